"""What is to become of models when the source alters a table: `[source.NAME.schema_changes]`.

- `evolve`: the destination follows;
- `freeze`: it keeps the shape it has, what is new stays in raw alone;
- `suspend`: the table's models stand still until a person lets them go on.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

from headrace import values
from headrace.change import TableId
from headrace.document import Document, Parser

ChangeKind = Literal[
    "column_added",
    "column_dropped",
    "column_renamed",
    "type_widened",
    "type_changed",
    "key_changed",
    "table_added",
    "table_moved",
]
Action = Literal["evolve", "freeze", "suspend"]

Rules = tuple[tuple[str, ChangeKind, Action], ...]
"""A pattern of tables, a kind and what is done then; the last that fits decides."""

_CHOICES: dict[ChangeKind, tuple[Action, ...]] = {
    # Rows are known by the key: there is no other to keep them by.
    "key_changed": ("evolve", "suspend"),
    # There are no models yet that could wait; those of a table that has moved have lost it in any case.
    "table_added": ("evolve", "freeze"),
    "table_moved": ("evolve", "freeze"),
}
_EVERY = "*.*"


def action(rules: Rules, table: TableId, kind: ChangeKind) -> Action:
    """Return what is done about a kind of change of a table."""
    for pattern, of, chosen in reversed(rules):
        schema, _, name = pattern.replace("[", "[[]").partition(".")
        if of == kind and fnmatchcase(table.schema, schema) and fnmatchcase(table.name, name):
            return chosen
    return "evolve"


def parse_rules(document: Document, path: tuple[str, ...], raw: object) -> Rules:
    """Parse the table `schema_changes`: kinds of changes, and patterns of tables with kinds of their own."""
    if not isinstance(raw, dict):
        document.table(path, raw, {})
        return ()
    general = {key: value for key, value in raw.items() if "." not in key}
    sections: list[tuple[str, dict[ChangeKind, Action]]]
    sections = [(_EVERY, _kinds(document, path, general))]
    for pattern in raw.keys() - general.keys():
        fault = values.pattern_fault(pattern)
        if fault or pattern.startswith("!"):
            document.fail((*path, pattern), fault or "a pattern of schema_changes cannot begin with !")
    for pattern in (key for key in raw if key not in general):
        sections.append((pattern, _kinds(document, (*path, pattern), raw[pattern])))
    return tuple((pattern, kind, chosen) for pattern, given in sections for kind, chosen in given.items())


def _kinds(document: Document, path: tuple[str, ...], raw: object) -> dict[ChangeKind, Action]:
    parsers: dict[str, Parser] = {
        kind: values.only(*_CHOICES.get(kind, get_args(Action))) for kind in get_args(ChangeKind)
    }
    return cast("dict[ChangeKind, Action]", document.table(path, raw, parsers))
