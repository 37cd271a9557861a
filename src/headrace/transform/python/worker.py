"""The process in which a Python model runs: it answers one request after another until its caller is gone.

    python -m headrace.transform.python.worker SOCKET LIFE PROGRESS

Three descriptors: a socket of messages, a pipe that ends when the caller does, and shared memory of two
integers, the row in work and a count of calls. A request and its answer are JSON, each followed by as many
Arrow streams as its `tables` says. What the model prints goes where descriptors 1 and 2 go.
"""

from __future__ import annotations

import json
import linecache
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa

from headrace.lifeline import end_with
from headrace.transform.python.function import Broken, Function, Made, find_function
from headrace.transform.python.outputs import Unfit, name_of
from headrace.transform.python.wire import OUT_OF_MEMORY, Progress, read_tables, send

NAME = "headrace-model"
"""What the process is called."""

_MODELS = "models"
_IDLE_SECONDS = 60.0
"""How long a worker without work stays."""


def main(arguments: Sequence[str]) -> None:
    """Answer requests until the caller closes the socket, or none comes for a while."""
    channel, life, shared = map(int, arguments)
    end_with(life)
    with suppress(OSError):
        Path("/proc/self/comm").write_text(NAME)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold cells
    progress = Progress(shared)
    connection = Connection(channel)
    worker = _Worker(progress)
    try:
        while connection.poll(_IDLE_SECONDS):
            request = json.loads(connection.recv_bytes())
            progress.call()
            batches = [table.to_batches()[0] for table in read_tables(connection, request)]
            send(connection, *worker.answer(request, batches))
            progress.rest()
    except EOFError:
        return
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


class _Worker:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._function: Function | None = None

    def answer(
        self, request: Mapping[str, Any], batches: Sequence[pa.RecordBatch]
    ) -> tuple[dict[str, Any], list[pa.Table]]:
        """Answer a request; what is wrong with the model itself is in `broken`."""
        try:
            if request["do"] == "load":
                self._function = _load(request["file"], request["code"], request["helpers"])
                return _described(self._function), []
            assert self._function is not None
            if request["do"] == "bind":
                self._function.bind(request["types"])
                limit_memory(request["memory"])
                return {}, []
            made = self._function.make(batches[0], self._progress)
            return _outcome(made)
        except (Broken, Unfit) as error:
            return {"broken": str(error)}, []


def _described(function: Function) -> dict[str, Any]:
    description = asdict(function.describe())
    del description["definition"]["contract"]  # its rules are among the columns'
    return description


def _outcome(made: Made) -> tuple[dict[str, Any], list[pa.Table]]:
    return {"faults": made.faults}, [table for table in made.tables if table.num_rows]


# ------------------------------------------------------------------------------ the model's file


class _Helpers(MetaPathFinder, Loader):
    """Imports the helper modules of a project, of the texts that belong to the model's version."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        """Return the spec of a helper."""
        return ModuleSpec(name, self) if name in self._texts else None

    def exec_module(self, module: ModuleType) -> None:
        """Run a helper's text."""
        _run(f"{_MODELS}/{module.__name__}.py", self._texts[module.__name__], module)


def _load(file: str, code: str, helpers: Mapping[str, str]) -> Function:
    """Run a model's file. Raises Unfit, naming file and line, for whatever it raises."""
    for helper in helpers:  # whatever this process has imported by now
        sys.modules.pop(helper, None)
    sys.meta_path.insert(0, _Helpers(helpers))
    name = file.rpartition("/")[2].partition(".")[0]
    module = ModuleType(f"{_MODELS}.{name}")  # not `json`, say, for models/json.py
    module.__file__ = file
    module.__dict__["__helpers__"] = [f"{_MODELS}/{helper}.py" for helper in helpers]
    sys.modules[module.__name__] = module
    files = {file, *module.__dict__["__helpers__"]}
    try:
        _run(file, code, module)
    except MemoryError:
        raise
    except SyntaxError as error:
        raise Unfit(f"{error.filename or file}:{error.lineno or 1}: {error.msg}") from error
    except BaseException as error:
        raise Unfit(f"{_where(error, files) or file}: {name_of(type(error))}: {error}") from error
    try:
        return find_function(module)
    except Unfit as error:
        raise Unfit(f"{file}: {error}") from error


def _run(file: str, code: str, module: ModuleType) -> None:
    # Where a traceback looks for the lines of a file: those that run, whatever stands on the disk by now.
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    exec(compile(code, file, "exec"), module.__dict__)


def _where(error: BaseException, files: set[str]) -> str:
    place, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in files:
            place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


# --------------------------------------------------------------------------------- the process


def limit_memory(allowed: int) -> None:
    """Let the process take so many bytes more than it has.

    RLIMIT_DATA counts what is private and writable. The address space, of which libraries reserve what they
    never touch, says nothing; and looking at the resident size from outside is late by what a process takes
    between two looks.
    """
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
        held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (held + allowed, held + allowed))


if __name__ == "__main__":
    main(sys.argv[1:])
