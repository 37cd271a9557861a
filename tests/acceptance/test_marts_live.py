"""Marts in a running pipeline, over two sources, on a real Postgres."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from headrace.cli import main
from headrace.config import load_project
from headrace.pipeline import Pipeline
from headrace.testing.postgres import PostgresServer
from pipelines import running, until

MART = """/* headrace
materialize = "table"
refresh_every = "0s"
*/
SELECT s.name, count(*) AS orders
FROM shop.orders AS o JOIN crm.people AS s ON s.id = o.person GROUP BY ALL"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("pg")) as made:
        yield made


def test_a_mart_follows_two_sources_and_says_what_it_is_of(
    server: PostgresServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = {}
    for name, table in (
        ("shop", "orders (id int PRIMARY KEY, person int)"),
        ("crm", "people (id int PRIMARY KEY, name text)"),
    ):
        server.psql(f"CREATE DATABASE {name}")
        urls[name] = server.url.removesuffix("postgres") + name
        with psycopg.connect(urls[name], autocommit=True) as db:
            db.execute(f"CREATE TABLE {table}")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "per_person.sql").write_text(MART)
    (tmp_path / "models" / "total.sql").write_text("SELECT sum(orders)::INT AS n FROM per_person")
    settings = (
        f'[source.{name}]\nurl = "{url}"\nslot = "s_{name}"\nheartbeat = "500ms"\n'
        for name, url in urls.items()
    )
    (tmp_path / "headrace.toml").write_text("".join(settings))
    project = load_project(tmp_path)
    shop, crm = (psycopg.connect(url, autocommit=True) for url in urls.values())
    crm.execute("INSERT INTO people VALUES (1, 'Ada'), (2, 'Bob')")

    def rows(pipeline: Pipeline, query: str) -> list[tuple[object, ...]]:
        try:
            (found,) = pipeline.lanes[0].destination.read([query])
        except Exception:
            return []
        return sorted(tuple(row.values()) for row in found.to_pylist())

    with running(project) as pipeline:
        shop.execute("INSERT INTO orders SELECT g, 1 + g % 2 FROM generate_series(1, 5) g")
        until(lambda: rows(pipeline, "FROM total") == [(5,)], what="never made")
        crm.execute("UPDATE people SET name = 'Beth' WHERE id = 2")
        until(
            lambda: rows(pipeline, "FROM per_person") == [("Ada", 2), ("Beth", 3)],
            what="a change is not seen",
        )
        assert main(["status", "--json", "--project", str(tmp_path)]) == 0
        marts = {mart["name"]: mart for mart in json.loads(capsys.readouterr().out)["marts"]}
        assert set(marts["per_person"]["positions"]) == {"shop", "crm"}
        assert marts["per_person"]["rows"] == 2
        assert (marts["total"]["state"], marts["total"]["positions"]) == ("ok", {})
        assert main(["status", "--project", str(tmp_path)]) == 0
        assert "per_person" in capsys.readouterr().out
    shop.execute("DELETE FROM orders WHERE id > 1")
    Pipeline(load_project(tmp_path)).run_once()
    assert main(["query", "FROM total", "--csv", "--project", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "n\n1\n"
    shop.close()
    crm.close()
