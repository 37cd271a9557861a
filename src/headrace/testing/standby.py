"""A streaming standby of a throw-away Postgres, which a test can promote."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from headrace.errors import HeadraceError
from headrace.testing.postgres import PostgresServer, _wait, clean_environment

CATCH_UP_SECONDS = 30.0
PROMOTE_SECONDS = 30.0


class Standby(PostgresServer):
    """A hot standby of `primary`, cloned by pg_basebackup at its first `start`.

    It has the primary's settings, then `hot_standby_feedback = on`, from version 17 on
    `sync_replication_slots = on`, then `settings`. It streams through a physical slot of the primary called
    `slot`, made if it is not there. All that PostgresServer says holds, but `stop` the standby before its
    primary: a fast shutdown of the primary waits for it.
    """

    def __init__(
        self,
        primary: PostgresServer,
        folder: Path,
        settings: Mapping[str, str] | None = None,
        *,
        slot: str = "standby",
    ) -> None:
        own = {"hot_standby_feedback": "on", "primary_slot_name": slot}
        if primary.version >= 17:
            own["sync_replication_slots"] = "on"
        super().__init__(folder, primary.version, {**primary.settings, **own, **(settings or {})})
        self.primary = primary
        self.slot = slot

    def catch_up(self) -> None:
        """Wait until everything that is in the primary's WAL now is replayed here.

        Raises HeadraceError if it takes longer than 30 s.
        """
        head = self.primary.psql("SELECT pg_current_wal_flush_lsn()")
        replayed = f"SELECT coalesce(pg_last_wal_replay_lsn() >= '{head}', false)"
        if not _wait(lambda: self.psql(replayed) == "t", CATCH_UP_SECONDS):
            raise HeadraceError(f"The standby in {self.folder} did not reach {head}.")

    def promote(self) -> None:
        """Make it a primary of its own, and return when it takes writes.

        Raises HeadraceError if it takes longer than 30 s.
        """
        if self.psql(f"SELECT pg_promote(true, {PROMOTE_SECONDS:.0f})") != "t":
            raise HeadraceError(f"The standby in {self.folder} was not promoted.")

    def _initdb(self) -> None:
        name = self.slot.replace("'", "''")
        self.primary.psql(
            f"SELECT pg_create_physical_replication_slot('{name}', true) WHERE NOT EXISTS "
            f"(SELECT FROM pg_replication_slots WHERE slot_name = '{name}')"
        )
        fresh = self.folder / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        command = [str(self.bin / "pg_basebackup"), "--pgdata", str(fresh), "--dbname", self.primary.url]
        command += ["--write-recovery-conf", "--checkpoint=fast", "--wal-method=stream", "--no-sync"]
        done = subprocess.run(
            [*command, "--slot", self.slot],
            cwd=self.folder,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise HeadraceError(f"pg_basebackup failed in {self.folder}: {done.stderr.strip()}")
        if self._account.uid:
            for path in (fresh, *fresh.rglob("*")):
                os.chown(path, *self._account, follow_symlinks=False)
        fresh.rename(self.data)
