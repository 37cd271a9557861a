"""Every reason of a record has its section in the runbook, and a line among the quarantine's reasons."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAGES = ("decode", "transform", "constraint", "write", "crash")
REASON = re.compile(rf"(?:{'|'.join(STAGES)})\.[a-z_]+")


def reasons() -> set[str]:
    """All reasons that the source names, each of which is a string of its own there."""
    found = set()
    for path in (ROOT / "src" / "headrace").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and REASON.fullmatch(node.value)
            ):
                found.add(node.value)
    return found


def test_every_reason_is_in_the_runbook_and_no_other() -> None:
    text = (ROOT / "docs" / "runbook.md").read_text()
    sections = dict(re.findall(r"^## (\S+\.\S+)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    assert set(sections) == reasons()
    for reason, section in sections.items():
        for word in ("**Look at**", "**Mend**", "**Redrive**"):
            assert f"\n- {word} " in section, f"{reason} lacks {word}"


def test_every_reason_is_told_of_where_the_quarantine_is() -> None:
    (table,) = re.findall(
        r"^## Reasons\n(.*?)^## ", (ROOT / "docs" / "quarantine.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert {name for name in re.findall(r"`([a-z_.]+)`", table) if REASON.fullmatch(name)} == reasons()
