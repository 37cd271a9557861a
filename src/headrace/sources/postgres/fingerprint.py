"""What the publication was when Headrace last had a hand in it, and whether it still is.

A table that was out of the publication for a while, a filter or a column list changed by somebody
else: the changes that were left out meanwhile never come, and nothing in the stream says so. So the
publication's fingerprint stands in the note `publication`, and anything else than it stops the source.

Only catalogs are read, no view or function that would open a table: the application's own locks on
its tables must not hold up the stream.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headrace.alarms import tell
from headrace.change import TableId
from headrace.config import SourceConfig
from headrace.errors import RESYNC, SourceGap
from headrace.protocols import LogIndex
from headrace.sources.postgres.catalog import Connection
from headrace.sources.postgres.clauses import has_clauses
from headrace.sources.postgres.publication import amend
from headrace.sources.postgres.tables import captured_tables

_NOTE = "publication"

_PUBLICATION = """
SELECT p.oid::bigint, p.xmin::text, p.pubowner::bigint, p.puballtables,
       p.pubviaroot, p.pubinsert, p.pubupdate, p.pubdelete, p.pubtruncate
FROM pg_publication p WHERE p.pubname = %s
"""

# prattrs and prqual exist from 15 on, as does publishing whole schemas.
_MEMBERS = """
SELECT c.oid::bigint, n.nspname, c.relname, r.oid::bigint, {columns}, {filter}
FROM pg_publication_rel r JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE r.prpubid = %(publication)s ORDER BY c.oid
"""
_LISTED = "r.prattrs::int2[]::int[]", "md5(r.prqual::text)"
_OTHERS = """
SELECT c.oid::bigint, n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND NOT (c.relispartition AND %(root)s)
  AND c.oid >= 16384 AND n.nspname <> 'information_schema' AND {which} ORDER BY c.oid
"""
_SCHEMAS = "c.relnamespace IN (SELECT pnnspid FROM pg_publication_namespace WHERE pnpubid = %(publication)s)"


@dataclass(frozen=True, slots=True)
class Member:
    """A published table.

    `member` is the oid of its entry in the publication, another one once the table was taken out and
    put back; 0 where all tables, or those of a schema, are published. `columns` are the numbers of the
    listed columns, None without a list; `filter` is a hash of the row filter, '' without one.
    """

    oid: int
    schema: str
    name: str
    member: int
    columns: tuple[int, ...] | None
    filter: str

    @property
    def table(self) -> TableId:
        """The table by name."""
        return TableId(self.schema, self.name)


@dataclass(frozen=True, slots=True)
class Publication:
    """A publication as the catalog has it: `settings` are `via_root` and the kinds of changes, `touched`
    is the id of the transaction that last altered any of them or the owner."""

    oid: int
    touched: str
    owner: int
    settings: dict[str, bool]
    members: tuple[Member, ...]

    def to_json(self) -> str:
        """Render as the note holds it."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Publication:
        """Read back what `to_json` wrote."""
        raw = json.loads(text)
        members = (
            Member(**{**m, "columns": None if m["columns"] is None else tuple(m["columns"])})
            for m in raw["members"]
        )
        return cls(**{**raw, "members": tuple(members)})


def publication_fingerprint(db: Connection, name: str) -> Publication | None:
    """Return all that decides what a publication lets through; None if there is none of that name."""
    row = db.execute(_PUBLICATION, [name]).fetchone()
    if row is None:
        return None
    publication, touched, owner, all_tables, *flags = row
    settings = dict(zip(("via_root", "insert", "update", "delete", "truncate"), flags, strict=True))
    wanted = {"publication": publication, "root": settings["via_root"]}
    modern = has_clauses(db)
    columns, filter_ = _LISTED if modern else ("NULL", "NULL")
    listed = [
        Member(oid, schema, table, member, tuple(numbers) if numbers else None, condition or "")
        for oid, schema, table, member, numbers, condition in _rows(
            db, _MEMBERS.format(columns=columns, filter=filter_), wanted
        )
    ]
    known = {member.oid for member in listed}
    which = "true" if all_tables else _SCHEMAS if modern else "false"
    others = [
        Member(oid, schema, table, 0, None, "")
        for oid, schema, table in _rows(db, _OTHERS.format(which=which), wanted)
        if oid not in known
    ]
    return Publication(publication, touched, owner, settings, (*listed, *others))


def expect_publication(db: Connection, config: SourceConfig, log: LogIndex) -> None:
    """Take the publication as it is now for what it should be; call it after making or altering it."""
    found = publication_fingerprint(db, config.publication)
    if found is None:
        raise _gap(config, f"the publication {config.publication} is gone")
    log.set_note(_NOTE, found.to_json())


def check_publication(db: Connection, config: SourceConfig, log: LogIndex) -> None:
    """Stop where the publication may have left out changes of a captured table.

    Raises SourceGap with what is different. Tables that are captured no longer may go, others may come.
    """
    note = log.note(_NOTE)
    found = publication_fingerprint(db, config.publication)
    if found is None:
        raise _gap(config, f"the publication {config.publication} is gone")
    expected = Publication.from_json(note) if note else found
    captured = set(captured_tables(log))
    now = {member.oid: member for member in found.members}
    faults = [_settings_fault(expected, found)]
    faults += [
        _member_fault(db, member, now.get(member.oid))
        for member in expected.members
        if member.table in captured
    ]
    if not note:
        missing = sorted(captured - {member.table for member in found.members})
        faults += [f"{table} is not in it" for table in missing]
    if fault := next((fault for fault in faults if fault), ""):
        raise _gap(config, f"the publication {config.publication} is not what it was: {fault}")
    if not note or expected.touched != found.touched:
        if note and expected.owner == found.owner:
            tell(
                "source %s: the publication %s was altered, and is what it was: if it let less through in "
                "between, changes are missing; `headrace verify` tells.",
                config.name, config.publication, source=config.name, severity="warning",
            )  # fmt: skip
        log.set_note(_NOTE, found.to_json())


def amend_own(db: Connection, config: SourceConfig, log: LogIndex, tables: Sequence[TableId]) -> None:
    """Like `amend`, where the publication is what it was: what it becomes is expected from now on.

    Raises SourceGap where somebody else has changed it.
    """
    check_publication(db, config, log)
    if amend(db, config, tables):
        expect_publication(db, config, log)


def captured_oids(log: LogIndex) -> dict[int, TableId]:
    """Return the oid of each captured table that is published by Headrace's own doing.

    One that was removed may still be published, where the role may not take it out.
    """
    note = log.note(_NOTE)
    captured = set(captured_tables(log))
    members = Publication.from_json(note).members if note else ()
    return {member.oid: member.table for member in members if member.table in captured}


def _settings_fault(expected: Publication, found: Publication) -> str:
    if found.oid != expected.oid:
        return "it was dropped and made again"
    changed = [name for name, value in found.settings.items() if value != expected.settings[name]]
    return ", ".join(f"{name} is {'on' if found.settings[name] else 'off'}" for name in changed)


def _member_fault(db: Connection, expected: Member, found: Member | None) -> str:
    """Say what became of one captured table in the publication; '' if nothing, or if it was dropped."""
    table = expected.table
    if found is None:
        return _absence(db, expected)
    if found.member != expected.member:
        return f"{table} was taken out and put back"
    if found.columns != expected.columns:
        return f"{table} is published with {_columns(db, found)}, not with {_columns(db, expected)}"
    if found.filter != expected.filter:
        which = "another" if expected.filter and found.filter else "a new" if found.filter else "no longer a"
        return f"{table} has {which} row filter"
    return ""


def _absence(db: Connection, expected: Member) -> str:
    table = expected.table
    for oid, schema, name in _rows(
        db,
        "SELECT c.oid::bigint, n.nspname, c.relname FROM pg_class c JOIN pg_namespace n "
        "ON n.oid = c.relnamespace "
        "WHERE c.oid = %(oid)s OR (n.nspname = %(schema)s AND c.relname = %(name)s) "
        "ORDER BY c.oid = %(oid)s DESC",
        {"oid": expected.oid, "schema": table.schema, "name": table.name},
    ):
        if oid != expected.oid:
            return ""  # another of its name: its own fate is told by `catalog_watch`
        if TableId(schema, name) != table:
            return f"{table} is called {schema}.{name} now, and is not in it"
        return f"{table} is no longer in it"
    return ""


def _columns(db: Connection, member: Member) -> str:
    if member.columns is None:
        return "all columns"
    rows = _rows(
        db,
        "SELECT attname FROM pg_attribute WHERE attrelid = %(oid)s AND attnum = ANY (%(numbers)s) "
        "ORDER BY attnum",
        {"oid": member.oid, "numbers": list(member.columns)},
    )
    return f"the columns {', '.join(row[0] for row in rows)}"


def _rows(db: Connection, query: str, values: dict[str, Any]) -> list[tuple[Any, ...]]:
    return db.execute(query.encode(), values).fetchall()


def _gap(config: SourceConfig, what: str) -> SourceGap:
    return SourceGap(
        f"Source {config.name}: {what}. Changes may have been left out meanwhile.",
        RESYNC.format(source=config.name),
    )
