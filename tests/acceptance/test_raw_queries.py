"""`headrace query` over raw tables, beside a running pipeline, next to tables of the destination."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

import headrace
from headrace.config import load_project
from headrace.pipeline import Pipeline
from headrace.server import read
from headrace.testing.postgres import PostgresServer
from pipelines import running, until
from projects import here, sales_project, sql


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("raw") / "pg") as running_server:
        yield running_server


@pytest.mark.parametrize("type_", ["duckdb", "postgres"])
def test_raw_stands_beside_the_destination_as_of_where_that_stands(
    tmp_path: Path, server: PostgresServer, type_: str
) -> None:
    project = sales_project(tmp_path, server)
    if type_ == "postgres":
        sql(server, "DROP DATABASE IF EXISTS mart", "CREATE DATABASE mart")
        text = (tmp_path / "headrace.toml").read_text()
        url = re.sub(r"/postgres(\?|$)", r"/mart\1", server.url)
        (tmp_path / "headrace.toml").write_text(f'{text}[destination]\ntype = "postgres"\nurl = "{url}"\n')
        project = load_project(tmp_path)
    Pipeline(project).run_once()
    offset = read(project, ['SELECT "offset" FROM headrace.progress'])[0].to_pylist()[0]["offset"]
    joined = (
        "SELECT o.id, o.amount, s.status, s.amount AS sold FROM raw.shop.orders o "
        "LEFT JOIN sales s ON s.order_id = o.id ORDER BY o.id"
    )
    with running(project) as pipeline:
        sql(server, "UPDATE orders SET amount = '3' WHERE id = 3", "DELETE FROM orders WHERE id = 2")
        until(
            lambda: (
                here("query", "SELECT * FROM raw.shop.orders", "--json", cwd=tmp_path).out.count("\n") == 2
            )
        )
        until(lambda: "3.00" in here("query", "SELECT amount FROM sales", cwd=tmp_path).out)
        assert here("query", joined, "--json", cwd=tmp_path).objects() == [
            {"id": 1, "amount": "1.50", "status": "NEW", "sold": 1.50},
            {"id": 3, "amount": "3", "status": "PAID", "sold": 3.00},
        ]
        before = here(
            "query", "SELECT id FROM raw.shop.orders", "--as-of", str(offset), "--json", cwd=tmp_path
        )
        assert sorted(row["id"] for row in before.objects()) == [1, 2, 3]
        changes = here(
            "query", f"SELECT _op, id FROM changes.shop.orders WHERE _offset > {offset} ORDER BY _commit",
            "--csv", cwd=tmp_path,
        )  # fmt: skip
        assert changes.out == "_op,id\nu,3\nd,2\n"
        refused = here("query", joined, "--as-of", str(offset), cwd=tmp_path)
        assert refused.code == 2
        assert '"sales" is only there as it is now' in refused.err
        with pipeline.lanes[0].applying:  # staging goes on, the destination does not
            sql(server, "INSERT INTO orders VALUES (4, 'new', '4')")
            until(
                lambda: "4" in here("query", "SELECT max(id) FROM raw.shop.orders", "--csv", cwd=tmp_path).out
            )
            assert len(here("query", joined, "--json", cwd=tmp_path).objects()) == 2
    opened = headrace.open_project(tmp_path)
    assert opened.tables() == ["shop.customers", "shop.orders"]
    assert opened.raw("shop.orders").read_all().num_rows == 3


def test_what_the_page_on_staging_shows_runs(
    tmp_path: Path, server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pipeline(sales_project(tmp_path, server)).run_once()
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "staging.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        shown: dict[str, object] = {}
        exec(block.replace("2026-11-28T10:00", datetime.now(UTC).isoformat()), shown)
        if "now" in shown:
            assert sorted(shown["now"]["id"]) == [1, 2, 3]  # type: ignore[index]
