"""Reading the source as it was at one exact position."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import psycopg
import pyarrow as pa

from headrace.change import TableSchema
from headrace.config import SourceConfig
from headrace.errors import SourceError
from headrace.sources.postgres.catalog import quoted
from headrace.sources.postgres.columns import Policy
from headrace.sources.postgres.connection import (
    BYTES_AS_THEY_ARE,
    connect,
    connect_replication,
    without_password,
)
from headrace.sources.postgres.copy import is_partitioned, select_rows
from headrace.sources.postgres.lsn import format_lsn
from headrace.sources.postgres.reader import Reader
from headrace.sources.postgres.snapshots import export_snapshot
from headrace.sources.postgres.undecodable import Undecodable

_ROW_MESSAGES = (b"I"[0], b"U"[0], b"D"[0], b"T"[0])


class SourceSnapshot:
    """The source as of `commit`: everything committed up to there, and nothing else."""

    def __init__(self, commit: int, name: str, reader: Reader, policy: Policy) -> None:
        self.commit = commit
        self._name = name
        self._reader = reader
        self._policy = policy

    def read(self, schema: TableSchema) -> pa.Table:
        """Return all rows of a table that are captured, as they are captured.

        Raises SourceError when the table is no longer of that shape.
        """
        undecodable = Undecodable()
        names = [column.name for column in schema.columns]
        try:
            with self._reader.under(self._name) as db:
                partitioned = is_partitioned(db, schema.table)
                query = select_rows(schema, partitioned, self._policy.where(schema.table))
                with closing(self._reader.rows(query, names)) as batches:
                    kept = [
                        self._policy.apply(schema.table, undecodable.escape(schema.table, batch))
                        for batch in batches
                    ]
        except psycopg.Error as error:
            raise SourceError(f"{schema.table}: {without_password(str(error)).splitlines()[0]}") from error
        return pa.Table.from_batches(kept, pa.schema([(name, pa.string()) for name in names]))


@contextmanager
def take_snapshot(config: SourceConfig) -> Iterator[SourceSnapshot]:
    """Hold a snapshot together with its position: a temporary slot is the only exact pair of both.

    The slot and the snapshot are gone when the block ends. Raises SourceUnavailable.
    """
    url = config.url.reveal()
    with connect_replication(url) as holder, closing(Reader(url)) as reader:
        commit, name = export_snapshot(holder, "headrace_verify", "the comparison")
        yield SourceSnapshot(commit, name, reader, Policy(config))


def pending_changes(config: SourceConfig, through: int, after: int) -> int:
    """Count row changes up to position `through` that the slot has still to deliver beyond `after`.

    Looks without taking anything; call it only while no pipeline reads the slot.
    """
    with connect(config.url.reveal()) as db:
        db.execute(BYTES_AS_THEY_ARE)  # the output plugin heeds it; the answer has no text
        rows = db.execute(
            "SELECT data, (lsn - '0/0')::bigint FROM pg_logical_slot_peek_binary_changes("
            "%s, %s::pg_lsn, NULL, 'proto_version', '1', 'publication_names', %s)",
            [config.slot, format_lsn(through), quoted(config.publication)],
        )
        return sum(row[0][0] in _ROW_MESSAGES and row[1] > after for row in rows)
