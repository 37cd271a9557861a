"""An outcome as a file: how one process hands to another what a model makes of some changes.

The tables of a `Prepared` stand one after another as Arrow IPC streams; behind them stand an index of them
with all else that there is, as JSON, its length, and the format's mark. A file without its end is so never
taken for a whole one. It has its name once it is fsynced. Reading maps it: its cells are not copied.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from headrace.change import Counts
from headrace.prepared import Claims, Prepared, Reference, UniqueKey
from headrace.steps import Steps

_MARK = b"HRPREP01"
_END = struct.Struct("<Q8s")  # length of the index, mark
_ALIGNED = 64


class NotTheOutcome(Exception):
    """A file is not whole, or is not that of the part and the attempt that was asked for."""


class Lease(NamedTuple):
    """Who may hand in the outcome of a part: the attempt, counted from 1, that it was given to last."""

    part: str
    epoch: str
    attempt: int


def write_prepared(path: Path, prepared: Prepared, lease: Lease) -> None:
    """Write an outcome, durable when it has its name. Raises OSError."""
    making = path.with_suffix(".making")
    index: dict[str, Any] = {"lease": list(lease), **_told(prepared), "tables": {}}
    try:
        with making.open("wb") as file:
            for name, table in _tables(prepared).items():
                file.write(b"\0" * (-file.tell() % _ALIGNED))
                begin = file.tell()
                with pa.ipc.new_stream(file, table.schema) as writer:
                    writer.write_table(table)
                index["tables"][name] = [begin, file.tell() - begin]
            text = json.dumps(index).encode()
            file.write(text)
            file.write(_END.pack(len(text), _MARK))
            file.flush()
            os.fsync(file.fileno())
        making.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        making.unlink(missing_ok=True)
        raise


def read_prepared(path: Path, lease: Lease) -> Prepared:
    """Return the outcome in a file, which may be deleted from then on.

    Raises NotTheOutcome for a file that is half written, or of another part, run or attempt, and OSError for
    one that cannot be read.
    """
    try:
        with pa.memory_map(str(path)) as source:
            whole = source.read_buffer()
        index = _index_of(whole)
        told = Lease(*index["lease"])
        if told != lease:
            raise NotTheOutcome(f"{path.name} is of attempt {told.attempt} of part {told.part[:8]}")
        tables = {
            name: pa.ipc.open_stream(whole.slice(begin, size)).read_all()
            for name, (begin, size) in index["tables"].items()
        }
        return _made(index, tables)
    except (pa.ArrowException, struct.error, ValueError, LookupError, TypeError) as error:
        raise NotTheOutcome(f"{path.name} is no whole outcome: {type(error).__name__}") from error


def _index_of(whole: pa.Buffer) -> dict[str, Any]:
    size, mark = _END.unpack(whole.slice(max(whole.size - _END.size, 0)).to_pybytes())
    if mark != _MARK or size > whole.size - _END.size:
        raise ValueError("it has no end")
    text = whole.slice(whole.size - _END.size - size, size).to_pybytes()
    index: dict[str, Any] = json.loads(text)
    return index


def _tables(prepared: Prepared) -> dict[str, pa.Table]:
    found: dict[str, pa.Table | None] = {
        "removed": pa.table({"removed": prepared.removed}),
        "rows": prepared.rows,
        "records": prepared.records,
        "fewer": prepared.fewer,
        "deleted": prepared.deleted,
        "places": prepared.claims and prepared.claims.places,
        "steps": prepared.steps and prepared.steps.table,
    }
    return {name: table for name, table in found.items() if table is not None}


def _told(prepared: Prepared) -> dict[str, Any]:
    """Return what of an outcome is in no table."""
    claims = prepared.claims and {
        "model": prepared.claims.model,
        "keys": [list(key) for key in prepared.claims.keys],
        "references": [asdict(each) for each in prepared.claims.references],
    }
    return {
        "reset": prepared.reset,
        "counts": asdict(prepared.counts),
        "claims": claims,
        "makes": prepared.steps and prepared.steps.makes,
    }


def _made(index: Mapping[str, Any], tables: Mapping[str, pa.Table]) -> Prepared:
    claims = index["claims"] and Claims(
        index["claims"]["model"],
        tuple(UniqueKey(name, tuple(columns)) for name, columns in index["claims"]["keys"]),
        tables["places"],
        tuple(_reference(each) for each in index["claims"]["references"]),
    )
    return Prepared(
        reset=index["reset"],
        removed=tables["removed"]["removed"].combine_chunks(),
        rows=tables["rows"],
        records=tables["records"],
        counts=Counts(**index["counts"]),
        fewer=tables.get("fewer"),
        claims=claims,
        deleted=tables.get("deleted"),
        steps=index["makes"] and Steps(index["makes"], tables["steps"]),
    )


def _reference(told: Mapping[str, Any]) -> Reference:
    cells: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
    return Reference(**cells)
