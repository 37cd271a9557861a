"""Row models: SQL files, and the mirrors that stand in where a table has none."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import duckdb
import pyarrow as pa

from headrace.change import Counts, TableId, TableSchema
from headrace.decisions import Decisions
from headrace.defaults import NO_DEFAULTS, Constraints, ModelDefaults
from headrace.errors import HeadraceError, ModelBroken, ModelError, Verdict, verdict_of
from headrace.keys import quoted
from headrace.masking import NOTHING, Masked
from headrace.parts import BESIDE
from headrace.pgtypes import canonical, cast_keeps_apart, duckdb_type, is_whole, mirror_expression
from headrace.prepared import Contested, Prepared, Reference, Refused, UniqueKey
from headrace.scrub import scrub
from headrace.transform.attempts import Attempts
from headrace.transform.casts import reads_column
from headrace.transform.contested import alone, uncontested
from headrace.transform.engine import engine
from headrace.transform.evaluate import Evaluation
from headrace.transform.fold import fold
from headrace.transform.handling import NO_SAY, Handling
from headrace.transform.kind import LATEST, Kind, refuse_without_key
from headrace.transform.multiset import fold_multiset
from headrace.transform.nulling import NULLED
from headrace.transform.python.evaluate import PythonEvaluation, PythonRows
from headrace.transform.python.function import KEPT
from headrace.transform.python.inputs import META
from headrace.transform.python.process import Worker
from headrace.transform.python.text import PythonText
from headrace.transform.soft import fold_soft
from headrace.transform.source_constraints import SourceKey, take_over
from headrace.transform.sql import Check, ModelText
from headrace.transform.stepping import settle, step

_WHOLE = {"SMALLINT", "INTEGER", "BIGINT", "HUGEINT"}


@dataclass(frozen=True, slots=True)
class RowModel:
    """One destination table made of one raw table, row by row. Made by `bind` and `mirror`."""

    name: str
    source: str
    table: TableId
    schema: TableSchema
    alias: str
    outputs: tuple[tuple[str, str, str], ...]
    """(name, expression, DuckDB type) of each output column."""
    where: str
    checks: tuple[Check, ...]
    version: str
    kind: Kind = LATEST
    python: PythonRows | None = None
    """What makes the rows that the expressions are over, where that is Python and not the raw table."""
    unique: tuple[UniqueKey, ...] = ()
    """Its key, where the source's does not keep its values apart, and those taken over: see `Claims`."""
    handling: Handling = NO_SAY
    masked: Masked = NOTHING
    """What of it is not shown, see `headrace.transform.pii`."""
    constraints: Constraints = "own"
    """Whether it keeps those of its table at the source, too."""
    source_keys: tuple[SourceKey, ...] = ()
    """The foreign keys of its table at the source that are over outputs of it."""
    left_out: tuple[str, ...] = ()
    """Constraints of its table that it does not keep, each with the reason in words."""
    foreign_keys: tuple[str, ...] = ()
    """The names of those that it has, also of one whose parent does not bind now."""
    references: tuple[Reference, ...] = ()
    """The foreign keys of its rows, and those that refer to its rows."""
    orphan_after: float = NO_DEFAULTS.orphan_after
    """Seconds for which a row waits for what it refers to, before that is an error."""
    refused: frozenset[Refused] = field(default=frozenset(), compare=False)
    """Changes that are bad since their rows would have the key of another, or refer to none."""
    decisions: Decisions | None = field(default=None, compare=False)
    """What people decided about changes, None if nothing."""

    attempts: Attempts | None = field(default=None, compare=False, metadata=BESIDE)
    """Where it is noted what is being prepared, if it is to be."""
    suspect: bool = field(default=False, compare=False)
    """Whether changes may end the process that judges them: they are tried in another one first."""

    def prepare(self, changes: pa.Table) -> Prepared:
        """See `Model.prepare`."""
        if self.decisions is None:
            return self._noted(changes)
        taken = self.decisions.taken(self.schema, changes)
        prepared, left_out = self._noted(taken), changes.num_rows - taken.num_rows
        counts = prepared.counts + Counts(read=left_out, filtered=left_out)
        return replace(prepared, counts=counts) if left_out else prepared

    def _noted(self, changes: pa.Table) -> Prepared:
        """Prepare changes, noted while it lasts."""
        if self.attempts is None:
            return self._prepare(changes)
        with self.attempts.attempt(self.name, self.version, changes) as suspect:
            return (replace(self, suspect=True) if suspect else self)._prepare(changes)

    def _prepare(self, changes: pa.Table) -> Prepared:
        with engine() as db:
            if self.kind.materialize != "latest":
                return step(db, self, changes)
            evaluation, key = self.evaluation(db), self.schema.key
            if not key:
                return fold_multiset(db, self.schema, changes, evaluation)
            if self.kind.delete == "soft":
                return fold_soft(db, key, changes, evaluation)
            return fold(db, key, changes, evaluation)

    def evaluation(self, db: duckdb.DuckDBPyConnection) -> Evaluation:
        """Return what judges changes under the model, on a connection of `engine`."""
        return PythonEvaluation(db, self, self.python) if self.python else Evaluation(db, self)

    def settled(self, changes: pa.Table) -> Prepared:
        """Return what the whole histories of some keys come to."""
        with engine() as db:
            return settle(db, self.prepare(changes))

    def whole(self, changes: pa.Table) -> Prepared:
        """Return what the whole histories of some keys come to, in a table where nothing was before."""
        return uncontested(self, lambda model: alone(model.settled(changes)))

    def refusing(self, contested: Contested) -> RowModel:
        """Return the model that takes what was contested for bad; its version is the same. Raises ModelBroken
        where that is to suspend it."""
        refused = contested.refused.get(self.name)
        keys = {key.name: key for key in self.unique}
        taken = [keys[name or ""] for *_, name, _ in refused or () if (name or "") in keys]
        if taken and self.handling.on_key_violation == "suspend":
            key = ", ".join(taken[0].columns)
            raise ModelBroken(
                self.name,
                f"{len(taken):,} changes would give their rows the key ({key}) of others, which suspends "
                "the model (on_violation).",
                f"Mend the data or the model, then run `headrace resume {self.name}`.",
            )
        return replace(self, refused=self.refused.union(refused)) if refused else self

    @property
    def claimed_names(self) -> tuple[str, ...]:
        """The names of its foreign keys and of its unique keys."""
        return (*self.foreign_keys, *(key.name for key in self.unique))

    @property
    def claims(self) -> bool:
        """Whether what its rows claim has to be known, see `Claims`."""
        return bool(self.unique or self.references)

    @property
    def own_references(self) -> tuple[Reference, ...]:
        """The foreign keys of its rows."""
        return tuple(each for each in self.references if each.model == self.name)

    def limited(self, limits: Sequence[tuple[str, str]]) -> RowModel:
        """Return the model with `Destination.limits` of its outputs as further checks."""
        outputs = {name for name, _, _ in self.outputs}
        more = (Check(column, condition) for column, condition in limits if column in outputs)
        return replace(self, checks=(*self.checks, *more)) if limits else self

    @property
    def key_is_masked(self) -> bool:
        """Whether a record's source key, or what it waits for, holds values that are not to be shown."""
        awaited = {name for key in self.unique for name in key.columns}
        awaited.update(name for each in self.own_references for name in each.columns)
        return self.masked.key or not awaited.isdisjoint(self.masked.outputs)

    @property
    def nulls(self) -> bool:
        """Whether a check of it nulls cells, so that its rows say which."""
        return any(check.on_violation == "null" for check in self.checks)

    @property
    def max_error_rate(self) -> float:
        """Which share of its newest changes may fail before it is taken for broken; 1 for any."""
        return self.handling.max_error_rate

    @property
    def is_mirror(self) -> bool:
        """Whether the model follows its table's shape instead of a file."""
        return self.version.startswith("mirror:")

    @property
    def schema_version(self) -> int:
        """See `Model.schema_version`."""
        return self.schema.version

    @property
    def supersedes(self) -> bool:
        """See `Model.supersedes`."""
        return bool(self.schema.key) and self.kind.materialize == "latest"

    @property
    def numbered(self) -> str | None:
        """See `Table.numbered`."""
        key = [column for column in self.schema.columns if column.name in self.schema.key]
        plain = self.kind.materialize == "latest" and self.kind.delete == "hard"
        if not plain or self.python is not None or len(key) != 1 or not is_whole(key[0].type):
            return None
        outputs = (output for output in self.outputs if output[2] in _WHOLE)
        reading = (name for name, text, _ in outputs if reads_column(text, key[0], self.alias))
        return next(reading, None)

    def holding(self, column: str) -> list[str]:
        """Return the outputs that hold a column of the raw table, its values told apart as they are there;
        of a Python model those of its key are known to."""
        if self.python:
            pairs = zip(self.schema.key, self.python.key, strict=False)
            return [name for of, name in pairs if of == column]
        (known,) = (each for each in self.schema.columns if each.name == column)
        return [
            name
            for name, text, type_ in self.outputs
            if reads_column(text, known, self.alias) and cast_keeps_apart(known.type, type_)
        ]

    def types(self) -> dict[str, str]:
        """See `Model.types`."""
        outputs = {name: type_ for name, _, type_ in self.outputs}
        return outputs | (NULLED if self.nulls else {}) | dict(self.kind.columns)


@contextmanager
def preparing(model: str) -> Iterator[None]:
    """Turn what goes wrong in preparing a model into ModelBroken, but for what passes by itself."""
    try:
        yield
    except Exception as error:
        if verdict_of(error) is Verdict.RETRY or isinstance(error, ModelBroken):
            raise
        if isinstance(error, HeadraceError):
            raise ModelBroken(model, str(error), error.remedy) from error
        what = f"{type(error).__name__}: {scrub(str(error))}"
        remedy = "Mend it, or report what Headrace lacks."
        raise ModelBroken(model, f"Model {model} cannot run: {what}", remedy) from error


def mirror(source: str, schema: TableSchema, defaults: ModelDefaults = NO_DEFAULTS) -> RowModel:
    """Return the model of a table that has none: every column with its source type."""
    outputs = tuple(
        (column.name, mirror_expression(column), canonical(duckdb_type(column))) for column in schema.columns
    )
    model = RowModel(
        name=f"{source}.{schema.table.label}",
        source=source,
        table=schema.table,
        schema=schema,
        alias=schema.table.name,
        outputs=outputs,
        where="",
        checks=(),
        version="mirror:" + hashlib.blake2b(repr(outputs).encode(), digest_size=8).hexdigest(),
        orphan_after=defaults.orphan_after,
    )
    return take_over(model) if defaults.constraints == "source" else model


def refuse_twins(name: str, schema: TableSchema, tables: Iterable[TableId]) -> None:
    """Refuse a model whose table has columns that DuckDB takes for one, since they differ in case only.

    A mirror, whose name is its table's, gives way to one of such a name among `tables`, the first one
    captured. Raises ModelBroken; what was captured stays in staging.
    """
    folded: dict[str, str] = {}
    for column in schema.columns:
        other = folded.setdefault(column.name.casefold(), column.name)
        if other != column.name:
            raise ModelBroken(
                name,
                f"Table {schema.table} has columns {other} and {column.name}, which differ in upper and "
                "lower case only: the destination takes them for one.",
                "Rename one of them at the source. Nothing is lost: staging holds both.",
            )
    mine = schema.table.label.casefold()
    first = next((table for table in tables if table.label.casefold() == mine), schema.table)
    if first != schema.table:
        raise ModelBroken(
            name,
            f"Tables {first} and {schema.table} would have one name in the destination, which takes upper "
            "and lower case for the same.",
            "Write a model with another name for one of them. Nothing is lost: staging holds both.",
        )


def as_text(source: str, schema: TableSchema) -> RowModel:
    """Return the model that keeps every column as the source's own text: the state of the raw table."""
    outputs = tuple((column.name, quoted(column.name), "VARCHAR") for column in schema.columns)
    return replace(mirror(source, schema), outputs=outputs, version="text")


def bind(text: ModelText, schema: TableSchema, defaults: ModelDefaults = NO_DEFAULTS) -> RowModel:
    """Bind a model file to the shape of its table; `defaults` hold for what the file leaves open.

    Raises ModelBroken with the engine's own words when an expression names a missing column or
    does not type-check, and ModelError when its key is not the source's and cannot be kept unique.
    """
    if not schema.key:
        refuse_without_key(text.file, text.kind)
    said = text.said.over(defaults)
    bound = _bind_python(text, schema) if isinstance(text, PythonText) else _bind_sql(text, schema)
    model = replace(
        bound,
        foreign_keys=tuple(each.name for each in text.foreign_keys),
        orphan_after=said.orphan_after,
    )
    return take_over(model, text.key, text.foreign_keys) if said.constraints == "source" else model


def _bind_sql(text: ModelText, schema: TableSchema) -> RowModel:
    """Bind a model of SQL: its outputs are expressions over the raw table."""
    types = dict(text.types)
    with engine() as db:
        _empty_events(db, schema)
        found = _types(db, text)
        outputs = tuple(
            (name, _typed(e, types.get(name)), types.get(name, found[name])) for name, e in text.outputs
        )
        model = RowModel(
            name=text.name,
            source=text.source,
            table=schema.table,
            schema=schema,
            alias=text.alias,
            outputs=outputs,
            where=text.where,
            checks=text.checks,
            version=text.version,
            kind=text.kind,
            handling=text.handling,
        )
        _try(db, text, Evaluation(db, model).query("events"))
        outputs = tuple(
            (name, expression, _type_name(db, text, type_)) for name, expression, type_ in outputs
        )
    return replace(model, outputs=outputs, unique=_unique(text, schema, outputs))


def _bind_python(text: PythonText, schema: TableSchema) -> RowModel:
    """Bind a Python model: its outputs are what its function puts out, cast to their types."""
    if text.fault:
        raise ModelBroken(text.name, text.fault, f"Mend {text.script.file}.")
    names = [column.name for column in schema.columns]
    seen = [*names, *(META if schema.key else ())]
    for name in text.reads or ():
        if name not in seen:
            near = difflib.get_close_matches(name, seen, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ModelBroken(
                text.name,
                f"Model {text.name} reads {name}, which raw.{text.source}.{text.table} does not have.",
                f"Mend {text.script.file}.{hint}",
            )
    with engine() as db:
        types = {name: _type_name(db, text, type_) for name, type_ in text.types}
        worker = Worker(text.script, types, text.memory, text.timeout)
        model = RowModel(
            name=text.name,
            source=text.source,
            table=schema.table,
            schema=schema,
            alias=text.alias,
            outputs=tuple((name, f"CAST({quoted(name)} AS {type_})", type_) for name, type_ in types.items()),
            where=KEPT,
            checks=(*_key_checks(text, schema, types), *text.checks),
            version=text.version,
            kind=text.kind,
            handling=text.handling,
            python=PythonRows(text.name, worker, seen if text.reads is None else text.reads, text.key),
        )
        made = ", ".join(f"NULL::{type_} AS {quoted(name)}" for name, type_ in types.items())
        db.execute(
            "CREATE OR REPLACE TEMP TABLE events AS SELECT NULL::BIGINT AS _hr_n, NULL::VARCHAR AS _hr_k, "
            f"NULL::BOOLEAN AS {KEPT}, {made} LIMIT 0"
        )
        _try(db, text, Evaluation(db, model).query("events"))
    if not schema.key:
        refuse_without_key(text.file, text.kind)
    return model


def _key_checks(text: PythonText, schema: TableSchema, types: Mapping[str, str]) -> Iterator[Check]:
    """Yield what holds the key of a Python model to its table's, which nobody can read from its code."""
    if not text.key:
        return
    source = {column.name: column.type for column in schema.columns}
    keeps = [
        cast_keeps_apart(source[name], types[of]) for name, of in zip(schema.key, text.key, strict=False)
    ]
    if len(text.key) != len(schema.key) or not all(keeps):
        raise ModelError(
            f"Model {text.name}: its key {list(text.key)} is not the key of its table, {list(schema.key)}, "
            "so it may not be unique.",
            "Name an output for each of the table's key columns, in their order and of their types.",
        )
    for i, name in enumerate(text.key):
        cell = "_hr_k" if len(text.key) == 1 else f"json_extract_string(_hr_k, '$[{i}]')"
        yield Check(name, f"{quoted(name)} = CAST({cell} AS {types[name]})")


def _typed(expression: str, type_: str | None) -> str:
    return f"CAST(({expression}) AS {type_})" if type_ else expression


def _empty_events(db: duckdb.DuckDBPyConnection, schema: TableSchema) -> None:
    names = [column.name for column in schema.columns]
    cells = [f"NULL::VARCHAR AS {quoted(name)}" for name in names]
    numbers = ("_epoch", "_commit", "_ordinal", "_offset", "_txid", "_hr_n")
    meta = [f"NULL::BIGINT AS {name}" for name in numbers]
    hidden = ["NULL::VARCHAR AS _op", "NULL::TIMESTAMPTZ AS _committed_at", "NULL::VARCHAR AS _hr_k"]
    if not schema.key:
        # Rows that are the same must come out the same, whichever change brought them.
        meta, hidden = meta[-1:], hidden[-1:]
    db.execute(f"CREATE OR REPLACE TEMP TABLE events AS SELECT {', '.join(cells + meta + hidden)} LIMIT 0")


def _types(db: duckdb.DuckDBPyConnection, text: ModelText) -> dict[str, str]:
    columns = ", ".join(f"({expression}) AS {quoted(name)}" for name, expression in text.outputs)
    rows = _try(db, text, f"DESCRIBE SELECT {columns} FROM events AS {quoted(text.alias)}")
    return {str(row[0]): str(row[1]) for row in rows}


def _type_name(db: duckdb.DuckDBPyConnection, text: ModelText, type_: str) -> str:
    return str(_try(db, text, f"DESCRIBE SELECT NULL::{type_}")[0][1])


def _try(db: duckdb.DuckDBPyConnection, text: ModelText, query: str) -> list[tuple[object, ...]]:
    try:
        return db.execute(query).fetchall()
    except duckdb.Error as error:
        words = str(error).split("\n\nLINE")[0].strip().replace("\n", " ")
        raise ModelBroken(
            text.name,
            f"Model {text.name} does not fit raw.{text.source}.{text.table}: {words}",
            f"Mend models/{text.file}.",
        ) from error


def _unique(
    text: ModelText, schema: TableSchema, outputs: Sequence[tuple[str, str, str]]
) -> tuple[UniqueKey, ...]:
    """Return the key; none if there is no key, or one that is unique because the source's key is.

    Raises ModelError for a key that cannot be kept unique.
    """
    if not text.key:
        return ()
    if not schema.key:
        raise ModelError(
            f"Model {text.name} has a key, but its table has none: rows of it may be the same.",
            "Leave the key out, or give the table one at the source.",
        )
    expressions = {name: (expression, type_) for name, expression, type_ in outputs}
    covered = set()
    for name in text.key:
        expression, type_ = expressions[name]
        for column in schema.columns:
            reads = column.name in schema.key and reads_column(expression, column, text.alias)
            if reads and cast_keeps_apart(column.type, type_):
                covered.add(column.name)
    if covered == set(schema.key):
        return ()
    lacks = (
        f"Model {text.name}: its key {list(text.key)} does not hold the key of its table, {list(schema.key)}"
    )
    hold = "put the table's key columns, cast to their own types, into the key"
    if text.kind != LATEST:
        what = "keeps deleted rows" if text.kind.delete == "soft" else f"is {text.kind.materialize}"
        raise ModelError(
            f"{lacks}, and it {what}: rows of the past would have keys that others have now.",
            f"Leave that out, or {hold}.",
        )
    for name in text.key:
        type_ = expressions[name][1]
        if type_.endswith("]") or type_.startswith(("STRUCT", "MAP", "UNION", "JSON", "VARIANT")):
            raise ModelError(
                f"{lacks}, and {name} is {type_}, which cannot be held to be unique.",
                f"Cast {name} to a plain type, or {hold}.",
            )
    return (UniqueKey("", text.key),)
