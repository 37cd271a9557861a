"""Which columns of its raw table each output of a model reads.

DuckDB's own parser tells, since it is what runs the expressions; a second grammar would not know all of
its syntax.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from headrace.transform.python.text import PythonText
from headrace.transform.sql import ModelText


@dataclass(frozen=True, slots=True)
class Reads:
    """An output column, or WHERE (with the name ''), and the raw table's columns that it reads.

    `expression` is verbatim; `columns` stand in the order of their first use, as the model spells them,
    and may be Headrace's own (`_committed_at`).
    """

    name: str
    expression: str
    columns: tuple[str, ...]


def lineage(text: ModelText) -> list[Reads]:
    """Return what each output of a model reads, in order, and at the end what its WHERE does.

    Of Python it is known at most which columns the function is given; each output may be made of all of them.
    """
    if isinstance(text, PythonText):
        return [Reads(name, "Python", text.reads or ()) for name, _ in text.outputs]
    parts = [*text.outputs, *([("", text.where)] if text.where else [])]
    query = "SELECT " + ", ".join(f"({expression}\n)" for _, expression in parts)
    with duckdb.connect() as db:
        ((parsed,),) = db.execute("SELECT json_serialize_sql(?)", [query]).fetchall()
    trees = json.loads(parsed)["statements"][0]["node"]["select_list"]
    return [
        Reads(name, expression, tuple(dict.fromkeys(_columns(tree, text, ()))))
        for (name, expression), tree in zip(parts, trees, strict=True)
    ]


def _columns(part: object, text: ModelText, bound: Sequence[str]) -> Iterator[str]:
    """Yield the columns that a parsed expression refers to, but for the parameters of lambdas around it."""
    if isinstance(part, list):
        for item in part:
            yield from _columns(item, text, bound)
    elif isinstance(part, dict):
        kind = part.get("class")
        if kind == "COLUMN_REF":
            yield from _column(part["column_names"], text, bound)
        elif kind == "LAMBDA":
            yield from _columns(part["expr"], text, (*bound, *_parameters(part["lhs"])))
        else:
            for item in part.values():
                yield from _columns(item, text, bound)


def _column(path: Sequence[str], text: ModelText, bound: Sequence[str]) -> Iterator[str]:
    """Yield the column of `column`, `alias.column` or `raw.source.table.column`, and of fields of them."""
    names = [name.lower() for name in path]
    if names[0] in bound:
        return
    if len(path) > 3 and names[:3] == ["raw", text.source.lower(), text.table.lower()]:
        yield path[3]
    else:
        yield path[1] if len(path) > 1 and names[0] == text.alias.lower() else path[0]


def _parameters(left: Any) -> Iterator[str]:
    """Yield the parameters of a lambda: one name, or a row of them."""
    if isinstance(left, list):
        for item in left:
            yield from _parameters(item)
    elif isinstance(left, dict):
        if left.get("class") == "COLUMN_REF":
            yield left["column_names"][0].lower()
        for item in left.values():
            yield from _parameters(item)
