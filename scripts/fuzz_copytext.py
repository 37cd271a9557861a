#!/usr/bin/env python3
"""Feeds the reader of COPY's text format with any bytes; what it reads is compared with a slow, plain one's.

    fuzz_copytext.py fuzz FOLDER [OPTION]    fuzz; libFuzzer's options, such as -max_total_time=600

An input is two bytes (columns, size of a batch), then rows, each behind its length in two bytes. It needs
atheris, and a build for it, as fuzz_decoder.py says.
"""

from __future__ import annotations

import re
import struct
import sys

from headrace.errors import MalformedMessage
from headrace.sources.postgres.copytext import TextReader

LENGTH = struct.Struct(">H")
ESCAPED = re.compile(rb"\\(.)", re.DOTALL)
MEANT = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}


def fields_of(row: bytes, width: int) -> list[bytes | None] | None:
    """Return the fields of a row, None if it is malformed."""
    if not row.endswith(b"\n"):
        return None
    cut = [b""]
    for token in re.findall(rb"\\.|[^\\]|\\\Z", row[:-1], re.DOTALL):
        if token in {b"\n", b"\\"}:  # bare in the middle; or the last newline is escaped
            return None
        if token == b"\t":
            cut.append(b"")
        else:
            cut[-1] += token
    if len(cut) != width:
        return None
    return [
        None if field == rb"\N" else ESCAPED.sub(lambda found: MEANT.get(found[1], found[1]), field)
        for field in cut
    ]


def run(data: bytes) -> None:
    """Read an input both ways; raises where they differ."""
    width, limit, at = data[0] % 6 + 1 if data else 1, data[1] + 1 if len(data) > 1 else 1, 2
    reader = TextReader([f"c{i}" for i in range(width)], limit)
    expected, found = [], []
    while at + LENGTH.size <= len(data):
        (size,) = LENGTH.unpack_from(data, at)
        row = data[at + LENGTH.size : at + LENGTH.size + size]
        at += LENGTH.size + size
        fields = fields_of(row, width)
        try:
            full = reader.push(row)
        except MalformedMessage:
            assert fields is None, f"refused {row!r}"
            return
        assert fields is not None, f"took {row!r}"
        expected.append(fields)
        if full:
            found += taken(reader)
    found += taken(reader)
    assert found == expected


def taken(reader: TextReader) -> list[list[bytes | None]]:
    """Take all there is, as rows of bytes."""
    batch = reader.take()
    if batch is None:
        return []
    columns = [column.cast("binary").to_pylist() for column in batch.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] != ["fuzz"] or len(sys.argv) < 3:
        sys.exit(__doc__)
    import atheris

    _, _, folder, *options = sys.argv
    atheris.Setup([sys.argv[0], *options, "-max_len=4096", folder], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
