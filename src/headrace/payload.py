"""What a `rows` entry holds: an Arrow IPC stream, LZ4-compressed.

Columns, in this order: `_op` string, `_commit` int64, `_ordinal` int64, `_committed_at` int64
(microseconds), `_txid` int64, `_lsn` int64 (where in the source's WAL the change stands; of a copied row,
its `_commit`), then the source's columns as strings, then only where a row needs them `_unchanged`
list<string> (cells that the source did not send) and `_before` map<string, string> (the old row's known
cells).

In the stream `_lsn` is its first value and then each one's difference from the one before: a byte a row
where the values would take five. `decode_rows` gives the values.

An `undecodable` entry holds messages of the source that could not be decoded, in the same way: with the
columns of `UNDECODABLE`.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pyarrow as pa

HEAD = ("_op", "_commit", "_ordinal", "_committed_at", "_txid", "_lsn")
UNCHANGED = pa.list_(pa.string())
BEFORE = pa.map_(pa.string(), pa.string())

UNDECODABLE = pa.schema(
    {
        "_op": pa.string(),
        "_commit": pa.int64(),
        "_ordinal": pa.int64(),
        "_committed_at": pa.int64(),
        "_txid": pa.int64(),
        "_lsn": pa.int64(),
        "kind": pa.string(),
        "why": pa.string(),
        "message": pa.binary(),
    }
)
"""The columns of an `undecodable` entry: `_op` is null where the message is no change, `kind` is the
message's first byte, `why` says what is wrong with it, without its content, `message` are its bytes."""

_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")
_LSN = HEAD.index("_lsn")


_LARGE = 8 << 20
"""Bytes from which a batch is written where growing and handing over cost no copy of it."""


def encode_rows(batch: pa.RecordBatch) -> bytes:
    """Write a batch as a payload."""
    lsns = batch.column(_LSN).to_numpy()
    return write_batch(batch.set_column(_LSN, "_lsn", pa.array(np.diff(lsns, prepend=0))))


def decode_rows(payload: bytes) -> pa.RecordBatch:
    """Read a payload back; raises pyarrow.ArrowInvalid when it is none."""
    batch = read_batch(payload)
    steps = batch.column(_LSN).to_numpy()
    return batch.set_column(_LSN, "_lsn", pa.array(np.cumsum(steps)))


def write_batch(batch: pa.RecordBatch) -> bytes:
    """Write any batch, as it is, as an Arrow IPC stream, LZ4-compressed."""
    if batch.nbytes < _LARGE:
        sink = pa.BufferOutputStream()
        _write(sink, batch)
        return bytes(memoryview(sink.getvalue()))
    file = BytesIO()
    _write(pa.PythonFile(file, "w"), batch)
    return file.getvalue()


def read_batch(data: bytes) -> pa.RecordBatch:
    """Read back what `write_batch` wrote; raises pyarrow.ArrowInvalid when it is none."""
    return pa.ipc.open_stream(data).read_next_batch()


def _write(sink: pa.NativeFile, batch: pa.RecordBatch) -> None:
    with pa.ipc.new_stream(sink, batch.schema, options=_OPTIONS) as writer:
        writer.write_batch(batch)
