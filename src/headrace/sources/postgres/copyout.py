"""Reading a query's rows with COPY … TO STDOUT, as Arrow batches of text.

The fields are what each type's output function gives, which is what the stream sends. They are read
from libpq without a Python object for each row, where psycopg's libpq can be called directly; elsewhere
through psycopg, which is slower.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Generator, Sequence
from functools import cache
from typing import NamedTuple

import psycopg
import pyarrow as pa
from psycopg import pq
from psycopg.errors import error_from_result

from headrace.sources.postgres.catalog import Connection
from headrace.sources.postgres.copytext import TextReader

BATCH_BYTES = 4 << 20
_LOST = -2  # what PQgetCopyData says of an error; -1 stands for the end


class _Libpq(NamedTuple):
    """Addresses of functions."""

    get_copy_data: int
    free_memory: int


@cache
def libpq() -> _Libpq | None:
    """Return the functions of the libpq that psycopg's connections are made with, None if it is not known.

    A process may hold several, and one must not touch the connections of another. Looked up in psycopg's
    native module, a symbol is found in the libpq that this module is linked with.
    """
    module = sys.modules[pq.PGconn.__module__]
    try:
        native = ctypes.CDLL(str(module.__file__))
        if native.PQlibVersion() != pq.version():
            return None
        addresses = (
            ctypes.cast(function, ctypes.c_void_p).value
            for function in (native.PQgetCopyData, native.PQfreemem)
        )
        return _Libpq(*(address or 0 for address in addresses))
    except (OSError, AttributeError):  # psycopg in plain Python, or linked in another way
        return None


def copy_out(
    db: Connection, query: str, names: Sequence[str], max_bytes: int = BATCH_BYTES
) -> Generator[pa.RecordBatch]:
    """Yield the rows of a query, whose columns are called `names` then, in batches of about `max_bytes`;
    a row longer than that is the last of its batch. Cells are strings that need not be UTF-8.

    `db` is the caller's alone meanwhile; where the COPY is not read to its end, it is closed. Raises
    psycopg.Error, with the SQLSTATE that the server gave, and MalformedMessage.
    """
    begun = db.pgconn.exec_(f"COPY ({query}) TO STDOUT".encode())
    if begun.status != pq.ExecStatus.COPY_OUT:
        raise _refusal(begun)
    try:
        reader = TextReader(names, max_bytes)
        more = True
        while more:
            more = _fill(db, reader)
            if (batch := reader.take()) is not None:
                yield batch
            del batch  # else it would stay while the next one is read
    finally:
        if db.pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
            db.close()


def _fill(db: Connection, reader: TextReader) -> bool:
    """Read a batch; return whether more may come. Raises the error that the COPY ended with."""
    direct = libpq()
    if direct is None:
        full, said = False, 0
        while not full and said >= 0:
            said, row = db.pgconn.get_copy_data(0)
            if said > 0:
                full = reader.push(row)
    else:
        address: int | None = getattr(db.pgconn, "pgconn_ptr", None)  # which psycopg's stubs do not name
        if address is None:
            raise _lost(db)
        full, said = reader.read(address, *direct)
    if full:
        return True
    if said == _LOST:
        raise _lost(db)
    failed = None
    while (result := db.pgconn.get_result()) is not None:
        if result.status != pq.ExecStatus.COMMAND_OK:
            failed = result
    if failed is not None:
        raise _refusal(failed)
    return False


def _refusal(result: pq.abc.PGresult) -> psycopg.Error:
    if result.error_field(pq.DiagnosticField.SQLSTATE):
        return error_from_result(result)
    return psycopg.OperationalError(result.get_error_message())  # libpq's own: the connection is lost


def _lost(db: Connection) -> psycopg.OperationalError:
    return psycopg.OperationalError(db.pgconn.get_error_message() or "the connection is closed")
