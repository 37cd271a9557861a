"""What became of captured tables that the stream does not say, or says with the next row only.

The stream describes a table before its next row, by the names and types of its columns. So it tells neither
that a table was dropped, nor that a column was dropped and added again, nor that values at rest were
computed anew under the same type; and of constraints, and of a table that nobody writes to, it tells nothing.
The catalogs know: the oid of a table, the numbers of its columns, its constraints, and its file. They stand
in the note `catalog`, as they were before a table's copy and at every look since. Only catalogs are read,
without a lock.

What a table looks like now must take effect at its right place among the changes. So it is announced in
the stream itself, by a message of a transaction in which the table could not be altered: see `announce`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import psycopg

from headrace.change import TableId, TableSchema
from headrace.config import SourceConfig
from headrace.errors import UserError
from headrace.protocols import LogIndex
from headrace.sources.postgres.catalog import Connection, qualified
from headrace.sources.postgres.fingerprint import amend_own
from headrace.sources.postgres.publication import capturable_shapes

_NOTE = "catalog"
_ANNOUNCED = "announced"
_WORD = "shape "
_LOCK_WAIT = "100ms"
_LOCK_HELD = "2s"

_TABLES = """
SELECT c.oid::bigint, n.nspname, c.relname, c.relfilenode::bigint,
  coalesce((SELECT string_agg(i.indkey::text, ',' ORDER BY i.indexrelid) FROM pg_index i
    WHERE i.indrelid = c.oid AND (i.indisprimary OR i.indisreplident)), '') || c.relreplident::text,
  (SELECT jsonb_agg(jsonb_build_array(a.attnum,
      -- A name need not be text there, and nobody is to stumble over it who only compares.
      CASE current_setting('server_encoding') WHEN 'SQL_ASCII'
        THEN encode(convert_to(a.attname::text, 'SQL_ASCII'), 'escape') ELSE a.attname::text END,
      a.atttypid::bigint, a.atttypmod, a.xmin::text,
      a.atthasmissing) ORDER BY a.attnum)::text
   FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
  md5(concat_ws(';',
    (SELECT string_agg(a.attnum::text, ' ' ORDER BY a.attnum) FROM pg_attribute a
     WHERE a.attrelid = c.oid AND a.attnotnull AND NOT a.attisdropped),
    (SELECT string_agg(concat_ws(' ', k.contype::text, k.conname, k.conkey::text, p.relnamespace, p.relname,
        k.confkey::text, k.convalidated, md5(k.conbin::text)), ',' ORDER BY k.oid)
     FROM pg_constraint k LEFT JOIN pg_class p ON p.oid = k.confrelid
     WHERE k.conrelid = c.oid AND k.conparentid = 0),
    (SELECT string_agg(concat_ws(' ', p.relname, i.indkey::text, i.indisvalid, i.indpred IS NULL), ','
        ORDER BY p.relname)
     FROM pg_index i JOIN pg_class p ON p.oid = i.indexrelid WHERE i.indrelid = c.oid AND i.indisunique)))
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = ANY (%s::oid[])
   OR c.oid IN (SELECT to_regclass(name)::oid FROM unnest(%s::text[]) name)
"""


class _Column(NamedTuple):
    number: int
    name: str
    type: int
    modifier: int
    touched: str  # the transaction that wrote its row in the catalog last
    has_missing: bool


@dataclass(frozen=True, slots=True)
class _Table:
    oid: int
    file: int
    key: str
    described: str
    """Its columns as JSON: read only where it differs from what it was."""
    constraints: str = ""
    """A hash of what else the source keeps of its rows, '' where nobody has looked yet."""

    @property
    def columns(self) -> list[_Column]:
        return [_Column(*column) for column in json.loads(self.described)]

    def looks_like(self, other: _Table) -> bool:
        """Whether the stream would describe both alike, and the same is kept of their rows."""
        alike = (self.key, self.constraints) == (other.key, other.constraints)
        return alike and [c[1:4] for c in self.columns] == [c[1:4] for c in other.columns]


@dataclass(frozen=True, slots=True)
class CatalogChange:
    """What became of a captured table.

    - `gone`: it was dropped (there may be another of its name);
    - `moved`: it has the name `now`;
    - `altered`: the stream would describe it otherwise than before, or its constraints are others; or
      `reason` says why rows at rest may be others, though it looks as before.
    """

    kind: Literal["gone", "moved", "altered"]
    table: TableId
    now: TableId | None = None
    reason: str = ""
    found: _Table | None = None
    """What an altered one is now."""


def remember_catalog(db: Connection, log: LogIndex, tables: Sequence[TableId]) -> None:
    """Take note of what tables are that are about to be copied: from here on changes are told."""
    known = _known(log)
    found = _read(db, [], tables)
    _write(log, known | {table: known_now for table, known_now in found.items() if table in tables})


def catalog_changes(db: Connection, log: LogIndex, tables: Iterable[TableId]) -> list[CatalogChange]:
    """Return what became of captured tables since they were taken note of.

    One that is gone or moved is told at each look, as long as it is captured under its former name; one that
    is altered until `take_note`.
    """
    changes = list[CatalogChange]()
    captured = list(tables)
    known = {table: was for table, was in _known(log).items() if table in captured}
    found = _read(db, [was.oid for was in known.values()], captured)
    names = {now.oid: table for table, now in found.items()}
    noted = {table: now for table, now in found.items() if table in captured}
    for table, was in known.items():
        called = names.get(was.oid)
        if called is None:
            noted[table] = was
            changes.append(CatalogChange("gone", table))
        elif called != table:
            noted |= {table: was, called: found[called]}
            changes.append(CatalogChange("moved", table, now=called))
        elif (now := found[table]) != was:
            reason = _rewritten(was, now)
            if reason or not was.looks_like(now):
                noted[table] = was
                changes.append(CatalogChange("altered", table, reason=reason, found=now))
    _write(log, noted)
    return changes


def take_note(log: LogIndex, changes: Iterable[CatalogChange]) -> None:
    """Take note of what altered tables are now: from here on only what becomes of that is told."""
    found = {change.table: change.found for change in changes if change.found is not None}
    if found:
        _write(log, _known(log) | found)


def is_known(db: Connection, log: LogIndex, table: TableId, captured: Iterable[TableId]) -> bool:
    """Whether a table is a captured one that has just got this name."""
    (found,) = _read(db, [], [table]).values() or (None,)
    of = set(captured)
    return any(found is not None and was.oid == found.oid for name, was in _known(log).items() if name in of)


def announce(db: Connection, config: SourceConfig, log: LogIndex, table: TableId) -> bool:
    """Have the stream say what a table looks like, though none of its rows changed; False where that
    cannot be now: the application has it locked, or it cannot be captured so, is gone, or may not be read.

    Whoever alters a table waits for all who have read it in an open transaction, and for all who wrote its
    rows. So between the changes of the former shape and those of the next there is exactly one place where
    this transaction's message can stand. The shape itself is in the log: the message holds a word that
    nobody else can know, and no more.
    """
    try:
        amend_own(db, config, log, [table])
        with db.transaction():
            db.execute(f"SET LOCAL lock_timeout = '{_LOCK_WAIT}'".encode())
            # The lock is short also where our own disk is slow: the application's DDL would queue behind it.
            db.execute(f"SET LOCAL idle_in_transaction_session_timeout = '{_LOCK_HELD}'".encode())
            db.execute(f"SELECT FROM {qualified(table)} LIMIT 0".encode())
            (shape,) = capturable_shapes(db, config, [table])
            word = secrets.token_hex(8)
            known = json.loads(log.note(_ANNOUNCED) or "{}")
            announced = json.dumps(known | {str(table): [word, shape.to_json()]}, ensure_ascii=False)
            log.set_note(_ANNOUNCED, announced)
            db.execute("SELECT pg_logical_emit_message(true, 'headrace', %s)", [_WORD + word])
    except (
        UserError,
        psycopg.errors.LockNotAvailable,
        psycopg.errors.InternalError_,  # a relation went while the catalog was asked
        psycopg.errors.UndefinedTable,
        psycopg.errors.InsufficientPrivilege,
        KeyError,
    ):
        return False  # which a stream can do without: its next change, or the next look, says what is wrong
    except psycopg.errors.CharacterNotInRepertoire:
        pass  # no shape can have such a name, whenever it is tried
    return True


def announced_shape(log: LogIndex, prefix: str, content: str) -> TableSchema | None:
    """Return the shape that a message in the stream announces; None for any other message."""
    if prefix != "headrace" or not content.startswith(_WORD):
        return None
    announced: Mapping[str, tuple[str, str]] = json.loads(log.note(_ANNOUNCED) or "{}")
    word = content.removeprefix(_WORD)
    return next((TableSchema.from_json(text) for known, text in announced.values() if known == word), None)


def _rewritten(was: _Table, now: _Table) -> str:
    """Say why rows at rest may be others although the stream would describe the table as before, '' if not.

    VACUUM FULL and CLUSTER write a new file as well, but leave the columns' own rows in the catalog alone
    (but for those whose default they write out); ALTER COLUMN TYPE does not.
    """
    before = {column.name: column for column in was.columns}
    reasons = []
    for column in now.columns:
        old = before.get(column.name)
        if old is None or old[2:4] != column[2:4]:
            continue  # another description: the stream's own word
        if old.number != column.number:
            reasons.append(f"column {column.name} was dropped and added again")
        elif was.file != now.file and old.touched != column.touched and not old.has_missing:
            reasons.append(f"column {column.name} was computed anew")
    return "; ".join(reasons)


def _read(db: Connection, oids: list[int], tables: Sequence[TableId]) -> dict[TableId, _Table]:
    names = [qualified(table) for table in tables]
    rows = db.execute(_TABLES, [oids, names]).fetchall()
    return {
        TableId(schema, name): _Table(oid, file, key, described or "[]", constraints)
        for oid, schema, name, file, key, described, constraints in rows
    }


def _known(log: LogIndex) -> dict[TableId, _Table]:
    return {TableId(*table): _Table(*rest) for table, *rest in json.loads(log.note(_NOTE) or "[]")}


def _write(log: LogIndex, tables: Mapping[TableId, _Table]) -> None:
    rows = [(table, t.oid, t.file, t.key, t.described, t.constraints) for table, t in sorted(tables.items())]
    if (note := json.dumps(rows, ensure_ascii=False)) != log.note(_NOTE):
        log.set_note(_NOTE, note)
