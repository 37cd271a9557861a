"""What a `rows` entry holds: an Arrow IPC stream, LZ4-compressed.

Columns, in this order: `_op` string, `_commit` int64, `_ordinal` int64, `_committed_at` int64
(microseconds), `_txid` int64, then the source's columns as strings, then only where a row needs
them `_unchanged` list<string> (cells that the source did not send) and `_before` map<string, string>
(the old row's known cells).
"""

from __future__ import annotations

from io import BytesIO

import pyarrow as pa

HEAD = ("_op", "_commit", "_ordinal", "_committed_at", "_txid")
UNCHANGED = pa.list_(pa.string())
BEFORE = pa.map_(pa.string(), pa.string())

_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


_LARGE = 8 << 20
"""Bytes from which a batch is written where growing and handing over cost no copy of it."""


def encode_rows(batch: pa.RecordBatch) -> bytes:
    """Write a batch as a payload."""
    if batch.nbytes < _LARGE:
        sink = pa.BufferOutputStream()
        _write(sink, batch)
        return bytes(memoryview(sink.getvalue()))
    file = BytesIO()
    _write(pa.PythonFile(file, "w"), batch)
    return file.getvalue()


def _write(sink: pa.NativeFile, batch: pa.RecordBatch) -> None:
    with pa.ipc.new_stream(sink, batch.schema, options=_OPTIONS) as writer:
        writer.write_batch(batch)


def decode_rows(payload: bytes) -> pa.RecordBatch:
    """Read a payload back; raises pyarrow.ArrowInvalid when it is none."""
    return pa.ipc.open_stream(payload).read_next_batch()
