"""The folder of model files while a pipeline runs: what counts as a change, and what does not."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from headrace.errors import ModelError, UserError
from headrace.transform.folder import ModelFolder

GOOD = "SELECT id::BIGINT AS id FROM raw.shop.orders"


def names(folder: ModelFolder) -> set[str]:
    return {text.name for text in folder.current(now=True)}


def test_at_the_start_every_file_must_read(tmp_path: Path) -> None:
    assert ModelFolder(tmp_path / "none", {"shop"}).current() == ()
    (tmp_path / "a.sql").write_text(GOOD)
    assert names(ModelFolder(tmp_path, {"shop"})) == {"a"}
    with pytest.raises(UserError, match=r"no \[source.shop\]"):
        ModelFolder(tmp_path, {"other"})
    (tmp_path / "b.sql").write_text("SELEC")
    with pytest.raises(ModelError):
        ModelFolder(tmp_path, {"shop"})


def test_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.sql"
    path.write_text(GOOD)
    folder = ModelFolder(tmp_path, {"shop"})
    before = folder.current(now=True)
    path.touch()
    assert folder.current(now=True) is before
    path.write_text(GOOD + " WHERE id > 1")
    assert folder.current() is before
    (after,) = folder.current(now=True)
    assert after.version != before[0].version
    (tmp_path / "b.sql").write_text(GOOD)
    assert names(folder) == {"a", "b"}
    path.unlink()
    assert names(folder) == {"b"}


def test_without_haste_a_change_counts_when_seen_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.transform.folder._LOOK_EVERY", 0.0)
    path = tmp_path / "a.sql"
    path.write_text(GOOD)
    folder = ModelFolder(tmp_path, {"shop"})
    before = folder.current()
    path.write_text("")
    assert folder.current() is before
    path.write_text(GOOD + " WHERE id > 1")
    assert folder.current() is before
    assert folder.current() is not before


def test_what_does_not_read_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.sql"
    path.write_text(GOOD)
    folder = ModelFolder(tmp_path, {"shop"})
    before = folder.current()
    # Configured by a run in this process, the loggers may not propagate.
    alerts = logging.getLogger("headrace.alert")
    alerts.addHandler(caplog.handler)
    try:
        path.write_text("SELEC")
        (tmp_path / "b.sql").write_text(GOOD.replace("shop", "nowhere"))
        assert folder.current(now=True) == before
        path.touch()
        assert folder.current(now=True) == before
    finally:
        alerts.removeHandler(caplog.handler)
    said = {record.getMessage() for record in caplog.records}
    assert len(said) == 2
    assert any("a cannot be read, the version before stays in force: a.sql:1" in words for words in said)
    assert any("b cannot be read, it is left out" in words for words in said)
    path.write_text(GOOD)
    (after,) = folder.current(now=True)
    assert after == before[0]
