"""Cells that the source did not send are filled with what raw says, whatever happened in between."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.change import Entry, LoggedEntry, Position, TableId
from headrace.payload import BEFORE, UNCHANGED, encode_rows
from headrace.staging.delta import DeltaStaging
from headrace.staging.unchanged import fill_unchanged

Key = tuple[str, str]
CELLS = ("v", "w")


@dataclass
class Change:
    op: str
    key: Key
    before: Key | None
    sent: dict[str, str | None]
    """The cells that the source sends; the others are unchanged."""
    true: dict[str, str | None]


@st.composite
def histories(draw: st.DrawFn, width: int) -> list[Change]:
    """Changes as a database could make them: inserts, updates, new keys, deletes, truncates, new copies."""
    keys = [("1", "x"), ("2", "x"), ("3", "x")] if width == 1 else [("1", "x"), ("1", "y"), ("2", '"')]
    values = st.sampled_from(["a", "b", "", "long" * 50, None])
    live: dict[Key, dict[str, str | None]] = {}
    made: list[Change] = []
    for _ in range(draw(st.integers(1, 30))):
        free = [key for key in keys if key not in live]
        options = [
            *(["c"] if free else []),
            *(["u", "u", "u", "u", "k", "d"] if live else []),
            *(["t"] if live else []),
        ]
        op = draw(st.sampled_from(options))
        if op == "t" and draw(st.booleans()):
            made.append(Change("t", ("", ""), None, {}, {}))
            live.clear()
        elif op == "t":
            made.append(Change("t", ("", ""), None, {}, {}))
            made.extend(Change("r", key, None, dict(row), dict(row)) for key, row in live.items())
        elif op == "c":
            key = draw(st.sampled_from(free))
            live[key] = {name: draw(values) for name in CELLS}
            made.append(Change("c", key, None, dict(live[key]), dict(live[key])))
        elif op == "d":
            key = draw(st.sampled_from(sorted(live)))
            del live[key]
            made.append(Change("d", key, None, dict.fromkeys(CELLS), dict.fromkeys(CELLS)))
        else:
            old = draw(st.sampled_from(sorted(live)))
            new = draw(st.sampled_from(free)) if op == "k" and free else old
            row, sent = live.pop(old), {}
            for name in CELLS:
                value = draw(st.one_of(st.just(row[name]), values))
                if value != row[name] or value is None or draw(st.booleans()):
                    sent[name] = value
                row[name] = value
            live[new] = row
            made.append(Change("u", new, old if new != old else None, sent, dict(row)))
    return made


def entry(changes: Sequence[Change], first: int) -> Entry:
    n = len(changes)
    numbers = pa.array(range(first, first + n), pa.int64())
    void = [change.op == "t" for change in changes]
    batch = pa.RecordBatch.from_pydict(
        {
            "_op": pa.array([c.op for c in changes]),
            "_commit": numbers,
            "_ordinal": pa.array([1] * n, pa.int64()),
            "_committed_at": numbers,
            "_txid": numbers,
            "_lsn": numbers,
            "a": pa.array(
                [None if no else c.key[0] for c, no in zip(changes, void, strict=True)], pa.string()
            ),
            "b": pa.array(
                [None if no else c.key[1] for c, no in zip(changes, void, strict=True)], pa.string()
            ),
            **{name: pa.array([c.sent.get(name) for c in changes], pa.string()) for name in CELLS},
            "_unchanged": pa.array([missing(c) or None for c in changes], UNCHANGED),
            "_before": pa.array(
                [c.before and [("a", c.before[0]), ("b", c.before[1])] for c in changes], BEFORE
            ),
        }
    )
    at = Position(0, first, 1)
    return Entry("rows", TABLE, at, at, 0, n, 1, encode_rows(batch))


TABLE = TableId("public", "t")
_serial = itertools.count()


def missing(change: Change) -> list[str]:
    return [name for name in CELLS if name not in change.sent and change.op == "u"]


def staged(folder: Path, changes: Sequence[Change], cuts: Sequence[int]) -> DeltaStaging:
    """Real raw tables: one log entry per change, one file per cut."""
    staging = DeltaStaging(folder, f"s{next(_serial)}", "l" * 32)
    after = 0
    for through in cuts:
        staging.write(
            [LoggedEntry(i + 1, entry([changes[i]], i + 1), 0, True, "") for i in range(after, through)]
        )
        after = through
    return staging


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unchanged")


@pytest.mark.parametrize("width", [1, 2])
@given(data=st.data())
def test_any_slice_of_any_history_gets_the_true_values(width: int, folder: Path, data: st.DataObject) -> None:
    changes = data.draw(histories(width))
    ends = st.sets(st.integers(1, len(changes)), max_size=3)
    files = sorted(data.draw(ends) | {len(changes)})
    slices = sorted(data.draw(ends) | {len(changes)})
    key = ("a", "b")[:width]
    staging = staged(folder, changes, files)
    after = 0
    for through in slices:
        filled = fill_unchanged(staging, TABLE, key, staging.read(TABLE, after, through)).to_pylist()
        found = [{name: row[name] for name in CELLS} for row in filled]
        assert found == [{name: c.true.get(name) for name in CELLS} for c in changes[after:through]]
        assert [row["_unchanged"] for row in filled] == [None] * len(filled)
        after = through


def full(key: str, value: str) -> Change:
    return Change("c", (key, ""), None, {"v": value, "w": "w"}, {})


def silent(key: str, before: str | None = None, **sent: str) -> Change:
    return Change("u", (key, ""), (before, "") if before else None, dict(sent), {})


def fill(folder: Path, *changes: Change, after: int = 0) -> list[tuple[object, object, object]]:
    staging = staged(folder, changes, range(1, len(changes) + 1))
    rows = fill_unchanged(staging, TABLE, ("a",), staging.read(TABLE, after, len(changes))).to_pylist()
    return [(row["v"], row["w"], row["_unchanged"]) for row in rows]


def test_a_value_is_followed_through_changes_of_the_key(folder: Path) -> None:
    chain = [full("1", "one"), silent("2", "1"), silent("3", "2"), full("1", "other"), silent("3")]
    assert fill(folder, *chain, after=4) == [("one", "w", None)]


def test_a_value_of_the_same_slice_is_found_too(folder: Path) -> None:
    assert fill(folder, full("1", "one"), silent("1", v="two"), silent("1", w="x"))[-1] == ("two", "x", None)


def test_what_raw_cannot_tell_stays_named(folder: Path) -> None:
    assert fill(folder, silent("1", w="new")) == [(None, "new", ["v"])]


def test_the_future_is_never_looked_at(folder: Path) -> None:
    assert fill(folder, silent("1", w="w"), full("1", "later"))[0] == (None, "w", ["v"])


def test_changes_with_every_cell_are_handed_through_as_they_are(folder: Path) -> None:
    staging = staged(folder, [full("1", "a")], [1])
    changes = staging.read(TABLE, 0, 1)
    assert fill_unchanged(staging, TABLE, ("a",), changes) is changes


def test_a_null_is_a_value(folder: Path) -> None:
    first = Change("c", ("1", ""), None, {"v": None, "w": "w"}, {})
    assert fill(folder, full("1", "old"), first, silent("1", w="x"))[-1] == (None, "x", None)
