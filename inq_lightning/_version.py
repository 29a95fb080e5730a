"""The version of the package, read by all who name it."""

__version__ = "0.1.0"
