"""Headrace: every change of an operational database into an analytical store, and none lost."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.definition import Row as Row
    from headrace.definition import contract as contract
    from headrace.definition import model as model
    from headrace.raw.project import open_project as open_project
    from headrace.reading import open_log as open_log

# Before Arrow is loaded: some of it, such as compression, takes no pool but this. See `headrace.memory`.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

__version__ = "0.1.0"
__all__ = ["Row", "__version__", "contract", "model", "open_log", "open_project"]

_WHERE = {
    "Row": "headrace.definition",
    "contract": "headrace.definition",
    "model": "headrace.definition",
    "open_log": "headrace.reading",
    "open_project": "headrace.raw.project",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
