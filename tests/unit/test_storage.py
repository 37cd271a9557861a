"""How many bytes the layers take, and how long the disk lasts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from entries import rows, schema, shape
from headrace.change import TableId
from headrace.cli.storage import disk_words, forecast, storage, storage_words
from headrace.config import load_project
from headrace.log.sqlite import SQLiteLog
from headrace.staging.delta import DeltaStaging

A, B = TableId("public", "a"), TableId("sales", "b")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SQLiteLog]:
    with closing(SQLiteLog(tmp_path / "log.db")) as made:
        for table in (A, B):
            made.append([schema(1, shape(table, "id"))])
        for commit in range(2, 20):
            made.append([rows(shape(A, "id"), [("c", commit, 1, (f"{commit}",))])])
        made.append([rows(shape(B, "id"), [("c", 20, 1, ("x",))])])
        yield made


@pytest.fixture
def staging(tmp_path: Path, log: SQLiteLog) -> DeltaStaging:
    made = DeltaStaging(tmp_path / "staging", "shop", log.id)
    for item in log.read(0, 1 << 20):
        made.write([item])
    return made


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    now = time.time() + seconds
    monkeypatch.setattr("headrace.cli.storage.time.time", lambda: now)


def test_bytes_by_layer_and_table(log: SQLiteLog, staging: DeltaStaging) -> None:
    found = storage(log, staging)
    raw = {name: sum(f.stat().st_size for f in path.glob("*.parquet")) for name, path in (
        ("public.a", staging.tables()[A].path), ("sales.b", staging.tables()[B].path)
    )}  # fmt: skip
    assert found["tables"] == raw
    assert (found["log"], found["raw"]) == (log.size(), sum(raw.values()))
    assert (found["log_per_day"], found["raw_per_day"]) == (None, None), "a moment tells nothing of a day"
    assert "a day" not in storage_words(found)


def test_a_day_is_forecast_from_what_there_is_of_the_last(
    log: SQLiteLog, staging: DeltaStaging, monkeypatch: pytest.MonkeyPatch
) -> None:
    later(monkeypatch, 3600)
    found = storage(log, staging)
    assert found["log_per_day"] == pytest.approx(24 * log.bytes_between(0, log.end().offset), rel=0.01)
    assert found["raw_per_day"] == pytest.approx(24 * found["raw"], rel=0.01)
    assert "a day" in storage_words(found)
    later(monkeypatch, 3 * 86_400)
    assert storage(log, staging)["raw_per_day"] in (None, 0), "nothing came in the last day"


def test_a_log_that_is_trimmed_grows_no_more(
    log: SQLiteLog, staging: DeltaStaging, monkeypatch: pytest.MonkeyPatch
) -> None:
    later(monkeypatch, 3600)
    log.trim(5, frozenset())
    assert storage(log, staging)["log_per_day"] == 0
    assert storage(log, staging)["raw_per_day"] > 0


def test_the_disk_lasts_for_what_all_sources_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "headrace.toml").write_text('[source.shop]\nurl = "postgresql://u@h/d"\n')
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000 << 20))
    project = load_project(tmp_path)
    grows = {"log_per_day": 3 << 20, "raw_per_day": 2 << 20}
    found = forecast(project, [grows, grows, None, {"log_per_day": None, "raw_per_day": None}])
    assert found == {"free": 1000 << 20, "per_day": 10 << 20, "days": 100.0}
    assert disk_words(found, 1 << 20) == "destination 1.0 MiB; 1000.0 MiB free, enough for 100 days"
    assert forecast(project, [None])["days"] is None
    assert forecast(project, [{"log_per_day": 0, "raw_per_day": 0}])["days"] is None
