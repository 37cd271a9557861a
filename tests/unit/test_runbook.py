"""What documentation says of the quarantine, held against source and tests."""

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


def test_what_is_said_of_us_beside_others_names_tests_that_there_are() -> None:
    text = (ROOT / "docs" / "quarantine-compared.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(?:\w+::)?(\w+)`", text)
    assert len(named) > 30
    lacking = [(path, test) for path, test in named if f"def {test}(" not in (ROOT / path).read_text()]
    assert not lacking


def test_what_is_said_of_others_has_its_source() -> None:
    text, _, sources = (ROOT / "docs" / "quarantine-compared.md").read_text().partition("\n## Sources\n")
    cited = {int(number) for number in re.findall(r"\[(\d+)\]", text)}
    assert cited == {int(number) for number in re.findall(r"^(?:- )?\[?(\d+)[\].]", sources, re.MULTILINE)}
