"""Every decision with all its inputs, one JSON object a line: decisions can be explained, and replayed.

    {"at": "2026-11-29T14:05:00+00:00", "policy": "slo_band", "settings": {...}, "snapshot": {...},
     "decision": {"workers": 3, "code": "behind", "figures": {...}, "sentence": "..."}}

The journal is kept for people and for `headrace scale simulate`; nothing depends on it to be right, so it is
not fsynced: a crash of the machine may cost the last lines. It has two files at most, the current and the
one before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from headrace.errors import UserError
from headrace.scaling.arrivals import TICK, Arrivals
from headrace.scaling.policy import Backlog, Schedule, SloBand, Static
from headrace.scaling.snapshot import Code, Decision, Limits, Load, Reason, Snapshot

FILE = "scaling.jsonl"
"""Its name in the state folder."""

MAX_BYTES = 32 << 20
"""At which the file becomes the one before: three weeks of a decision a minute for one model, or half a day
for sixty."""

JournalledPolicy = SloBand | Backlog | Static | Schedule
_POLICIES: Mapping[str, type[JournalledPolicy]] = {
    "slo_band": SloBand,
    "backlog": Backlog,
    "static": Static,
    "schedule": Schedule,
}
_LONGEST = 1 << 20
"""Bytes of a line: thousands of models."""
_MAX_GAP = 300.0
"""Seconds without a decision that are filled in with the last rates; longer ones count as quiet."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision, when it was made, and by what: `policy.decide(snapshot)` decides it again."""

    at: datetime
    policy: JournalledPolicy
    snapshot: Snapshot
    decision: Decision


class Journal:
    """The decisions of a pipeline. One process writes, any number read."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        """`path` is the current file; the one before stands beside it, with `.1` after its name."""
        self._path = path
        self._before = path.with_name(path.name + ".1")
        self._max_bytes = max_bytes

    def append(self, entry: Entry) -> None:
        """Write an entry; raises OSError where the disk does not take it."""
        line = json.dumps(as_object(entry), separators=(",", ":"), allow_nan=False) + "\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b") as file:
            _cut_torn(file)
            file.write(line.encode())
            is_full = file.tell() >= self._max_bytes
        if is_full:
            self._path.replace(self._before)

    def read(self, since: datetime | None = None) -> Iterator[Entry]:
        """Yield the entries in order, from `since` on. Raises UserError where a line is not one of ours.

        A last line that is not finished, from a crash in its writing or one that is being written, is left
        out.
        """
        with ExitStack() as stack:
            files = [stack.enter_context(file) for file in self._open()]
            for file in files:
                for number, line in enumerate(file, 1):
                    if line.endswith(b"\n") and line.strip():
                        entry = _entry(Path(file.name), number, line)
                        if not since or entry.at >= since:
                            yield entry

    def last(self) -> Entry | None:
        """Return the newest decision; None where there is none, or its line is not one of ours."""
        for path in (self._path, self._before):
            with suppress(OSError, UserError), path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST))
                *whole, _ = file.read().rsplit(b"\n", 2)
                if whole and whole[-1]:
                    return _entry(path, 0, whole[-1])
        return None

    def _open(self) -> list[BinaryIO]:
        """Open what there is, the file before first. Both are open before the first is read, so that one
        that is full meanwhile is read all the same; opened in this order, none is missed."""
        files = list[BinaryIO]()
        for path in (self._path, self._before):
            try:
                file = path.open("rb")
            except FileNotFoundError:
                continue
            except OSError as error:
                for each in files:
                    each.close()
                raise UserError(f"{path} cannot be read: {error.strerror}.") from error
            if files and os.path.sameopenfile(files[0].fileno(), file.fileno()):
                file.close()  # it became the one before in between
            else:
                files.insert(0, file)
        return files


def _cut_torn(file: BinaryIO) -> None:
    """Drop what a crash, or a full disk, has left of a line at the end: the next one would be part of it."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    if file.read() in (b"", b"\n"):
        return
    file.seek(max(0, end - _LONGEST))
    tail = file.read()
    file.truncate(end - len(tail) + tail.rfind(b"\n") + 1)


def arrivals_of(entries: Iterable[Entry]) -> Arrivals:
    """Return the arrivals that decisions were made of, in worker-seconds: so models of different weight add
    up.

    Simulate them with a `mu` of 1. Raises UserError where there are too few.
    """
    times: list[float] = []
    rates: list[float] = []
    for entry in entries:
        moment = entry.at.timestamp()
        if times and moment <= times[-1]:
            continue
        if times and moment - times[-1] > _MAX_GAP:
            times += [times[-1] + TICK, moment - TICK]
            rates += [0.0, 0.0]
        times.append(moment)
        rates.append(
            sum(load.ewma_30s / load.service_rate for load in entry.snapshot.loads if load.service_rate)
        )
    if len(times) < 2 or times[-1] - times[0] < TICK:
        raise UserError(
            f"The journal has {len(times)} decisions, which is too little to simulate.",
            "Let the pipeline run.",
        )
    if not any(rates):
        raise UserError(
            "Nothing arrived while the journal was written, so that there is nothing to scale for."
        )
    grid = np.arange(times[0], times[-1], TICK)
    return Arrivals(datetime.fromtimestamp(times[0], UTC), np.interp(grid, times, rates) * TICK)


def as_object(entry: Entry) -> dict[str, Any]:
    """Return an entry as its line has it; of each load also the `work_seconds` that wait."""
    reason = entry.decision.reason
    settings = asdict(entry.policy)
    del settings["name"]
    snapshot = asdict(entry.snapshot)
    for told, load in zip(snapshot["loads"], entry.snapshot.loads, strict=True):
        told["work_seconds"] = round(load.work_seconds, 3) if load.service_rate else None
    return {
        "at": entry.at.astimezone(UTC).isoformat(),
        "policy": entry.policy.name,
        "settings": settings,
        "snapshot": snapshot,
        "decision": {
            "workers": entry.decision.workers,
            "code": reason.code.value,
            "figures": dict(reason.figures),
            "sentence": reason.sentence,
        },
    }


def _entry(path: Path, number: int, line: bytes) -> Entry:
    try:
        found = json.loads(line)
        snapshot = dict(found["snapshot"])
        snapshot["loads"] = tuple(Load(**_known(Load, load)) for load in snapshot["loads"])
        snapshot["limits"] = Limits(**_known(Limits, snapshot["limits"]))
        decision = found["decision"]
        return Entry(
            datetime.fromisoformat(found["at"]),
            _policy(found["policy"], found.get("settings", {})),
            Snapshot(**_known(Snapshot, snapshot)),
            Decision(int(decision["workers"]), Reason(Code(decision["code"]), decision["figures"])),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} line {number} is no decision of Headrace ({type(error).__name__}).",
            "Delete the line, or the file: the journal is only for looking back.",
        ) from error


def _policy(name: str, settings: dict[str, Any]) -> JournalledPolicy:
    kind = _POLICIES[name]
    known = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    return kind(**_known(kind, known))


def _known(kind: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what a later version may have written."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}
