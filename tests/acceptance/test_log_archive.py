"""`headrace log export`, `import` and `backup`, as a user meets them: with a pipeline on a real Postgres, and
where there is nothing but a log."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psycopg
import pyarrow.parquet as pq
import pytest

from headrace.change import Entry, Position, TableId
from headrace.log.proof import verify
from headrace.log.sqlite import SQLiteLog
from headrace.testing.postgres import PostgresServer

SECRET = '[source.shop]\nurl = "${env:HEADRACE_NOT_SET_ANYWHERE}"\n'


class Done(NamedTuple):
    code: int
    out: str
    err: str


def headrace(*arguments: str | Path, cwd: Path) -> Done:
    command = [sys.executable, "-W", "error", "-m", "headrace", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)
    assert "Traceback" not in done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def made(*arguments: str | Path, cwd: Path) -> list[str]:
    """Run a command that must work; returns the cells under its header."""
    done = headrace(*arguments, cwd=cwd)
    assert done.code == 0, done
    assert done.err == ""
    assert done.out.splitlines()[-2].split() == ["files", "entries", "rows", "bytes", "head", "hash"]
    return done.out.splitlines()[-1].split()


def append(log: SQLiteLog, *commits: int) -> None:
    for commit in commits:
        at = Position(0, commit, 1)
        log.append([Entry("rows", TableId("public", "t"), at, at, commit, 2, 1, b"payload" * commit)])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a log of four entries and a secret that nobody has set."""
    folder = tmp_path / "p"
    (folder / ".headrace" / "log").mkdir(parents=True)
    (folder / "headrace.toml").write_text(SECRET)
    log = SQLiteLog(folder / ".headrace" / "log" / "shop.db")
    append(log, 1, 2, 3, 4)
    log.close()
    return folder


def end_of(path: Path) -> tuple[int, str]:
    log = SQLiteLog(path, read_only=True)
    try:
        end = verify(log).end
    finally:
        log.close()
    return end.offset, end.hash


# -- without a pipeline, its source or its secrets -----------------------------------------------------


def test_export_import_and_backup_say_what_they_did(project: Path, tmp_path: Path) -> None:
    head = [str(cell) for cell in end_of(project / ".headrace/log/shop.db")]
    assert made("log", "export", tmp_path / "out", cwd=project) == ["1", "4", "8", "70", *head]
    again = headrace("log", "export", tmp_path / "out", cwd=project)
    assert "(1 more there already)" in again.out
    assert again.out.splitlines()[-1].split() == ["0", "0", "0", "0", *head]
    assert made("log", "backup", tmp_path / "copy", cwd=project) == ["2", "4", "8", "70", *head]

    into = tmp_path / "shop.db"
    assert made("log", "import", tmp_path / "out", "--into", into, cwd=tmp_path) == [
        "1",
        "4",
        "8",
        "70",
        *head,
    ]
    for path in (into, tmp_path / "copy" / "shop.db"):
        assert [str(cell) for cell in end_of(path)] == head


def test_a_log_is_imported_into_a_project_that_has_none(project: Path, tmp_path: Path) -> None:
    made("log", "export", tmp_path / "out", cwd=project)
    refused = headrace("log", "import", tmp_path / "out", cwd=project)
    assert (refused.code, refused.out) == (2, "")
    assert re.search(r"shop\.db is there already\. ", refused.err)

    empty = tmp_path / "q"
    empty.mkdir()
    assert "is no project of Headrace" in headrace("log", "import", tmp_path / "out", cwd=empty).err
    (empty / "headrace.toml").write_text(SECRET)
    made("log", "import", tmp_path / "out", cwd=empty)
    assert end_of(empty / ".headrace/log/shop.db") == end_of(project / ".headrace/log/shop.db")


def test_what_does_not_hold_is_named_and_makes_nothing(project: Path, tmp_path: Path) -> None:
    made("log", "export", tmp_path / "out", cwd=project)
    (path,) = (tmp_path / "out").iterdir()
    data = bytearray(path.read_bytes())
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(0).column(file.schema.names.index("payload"))
    data[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    (tmp_path / "in").mkdir()
    done = headrace("log", "import", path, "--into", tmp_path / "in" / "shop.db", cwd=tmp_path)
    assert (done.code, done.out) == (1, "")
    assert path.name in done.err
    assert "it cannot be read behind offset 1" in done.err
    assert len(done.err.splitlines()) == 1
    assert list((tmp_path / "in").iterdir()) == []


def test_mistakes_are_said_in_a_sentence(project: Path, tmp_path: Path) -> None:
    def says(*arguments: str | Path, cwd: Path = project) -> str:
        done = headrace("log", *arguments, cwd=cwd)
        assert (done.code, done.out) == (2, ""), done
        return done.err

    assert "There is no log in" in says("export", tmp_path / "x", cwd=tmp_path)
    assert "There is no log of a source nil. There are: shop." in says(
        "export", tmp_path / "x", "--source", "nil"
    )
    assert "There is no file of an export in" in says("import", tmp_path, "--into", tmp_path / "shop.db")
    assert "is not an empty folder" in says("backup", project)
    SQLiteLog(project / ".headrace" / "log" / "other.db").close()
    assert "There are the logs of several sources. Name one: other, shop." in says("backup", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert made("log", "backup", tmp_path / "x", "--source", "other", cwd=project)[1] == "0"
    made("log", "export", tmp_path / "two", "--source", "shop", cwd=project)
    made("log", "export", tmp_path / "two", "--source", "other", cwd=project)


# -- with a pipeline -----------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    with tempfile.TemporaryDirectory(prefix="hr-") as folder, PostgresServer(Path(folder)) as server:
        yield server


def test_a_running_pipeline_is_backed_up_and_goes_on_from_what_was_kept(
    server: PostgresServer, tmp_path: Path
) -> None:
    """An old backup is refused, for the destination is ahead of it; an export of the end goes on."""
    project = tmp_path / "p"
    project.mkdir()
    (project / "headrace.toml").write_text(f'[source.shop]\nurl = "{server.url}"\n')
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute("CREATE TABLE t (id bigint PRIMARY KEY, v text)")
        db.execute("INSERT INTO t SELECT n, 'copied' FROM generate_series(1, 500) n")
        assert headrace("run", "--once", cwd=project).code == 0
        run = subprocess.Popen(
            [sys.executable, "-m", "headrace", "run"],
            cwd=project,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            for n in range(3):
                db.execute(
                    "INSERT INTO t SELECT 1000 + 100 * %s + n, 'late' FROM generate_series(1, 50) n", [n]
                )
                time.sleep(0.3)
                made("log", "backup", tmp_path / f"backup{n}", cwd=project)
                made("log", "export", tmp_path / "out", cwd=project)
        finally:
            run.send_signal(signal.SIGTERM)
            assert run.wait(30) == 0
        log = project / ".headrace" / "log"
        head = made("log", "export", tmp_path / "out", cwd=project)[4:]

        shutil.rmtree(log)
        shutil.copytree(tmp_path / "backup0", log)
        ahead = headrace("run", "--once", cwd=project)
        assert (ahead.code, "to stage the log anew" in ahead.err) == (1, True), ahead
        shutil.rmtree(project / ".headrace" / "staging" / "raw" / "shop")
        old = headrace("run", "--once", cwd=project)
        assert (old.code, "the state folder is an older copy" in old.err) == (2, True), old

        shutil.rmtree(log)
        assert made("log", "import", tmp_path / "out", cwd=project)[4:] == head
        db.execute("INSERT INTO t VALUES (5000, 'after the import')")
        done = headrace("run", "--once", cwd=project)
        assert done.code == 0, done
        assert "verified" in headrace("verify", cwd=project).out.splitlines()

        # With nothing but an old backup: destination and staging are filled anew.
        shutil.rmtree(log)
        shutil.copytree(tmp_path / "backup0", log)
        shutil.rmtree(project / ".headrace" / "staging" / "raw" / "shop")
        (project / "warehouse.duckdb").unlink()
        gap = headrace("run", "--once", cwd=project)
        assert (gap.code, "headrace resync shop" in gap.err) == (1, True), gap
        assert headrace("resync", "shop", cwd=project).code == 0
        assert headrace("run", "--once", cwd=project).code == 0
    assert "verified" in headrace("verify", cwd=project).out.splitlines()
