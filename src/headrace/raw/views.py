"""Raw tables as views of a DuckDB session: what a source's table was at a place, and all of its changes.

The views read the Parquet files of the raw table, only those that hold offsets that are wanted and of these
only the columns and row groups that a query needs. The state of a table is what `headrace.transform.fold`
makes of its history: of each source key the last change by position, where a change of the key itself is
two, the old key's end and the new one's beginning; a copied row is as old as the snapshot that it was read
under, and contains every change through it.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

import duckdb
import pyarrow as pa

from headrace.change import Column, Copy, Offset, TableId, TableSchema
from headrace.errors import UserError
from headrace.keys import identity, key_before, key_of_row, literal, quoted
from headrace.pgtypes import duckdb_type, mirror_expression
from headrace.raw.place import Place
from headrace.sources.postgres.lsn import format_lsn
from headrace.staging.delta import DeltaStaging
from headrace.staging.naming import logical_name
from headrace.staging.rows import META
from headrace.staging.unchanged import fill_unchanged

_FILE = 1 << 28
"""More rows than a file has: an event's number is its file's place times this, and its row in it."""
_LATER = 1 << 62
"""More than any number of an event, and half of the room of a BIGINT."""
_NUMBERS = ("_epoch", "_commit", "_ordinal", "_offset", "_txid")
_SHOWN = ("_op", *_NUMBERS[:4], "_committed_at", "_txid")
_TYPES = {"_op": "VARCHAR", "_unchanged": "VARCHAR[]", "_before": "MAP(VARCHAR, VARCHAR)"}
_FILL_ROWS = 20_000
"""Rows with cells that the source did not send that are looked up at once."""

_numbers = count(1)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A table of a source at a place; of its changes only those behind the offset `after`."""

    source: str
    table: TableId
    place: Place
    after: Offset = 0


def relation(db: duckdb.DuckDBPyConnection, staging: DeltaStaging, wanted: Wanted, catalog: str) -> str:
    """Return the query that is a table in one of `headrace.raw.CATALOGS`.

    Makes temporary tables in `db` where cells that the source did not send have to be looked up. Raises
    UserError where the table was not known then, or its copy is of a later time.
    """
    shape = staging.schemas(wanted.place.shapes).get(wanted.table)
    if shape is None:
        raise UserError(
            f"Table {wanted.table} of {wanted.source} was not captured by then.",
            f"`headrace staging history {wanted.table.label}` says since when it is.",
        )
    if catalog.startswith("changes"):
        rows = _events(staging, wanted, wanted.after, wanted.place.through, _counts(wanted.place))
    else:
        rows = _state(db, staging, wanted, shape)
    typed = not catalog.endswith("_text")
    cells = _cells(staging, shape, typed=typed)
    meta = [f"make_timestamptz({name}) AS {name}" if name == "_committed_at" else name for name in _SHOWN]
    more = ["_unchanged", "_before"] if catalog.startswith("changes") else []
    return f"SELECT {', '.join([*cells, *meta, *more])} FROM ({rows})"


def _cells(staging: DeltaStaging, shape: TableSchema, *, typed: bool) -> list[str]:
    """Return the expressions of a table's columns.

    Of two names that differ in upper and lower case only, the second is as staging writes it.
    """
    shapes = [known for known in staging.shapes_of(shape.table) if known[1].version <= shape.version]
    names = _read_as(staging, shape)
    return [
        f"{_typed(c, names[c.name], shapes) if typed else quoted(names[c.name])} AS {quoted(names[c.name])}"
        for c in shape.columns
    ]


def _read_as(staging: DeltaStaging, shape: TableSchema) -> dict[str, str]:
    """Return the names under which `_events` has a table's columns."""
    physical = staging.tables()[shape.table].columns
    twins = _twins({name: logical_name(name) for name in physical})
    known = {logical_name(name): name if name in twins else logical_name(name) for name in physical}
    return {column.name: known[column.name] for column in shape.columns}


def _typed(column: Column, name: str, shapes: Sequence[tuple[Offset, TableSchema]]) -> str:
    """Return the expression that reads a column's text, called `name`, as its present type, null where it
    cannot be.

    What was written under another type is read as that one first: text is no hexadecimal because the column
    holds bytes by now.
    """
    target = duckdb_type(column)
    cell, before = "", ""
    for offset, shape in shapes:
        then = next((known for known in shape.columns if known.name == column.name), column)
        own = f"TRY({mirror_expression(replace(then, name=name))})"
        if duckdb_type(then) != target:
            own = f"TRY_CAST({own} AS {target})"
        if own != before:
            cell = f"CASE WHEN _offset < {offset} THEN {cell} ELSE {own} END" if cell else own
            before = own
    return cell


def _events(staging: DeltaStaging, wanted: Wanted, after: Offset, through: Offset, condition: str) -> str:
    """Return the query of a table's staged rows in `(after, through]` under their logical names.

    `_hr_n` numbers them in the order of the log, which is that of the source for what was streamed.
    """
    raw = staging.tables()[wanted.table]
    names = {name: logical_name(name) for name in raw.columns}
    types = {name: _TYPES.get(name, "BIGINT") if name in META else "VARCHAR" for name in names}
    empty = ", ".join(f"NULL::{types[name]} AS {quoted(name)}" for name in names)
    whole = f"SELECT {empty}, NULL::BIGINT AS _hr_n WHERE false"  # a column may be in no file yet
    if files := raw.overlapping(after, through):
        paths = ", ".join(literal(glob.escape(str(raw.path / file.name))) for file in files)
        number = f"file_index::BIGINT * {_FILE} + file_row_number AS _hr_n"
        whole += f" UNION ALL BY NAME SELECT *, {number} FROM read_parquet([{paths}], union_by_name = true)"
    # Names that differ in case only are one to the engine: the second keeps its name in the file.
    twins = _twins(names)
    cells = ", ".join(
        quoted(name) if name in twins else f"{quoted(name)} AS {quoted(names[name])}" for name in names
    )
    inside = f"_offset > {after} AND _offset <= {through} AND ({condition})"
    return f"SELECT {cells}, _hr_n FROM ({whole}) WHERE {inside}"


def _counts(place: Place) -> str:
    """Return the condition of the transactions that count at a place."""
    if place.before is None:
        return "true"
    epoch, commit = place.before
    return f"_epoch < {epoch} OR (_epoch = {epoch} AND _commit < {commit})"


def copy_at(staging: DeltaStaging, wanted: Wanted) -> Copy:
    """Return the newest copy of a table that was whole at a place.

    One that was completed later counts, if all of it was read before. Raises UserError where there is none.
    """
    place = wanted.place
    copy = staging.copy(wanted.table, place.through if place.before is None else staging.through())
    earliest = copy
    while copy is not None and not place.holds(copy.ceiling):
        earliest, copy = copy, staging.copy(wanted.table, copy.end - 1)
    if copy is None:
        first = (
            f"The first one shows it as of {format_lsn(earliest.ceiling.commit)}, offset {earliest.end}."
            if earliest
            else "`headrace tables list` says how far it is."
        )
        raise UserError(f"There was no whole copy of {wanted.table} of {wanted.source} by then.", first)
    return copy


def _state(db: duckdb.DuckDBPyConnection, staging: DeltaStaging, wanted: Wanted, shape: TableSchema) -> str:
    """Return the query of the rows that a table had."""
    copy, place = copy_at(staging, wanted), wanted.place
    floor = copy.floor
    streamed = (
        f"_op <> 'r' AND _offset > {copy.after} AND _offset <= {place.through} AND ({_counts(place)}) AND "
        f"(_epoch > {floor.epoch} OR (_epoch = {floor.epoch} AND _commit > {floor.commit}))"
    )
    copied = f"_op = 'r' AND _offset > {copy.begin} AND _offset < {copy.end}"
    last = max(copy.end, place.through)
    events = _events(staging, wanted, min(copy.begin, copy.after), last, f"({copied}) OR ({streamed})")
    # Everything before a truncate is over.
    events = (
        f"WITH whole AS NOT MATERIALIZED (SELECT *, {_order(copy)} AS _hr_p FROM ({events})), "
        "over AS (SELECT max(_hr_p) AS p FROM whole WHERE _op = 't') "
        "SELECT whole.* FROM whole, over WHERE _op <> 't' AND (p IS NULL OR _hr_p > p)"
    )
    if not shape.key:
        return _multiset(events, shape, _read_as(staging, shape))
    rows = _last_of_keys(events, shape.key)
    lacking = f"SELECT DISTINCT unnest(_unchanged) FROM ({events})"  # no name of a column that is gone by now
    names = {name for (name,) in db.execute(lacking).fetchall()} & {c.name for c in shape.columns}
    return _filled(db, staging, wanted, shape.key, sorted(names), last, rows) if names else rows


def _order(copy: Copy) -> str:
    """Return the number by which events follow one another at the source.

    Streamed ones do as they stand in the log, behind the copy, unless it has several snapshots: then up to
    the last of them commits decide, and a copied row contains the changes of its own.
    """
    copied = f"CASE WHEN _op = 'r' THEN 0 ELSE {_LATER} END"
    if copy.floor == copy.ceiling:
        return f"{copied} + _hr_n"
    commit = f"CASE WHEN _epoch > {copy.floor.epoch} THEN {_LATER} ELSE _commit END"
    return f"(({commit})::HUGEINT << 64) + CASE WHEN _op = 'r' THEN {_LATER} ELSE 0 END + _hr_n"


def _last_of_keys(events: str, key: Sequence[str]) -> str:
    own, before = key_of_row(key), key_before(key)
    return (
        f"WITH events AS NOT MATERIALIZED ({events}), points AS ("
        f"SELECT {own} AS k, _hr_p AS p, _op = 'd' AS gone FROM events UNION ALL "
        f"SELECT {before}, _hr_p, true FROM events WHERE _op <> 'd' AND _before IS NOT NULL "
        f"AND {before} IS DISTINCT FROM {own}), "
        "lasts AS (SELECT max(p) AS p FROM points GROUP BY k HAVING NOT arg_max(gone, p)) "
        "SELECT events.* FROM events SEMI JOIN lasts ON events._hr_p = lasts.p"
    )


def _multiset(events: str, shape: TableSchema, names: Mapping[str, str]) -> str:
    """Return the rows of a table without a key: each content as often as it came and did not go. A row that
    goes is the newest of its kind."""
    columns = tuple(replace(column, name=names[column.name]) for column in shape.columns)
    (own, _), (_, before) = identity(replace(shape, columns=columns)), identity(shape)
    return (
        f"WITH events AS NOT MATERIALIZED (SELECT *, {own} AS _hr_k FROM ({events})), "
        "left_over AS (SELECT k, sum(step) AS n FROM ("
        "SELECT _hr_k AS k, CASE WHEN _op = 'd' THEN -1 ELSE 1 END AS step FROM events UNION ALL "
        f"SELECT {before}, -1 FROM events WHERE _op = 'u') GROUP BY k) "
        "SELECT events.* FROM events JOIN left_over ON _hr_k = k WHERE _op <> 'd' "
        "QUALIFY row_number() OVER (PARTITION BY _hr_k ORDER BY _hr_p) <= n"
    )


def _filled(
    db: duckdb.DuckDBPyConnection,
    staging: DeltaStaging,
    wanted: Wanted,
    key: Sequence[str],
    names: Sequence[str],
    newest: Offset,
    rows: str,
) -> str:
    """Return a query of rows in which cells of some columns that the source did not send have their values
    from earlier changes, which are looked up here, some rows at a time."""
    lacking = f"SELECT * FROM ({rows}) WHERE _unchanged IS NOT NULL"
    table = f"memory.main._hr_filled_{next(_numbers)}"
    columns = list(dict.fromkeys([*key, *names, *META, "_hr_n"]))
    chosen, kept = (", ".join(map(quoted, some)) for some in (columns, [*names, "_hr_n"]))
    db.execute(f"CREATE TABLE {table} AS SELECT {kept} FROM ({rows}) LIMIT 0")
    with db.cursor() as other:
        other.execute("SET TimeZone = 'UTC'")
        for batch in other.sql(f"SELECT {chosen} FROM ({lacking})").to_arrow_reader(_FILL_ROWS):
            part = pa.Table.from_batches([batch])
            places = part["_hr_n"]
            filled = fill_unchanged(staging, wanted.table, key, part.drop_columns(["_hr_n"]), newest=newest)
            _hr_part = filled.append_column("_hr_n", places)
            db.execute(f"INSERT INTO {table} BY NAME SELECT {kept} FROM _hr_part")
    found = ", ".join(
        f"CASE WHEN f._hr_n IS NULL THEN s.{quoted(name)} ELSE f.{quoted(name)} END AS {quoted(name)}"
        for name in names
    )
    return f"SELECT s.* REPLACE ({found}) FROM ({rows}) s LEFT JOIN {table} f ON s._hr_n = f._hr_n"


def _twins(names: dict[str, str]) -> set[str]:
    """Return the columns whose names at the source differ from an earlier one's in case only."""
    taken, twins = set[str](), set[str]()
    for name, logical in names.items():
        if logical.casefold() in taken:
            twins.add(name)
        taken.add(logical.casefold())
    return twins
