"""Random histories of a few tables, and our log of them in a form that others' accounts compare with."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from hypothesis import strategies as st

from headrace.config import Project, load_project
from headrace.payload import HEAD, decode_rows
from headrace.pipeline import open_lanes

LITERALS = {
    "integer": ["0", "-1", "2147483647"],
    "bigint": ["9223372036854775807"],
    "numeric": ["1.10", "'NaN'", "1e40", "-0.000"],
    "double precision": ["0.1", "'-Infinity'", "1e-300"],
    "boolean": ["true", "false"],
    "text": ["''", "'a b'", "'it''s'", "E'\\\\x'", "E'a\\nb\\t'", "'größe 🚰'", "'null'", "'a[b]:c'", "'\"'", "repeat('x', 3000)"],  # noqa: E501
    "bytea": [r"'\x00ff'", "''"],
    "timestamp with time zone": ["'2024-02-29 12:00:00.5+05:30'", "'infinity'",
                                 "'0044-03-15 12:00:00+00 BC'"],
    "date": ["'2024-02-29'", "'-infinity'"],
    "jsonb": ["""'{"a": [1, null, "x"]}'""", "'null'"],
    "text[]": ["""'{"a b",NULL,"NULL"}'""", "'{}'", "'{{a},{b}}'"],
    "bit varying": ["B'101'"],
    "interval": ["'1 mon -2 days 00:00:01'"],
}  # fmt: skip
LONG = "(SELECT string_agg(md5(n::text || '{}'), '') FROM generate_series(1, 150) n)"
"""A text that does not compress, and so lies outside of its row."""

NAMES = ["v", "größe", "select", "a b", 'q"q', "V2", "long_" * 6, "null", "c]:", "old-key"]
KEYS = [("integer",), ("text",), ("integer", "text")]


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@dataclass(frozen=True)
class Table:
    """A table of a history: its columns with types, key columns first."""

    name: str
    keys: tuple[str, ...]
    columns: dict[str, str]
    identity: str

    def definition(self) -> str:
        columns = ", ".join(f"{quoted(name)} {type_}" for name, type_ in self.columns.items())
        key = ", ".join(map(quoted, self.keys))
        return (
            f"CREATE TABLE {self.name} ({columns}, PRIMARY KEY ({key})); "
            f"ALTER TABLE {self.name} REPLICA IDENTITY {self.identity}"
        )

    def some(self, first: int, last: int) -> str:
        """Rows with numbers for keys, and a long text each."""
        keys = ", ".join("n" if self.columns[key] == "integer" else "n::text" for key in self.keys)
        listed = ", ".join(map(quoted, self.keys))
        return (
            f"INSERT INTO {self.name} ({listed}, far) SELECT {keys}, {LONG.format(first)} "
            f"FROM generate_series({first}, {last}) n ON CONFLICT DO NOTHING"
        )


@dataclass
class History:
    """Tables, and steps: (session, statement)."""

    tables: list[Table]
    steps: list[tuple[int, str]]


@st.composite
def histories(draw: st.DrawFn) -> History:
    tables = []
    for number in range(draw(st.integers(2, 3))):
        keys = draw(st.sampled_from(KEYS))
        others = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
        columns = {f"k{i}": type_ for i, type_ in enumerate(keys)}
        columns |= {name: draw(st.sampled_from(sorted(LITERALS))) for name in others}
        columns["far"] = "text"
        identity = draw(st.sampled_from(["DEFAULT", "DEFAULT", "FULL"]))
        tables.append(Table(f"t{number}", tuple(columns)[: len(keys)], columns, identity))
    steps = [(0, table.some(1, 4)) for table in tables]
    for session in draw(st.lists(st.integers(0, 1), min_size=4, max_size=9)):
        ends = draw(st.sampled_from(["COMMIT", "COMMIT", "COMMIT", "ROLLBACK", ""]))
        steps.append((session, "BEGIN"))
        steps += [
            (session, statement) for statement in draw(st.lists(statements(tables), min_size=2, max_size=8))
        ]
        steps += [(session, ends)] if ends else []
    return History(tables, steps)


@st.composite
def statements(draw: st.DrawFn, tables: Sequence[Table]) -> str:
    table = draw(st.sampled_from(tables))
    kinds = ["insert", "update", "far"] * 3 + ["key", "delete"] * 2
    kind = draw(st.sampled_from([*kinds, "again", "truncate", "savepoint", "rollback", "release", "many"]))
    cells = [
        _key(draw, type_) if name in table.keys else _cell(draw, name, type_)
        for name, type_ in table.columns.items()
    ]
    plain = [name for name in table.columns if name not in table.keys]
    column = draw(st.sampled_from(plain))
    where = f"k0::text < '{draw(st.sampled_from(['1', '5', '9', 'x']))}'"
    insert = f"INSERT INTO {table.name} VALUES ({', '.join(cells)}) ON CONFLICT DO NOTHING"
    only = f"k0 = {_key(draw, table.columns['k0'])}"
    name = "far" if kind == "far" else column
    value = _cell(draw, name, table.columns[name])
    new = _key(draw, table.columns["k0"])
    emptied = draw(st.sets(st.sampled_from([table.name for table in tables]), min_size=1))
    return {
        "insert": insert,
        "update": f"UPDATE {table.name} SET {quoted(name)} = {value} WHERE {where}",
        "far": f"UPDATE {table.name} SET {quoted(name)} = {value} WHERE {where}",
        "key": f"UPDATE {table.name} SET k0 = {new} WHERE {only} "
        f"AND NOT EXISTS (SELECT FROM {table.name} WHERE k0 = {new})",
        "delete": f"DELETE FROM {table.name} WHERE {draw(st.sampled_from([where, only]))}",
        "again": f"DELETE FROM {table.name} WHERE {only}; {insert}",
        "truncate": f"TRUNCATE {', '.join(sorted(emptied))}",
        "savepoint": "SAVEPOINT s",
        "rollback": "ROLLBACK TO s",
        "release": "RELEASE s",
        "many": table.some(3, 12),
    }[kind]


def _key(draw: st.DrawFn, type_: str) -> str:
    return draw(st.sampled_from(["1", "2", "3"] if type_ == "integer" else ["'1'", "'é'", "''"]))


def _cell(draw: st.DrawFn, name: str, type_: str) -> str:
    if name == "far" and draw(st.booleans()):
        return LONG.format(draw(st.integers(0, 9)))
    return draw(st.sampled_from([*LITERALS[type_], "NULL"])) + (f"::{type_}" if type_ != "text" else "")


def play(history: History, sessions: Sequence[psycopg.Connection[Any]]) -> None:
    """Run the steps; what is refused (a lock that is held, a savepoint that is not there) is part of it."""
    for session, statement in history.steps:
        with contextlib.suppress(psycopg.Error):
            sessions[session].execute(statement.encode())
    for session in sessions:
        with contextlib.suppress(psycopg.Error):
            session.execute("COMMIT")


@dataclass
class Change:
    """One change by one account: `cells` of the new row, or of the old one for a delete."""

    tables: tuple[str, ...]
    op: str
    cells: dict[str, str | None] = field(default_factory=dict)
    unchanged: frozenset[str] = frozenset()
    before: dict[str, str | None] | None = None


@dataclass
class Told:
    """A transaction by one account."""

    xid: int
    committed_at: int
    changes: list[Change]


def project_of(folder: Path, url: str, tables: Sequence[str], slot: str) -> Project:
    listed = ", ".join(f'"{table}"' for table in tables)
    (folder / ".headrace" / "log").mkdir(parents=True)
    (folder / "headrace.toml").write_text(
        f'[source.pg]\ntype = "postgres"\nurl = "{url}"\nslot = "{slot}"\npublication = "{slot}"\n'
        f'tables = [{listed}]\n[log]\ngroup_linger = "1ms"\n'
        '[destination]\ntype = "duckdb"\npath = "w.duckdb"\n'
    )
    return load_project(folder)


@contextlib.contextmanager
def captured(project: Project) -> Iterator[Any]:
    """Bring what is committed now into the log, and return the lane."""
    (lane,) = open_lanes(project)
    try:
        lane.capture(threading.Event(), until=lane.source.head())
        yield lane
    finally:
        lane.close()


def in_our_log(project: Project) -> list[Told]:
    """What our log tells behind the copy: transactions in order, and their changes in order."""
    found: dict[int, Told] = {}
    numbered: dict[int, list[tuple[int, Change]]] = {}
    with captured(project) as lane:
        items = lane.log.read(0, 1 << 40)
    for item in items:
        entry = item.entry
        if entry.kind == "truncate":
            known = numbered.setdefault(entry.last.commit, [])
            same = [change for ordinal, change in known if ordinal == entry.last.ordinal]
            if same:
                same[0].tables += (entry.table.name,)
            else:
                known.append((entry.last.ordinal, Change((entry.table.name,), "t")))
            found.setdefault(entry.last.commit, Told(0, entry.committed_at, []))
        elif entry.kind == "rows":
            batch = decode_rows(entry.payload)
            names = [
                name for name in batch.schema.names[len(HEAD) :] if name not in ("_unchanged", "_before")
            ]
            for row in batch.to_pylist():
                cells = {name: row[name] for name in names}
                unchanged = frozenset(row.get("_unchanged") or ())
                before = row.get("_before")
                change = Change((entry.table.name,), row["_op"], cells, unchanged, before and dict(before))
                numbered.setdefault(row["_commit"], []).append((row["_ordinal"], change))
                told = found.setdefault(row["_commit"], Told(row["_txid"], row["_committed_at"], []))
                told.xid = row["_txid"]
                assert told.committed_at == row["_committed_at"]
    for commit, changes in numbered.items():
        ordinals = [ordinal for ordinal, _ in sorted(changes, key=lambda pair: pair[0])]
        assert ordinals == list(range(1, len(ordinals) + 1)), "ordinals have gaps or repeat"
        found[commit].changes = [change for _, change in sorted(changes, key=lambda pair: pair[0])]
    return [found[commit] for commit in sorted(found)]
