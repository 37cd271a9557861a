"""`headrace run`: the pipeline in the foreground, until it is told to stop or has caught up."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Annotated

from cyclopts import Parameter

from headrace.config import Project, load_project
from headrace.errors import HeadraceError
from headrace.pipeline import Pipeline
from headrace.secret import without_passwords
from headrace.server import read
from headrace.sources.postgres.lsn import format_lsn
from headrace.transform.header import model_paths

logger = logging.getLogger("headrace.run")

_Fault = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def run(
    *,
    project: Annotated[Path, Parameter(help="The project's folder.")] = Path(),
    once: Annotated[
        bool, Parameter(help="Bring over all that is committed now, then end.", negative="")
    ] = False,
) -> None:
    """Run the pipeline: every change goes from the sources to the destination, as long as this runs.

    SIGTERM or SIGINT ends it with exit code 0 when what is in hand is finished, or undone after 10 s; a
    second one ends it at once.
    What happens is logged to stderr, one line each. Exit code 1 when every source has stopped for
    good, 2 for what the user can mend.
    """
    settings = load_project(project)
    log_to_stderr()
    stop = threading.Event()
    stop_on_signals(stop)
    pipeline = Pipeline(settings, stop)
    print(_start_line(settings), flush=True)
    if not once:
        pipeline.run()
        logger.info("stopped")
        return
    try:
        pipeline.run_once()
    finally:
        print(_summary(settings), flush=True)


def log_to_stderr() -> None:
    """Write each event of Headrace as one line to stderr: ISO time in UTC, level, message."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine())
    own = logging.getLogger("headrace")
    for other in own.handlers[:]:
        own.removeHandler(other)
    own.addHandler(handler)
    own.setLevel(logging.INFO)
    own.propagate = False


class OneLine(logging.Formatter):
    """One line per event, without passwords; of an exception only its places, since messages may
    quote values."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        words = without_passwords(" ".join(record.getMessage().split()))
        places = f" [{self.formatException(record.exc_info)}]" if record.exc_info else ""
        return f"{moment}.{int(record.msecs):03d}Z {record.levelname} {words}{places}"

    def formatException(self, ei: _Fault) -> str:  # noqa: N802 - the name that logging calls
        """Return the places that an exception passed, innermost last."""
        frames = traceback.extract_tb(ei[2])
        return " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)


def stop_on_signals(stop: threading.Event) -> None:
    """Set `stop` at the first SIGTERM or SIGINT; a second one ends the process at once.

    A thread reads the signals from a pipe: the main thread may be deep in a library, or hold the very
    lock that setting an event takes.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_watch, args=(reader, stop), name="signals", daemon=True).start()


def _watch(reader: int, stop: threading.Event) -> None:
    while received := os.read(reader, 1):
        if received[0] not in (signal.SIGTERM, signal.SIGINT):
            continue
        name = signal.Signals(received[0]).name
        if stop.is_set():
            os._exit(128 + received[0])
        logger.info("%s: finishing what is in hand; once more ends at once", name)
        stop.set()


def _start_line(project: Project) -> str:
    sources = ", ".join(f"{source.name} ({source.place})" for source in project.sources)
    count = len(model_paths(project.models))
    models = (
        f"{count} model{'s' * (count != 1)}, every other table mirrored" if count else "every table mirrored"
    )
    return f"headrace {os.getpid()}: {sources} → {project.destination.name}; {models}"


def _summary(project: Project) -> str:
    """Say where the destination stands; it may be out of reach, which is no new failure."""
    try:
        places, models = read(
            project,
            [
                'SELECT source, "offset", commit FROM headrace.progress ORDER BY source',
                "SELECT count(*) FILTER (WHERE state <> 'retired') AS n, "
                "count(*) FILTER (WHERE state = 'in_sync') AS good, "
                "coalesce(sum(open_records), 0)::BIGINT AS bad FROM headrace.models",
            ],
        )
    except HeadraceError as error:
        return f"Where the destination stands is not known: {error}"
    stands = "; ".join(
        f"{row['source']} at offset {row['offset']} ({format_lsn(row['commit'])})"
        for row in places.to_pylist()
    )
    counts = models.to_pylist()[0]
    return (
        f"{stands or 'nothing applied'}: {counts['good']} of {counts['n']} models in sync, "
        f"{counts['bad']} open record{'s' * (counts['bad'] != 1)} in quarantine"
    )
