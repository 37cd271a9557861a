"""Raw tables as views: at every place what the source held then, in the source's types, from the files that
are needed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from test_joining import TABLE, Source, entry, marker, stream_to, write_copy

from entries import SECOND, rows, schema, truncate
from headrace.change import Column, CopyMark, Entry, TableId, TableSchema
from headrace.errors import UserError
from headrace.log.sqlite import SQLiteLog
from headrace.raw.project import OpenProject, open_project
from headrace.raw.query import names_in
from headrace.sources.postgres.lsn import format_lsn
from headrace.staging.delta import DeltaStaging

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ITEMS = TableId("public", "items")
Opened = tuple[SQLiteLog, DeltaStaging, OpenProject]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """A project whose log is written by hand."""
    (tmp_path / "headrace.toml").write_text('[source.shop]\nurl = "${env:NOT_SET}"\n')
    (tmp_path / ".headrace" / "log").mkdir(parents=True)
    log = SQLiteLog(tmp_path / ".headrace" / "log" / "shop.db")
    staging = DeltaStaging(tmp_path / ".headrace" / "staging", "shop", log.id)
    yield log, staging, open_project(tmp_path)
    log.close()


def stage(log: SQLiteLog, staging: DeltaStaging) -> None:
    staging.write(list(log.entries(staging.written(), log.end().offset)))


def copied(of: TableSchema, commit: int, *cells: tuple[str | None, ...]) -> list[Entry]:
    """A whole copy of a table under one snapshot."""
    begin = marker(commit, CopyMark("begin", of))
    ends = [marker(commit, CopyMark("chunk")), marker(commit, CopyMark("end", floor=commit, ceiling=commit))]
    read = rows(of, [("r", commit, i, row) for i, row in enumerate(cells, 1)], "copy")
    marks = [replace(mark, table=of.table) for mark in (begin, *ends)]
    return [marks[0], read, *marks[1:]]


@pytest.mark.parametrize("seed", range(4))
def test_every_place_shows_what_the_source_held_then(opened: Opened, seed: int) -> None:
    log, staging, project = opened
    chance = random.Random(seed)
    source = Source(chance, 40)
    streamed = write_copy(log, source, chance, stream_to(log, source, 0, 4))
    first = max(mark.ceiling for *_, mark in log.copy_marks())
    streamed = stream_to(log, source, streamed, 30)
    streamed = write_copy(log, source, chance, streamed)
    stream_to(log, source, streamed, 40)
    stage(log, staging)

    for commit in range(first, 41, 4):
        wanted = {(key, *row) for key, row in source.states[commit].items()}
        found = project.raw("shop.t", as_of=format_lsn(commit), columns=["id", "v", "big"]).read_all()
        assert {tuple(row.values()) for row in found.to_pylist()} == wanted, commit
        assert found.num_rows == len(wanted)
    offsets = [item.offset for item in log.headers(0, log.end().offset) if item.ends_group]
    for offset in offsets[-2:]:
        at = log.place(offset)[0].commit
        assert project.raw("shop.t", as_of=offset).read_all().num_rows == len(source.states[at])
    with pytest.raises(UserError, match="by then"):
        project.raw("shop.t", as_of="0/0")


def test_retention_takes_nothing_from_what_can_be_asked(opened: Opened) -> None:
    log, staging, project = opened
    source = Source(random.Random(1), 60)
    log.append(
        [
            marker(0, CopyMark("begin", source_shape())),
            marker(0, CopyMark("chunk")),
            marker(0, CopyMark("end")),
        ]
    )
    for commit in range(0, 60, 3):  # groups of three transactions
        log.append([replace(entry(source.changes[commit : commit + 3]), committed_at=commit + 3)])
    stage(log, staging)
    log.trim(log.end().offset - 4)
    assert log.begin().offset > 10
    for commit in (2, 10, 59):
        for place in (format_lsn(commit), EPOCH + timedelta(microseconds=commit)):
            found = project.raw("shop.t", as_of=place, columns=["id", "v", "big"]).read_all()
            assert {tuple(row.values()) for row in found.to_pylist()} == {
                (key, *row) for key, row in source.states[commit].items()
            }, (place, commit)
    with pytest.raises(UserError, match="where the transactions at offset 5 end"):
        project.raw("shop.t", as_of=5)


def source_shape() -> TableSchema:
    return TableSchema(TABLE, (Column("id", "text"), Column("v", "text"), Column("big", "text")), ("id",))


def test_cells_have_the_sources_types_and_what_is_no_value_of_them_is_null(opened: Opened) -> None:
    log, staging, project = opened
    was = TableSchema(ITEMS, (Column("id", "integer"), Column("data", "text"), Column("at", "date")), ("id",))
    now = TableSchema(
        ITEMS,
        (Column("id", "bigint"), Column("data", "bytea"), Column("at", "date"), Column("n", "numeric(9,2)")),
        ("id",),
        2,
    )
    log.append(
        copied(was, 100, ("1", "abcd", "2026-01-01"), ("2", "x", "0044-03-15 BC"), ("3", "y", "never"))
    )
    log.append([schema(200, now), rows(now, [("u", 200, 1, ("1", "\\x6869", "2026-02-02", "1.50"))])])
    stage(log, staging)

    found = project.query("SELECT * FROM raw.shop.items ORDER BY id").read_all()
    assert [str(found.schema.field(name).type) for name in ("id", "data", "at", "n")] == [
        "int64", "binary", "date32[day]", "decimal128(9, 2)",
    ]  # fmt: skip
    one, two, three = found.select(["data", "_op", "_commit", "_offset"]).to_pylist()
    assert (one["data"], one["_op"], one["_commit"]) == (b"hi", "u", 200)
    assert two["data"] == b"x"  # it was text then, and no hexadecimal
    assert project.query(
        "SELECT t.at, r.at IS NULL AS is_no_date FROM raw_text.shop.items t JOIN raw.shop.items r "
        "ON r.id = t.id::BIGINT WHERE r.id = 3"
    ).read_all().to_pylist() == [{"at": "never", "is_no_date": True}]
    assert three["_op"] == "r"
    before = project.raw("shop.items", as_of=format_lsn(199)).read_all()
    assert str(before.schema.field("data").type) == "string"
    assert "n" not in before.column_names
    (first, *_) = project.changes("shop.items", after=3, text=True).read_all().to_pylist()
    assert (first["_op"], first["data"], first["_unchanged"]) == ("u", "\\x6869", None)
    assert first["_committed_at"] == EPOCH + timedelta(microseconds=200 * SECOND)


def test_a_table_without_a_key_has_each_row_as_often_as_the_source(opened: Opened) -> None:
    log, staging, project = opened
    shape = TableSchema(ITEMS, (Column("v", "text"), Column("V", "integer")), ())
    log.append(copied(shape, 100, ("a", "1"), ("a", "1"), ("b", None)))
    log.append([rows(shape, [("c", 200, 1, ("a", "1")), ("d", 200, 2, ("b", None))])])
    log.append([rows(shape, [("u", 300, 1, ("c", "2"), None, {"v": "a", "V": "1"})])])
    stage(log, staging)
    found = project.query("SELECT * FROM raw.shop.items ORDER BY ALL").read_all()
    assert [tuple(row.values())[:2] for row in found.to_pylist()] == [("a", 1), ("a", 1), ("c", 2)]
    assert found.column_names[:2] == ["v", "V~56"]
    log.append([truncate(shape, 400)])
    stage(log, staging)
    assert project.raw("shop.items").read_all().num_rows == 0
    assert project.raw("shop.items", as_of=format_lsn(399)).read_all().num_rows == 3


def test_only_files_with_wanted_offsets_are_read(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    log, staging, project = opened
    shape = TableSchema(ITEMS, (Column("id", "integer"),), ("id",))
    log.append(copied(shape, 100, ("0",)))
    stage(log, staging)
    for commit in range(1, 6):
        log.append([rows(shape, [("c", 100 + commit, 1, (str(commit),))])])
        stage(log, staging)
    raw = staging.tables()[ITEMS]
    keep = {file.name for file in raw.overlapping(7, log.end().offset)}
    for file in raw.files:
        if file.name not in keep:
            (raw.path / file.name).unlink()  # who opens it fails
    found = project.changes("shop.items", after=7, columns=["id"]).read_all()
    assert sorted(found["id"].to_pylist()) == [4, 5]
    monkeypatch.undo()


def test_the_tables_of_a_query_are_told_from_its_other_names() -> None:
    found = names_in(
        'WITH c AS (FROM raw.shop."sales.items"), raw AS (SELECT 1) SELECT r.id FROM changes.shop.o r '
        "JOIN shop.o USING (id), c, raw, sales s WHERE id IN (SELECT id FROM RAW_text.shop.x)"
    )
    assert found.raw == (("changes", "shop", "o"), ("raw", "shop", "sales.items"), ("raw_text", "shop", "x"))
    assert found.others == ('"sales"', '"shop"."o"')


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("SELECT * FROM raw.shop.nothing", "There is no raw table nothing"),
        ("SELECT * FROM raw.mart.items", r"There is no \[source.mart\]"),
        ("SELECT nothing FROM raw.shop.items", "nothing"),
        ("CREATE TABLE t AS SELECT * FROM raw.shop.items", "Only queries are answered"),
        ("SELECT * FROM raw.shop.items, sales", "There is no destination"),
    ],
)
def test_what_cannot_be_read_is_told(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, query: str, words: str
) -> None:
    log, staging, project = opened
    monkeypatch.setenv("NOT_SET", "postgresql://localhost/shop")
    log.append(copied(TableSchema(ITEMS, (Column("id", "integer"),), ("id",)), 100, ("1",)))
    stage(log, staging)
    with pytest.raises(UserError, match=words):
        project.query(query)
    for as_of in ("yesterday", 99):
        with pytest.raises(UserError):
            project.raw("shop.items", as_of=as_of)
    with pytest.raises(UserError, match='"sales" is only there as it is now'):
        project.query("SELECT * FROM raw.shop.items, sales", as_of=3)
