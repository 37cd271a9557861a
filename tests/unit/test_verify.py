"""What `headrace verify` compares with a log that retention trims meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from entries import rows, schema, shape
from headrace.change import LoggedEntry, Mark, Offset, TableId
from headrace.conservation import check_ledger
from headrace.log.sqlite import SQLiteLog
from headrace.verify import _check_progress

SHAPE = shape(TableId("public", "orders"), "id", "status")


class TrimmedMeanwhile(SQLiteLog):
    """A log that is trimmed once, right behind the first answer to `begin`, `headers` or `mark`."""

    meanwhile: Callable[[], object] | None = None

    def _answered(self) -> None:
        trim, self.meanwhile = self.meanwhile, None
        if trim is not None:
            trim()

    def begin(self) -> Mark:
        answer = super().begin()
        self._answered()
        return answer

    def mark(self, offset: Offset) -> Mark | None:
        answer = super().mark(offset)
        self._answered()
        return answer

    def headers(self, after: Offset, through: Offset) -> Iterator[LoggedEntry]:
        yield from list(super().headers(after, through))
        self._answered()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[TrimmedMeanwhile]:
    with closing(TrimmedMeanwhile(tmp_path / "shop.db")) as made:
        made.append([schema(10, SHAPE)])
        for commit in range(20, 70, 10):
            made.append([rows(SHAPE, [("c", commit, i, (str(commit + i), "new")) for i in (1, 2)])])
        yield made


def lane(log: SQLiteLog) -> Any:
    return SimpleNamespace(log=log, config=SimpleNamespace(name="shop"))


def ledger(*spans: tuple[int, int, int]) -> list[dict[str, Any]]:
    return [
        {
            "kind": "apply",
            "after": after,
            "through": through,
            "read": read,
            "parts": read,
            "quarantined": 0,
            "waiting": 0,
            "blocked": 0,
        }
        for after, through, read in spans
    ]


def test_a_ledger_closes_while_the_log_is_trimmed(log: TrimmedMeanwhile) -> None:
    spans = ledger((0, 2, 2), (2, 3, 2), (3, 4, 2), (4, 6, 4))
    for through in (0, 3, 4):
        log.meanwhile = partial(log.trim, through)
        found = check_ledger(log, SHAPE.table, 6, spans, [])
        assert found.closes, found.detail
        assert log.begin().offset == through
    wrong = ledger((0, 2, 2), (2, 3, 2), (3, 4, 2), (4, 6, 3))
    assert not check_ledger(log, SHAPE.table, 6, wrong, []).closes
    assert not check_ledger(log, SHAPE.table, 6, ledger((0, 2, 2), (4, 5, 2)), []).closes


def test_progress_that_retention_passes_meanwhile_is_no_difference(log: TrimmedMeanwhile) -> None:
    progress = [log.mark(3)._asdict()]  # type: ignore[union-attr]
    found = _check_progress(lane(log), progress, 0)
    assert found.ok
    assert "with the same hash" in found.detail
    log.trim(5)
    found = _check_progress(lane(log), progress, 2)
    assert found.ok
    assert "trimmed meanwhile" in found.detail
    assert not _check_progress(lane(log), progress, 5).ok, "an old copy"
    log.meanwhile = lambda: log.trim(6)
    assert not _check_progress(lane(log), [{**progress[0], "offset": 5}], 0).ok, "another hash"
