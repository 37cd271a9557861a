"""The copy of a DuckDB file for readers: whole at every moment, and never in the way of an apply."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import duckdb
import pytest

from headrace.destinations import publishing
from headrace.destinations.duckdb import DuckDBDestination
from headrace.destinations.publishing import Publisher, read_published
from headrace.errors import DestinationBusy, DestinationUnavailable, Verdict
from headrace.failpoints import VARIABLE
from headrace.protocols import Part, Slice
from headrace.testing.destinations import MODEL, row, slice_of
from headrace.testing.logs import armed
from headrace.transform.fold import NOTHING


class Kept(NamedTuple):
    destination: DuckDBDestination
    publisher: Publisher
    path: Path

    def apply(self, after: int, *keys: int) -> None:
        self.destination.apply(slice_of(after, (MODEL, [row(key) for key in keys]), size=len(keys)))

    def rows(self) -> list[int]:
        """The rows of the copy, as a reader of its own has them."""
        with duckdb.connect(str(self.path), read_only=True) as db:
            return [key for (key,) in db.execute("SELECT id FROM shop.t ORDER BY id").fetchall()]


def kept(folder: Path, every: float = 0.0) -> Kept:
    destination = DuckDBDestination(folder / "w.duckdb")
    path = folder / "public" / "copy.duckdb"
    path.parent.mkdir(exist_ok=True)
    return Kept(destination, Publisher(destination, path, every), path)


def files(it: Kept) -> list[str]:
    return [path.name for path in it.path.parent.iterdir()]


@pytest.fixture
def it(tmp_path: Path) -> Kept:
    return kept(tmp_path)


def test_a_reader_keeps_what_it_has_opened_and_delays_nothing(it: Kept) -> None:
    assert not it.publisher.step(), "there is nothing yet"
    it.apply(0, 1)
    assert it.publisher.step()
    with duckdb.connect(str(it.path), read_only=True) as reader:
        reader.execute("BEGIN")
        for key in range(2, 20):
            begun = time.monotonic()
            it.apply(key - 1, key)
            assert it.publisher.step(now=True)
            assert time.monotonic() - begun < 5
            assert reader.execute("SELECT count(*) FROM shop.t").fetchall() == [(1,)]
    assert it.rows() == [*range(1, 20)]
    copy = read_published(it.path)
    assert copy is not None
    assert copy.sources == {"shop": (19, 19, 0)}
    assert time.time() - copy.made_at < 60
    assert files(it) == ["copy.duckdb"]
    assert it.path.stat().st_mode & 0o222 == 0


def test_it_is_made_at_an_interval_where_something_has_changed(tmp_path: Path) -> None:
    it = kept(tmp_path, every=60.0)
    it.apply(0, 1)
    assert it.publisher.step()
    assert it.publisher.is_current()
    it.apply(1, 2)
    assert not it.publisher.is_current()
    assert not it.publisher.step(), "it is not time"
    assert it.publisher.step(now=True)
    it.destination.apply(moved(2))
    assert it.publisher.is_current()
    assert not it.publisher.step(now=True), "only the progress has moved"


def moved(after: int) -> Slice:
    """A slice in which nothing changes."""
    return replace(slice_of(after), parts=(Part(MODEL, NOTHING, in_sync=True),))


WORK = """
import sys
from pathlib import Path
from headrace.destinations.duckdb import DuckDBDestination
from headrace.destinations.publishing import Publisher
from headrace.protocols import Part, Slice
from headrace.testing.destinations import MODEL, row, slice_of
folder, after = Path(sys.argv[1]), int(sys.argv[2])
destination = DuckDBDestination(folder / "w.duckdb")
publisher = Publisher(destination, folder / "public" / "copy.duckdb", 0.0)
for n in range(after, after + 3):
    destination.apply(slice_of(n, (MODEL, [row(n + 1)])))
    publisher.step(now=True)
"""


def run(folder: Path, after: int, failpoints: str) -> int:
    environment = {**os.environ, VARIABLE: failpoints}
    command = [sys.executable, "-c", WORK, str(folder), str(after)]
    return subprocess.run(command, env=environment, timeout=60, check=False).returncode


def test_killed_at_any_step_the_name_stands_for_a_whole_copy_of_one_commit(
    it: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    it.apply(0, 1)
    assert it.publisher.step()
    steps = (("piece", 0), ("copied", 0), ("synced", 0), ("renamed", 1))
    for point, is_there in steps:
        progress = it.destination.progress("shop")
        assert progress is not None
        # The second copy of three is killed; an apply that is killed leaves a write-ahead log behind.
        assert run(tmp_path, progress.offset, f"publish.{point}=kill@2") == -signal.SIGKILL
        copy = read_published(it.path)
        assert copy is not None
        assert copy.sources["shop"][0] == progress.offset + 1 + is_there
        assert it.rows() == [*range(1, progress.offset + 2 + is_there)]
        assert len(files(it)) <= 2
    publisher = Publisher(it.destination, it.path, 0.0)
    assert files(it) == ["copy.duckdb"], "what was left is gone"
    assert publisher.step(), "the process before may have been killed before it copied"
    progress = it.destination.progress("shop")
    assert progress is not None
    assert it.rows() == [*range(1, progress.offset + 1)]


def test_what_a_killed_apply_left_in_its_write_ahead_log_is_in_the_copy(it: Kept) -> None:
    it.apply(0, 1)
    code = (
        "import os, signal, sys, duckdb\n"
        "db = duckdb.connect(sys.argv[1])\n"
        "db.execute(\"INSERT INTO shop.t BY NAME SELECT 2 AS id, 'a' AS v\")\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(it.destination.path)], check=False, timeout=60)
    assert it.destination.path.with_name("w.duckdb.wal").exists()
    assert it.publisher.step()
    assert it.rows() == [1, 2]


@pytest.mark.parametrize("fault", ["no room", "it breaks off"])
def test_a_copy_that_cannot_be_made_is_told_of_and_the_one_before_stays(
    it: Kept, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    it.apply(0, 1)
    assert it.publisher.step()
    it.apply(1, 2)
    point = "publish.none" if fault == "no room" else "publish.copied"
    with monkeypatch.context() as patch:
        if fault == "no room":
            usage = shutil.disk_usage(it.path.parent)._replace(free=1 << 20)
            patch.setattr(publishing.shutil, "disk_usage", lambda _: usage)
            patch.setattr(publishing, "_CLONE", 0)  # on no file system are blocks shared
        with armed(f"{point}=raise"), pytest.raises(DestinationUnavailable) as caught:
            it.publisher.step()
    assert caught.value.verdict is Verdict.RETRY
    assert f"{it.path} is not published" in str(caught.value)
    assert it.rows() == [1]
    assert files(it) == ["copy.duckdb"]
    it.apply(2, 3)
    assert it.publisher.step()
    assert it.rows() == [1, 2, 3]


HOLD = """
import sys, duckdb
db = duckdb.connect(sys.argv[1])
print("held", flush=True)
sys.stdin.readline()
"""


def test_where_the_kernel_does_not_copy_it_is_done_here(it: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object) -> int:
        raise OSError(errno.EXDEV, "other file systems")

    monkeypatch.setattr(publishing.os, "copy_file_range", cannot)
    monkeypatch.setattr(publishing, "_CLONE", 0)
    it.apply(0, *range(1, 1_000))
    assert it.publisher.step()
    assert it.rows() == [*range(1, 1_000)]


def test_a_copy_that_somebody_writes_to_is_not_replaced(it: Kept) -> None:
    it.apply(0, 1)
    assert it.publisher.step()
    it.path.chmod(0o644)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(it.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        it.apply(1, 2)
        with pytest.raises(DestinationBusy, match="has it open to write"):
            it.publisher.step()
    finally:
        holder.communicate(b"\n", timeout=30)
    it.path.with_name("copy.duckdb.wal").write_bytes(b"of a writer that was killed")
    assert it.publisher.step()
    assert it.rows() == [1, 2]


def hold(destination: DuckDBDestination, ended: threading.Event) -> threading.Thread:
    """A long query of the pipeline, in a thread."""
    entered = threading.Event()

    def ask() -> None:
        with destination.open():
            entered.set()
            ended.wait(30)

    thread = threading.Thread(target=ask)
    thread.start()
    assert entered.wait(10)
    return thread


def test_it_waits_for_a_long_query_and_holds_nobody_up_meanwhile(
    it: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_PATIENCE", 0.2)
    monkeypatch.setattr(publishing, "_PUSH", 0.2)
    it.apply(0, 1)
    ended = threading.Event()
    thread = hold(it.destination, ended)
    try:
        assert not it.publisher.step()
        begun = time.monotonic()
        it.apply(1, 2)
        assert time.monotonic() - begun < 5
        monkeypatch.setattr(publishing, "_LATE", 0.0)
        with pytest.raises(DestinationBusy, match="was not in use"):
            it.publisher.step()
    finally:
        ended.set()
        thread.join()
    assert it.publisher.step()
    assert it.rows() == [1, 2]


def test_it_is_made_between_queries_that_follow_each_other_without_a_pause(
    it: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_PATIENCE", 0.1)
    it.apply(0, 1)
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            it.destination.progress("shop")

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for n in range(1, 6):
            it.apply(n, n + 1)
            until = time.monotonic() + 60  # after a copy that has held others up it pauses ten times as long
            while not it.publisher.step():
                assert time.monotonic() < until
                time.sleep(0.01)
            assert it.rows() == [*range(1, n + 2)]
    finally:
        done.set()
        for thread in threads:
            thread.join()
