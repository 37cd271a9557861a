"""`headrace demo` from outside: what it says, how it ends, and that nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

DEMO = [sys.executable, "-m", "headrace", "demo"]
FIGURES = (
    "captured",
    "staged",
    "applied",
    "superseded",
    "filtered",
    "quarantined",
    "redriven",
    "lost",
    "duplicated",
    "verified",
    "resumed_after_kill_s",
    "freshness_p50_s",
    "freshness_p99_s",
)


def left_in(folder: Path) -> list[str]:
    """Return the command lines of processes that name the folder, or a file in it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in words:
            found.append(words)
    return found


def gone(folder: Path) -> bool:
    deadline = time.monotonic() + 20
    while left_in(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not left_in(folder)


@pytest.fixture
def temporary(tmp_path: Path) -> Iterator[dict[str, str]]:
    folder = tmp_path / "t"
    folder.mkdir()
    yield {**os.environ, "TMPDIR": str(folder)}
    assert gone(folder)


@pytest.mark.timeout(120)
def test_nothing_is_lost_or_doubled_under_kills(temporary: dict[str, str]) -> None:
    done = subprocess.run(
        [*DEMO, "--seconds", "8", "--json"],
        env=temporary,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    figures = json.loads(line)
    assert tuple(figures) == FIGURES
    assert figures["lost"] == figures["duplicated"] == figures["quarantined"] == 0
    assert figures["verified"] is True
    assert figures["redriven"] > 0
    ends = ("applied", "superseded", "filtered", "quarantined")
    assert figures["captured"] == figures["staged"] == sum(figures[end] for end in ends)
    assert 0 < figures["resumed_after_kill_s"] < 60
    assert done.stderr.count("SIGKILL to the pipeline") == 2
    assert "SELECT count(*) AS rows, md5(" in done.stderr


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_child_outlives_it(temporary: dict[str, str], number: signal.Signals) -> None:
    folder = Path(temporary["TMPDIR"])
    with subprocess.Popen(
        [*DEMO, "--seconds", "60"], env=temporary, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as demo:
        deadline = time.monotonic() + 40
        while not any("headrace run" in words for words in left_in(folder)) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        demo.send_signal(number)
        code = demo.wait(30)
    assert code == (-signal.SIGKILL if number is signal.SIGKILL else 130)
    assert gone(folder)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for arguments, words in (
        (["--seconds", "1"], "--seconds must be 5 to 3600."),
        (["--keep", str(tmp_path)], "is not empty"),
    ):
        done = subprocess.run([*DEMO, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
