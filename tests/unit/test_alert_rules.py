"""What is told to whom and when, what stays on disk, and how it is signed: without a database."""

from __future__ import annotations

import json
import logging
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest

from headrace import outages
from headrace.alarms import KINDS, Alarm, resolve, trigger
from headrace.alerts import sending, smtp
from headrace.alerts.grouping import is_for, muted, notice_due, severity_of
from headrace.alerts.message import Message, Undelivered
from headrace.alerts.rules import AGAIN_WITHIN, issue_rule
from headrace.alerts.sending import pause, send
from headrace.alerts.service import Alerting, example_body
from headrace.alerts.store import Alert, AlertStore, Silence, Standing, Told
from headrace.alerts.webhook import signature
from headrace.channels import AlertsConfig, AlertSettings, Channel
from headrace.config import load_project
from headrace.errors import DestinationUnavailable, LogFull, SourceUnavailable
from headrace.lane import Lane
from headrace.outages import Outages
from headrace.secret import Secret
from receivers import CERTIFICATE, Mail, Web

TIMERS = AlertsConfig()
ISSUE = Alert(
    "a1", "issue", "v1:1", "shop", "sales", "warning", 1, "NEW CAUSE", lasts=True, began_at=100, said_at=100
)
SUSPENDED = replace(ISSUE, id="a2", kind="suspended", subject="sales", severity="error")
NOTICE = replace(ISSUE, id="a3", kind="notice", subject="x", lasts=False, ended_at=100.0)
OPS = Channel("ops", Secret("https://ops.example/x"))


def due(known: list[tuple[Alert, Told | None]], standing: Standing | None, now: float) -> list[str] | None:
    notice = notice_due("sales", known, standing, TIMERS, now)
    return None if notice is None else [a.id for a in notice.firing] + [f"-{a.id}" for a in notice.over]


def test_a_group_waits_for_what_comes_together_then_tells_what_is_new_and_repeats_what_is_not() -> None:
    told, at = Told(1, is_over=False), Standing(1_000.0, is_outstanding=False)
    assert due([(ISSUE, None)], None, 129) is None
    assert due([(ISSUE, None), (SUSPENDED, None)], None, 130) == ["a1", "a2"]
    late = replace(SUSPENDED, began_at=1_010.0)
    assert due([(ISSUE, told), (late, None)], at, 1_299) is None
    assert due([(ISSUE, told), (late, None)], at, 1_300) == ["a1", "a2"]
    assert due([(ISSUE, told)], at, 15_399) is None
    assert due([(ISSUE, told)], at, 15_400) == ["a1"]
    assert due([(replace(ISSUE, grade=2), told)], at, 1_300) == ["a1"]
    over = replace(ISSUE, ended_at=1_100.0)
    assert due([(over, told)], at, 1_299) is None
    assert due([(over, told)], at, 1_300) == ["-a1"]
    # Nobody was told that it began: nobody is told that it is over.
    assert due([(over, None)], None, 1_300) is None
    assert due([(NOTICE, None)], None, 130) == ["a3"]


def test_no_more_is_sent_about_a_group_while_something_is_still_to_be_sent() -> None:
    assert due([(ISSUE, Told(1, is_over=False))], Standing(0.0, is_outstanding=True), 1e6) is None


def test_a_suspended_model_and_a_source_that_is_away_mute_what_they_explain_and_nothing_else() -> None:
    down = replace(SUSPENDED, kind="source_down", subject="shop.capture", model="")
    stale = replace(ISSUE, kind="freshness", subject="sales")
    slot = replace(ISSUE, kind="slot", subject="shop.lag", model="")
    assert muted(ISSUE, [ISSUE, SUSPENDED], []) == "model sales is suspended"
    assert muted(replace(ISSUE, model="other"), [SUSPENDED], []) == ""
    assert muted(SUSPENDED, [SUSPENDED, down], []) == ""
    assert muted(stale, [down], []) == "shop.capture stands still"
    assert muted(ISSUE, [down], []) == ""
    assert muted(slot, [down], []) == ""
    for subject in ("sales", "v1:1"):
        assert muted(ISSUE, [], [Silence(subject, 9e9, "known", 0.0)]) == "silenced: known"
    assert muted(ISSUE, [], [Silence("v1:2", 9e9, "known", 0.0)]) == ""


def test_a_models_header_says_how_grave_it_is_and_where_it_goes() -> None:
    all_ = Channel("all", Secret("https://all.example"), severity="info")
    grave = Channel("grave", Secret("https://grave.example"), severity="error")
    named = Channel("named", Secret("https://named.example"), models=("sal*",))
    owned = Channel("owned", Secret("https://owned.example"), owners=("finance",))
    channels = [all_, grave, named, owned]
    names = [channel.name for channel in channels]

    def going(alert: Alert, settings: AlertSettings) -> list[str]:
        return [each.name for each in channels if is_for(each, alert, {"sales": settings}, names)]

    assert going(ISSUE, AlertSettings()) == ["all", "named"]
    assert going(ISSUE, AlertSettings(severity="critical", owner="finance")) == names
    assert going(ISSUE, AlertSettings(severity="info", route=("grave",))) == ["grave"]
    assert going(ISSUE, AlertSettings(route=("nowhere",))) == ["all", "named"]
    assert severity_of(replace(ISSUE, grade=2)) == "error"
    assert severity_of(replace(ISSUE, grade=9), AlertSettings(severity="error")) == "critical"


def test_the_store_keeps_an_alert_and_whom_it_was_told_to(tmp_path: Path) -> None:
    path = tmp_path / "alerts.db"
    store = AlertStore(path)
    store.end("issue", "v1:1", 1.0) if store.exists() else None
    assert not path.exists()
    issue = Alarm("issue", "v1:1", "shop", "sales", "warning")
    store.record(issue, "NEW CAUSE", 10.0)
    (first,) = store.firing()
    for i in range(1_000):
        store.record(issue, f"NEW CAUSE {i}", 11.0)
    sent = store.enqueue("ops", "sales", "{}", {first.id: Told(1, is_over=False)}, 12.0)
    store.close()

    again = AlertStore(path)
    assert [(each.id, each.words, each.began_at) for each in again.firing()] == [
        (first.id, "NEW CAUSE 999", 10.0)
    ]
    assert again.untold("ops", 13.0)[0][1] == Told(1, is_over=False)
    assert again.untold("other", 13.0)[0][1] is None
    delivery = again.due("ops", 13.0)
    assert delivery is not None
    assert delivery.id == sent
    again.failed(delivery, "it answered 500", 20.0)
    assert again.due("ops", 19.0) is None
    assert [each.failure for each in again.failing()] == ["it answered 500"]
    again.delivered(delivery, 21.0)
    assert again.due("ops", 99.0) is None
    assert again.standings("ops") == {"sales": Standing(12.0, is_outstanding=False)}
    again.end("issue", "v1:1", 30.0)
    again.record(issue, "NEW CAUSE", 40.0)
    assert [each.id == first.id for each in again.recent(9)] == [False, True]
    again.prune(31.0)
    assert [each.began_at for each in again.recent(9)] == [40.0]
    assert again.deliveries(9) == []
    again.close()


def test_what_does_not_last_is_told_once_however_often_it_is_said(tmp_path: Path) -> None:
    store = AlertStore(tmp_path / "alerts.db")
    for now in (10.0, 20.0, 10_000.0):
        store.record(Alarm("notice", "a table is new"), "a table is new", now)
    assert len(store.recent(9)) == 1
    store.record(Alarm("notice", "a table is new"), "a table is new", 30_000.0)
    assert [each.began_at for each in store.recent(9)] == [30_000.0, 10.0]
    store.close()


@pytest.fixture
def alerting(tmp_path: Path) -> Iterator[Alerting]:
    """Alerts of a project that has no destination to ask, with one channel that tells at once."""
    (tmp_path / "headrace.toml").write_text(
        '[source.shop]\nurl = "postgresql://localhost/x"\n[alerts]\ngroup_wait = "0s"\ndisk_low = "0B"\n'
        '[alerts.ops]\nurl = "http://127.0.0.1:9/x"\n'
    )

    def read(*_: object) -> None:
        raise DestinationUnavailable("away")

    lane = SimpleNamespace(
        config=SimpleNamespace(name="shop"),
        folder=SimpleNamespace(current=tuple, marts=tuple),
        destination=SimpleNamespace(read=read, exists=lambda: True),
    )
    made = Alerting(load_project(tmp_path), [cast(Lane, lane)])
    yield made
    made.close()


def sent(alerting: Alerting) -> list[dict[str, Any]]:
    """What is written to be sent, as its receiver would get it; it counts as delivered then."""
    store, bodies = alerting._store, []
    while delivery := store.due("ops", 9e9):
        bodies.append(json.loads(delivery.body))
        store.delivered(delivery, 0.0)
    return bodies


def test_a_line_of_the_logger_is_recorded_when_the_call_returns(alerting: Alerting) -> None:
    trigger("slot", "shop.lag", "ALARM of %s", "postgresql://me:hunter2@db/x", source="shop")
    logging.getLogger("headrace.alert").error("%s is told by nobody in particular", "this")
    slot, notice = alerting._store.recent(9) if alerting._store.recent(1)[0].fires else (None, None)
    assert slot is not None
    assert notice is not None
    assert (slot.kind, slot.source, slot.words) == ("slot", "shop", "ALARM of postgresql://me:***@db/x")
    assert (notice.kind, notice.severity, notice.fires) == ("notice", "error", False)
    resolve("slot", "shop.lag", "RESOLVED")
    assert not alerting._store.firing()


def test_an_alert_that_cannot_be_recorded_is_recorded_later(
    alerting: Alerting, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(AlertStore, "record", lambda *_: 1 / 0)
        trigger("gap", "shop.capture", "STOPPED", source="shop")
        trigger("stopped", "shop.load", "STOPPED", source="shop")
    assert not alerting._store.firing()
    alerting.step(_stopped())
    assert [each.kind for each in alerting._store.firing()] == ["gap", "stopped"]


def _stopped() -> threading.Event:
    stop = threading.Event()
    stop.set()
    return stop


def test_what_is_muted_is_told_when_nothing_mutes_it_any_more(alerting: Alerting) -> None:
    trigger("suspended", "sales", "SUSPENDED", source="shop", model="sales")
    trigger("issue", "v1:1", "NEW CAUSE", source="shop", model="sales")
    alerting.plan(1e9 * 2)
    (body,) = sent(alerting)
    assert [alert["kind"] for alert in body["alerts"]] == ["suspended"]
    assert body["severity"] == "error"
    resolve("suspended", "sales", "RESOLVED", model="sales")
    alerting._store.silence("sales", 3e9, "known", 0.0)
    alerting.plan(2.1e9)
    (body,) = sent(alerting)
    assert [(each["kind"], each["status"]) for each in body["alerts"]] == [("suspended", "resolved")]
    alerting._store.silence("sales", 0.0, "", 1.0)
    alerting.plan(2.2e9)
    (body,) = sent(alerting)
    assert [(each["kind"], each["status"]) for each in body["alerts"]] == [("issue", "firing")]


def test_what_only_a_former_process_has_said_is_over_in_time(alerting: Alerting) -> None:
    for kind in ("slot", "suspended"):
        alerting._store.record(Alarm(kind, "x", "shop", "", KINDS[kind].severity), "former", 1.0)
    trigger("gap", "shop.capture", "STOPPED", source="shop")
    started = alerting._started
    assert started is not None
    alerting._look(started + AGAIN_WITHIN - 1)
    assert len(alerting._store.firing()) == 3
    alerting._look(started + AGAIN_WITHIN + 1)
    # A suspended model is known by the destination, which is away.
    assert sorted(each.kind for each in alerting._store.firing()) == ["gap", "suspended"]


def test_an_issue_that_escalates_or_comes_back_is_graver_and_told_again() -> None:
    row = dict.fromkeys(("source", "model", "reason", "columns", "message"), "x") | {
        "issue": "v1:1",
        "records": 3,
    }
    grades = {state: issue_rule({**row, "state": state}).grade for state in ("new", "ongoing", "escalating")}
    assert grades == {"new": 1, "ongoing": 1, "escalating": 2}
    assert issue_rule({**row, "state": "regressed"}).grade == 2


def test_a_wait_that_lasts_is_alerted_of_once_and_over_when_it_works(
    alerting: Alerting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outages, "ALERT_AFTER", 0.0)
    lasting = Outages()
    assert lasting.fails("shop.capture", SourceUnavailable("away")) is False
    assert lasting.fails("shop.capture", SourceUnavailable("away")) is True
    lasting.fails("shop.load", LogFull("full"))
    lasting.fails("shop.load", LogFull("full"))
    firing = alerting._store.firing()
    assert [(each.kind, each.source) for each in firing] == [("source_down", "shop"), ("waiting", "shop")]
    # That the source answers does not make room.
    lasting.works("shop.load", SourceUnavailable)
    lasting.works("shop.capture", SourceUnavailable)
    assert lasting.reasons() == {"shop.load": "alerted: full"}
    assert [each.kind for each in alerting._store.firing()] == ["waiting"]
    lasting.works("shop.load")
    assert alerting._store.firing() == []


def test_a_webhook_is_signed_as_standard_webhooks_says() -> None:
    signed = b'msg_p5jXN8AQM9LWM0D4loKWxJek.1614265330.{"test": 2432232314}'
    expected = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert signature("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", signed) == expected


def test_pauses_grow_differ_and_heed_what_the_receiver_asks() -> None:
    random.seed(1)
    assert all(2.5 <= pause(1) <= 5.0 for _ in range(50))
    assert all(300.0 <= pause(n) <= 600.0 for n in (8, 20, 10_000))
    assert len({pause(3) for _ in range(10)}) > 5
    assert pause(1, asked=120.0) == 120.0
    assert pause(1, asked=1e9) == 3_600.0


MESSAGE = Message.new("/headrace/shop", "sales", 0.0, example_body(0.0))


def test_mail_is_sent_with_what_groups_it_and_a_refusal_is_a_failure() -> None:
    mail = Mail()
    channel = Channel(
        "mail", Secret(f"smtp://me:hunter2@127.0.0.1:{mail.port}"), None, "h@x.org", ("a@x.org", "b@x.org")
    )
    try:
        send(channel, MESSAGE)
        (got,) = mail.mails
        assert got["Message-ID"] == f"<{MESSAGE.id}@headrace>"
        assert got["To"] == "a@x.org, b@x.org"
        assert got["References"] == "<-headrace-shop.sales@headrace>"
        assert "This is a test" in got.get_content()
        assert mail.logins
        mail.refuse = b"550 no\r\n"
        with pytest.raises(Undelivered, match="550"):
            send(channel, MESSAGE)
    finally:
        mail.close()
    with pytest.raises(Undelivered, match="ConnectionRefusedError"):
        send(channel, MESSAGE)


def test_a_password_is_not_mailed_about_without_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp, "_LOCAL", ())
    mail = Mail()
    try:
        channel = Channel(
            "mail", Secret(f"smtp://me:hunter2@127.0.0.1:{mail.port}"), None, "h@x.org", ("a@x.org",)
        )
        with pytest.raises(Undelivered, match="no TLS"):
            send(channel, MESSAGE)
        assert (mail.logins, mail.mails) == ([], [])
    finally:
        mail.close()


@pytest.mark.parametrize(("scheme", "tls"), [("smtp", "starttls"), ("smtps", "smtps")])
def test_mail_goes_over_tls_to_a_server_that_is_who_it_says(
    scheme: str, tls: Literal["smtps", "starttls"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtp, "_LOCAL", ())  # a password goes nowhere without TLS
    mail = Mail(tls)
    channel = Channel(
        "mail", Secret(f"{scheme}://me:hunter2@127.0.0.1:{mail.port}"), None, "h@x.org", ("a@x.org",)
    )
    try:
        with pytest.raises(Undelivered, match="SSLCertVerificationError"):
            send(channel, MESSAGE)
        assert mail.logins == []
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        send(channel, MESSAGE)
        assert (len(mail.logins), len(mail.mails), mail.encrypted) == (1, 1, 1)
    finally:
        mail.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_apprise_reaches_other_services(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("apprise")
    web = Web()
    try:
        channel = Channel("other", Secret(web.url.replace("http://", "json://")))
        assert channel.type == "apprise"
        send(channel, MESSAGE)
        assert "This is a test" in web.posts[0].event["message"]
        web.plan = [500]
        with pytest.raises(Undelivered, match="did not take it"):
            send(channel, MESSAGE)
        with pytest.raises(Undelivered, match="knows no service"):
            send(Channel("odd", Secret("hunter2://x")), MESSAGE)
    finally:
        web.close()
    monkeypatch.setitem(__import__("sys").modules, "apprise", None)
    with pytest.raises(Undelivered, match=r"pip install 'headrace\[alerts\]'"):
        send(channel, MESSAGE)


def test_whatever_a_library_raises_is_a_failure_that_quotes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sending._MODULES, "webhook", "headrace.alerts.nowhere_hunter2")
    with pytest.raises(Undelivered) as caught:
        send(OPS, MESSAGE)
    assert "hunter2" not in str(caught.value)


def test_many_may_make_the_file_at_once(tmp_path: Path) -> None:
    for round_ in range(5):
        stores = [AlertStore(tmp_path / f"{round_}.db") for _ in range(8)]
        failed: list[Exception] = []

        def open_one(store: AlertStore, failed: list[Exception] = failed) -> None:
            try:
                store.silence("sales", 9e9, "known", 0.0)
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=open_one, args=(store,)) for store in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        for store in stores:
            store.close()
