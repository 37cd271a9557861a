"""What becomes of an announcement that the source refuses."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import psycopg
import pytest

from headrace.change import TableId
from headrace.sources.postgres import catalog_watch
from headrace.testing.memory_log import MemoryLog


class _Refusing:
    """A connection whose role may read no table."""

    @staticmethod
    def transaction() -> Any:
        return nullcontext()

    @staticmethod
    def execute(statement: bytes, *_: object) -> None:
        if statement.startswith(b"SELECT FROM"):
            raise psycopg.errors.InsufficientPrivilege("permission denied for table t")


def test_a_table_that_may_be_read_no_longer_is_announced_with_a_later_look_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(catalog_watch, "amend_own", lambda *_: None)
    db: Any = _Refusing()
    log: Any = MemoryLog("shop")
    config: Any = None
    assert not catalog_watch.announce(db, config, log, TableId("public", "t"))
