"""The folder of model files while a pipeline runs: what counts as a change, and what does not."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from headrace.destinations.duckdb import DuckDBDestination
from headrace.destinations.postgres import PostgresDestination
from headrace.errors import ModelError, UserError
from headrace.secret import Secret
from headrace.transform.folder import ModelFolder

FOLD = DuckDBDestination(Path("warehouse.duckdb")).folded
GOOD = "SELECT id::BIGINT AS id FROM raw.shop.orders"


def names(folder: ModelFolder) -> set[str]:
    return {text.name for text in folder.current(now=True)}


def test_at_the_start_every_file_must_read(tmp_path: Path) -> None:
    assert ModelFolder(tmp_path / "none", {"shop"}, FOLD).current() == ()
    (tmp_path / "a.sql").write_text(GOOD)
    assert names(ModelFolder(tmp_path, {"shop"}, FOLD)) == {"a"}
    with pytest.raises(UserError, match=r"no \[source.shop\]"):
        ModelFolder(tmp_path, {"other"}, FOLD)
    (tmp_path / "b.sql").write_text("SELEC")
    with pytest.raises(ModelError):
        ModelFolder(tmp_path, {"shop"}, FOLD)


def test_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.sql"
    path.write_text(GOOD)
    folder = ModelFolder(tmp_path, {"shop"}, FOLD)
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
    folder = ModelFolder(tmp_path, {"shop"}, FOLD)
    before = folder.current()
    path.write_text("")
    assert folder.current() is before
    path.write_text(GOOD + " WHERE id > 1")
    assert folder.current() is before
    assert folder.current() is not before


def test_what_does_not_read_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.sql"
    path.write_text(GOOD)
    folder = ModelFolder(tmp_path, {"shop"}, FOLD)
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


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("Orders", "orders", "odels Orders and orders would fill one table"),
        ("main.sales", "sales", "odels main.sales and sales would fill one table"),
        ("sales", "shop.lines", "shop.lines would be a table among the mirrors of source shop"),
        ("sales", "Shop.orders", "Shop.orders would be a table among the mirrors of source shop"),
        ("sales", "headrace.progress", "would fill the schema headrace"),
    ],
)
def test_two_names_of_one_table_are_refused_at_the_start_and_the_newer_one_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: str, second: str, words: str
) -> None:
    logging.getLogger("headrace").propagate = True
    (tmp_path / f"{first}.sql").write_text(GOOD)
    folder = ModelFolder(tmp_path, {"shop"}, FOLD)
    (tmp_path / f"{second}.sql").write_text(GOOD)
    with pytest.raises(ModelError) as caught:
        ModelFolder(tmp_path, {"shop"}, FOLD)
    assert words in str(caught.value)
    assert names(folder) == {first}
    assert words in caplog.text
    (tmp_path / f"{first}.sql").unlink()
    (tmp_path / f"{second}.sql").rename(tmp_path / "other.sql")
    assert names(folder) == {"other"}


def test_a_model_may_have_the_name_of_the_mirror_in_whose_place_it_comes(tmp_path: Path) -> None:
    (tmp_path / "shop.orders.sql").write_text(GOOD)
    assert names(ModelFolder(tmp_path, {"shop"}, FOLD)) == {"shop.orders"}


def test_postgres_tells_names_apart_that_differ_in_case(tmp_path: Path) -> None:
    fold = PostgresDestination(Secret("postgresql://nobody@127.0.0.1:1/x"), schema="mart").folded
    for name in ("Orders", "orders", "main.orders"):
        (tmp_path / f"{name}.sql").write_text(GOOD)
    assert names(ModelFolder(tmp_path, {"shop"}, fold)) == {"Orders", "orders", "main.orders"}
    (tmp_path / "mart.orders.sql").write_text(GOOD)
    with pytest.raises(ModelError, match=r"Models mart\.orders and orders would fill one table"):
        ModelFolder(tmp_path, {"shop"}, fold)


def test_a_source_cannot_be_called_as_a_schema_of_our_own(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Source headrace would fill the schema headrace"):
        ModelFolder(tmp_path, {"headrace"}, FOLD)
