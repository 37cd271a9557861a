"""A bank: whatever runs, each read of the destination sees as much money as there is.

Another process reads without a pause while money moves, accounts open and close, one transaction changes
every account, and a model is rebuilt. Then some records go bad: what the model lacks is what the quarantine
names, read in the same transaction. HEADRACE_BANK_ROWS is the number of accounts.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import psycopg
import pytest

from headrace.cli import main
from headrace.config import Project, load_project
from headrace.errors import HeadraceError
from headrace.server import read
from headrace.testing.postgres import PostgresServer
from pipelines import running, until

ACCOUNTS = int(os.environ.get("HEADRACE_BANK_ROWS", "100000"))
"""Accounts that stay; as many again as COUNTER open and close."""
COUNTER = 1_000
TOTAL = 100 * (ACCOUNTS + COUNTER)
PATIENCE = 60.0 + ACCOUNTS / 5_000

SELECT = "SELECT id::BIGINT AS id, balance::DECIMAL(14,2) AS balance, {} AS level FROM raw.shop.accounts"
MODELS = {"accounts": SELECT.format("level"), "holdings": SELECT.format("level::INTEGER")}
"""The first takes every record; the second, which is rebuilt, lacks those that are bad."""

READER = '''
import json, sys, time
kind, where = sys.argv[1:]
QUERY = """
WITH named AS (
  SELECT DISTINCT key FROM headrace.quarantine
  WHERE model = 'holdings' AND status IN ('quarantined', 'waiting', 'blocked'))
SELECT (SELECT sum(balance) FROM accounts) AS whole, (SELECT sum(balance) FROM holdings) AS model,
  (SELECT coalesce(sum(coalesce(h.balance, 0) - coalesce(a.balance, 0)), 0) FROM named
   LEFT JOIN holdings h ON h._source_key = key LEFT JOIN accounts a ON a._source_key = key) AS named,
  (SELECT count(*) FROM named) AS records,
  (SELECT count(DISTINCT commit) FROM headrace.models) AS commits,
  (SELECT max(commit) FROM headrace.progress) AS at
"""

def ask():
    if kind == "duckdb":
        import duckdb
        with duckdb.connect(where, read_only=True) as db:
            return db.execute(QUERY).fetchone()
    import psycopg
    with psycopg.connect(where) as db:
        db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        return db.execute(QUERY).fetchone()

seen, reads, most, wrong = set(), 0, 0, []
ask()
print("reads", flush=True)
import threading
end = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), end.set()), daemon=True).start()
while not end.is_set():
    whole, model, named, records, commits, at = ask()
    reads, most = reads + 1, max(most, records)
    seen.add(at)
    if whole != TOTAL or (commits == 1 and model - named != TOTAL) or (not records and model != TOTAL):
        wrong.append([str(whole), str(model), str(named), records, commits, at])
print(json.dumps({"reads": reads, "commits": len(seen), "most": most, "wrong": wrong[:5]}), flush=True)
'''


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("pg")) as made:
        yield made


@pytest.fixture(params=["duckdb", "postgres"])
def bank(request: pytest.FixtureRequest, server: PostgresServer, tmp_path: Path) -> tuple[str, Project, str]:
    """Return the source's url, the project, and where readers look."""
    for name in ("bank", "warehouse"):
        server.psql(f"CREATE DATABASE {request.param}_{name}")
    urls = [f"{server.url.removesuffix('postgres')}{request.param}_{name}" for name in ("bank", "warehouse")]
    with psycopg.connect(urls[0], autocommit=True) as db:
        db.execute("CREATE TABLE accounts (id bigint PRIMARY KEY, balance numeric(14,2), level text)")
        db.execute(
            "INSERT INTO accounts SELECT i, 100, '1' FROM generate_series(1, %s) i", [ACCOUNTS + COUNTER]
        )
    copy = tmp_path / "copy.duckdb"
    destination = (
        f'type = "postgres"\nurl = "{urls[1]}"'
        if request.param == "postgres"
        else f'publish = "{copy}"\npublish_every = "100ms"'
    )
    (tmp_path / "headrace.toml").write_text(
        f'[source.shop]\nurl = "{urls[0]}"\nslot = "bank_{request.param}"\n[destination]\n{destination}\n'
    )
    (tmp_path / "models").mkdir()
    for name, text in MODELS.items():
        (tmp_path / "models" / f"{name}.sql").write_text(text)
    where = urls[1] if request.param == "postgres" else str(copy)
    return urls[0], load_project(tmp_path), where


class Counter(threading.Thread):
    """Moves money, up to a hundred times a second, until told to stop; if `is_bad`, a change in ten leaves a
    record that does not fit the model, and others make it good again."""

    def __init__(self, url: str, *, is_bad: bool) -> None:
        super().__init__()
        self.moved = 0
        self.stop = threading.Event()
        self._is_bad = is_bad
        self._url, self._random = url, random.Random(1)

    def run(self) -> None:
        with psycopg.connect(self._url, autocommit=True) as db:
            rows = db.execute("SELECT id FROM accounts WHERE id > %s ORDER BY id", [ACCOUNTS]).fetchall()
            open_ = [id_ for (id_,) in rows]
            newest = open_[-1]
            while not self.stop.wait(0.01):
                what = self._random.random()
                with db.transaction():
                    if what < 0.15 and len(open_) > 10:
                        going = open_.pop(self._random.randrange(len(open_)))
                        balance = db.execute(
                            "DELETE FROM accounts WHERE id = %s RETURNING balance", [going]
                        ).fetchall()[0][0]
                        self._pay(db, balance, self._random.choice(open_))
                    elif what < 0.3:
                        newest += 1
                        open_.append(newest)
                        db.execute("INSERT INTO accounts VALUES (%s, 25, %s)", [newest, self._level()])
                        self._pay(db, -25, self._random.choice(open_[:-1]))
                    else:
                        one, other = self._random.sample(open_, 2)
                        amount = self._random.randrange(1, 50)
                        self._pay(db, -amount, one)
                        self._pay(db, amount, self._random.choice([other, self._random.randint(1, ACCOUNTS)]))
                self.moved += 1

    def _pay(self, db: psycopg.Connection[Any], amount: object, account: int) -> None:
        db.execute(
            "UPDATE accounts SET balance = balance + %s, level = %s WHERE id = %s",
            [amount, self._level(), account],
        )

    def _level(self) -> str:
        return "high" if self._is_bad and self._random.random() < 0.1 else "1"


def is_to_be_read(kind: str, where: str) -> bool:
    """Return whether readers find both models whole: the first copies may be of moments before they were."""
    if kind == "postgres":
        return True
    try:
        with duckdb.connect(where, read_only=True) as db:
            in_sync = db.execute("SELECT count(*) FROM headrace.models WHERE state = 'in_sync'").fetchall()
    except (duckdb.IOException, duckdb.CatalogException):
        return False
    return in_sync == [(2,)]


@contextmanager
def reading(kind: str, where: str) -> Iterator[dict[str, Any]]:
    """Read in a process of its own; what it has found is in the dict at the end."""
    found: dict[str, Any] = {}
    code = f"TOTAL = {TOTAL}\n{READER}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, kind, where], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "reads\n"
        yield found
    finally:
        out, _ = process.communicate("\n", timeout=PATIENCE)
    found |= json.loads(out.splitlines()[-1])


def changed_by_all(url: str, amount: int) -> None:
    """One transaction over every account that stays: half give to the other half."""
    with psycopg.connect(url) as db:
        db.execute(
            "UPDATE accounts SET balance = balance + CASE WHEN id %% 2 = 0 THEN %s ELSE -%s END "
            "WHERE id <= %s",
            [amount, amount, ACCOUNTS],
        )


class Bank:
    """The bank as it runs."""

    def __init__(self, url: str, project: Project, where: str) -> None:
        self.url, self.project, self.where = url, project, where
        self.kind = project.destination.type

    def ask(self, query: str) -> object:
        """Ask the pipeline for one value; None while it has no answer."""
        try:
            (found,) = read(self.project, [f"SELECT ({query}) AS n"])
        except HeadraceError:
            return None
        return found["n"][0].as_py()

    def arrive(self, account: int) -> None:
        with psycopg.connect(self.url) as db:
            ((balance,),) = db.execute("SELECT balance FROM accounts WHERE id = %s", [account]).fetchall()
        query = f"SELECT balance FROM accounts WHERE id = {account}"
        until(lambda: self.ask(query) == balance, PATIENCE, "it has not arrived")

    def rebuild(self) -> None:
        assert main(["rebuild", "holdings", "--project", str(self.project.root)]) == 0

    def day(self, *, is_bad: bool) -> str:
        """Have all happen at once, and return what was seen of it."""
        counter = Counter(self.url, is_bad=is_bad)
        begun = time.monotonic()
        with reading(self.kind, self.where) as found:
            counter.start()
            try:
                until(lambda: counter.moved >= 50, PATIENCE)
                changed_by_all(self.url, 1)
                self.rebuild()
                until(lambda: counter.moved >= 150, PATIENCE)
            finally:
                counter.stop.set()
                counter.join()
            self.arrive(2)
        assert found["wrong"] == []
        assert found["commits"] >= 3, "it did not see money move"
        assert (found["most"] > 0) == is_bad
        took = time.monotonic() - begun
        return (
            f"{self.kind}, {ACCOUNTS} accounts, {counter.moved} transactions in {took:.0f} s: "
            f"{found['reads']} reads of {found['commits']} commits, at most {found['most']} bad records"
        )

    def publishes_what_there_is_at_the_end(self, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        assert main(["status", "--json", "--project", str(self.project.root)]) == 0
        report = json.loads(capsys.readouterr().out)
        copy = report["destination"]["published"]
        if self.kind == "postgres":
            assert copy is None
            return
        (source,) = report["sources"]
        assert copy["sources"]["shop"]["offset"] == source["visible"]["offset"]
        assert (copy["error"], copy["path"], copy["is_current"]) == (None, self.where, False)
        assert main(["status", "--project", str(self.project.root)]) == 0
        position = copy["sources"]["shop"]["position"]
        assert f"shop through {position}" in capsys.readouterr().out


@pytest.mark.timeout(300 + ACCOUNTS // 1_000)
def test_no_money_is_ever_made_or_lost(
    bank: tuple[str, Project, str], capsys: pytest.CaptureFixture[str]
) -> None:
    it = Bank(*bank)
    with running(it.project):
        joined = "SELECT count(*) FROM headrace.models WHERE state = 'in_sync'"
        until(lambda: it.ask(joined) == 2, PATIENCE, "the copy has not arrived")
        until(lambda: is_to_be_read(it.kind, it.where), PATIENCE, "nothing is published")
        figures = [it.day(is_bad=False), it.day(is_bad=True)]
    it.publishes_what_there_is_at_the_end(capsys)
    with capsys.disabled():
        print("", *figures, sep="\n")
