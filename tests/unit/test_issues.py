"""The life of issues, and what the commands of the quarantine say and do, without a source."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from test_decided import Project

from entries import rows as entry
from headrace.errors import UserError
from headrace.lane import Lane
from projects import Done, here


class Shop(Project):
    """A project whose commands are run beside nothing."""

    def bad(self, *values: tuple[str, str]) -> None:
        """Commit and apply an insert or update of each key."""
        self.commit += 1
        ops = ["u" if key in self.state else "c" for key, _ in values]
        made = [(op, self.commit, i, each) for i, (op, each) in enumerate(zip(ops, values, strict=True), 1)]
        self.state.update(values)
        self.lane.log.append([entry(self.shape, made)])
        self.bring()

    def issue(self) -> tuple[Any, ...]:
        ((state, records, opened),) = self.ask("SELECT state, records, open FROM headrace.issues")
        return state, records, opened

    def redrive(self) -> None:
        self.lane.redrive("m", [record[-1] for record in self.records("status = 'quarantined'")])

    def backdate(self, what: str) -> None:
        """Let time pass for the issue."""
        with duckdb.connect(str(self.folder / "warehouse.duckdb")) as db:
            db.execute(f"UPDATE headrace.issues SET {what}")

    def command(self, *arguments: str) -> Done:
        self.lane.close()
        done = here("quarantine", *arguments, cwd=self.folder)
        self.lane = self._open()
        return done


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    made = Shop(tmp_path)
    lane: Lane = made.lane
    yield made
    lane.close()
    made.lane.close()


def test_an_issue_lives_by_its_records_and_the_versions_of_its_model(shop: Shop) -> None:
    shop.bad(("1", "3"), ("2", "3"))
    assert shop.issue() == ("new", 2, 2)
    shop.bad(("3", "3"))
    assert shop.issue() == ("new", 3, 3)
    shop.backdate("state_since = now() - INTERVAL 2 HOUR")
    shop.bad(("4", "3"))
    assert shop.issue() == ("ongoing", 4, 4)
    shop.mend(2)
    shop.redrive()
    assert shop.issue() == ("resolved", 4, 0)
    # The file of before is put back: late data of a version that was known when it was resolved.
    shop.mend(0)
    shop.bad(("5", "3"))
    assert shop.issue() == ("ongoing", 5, 1)
    shop.bad(("5", "2"))
    assert shop.issue() == ("resolved", 5, 0)
    shop.bad(("5", "3"))
    assert shop.issue() == ("regressed", 6, 1)
    # In one transaction what closes and opens is nothing new.
    shop.bad(("5", "1"), ("6", "3"))
    assert shop.issue() == ("regressed", 7, 1)
    shop.bad(("6", "1"))
    shop.mend(1)
    shop.put((shop.folder / "models" / "m.sql").read_text().replace("'5'", "'3'"))
    shop.lane.reload_models(now=True)
    shop.bad(("6", "3"))
    assert shop.issue() == ("regressed", 8, 1)


def test_an_archived_issue_comes_back_when_it_escalates(shop: Shop) -> None:
    shop.bad(("1", "3"))
    ((issue,),) = shop.ask("SELECT issue FROM headrace.issues")
    assert shop.command("archive", issue, "--actor", "ada").code == 0
    shop.bad(("2", "3"))
    assert shop.issue() == ("archived", 2, 2)
    hours = "first_seen = now() - INTERVAL 10 HOUR, window_began = now() - INTERVAL 2 HOUR"
    shop.backdate(hours)
    shop.bad(*((str(key), "3") for key in range(100, 109)))
    assert shop.issue() == ("archived", 11, 11)
    shop.bad(("109", "3"))
    assert shop.issue() == ("escalating", 12, 12)
    assert shop.ask("SELECT actor FROM headrace.issues") == [("ada",)]
    listed = shop.command("issues")
    assert "escalating" in listed.out
    assert shop.command("issues", "list", "--json").objects()[0]["records"] == 12
    refused = shop.command("archive", "v1:0")
    assert (refused.code, "is not there" in refused.err) == (2, True)


def test_a_dry_run_says_what_becomes_of_each_record(shop: Shop) -> None:
    shop.bad(("1", "3"))
    shop.bad(("1", "5"), ("2", "9"))
    shop.bad(("3", "5"))
    shop.mend(1)
    tried = shop.command("redrive", "--all", "--dry-run", "--json").objects()
    assert [(each["key"], each["outcome"], each["superseded_by"]) for each in tried] == [
        ("1", "passes", None), ("1", "fails", None), ("2", "fails", None), ("3", "fails", None),
    ]  # fmt: skip
    assert tried[1]["reason"] == "transform.cast"
    shop.mend(2)
    where = ("redrive", "--where", "key < '3' -- all but one", "--json")
    tried = shop.command(*where, "--dry-run").objects()
    assert [(each["key"], each["outcome"]) for each in tried] == [
        ("1", "superseded"), ("1", "passes"), ("2", "fails"),
    ]  # fmt: skip
    assert tried[0]["superseded_by"] == shop.commit - 1
    assert shop.ask("SELECT count(*) FROM headrace.quarantine WHERE status = 'quarantined'") == [(4,)]
    (done,) = shop.command("redrive", "--txid", str(700 + shop.commit - 1), "--json").objects()
    assert (done["keys"], done["resolved"], done["still_quarantined"]) == (2, 2, 1)
    states = "SELECT key, status, superseded_by FROM headrace.quarantine WHERE key = '1'"
    assert shop.ask(states) == [("1", "resolved", None), ("1", "superseded", shop.commit - 1)]
    assert shop.ask("SELECT id, n FROM m") == [(1, 5)]
    shop.assert_verified()
    assert "is not clear" in shop.command("redrive", "--all", "--where", "true").err
    assert shop.command("redrive", "--where", "nope = 1").code == 2


def test_a_batch_that_fails_leaves_the_others(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.bad(("1", "3"), ("2", "3"), ("3", "3"))
    shop.mend(2)
    monkeypatch.setattr("headrace.cli.quarantine.MAX_KEYS", 1)
    tries = iter(range(9))
    redrive = Lane.redrive

    def failing(lane: Lane, *arguments: Any, **more: Any) -> dict[str, Any]:
        if next(tries) == 1:
            raise UserError("No.", "Wait.")
        return redrive(lane, *arguments, **more)

    monkeypatch.setattr(Lane, "redrive", failing)
    done = shop.command("redrive", "--all", "--json")
    (told,) = done.objects()
    assert (done.code, told["resolved"], told["failed"]) == (1, 2, 1)
    assert "No. Wait." in done.err
    assert shop.ask("SELECT id FROM m") == [(1,), (3,)]


def test_a_new_version_says_how_many_records_would_pass(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    shop.bad(("1", "3"), ("2", "5"), ("3", "3"))
    shop.mend(1)
    shop.bring()
    shop.lane.close()
    told = "RECORDS 2 of 3 open records of model m would pass under its new version: headrace quarantine "
    assert told in caplog.text
    shop.lane = shop._open()


def test_patches_are_refused_that_cannot_be(shop: Shop) -> None:
    shop.bad(("1", "3"))
    ((id_,),) = shop.ask("SELECT id::VARCHAR FROM headrace.quarantine")
    for cell, words in (("id=2", "of the key"), ("w=2", "no column w"), ("secret", "not column=value")):
        refused = shop.command("patch", id_, cell)
        assert refused.code == 2
        assert words in refused.err
        assert "secret" not in refused.err
    assert shop.command("discard", id_).code == 2
    assert shop.ask("SELECT status FROM headrace.quarantine") == [("quarantined",)]
    # One that does not help is told, and counts all the same.
    still = shop.command("patch", id_, "v=5")
    assert "is quarantined: transform.cast" in still.out
    assert shop.lane.staging.decisions("m", 1 << 60) is not None


def test_an_export_has_every_record(shop: Shop) -> None:
    shop.bad(("1", "3"), ("2", "5"))
    shop.bad(("1", "1"))
    files = {kind: shop.folder / f"bad.{kind}" for kind in ("parquet", "csv", "json")}
    for kind, path in files.items():
        assert shop.command("export", "--format", kind, "--output", str(path)).code == 0
    exported = pq.read_table(files["parquet"]).to_pylist()
    lines = [json.loads(line) for line in files["json"].read_text().splitlines()]
    with files["csv"].open() as file:
        cells = list(csv.DictReader(file))
    for rows in (exported, lines, cells):
        assert [(row["key"], row["status"]) for row in rows] == [("1", "superseded"), ("2", "quarantined")]
        assert {row["sqlstate"] for row in rows} == {"22018"}
    assert shop.command("export", "--format", "csv", "--output", "/nowhere/x", "--status", "open").code == 2
    assert not list(shop.folder.glob(".*part"))


def test_the_queries_of_the_documentation_run(shop: Shop) -> None:
    shop.bad(("1", "3"), ("2", "1"))
    text = (Path(__file__).parents[2] / "docs" / "quarantine.md").read_text()
    block = text.partition("## Queries")[2].partition("```sql")[2].partition("```")[0]
    queries = [query for query in block.replace("sales", "m").split(";") if query.strip()]
    assert len(queries) >= 6
    answers = [shop.lane.destination.read([query])[0] for query in queries]
    assert [answer.num_rows for answer in answers] == [1, 1, 1, 0, 0, 1]
    assert answers[-1]["quarantined"].to_pylist() == [1]
