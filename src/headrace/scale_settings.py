"""`[scale]`: the freshness to aim for, and how many workers may work for it."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from headrace import values
from headrace.document import Document, Invalid, Parser, kind_of, quoted

PolicyName = Literal["slo_band", "backlog", "static", "schedule"]
MAX_WORKERS = 1024
HOURS = 168
"""Of a week."""

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_EXAMPLE = 'such as { "mon-fri 08-18" = 4 }'
_SPAN = re.compile(r"(?:([a-z]{3})(?:-([a-z]{3}))?|daily) ([0-9]{1,2})-([0-9]{1,2})")


@dataclass(frozen=True, slots=True)
class ScaleConfig:
    """`[scale]`: the freshness to aim for, from source commit to visible (seconds), and the workers.

    `policy` decides how many there are, between `min_workers` and `max_workers` (None: one for each core;
    0: none ever, the main process prepares everything). Together they work at most
    `max_worker_hours_per_day` (None: no budget) of a UTC day; each takes `worker_memory` bytes at most, and
    an hour of one costs `price`, in whatever currency. `threshold`, seconds of work for each worker, is the
    policy `backlog`'s; `schedule`, a number for each hour of the week from Monday 00:00 UTC on, that of
    `schedule`. `listen` is where HTTP is answered, None: nowhere.
    """

    freshness: float = 10.0
    policy: PolicyName = "slo_band"
    min_workers: int = 0
    max_workers: int | None = None
    max_worker_hours_per_day: float | None = None
    worker_memory: int = 1 << 30
    price: float = 0.0
    threshold: float = 60.0
    schedule: tuple[int, ...] = ()
    listen: tuple[str, int] | None = None

    @property
    def cap(self) -> int:
        """The most workers that there may be."""
        return cores() if self.max_workers is None else self.max_workers


NO_SCALE = ScaleConfig()
"""That of a project that says nothing."""


def cores(quota: Path = _QUOTA) -> int:
    """Return how many cores of this machine this process may use: those that it may run on, or as much time
    of them as its container is given, if that is less.

    `quota` is the control group's `cpu.max`: microseconds of time (or `max`) in a period.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        time, period = quota.read_text().split()
        return max(1, min(count, math.ceil(int(time) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # none is set, or this is not Linux
        return count


def read_scale(document: Document) -> ScaleConfig:
    """Read the section; what is wrong with it is noted in the document."""
    parsers: dict[str, Parser] = {
        "freshness": values.duration("100ms", "24h"),
        "policy": values.only(*get_args(PolicyName)),
        "min_workers": values.count(0, MAX_WORKERS),
        "max_workers": values.count(0, MAX_WORKERS),
        "max_worker_hours_per_day": _number("hours"),
        "worker_memory": values.size("256MiB", "1024GiB"),
        "price": _number("money"),
        "threshold": values.duration("1s", "24h"),
        "schedule": _schedule,
        "listen": _address,
    }
    given: dict[str, Any] = document.section("scale", parsers)
    spans = given.pop("schedule", None)
    config = ScaleConfig(**given)
    if config.min_workers > config.cap:
        words = f"{config.min_workers} is more than max_workers, which is {config.cap}"
        document.fail(("scale", "min_workers"), words)
    if (config.policy == "schedule") != (spans is not None):
        wrong = 'is for policy = "schedule" only' if spans is not None else f"missing; add it, {_EXAMPLE}"
        document.fail(("scale", "schedule"), wrong)
    if "threshold" in given and config.policy != "backlog":
        document.fail(("scale", "threshold"), 'is for policy = "backlog" only')
    if spans is None:
        return config
    hours = [config.min_workers] * HOURS
    for span, workers in spans:
        for hour in span:
            hours[hour] = workers
    return ScaleConfig(**given, schedule=tuple(hours))


def _number(what: str) -> Parser:
    def parse(value: object) -> float:
        if type(value) not in (int, float):
            raise Invalid(f"must be a number ({what}), not {kind_of(value)}")
        number = float(value)  # type: ignore[arg-type]
        if not 0 <= number < math.inf:
            raise Invalid("must be 0 or more")
        return number

    return parse


def _schedule(value: object) -> list[tuple[list[int], int]]:
    """Parse to pairs of hours of the week and how many workers; of those that overlap the last holds."""
    if not isinstance(value, dict) or not value:
        raise Invalid(f"must be a table of hours, {_EXAMPLE}, not {kind_of(value)}")
    return [(_hours(span), values.count(0, MAX_WORKERS)(workers)) for span, workers in value.items()]


def _hours(span: str) -> list[int]:
    """Parse `mon-fri 08-18`, `sat 0-24`, `daily 6-7`: days, and hours of them, the last one left out."""
    match = _SPAN.fullmatch(span.strip().lower())
    first, last, begin, end = match.groups() if match else (None, None, "1", "0")
    named = {day for day in (first, last) if day}
    if not named <= set(_DAYS) or not 0 <= int(begin) < int(end) <= 24:
        raise Invalid(
            f'{quoted(span)} is no hours of the week; write them (UTC) like "mon-fri 08-18" or "daily 0-24"'
        )
    if first is None:
        days = list(range(7))
    else:
        start = _DAYS.index(first)
        days = [(start + i) % 7 for i in range((_DAYS.index(last or first) - start) % 7 + 1)]
    return [day * 24 + hour for day in days for hour in range(int(begin), int(end))]


def _address(value: object) -> tuple[str, int]:
    """Parse a host and a port; without a host it is this machine alone."""
    text = values.string(value, ' such as "127.0.0.1:9187"')
    host, _, port = text.rpartition(":")
    if (
        not re.fullmatch(r"[0-9]{1,5}", port)
        or not 0 < int(port) < 65536
        or not re.fullmatch(r"[\w.-]*", host)
    ):
        raise Invalid(
            f'{quoted(text)} is no address to listen on; write host and port, like "127.0.0.1:9187"'
        )
    return host or "127.0.0.1", int(port)
