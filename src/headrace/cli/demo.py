"""`headrace demo`: the whole path on a real Postgres that is busy, with a pipeline that is killed.

In this order:

1. a Postgres in a temporary folder, with a shop's history in it, and a project for it;
2. the pipeline and the workload start, each a process of its own; a reader looks from outside;
3. the pipeline is killed (SIGKILL) twice at random moments and started again at once;
4. the workload ends, the pipeline catches up;
5. the model is mended and the quarantine redriven;
6. everything is compared, by `headrace verify` and by plain SQL on both sides.
"""

from __future__ import annotations

import json as json_text
import random
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

from cyclopts import Parameter

from headrace.config import MODELS_FOLDER, Project, load_project
from headrace.errors import HeadraceError, UserError
from headrace.testing import demo_check
from headrace.testing.demo_stage import (
    AROUND_A_KILL,
    NO_ANSWER,
    POLL,
    Child,
    Watcher,
    first_row,
    headrace_command,
    last_words,
    percentile,
    run_command,
    stopped_by_signals,
    typed_name,
)
from headrace.testing.postgres import PostgresServer, binaries

if TYPE_CHECKING:
    import psycopg
    from rich.status import Status

SECONDS = range(5, 3_601)
"""How long the workload may run."""

TRANSACTIONS_PER_SECOND = 200
ORDERS, PRODUCTS, CUSTOMERS = 20_000, 800, 2_000
KILLS = ((0.15, 0.4), (0.5, 0.75))
"""Between which shares of the time each kill falls."""

_TOLD_EVERY = 5.0
_START_LIMIT = 60.0
_CATCH_UP_LIMIT = 120.0
_DRAIN_LIMIT = 60.0
_INTERRUPTED = 130


def demo(
    *,
    seconds: Annotated[int, Parameter(help="How long the workload runs.")] = 30,
    json: Annotated[
        bool, Parameter(help="Print one JSON object to stdout; the rest goes to stderr.", negative="")
    ] = False,
    keep: Annotated[
        Path | None, Parameter(help="Keep everything in this new folder, the database too.")
    ] = None,
) -> int:
    """See it at work: a shop's database, kills, bad values, and proof that nothing is lost.

    Needs nothing but `pip install "headrace[demo]"`; ends by itself and leaves no process behind. Exit
    code 0 only if nothing is lost, nothing doubled, and every row and cell agrees.
    """
    if seconds not in SECONDS:
        raise UserError(f"--seconds must be {SECONDS[0]} to {SECONDS[-1]}.")
    binaries(18)
    show = _Show(json=json)
    root = _folder(keep)
    try:
        with stopped_by_signals():
            report = _play(root, seconds, show, keep=keep is not None)
    except KeyboardInterrupt:
        if keep is None:
            shutil.rmtree(root, ignore_errors=True)
        what = f"removed {root}" if keep is None else f"left what there was in {root}"
        show.step(f"Interrupted: stopped every process and {what}.")
        return _INTERRUPTED
    except HeadraceError:
        show.step(f"The demo failed; the pipeline's own words are in {root / 'pipeline.log'}.")
        raise
    _print_end(report, root, show, keep=keep is not None)
    if json:
        print(json_text.dumps(report.figures()), flush=True)
    return 0 if report.good else 1


@dataclass(slots=True)
class _Report:
    """What came of it; times in seconds."""

    counts: dict[str, int] = field(default_factory=dict)
    redriven: int = 0
    results: list[demo_check.Result] = field(default_factory=list)
    bank: tuple[str, str, str] = ("", "", "")
    verify_agrees: bool = False
    resumed: list[float] = field(default_factory=list)
    freshness: list[float] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return sum(len(result.lost) for result in self.results)

    @property
    def duplicated(self) -> int:
        return sum(len(result.duplicated) for result in self.results)

    @property
    def verified(self) -> bool:
        """Whether `headrace verify`, our own SQL, the bank and the ledger all agree."""
        equal = bool(self.results) and all(result.equal for result in self.results)
        return self.verify_agrees and equal and len(set(self.bank)) == 1 and self.ledger_closes

    @property
    def ledger_closes(self) -> bool:
        """Whether every row of the log was staged and is accounted for."""
        ends = sum(self.counts[name] for name in ("applied", "superseded", "filtered", "quarantined"))
        return self.counts["captured"] == self.counts["staged"] == ends

    @property
    def good(self) -> bool:
        return self.verified and self.lost == self.duplicated == 0

    def figures(self) -> dict[str, Any]:
        return {
            **self.counts,
            "redriven": self.redriven,
            "lost": self.lost,
            "duplicated": self.duplicated,
            "verified": self.verified,
            "resumed_after_kill_s": round(max(self.resumed), 3) if self.resumed else None,
            "freshness_p50_s": percentile(self.freshness, 0.50),
            "freshness_p99_s": percentile(self.freshness, 0.99),
        }


# -------------------------------------------------------------------------------------- the play


@dataclass(slots=True)
class _Stage:
    """What the acts of the play have in common."""

    root: Path
    db: psycopg.Connection[Any]
    project: Project
    pipeline: Child
    watcher: Watcher
    show: _Show
    report: _Report


def _play(root: Path, seconds: int, show: _Show, *, keep: bool) -> _Report:
    import psycopg

    with ExitStack() as stack:
        stack.enter_context(show)
        server = stack.enter_context(PostgresServer(root / "postgres", 18))
        db = stack.enter_context(psycopg.connect(server.url, autocommit=True))
        _furnish(db, show)
        project = _write_project(root / "project", server.url)
        show.step(f"Project written to {project.root}: four mirrors, and a model that junk discounts fail.")
        command = headrace_command("run", "--project", str(project.root))
        pipeline = stack.enter_context(Child(command, root / "pipeline.log"))
        pipeline.start()
        watcher = stack.enter_context(Watcher(project))
        stage = _Stage(root, db, project, pipeline, watcher, show, _Report())
        _under_fire(stage, server.url, seconds)
        _catch_up(stage)
        _redrive(stage)
        _verify(stage)
        watcher.close()
        pipeline.stop(_DRAIN_LIMIT)
        stage.report.counts = _counts(project)
    if not keep:
        shutil.rmtree(root / "postgres", ignore_errors=True)
    return stage.report


def _furnish(db: psycopg.Connection[Any], show: _Show) -> None:
    from headrace.testing import shop

    shop.create_schema(db)
    shop.fill(db, customers=CUSTOMERS, products=PRODUCTS, orders=ORDERS)
    version = str(db.info.server_version // 10_000)
    show.step(
        f"Postgres {version} is up, with a shop of {ORDERS:,} orders: text, numeric, jsonb, enum, arrays."
    )


def _write_project(folder: Path, url: str) -> Project:
    (folder / MODELS_FOLDER).mkdir(parents=True)
    (folder / "headrace.toml").write_text(demo_check.SETTINGS.format(url=url), encoding="utf-8")
    (folder / MODELS_FOLDER / demo_check.MODEL_FILE).write_text(demo_check.MODEL, encoding="utf-8")
    return load_project(folder)


def _under_fire(stage: _Stage, url: str, seconds: int) -> None:
    """Let the workload run, kill the pipeline twice, and measure from outside."""
    seed = secrets.randbelow(1_000_000)
    rng = random.Random(seed)
    moments = [seconds * rng.uniform(*share) for share in KILLS]
    command = [sys.executable, "-m", "headrace.testing.shop", url]
    command += ["--seconds", str(seconds), "--tps", str(TRANSACTIONS_PER_SECOND), "--seed", str(seed)]
    stage.show.step(
        f"The pipeline and a workload of {TRANSACTIONS_PER_SECOND} transactions/s run for {seconds} s; "
        f"kills at {' and '.join(f'{moment:.1f} s' for moment in moments)} (seed {seed})."
    )
    output = stage.root / "workload.json"
    with Child(command, output) as workload:
        workload.start()
        kills = _watch(stage, workload, moments, seconds)
    summary = _summary(output)
    report = stage.report
    report.resumed = [_resumed(stage, restarted) for restarted in kills]
    report.freshness = stage.watcher.freshness(summary["commits"], kills)
    stage.show.step(
        f"The workload is over: {summary['committed']:,} transactions, {summary['rows']:,} rows changed. "
        f"After its kills the pipeline showed new rows within {_seconds(report.resumed)}."
    )


def _watch(stage: _Stage, workload: Child, moments: list[float], seconds: int) -> list[float]:
    """Kill the pipeline at each of `moments` until the workload ends; return when it was restarted."""
    kills: list[float] = []
    began = told = time.monotonic()
    while workload.running:
        now = time.monotonic()
        if moments and now - began >= moments[0]:
            moments.pop(0)
            kills.append(_kill(stage))
        _goes_on(stage)
        state = f"highest order visible: {stage.watcher.highest or 'none yet'}"
        stage.show.passing(state)
        if now - told >= _TOLD_EVERY:
            told = now
            stage.show.line(f"          {now - began:3.0f} s of {seconds}, {state}")
        if now - began > seconds + _START_LIMIT:
            raise HeadraceError("The workload does not end.")
        time.sleep(POLL)
    return kills


def _kill(stage: _Stage) -> float:
    highest = stage.watcher.highest or "none yet"
    pid = stage.pipeline.kill()
    restarted = time.time()
    stage.pipeline.start()
    stage.show.step(f"SIGKILL to the pipeline (pid {pid}), highest order visible: {highest}; started again.")
    return restarted


def _resumed(stage: _Stage, restarted: float) -> float:
    """Return how long after a restart a reader saw something new, waiting for it if need be."""
    deadline = time.monotonic() + _CATCH_UP_LIMIT
    while (at := stage.watcher.first_rise(restarted)) is None:
        _goes_on(stage)
        if time.monotonic() > deadline:
            raise HeadraceError(f"Nothing new was visible {_CATCH_UP_LIMIT:.0f} s after a restart.")
        time.sleep(POLL)
    return at - restarted


def _seconds(times: Sequence[float]) -> str:
    return " and ".join(f"{seconds:.1f} s" for seconds in times) or "no kill"


def _summary(path: Path) -> dict[str, Any]:
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        summary: dict[str, Any] = json_text.loads(lines[-1])
    except (IndexError, ValueError):
        words = lines[-1] if lines else "it said nothing"
        raise HeadraceError(f"The workload failed: {words}") from None
    return summary


def _catch_up(stage: _Stage) -> None:
    """Wait until every table shows a commit behind everything that the workload did."""
    row = stage.db.execute("SELECT (pg_logical_emit_message(true, 'demo', 'end') - '0/0')::bigint").fetchone()
    assert row is not None
    query = (
        "SELECT count(*), min(commit), max(reason) FILTER (WHERE state = 'suspended') FROM headrace.models"
    )
    began = time.monotonic()
    while True:
        _goes_on(stage)
        tables, commit, suspended = first_row(stage.project, query) or (0, 0, None)
        if suspended:
            raise HeadraceError(f"A model was suspended: {suspended}")
        if tables == demo_check.MODELS and commit > row[0]:
            break
        if time.monotonic() - began > _CATCH_UP_LIMIT:
            raise HeadraceError(f"The pipeline did not catch up within {_CATCH_UP_LIMIT:.0f} s.")
        time.sleep(POLL)
    lasted = time.monotonic() - began
    stage.show.step(f"Caught up {lasted:.1f} s later: all tables show the source's last commit.")


def _goes_on(stage: _Stage) -> None:
    """Raise HeadraceError if the pipeline ended, or one of its threads stopped for good."""
    from headrace import server

    stage.pipeline.must_run()
    stopped: dict[str, str] = {}
    with suppress(*NO_ANSWER, HeadraceError):
        stopped = server.ask(stage.project, {"op": "status"})["stopped"]
    for name, reason in stopped.items():
        raise HeadraceError(f"{name} has stopped: {reason}")


def _redrive(stage: _Stage) -> None:
    from headrace import server

    causes = (
        "SELECT reason, columns, message, count(*) AS records FROM headrace.quarantine "
        "WHERE status = 'quarantined' GROUP BY ALL ORDER BY records DESC LIMIT 5"
    )
    for cause in server.read(stage.project, [causes])[0].to_pylist():
        stage.show.step("In quarantine: {records} times {reason} in {columns}: {message}".format(**cause))
    (stage.project.models / demo_check.MODEL_FILE).write_text(demo_check.MENDED, encoding="utf-8")
    stage.show.step(
        f"Model mended: CAST(discount …) is TRY_CAST(discount …) in {MODELS_FOLDER}/{demo_check.MODEL_FILE}."
    )
    done = run_command(
        headrace_command("quarantine", "redrive", "--all", "--project", str(stage.project.root))
    )
    if done.returncode:
        raise HeadraceError(f"The redrive failed: {last_words(done)}")
    states = "SELECT count(*) FILTER (WHERE status = 'resolved'), count(*) FROM headrace.quarantine"
    resolved, records = first_row(stage.project, states) or (0, 0)
    stage.report.redriven = int(resolved)
    others = "; the others had been superseded by a later, good change of their row" * (resolved < records)
    stage.show.step(f"Redriven: {resolved:,} of {records:,} records resolved{others}.")


# --------------------------------------------------------------------------------------- proof


def _verify(stage: _Stage) -> None:
    from headrace import server

    report = stage.report
    report = stage.report
    done = run_command(headrace_command("verify", "--json", "--project", str(stage.project.root)))
    report.verify_agrees = done.returncode == 0
    verdict = "agrees" if report.verify_agrees else f"does not agree: {last_words(done)}"
    stage.show.step(f"headrace verify, beside the running pipeline: {verdict}.")

    def read(queries: Sequence[str]) -> list[Any]:
        return server.read(stage.project, queries)

    report.results = demo_check.compare(stage.db, read)
    report.bank = demo_check.bank(stage.db, read)
    stage.show.step("Compared by plain SQL, the md5 of every cell of every row on both sides:")
    for result in report.results:
        mark = "equal" if result.equal else f"DIFFERENT: {result.faults() or result.destination_digest}"
        name = result.comparison.table
        stage.show.line(f"  {name:<17} {result.source_rows:>9,} rows  {result.source_digest}  {mark}")
        stage.show.line(f"    Postgres: {demo_check.digest(result.comparison.source)}", dim=True)
        stage.show.line(f"    DuckDB:   {demo_check.digest(result.comparison.destination)}", dim=True)
    there, here, expected = report.bank
    stage.show.line(f"  bank: {there} in Postgres, {here} in DuckDB, {expected} at the beginning")
    for side, query in zip(("Postgres: ", "DuckDB:   "), demo_check.bank_queries(), strict=True):
        stage.show.line(f"    {side}{query}", dim=True)


def _counts(project: Project) -> dict[str, int]:
    """Count the rows of the log and of staging, and sum up the ledger."""
    from headrace.log.sqlite import SQLiteLog
    from headrace.staging.delta import DeltaStaging

    log = SQLiteLog(project.state / "log" / "shop.db", read_only=True)
    end = log.end().offset
    staging = DeltaStaging(project.staging.path, "shop", log.id, read_only=True)
    staged = sum(staging.count(table, 0, end) for table in staging.schemas(end))
    captured, _, _ = log.backlog(0)
    log.close()
    names = ("applied", "superseded", "filtered", "quarantined")
    sums = ", ".join(f"coalesce(sum({name}), 0)::BIGINT" for name in names)
    found = first_row(project, f"SELECT {sums} FROM headrace.ledger WHERE kind <> 'void'") or (0,) * len(
        names
    )
    return {"captured": captured, "staged": staged, **dict(zip(names, map(int, found), strict=True))}


def _folder(keep: Path | None) -> Path:
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="headrace-demo-"))
    root = keep.expanduser().resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
        empty = not any(root.iterdir())
    except OSError as error:
        raise UserError(f"{root} cannot be used: {error.strerror}.", "Name another folder.") from error
    if not empty:
        raise UserError(f"{root} is not empty.", "Name a new folder.")
    return root


# ------------------------------------------------------------------------------------------ words


class _Show:
    """Says how it goes: on a terminal with a living line, elsewhere as plain lines."""

    def __init__(self, *, json: bool) -> None:
        from rich.console import Console

        self._console = Console(stderr=json, highlight=False, markup=False, soft_wrap=True)
        self._began = time.monotonic()
        self._status: Status | None = None

    def step(self, text: str) -> None:
        """Say what happened."""
        self.line(f"{time.monotonic() - self._began:6.1f} s  {text}")

    def line(self, text: str, *, dim: bool = False) -> None:
        """Print a line."""
        self._console.print(text, style="dim" if dim and self._console.is_terminal else None)

    def passing(self, text: str) -> None:
        """Show how things stand, on a terminal, until the next such line."""
        if self._status is not None:
            self._status.update(text)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._status = self._console.status("")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


def _print_end(report: _Report, root: Path, show: _Show, *, keep: bool) -> None:
    figures = report.figures()
    show.line("")
    for name, value in figures.items():
        shown = "-" if value is None else f"{value:,}" if type(value) is int else str(value)
        show.line(f"  {name:<21} {shown:>12}")
    if not report.freshness:
        show.line(
            f"  (freshness is judged outside of ±{AROUND_A_KILL:.0f} s of a kill: run longer to see it)"
        )
    if not report.ledger_closes:
        show.line("  The ledger does not close: captured, staged and the sum of the ends should be equal.")
    project, program = shlex.quote(str(root / "project")), typed_name()
    show.line("")
    show.line(f"Everything stays in {root}, and all processes have ended. What to try next:")
    for command in (
        f'{program} query --project {project} "SELECT status, count(*), sum(amount) FROM sales GROUP BY ALL"',
        f'{program} query --project {project} "FROM headrace.ledger ORDER BY recorded_at DESC LIMIT 5"',
        f"{program} quarantine list --project {project}",
        *(_alive_again(root, f"{program} run --project {project}") if keep else ()),
    ):
        show.line(f"  {command}")
    if not keep:
        show.line("Its Postgres is removed; with --keep DIR that stays too, to go on with.")
    show.line(f"With your own database: {program} init postgresql://user@host/database shop")


def _alive_again(root: Path, run: str) -> tuple[str, str]:
    code = (
        "from headrace.testing.postgres import PostgresServer as P; "
        f"s = P({str(root / 'postgres')!r}); s.start(); input(s.url + ' runs until you press Enter')"
    )
    return (
        f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}",
        f"{run}      # beside it",
    )
