"""DuckDB as a destination: exactly once, for one owner, and nothing but what the slice says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from headrace.change import Column, Mark, Position, TableId, TableSchema
from headrace.destinations.duckdb import DuckDBDestination
from headrace.errors import (
    DestinationBusy,
    DestinationError,
    ForeignDestination,
    ModelBroken,
    UserError,
    Verdict,
)
from headrace.failpoints import VARIABLE
from headrace.payload import BEFORE, UNCHANGED
from headrace.protocols import Part, Slice
from headrace.transform.model import RowModel, bind, mirror
from headrace.transform.sql import read_model

LOG = "l" * 32
TABLE = TableId("public", "t")


def shape(*columns: tuple[str, str]) -> TableSchema:
    return TableSchema(TABLE, (Column("id", "bigint"), *(Column(*column) for column in columns)), ("id",))


PLAIN = shape(("v", "text"))


def staged(model: RowModel, cells: list[dict[str, str | None]], after: int) -> pa.Table:
    n = len(cells)
    numbers = pa.array(range(after + 1, after + n + 1), pa.int64())
    names = [column.name for column in model.schema.columns]
    return pa.table(
        {name: pa.array([row.get(name) for row in cells], pa.string()) for name in names}
        | {
            "_op": pa.array(["c"] * n, pa.string()),
            "_epoch": pa.array([0] * n, pa.int64()),
            "_commit": numbers,
            "_ordinal": numbers,
            "_offset": numbers,
            "_committed_at": numbers,
            "_txid": numbers,
            "_unchanged": pa.nulls(n, UNCHANGED),
            "_before": pa.nulls(n, BEFORE),
        }
    )


def slice_of(
    after: int, *parts: tuple[RowModel, list[dict[str, str | None]]], log: str = LOG, size: int = 1
) -> Slice:
    through = after + size
    return Slice(
        "shop",
        Mark(log, after, f"h{after}"),
        Mark(log, through, f"h{through}"),
        Position(0, through, 1),
        0,
        tuple(Part(model, model.prepare(staged(model, cells, after)), True) for model, cells in parts),
    )


def row(key: int, value: str | None = "a", **more: str) -> dict[str, str | None]:
    return {"id": str(key), "v": value, **more}


@pytest.fixture
def destination(tmp_path: Path) -> DuckDBDestination:
    return DuckDBDestination(tmp_path / "w.duckdb")


def table(
    destination: DuckDBDestination, query: str = "SELECT id, v FROM shop.t ORDER BY id"
) -> list[tuple[object, ...]]:
    (made,) = destination.read([query])
    return [tuple(row.values()) for row in made.to_pylist()]


MODEL = mirror("shop", PLAIN)


# -- one owner, each slice once --------------------------------------------------------------------------


def test_progress_moves_with_the_data(destination: DuckDBDestination) -> None:
    assert destination.progress("shop") is None
    assert destination.models("shop") == {}
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    assert destination.progress("shop") == Mark(LOG, 1, "h1")
    state = destination.models("shop")["shop.t"]
    assert (state.offset, state.state, state.version, state.open_records) == (1, "in_sync", MODEL.version, 0)
    assert destination.progress("other") is None


@pytest.mark.parametrize(
    ("after", "log", "error"),
    [
        (0, LOG, DestinationError),  # the same slice again
        (2, LOG, ForeignDestination),  # a slice too far
        (1, "f" * 32, ForeignDestination),  # another log
    ],
)
def test_a_slice_that_does_not_continue_is_refused_and_changes_nothing(
    destination: DuckDBDestination, after: int, log: str, error: type[Exception]
) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    with pytest.raises(error):
        destination.apply(slice_of(after, (MODEL, [row(2)]), log=log))
    assert table(destination) == [(1, "a")]
    assert destination.progress("shop") == Mark(LOG, 1, "h1")
    assert table(destination, "SELECT count(*) FROM headrace.ledger") == [(1,)]


def test_an_owner_whose_log_took_another_turn_is_refused(destination: DuckDBDestination) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    work = slice_of(1, (MODEL, [row(2)]))
    turned = Slice(work.source, Mark(LOG, 1, "other"), work.through, work.position, 0, work.parts)
    with pytest.raises(ForeignDestination, match="another pipeline"):
        destination.apply(turned)


def test_a_stale_second_owner_is_refused(destination: DuckDBDestination) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    mine, theirs = slice_of(1, (MODEL, [row(2)])), slice_of(1, (MODEL, [row(3)]), size=2)
    DuckDBDestination(destination.path).apply(theirs)
    with pytest.raises(DestinationError):
        destination.apply(mine)
    assert table(destination) == [(1, "a"), (3, "a")]


def test_progress_without_a_beginning_is_refused(destination: DuckDBDestination) -> None:
    with pytest.raises(ForeignDestination, match="has no progress"):
        destination.apply(slice_of(5, (MODEL, [row(1)])))


APPLY = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_destination as t
t.DuckDBDestination(Path(sys.argv[2])).apply(t.slice_of(1, (t.MODEL, [t.row(2)])))
"""


@pytest.mark.parametrize(
    ("place", "applied"), [("destination.apply.commit", False), ("destination.apply.committed", True)]
)
def test_a_killed_apply_takes_effect_exactly_once(
    destination: DuckDBDestination, place: str, applied: bool
) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    done = subprocess.run(
        [sys.executable, "-c", APPLY, str(Path(__file__).parent), str(destination.path)],
        env={**os.environ, VARIABLE: f"{place}=kill"},
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    progress = destination.progress("shop")
    assert progress is not None
    assert progress.offset == (2 if applied else 1)
    if not applied:
        destination.apply(slice_of(1, (MODEL, [row(2)])))
    assert table(destination) == [(1, "a"), (2, "a")]
    assert table(destination, 'SELECT "after", read FROM headrace.ledger ORDER BY 1') == [(0, 1), (1, 1)]


def test_an_apply_that_fails_in_the_middle_leaves_nothing(
    destination: DuckDBDestination, tmp_path: Path
) -> None:
    with destination.connected() as db:
        db.execute("CREATE TABLE second AS SELECT 'x' AS _source, 'y' AS _source_key, 'no number' AS id")
    second = bound(tmp_path, "second", "SELECT id::BIGINT AS id, v FROM raw.shop.t")
    with pytest.raises(ModelBroken, match="Table second cannot take the model's columns") as caught:
        destination.apply(slice_of(0, (MODEL, [row(1)]), (second, [row(1)])))
    assert caught.value.model == "second"
    assert destination.progress("shop") is None
    tables = "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'shop'"
    assert table(destination, tables) == [(0,)]
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    assert table(destination) == [(1, "a")]


# -- shape ---------------------------------------------------------------------------------------------


def test_a_new_column_appears_and_a_lost_one_is_null_from_then_on(destination: DuckDBDestination) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    wider = mirror("shop", shape(("w", "integer")))
    destination.apply(slice_of(1, (wider, [{"id": "2", "w": "7"}])))
    assert table(destination, "SELECT id, v, w FROM shop.t ORDER BY id") == [(1, "a", None), (2, None, 7)]


def test_a_column_changes_its_type_with_the_rows_that_are_there(destination: DuckDBDestination) -> None:
    narrow, wide = (
        mirror("shop", shape(("v", "integer"))),
        mirror("shop", shape(("v", "bigint"), ("w", "text"))),
    )
    destination.apply(slice_of(0, (narrow, [row(1, "7"), row(2, "8")])))
    destination.apply(slice_of(1, (wide, [row(2, str(2**40), w="x")])))
    assert table(destination) == [(1, 7), (2, 2**40)]


def bound(folder: Path, name: str, text: str, schema: TableSchema = PLAIN) -> RowModel:
    path = folder / f"{name}.sql"
    path.write_text(text)
    return bind(read_model(path), schema)


@pytest.mark.parametrize(
    "name",
    ["records", "arrived", "removed", "settled", "incoming", "Mixed Case", 'quo"te', "order", "headrace"],
)
def test_a_model_may_have_any_name(destination: DuckDBDestination, tmp_path: Path, name: str) -> None:
    text = "SELECT id::BIGINT AS id, v::INTEGER AS v FROM raw.shop.t"
    one, two = bound(tmp_path, "first", text), bound(tmp_path, name, text)
    for after, value in ((0, "1"), (2, "x"), (4, "3")):
        cells = [row(1, value), row(2, "5")]
        destination.apply(slice_of(after, (one, cells), (two, cells), size=2))
    quoted = '"' + name.replace('"', '""') + '"'
    assert table(destination, f"SELECT id, v FROM main.{quoted} ORDER BY id") == [(1, 3), (2, 5)]
    statuses = table(destination, "SELECT model, status FROM headrace.quarantine ORDER BY model = 'first'")
    assert statuses == [(name, "superseded"), ("first", "superseded")]


@pytest.mark.parametrize(
    "column", ["key", "k", "n", "status", "removed", "order", "Mixed", 'a"b', "arrived", "r"]
)
def test_a_column_may_have_any_name(destination: DuckDBDestination, column: str) -> None:
    model = mirror("shop", shape((column, "text")))
    for after, value in ((0, "a"), (1, "b")):
        destination.apply(slice_of(after, (model, [{"id": "1", column: value}])))
    quoted = '"' + column.replace('"', '""') + '"'
    assert table(destination, f"SELECT id, {quoted} FROM shop.t") == [(1, "b")]


def test_each_new_cause_is_told_once(destination: DuckDBDestination) -> None:
    model = mirror("shop", shape(("v", "integer")))
    first = destination.apply(slice_of(0, (model, [row(1, "x"), row(2, "y")]), size=2))
    assert len(first) == 1
    assert destination.apply(slice_of(2, (model, [row(3, "z")]))) == []
    assert destination.issue(first[0])[4] == 3


# -- access --------------------------------------------------------------------------------------------

HOLD = """
import sys, duckdb
db = duckdb.connect(sys.argv[1])
print("held", flush=True)
sys.stdin.readline()
"""


def test_a_file_that_another_process_holds_is_busy_and_names_it(destination: DuckDBDestination) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(destination.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(DestinationBusy, match=rf"PID {holder.pid}\b") as caught:
            destination.apply(slice_of(1, (MODEL, [row(2)])))
        assert caught.value.verdict is Verdict.RETRY
    finally:
        holder.communicate(b"\n", timeout=30)
    destination.apply(slice_of(1, (MODEL, [row(2)])))
    assert table(destination) == [(1, "a"), (2, "a")]


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM shop.t",
        "DROP TABLE shop.t",
        "SELECT 1; DELETE FROM shop.t",
        "CREATE TABLE x (a INT)",
        "INSERT INTO shop.t SELECT * FROM shop.t",
        "UPDATE shop.t SET v = 'x'",
        "ATTACH ':memory:' AS m",
        "COMMIT",
        "SET memory_limit = '1GB'",
        "COPY shop.t TO '/dev/null'",
        "WITH x AS (SELECT 1) DELETE FROM shop.t",
        "EXPLAIN ANALYZE DELETE FROM shop.t",
        "nonsense",
        "SELECT * FROM absent",
    ],
)
def test_only_queries_are_answered(destination: DuckDBDestination, query: str) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    with pytest.raises(UserError):
        destination.read([query])
    assert table(destination) == [(1, "a")]


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "w.duckdb").write_bytes(b"no database " * 1000)
    with pytest.raises(DestinationError, match=r"w\.duckdb is no DuckDB file"):
        DuckDBDestination(tmp_path / "w.duckdb").progress("shop")


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match="cannot be opened"):
        DuckDBDestination(tmp_path / "absent" / "w.duckdb").apply(slice_of(0, (MODEL, [row(1)])))


def test_a_query_beside_an_apply_that_has_spilled_disturbs_neither(tmp_path: Path) -> None:
    """Both are connections to one engine, whose folder for what does not fit cannot be moved once used."""
    destination = DuckDBDestination(tmp_path / "w.duckdb", spill=tmp_path / "spill")
    with destination.connected() as applying:
        applying.execute(
            "CREATE TABLE t AS SELECT i, md5(i::VARCHAR) AS k FROM range(2000000) r(i) ORDER BY k"
        )
        assert any((tmp_path / "spill").iterdir()), "it has spilled"
        assert destination.read(["SELECT 1 AS one"])[0].to_pylist() == [{"one": 1}]
        with destination.connected() as other:
            assert other.execute("SELECT count(*) FROM t").fetchall() == [(2_000_000,)]
