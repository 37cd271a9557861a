"""What bad rows, and the records of them, cost the good ones; and how fast records are redriven.

`clean`, `bad1`, `bad10`: changes of which none, 1 % and 10 % cannot be cast, through prepare and apply into
DuckDB, records and all. The rival is the same way with the same good rows and a model whose casts are plain:
one bad cell would fail it as a whole. `open_duckdb`, `open_postgres`: slices of good rows applied while the
model has 100,000 open records, against the same without any. `redrive`: records made good by a mended model,
from the command to the committed rows, against a budget. Rates are by processor time of the process but for
`open_postgres`: what else the machine does counts for nothing.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from models import changes_of, eight_casts
from rig import Case, Rig, by_turns, open_rig, ours

from headrace.change import Mark, Position
from headrace.destinations.database import Database
from headrace.destinations.duckdb import DuckDBDestination
from headrace.destinations.postgres import PostgresDestination
from headrace.keys import quoted
from headrace.protocols import Part, Slice
from headrace.secret import Secret
from headrace.transform.evaluate import Evaluation
from headrace.transform.model import RowModel

BAD = {"clean": 0, "bad1": 100, "bad10": 10}
"""Cases, and which of so many rows is bad."""
CASES = (*BAD, "open_duckdb", "open_postgres", "redrive")
ROWS, PART, SLICE = 500_000, 100_000, 300_000
OPEN, CHANGES, SLICES = 100_000, 10_000, 20
RATE = 20_000
_LOG = "l" * 32


def run(*, quick: bool, case: str | None = None) -> dict[str, Any]:
    divisor, times = (10, 3) if quick else (1, 9)
    cases: dict[str, Case] = {}
    with ExitStack() as stack:
        for name in CASES if case is None else (case,):
            if name in BAD:
                cases[name] = _isolation(ROWS // divisor, BAD[name], times)
            elif name == "open_duckdb":
                cases[name] = _open(_duckdb, OPEN // divisor, times)
            elif name == "open_postgres":
                cases[name] = _open(_postgres(stack.enter_context(open_rig())), OPEN // divisor, times)
            else:
                cases[name] = _redrive(stack.enter_context(open_rig()), OPEN // divisor, min(times, 5))
    return {"unit": "rows/s", "cases": cases}


class _Plain(Evaluation):
    """What a model would be that isolates nothing."""

    def query(self, events: str) -> str:
        outputs = ", ".join(f"({text}) AS {quoted(name)}" for name, text, _ in self._model.outputs)
        return (
            "SELECT _hr_n, _hr_k, false AS _hr_failed, NULL::SMALLINT AS _hr_cast, false AS _hr_filtered, "
            f"{outputs} FROM {events} AS {quoted(self._model.alias)}"
        )


class _PlainModel(RowModel):
    __slots__ = ()

    def evaluation(self, db: Any) -> Evaluation:
        return _Plain(db, self)


def _isolation(rows: int, every: int, times: int) -> Case:
    """Return the runs with one bad row in `every`, none if that is 0."""
    model = eight_casts()
    plain = _PlainModel(**{field.name: getattr(model, field.name) for field in fields(RowModel)})
    parts = [_spoilt(changes_of(first, PART), every) for first in range(0, rows, PART)]
    good = [part.filter(pc.not_equal(part["amount"], "n/a")) for part in parts]
    kept = sum(part.num_rows for part in good)
    bad = rows - kept
    runs = by_turns(
        times,
        {
            "ours": lambda: {"ours": rows / _seconds(model, parts, bad)},
            "rival": lambda: {"rival": kept / _seconds(plain, good, 0)},
        },
    )
    return "the same without isolation, good rows alone", runs, {"rows": rows, "bad": bad}


def _spoilt(changes: pa.Table, every: int) -> pa.Table:
    if not every:
        return changes
    bad = pa.array(np.arange(changes.num_rows) % every == 0)
    amounts = pc.if_else(bad, "n/a", changes["amount"])
    return changes.set_column(changes.schema.get_field_index("amount"), "amount", amounts)


def _seconds(model: RowModel, parts: list[pa.Table], records: int) -> float:
    """Return the processor time that parts take to be prepared and applied to a new table."""
    with _duckdb() as destination:
        destination.progress("shop")
        begin = time.process_time()
        after = Mark(_LOG, 0, "0")
        for first in range(0, len(parts), SLICE // PART):
            some = parts[first : first + SLICE // PART]
            after = _apply(destination, after, (Part(model, model.prepare(part), True) for part in some))
        seconds = time.process_time() - begin
        (found,) = destination.read(
            [f"SELECT (SELECT count(*) FROM {model.name}), (SELECT count(*) FROM headrace.quarantine)"]
        )
        rows = sum(part.num_rows for part in parts)
        assert [column[0].as_py() for column in found.columns] == [rows - records, records]
    return seconds


def _open(open_destination: Callable[[], Any], records: int, times: int) -> Case:
    """Return the runs of slices beside so many open records, and beside none."""
    model = eight_casts()
    good = [changes_of(first, CHANGES) for first in range(0, SLICES * CHANGES, CHANGES)]
    bad = [
        _spoilt(changes_of(10 * SLICES * CHANGES + first, min(PART, records)), 1)
        for first in range(0, records, PART)
    ]
    prepared = [model.prepare(part) for part in good]
    with open_destination() as beside, open_destination() as without:
        stands: dict[Database, Mark] = {}
        for destination, parts in ((beside, [*good, *bad]), (without, good)):
            made = (Part(model, model.prepare(part), True) for part in parts)
            stands[destination] = _apply(destination, Mark(_LOG, 0, "0"), made)
        clock = time.process_time if isinstance(beside, DuckDBDestination) else time.monotonic

        def speed(destination: Database) -> float:
            begin = clock()
            for each in prepared:
                stands[destination] = _apply(destination, stands[destination], [Part(model, each, True)])
            return SLICES * CHANGES / (clock() - begin)

        runs = by_turns(
            times,
            {"ours": lambda: {"ours": speed(beside)}, "rival": lambda: {"rival": speed(without)}},
        )
        (found,) = beside.read(["SELECT count(*) FROM headrace.quarantine WHERE status = 'quarantined'"])
        assert found.column(0)[0].as_py() == records
    return "the same without open records", runs, {"open": records, "rows": SLICES * CHANGES}


def _apply(destination: Database, after: Mark, parts: Any) -> Mark:
    through = Mark(_LOG, after.offset + 1, str(after.offset + 1))
    destination.apply(Slice("shop", after, through, Position(0, through.offset, 1), 0, parts))
    return through


@contextmanager
def _duckdb() -> Iterator[Database]:
    with (
        tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder,
        closing(DuckDBDestination(Path(folder) / "bench.duckdb", spill=Path(folder))) as destination,
    ):
        yield destination


def _postgres(rig: Rig) -> Callable[[], Any]:
    names = iter(("beside", "without"))

    @contextmanager
    def made() -> Iterator[Database]:
        name = next(names)
        rig.db.execute(f"CREATE DATABASE {name}")
        url = f"{rig.server.url.removesuffix('postgres')}{name}"
        with closing(PostgresDestination(Secret(url))) as destination:
            yield destination

    return made


def _redrive(rig: Rig, records: int, times: int) -> Case:
    """Return the runs of a redrive of so many records, a fifth of the table's rows."""
    rig.db.execute("CREATE TABLE orders (id bigint PRIMARY KEY, amount text, note text)")
    rig.db.execute(
        "INSERT INTO orders SELECT i, CASE i %% 5 WHEN 0 THEN 'n/a ' || i ELSE round(i / 7.0, 2)::text END, "
        "'note for order number ' || i FROM generate_series(1, %s) i",
        [5 * records],
    )
    folder = rig.project()
    model = folder / "models" / "orders.sql"
    model.parent.mkdir()
    select = "SELECT id::BIGINT AS id, {} AS amount, note FROM raw.shop.orders"
    model.write_text(select.format("amount::DECIMAL(12,2)"))
    ours("once", folder)
    runs = []
    for turn in range(times):
        broken = folder.with_name(f"{folder.name}_{turn}")
        shutil.copytree(folder, broken)
        mended = select.format("(CASE WHEN amount LIKE 'n/a %' THEN NULL ELSE amount END)::DECIMAL(12,2)")
        (broken / "models" / "orders.sql").write_text(mended)
        command = [sys.executable, "-m", "headrace", "quarantine", "redrive", "--all", "--json"]
        begin = _children()
        done = subprocess.run([*command, "--project", broken], stdout=subprocess.PIPE, check=True)
        seconds = _children() - begin
        told = json.loads(done.stdout)
        assert (told["resolved"], told["still_quarantined"]) == (records, 0), "all are to be good"
        runs.append({"ours": records / seconds, "rival": float(RATE)})
    return "a budget", runs, {"records": records, "rows": 5 * records}


def _children() -> float:
    """Return the processor time of all processes that were started and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
