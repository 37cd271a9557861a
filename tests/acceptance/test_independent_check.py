"""Two proofs that share no code agree on a good run, and both turn red when anything is tampered with."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import psycopg
import pytest

from headrace.config import Project, load_project
from headrace.errors import HeadraceError
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


def log(sql: str) -> Callable[[Project], None]:
    def tamper(project: Project) -> None:
        with sqlite3.connect(project.state / "log" / "shop.db") as db:
            assert db.execute(sql).rowcount == 1, "the tampering changed nothing"

    return tamper


def flip_a_payload_byte(project: Project) -> None:
    with sqlite3.connect(project.state / "log" / "shop.db") as db:
        query = "SELECT \"offset\", payload FROM entries WHERE kind = 'rows' AND table_name = 'accounts'"
        offset, payload = db.execute(f"{query} ORDER BY 1 DESC").fetchone()
        at = len(payload) // 2
        changed = payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :]
        db.execute('UPDATE entries SET payload = ? WHERE "offset" = ?', (changed, offset))


def rewrite_the_end(project: Project) -> None:
    """Alter the last entry and make its hash anew: the chain holds, but the destination remembers."""
    with sqlite3.connect(project.state / "log" / "shop.db") as db:
        names = (
            '"offset", kind, table_schema, table_name, first_epoch, first_commit, first_ordinal, last_epoch, '
        )
        names += (
            "last_commit, last_ordinal, committed_at, rows, schema_version, appended_at, ends_group, payload"
        )
        (before,), (last,) = (
            db.execute(f'SELECT {what} FROM entries ORDER BY "offset" DESC LIMIT 1 OFFSET {n}').fetchall()
            for what, n in (("hash", 1), (names, 0))
        )
        *header, payload = last
        header[10] += 1
        text = json.dumps(header, separators=(",", ":")).encode()
        digest = hashlib.blake2b(bytes.fromhex(before[0]) + text + payload, digest_size=32).hexdigest()
        query = 'UPDATE entries SET committed_at = ?, hash = ? WHERE "offset" = ?'
        assert db.execute(query, (header[10], digest, header[0])).rowcount == 1


MIRROR, SALES = "(SELECT min(rowid) FROM shop.accounts)", "(SELECT min(rowid) FROM sales)"
LEDGER = "(SELECT min(rowid) FROM headrace.ledger WHERE model = 'sales')"
MIDDLE = '(SELECT max("offset") / 2 FROM entries)'
RECORD = "(SELECT min(rowid) FROM headrace.quarantine WHERE model = 'sales' AND status = 'quarantined')"
OF_MIRROR, OF_SALES = ({"model shop.accounts"}, {"mirror shop.accounts"}), ({"model sales"}, {"model sales"})
OF_LEDGER = ({"ledger of sales"}, {"ledger of sales"})
COPY_ENTRY = (
    'INSERT INTO entries SELECT (SELECT max("offset") + 1 FROM entries), kind, table_schema, table_name, '
    "first_epoch, first_commit, first_ordinal, last_epoch, last_commit, last_ordinal, committed_at, rows, "
    'schema_version, appended_at, ends_group, hash, bytes, payload FROM entries WHERE "offset" = '
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
