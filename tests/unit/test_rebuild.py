"""Rebuilding a model beside its live table, on a lane whose log a test writes itself."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entries import rows as entry
from headrace import failpoints
from headrace.change import Column, CopyMark, Entry, Position, TableId, TableSchema
from headrace.cli import main
from headrace.config import load_project
from headrace.errors import UserError
from headrace.lane import Lane
from headrace.log import index
from headrace.pipeline import open_lanes
from headrace.snapshot import past_of, write_snapshot
from headrace.transform.header import version_of

TABLE = TableId("public", "t")
SHAPE = TableSchema(TABLE, (Column("id", "bigint"), Column("v", "text")), ("id",), 1)
MODEL = """/* headrace
key = ["id"]
[contract]
id = "BIGINT NOT NULL"
n = "INTEGER"
*/
SELECT id::BIGINT AS id, {} AS n FROM raw.shop.t {}"""
TEXTS = [MODEL.format("replace(v, '3', 'x')::INTEGER", ""), MODEL.format("v::INTEGER * 10", "WHERE v <> '7'")]


class Shop:
    """A source's log, its staging, its model and its destination; no source."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "models").mkdir()
        (folder / "headrace.toml").write_text('[source.shop]\nurl = "postgresql://nobody@127.0.0.1:1/x"\n')
        (folder / ".headrace" / "log").mkdir(parents=True)
        self.shape = SHAPE
        self.state: dict[str, str] = {}
        self.commit = 10
        self.put(TEXTS[0])
        self.lane = self._open()
        for mark in (CopyMark("begin", self.shape), CopyMark("chunk"), CopyMark("end", floor=1, ceiling=1)):
            at = Position(0, 1, 0)
            self.lane.log.append([Entry("marker", TABLE, at, at, 1, 0, 1, mark.to_json().encode())])
        self.bring()

    def _open(self) -> Lane:
        (lane,) = open_lanes(load_project(self.folder))
        return lane

    def put(self, text: str) -> None:
        (self.folder / "models" / "m.sql").write_text(text)

    def reopen(self) -> None:
        self.lane.close()
        self.lane = self._open()

    def change(self, chance: random.Random, count: int = 1) -> None:
        """Commit a transaction of some changes at the source, and capture it."""
        self.commit += 1
        made: list[tuple[Any, ...]] = []
        for ordinal in range(1, count + 1):
            key, value = str(chance.randint(1, 12)), str(chance.randint(0, 9))
            if key not in self.state:
                made.append(("c", self.commit, ordinal, (key, value)))
            elif chance.random() < 0.2:
                made.append(("d", self.commit, ordinal, (key, None)))
                del self.state[key]
                continue
            elif (new := str(chance.randint(1, 12))) not in self.state and chance.random() < 0.3:
                made.append(("u", self.commit, ordinal, (new, value), None, {"id": key}))
                del self.state[key]
                key = new
            else:
                made.append(("u", self.commit, ordinal, (key, value)))
            self.state[key] = value
        self.lane.log.append([entry(self.shape, made)])

    def truncate(self) -> None:
        """Commit a truncate at the source, and capture it."""
        self.commit += 1
        at = Position(0, self.commit, 1)
        told = json.dumps({"lsn": self.commit, "txid": self.commit}).encode()
        self.lane.log.append([Entry("truncate", TABLE, at, at, self.commit, 1, 1, told)])
        self.state.clear()

    def load(self) -> None:
        while self.lane.load():
            pass

    def bring(self) -> None:
        self.load()
        while self.lane.apply():
            pass

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        (table,) = self.lane.destination.read([query])
        return sorted(tuple(row.values()) for row in table.to_pylist())

    def rebuilds(self) -> int:
        ((count,),) = self.ask("SELECT count(*) FROM headrace.rebuilds WHERE NOT dry_run")
        return int(count)

    def assert_is_all_of_history(self) -> None:
        """Where it stands, the model holds what the fold of its whole history under it is."""
        ((offset,),) = self.ask("SELECT \"offset\" FROM headrace.models WHERE model = 'm'")
        (model,) = self.lane.models()
        folded = model.prepare(self.lane.joiner.history(model, offset))
        wanted = sorted((row["id"], row["n"]) for row in folded.rows.to_pylist())
        assert self.ask("SELECT id, n FROM m") == wanted
        opened = "SELECT commit, ordinal, key FROM headrace.quarantine WHERE status = 'quarantined'"
        records = folded.records.select(["commit", "ordinal", "key"]).to_pylist()
        assert self.ask(opened) == sorted(tuple(record.values()) for record in records)
        assert self.ask("SELECT sum(quarantined)::INT FROM headrace.ledger WHERE kind <> 'void'") == [
            (len(records),)
        ]


@pytest.fixture(autouse=True, scope="module")
def small_slices() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.log.index.MAX_SLICE_ROWS", 5)
        patch.setattr("headrace.history.PIECE_ROWS", 5)
        yield


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    made = Shop(tmp_path)
    yield made
    made.lane.close()


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 32))
def test_whatever_happens_meanwhile_a_rebuild_ends_as_the_fold_of_all_history(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    chance = random.Random(seed)
    shop = Shop(tmp_path_factory.mktemp("shop"))
    known, text = 0, 0
    for _ in range(30):
        what = chance.choice(["change", "change", "load", "apply", "apply", "rebuild", "reopen", "edit"])
        if what == "change" and chance.random() < 0.1:
            shop.truncate()
        elif what == "change":
            shop.change(chance, chance.randint(1, 3))
        elif what == "load":
            shop.load()
        elif what == "apply":
            shop.lane.apply()
        elif what == "reopen":
            shop.reopen()
        elif what == "edit":
            text = 1 - text
            shop.put(TEXTS[text])
            shop.lane.reload_models(now=True)
        elif what == "rebuild":
            with suppress(UserError):  # one of the other kind is under way
                shop.lane.rebuild("m", dry_run=chance.random() < 0.3)
        if (done := shop.rebuilds()) > known:
            known = done
            shop.assert_is_all_of_history()
    shop.bring()
    shop.lane.rebuild("m")
    shop.bring()
    shop.assert_is_all_of_history()
    assert shop.rebuilds() > known
    assert shop.ask("FROM duckdb_tables() SELECT table_name WHERE schema_name = 'headrace_joining'") == []
    shop.lane.close()


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 32))
def test_the_past_is_the_fold_of_what_was_committed_by_then(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    chance = random.Random(seed)
    shop = Shop(tmp_path_factory.mktemp("shop"))
    for n in range(20):
        shop.truncate() if n == 12 or chance.random() < 0.05 else shop.change(chance, chance.randint(1, 4))
        shop.load()  # a file of its own
    shop.bring()
    held, lane = shop.ask("SELECT id, n FROM m"), shop.lane
    shop.put(TEXTS[1 - seed % 2])
    lane.reload_models(now=True)
    (model,) = lane.models()
    for commit in chance.sample(range(10, shop.commit + 1), 3):
        past = past_of(lane.log, lane.staging, model, f"0/{commit:X}")
        found = write_snapshot(past, lane.destination, f"as_of_{commit}", shop.folder, threading.Event())
        history = lane.joiner.history(model, past.at.through)
        folded = model.prepare(history.filter(pc.less_equal(history["_commit"], commit)))
        rows = sorted((row["id"], row["n"]) for row in folded.rows.to_pylist())
        assert shop.ask(f"SELECT id, n FROM as_of_{commit}") == rows
        assert (found["rows"], found["open_records"]) == (len(rows), folded.records.num_rows)
        was, now = dict(rows), dict(held)
        assert found["added"] == len(now.keys() - was.keys())
        assert found["removed"] == len(was.keys() - now.keys())
        assert found["changed"] == sum(was[key] != now[key] for key in was.keys() & now.keys())
    assert shop.ask("SELECT id, n FROM m") == held
    assert shop.ask("FROM headrace.joining") == []
    lane.close()


def test_the_command_shows_the_past_and_puts_it_into_a_table(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    for commit, changes in (
        (11, [("c", "1", "5"), ("c", "2", "6")]),
        (12, [("u", "1", "8"), ("d", "2", None)]),
    ):
        made = [(op, commit, i, (key, value)) for i, (op, key, value) in enumerate(changes, 1)]
        shop.lane.log.append([entry(SHAPE, made)])
    shop.bring()
    shop.lane.close()
    command = ["rebuild", "m", "--project", str(shop.folder), "--as-of"]
    assert main([*command, "0/B", "--dry-run"]) == 0
    told = capsys.readouterr().out
    for line in ("m had 2 rows and 0 open records in quarantine, as of 0/B", "removed  1", "1: n 5 → 8"):
        assert line in told
    assert main([*command, "1970-01-01T00:00:11", "--into", "before.m"]) == 0
    assert "before.m holds them" in capsys.readouterr().out
    shop.lane = shop._open()
    assert shop.ask("SELECT id, n FROM before.m") == [(1, 5), (2, 6)]
    assert shop.ask("SELECT id, n FROM m") == [(1, 8)]
    assert shop.ask("SELECT count(*) FROM headrace.shapes WHERE model LIKE '%before%'") == [(0,)], (
        "it is theirs"
    )
    assert shop.ask("FROM duckdb_tables() SELECT table_name WHERE schema_name = 'headrace_joining'") == []
    shop.lane.close()
    for arguments, words in (
        (["0/B"], "The live table does not go back"),
        (["0/B", "--into", "before.m"], "There is a table before.m in the destination already"),
        (["0/B", "--into", "m"], "There is a table m in the destination already"),
        (["0/B", "--into", "headrace.m"], "is no name for a table"),
        (["0/D", "--dry-run"], "0/D lies beyond what is captured"),
        (["2", "--dry-run"], "2 lies before what is known of public.t: its copy was complete at offset 3"),
    ):
        assert main([*command, *arguments]) == 2
        assert words in capsys.readouterr().err
    shop.lane = shop._open()


def test_the_live_table_goes_on_while_it_is_rebuilt(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never stands still: what is built comes to where it is nevertheless."""
    monkeypatch.setattr(index, "_MAX_SLICE_BYTES", 1)
    chance = random.Random(1)
    for _ in range(20):
        shop.change(chance)
    shop.bring()
    shop.lane.rebuild("m")
    stands = []
    while not shop.rebuilds():
        shop.change(chance)
        shop.load()
        assert shop.lane.apply()
        assert len(stands) < 50, "it comes to no end"
        stands += shop.ask("SELECT \"offset\" FROM headrace.models WHERE model = 'm'")
    assert len(set(stands)) > 3, "it stood still meanwhile"
    shop.bring()
    assert shop.rebuilds() == 1
    shop.assert_is_all_of_history()


@pytest.mark.parametrize("point", ["destination.join.commit", "destination.join.attach"])
def test_a_rebuild_that_fails_at_any_step_goes_on(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    chance = random.Random(2)
    for _ in range(20):
        shop.change(chance)
    shop.bring()
    shop.put(TEXTS[1])
    shop.lane.rebuild("m")
    monkeypatch.setattr(failpoints, "_armed", failpoints._parse(f"{point}=raise"))
    with pytest.raises(OSError, match=point):
        shop.bring()
    monkeypatch.setattr(failpoints, "_armed", {})
    shop.reopen()
    shop.bring()
    assert shop.rebuilds() == 1
    shop.assert_is_all_of_history()


def test_a_killed_rebuild_goes_on_where_it_was(shop: Shop) -> None:
    """Also before and between the older changes of keys whose newest change is bad."""
    chance = random.Random(3)
    for _ in range(12):
        shop.change(chance, 4)
        shop.load()  # a file of its own, so that there are pieces
    shop.put(TEXTS[1])
    shop.bring()
    shop.put(TEXTS[0])
    shop.lane.close()
    run = f"main(['rebuild', 'm', '--project', {str(shop.folder)!r}])"
    code = f"from headrace import history; history.PIECE_ROWS = 3\nfrom headrace.cli import main; exit({run})"
    stood = list[tuple[int, int]]()
    for at in (2, 4, 2, 0):
        armed = os.environ | {failpoints.VARIABLE: f"destination.join.commit=kill@{at}"}
        ended = subprocess.run([sys.executable, "-c", code], env=armed, check=False).returncode
        assert ended == (-signal.SIGKILL if at else 0)
        shop.lane = shop._open()
        ((phase, offset),) = shop.ask("SELECT phase, \"offset\" FROM headrace.joins WHERE model = 'm'")
        shop.lane.close()
        stood.append((("newest", "older copy", "older", "done").index(phase), offset))
    assert stood == sorted(set(stood)), "it began anew"
    assert stood[0][0] == 0
    shop.lane = shop._open()
    assert shop.rebuilds() == 1
    assert shop.ask("SELECT count(*) > 0 FROM headrace.quarantine WHERE status = 'quarantined'") == [(True,)]
    shop.assert_is_all_of_history()


def test_the_command_shows_the_difference_and_a_dry_run_changes_nothing(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.lane.log.append(
        [entry(shop.shape, [("c", 11, i, (str(i), v)) for i, v in ((1, "5"), (2, "7"), (3, "3"))])]
    )
    shop.bring()
    held = [(1, 5), (2, 7)]
    assert shop.ask("SELECT id, n FROM m") == held
    shop.put(TEXTS[1])
    shop.lane.close()
    for dry_run in (True, False):
        assert main(["rebuild", "m", "--project", str(shop.folder), *["--dry-run"][: int(dry_run)]]) == 0
        told = capsys.readouterr().out
        assert f"m {'would have' if dry_run else 'has'} 2 rows and 0 open records" in told
        for line in ("added  1", "3: id 3, n 30", "removed  1", "2: id 2, n 7", "changed  1", "1: n 5 → 50"):
            assert line in told
        shop.lane = shop._open()
        assert shop.ask("SELECT id, n FROM m") == (held if dry_run else [(1, 50), (3, 30)])
        shop.lane.close()
    shop.lane = shop._open()
    shop.assert_is_all_of_history()


def test_a_model_that_is_behind_its_source_stays_so_when_it_is_rebuilt(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is in sync shows one commit of the source; this one shows an earlier one."""
    (shop.folder / "models" / "other.sql").write_text(TEXTS[0])
    shop.lane.log.append([entry(SHAPE, [("c", 11, 1, ("1", "5"))])])
    shop.bring()
    shop.put(TEXTS[0].replace("replace(v", "replace(gone"))
    shop.lane.reload_models(now=True)
    shop.lane.log.append([entry(SHAPE, [("c", 12, 1, ("2", "6"))])])
    shop.bring()
    assert "m" in shop.lane.suspended()
    shop.put(TEXTS[1])
    shop.lane.close()
    assert main(["rebuild", "m", "--project", str(shop.folder)]) == 0
    assert "m has 1 rows" in capsys.readouterr().out
    shop.lane = shop._open()
    states = shop.ask("SELECT model, state FROM headrace.models WHERE model IN ('m', 'other')")
    assert states == [("m", "joining"), ("other", "in_sync")]
    shop.bring()
    assert shop.ask("SELECT model, state FROM headrace.models WHERE model = 'm'") == [("m", "in_sync")]
    assert shop.ask("SELECT id, n FROM m") == [(1, 50), (2, 60)]


def test_a_rollback_puts_the_former_version_back_and_rebuilds(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.lane.log.append([entry(SHAPE, [("c", 11, 1, ("1", "5"))])])
    shop.bring()
    shop.put(TEXTS[1])
    shop.lane.rebuild("m")
    shop.lane.log.append([entry(SHAPE, [("c", 12, 1, ("2", "6"))])])
    shop.bring()
    assert shop.ask("SELECT id, n FROM m") == [(1, 50), (2, 60)]
    shop.lane.close()
    project = ["--project", str(shop.folder)]
    for text, held in ((TEXTS[0], [(1, 5), (2, 6)]), (TEXTS[1], [(1, 50), (2, 60)])):
        version = ["--to", version_of(text)] if text == TEXTS[1] else []
        assert main(["rollback", "m", *version, *project]) == 0
        assert (shop.folder / "models" / "m.sql").read_text() == text
        shop.lane = shop._open()
        assert shop.ask("SELECT id, n FROM m") == held
        shop.lane.close()
    assert main(["rollback", "m", "--to", "nothing", *project]) == 2
    assert f"Kept are: {', '.join(sorted(map(version_of, TEXTS)))}" in capsys.readouterr().err
    shop.lane = shop._open()


def test_what_cannot_be_rebuilt_is_refused(shop: Shop) -> None:
    with pytest.raises(UserError, match="Model x does not run now"):
        shop.lane.rebuild("x")
    at = Position(0, 2, 0)
    begin = CopyMark("begin", shop.shape, after=shop.lane.log.end().offset)
    for mark in (begin, CopyMark("chunk"), CopyMark("end", floor=2, ceiling=2)):
        shop.lane.log.append([Entry("marker", TABLE, at, at, 1, 0, 1, mark.to_json().encode())])
    shop.load()
    while shop.lane.apply() and not shop.ask("FROM headrace.joins SELECT 1 WHERE phase <> 'done'"):
        pass
    with pytest.raises(UserError, match="still takes in its table's copy"):
        shop.lane.rebuild("m")


@pytest.mark.parametrize("statement", ["ALTER TABLE m DROP COLUMN n", "DROP TABLE m"])
def test_a_table_that_somebody_changed_stands_still_until_it_is_built_anew(
    shop: Shop, capsys: pytest.CaptureFixture[str], statement: str
) -> None:
    chance = random.Random(3)
    for _ in range(20):
        shop.change(chance)
    shop.bring()
    with duckdb.connect(str(shop.folder / "warehouse.duckdb")) as db:
        db.execute(statement)
    for _ in range(2):  # a pipeline that starts anew tries once more, and writes nothing either
        shop.change(chance)
        shop.bring()
        assert "somebody else" in shop.lane.suspended()["m"]
        shop.lane.destination.reconsider("shop")
        shop.reopen()
    shop.bring()
    shop.lane.close()
    assert main(["rebuild", "m", "--dry-run", "--project", str(shop.folder)]) == 1
    assert "somebody else" in capsys.readouterr().err
    assert main(["rebuild", "m", "--project", str(shop.folder)]) == 0
    assert "is dropped. The pipeline builds it anew" in capsys.readouterr().err
    shop.lane = shop._open()
    shop.bring()
    assert shop.lane.suspended() == {}
    assert dict(shop.ask("SELECT id::VARCHAR, n FROM m")).keys() <= shop.state.keys()
    shop.assert_is_all_of_history()
    shop.lane.close()
