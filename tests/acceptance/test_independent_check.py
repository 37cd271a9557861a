"""Two proofs that share no code agree on a good run, and both turn red when anything is tampered with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
import duckdb
import psycopg
import pytest
from blake3 import blake3

from headrace.config import Project, load_project
from headrace.errors import HeadraceError
from headrace.log.sqlite import SQLiteLog
from headrace.pipeline import Pipeline
from headrace.testing import shop
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "independent_check.py"

SETTINGS = """\
[source.shop]
type = "postgres"
url = "{url}"
[destination]
type = "duckdb"
path = "warehouse.duckdb"
"""

MODEL = """\
/* headrace
key = ["order_id"]
[contract]
order_id = "BIGINT NOT NULL"
amount = "DECIMAL(12,2) NOT NULL CHECK (amount >= 0)"
*/
-- Discounts are typed by hand: those that are no number go to the quarantine.
SELECT id::BIGINT AS order_id, status AS status, amount::DECIMAL(12,2) AS amount,
       CAST(discount AS DECIMAL(5,2)) AS discount, due::DATE AS due
FROM raw.shop.orders
WHERE status <> 'returned'
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project that has copied a shop's history and followed three seconds of its work."""
    with PostgresServer(tmp_path_factory.mktemp("pg")) as server:
        with psycopg.connect(server.url, autocommit=True) as db:
            shop.create_schema(db)
            shop.fill(db, customers=50, products=20, orders=600, accounts=20)
        root = tmp_path_factory.mktemp("project") / "good"
        (root / "models").mkdir(parents=True)
        (root / "models" / "sales.sql").write_text(MODEL)
        (root / "headrace.toml").write_text(SETTINGS.format(url=server.url))
        Pipeline(load_project(root)).run_once()
        for seed in (1, 2):
            with shop.Workload(server.url, seed=seed, transactions_per_second=150):
                time.sleep(1.5)
            Pipeline(load_project(root)).run_once()
        yield load_project(root)


def start_check(project: Project) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-I", str(SCRIPT), f"--source-url={project.sources[0].url.reveal()}",
         f"--warehouse={project.destination.path}", f"--log={project.state / 'log' / 'shop.db'}",
         f"--model=sales={project.models / 'sales.sql'}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def both(project: Project) -> tuple[set[str], set[str], str]:
    """What verify blames, what the script blames, and what the script said."""
    with start_check(project) as check:
        by_verify = blamed_by_verify(project)
        said, _ = check.communicate(timeout=60)
    assert "Traceback" not in said, said
    wrong = {line.split(": ")[0].removeprefix("WRONG ") for line in said.splitlines() if line[:5] == "WRONG"}
    assert check.returncode == bool(wrong), said
    return by_verify, wrong, said


def blamed_by_verify(project: Project) -> set[str]:
    try:
        report = verify(project)
    except HeadraceError as error:
        return {str(error)}
    wrong = {finding.what.split(" at offset")[0] for finding in report.findings if not finding.ok}
    assert report.verified == (not wrong)
    return wrong


def test_the_script_imports_nothing_of_headrace() -> None:
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name.partition('.')[0] == 'headrace' for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_both_agree_on_a_good_run(good: Project) -> None:
    by_verify, by_script, said = both(good)
    assert by_verify == by_script == set()
    failing = next(line for line in said.splitlines() if "quarantine of sales" in line)
    assert " 0 rows fail" not in failing, "no row failed: the comparison of quarantines was idle"
    assert "model sales: 0 rows" not in said


def warehouse(sql: str) -> Callable[[Project], None]:
    def tamper(project: Project) -> None:
        with duckdb.connect(str(project.destination.path)) as db:
            assert db.execute(sql).fetchall()[0][0] == 1, "the tampering changed nothing"

    return tamper


@contextmanager
def opened_log(project: Project) -> Iterator[apsw.Connection]:
    """Write to the log's database as Headrace does, so that its pages' checksums are right."""
    log = SQLiteLog(project.state / "log" / "shop.db")
    with log._db.transaction():
        db = log._db.connection()
        yield db
    log.close()


def log(sql: str) -> Callable[[Project], None]:
    def tamper(project: Project) -> None:
        with opened_log(project) as db:
            db.execute(sql)
            assert db.changes() == 1, "the tampering changed nothing"

    return tamper


def flip_a_payload_byte(project: Project) -> None:
    with opened_log(project) as db:
        ((segment, start, size),) = db.execute(
            "SELECT segment, start, bytes FROM entries WHERE kind = 'rows' AND table_name = 'accounts' "
            'ORDER BY "offset" DESC LIMIT 1'
        ).fetchall()
    path = project.state / "log" / "shop.segments" / f"{segment:020d}.segment"
    content = bytearray(path.read_bytes())
    content[start + size // 2] ^= 1
    path.write_bytes(content)


def remove_a_segment(project: Project) -> None:
    min((project.state / "log" / "shop.segments").glob("*.segment")).unlink()


def flip_a_page_byte(project: Project) -> None:
    """In an index, which no hash vouches for: its checksum does, and SQLite's own look at it."""
    with opened_log(project) as db:
        ((page,),) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'by_table'").fetchall()
        size = db.pragma("page_size")
    path = project.state / "log" / "shop.db"
    content = bytearray(path.read_bytes())
    content[(page - 1) * size + size - 20] ^= 1
    path.write_bytes(content)


HEADER = (
    '"offset", kind, table_schema, table_name, first_epoch, first_commit, first_ordinal, last_epoch, '
    "last_commit, last_ordinal, min_txid, max_txid, committed_at, latest_at, rows, "
    "schema_version, appended_at, ends_group"
)


def rewrite_the_end(project: Project) -> None:
    """Alter the last entry and make its hash anew: the chain holds, but the destination remembers."""
    path = project.state / "log" / "shop.segments"
    with opened_log(project) as db:
        query = (
            f"SELECT {HEADER}, previous, bytes, segment, start, payload, coalesce(filter, x'') FROM entries "
        )
        query += 'LEFT JOIN filters USING ("offset") ORDER BY "offset" DESC LIMIT 1'
        (*header, previous, size, segment, start, payload, key_filter) = db.execute(query).fetchall()[0]
        if segment is not None:
            payload = (path / f"{segment:020d}.segment").read_bytes()[start : start + size]
        header[HEADER.split(", ").index("committed_at")] += 1
        told = json.dumps(["shop", *header, len(key_filter)], separators=(",", ":"), ensure_ascii=False)
        body = previous + told.encode() + key_filter + payload
        digest = blake3(body).digest()
        query = 'UPDATE entries SET committed_at = committed_at + 1, hash = ? WHERE "offset" = ?'
        db.execute(query, (digest, header[0]))
        assert db.changes() == 1


MIRROR, SALES = "(SELECT min(rowid) FROM shop.accounts)", "(SELECT min(rowid) FROM sales)"
LEDGER = "(SELECT min(rowid) FROM headrace.ledger WHERE model = 'sales')"
MIDDLE = '(SELECT max("offset") / 2 FROM entries)'
RECORD = "(SELECT min(rowid) FROM headrace.quarantine WHERE model = 'sales' AND status = 'quarantined')"
OF_MIRROR, OF_SALES = ({"model shop.accounts"}, {"mirror shop.accounts"}), ({"model sales"}, {"model sales"})
OF_LEDGER = ({"ledger of sales"}, {"ledger of sales"})
COPY_ENTRY = (
    f'INSERT INTO entries SELECT (SELECT max("offset") + 1 FROM entries), {HEADER.partition(", ")[2]}, previous, '
    "hash, bytes, segment, start, payload, high_epoch, high_commit, high_ordinal, high_at, high_committed_at FROM entries "
    'WHERE "offset" = '
)

# ruff: noqa: E501
TAMPERINGS = {
    "mirror row altered": (warehouse(f"UPDATE shop.accounts SET balance = balance + 0.01 WHERE rowid = {MIRROR}"), *OF_MIRROR),
    "mirror row removed": (warehouse(f"DELETE FROM shop.accounts WHERE rowid = {MIRROR}"), *OF_MIRROR),
    "mirror row doubled": (warehouse(f"INSERT INTO shop.accounts SELECT * FROM shop.accounts WHERE rowid = {MIRROR}"), *OF_MIRROR),
    "model row altered": (warehouse(f"UPDATE sales SET status = status || ' ' WHERE rowid = {SALES}"), *OF_SALES),
    "model row removed": (warehouse(f"DELETE FROM sales WHERE rowid = {SALES}"), *OF_SALES),
    "model row doubled": (warehouse(f"INSERT INTO sales SELECT * FROM sales WHERE rowid = {SALES}"), *OF_SALES),
    "log byte altered": (flip_a_payload_byte, {"log shop"}, {"log"}),
    "log segment removed": (remove_a_segment, {"log shop"}, {"log"}),
    "log entry removed": (log(f'DELETE FROM entries WHERE "offset" = {MIDDLE}'), {"log shop"}, {"log"}),
    "log entry doubled": (log(COPY_ENTRY + MIDDLE), {"log shop"}, {"log"}),
    "last log entry made anew": (rewrite_the_end, {"progress of shop"}, {"progress"}),
    "ledger figure altered": (warehouse(f"UPDATE headrace.ledger SET applied = applied + 1 WHERE rowid = {LEDGER}"), *OF_LEDGER),
    "ledger figures altered alike": (
        warehouse(f"UPDATE headrace.ledger SET read = read + 1, applied = applied + 1 WHERE rowid = {LEDGER}"), *OF_LEDGER
    ),
    "ledger span altered": (warehouse(f'UPDATE headrace.ledger SET "through" = "after" + 1 WHERE rowid = {LEDGER}'), *OF_LEDGER),
    "ledger row removed": (warehouse(f"DELETE FROM headrace.ledger WHERE rowid = {LEDGER}"), *OF_LEDGER),
    "ledger row doubled": (warehouse(f"INSERT INTO headrace.ledger SELECT * FROM headrace.ledger WHERE rowid = {LEDGER}"), *OF_LEDGER),
    "quarantine record removed": (warehouse(f"DELETE FROM headrace.quarantine WHERE rowid = {RECORD}"), *OF_LEDGER),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_both_turn_red(good: Project, tmp_path: Path, name: str) -> None:
    tamper, verify_blames, check_blames = TAMPERINGS[name]
    root = tmp_path / "copy"
    shutil.copytree(good.root, root)
    project = load_project(root)
    tamper(project)
    by_verify, by_script, _ = both(project)
    assert verify_blames <= by_verify
    assert check_blames <= by_script


def test_a_byte_of_the_logs_database_that_no_hash_covers(good: Project, tmp_path: Path) -> None:
    """Its page's checksum is Headrace's own: the script, which has SQLite of the standard library, is blind."""
    root = tmp_path / "copy"
    shutil.copytree(good.root, root)
    project = load_project(root)
    flip_a_page_byte(project)
    by_verify, _, _ = both(project)
    assert "checksum" in " ".join(by_verify) or "log shop" in by_verify


def test_both_agree_when_retention_has_trimmed_the_log(good: Project, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(good.root, root)
    project = load_project(root)
    log = SQLiteLog(project.state / "log" / "shop.db")
    log.trim(log.end().offset // 2)
    begin = log.begin().offset
    log.close()
    by_verify, by_script, said = both(project)
    assert by_verify == by_script == set()
    assert f"the chain holds from offset {begin + 1} to " in said
    spans = [line for line in said.splitlines() if "begin before the log does" in line]
    assert len(spans) == 5, "all models had begun to read before"
    with opened_log(project) as db:
        db.execute("UPDATE stops SET hash = randomblob(32)")
    assert "log" in both(project)[1]
