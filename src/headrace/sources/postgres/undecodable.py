r"""Cells whose bytes are not UTF-8, kept without loss.

Postgres hands them out where nobody checks what text is: from a database of encoding SQL_ASCII, and
from type "char" in Postgres 14. Everything behind the source takes cells for UTF-8, so such a cell
becomes U+0000, `\x` and its bytes in hex: `\0\xe4fc`. No text of Postgres holds U+0000, so the escape
can neither meet a value nor be taken for one. `original` is the way back.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from headrace.alarms import tell
from headrace.change import TableId

MARK = "\0\\x"
"""What an escaped cell begins with."""


def text_of(data: bytes) -> str:
    """Return bytes as text, escaped where they are not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return MARK + data.hex()


def original(cell: str) -> bytes:
    """Return the bytes that a cell had at the source."""
    return bytes.fromhex(cell.removeprefix(MARK)) if cell.startswith(MARK) else cell.encode()


class Undecodable:
    """Escapes what is not UTF-8, and says so once for each column."""

    def __init__(self) -> None:
        self._said: set[tuple[TableId, str]] = set()

    def escape(self, table: TableId, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return the batch with every cell of its string columns, and every value of its maps, as UTF-8.

        It is the same batch where nothing was to be done, which costs a look at each byte.
        """
        changed = False
        columns = []
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            kept = _as_utf8(column)
            if kept is not column:
                changed = True
                self._say(table, name)
            columns.append(kept)
        return pa.RecordBatch.from_arrays(columns, schema=batch.schema) if changed else batch

    def _say(self, table: TableId, column: str) -> None:
        if (table, column) in self._said:
            return
        self._said.add((table, column))
        tell(
            "NOT UTF-8: column %s of %s holds bytes that are no UTF-8. They are kept: such a cell is U+0000, "
            "\\x and its bytes in hex. A model can tell it by starts_with(cell, chr(0)).",
            column,
            table,
        )


def _as_utf8(column: pa.Array) -> pa.Array:
    if pa.types.is_map(column.type):
        if _is_utf8(column.items):
            return column
        rows = column.cast(pa.map_(pa.string(), pa.binary())).to_pylist()
        return pa.array([row and [(name, _text(cell)) for name, cell in row] for row in rows], column.type)
    if not pa.types.is_string(column.type) or _is_utf8(column):
        return column
    return pa.array([_text(cell) for cell in column.cast(pa.binary()).to_pylist()], pa.string())


def _text(cell: bytes | None) -> str | None:
    return None if cell is None else text_of(cell)


def _is_utf8(column: pa.Array) -> bool:
    text = column.buffers()[2]
    if text is None or text.size == 0 or np.frombuffer(text, np.int8).min() >= 0:
        return True
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True
