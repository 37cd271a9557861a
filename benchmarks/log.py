"""The log by itself, without a source: how fast rows become durable in it, and how fast they come out again.

- sqlite_append: batches of 10,000 rows, appended one by one, each durable before the next; the payloads are
  ready.
- sqlite_read: all of them read, their hashes compared, and decoded, on one core.

The rivals do no more than the disk must: write and fdatasync the same bytes, read the same bytes and decode
them. Ours and the rival take turns with each batch or piece; files are in the page cache.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the reader: one core, also for the threads of what is imported
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import pyarrow as pa
from rig import TIMEOUT, Case

from headrace.change import Entry, Position, TableId
from headrace.keyfilter import key_filter
from headrace.log.proof import verify
from headrace.log.sqlite import SQLiteLog
from headrace.payload import decode_rows, encode_rows

CASES = ("sqlite_append", "sqlite_read")
BATCH = 10_000
TABLE = TableId("public", "orders")
_READ_BYTES = 16 << 20


def run(*, quick: bool, case: str | None = None) -> dict[str, Any]:
    rows, runs = (200_000, 2) if quick else (2_000_000, 7)
    cases: dict[str, Case] = {}
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as temporary:
        folder = Path(temporary)
        batches = [_batch(n) for n in range(rows // BATCH)]
        entries = [_entry(n, batch) for n, batch in enumerate(batches)]
        if case in (None, "sqlite_append"):
            cases["sqlite_append"] = _append(folder, batches, entries, runs)
        if case in (None, "sqlite_read"):
            cases["sqlite_read"] = _read(folder, entries, runs)
    return {"unit": "rows/s", "cases": cases}


def _batch(number: int) -> pa.RecordBatch:
    """Ten thousand inserted rows; the cells of each are 100 bytes of text, a third of them random."""
    made = random.Random(number)
    ids = range(number * BATCH, (number + 1) * BATCH)
    columns = {
        "_op": pa.array(["c"] * BATCH),
        "_commit": pa.array([number + 1] * BATCH, pa.int64()),
        "_ordinal": pa.array(range(1, BATCH + 1), pa.int64()),
        "_committed_at": pa.array([1_700_000_000_000_000 + number] * BATCH, pa.int64()),
        "_txid": pa.array([number + 700] * BATCH, pa.int64()),
        "_lsn": pa.array([(i + 1) * 120 for i in ids], pa.int64()),
        "id": pa.array([f"{i:010d}" for i in ids]),
        "customer": pa.array([f"{made.randrange(100_000):06d}" for _ in ids]),
        "status": pa.array([("paid", "sent", "open")[i % 3] for i in ids]),
        "amount": pa.array([f"{made.randrange(10_000_000) / 100:011.2f}" for _ in ids]),
        "token": pa.array([made.randbytes(12).hex() for _ in ids]),
        "note": pa.array([f"note for order number {i:010d}" for i in ids]),
        "placed": pa.array(["2026-11-28 10:00"[:14]] * BATCH),
    }
    return pa.RecordBatch.from_pydict(columns)


def _entry(number: int, batch: pa.RecordBatch) -> Entry:
    first, last = Position(0, number + 1, 1), Position(0, number + 1, BATCH)
    at = 1_700_000_000_000_000 + number
    txids = (number + 700, number + 700)
    return Entry(
        "rows", TABLE, first, last, at, BATCH, 1, encode_rows(batch), txids, filter=key_filter(batch, ("id",))
    )


def _append(folder: Path, batches: list[pa.RecordBatch], entries: list[Entry], runs: int) -> Case:
    measured = []
    for number in range(runs):
        measured.append(_append_once(folder / str(number), entries))
        begin = time.perf_counter()
        with _new_log(folder / f"{number}.encoding") as log:
            for n, batch in enumerate(batches):
                log.append([_entry(n, batch)])
        measured[-1]["with_encoding"] = len(batches) * BATCH / (time.perf_counter() - begin)
    size = sum(len(entry.payload) for entry in entries)
    told = {
        "rows": len(entries) * BATCH,
        "bytes": size,
        "bytes_per_row": round(size / len(entries) / BATCH, 1),
    }
    return "write and fdatasync of the same bytes", measured, told


def _append_once(folder: Path, entries: list[Entry]) -> dict[str, float]:
    """Let the contestants take turns with each batch, so that a disk's moods meet both."""
    took = {"ours": 0.0, "rival": 0.0}
    with _new_log(folder) as log:
        file = os.open(folder / "bare", os.O_WRONLY | os.O_CREAT)

        def bare(entry: Entry) -> None:
            os.write(file, entry.payload)
            os.fdatasync(file)

        for number, entry in enumerate(entries):
            turn = [("ours", lambda entry: log.append([entry])), ("rival", bare)]
            for name, append in turn if number % 2 else reversed(turn):
                begin = time.perf_counter()
                append(entry)
                took[name] += time.perf_counter() - begin
        os.close(file)
        if log.backlog(0)[0] != len(entries) * BATCH:
            raise RuntimeError("the log does not hold what was appended")
    return {name: len(entries) * BATCH / seconds for name, seconds in took.items()}


@contextmanager
def _new_log(folder: Path) -> Iterator[SQLiteLog]:
    """Lend a log in a new folder, which goes afterwards."""
    folder.mkdir()
    log = SQLiteLog(folder / "log.db")
    yield log
    log.close()
    shutil.rmtree(folder)


def _read(folder: Path, entries: list[Entry], runs: int) -> Case:
    with _new_log(folder / "read") as log:
        for entry in entries:
            log.append([entry])
        measured = [_reader(folder / "read") for _ in range(runs)]
    speed = statistics.median(run["verify_mb_per_s"] for run in measured)
    told = {"rows": len(entries) * BATCH, "verify_mb_per_s": round(speed)}
    return "read of the same bytes, and decode", measured, told


def _reader(folder: Path) -> dict[str, float]:
    """Measure in a process of its own, on one core."""
    done = subprocess.run(
        [sys.executable, __file__, folder], stdout=subprocess.PIPE, check=True, timeout=TIMEOUT
    )
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _read_here(folder: Path) -> dict[str, float]:
    """Let the contestants take turns with each piece of 16 MB."""
    log = SQLiteLog(folder / "log.db", read_only=True)
    total, _, _ = log.backlog(0)
    bare = _bare(folder)
    took, rows, after = {"ours": 0.0, "rival": 0.0}, {"ours": 0, "rival": 0}, 0

    def ours() -> int:
        return sum(decode_rows(item.entry.payload).num_rows for item in log.read(after, _READ_BYTES))

    def rival() -> int:
        return sum(decode_rows(bare(size)).num_rows for size in sizes)

    turn: list[tuple[str, Callable[[], int]]] = [("ours", ours), ("rival", rival)]
    while sizes := [len(item.entry.payload) for item in log.read(after, _READ_BYTES)]:
        turn.reverse()
        for name, read in turn:
            begin = time.perf_counter()
            rows[name] += read()
            took[name] += time.perf_counter() - begin
        after += len(sizes)
    if set(rows.values()) != {total}:
        raise RuntimeError("not all was read")
    begin = time.perf_counter()
    proved = verify(log)
    speed = proved.bytes / 1e6 / (time.perf_counter() - begin)
    return {**{name: total / seconds for name, seconds in took.items()}, "verify_mb_per_s": speed}


def _bare(folder: Path) -> Callable[[int], bytes]:
    """Return what reads the bytes of all segments one after the other."""
    files = [path.open("rb", buffering=0) for path in sorted((folder / "log.segments").iterdir())]

    def read(size: int) -> bytes:
        while not (found := files[0].read(size)):
            files.pop(0).close()
        return found

    return read


if __name__ == "__main__":
    print(json.dumps(_read_here(Path(sys.argv[1]))))
