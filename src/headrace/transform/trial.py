"""Whether a query survives some rows: asked of a process of its own, which may die of them.

SQL runs in the pipeline's process, and no border inside of a process holds: a value may crash the engine,
make it take all memory, or keep it in a loop that cannot be interrupted. So changes that have ended the
process before (see `headrace.transform.attempts`) are tried here first, with limits of memory and time,
and bisected to the rows that no process survives. All others are judged as ever.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

import duckdb
import pyarrow as pa

from headrace.errors import ModelBroken
from headrace.lifeline import signal_of
from headrace.transform.engine import engine
from headrace.transform.python.process import environment
from headrace.transform.python.wire import OUT_OF_MEMORY
from headrace.transform.python.worker import limit_memory

SECONDS, SECONDS_PER_ROW = 10.0, 0.001
"""How long a query may take: for whatever it is asked, and for each row."""

MEMORY = 2 << 30
"""Bytes that a trial may take beyond what its process has when it starts."""

_MOST_KILLERS = 20
_START = 10.0  # seconds of processor time until a trial begins

Death = tuple[str, str]
"""The reason of a record, and the words for it."""


def time_for(rows: int) -> float:
    """Return how many seconds a query over so many rows may take."""
    return SECONDS + SECONDS_PER_ROW * rows


def killers(model: str, query: str, events: pa.Table) -> dict[int, Death]:
    """Return the events, by `_hr_n`, that end each process in which `query` judges them as relation `events`.

    Raises ModelBroken for a query that needs no row for that, or that too many rows have this effect on.
    """
    found = dict[int, Death]()
    parts = deque([events])
    while parts:
        part = parts.popleft()
        death = trial(query, part)
        if death is None:
            continue
        if part.num_rows > 1:
            middle = part.num_rows // 2
            parts.extendleft((part.slice(middle), part.slice(0, middle)))
            continue
        if trial(query, events.slice(0, 0)) is not None:
            raise _broken(model, f"without any row: {death[1]}")
        if (death := trial(query, part)) is not None:  # once may be chance
            found[part["_hr_n"][0].as_py()] = death
        refuse_too_many(model, (("crash", *each) for each in found.values()))
    return found


def refuse_too_many(model: str, causes: Iterable[tuple[str, ...]]) -> None:
    """Raise ModelBroken where so many of some records have a crash for their cause that it is the model's."""
    crashes = [cause for cause in causes if cause[0] == "crash"]
    if len(crashes) > _MOST_KILLERS:
        raise _broken(model, f"on {len(crashes)} records of one part, the last time: {crashes[-1][-1]}")


def trial(query: str, events: pa.Table) -> Death | None:
    """Run a query over the relation `events` in a process of its own; return what ended it, None if it did
    not. Raises OSError where none can be started."""
    limit, ready = time_for(events.num_rows), b""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "headrace.transform.trial", str(MEMORY), str(limit)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        try:
            with suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(len(query.encode()).to_bytes(8) + query.encode())
                with pa.ipc.new_stream(stdin, events.schema) as writer:
                    writer.write_table(events)
            ready = process.stdout.read(1)
            code = process.wait(limit if ready else None)
        except subprocess.TimeoutExpired:
            return "crash.timeout", f"it took more than {limit:g} s"
        finally:
            process.kill()
    if not ready:
        raise OSError(f"a process for a trial could not start, and ended with {code}")
    if code == OUT_OF_MEMORY:
        return "crash.memory", f"it needs more than {MEMORY >> 20} MiB"
    if code < 0:
        return "crash.signal", f"its process was ended by {signal_of(code)}"
    return None if code == 0 else ("crash.exit", f"its process ended with {code}")


def show_events(db: duckdb.DuckDBPyConnection, events: pa.Table) -> None:
    """Make the relation `events` of changes, with commit times as times."""
    db.register("arrow_events", events)
    db.execute(
        "CREATE OR REPLACE TEMP VIEW events AS SELECT * REPLACE "
        "(make_timestamptz(_committed_at) AS _committed_at) FROM arrow_events"
    )


def _main(memory: int, seconds: float) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold cells
    # Should the caller die meanwhile, nobody else would end it.
    limit = int((seconds + _START) * (os.cpu_count() or 1)) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    stdin = sys.stdin.buffer
    query = stdin.read(int.from_bytes(stdin.read(8))).decode()
    events = pa.ipc.open_stream(stdin.read()).read_all()
    with engine() as db:
        show_events(db, events)
        limit_memory(memory)
        os.write(1, b".")  # the time counts from here
        try:
            db.sql(query).to_arrow_table()
        except (duckdb.OutOfMemoryException, MemoryError):
            return OUT_OF_MEMORY
        except duckdb.Error:
            return 0  # of that no process dies
    return 0


def _broken(model: str, what: str) -> ModelBroken:
    return ModelBroken(
        model, f"Model {model} ends its process {what}.", "Mend it: a record may do so, but hardly so many."
    )


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), float(sys.argv[2])))
