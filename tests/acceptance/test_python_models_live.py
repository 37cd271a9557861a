"""A Python model in a real pipeline and under every command that works on models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from headrace.cli import main
from headrace.config import Project, load_project
from headrace.errors import UserError
from headrace.pipeline import Pipeline
from headrace.server import read_rows
from headrace.testing.postgres import PostgresServer
from headrace.transform.python.text import outline
from headrace.verify import verify
from pipelines import running, until

MODEL = """
import os
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated

import headrace
from _words import state


@dataclass
class Order:
    order_id: int
    amount: Annotated[Decimal, headrace.contract("DECIMAL(12,2) CHECK (amount >= 0)")]
    status: str | None


@headrace.model(reads="raw.shop.orders", key=["order_id"], timeout="2s")
def orders(row: headrace.Row) -> Order | None:
    if row["status"] == "draft":
        return None
    if row["status"] == "crash":
        os._exit(1)
    return Order(int(row["id"]), Decimal(row["amount"]), state(row["status"]))
"""
WORDS = "def state(text):\n    return text and text.upper()\n"
CASE = """
model = "sales"

[[test]]
name = "orders are read"
given = [
  { id = 1, amount = "1.50", status = "paid" },
  { id = 2, amount = "2", status = "draft" },
  { id = 3, amount = "free", status = "paid" },
]
expect = [{ order_id = 1, amount = 1.50, status = "PAID" }]
quarantine = [{ key = 3, reason = "transform.python" }]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("python") / "pg") as server:
        yield server


def execute(server: PostgresServer, *statements: str) -> None:
    with psycopg.connect(server.url, autocommit=True) as db:
        for statement in statements:
            db.execute(statement.encode())


def rows(project: Project, query: str) -> list[tuple[object, ...]]:
    return [tuple(row) for row in read_rows(project, query)[1]]


def command(capsys: pytest.CaptureFixture[str], project: Project, *words: str, ok: bool = True) -> str:
    capsys.readouterr()
    assert (main([*words, "--project", str(project.root)]) in (0, None)) == ok, capsys.readouterr()
    return capsys.readouterr().out


@pytest.fixture
def project(tmp_path: Path, server: PostgresServer) -> Project:
    execute(
        server,
        "DROP PUBLICATION IF EXISTS headrace_shop",
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active",
        "DROP TABLE IF EXISTS orders",
        "CREATE TABLE orders (id int PRIMARY KEY, amount text, status text)",
        "INSERT INTO orders VALUES (1, '1.5', 'paid'), (2, '2', 'draft'), (3, 'free', 'new')",
        "INSERT INTO orders VALUES (4, '4', 'crash')",
    )
    (tmp_path / "models").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "headrace.toml").write_text(f'[source.shop]\nurl = "{server.url}"\n')
    (tmp_path / "models" / "sales.py").write_text(MODEL)
    (tmp_path / "models" / "_words.py").write_text(WORDS)
    (tmp_path / "tests" / "sales.toml").write_text(CASE)
    return load_project(tmp_path)


def test_a_python_model_is_a_model_like_any_other(
    project: Project, server: PostgresServer, capsys: pytest.CaptureFixture[str]
) -> None:
    file, words = project.models / "sales.py", project.models / "_words.py"
    assert "model sales fits raw.shop.orders" in command(capsys, project, "check")
    Pipeline(project).run_once()
    sales = "SELECT order_id, CAST(amount AS VARCHAR), status FROM sales ORDER BY 1"
    open_ = "SELECT key, reason FROM headrace.quarantine WHERE status = 'quarantined' ORDER BY 1"
    assert rows(project, sales) == [(1, "1.50", "PAID")]
    assert rows(project, open_) == [("3", "transform.python"), ("4", "crash.exit")]

    command(capsys, project, "ci", "--record")
    assert "models/sales.py" in command(capsys, project, "ci")
    command(capsys, project, "test")
    assert "row model" in command(capsys, project, "models", "ls")
    shown = json.loads(command(capsys, project, "models", "show", "sales", "--json"))
    assert [(c["name"], c["type"], c["not_null"]) for c in shown["columns"]] == [
        ("order_id", "BIGINT", True),
        ("amount", "DECIMAL(12,2)", True),
        ("status", "VARCHAR", False),
    ]
    lineage = json.loads(command(capsys, project, "models", "lineage", "sales", "--json"))
    assert {(c["expression"], tuple(c["reads"])) for c in lineage["columns"]} == {("Python", ())}
    mended = MODEL.replace('Decimal(row["amount"])', 'Decimal(row["amount"].replace("free", "0"))')
    off = project.models / "sales.py.off"
    off.write_text(mended)
    previewed = json.loads(command(capsys, project, "preview", "models/sales.py.off", "--json"))
    assert (previewed["rows"], previewed["filtered"], previewed["records"]) == (2, 1, 1)
    off.unlink()

    # What changes in a running pipeline, also in a helper alone, is taken up by it.
    with running(project) as pipeline:
        words.write_text(WORDS.replace("upper", "title"))
        file.write_text(mended)
        wanted = outline(file).version
        assert wanted != shown["version"]
        until(lambda: [text.version for text in pipeline.lanes[0].folder.current()] == [wanted])
        execute(
            server,
            "INSERT INTO orders VALUES (5, '5', 'shipped')",
            "UPDATE orders SET status = 'new' WHERE id = 4",
        )
        until(lambda: len(rows(project, sales)) == 3, what="what came after the change is applied")
        assert rows(project, sales)[1:] == [(4, "4.00", "New"), (5, "5.00", "Shipped")]
        command(capsys, project, "quarantine", "redrive", "--key", "3", "--model", "sales")
    assert rows(project, open_) == []
    command(capsys, project, "rebuild", "sales")
    assert rows(project, sales)[:2] == [(1, "1.50", "Paid"), (3, "0.00", "New")]
    assert main(["rollback", "sales", "--to", shown["version"], "--project", str(project.root)]) == 2
    assert "other helper modules" in capsys.readouterr().err
    words.write_text(WORDS)
    command(capsys, project, "rollback", "sales", "--to", shown["version"])
    assert (file.read_text(), rows(project, sales)[0]) == (MODEL, (1, "1.50", "PAID"))
    report = verify(project)
    assert report.verified, [finding for finding in report.findings if not finding.ok]


def test_a_file_that_cannot_be_imported_suspends_its_model_alone_until_it_is_mended(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    file = project.models / "sales.py"
    file.write_text("import nowhere_to_be_found\n" + MODEL)
    with pytest.raises(UserError, match="Model sales is suspended"):
        Pipeline(project).run_once()
    ((name, state, reason),) = rows(project, "SELECT model, state, reason FROM headrace.models")
    assert (name, state) == ("sales", "suspended"), "nor is its table mirrored in its stead"
    assert "models/sales.py:1: ModuleNotFoundError" in str(reason)
    command(capsys, project, "ci", ok=False)
    assert "ModuleNotFoundError" in command(capsys, project, "check", ok=False)
    file.write_text(MODEL)
    Pipeline(project).run_once()
    assert rows(project, "SELECT state FROM headrace.models") == [("in_sync",)]
    assert rows(project, "SELECT order_id FROM sales") == [(1,)]
