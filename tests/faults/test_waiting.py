"""Children that are committed long before their parents, in any order, in circles, while it is killed.

`HEADRACE_CHILDREN` is how many there are, of each of two kinds; the issue's figure is 100,000.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import psycopg
import pytest
from harness import make_project, said, start, stop

from headrace.config import Project
from headrace.errors import HeadraceError
from headrace.server import read_rows
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify

CHILDREN = int(os.environ.get("HEADRACE_CHILDREN", "600"))
_BATCHES = 10
_PATIENCE = 60.0 + CHILDREN / 100
_KEYED = """/* headrace
key = ["id"]
orphan_after = "{after}"
[[foreign_key]]
columns = ["{column}"]
references = "{parent}"
*/
SELECT id::BIGINT AS id, {column}::BIGINT AS {column} FROM raw.shop.{table}"""


def _rows(project: Project, query: str) -> list[tuple[object, ...]]:
    """Ask a destination that may be held or not be there yet."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return [tuple(row) for row in read_rows(project, query)[1]]
        except (HeadraceError, OSError, ValueError):
            assert time.monotonic() < deadline, "the destination does not answer"
            time.sleep(0.2)


def _until(project: Project, query: str, wanted: object, what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while (found := _rows(project, query)[0][0]) != wanted:
        assert time.monotonic() < deadline, f"{what}: {found} instead of {wanted}"
        time.sleep(0.2)


def _family(folder: Path, server: PostgresServer, name: str, after: str) -> tuple[Project, str]:
    """Make tables without foreign keys of their own, so that children can come first."""
    server.psql(f"CREATE DATABASE {name}")
    url = server.url.removesuffix("postgres") + name
    with psycopg.connect(url, autocommit=True) as db:
        for table, column in (("parents", "v"), ("children", "parent_id"), ("rings", "next_id")):
            db.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, {column} int)".encode())
    project = make_project(folder, url, slot=f"headrace_{name}")
    for table, column, parent in (("children", "parent_id", "shop.parents"), ("rings", "next_id", "rings")):
        text = _KEYED.format(after=after, column=column, parent=parent, table=table)
        (folder / "models" / f"{table}.sql").write_text(text)
    return project, url


def _insert(url: str, table: str, rows: list[tuple[int, int]]) -> None:
    """Insert rows in transactions of a batch each."""
    size = -(-len(rows) // _BATCHES)
    with psycopg.connect(url, autocommit=True) as db, db.cursor() as cursor:
        for at in range(0, len(rows), size):
            with cursor.copy(f"COPY {table} FROM STDIN".encode()) as copy:
                for row in rows[at : at + size]:
                    copy.write_row(row)


def _shuffled(chance: random.Random, rows: list[tuple[int, int]]) -> list[tuple[int, int]]:
    chance.shuffle(rows)
    return rows


def _alerts(project: Project) -> int:
    return said(project).count("NEW CAUSE")


def _assert_verified(project: Project) -> None:
    wrong = [finding for finding in verify(project).findings if not finding.ok]
    assert not wrong, wrong


def test_children_that_come_long_before_their_parents_are_all_applied(
    tmp_path: Path, server: PostgresServer
) -> None:
    chance = random.Random(1)
    project, url = _family(tmp_path, server, "early", "15m")
    process = start(project)
    _until(project, "SELECT count(*) FROM headrace.models WHERE state = 'in_sync'", 3, "models")
    parents = max(CHILDREN // 10, 1)
    _insert(url, "children", _shuffled(chance, [(n, n % parents) for n in range(CHILDREN)]))
    # Rings of five, of which two are missing.
    ring = [(n, n - 4 if n % 5 == 4 else n + 1) for n in range(CHILDREN)]
    ring = _shuffled(chance, ring)
    _insert(url, "rings", [row for row in ring if row[0] % 5 > 1])
    count = "SELECT count(*) FROM headrace.quarantine WHERE status = 'waiting'"
    _until(project, count, CHILDREN + sum(row[0] % 5 > 1 for row in ring), "waiting")
    begun = time.monotonic()
    coming = _shuffled(chance, [(n, n) for n in range(parents)])
    missing = [row for row in ring if row[0] % 5 < 2]
    for part in range(5):
        _insert(url, "parents", coming[part::5])
        _insert(url, "rings", missing[part::5])
        time.sleep(chance.uniform(0.2, 2.0))
        assert stop(process, signal.SIGKILL) == -signal.SIGKILL
        process = start(project)
    _until(project, "SELECT count(*) FROM children", CHILDREN, "children")
    _until(project, "SELECT count(*) FROM rings", CHILDREN, "rings")
    _until(project, count, 0, "waiting")
    seconds = time.monotonic() - begun
    print(f"{2 * CHILDREN} rows in {seconds:.1f} s from their parents' first on, with five kills")
    assert stop(process) == 0
    assert _alerts(project) == 0
    _assert_verified(project)


def test_children_that_wait_too_long_are_one_issue_and_still_applied(
    tmp_path: Path, server: PostgresServer
) -> None:
    project, url = _family(tmp_path, server, "orphans", "1s")
    process = start(project)
    _until(project, "SELECT count(*) FROM headrace.models WHERE state = 'in_sync'", 3, "models")
    _insert(url, "children", _shuffled(random.Random(2), [(n, n % 10) for n in range(CHILDREN)]))
    late = "SELECT count(*) FROM headrace.quarantine WHERE status = 'quarantined'"
    _until(project, late, CHILDREN, "quarantined")
    assert _rows(project, "SELECT count(DISTINCT issue) FROM headrace.quarantine") == [(1,)]
    assert stop(process, signal.SIGKILL) == -signal.SIGKILL
    process = start(project)
    _insert(url, "parents", [(n, n) for n in range(10)])
    _until(project, "SELECT count(*) FROM children", CHILDREN, "children")
    _until(project, late, 0, "quarantined")
    assert stop(process) == 0
    assert _alerts(project) == 1
    _assert_verified(project)


@pytest.mark.parametrize("place", ["destination.apply.committed", "destination.redrive.commit"])
def test_a_pipeline_killed_between_a_parent_and_its_children_brings_them_at_its_next_start(
    tmp_path: Path, server: PostgresServer, place: str
) -> None:
    name = place.rpartition(".")[2]
    project, url = _family(tmp_path, server, name, "15m")
    process = start(project)
    _until(project, "SELECT count(*) FROM headrace.models WHERE state = 'in_sync'", 3, "models")
    _insert(url, "children", [(1, 7), (2, 7), (3, 8)])
    _until(project, "SELECT count(*) FROM headrace.quarantine", 3, "waiting")
    assert stop(process) == 0
    _insert(url, "parents", [(7, 7)])
    process = start(project, failpoints=f"{place}=kill")
    assert process.wait(60) == -signal.SIGKILL
    process = start(project)
    _until(project, "SELECT count(*) FROM children", 2, "children")
    assert stop(process) == 0
    _assert_verified(project)
