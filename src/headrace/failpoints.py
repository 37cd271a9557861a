"""Named places where a test can make the process die, fail or wait.

`HEADRACE_FAILPOINTS="log.append.commit=kill@3;staging.commit=raise"` arms them: at the third passage
of the first the process kills itself with SIGKILL, at each passage of the second an OSError is
raised. `sleep:SECONDS` waits. Unset, a passage costs one dictionary look-up.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass

VARIABLE = "HEADRACE_FAILPOINTS"


@dataclass(slots=True)
class _Armed:
    action: str
    at: int | None
    passed: int = 0


def _parse(text: str) -> dict[str, _Armed]:
    armed = {}
    for part in filter(None, text.split(";")):
        name, _, action = part.partition("=")
        action, _, at = action.partition("@")
        armed[name] = _Armed(action, int(at) if at else None)
    return armed


_armed = _parse(os.environ.get(VARIABLE, ""))
_lock = threading.Lock()


def failpoint(name: str) -> None:
    """Pass the place called `name`; raises OSError, sleeps or kills where a test armed it."""
    armed = _armed.get(name)
    if armed is None:
        return
    with _lock:
        armed.passed += 1
        if armed.at is not None and armed.passed != armed.at:
            return
    if armed.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif armed.action.startswith("sleep:"):
        time.sleep(float(armed.action.removeprefix("sleep:")))
    else:
        raise OSError(f"failpoint {name}")
