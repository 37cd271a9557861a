"""A log whose power is cut, at any moment, holds all that it acknowledged; one whose disk is full goes on.

HEADRACE_CUTS says how many cuts there are. Both tests mount a file system of their own, in a file, in a mount
namespace of their own, so that nothing of it is seen outside or stays: that needs root and loop devices.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("log_survival.py")
CUTS = int(os.environ.get("HEADRACE_CUTS", "10"))


def apart(verb: str, folder: Path, *numbers: int, timeout: float) -> Any:
    """Run a verb of log_survival.py in a mount namespace of its own."""
    isolated = ["unshare", "--mount", "--propagation", "private", "--"]
    if os.geteuid() != 0 or subprocess.run([*isolated, "true"], check=False, capture_output=True).returncode:
        pytest.fail("This test mounts file systems: run it as root, where `unshare --mount` is allowed.")
    for tool in ("mkfs.ext4", "mount", "umount"):
        if subprocess.run(["which", tool], check=False, capture_output=True).returncode:
            pytest.fail(f"This test needs {tool}: on Debian, apt install e2fsprogs mount.")
    done = subprocess.run(
        [*isolated, sys.executable, SCRIPT, verb, folder, *map(str, numbers)],
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    if re.search("^mount: ", done.stderr, re.MULTILINE):
        pytest.fail(f"This test needs loop devices to mount a file system in a file: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.timeout(120 + 5 * CUTS)
def test_a_log_whose_power_is_cut_holds_what_it_acknowledged(tmp_path: Path) -> None:
    told = apart("power", tmp_path, CUTS, 1, timeout=60 + 5 * CUTS)
    print(told)
    assert told["cuts"] == CUTS
    assert told["appends"] > 5 * CUTS
    assert told["checked"] > CUTS
    assert told["trimmed"] > 0


def test_a_log_whose_disk_is_full_says_so_and_goes_on(tmp_path: Path) -> None:
    held = apart("full", tmp_path, timeout=120)
    assert 0 < held["begin"] <= held["rows"] < held["message"] < held["end"]
    assert held["freed"] > 1_000_000


def test_a_log_that_is_opened_without_any_room_says_what_to_do(tmp_path: Path) -> None:
    refused = "LogFull: Make room, and start again."
    assert apart("open", tmp_path, timeout=120) == [refused, refused, "2"]


def test_a_log_that_has_filled_its_disk_can_be_trimmed(tmp_path: Path) -> None:
    told = apart("trim", tmp_path, timeout=120)
    assert told["freed"] >= 32 << 20
    assert told["reserve"] == told["reserve_after"] == 8 << 20
    assert told["size"] < 140 << 20, "the reserve is no part of the log"
    assert told["entries"] == 1


def test_a_consumer_that_holds_too_much_does_not_keep_a_full_disk_full(tmp_path: Path) -> None:
    told = apart("lost", tmp_path, timeout=120)
    assert told["begin"] > 15
    assert told["reserve"] >= 1 << 20, "it was not made again"
    assert [reason for reason in told["lost"] if "more than hold_max" in reason]
    assert len([alarm for alarm in told["alarms"] if alarm.startswith("LOST consumer slow")]) == 1


def test_a_log_that_has_filled_its_disk_is_opened_again_and_trimmed(tmp_path: Path) -> None:
    told = apart("again", tmp_path, timeout=120)
    assert 1 << 19 <= told["opened"] < 1 << 20, "it kept no room for the trim"
    assert (told["begin"], told["end"]) == (20, 41)
    assert told["trimmed"] >= 1 << 20
