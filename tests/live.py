"""A project over one live Postgres, whose models a test writes."""

from __future__ import annotations

from pathlib import Path

import psycopg

from headrace.config import Project, load_project
from headrace.pipeline import Pipeline
from headrace.server import read_rows
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify


class LiveProject:
    """Captures all tables of a server as the source `shop`, after `statements` have made them anew."""

    def __init__(self, folder: Path, server: PostgresServer, *statements: str) -> None:
        self.server = server
        self.sql(
            "DROP PUBLICATION IF EXISTS headrace_shop",
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active",
            *statements,
        )
        (folder / "models").mkdir(parents=True)
        (folder / "headrace.toml").write_text(f'[source.shop]\nurl = "{server.url}"\n')
        self.project: Project = load_project(folder)

    def model(self, sql: str, name: str = "m", header: str = "") -> None:
        path = self.project.models / f"{name}.sql"
        path.unlink(missing_ok=True)
        path.write_text(f'/* headrace\nkey = ["id"]\n{header}\n*/\n{sql}\n')

    def sql(self, *statements: str) -> None:
        with psycopg.connect(self.server.url, autocommit=True) as db:
            for statement in statements:
                db.execute(statement.encode())

    def run(self) -> None:
        Pipeline(self.project).run_once()

    def rows(self, query: str) -> list[tuple[object, ...]]:
        return [tuple(row) for row in read_rows(self.project, query)[1]]

    def assert_verified(self) -> None:
        report = verify(self.project)
        assert report.verified, [finding for finding in report.findings if not finding.ok]
