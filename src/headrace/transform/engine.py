"""The DuckDB that prepares: one for each thread, with the settings that isolation needs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import duckdb

_local = threading.local()


def engine() -> duckdb.DuckDBPyConnection:
    """Return this thread's DuckDB for prepare, with the settings that isolation needs.

    `common_subexpressions` is off: DuckDB 2.0.0 otherwise lifts a cast that occurs twice out of its TRY,
    and one bad row fails the query.
    """
    connection: duckdb.DuckDBPyConnection | None = getattr(_local, "connection", None)
    if connection is None:
        connection = duckdb.connect()
        connection.execute("SET disabled_optimizers = 'common_subexpressions'")
        connection.execute("SET preserve_insertion_order = true")
        connection.execute("SET enable_progress_bar = false")
        # What one evaluation frees goes back before the next: the default keeps up to half a gigabyte.
        connection.execute("SET allocator_flush_threshold = '16MB'")
        connection.execute("SET allocator_bulk_deallocation_flush_threshold = '16MB'")
        _local.connection = connection
    cursor = connection.cursor()
    cursor.execute("SET TimeZone = 'UTC'")  # a setting of the session: a cursor is one of its own
    return cursor


@contextmanager
def within(db: duckdb.DuckDBPyConnection, seconds: float) -> Iterator[None]:
    """Interrupt a query that takes longer."""
    timer = threading.Timer(seconds, db.interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # else it might meet the next query
