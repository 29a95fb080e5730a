"""Inference inside torch."""
