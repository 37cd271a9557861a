"""Changes as Parquet: a file per table, written in pieces of a bounded size."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.change import TableId
from headrace.errors import UserError

_TABLE_BYTES, _ALL_BYTES = 8 << 20, 128 << 20
"""What is kept back of one table, and of all, until it is a row group worth writing."""


class ParquetFiles:
    """A folder of files, `schema.table.parquet` each; they get their names once all is written."""

    def __init__(self, folder: Path, schema_of: Callable[[TableId], pa.Schema]) -> None:
        """`schema_of` gives the columns of a table's file. Raises UserError when files are there already."""
        self._folder = folder
        self._schema_of = schema_of
        self._writers: dict[TableId, tuple[Path, pq.ParquetWriter]] = {}
        self._waiting: dict[TableId, list[pa.RecordBatch]] = {}
        self._sizes: dict[TableId, int] = {}
        self.rows: dict[TableId, int] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror}.", "Name another folder.") from error
        if any(folder.glob("*.parquet")):
            raise UserError(f"{folder} holds Parquet files already.", "Name another folder, or empty it.")

    def __enter__(self) -> ParquetFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            for table in list(self._waiting):
                self._write(table)
        for path, writer in self._writers.values():
            writer.close()
            if kind is None:
                path.rename(path.with_suffix(""))
            else:
                path.unlink()

    def add(self, table: TableId, batch: pa.RecordBatch) -> None:
        """Append rows, of whichever of the table's shapes."""
        if not batch.num_rows:
            return
        self.rows[table] = self.rows.get(table, 0) + batch.num_rows
        self._waiting.setdefault(table, []).append(batch)
        self._sizes[table] = self._sizes.get(table, 0) + batch.nbytes
        if self._sizes[table] > _TABLE_BYTES:
            self._write(table)
        elif sum(self._sizes.values()) > _ALL_BYTES:
            self._write(max(self._sizes, key=self._sizes.__getitem__))

    def _write(self, table: TableId) -> None:
        if table not in self._writers:
            name = re.sub(r"[^\w.-]", lambda found: quote(found[0], safe=""), str(table))
            path = self._folder / f"{name}.parquet.part"
            self._writers[table] = path, pq.ParquetWriter(path, self._schema_of(table), compression="zstd")
        path, writer = self._writers[table]
        parts = [_widened(batch, writer.schema) for batch in self._waiting.pop(table)]
        self._sizes.pop(table)
        writer.write_table(pa.Table.from_batches(parts).combine_chunks())


def _widened(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return a batch with just the columns of `schema`; those that it lacks are null."""
    present = set(batch.schema.names)
    cells = [
        batch[field.name] if field.name in present else pa.nulls(batch.num_rows, field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(cells, schema=schema)
