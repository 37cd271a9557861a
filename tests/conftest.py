"""Settings that all tests share."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# HEADRACE_EXAMPLES=1000 searches longer than a normal run has time for.
settings.register_profile(
    "headrace",
    max_examples=int(os.environ.get("HEADRACE_EXAMPLES", "20")),
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("headrace")


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """A command that runs in this process logs to the stderr of its time, which is closed afterwards."""
    own = logging.getLogger("headrace")
    before = own.handlers[:], own.level, own.propagate
    yield
    own.handlers[:], own.level, own.propagate = before


@pytest.fixture
def unwritable() -> Callable[[Path], AbstractContextManager[None]]:
    """Return what makes a folder unwritable for a while, for root too, whom no mode keeps out."""

    @contextmanager
    def made(folder: Path) -> Iterator[None]:
        def change(flag: str, mode: int) -> None:
            if os.geteuid() == 0:
                subprocess.run(["chattr", flag, folder], check=True, capture_output=True)
            else:
                folder.chmod(mode)

        change("+i", 0o500)
        try:
            yield
        finally:
            change("-i", 0o700)

    return made
