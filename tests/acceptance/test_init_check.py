"""`headrace init` and `headrace check` against a real Postgres, as a user meets them: in a subprocess."""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import psycopg
import pytest

from headrace.cli import main
from headrace.config import load_project, source_config
from headrace.secret import Secret
from headrace.sources.postgres.preflight import inspect
from headrace.testing import shop
from headrace.testing.postgres import PostgresServer

PASSWORD = "hunter2-planted"


class Done(NamedTuple):
    code: int
    out: str
    err: str


def headrace(*arguments: str, cwd: Path | None = None, **environment: str) -> Done:
    clean = {name: value for name, value in os.environ.items() if not name.endswith("_URL")}
    done = subprocess.run(
        [sys.executable, "-m", "headrace", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**clean, **environment},
        timeout=60,
        check=False,
    )
    for text in (done.stdout, done.stderr):
        assert PASSWORD not in text
        assert "Traceback" not in text
    return Done(done.returncode, done.stdout, done.stderr)


def refusal(done: Done, code: int = 2) -> str:
    """The one paragraph of a command that refused."""
    assert done.code == code, done
    assert done.err.strip()
    assert "\n\n" not in done.err.strip()
    return done.err


def project_with(folder: Path, url: str, more: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "headrace.toml").write_text(f'[source.shop]\nurl = "{url}"\n{more}\n')
    return folder


def findings(folder: Path, level: str, **environment: str) -> dict[str, str]:
    """What check finds of one level, with its remedies; in this process, which saves a second of imports."""
    printed = io.StringIO()
    with mock.patch.dict(os.environ, environment), contextlib.redirect_stdout(printed):
        code = main(["check", "--json", "--project", str(folder)])
    assert PASSWORD not in printed.getvalue()
    found = json.loads(printed.getvalue())
    assert found["ok"] == (code == 0)
    assert code == (2 if any(one["level"] == "fail" for one in found["findings"]) else 0)
    return {one["what"]: one["remedy"] for one in found["findings"] if one["level"] == level}


def only(found: dict[str, str], words: str) -> str:
    """The remedy of the one finding that says `words`."""
    matching = [remedy for what, remedy in found.items() if words in what]
    assert len(matching) == 1, (words, found)
    return matching[0]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with (
        tempfile.TemporaryDirectory(prefix="hr-") as folder,
        PostgresServer(Path(folder), settings={"max_slot_wal_keep_size": "8GB"}) as server,
    ):
        server.psql("CREATE DATABASE shop")
        with psycopg.connect(database(server, "shop")) as connection:
            shop.create_schema(connection)
            shop.fill(connection, customers=50, products=20, orders=50, accounts=5)
        yield server


def database(server: PostgresServer, name: str, user: str = "postgres") -> str:
    return f"postgresql://{user}@127.0.0.1:{server.port}/{name}"


@pytest.fixture
def made(server: PostgresServer, request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """A database of the test's own, empty: its name and url."""
    name = request.node.name.removeprefix("test_").partition("[")[0][:50]
    server.psql(f'CREATE DATABASE "{name}"')
    yield name, database(server, name)
    server.psql(f'DROP DATABASE "{name}" WITH (FORCE)')


# --------------------------------------------------------------------------------------------- init


def test_init_makes_a_project_that_check_accepts(server: PostgresServer, tmp_path: Path) -> None:
    url = database(server, "shop")
    done = headrace("init", url, "p", cwd=tmp_path)
    assert done.code == 0, done
    assert "headrace check --project p" in done.out
    assert "headrace run --once --project p" in done.out
    folder = tmp_path / "p"
    project = load_project(folder)
    assert [source.name for source in project.sources] == ["shop"]
    assert project.sources[0].tables == ("public.*",)
    assert project.sources[0].url.reveal() == url
    assert stat.S_IMODE((folder / "headrace.toml").stat().st_mode) == 0o600
    assert (folder / ".gitignore").read_text().split() == [".headrace/", "*.duckdb*"]
    assert findings(folder, "fail") == {}
    assert "Ready to run" in headrace("check", cwd=folder).out


def test_the_example_is_a_working_model_once_renamed(server: PostgresServer, tmp_path: Path) -> None:
    headrace("init", database(server, "shop"), str(tmp_path))
    example, *others = (tmp_path / "models").iterdir()
    assert not others
    assert example.name.endswith("_clean.sql.off")
    assert headrace("test", cwd=tmp_path).out.endswith("1 test, 0 failed.\n")
    example.rename(example.with_suffix(""))
    assert headrace("test", cwd=tmp_path).out.endswith("1 test, 0 failed.\n")
    assert [what for what in findings(tmp_path, "ok") if what.startswith("model ")] == [
        f"model {example.name.removesuffix('.sql.off')} fits raw.shop."
        f"{example.name.removesuffix('_clean.sql.off')}"
    ]


def test_init_does_not_overwrite(server: PostgresServer, tmp_path: Path) -> None:
    project_with(tmp_path, "postgresql://other/db")
    before = (tmp_path / "headrace.toml").read_bytes()
    assert "exists already" in refusal(headrace("init", database(server, "shop"), str(tmp_path)))
    assert (tmp_path / "headrace.toml").read_bytes() == before


def test_init_writes_no_password(server: PostgresServer, tmp_path: Path) -> None:
    url = database(server, "shop", f"postgres:{PASSWORD}")
    done = headrace("init", url, str(tmp_path))
    assert done.code == 0
    assert "export SHOP_URL=" in done.out
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or PASSWORD not in path.read_text()
    written = tomllib.loads((tmp_path / "headrace.toml").read_text())
    assert written["source"]["shop"]["url"] == "${env:SHOP_URL}"
    assert "SHOP_URL is not set" in refusal(headrace("check", "--project", str(tmp_path)))
    assert findings(tmp_path, "fail", SHOP_URL=url) == {}


def test_init_names_the_variable_that_holds_the_url(server: PostgresServer, tmp_path: Path) -> None:
    url = database(server, "shop", f"postgres:{PASSWORD}")
    for number, given in enumerate((url, "${env:DATABASE_URL}")):
        folder = tmp_path / str(number)
        done = headrace("init", given, str(folder), DATABASE_URL=url)
        assert done.code == 0
        assert "export" not in done.out
        assert '"${env:DATABASE_URL}"' in (folder / "headrace.toml").read_text()


def test_init_keeps_an_existing_gitignore(server: PostgresServer, tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("mine\n.headrace/\n")
    headrace("init", database(server, "shop"), str(tmp_path))
    assert (tmp_path / ".gitignore").read_text().split() == ["mine", ".headrace/", "*.duckdb*"]


def test_odd_tables(made: tuple[str, str], server: PostgresServer, tmp_path: Path) -> None:
    """Init leaves out what cannot be captured, with the reason, and check accepts the rest unedited."""
    server.psql(
        """
        CREATE TABLE good (id int PRIMARY KEY, "Select" text, "a ""q"" b" bytea, "é" int[], _x text);
        CREATE TABLE keyless (a int);
        CREATE TABLE nothing (id int PRIMARY KEY); ALTER TABLE nothing REPLICA IDENTITY NOTHING;
        CREATE TABLE reserved (id int PRIMARY KEY, "_Op" int);
        CREATE TABLE folded (id int PRIMARY KEY, "A" int, a int);
        CREATE TABLE later (id int PRIMARY KEY DEFERRABLE);
        CREATE TABLE twin (id int PRIMARY KEY); CREATE TABLE "Twin" (id int PRIMARY KEY);
        CREATE TABLE "we.ird ""*?!"" x" (id text PRIMARY KEY);
        CREATE TABLE " blank " (a int);
        CREATE UNLOGGED TABLE fleeting (id int PRIMARY KEY);
        CREATE TABLE made (id int PRIMARY KEY, twice int GENERATED ALWAYS AS (id * 2) STORED);
        CREATE TABLE parts (id int PRIMARY KEY, t text) PARTITION BY RANGE (id);
        CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (9);
        CREATE TABLE weak (id int NOT NULL) PARTITION BY RANGE (id);
        CREATE TABLE weak_1 PARTITION OF weak FOR VALUES FROM (0) TO (9);
        CREATE UNIQUE INDEX weak_id ON weak (id); ALTER TABLE weak REPLICA IDENTITY USING INDEX weak_id;
        CREATE TABLE wide (id int NOT NULL, note text, PRIMARY KEY (id) INCLUDE (note));
        CREATE VIEW looks AS SELECT 1 AS id;
        CREATE SCHEMA sales; CREATE TABLE sales.deals (id uuid PRIMARY KEY);
        """,
        made[0],
    )
    assert headrace("init", made[1], str(tmp_path)).code == 0
    text = (tmp_path / "headrace.toml").read_text()
    (source,) = load_project(tmp_path).sources
    left_out = {"keyless", "nothing", "reserved", "folded", "later", "weak", "Twin", "?blank?"}
    assert source.tables[0] == "public.*"
    assert {pattern.removeprefix("!public.") for pattern in source.tables[1:]} == left_out
    assert '# "sales.*"' in text
    assert findings(tmp_path, "fail") == {}
    warned = findings(tmp_path, "warn")
    assert "SET LOGGED" in only(warned, "public.fleeting is not logged")
    assert only(warned, "public.made: generated columns are left out: twice")

    # With everything selected, each is a finding of its own.
    everything = project_with(tmp_path / "all", made[1])
    failed = findings(everything, "fail")
    assert 'ALTER TABLE "public"."keyless" ADD PRIMARY KEY (…);' in only(failed, "public.keyless")
    assert "REPLICA IDENTITY DEFAULT" in only(failed, "identity is NOTHING")
    assert "RENAME COLUMN" in only(failed, "column _Op has a name")
    assert "RENAME COLUMN" in only(failed, "columns A and a differ")
    assert "REPLICA IDENTITY FULL" in only(failed, "deferrable")
    assert "ALTER TABLE public.weak_1 REPLICA IDENTITY FULL" in only(
        failed, "partitions have no key of their own"
    )
    assert '"!public.twin"' in only(failed, "public.Twin and public.twin would have one name")


def test_other_schemas_where_public_is_empty(
    made: tuple[str, str], server: PostgresServer, tmp_path: Path
) -> None:
    server.psql(
        'CREATE SCHEMA a; CREATE SCHEMA "b.c"; CREATE TABLE a.x (id int PRIMARY KEY);'
        'CREATE TABLE "b.c".y (id int PRIMARY KEY); CREATE TABLE "b.c".z (id int)',
        made[0],
    )
    assert headrace("init", made[1], str(tmp_path), "--name", "other").code == 0
    (source,) = load_project(tmp_path).sources
    assert source.name == "other"
    assert source.tables == ("a.*", "b?c.*", "!b?c.z")
    assert findings(tmp_path, "fail") == {}


def test_warehouse(server: PostgresServer, made: tuple[str, str], tmp_path: Path) -> None:
    """DuckDB cannot tell a file from a schema of the same name: init avoids it, check finds it."""
    server.psql("CREATE TABLE t (id int PRIMARY KEY)", made[0])
    assert headrace("init", made[1], str(tmp_path)).code == 0
    assert load_project(tmp_path).destination.path.name == "analytics.duckdb"
    clash = project_with(tmp_path / "clash", made[1], '[destination]\npath = "Shop.duckdb"')
    assert "shop_warehouse.duckdb" in only(findings(clash, "fail"), "DuckDB cannot tell them apart")


def test_a_copy_for_readers(server: PostgresServer, made: tuple[str, str], tmp_path: Path) -> None:
    server.psql("CREATE TABLE t (id int PRIMARY KEY)", made[0])
    settings = '[destination]\npublish = "{}"'
    clash = project_with(tmp_path / "clash", made[1], settings.format("Shop.duckdb"))
    assert "shop_published.duckdb" in only(findings(clash, "fail"), "DuckDB cannot tell them apart")
    absent = project_with(tmp_path / "absent", made[1], settings.format("public/read.duckdb"))
    assert f"mkdir -p {absent}/public" in only(findings(absent, "fail"), "there is no folder")
    (absent / "public").mkdir()
    assert only(findings(absent, "ok"), "read.duckdb can be published") == ""


def test_an_empty_database(made: tuple[str, str], tmp_path: Path) -> None:
    assert headrace("init", made[1], str(tmp_path)).code == 0
    assert only(findings(tmp_path, "fail"), "no table matches")


def test_a_slot_of_another_project(server: PostgresServer, made: tuple[str, str], tmp_path: Path) -> None:
    name, url = made
    server.psql("CREATE TABLE t (id int PRIMARY KEY)", name)
    slot = f"headrace_{name}"
    server.psql(f"SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')", name)
    try:
        own = project_with(tmp_path / "own", url, f'slot = "{slot}"')
        assert f"pg_drop_replication_slot('{slot}')" in only(findings(own, "fail"), "exists already")
        (own / ".headrace").mkdir()
        assert only(findings(own, "ok"), "waiting for its pipeline") == ""
        assert headrace("init", url, str(tmp_path / "new")).code == 0
        assert load_project(tmp_path / "new").sources[0].slot == f"{slot}_2"
        assert findings(tmp_path / "new", "fail") == {}
    finally:
        server.psql(f"SELECT pg_drop_replication_slot('{slot}')", name)


def test_an_unwritable_folder(server: PostgresServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = refusal(headrace("init", database(server, "shop"), str(tmp_path / "file" / "p")))
    assert "cannot be made" in text
    project = project_with(
        tmp_path / "p", database(server, "shop"), f'[destination]\npath = "{tmp_path}/file/x.duckdb"'
    )
    assert "another than" in only(findings(project, "fail"), "file is no folder")


def test_a_folder_without_the_right_to_write(
    server: PostgresServer, tmp_path: Path, unwritable: Callable[[Path], AbstractContextManager[None]]
) -> None:
    project = project_with(tmp_path / "p", database(server, "shop"))
    with unwritable(project):
        assert "write there" in only(findings(project, "fail"), "p cannot be written")
        text = refusal(headrace("init", database(server, "shop"), str(project / "q")))
    assert "cannot be made" in text


# -------------------------------------------------------------------------------------------- check


def test_wal_level(tmp_path: Path) -> None:
    with PostgresServer(tmp_path / "pg", settings={"wal_level": "replica"}) as server:
        server.psql("CREATE TABLE t (id int PRIMARY KEY)")
        failed = findings(project_with(tmp_path / "p", server.url), "fail")
        assert "ALTER SYSTEM SET wal_level = 'logical';" in only(failed, "wal_level is replica")
        assert len(failed) == 1
        warned = findings(tmp_path / "p", "warn")
        assert "ALTER SYSTEM SET max_slot_wal_keep_size" in only(warned, "max_slot_wal_keep_size is -1")
        hba = server.data / "pg_hba.conf"
        hba.write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
        server.psql("CREATE ROLE app LOGIN PASSWORD 'right'; SELECT pg_reload_conf()")
        wrong = f"postgresql://app:{PASSWORD}@127.0.0.1:{server.port}/postgres"
        remedy = only(_until_refused(tmp_path / "p", wrong), "password authentication failed")
        assert "Check user and password" in remedy
        assert "password authentication failed" in refusal(headrace("init", wrong, str(tmp_path / "q")))


def _until_refused(folder: Path, url: str) -> dict[str, str]:
    """What check says once the reloaded pg_hba.conf is in force."""
    for _ in range(20):
        found = findings(project_with(folder, url), "fail")
        if any("password" in what for what in found):
            break
        time.sleep(0.1)
    return found


def test_no_such_role_database_or_server(server: PostgresServer, tmp_path: Path) -> None:
    for url, words in (
        (database(server, "shop", f"nobody_here:{PASSWORD}"), 'role "nobody_here" does not exist'),
        (database(server, f"nowhere?password={PASSWORD}"), 'database "nowhere" does not exist'),
    ):
        assert words in refusal(headrace("init", url, str(tmp_path / "new")))
        failed = findings(project_with(tmp_path / "p", url), "fail")
        assert "Check the source's url." in only(failed, words)
        assert len(failed) == 1
    url = f"postgresql://a:{PASSWORD}@127.0.0.1:1/d"
    assert "cannot be reached" in refusal(headrace("init", url, str(tmp_path / "new")), 1)
    assert only(findings(project_with(tmp_path / "p", url), "fail"), "cannot be reached")
    assert not (tmp_path / "new").exists()


def test_tables_that_are_not_there(server: PostgresServer, tmp_path: Path) -> None:
    tables = 'tables = ["public.orders", "public.custmers", "nope.*"]'
    project = project_with(tmp_path, database(server, "shop"), tables)
    remedy = only(findings(project, "fail"), "there is no table public.custmers")
    assert remedy == 'Did you mean "public.customers"?'
    assert only(findings(project, "warn"), 'the pattern "nope.*" matches no table')


def test_the_rights_of_a_role(made: tuple[str, str], server: PostgresServer, tmp_path: Path) -> None:
    name, url = made
    server.psql("CREATE ROLE clerk LOGIN; CREATE TABLE t (id int PRIMARY KEY)", name)
    try:
        project = project_with(tmp_path, url.replace("postgres@", "clerk@"))
        failed = findings(project, "fail")
        assert only(failed, "may not replicate") == 'ALTER ROLE "clerk" REPLICATION;'
        grant = only(failed, "may not read public.t")
        assert grant == 'GRANT SELECT ON "public"."t" TO "clerk";'
        create = only(failed, "cannot make publication headrace_shop").partition(": ")[2]
        assert create == (
            'CREATE PUBLICATION "headrace_shop" FOR TABLE "public"."t" '
            "WITH (publish_via_partition_root = true);"
        )
        # The remedies are exact: run as they stand, they leave nothing to find.
        server.psql(f'ALTER ROLE "clerk" REPLICATION; {grant} {create}', name)
        assert findings(project, "fail") == {}
        server.psql("CREATE TABLE u (id int PRIMARY KEY); GRANT SELECT ON u TO clerk", name)
        extend = only(findings(project, "fail"), "cannot extend").partition(": ")[2]
        server.psql(f"{extend} ALTER TABLE t ENABLE ROW LEVEL SECURITY", name)
        assert "BYPASSRLS" in only(findings(project, "fail"), "row security")
    finally:
        server.psql("DROP OWNED BY clerk; DROP ROLE clerk", name)


def test_replication_slots_that_run_out(tmp_path: Path) -> None:
    few = {"max_replication_slots": "1", "max_slot_wal_keep_size": "16MB"}
    with PostgresServer(tmp_path / "pg", settings=few) as server:
        server.psql("CREATE TABLE t (id int PRIMARY KEY)")
        config = source_config("shop", Secret(server.url))
        warned = {finding.what: finding.remedy for finding in inspect(config) if finding.level == "warn"}
        assert only(warned, "none is left for verify")
        assert "16 MB" in next(what for what in warned if "max_slot_wal_keep_size" in what)
        server.psql("SELECT pg_create_logical_replication_slot('other', 'pgoutput')")
        failed = {finding.what: finding.remedy for finding in inspect(config) if finding.level == "fail"}
        assert "pg_drop_replication_slot('other')" in only(failed, "none is free")
        mine = source_config("shop", Secret(server.url), slot="other")
        assert not [finding for finding in inspect(mine) if finding.level == "fail"]


def test_models_that_do_not_fit(server: PostgresServer, tmp_path: Path) -> None:
    project = project_with(tmp_path, database(server, "shop"))
    models = tmp_path / "models"
    models.mkdir()
    for name, text in {
        "parses_not": "SELEC id FROM raw.shop.orders",
        "lacks": "SELECT id::BIGINT AS id, amonut AS amount FROM raw.shop.orders",
        "elsewhere": "SELECT id AS id FROM raw.shp.orders",
        "tableless": "SELECT id AS id FROM raw.shop.ordrs",
        "good": "SELECT id::BIGINT AS id FROM raw.shop.orders",
        "Good": "SELECT id::BIGINT AS id FROM raw.shop.orders",
        "shop.accounts": "SELECT id::BIGINT AS id FROM raw.shop.customers",
    }.items():
        (models / f"{name}.sql").write_text(text)
    failed = findings(project, "fail")
    assert only(failed, "parses_not.sql:1")
    assert "models/lacks.sql" in only(failed, "amonut")
    assert 'Did you mean "shop"?' in only(failed, "there is no source shp")
    assert 'Did you mean "orders"?' in only(failed, "no such table is captured")
    assert only(failed, "models Good and good would fill one table") == "Rename models/good.sql."
    assert "Rename models/shop.accounts.sql." in only(failed, "among the mirrors of source shop")
    assert len(failed) == 6


def test_sources_that_share_a_slot(server: PostgresServer, tmp_path: Path) -> None:
    url = database(server, "shop")
    more = f'slot = "one"\n[source.b]\nurl = "{url}"\nslot = "one"'
    failed = findings(project_with(tmp_path, url, more), "fail")
    assert '[source.b] slot = "one_2"' in only(failed, "share the slot one")


def test_a_destination_that_is_held(server: PostgresServer, tmp_path: Path) -> None:
    project = project_with(tmp_path, database(server, "shop"))
    path = tmp_path / "warehouse.duckdb"
    code = f"import duckdb, sys; c = duckdb.connect({str(path)!r}); print('open', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        warned = findings(project, "warn")
        assert "goes on by itself" in only(warned, f"(PID {holder.pid})")
        holder.communicate("\n")
    assert only(findings(project, "ok"), "warehouse.duckdb opens") == ""
    path.write_bytes(b"not a database" * 1000)
    assert only(findings(project, "fail"), "warehouse.duckdb")


def test_a_mistake_in_the_settings(server: PostgresServer, tmp_path: Path) -> None:
    project = project_with(tmp_path, database(server, "shop"), "tabels = []\n[scale]\nfreshness = 3")
    text = refusal(headrace("check", cwd=project))
    assert 'did you mean "tables"?' in text
    assert "freshness" in text


def test_lines_for_people(server: PostgresServer, tmp_path: Path) -> None:
    project = project_with(tmp_path, database(server, "shop"), 'tables = ["public.ordrs"]')
    done = headrace("check", cwd=project)
    assert done.code == 2
    assert "\x1b" not in done.out
    lines = done.out.splitlines()
    at = lines.index("  FAIL there is no table public.ordrs")
    assert lines[at + 1] == '       Did you mean "public.orders"?'
    assert lines[-1].startswith("2 things to mend before a pipeline can run")
