"""Whatever is changed, fails, is mended, redriven, patched, discarded and taken back, in whatever order and
with whatever crashes: in the end all is as if the last model and decisions had been there from the first."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_rebuild import Shop

from entries import rows as entry
from headrace.config import load_project
from headrace.decisions import Decided, Decision
from headrace.lane import Lane
from headrace.testing.logs import armed
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify_destination

MODEL = """/* headrace
key = ["id"]
{}[contract]
id = "BIGINT NOT NULL"
n = "INTEGER"
*/
SELECT id::BIGINT AS id, {}::INTEGER AS n FROM raw.shop.t WHERE v <> '7'"""
BAD = ("359", "59", "9")
"""Cells that each version of the model cannot take; the last one takes whatever another has taken."""
CRASHES = (
    "log.append.commit", "log.append.committed", "staging.data_synced", "staging.commit_synced",
    "destination.redrive.commit", "destination.apply.commit", "destination.apply.committed",
)  # fmt: skip
STEPS = ("change", "apply", "redrive", "patch", "discard", "undo", "mend")


class Project(Shop):
    """A source's log, its staging, one model and its destination; people decide and mend meanwhile."""

    def __init__(self, folder: Path, header: str = "", destination: str = "") -> None:
        self._header = header
        self._destination = destination
        super().__init__(folder)
        self.mend(0)

    def _open(self) -> Lane:
        config = self.folder / "headrace.toml"
        if self._destination not in config.read_text():
            config.write_text(config.read_text() + self._destination)
        return super()._open()

    def mend(self, version: int) -> None:
        expression = "v"
        for digit in BAD[version]:
            expression = f"replace({expression}, '{digit}', 'x')"
        self.put(MODEL.format(self._header, expression))
        self.lane.reload_models(now=True)

    def records(self, condition: str) -> list[tuple[Any, ...]]:
        place = 'epoch, commit, ordinal, "offset", key'
        return self.ask(f"SELECT {place} FROM headrace.quarantine WHERE {condition}")

    def decide(self, verb: Any, record: tuple[Any, ...], value: str | None = None) -> None:
        cells = {"v": value} if verb == "patch" else None
        self.lane.decide(Decision(verb, "m", (Decided(*record),), "ada", "so", cells))

    def step(self, what: str, chance: random.Random) -> None:
        opened = self.records("status = 'quarantined'")
        if what == "change":
            self.change(chance, chance.randint(1, 3))
        elif what == "mend":
            self.mend(chance.randint(0, 1))
        elif what == "apply":
            self.lane.load()
            self.lane.apply()
        elif what == "redrive" and opened:
            self.lane.redrive("m", [record[-1] for record in opened])
        elif what == "undo":
            decided = self.records("status = 'discarded' OR resolution = 'patched'")
            if decided:
                self.decide("undo", chance.choice(decided))
        elif what in ("patch", "discard") and opened:
            self.decide(what, chance.choice(opened), str(chance.randint(0, 9)))

    def recover(self) -> None:
        """Start again, as after a crash."""
        self.reopen()
        self.lane.reload_models(now=True)

    def finish(self) -> None:
        """Bring all there is, and redrive what is open under the last model."""
        self.mend(2)
        self.bring()
        if opened := self.records("status = 'quarantined'"):
            self.lane.redrive("m", [record[-1] for record in opened])
        self.bring()

    def expected(self) -> list[tuple[int, int]]:
        """Return the rows that the history comes to, change by change, under the last model and the decisions
        in the log."""
        staging = self.lane.staging
        decisions = staging.decisions("m", staging.through())
        latest = {
            change[:3]: decision
            for _, decision in (decisions.all if decisions else ())
            for change in decision.changes
        }
        rows: dict[str, int] = {}
        for change in staging.read(self.shape.table, 0, staging.through()).to_pylist():
            decision = latest.get((change["_epoch"], change["_commit"], change["_ordinal"]))
            before = dict(change["_before"] or ()).get("id", change["id"])
            if before != change["id"] or change["_op"] == "d":
                rows.pop(before, None)
            if change["_op"] == "d" or (decision and decision.verb == "discard"):
                continue
            patched = decision is not None and decision.verb == "patch"
            value = (decision.cells or {})["v"] if decision and patched else change["v"]
            if value == "7":
                rows.pop(change["id"], None)
            elif value not in BAD[2]:
                rows[change["id"]] = int(value)
        return sorted((int(key), value) for key, value in rows.items())

    def assert_verified(self) -> None:
        self.lane.close()
        findings = verify_destination(load_project(self.folder), "shop")
        assert all(finding.ok for finding in findings), findings
        self.lane = self._open()

    def assert_issues_count(self) -> None:
        """Each issue says of its records what they are."""
        counted = "SELECT issue, open, state = 'resolved' AS resolved FROM headrace.issues"
        is_open = "sum(CASE WHEN q.status = 'quarantined' THEN 1 ELSE 0 END)::BIGINT"
        found = (
            f"SELECT i.issue, {is_open} AS open, {is_open} = 0 AS resolved FROM headrace.issues i "
            "LEFT JOIN headrace.quarantine q ON q.issue = i.issue GROUP BY i.issue"
        )
        assert self.ask(counted) == self.ask(found)


@pytest.fixture(autouse=True, scope="module")
def small_slices() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.log.index.MAX_SLICE_ROWS", 5)
        patch.setattr("headrace.redriving._BATCH", 2)
        yield


def lived(made: Project, steps: list[tuple[str, str | None, int]]) -> None:
    """Take steps, some of which crash."""
    chance = random.Random(len(steps))
    for what, crash, seed in steps:
        chance.seed(seed)
        if crash is None:
            made.step(what, chance)
            continue
        with armed(f"{crash}=raise@1"), suppress(OSError):
            made.step(what, chance)
            made.bring()
        made.recover()
    made.finish()


STORY = st.lists(
    st.tuples(
        st.sampled_from(("change", *STEPS)),
        st.none() | st.none() | st.none() | st.sampled_from(CRASHES),
        st.integers(0, 1 << 16),
    ),
    min_size=6,
    max_size=14,
)


@settings(
    max_examples=int(os.environ.get("HEADRACE_STORIES", "4")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=STORY)
def test_all_is_as_if_nothing_had_failed(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str | None, int]]
) -> None:
    made = Project(tmp_path_factory.mktemp("lived"))
    try:
        lived(made, steps)
        assert made.ask("SELECT id, n FROM m") == made.expected()
        made.assert_issues_count()
        made.assert_verified()
    finally:
        made.lane.close()


STEADY = [
    ("change", None, 1), ("change", None, 2), ("change", None, 3), ("change", "destination.apply.commit", 4),
    ("patch", "destination.redrive.commit", 5), ("discard", "log.append.committed", 6), ("change", None, 7),
    ("apply", None, 8), ("discard", None, 9), ("mend", "staging.commit_synced", 11), ("redrive", None, 12),
    ("undo", "destination.redrive.commit", 13), ("patch", "destination.apply.committed", 14),
]  # fmt: skip


def test_so_in_postgres_too(tmp_path: Path) -> None:
    with PostgresServer(tmp_path / "pg") as server:
        (tmp_path / "project").mkdir()
        made = Project(
            tmp_path / "project", destination=f'[destination]\ntype = "postgres"\nurl = "{server.url}"\n'
        )
        lived(made, STEADY)
        assert made.ask("SELECT id, n FROM m") == made.expected()
        made.assert_issues_count()
        made.assert_verified()
        made.lane.close()


@pytest.mark.parametrize("kind", ["history", "append"])
def test_a_discarded_change_lets_go_what_waits_behind_it(tmp_path: Path, kind: str) -> None:
    made = Project(tmp_path, f'materialize = "{kind}"\n')
    made.commit += 1
    for value in ("1", "5", "2"):
        made.commit += 1
        op = "c" if value == "1" else "u"
        made.lane.log.append([entry(made.shape, [(op, made.commit, 1, ("4", value))])])
    made.bring()
    assert made.ask("SELECT status, blocked FROM headrace.quarantine") == [("quarantined", 1)]
    (record,) = made.records("true")
    made.decide("discard", record)
    made.bring()
    assert made.ask("SELECT n FROM m") == [(1,), (2,)]
    assert made.ask("SELECT status, actor, resolution FROM headrace.quarantine") == [
        ("discarded", "ada", "so")
    ]
    made.assert_verified()
    made.decide("undo", record)
    made.bring()
    assert made.ask("SELECT n FROM m") == [(1,)]
    assert made.ask("SELECT status, blocked FROM headrace.quarantine") == [("quarantined", 1)]
    made.assert_verified()
    made.lane.close()
