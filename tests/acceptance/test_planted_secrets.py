"""Secrets planted in every place that a value can be in are found in no output but the data itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from headrace.cli.run import OneLine
from headrace.config import load_project
from headrace.pipeline import Pipeline
from headrace.server import read_rows
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify
from projects import here

SECRET = "s3cr3t"
"""In each planted value."""
PYTHON = """
import headrace
from dataclasses import dataclass

@dataclass
class Out:
    id: int
    mail: str

@headrace.model(reads="raw.shop.people", pii=["mail"])
def pythonic(row: headrace.Row) -> Out:
    if not row["born"][0].isdigit():
        raise ValueError(f"what of {row['mail']} born {row['born']}?")
    return Out(int(row["id"]), {}[row["mail"]] if row["id"] == "3" else row["mail"])
"""
TYPED = """/* headrace
pii = ["mail", "born", "amount", "made"]
[contract]
mail = "CHECK (mail NOT LIKE 'b@%')"
*/
SELECT id::INT AS id, mail, born::DATE AS born, strptime(mail || born, '%Y') AS made,
  CASE WHEN amount = '' THEN mail::INT::VARCHAR ELSE amount END::DECIMAL(9,2) AS amount FROM raw.shop.people
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("secrets") / "pg") as started:
        yield started


def planted(root: Path, server: PostgresServer) -> str:
    """Make tables and a project with secrets in them; returns the text of a model that is mended later."""
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute(
            "CREATE TABLE people (id int PRIMARY KEY, mail text, born text, amount text);"
            "CREATE TABLE logins (mail text PRIMARY KEY, day text); CREATE TABLE bare (mail text, n text);"
            "ALTER TABLE bare REPLICA IDENTITY FULL;"
            "INSERT INTO people VALUES (1, 'a@s3cr3t-a', '2001-01-01', '1'),"
            "(2, 'b@s3cr3t-b', 's3cr3t-born', '2'),"
            "(3, 'c@s3cr3t-c', '2001-01-01', 's3cr3t-amount'), (4, 'd@s3cr3t-d', '2001-01-01', ''),"
            "(5, 's3cr3t'', s3cr3t: x \"s3cr3t\" \\n s3cr3t', '2001-01-01', '3');"
            "INSERT INTO logins VALUES ('e@s3cr3t-e', 'x'); INSERT INTO bare VALUES ('f@s3cr3t-f', 'x')"
        )
    (root / "models").mkdir(parents=True)
    url = server.url.replace("postgres@", "postgres:s3cr3t-pw@")
    (root / "headrace.toml").write_text(
        f'[source.shop]\nurl = "{url}"\npii = ["people.mail", "people.born", "people.amount", "*.mail"]\n'
    )
    strict = "SELECT mail, day::INT AS day FROM raw.shop.logins"
    (root / "models" / "typed.sql").write_text(TYPED)
    (root / "models" / "logged.sql").write_text(strict)
    (root / "models" / "bared.sql").write_text("SELECT mail, n::INT AS n FROM raw.shop.bare")
    (root / "models" / "pythonic.py").write_text(PYTHON)
    return strict


def test_what_is_planted_is_found_in_the_log_in_staging_and_in_the_tables_alone(
    tmp_path: Path, server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    root = tmp_path / "project"
    strict = planted(root, server)
    Pipeline(load_project(root)).run_once()
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute("UPDATE people SET mail = 'g@s3cr3t-g' WHERE id = 1; DELETE FROM logins")
        db.execute("INSERT INTO logins VALUES ('h@s3cr3t-h', 'x')")
    Pipeline(load_project(root)).run_once()
    loose = strict.replace("day::INT", "TRY_CAST(day AS INT)")
    (root / "models" / "logged.sql").write_text(loose)

    def out(*command: str) -> str:
        done = here(*command, cwd=root)
        assert "Headrace met an error" not in done.err, (command, done.err)
        return done.out + done.err

    records = read_rows(load_project(root), "SELECT id::VARCHAR, key, model FROM headrace.quarantine")[1]
    records = [tuple(map(str, row)) for row in records]
    assert {model for _, _, model in records} == {"typed", "logged", "bared", "pythonic"}
    (record,) = (id_ for id_, key, model in records if (model, key) == ("typed", "2"))
    patched = out("quarantine", "patch", record, "mail=p@s3cr3t-p", "--reason", "test")
    assert "s3cr3t" not in patched
    outputs = {
        command: out(*command)
        for command in [
            ("status",), ("status", "--json"), ("check",), ("ci",), ("models", "ls"),
            ("models", "show", "typed"), ("quarantine", "list"), ("quarantine", "list", "--json"),
            *(("quarantine", "show", id_, *more) for id_, _, _ in records for more in ((), ("--json",))),
            ("quarantine", "issues"), ("quarantine", "redrive", "--all", "--dry-run"),
            ("quarantine", "export", "--format", "json", "--output", str(tmp_path / "records.json")),
            ("alerts", "list"),
            ("preview", "typed"), ("preview", "logged"), ("preview", "pythonic", "--json"),
            ("rebuild", "logged", "--dry-run"), ("rebuild", "typed", "--as-of", "3"), ("tables", "list"),
            ("log", "tail"), *(("log", "show", str(n)) for n in range(1, 20)),
            *(("log", "show", str(n), "--json") for n in range(1, 20)),
            ("log", "find", "--key", "people:1"), ("log", "find", "--key", "people:1", "--json"),
            ("staging", "history", "people"), ("staging", "ls"),
        ]
    }  # fmt: skip
    outputs["the export",] = (tmp_path / "records.json").read_text()
    assert '"key":"***"' in outputs["the export",].replace(" ", "")
    outputs["verify",] = str(verify(load_project(root)).to_dict())
    found = {command: text for command, text in outputs.items() if SECRET in text}
    assert not found
    # What masks nothing proves nothing.
    assert "***" in outputs["preview", "typed"] + outputs["log", "find", "--key", "people:1"]
    assert "a@s3cr3t-a" in out("log", "find", "--key", "people:1", "--unmask")
    assert "s3cr3t" in "".join(out("log", "show", str(n), "--unmask") for n in range(1, 20))
    lines = [OneLine().format(record) for record in caplog.records if record.name.startswith("headrace")]
    assert not [line for line in lines if SECRET in line]
    assert any("NEW CAUSE" in line for line in lines)
    # Of Headrace's own tables in the destination one column has what is masked: the key, to redrive by.
    project = load_project(root)
    tables = read_rows(
        project, "SELECT table_name FROM information_schema.tables WHERE table_schema = 'headrace'"
    )[1]
    for (name,) in tables:
        columns, rows = read_rows(project, f"SELECT * FROM headrace.{name}")
        plain = [i for i, column in enumerate(columns) if column != "key"]
        assert SECRET not in str([[row[i] for i in plain] for row in rows]), name
    keys = {key for _, key, model in records if model == "logged"}
    assert "h@s3cr3t-h" in keys
    redriven = out("quarantine", "redrive", "--model", "logged", "--key", "h@s3cr3t-h")
    assert redriven == "1 keys redriven: 1 records resolved, 0 still quarantined.\n"
    kept = [
        path
        for path in (root / ".headrace").rglob("*")
        if path.is_file() and not {"log", "staging", "versions"} & set(path.relative_to(root).parts)
    ]
    assert not [path for path in kept if SECRET.encode() in path.read_bytes()]
