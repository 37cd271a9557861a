"""Reading a model file: a SELECT over one raw table, with a comment of TOML before it.

The user's expressions run verbatim: this module finds where each begins and ends and renders
nothing again (rendering corrupts some statements). DuckDB's own parser decides what is valid.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import sqlglot
from sqlglot.tokenizer_core import Token, TokenType

from headrace.channels import DEFAULT, AlertSettings
from headrace.errors import ModelError
from headrace.transform import alerting
from headrace.transform.foreign import KEYS as FOREIGN
from headrace.transform.foreign import NOTHING_SAID, ForeignKey, Said, foreign_keys_of, said_of
from headrace.transform.handling import KEYS as HANDLING
from headrace.transform.handling import NO_SAY, Action, Handling, action_of, handling_of
from headrace.transform.header import settings_of, version_of
from headrace.transform.kind import LATEST, Kind, kind_of

_KEYS = ("key", "contract", "materialize", "delete", *FOREIGN, *HANDLING, *alerting.KEYS)
_CLOCKS = {"current_date", "current_time", "current_timestamp", "localtime", "localtimestamp"}
_OPENING = {TokenType.L_PAREN, TokenType.L_BRACE, TokenType.L_BRACKET}
_CLOSING = {TokenType.R_PAREN, TokenType.R_BRACE, TokenType.R_BRACKET}
_RULE = re.compile(r"\b(NOT\s+NULL|CHECK\s*\()", re.IGNORECASE)
_ACTION = re.compile(r"ON\s+VIOLATION\s+(\w+)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Check:
    """One rule of a contract. `expression` is over output columns; '' means NOT NULL.

    `on_violation` says what becomes of a row that violates it: `quarantine`; `warn`, it is applied and
    counted; `null`, so it is with the cell nulled; `suspend`, the model is.
    """

    column: str
    expression: str
    on_violation: Action = "quarantine"

    @property
    def reason(self) -> str:
        """The reason code of a violation."""
        return "constraint.check" if self.expression else "constraint.not_null"

    @property
    def text(self) -> str:
        """The rule as the contract has it."""
        return f"CHECK ({self.expression})" if self.expression else "NOT NULL"


@dataclass(frozen=True, slots=True)
class ModelText:
    """A model file, taken apart.

    `outputs` are (name, expression) pairs and `where` is '' or an expression, both verbatim;
    `types` are the contract's types by output column, `kind` what becomes of a row's earlier states, `alerts`
    who is told of what goes wrong, `said` what it says of its constraints as a whole.
    """

    name: str
    source: str
    table: str
    alias: str
    outputs: tuple[tuple[str, str], ...]
    where: str
    key: tuple[str, ...]
    types: tuple[tuple[str, str], ...]
    checks: tuple[Check, ...]
    version: str
    kind: Kind = LATEST
    handling: Handling = NO_SAY
    alerts: AlertSettings = DEFAULT
    foreign_keys: tuple[ForeignKey, ...] = ()
    said: Said = NOTHING_SAID

    @property
    def file(self) -> str:
        """The file's name."""
        return f"{self.name}.sql"


def read_model(path: Path, name: str = "") -> ModelText:
    """Read a model file; its name is the file's without the suffix, unless given.

    Raises ModelError, naming file and line, when it does not parse, is no plain SELECT over one raw
    table, or uses what a row model may not: joins, aggregates, windows, subqueries, clocks.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}.") from error
    settings = settings_of(path.name, text, _KEYS)
    node = _parse(path.name, text)
    _refuse_what_rows_cannot_do(path.name, node)
    source, table, alias = _table(path.name, node)
    outputs, where = _spans(path.name, text)
    names = [name for name, _ in outputs]
    handling = handling_of(path.name, settings, names)
    types, checks = _contract(path.name, settings.get("contract", {}), names, handling)
    key = _key(path.name, settings, outputs)
    checks = checked(path.name, key, checks, handling)
    kind = kind_of(path.name, settings, [name for name, _ in outputs])
    foreign_keys = foreign_keys_of(path.name, settings, names)
    return ModelText(
        name or path.stem, source, table, alias, outputs, where, key, types, checks, version_of(text), kind,
        handling, alerting.alert_settings_of(path.name, settings), foreign_keys, said_of(path.name, settings),
    )  # fmt: skip


def _parse(file: str, text: str) -> dict[str, Any]:
    with duckdb.connect() as db:
        row = db.execute("SELECT json_serialize_sql(?)", [text]).fetchall()[0]
    parsed = json.loads(row[0])
    if parsed["error"]:
        place = int(parsed["position"]) if "position" in parsed else 0
        line = text.count("\n", 0, place) + 1
        raise ModelError(
            f"{file}:{line}: {parsed['error_message']}.", "A model is one SELECT in DuckDB's SQL."
        )
    statements = parsed["statements"]
    if len(statements) != 1 or statements[0]["node"]["type"] != "SELECT_NODE":
        raise ModelError(f"{file}: a model is one plain SELECT, without UNION or a second statement.")
    node: dict[str, Any] = statements[0]["node"]
    return node


def _refuse_what_rows_cannot_do(file: str, node: dict[str, Any]) -> None:
    if node["cte_map"]["map"]:
        raise ModelError(f"{file}: a row model has no WITH.")
    sample = node["sample"] or node["from_table"].get("sample")
    if node["group_expressions"] or node["having"] or node["qualify"] or node["modifiers"] or sample:
        raise ModelError(
            f"{file}: a row model filters and projects single rows: no DISTINCT, GROUP BY, HAVING, "
            "QUALIFY, ORDER BY, LIMIT or SAMPLE."
        )
    functions = _functions()
    for part in _walk([node["select_list"], node["where_clause"]]):
        kind = part.get("class")
        if kind in {"SUBQUERY", "WINDOW", "STAR"}:
            what = {"STAR": "* (name the columns)", "WINDOW": "a window"}.get(kind, "a subquery")
            raise ModelError(f"{file}: a row model cannot use {what}.")
        name = str(part.get("function_name", "")).lower()
        columns = [str(column).lower() for column in part.get("column_names", ())]
        clock = name if functions.get(name, "") == "clock" or _is_age_until_now(name, part) else ""
        if len(columns) == 1 and columns[0] in _CLOCKS:
            clock = columns[0]
        if clock:
            raise ModelError(
                f"{file}: {clock} gives another value at each run, so a replay would not repeat.",
                "Use _committed_at, the time at which the source committed the change.",
            )
        if functions.get(name) == "aggregate" or name == "unnest":
            raise ModelError(f"{file}: {name}() makes one row of many or many of one: a row model cannot.")


def _functions() -> dict[str, str]:
    """Say which functions are aggregates and which depend on when they run."""
    # Variants over TIMESTAMPTZ depend on the session's time zone, which is pinned: a function is no clock
    # for them. `ago` is a macro over the clock, of which the catalog does not say so.
    with duckdb.connect() as db:
        rows = db.execute(
            """SELECT function_name, CASE
              WHEN bool_or(function_type = 'aggregate') THEN 'aggregate'
              WHEN bool_or(stability = 'VOLATILE') OR bool_and(stability <> 'CONSISTENT') THEN 'clock'
            END AS what
            FROM duckdb_functions() WHERE function_type IN ('aggregate', 'scalar')
            GROUP BY ALL HAVING what IS NOT NULL"""
        ).fetchall()
    return dict(rows) | {"ago": "clock"}


def _is_age_until_now(name: str, part: dict[str, Any]) -> bool:
    """Whether this is `age(t)`: with one argument it counts until today, and the catalog does not say so."""
    return name == "age" and len(part.get("arguments", part.get("children", ()))) == 1


def _walk(part: object) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        yield part
        for value in part.values():
            yield from _walk(value)
    elif isinstance(part, list):
        for value in part:
            yield from _walk(value)


def _table(file: str, node: dict[str, Any]) -> tuple[str, str, str]:
    table = node["from_table"]
    path = table.get("qualified_name", {}).get("path") or [
        part
        for part in (table.get("catalog_name"), table.get("schema_name"), table.get("table_name"))
        if part
    ]
    if table["type"] != "BASE_TABLE" or len(path) != 3 or path[0].lower() != "raw":
        raise ModelError(
            f"{file}: a row model reads one raw table.",
            'Write FROM raw.<source>.<table>, or raw.<source>."schema.table" outside of public. To join '
            "tables, write a mart, which reads row models and mirrors.",
        )
    if table.get("column_name_alias"):
        raise ModelError(f"{file}: the table's alias renames the columns.", "Write `column AS name` instead.")
    return path[1], path[2], table["alias"] or path[2]


def _spans(file: str, text: str) -> tuple[tuple[tuple[str, str], ...], str]:
    """Find the texts of the output expressions and of WHERE by their tokens."""
    tokens = sqlglot.tokenize(text, read="duckdb")
    while tokens and tokens[-1].token_type is TokenType.SEMICOLON:
        tokens.pop()
    if tokens[0].token_type is not TokenType.SELECT:
        raise ModelError(f"{file}: a model begins with SELECT.", "Put FROM after the output columns.")
    depth, items, item, where_at = 0, [], list[Token](), None
    in_list = False
    for i, token in enumerate(tokens):
        depth += (token.token_type in _OPENING) - (token.token_type in _CLOSING)
        if depth == 0 and token.token_type is TokenType.SELECT:
            in_list = True
        elif in_list and depth == 0 and _ends_output(tokens, i):
            if item:
                items.append(_output(file, text, item))
            item, in_list = [], token.token_type is TokenType.COMMA
        elif depth == 0 and token.token_type is TokenType.WHERE:
            where_at = i
        elif in_list:
            item.append(token)
    where = "" if where_at is None else _cut(text, tokens[where_at + 1 :])
    names = [name.lower() for name, _ in items]
    for name in names:
        if names.count(name) > 1 or name.startswith("_"):
            raise ModelError(f"{file}: the output name {name!r} is used twice, or begins with an underscore.")
    return tuple(items), where


def _ends_output(tokens: list[Token], i: int) -> bool:
    """Whether a token ends an output expression: a comma, or a FROM that is not of IS DISTINCT FROM."""
    if tokens[i].token_type is TokenType.FROM:
        return tokens[i - 1].token_type is not TokenType.DISTINCT
    return tokens[i].token_type is TokenType.COMMA


def _output(file: str, text: str, tokens: list[Token]) -> tuple[str, str]:
    if len(tokens) > 2 and tokens[-2].token_type is TokenType.ALIAS:
        return tokens[-1].text, _cut(text, tokens[:-2])
    path = tokens[::2]
    dots = tokens[1::2]
    if len(path) == len(dots) + 1 and all(dot.token_type is TokenType.DOT for dot in dots):
        return path[-1].text, _cut(text, tokens)
    raise ModelError(f"{file}: {_cut(text, tokens)} needs a name.", "Write `expression AS name`.")


def _cut(text: str, tokens: list[Token]) -> str:
    return text[tokens[0].start : tokens[-1].end + 1]


def _key(file: str, settings: dict[str, Any], outputs: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    key = settings.get("key", [])
    if not isinstance(key, list) or not all(isinstance(column, str) for column in key):
        raise ModelError(f'{file}: key must be a list of output columns, such as ["order_id"].')
    for column in key:
        if column not in dict(outputs):
            raise ModelError(f"{file}: key names {column!r}, which the SELECT does not put out.")
    return tuple(key)


def _contract(
    file: str, contract: object, names: list[str], handling: Handling
) -> tuple[tuple[tuple[str, str], ...], tuple[Check, ...]]:
    if not isinstance(contract, dict):
        raise ModelError(f'{file}: contract must be a table: [contract], then amount = "BIGINT", say.')
    types, checks = [], []
    for column, rule in contract.items():
        if column not in names:
            near = difflib.get_close_matches(column, names, 1)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            raise ModelError(
                f"{file}: the contract names {column!r}, which the SELECT does not put out.{hint}"
            )
        if not isinstance(rule, str):
            raise ModelError(
                f'{file}: the contract of {column!r} must be a string such as "BIGINT NOT NULL".'
            )
        type_, column_checks = rules_of(file, column, rule, handling.on_violation)
        checks += column_checks
        if type_:
            types.append((column, type_))
    return tuple(types), tuple(checks)


def checked(
    file: str, key: tuple[str, ...], checks: Sequence[Check], handling: Handling
) -> tuple[Check, ...]:
    """Return the checks of a contract with those that a key brings: its columns are never null.

    Raises ModelError, naming the file, where a check would null what must not be null.
    """
    found, required = list[Check](), {check.column for check in checks if not check.expression}
    for said in checks:
        is_of_key = said.column in key and not said.expression
        is_said_of_all = is_of_key and said.on_violation == handling.on_violation
        check = replace(said, on_violation=handling.on_key_violation) if is_said_of_all else said
        if (is_of_key and check.on_violation == "warn") or (
            check.on_violation == "null" and check.column in {*key, *required}
        ):
            raise ModelError(
                f"{file}: ON VIOLATION {check.on_violation} cannot be of {check.column}: {check.text}, since "
                f"{check.column} must not be null.",
                "Leave it out there; the row is then quarantined.",
            )
        found.append(check)
    by_key = (Check(name, "", handling.on_key_violation) for name in key if name not in required)
    return (*by_key, *found)


def rules_of(file: str, column: str, rule: str, default: Action = "quarantine") -> tuple[str, list[Check]]:
    """Split `DECIMAL(12,2) NOT NULL CHECK (amount >= 0) ON VIOLATION warn` into its type, which may be '',
    and its checks; `default` is what a violation does where none of them says.

    Raises ModelError, naming the file, for what is no rule.
    """
    checks: list[Check] = []
    match = _RULE.search(rule)
    type_ = rule[: match.start()].strip() if match else rule.strip()
    rest = rule[match.start() :] if match else ""
    while rest:
        match = _RULE.match(rest)
        if not match:
            raise ModelError(f"{file}: in the contract of {column!r}, {rest!r} is not understood.")
        if not match[1].upper().startswith("CHECK"):
            action, rest = _action(file, column, rest[match.end() :].strip(), default)
            # A default that cannot be meant of NOT NULL is of the others.
            checks.append(Check(column, "", "quarantine" if action == default == "null" else action))
            continue
        tokens = sqlglot.tokenize(rest[match.end() - 1 :], read="duckdb")
        depth = 0
        for token in tokens:
            depth += (token.token_type is TokenType.L_PAREN) - (token.token_type is TokenType.R_PAREN)
            if depth == 0:
                break
        else:
            raise ModelError(f"{file}: in the contract of {column!r}, a CHECK is not closed.")
        close = match.end() - 1 + token.start
        expression = rest[match.end() : close].strip()
        action, rest = _action(file, column, rest[close + 1 :].strip(), default)
        checks.append(Check(column, expression, action))
    return type_, checks


def _action(file: str, column: str, rest: str, default: Action) -> tuple[Action, str]:
    """Take `ON VIOLATION action` off what follows a check."""
    match = _ACTION.match(rest)
    if not match:
        return default, rest
    return action_of(f"{file}: in the contract of {column!r}, ON VIOLATION", match[1].lower()), rest[
        match.end() :
    ]
