"""What the suite of a destination needs: how to make one, and slices to apply to it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from headrace.cells import rows_of
from headrace.change import Column, Mark, Position, TableId, TableSchema
from headrace.payload import BEFORE, UNCHANGED
from headrace.protocols import Destination, Part, Slice
from headrace.transform.model import RowModel, bind, mirror
from headrace.transform.sql import read_model

LOG = "l" * 32
TABLE = TableId("public", "t")

Cells = Mapping[str, str | None]


class Destinations(Protocol):
    """What the suite needs to know of a kind of destination."""

    steps: Sequence[tuple[str, bool]]
    """The failpoints that an apply passes, and whether its slice is there behind each."""

    def make(self) -> Destination:
        """Return a new, empty destination, closed by its maker."""
        ...

    def reopen(self, destination: Destination) -> Destination:
        """Return what another process sees of a destination."""
        ...

    def code(self, destination: Destination) -> str:
        """Return Python that opens a destination in another process as `destination`."""
        ...

    def alter(self, destination: Destination, statement: str) -> None:
        """Run a statement in the destination, as somebody does who works beside Headrace."""
        ...


def shape(*columns: tuple[str, str], key: Sequence[str] = ("id",)) -> TableSchema:
    """Return the shape of a table with a bigint `id` and these columns (name, type)."""
    return TableSchema(TABLE, (Column("id", "bigint"), *(Column(*column) for column in columns)), tuple(key))


PLAIN = shape(("v", "text"))
MODEL = mirror("shop", PLAIN)
NUMBERS = mirror("shop", shape(("v", "integer")))
"""A model under which `v` may be bad."""


def limited(destination: Destination, model: RowModel) -> RowModel:
    """Return a model as a pipeline runs it on a destination."""
    return model.limited(destination.limits(model))


def model_of(name: str, text: str, schema: TableSchema = PLAIN) -> RowModel:
    """Bind the text of a model file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.sql"
        path.write_text(text)
        return bind(read_model(path), schema)


def row(key: int, value: str | None = "a", **more: str | None) -> Cells:
    """Return the cells of a change of the row `key`; `_op` is its operation, else `c`."""
    return {"id": str(key), "v": value, **more}


def staged(model: RowModel, rows: Sequence[Cells], after: int) -> pa.Table:
    """Return changes as staging gives them; each stands at a commit and an offset of its own."""
    count = len(rows)
    numbers = pa.array(range(after + 1, after + count + 1), pa.int64())
    names = [column.name for column in model.schema.columns]
    return pa.table(
        {name: pa.array([cells.get(name) for cells in rows], pa.string()) for name in names}
        | {
            "_op": pa.array([cells.get("_op", "c") for cells in rows], pa.string()),
            "_epoch": pa.array([0] * count, pa.int64()),
            "_commit": numbers,
            "_ordinal": numbers,
            "_offset": numbers,
            "_committed_at": numbers,
            "_txid": numbers,
            "_unchanged": pa.nulls(count, UNCHANGED),
            "_before": pa.nulls(count, BEFORE),
        }
    )


def slice_of(after: int, *parts: tuple[RowModel, Sequence[Cells]], log: str = LOG, size: int = 1) -> Slice:
    """Return the slice `(after, after + size]` of the source `shop`, with one part per model."""
    through = after + size
    return Slice(
        "shop",
        Mark(log, after, f"h{after}"),
        Mark(log, through, f"h{through}"),
        Position(0, through, 1),
        0,
        tuple(Part(model, model.prepare(staged(model, cells, after)), True) for model, cells in parts),
    )


def table(destination: Destination, query: str = "") -> list[tuple[Any, ...]]:
    """Return the rows of a query, by default those of `MODEL`."""
    target = destination.table_of(MODEL.name)
    (made,) = destination.read([query or f"SELECT id, v FROM {target} ORDER BY id"])
    return list(rows_of(made))
