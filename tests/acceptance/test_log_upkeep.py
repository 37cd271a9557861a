"""Retention, anchors, lost consumers and markers of gaps, on a real Postgres."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Literal

import apsw
import psycopg
import pytest

import headrace
from headrace.change import Mark, Offset, SourceMark, TableId
from headrace.cli import main
from headrace.config import Project, load_project
from headrace.errors import ForeignDestination, LogTrimmed, SourceGap
from headrace.log.consumers import Cursors
from headrace.log.proof import Anchor, check_anchor, read_anchors
from headrace.log.proof import verify as verify_log
from headrace.log.sqlite import SQLiteLog
from headrace.pipeline import Pipeline
from headrace.sources.postgres.tables import TableStates
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify
from pipelines import running, until

KEY = "a key of anchors for tests"
STRICT = """/* headrace
key = ["id"]
[contract]
id = "BIGINT NOT NULL"
*/
SELECT id::BIGINT AS id, note AS note FROM raw.shop.t
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("pg")) as made:
        yield made


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.pipeline.EVERY", 0.1)


@pytest.fixture
def db(server: PostgresServer, request: pytest.FixtureRequest) -> Iterator[psycopg.Connection[object]]:
    name = request.node.name.replace("[", "_").replace("]", "")[:60]
    server.psql(f'CREATE DATABASE "{name}"')
    with psycopg.connect(server.url.removesuffix("postgres") + name, autocommit=True) as made:
        made.execute("CREATE TABLE t (id int PRIMARY KEY, note text)")
        made.execute("INSERT INTO t SELECT g, 'copied ' || g FROM generate_series(1, 500) g")
        yield made


@pytest.fixture
def project(tmp_path: Path, db: psycopg.Connection[object], server: PostgresServer) -> Iterator[Project]:
    slot = f"s{abs(hash(db.info.dbname))}"[:40]
    yield configure(tmp_path, db, slot, 'keep = "1s"')
    db.execute(
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s", [slot]
    )


def configure(folder: Path, db: psycopg.Connection[object], slot: str, log: str) -> Project:
    url = f"postgresql://{db.info.user}@{db.info.host}:{db.info.port}/{db.info.dbname}"
    (folder / "models").mkdir(exist_ok=True)
    (folder / "headrace.toml").write_text(
        f'[source.shop]\nurl = "{url}"\nslot = "{slot}"\nheartbeat = "500ms"\n[log]\n{log}\n'
    )
    return load_project(folder)


def log_of(project: Project) -> closing[SQLiteLog]:
    return closing(SQLiteLog(project.log_path("shop"), read_only=True))


def insert(db: psycopg.Connection[object], first: int, count: int) -> None:
    for at in range(first, first + count):
        db.execute("INSERT INTO t VALUES (%s, %s)", [at, f"row {at}"])


def insert_and_trim(project: Project, db: psycopg.Connection[object], first: int, count: int) -> None:
    """Insert rows, and wait until they are captured, applied, and gone from the log."""
    insert(db, first, count)
    head = db.execute("SELECT pg_current_wal_flush_lsn() - '0/0'::pg_lsn").fetchone()

    def is_trimmed() -> bool:
        with log_of(project) as log:
            return bool(head) and log.place(log.begin().offset)[0].commit > int(head[0])  # type: ignore[index]

    until(project.log_path("shop").exists)
    until(is_trimmed, what="nothing was trimmed")


def begins(project: Project) -> int:
    with log_of(project) as log:
        return log.begin().offset


def assert_verified(project: Project) -> None:
    Pipeline(load_project(project.root)).run_once()
    wrong = [finding for finding in verify(project).findings if not finding.ok]
    assert not wrong, wrong


@pytest.mark.usefixtures("often")
def test_old_entries_go_and_everything_can_still_be_built_from_staging(
    project: Project, db: psycopg.Connection[object]
) -> None:
    with running(project):
        insert_and_trim(project, db, 1001, 30)
        insert(db, 2001, 10)
        with log_of(project) as log:
            verify_log(log)
            assert set(log.schemas()) == {TableId("public", "t")}
            with pytest.raises(LogTrimmed, match="deleted by retention"):
                log.read(0, 1)
    assert_verified(project)
    project.destination.path.unlink()
    assert_verified(project)


@pytest.mark.usefixtures("often")
def test_a_suspended_model_does_not_hold_the_log_and_goes_on_from_staging(
    project: Project, db: psycopg.Connection[object]
) -> None:
    model = project.models / "strict.sql"
    model.write_text(STRICT)
    with running(project) as pipeline:
        until(lambda: pipeline.lanes[0].models() and pipeline.lanes[0].idle())
        model.write_text(STRICT.replace("note AS note", "nothing AS note"))
        until(lambda: "strict" in pipeline.lanes[0].suspended(), what="not suspended")
        stood = pipeline.lanes[0].destination.models("shop")["strict"].offset
        insert_and_trim(project, db, 1001, 20)
        assert begins(project) > stood
        model.write_text(STRICT)
        until(lambda: not pipeline.lanes[0].suspended(), what="still suspended")
        insert(db, 2001, 1)
        until(pipeline.lanes[0].idle)
    assert_verified(project)


def test_a_destination_from_before_the_log_begins_is_refused_with_what_to_do(
    project: Project, db: psycopg.Connection[object], tmp_path: Path
) -> None:
    Pipeline(project).run_once()
    insert(db, 501, 1)
    Pipeline(project).run_once()
    old = tmp_path / "old.duckdb"
    shutil.copy(project.destination.path, old)
    insert(db, 1001, 20)
    Pipeline(project).run_once()
    with closing(SQLiteLog(project.log_path("shop"))) as log:
        log.trim(log.end().offset)
    shutil.copy(old, project.destination.path)
    with pytest.raises(ForeignDestination, match="begins behind offset") as caught:
        Pipeline(load_project(project.root))
    assert "built from staging" in caught.value.remedy


@pytest.mark.usefixtures("often")
def test_without_staging_a_trimmed_log_says_what_is_missing(
    project: Project, db: psycopg.Connection[object]
) -> None:
    with running(project):
        insert_and_trim(project, db, 1001, 10)
    shutil.rmtree(project.staging.path)
    with pytest.raises(LogTrimmed, match="Staging lacks") as caught:
        Pipeline(load_project(project.root)).run_once()
    assert "resync" in caught.value.remedy
    insert(db, 3001, 2)
    db.execute("DELETE FROM t WHERE id <= 5")
    assert main(["resync", "shop", "--project", str(project.root)]) == 0
    assert_verified(project)
    insert(db, 4001, 2)
    assert_verified(project)
    project.destination.path.unlink()
    assert_verified(project)


@pytest.mark.usefixtures("often")
def test_a_paused_table_does_not_hold_the_log_and_goes_on_from_staging(
    project: Project, db: psycopg.Connection[object]
) -> None:
    with running(project) as pipeline:
        until(lambda: pipeline.lanes[0].models() and pipeline.lanes[0].idle())
        assert main(["tables", "pause", "t", "--project", str(project.root)]) == 0
        stood = pipeline.lanes[0].destination.models("shop")["shop.t"].offset
        insert_and_trim(project, db, 1001, 20)
        assert begins(project) > stood
        assert main(["tables", "resume", "t", "--project", str(project.root)]) == 0
    assert_verified(project)


@pytest.fixture
def pipeline(project: Project) -> Iterator[Pipeline]:
    """One whose steps a test takes itself."""
    made = Pipeline(project)
    yield made
    made.close()


def bring(pipeline: Pipeline, verb: str = "apply") -> None:
    """Take every step there is to take, up to a verb."""
    (lane,) = pipeline.lanes
    lane.capture(pipeline.stop, until=lane.source.head())
    for step in (lane.load, lane.apply)[: 1 + (verb == "apply")]:
        while step():
            pass


def trim(pipeline: Pipeline) -> int:
    """Let all get old that the log holds, and take a step of its upkeep; returns where it begins then."""
    time.sleep(1.1)
    pipeline._upkeep["shop"].step()
    return pipeline.lanes[0].log.begin().offset


def pause(pipeline: Pipeline, what: Literal["pause", "resume"]) -> None:
    (lane,) = pipeline.lanes
    lane.source.change_tables(lane.log, [TableId("public", "t")], what)


def put(pipeline: Pipeline, text: str) -> None:
    """Have the pipeline know a model."""
    (pipeline.project.models / "strict.sql").write_text(text)
    pipeline.lanes[0].reload_models(now=True)


def suspend(pipeline: Pipeline, db: psycopg.Connection[object]) -> None:
    """Break the model, and let the source move on."""
    insert(db, 1001, 1)
    bring(pipeline)
    put(pipeline, STRICT.replace("note AS note", "nothing AS note"))
    insert(db, 1002, 1)
    bring(pipeline)
    assert "strict" in pipeline.lanes[0].suspended()


def renewed(pipeline: Pipeline) -> Pipeline:
    pipeline.close()
    return Pipeline(load_project(pipeline.project.root))


def test_a_model_that_joins_finds_where_it_joins_however_long_that_takes(
    pipeline: Pipeline, db: psycopg.Connection[object]
) -> None:
    db.execute("CREATE TABLE u (id int PRIMARY KEY, note text)")
    moves_on = "INSERT INTO u SELECT coalesce(max(id), 0) + 1, 'moves on' FROM u"
    bring(pipeline)
    (lane,) = pipeline.lanes
    pause(pipeline, "pause")
    db.execute(moves_on)
    bring(pipeline)
    put(pipeline, STRICT)
    pause(pipeline, "resume")
    assert lane.apply(), "its join has not begun"
    pause(pipeline, "pause")
    target = max(lane.joiner.targets())
    for _ in range(2):
        db.execute(moves_on)
        bring(pipeline)
        begin = trim(pipeline)
    assert begin > target
    pause(pipeline, "resume")
    bring(pipeline)
    assert lane.idle()
    assert not lane.suspended()


def test_a_model_that_is_mended_while_the_log_is_trimmed_goes_on(
    pipeline: Pipeline, db: psycopg.Connection[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was decided while it was suspended must not take from it where its first slice has ended."""
    put(pipeline, STRICT)
    bring(pipeline)
    (lane,) = pipeline.lanes
    suspend(pipeline, db)
    trim(pipeline)
    insert(db, 1003, 1)
    bring(pipeline)
    delete, others = lane.log.trim, []

    def apply_now() -> None:
        lane.folder.current(now=True)
        lane.apply()

    def meanwhile(through: Offset, pinned: Iterable[Offset]) -> int:
        if not others:
            (pipeline.project.models / "strict.sql").write_text(STRICT)
            others.append(threading.Thread(target=apply_now))
            others[0].start()
            others[0].join(3)
        return delete(through, pinned)

    monkeypatch.setattr(lane.log, "trim", meanwhile)
    trim(pipeline)
    others[0].join(30)
    assert not others[0].is_alive()
    bring(pipeline)
    assert lane.idle()
    assert not lane.suspended()


def test_a_destination_is_known_again_when_no_model_stands_where_it_was(
    pipeline: Pipeline, db: psycopg.Connection[object]
) -> None:
    put(pipeline, STRICT)
    bring(pipeline)
    insert(db, 1000, 1)
    bring(pipeline)
    pause(pipeline, "pause")
    put(pipeline, STRICT.replace("note AS note", "note AS remark"))
    reached = pipeline.lanes[0].destination.progress("shop")
    for at in (1001, 1002):
        insert(db, at, 1)
        bring(pipeline)
        begin = trim(pipeline)
    assert reached is not None
    assert begin > reached.offset
    again = renewed(pipeline)
    pause(again, "resume")
    bring(again)
    assert again.lanes[0].idle()
    again.close()


def test_a_copy_that_waits_its_turn_finds_what_it_will_look_for(
    pipeline: Pipeline, db: psycopg.Connection[object]
) -> None:
    bring(pipeline)
    begin = trim(pipeline)
    states = TableStates(pipeline.lanes[0].log)
    insert(db, 1001, 3)
    bring(pipeline)
    states.move([TableId("public", "u")], "requested")
    assert trim(pipeline) == begin
    states.move([TableId("public", "u")], "removed")
    assert trim(pipeline) > begin


@pytest.mark.usefixtures("often")
def test_a_consumer_holds_the_log_is_told_of_and_at_last_lost(
    project: Project, db: psycopg.Connection[object], caplog: pytest.LogCaptureFixture
) -> None:
    project = configure(project.root, db, project.sources[0].slot, 'keep = "1s"\nhold_max = "4000B"')
    caplog.set_level(logging.WARNING, "headrace.alert")
    Pipeline(project).run_once()
    with closing(Cursors(project.log_path("shop").with_suffix(".cursors"))) as cursors:
        with log_of(project) as log:
            mark = log.mark(log.group_end(log.end().offset))
            assert mark is not None
            cursors.commit("reports", mark)
        with running(project):
            insert(db, 1001, 1)
            until(lambda: begins(project) >= mark.offset, what="not even what it has read goes")
            assert begins(project) == mark.offset
            for at in range(1002, 1040):
                insert(db, at, 1)
            until(lambda: cursors.all()[0].lost, what="never lost")
            until(lambda: begins(project) > mark.offset)
    words = [record.getMessage() for record in caplog.records]
    assert any(word.startswith("LOST consumer reports of shop") for word in words)


@pytest.mark.usefixtures("often")
def test_a_consumer_that_commits_while_it_is_judged_is_not_lost(
    project: Project,
    db: psycopg.Connection[object],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    judged: list[int] = []
    mark_lost = Cursors.mark_lost

    def late(self: Cursors, name: str, offset: int, reason: str) -> bool:
        with log_of(project) as log:
            mark = log.mark(log.slice_end(offset, log.end().offset, 1, 1))
            assert mark is not None
            self.commit(name, mark)
            judged.append(offset)
            return mark_lost(self, name, offset, reason)

    monkeypatch.setattr(Cursors, "mark_lost", late)
    Pipeline(project).run_once()
    with headrace.open_log(project.root) as log:
        log.read("reports")
        for at in range(1001, 1011):
            insert(db, at, 1)
            Pipeline(project).run_once()
        project = configure(project.root, db, project.sources[0].slot, 'keep = "1s"\nhold_max = "1B"')
        with running(project):
            until(lambda: len(judged) > 5, what="never judged")
        (cursor,) = log.consumers()
        assert not cursor.lost
        assert log.begin.offset <= cursor.offset
    assert not any("LOST" in record.getMessage() for record in caplog.records)


@pytest.mark.usefixtures("often")
def test_a_cursor_from_before_the_log_begins_or_of_another_log_holds_nothing(
    project: Project, db: psycopg.Connection[object]
) -> None:
    with running(project):
        insert_and_trim(project, db, 1001, 10)
        with closing(Cursors(project.log_path("shop").with_suffix(".cursors"))) as cursors:
            with log_of(project) as log:
                cursors.commit("old", Mark(log.id, 1, "00"))
                cursors.commit("foreign", Mark("another", log.end().offset, "00"))
            insert_and_trim(project, db, 1011, 10)


def test_heads_are_anchored_in_a_file_and_by_a_webhook(
    project: Project,
    db: psycopg.Connection[object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    posted: list[dict[str, object]] = []
    refused: list[int] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if len(refused) < 4:
                refused.append(503)
                self.send_error(503)
                return
            posted.append(json.loads(body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    monkeypatch.setenv("HEADRACE_ANCHOR_KEY", KEY)
    monkeypatch.setattr("headrace.pipeline.EVERY", 0.1)
    monkeypatch.setattr("headrace.log.anchoring._FIRST_PAUSE", 0.2)
    caplog.set_level(logging.WARNING, "headrace.alert")
    with HTTPServer(("127.0.0.1", 0), Receiver) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        settings = (
            'keep = "forever"\nanchor_every = "1s"\nanchor_file = "anchors.jsonl"\n'
            f'anchor_url = "http://127.0.0.1:{receiver.server_port}/token"\n'
            'anchor_key = "${env:HEADRACE_ANCHOR_KEY}"'
        )
        project = configure(project.root, db, project.sources[0].slot, settings)
        with running(project):
            until(lambda: len(posted) >= 3, what="no anchors")
        receiver.shutdown()
    text = (project.root / "anchors.jsonl").read_text()
    anchors = read_anchors(text, "anchors.jsonl")
    assert len({made.offset for made in anchors}) == len(anchors), "none is written twice"
    with log_of(project) as log:
        for made in [*anchors, *(Anchor.from_json(json.dumps(raw)) for raw in posted)]:
            assert check_anchor(log, made, KEY)
    words = [record.getMessage() for record in caplog.records if "ANCHOR" in record.getMessage()]
    assert len(words) == 2
    assert words[0].startswith("ANCHOR of shop could not be delivered to anchor_url")
    assert words[1].startswith("RESOLVED ANCHOR of shop")
    assert "token" not in caplog.text
    command = [
        "log",
        "verify",
        "--project",
        str(project.root),
        "--against",
        str(project.root / "anchors.jsonl"),
    ]
    assert main(command) == 0
    assert "noted; " in capsys.readouterr().out
    with closing(apsw.Connection(str(project.log_path("shop")), vfs="cksmvfs")) as file:
        file.execute('DELETE FROM entries WHERE "offset" > ?', (anchors[-1].offset - 1,))
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 1
    assert "tail was cut off" in capsys.readouterr().out


def test_a_gap_and_the_new_beginning_after_it_stand_in_the_log(
    project: Project, db: psycopg.Connection[object]
) -> None:
    slot = project.sources[0].slot
    project = configure(project.root, db, slot, 'keep = "forever"')
    Pipeline(project).run_once()
    db.execute("SELECT pg_drop_replication_slot(%s)", [slot])
    for _ in range(2):
        with pytest.raises(SourceGap):
            Pipeline(load_project(project.root)).run_once()
    assert main(["resync", "--project", str(project.root)]) == 0
    Pipeline(load_project(project.root)).run_once()
    with log_of(project) as log:
        entries = log.entries(0, log.end().offset, kinds=("marker",))
        marks = [SourceMark.from_json(item.entry.payload) for item in entries if item.entry.table is None]
        verify_log(log)
    assert [mark.kind for mark in marks] == ["gap", "resync"], "said once, while it lasts"
    assert slot in marks[0].reason
    assert_verified(project)


@pytest.mark.usefixtures("often")
def test_consumers_that_cannot_be_read_hold_the_log_until_they_can_be(
    project: Project, db: psycopg.Connection[object], caplog: pytest.LogCaptureFixture
) -> None:
    settings = 'keep = "1s"\nanchor_every = "1s"\nanchor_file = "anchors.jsonl"'
    project = configure(project.root, db, project.sources[0].slot, settings)
    caplog.set_level(logging.WARNING)
    cursors = project.log_path("shop").with_suffix(".cursors")
    anchors = project.root / "anchors.jsonl"
    with running(project):
        insert_and_trim(project, db, 1001, 5)
    for file in cursors.parent.glob(f"{cursors.name}*"):
        file.unlink()
    cursors.mkdir()  # as little of a database as one that only another user may read
    insert(db, 1501, 5)
    with running(project) as pipeline:
        until(lambda: "shop.upkeep" in pipeline.status()["waiting"], what="not told")
        begin, anchored = begins(project), len(anchors.read_text().splitlines())
        insert(db, 2001, 5)
        until(lambda: len(anchors.read_text().splitlines()) > anchored + 2, what="anchors wait too")
        until(pipeline.lanes[0].idle, what="capture, load or apply wait too")
        assert begins(project) == begin, "deleted what a consumer may need"
        assert pipeline.status()["stopped"] == {}
        until(lambda: "alerted" in pipeline.status()["waiting"]["shop.upkeep"], what="never alarmed")
        cursors.rmdir()
        until(lambda: begins(project) > begin, what="does not go on")
        until(lambda: not pipeline.status()["waiting"], what="still told")
    *words, over = [record.getMessage() for record in caplog.records if "upkeep" in record.getMessage()]
    assert len(words) == 2, "once when it waits, once when that lasts"
    assert over.startswith("RESOLVED shop.upkeep goes on after ")
    for word in words:
        assert f"It is not known who reads the log: {cursors} cannot be opened" in word
        assert "Nothing of the log is deleted meanwhile" in word
