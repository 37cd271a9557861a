"""Which source columns an output reads: as DuckDB's parser sees it, whatever the expression looks like."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.transform.lineage import lineage
from headrace.transform.sql import read_model


@pytest.mark.parametrize(
    ("expression", "columns"),
    [
        ("id::BIGINT", ("id",)),
        ("1", ()),
        ("a + b + a", ("a", "b")),
        ("t.a", ("a",)),
        ("raw.shop.t.a", ("a",)),
        ("payload.field.inner", ("payload",)),
        ("t.payload.field", ("payload",)),
        ("\"Odd, name\" || 'text'", ("Odd, name",)),
        ("payload::JSON ->> 'a'", ("payload",)),
        ("CASE WHEN a IS DISTINCT FROM b THEN c END", ("a", "b", "c")),
        ("list_transform([a], lambda x: x || b)", ("a", "b")),
        ("list_transform([a], lambda a, i: a || i)", ("a",)),
        ("[x || b for x in [a] if x > c]", ("a", "c", "b")),
        ("_committed_at", ("_committed_at",)),
        ("a -- of b\n || c", ("a", "c")),
    ],
)
def test_what_an_output_reads(expression: str, columns: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "m.sql"
    path.write_text(f"SELECT {expression} AS o FROM raw.shop.t")
    (found,) = lineage(read_model(path))
    assert (found.name, found.expression) == ("o", expression)
    assert set(found.columns) == set(columns)


def test_where_comes_last_and_has_no_name(tmp_path: Path) -> None:
    path = tmp_path / "m.sql"
    path.write_text("SELECT a AS x, b AS y FROM raw.shop.orders AS o WHERE o.c > 'z' -- not d")
    assert [(r.name, r.columns) for r in lineage(read_model(path))] == [
        ("x", ("a",)),
        ("y", ("b",)),
        ("", ("c",)),
    ]
