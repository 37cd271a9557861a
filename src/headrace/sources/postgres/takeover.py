"""A slot that a dead reader still holds.

Where the network or the machine of a Headrace went away without a word, its walsender lives on until
the server finds out: after `wal_sender_timeout`, or never if that is 0. Until then nobody else can read
the slot, and the server's disk fills.
"""

from __future__ import annotations

import logging
import time

import psycopg

from headrace.config import SourceConfig
from headrace.sources.postgres.catalog import Connection
from headrace.sources.postgres.connection import PINNED

logger = logging.getLogger("headrace.capture")

TAKE_OVER_AFTER = 60.0
"""Seconds without any sign of life after which a reader of our slot counts as dead."""

_HOLDER = """
SELECT s.active_pid, a.application_name, a.backend_start::text, s.confirmed_flush_lsn::text,
       r.reply_time::text
FROM pg_replication_slots s
LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid
LEFT JOIN pg_stat_replication r ON r.pid = s.active_pid
WHERE s.slot_name = %s AND s.active_pid IS NOT NULL
"""


class Takeover:
    """Ends a stale walsender of our own, once.

    A live reader confirms at least as often as it sends heartbeats, and replies every ten seconds (which a
    role may see that has pg_monitor): while anything of it moves, it is left alone, whoever it is.
    """

    def __init__(self, config: SourceConfig) -> None:
        self._slot = config.slot
        self._after = max(TAKE_OVER_AFTER, 3 * config.heartbeat)
        self._seen: tuple[object, ...] = ()
        self._since = 0.0
        self._ended: set[object] = set()

    def consider(self, db: Connection) -> None:
        """Look who holds the slot; call it at each attempt to read."""
        holder = db.execute(_HOLDER, [self._slot]).fetchone()
        if holder is None or holder[1] != PINNED["application_name"]:
            self._seen = ()
            return
        if holder != self._seen:
            self._seen, self._since = holder, time.monotonic()
        pid, start = holder[0], holder[2]
        silent = time.monotonic() - self._since
        if silent < self._after or (pid, start) in self._ended:
            return
        self._ended.add((pid, start))
        try:
            db.execute("SELECT pg_terminate_backend(%s)", [pid])
        except psycopg.errors.InsufficientPrivilege:
            logger.warning(
                "the slot %s is held by pid %s, a Headrace that has been silent for %.0f s, and the role may "
                "not end it: let somebody run SELECT pg_terminate_backend(%s)",
                self._slot, pid, silent, pid,
            )  # fmt: skip
        else:
            logger.warning(
                "the slot %s was held by pid %s, a Headrace that had been silent for %.0f s: that backend is "
                "ended",
                self._slot, pid, silent,
            )  # fmt: skip
