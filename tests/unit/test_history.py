"""What a model keeps of earlier states, over copies: a table that is copied again loses none of them, and is
what the fold of all of staging is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from test_joining import SHAPE, TABLE, Bench, Source, change, entry, stream_to, write_copy
from test_rebuild import Shop

from headrace.authoring.files import find_model
from headrace.authoring.preview import preview
from headrace.cells import rows_of
from headrace.change import Column, Copy, Position, TableSchema
from headrace.config import load_project
from headrace.payload import BEFORE
from headrace.recopied import absences
from headrace.transform.model import RowModel, bind
from headrace.transform.sql import read_model

BODY = "/* headrace\n{} */ SELECT id, {} AS v, big{} FROM raw.shop.t"
KINDS = {
    "history": 'materialize = "history"\n',
    "soft": 'delete = "soft"\n',
    "append": 'materialize = "append"\n',
    "soft append": 'materialize = "append"\ndelete = "soft"\n',
}


def model_of(folder: Path, kind: str, value: str = "v") -> RowModel:
    path = folder / "m.sql"
    path.write_text(BODY.format(KINDS[kind], value, ", _op AS op" if "append" in kind else ""))
    return bind(read_model(path), SHAPE)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.log.close()


@pytest.fixture(autouse=True)
def small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shares of keys; and what a copy no more has was gone as of its floor."""
    monkeypatch.setattr("headrace.recopied._SHARE_ROWS", 25)

    def began(_: object, copy: Copy) -> int:
        return copy.floor.commit

    monkeypatch.setattr("headrace.joining.began", began)


def is_the_fold_of_all_history(bench: Bench, model: RowModel) -> None:
    whole = model.whole(bench.joiner.history(model, bench.staging.through()))
    names = ", ".join(["_source_key", *model.types()])
    (found,) = bench.destination.read([f"SELECT {names} FROM m"])
    # What a model makes of no changes has no columns.
    expected = whole.rows.select(["_source_key", *model.types()]) if whole.rows.num_rows else whole.rows
    assert sorted(map(repr, rows_of(found))) == sorted(map(repr, rows_of(expected)))
    opened = "SELECT key, commit, ordinal, blocked FROM headrace.quarantine WHERE status = 'quarantined'"
    records = whole.records.select(["key", "commit", "ordinal", "blocked"])
    assert sorted(bench.ask(opened)) == sorted(map(tuple, rows_of(records)))
    books = "SELECT coalesce(sum({0}), 0)::INT FROM headrace.ledger WHERE kind <> 'void'"
    assert bench.ask(books.format("quarantined")) == [(records.num_rows,)]
    assert bench.ask(books.format("blocked")) == [(sum(records["blocked"].to_pylist()),)]
    unclosed = "read <> applied + superseded + filtered + quarantined + waiting + blocked"
    assert bench.ask(f"SELECT count(*) FROM headrace.ledger WHERE {unclosed}") == [(0,)]


def bring(bench: Bench, model: RowModel, chance: random.Random) -> None:
    bench.load()
    bench.join(model, chance)


@pytest.mark.parametrize(("seed", "length"), [(1, 0), (2, 20), (3, 40)])
def test_a_history_shows_the_source_as_of_every_commit_whatever_is_copied_again(
    bench: Bench, tmp_path: Path, seed: int, length: int
) -> None:
    chance = random.Random(seed)
    source, model = Source(chance, length), model_of(tmp_path, "history")
    streamed = write_copy(bench.log, source, chance, chance.randint(0, length // 2))
    bring(bench, model, chance)
    copy = bench.staging.copy(TABLE, bench.staging.through())
    assert copy is not None
    for _ in range(3):
        ever = "coalesce(epoch_us(valid_to), 999999)"
        versions = bench.ask(f"SELECT id, v, big, epoch_us(valid_from), {ever} FROM m")
        for commit in range(copy.ceiling.commit, streamed + 1):
            seen = {key: (v, big) for key, v, big, since, until in versions if since <= commit < until}
            assert seen == source.states[commit], commit
        assert bench.ask("SELECT count(*) FROM m WHERE valid_to < valid_from") == [(0,)]
        is_the_fold_of_all_history(bench, model)
        streamed = write_copy(bench.log, source, chance, streamed)
        bring(bench, model, chance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [5])
def test_over_copies_gaps_and_bad_changes_a_table_is_the_fold_of_all_history(
    bench: Bench, tmp_path: Path, kind: str, seed: int
) -> None:
    chance = random.Random(seed)
    source, model = Source(chance, 60), model_of(tmp_path, kind, "replace(v, '3', 'x')[2:]::INT")
    streamed = write_copy(bench.log, source, chance, chance.randint(0, 10))
    for _ in range(2):  # in place, then beside
        bring(bench, model, chance)
        is_the_fold_of_all_history(bench, model)
        streamed = stream_to(bench.log, source, streamed, min(streamed + chance.randint(0, 8), 60))
        streamed = min(streamed + chance.choice([0, 6]), 60)  # a gap
        streamed = write_copy(bench.log, source, chance, streamed)
    bring(bench, model, chance)
    is_the_fold_of_all_history(bench, model)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "history",
            [("k1", "a", 5, None), ("k2", "a", 5, 7), ("k2", "b", 7, 9), ("k2", "c", 9, None),
             ("k3", "a", 5, 9), ("k4", "a", 9, None)],
        ),
        ("soft", [("k1", "a", None), ("k2", "c", None), ("k3", "a", 9), ("k4", "a", None)]),
        (
            "append",
            [("k1", "a", "r", 5), ("k2", "a", "r", 5), ("k2", "b", "u", 7), ("k2", "c", "r", 9),
             ("k3", "a", "r", 5), ("k4", "a", "r", 9)],
        ),
        (
            "soft append",
            [("k1", "a", "r", 5), ("k2", "a", "r", 5), ("k2", "b", "u", 7), ("k2", "c", "r", 9),
             ("k3", "a", "r", 5), ("k3", None, "d", 9), ("k4", "a", "r", 9)],
        ),
    ],
)  # fmt: skip
def test_of_a_new_copy_only_what_differs_is_kept(
    bench: Bench, tmp_path: Path, kind: str, expected: list[tuple[object, ...]]
) -> None:
    """Behind a gap: k1 is as it was, k2 has changed twice, the second time unseen, k3 is gone, k4 came."""
    model = model_of(tmp_path, kind)
    bench.copy(5, *((key, ("a", "x")) for key in ("k1", "k2", "k3")))
    bench.join(model)
    bench.log.append([entry([change("u", 7, "k2", ("b", "x"))])])
    bench.copy(9, ("k1", ("a", "x")), ("k2", ("c", "x")), ("k4", ("a", "x")))
    bench.join(model)
    more = {
        "history": "epoch_us(valid_from), CASE WHEN NOT is_current THEN epoch_us(valid_to) END",
        "soft": "epoch_us(_deleted_at)",
    }.get(kind, "op, _commit")
    assert bench.ask(f"SELECT id, v, {more} FROM m ORDER BY ALL NULLS LAST") == expected
    is_the_fold_of_all_history(bench, model)


def test_what_several_copies_lack_is_told_once(bench: Bench, tmp_path: Path) -> None:
    model, both = model_of(tmp_path, "soft append"), ("k1", "k2")
    bench.copy(5, *((key, ("a", "x")) for key in both))
    bench.join(model)
    for commit in (9, 12, 15):
        bench.copy(commit, ("k1", ("a", "x")))
        bench.join(model)
    expected = [("k1", "a", "r", 5), ("k2", "a", "r", 5), ("k2", None, "d", 9)]
    assert bench.ask("SELECT id, v, op, _commit FROM m ORDER BY ALL NULLS LAST") == expected


def test_a_key_column_may_have_any_name() -> None:
    names = ("k", "gone", "every", "place", "whole")
    shape = TableSchema(TABLE, tuple(Column(name, "text") for name in names), names)
    head = {"_op": "r", "_epoch": 0, "_commit": 5, "_ordinal": 1}
    cells = [dict.fromkeys(names, key) | head for key in ("a", "b")]
    before = pa.Table.from_pylist(cells).append_column("_before", pa.nulls(2, BEFORE))
    floor = Position(0, 9, 0)
    copy = Copy(7, 9, 7, floor, floor, names)
    (gone,) = absences(shape, copy, [before], before.slice(0, 1), 9).to_pylist()
    assert [gone[name] for name in (*names, "_op", "_commit")] == ["b"] * 5 + ["d", 9]


@pytest.mark.parametrize("kind", KINDS)
def test_a_lane_applies_rebuilds_previews_and_redrives_it(tmp_path: Path, kind: str) -> None:
    shop, chance = Shop(tmp_path), random.Random(7)

    def put(value: str) -> None:
        text = "/* headrace\n{}*/ SELECT id::BIGINT AS id, {} AS n FROM raw.shop.t WHERE v <> '7'"
        shop.put(text.format(KINDS[kind], value))
        shop.lane.reload_models(now=True)

    def check() -> None:
        ((offset,),) = shop.ask("SELECT \"offset\" FROM headrace.models WHERE model = 'm'")
        (model,) = shop.lane.models()
        whole, names = model.whole(shop.lane.joiner.history(model, offset)), list(model.types())
        (found,) = shop.lane.destination.read([f"SELECT {', '.join(names)} FROM m"])
        expected = rows_of(whole.rows.select(names))
        assert sorted(map(repr, rows_of(found))) == sorted(map(repr, expected))
        sums = "SELECT sum(quarantined)::INT, sum(blocked)::INT FROM headrace.ledger WHERE kind <> 'void'"
        blocked = sum(whole.records["blocked"].to_pylist())
        assert shop.ask(sums) == [(whole.records.num_rows, blocked)]

    put("replace(v, '3', 'x')::INTEGER")
    for _ in range(25):
        shop.change(chance, chance.randint(1, 3))
        shop.load()
        shop.lane.apply()
    shop.bring()
    check()
    seen = preview(load_project(shop.folder), find_model(load_project(shop.folder), "m"))
    assert seen.difference is not None
    assert seen.difference.nothing, seen.difference
    shop.lane.rebuild("m")
    shop.bring()
    assert shop.ask("SELECT added, removed, changed FROM headrace.rebuilds") == [(0, 0, 0)]
    put("v::INTEGER")
    keys = [key for (key,) in shop.ask("SELECT key FROM headrace.quarantine WHERE status = 'quarantined'")]
    assert keys or kind == "soft"
    shop.lane.redrive("m", keys)
    if kind != "soft":  # what a delete has healed stays as it was
        check()
    shop.bring()
    put("v::INTEGER * 10")
    shop.lane.rebuild("m")
    shop.bring()
    check()
    shop.lane.close()
