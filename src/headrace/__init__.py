"""Headrace: every change of an operational database into an analytical store, and none lost."""

import os

# Before Arrow is loaded: some of it, such as compression, takes no pool but this. See `headrace.memory`.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

__version__ = "0.1.0"
__all__ = ["__version__"]
