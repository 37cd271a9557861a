"""A backlog with two workers, against the same without: how many times faster, from backlog to applied.

`python_burst`: 2 M changes that wait for a model of a Python function. `rebuild`: a table made once more of
10 M changes by the same function; `rebuild_sql`: by SQL. `sql_burst`: 2 M changes for a model of SQL. Of the
changes half are the newest of their row. Ours is a pipeline as it comes, which may have two workers and
decides by itself when, whether and how many; the time it takes to find out is part of the measurement. The
rival is the same pipeline with `max_workers = 0`. Both have applied 300,000 changes before, so they know how
fast they are, and end when all is visible; the tables are compared. `ours` and `rival` are changes a second.
Where workers do not help, the best that there can be is 1.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import duckdb
import history
from rig import Case, by_turns, ours

from headrace.config import load_project
from headrace.pipeline import open_lanes

CASES = ("python_burst", "rebuild", "rebuild_sql", "sql_burst")
WORKERS = 2
_BEFORE = 300_000
_SQL = """SELECT id::BIGINT AS order_id, customer_id::INTEGER AS customer_id, amount::DECIMAL(12,2) AS amount,
lower(status) AS status, placed_at::TIMESTAMPTZ AS placed_at FROM raw.shop.orders
"""
PYTHON = """import hashlib
import hmac
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Annotated

import headrace

TAX = {"new": Decimal("0.00"), "paid": Decimal("0.19"), "sent": Decimal("0.19"), "back": Decimal("0.00")}


@dataclass
class Order:
    order_id: int
    customer: str
    amount: Annotated[Decimal, headrace.contract("DECIMAL(12,2)")]
    tax: Annotated[Decimal, headrace.contract("DECIMAL(12,2)")]
    status: str
    placed_at: datetime
    week: str


@headrace.model(reads="raw.shop.orders", key=["order_id"])
def orders(row: headrace.Row) -> Order:
    customer = hmac.new(b"not a secret", row["customer_id"].encode(), hashlib.sha256).hexdigest()[:20]
    amount = Decimal(row["amount"])
    status = row["status"].strip().lower()
    tax = (amount * TAX[status]).quantize(Decimal("0.01"))
    placed_at = datetime.fromisoformat(row["placed_at"])
    year, week, _ = placed_at.isocalendar()
    return Order(int(row["id"]), customer, amount, tax, status, placed_at, f"{year}-W{week:02}")
"""


def run(*, quick: bool, case: str | None = None) -> dict[str, Any]:
    burst, long, times = (200_000, 400_000, 1) if quick else (2_000_000, 10_000_000, 3)
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as temporary:
        cases = {
            name: _case(Path(temporary) / name, name, long if "rebuild" in name else burst, times)
            for name in CASES
            if case in (None, name)
        }
    return {"unit": "changes/s", "cases": cases}


def _case(folder: Path, name: str, changes: int, times: int) -> Case:
    is_rebuild = name.startswith("rebuild")
    model = {"orders.py": PYTHON} if name in ("python_burst", "rebuild") else {"orders.sql": _SQL}
    made, keys = folder / "made", changes // 2
    history.make(made, _BEFORE, keys, model).close()
    ours("drain", made)
    (lane,) = open_lanes(load_project(made))
    history.extend(lane, _BEFORE, changes if is_rebuild else _BEFORE + changes, keys)
    while is_rebuild and lane.apply():
        pass
    lane.close()
    sums = set[Any]()

    def timed(title: str, workers: int) -> dict[str, float]:
        project = folder / title
        shutil.copytree(made, project)
        with (project / "headrace.toml").open("a") as file:
            file.write(f"[scale]\nmax_workers = {workers}\n")
        measured = ours("build_again", project, "orders") if is_rebuild else ours("drain", project)
        with duckdb.connect(str(project / "warehouse.duckdb"), read_only=True) as db:
            sums.add(db.execute("SELECT count(*), sum(hash(orders)::HUGEINT) FROM orders").fetchone())
        shutil.rmtree(project)
        more = {"most_workers": measured["most_workers"]} if workers else {}
        return {title: changes / measured["seconds"], **more}

    runs = by_turns(times, {"ours": lambda: timed("ours", WORKERS), "rival": lambda: timed("rival", 0)})
    assert len(sums) == 1, "with workers and without, the tables differ"
    shutil.rmtree(folder)
    return "the same without workers", runs, {"changes": changes, "rows": keys}
