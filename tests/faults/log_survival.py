"""A writer of a log that is to be killed or to lose its power, and what must be left of its log.

    log_survival.py write LOG SEED           append, note and trim until the end, telling each on a line
    log_survival.py power FOLDER CUTS SEED   cut the power of such writers; needs root and a mount namespace
    log_survival.py full FOLDER              fill a small file system, make room, go on
    log_survival.py trim FOLDER              trim a log that has filled its disk to the last block
    log_survival.py lost FOLDER              lose a consumer that holds a log which has filled its disk
    log_survival.py again FOLDER             open, after its end, a log which has filled its disk
    log_survival.py open FOLDER              open a log where there is no room for what SQLite has beside it

A power cut is the EXT4 shutdown ioctl without a flush of its journal: what was not synced is gone. A sync
that was under way at that moment may return as if it had come to its end, and the writer, which a real cut
would have stopped, tells of it: so only what was heard before the cut counts as acknowledged.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import random
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

from headrace.change import Entry, Kind
from headrace.config import LogConfig
from headrace.errors import LogError, LogFull
from headrace.lane import Lane
from headrace.log import database
from headrace.log.consumers import Cursors
from headrace.log.proof import verify
from headrace.log.retention import Needs
from headrace.log.sqlite import SQLiteLog
from headrace.testing.logs import change
from headrace.turns import Turns
from headrace.upkeep import Upkeep

SEGMENT = 200_000
_SHUTDOWN = (2 << 30) | (4 << 16) | (ord("X") << 8) | 125  # EXT4_IOC_SHUTDOWN
_NO_FLUSH = 2
_ROUNDS = 5  # cuts of one file system


@dataclass
class Told:
    """What a log's writers have acknowledged, over all their lives."""

    hashes: dict[int, str] = field(default_factory=dict)
    trimming: int = 0
    trimmed: int = 0
    appends: int = 0
    checked: int = 0
    cuts: int = 0
    late: int = 0

    def hear(self, output: bytes, too_late: bytes = b"") -> None:
        """Take what a writer has told, and what it told after its power was cut; a line without its end was
        not told."""
        early = output.count(b"\n")
        for number, line in enumerate((output + too_late).decode().split("\n")[:-1]):
            verb, offset, *rest = line.split()
            if number >= early and verb != "trimming":
                self.late += 1
            elif verb == "appended":
                self.hashes[int(offset)] = rest[0]
                self.appends += 1
            elif verb == "trimming":
                self.trimming = max(self.trimming, int(offset))
            else:
                self.trimmed = max(self.trimmed, int(offset))

    def check(self, path: Path) -> None:
        """Open the log as a restart does, and see that all that was told is so."""
        log = SQLiteLog(path, segment_bytes=SEGMENT)
        proved = verify(log)
        assert proved.end.offset >= max(self.hashes, default=0), "an acknowledged group is lost"
        assert self.trimmed <= proved.begin.offset <= self.trimming, "the log begins where nobody trimmed it"
        for offset, digest in self.hashes.items():
            if offset >= proved.begin.offset:
                mark = log.mark(offset)
                assert mark is not None
                assert mark.hash == digest, f"offset {offset} is another than was acknowledged"
                self.checked += 1
        last = log.last_commit()
        noted = log.note("commit")
        assert noted == (str(last[0].commit) if last else None), "a note is of another group than the last"
        held = [item.offset for item in log.read(proved.begin.offset, 1 << 30)]
        assert held == list(range(proved.begin.offset + 1, proved.end.offset + 1))
        assert held or proved.begin == proved.end
        self.hashes = {proved.end.offset: proved.end.hash} if proved.end.offset else {}
        log.close()


def write(path: Path, seed: int) -> None:
    """Append groups of any size with a note each, and trim now and then."""
    chosen = random.Random(seed)
    database._CHECKPOINT_PAGES = chosen.choice([8, 100, 4096])
    log = SQLiteLog(path, segment_bytes=SEGMENT)
    last = log.last_commit()
    commit = last[0].commit if last else 0
    ends = [log.end().offset]

    def making(commit: int) -> Iterator[Entry]:
        for ordinal in range(chosen.randrange(1, 6)):
            size = chosen.choice([10, 1_000, 60_000, 150_000])
            yield change(commit, ordinal, chosen.randbytes(chosen.randrange(size)))
        if chosen.random() < 0.2:
            yield change(commit, 9, chosen.randbytes(500), kind="message", table=None, filter=b"")
        log.set_note("commit", str(commit))

    while True:
        commit += 1
        end = log.append(making(commit))
        print("appended", end.offset, end.hash, flush=True)
        ends.append(end.offset)
        if commit % 15 == 0:
            through = ends[-min(len(ends), chosen.randrange(1, 10))]
            print("trimming", through, flush=True)
            log.trim(through, pinned=ends[-4:-3])
            print("trimmed", through, flush=True)


def writer(path: Path, seed: int) -> subprocess.Popen[bytes]:
    """Start a writer."""
    command = [sys.executable, __file__, "write", str(path), str(seed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def heard_until(process: subprocess.Popen[bytes], chosen: random.Random) -> bytes:
    """Listen to a writer until a random moment, in one of ten cases while it opens its log."""
    assert process.stdout is not None
    file = process.stdout.fileno()
    if chosen.random() < 0.1:
        time.sleep(chosen.uniform(0.1, 0.4))
        return b""
    told = os.read(file, 1 << 16)
    end = time.monotonic() + chosen.uniform(0, 0.4)
    os.set_blocking(file, False)
    while time.monotonic() < end:
        with suppress(BlockingIOError):
            told += os.read(file, 1 << 16)
        time.sleep(0.001)
    with suppress(BlockingIOError):
        told += os.read(file, 1 << 16)
    os.set_blocking(file, True)
    return told


def the_rest(process: subprocess.Popen[bytes]) -> bytes:
    """Kill a writer and return what it told in its last moments."""
    process.kill()
    told, _ = process.communicate(timeout=60)
    return told


@contextmanager
def mounted(image: Path, at: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "loop", image, at], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", at], check=True)


def made(folder: Path, megabytes: int) -> tuple[Path, Path]:
    """Make a file system in a file, and a folder to mount it on."""
    image, at = folder / "image", folder / "mount"
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    at.mkdir(exist_ok=True)
    return image, at


def power(folder: Path, cuts: int, seed: int) -> Told:
    """Cut the power of writers; each log lives through several cuts."""
    chosen, total = random.Random(seed), Told()
    for cut in range(cuts):
        if cut % _ROUNDS == 0:
            (image, at), told = made(folder, 64), Told()
        with mounted(image, at):
            process = writer(at / "log.db", chosen.randrange(1 << 30))
            heard = heard_until(process, chosen)
            switch = os.open(at, os.O_RDONLY)
            fcntl.ioctl(switch, _SHUTDOWN, struct.pack("I", _NO_FLUSH))
            os.close(switch)
            told.hear(heard, the_rest(process))
        with mounted(image, at):
            told.check(at / "log.db")
        total.cuts += 1
        if (cut + 1) % _ROUNDS == 0 or cut + 1 == cuts:
            total.appends += told.appends
            total.checked += told.checked
            total.late += told.late
            total.trimmed += told.trimmed
    return total


def full(folder: Path) -> dict[str, int]:
    """Append until there is no room, for payloads and for the database; make room and go on; trim."""
    image, at = made(folder, 24)
    held: dict[str, int] = {}
    with mounted(image, at):
        log = SQLiteLog(at / "log.db", segment_bytes=SEGMENT)
        for ballast in "ab":
            (at / ballast).write_bytes(os.urandom(3 << 20))
        for kind, size, ballast in (("rows", 70_000, "a"), ("message", 30_000, "b")):
            _fill(log, kind, size)
            held[kind] = log.end().offset
            (at / ballast).unlink()
            assert log.append([change(log.end().offset + 1)]).offset == held[kind] + 1
        held["freed"] = log.trim(held["rows"])
        _fill(log, "rows", 70_000)
        log.close()
        again = SQLiteLog(at / "log.db", segment_bytes=SEGMENT)
        proved = verify(again)
        held |= {"begin": proved.begin.offset, "end": proved.end.offset}
        again.close()
    return held


def opened(folder: Path) -> list[str]:
    """Open a log on a disk without any room, to write it and to read it, and once there is some."""
    image, at = made(folder, 24)
    said: list[str] = []
    with mounted(image, at):
        log = SQLiteLog(at / "log.db", segment_bytes=SEGMENT)
        log.append([change(1)])
        log.close()
        ballast = filled_up(at)
        for read_only in (False, True):
            try:
                SQLiteLog(at / "log.db", read_only=read_only).close()
            except LogError as error:
                said.append(f"{type(error).__name__}: {error.remedy}")
        ballast.unlink()
        again = SQLiteLog(at / "log.db", segment_bytes=SEGMENT)
        said.append(str(again.append([change(2)]).offset))
        again.close()
    return said


def trimmed(folder: Path) -> dict[str, int]:
    """Fill a disk with a log that was just opened, and whose WAL is small, to the last block; trim, go on."""
    image, at = made(folder, 160)
    with mounted(image, at):
        log = SQLiteLog(at / "log.db", segment_bytes=32 << 20)
        for commit in range(1, 501):
            log.append([change(commit, i, os.urandom(9_000), filter=os.urandom(900)) for i in range(20)])
        log.close()
        log = SQLiteLog(at / "log.db", segment_bytes=32 << 20)
        told = {"reserve": _reserved(at), "size": log.size()}
        filled_up(at)
        end = log.end()
        try:
            log.append([change(501, i, os.urandom(9_000)) for i in range(20)])
            raise AssertionError("there was room")
        except LogFull:
            assert log.end() == end
        told |= {"freed": log.trim(end.offset // 2), "reserve_after": _reserved(at)}
        assert log.append([change(501)]).offset == end.offset + 1
        told["entries"] = verify(log).entries - (end.offset - log.begin().offset)
        log.close()
    return told


class _OneLane:
    """A lane of which all is applied."""

    def __init__(self, log: SQLiteLog) -> None:
        self.log = log
        self.applying = Turns()

    def needs(self) -> Needs:
        return Needs(self.log.end().offset, frozenset())


def lost(folder: Path) -> dict[str, object]:
    """Fill a disk to the last block with a log that a consumer holds for more than it may; step by step."""
    image, at = made(folder, 64)
    alarms: list[str] = []
    alarm = logging.Handler()
    alarm.emit = lambda record: alarms.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("headrace.alert").addHandler(alarm)
    with mounted(image, at):
        log = _of_megabytes(at, 40)
        config = LogConfig(keep=None, keep_bytes=20 << 20, hold_max=1 << 20)
        upkeep = Upkeep(cast(Lane, _OneLane(log)), config, threading.Event())
        cursors = Cursors(at / "log.cursors")
        mark = log.mark(3)
        assert mark is not None
        cursors.commit("slow", mark)
        assert len(upkeep._consumers()) == 1
        filled_up(at)
        upkeep.step()
        told: dict[str, object] = {"begin": log.begin().offset, "reserve": _reserved(at)}
        upkeep.step()
        upkeep.close()
        told |= {"lost": [cursor.reason for cursor in cursors.all() if cursor.lost], "alarms": alarms}
        cursors.close()
        log.close()
    return told


def opened_again(folder: Path) -> dict[str, object]:
    """Fill a disk to the last block beside a log that is closed, open it, fill up again, and trim, where a
    consumer has to be looked up."""
    image, at = made(folder, 64)
    with mounted(image, at):
        log = _of_megabytes(at, 40)
        cursors = Cursors(at / "log.cursors")
        mark = log.mark(20)
        assert mark is not None
        cursors.commit("reports", mark)
        cursors.close()
        log.close()
        filled_up(at)
        log = SQLiteLog(at / "log.db", segment_bytes=4 << 20)
        told: dict[str, object] = {"opened": _reserved(at)}
        filled_up(at, "more")
        config = LogConfig(keep=None, keep_bytes=1)
        upkeep = Upkeep(cast(Lane, _OneLane(log)), config, threading.Event())
        upkeep.step()
        upkeep.close()
        told |= {"begin": log.begin().offset, "trimmed": _reserved(at)}
        told["end"] = log.append([change(41)]).offset
        log.close()
    return told


def _of_megabytes(at: Path, size: int) -> SQLiteLog:
    """Return a log of groups of 1 MB each."""
    log = SQLiteLog(at / "log.db", segment_bytes=4 << 20)
    for commit in range(1, size + 1):
        log.append([change(commit, payload=os.urandom(1 << 20))])
    return log


def _reserved(at: Path) -> int:
    reserve = at / "log.reserve"
    return reserve.stat().st_blocks * 512 if reserve.exists() else 0


def filled_up(at: Path, name: str = "ballast") -> Path:
    """Take all the room of a file system, to the last block."""
    ballast = at / name
    with ballast.open("wb", buffering=0) as file:
        for piece in (1 << 20, 1 << 12):
            with suppress(OSError):
                while True:
                    file.write(b"x" * piece)
                    os.fsync(file.fileno())
    return ballast


def _fill(log: SQLiteLog, kind: Kind, size: int) -> None:
    """Append until there has been no room three times, which leaves nothing behind each time."""
    refused = 0
    while refused < 3:
        end, files = log.end(), sorted(log.segments.iterdir())
        try:
            log.append([change(end.offset + 1, i, os.urandom(size), kind=kind) for i in range(3)])
        except LogFull:
            refused += 1
            assert (log.end(), sorted(log.segments.iterdir())) == (end, files)
            assert verify(log).end == end


def main() -> None:
    verb, folder, *numbers = sys.argv[1:]
    if verb == "write":
        write(Path(folder), int(numbers[0]))
    elif verb == "power":
        print(json.dumps({**asdict(power(Path(folder), *map(int, numbers))), "hashes": None}))
    elif verb == "trim":
        print(json.dumps(trimmed(Path(folder))))
    elif verb == "lost":
        print(json.dumps(lost(Path(folder))))
    elif verb == "again":
        print(json.dumps(opened_again(Path(folder))))
    elif verb == "open":
        print(json.dumps(opened(Path(folder))))
    else:
        print(json.dumps(full(Path(folder))))


if __name__ == "__main__":
    main()
