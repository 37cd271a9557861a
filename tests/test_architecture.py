"""The house rules that a program can check: who may import whom, and how large a piece may be."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = SOURCE / "headrace"
FILES = sorted(path for path in PACKAGE.rglob("*.py"))

FLOORS = [
    {
        "change",
        "errors",
        "config",
        "defaults",
        "values",
        "document",
        "secret",
        "references",
        "failpoints",
        "keys",
        "turns",
        "scrub",
        "definition",
        "lifeline",
        "schema_policy",
        "scale_settings",
        "alarms",
        "channels",
        "posting",
    },
    {
        "protocols",
        "prepared",
        "prepared_file",
        "parts",
        "steps",
        "join",
        "reference",
        "mart",
        "payload",
        "pgtypes",
        "keyfilter",
        "cells",
        "debezium",
        "ahead",
        "evolution",
        "decisions",
        "records",
        "masking",
        "standing",
    },
    {"sources", "log", "staging", "transform", "destinations", "quarantine", "scaling"},
    {
        "joining",
        "cutting",
        "hands",
        "handover",
        "preparing",
        "worker",
        "history",
        "rebuilding",
        "redriving",
        "capturing",
        "recopied",
        "undecodable",
        "snapshot",
        "lane",
        "waiting",
        "pipeline",
        "state",
        "stopping",
        "binding",
        "reading",
        "server",
        "verify",
        "conservation",
        "memory",
        "upkeep",
        "upstream",
        "marts",
        "authoring",
        "raw",
        "alerts",
        "outages",
        "autoscaling",
        "belonging",
        "measuring",
    },
    {"cli", "console", "testing"},
]
FOLDERS = FLOORS[2]
ENTRY = {"__init__", "__main__"}
MAX_FUNCTION = 70
MAX_MODULE = 500
VAGUE = {"utils", "util", "common", "core", "helpers", "helper", "misc"}


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(module: str) -> str:
    """The part of the package that a floor names: `transform` for `headrace.transform.fold`."""
    return module.split(".")[1] if "." in module else "__init__"


def floor(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name in names)


class _Unless(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def imports(path: Path, *, at_run_time: bool = False) -> Iterator[str]:
    """Every module that a file imports, wherever in it, in full; `from a import b` may mean `a.b`.

    `at_run_time` leaves out what only a type checker imports.
    """
    tree = ast.parse(path.read_text())
    for node in ast.walk(_Unless().visit(tree) if at_run_time else tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


MODULES = {name_of(path): path for path in FILES}


def ours(path: Path, *, at_run_time: bool = False) -> Iterator[str]:
    return (name for name in imports(path, at_run_time=at_run_time) if name.split(".")[0] == "headrace")


def test_every_module_has_a_floor() -> None:
    known = set().union(*FLOORS) | ENTRY
    assert {unit(module) for module in MODULES} - known == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down_only(path: Path) -> None:
    own = unit(name_of(path))
    if own in ENTRY:
        # The package itself offers what users import, and imports it when it is asked for.
        allowed = {"__main__": {"cli"}, "__init__": {"definition", "reading", "raw"}}[path.stem]
        assert {unit(name) for name in ours(path)} <= allowed
        return
    for name in ours(path):
        other = unit(name)
        if other in {own, "__init__"}:
            continue
        if floor(other) == floor(own):
            assert other not in FOLDERS, (
                f"{path}: the folders of the data path never import each other ({name})"
            )
        assert floor(other) <= floor(own), f"{path} imports {name}, which stands above it"
        assert (own, other) != ("testing", "cli"), f"{path}: testing imports nothing of the command line"


def test_the_lowest_floor_needs_the_standard_library_alone() -> None:
    for name in FLOORS[0]:
        for module in imports(PACKAGE / f"{name}.py"):
            root = module.split(".")[0]
            assert root == "headrace" or root in sys.stdlib_module_names, f"{name} imports {module}"


def test_nothing_imports_in_a_circle() -> None:
    graph = {
        name: {other for other in ours(path, at_run_time=True) if other != name}
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way, name])
        if name not in done:
            for other in graph.get(name, ()):
                if other != "headrace":
                    visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_and_modules_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_MODULE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{path.name}: {node.name} has {length} lines"


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert not {part for module in MODULES for part in module.split(".")} & VAGUE


def test_the_floors_are_apart() -> None:
    for lower, upper in pairwise(FLOORS):
        assert not lower & upper
