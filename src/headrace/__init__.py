"""Headrace: every change of an operational database into an analytical store, and none lost."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.raw.project import open_project as open_project
    from headrace.reading import open_log as open_log

# Before Arrow is loaded: some of it, such as compression, takes no pool but this. See `headrace.memory`.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

__version__ = "0.1.0"
__all__ = ["__version__", "open_log", "open_project"]


def __getattr__(name: str) -> Any:
    if name == "open_log":
        from headrace.reading import open_log

        return open_log
    if name == "open_project":
        from headrace.raw.project import open_project

        return open_project
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
