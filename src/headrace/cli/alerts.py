"""`headrace alerts`: what fires and whether it was delivered; trying the channels; silencing."""

from __future__ import annotations

import json as json_text
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from headrace.alerts.message import time_text
from headrace.alerts.store import FILE, Alert, AlertStore, Delivery, Silence
from headrace.cli.tables import print_json_lines, print_table
from headrace.config import Project, load_project
from headrace.document import Invalid
from headrace.errors import UserError
from headrace.sources.postgres.health import age_text
from headrace.values import duration

_Project = Annotated[Path, Parameter(help="The project's folder.")]
_Json = Annotated[bool, Parameter(help="Print JSON.", negative="")]


def list_alerts(*, project: _Project = Path(), limit: int = 50, json: _Json = False) -> None:
    """List what fires, then what is over, the newest first; what was sent, and is still to be; silences.

    Works beside a running pipeline and without one. With --json one object: `alerts`, each with dedup_id,
    kind, subject, source, model, severity, summary, began_at, ended_at (null: it fires); `deliveries`: id,
    channel, group, made_at, attempts, delivered_at (null: not yet), next_attempt, failure; `silences`:
    subject, until, reason.

    Parameters
    ----------
    limit
        How many alerts and how many deliveries at most.
    """
    settings = load_project(project, secrets=False)
    store, now = AlertStore(settings.state / FILE), time.time()
    alerts, deliveries = store.recent(limit), store.deliveries(limit)
    silences = store.silences(now)
    store.close()
    if json:
        report = {
            "alerts": [_alert(alert) for alert in alerts],
            "deliveries": [_delivery(delivery) for delivery in deliveries],
            "silences": [_silence(silence) for silence in silences],
        }
        print(json_text.dumps(report, ensure_ascii=False))
        return
    _print_alerts(alerts, now)
    _print_deliveries(deliveries, now)
    for silence in silences:
        print(f"silenced {silence.subject} until {time_text(silence.until)}: {silence.reason}")


def send_test(channel: str = "", *, project: _Project = Path(), json: _Json = False) -> int:
    """Send a test by every channel, or by one, now; exit code 1 where one does not take it.

    With --json one line for each channel: channel, type, delivered, failure.

    Parameters
    ----------
    channel
        Only this one, as `[alerts.NAME]` calls it.
    """
    from headrace.alerts.message import Message, Undelivered
    from headrace.alerts.sending import send
    from headrace.alerts.service import example_body, origin_of

    settings = load_project(project)
    names = [each.name for each in settings.alerts.channels]
    chosen = [each for each in settings.alerts.channels if channel in ("", each.name)]
    if not chosen:
        known = ", ".join(names) or "none: add [alerts.NAME] to headrace.toml"
        raise UserError("There is no such channel to test.", f"There are: {known}.")
    rows = []
    for each in chosen:
        message = Message.new(origin_of(settings), "test", time.time(), example_body(time.time()))
        failure = ""
        try:
            send(each, message)
        except Undelivered as error:
            failure = str(error)
        rows.append((each.name, each.type, not failure, failure))
    if json:
        print_json_lines(("channel", "type", "delivered", "failure"), map(list, rows))
    else:
        for name, type_, delivered, failure in rows:
            print(f"{name} ({type_}): {'delivered' if delivered else f'FAILED: {failure}'}")
    return 0 if all(row[2] for row in rows) else 1


def silence(
    subject: str,
    *,
    for_: Annotated[str, Parameter(name="--for")] = "4h",
    reason: str = "",
    end: Annotated[bool, Parameter(negative="")] = False,
    project: _Project = Path(),
) -> None:
    """Have nobody told of a model, or of an issue, for a while; what still holds then is told then.

    Works beside a running pipeline and without one.

    Parameters
    ----------
    subject
        A model's name, or an issue's id (or what else an alert has as its subject).
    for_
        How long, such as 30m, 4h or 2d.
    reason
        Why, for who looks at `headrace alerts list`.
    end
        End the silence now.
    """
    settings = load_project(project, secrets=False)
    now = time.time()
    if not settings.state.exists():
        raise UserError("This project has not run yet.", "Run it: `headrace run`.")
    store = AlertStore(settings.state / FILE)
    try:
        if end:
            _refuse_unsilenced(subject, store.silences(now))
            store.silence(subject, now, "", now)
            print(f"{subject} is silenced no longer.")
            return
        if not reason.strip():
            raise UserError("A silence needs a reason.", "Give --reason TEXT.")
        until = now + _seconds(for_)
        _refuse_unknown(settings, subject, store)
        store.silence(subject, until, reason, now)
        print(f"Nobody is told of {subject} until {time_text(until)}.")
    finally:
        store.close()


def _seconds(text: str) -> float:
    try:
        seconds: float = duration("1s", "365d")(text)
    except Invalid as error:
        raise UserError(f"--for {error}.") from None
    return seconds


def _refuse_unsilenced(subject: str, silences: Sequence[Silence]) -> None:
    if all(silence.subject != subject for silence in silences):
        known = ", ".join(silence.subject for silence in silences) or "none"
        raise UserError("There is no such silence.", f"There are: {known}.")


def _refuse_unknown(project: Project, subject: str, store: AlertStore) -> None:
    """Refuse what is neither an alert's subject or model, nor a model's file: a slip of the pen would silence
    nothing."""
    is_model = any((project.models / f"{subject}{suffix}").exists() for suffix in (".sql", ".py"))
    is_mirror = any(subject.startswith(f"{source.name}.") for source in project.sources)
    if is_model or is_mirror or store.knows(subject):
        return
    raise UserError("There is no model and no alert of this name.", "`headrace alerts list` shows them.")


def _alert(alert: Alert) -> dict[str, Any]:
    return {
        "dedup_id": alert.id,
        **{name: getattr(alert, name) for name in ("kind", "subject", "source", "model", "severity")},
        "summary": alert.words,
        "began_at": time_text(alert.began_at),
        "ended_at": None if alert.ended_at is None else time_text(alert.ended_at),
    }


def _delivery(delivery: Delivery) -> dict[str, Any]:
    done = delivery.done_at
    return {
        **{name: getattr(delivery, name) for name in ("id", "channel", "group")},
        "made_at": time_text(delivery.made_at),
        "attempts": delivery.attempts,
        "delivered_at": None if done is None else time_text(done),
        "next_attempt": None if done is not None else time_text(delivery.due_at),
        "failure": delivery.failure,
    }


def _silence(silence: Silence) -> Mapping[str, Any]:
    return {"subject": silence.subject, "until": time_text(silence.until), "reason": silence.reason}


def _print_alerts(alerts: Sequence[Alert], now: float) -> None:
    firing = sum(alert.fires for alert in alerts)
    print(f"{firing or 'No'} alert{'s' * (firing != 1)} firing")
    rows = [("firing" if alert.fires else "over", alert, age_text(now - alert.began_at)) for alert in alerts]
    for state, alert, age in rows:
        print(f"{state:<6} {age:>6}  {alert.severity:<8} {alert.words}")


def _print_deliveries(deliveries: Sequence[Delivery], now: float) -> None:
    if deliveries:
        print()
        print_table(("channel", "group", "age", "attempts", "state"), list(_rows(deliveries, now)))


def _rows(deliveries: Sequence[Delivery], now: float) -> Iterator[tuple[object, ...]]:
    for delivery in deliveries:
        state = "delivered" if delivery.done_at else "to be sent"
        if delivery.failure:
            state = f"FAILED: {delivery.failure}; again in {age_text(max(0.0, delivery.due_at - now))}"
        age = age_text(now - delivery.made_at)
        yield delivery.channel, delivery.group, age, delivery.attempts, state
