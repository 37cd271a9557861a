"""A log whose writer is killed, at any moment, holds all that it acknowledged.

HEADRACE_LOG_KILLS says how many kills there are.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from log_survival import Told, heard_until, the_rest, writer

KILLS = int(os.environ.get("HEADRACE_LOG_KILLS", "15"))
LIVES = 10  # kills of one log


@pytest.mark.timeout(120 + 3 * KILLS)
def test_a_log_whose_writer_is_killed_holds_what_it_acknowledged(tmp_path: Path) -> None:
    chosen = random.Random(1)
    appends = checked = trimmed = 0
    for kill in range(KILLS):
        if kill % LIVES == 0:
            told, path = Told(), tmp_path / str(kill) / "log.db"
            path.parent.mkdir()
        process = writer(path, chosen.randrange(1 << 30))
        heard = heard_until(process, chosen)
        told.hear(heard + the_rest(process))
        told.check(path)
        appends, told.appends = appends + told.appends, 0
        checked, told.checked = checked + told.checked, 0
        trimmed = max(trimmed, told.trimmed)
    print(f"{KILLS} kills, {appends} acknowledged appends, {checked} compared")
    assert appends > 5 * KILLS
    assert checked > KILLS
    assert trimmed > 0
