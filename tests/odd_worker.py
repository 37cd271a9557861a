"""A worker whose parts do what the name of their model says; run by a pool in place of `headrace.worker`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from headrace.change import Counts
from headrace.parts import PartSpec
from headrace.prepared import Prepared
from headrace.scaling.worker import Answers, serve

KEPT: list[bytes] = []


def outcome(part: PartSpec) -> Prepared:
    """The numbers in `(after, through]`."""
    numbers = pa.array(range(part.after + 1, part.through + 1), pa.int64())
    table = pa.table({"_source_key": numbers.cast(pa.string()), "n": numbers})
    counts = Counts(read=len(numbers), applied=len(numbers))
    return Prepared(False, pa.array([], pa.string()), table, table.slice(0, 0), counts)


def opened(answers: Answers) -> Callable[[PartSpec], Prepared]:
    def prepare(part: PartSpec) -> Prepared:
        what, _, more = part.model.name.partition(" ")
        if what == "sleep":
            time.sleep(float(more))
        elif what == "later":  # but not in its first part
            time.sleep(float(more) if part.after else 0)
        elif what == "slow":  # but it gets further
            for _ in range(int(more)):
                time.sleep(0.3)
                answers.say("progress")
        elif what == "die":
            os.kill(os.getpid(), int(more))
        elif what == "once":  # the first that has it dies
            if not Path(more).exists():
                Path(more).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        elif what == "fail":
            raise ValueError("cell")
        elif what == "swell":
            KEPT.append(b"x" * (int(more) << 20))
            time.sleep(30)
        return outcome(part)

    return prepare


if __name__ == "__main__":
    serve(int(sys.argv[1]), opened)
