"""`headrace scale`: what workers would have done, and what a load will need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from cyclopts import Parameter

from headrace.cells import json_of
from headrace.cli.tables import print_table
from headrace.config import load_project
from headrace.document import Invalid
from headrace.errors import UserError
from headrace.scaling.arrivals import TICK, Arrivals, read_csv
from headrace.scaling.baselines import compare
from headrace.scaling.journal import FILE, Journal, arrivals_of
from headrace.scaling.picture import as_svg, in_terminal
from headrace.scaling.policy import Limits
from headrace.scaling.simulation import Outcome, Plant
from headrace.values import duration

_WEEK = 7 * 86_400.0
_COLUMNS = ("policy", "worker-hours", "over bound", "min over", "p99 s", "max s", "changes/day")
_FIELDS = (
    *("policy", "worker_hours", "ratio", "minutes_over", "p99_freshness", "max_freshness"),
    *("actions_per_day", "price"),
)


class _Known(NamedTuple):
    """What workers are where no options say it; seconds, and rows a second."""

    freshness: float
    start: float
    pause: float
    own_rate: float


_ASSUMED = _Known(120.0, 60.0, 3.0, 0.0)


@Parameter(name="*")
@dataclass
class Workers:
    """What the workers are that are simulated."""

    worker_rate: Annotated[float | None, Parameter(help="Rows a second of one worker.")] = None
    mean_workers: Annotated[
        float | None, Parameter(help="Instead: how many workers the mean of the arrivals keeps busy.")
    ] = None
    freshness: Annotated[
        str | None, Parameter(help="The target, from commit to visible: 30s. [default: 2m]")
    ] = None
    start: Annotated[
        str | None, Parameter(help="From ordering a worker to its first result. [default: 60s]")
    ] = None
    pause: Annotated[
        str | None, Parameter(help="All stand still so long when one joins or leaves. [default: 3s]")
    ] = None
    min_workers: int = 0
    max_workers: int = 64
    own_rate: Annotated[
        float | None, Parameter(help="Rows a second of the main process without workers. [default: 0]")
    ] = None
    apply_rate: Annotated[float | None, Parameter(help="Rows a second that apply takes at most.")] = None
    wrong_by: Annotated[
        float, Parameter(help="How much the policy takes a worker for too fast (0.3) or too slow (-0.3).")
    ] = 0.0
    daily_hours: Annotated[float | None, Parameter(help="Worker-hours that a day may cost.")] = None
    price: Annotated[float, Parameter(help="Of a worker-hour.")] = 0.0


def simulate(
    arrivals: Path | None = None,
    *,
    workers: Workers = Workers(),  # noqa: B008 - its fields are options, each with its own default
    learn: Annotated[
        str | None, Parameter(help="For how long the first arrivals only teach the schedule: 7d.")
    ] = None,
    threshold: Annotated[str, Parameter(help="The backlog policy's seconds of work a worker.")] = "60s",
    svg: Annotated[Path | None, Parameter(help="Write the pictures of all to a file.")] = None,
    json: Annotated[bool, Parameter(help="Print one JSON object.", negative="")] = False,
    project: Annotated[Path, Parameter(help="The project's folder.")] = Path(),
) -> None:
    """Show what policies would have done with arrivals, and what that costs.

    A file of arrivals has the columns timestamp,value: the start of an interval, and the rows in it. Without
    a file, the decisions that this project has journalled are replayed; rows are worker-seconds then, and a
    worker does one a second. The strictest target, the start time and the main process's rate are those of
    the last decision then, and nobody pauses, unless options say otherwise.

    With --json: mean_rate, seconds, bound_hours, policies (policy, worker_hours, ratio, minutes_over,
    p99_freshness, max_freshness, actions_per_day, price).

    Parameters
    ----------
    arrivals
        A CSV file.
    """
    every, known = (read_csv(arrivals), _ASSUMED) if arrivals else _journalled(project)
    history, judged = _split(every, learn)
    plant = _plant(workers, judged, known, is_replay=arrivals is None)
    outcomes = compare(judged, history, plant, threshold=seconds_of("--threshold", threshold))
    if svg is not None:
        _write(svg, as_svg(judged, plant.mu, outcomes))
    if json:
        print(json_of(_object(judged, outcomes)))
        return
    is_priced = bool(plant.limits.price)
    print_table(
        (*_COLUMNS, "price") if is_priced else _COLUMNS,
        [_row(outcome, is_priced=is_priced) for outcome in outcomes],
    )
    print(
        f"Lower bound {outcomes[0].bound_hours:,.1f} worker-hours in {judged.seconds / 86_400:,.1f} days: "
        f"the work itself. min over: minutes in which freshness was over {plant.slo:,.0f} s."
    )
    print()
    print(in_terminal(judged, plant.mu, outcomes[0]))


def seconds_of(option: str, text: str) -> float:
    """Return a duration given on the command line."""
    try:
        seconds: float = duration("0s", "3650d")(text)
    except Invalid as error:
        raise UserError(f"{option} {error}.") from None
    return seconds


def _journalled(project: Path) -> tuple[Arrivals, _Known]:
    settings = load_project(project, secrets=False)
    entries = list(Journal(settings.state / FILE).read())
    arrivals, last = arrivals_of(entries), entries[-1].snapshot
    loads = [load for load in last.loads if load.service_rate]
    own = [(load.own_rate or 0.0) / (load.service_rate or 1.0) for load in loads]
    slo = min((load.slo for load in loads), default=_ASSUMED.freshness)
    return arrivals, _Known(slo, last.start_p95, 0.0, min(own, default=0.0))


def _split(every: Arrivals, learn: str | None) -> tuple[Arrivals, Arrivals]:
    """Return what teaches the schedule, and what is judged: half of it each, and a week of teaching at
    most."""
    taught = seconds_of("--learn", learn) if learn else min(_WEEK, every.seconds / 2)
    if not TICK <= taught <= every.seconds - TICK:
        raise UserError(
            f"--learn {learn} leaves nothing of the {every.seconds / 3600:,.1f} hours of arrivals.",
            "Give less, and more than 15s.",
        )
    return every.split(taught)


def _plant(workers: Workers, judged: Arrivals, known: _Known, *, is_replay: bool) -> Plant:
    if (workers.worker_rate is None) == (workers.mean_workers is None) and not is_replay:
        raise UserError(
            "How much a worker does is not clear.",
            "Give one of --worker-rate (rows a second) and --mean-workers (that the mean keeps busy).",
        )
    if workers.mean_workers is not None:
        _positive("--mean-workers", workers.mean_workers)
        rate = judged.rate / workers.mean_workers
    else:
        rate = 1.0 if workers.worker_rate is None else workers.worker_rate
    _positive("--worker-rate", rate)
    if not 0 <= workers.min_workers <= workers.max_workers or workers.max_workers < 1:
        raise UserError("--min-workers and --max-workers do not fit.", "0 <= min <= max, and max at least 1.")
    if not -1 < workers.wrong_by < 10:
        raise UserError("--wrong-by is a share: 0.3 for a third too fast, -0.3 for as much too slow.")
    return Plant(
        mu=rate,
        slo=_positive("--freshness", _given("--freshness", workers.freshness, known.freshness)),
        start=_given("--start", workers.start, known.start),
        pause=_given("--pause", workers.pause, known.pause),
        own_rate=known.own_rate if workers.own_rate is None else workers.own_rate,
        apply_rate=workers.apply_rate,
        believed=1 + workers.wrong_by,
        hours_per_day=workers.daily_hours,
        limits=Limits(workers.min_workers, workers.max_workers, price=workers.price),
    )


def _given(option: str, text: str | None, known: float) -> float:
    return known if text is None else seconds_of(option, text)


def _positive(option: str, number: float) -> float:
    if not 0 < number < math.inf:
        raise UserError(f"{option} must be more than 0.")
    return number


def _row(outcome: Outcome, *, is_priced: bool) -> Sequence[object]:
    row = (
        outcome.policy,
        round(outcome.worker_hours, 1),
        round(outcome.ratio, 2),
        round(outcome.minutes_over, 1),
        round(outcome.p99_freshness),
        round(outcome.max_freshness),
        round(outcome.actions_per_day, 1),
    )
    return (*row, round(outcome.price, 2)) if is_priced else row


def _object(judged: Arrivals, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "mean_rate": judged.rate,
        "seconds": judged.seconds,
        "bound_hours": outcomes[0].bound_hours,
        "policies": [{name: getattr(outcome, name) for name in _FIELDS} for outcome in outcomes],
    }


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.", "Name another file.") from error
