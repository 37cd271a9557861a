"""Constraints of a real Postgres, taken over by models: from its catalog, and when they change."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import duckdb
import psycopg
import pytest

from headrace.change import TableId
from headrace.cli import main
from headrace.keys import literal
from headrace.sources.postgres.catalog import read_shapes
from headrace.testing.postgres import INSTALLS, PostgresServer
from headrace.transform.model import mirror
from headrace.transform.source_checks import Unlike, duckdb_condition
from headrace.transform.source_constraints import held
from live import LiveProject


@pytest.fixture(scope="module", params=sorted(INSTALLS))
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("pg"), request.param) as server:
        yield server


TABLES = (
    "DROP TABLE IF EXISTS orders, customers, cells, other.parts",
    "CREATE TABLE customers (id integer PRIMARY KEY, mail text UNIQUE)",
    """CREATE TABLE orders (id bigint PRIMARY KEY, customer integer NOT NULL REFERENCES customers
    DEFERRABLE INITIALLY DEFERRED, amount numeric(12,2) CHECK (amount > 0), code text,
    note text NOT NULL CHECK (note IN ('xx', 'yy', 'zz', 'ww')),
    CHECK (amount < 1000 OR code IS NOT NULL))""",
    "ALTER TABLE orders ADD CONSTRAINT later CHECK (length(note) > 1) NOT VALID",
    "CREATE UNIQUE INDEX orders_code ON orders (code)",
    "CREATE UNIQUE INDEX orders_dear ON orders (note) WHERE amount > 100",
    "INSERT INTO customers VALUES (1, 'ada'), (2, 'bob')",
    "INSERT INTO orders VALUES (1, 1, 5, 'a', 'xx'), (2, 2, 6, NULL, 'yy')",
)


def test_a_pipeline_follows_the_constraints_of_its_source(
    tmp_path: Path, server: PostgresServer, capsys: pytest.CaptureFixture[str]
) -> None:
    shop = LiveProject(tmp_path, server, *TABLES)
    header = 'constraints = "source"\n[contract]\namount = "CHECK (amount <> 13)"'
    shop.model(
        "SELECT id::BIGINT AS id, customer::INTEGER AS customer, amount::DECIMAL(12,2) AS amount, code, note "
        "FROM raw.shop.orders WHERE note <> 'hidden'",
        "orders", header,
    )  # fmt: skip
    shop.model("SELECT id::INTEGER AS id, mail FROM raw.shop.customers WHERE mail <> 'zoe'", "people")
    shop.run()
    shop.assert_verified()
    assert main(["models", "show", "orders", "--project", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for words in (
        'amount: CHECK ("amount" > 0)',
        'amount: CHECK (("amount" < 1000) OR ("code" IS NOT NULL))',
        "note: NOT NULL",
        "code: UNIQUE",
        "customer: REFERENCES people (id)",
        "later: it is not validated",
        "orders_dear: it is of a part of the rows",
    ):
        assert words in shown, shown
    assert main(["ci", "--record", "--project", str(tmp_path)]) == 0
    assert main(["ci", "--project", str(tmp_path)]) == 0
    lock = (tmp_path / "schemas" / "models.lock").read_text()
    assert 'note = "VARCHAR NOT NULL"' in lock
    assert main(["check", "--project", str(tmp_path)]) == 0
    assert "model orders does not take over later: it is not validated" in capsys.readouterr().out
    # The model of the parent leaves a row out: a child of it waits, though the source has the row.
    shop.sql(
        "INSERT INTO customers VALUES (3, 'zoe')",
        "INSERT INTO orders VALUES (3, 3, 7, 'c', 'zz'), (4, 1, 13, 'd', 'zz')",
        # A bad change keeps its row at the code that another row has now.
        "UPDATE orders SET code = 'e', amount = 13 WHERE id = 1",
        "UPDATE orders SET code = 'a' WHERE id = 2",
    )
    shop.run()
    opened = (
        "SELECT key, reason, status FROM headrace.quarantine "
        "WHERE status IN ('quarantined', 'waiting') ORDER BY key"
    )
    assert shop.rows(opened) == [
        ("1", "constraint.check", "quarantined"), ("2", "constraint.unique", "quarantined"),
        ("3", "constraint.foreign_key", "waiting"), ("4", "constraint.check", "quarantined"),
    ]  # fmt: skip
    shop.assert_verified()
    # What the source lets go of, the model does: no row of the table changes, so the catalog tells.
    shop.sql(
        "DROP INDEX orders_code",
        "ALTER TABLE orders DROP CONSTRAINT orders_customer_fkey, DROP CONSTRAINT orders_check",
        "ALTER TABLE orders VALIDATE CONSTRAINT later",
        "INSERT INTO orders VALUES (5, 77, 2000, NULL, 'ww')",
    )
    shop.run()
    shop.run()
    assert [key for key, _, _ in shop.rows(opened)] == ["1", "4"]
    assert shop.rows("SELECT id FROM orders ORDER BY id") == [(1,), (2,), (3,), (5,)]
    assert main(["models", "show", "orders", "--project", str(tmp_path)]) == 0
    assert 'note: CHECK (LENGTH("note") > 1)' in (shown := capsys.readouterr().out)
    assert "+" in shown.split("versions that made its table")[1]
    assert main(["staging", "history", "orders", "--project", str(tmp_path)]) == 0
    assert "orders_check dropped; orders_code dropped; orders_customer_fkey dropped" in (
        capsys.readouterr().out.replace("later changed; ", "")
    )
    shop.assert_verified()
    # A rebuild needs no source.
    server.stop()
    try:
        assert main(["rebuild", "orders", "--project", str(tmp_path)]) == 0
        assert shop.rows("SELECT id, code FROM orders ORDER BY id") == [
            (1, "a"),
            (2, "a"),
            (3, "c"),
            (5, None),
        ]
    finally:
        server.start()


SAME = """n > 0 | n + 1 < m | n % 3 = 1 | -n < 2 | abs(n) = 2 | m * 2 <= 3.5 | m > '-0.5' | m <> 0.0001
t = 'a' | t <> '' | t IN ('a', 'bb') | t NOT IN ('a', 'x y') | t LIKE '%b' | t NOT LIKE 'a_'
t ~ '^[^@]+@[^@]+$' | t ~ '^a.c$' | t !~ '^(a|b){1,2}$' | t ~ '[a-z]+\\.[a-z]' | length(t) > 1
char_length(btrim(t)) = 1 | trim(t) <> '' | length(ltrim(t)) > 1 | rtrim(t) <> 'a'
b | NOT b | b IS TRUE | b IS NOT FALSE | n IS DISTINCT FROM 1
(n IS NULL) = (t IS NULL) | n BETWEEN 0 AND 2 | coalesce(n, m, 0) > 1 | d > '2020-02-29'
d <> '2020-03-01' | n > 1 OR t = 'a' AND b | f > 0.1 | f = 'NaN' | f > n | s::bigint > n | v = 'a'
w >= '2020-01-01 12:00' | z >= '2020-01-01 12:00+02' | u = '00000000-0000-0000-0000-000000000001'
n::numeric > m | m::numeric(3,1) > 1 | h < '12:30' | n NOT IN (1, 3)"""
LEFT_OUT = """n <> ALL ('{1,2}')
t > 'a' | lower(t) = t | t ~* 'A' | t ~ '^[[:alpha:]]' | n / 2 = 0 | c = 'a' | w = d | e = 'x'
d > CURRENT_DATE | num_nonnulls(n, m) = 1 | t ~ '\\yb' | t ~~ 'a\\%' | j -> 'a' IS NULL | ARRAY[n] = '{1}'
z::date = d | f::numeric = 0.3"""
ROWS = {
    "n": ["0", "1", "-2", "3", None],
    "m": ["0.0001", "1.7500", "-0.5000", None],
    "t": ["a", "bb", " b ", "", "a@b", "a\nc", "a.c", "é", "ab\n", "50%", "\u3000", "a\u00a0", None],
    "b": ["t", "f", None],
    "d": ["2020-03-01", "0044-03-15 BC", None],
    "f": ["0.1", "NaN", "-Infinity", "2.5", None],
    "s": ["-1", "7", None],
    "w": ["2020-01-01 12:00:00", "2019-12-31 23:59:59.5", None],
    "z": ["2020-01-01 10:00:00+00", "2020-01-01 09:59:59+00", None],
    "v": ["a", "b", None],
    "u": ["00000000-0000-0000-0000-000000000001", "00000000-0000-0000-0000-00000000000a", None],
    "h": ["12:29:59.9", "12:30:00", None],
}


TYPES = {
    "n": "integer", "m": "numeric(9,4)", "t": "text", "b": "boolean", "d": "date", "f": "double precision",
    "s": "smallint", "w": "timestamp", "z": "timestamptz", "v": "varchar(9)", "u": "uuid", "h": "time",
    "c": "character(3)", "e": "mood", "j": "jsonb",
}  # fmt: skip


def parts(text: str) -> list[str]:
    return [part.strip() for line in text.splitlines() for part in line.split(" | ")]


def test_a_condition_means_in_duckdb_what_it_means_in_postgres(server: PostgresServer) -> None:
    """Of each that is taken, both engines say the same of every combination of its columns' cells."""
    conditions = [*parts(SAME), *parts(LEFT_OUT)]
    checks = [f"CONSTRAINT c{i:03} CHECK ({condition})" for i, condition in enumerate(conditions)]
    columns = ["id integer PRIMARY KEY", *(f"{name} {type_}" for name, type_ in TYPES.items())]
    left_out = list[str]()
    with psycopg.connect(server.url, autocommit=True) as db, duckdb.connect() as engine:
        engine.execute("SET TimeZone = 'UTC'")
        db.execute("DROP TABLE IF EXISTS cells; DROP TYPE IF EXISTS mood; CREATE TYPE mood AS ENUM ('x')")
        db.execute(f"CREATE TABLE cells ({', '.join([*columns, *checks])})".encode())
        (shape,) = read_shapes(db, [TableId("public", "cells")]).values()
        model = mirror("shop", shape)
        cells, expressions = held(model), {name: expression for name, expression, _ in model.outputs}
        for constraint in (each for each in shape.constraints if each.kind == "check"):
            written = conditions[int(constraint.name[1:])]
            try:
                condition = duckdb_condition(constraint.expression, {c: cells[c] for c in constraint.columns})
            except Unlike:
                left_out.append(written)
                continue
            rows = itertools.product(*(ROWS[name] for name in constraint.columns))
            listed = ", ".join(
                f"({', '.join('NULL' if cell is None else literal(cell) for cell in row)})" for row in rows
            )
            given = f"(VALUES {listed}) r ({', '.join(constraint.columns)})"
            theirs = ", ".join(f"{name}::text::{TYPES[name]} AS {name}" for name in constraint.columns)
            ours = ", ".join(f"{expressions[name]} AS {name}" for name in constraint.columns)
            said = db.execute(
                f"SELECT {constraint.expression} FROM (SELECT {theirs} FROM {given}) r".encode()
            )
            answered = engine.execute(f"SELECT TRY({condition}) FROM (SELECT {ours} FROM {given})")
            assert answered.fetchall() == said.fetchall(), f"{written}: {condition}"
    assert left_out == parts(LEFT_OUT)
