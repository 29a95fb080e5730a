"""The algorithm: torch only, no trainer."""
