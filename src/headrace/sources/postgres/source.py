"""Postgres as a source: slot, stream, and copies beside it.

Facts that outlive the process are notes in the log: `published` (the publication, if we made it),
`resync` (asked for, not yet begun), and those of `slot`, `tables`, `publication`, `fingerprint`,
`partitions`, `identity`, `continuity` and `teardown`.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections import deque
from collections.abc import Container, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Literal

import psycopg

from headrace.alarms import tell
from headrace.change import ADDED, Entry, Position, SourceMark, TableId, source_marker
from headrace.config import SourceConfig, select_tables
from headrace.errors import SourceUnavailable, UserError
from headrace.evolution import accept
from headrace.protocols import LogIndex
from headrace.schema_policy import action
from headrace.sources.postgres.catalog import Connection, list_tables
from headrace.sources.postgres.catalog_watch import (
    CatalogChange,
    announce,
    catalog_changes,
    is_known,
    remember_catalog,
    take_note,
)
from headrace.sources.postgres.connection import broke_off, connect, connect_replication, place
from headrace.sources.postgres.copier import Copier
from headrace.sources.postgres.failover import keep_failover, wants_failover
from headrace.sources.postgres.fingerprint import (
    check_publication,
    expect_publication,
    publication_fingerprint,
)
from headrace.sources.postgres.follow import Follower, Limits, Progress, emit
from headrace.sources.postgres.identity import check_server, forget_server
from headrace.sources.postgres.lsn import format_lsn
from headrace.sources.postgres.partitions import remember_partitions
from headrace.sources.postgres.publication import (
    capturable_shapes,
    chosen_tables,
    publish,
    refiltered,
    remember_filters,
    withdraw,
)
from headrace.sources.postgres.recovery import in_recovery, replayed
from headrace.sources.postgres.slot import (
    POINT,
    check_resumable,
    claim_slot,
    create_slot,
    drop_unfinished,
    epoch_of,
    owned_slot,
)
from headrace.sources.postgres.tables import DROPPED, Stage, TableStates, captured_tables, read_states
from headrace.sources.postgres.takeover import Takeover
from headrace.sources.postgres.teardown import refuse_torn_down

logger = logging.getLogger("headrace.capture")

Request = Literal["add", "remove", "resync", "pause", "resume"]

_RESYNC = "resync"


class PostgresSource:
    """One Postgres database, read through one logical replication slot."""

    def __init__(
        self, config: SourceConfig, max_bytes: int, linger: float, spool: Path | None = None
    ) -> None:
        """`max_bytes` bounds what is decoded before it becomes a group, `linger` (seconds) how long
        a group waits for more while changes keep coming. Large transactions wait in the folder `spool`
        for their commit, by default the system's for temporary files."""
        self.name = config.name
        self._config = config
        self._url = config.url.reveal()
        self._limits = Limits(max_bytes, linger, spool or Path(tempfile.gettempdir()))
        self._progress = Progress()
        self._epoch = 0
        self._takeover = Takeover(config)
        self._requests: deque[TableId] = deque()
        self._resync = threading.Event()
        self._left_out: dict[TableId, str] = {}
        self._gone: dict[TableId, int] = {}
        self._plain: Connection | None = None

    def read(self, log: LogIndex) -> Generator[Iterable[Entry]]:
        """See `Source.read`."""
        refuse_torn_down(self._config, log)
        try:
            db = self._plain = connect(self._url)
            self._resync.clear()  # before the note is read: one that is asked for meanwhile ends this again
            if log.note(_RESYNC):
                self._start_anew(log)
            server = check_server(db, self._config, log)
            if owned_slot(log) == self._config.slot:
                self._takeover.consider(db)
            self._epoch = epoch_of(log)
            with closing(Copier(self._config, log, self._epoch)) as copier:
                if not log.note(POINT):
                    yield from self._begin(log, copier)
                slot = check_resumable(db, self._config, log)
                self._look_at_catalog(log)
                self._requests.clear()  # what is new is in the tables' states, and taken up with them
                check_publication(db, self._config, log)
                keep_failover(db, self._config)
                self._publish(log)
                self._withdraw(log, [t for t, state in read_states(log).items() if state.stage == "removed"])
                copier.resume()
                follower = Follower(
                    self._config,
                    log,
                    db,
                    copier,
                    self._limits,
                    self._progress,
                    partial(self._take_requests, log, copier),
                    partial(self._copy_again, log),
                    partial(self._look_at_catalog, log),
                    partial(self._moved, log),
                )
                yield from follower.groups(server, slot)
        except (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.InternalError_) as error:
            raise broke_off(self._url, error) from error  # also where a relation went while it was asked for
        finally:
            self.close()

    def confirm(self, through: Position) -> None:
        """See `Source.confirm`."""
        if through.epoch == self._epoch:
            self._progress.confirmed = max(self._progress.confirmed, through.commit)

    def head(self) -> int:
        """Return an LSN that every change committed until now lies before, and make sure that the
        stream will pass it: a logical message is written behind it, or on a standby what the server says."""
        with connect(self._url) as db:
            self._progress.sought = replayed(db) if in_recovery(db) else emit(db, "head")
            return self._progress.sought

    def close(self) -> None:
        """See `Source.close`."""
        if self._plain is not None:
            self._plain.close()
        self._plain = None

    def _catalog(self) -> Connection:
        assert self._plain is not None
        return self._plain

    def change_tables(self, log: LogIndex, tables: Sequence[TableId], what: Request) -> None:
        """Add tables to those that are captured, remove them, copy them again, pause or resume them.

        Durable when it returns; a running `read` takes it up within a second. Raises UserError for a
        table that the source does not have, or that is not captured.
        """
        states, captured = TableStates(log), captured_tables(log)
        if what == "add":
            with connect(self._url) as db:
                known = list_tables(db)
                if missing := [str(table) for table in tables if table not in known]:
                    raise UserError(
                        f"{place(self._url)} has no table {', '.join(missing)}.", "Check the names."
                    )
                capturable_shapes(db, self._config, tables)
        elif missing := [str(table) for table in tables if table not in captured]:
            raise UserError(
                f"Source {self.name} does not capture {', '.join(missing)}.", "See `headrace tables list`."
            )
        if what == "resume":
            accept(log, list(tables))
        if what in ("pause", "resume"):
            states.pause(tables, what == "pause")
            return
        stage: Stage = "removed" if what == "remove" else "requested"
        if what == "add":
            tables = [table for table in tables if table not in captured]
        states.move(tables, stage, {"add": ADDED, "resync": "resync", "remove": ""}[what])
        self._requests.extend(tables)

    def request_resync(self, log: LogIndex) -> None:
        """Begin anew: with a new slot, and every table copied again.

        Durable when it returns; a running `read` ends with SourceUnavailable, the next one takes it up.
        """
        log.set_note(_RESYNC, "requested")
        self._resync.set()

    def _start_anew(self, log: LogIndex) -> None:
        """Forget the slot and the server; positions from here on belong to a new epoch."""
        if log.note(POINT):
            log.append(self._new_epoch(log))
        forget_server(log)
        log.set_note(_RESYNC, "")

    @staticmethod
    def _new_epoch(log: LogIndex) -> Iterator[Entry]:
        """Yield the marker of a new beginning; the notes that make it one are of its transaction."""
        epoch = epoch_of(log) + 1
        log.set_note("epoch", str(epoch))
        log.set_note(POINT, "")
        reason = f"epoch {epoch} begins: every table is copied again"
        yield source_marker(Position(epoch, 0, 0), SourceMark("resync", reason))

    def _take_requests(self, log: LogIndex, copier: Copier) -> None:
        """Carry out what `change_tables` and `request_resync` have made durable."""
        if self._resync.is_set():
            raise SourceUnavailable(f"Source {self.name} begins anew, as it was asked to.")
        while self._requests:
            table = self._requests.popleft()
            state = read_states(log)[table]
            if state.stage == "removed":
                copier.drop(table)
                self._withdraw(log, [table])
                logger.info("%s is no longer captured", table)
            elif state.stage == "requested":
                self._publish(log)
                remember_partitions(self._catalog(), log, [table])
                remember_catalog(self._catalog(), log, [table])
                copier.start(table, state.reason, after=log.end().offset)

    def _copy_again(self, log: LogIndex, table: TableId, reason: str, must: bool) -> None:
        """Have a table copied again whose rows at rest are not what the source has now, or say so.

        It `must` where its models cannot go on without."""
        if table not in captured_tables(log):
            return  # removed, and the stream has not heard of that yet
        if self._config.on_rewrite == "alert" and not must:
            tell(
                "SCHEMA of %s changed: %s. Rows that no later change touches do not show it: "
                "`headrace tables resync %s`.", table, reason, table, source=self.name,
            )  # fmt: skip
            return
        tell(
            "SCHEMA of %s changed: %s. It is copied again beside its stream.", table, reason, source=self.name
        )
        TableStates(log).move([table], "requested", reason)
        self._requests.append(table)

    def _look_at_catalog(self, log: LogIndex) -> None:
        """Take up what became of the captured tables, and take in new ones; again with the next look where
        something goes meanwhile."""
        try:
            awaited = self._take_up_changes(log)
            if log.note(POINT):
                self._take_in_new(log, awaited)
        except psycopg.errors.InternalError_ as error:  # the server has met a relation that was being dropped
            logger.info("%s: the catalog changed while it was looked at: %s", self.name, error.sqlstate)

    def _take_up_changes(self, log: LogIndex) -> set[TableId]:
        """Take up what became of the captured tables; returns those of which more is to come."""
        db = self._catalog()
        awaited = set[TableId]()
        changes = catalog_changes(db, log, captured_tables(log))
        self._take_up_altered(log, [change for change in changes if change.kind == "altered"])
        away = {change.table: change for change in changes if change.kind != "altered"}
        # One that has its name back may go once more, and then what it held in between is still to come.
        self._gone = {table: at for table, at in self._gone.items() if table in away}
        for table, change in away.items():
            if not self._has_passed(table):  # what it held before is still to come
                awaited |= {change.now or table}
            elif change.now is None:
                self._let_go(log, table, DROPPED)
                tell(
                    "DROPPED table %s: the source has it no longer. What was captured of it stays.",
                    table,
                    source=self.name,
                )
            else:
                self._follow(log, table, change.now)
        return awaited

    def _take_up_altered(self, log: LogIndex, changes: Iterable[CatalogChange]) -> None:
        """Announce what tables look like, and have copied again what is to be; one that is locked, and all of
        which a failure keeps us, again with the next look."""
        db = self._catalog()
        done = list[CatalogChange]()
        try:
            for change in changes:
                if not in_recovery(db) and not announce(db, self._config, log, change.table):
                    continue
                if change.reason:
                    self._copy_again(log, change.table, change.reason, False)
                done.append(change)
        finally:
            take_note(log, done)

    def _has_passed(self, table: TableId) -> bool:
        """Whether the log holds all that the source committed until a table was first found to be gone."""
        db = self._catalog()
        if table not in self._gone:
            self._gone[table] = replayed(db) if in_recovery(db) else emit(db, "gone")
        return self._progress.confirmed >= self._gone[table]

    def _let_go(self, log: LogIndex, table: TableId, reason: str) -> None:
        """Capture a table no longer that the source has no longer, under its name."""
        self._gone.pop(table, None)
        TableStates(log).move([table], "removed", reason)
        self._requests.append(table)

    def _follow(self, log: LogIndex, table: TableId, now: TableId) -> None:
        """Capture a table under the name that it has now, by a copy of its own, if the project selects it."""
        db = self._catalog()
        self._let_go(log, table, f"called {now} now")
        check_publication(db, self._config, log)
        expect_publication(db, self._config, log)
        if action(self._config.schema_changes, table, "table_moved") == "freeze":
            then = "It is captured no longer (schema_changes)"
        elif not select_tables(self._config.tables, [now]):
            then = "That is not among the source's tables, so it is captured no longer"
        else:
            TableStates(log).move([now], "requested", ADDED)
            self._requests.append(now)
            then = f"It is copied under that name, for models that read raw.{self.name}.{now.label}"
        tell(
            "MOVED table %s is called %s now. %s; what was captured until now stays.",
            table,
            now,
            then,
            source=self.name,
        )

    def _moved(self, log: LogIndex, table: TableId, now: TableId) -> None:
        """See to a table whose changes the stream has brought under another name: the last ones under its
        former name came before."""
        self._gone[table] = 0
        self._look_at_catalog(log)
        if table in captured_tables(log):  # it has its name back, and what came meanwhile is left out
            self._copy_again(log, table, f"it was called {now} for a while", True)

    def _take_in_new(self, log: LogIndex, awaited: Container[TableId]) -> None:
        """Capture tables that the patterns select and that the source did not have until now, but for those
        `awaited` under another name. One that cannot be captured is tried again at the next look."""
        db, states = self._catalog(), read_states(log)
        for table in select_tables(self._config.tables, list_tables(db)):
            state = states.get(table)
            known = state is not None and not (state.stage == "removed" and state.reason == DROPPED)
            if known or table in awaited or is_known(db, log, table, captured_tables(log)):
                continue
            obstacle = self._obstacle(log, table)
            if not obstacle:
                TableStates(log).move([table], "requested", ADDED)
                self._requests.append(table)
                tell("NEW table %s: it is copied beside the stream, and captured.", table, source=self.name)
            elif self._left_out.get(table) != obstacle:
                tell("NEW table %s is not captured: %s", table, obstacle, source=self.name)
            self._left_out[table] = obstacle

    def _obstacle(self, log: LogIndex, table: TableId) -> str:
        """Publish a table; return what is in the way, '' if it is done."""
        if action(self._config.schema_changes, table, "table_added") == "freeze":
            return f"schema_changes says freeze. `headrace tables add {table}` takes it in."
        check_publication(self._catalog(), self._config, log)
        try:
            if publish(self._catalog(), self._config, [table]):
                expect_publication(self._catalog(), self._config, log)
        except (UserError, SourceUnavailable) as error:  # the application may have it locked for long
            return error.paragraph()
        except (psycopg.errors.UndefinedTable, KeyError):
            return "it was dropped just now."
        return ""

    def _publish(self, log: LogIndex) -> None:
        """Publish what is to be captured, and expect to find that from now on."""
        present = self._present(captured_tables(log))
        # Asked for before the publication changes: after a crash in between nothing would tell.
        states = read_states(log)
        changed = [t for t in refiltered(self._config, log, present) if states[t].stage != "requested"]
        if changed:
            TableStates(log).move(changed, "requested", "where changed")
        if publish(self._catalog(), self._config, present):
            expect_publication(self._catalog(), self._config, log)
        remember_filters(self._config, log, present)

    def _withdraw(self, log: LogIndex, tables: Iterable[TableId]) -> None:
        """Publish tables no longer, and expect to find that from now on."""
        if withdraw(self._catalog(), self._config, tables):
            expect_publication(self._catalog(), self._config, log)

    def _present(self, tables: Sequence[TableId]) -> list[TableId]:
        """Return those of some tables that the source has: one that was dropped cannot be published."""
        known = set(list_tables(self._catalog()))
        return [table for table in tables if table in known]

    def _begin(self, log: LogIndex, copier: Copier) -> Generator[Iterable[Entry]]:
        """Make publication and slot, and have every table copied under the slot's own snapshot."""
        db = self._catalog()
        again = bool(captured_tables(log))
        tables = captured_tables(log) or chosen_tables(db, self._config)
        drop_unfinished(db, self._config, log)
        if publication_fingerprint(db, self._config.publication) is None:
            log.set_note("published", self._config.publication)
        elif owned_slot(log) is None:  # what we made, if we did, is on another server
            log.set_note("published", "")
        claim_slot(self._config, log)
        publish(db, self._config, self._present(tables))
        expect_publication(db, self._config, log)
        remember_partitions(db, log, tables)
        remember_catalog(db, log, tables)
        with connect_replication(self._url) as maker:
            failover = wants_failover(db, self._config)
            point, snapshot = yield from create_slot(db, maker, self._config, failover=failover)
            copier.snapshots.adopt(point, snapshot)
            check_server(db, self._config, log)  # a standby may have been promoted meanwhile
        TableStates(log).move(tables, "requested", "resync" if again else "")
        log.set_note(POINT, str(point))
        logger.info("copy of %d tables begins at %s", len(tables), format_lsn(point))
        for table in tables:
            copier.start(table, "resync" if again else "", after=log.end().offset, under_current=True)
