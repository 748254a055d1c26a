"""The version of this package, as written into model cards and tracked runs."""

__version__ = "0.1.0"
