"""Which changes of a table's shape leave its rows as they are."""

from __future__ import annotations

import pytest

from headrace.change import Column, TableId, TableSchema
from headrace.sources.postgres.ddl import rewritten


def shape(**columns: str) -> TableSchema:
    found = tuple(Column(name, type_) for name, type_ in {"id": "integer", **columns}.items())
    return TableSchema(TableId("public", "t"), found, ("id",))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("smallint", "bigint"),
        ("integer", "numeric"),
        ("character varying(5)", "character varying(9)"),
        ("character varying(5)", "character varying"),
        ("character varying(5)", "text"),
        ("character varying", "text"),
        ("numeric(5,2)", "numeric(9,2)"),
        ("bit varying(5)", "bit varying"),
        ("money", "money"),
    ],
)
def test_a_wider_type_keeps_every_text(before: str, after: str) -> None:
    assert rewritten(shape(v=before), shape(v=after)) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("bigint", "integer"),
        ("integer", "text"),
        ("integer", "double precision"),
        ("real", "double precision"),
        ("text", "character varying(5)"),
        ("character varying(9)", "character varying(5)"),
        ("character(5)", "character(9)"),
        ("character(5)", "text"),
        ("numeric(5,2)", "numeric(9,3)"),
        ("numeric(5,2)", "numeric"),
        ("numeric", "numeric(5,2)"),
        ("timestamp without time zone", "timestamp with time zone"),
        ("json", "jsonb"),
        ("bit varying(5)", "text"),
    ],
)
def test_any_other_type_may_have_rewritten_rows(before: str, after: str) -> None:
    assert rewritten(shape(v=before), shape(v=after)) == f"column v changed from {before} to {after}"


def test_an_added_column_matters_if_it_came_with_a_value() -> None:
    assert rewritten(shape(), shape(n="text")) is None
    assert rewritten(shape(), shape(n="text"), {"n"}) == "column n was added with a value for old rows"
    assert rewritten(shape(n="text"), shape(n="text", m="text"), {"n"}) is None


def test_a_column_that_went_matters_if_another_came() -> None:
    assert rewritten(shape(a="text"), shape()) is None
    assert rewritten(shape(a="text"), shape(b="text")) == "columns a may be called b now"
    assert rewritten(shape(a="text"), shape(b="text"), {"b"}) == (
        "column b was added with a value for old rows"
    )


def test_every_reason_is_told() -> None:
    found = rewritten(shape(a="text", b="text"), shape(a="jsonb", b="date"))
    assert found == "column a changed from text to jsonb; column b changed from text to date"
