"""`headrace scale`, as a user meets it; none of it needs a database."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from xml.etree import ElementTree

import pytest
from test_scaling_journal import entry

from headrace.cli import main
from headrace.cli.scale_live import moment
from headrace.scaling.journal import Entry, Journal, as_object
from headrace.server import Server

if TYPE_CHECKING:
    from headrace.protocols import Destination

PROJECT = """[source.shop]
type = "postgres"
url = "postgresql://nobody@127.0.0.1:1/none"
tables = ["public.*"]
[destination]
type = "duckdb"
path = "w.duckdb"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "headrace.toml").write_text(PROJECT)
    return tmp_path


@pytest.fixture
def arrivals(tmp_path: Path) -> Path:
    """Two days: quiet, and busy in the middle of the day."""
    file = tmp_path / "arrivals.csv"
    hours = [(day, hour) for day in (1, 2) for hour in range(24)]
    lines = [f"2026-06-0{day} {hour:02}:00,{36_000 if 9 <= hour < 15 else 3_600}" for day, hour in hours]
    file.write_text("\n".join(["timestamp,value", *lines, ""]))
    return file


def test_a_file_of_arrivals_is_simulated(
    arrivals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.svg"
    common = ["scale", "simulate", str(arrivals), "--worker-rate", "2", "--min-workers", "1"]
    assert main([*common, "--price", "0.1", "--svg", str(picture)]) == 0
    out = capsys.readouterr().out
    head, *rows = out.splitlines()[:6]
    assert head.split()[:2] == ["policy", "worker-hours"]
    assert [row.split("  ")[0] for row in rows] == [
        *("slo_band", "backlog 60 s", "cpu 70 %", "schedule", "static peak")
    ]
    assert "Lower bound" in out
    assert "█" in out
    assert "2026-06-02 00:00" in out  # the first day teaches the schedule
    panels = ElementTree.parse(picture).getroot().iter("{http://www.w3.org/2000/svg}title")
    titles = [str(panel.text).split(":")[0] for panel in panels]
    assert titles == [row.split("  ")[0] for row in rows]
    assert main([*common, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ours, *others = found["policies"]
    assert ours["minutes_over"] == 0
    assert ours["worker_hours"] < others[-1]["worker_hours"] / 2  # static peak
    assert ours["actions_per_day"] < others[0]["actions_per_day"] / 3  # backlog
    assert found["bound_hours"] == pytest.approx(24 * found["mean_rate"] / 2, rel=1e-6)


def test_the_journal_is_replayed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["scale", "simulate", "--project", str(project), "--json"]
    assert main(arguments) == 2
    assert "Let the pipeline run" in capsys.readouterr().err
    journal = Journal(project / ".headrace" / "scaling.jsonl")
    for tick in range(0, 240, 2):
        journal.append(entry(tick))
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mean_rate"] == pytest.approx(4.0)
    assert found["policies"][0]["policy"] == "slo_band"
    # The target of 60 s and the start of 8 are the pipeline's own.
    own = ["--freshness", "60s", "--start", "8s", "--pause", "0s", "--own-rate", "0.8"]
    assert main([*arguments, *own]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main([*arguments, "--start", "120s"]) == 0
    assert json.loads(capsys.readouterr().out) != found
    assert main(["scale", "simulate", "--project", str(project)]) == 0
    assert "in which freshness was over 60 s." in capsys.readouterr().out


def test_a_plan_is_made_of_the_journal_and_of_options(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = ["scale", "plan", "--rows-per-second", "1000", "--row-bytes", "100", "--project", str(project)]
    assert main(load) == 2
    assert "--worker-rate" in capsys.readouterr().err
    Journal(project / ".headrace" / "scaling.jsonl").append(entry(0))
    assert main([*load, "--burst", "3000000", "--apply-rate", "5000", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    found = {answer["what"]: answer for answer in made["answers"]}
    assert found["workers at the mean"]["value"] == 2  # 550 rows a second each, as measured
    assert found["workers at the mean"]["basis"] == "measured"
    assert found["recovery after 3,000,000 rows at once"]["basis"].startswith("given")
    assert main(load) == 0
    out = capsys.readouterr().out
    assert "WAL at the source, 4 h away" in out
    assert "! The rate of capture is not known" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--worker-rate"),
        (["--worker-rate", "0"], "--worker-rate must be more than 0"),
        (["--worker-rate", "1", "--mean-workers", "2"], "Give one of"),
        (["--worker-rate", "1", "--start", "soon"], '--start "soon" is not a duration'),
        (["--worker-rate", "1", "--freshness", "0s"], "--freshness must be more than 0"),
        (["--worker-rate", "1", "--min-workers", "9", "--max-workers", "3"], "do not fit"),
        (["--worker-rate", "1", "--wrong-by", "-2"], "--wrong-by"),
        (["--worker-rate", "1", "--learn", "9d"], "--learn 9d leaves nothing"),
        (["--worker-rate", "1", "--svg", "/nowhere/x.svg"], "/nowhere/x.svg cannot be written"),
    ],
)
def test_mistakes(
    arrivals: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scale", "simulate", str(arrivals), *arguments]) == 2
    assert words in capsys.readouterr().err


def journalled(project: Path) -> list[Entry]:
    """An hour of decisions, one each quarter of a minute, that ends a while ago."""
    journal, entries = Journal(project / ".headrace" / "scaling.jsonl"), []
    for tick in range(240):
        one = entry(tick, rate=2_000.0 if tick < 120 else 8_000.0)
        entries.append(one)
        journal.append(one)
    return entries


def written(entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(as_object(entry)))
    return found


def test_a_decision_is_explained_from_the_journal(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = journalled(project)
    where = ["--project", str(project)]
    at = entries[100].at + timedelta(seconds=7)
    assert main(["scale", "explain", at.isoformat(), *where, "--json"]) == 0
    again = {"workers": 5, "code": "behind"}
    assert json.loads(capsys.readouterr().out) == {**written(entries[100]), "again": again}
    assert main(["scale", "explain", at.isoformat(), *where]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "2026-06-29 14:30:00 UTC, policy slo_band: 5 workers, behind"
    assert lines[1] == entries[100].decision.reason.sentence
    head = next(line for line in lines if line.startswith("load"))
    assert "rows wait" in head
    assert "main process" in head
    assert any(line.split() == ["orders", "60", *line.split()[2:]] for line in lines)
    assert any(line.startswith("seconds from a worker's start to its first result") for line in lines)
    assert main(["scale", "explain", (entries[-1].at + timedelta(hours=2)).isoformat(), *where]) == 0
    assert capsys.readouterr().out.startswith("The pipeline wrote nothing from 2026-06-29 15:04:45 to ")
    assert main(["scale", "explain", "2031-01-01", *where]) == 2
    assert "2031-01-01 00:00:00 UTC is yet to come." in capsys.readouterr().err
    assert main(["scale", "explain", "2020-01-01", *where]) == 2
    assert "The first that is journalled is of 2026-06-29 14:05:00." in capsys.readouterr().err
    assert main(["scale", "explain", "yesterday", *where]) == 2
    assert '"yesterday" is no time.' in capsys.readouterr().err


def test_a_clock_that_was_put_back_hides_no_decision(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(project / ".headrace" / "scaling.jsonl")
    for tick in (0, 5_000, 4):
        journal.append(entry(tick))
    at = (entry(4).at + timedelta(seconds=1)).isoformat()
    assert main(["scale", "explain", at, "--project", str(project), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["at"] == entry(4).at.isoformat()


def test_what_another_version_would_decide_is_said(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = entry(0)
    earlier = replace(one, decision=replace(one.decision, workers=2))
    Journal(project / ".headrace" / "scaling.jsonl").append(earlier)
    assert main(["scale", "explain", "2026-06-29T14:05", "--project", str(project)]) == 0
    *_, told, why = capsys.readouterr().out.splitlines()
    assert told == "From the same inputs this version decides: 5 workers, behind"
    assert why == one.decision.reason.sentence


def test_the_history_is_what_has_changed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = journalled(project)
    where = ["--project", str(project), "--since", "2026-06-29T14:00"]
    assert main(["scale", "history", *where, "--json"]) == 0
    told = [json.loads(line)["decision"]["code"] for line in capsys.readouterr().out.splitlines()]
    codes = [one.decision.reason.code.value for one in entries]
    assert told == [code for code, _ in groupby(codes)]
    assert main(["scale", "history", *where, "--every", "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 240
    assert main(["scale", "history", *where]) == 0
    assert capsys.readouterr().out.splitlines()[0].split("  ")[0] == "at (UTC)"


def test_the_status_without_a_pipeline_is_the_last_decision(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scale", "status", "--project", str(project)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "not running: headrace run",
        "Nothing has been decided yet.",
    ]
    last = journalled(project)[-1]
    assert main(["scale", "status", "--project", str(project), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["running"], found["desired"], found["ready"]) == (False, last.decision.workers, None)
    assert found["decision"] == written(last)


def test_the_status_of_a_running_pipeline_is_its_own(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = entry(0, rate=2_000.123456789)
    pool = {"ready": 2, "starting": 1, "busy": 2, "queued": 7, "worker_hours_today": 0.5}
    report = {"desired": 5, **pool, "decision": as_object(one)}
    (project / ".headrace").mkdir()
    server = Server(project / ".headrace", cast("Destination", None), {"scale": lambda _: report})
    try:
        assert main(["scale", "status", "--project", str(project)]) == 0
        first, *lines = capsys.readouterr().out.splitlines()
        assert main(["scale", "status", "--project", str(project), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
    finally:
        server.close()
    assert first == ("5 workers wanted: 2 ready, 1 starting, 2 busy; 7 parts queued; 0.50 worker-hours today")
    orders = next(line for line in lines if line.startswith("orders"))
    assert orders.split()[:6] == ["orders", "60", "100,000", "100", "30", "2,000"]
    assert found == {"running": True, **report, "decision": written(one)}


def test_a_time_of_day_is_the_last_one() -> None:
    now = datetime(2026, 6, 29, 14, 0, tzinfo=UTC)
    assert moment("13:05", now) == datetime(2026, 6, 29, 13, 5, tzinfo=UTC)
    assert moment("14:05:30", now) == datetime(2026, 6, 28, 14, 5, 30, tzinfo=UTC)
    assert moment("2026-06-29T14:05+02:00", now) == datetime(2026, 6, 29, 12, 5, tzinfo=UTC)
