"""Compare a source, a log and a warehouse without a line of Headrace: its own proof, twice made.

    independent_check.py --source-url URL --warehouse FILE.duckdb --log FILE.db [--model NAME=SQL_FILE ...]

Run it beside no running pipeline and a source at rest. It opens both files read-only and compares:

- log: hash chain, dense offsets, whole groups, and the place in it that the warehouse remembers; the chain
  begins behind what retention has deleted, and the log's segments are read from the folder beside it;
- mirrors: every table of the publication, row by row and column by column;
- models: the model's own SQL over the source's rows as text; rows that fail are those in quarantine;
- ledger: each row closes and reads what the log holds in its span, and all add up; of spans that begin
  before the log does, only how many there are is told.

Exit code 0 when all agree, 1 when something differs; a warehouse that is behind its source differs.
"""

from __future__ import annotations

import argparse
import json
import re
import sqlite3
import struct
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from decimal import Decimal
from heapq import merge
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import duckdb
import psycopg
from blake3 import blake3
from psycopg.conninfo import conninfo_to_dict, make_conninfo

Duck = duckdb.DuckDBPyConnection
Postgres = psycopg.Connection[Any]

OPEN = "status IN ('quarantined', 'waiting', 'blocked')"
SHOWN = 5
SETTINGS = (
    "-c TimeZone=UTC -c DateStyle=ISO,YMD -c IntervalStyle=postgres -c extra_float_digits=1 "
    "-c bytea_output=hex -c lc_monetary=C -c search_path=pg_catalog -c xmloption=content"
)
HEADER = (
    "offset", "kind", "table_schema", "table_name", "first_epoch", "first_commit", "first_ordinal",
    "last_epoch", "last_commit", "last_ordinal", "min_txid", "max_txid", "committed_at",
    "latest_at", "rows", "schema_version", "appended_at", "ends_group",
)  # fmt: skip


@dataclass
class Work:
    """Both sides, the source's name in the project, and how much was wrong so far."""

    source: str
    db: Postgres
    warehouse: Duck
    wrong: int = 0

    def ask(self, query: str, *values: object) -> list[Any]:
        return self.warehouse.execute(query, values).fetchall()

    def say(self, ok: bool, what: str, detail: str) -> None:
        self.wrong += not ok
        print(f"{'ok   ' if ok else 'WRONG'} {what}: {detail}")


@dataclass
class Log:
    """What the log holds, by its own account, behind the offset `begin`."""

    begin: int = 0
    end: int = 0
    hashes: dict[int, str] = field(default_factory=dict)
    rows: dict[tuple[str, bool], list[tuple[int, int]]] = field(default_factory=dict)
    """(offset, row changes) of every entry, by table label and whether a copy read them."""

    def remember(self, header: tuple[Any, ...]) -> None:
        offset, kind, schema, table = header[:4]
        if table is not None and kind in {"rows", "truncate", "copy"}:
            mine = self.rows.setdefault((label_of(schema, table), kind == "copy"), [])
            mine.append((offset, header[HEADER.index("rows")]))

    def count(self, table: str, after: int, through: int, *, copied: bool) -> int:
        return sum(rows for offset, rows in self.rows.get((table, copied), ()) if after < offset <= through)


@dataclass(frozen=True)
class Table:
    """A source table: how a project calls it, its name in SQL, its columns and its key."""

    label: str
    sql: str
    columns: dict[str, str]
    key: tuple[str, ...]


def main() -> int:
    asked = arguments()
    models = [Model.read(*pair.split("=", 1)) for pair in asked.model]
    source = asked.log.stem
    settings = {**conninfo_to_dict(asked.source_url), "options": SETTINGS}
    with (
        psycopg.connect(make_conninfo(**settings)) as db,
        duckdb.connect(str(asked.warehouse), read_only=True) as warehouse,
    ):
        warehouse.execute("SET TimeZone = 'UTC'")
        work = Work(source, db, warehouse)
        log = walk_log(asked.log, work)
        compare_end(work, log)
        compare_ledger(work, log, {model.name: model.table for model in models})
        tables = list(published(db, asked.publication or f"headrace_{source}"))
        work.say(bool(tables), "publication", f"{len(tables)} tables")
        for table in tables:
            mine = [model for model in models if model.table == table.label]
            for model in mine:
                compare_model(work, table, model)
            if not mine:
                compare_mirror(work, table)
    print(f"{work.wrong} things differ" if work.wrong else "all agrees")
    return 1 if work.wrong else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--source-url", required=True)
    parser.add_argument("--warehouse", required=True, type=Path)
    parser.add_argument("--log", required=True, type=Path, help="its name is the source's name: shop.db")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=SQL_FILE")
    parser.add_argument("--publication", help="headrace_<source> without")
    return parser.parse_args()


QUOTED = ", ".join(f'"{name}"' for name in HEADER)
ENTRIES = (
    f"SELECT {QUOTED}, previous, hash, bytes, segment, start, payload, filter "
    'FROM entries LEFT JOIN filters USING ("offset") ORDER BY "offset"'
)


def walk_log(path: Path, work: Work) -> Log:
    """Walk the chain: BLAKE3 over the hash before, the header as compact JSON, filter and payload."""
    log, faults, payloads = Log(), list[str](), Payloads(path.with_suffix(".segments"))
    ended, previous = 1, bytes(32)
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        try:
            for log.begin, previous in db.execute('SELECT "offset", hash FROM stops ORDER BY "offset"'):
                log.hashes[log.begin] = previous.hex()
            log.end = log.begin
            for row in db.execute(ENTRIES):
                header, (before, digest, size, *place, key_filter) = row[: len(HEADER)], row[len(HEADER) :]
                offset, is_kept = header[0], header[0] <= log.begin
                if not is_kept and offset != log.end + 1:
                    faults.append(f"offset {log.end + 1} is missing")
                if not is_kept and before != previous:
                    faults.append(f"offset {offset} does not follow the one before")
                told = json.dumps(
                    [path.stem, *header, len(key_filter or b"")], separators=(",", ":"), ensure_ascii=False
                )
                body = before + told.encode() + (key_filter or b"") + payloads.read(size, *place)
                if blake3(body).digest() != digest:
                    faults.append(f"the hash of offset {offset} does not hold")
                log.hashes[offset] = digest.hex()
                if not is_kept:  # the shapes and markers that retention has kept stand by themselves
                    log.remember(header)
                    log.end, previous, ended = offset, digest, header[-1]
        except (sqlite3.Error, OSError, TypeError, ValueError) as error:
            faults.append(f"unreadable after offset {log.end}: {error}")
    if not ended:
        faults.append("the last group has no end")
    span = f"the chain holds from offset {log.begin + 1} to {log.end}"
    work.say(not faults, "log", "; ".join(faults[:SHOWN]) or span)
    return log


class Payloads:
    """Where the bytes of entries are: in the database, or in a segment, one file open at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.segment: int | None = None
        self.content = b""

    def read(self, size: int, segment: int | None, start: int, payload: bytes | None) -> bytes:
        if segment is None:
            return payload or b""
        if segment != self.segment:
            self.content = (self.folder / f"{segment:020d}.segment").read_bytes()
            self.segment = segment
        return self.content[start : start + size]


def compare_end(work: Work, log: Log) -> None:
    """Compare the place that the warehouse remembers with the log."""
    rows = work.ask('SELECT "offset", hash FROM headrace.progress WHERE source = ?', work.source)
    same = len(rows) == 1 and log.hashes.get(rows[0][0]) == rows[0][1]
    detail = f"stands at offset {[row[0] for row in rows]} of {log.end}"
    work.say(same, "progress", detail if same else f"{detail}, which has another hash there")


def compare_ledger(work: Work, log: Log, tables: dict[str, str]) -> None:
    """Compare each model's ledger with the log and with its open records; `tables` by model."""
    query = 'SELECT model, "offset", open_records FROM headrace.models WHERE source = ?'
    for model, offset, said in work.ask(query, work.source):
        rows = work.ask(
            'SELECT kind, "after", "through", read, applied + superseded + filtered + quarantined + waiting '
            "+ blocked, quarantined FROM headrace.ledger WHERE source = ? AND model = ? AND kind <> 'void' "
            'ORDER BY "after", "through"', work.source, model,
        )  # fmt: skip
        table = tables.get(model, model.removeprefix(f"{work.source}."))
        faults = ledger_faults(rows, log, table, offset)
        records = f"SELECT count(*) FROM headrace.quarantine WHERE source = ? AND model = ? AND {OPEN}"
        opened, quarantined = work.ask(records, work.source, model)[0][0], sum(row[5] for row in rows)
        if not quarantined == opened == said:
            faults.append(f"{quarantined} quarantined, {opened} open records, {said} said")
        total = sum(row[3] for row in rows)
        detail = "; ".join(faults[:SHOWN]) or f"{len(rows)} rows close over {total} changes, {opened} open"
        if early := sum(row[1] < log.begin for row in rows):
            detail += f"; {early} begin before the log does and are not compared with it"
        work.say(not faults, f"ledger of {model}", detail)


def ledger_faults(rows: list[Any], log: Log, table: str, offset: int) -> list[str]:
    faults = [f"the row of {row[1]}..{row[2]} does not close" for row in rows if row[3] != row[4]]
    for kind in ("copy", "apply"):
        reached = 0
        mine = [row for row in rows if row[0] == kind]
        for _, after, through, read, *_ in mine:
            if after < reached or through > offset:
                faults.append(f"the span {after}..{through} overlaps another, or ends after {offset}")
            held = log.count(table, after, through, copied=kind == "copy")
            if after >= log.begin and read != held:
                faults.append(f"{read} read in {after}..{through}, the log holds {held}")
            reached = through
        # Behind where a model began to read, nothing may be left out: as far as the log tells it.
        compared = [row for row in mine if row[1] >= log.begin]
        early = [row[2] for row in mine if row[1] < log.begin]
        since = max(early, default=min((row[1] for row in mine), default=0))
        total, held = sum(row[3] for row in compared), log.count(table, since, offset, copied=kind == "copy")
        if total != held:
            faults.append(f"{kind}: read {total} in all, the log holds {held} from {since} on")
    return faults


PUBLISHED = """
SELECT n.nspname, c.relname, c.relkind, array_agg(a.attname::text ORDER BY a.attnum),
  array_agg(format_type(a.atttypid, a.atttypmod) ORDER BY a.attnum),
  array_agg(a.attname::text ORDER BY a.attnum) FILTER (WHERE a.attnum = ANY (i.indkey))
FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid JOIN pg_class c ON c.oid = r.prrelid
JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid
JOIN pg_index i ON i.indrelid = c.oid
  AND CASE WHEN c.relreplident = 'i' THEN i.indisreplident ELSE i.indisprimary END
WHERE p.pubname = %s AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
GROUP BY 1, 2, 3 ORDER BY 1, 2
"""


def published(db: Postgres, publication: str) -> Iterator[Table]:
    for schema, name, kind, columns, types, key in db.execute(PUBLISHED, [publication]).fetchall():
        sql = f"{'' if kind in ('p', b'p') else 'ONLY '}{quoted(schema)}.{quoted(name)}"
        yield Table(label_of(schema, name), sql, dict(zip(columns, types, strict=True)), tuple(key))


def text_of(cell: str) -> str:
    """What the type's output function says; `IS DISTINCT FROM`, for a row of nulls IS NULL."""
    return f"CASE WHEN {cell} IS DISTINCT FROM NULL THEN format('%s', {cell}) END"


def compare_mirror(work: Work, table: Table) -> None:
    what = f"mirror {work.source}.{table.label}"
    types = columns_of(work, work.source, table.label)
    missing = [name for name in table.columns if name not in types]
    if missing:
        work.say(False, what, f"has no column {', '.join(missing)}" if types else "is missing")
        return
    opened = open_keys(work, f"{work.source}.{table.label}")
    rows, faults, examples = 0, Counter[str](), dict[str, str]()
    for key, wanted, found in paired(source_rows(work, table, types), found_rows(work, table, types)):
        name = key[0] if len(table.key) == 1 else compact(list(key))
        if name in opened:
            continue
        rows += len(wanted)
        for fault in row_faults(types, table, wanted, found):
            faults[fault] += 1
            examples.setdefault(fault, name)
    detail = f"{rows} rows, {len(table.columns)} columns agree; {len(opened)} keys in quarantine left out"
    listed = "; ".join(f"{fault} {n} times, such as {examples[fault]}" for fault, n in faults.items())
    work.say(not faults, what, listed or detail)


def row_faults(types: dict[str, str], table: Table, wanted: list[Any], found: list[Any]) -> list[str]:
    """Compare the rows of one key on both sides."""
    if len(wanted) != 1 or len(found) != 1:
        return ["missing" if not found else "extra" if not wanted else "doubled"]
    return [
        f"{name} differs"
        for name, left, right in zip(table.columns, wanted[0], found[0], strict=True)
        if left != right and settle(types[name], left) != settle(types[name], right)
    ]


def source_rows(work: Work, table: Table, types: dict[str, str]) -> Iterator[Any]:
    """Yield (key, cells) ordered by the keys' bytes."""
    keys = [text_of(quoted(name)) for name in table.key]
    cells = [source_cell(quoted(name), type_, types[name]) for name, type_ in table.columns.items()]
    order = ", ".join(f'({key}) COLLATE "C"' for key in keys)
    with work.db.cursor(name="rows") as cursor:
        cursor.itersize = 5_000
        cursor.execute(f"SELECT {', '.join(keys + cells)} FROM {table.sql} ORDER BY {order}".encode())
        for row in cursor:
            yield row[: len(keys)], row[len(keys) :]


def found_rows(work: Work, table: Table, types: dict[str, str]) -> Iterator[Any]:
    parts = range(len(table.key))
    key = [f"(_source_key::JSON ->> {i})" for i in parts] if len(parts) > 1 else ["_source_key"]
    cells = [found_cell(quoted(name), types[name]) for name in table.columns]
    cursor = work.warehouse.cursor()
    cursor.execute("SET TimeZone = 'UTC'")
    target = f"{quoted(work.source)}.{quoted(table.label)}"
    cursor.execute(f"SELECT {', '.join(key + cells)} FROM {target} ORDER BY {', '.join(key)}")
    while rows := cursor.fetchmany(5_000):
        for row in rows:
            yield row[: len(key)], row[len(key) :]


def paired(left: Iterator[Any], right: Iterator[Any]) -> Iterator[tuple[Any, list[Any], list[Any]]]:
    """Yield each key with its rows on both sides, which are ordered by key."""
    both = merge(((*row, 0) for row in left), ((*row, 1) for row in right), key=itemgetter(0))
    for key, group in groupby(both, key=itemgetter(0)):
        rows = list(group)
        yield key, *([cells for _, cells, its in rows if its == side] for side in (0, 1))


EPOCH = "(extract(epoch FROM {c}) * 1000000)::bigint::text"
SOURCE_CELLS = {
    "boolean": "CASE WHEN {c} THEN 't' WHEN NOT {c} THEN 'f' END",
    "bytea": "encode({c}, 'hex')",
    "date": "CASE WHEN isfinite({c}) THEN ({c} - date '1970-01-01')::text ELSE {c}::text END",
    "timestamp": f"CASE WHEN isfinite({{c}}) THEN {EPOCH} ELSE {{c}}::text END",
    "time": EPOCH,
}
FOUND_CELLS = {
    "BOOLEAN": SOURCE_CELLS["boolean"],
    "BLOB": "lower(hex({c}))",
    "DATE": "if(isfinite({c}), datediff('day', DATE '1970-01-01', {c})::VARCHAR, {c}::VARCHAR)",
    "TIMESTAMP": "if(isfinite({c}), epoch_us({c})::VARCHAR, {c}::VARCHAR)",
    "TIME": "epoch_us({c})::VARCHAR",
}


def source_cell(cell: str, type_: str, target: str) -> str:
    """The canonical text of a Postgres value, given the type that the warehouse holds it in."""
    if target == "VARCHAR":
        return text_of(cell)
    if type_.endswith("[]"):
        element = source_cell("e", type_[:-2], target[:-2])
        return (
            f"CASE WHEN {cell} IS NOT NULL THEN (SELECT coalesce(json_agg({element} ORDER BY n), '[]')::text "
            f"FROM unnest({cell}) WITH ORDINALITY u(e, n)) END"
        )
    template = SOURCE_CELLS.get(re.split(r"[( ]", type_)[0])
    return template.format(c=cell) if template else text_of(cell)


def found_cell(cell: str, type_: str) -> str:
    """The canonical text of a DuckDB value."""
    if type_.endswith("[]"):
        return f"to_json(list_transform({cell}, lambda e: {found_cell('e', type_[:-2])}))::VARCHAR"
    return FOUND_CELLS.get(type_.partition(" ")[0], "{c}::VARCHAR").format(c=cell)


NUMBERS = dict.fromkeys(("parse_float", "parse_int", "parse_constant"), lambda text: ("number", text))
SETTLE: dict[str, Any] = {
    "JSON": lambda text: json.loads(text, object_pairs_hook=tuple, **NUMBERS),
    "FLOAT": lambda text: struct.pack("f", float(text)),
    "DOUBLE": lambda text: repr(float(text)),
    "DECIMAL": lambda text: str(Decimal(text)),
}


def settle(target: str, text: str | None) -> object:
    """A comparable value of a canonical text, where two texts may mean the same."""
    if text is None:
        return None
    if target.endswith("[]"):
        return [settle(target[:-2], part) for part in json.loads(text)]
    return SETTLE.get(target.partition("(")[0], str)(text)


def columns_of(work: Work, schema: str, table: str) -> dict[str, str]:
    query = (
        "SELECT column_name, data_type FROM information_schema.columns WHERE table_schema = ? "
        "AND table_name = ? AND column_name NOT IN ('_source', '_source_key') ORDER BY ordinal_position"
    )
    return dict(work.ask(query, schema, table))


def open_keys(work: Work, model: str) -> set[str]:
    query = f"SELECT DISTINCT key FROM headrace.quarantine WHERE source = ? AND model = ? AND {OPEN}"
    return {canonical_key(row[0]) for row in work.ask(query, work.source, model)}


def canonical_key(key: str) -> str:
    """A composite key is a JSON list of strings; spelled the same on both sides."""
    try:
        parts = json.loads(key)
    except ValueError:
        return key
    return compact(parts) if isinstance(parts, list) and all(isinstance(p, str) for p in parts) else key


@dataclass(frozen=True)
class Model:
    """A model file: its SELECT, and what its header demands of the outputs."""

    name: str
    table: str
    select: str
    key: tuple[str, ...]
    contract: dict[str, str]

    @classmethod
    def read(cls, name: str, path: str) -> Model:
        text = Path(path).read_text()
        header = re.match(r"\s*/\*\s*headrace\b(.*?)\*/", text, re.DOTALL)
        rules = tomllib.loads(header[1]) if header else {}
        body = re.sub(r"/\*.*?\*/", "", text[header.end() :] if header else text, flags=re.DOTALL)
        body = re.sub(r"^\s*--.*$", "", body, flags=re.MULTILINE).strip().rstrip(";")
        found = re.search(r'\bFROM\s+raw\.\w+\.(?:"([^"]+)"|(\w+))', body, re.IGNORECASE)
        assert found, f"{path} does not read raw.<source>.<table>"
        return cls(name, found[1] or found[2], body, tuple(rules.get("key", ())), rules.get("contract", {}))

    def query(self, columns: list[str]) -> str:
        """The SELECT with each row's source key, its outputs in their contract's types, and whether
        one of its rules is violated."""
        keyed = re.sub(r"^\s*SELECT\b", "SELECT _row_key, _row,", self.select, count=1, flags=re.IGNORECASE)
        casts, rules = [], [f"{quoted(name)} IS NULL" for name in self.key]
        for name in columns:
            cell, rule = quoted(name), self.contract.get(name, "")
            type_ = re.split(r"\bNOT\s+NULL\b|\bCHECK\b", rule, flags=re.IGNORECASE)[0].strip()
            casts.append(f"CAST({cell} AS {type_}) AS {cell}" if type_ else cell)
            rules += [f"{cell} IS NULL" for _ in re.findall(r"\bNOT\s+NULL\b", rule, re.IGNORECASE)]
            checks = re.findall(r"\bCHECK\s*(\(.*\))", rule, re.IGNORECASE | re.DOTALL)
            rules += [f"NOT coalesce({check}, true)" for check in checks]
        made = f"SELECT _row_key, _row, {', '.join(casts)} FROM ({keyed})"
        return f"SELECT *, {' OR '.join(rules) or 'false'} AS _violated FROM ({made})"


def compare_model(work: Work, table: Table, model: Model) -> None:
    what = f"model {model.name}"
    schema, name = (["main", *model.name.split(".", 1)])[-2:]
    columns = columns_of(work, schema, name)
    if not columns:
        work.say(False, what, "is missing")
        return
    names = list(columns)
    with duckdb.connect() as lab, tempfile.TemporaryDirectory() as folder:
        load_as_text(work, lab, table, Path(folder) / "rows.csv")
        failed = run_model(lab, model.query(names), columns)
        opened = open_keys(work, model.name)
        same = failed == opened
        sample = ", ".join(sorted(failed ^ opened)[:SHOWN])
        detail = f"{len(failed)} rows fail" + ("" if same else f", {len(opened)} are in quarantine: {sample}")
        work.say(same, f"quarantine of {model.name}", detail)
        target = f"{quoted(schema)}.{quoted(name)}"
        listed = ", ".join(f"{quoted(c)}::VARCHAR" for c in names)
        wanted = lab.execute(f"SELECT _row_key, {listed} FROM made ORDER BY 1").fetchall()
        found = work.ask(f"SELECT _source_key, {listed} FROM {target} ORDER BY 1")
    left, right = (
        sorted((row for row in rows if canonical_key(row[0]) not in opened | failed), key=repr)
        for rows in (wanted, found)
    )
    detail = f"{len(left)} rows, {len(names)} columns agree"
    if left != right:
        keys = ", ".join(sorted({row[0] for row in set(left) ^ set(right)})[:SHOWN]) or "doubled"
        detail = f"{len(left)} rows wanted, {len(right)} found; differing keys: {keys}"
    work.say(left == right, what, detail)


def load_as_text(work: Work, lab: Duck, table: Table, file: Path) -> None:
    """Make the source's rows a table of text, and `raw.<source>.<table>` a window on it."""
    cells = ", ".join(text_of(quoted(name)) for name in table.columns)
    with file.open("wb") as out, work.db.cursor().copy(
        f"COPY (SELECT {cells} FROM {table.sql}) TO STDOUT (FORMAT csv, FORCE_QUOTE *)".encode()
    ) as copy:  # fmt: skip
        for data in copy:
            out.write(data)
    cells = ", ".join(f"{quoted(name)} VARCHAR" for name in table.columns)
    key = [quoted(name) for name in table.key]
    row_key = key[0] if len(key) == 1 else f"to_json([{', '.join(key)}])::VARCHAR"
    lab.execute(
        f"""SET TimeZone = 'UTC'; ATTACH ':memory:' AS raw; CREATE SCHEMA raw.{quoted(work.source)};
        CREATE TABLE loaded ({cells}); SET VARIABLE first = 0; SET VARIABLE past = 0;
        COPY loaded FROM '{file}' (FORMAT csv, HEADER false, ALLOW_QUOTED_NULLS false, NULLSTR '', QUOTE '"',
          ESCAPE '"', PARALLEL false, MAX_LINE_SIZE 67108864, AUTO_DETECT false, DELIM ',');
        CREATE TABLE raw.main.rows AS
          SELECT *, {row_key} AS _row_key, row_number() OVER () - 1 AS _row FROM loaded;
        CREATE VIEW raw.{quoted(work.source)}.{quoted(table.label)} AS SELECT * FROM raw.main.rows
          WHERE _row >= getvariable('first') AND _row < getvariable('past')"""
    )


def run_model(lab: Duck, query: str, columns: dict[str, str]) -> set[str]:
    """Fill `made` with what the model makes of the rows that it can take; returns the others' keys,
    which are found by halving."""
    types = ", ".join(f"{quoted(name)} {type_}" for name, type_ in columns.items())
    lab.execute(f"CREATE TABLE made (_row_key VARCHAR, _row BIGINT, {types}, _violated BOOLEAN)")
    (total,) = lab.execute("SELECT count(*) FROM raw.main.rows").fetchall()[0]
    failed: set[int] = set()
    spans = [(0, int(total))]
    while spans:
        first, past = spans.pop()
        try:
            lab.execute(f"SET VARIABLE first = {first}; SET VARIABLE past = {past}")
            lab.execute(f"INSERT INTO made {query}")
        except duckdb.Error:
            middle = (first + past) // 2
            spans += [(first, middle), (middle, past)] if middle > first else []
            failed |= {first} if middle == first else set()
    failed |= {row[0] for row in lab.execute("DELETE FROM made WHERE _violated RETURNING _row").fetchall()}
    listed = ", ".join(map(str, failed)) or "-1"
    keys = lab.execute(f"SELECT _row_key FROM raw.main.rows WHERE _row IN ({listed})").fetchall()
    return {canonical_key(row[0]) for row in keys}


def label_of(schema: str, table: str) -> str:
    return table if schema == "public" else f"{schema}.{table}"


def compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


if __name__ == "__main__":
    sys.exit(main())
