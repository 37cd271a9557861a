"""The command line itself: overview, mistakes and errors, none of which needs a database."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from headrace.cli import main

PASSWORD = "hunter2-planted"
COMMANDS = (
    *("init", "check", "run", "status", "query", "verify"),
    *("tables", "resync", "quarantine", "teardown", "demo"),
)


class Done(NamedTuple):
    code: int
    out: str
    err: str


def headrace(*arguments: str, cwd: Path | None = None) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "headrace", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
        check=False,
    )
    for text in (done.stdout, done.stderr):
        assert PASSWORD not in text
        assert "Traceback" not in text
    return Done(done.returncode, done.stdout, done.stderr)


def refusal(done: Done, code: int = 2) -> str:
    """The one paragraph of a command that refused."""
    assert done.code == code, done
    assert done.err.strip()
    assert "\n\n" not in done.err.strip()
    return done.err


def test_help_lists_the_commands_and_is_fast() -> None:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        done = headrace("--help")
        times.append(time.perf_counter() - began)
        assert done.code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in done.out
    assert min(times) < 0.15


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    heavy = ("cyclopts", "rich", "duckdb", "pyarrow", "psycopg", "deltalake", "sqlglot", "numpy")
    code = f"import sys, headrace.cli; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version_and_help_of_one_command() -> None:
    assert headrace("--version").out.strip() == "0.1.0"
    for command in ("init", "check"):
        assert "Usage: headrace" in headrace(command, "--help").out
    assert "redrive" in headrace("quarantine").out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chek"], 'Did you mean "check"?'),
        (["--project", "x"], "Options stand after a command"),
        (["check", "--frob"], "--frob"),
        (["quarantine", "lst"], 'Did you mean "list"?'),
        (["init"], "url"),
        (["init", f"postgresql://app:{PASSWORD}@h/d", "dir", "more", "--frob"], "headrace init --help"),
        ([f"postgresql://app:{PASSWORD}@h/d"], "There are: init"),
        (["init", f"mysql://app:{PASSWORD}@h/d"], "postgresql://"),
        (["check", "--project", "/nowhere"], "headrace init URL"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    assert words in refusal(headrace(*arguments, cwd=tmp_path))


def test_an_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("headrace.cli._dispatch", side_effect=KeyboardInterrupt):
        assert main(["check"]) == 130
    assert capsys.readouterr().err.startswith("Interrupted.")


def test_an_unexpected_error_is_one_paragraph(tmp_path: Path) -> None:
    code = (
        "import sys, headrace.cli as cli\n"
        f"def broken(given): raise ZeroDivisionError('at postgresql://a:{PASSWORD}@h')\n"
        "cli._dispatch = broken\n"
        "sys.exit(cli.main(['check']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    text = refusal(Done(done.returncode, done.stdout, done.stderr), 1)
    assert "ZeroDivisionError: at postgresql://a:***@h" in text
    assert "HEADRACE_TRACEBACK=1" in text
    assert "Traceback" not in text


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen(
        [sys.executable, "-m", "headrace", "--help"], stdout=write, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(write)
        assert process.communicate()[1] == ""
        assert process.returncode == 1
