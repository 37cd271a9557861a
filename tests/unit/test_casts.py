"""Casts that are tried by themselves come to what TRY comes to, and only those are that may."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from headrace.change import Column, TableId, TableSchema
from headrace.payload import BEFORE, UNCHANGED
from headrace.transform import evaluate
from headrace.transform.casts import Cast, cast_of
from headrace.transform.model import bind
from headrace.transform.sql import read_model

COLUMNS = ("id", "v", "w")
CELLS = [
    None, "", " ", "1", " 1 ", "1.5", "-0", "1e3", "9999999999999999999", "nan", "inf", "t", "false", "x",
    "é", "2024-02-29", "2023-02-29", "2024-02-29 10:00:00", "2024-02-29 10:00:00+02",
    "2024-02-29 10:00:00 No/Where", "12:30", "25:00", "123e4567-e89b-12d3-a456-426614174000", "[1]", "null",
    "infinity", "294277-01-01 (BC)",
]  # fmt: skip
TYPES = [
    "TINYINT", "INTEGER", "UBIGINT", "HUGEINT", "DECIMAL(4,2)", "DOUBLE", "BOOLEAN", "DATE", "TIME",
    "TIMESTAMP", "TIMESTAMPTZ", "UUID",
]  # fmt: skip


def changes(cells: list[str | None]) -> pa.Table:
    n = len(cells)
    numbers = pa.array(range(1, n + 1), pa.int64())
    return pa.table(
        {
            "id": numbers.cast(pa.string()),
            "v": pa.array(cells, pa.string()),
            "w": pa.array(cells[::-1], pa.string()),
            "_op": pa.array(["c"] * n),
            **dict.fromkeys(("_epoch", "_commit", "_ordinal", "_offset", "_committed_at", "_txid"), numbers),
            "_unchanged": pa.nulls(n, UNCHANGED),
            "_before": pa.nulls(n, BEFORE),
        }
    )


@pytest.mark.parametrize("where", ["", "WHERE w::TINYINT > 0"])
def test_rows_and_records_are_those_of_a_model_under_one_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """All types at once over cells that suit some of them, beside an output that is no cast."""
    path = tmp_path / "m.sql"
    schema = TableSchema(TableId("public", "t"), tuple(Column(name, "text") for name in COLUMNS), ("id",))
    cells = [*CELLS, *(f"bad {i}" for i in range(3))]
    for type_ in TYPES:
        path.write_text(
            f'/* headrace\n[contract]\nx = "CHECK (x IS NOT NULL OR y IS NULL)"\n*/\n'
            f"SELECT v::{type_} AS x, CAST(nullif(w, '') AS {type_}) AS y, "
            f"w::{type_}::VARCHAR::{type_} AS z, upper(v) AS u, w::DATE + 1 AS d FROM raw.shop.t {where}"
        )
        model = bind(read_model(path), schema)
        with monkeypatch.context() as patched:
            patched.setattr(evaluate, "cast_of", lambda *_: None)
            expected = model.prepare(changes(cells))
        made = model.prepare(changes(cells))
        assert made.records.num_rows, "else nothing was compared"
        assert made.rows.sort_by("_source_key").equals(expected.rows.sort_by("_source_key")), type_
        assert made.records.equals(expected.records), type_
        assert made.counts == expected.counts


def test_a_cast_is_taken_apart() -> None:
    def found(expression: str) -> Cast | None:
        return cast_of(expression, COLUMNS, "t")

    assert found("v::INT") == found("CAST(v AS INT)") == found("(v::INT)") == Cast("v", ("INT",), True)
    assert found('CAST(("v"::DECIMAL(12,2)) AS BIGINT)') == Cast('"v"', ("DECIMAL(12,2)", "BIGINT"), True)
    assert found("nullif(trim(t.v), '')::DATE") == Cast("nullif(trim(t.v), '')", ("DATE",), False)


@pytest.mark.parametrize(
    "expression",
    [
        "v", "v::INT + 1", "- v::INT", "v::INT = w::INT", "TRY_CAST(v AS INT)", "lower(v)", "v::INT[]",
        "v::JSON", "(v::JSON)::INT", "(v->'$.a')::INT", "length(v)::INT", "_commit::INT", "DATE '2020-01-01'",
        "'1'::INT + 0",
    ],
)  # fmt: skip
def test_what_is_no_cast_of_a_text_to_a_plain_type_stays_under_try(expression: str) -> None:
    assert cast_of(expression, COLUMNS, "t") is None
