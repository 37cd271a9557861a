"""Postgres as a destination: what is its own."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from headrace.change import Mark
from headrace.destinations.postgres import PostgresDestination
from headrace.errors import CommitUnknown, DestinationError, DestinationUnavailable, ModelBroken, Verdict
from headrace.join import Join
from headrace.mart import Mart
from headrace.secret import Secret
from headrace.testing.destinations import LOG, MODEL, limited, model_of, row, shape, slice_of, table
from headrace.testing.logs import armed
from headrace.testing.postgres import PostgresServer
from headrace.transform.model import mirror


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    started = PostgresServer(tmp_path_factory.mktemp("pg"))
    started.start()
    yield started
    started.stop("immediate")


_numbers = iter(range(1_000_000))


@pytest.fixture
def url(server: PostgresServer) -> str:
    database = f"d{next(_numbers)}"
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute(f"CREATE DATABASE {database}")
    return server.url.removesuffix("postgres") + database


@pytest.fixture
def destination(url: str) -> Iterator[PostgresDestination]:
    made = PostgresDestination(Secret(url), lock_timeout=0.3)
    yield made
    made.close()


@pytest.fixture
def db(url: str) -> Iterator[psycopg.Connection]:
    """The connection of a user who shares the database."""
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


class Proxy:
    """Forwards to a server, and cuts the line at a message of the client that holds certain bytes: before it
    is passed on, or behind it, when the server has it and its answer is lost."""

    def __init__(self, port: int, cut_at: bytes, *, passed_on: bool) -> None:
        self._port, self._cut_at, self._passed_on = port, cut_at, passed_on
        self.armed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for end in (self._listener, *self._ends):
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                self._ends += [client, server]
                threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, from_client: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if from_client and self.armed and self._cut_at in data:
                    self.armed = False
                    source.shutdown(socket.SHUT_RDWR)  # the answer finds nobody
                    if self._passed_on:
                        sink.sendall(data)
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("passed_on", [True, False])
def test_a_commit_whose_answer_is_lost_is_resolved_by_the_progress(
    server: PostgresServer, url: str, passed_on: bool
) -> None:
    proxy = Proxy(server.port, b"COMMIT", passed_on=passed_on)
    far = PostgresDestination(Secret(url.replace(f":{server.port}/", f":{proxy.port}/")))
    try:
        far.apply(slice_of(0, (MODEL, [row(1)])))
        proxy.armed = True
        work = slice_of(1, (MODEL, [row(2)]))
        if passed_on:
            assert far.apply(work) == []
        else:
            with pytest.raises(CommitUnknown) as caught:
                far.apply(work)
            assert caught.value.verdict is Verdict.RETRY
            assert far.progress("shop") == Mark(LOG, 1, "h1")
            far.apply(work)
        assert not proxy.armed
        assert table(far) == [(1, "a"), (2, "a")]
        assert table(far, "SELECT count(*) FROM headrace.ledger") == [(2,)]
    finally:
        far.close()
        proxy.close()


def test_a_connection_that_is_killed_is_made_anew(
    destination: PostgresDestination, db: psycopg.Connection
) -> None:
    kill = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE application_name = 'headrace' AND datname = current_database()"
    )
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    assert db.execute(kill).fetchall() == [(True,)]  # one at rest
    work = slice_of(1, (MODEL, [row(2)]))
    destination.apply(work)
    timer = threading.Timer(0.2, lambda: db.execute(kill))
    timer.start()
    with armed("destination.apply.commit=sleep:1"), pytest.raises(DestinationUnavailable):
        destination.apply(slice_of(2, (MODEL, [row(3)])))
    timer.join()
    destination.apply(slice_of(2, (MODEL, [row(3)])))
    assert table(destination) == [(1, "a"), (2, "a"), (3, "a")]


def test_a_server_that_is_away_is_waited_for_and_a_wrong_login_is_not(server: PostgresServer) -> None:
    away = PostgresDestination(Secret("postgresql://x:secret@127.0.0.1:1/x"))
    with pytest.raises(DestinationUnavailable, match="cannot be reached") as caught:
        away.progress("shop")
    assert caught.value.verdict is Verdict.RETRY
    assert "secret" not in caught.value.paragraph()
    wrong = PostgresDestination(Secret(server.url.removesuffix("postgres") + "absent"))
    with pytest.raises(DestinationError, match="does not exist") as refused:
        wrong.progress("shop")
    assert refused.value.verdict is not Verdict.RETRY


def test_a_lock_is_waited_for_within_bounds(destination: PostgresDestination, db: psycopg.Connection) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    with db.transaction():
        db.execute("LOCK TABLE shop.t IN SHARE MODE")
        with pytest.raises(DestinationUnavailable, match="lock timeout"):
            destination.apply(slice_of(1, (MODEL, [row(1, "b")])))
    destination.apply(slice_of(1, (MODEL, [row(1, "b")])))
    assert table(destination) == [(1, "b")]


def test_two_that_apply_at_once_take_turns(url: str, destination: PostgresDestination) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    other = PostgresDestination(Secret(url))
    errors: list[BaseException] = []

    def apply(one: PostgresDestination) -> None:
        try:
            one.apply(slice_of(1, (MODEL, [row(2)])))
        except DestinationError as error:
            errors.append(error)

    with armed("destination.apply.commit=sleep:0.2"):
        threads = [threading.Thread(target=apply, args=(one,)) for one in (destination, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(errors) == 1
    assert table(destination) == [(1, "a"), (2, "a")]
    other.close()


# -- what users add to the tables


def broken(destination: PostgresDestination, cells: list[dict[str, str | None]]) -> ModelBroken:
    with pytest.raises(ModelBroken) as caught:
        destination.apply(slice_of(1, (MODEL, cells), size=len(cells)))
    assert caught.value.model == MODEL.name
    assert destination.progress("shop") == Mark(LOG, 1, "h1")
    assert "secret" not in str(caught.value), "no cell is quoted"
    return caught.value


def test_a_unique_key_that_waits_for_the_end_takes_a_swap_and_refuses_a_double(
    destination: PostgresDestination, db: psycopg.Connection
) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1, "secret"), row(2, "b")])))
    db.execute("ALTER TABLE shop.t ADD CONSTRAINT apart UNIQUE (v) DEFERRABLE")
    assert 'constraint "apart"' in str(broken(destination, [row(2, "secret")]))
    destination.apply(slice_of(1, (MODEL, [row(1, "b"), row(2, "secret")]), size=2))
    assert table(destination) == [(1, "b"), (2, "secret")]


def test_a_check_that_a_row_violates_breaks_its_model(
    destination: PostgresDestination, db: psycopg.Connection
) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    db.execute("ALTER TABLE shop.t ADD CONSTRAINT short CHECK (length(v) < 5)")
    assert 'CheckViolation (SQLSTATE 23514), constraint "short"' in str(
        broken(destination, [row(2, "secret")])
    )


@pytest.mark.parametrize("state", ["P0001", "53100", "XX000", "42501"])
def test_what_a_trigger_says_of_a_row_is_told_by_its_state(
    destination: PostgresDestination, db: psycopg.Connection, state: str
) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    target = destination.table_of(MODEL.name)
    db.execute(
        f"""CREATE FUNCTION deny() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE 'no room for %', NEW USING ERRCODE = '{state}'; END $$;
        CREATE TRIGGER deny BEFORE INSERT ON {target} FOR EACH ROW EXECUTE FUNCTION deny()""".encode()
    )
    with pytest.raises((DestinationError, ModelBroken)) as caught:
        destination.apply(slice_of(1, (MODEL, [row(4711)])))
    assert f"SQLSTATE {state}" in caught.value.paragraph()
    assert "no room" not in caught.value.paragraph()


def test_foreign_keys_of_others_hold_where_they_can_wait(
    destination: PostgresDestination, db: psycopg.Connection
) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    db.execute("ALTER TABLE shop.t ADD PRIMARY KEY (id)")
    db.execute("CREATE TABLE notes (id bigint CONSTRAINT to_t REFERENCES shop.t DEFERRABLE, note text)")
    db.execute("INSERT INTO notes VALUES (1, 'mine')")
    destination.apply(slice_of(1, (MODEL, [row(1, "b")])))
    with pytest.raises(ModelBroken, match='constraint "to_t"') as caught:
        destination.apply(slice_of(2, (MODEL, [row(1, None, _op="d")])))
    assert caught.value.model == MODEL.name
    assert table(destination, "SELECT id, note FROM public.notes") == [(1, "mine")]
    db.execute("ALTER TABLE notes DROP CONSTRAINT to_t")
    db.execute("ALTER TABLE notes ADD CONSTRAINT to_t FOREIGN KEY (id) REFERENCES shop.t ON DELETE CASCADE")
    with pytest.raises(ModelBroken, match="ON DELETE CASCADE"):
        destination.apply(slice_of(2, (MODEL, [row(1, "c")])))
    assert table(destination, "SELECT id, note FROM public.notes") == [(1, "mine")]


def test_tables_that_refer_to_each_other_arrive_in_any_order_and_the_one_that_changed_is_blamed(
    destination: PostgresDestination, db: psycopg.Connection
) -> None:
    other = model_of("other", "SELECT id::BIGINT AS id FROM raw.shop.t")
    destination.apply(slice_of(0, (MODEL, [row(1)]), (other, [row(1)])))
    db.execute("ALTER TABLE shop.t ADD PRIMARY KEY (id)")
    db.execute("ALTER TABLE other ADD FOREIGN KEY (id) REFERENCES shop.t DEFERRABLE")
    destination.apply(slice_of(1, (other, [row(2)]), (MODEL, [row(2)])))
    for change, blamed in (((other, [row(3)]), "other"), ((MODEL, [row(1, None, _op="d")]), "shop.t")):
        with pytest.raises(ModelBroken, match="other_id_fkey") as caught:
            destination.apply(slice_of(2, change))
        assert caught.value.model == blamed
    assert table(destination) == [(1, "a"), (2, "a")]


def test_views_of_users_stay_and_what_they_forbid_breaks_the_model(
    destination: PostgresDestination, db: psycopg.Connection
) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    db.execute("CREATE VIEW seen AS SELECT v FROM shop.t")
    destination.apply(slice_of(1, (MODEL, [row(1, "b")])))
    assert db.execute("SELECT v FROM seen").fetchall() == [("b",)]
    narrow = mirror("shop", shape(("v", "integer")))
    with pytest.raises(ModelBroken, match="cannot be built again"):
        destination.forget_if_reshaped(narrow)
    with pytest.raises(ModelBroken, match="cannot take the model's columns"):
        destination.apply(slice_of(2, (narrow, [row(1, "1")])))
    assert table(destination) == [(1, "b")]


def test_a_table_that_was_there_before_is_not_touched(
    destination: PostgresDestination, db: psycopg.Connection
) -> None:
    db.execute("CREATE SCHEMA shop")
    db.execute("CREATE TABLE shop.t (id bigint, v text)")
    db.execute("INSERT INTO shop.t VALUES (7, 'theirs')")
    with pytest.raises(ModelBroken, match="_source"):
        destination.apply(slice_of(0, (MODEL, [row(1)])))
    assert db.execute("SELECT * FROM shop.t").fetchall() == [(7, "theirs")]


# -- values and names


def test_what_postgres_cannot_hold_is_bad_before_it_gets_there(destination: PostgresDestination) -> None:
    text = (
        "SELECT id::BIGINT AS id, v || CASE WHEN id = '1' THEN chr(0) ELSE '' END AS v, "
        "CASE WHEN id = '2' THEN DATE '5000-01-01 (BC)' ELSE DATE '-infinity' END AS d, "
        "[CASE WHEN id = '3' THEN chr(0) END] AS l FROM raw.shop.t"
    )
    model = limited(destination, model_of("m", text))
    destination.apply(slice_of(0, (model, [row(key) for key in range(1, 5)]), size=4))
    assert table(destination, "SELECT id, v, d::text FROM m") == [(4, "a", "-infinity")]
    records = "SELECT key, reason, columns FROM headrace.quarantine ORDER BY key"
    assert table(destination, records) == [
        ("1", "constraint.check", "v"),
        ("2", "constraint.check", "d"),
        ("3", "constraint.check", "l"),
    ]


def test_a_key_with_a_nul_breaks_its_model_alone(destination: PostgresDestination) -> None:
    model = mirror("shop", shape(("v", "text"), key=("v",)))
    with pytest.raises(ModelBroken, match="NUL character"):
        destination.apply(slice_of(0, (model, [row(1, "a\0b")])))


@pytest.mark.parametrize(
    ("name", "words"), [("x" * 64, "63 bytes"), (f"shop.{'é' * 32}", "63 bytes"), ("pg_x.t", "for itself")]
)
def test_a_name_that_postgres_would_cut_off_is_refused(
    destination: PostgresDestination, name: str, words: str
) -> None:
    assert words in str(destination.misnamed(name))
    with pytest.raises(ModelBroken, match=words):
        destination.apply(slice_of(0, (replace(MODEL, name=name), [row(1)])))
    long = mirror("shop", shape(("c" * 64, "text")))
    with pytest.raises(ModelBroken, match="63 bytes"):
        destination.apply(slice_of(0, (long, [{"id": "1"}])))


def test_case_tells_names_apart(destination: PostgresDestination) -> None:
    upper, lower = (model_of(name, "SELECT v FROM raw.shop.t") for name in ("Orders", "orders"))
    destination.apply(slice_of(0, (upper, [row(1, "U")]), (lower, [row(1, "l")])))
    assert table(destination, 'SELECT v FROM "Orders" UNION ALL SELECT v FROM orders') == [("U",), ("l",)]


def test_models_without_a_schema_go_where_the_project_says(url: str, tmp_path: Path) -> None:
    destination = PostgresDestination(Secret(url), schema="Mart")
    destination.apply(slice_of(0, (model_of("m", "SELECT v FROM raw.shop.t"), [row(1)])))
    assert table(destination, 'SELECT v FROM "Mart".m') == [("a",)]
    destination.close()


# -- what check says


DOCUMENTED = re.compile(r"### Rights\n.*?```sql\n(.*?)```", re.DOTALL)
PAGE = Path(__file__).parents[2] / "docs" / "destinations.md"


def test_the_rights_that_are_documented_are_enough_and_no_more_are_given(server: PostgresServer) -> None:
    """What the page says is run as it stands there, and a role of no other rights does all that there is to
    do, to tables that a reader with the documented rights reads."""
    found = DOCUMENTED.search(PAGE.read_text())
    assert found is not None
    before, _, after = found[1].partition("\\c warehouse\n")
    assert after, "it connects to the new database in between"
    with psycopg.connect(server.url, autocommit=True) as db:
        for statement in before.strip().split(";")[:-1]:
            db.execute(statement.encode())
    url = server.url.removesuffix("postgres") + "warehouse"
    with psycopg.connect(url, autocommit=True) as db:
        for statement in re.sub("--.*", "", after).strip().split(";")[:-1]:
            db.execute(statement.encode())
        db.execute("CREATE ROLE reader LOGIN")
        db.execute("GRANT USAGE ON SCHEMA shop TO reader")
        db.execute("ALTER DEFAULT PRIVILEGES FOR ROLE headrace_loader GRANT SELECT ON TABLES TO reader")
    loader = PostgresDestination(Secret(url.replace("postgres@", "headrace_loader@")))
    assert [finding.level for finding in loader.inspect()] == ["ok"]
    model = model_of("m", "SELECT id::BIGINT AS id, v FROM raw.shop.t")
    many = [row(key) for key in range(3_000)]
    loader.apply(slice_of(0, (MODEL, many), (model, [row(1)]), size=3_000))
    loader.apply(slice_of(3_000, (MODEL, many), (model, [row(1, "b")]), size=3_000))
    beside = Join(MODEL.name, "shop", MODEL.version, 0, 6_000, 6_000, "copy", 0, 6_000, "rebuild")
    loader.joins.start(beside, MODEL)
    mart = Mart("total", "SELECT count(*) AS n FROM shop.t", ("shop.t",), "table", 0.0, "v1")
    assert loader.marts.make(mart, None, ["shop.t"]).state == "ok"
    assert table(loader, "SELECT n FROM total") == [(3_000,)]
    loader.close()
    with psycopg.connect(url.replace("postgres@", "reader@")) as db:
        assert db.execute("SELECT count(*) FROM shop.t").fetchall() == [(3_000,)]
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            db.execute("DELETE FROM shop.t")


def test_inspect_says_what_is_missing(server: PostgresServer, url: str, db: psycopg.Connection) -> None:
    name = url.rpartition("/")[2]
    for statement in ("DROP ROLE IF EXISTS loader", "CREATE ROLE loader LOGIN"):
        db.execute(statement)
    db.execute(f"REVOKE TEMPORARY ON DATABASE {name} FROM public")
    loader = PostgresDestination(Secret(url.replace("postgres@", "loader@")))
    findings = list(loader.inspect())
    fails = {finding.what: finding.remedy for finding in findings if finding.level == "fail"}
    assert fails["temporary tables cannot be made"] == f'GRANT TEMPORARY ON DATABASE "{name}" TO "loader"'
    assert fails["there is no schema headrace, and it cannot be made"] == (
        'CREATE SCHEMA "headrace" AUTHORIZATION "loader"'
    )
    with pytest.raises(DestinationError, match="permission denied") as caught:
        loader.progress("shop")
    assert caught.value.verdict is not Verdict.RETRY
    for remedy in [*fails.values(), 'CREATE SCHEMA "shop" AUTHORIZATION loader']:
        db.execute(remedy)
    assert [finding.level for finding in loader.inspect()] == ["ok"]
    loader.apply(slice_of(0, (MODEL, [row(1)])))
    assert table(loader) == [(1, "a")]
    loader.close()
    with psycopg.connect(server.url, autocommit=True) as other:
        other.execute(f"CREATE DATABASE {name}_latin ENCODING 'LATIN1' TEMPLATE template0")
    latin = PostgresDestination(Secret(f"{url}_latin"))
    assert any("encoding LATIN1" in finding.what for finding in latin.inspect())
    latin.close()
