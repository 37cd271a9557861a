"""What a part is, how it is cut, and its outcome as a file."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.change import Column, Copy, Counts, Position, TableId, TableSchema
from headrace.cutting import MOST_BYTES, Piece, cut, rows_for, stretched
from headrace.decisions import Decided, Decision, Decisions
from headrace.parts import PartSpec, Shares, Staged, fingerprint
from headrace.prepared import Claims, Prepared, Reference, Refused, UniqueKey
from headrace.prepared_file import Lease, NotTheOutcome, read_prepared, write_prepared
from headrace.preparing import Whole
from headrace.staging.table import RowGroup
from headrace.steps import Steps
from headrace.transform.fold import RECORD
from headrace.transform.model import RowModel, mirror

TABLE = TableId("public", "t")
SHAPE = TableSchema(TABLE, (Column("id", "bigint"), Column("v", "text")), ("id",))
LEASE = Lease("part", "run", 1)


def spec(model: RowModel, **more: Any) -> PartSpec:
    fields = {"after": 3, "through": 9, "newest": 9, "epoch": "e", "rows": 6} | more
    return PartSpec("slice", Staged("shop", "log", "/a"), model, fingerprint(model), **fields)


def test_a_part_is_named_by_all_that_determines_its_outcome() -> None:
    model = mirror("shop", SHAPE)
    plain = spec(model)
    decision = Decision("discard", model.name, (Decided(0, 4, 1, 5, "1"),), "ada")
    at = Position(0, 1, 0)
    others = [
        spec(replace(model, version="other")),
        spec(replace(model, refused=frozenset({Refused(0, 4, 1, "")}))),
        spec(replace(model, decisions=Decisions([(7, decision)]))),
        spec(replace(model, suspect=True)),
        spec(model.limited([("v", "length(v) < 9")])),
        spec(model, after=2),
        spec(model, through=8),
        spec(model, newest=10),
        spec(model, copy=Copy(1, 2, 0, at, at, ("id",))),
        spec(model, chosen=b"\x01"),
        spec(model, stretch=(0, 2)),
        spec(model, stretch=(1, 2)),
        spec(model, shares=Shares(2, (5,))),
        spec(model, shares=Shares(2, (6,))),
        replace(plain, kind="copy"),
        replace(plain, staged=Staged("shop", "other", "/a")),
    ]
    assert len({plain.id, *(each.id for each in others)}) == len(others) + 1
    same = [
        spec(mirror("shop", SHAPE)),
        replace(plain, epoch="f"),
        replace(plain, rows=7),
        replace(plain, staged=Staged("shop", "log", "/b")),
    ]
    assert {each.id for each in same} == {plain.id}
    with pytest.raises(TypeError, match="object has no fingerprint"):
        fingerprint((1, object()))


def test_the_name_is_the_same_in_every_process() -> None:
    code = (
        "from headrace.parts import fingerprint as f;"
        "print(f((frozenset(map(str, range(50))), {'b': 1.5, 'a': None}, b'x', True, 1)))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, check=True,
            capture_output=True, text=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(told) == 1
    assert len({fingerprint(each) for each in (1, True, 1.0, "1", b"1", (1,), {1}, {1: 1}, None)}) == 9


names = st.sampled_from(["a", "b", "ünïcode", ""])


def chunked(cells: list[str], begin: int) -> pa.Table:
    one = pa.table(
        {
            "_source_key": pa.array(cells, pa.string()),
            "n": pa.array(range(len(cells)), pa.int64()),
            "amount": pa.nulls(len(cells), pa.decimal128(9, 2)),
            "tags": pa.array([[cell, None] for cell in cells], pa.list_(pa.string())),
        }
    )
    return pa.concat_tables([one, one]).slice(begin)


tables = st.builds(chunked, st.lists(names), st.integers(0, 3))
references = st.builds(
    Reference, names, names, st.tuples(names), names, st.tuples(names, names), st.tuples(names),
    st.sampled_from([(), (0, 1)]), st.booleans(),
)  # fmt: skip
claims = st.builds(
    Claims, names, st.lists(st.builds(UniqueKey, names, st.tuples(names))).map(tuple), tables,
    st.lists(references).map(tuple),
)  # fmt: skip
outcomes = st.builds(
    Prepared,
    reset=st.booleans(),
    removed=st.lists(names).map(lambda keys: pa.array(keys, pa.string())),
    rows=tables,
    records=st.sampled_from([RECORD.empty_table(), pa.nulls(3).cast(pa.string())]).map(
        lambda made: made if isinstance(made, pa.Table) else pa.table({"key": made})
    ),
    counts=st.builds(Counts, *[st.integers(0, 2**62)] * 9),
    fewer=st.none() | tables,
    claims=st.none() | claims,
    deleted=st.none() | tables,
    steps=st.none() | st.builds(Steps, st.sampled_from(["history", "append"]), tables),
)


@given(outcomes)
def test_an_outcome_comes_back_from_its_file_as_it_was(tmp_path: Path, prepared: Prepared) -> None:
    path = tmp_path / "it.part"
    write_prepared(path, prepared, LEASE)
    assert [each.name for each in tmp_path.iterdir()] == ["it.part"]
    found = read_prepared(path, LEASE)
    path.unlink()
    assert found == prepared
    for mine, its in ((found.rows, prepared.rows), (found.records, prepared.records)):
        assert mine.schema == its.schema


def test_a_half_written_or_foreign_file_is_never_taken(tmp_path: Path) -> None:
    path = tmp_path / "it.part"
    rows = pa.table({"_source_key": ["1"] * 500, "n": range(500)})
    prepared = Prepared(False, pa.array([], pa.string()), rows, RECORD.empty_table(), Counts(read=500))
    write_prepared(path, prepared, LEASE)
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 997), *range(len(whole) - 40, len(whole))]:
        path.write_bytes(whole[:size])
        with pytest.raises(NotTheOutcome):
            read_prepared(path, LEASE)
    path.write_bytes(whole)
    for other in (Lease("other", "run", 1), Lease("part", "before", 1), Lease("part", "run", 2)):
        with pytest.raises(NotTheOutcome, match="attempt 1 of part"):
            read_prepared(path, other)
    path.write_bytes(b"another program's" * 9)
    with pytest.raises(NotTheOutcome):
        read_prepared(path, LEASE)


def row_groups(told: list[tuple[int, int, int]]) -> list[RowGroup]:
    """Row groups of so many offsets and rows, each behind so many offsets of other tables."""
    found, last = list[RowGroup](), 0
    for offsets, rows, gap in told:
        first, last = last + gap + 1, last + gap + offsets
        found.append(RowGroup(first, last, rows, 9 * rows))
    return found


groups = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 90), st.integers(0, 3))).map(row_groups)


@given(groups, st.integers(1, 60), st.data())
def test_pieces_are_the_span_in_order_and_of_about_the_size(
    found: list[RowGroup], rows: int, data: st.DataObject
) -> None:
    end = found[-1].last if found else 5
    after = data.draw(st.integers(0, end - 1))
    through = data.draw(st.integers(after + 1, end))
    inside = [group for group in found if group.last > after and group.first <= through]
    pieces = cut(inside, after, through, rows)
    assert bool(pieces) == bool(inside)
    if pieces:
        ends = [after, *(piece.through for piece in pieces)]
        assert [piece.after for piece in pieces] == ends[:-1]
        assert ends[-1] == through
        assert all(piece.after < piece.through for piece in pieces)
        for piece in pieces:
            one_offset = sum(g.first <= piece.through and g.last > piece.after for g in inside) == 1
            assert piece.rows <= 1.5 * rows + 1 or one_offset


def test_a_file_that_was_merged_with_those_before_it_is_cut_behind_them() -> None:
    found = [
        RowGroup(1, 10, 100, 1),
        RowGroup(1, 10, 100, 1),
        RowGroup(1, 60, 600, 6),
        RowGroup(61, 70, 100, 1),
    ]
    pieces = cut(found, 0, 70, 100)
    ends = [0, *(piece.through for piece in pieces)]
    assert [piece.after for piece in pieces] == ends[:-1]
    assert ends == sorted(set(ends))
    assert sum(piece.rows for piece in pieces) == 700


def test_what_one_entry_has_too_much_of_is_cut_into_stretches() -> None:
    piece = Piece(3, 4, 100)
    assert stretched(piece, 70) == [piece]
    assert stretched(piece, 33) == [Piece(3, 4, 33, (number, 3)) for number in range(3)]


def test_what_parts_are_stretches_of_is_read_once_and_held_no_longer() -> None:
    reads = list[tuple[int, int]]()

    class Raw:
        def read(self, _: TableId, after: int, through: int) -> pa.Table:
            reads.append((after, through))
            return pa.table({"n": range(100 * after, 100 * after + 100)})

    raw: Any = Raw()
    whole, model = Whole(), mirror("shop", SHAPE)

    def numbers(after: int, number: int, count: int, model: RowModel = model) -> list[int]:
        part = spec(model, after=after, through=after + 1, stretch=(number, count) if count > 1 else None)
        found: list[int] = whole.rows_of(raw, part, model)["n"].to_pylist()
        return found

    assert [n for i in range(3) for n in numbers(3, i, 3)] == list(range(300, 400))
    assert reads == [(3, 4)]
    assert whole._rows is None
    assert numbers(5, 0, 1) == list(range(500, 600))
    assert whole._rows is None
    assert numbers(3, 1, 4) == list(range(325, 350))
    assert numbers(3, 1, 4, replace(model, version="of a column that has come since")) == list(
        range(325, 350)
    )
    assert numbers(4, 1, 4) == list(range(425, 450))
    assert reads == [(3, 4), (5, 6), (3, 4), (3, 4), (4, 5)]


def test_a_part_takes_a_worker_some_seconds_and_is_bounded() -> None:
    assert [rows_for(rate) for rate in (None, 20_000, 1, 10_000_000)] == [10_000, 20_000, 2_000, 500_000]
    wide = RowGroup(1, 10, 10, 10 * MOST_BYTES)
    assert cut([wide], 0, 10, 1_000) == [Piece(i, i + 1, 1) for i in range(10)]
