"""The peak memory of `headrace run`, from the source to queryable in DuckDB, against a budget.

- transaction: ten million rows in one transaction;
- tables: 50 tables, copied, and then changed in transactions that touch them all;
- value: one value of 100 MB; four times its size are added to the budget.
"""

from __future__ import annotations

from typing import Any

import workload
from rig import Case, open_rig, pipeline_until

CASES = ("transaction", "tables", "value")
BUDGET = 400.0  # MB
TABLES = 50


def run(*, quick: bool, case: str | None = None) -> dict[str, Any]:
    cases = {name: _CASES[name](quick) for name in CASES if case in (None, name)}
    return {"unit": "MB at its peak", "cases": cases}


def _transaction(quick: bool) -> Case:
    rows = 500_000 if quick else 10_000_000
    with open_rig() as rig:
        workload.create(rig)
        attached = rig.attach()
        workload.insert_big(rig, rows)
        rig.settle()
        took, peak = pipeline_until(rig.again(attached), f"count(*) = {rows} FROM shop.orders", wait=900)
    return _told(peak, BUDGET, {"rows": rows, "seconds": round(took, 1)})


def _tables(quick: bool) -> Case:
    rows, rounds = (500, 10) if quick else (20_000, 100)
    names = [f"t{n}" for n in range(TABLES)]
    with open_rig() as rig:
        for name in names:
            rig.db.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, n int, note text)")
            rig.db.execute(
                f"INSERT INTO {name} SELECT g, 0, 'note number ' || g FROM generate_series(1, {rows}) g"
            )
        folder = rig.project()
        _, copied = pipeline_until(
            folder, f"count(*) = {TABLES} FROM headrace.models WHERE state = 'in_sync'", wait=300
        )
        for _ in range(rounds):
            with rig.db.transaction():
                for name in names:
                    rig.db.execute(f"UPDATE {name} SET n = n + 1 WHERE id % 10 = 0")
        done = " AND ".join(f"(SELECT max(n) FROM shop.{name}) = {rounds}" for name in names)
        _, changed = pipeline_until(folder, done, wait=300)
    extra = {"tables": TABLES, "rows": TABLES * rows, "changes": TABLES * rounds * rows // 10}
    return _told(max(copied, changed), BUDGET, {**extra, "copied_mb": round(copied)})


def _value(quick: bool) -> Case:
    size = (10 if quick else 100) << 20
    with open_rig() as rig:
        rig.db.execute("CREATE TABLE orders (id int PRIMARY KEY, v text)")
        rig.db.execute("ALTER TABLE orders ALTER v SET STORAGE EXTERNAL")
        attached = rig.attach()
        rig.db.execute(f"INSERT INTO orders SELECT 1, string_agg(md5(g::text), '') FROM {_lines(size)} g")
        rig.settle()
        _, peak = pipeline_until(rig.again(attached), f"max(length(v)) = {size} FROM shop.orders", wait=300)
    return _told(peak, BUDGET + 4 * (size >> 20), {"value_mb": size >> 20})


def _lines(size: int) -> str:
    return f"generate_series(1, {size // 32})"


def _told(peak: float, budget: float, extra: dict[str, Any]) -> Case:
    return f"a budget of {budget:.0f} MB", [{"ours": peak, "rival": budget}], extra


_CASES = {"transaction": _transaction, "tables": _tables, "value": _value}
