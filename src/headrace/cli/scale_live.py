"""`headrace scale status|history|explain`: how many workers there are, were, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from headrace.cells import json_of
from headrace.cli.tables import print_table
from headrace.config import Project, load_project
from headrace.errors import UserError
from headrace.scaling.journal import FILE, Entry, Journal, as_object
from headrace.server import ask

_ABSENT = timedelta(minutes=3)
"""Without an entry for so long the pipeline did not run: it writes one a minute."""
_AHEAD = timedelta(minutes=1)
"""By which the clock of whoever asks may be ahead."""
_LOADS = {
    "load": "model",
    "target s": "slo",
    "rows wait": "backlog_rows",
    "work s": "work_seconds",
    "oldest s": "oldest_age",
    "rows/s 30 s": "ewma_30s",
    "300 s": "ewma_300s",
    "most": "max_300s",
    "a worker does": "mu",
    "main process": "own_rate",
    "hand-over": "handover_rate",
    "busy cores": "busy_cores",
    "apply": "apply_rate",
    "worth a worker": "worth",
}
_OTHERS = {
    "ready": "workers that take parts",
    "starting": "workers that start",
    "desired": "workers that the decision before wanted",
    "start_p95": "seconds from a worker's start to its first result",
    "parts": "parts for workers to take",
    "apply_rate": "rows/s that apply takes",
    "staged_rate": "rows/s that have come to be staged at most",
    "prepared_parts": "prepared parts that wait for apply",
    "raises_without_gain": "raises in vain",
    "figures_age": "seconds since the figures were taken",
}
_LIMITS = {
    "min_workers": "workers at least",
    "max_workers": "workers at most",
    "worker_hours_left": "worker-hours left today",
    "price": "price of a worker-hour",
}

_ProjectOption = Annotated[Path, Parameter(help="The project's folder.")]
_JsonOption = Annotated[bool, Parameter(help="Print one JSON object.", negative="")]


def status(*, project: _ProjectOption = Path(), json: _JsonOption = False) -> None:
    """Show how many workers there are and should be, why, and what that is decided by.

    Asks the running pipeline; where none runs, the last decision is shown.

    With --json: running; desired, ready, starting, busy (workers), queued (parts), worker_hours_today, all
    null where no pipeline runs but desired; decision, as `explain --json` has it, or null.
    """
    settings = load_project(project, secrets=False)
    report = _report(settings)
    if json:
        print(json_of(report))
        return
    if report["running"]:
        print(
            "{desired} workers wanted: {ready} ready, {starting} starting, {busy} busy; {queued} parts "
            "queued; {worker_hours_today:,.2f} worker-hours today".format(**report)
        )
    else:
        print("not running: headrace run")
    if report["decision"] is None:
        print("Nothing has been decided yet.")
    else:
        _print_entry(report["decision"])


def history(
    *,
    since: Annotated[
        str | None, Parameter(help="From when on: 2026-11-29T14:05 or 14:05, UTC. [default: a day ago]")
    ] = None,
    every: Annotated[
        bool, Parameter(help="All entries, not only those that change something.", negative="")
    ] = False,
    project: _ProjectOption = Path(),
    json: Annotated[bool, Parameter(help="Print one JSON object a line.", negative="")] = False,
) -> None:
    """List the decisions that changed the number of workers, or the reason for it.

    With --json: each as `explain --json` has it.
    """
    settings = load_project(project, secrets=False)
    now = datetime.now(UTC)
    begin = moment(since, now) if since else now - timedelta(days=1)
    entries = Journal(settings.state / FILE).read(begin)
    chosen = entries if every else _changes(entries)
    if json:
        for entry in chosen:
            print(json_of(as_object(entry)))
        return
    rows = [
        (
            _time(entry.at),
            entry.decision.workers,
            entry.decision.reason.code.value,
            str(entry.decision.reason),
        )
        for entry in chosen
    ]
    if rows:
        print_table(("at (UTC)", "workers", "code", "why"), rows)
    else:
        print(f"No decisions since {_time(begin)}.")


def explain(
    at: str | None = None,
    *,
    project: _ProjectOption = Path(),
    json: _JsonOption = False,
) -> None:
    """Say why there were so many workers at a moment: the decision in force then, and all that made it.

    With --json: at, policy, settings (of the policy), snapshot (all inputs), decision (workers, code,
    figures, sentence), again (workers and code that this version decides from the same).

    Parameters
    ----------
    at
        2026-11-29T14:05:00, or 14:05 for the last time that it was so late; UTC. Now, if not given.
    """
    settings = load_project(project, secrets=False)
    now = datetime.now(UTC)
    when = moment(at, now) if at else now
    if when > now + _AHEAD:
        raise UserError(f"{_time(when)} UTC is yet to come.", "Times are of UTC, unless they say otherwise.")
    entry = _in_force(settings, when)
    again = entry.policy.decide(entry.snapshot)
    if json:
        decided = {"workers": again.workers, "code": again.reason.code.value}
        print(json_of({**as_object(entry), "again": decided}))
        return
    if when - entry.at > _ABSENT:
        print(f"The pipeline wrote nothing from {_time(entry.at)} to {_time(when)}: it was not running.")
    _print_entry(as_object(entry))
    if again != entry.decision:
        print(f"\nFrom the same inputs this version decides: {again.workers} workers, {again.reason.code}")
        print(again.reason.sentence)


def moment(text: str, now: datetime) -> datetime:
    """Return the time that a person names: ISO 8601, or a time of day, the last before `now`. UTC unless it
    says otherwise."""
    try:
        if "-" not in text:
            clock = datetime.fromisoformat(f"{now.date().isoformat()}T{text}")
            found = clock if clock.tzinfo else clock.replace(tzinfo=UTC)
            return found if found <= now else found - timedelta(days=1)
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(
            f'"{text}" is no time.', "Write it like 2026-11-29T14:05:00 or 14:05 (UTC)."
        ) from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _report(settings: Project) -> dict[str, Any]:
    try:
        return {"running": True, **{k: v for k, v in ask(settings, {"op": "scale"}).items() if k != "ok"}}
    except OSError:
        last = Journal(settings.state / FILE).last()
    unknown = dict.fromkeys(("ready", "starting", "busy", "queued", "worker_hours_today"))
    return {
        "running": False,
        "desired": last.decision.workers if last else None,
        **unknown,
        "decision": as_object(last) if last else None,
    }


def _in_force(settings: Project, when: datetime) -> Entry:
    """Return the last decision at or before a moment. Raises UserError where there is none."""
    found, first = None, None
    for entry in Journal(settings.state / FILE).read():
        first = first or entry.at
        if entry.at <= when:  # a clock that was put back has later ones behind it
            found = entry
    if found is None:
        words = f"The first that is journalled is of {_time(first)}." if first else "None is journalled."
        raise UserError(
            f"There is no decision of {_time(when)} or before. {words}",
            "`headrace scale history` lists them; a running pipeline makes them.",
        )
    return found


def _changes(entries: Iterable[Entry]) -> Iterator[Entry]:
    before: tuple[object, ...] | None = None
    for entry in entries:
        what = (entry.decision.workers, entry.decision.reason.code)
        if what != before:
            yield entry
        before = what


def _print_entry(entry: Mapping[str, Any]) -> None:
    decision, snapshot = entry["decision"], entry["snapshot"]
    at = datetime.fromisoformat(entry["at"])
    print(f"{_time(at)} UTC, policy {entry['policy']}: {decision['workers']} workers, {decision['code']}")
    print(decision["sentence"])
    if snapshot["loads"]:
        print()
        names = list(_LOADS)
        print_table(names, [[_shown(load.get(_LOADS[name])) for name in names] for load in snapshot["loads"]])
    print()
    rows = [(about, _shown(snapshot.get(key))) for key, about in _OTHERS.items()]
    rows += [(about, _shown(snapshot["limits"].get(key))) for key, about in _LIMITS.items()]
    print_table(("input", "value"), rows)


def _shown(value: object) -> object:
    """Return a figure with as many digits as people read; `-` for one that is not known."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Decimal):  # so a running pipeline's answer is read
        value = float(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3g}"
    return f"{value:,}" if isinstance(value, int) else value


def _time(at: datetime) -> str:
    return at.astimezone(UTC).replace(tzinfo=None).isoformat(sep=" ", timespec="seconds")
