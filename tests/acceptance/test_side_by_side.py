"""Two environments of one project over one database: neither touches what is the other's."""

from __future__ import annotations

from pathlib import Path

from headrace.config import load_project
from headrace.pipeline import Pipeline
from headrace.server import read_rows
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify
from projects import SALES, here, sales_project, sql


def test_two_environments_stand_side_by_side(tmp_path: Path) -> None:
    with PostgresServer(tmp_path / "pg") as server:
        folder = tmp_path / "project"
        folder.mkdir()
        prod = sales_project(folder, server)
        Pipeline(prod).run_once()
        # What would be shared is refused: the destination is another log's.
        (folder / "headrace.dev.toml").write_text('[source.shop]\nslot = "dev"\npublication = "dev"\n')
        done = here("run", "--once", "--env", "dev", cwd=folder)
        assert done.code == 2
        assert "was filled from another log" in done.err
        with (folder / "headrace.dev.toml").open("a") as file:
            file.write('[destination]\npath = "dev.duckdb"\n')
        sql(server, "INSERT INTO orders VALUES (4, 'paid', '4')")
        (folder / "models" / "sales.sql").write_text(SALES.replace("upper", "lower"))
        assert here("run", "--once", "--env", "dev", cwd=folder).code == 0
        dev = load_project(folder, env="dev")
        query = "SELECT order_id, status FROM sales ORDER BY 1"
        assert [tuple(row) for row in read_rows(dev, query)[1]] == [(1, "new"), (4, "paid")]
        assert [tuple(row) for row in read_rows(prod, query)[1]] == [(1, "NEW")]
        assert verify(dev).verified
