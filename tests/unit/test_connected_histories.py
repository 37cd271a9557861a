"""Whatever happens to rows that refer to each other, in the end the tables are what the final models make of
the source's history.

What that is, a few lines of Python say, without slices, records or retries: of the changes of a key since its
row was last gone, the newest one counts that is good and refers to a row which there is; and as many rows
there are as can hold each other up.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from family import Family, Row, gone, put, shape_of
from headrace import failpoints

NODES = shape_of("nodes", "up_id", "v")
LEAVES = shape_of("leaves", "node_id", "v")
SQL = """/* headrace
key = ["id"]
orphan_after = "{after}"
[[foreign_key]]
columns = ["ref"]
references = "nodes"
*/
SELECT id::BIGINT AS id, {ref}::BIGINT AS ref, {v}::INTEGER AS v FROM raw.shop.{table}"""
VERSIONS = ("v", "replace(v, 'x', '')")
"""What the models make of `v`: a number, and of `x7` too once they are mended; nothing makes one of `?`."""
REFERS = {"nodes": "up_id", "leaves": "node_id"}
PLACES = (
    "staging.committed",
    "destination.apply.part",
    "destination.apply.commit",
    "destination.apply.committed",
    "destination.redrive.commit",
)
KEYS = [str(n) for n in range(1, 6)]
EXAMPLES = int(os.environ.get("HEADRACE_EXAMPLES", "2"))


class Change(NamedTuple):
    """A change of a key: its place, what its row refers to, and its cell."""

    commit: int
    ordinal: int
    ref: str | None
    v: str


class World:
    """A source whose tables refer to each other, beside what is made of it."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.chance = chance
        self.after = chance.choice(["15m", "0s"])
        texts = {table: self.text(table, 0) for table in REFERS}
        self.family = Family(folder, [NODES, LEAVES], texts)
        self.since: dict[str, dict[str, list[Change]]] = {table: {} for table in REFERS}
        """By table and key, the changes since the row was last gone; a key that is not there has no row."""

    def text(self, table: str, version: int) -> str:
        return SQL.format(after=self.after, ref=REFERS[table], v=VERSIONS[version], table=table)

    def edit(self, table: str, version: int) -> None:
        (self.family.folder / "models" / f"{table}.sql").write_text(self.text(table, version))
        self.family.lane.reload_models(now=True)

    def commit(self) -> None:
        """Commit a transaction of some changes at the source, and capture it."""
        rows = [self._change(n) for n in range(1, self.chance.randint(1, 5) + 1)]
        self.family.commits(*rows)

    def _change(self, ordinal: int) -> Row:
        chance, table = self.chance, self.chance.choice(["nodes", "nodes", "leaves"])
        rows, key = self.since[table], chance.choice(KEYS)
        if chance.random() < 0.02:
            rows.clear()
            return ("t", table, "", {})
        if key in rows and chance.random() < 0.25:
            del rows[key]
            return gone(table, key)
        cells = {
            REFERS[table]: chance.choice([None, *KEYS, "99"]),
            "v": chance.choice(["1", "2", "3", "4", "x5", "?"]),
        }
        now = Change(self.family.commit + 1, ordinal, cells[REFERS[table]], str(cells["v"]))
        if key in rows and (new := chance.choice(KEYS)) not in rows and chance.random() < 0.3:
            del rows[key]
            rows[new] = [now]
            return ("u", table, new, {"before": key, **cells})
        rows.setdefault(key, []).append(now)
        return put(table, key, **cells)

    def expected(self) -> tuple[dict[tuple[str, str], Change], set[tuple[str, str, int, int]]]:
        """Return the changes that make the rows, and those that are open: bad, or in want of a row."""
        there = set(self.since["nodes"])
        while True:
            settled = {
                (table, key): change
                for table, rows in self.since.items()
                for key, changes in rows.items()
                for change in changes  # the newest that passes is the last
                if change.v != "?" and change.ref in {None, *there}
            }
            left = {key for table, key in settled if table == "nodes"}
            if left == there:
                break
            there = left
        opened = {
            (table, key, change.commit, change.ordinal)
            for table, rows in self.since.items()
            for key, changes in rows.items()
            for change in changes
            if (table, key) not in settled or change > settled[table, key]
        }
        return settled, opened

    def redrive(self, share: float) -> None:
        """Redrive some of what is open, but for what waits for a row: that comes by itself."""
        opened = self.family.ask(
            "SELECT DISTINCT model, key FROM headrace.quarantine WHERE status = 'quarantined' "
            "AND reason <> 'constraint.foreign_key'"
        )
        for model in REFERS:
            keys = [key for name, key in opened if name == model and self.chance.random() < share]
            if keys:
                self.family.lane.redrive(model, keys)

    def crash(self, chosen: str) -> None:
        """Go on until a place fails, and begin anew from what is durable."""
        with pytest.MonkeyPatch.context() as patch:
            at = self.chance.randint(1, 3)
            patch.setattr(failpoints, "_armed", failpoints._parse(f"{chosen}=raise@{at}"))
            with suppress(OSError):
                self.family.bring()
                self.redrive(0.5)
                self.family.bring()
        self.family.reopen()


@pytest.fixture(autouse=True, scope="module")
def small_slices() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.log.index.MAX_SLICE_ROWS", 5)
        yield


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32))
def test_any_history_ends_as_the_final_models_would_have_it(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    chance = random.Random(seed)
    world = World(tmp_path_factory.mktemp("world"), chance)
    family = world.family
    family.bring()
    steps = ["commit"] * 7 + ["apply", "bring"] * 2 + ["load", "redrive", "edit", "crash"]
    for what in chance.choices(steps, k=22):
        if what == "commit":
            world.commit()
        elif what == "load":
            family.load()
        elif what == "apply":
            family.lane.apply()
        elif what == "bring":
            family.bring()
        elif what == "redrive":
            world.redrive(0.5)
        elif what == "edit":
            world.edit(chance.choice(["nodes", "leaves"]), chance.randint(0, 1))
        elif what == "crash":
            world.crash(chance.choice(PLACES))
    for table in REFERS:
        world.edit(table, 1)
    family.bring()
    world.redrive(1.0)
    family.bring()
    settled, opened = world.expected()
    rows = {
        (table, str(key)): (ref if ref is None else str(ref), v)
        for table in REFERS
        for key, ref, v in family.ask(f"SELECT id, ref, v FROM {table}")
    }
    assert rows == {place: (each.ref, int(each.v.removeprefix("x"))) for place, each in settled.items()}
    records = family.ask(
        "SELECT model, key, commit, ordinal FROM headrace.quarantine "
        "WHERE status IN ('quarantined', 'waiting')"
    )
    assert set(records) == opened
    assert len(records) == len(opened)
    family.verified()
    family.lane.close()
