"""What becomes of a new table that cannot be taken in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from headrace.change import TableId
from headrace.config import load_project
from headrace.sources.postgres import catalog_watch, source
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
    monkeypatch.setattr(source, "catalog_changes", lambda *_: found)
    shop._look_at_catalog(log)  # type: ignore[arg-type]
    assert shop._gone == {table: 1 << 40}
    found.clear()
    shop._look_at_catalog(log)  # type: ignore[arg-type]
    assert not shop._gone, "its last changes would be left out when it goes"


def test_what_cannot_be_announced_is_announced_with_a_later_look_and_what_could_is_not_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Functions of the catalog that meet a relation which is being dropped fail with an internal error; a
    connection may be lost in the midst of a look."""
    (tmp_path / "headrace.toml").write_text('[source.shop]\nurl = "postgresql://u@h/d"\n')
    (config,) = load_project(tmp_path).sources
    shop, log = source.PostgresSource(config, 1 << 20, 0.0), MemoryLog("shop")
    tables = [TableId("public", name) for name in ("a", "b", "c")]
    seen = {table: catalog_watch._Table(oid, 1, "", "[]") for oid, table in enumerate(tables)}
    monkeypatch.setattr(source, "captured_tables", lambda _: tables)
    monkeypatch.setattr(catalog_watch, "_read", lambda *_: dict(seen))
    monkeypatch.setattr(source.PostgresSource, "_catalog", lambda _: None)
    monkeypatch.setattr(source, "in_recovery", lambda _: False)
    asked = list[str]()
    fails = dict[str, Exception]()

    def announce(_db: object, _config: object, _log: object, table: TableId) -> bool:
        asked.append(table.name)
        if table.name in fails:
            raise fails[table.name]
        return table.name not in locked

    def look() -> str:
        asked.clear()
        shop._look_at_catalog(log)  # type: ignore[arg-type]
        return "".join(asked)

    monkeypatch.setattr(source, "announce", announce)
    locked = {"a"}
    assert not look(), "all that is found at first is taken note of"
    for table in tables:
        seen[table] = replace(seen[table], key="other")
    fails["c"] = psycopg.errors.InternalError_("could not open relation with OID 1")
    assert look() == "abc"
    fails["c"] = psycopg.OperationalError("the connection is lost")
    with pytest.raises(psycopg.OperationalError):
        look()
    assert "".join(asked) == "ac", "b is told"
    fails.clear()
    locked.clear()
    assert look() == "ac"
    assert not look()


def test_a_table_is_not_announced_while_the_server_meets_one_that_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def amend(*_: object) -> None:
        raise psycopg.errors.InternalError_("could not open relation with OID 1")

    (tmp_path / "headrace.toml").write_text('[source.shop]\nurl = "postgresql://u@h/d"\n')
    (config,) = load_project(tmp_path).sources
    monkeypatch.setattr(catalog_watch, "amend_own", amend)
    assert not catalog_watch.announce(None, config, MemoryLog("shop"), TableId("public", "t"))  # type: ignore[arg-type]
