"""A model's table made once more of a long history, after a wrong expression was mended.

`rebuild`: from the request to the right table live, in a process of its own. The rival is the same SELECT in
DuckDB over the staged Parquet files into a table of a new file, of the newest change of each key as a person
would write it by hand; `every_change` is the same without looking for the newest. `vs_copy`: the rival is
the cheapest re-extraction, COPY of the source table piped into DuckDB with the same SELECT. Rates count all
staged changes, of rival and ours alike. The tables are compared, outside of the time.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb
import history
from rig import TIMEOUT, Case, Rig, by_turns, open_rig, ours

from headrace.testing.postgres import clean_environment

CASES = ("rebuild", "vs_copy")
_WRONG, _RIGHT = "upper(status)", "lower(status)"
_OUTPUTS = f"""id::BIGINT AS order_id, customer_id::INTEGER AS customer_id, amount::DECIMAL(12,2) AS amount,
{_RIGHT} AS status, placed_at::TIMESTAMPTZ AS placed_at"""
_MODEL = f"SELECT {_OUTPUTS} FROM raw.shop.orders\n"
_ORDER = "PARTITION BY id ORDER BY _epoch DESC, _commit DESC, _ordinal DESC"
_SUM = "SELECT count(*), sum(hash(order_id, customer_id, amount, status, placed_at)::HUGEINT) FROM orders"
_TABLE = ", ".join(f"{name} {type_}" for name, type_ in history.COLUMNS.items())


def run(*, quick: bool, case: str | None = None) -> dict[str, Any]:
    changes, keys, times = (200_000, 20_000, 2) if quick else (10_000_000, 1_000_000, 5)
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as temporary:
        bench = _Bench(Path(temporary), changes, keys)
        cases = {name: bench.case(name, times) for name in CASES if case in (None, name)}
    return {"unit": "changes/s", "cases": cases}


class _Bench:
    """A project with its history staged and its table live."""

    def __init__(self, folder: Path, changes: int, keys: int) -> None:
        self._folder, self._changes, self._keys = folder, changes, keys
        self._project = folder / "project"
        lane = history.make(self._project, changes, keys, {"orders": _MODEL})
        while lane.apply():
            pass
        lane.close()
        raw = self._project / ".headrace" / "staging" / "raw" / "shop"
        self._files = [str(path) for path in sorted(raw.glob("public/orders/*.parquet"))]
        with duckdb.connect(str(self._project / "warehouse.duckdb"), read_only=True) as db:
            db.execute(
                f"COPY (SELECT * EXCLUDE (_source, _source_key) FROM orders) TO '{folder / 'rows.csv'}'"
            )
        self._wanted = self._found(self._project / "warehouse.duckdb")

    def case(self, name: str, times: int) -> Case:
        extra = {"changes": self._changes, "keys": self._keys}
        if name == "rebuild":
            rivals = {"rival": self._by_hand, "every_change": self._every_change}
            return "the newest change of each key by hand, in DuckDB", self._turns(times, rivals), extra
        with open_rig() as rig:
            self._fill(rig)
            runs = self._turns(times, {"rival": lambda: self._re_extract(rig)})
        return "COPY of the source table piped into DuckDB", runs, extra

    def _turns(self, times: int, rivals: dict[str, Any]) -> list[dict[str, float]]:
        def timed(name: str) -> Any:
            return lambda: {name: self._changes / rivals[name]()}

        return by_turns(times, {"ours": self._ours, **{name: timed(name) for name in rivals}})

    def _ours(self) -> dict[str, float]:
        """Mend the model that has been wrong until now, and rebuild its table."""
        path = self._project / "models" / "orders.sql"
        path.write_text(_MODEL.replace(_RIGHT, _WRONG))
        ours("rebuild", self._project, "orders")
        path.write_text(_MODEL)
        measured = ours("rebuild", self._project, "orders")
        assert self._found(self._project / "warehouse.duckdb") == self._wanted
        rate = self._changes / measured["seconds"]
        return {"ours": rate, "peak_rss_mb": measured["peak_rss_mb"], "cpu_seconds": measured["cpu_seconds"]}

    def _by_hand(self) -> float:
        newest = f"SELECT * FROM read_parquet({self._files}) QUALIFY row_number() OVER ({_ORDER}) = 1"
        return self._made(f"SELECT {_OUTPUTS} FROM ({newest}) WHERE _op <> 'd'", self._wanted)

    def _every_change(self) -> float:
        return self._made(f"SELECT {_OUTPUTS} FROM read_parquet({self._files}) WHERE _op <> 'd'", None)

    def _fill(self, rig: Rig) -> None:
        rig.db.execute(f"CREATE TABLE orders ({_TABLE})")
        self._psql(
            rig, rf"\copy orders FROM '{self._folder / 'rows.csv'}' (FORMAT csv, HEADER)"
        ).communicate()
        rig.db.execute("VACUUM ANALYZE orders")

    def _re_extract(self, rig: Rig) -> float:
        pipe = self._folder / "pipe"
        os.mkfifo(pipe)
        columns = ", ".join(f"'{name}': 'VARCHAR'" for name in history.COLUMNS)
        copied = f"read_csv('{pipe}', auto_detect = false, header = false, columns = {{{columns}}})"
        copy = self._psql(rig, rf"\copy orders TO '{pipe}' (FORMAT csv)")
        try:
            return self._made(f"SELECT {_OUTPUTS} FROM {copied}", self._wanted)
        finally:
            assert copy.wait(TIMEOUT) == 0
            pipe.unlink()

    def _psql(self, rig: Rig, command: str) -> subprocess.Popen[bytes]:
        program = [rig.server.bin / "psql", "-qX", "-v", "ON_ERROR_STOP=1", "-d", rig.server.url]
        return subprocess.Popen([*program, "-c", command], env=clean_environment() | {"PGTZ": "UTC"})

    def _made(self, select: str, wanted: object) -> float:
        """Return the seconds that a query takes to become a table of a new file."""
        path = self._folder / "rival.duckdb"
        path.unlink(missing_ok=True)
        begin = time.monotonic()
        with duckdb.connect(str(path)) as db:
            db.execute("SET TimeZone = 'UTC'")
            db.execute(f"CREATE TABLE orders AS {select}")
        took = time.monotonic() - begin
        assert wanted is None or self._found(path) == wanted
        return took

    def _found(self, path: Path) -> object:
        with duckdb.connect(str(path), read_only=True) as db:
            db.execute("SET TimeZone = 'UTC'")
            return db.execute(_SUM).fetchone()
