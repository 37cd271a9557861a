"""A project's state folder: one process has it, and a start that is refused leaves nothing in it."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import IO

from headrace.errors import HeadraceError, StateInUse, UserError
from headrace.log.sqlite import SQLiteLog


def take_state(state: Path) -> IO[str]:
    """Take a state folder, for as long as what is returned is open.

    Raises StateInUse while another process has it, UserError where it cannot be written.
    """
    try:
        (state / "log").mkdir(mode=0o700, parents=True, exist_ok=True)
        state.chmod(state.stat().st_mode & 0o770 | 0o700)  # a group may have been let in, to read
        lock = (state / "lock").open("a+")
    except OSError as error:
        raise UserError(
            f"The state folder {state} cannot be written: {error.strerror}.", "Mend its rights."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise StateInUse(
            f"Another Headrace (pid {holder}) runs on {state}.",
            "Stop it first, or ask it: `headrace status`, `headrace query`.",
        ) from error
    lock.truncate(0)
    with suppress(OSError):
        lock.write(str(os.getpid()))
        lock.flush()
    return lock


def forget_empty_logs(state: Path) -> None:
    """Remove logs that a refused start has just made, so that the right state folder can come back."""
    for path in (state / "log").glob("*.db"):
        with suppress(HeadraceError):
            log = SQLiteLog(path, read_only=True)
            empty = log.end().offset == 0 and log.note("system") is None
            log.close()
            if empty and not any(log.segments.glob("*")):
                for file in path.parent.glob(f"{path.name}*"):
                    file.unlink()
                with suppress(FileNotFoundError):
                    log.segments.rmdir()
