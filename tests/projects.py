"""A small project of two tables and one model, and commands run on it in this process."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from headrace.cli import main
from headrace.config import Project, load_project
from headrace.testing.postgres import PostgresServer

SALES = """/* headrace
key = ["order_id"]
[contract]
amount = "DECIMAL(12,2) NOT NULL CHECK (amount >= 0)"
*/
SELECT id::BIGINT AS order_id, upper(status) AS status, amount::DECIMAL(12,2) AS amount
FROM raw.shop.orders WHERE status <> 'draft'
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str

    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


def here(*arguments: str, cwd: Path) -> Done:
    """A command in this process, which saves its imports."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*arguments, "--project", str(cwd)])
    return Done(code, out.getvalue(), err.getvalue())


def sql(server: PostgresServer, *statements: str) -> None:
    with psycopg.connect(server.url, autocommit=True) as db:
        for statement in statements:
            db.execute(statement.encode())


def sales_project(folder: Path, server: PostgresServer) -> Project:
    """Fill two tables anew, and make a project with one model of the first."""
    sql(
        server,
        "DROP PUBLICATION IF EXISTS headrace_shop",
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active",
        "DROP TABLE IF EXISTS orders, customers, visits",
        "CREATE TABLE orders (id int PRIMARY KEY, status text NOT NULL, amount text)",
        "CREATE TABLE customers (id int PRIMARY KEY, name text)",
        "INSERT INTO orders VALUES (1, 'new', '1.50'), (2, 'draft', '2'), (3, 'paid', 'three')",
        "INSERT INTO customers VALUES (1, 'Ada')",
    )
    (folder / "models").mkdir()
    (folder / "headrace.toml").write_text(f'[source.shop]\nurl = "{server.url}"\n')
    (folder / "models" / "sales.sql").write_text(SALES)
    return load_project(folder)
