"""Where a running pipeline listens."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from headrace.server import _new_socket_path


@pytest.mark.parametrize("length", [1, 60, 120])
def test_a_path_is_short_enough_wherever_temporary_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    folder = tmp_path / ("t" * length)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    path = _new_socket_path(tmp_path / ".headrace")
    assert len(os.fsencode(path)) <= 107
    assert path.parent.is_dir()
    assert path != _new_socket_path(tmp_path / "another" / ".headrace")
