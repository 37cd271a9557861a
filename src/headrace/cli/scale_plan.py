"""`headrace scale plan`: what a stated load will need."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from headrace.cells import json_of
from headrace.cli.scale import seconds_of
from headrace.cli.tables import print_table
from headrace.config import FILE_NAME, load_project
from headrace.errors import UserError
from headrace.scaling.journal import FILE, Journal
from headrace.scaling.plan import Answer, Figure, Figures, Question, figures_of
from headrace.scaling.plan import plan as make_plan


@Parameter(name="*")
@dataclass
class Workload:
    """The load that is planned for."""

    rows_per_second: Annotated[float, Parameter(help="The mean.")]
    row_bytes: Annotated[float, Parameter(help="Of a row's values as text.")]
    freshness: Annotated[str, Parameter(help="The target, from commit to visible.")] = "60s"
    retention: Annotated[str, Parameter(help="How long log and raw tables are kept.")] = "7d"
    outage: Annotated[str, Parameter(help="How long Headrace may be away.")] = "4h"
    peak: Annotated[float, Parameter(help="The busiest minutes over the mean.")] = 1.0
    burst: Annotated[float, Parameter(help="Rows that come at once, beside the rest.")] = 0.0
    inserts: Annotated[float, Parameter(help="Share of the changes that add a row.")] = 1.0
    max_workers: int = 16
    price: Annotated[float, Parameter(help="Of a worker-hour.")] = 0.0


@Parameter(name="*")
@dataclass
class Known:
    """Figures that are given rather than measured; rates in rows a second."""

    worker_rate: Annotated[float | None, Parameter(help="Of one worker.")] = None
    own_rate: Annotated[float | None, Parameter(help="Of the main process without workers.")] = None
    capture_rate: float | None = None
    load_rate: float | None = None
    apply_rate: float | None = None
    start: Annotated[str | None, Parameter(help="From ordering a worker to its first result.")] = None
    wal_factor: Annotated[float | None, Parameter(help="Bytes of WAL for each byte of a row.")] = None
    log_factor: Annotated[float | None, Parameter(help="Bytes of the log, likewise.")] = None
    raw_factor: Annotated[float | None, Parameter(help="Bytes of raw tables, likewise.")] = None
    destination_factor: Annotated[float | None, Parameter(help="Bytes of the destination, likewise.")] = None


def plan(
    *,
    load: Workload,
    known: Known = Known(),  # noqa: B008 - its fields are options, each with its own default
    json: Annotated[bool, Parameter(help="Print one JSON object.", negative="")] = False,
    project: Annotated[Path, Parameter(help="The project's folder.")] = Path(),
) -> None:
    """Say what a load will need: workers, disk, WAL at the source, time to recover, price.

    Figures are those that this project has journalled, if it has, and what options give instead. Each answer
    says what it rests on: measured, given or assumed, and whether it goes beyond what was measured.

    With --json: answers (what, value, unit, basis, note), warnings.
    """
    question = Question(
        rows_per_second=_positive("--rows-per-second", load.rows_per_second),
        row_bytes=_positive("--row-bytes", load.row_bytes),
        freshness=_positive("--freshness", seconds_of("--freshness", load.freshness)),
        retention=seconds_of("--retention", load.retention),
        outage=seconds_of("--outage", load.outage),
        peak=_at_least("--peak", load.peak, 1.0),
        burst=_at_least("--burst", load.burst, 0.0),
        inserts=min(1.0, _at_least("--inserts", load.inserts, 0.0)),
        max_workers=int(_at_least("--max-workers", load.max_workers, 1)),
        price=_at_least("--price", load.price, 0.0),
    )
    made = make_plan(question, _figures(project, known))
    if json:
        print(json_of(asdict(made)))
        return
    print_table(
        ("what", "value", "rests on", "note"),
        [(answer.what, _shown(answer), answer.basis, answer.note) for answer in made.answers],
    )
    for warning in made.warnings:
        print(f"! {warning}")


def _figures(project: Path, known: Known) -> Figures:
    """Return what the project's journal tells, if there is a project, and over it what is given."""
    figures = Figures()
    if (project / FILE_NAME).exists():
        settings = load_project(project, secrets=False)
        figures = figures_of(Journal(settings.state / FILE).read())
    rates = ((name, "rate") for name in ("worker", "own", "capture", "load", "apply"))
    factors = ((name, "factor") for name in ("wal", "log", "raw", "destination"))
    given = [(n, f"--{n}-{kind}", getattr(known, f"{n}_{kind}")) for n, kind in (*rates, *factors)]
    given.append(("start", "--start", seconds_of("--start", known.start) if known.start else None))
    for name, option, value in given:
        if value is not None:
            figures = replace(figures, **{name: Figure(_positive(option, value), "given")})  # type: ignore[arg-type]
    return figures


def _positive(option: str, number: float) -> float:
    if not 0 < number < math.inf:
        raise UserError(f"{option} must be more than 0.")
    return number


def _at_least(option: str, number: float, least: float) -> float:
    if not least <= number < math.inf:
        raise UserError(f"{option} must be {least:g} or more.")
    return number


def _shown(answer: Answer) -> str:
    value = answer.value
    if value is None:
        return "-"
    if answer.unit == "bytes":
        for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
            if value >= size:
                return f"{value / size:,.1f} {unit}"
        return f"{value:,.0f} B"
    if answer.unit == "seconds":
        return f"{value:,.0f} s" if value < 600 else f"{value / 60:,.0f} min"
    return f"{value:,.0f}" if answer.unit == "workers" else f"{value:,.1f} {answer.unit}"
