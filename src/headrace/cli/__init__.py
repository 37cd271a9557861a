"""The command line: which commands there are, and what becomes of an error.

The overview is printed from the table below, without the parser: that alone takes 0.1 s to import,
and every command's own module comes only when it is called.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING

from headrace import __version__
from headrace.errors import HeadraceError, UserError
from headrace.secret import without_passwords

if TYPE_CHECKING:
    from cyclopts import App

TRACEBACK = "HEADRACE_TRACEBACK"
"""The environment variable that lets an unexpected error through with its traceback."""

COMMANDS: Mapping[str, tuple[str, str]] = {
    "init": ("headrace.cli.init:init", "Make a project for a database: headrace init URL [DIR]."),
    "check": ("headrace.cli.check:check", "Look for all that would stop a pipeline, and how to mend it."),
    "run": ("headrace.cli.run:run", "Run the pipeline, until it is stopped or, with --once, has caught up."),
    "status": ("headrace.cli.status:status", "Show how far each hop is, what waits and what is quarantined."),
    "query": ("headrace.cli.query:query", "Ask the destination in SQL, also while the pipeline runs."),
    "models": ("", "List and show models, and where their columns come from."),
    "preview": (
        "headrace.cli.preview:preview",
        "Show what a model would make of the staged data, before it does.",
    ),
    "test": ("headrace.cli.test:run", "Run the tests of models, tests/*.toml, without a database."),
    "ci": ("headrace.cli.ci:ci", "Check and test all models, and that none breaks, without a database."),
    "verify": ("headrace.cli.verify:verify", "Compare source, staging and destination, value by value."),
    "tables": ("", "List the captured tables; add, remove, copy again, pause and resume them."),
    "resync": (
        "headrace.cli.captured:resync_source",
        "Begin anew with a source after a gap, and repair what differs.",
    ),
    "suspend": (
        "headrace.cli.suspension:suspend",
        "Let one model stand still until it is resumed; all else goes on.",
    ),
    "resume": ("headrace.cli.suspension:resume", "Let a suspended model be tried again."),
    "rebuild": (
        "headrace.cli.rebuild:rebuild",
        "Make a model's table once more from staging, beside the live one, and swap.",
    ),
    "rollback": (
        "headrace.cli.rebuild:rollback",
        "Put back an earlier version of a model's file, and rebuild its table.",
    ),
    "log": ("", "Read, search, prove, replay and archive the log of what was captured."),
    "staging": ("", "List the raw tables and what they were; compact them."),
    "ledger": ("", "Check that every change that was read is accounted for."),
    "quarantine": ("", "List, show, redrive, patch and discard what could not be applied."),
    "alerts": ("", "List alerts and their delivery, test the channels, silence."),
    "scale": ("", "Workers: how many and why; simulate them; plan what a load will need."),
    "teardown": ("headrace.cli.teardown:teardown", "Drop what the project made at its sources."),
    "demo": ("headrace.cli.demo:demo", "See it at work: a shop's database, kills, bad values, proof."),
}
"""Each command's function and what it does; one without a function is a group of its own."""

QUARANTINE: Mapping[str, tuple[str, str]] = {
    "list": ("headrace.cli.quarantine:list_records", "List the open records, by cause."),
    "show": (
        "headrace.cli.quarantine:show",
        "Show one record: its values, its reason, its place in the log.",
    ),
    "redrive": ("headrace.cli.quarantine:redrive", "Try records again with the models as they are now."),
    "patch": ("headrace.cli.decide:patch", "Have a model read other cells of a change."),
    "discard": ("headrace.cli.decide:discard", "Leave changes out for good, with a reason."),
    "undo": ("headrace.cli.decide:undo", "Take back what was decided about a change."),
    "issues": ("headrace.cli.issues:issues", "List the causes of records and how they go."),
    "archive": ("headrace.cli.issues:archive", "Put an issue aside until it escalates."),
    "export": ("headrace.cli.export:export", "Write records to a file: Parquet, CSV, JSON."),
}

LEDGER: Mapping[str, tuple[str, str]] = {
    "check": ("headrace.cli.ledger:check", "Hold the ledger against log, staging and quarantine."),
}

ALERTS: Mapping[str, tuple[str, str]] = {
    "list": ("headrace.cli.alerts:list_alerts", "List what fires and what was, and how its delivery stands."),
    "test": ("headrace.cli.alerts:send_test", "Send a test by every channel."),
    "silence": ("headrace.cli.alerts:silence", "Have nobody told of a model or an issue for a while."),
}

TABLES: Mapping[str, tuple[str, str]] = {
    "list": ("headrace.cli.captured:list_tables", "List the captured tables and how far their copies are."),
    "add": ("headrace.cli.captured:add", "Capture more tables, beside those that are."),
    "remove": ("headrace.cli.captured:remove", "Capture tables no longer; what is there stays."),
    "resync": ("headrace.cli.captured:resync", "Copy tables again, and write what differs."),
    "pause": ("headrace.cli.captured:pause", "Let the models of tables stand still; capture goes on."),
    "resume": ("headrace.cli.captured:resume", "Let the models of paused tables go on."),
}

LOG: Mapping[str, tuple[str, str]] = {
    "head": ("headrace.cli.log:head", "Show where the log ends and begins, and what it holds."),
    "tail": ("headrace.cli.log:tail", "List the newest entries, and with --follow those to come."),
    "show": ("headrace.cli.log:show", "Show one entry with its rows."),
    "find": ("headrace.cli.log_find:find", "Find a key's history, a transaction, a position or a time."),
    "replay": (
        "headrace.cli.log_replay:replay",
        "Write changes out: JSON lines, Debezium's JSON, Parquet.",
    ),
    "consumers": ("headrace.cli.log:consumers", "List the named consumers and how far each has read."),
    "verify": ("headrace.cli.log_proof:verify", "Prove that the log holds what was written."),
    "anchor": ("headrace.cli.log_proof:anchor", "Note the log's head, to be kept elsewhere."),
    "export": (
        "headrace.cli.log_archive:export",
        "Write the log to Parquet files, one a day.",
    ),
    "import": ("headrace.cli.log_archive:import_", "Make a log of exported files, and verify it."),
    "backup": ("headrace.cli.log_archive:backup", "Copy a log, also while it is written to."),
}

MODELS: Mapping[str, tuple[str, str]] = {
    "ls": (
        "headrace.cli.models:ls",
        "List the models: what each reads, how it stands, how far behind it is.",
    ),
    "show": (
        "headrace.cli.models:show",
        "Show one: its columns, key and checks, and the versions that made it.",
    ),
    "lineage": ("headrace.cli.models:lineage", "Show what each output column is made of."),
    "export-dbt": ("headrace.cli.models:export", "Print the destination's tables as sources of dbt."),
}

STAGING: Mapping[str, tuple[str, str]] = {
    "ls": ("headrace.cli.staging:ls", "List the raw tables: rows, files, bytes, offsets."),
    "schema": ("headrace.cli.staging:schema", "Show a table's columns with the source's types."),
    "history": ("headrace.cli.staging:history", "Show the shapes that a table had, and its copies."),
    "compact": ("headrace.cli.staging:compact", "Merge small files into large ones now."),
}

SCALE: Mapping[str, tuple[str, str]] = {
    "status": (
        "headrace.cli.scale_live:status",
        "Show how many workers there are and should be, why, and what that is decided by.",
    ),
    "history": ("headrace.cli.scale_live:history", "List the decisions: when, how many, and why."),
    "explain": ("headrace.cli.scale_live:explain", "Say why there were so many workers at a moment."),
    "simulate": (
        "headrace.cli.scale:simulate",
        "Show what policies would have done with arrivals, and what that costs.",
    ),
    "plan": (
        "headrace.cli.scale_plan:plan",
        "Say what a load will need: workers, disk, WAL, time to recover, price.",
    ),
}

_GROUPS = {
    "ledger": LEDGER,
    "alerts": ALERTS,
    "log": LOG,
    "models": MODELS,
    "quarantine": QUARANTINE,
    "scale": SCALE,
    "staging": STAGING,
    "tables": TABLES,
}
_ABOUT = "Every change of an operational database into an analytical store, and none lost."
_HELP = ("--help", "-h", "help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, 1 for a failure, 2 for the user's mistake.

    Every error becomes one paragraph on stderr.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _environment(given):
            code = _dispatch(given)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail("Interrupted. What was durable stays; the same command goes on from there.", 130)
    except HeadraceError as error:
        return _fail(error.paragraph(), error.exit_code)
    except BrokenPipeError as error:
        return 1 if _reader_is_gone() else _unexpected(error)
    except Exception as error:
        return _unexpected(error)


def app() -> App:
    """Return the parser with every command; a command's module is imported when it is called."""
    from cyclopts import App

    make = partial(App, version=__version__, help_format="plaintext", suppress_keyboard_interrupt=False)
    top = make(name="headrace", help=_ABOUT)
    for name, (function, about) in COMMANDS.items():
        if function:
            top.command(function, name=name, help=about)
        else:
            group = make(name=name, help=about)
            for inner, (inner_function, inner_about) in _GROUPS[name].items():
                group.command(inner_function, name=inner, help=inner_about)
            top.command(group)
    return top


@contextmanager
def _environment(given: list[str]) -> Iterator[None]:
    """Take `--env NAME` out of a command line, wherever it stands, and put it in force for the command.

    Every command reads a project, so that the option is theirs all; they read it from HEADRACE_ENV.
    """
    end = given.index("--") if "--" in given else len(given)
    at = next((i for i in range(end) if given[i].partition("=")[0] == "--env"), None)
    if at is None:
        yield
        return
    option, equals, name = given.pop(at).partition("=")
    if not equals:
        name = given.pop(at) if at < min(end - 1, len(given)) else ""
    if not name:
        raise UserError(
            f"{option} needs a name.", "Write --env NAME; its settings are in headrace.NAME.toml."
        )
    from headrace.config import ENVIRONMENT

    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT]
        else:
            os.environ[ENVIRONMENT] = before


def _dispatch(given: list[str]) -> int:
    if not given or given[0] in _HELP:
        print(_overview("headrace", COMMANDS, _ABOUT))
        return 0
    if given[0] in ("--version", "-V"):
        print(__version__)
        return 0
    _refuse_unknown("headrace", given[0], COMMANDS)
    if group := _GROUPS.get(given[0]):
        title = f"headrace {given[0]}"
        if len(given) == 1 or given[1] in _HELP:
            print(_overview(title, group, COMMANDS[given[0]][1]))
            return 0
        _refuse_unknown(title, given[1], group)
    return _call(given)


def _call(given: list[str]) -> int:
    from cyclopts import CycloptsError

    try:
        result = app()(given, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        raise UserError(
            _without(given, " ".join(str(error).split())), f"See: {_usage(given)} --help"
        ) from None
    return result if type(result) is int else 0


def _refuse_unknown(title: str, name: str, known: Mapping[str, object]) -> None:
    if name in known:
        return
    if name.startswith("-"):
        option = name.partition("=")[0]
        raise UserError(
            f"{title} has no option {option}.", f"Options stand after a command. See: {title} --help"
        )
    near = get_close_matches(name.lower(), known, 1)
    # What is no plain word may be a url with its password.
    shown = f'"{name}"' if name.replace("-", "").isalpha() and len(name) <= 20 else "this"
    hint = f'Did you mean "{near[0]}"?' if near else f"There are: {', '.join(known)}."
    raise UserError(f"{title} has no command {shown}.", hint)


def _overview(title: str, commands: Mapping[str, tuple[str, str]], about: str) -> str:
    width = max(map(len, commands))
    lines = [f"Usage: {title} COMMAND [OPTIONS]", "", about, "", "Commands:"]
    lines += [f"  {name:<{width}}  {help_}" for name, (_, help_) in commands.items()]
    lines += ["", "A command works on the project in the current folder; --project DIR names another."]
    lines += ["With --env NAME the settings of headrace.NAME.toml lie over those of headrace.toml."]
    lines += [f"More about one: {title} COMMAND --help", *_top_options(title)]
    return "\n".join(lines)


def _top_options(title: str) -> list[str]:
    return ["Which version this is: headrace --version"] if title == "headrace" else []


def _usage(given: Sequence[str]) -> str:
    depth = 2 if given[0] in _GROUPS else 1
    return " ".join(("headrace", *given[:depth]))


def _without(given: Sequence[str], text: str) -> str:
    for word in given:
        if "://" in word or "=" in word:
            text = text.replace(word, "***")
    return without_passwords(text)


def _unexpected(error: Exception) -> int:
    if os.environ.get(TRACEBACK):
        raise error
    words = without_passwords(" ".join(str(error).split()))
    what = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return _fail(
        f"Headrace met an error that it does not understand: {what.rstrip('.')}. Nothing durable is lost. "
        f"Run again with {TRACEBACK}=1 to see where, and report it.",
        1,
    )


def _fail(paragraph: str, code: int) -> int:
    _silently(sys.stdout.flush)
    print(paragraph, file=sys.stderr)
    return code


def _reader_is_gone() -> bool:
    """Whether stdout leads nowhere, as after `headrace … | head`; then nothing more is written there."""
    out = select.poll()
    out.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in out.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _silently(act: Callable[[], object]) -> None:
    try:
        act()
    except OSError:
        return
