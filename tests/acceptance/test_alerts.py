"""Alerts of a real pipeline, at real receivers: none lost, none doubled, one for one cause."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace import posting
from headrace.alarms import Alarm
from headrace.alerts import sending
from headrace.alerts.rules import Rules
from headrace.alerts.store import FILE, AlertStore
from headrace.alerts.webhook import signature
from headrace.config import Project, load_project
from headrace.errors import HeadraceError
from headrace.failpoints import VARIABLE
from headrace.pipeline import Pipeline, open_lanes
from headrace.testing.postgres import PostgresServer
from pipelines import running, until
from projects import here, sales_project, sql
from receivers import Mail, Web

SECRET = "a secret of the webhook"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("alerts") / "pg") as running_server:
        yield running_server


@pytest.fixture
def web() -> Iterator[Web]:
    made = Web()
    yield made
    made.close()


@pytest.fixture
def project(tmp_path: Path, server: PostgresServer, web: Web) -> Project:
    """The sales project, whose third order fails, with a webhook that is told at once."""
    sales_project(tmp_path, server)
    config = tmp_path / "headrace.toml"
    config.write_text(
        f'{config.read_text()}[alerts]\ngroup_wait = "0s"\ngroup_interval = "1s"\n'
        f'[alerts.ops]\nurl = "{web.url}"\nsecret = "{SECRET}"\n'
    )
    return load_project(tmp_path)


def run_once(project: Project, **failpoints: str) -> int:
    """Run it in a process of its own, which dies at the failpoints."""
    armed = ";".join(f"{name.replace('_', '.')}={action}" for name, action in failpoints.items())
    return subprocess.run(
        [sys.executable, "-m", "headrace", "run", "--once", "--project", str(project.root)],
        env={**os.environ, VARIABLE: armed},
        capture_output=True,
        check=False,
    ).returncode


def only(events: list[dict[str, Any]]) -> dict[str, Any]:
    (event,) = events
    (alert,) = event["data"]["alerts"]
    return {**alert, "event": event}


def test_a_thousand_records_of_one_cause_are_one_alert_whatever_the_receiver_does(
    project: Project, server: PostgresServer, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(posting, "_TIMEOUT", 0.5)
    monkeypatch.setattr(sending, "_FIRST_PAUSE", 0.2)
    web.plan = [500, "reset", "hang", 302, 503]
    model = project.models / "sales.sql"
    model.write_text(model.read_text().replace("/* headrace", "/* headrace\nmax_error_rate = 1"))
    sql(server, "INSERT INTO orders SELECT i, 'new', 'bad' FROM generate_series(10, 1008) i")
    with running(project):
        until(web.taken, 30, "delivered at last")
        alert = only(web.taken())
        assert [post.answer for post in web.posts] == [500, "reset", "hang", 302, 503, 200]
        # Every attempt is the same event.
        assert len({post.body for post in web.posts}) == 1
        assert {post.headers["webhook-id"] for post in web.posts} == {alert["event"]["id"]}
        for post in web.posts:
            stamp = post.headers["webhook-timestamp"]
            signed = f"{alert['event']['id']}.{stamp}.".encode() + post.body
            assert post.headers["webhook-signature"] == signature(SECRET, signed)
        _is_whole(alert)
        model.write_text(
            '/* headrace\nkey = ["order_id"]\n*/\nSELECT id::BIGINT AS order_id, upper(status) AS status, '
            "TRY_CAST(amount AS DECIMAL(12,2)) AS amount FROM raw.shop.orders WHERE status <> 'draft'\n"
        )
        done = here("quarantine", "redrive", "--issue", alert["subject"], cwd=project.root)
        assert "1000 records resolved" in done.out, done
        until(lambda: len(web.taken()) == 2, 30, "resolved")
    resolved = only(web.taken()[1:])
    assert resolved["event"]["type"] == "headrace.alert.resolved"
    assert (resolved["dedup_id"], resolved["status"]) == (alert["dedup_id"], "resolved")
    assert resolved["event"]["id"] != alert["event"]["id"]


def _is_whole(alert: dict[str, Any]) -> None:
    """What an alert of an issue has to hold."""
    event, details = alert["event"], alert["details"]
    assert {name: event[name] for name in ("specversion", "source", "type", "subject")} == {
        "specversion": "1.0",
        "source": f"/headrace/{event['source'].rpartition('/')[2]}",
        "type": "headrace.alert.firing",
        "subject": "sales",
    }
    assert alert["summary"].startswith("transform.cast amount: Conversion Error")
    assert (details["records"], details["quarantined"], details["blocked"]) == (1_000, 1_000, 0)
    assert details["per_minute"] == 200.0
    assert len(details["samples"]) == 3
    assert details["samples"][0]["cells"]["amount"] == "bad"
    assert details["model_version"]
    assert details["model_changed_at"].startswith("20")
    assert alert["commands"]["redrive"] == f"headrace quarantine redrive --issue {alert['subject']}"
    for name in ("first_seen", "committed", "positions", "txids", "offsets"):
        assert details[name], name


def test_an_issue_in_a_postgres_destination_is_told_as_whole(
    project: Project, server: PostgresServer, web: Web
) -> None:
    sql(server, "DROP SCHEMA IF EXISTS headrace CASCADE", "DROP SCHEMA IF EXISTS away CASCADE")
    sql(server, "INSERT INTO orders SELECT i, 'new', 'bad' FROM generate_series(10, 1008) i")
    config = project.root / "headrace.toml"
    to = f'[destination]\ntype = "postgres"\nurl = "{server.url}"\nschema = "away"\n'
    config.write_text(f"{config.read_text()}{to}")
    model = project.models / "sales.sql"
    model.write_text(model.read_text().replace("/* headrace", "/* headrace\nmax_error_rate = 1"))
    Pipeline(load_project(project.root)).run_once()
    _is_whole(only(web.taken()))


def test_what_is_masked_goes_to_nobody(project: Project, server: PostgresServer, web: Web) -> None:
    config = project.root / "headrace.toml"
    pii = 'pii = ["public.orders.id", "public.orders.amount"]'
    config.write_text(config.read_text().replace("[source.shop]", f"[source.shop]\n{pii}"))
    sql(server, "INSERT INTO orders VALUES (4711000, 'new', 'hunter3')")
    Pipeline(load_project(project.root)).run_once()
    first, *_ = only(web.taken())["details"]["samples"]
    assert (first["key"], first["cells"]["id"], first["cells"]["amount"]) == ("***", "***", "***")
    kept = b"".join(path.read_bytes() for path in project.state.glob(f"{FILE}*"))
    for said in (web.posts[0].body, kept):
        assert b"4711000" not in said
        assert b"hunter3" not in said


def test_a_kill_between_the_record_and_its_delivery_loses_no_alert(project: Project, web: Web) -> None:
    killed = -signal.SIGKILL
    assert run_once(project, alerts_record="kill@1") == killed
    assert not (project.state / FILE).exists()
    assert run_once(project, alerts_sent="kill@1") == killed
    first = only(web.taken())
    Pipeline(project).run_once()
    again = only(web.taken()[1:])
    assert again["event"] == first["event"]
    Pipeline(project).run_once()
    assert len(web.posts) == 2


def test_what_is_silenced_is_told_when_the_silence_ends(
    project: Project, web: Web, capsys: pytest.CaptureFixture[str]
) -> None:
    (project.state / "log").mkdir(parents=True)
    refused = here("alerts", "silence", "slaes", "--reason", "x", cwd=project.root)
    assert (refused.code, refused.err) == (
        2,
        "There is no model and no alert of this name. `headrace alerts list` shows them.\n",
    )
    assert here("alerts", "silence", "sales", cwd=project.root).code == 2
    done = here("alerts", "silence", "sales", "--for", "2h", "--reason", "known", cwd=project.root)
    assert done.out.startswith("Nobody is told of sales until 20")
    Pipeline(project).run_once()
    assert web.posts == []
    listed = here("alerts", "list", "--json", cwd=project.root).objects()[0]
    assert [(each["kind"], each["ended_at"]) for each in listed["alerts"]] == [("issue", None)]
    assert listed["silences"][0]["reason"] == "known"
    assert (
        here("alerts", "silence", "sales", "--end", cwd=project.root).out == "sales is silenced no longer.\n"
    )
    Pipeline(project).run_once()
    assert only(web.taken())["kind"] == "issue"


def test_a_failed_delivery_is_to_be_seen_and_the_channels_can_be_tried(project: Project, web: Web) -> None:
    mail = Mail()
    config = project.root / "headrace.toml"
    config.write_text(
        f'{config.read_text()}[alerts.mail]\nurl = "smtp://127.0.0.1:{mail.port}"\n'
        'from = "headrace@example.org"\nto = "data@example.org"\nmodels = ["sales"]\n'
    )
    web.plan = [500, 500]
    Pipeline(load_project(project.root)).run_once()
    (got,) = mail.mails
    assert got["Subject"].startswith("[FIRING] sales: transform.cast amount")
    assert "redrive: headrace quarantine redrive --issue v1:" in got.get_content()
    status = here("status", cwd=project.root).out
    assert "ALERTS are not delivered by ops (1 attempts" in status
    listed = here("alerts", "list", cwd=project.root).out
    assert "FAILED: it answered 500" in listed
    assert "hunter2" not in status + listed
    tried = here("alerts", "test", cwd=project.root)
    assert (tried.code, tried.out) == (1, "ops (webhook): FAILED: it answered 500\nmail (smtp): delivered\n")
    assert here("alerts", "test", "ops", cwd=project.root).code == 0
    mail.close()


def test_a_model_that_is_late_or_stands_still_is_alerted_of(
    project: Project, server: PostgresServer, web: Web, caplog: pytest.LogCaptureFixture
) -> None:
    model = project.models / "sales.sql"
    model.write_text(model.read_text().replace("/* headrace", '/* headrace\nfreshness = "1s"'))
    Pipeline(project).run_once()
    sql(server, "INSERT INTO orders VALUES (9, 'new', '9')", "INSERT INTO customers VALUES (9, 'Eve')")
    (lane,) = open_lanes(project)
    lane.capture(threading.Event(), until=lane.source.head())
    rules = Rules(project, {"shop": lane}, lane.destination)
    store = AlertStore(project.state / FILE)
    texts = {text.name: text for text in lane.folder.current()}

    def told(now: float) -> list[str]:
        caplog.clear()
        rules.look(store.firing(), texts, now)
        for record in caplog.records:
            if isinstance(alarm := getattr(record, "alarm", None), Alarm):
                store.record(alarm, record.getMessage(), now)
        return [record.getMessage() for record in caplog.records if record.name == "headrace.alert"]

    now = time.time()
    assert told(now - 60) == []
    (late,) = told(now + 60)
    assert late.startswith("STALE model sales: a change that was committed")
    assert told(now + 61) == []
    assert [words.partition(":")[0] for words in told(now + 841)] == [
        "NO PROGRESS of model sales",
        "NO PROGRESS of model shop.customers",
    ]
    while lane.load() or lane.apply():
        pass
    assert sorted(told(now + 1_000)) == [
        "RESOLVED freshness sales",
        "RESOLVED progress sales",
        "RESOLVED progress shop.customers",
    ]
    lane.close()
    lane.destination.close()
    store.close()


def test_a_suspended_model_is_one_alert_that_outlives_the_process_and_ends_with_it(
    project: Project, web: Web
) -> None:
    model = project.models / "sales.sql"
    whole = model.read_text()
    model.write_text(whole.replace("upper(status)", "nonsense(status)"))
    for _ in range(2):
        with pytest.raises(HeadraceError, match="suspended"):
            Pipeline(project).run_once()
    alert = only(web.taken())
    assert (alert["kind"], alert["subject"], alert["severity"]) == ("suspended", "sales", "error")
    model.write_text(whole)
    Pipeline(project).run_once()
    over = [(each["kind"], each["status"]) for event in web.taken()[1:] for each in event["data"]["alerts"]]
    assert sorted(over) == [("issue", "firing"), ("suspended", "resolved")]
    assert json.dumps(web.taken()).count(alert["dedup_id"]) == 2
