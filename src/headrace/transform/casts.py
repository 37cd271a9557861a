"""Casts that need no TRY: the fast way through rows of which many are bad.

TRY evaluates vector by vector, and a vector in which a single row fails once more row by row, a hundred times
slower. An output that is a cast, or casts of casts, of a text is asked by TRY_CAST instead, which is null
where the cast fails and as fast whether it does or not. That holds for plain types only: a value that is no
null never becomes one by a cast that succeeds.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache

import duckdb
import sqlglot
from sqlglot.errors import SqlglotError
from sqlglot.tokenizer_core import Token, TokenType

from headrace.change import Column
from headrace.keys import quoted
from headrace.pgtypes import cast_keeps_apart
from headrace.transform.engine import engine

_PLAIN = re.compile(
    r"(TINYINT|SMALLINT|INTEGER|INT[1248]?|BIGINT|HUGEINT|U?(TINY|SMALL|BIG|HUGE)INT|UINTEGER|SHORT|LONG|SIGNED"
    r"|DECIMAL|NUMERIC|FLOAT[48]?|REAL|DOUBLE( PRECISION)?|BOOL(EAN)?|DATE|TIME|UUID"
    r"|TIMESTAMP|TIMESTAMPTZ|DATETIME|TIMESTAMP WITH TIME ZONE|VARCHAR|TEXT|STRING)(\(\d+\s*(,\s*\d+)?\))?",
    re.IGNORECASE,
)
_CAST = re.compile(r"CAST\s*\((.*)\s+AS\s+([\w\s(),]+)\)", re.DOTALL | re.IGNORECASE)
_SHORT_CAST = re.compile(r"(.*)::([\w\s(),]+)", re.DOTALL)
_OPENING = {TokenType.L_PAREN, TokenType.L_BRACE, TokenType.L_BRACKET}
_CLOSING = {TokenType.R_PAREN, TokenType.R_BRACE, TokenType.R_BRACKET}


@dataclass(frozen=True, slots=True)
class Cast:
    """A text, and the types that it is cast to, one after the other.

    `operand` is its expression; `is_column` says that it cannot fail since it is a column.
    """

    operand: str
    types: tuple[str, ...]
    is_column: bool

    def tried(self, operand: str) -> str:
        """Return the expression that casts `operand`, null where that fails."""
        expression = operand
        for type_ in self.types:
            expression = f"TRY_CAST({expression} AS {type_})"
        return f"TRY({expression})"  # not every cast of the engine keeps to TRY_CAST


@lru_cache(4096)
def cast_of(expression: str, columns: tuple[str, ...], alias: str) -> Cast | None:
    """Take an output's expression over a raw table's `columns`, all of them texts, apart.

    Returns None for what is no cast of a text to plain types.
    """
    operand, types = expression.strip(), list[str]()
    with engine() as db:
        while split := _outermost(db, operand):
            operand = split[0]
            types.append(split[1])
        if not types or not all(_PLAIN.fullmatch(type_) for type_ in types):
            return None
        texts = ", ".join(f"NULL::VARCHAR AS {quoted(name)}" for name in columns)
        try:
            found = db.execute(
                f"DESCRIBE SELECT ({operand}) FROM (SELECT {texts}) AS {quoted(alias)}"
            ).fetchall()
        except duckdb.Error:  # of columns that no source has, such as _committed_at
            return None
        is_column = _node_of(db, operand) == "COLUMN_REF"
    return Cast(operand, tuple(reversed(types)), is_column) if found[0][1] == "VARCHAR" else None


def reads_column(expression: str, column: Column, alias: str) -> bool:
    """Whether an expression is a column, perhaps cast; casts on the way must keep its values apart."""
    casts = casts_of_column(expression, column, alias)
    # The outermost is the output's type.
    return casts is not None and all(cast_keeps_apart(column.type, to) for to in casts[1:])


def casts_of_column(expression: str, column: Column, alias: str) -> list[str] | None:
    """Return the types that an expression casts a column to, the last one first; None where it is not that
    column."""
    bare, casts = expression.strip(), list[str]()
    while match := _CAST.fullmatch(bare) or _SHORT_CAST.fullmatch(bare):
        bare = match[1].strip().removeprefix("(").removesuffix(")").strip()
        casts.append(match[2].strip().upper())
    names = {column.name.lower(), f"{alias}.{column.name}".lower()}
    return casts if bare.replace('"', "").lower() in names else None


def _outermost(db: duckdb.DuckDBPyConnection, expression: str) -> tuple[str, str] | None:
    """Return operand and type of an expression that is a cast; parentheses around it count for nothing."""
    tokens = _tokens(expression)
    while _is_wrapped(tokens):
        tokens = tokens[1:-1]
    if len(tokens) < 3:
        return None
    if tokens[0].text.upper() == "CAST" and _closes_last(tokens, 1):
        begin, at, end = 2, _at_depth(tokens, TokenType.ALIAS, 1), len(tokens) - 1
    else:
        begin, at, end = 0, _at_depth(tokens, TokenType.DCOLON, 0), len(tokens)
    if at is None or _node_of(db, expression) != "CAST":
        return None
    return _cut(expression, tokens[begin:at]), _cut(expression, tokens[at + 1 : end])


def _tokens(expression: str) -> list[Token]:
    try:
        return list(sqlglot.tokenize(expression, read="duckdb"))
    except SqlglotError:
        return []


def _node_of(db: duckdb.DuckDBPyConnection, expression: str) -> str:
    """Return what the engine takes an expression for."""
    ((text,),) = db.execute("SELECT json_serialize_sql(?)", [f"SELECT ({expression})"]).fetchall()
    parsed = json.loads(text)
    if parsed["error"]:
        return ""
    node = parsed["statements"][0]["node"]["select_list"][0]
    return "" if node.get("try_cast") else str(node["class"])


def _is_wrapped(tokens: list[Token]) -> bool:
    return len(tokens) > 2 and tokens[0].token_type is TokenType.L_PAREN and _closes_last(tokens, 0)


def _closes_last(tokens: list[Token], first: int) -> bool:
    """Whether what opens at `first` closes with the last token."""
    depth = 0
    for i, token in enumerate(tokens[first:], first):
        depth += (token.token_type in _OPENING) - (token.token_type in _CLOSING)
        if depth == 0:
            return i == len(tokens) - 1
    return False


def _at_depth(tokens: list[Token], kind: TokenType, wanted: int) -> int | None:
    """Return the last place of a token of a kind within so many brackets."""
    depth, found = 0, None
    for i, token in enumerate(tokens):
        depth += (token.token_type in _OPENING) - (token.token_type in _CLOSING)
        if depth == wanted and token.token_type is kind:
            found = i
    return found


def _cut(text: str, tokens: list[Token]) -> str:
    return text[tokens[0].start : tokens[-1].end + 1] if tokens else ""
