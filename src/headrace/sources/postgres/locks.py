"""Our statements at the source never make the application wait for long.

A statement that waits for a lock stands in the queue, and whatever conflicts with it queues behind it. So
ours give up soon, and are tried again later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psycopg

from headrace.change import TableId
from headrace.errors import SourceUnavailable
from headrace.sources.postgres.catalog import Connection, qualified
from headrace.sources.postgres.connection import LOCK_TIMEOUT

# The modes that conflict with ShareUpdateExclusive, which a change of a publication takes.
_HOLDERS = """
SELECT l.pid, coalesce(a.usename::text, ''), coalesce(a.application_name, ''), coalesce(a.state, '')
FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.relation IN (SELECT to_regclass(n)::oid FROM unnest(%s::text[]) n) AND l.granted
  AND l.mode IN ('ShareUpdateExclusiveLock', 'ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock',
    'AccessExclusiveLock')
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
ORDER BY a.xact_start LIMIT 1
"""


@contextmanager
def unless_locked(db: Connection, what: str, tables: Sequence[TableId]) -> Iterator[None]:
    """Run a statement on tables that others may have locked.

    `what` names it in the message. Raises SourceUnavailable when it did not get its locks in time.
    """
    try:
        yield
    except psycopg.errors.LockNotAvailable as error:
        names = ", ".join(map(str, tables[:5]))
        raise SourceUnavailable(
            f"{what} waited {LOCK_TIMEOUT} for a lock on {names}{_holder(db, tables)}.",
            "It is tried again; nobody waits behind it meanwhile.",
        ) from error


def _holder(db: Connection, tables: Sequence[TableId]) -> str:
    row = db.execute(_HOLDERS, [[qualified(table) for table in tables]]).fetchone()
    if row is None:
        return ""
    return f", held by pid {row[0]} ({', '.join(filter(None, row[1:]))})"
