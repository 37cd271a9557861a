"""Part of the suite of a destination: models that keep more of a row than its newest state."""

# ruff: noqa: D102 - the name of a test says what it tests

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from headrace.cells import rows_of
from headrace.change import Mark, Position
from headrace.join import Difference
from headrace.prepared import Prepared
from headrace.protocols import Destination, Part, Slice
from headrace.testing.destination_joins_suite import FIRST, attach, take_in
from headrace.testing.destinations import LOG, Cells, model_of, row, shape, staged, table
from headrace.testing.logs import armed
from headrace.transform.model import RowModel

_HEADERS = {
    "soft": 'delete = "soft"',
    "history": 'materialize = "history"',
    "append": 'materialize = "append"',
    "soft append": 'materialize = "append"\ndelete = "soft"',
}
_CONTRACT = 'v = "CHECK (v <> 7) ON VIOLATION null"'
_BODY = "id::BIGINT AS id, v::INTEGER AS v, json_object('v', v) AS j, [v::INTEGER] AS l FROM raw.shop.t"


def _model(kind: str, name: str = "kept") -> RowModel:
    header = f"{_HEADERS[kind]}\n[contract]\n{_CONTRACT}"
    return model_of(name, f"/* headrace\n{header}\n*/ SELECT {_BODY}", shape(("v", "text")))


def _changes(chance: random.Random, count: int, *, keys: int) -> list[Cells]:
    def one() -> Cells:
        op = chance.choice("cuuuuddt" if chance.random() < 0.2 else "cuuuuddd")
        if op == "t":
            return {"id": None, "v": None, "_op": op}
        value = chance.choice(["1", "2", "3", "7", "x"]) if op != "d" else None
        return row(chance.randrange(keys), value, _op=op)

    return [one() for _ in range(count)]


def _in_transactions(changes: pa.Table, size: int) -> pa.Table:
    """Put so many changes into one transaction each; its commit is that of the last one."""
    numbers = changes["_commit"].to_pylist()
    commits = pa.array([-(-number // size) * size for number in numbers], pa.int64())
    for name in ("_commit", "_committed_at"):
        changes = changes.set_column(changes.schema.get_field_index(name), name, commits)
    return changes


def _apply(destination: Destination, model: RowModel, changes: pa.Table, parts: int, after: int) -> None:
    through = after + changes.num_rows
    size = -(-changes.num_rows // parts)
    pieces = [changes.slice(i, size) for i in range(0, changes.num_rows, size)]
    marks = (Mark(LOG, after, f"h{after}"), Mark(LOG, through, f"h{through}"))
    made = [Part(model, model.prepare(piece), True) for piece in pieces]
    destination.apply(Slice("shop", *marks, Position(0, through, 1), 0, made))


def _rows(destination: Destination, model: RowModel) -> list[str]:
    names = ", ".join(name for name in model.types() if name not in ("j", "l"))
    (found,) = destination.read([f"SELECT {names} FROM {destination.table_of(model.name)}"])
    return sorted(map(repr, rows_of(found)))


def _as_rows(model: RowModel, rows: pa.Table) -> list[str]:
    return sorted(map(repr, rows_of(rows.select([n for n in model.types() if n not in ("j", "l")]))))


def _records(destination: Destination) -> Sequence[tuple[object, ...]]:
    return table(
        destination,
        "SELECT key, commit, ordinal, blocked FROM headrace.quarantine WHERE status = 'quarantined' "
        "ORDER BY 1, 2, 3",
    )


class KindSuite:
    """Deleted rows, versions of rows, and every change."""

    @pytest.mark.parametrize("kind", _HEADERS)
    @pytest.mark.parametrize(("seed", "keys", "size"), [(1, 4, 12), (2, 900, 2_400)])
    def test_slices_and_their_parts_come_to_what_all_changes_do(
        self, destination: Destination, kind: str, seed: int, keys: int, size: int
    ) -> None:
        chance, model = random.Random(seed), _model(kind)
        whole = _in_transactions(staged(model, _changes(chance, 4 * size, keys=keys), 0), 3)
        for i in range(4):
            _apply(destination, model, whole.slice(i * size, size), 1 + i % 3, i * size)
        expected = model.whole(whole)
        assert _rows(destination, model) == _as_rows(model, expected.rows)
        told = expected.records.select(["key", "commit", "ordinal", "blocked"])
        assert sorted(_records(destination)) == sorted(map(tuple, rows_of(told)))
        books = table(
            destination,
            "SELECT sum(read)::BIGINT, sum(quarantined)::BIGINT, sum(blocked)::BIGINT, sum(applied + "
            "superseded + filtered + quarantined + blocked)::BIGINT FROM headrace.ledger",
        )
        blocked = sum(told["blocked"].to_pylist())
        assert books == [(4 * size, told.num_rows, blocked, 4 * size)]

    @pytest.mark.parametrize("kind", ["history", "append"])
    def test_a_bad_change_blocks_its_key_until_a_redrive(self, destination: Destination, kind: str) -> None:
        model = _model(kind)
        changes = staged(model, [row(1, "1"), row(1, "x", _op="u"), row(2, "5"), row(1, "2", _op="u")], 0)
        _apply(destination, model, changes, 1, 0)
        again = staged(model, [row(1, None, _op="d"), row(2, "6", _op="u")], 4)
        with armed("destination.apply.commit=raise"), pytest.raises(OSError, match="apply"):
            _apply(destination, model, again, 1, 4)
        _apply(destination, model, again, 1, 4)
        assert _records(destination) == [("1", 2, 2, 2)]
        target = destination.table_of("kept")
        assert table(destination, f"SELECT id, v FROM {target} ORDER BY 1, 2") == [(1, 1), (2, 5), (2, 6)]
        body = _BODY.replace("v::INTEGER", "TRY_CAST(v AS INTEGER)")
        text = f"/* headrace\n{_HEADERS[kind]}\n*/ SELECT {body}"
        mended = model_of("kept", text, shape(("v", "text")))
        whole = pa.concat_tables([changes, again])
        mine = mended.whole(whole.filter(pc.equal(whole["id"], "1")))
        prepared = Prepared(False, pa.array(["1"]), mine.rows, mine.records, mine.counts)
        assert destination.redrive(mended, prepared) == {"resolved": 1, "still_quarantined": 0}
        assert _rows(destination, mended) == _as_rows(mended, mended.whole(whole).rows)
        books = "SELECT sum(quarantined)::BIGINT, sum(blocked)::BIGINT FROM headrace.ledger"
        assert table(destination, books) == [(0, 0)]
        more = staged(mended, [row(1, "9"), row(2, "6", _op="u")], 6)
        _apply(destination, mended, more, 2, 6)
        assert _rows(destination, mended) == _as_rows(
            mended, mended.whole(pa.concat_tables([whole, more])).rows
        )

    def test_what_grows_beside_is_exchanged_key_by_key(self, destination: Destination) -> None:
        model = _model("history", "shop.t")
        live = [row(1, "1"), row(2, "2"), row(3, "x"), row(2, "4", _op="u")]
        attach(destination, take_in(destination, FIRST, model, live), model)
        target = destination.table_of(model.name)
        held = [(1, 1, True), (2, 2, False), (2, 4, True)]
        asked = f"SELECT id, v, is_current FROM {target} ORDER BY 1, valid_from"
        assert table(destination, asked) == held
        again = replace(FIRST, stands=10, why="rebuild")
        changed = [row(1, "1"), row(2, "3"), row(4, "4"), row(2, "4", _op="u")]
        copied = take_in(destination, again, model, changed)
        assert attach(destination, copied, model) == Difference(1, 0, 1)
        assert table(destination, asked) == [(1, 1, True), (2, 3, False), (2, 4, True), (4, 4, True)]
