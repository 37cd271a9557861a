"""What the benchmarks share: a server with a backlog, its slot copied for each run, and both clocks.

A backlog is written once. Each run gets the slot and the project as they were before it: the slot by
`pg_copy_logical_replication_slot`, the project as a copy of its folder. So every run of ours and of
its rival decodes the same WAL from the same place.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from headrace.config import load_project
from headrace.errors import HeadraceError
from headrace.server import is_running, read
from headrace.testing.postgres import PostgresServer, clean_environment

SLOT = "headrace_shop"
RECVLOGICAL = "pg_recvlogical -f /dev/null"
TIMEOUT = 300.0  # seconds for any one measurement: a hang is an error, not a figure

Runs = list[dict[str, float]]
Case = tuple[str, Runs, dict[str, Any]]
"""The rival's name, the runs (`ours` and `rival`, and what else is told of each), what is told of all."""

_SETTINGS = {
    "synchronous_commit": "off",
    "max_wal_size": "16GB",
    "checkpoint_timeout": "1h",
    "autovacuum": "off",
}
_BEFORE = "before_backlog"
_OURS = Path(__file__).with_name("ours.py")


class Unavailable(Exception):
    """Something that a benchmark needs is not installed; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """A backlog's end: `head` is an LSN with all changes before it and one small commit behind it,
    `end` the WAL's end after that."""

    head: int
    end: str


class Rig:
    """A server and the projects that read from it, all in one temporary folder."""

    def __init__(self, folder: Path, server: PostgresServer, db: psycopg.Connection[Any]) -> None:
        self.folder = folder
        self.server = server
        self.db = db
        self._made = 0

    def project(self, settings: str = "") -> Path:
        """Make a project of one source, `shop`; `settings` are further lines of its section."""
        folder = self._new_folder()
        folder.mkdir()
        text = f'[source.shop]\nurl = "{self.server.url}"\n{settings}'
        (folder / "headrace.toml").write_text(text)
        return folder

    def attach(self, settings: str = "") -> Path:
        """Copy the tables into a new project, and remember its slot as of now."""
        folder = self.project(settings)
        ours("once", folder)
        self._copy_slot(SLOT, _BEFORE)
        return folder

    def settle(self) -> Backlog:
        """Leave the server nothing to tidy up during the runs, and mark the backlog's end."""
        self.db.execute("VACUUM")
        self.db.execute("CHECKPOINT")
        head = self.one("SELECT pg_logical_emit_message(true, 'headrace', 'head') - '0/0'::pg_lsn")
        return Backlog(int(head), str(self.one("SELECT pg_current_wal_flush_lsn()::text")))

    def again(self, attached: Path) -> Path:
        """Return a copy of an attached project, with the slot as it was before the backlog."""
        folder = self._new_folder()
        shutil.copytree(attached, folder)
        self.drop_slot(SLOT)
        self._copy_slot(_BEFORE, SLOT)
        return folder

    def recvlogical(self, end: str) -> float:
        """Return the seconds that `pg_recvlogical` takes for the backlog, asking for what we ask for."""
        with self.rival_slot() as slot:
            begin = time.monotonic()
            subprocess.run(
                [
                    self.server.bin / "pg_recvlogical", "-d", self.server.url, "--slot", slot, "--start",
                    "-f", "/dev/null", "-o", "proto_version=1", "-o", f"publication_names={SLOT}",
                    "-o", "messages=true", "--endpos", end,
                ],
                check=True,
                timeout=TIMEOUT,
                env=clean_environment(),
            )  # fmt: skip
            return time.monotonic() - begin

    @contextmanager
    def rival_slot(self) -> Iterator[str]:
        """Lend a slot that stands before the backlog."""
        self._copy_slot(_BEFORE, "rival")
        try:
            yield "rival"
        finally:
            self.drop_slot("rival")

    def drop_slot(self, name: str) -> None:
        """Drop a slot if it is there, waiting for a reader that has just gone."""
        deadline = time.monotonic() + 20
        while True:
            try:
                self.db.execute(
                    "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots "
                    "WHERE slot_name = %s",
                    [name],
                )
                return
            except psycopg.errors.ObjectInUse:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _copy_slot(self, name: str, copy: str) -> None:
        self.db.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", [name, copy])

    def _new_folder(self) -> Path:
        self._made += 1
        return self.folder / f"project{self._made}"

    def one(self, sql: str) -> Any:
        """Return the only value of a query on the server."""
        row = self.db.execute(sql).fetchone()
        assert row is not None
        return row[0]


@contextmanager
def open_rig(*, durable: bool = False, settings: dict[str, str] | None = None) -> Iterator[Rig]:
    """Start a server of our own, gone afterwards with all that was measured on it."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        chosen = _SETTINGS if settings is None else settings
        with (
            PostgresServer(folder / "pg", settings=chosen, durable=durable) as server,
            psycopg.connect(server.url, autocommit=True) as db,
        ):
            yield Rig(folder, server, db)


def ours(verb: str, *arguments: object) -> dict[str, float]:
    """Run a verb of ours.py in a process of its own and return what it measured."""
    done = subprocess.run(_command(verb, arguments), stdout=subprocess.PIPE, check=True, timeout=TIMEOUT)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


@contextmanager
def running(verb: str, *arguments: object, niceness: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """Run a verb of ours.py beside us, until the block ends."""
    command = ["nice", "-n", str(niceness), *_command(verb, arguments)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def pipeline_until(folder: Path, condition: str, wait: float = TIMEOUT) -> tuple[float, float]:
    """Run the pipeline, a process of its own, until a query of the destination is true.

    Returns the seconds from the process's start, and its peak memory in MB. Raises TimeoutError after
    `wait` seconds.
    """
    project = load_project(folder)
    begin = time.monotonic()
    with running("pipeline", folder) as child:
        while True:
            # Asked through the pipeline only: who opens the file himself keeps it from the pipeline.
            with suppress(HeadraceError, OSError):
                if is_running(project):
                    (answer,) = read(project, [f"SELECT (SELECT {condition}) AS done"])
                    if answer["done"][0].as_py():
                        break
            if child.poll() is not None:
                raise RuntimeError(f"the pipeline ended with {child.returncode}")
            if time.monotonic() - begin > wait:
                raise TimeoutError(f"not within {wait:.0f} s: {condition}")
            time.sleep(0.05)
        return time.monotonic() - begin, memory_mb(child.pid, "VmHWM")


def memory_mb(pid: int, field: str) -> float:
    """Return a field of /proc/PID/status: VmRSS (resident now), VmHWM (at most), RssAnon (not of files)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) / 1024


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def by_turns(times: int, contestants: dict[str, Callable[[], dict[str, float]]]) -> Runs:
    """Run all contestants several times, each time in turned order: a warm cache favours none.

    A contestant returns what is to be told of its run; the dicts of one round are joined.
    """
    runs = []
    names = list(contestants)
    for turn in range(times):
        measured: dict[str, float] = {}
        for name in names if turn % 2 == 0 else reversed(names):
            measured |= contestants[name]()
        runs.append({key: measured[key] for key in sorted(measured, key=_first_things_first)})
    return runs


def _first_things_first(key: str) -> tuple[bool, str]:
    return key not in ("ours", "rival"), key


def _command(verb: str, arguments: Sequence[object]) -> list[str]:
    return [sys.executable, str(_OURS), verb, *map(str, arguments)]
