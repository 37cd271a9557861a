"""`headrace test`: what models make of given rows, held against what they should."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from headrace.authoring.cases import FOLDER
from headrace.authoring.judging import Outcome, run_tests
from headrace.authoring.recorded import read_shapes
from headrace.cells import json_of
from headrace.config import load_project


def run(
    *names: Annotated[str, Parameter(help="Only these: models, or files in tests/ without .toml.")],
    project: Annotated[Path, Parameter(help="The project's folder.")] = Path(),
    json: Annotated[bool, Parameter(help="Print one JSON object per test.", negative="")] = False,
) -> int:
    """Run the tests of models in tests/*.toml; exit code 1 if one fails.

    Needs no database and no state. With --json: file, line, name, model, problems (empty where it passed).
    """
    settings = load_project(project, secrets=False)
    recorded = {source.name: read_shapes(settings, source.name) for source in settings.sources}
    outcomes = run_tests(settings, recorded, names)
    if json:
        return _print_json(outcomes)
    return print_outcomes(outcomes)


def print_outcomes(outcomes: Iterable[Outcome]) -> int:
    """Print what became of tests, with all that is wrong; returns 1 if anything is."""
    total = failed = 0
    for outcome in outcomes:
        total += 1
        failed += bool(outcome.problems)
        print(
            f"{'FAIL' if outcome.problems else 'ok  '} {FOLDER}/{outcome.file}:{outcome.line} {outcome.name}"
        )
        for problem in outcome.problems:
            print(f"     {problem}")
    tests = "1 test" if total == 1 else f"{total} tests"
    print(f"{tests}, {failed} failed." if total else f"No tests: write {FOLDER}/NAME.toml.")
    return 1 if failed else 0


def _print_json(outcomes: Iterable[Outcome]) -> int:
    code = 0
    for outcome in outcomes:
        code |= bool(outcome.problems)
        print(json_of(asdict(outcome)))
    return code
