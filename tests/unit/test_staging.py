"""Raw tables: exactly the log's content, whatever dies, and plain Delta for anybody else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.change import Column, Entry, LoggedEntry, Position, TableId, TableSchema
from headrace.errors import LogError
from headrace.failpoints import VARIABLE
from headrace.log.sqlite import SQLiteLog
from headrace.payload import BEFORE, UNCHANGED, decode_rows, encode_rows
from headrace.staging.delta import DeltaStaging
from headrace.staging.rows import HISTORY
from headrace.staging.table import StagingForeign
from headrace.staging.timeline import timeline

A, B = TableId("public", "a"), TableId("public", "b")


def rows(
    table: TableId, commit: int, count: int = 1, columns: Sequence[str] = ("id", "v"), op: str = "c"
) -> Entry:
    cells = {name: pa.array([f"{name}{commit}.{i}" for i in range(count)]) for name in columns}
    batch = pa.RecordBatch.from_pydict(
        {
            "_op": pa.array([op] * count),
            "_commit": pa.array([commit] * count, pa.int64()),
            "_ordinal": pa.array(range(1, count + 1), pa.int64()),
            "_committed_at": pa.array([7] * count, pa.int64()),
            "_txid": pa.array([9] * count, pa.int64()),
            "_lsn": pa.array([commit] * count, pa.int64()),
            **cells,
            "_unchanged": pa.array([["v"]] + [None] * (count - 1), UNCHANGED),
            "_before": pa.array([[("id", "o'ld")]] + [None] * (count - 1), BEFORE),
        }
    )
    return Entry(
        "rows", table, Position(0, commit, 1), Position(0, commit, count), 7, count, 1, encode_rows(batch)
    )


def schema(table: TableId, commit: int, columns: Sequence[str] = ("id", "v"), version: int = 1) -> Entry:
    shape = TableSchema(table, tuple(Column(name, "text") for name in columns), ("id",), version)
    at = Position(0, commit, 0)
    return Entry("schema", table, at, at, 7, 0, version, shape.to_json().encode())


def event(kind: str, table: TableId, commit: int) -> Entry:
    at = Position(0, commit, 3)
    return Entry(kind, table, at, at, 7, 1, 1, b"{}")  # type: ignore[arg-type]


def history() -> list[list[Entry]]:
    """Groups of two tables: changes, truncates, a column that appears."""
    return [
        [schema(A, 1), event("truncate", A, 1)],
        [rows(A, 1, 4)],
        [schema(B, 2), rows(B, 2, 2), rows(A, 2, 1)],
        [rows(A, 3, 3)],
        [event("truncate", B, 4), schema(A, 4, ("id", "v", "w"), 2), rows(A, 4, 2, ("id", "v", "w"))],
        [schema(B, 5, ("id", "v", "z"), 2)],
    ]


@pytest.fixture
def log(tmp_path: Path) -> SQLiteLog:
    made = SQLiteLog(tmp_path / "log.db")
    for group in history():
        made.append(group)
    return made


def opened(folder: Path, log: SQLiteLog, *, read_only: bool = False) -> DeltaStaging:
    staging = DeltaStaging(folder / "staging", "shop", log.id, read_only=read_only)
    staging.recover(log.last_offsets(), log.end().offset, log.before_unstaged)
    return staging


def load(staging: DeltaStaging, log: SQLiteLog, max_bytes: int = 1) -> None:
    while entries := log.read(staging.written(), max_bytes):
        staging.write(entries)


def content(
    staging: DeltaStaging, table: TableId, after: int = 0, through: int = 1 << 40
) -> list[dict[str, object]]:
    return staging.read(table, after, through).to_pylist()


def expected(log: SQLiteLog, table: TableId) -> list[tuple[str, int, int, int, object]]:
    made: list[tuple[str, int, int, int, object]] = []
    for item in log.read(0, 1 << 30):
        entry = item.entry
        if entry.table != table or entry.kind == "schema":
            continue
        if entry.kind != "rows":
            made.append(("t", entry.last.commit, entry.last.ordinal, item.offset, None))
            continue
        batch = decode_rows(entry.payload).to_pylist()
        made += [(r["_op"], r["_commit"], r["_ordinal"], item.offset, r["id"]) for r in batch]
    return made


def actual(staging: DeltaStaging, table: TableId) -> list[tuple[object, ...]]:
    names = ("_op", "_commit", "_ordinal", "_offset", "id")
    return [tuple(row[name] for name in names) for row in content(staging, table)]


def holds_the_log(folder: Path, log: SQLiteLog) -> None:
    """A fresh reader finds exactly the log's content, its schemas, and nothing twice."""
    staging = opened(folder, log, read_only=True)
    assert staging.through() == log.end().offset
    for table in (A, B):
        assert actual(staging, table) == expected(log, table)
    assert staging.schemas(log.end().offset) == log.schemas()
    offsets = [row["_offset"] for row in content(staging, HISTORY)]
    assert offsets == [item.offset for item in log.read(0, 1 << 30) if item.entry.kind == "schema"]


# -- content -------------------------------------------------------------------------------------------


def test_staging_holds_exactly_the_log(tmp_path: Path, log: SQLiteLog) -> None:
    staging = opened(tmp_path, log)
    assert staging.through() == 0
    load(staging, log)
    assert staging.through() == log.end().offset
    holds_the_log(tmp_path, log)


def test_cells_have_three_states_and_old_rows_are_kept(tmp_path: Path, log: SQLiteLog) -> None:
    staging = opened(tmp_path, log)
    load(staging, log, 1 << 20)
    first = content(staging, A)[1]
    assert (first["_unchanged"], first["_before"], first["w"]) == (["v"], [("id", "o'ld")], None)
    assert (first["_txid"], first["_committed_at"], first["_epoch"]) == (9, 7, 0)


def test_a_truncate_is_one_row(tmp_path: Path, log: SQLiteLog) -> None:
    staging = opened(tmp_path, log)
    load(staging, log)
    assert [(r["_op"], r["_commit"], r["_ordinal"], r["id"]) for r in content(staging, A)][:1] == [
        ("t", 1, 3, None)
    ]
    assert content(staging, B)[-1]["_op"] == "t"


@pytest.mark.parametrize("bytes_", [1, 1 << 20])
def test_staging_the_same_entries_again_changes_nothing(tmp_path: Path, log: SQLiteLog, bytes_: int) -> None:
    staging = opened(tmp_path, log)
    load(staging, log, bytes_)
    entries = log.read(0, 1 << 20)
    for part in (entries, entries[:2], entries):
        staging.write(part)
    staging.write([])
    holds_the_log(tmp_path, log)
    assert opened(tmp_path, log).through() == log.end().offset


def test_a_quiet_table_with_a_new_shape_is_staged_to_the_end(tmp_path: Path, log: SQLiteLog) -> None:
    """B's last entry is a schema: it needs no commit of its own, and must not pull progress back."""
    load(opened(tmp_path, log), log)
    assert opened(tmp_path, log).through() == log.end().offset


def test_a_dropped_column_is_null_from_then_on_and_a_new_one_before(tmp_path: Path, log: SQLiteLog) -> None:
    log.append([rows(A, 9, 1, ("id",))])
    staging = opened(tmp_path, log)
    load(staging, log)
    table = staging.read(A, 0, log.end().offset)
    assert table["w"].to_pylist() == [None] * 9 + ["w4.0", "w4.1", None]
    assert table["v"].to_pylist()[-1] is None


def test_schemas_are_those_of_an_offset(tmp_path: Path, log: SQLiteLog) -> None:
    load(opened(tmp_path, log), log)
    staging = opened(tmp_path, log)
    versions = [
        {t.name: s.version for t, s in staging.schemas(offset).items()} for offset in (0, 1, 4, 9, 11)
    ]
    assert versions == [{}, {"a": 1}, {"a": 1, "b": 1}, {"a": 2, "b": 1}, {"a": 2, "b": 2}]


def test_the_timeline_of_a_table_says_what_changed(tmp_path: Path, log: SQLiteLog) -> None:
    at = Position(0, 8, 0)
    shape = TableSchema(A, (Column("id", "bigint"), Column("w", "text")), ("id", "w"), 3)
    log.append([Entry("schema", A, at, at, 70, 0, 3, shape.to_json().encode())])
    log.append([schema(A, 9, ("id",), 4)])
    staging = opened(tmp_path, log)
    load(staging, log)
    found = list(timeline(staging, A, log.end().offset))
    assert [event.what for event in found] == [
        "2 columns, key (id)",
        "w added: text",
        "v dropped",
        "id: text is bigint",
        "key (id) is key (id, w)",
        "w dropped",
        "id: bigint is text",
        "key (id, w) is key (id)",
    ]
    assert (found[2].position, found[2].committed_at, found[2].kind) == (at, 70, "column_dropped")
    assert len(list(timeline(staging, A, found[2].offset))) == 5


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[DeltaStaging, list[tuple[object, ...]]]:
    folder = tmp_path_factory.mktemp("cuts")
    log = SQLiteLog(folder / "log.db")
    for commit in range(1, 25):
        log.append([rows(A, commit, commit % 4 + 1), *([rows(A, commit, 2)] if commit % 3 else [])])
    staging = opened(folder, log)
    load(staging, log, 2_000)
    return opened(folder, log), list(expected(log, A))


@given(cut=st.tuples(st.integers(0, 45), st.integers(0, 45)))
def test_any_range_of_offsets_reads_what_the_log_has_there(
    loaded: tuple[DeltaStaging, list[tuple[object, ...]]], cut: tuple[int, int]
) -> None:
    staging, everything = loaded
    after, through = cut
    wanted = [row for row in everything if after < row[3] <= through]  # type: ignore[operator]
    found = [
        (r["_op"], r["_commit"], r["_ordinal"], r["_offset"], r["id"])
        for r in content(staging, A, after, through)
    ]
    assert found == wanted
    assert staging.count(A, after, through) == len(wanted)


# -- names ---------------------------------------------------------------------------------------------

NAMES = [
    "it's",
    'a"b',
    "a/b",
    "a\\b",
    ".",
    "..",
    ".hidden",
    "a.b",
    " ",
    "a b ",
    "%",
    "%2F",
    "a%20b",
    "~",
    "~2E",
    "é" * 31,
    "漢" * 21,
    "x" * 63,
    "MixedCase",
    "mixedcase",
    "a=b",
    "a?b#c",
    "_delta_log",
    "a\nb",
    "*",
    "\U0001f600",
    "CON",
    "",
]


def test_any_table_name_has_a_folder_of_its_own(tmp_path: Path) -> None:
    root = tmp_path / "a b'é"
    root.mkdir()
    log = SQLiteLog(root / "log.db")
    tables = [TableId("public", name) for name in NAMES if name] + [
        TableId("we/ird.ä", "t"),
        TableId("~", "~"),
    ]
    log.append(
        [entry for i, table in enumerate(tables) for entry in (schema(table, 1), rows(table, 1, i + 1))]
    )
    load(opened(root, log), log)
    staging = opened(root, log)
    assert staging.through() == log.end().offset
    for i, table in enumerate(tables):
        assert staging.count(table, 0, 1 << 40) == i + 1
    folders = [path.parent for path in (root / "staging").glob("raw/shop/*/*/_delta_log")]
    assert len(folders) == len(tables) + 1
    assert len({str(folder).lower() for folder in folders}) >= len(tables) - 1


# -- anybody's tables ------------------------------------------------------------------------------------


def test_raw_tables_are_plain_delta(tmp_path: Path, log: SQLiteLog) -> None:
    load(opened(tmp_path, log), log)
    delta = DeltaTable(tmp_path / "staging/raw/shop/public/a")
    table = delta.to_pyarrow_table() if hasattr(delta, "to_pyarrow_table") else pa.table(delta.to_arrow())
    assert sorted(table["id"].to_pylist(), key=str) == sorted((row[4] for row in expected(log, A)), key=str)
    files = delta.file_uris()
    with duckdb.connect() as db:
        count = db.execute(
            "SELECT count(*), count(w) FROM read_parquet(?, union_by_name=true)", [files]
        ).fetchall()
    assert count == [(len(expected(log, A)), 2)]


# -- crashes -------------------------------------------------------------------------------------------

LOADER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_staging as t
log = t.SQLiteLog(Path(sys.argv[2]) / "log.db")
t.load(t.opened(Path(sys.argv[2]), log), log, 300)
"""


@pytest.mark.parametrize("place", ["staging.data_synced", "staging.committed", "staging.commit_synced"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_killed_load_is_made_good_by_the_next(tmp_path: Path, log: SQLiteLog, place: str, at: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(Path(__file__).parent), str(tmp_path)],
        env={**os.environ, VARIABLE: f"{place}=kill@{at}"},
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    load(opened(tmp_path, log), log, 1 << 20)
    holds_the_log(tmp_path, log)


def tear(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    elif how == "first line only":
        path.write_text(
            path.read_text().splitlines()[-1 if "commitInfo" in path.read_text().splitlines()[-1] else 0]
        )
    elif how == "zeros":
        path.write_bytes(b"\0" * path.stat().st_size)
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize("how", ["truncated", "empty", "zeros", "first line only"])
@pytest.mark.parametrize("count", [1, 2])
def test_torn_commits_are_dropped_and_loaded_again(
    tmp_path: Path, log: SQLiteLog, how: str, count: int
) -> None:
    load(opened(tmp_path, log), log)
    for commit in sorted((tmp_path / "staging/raw/shop/public/a/_delta_log").glob("*.json"))[-count:]:
        tear(commit, how)
    load(opened(tmp_path, log), log)
    holds_the_log(tmp_path, log)


@pytest.mark.parametrize("how", ["truncated", "empty", "absent"])
def test_a_commit_whose_data_file_is_torn_is_dropped(tmp_path: Path, log: SQLiteLog, how: str) -> None:
    load(opened(tmp_path, log), log)
    newest = sorted((tmp_path / "staging/raw/shop/public/a").glob("*.parquet"))[-1]
    newest.unlink() if how == "absent" else tear(newest, how)
    load(opened(tmp_path, log), log)
    holds_the_log(tmp_path, log)


def test_a_table_torn_at_its_creation_is_made_again(tmp_path: Path, log: SQLiteLog) -> None:
    staging = opened(tmp_path, log)
    staging.write(log.read(0, 1))
    for name in ("public/a", "~/_schemas"):
        for commit in (tmp_path / "staging/raw/shop" / name / "_delta_log").glob("*.json"):
            tear(commit, "empty")
    load(opened(tmp_path, log), log)
    holds_the_log(tmp_path, log)


def test_a_reader_repairs_nothing(tmp_path: Path, log: SQLiteLog) -> None:
    load(opened(tmp_path, log), log)
    stray = tmp_path / "staging/raw/shop/public/a/_delta_log/99.json"
    stray.write_text("")
    opened(tmp_path, log, read_only=True)
    assert stray.exists()


def test_everything_is_synced_in_order_before_write_returns(
    tmp_path: Path, log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = opened(tmp_path, log)
    staging.write(log.read(0, 1))
    synced: list[Path] = []
    real = os.fsync

    def record(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        commits = list((table / "_delta_log").glob("*.json"))
        names_data = any(
            '"add"' in commit.read_text() and "0003.parquet" in commit.read_text() for commit in commits
        )
        if synced[-1].suffix == ".parquet":
            assert not names_data, "the data is synced before any commit names it"
        real(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    table = tmp_path / "staging/raw/shop/public/a"
    staging.write(log.read(2, 1))
    name = f"{staging.through():020d}.parquet"
    commit = max((table / "_delta_log").glob("*.json"))
    assert json.loads(next(x for x in commit.read_text().splitlines() if "add" in x))["add"]["path"] == name
    order = [synced.index(path) for path in (table / name, table, commit, table / "_delta_log")]
    assert order == sorted(order)


def test_a_new_table_s_folders_are_synced_up_to_the_root(
    tmp_path: Path, log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[Path] = set()
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.add(Path(f"/proc/self/fd/{fd}").readlink()), real(fd))[1]
    )
    staging = opened(tmp_path, log)
    staging.write(log.read(0, 1))
    table = tmp_path / "staging/raw/shop/public/a"
    wanted = {table / "_delta_log", table, *list(table.parents)[:5]}
    assert wanted <= synced, sorted(str(p) for p in wanted - synced)


# -- identity ------------------------------------------------------------------------------------------


def test_tables_of_another_log_are_refused(tmp_path: Path, log: SQLiteLog) -> None:
    load(opened(tmp_path, log), log)
    with pytest.raises(StagingForeign, match="another log") as caught:
        DeltaStaging(tmp_path / "staging", "shop", "f" * 32)
    assert caught.value.exit_code == 2


def test_a_log_that_ends_before_what_is_staged_is_refused(tmp_path: Path, log: SQLiteLog) -> None:
    load(opened(tmp_path, log), log)
    staging = DeltaStaging(tmp_path / "staging", "shop", log.id)
    with pytest.raises(LogError, match="restored from an older copy"):
        staging.recover({}, 5)


def test_a_source_of_another_name_has_its_own_tables(tmp_path: Path, log: SQLiteLog) -> None:
    load(opened(tmp_path, log), log)
    assert DeltaStaging(tmp_path / "staging", "other", "f" * 32).schemas(1 << 40) == {}


def items(log: SQLiteLog) -> Sequence[LoggedEntry]:
    return log.read(0, 1 << 30)


@settings(max_examples=6)
@given(cuts=st.sets(st.integers(1, 5)))
def test_how_the_log_is_cut_into_loads_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, cuts: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("loads")
    log = SQLiteLog(folder / "log.db")
    ends = [log.append(group).offset for group in history()]
    staging = opened(folder, log)
    after = 0
    for i in sorted(cuts | {len(ends)}):
        staging.write([item for item in items(log) if after < item.offset <= ends[i - 1]])
        after = ends[i - 1]
    holds_the_log(folder, log)
