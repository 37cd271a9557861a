"""`headrace quarantine export`: records as a file, written as they are read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from headrace.cli.quarantine import Status
from headrace.cli.records import SHOWN_AWAITED, SHOWN_KEY, Chosen
from headrace.config import load_project
from headrace.errors import UserError
from headrace.server import scan

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa

Format = Literal["parquet", "csv", "json"]


def export(
    *,
    format: Format,  # noqa: A002 - what users type
    output: Path,
    status: Status = "all",
    model: str | None = None,
    issue: str | None = None,
    where: str | None = None,
    project: Annotated[Path, Parameter(help="The project's folder.")] = Path(),
) -> None:
    """Write records, with every column of headrace.quarantine, to a file; by default all of them. What is
    masked is so there, too.

    They are written as they are read, however many; the file has its name once it is whole.

    Parameters
    ----------
    format
        parquet; csv, with a header; json, an object per line.
    output
        The file. One that is there is replaced.
    status
        `open` is quarantined, waiting or blocked.
    model
        Only records of this model.
    issue
        Only records of this cause.
    where
        Only records that this condition over headrace.quarantine chooses.
    """
    wanted = Chosen(status, model, issue, where=where).condition
    query = (
        f"SELECT CAST(id AS VARCHAR) AS shown_id, {SHOWN_KEY} AS shown_key, "
        f"{SHOWN_AWAITED} AS shown_waiting_on, * FROM headrace.quarantine "
        f'WHERE {wanted} ORDER BY source, model, "offset", ordinal'
    )
    making = output.with_name(f".{output.name}.part")
    count = 0
    try:
        with scan(load_project(project), [query]) as results:
            schema, batches = next(results)
            names = [name for name in schema.names if f"shown_{name}" not in schema.names]
            with _writer(format, making, _renamed(schema, names)) as write:
                for batch in batches:
                    write(_as(batch, names))
                    count += batch.num_rows
            next(results, None)
        making.replace(output)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}.", "Name another file.") from error
    finally:
        making.unlink(missing_ok=True)
    print(f"{count} records in {output}", file=sys.stderr)


def _renamed(schema: pa.Schema, names: list[str]) -> pa.Schema:
    import pyarrow as pa

    fields = [schema.field(name) for name in names]
    return pa.schema([field.with_name(field.name.removeprefix("shown_")) for field in fields])


def _as(batch: pa.RecordBatch, names: list[str]) -> pa.RecordBatch:
    return batch.select(names).rename_columns([name.removeprefix("shown_") for name in names])


def _writer(
    format: Format,  # noqa: A002
    path: Path,
    schema: pa.Schema,
) -> AbstractContextManager[Callable[[pa.RecordBatch], None]]:
    return {"parquet": _parquet, "csv": _csv, "json": _json}[format](path, schema)


@contextmanager
def _parquet(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.RecordBatch], None]]:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        yield writer.write_batch


@contextmanager
def _csv(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.RecordBatch], None]]:
    from pyarrow.csv import CSVWriter

    with CSVWriter(path, schema) as writer:
        yield writer.write_batch


@contextmanager
def _json(path: Path, _: pa.Schema) -> Iterator[Callable[[pa.RecordBatch], None]]:
    from headrace.cells import json_of

    file: IO[str]
    with path.open("w", encoding="utf-8") as file:
        yield lambda batch: file.writelines(f"{json_of(row)}\n" for row in batch.to_pylist())
