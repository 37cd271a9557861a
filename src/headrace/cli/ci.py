"""`headrace ci`: models parsed, bound, tested and held to their recorded output, without a database."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from headrace.authoring.checking import check_models
from headrace.authoring.checking import record as record_all
from headrace.authoring.files import model_file
from headrace.authoring.judging import run_tests
from headrace.authoring.recorded import read_shapes
from headrace.cells import json_of
from headrace.cli.test import print_outcomes
from headrace.config import MODELS_FOLDER, Project, load_project


def ci(
    *,
    record: Annotated[bool, Parameter(negative="")] = False,
    project: Annotated[Path, Parameter(help="The project's folder.")] = Path(),
    json: Annotated[bool, Parameter(help="Print one JSON object.", negative="")] = False,
) -> int:
    """Check all models against recorded tables, run all tests, and look for breaking changes.

    Exit code 1 if a model does not parse or bind, a test fails, or an output column is gone, has another type
    or may be null now, against schemas/models.lock. Needs no database, no state and no secrets. With --json:
    ok, models (model, problems, breaks, unbound), tests (as `headrace test` has them); of --record: files,
    breaks.

    Parameters
    ----------
    record
        Write schemas/ from what the pipeline has captured last, and from the models as they are: run it where
        the pipeline runs, and commit the files.
    """
    settings = load_project(project, secrets=False)
    if record:
        return _record(settings, json=json)
    results = list(check_models(settings))
    recorded = {source.name: read_shapes(settings, source.name) for source in settings.sources}
    outcomes = list(run_tests(settings, recorded))
    ok = all(result.ok for result in results) and not any(outcome.problems for outcome in outcomes)
    if json:
        models, tests = [asdict(result) for result in results], [asdict(outcome) for outcome in outcomes]
        print(json_of({"ok": ok, "models": models, "tests": tests}))
        return 0 if ok else 1
    for result in results:
        print(f"{'ok  ' if result.ok else 'FAIL'} {MODELS_FOLDER}/{model_file(settings, result.model).name}")
        for problem in (*result.problems, *result.breaks):
            print(f"     {problem}")
        if result.unbound:
            print(f"     not bound here: {result.unbound}")
    if any(result.breaks for result in results):
        print("What breaks on purpose is accepted with `headrace ci --record`.")
    print_outcomes(outcomes)
    return 0 if ok else 1


def _record(project: Project, *, json: bool) -> int:
    recorded = record_all(project)
    files = [str(path.relative_to(project.root)) for path in recorded.files]
    if json:
        print(json_of({"files": files, "breaks": recorded.breaks}))
        return 0
    for line in recorded.breaks:
        print(f"breaks: {line}")
    print(f"Recorded: {', '.join(files)}")
    return 0
