"""The seams: the map of the system.

    Source ──capture──▶ Log ──load──▶ Staging ──prepare──▶ Model ──apply──▶ Destination

Every hop copies from a stream to a sink, and the sink remembers how far it got in the same
transaction as the data. A restart asks the sink, not a side file; the backlog is a subtraction;
a replay is a sink that starts again from an earlier offset.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from headrace.change import (
    Copy,
    CopyMark,
    Entry,
    Kind,
    LoggedEntry,
    Mark,
    Offset,
    Position,
    TableId,
    TableSchema,
)
from headrace.prepared import Prepared
from headrace.records import Records

if TYPE_CHECKING:
    import pyarrow as pa

    from headrace.errors import ForeignDestination
    from headrace.join import Joins
    from headrace.mart import Marts
    from headrace.masking import Masked
    from headrace.reference import Waits
    from headrace.standing import ModelState


class Source(Protocol):
    """A database whose committed changes can be read in order."""

    name: str

    def read(self, log: LogIndex) -> Generator[Iterable[Entry]]:
        """Yield groups: whole source transactions, in commit order, from where `log` ends.

        A group may be larger than memory: its entries are made as they are taken, once, and it is to be
        taken to its end before the next is asked for. One that is made so may turn out to be empty.

        Reads `log` for its last position, its schemas and its notes, and writes notes only. Yields
        an empty group at least twice a second when there is nothing, so that the caller can stop.
        A group that the caller did not append before the iterator is closed is yielded again by
        the next call. The trap: what `read` yielded is not yet safe; only `confirm` says so.

        Raises SourceUnavailable (ask again later) and SourceGap (never skip).
        """
        ...

    def confirm(self, through: Position) -> None:
        """Allow the source to forget changes through `through`. Called after the log's fsync only."""
        ...

    def close(self) -> None:
        """Give connections back. The slot stays."""
        ...


class Log(Protocol):
    """The immutable sequence of all that was captured from one source. One writer, many readers.

    This is all that a log has to do; what its headers tell besides is `LogIndex`. Facts about the source
    (its identity, its slot, the states of its tables) are notes, durable with the groups that they are of.
    """

    id: str
    source: str

    def append(self, entries: Iterable[Entry]) -> Mark:
        """Append one group in one transaction and return the new end, after fsync.

        Either all entries are readable from then on, or none ever will be. Raises LogFull while there is
        no room, LogNotDurable for good once a sync has failed.
        """
        ...

    def read(self, after: Offset, max_bytes: int) -> Sequence[LoggedEntry]:
        """Return entries after `after`, in order: at least one if there is one, then as many as fit in
        `max_bytes` of payload. They may end in the middle of a group.

        Raises LogTrimmed for what retention has deleted, LogDamaged for what is not what was written.
        """
        ...

    def end(self) -> Mark:
        """Return the last durable entry's mark; offset 0 when the log is empty."""
        ...

    def begin(self) -> Mark:
        """Return the mark of the last entry that retention has deleted: the anchor of the chain; offset 0
        while all is there."""
        ...

    def trim(self, through: Offset, pinned: Iterable[Offset] = ()) -> int:
        """Delete entries through the last end of a group up to an offset; return the bytes given back.

        Of many it deletes the first ones only, so that nobody waits for long: at least one group.
        Shapes, markers of copies and decisions stay, and so do stops: ends of groups where readers of staging
        can still stop, `pinned` ones among them. Who calls has seen to it that nobody needs the rest.
        """
        ...

    def note(self, key: str) -> str | None:
        """Return a durable fact about the source (its identity, its slot, its copy)."""
        ...

    def set_note(self, key: str, value: str) -> None:
        """Record a fact durably; while a group is appended, by whoever makes its entries together with it,
        by anyone else after it, however long that takes."""
        ...

    def writing(self, patience: float | None = None) -> AbstractContextManager[bool]:
        """Return what keeps every other thread from writing, so that a note can be read and changed.

        Who cannot wait for a whole append has `patience` for some seconds, and is told whether it has it.
        """
        ...


class LogIndex(Log, Protocol):
    """What a log's headers tell without a payload. Each answer holds before the log's beginning too, as far
    as shapes, copies and stops tell it."""

    def mark(self, offset: Offset) -> Mark | None:
        """Return the mark of an entry or of a stop, or None if the log has no such one."""
        ...

    def position(self) -> Position | None:
        """Return the last durable position in the source, from which capture resumes."""
        ...

    def last_commit(self) -> tuple[Position, int] | None:
        """Return that position with the time of its commit (microseconds)."""
        ...

    def place(self, offset: Offset) -> tuple[Position, int]:
        """Return up to which position, and which commit time (microseconds), an offset holds the source.

        These are of the streamed entries through it, since a copy is read ahead of the stream; before
        the first one of its epoch they are those of the entry itself.
        """
        ...

    def slice_end(self, after: Offset, limit: Offset, max_bytes: int, max_rows: int) -> Offset:
        """Return the last group end up to `limit` with `(after, …]` within bounds, or the only one."""
        ...

    def table_slice_end(self, table: TableId, after: Offset, limit: Offset, kinds: Sequence[Kind]) -> Offset:
        """Return the last group end up to `limit` that keeps the entries of a table and some kinds in
        `(after, …]` within the bounds of a slice, but has one if there is one; `limit` if all fit."""
        ...

    def group_end(self, offset: Offset) -> Offset:
        """Return the last group end at or before `offset`."""
        ...

    def headers(self, after: Offset, through: Offset) -> Iterator[LoggedEntry]:
        """Yield entries in `(after, through]` without payloads."""
        ...

    def backlog(self, after: Offset, table: TableId | None = None) -> tuple[int, int, int | None]:
        """Return rows, bytes and the oldest append time (microseconds) after `after`, of one table or all."""
        ...

    def last_offsets(self) -> dict[TableId, Offset]:
        """Return the offset of the last entry of every table."""
        ...

    def before_unstaged(
        self, table: TableId, rows_through: Offset, schemas_through: Offset, aside: Sequence[Offset] = ()
    ) -> Offset:
        """Return the last group end before a table's first entry that is not staged, or the log's end.

        Its rows are staged through `rows_through`, its schema entries through `schemas_through`, and those
        at the offsets `aside` as bytes, since they could not be decoded.
        """
        ...

    def schemas(self) -> dict[TableId, TableSchema]:
        """Return the newest shape of every table."""
        ...

    def copy_marks(self) -> Sequence[tuple[Offset, TableId, Position, int, CopyMark]]:
        """Return the markers of all copies in order: offset, table, position, time of the append
        (microseconds), mark."""
        ...

    def truncates(self, table: TableId, after: Offset) -> Sequence[int]:
        """Return the commits at which a table was truncated, of those that stand behind an offset."""
        ...

    def changes_of(self, table: TableId, after: Offset) -> Iterator[bytes]:
        """Yield the payloads of a table's streamed rows after an offset, in order."""
        ...

    def wait(self, after: Offset, timeout: float) -> bool:
        """Wait up to `timeout` seconds for an entry after `after`; say whether there is one."""
        ...


class Staging(Protocol):
    """Raw tables: every change as the source wrote it, text cells, in log order."""

    def write(self, entries: Sequence[LoggedEntry]) -> None:
        """Stage entries, from wherever to wherever in a group, durably; twice changes nothing."""
        ...

    def written(self) -> Offset:
        """Return the last offset that is staged for every table, be it in the middle of a group."""
        ...

    def through(self) -> Offset:
        """Return the last end of a group that is staged for every table: what apply may use."""
        ...

    def read(self, table: TableId, after: Offset, through: Offset) -> pa.Table:
        """Return the streamed changes of a table in `(after, through]`, in source order.

        Columns: those of the newest schema at `through` as strings, then `_op`, `_epoch`, `_commit`,
        `_ordinal`, `_offset`, `_committed_at` (microseconds), `_txid`, `_unchanged` (names of cells that
        the source did not send), `_before` (map of the old row's known cells).
        """
        ...

    def copy(self, table: TableId, through: Offset) -> Copy | None:
        """Return the newest copy of a table that is complete as of an offset."""
        ...

    def read_copied(self, table: TableId, copy: Copy, after: Offset, through: Offset) -> pa.Table:
        """Return the rows of a copy that stand in `(after, through]`, with the columns of `read`."""
        ...

    def history(self, table: TableId, copy: Copy | None, through: Offset) -> pa.Table:
        """Return all that made a table what it is as of an offset, in source order: the rows of a copy
        and every change that may not be contained in them."""
        ...

    def pieces(self, table: TableId, after: Offset, through: Offset) -> Iterator[pa.Table]:
        """Yield what `read` would return, in pieces of a bounded size; nothing if there is nothing."""
        ...

    def count(self, table: TableId, after: Offset, through: Offset) -> int:
        """Return how many changes and copied rows of a table are in `(after, through]`, those among them
        that could not be decoded."""
        ...

    def undecodable(self, table: TableId, after: Offset, through: Offset) -> pa.Table:
        """Return what of a table is in `(after, through]` and could not be decoded, in the log's order.

        Columns: those of `headrace.payload.UNDECODABLE`, the bytes null, with `_epoch`, `_offset` and
        `changes`, how many changes a row stands for. `_op` is 'r' for copied rows.
        """
        ...

    def schemas(self, through: Offset) -> dict[TableId, TableSchema]:
        """Return the shape of every table as of an offset."""
        ...


class Table(Protocol):
    """What a table of the destination takes from its model."""

    @property
    def name(self) -> str:
        """`orders`, or `shop.orders`."""
        ...

    def types(self) -> dict[str, str]:
        """Return the columns, without hidden ones, with their types in DuckDB's words."""
        ...

    @property
    def numbered(self) -> str | None:
        """The column that is the source key itself, a whole number, in every row; None if none is, or if rows
        are found otherwise than by deleting them."""
        ...


class Model(Table, Protocol):
    """What a destination table is made of."""

    @property
    def table(self) -> TableId:
        """The raw table that it reads."""
        ...

    @property
    def source(self) -> str:
        """The source of that table."""
        ...

    @property
    def version(self) -> str:
        """Hash of all that determines its output."""
        ...

    @property
    def schema_version(self) -> int:
        """The version of its table's shape."""

    @property
    def supersedes(self) -> bool:
        """Whether a later good change of a source key takes the place of the earlier ones."""

    @property
    def masked(self) -> Masked:
        """What of it is not shown."""
        ...

    def prepare(self, changes: pa.Table) -> Prepared:
        """Check and convert changes (as `Staging.read` returns them, unchanged cells resolved).

        Pure. A record that fails is in `records`, never an exception. Raises ModelBroken when the
        model can't run on any row.
        """
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """One model's share of a slice, or a piece of it; `refolded` is of whole histories, and comes last."""

    model: Model
    prepared: Prepared
    in_sync: bool
    refolded: bool = False


@dataclass(frozen=True, slots=True)
class Slice:
    """The changes of one source in `(after, through]`, prepared for all models that stand there.

    `parts` is taken once, one at a time: a slice need not fit in memory. Each model that moves has one at
    least; those of one model are in source order.
    """

    source: str
    after: Mark
    through: Mark
    position: Position
    committed_at: int
    parts: Iterable[Part]


class DestinationFinding(NamedTuple):
    """Something that `headrace check` says of a destination: `level` is ok, warn or fail."""

    level: Literal["ok", "warn", "fail"]
    what: str
    remedy: str = ""


Scanned = tuple["pa.Schema", "Iterator[pa.RecordBatch]"]
"""A result that is read batch by batch."""


class Destination(Records, Protocol):
    """Where rows arrive, with the progress, the quarantine and the ledger of their arrival.

    Each method that changes something is one transaction. All of them raise DestinationUnavailable
    (DestinationBusy: another process holds the destination) for what passes by itself, and
    DestinationError for what does not.
    """

    name: str
    """What and where it is, for people; no secret."""
    fresh: str
    """What a user does to have an empty one instead, such as `name a new file in [destination] path`."""
    main: str
    """The schema of models whose name has none."""
    commits: int
    """How many transactions this process has committed."""

    @property
    def joins(self) -> Joins:
        """How models take in copies."""
        ...

    @property
    def marts(self) -> Marts:
        """What is computed from its tables."""
        ...

    @property
    def waits(self) -> Waits:
        """What waits for rows that it refers to."""
        ...

    def exists(self) -> bool:
        """Whether anything was ever applied to it."""
        ...

    def inspect(self) -> Iterator[DestinationFinding]:
        """Look for what would stop a pipeline; changes nothing."""
        ...

    def read(self, queries: Sequence[str], *, read_only: bool = False) -> list[pa.Table]:
        """Run queries that only read, in one transaction.

        `read_only`: no pipeline of this process uses the destination meanwhile. Raises UserError for
        anything but a query, and for what the engine says of one.
        """
        ...

    def scan(
        self, queries: Sequence[str], *, read_only: bool = False
    ) -> AbstractContextManager[Iterator[Scanned]]:
        """Run queries as `read` does, and read their results batch by batch; each is read to its end before
        the next is asked for. The batches raise DestinationError where a query fails on the way."""
        ...

    def place_of(self, model: str) -> tuple[str, str]:
        """Return schema and name of a model's table."""
        ...

    def folded(self, model: str) -> tuple[str, str]:
        """Return schema and name of a model's table, equal for names that the engine takes for one."""
        ...

    def table_of(self, model: str) -> str:
        """Return a model's table as SQL names it."""
        ...

    def misnamed(self, model: str) -> tuple[str, str] | None:
        """Say why no table can have a model's name, and the remedy; None if one can."""
        ...

    def limits(self, model: Table) -> Sequence[tuple[str, str]]:
        """Return what the columns of a model's table cannot hold though their types in DuckDB can: columns,
        each with the condition, over output columns, that a row meets unless it is bad."""
        ...

    def progress(self, source: str) -> Mark | None:
        """Return how far this source was applied, or None before its first slice."""
        ...

    def models(self, source: str) -> dict[str, ModelState]:
        """Return how each model of this source stands."""
        ...

    def apply(self, work: Slice) -> Sequence[str]:
        """Apply a slice in one transaction (data, quarantine, ledger, progress); return ids of new issues.

        The models named in `work` move from `work.after` to `work.through`; one that does not stand at
        `work.after` is refused: a second owner, or a repeated call, can do no harm. Raises ModelBroken for a
        table that cannot take columns or rows, Contested for changes to prepare again, and what taking the
        parts raises; then nothing changes.
        """
        ...

    def suspend(self, model: str, source: str, version: str, reason: str, *, tripped: bool = False) -> bool:
        """Mark a version of a model suspended, by its breaker if `tripped`; True if it was not already so."""
        ...

    def hold(self, model: str, source: str, reason: str) -> None:
        """Mark a model suspended by hand, until `release`, whatever becomes of its file."""
        ...

    def release(self, model: str, source: str) -> bool:
        """Let a suspended model be tried again; False if it was not suspended."""
        ...

    def reconsider(self, source: str) -> None:
        """Have the models tried once more that were broken: their tables may be mended."""
        ...

    def retire(self, model: str, source: str) -> None:
        """Mark a model that the project no longer has; its table stays."""
        ...

    def forget_if_reshaped(self, model: Model, *, mend: bool = False, dry_run: bool = False) -> bool:
        """Drop a model's table, and its place, where its columns are no longer the model's (to `mend` it:
        where others have changed them), unless on a dry run; returns whether they are not. Its open records
        become superseded and its ledger rows void: it is built again from staging. Raises ModelBroken where
        others have changed them, but to mend it."""
        ...

    def foreign(self, source: str) -> ForeignDestination:
        """Build the refusal of a destination whose progress is another log's."""

    def close(self) -> None:
        """Give connections back; the next use opens new ones."""
