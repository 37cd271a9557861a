"""What a worker and its caller say to each other: messages over a socket, and progress in shared memory.

A message is JSON, followed by as many Arrow streams as its `tables` says.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import pyarrow as pa

OUT_OF_MEMORY = 77
"""The exit code of a worker that was refused memory, of which an earlier row may have taken too much."""

AT_REST, NO_ROW = -1, -2
"""What stands for the row in work while there is no request, and outside of single rows."""

PROGRESS_BYTES = 16


def send(connection: Connection, message: Mapping[str, Any], tables: Sequence[pa.Table] = ()) -> None:
    """Send a message with tables."""
    connection.send_bytes(json.dumps({**message, "tables": len(tables)}).encode())
    for table in tables:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        connection.send_bytes(sink.getvalue())


def read_tables(connection: Connection, message: Mapping[str, Any]) -> list[pa.Table]:
    """Read the tables that follow a message, each of one chunk."""
    tables = []
    for _ in range(message["tables"]):
        with pa.ipc.open_stream(connection.recv_bytes()) as reader:
            tables.append(reader.read_all().combine_chunks())
    return tables


class Progress:
    """Where a worker is, in memory that it shares with its caller: the row in work, and a count of calls."""

    def __init__(self, descriptor: int) -> None:
        self._cells = memoryview(mmap.mmap(descriptor, PROGRESS_BYTES)).cast("q")

    def row(self, number: int) -> None:
        """Say that a row of the batch begins."""
        self._cells[0] = number

    def call(self) -> None:
        """Say that something begins that is of no single row."""
        self._cells[0] = NO_ROW
        self._cells[1] += 1

    def rest(self) -> None:
        """Say that there is no request in work."""
        self._cells[0] = AT_REST

    def now(self) -> tuple[int, int]:
        """Return the row in work and the count of calls."""
        return self._cells[0], self._cells[1]
