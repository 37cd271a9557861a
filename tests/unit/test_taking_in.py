"""What becomes of a new table that cannot be taken in."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from headrace.change import TableId
from headrace.config import load_project
from headrace.sources.postgres import source
from headrace.sources.postgres.catalog_watch import CatalogChange
from headrace.testing.memory_log import MemoryLog


@pytest.mark.parametrize("error", [psycopg.errors.UndefinedTable("no relation t"), KeyError("t")])
def test_a_new_table_that_is_dropped_while_it_is_published_does_not_stop_its_source(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> bool:
        raise error

    (tmp_path / "headrace.toml").write_text('[source.shop]\nurl = "postgresql://u@h/d"\n')
    (config,) = load_project(tmp_path).sources
    shop, log = source.PostgresSource(config, 1 << 20, 0.0), MemoryLog("shop")
    monkeypatch.setattr(source.PostgresSource, "_catalog", lambda _: None)
    monkeypatch.setattr(source, "check_publication", lambda *_: None)
    monkeypatch.setattr(source, "publish", gone)
    assert "dropped" in shop._obstacle(log, TableId("public", "t"))  # type: ignore[arg-type]


def test_a_table_that_has_its_name_back_is_waited_for_anew_when_it_goes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "headrace.toml").write_text('[source.shop]\nurl = "postgresql://u@h/d"\n')
    (config,) = load_project(tmp_path).sources
    shop, log, table = source.PostgresSource(config, 1 << 20, 0.0), MemoryLog("shop"), TableId("public", "t")
    found = [CatalogChange("gone", table)]
    monkeypatch.setattr(source.PostgresSource, "_catalog", lambda _: None)
    monkeypatch.setattr(source, "in_recovery", lambda _: False)
    monkeypatch.setattr(source, "emit", lambda *_: 1 << 40)
    monkeypatch.setattr(source, "catalog_changes", lambda *_: (found, lambda: None))
    shop._look_at_catalog(log)  # type: ignore[arg-type]
    assert shop._gone == {table: 1 << 40}
    found.clear()
    shop._look_at_catalog(log)  # type: ignore[arg-type]
    assert not shop._gone, "its last changes would be left out when it goes"


def test_what_is_told_while_a_relation_goes_is_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Functions of the catalog that meet a relation which is being dropped fail with an internal error."""
    (tmp_path / "headrace.toml").write_text('[source.shop]\nurl = "postgresql://u@h/d"\n')
    (config,) = load_project(tmp_path).sources
    shop, log, table = source.PostgresSource(config, 1 << 20, 0.0), MemoryLog("shop"), TableId("public", "t")
    announced, noted = list[TableId](), list[TableId]()

    def announce(*what: object) -> bool:
        announced.append(table)
        if len(announced) == 1:
            raise psycopg.errors.InternalError_("could not open relation with OID 1")
        return True

    monkeypatch.setattr(source.PostgresSource, "_catalog", lambda _: None)
    monkeypatch.setattr(source, "in_recovery", lambda _: False)
    monkeypatch.setattr(source, "announce", announce)
    found = [CatalogChange("altered", table)]
    monkeypatch.setattr(source, "catalog_changes", lambda *_: (found, lambda: noted.append(table)))
    shop._look_at_catalog(log)  # type: ignore[arg-type]
    assert (announced, noted) == ([table], [])
    shop._look_at_catalog(log)  # type: ignore[arg-type]
    assert (announced, noted) == ([table, table], [table])
