"""CHECK constraints of a Postgres source as conditions of DuckDB.

The source has held its rows to them already. So a condition that DuckDB judges otherwise would put good rows
aside, and only what is known to mean the same in both engines is taken: comparisons, boolean logic,
arithmetic, and a few functions of texts. Not among it are what depends on a collation, a locale, a time zone
or a clock, division, and types that have no counterpart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from headrace.change import Column

_Type = exp.DataType.Type
_KINDS = {
    _Type.SMALLINT: "number",
    _Type.INT: "number",
    _Type.BIGINT: "number",
    _Type.DECIMAL: "number",
    _Type.FLOAT: "number",
    _Type.DOUBLE: "number",
    _Type.TEXT: "text",
    _Type.VARCHAR: "text",
    _Type.BOOLEAN: "boolean",
    _Type.UUID: "uuid",
    _Type.DATE: "date",
    _Type.TIME: "time",
    _Type.TIMESTAMP: "timestamp",
    _Type.TIMESTAMPTZ: "timestamptz",
}
_SOURCE = re.compile(
    r"(?P<number>smallint|integer|bigint|real|double precision|numeric(\(.*\))?)"
    r"|(?P<text>text|character varying(\(\d+\))?)|(?P<boolean>boolean)|(?P<uuid>uuid)|(?P<date>date)"
    r"|(?P<time>time(\(\d\))? without time zone)|(?P<timestamp>timestamp(\(\d\))? without time zone)"
    r"|(?P<timestamptz>timestamp(\(\d\))? with time zone)"
)
_OUTPUT = re.compile(
    r"(?P<number>TINYINT|SMALLINT|INTEGER|BIGINT|HUGEINT|FLOAT|DOUBLE|DECIMAL\(.*\))|(?P<text>VARCHAR)"
    r"|(?P<boolean>BOOLEAN)|(?P<uuid>UUID)|(?P<date>DATE)|(?P<time>TIME)|(?P<timestamp>TIMESTAMP)"
    r"|(?P<timestamptz>TIMESTAMP WITH TIME ZONE)"
)
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
_PATTERN = re.compile(r"([^\\\[(]|\\[^\w]|\[(?!\^?\])[^\[\\]*\]|\((?!\?))*")
"""Regular expressions that RE2 reads as Postgres does: without named classes, escaped letters and `(?`."""

_EQUAL = (exp.EQ, exp.NEQ, exp.NullSafeEQ, exp.NullSafeNEQ)
_ORDER = (exp.LT, exp.LTE, exp.GT, exp.GTE, exp.Between)
_LOGIC = (exp.And, exp.Or, exp.Not)
_ARITHMETIC = (exp.Add, exp.Sub, exp.Mul, exp.Mod, exp.Neg, exp.Abs)
_OPEN = {"literal", "null"}
"""Kinds of what is of any type."""


class Unlike(Exception):
    """Why a condition is not known to mean the same in both engines, in words."""


class Cell(NamedTuple):
    """An output that holds a source's column: its name, and its type in DuckDB's words."""

    column: Column
    output: str
    type: str


def duckdb_condition(expression: str, cells: Mapping[str, Cell]) -> str:
    """Return a condition of Postgres over some columns as one of DuckDB over the outputs that hold them.

    Raises Unlike where it is not known to mean the same.
    """
    try:
        tree = sqlglot.parse_one(expression, read="postgres")
    except SqlglotError:
        raise Unlike("it cannot be parsed") from None
    if _Kinds(cells).of(tree) != "boolean":
        raise Unlike("it is no condition")
    whole = exp.Paren(this=tree)
    for node in reversed(list(whole.walk())):  # the inner ones first
        if (made := _made(node, cells)) is not node:
            node.replace(made)
    return _bare(whole).sql(dialect="duckdb")


class _Kinds:
    """What kind of value an expression is; raises Unlike for one that is not known to be the same."""

    def __init__(self, cells: Mapping[str, Cell]) -> None:
        self._cells = cells

    def of(self, node: exp.Expr) -> str:
        match node:
            case exp.Paren():
                kind = self.of(node.this)
            case exp.Column():
                kind = self._column(node)
            case exp.Literal():
                kind = "literal" if node.is_string else "number"
            case exp.Boolean():
                kind = "boolean"
            case exp.Null():
                kind = "null"
            case exp.Cast():
                kind = self._cast(node)
            case exp.Coalesce():
                kind = self._one(list(node.iter_expressions()))
            case exp.Is():
                self.of(node.this)
                kind = "boolean"
            case _:
                kind = self._operation(node)
        return kind

    def _operation(self, node: exp.Expr) -> str:
        parts = [part for part in node.iter_expressions() if not isinstance(part, exp.Identifier)]
        if (listed := _listed(node)) is not None:
            self._one([parts[0], *listed])
            return "boolean"
        if isinstance(node, _EQUAL):
            self._one(parts)
            return "boolean"
        if isinstance(node, _ORDER):
            if self._one(parts) in {"text", "literal"}:
                raise Unlike("how texts are ordered depends on the collation")
            return "boolean"
        wanted = (
            "boolean" if isinstance(node, _LOGIC) else "number" if isinstance(node, _ARITHMETIC) else "text"
        )
        if isinstance(node, exp.Like | exp.RegexpLike):
            _check_pattern(node)
            self._only(parts, "text")
            return "boolean"
        is_of_text = isinstance(node, exp.Length | exp.Trim) and len(parts) == 1
        if not is_of_text and not isinstance(node, (*_LOGIC, *_ARITHMETIC)):
            raise Unlike(f"{_name(node)} is not known to be the same in DuckDB")
        self._only(parts, wanted)
        return "number" if isinstance(node, exp.Length) else wanted

    def _column(self, node: exp.Column) -> str:
        cell = self._cells[node.name]
        source, output = _SOURCE.fullmatch(cell.column.type), _OUTPUT.fullmatch(cell.type)
        if source is None or cell.column.base:
            raise Unlike(f"{node.name} is {cell.column.type}")
        if output is None or source.lastgroup != output.lastgroup:
            raise Unlike(f"{node.name} is {cell.column.type}, and the output {cell.output} is {cell.type}")
        return str(source.lastgroup)

    def _cast(self, node: exp.Cast) -> str:
        to = node.to
        kind, given = _KINDS.get(to.this), self.of(node.this)
        if kind is None or (kind == "text" and to.expressions) or given not in {kind, *_OPEN}:
            raise Unlike(f"a cast to {to.sql('postgres')}")
        if _is_plain_numeric(node) and any(map(self._is_floating, node.this.find_all(exp.Column))):
            raise Unlike(f"a cast to {to.sql('postgres')}, which rounds there")
        if _is_plain_numeric(node) and given == "literal" and not _NUMBER.fullmatch(_bare(node.this).name):
            raise Unlike(f"a cast to {to.sql('postgres')}")
        return kind

    def _is_floating(self, node: exp.Column) -> bool:
        return self._cells[node.name].column.type in ("real", "double precision")

    def _one(self, parts: list[exp.Expr]) -> str:
        """Return the kind that all of these have."""
        kinds = {self.of(part) for part in parts}
        found = sorted(kinds - _OPEN)
        if len(found) > 1:
            raise Unlike(f"it holds {found[0]} against {found[1]}")
        return found[0] if found else "literal"

    def _only(self, parts: list[exp.Expr], kind: str) -> None:
        for part in parts:
            if self.of(part) not in {kind, *_OPEN}:
                raise Unlike(f"it takes a {self.of(part)} for a {kind}")


def _bare(node: exp.Expr) -> exp.Expr:
    return node.unnest()


def _listed(node: exp.Expr) -> list[exp.Expr] | None:
    """Return the members of the list in `x = ANY (ARRAY[…])` or `x <> ALL (ARRAY[…])`, None for all else."""
    right = node.args.get("expression")
    if isinstance(node, exp.EQ) and isinstance(right, exp.Any):
        members = right.this
    elif isinstance(node, exp.NEQ) and isinstance(right, exp.Anonymous) and right.name.upper() == "ALL":
        members = right.expressions[0]
    else:
        return None
    while isinstance(members, exp.Paren | exp.Cast):
        members = members.this
    return list(members.expressions) if isinstance(members, exp.Array) else None


def _is_plain_numeric(node: exp.Cast) -> bool:
    """Whether it is a cast to a numeric without a scale, which has none in DuckDB: there it would round."""
    return node.to.this is _Type.DECIMAL and not node.to.expressions


def _name(node: exp.Expr) -> str:
    return node.name if isinstance(node, exp.Anonymous) else type(node).__name__.lower()


def _check_pattern(node: exp.Expr) -> None:
    pattern = _bare(node.expression)
    if isinstance(pattern, exp.Cast):
        pattern = _bare(pattern.this)
    text = pattern.name
    fits = "\\" not in text if isinstance(node, exp.Like) else _PATTERN.fullmatch(text)
    if not isinstance(pattern, exp.Literal) or not fits:
        raise Unlike("its pattern may mean another thing in DuckDB")


def _made(node: exp.Expr, cells: Mapping[str, Cell]) -> exp.Expr:
    """Return what stands for a node in DuckDB's dialect, the node itself if nothing else does."""
    if isinstance(node, exp.Column):
        return exp.column(exp.to_identifier(cells[node.name].output, quoted=True))
    if isinstance(node, exp.Cast) and _is_plain_numeric(node):
        bare = _bare(node.this)
        return exp.Literal.number(bare.name) if isinstance(bare, exp.Literal) else node.this.copy()
    if isinstance(node, exp.Trim):
        # Without a second argument DuckDB takes away any space of Unicode, Postgres U+0020 alone.
        name = {"LEADING": "ltrim", "TRAILING": "rtrim"}.get(node.args.get("position") or "", "trim")
        return exp.Anonymous(this=name, expressions=[node.this.copy(), exp.Literal.string(" ")])
    if (listed := _listed(node)) is not None:
        # ANY of a list would be a subquery, which TRY does not take.
        found = exp.In(this=node.this.copy(), expressions=[each.copy() for each in listed])
        return exp.Not(this=found) if isinstance(node, exp.NEQ) else found
    if isinstance(node, exp.RegexpLike):
        any_character = exp.Literal.string("s")  # is what a dot means there
        return exp.func("regexp_matches", node.this.copy(), node.expression.copy(), any_character)
    return node
