"""A worker's first model runs in a process that was forked for it, and does there what it does in others."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

MODEL = """
from _csv import NAME  # a helper, though the fork has a module that is called so

@model(reads="raw.shop.t", key=["id"])
def m(row: Row) -> Out:
    print("seen", row["v"])
    if row["v"] == "dies":
        os.kill(os.getpid(), 11)
    if row["v"] == "leaves":
        os._exit(3)
    if row["v"] == "raises":
        raise ValueError
    return Out(int(row["id"]), f"{NAME} {os.getpid()}")
"""

PROGRAM = f"""
import json, logging, os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_python_models as t
from headrace.transform.python import process
from test_spare import MODEL
logging.basicConfig(stream=sys.stderr, level=logging.INFO)
model = t.bind(t.read(Path(sys.argv[1]), MODEL), t.SCHEMA)  # no process of it is left
process.keep_spare()
spare = process._spare
if sys.argv[2] == "died":
    spare.kill()
    spare.wait(10)
made = model.prepare(t.staged(sys.argv[3:]))
bad = t.bad(made)
model.python.close()
print(json.dumps([spare.pid, t.good(made), bad, spare.wait(10)]))
"""


def run(folder: Path, *arguments: str) -> tuple[int, dict[str, str], dict[str, list[str]], int, str]:
    """Return the process that was forked, the good rows, the bad ones, its exit code and what was logged."""
    (folder / "_csv.py").write_text('NAME = "of process"\n')
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), *arguments],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pid, rows, records, code = json.loads(done.stdout)
    return pid, rows, records, code, done.stderr


def test_the_first_model_runs_in_the_fork_and_one_that_died_is_replaced(tmp_path: Path) -> None:
    pid, rows, records, code, logged = run(tmp_path, "lives", "a", "raises", "b")
    assert rows == {"1": f"of process {pid}", "3": f"of process {pid}"}
    assert records == {"2": ["transform.python", ""]}
    assert code == -signal.SIGKILL
    assert "m: seen a" in logged
    pid, rows, records, code, _ = run(tmp_path, "died", "a")
    assert set(rows) == {"1"}
    assert rows["1"] != f"of process {pid}"
    assert (records, code) == ({}, -signal.SIGKILL)


def test_what_ends_the_fork_is_told_and_costs_itself_alone(tmp_path: Path) -> None:
    for cell, reason, expected in (
        ("dies", "crash.signal", -signal.SIGSEGV),
        ("leaves", "crash.exit", 3),
    ):
        _, rows, records, code, _ = run(tmp_path, "lives", "a", cell, "b")
        assert set(rows) == {"1", "3"}
        assert records == {"2": [reason, ""]}
        assert code == expected
