"""Every decision with all its inputs, one JSON object a line: decisions can be explained, and replayed.

    {"at": "2026-11-29T14:05:00+00:00", "policy": "slo_band", "snapshot": {...},
     "decision": {"workers": 3, "code": "behind", "figures": {...}, "sentence": "..."}}

The journal is kept for people and for `headrace scale simulate`; nothing depends on it to be right, so it is
not fsynced: a crash of the machine may cost the last lines. It has two files at most, the current and the
one before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from headrace.errors import UserError
from headrace.scaling.arrivals import TICK, Arrivals
from headrace.scaling.snapshot import Code, Decision, Limits, Load, Reason, Snapshot

FILE = "scaling.jsonl"
"""Its name in the state folder."""

MAX_BYTES = 32 << 20
"""At which the file becomes the one before: about nine days of decisions for one model, and two such
files."""

_LONGEST = 1 << 20
"""Bytes of a line: thousands of models."""
_MAX_GAP = 300.0
"""Seconds without a decision that are filled in with the last rates; longer ones count as quiet."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision, when it was made, and by what."""

    at: datetime
    policy: str
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
        with self._path.open("ab") as file:
            file.write(line.encode())
            is_full = file.tell() >= self._max_bytes
        if is_full:
            self._path.replace(self._before)

    def read(self, since: datetime | None = None) -> Iterator[Entry]:
        """Yield the entries in order, from `since` on. Raises UserError where a line is not one of ours.

        A last line that is not finished, from a crash in its writing or one that is being written, is left
        out.
        """
        for path in (self._before, self._path):
            yield from (entry for entry in read_file(path, missing_ok=True) if not since or entry.at >= since)

    def last(self) -> Entry | None:
        """Return the newest decision; None where there is none, or its line is not one of ours."""
        for path in (self._path, self._before):
            with suppress(OSError, UserError), path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST))
                *whole, _ = file.read().rsplit(b"\n", 2)
                if whole and whole[-1]:
                    return _entry(path, 0, whole[-1])
        return None


def read_file(path: Path, *, missing_ok: bool = False) -> Iterator[Entry]:
    """Yield the entries of one file; see `Journal.read`."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n") and line.strip():
                    yield _entry(path, number, line)
    except FileNotFoundError as error:
        if not missing_ok:
            raise UserError(
                f"{path} is not there.", "Decisions are journalled by a running pipeline."
            ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


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
    snapshot = asdict(entry.snapshot)
    for told, load in zip(snapshot["loads"], entry.snapshot.loads, strict=True):
        told["work_seconds"] = round(load.work_seconds, 3) if load.service_rate else None
    return {
        "at": entry.at.astimezone(UTC).isoformat(),
        "policy": entry.policy,
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
            str(found["policy"]),
            Snapshot(**_known(Snapshot, snapshot)),
            Decision(int(decision["workers"]), Reason(Code(decision["code"]), decision["figures"])),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} line {number} is no decision of Headrace ({type(error).__name__}).",
            "Delete the line, or the file: the journal is only for looking back.",
        ) from error


def _known(kind: type[Load | Limits | Snapshot], values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what a later version may have written."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}
