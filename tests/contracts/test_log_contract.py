"""The logs, SQLite's and the double in memory, keep the contract of a log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("headrace.testing.log_suite", "headrace.testing.log_retention_suite")

from headrace.change import Offset  # noqa: E402
from headrace.log import proof  # noqa: E402
from headrace.log.sqlite import SQLiteLog  # noqa: E402
from headrace.testing.log_suite import LogSuite, SharedLogSuite  # noqa: E402
from headrace.testing.memory_log import MemoryLog  # noqa: E402

STEPS = [("log.segment.sync", False), ("log.append.commit", False), ("log.append.committed", True)]


class SQLiteLogs:
    steps = STEPS
    trim_steps = ("log.trim.committed",)

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._logs: list[SQLiteLog] = []

    def make(self) -> SQLiteLog:
        folder = self._folder / str(len(self._logs))
        folder.mkdir()
        return self._open(folder / "log.db")

    def reopen(self, log: SQLiteLog) -> SQLiteLog:
        log.close()
        return self._open(log.path)

    def verify(self, log: SQLiteLog) -> None:
        verified = proof.verify(log)
        assert (verified.begin, verified.end) == (log.begin(), log.end())

    def cut_off(self, log: SQLiteLog, through: Offset) -> SQLiteLog:
        with log._db.transaction():
            db = log._db.connection()
            db.execute('DELETE FROM entries WHERE "offset" > ?', (through,))
            db.execute('DELETE FROM filters WHERE "offset" > ?', (through,))
        return self.reopen(log)

    def forge(self, log: SQLiteLog) -> SQLiteLog:
        forged = self.make()
        forged.set_note("log.id", log.id)
        return self.reopen(forged)

    def code(self, log: SQLiteLog, *, read_only: bool) -> str:
        return (
            "from pathlib import Path; from headrace.log.sqlite import SQLiteLog\n"
            f"log = SQLiteLog(Path({str(log.path)!r}), read_only={read_only})"
        )

    def close(self) -> None:
        for log in self._logs:
            log.close()

    def _open(self, path: Path) -> SQLiteLog:
        log = SQLiteLog(path, segment_bytes=20_000)
        self._logs.append(log)
        return log


class MemoryLogs:
    steps = STEPS
    trim_steps = ("log.trim.committed",)

    def make(self) -> MemoryLog:
        return MemoryLog()

    def reopen(self, log: MemoryLog) -> MemoryLog:
        return log.reopened()

    def verify(self, log: MemoryLog) -> None:
        assert log.verify() == log.end()

    def cut_off(self, log: MemoryLog, through: Offset) -> MemoryLog:
        del log._items[through:]
        return log

    def forge(self, log: MemoryLog) -> MemoryLog:
        return MemoryLog(log_id=log.id)


class TestSQLiteLog(SharedLogSuite):
    @pytest.fixture
    def logs(self, tmp_path: Path) -> Iterator[SQLiteLogs]:
        made = SQLiteLogs(tmp_path)
        yield made
        made.close()


class TestMemoryLog(LogSuite):
    @pytest.fixture
    def logs(self) -> MemoryLogs:
        return MemoryLogs()
