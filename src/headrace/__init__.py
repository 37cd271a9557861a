"""Headrace: every change of an operational database into an analytical store, and none lost."""

__version__ = "0.1.0"
__all__ = ["__version__"]
