"""`headrace log verify` and `headrace log anchor`: proof that the log is what was written."""

from __future__ import annotations

import json as json_text
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from headrace.errors import HeadraceError, LogError, UserError
from headrace.log.proof import Anchor, append_anchor, check_anchor, read_anchors
from headrace.log.proof import anchor as anchor_of
from headrace.log.proof import verify as verify_log
from headrace.log.sqlite import SQLiteLog
from headrace.reading import find_logs
from headrace.sources.postgres.health import size_text

KEY = "HEADRACE_ANCHOR_KEY"
"""The environment variable of the key that signs anchors."""

_FOLDER = Parameter(help="The project's folder.")
_SOURCE = Parameter(help="Its source; all of them if left out.")


def verify(
    *,
    project: Annotated[Path, _FOLDER] = Path(),
    source: Annotated[str, _SOURCE] = "",
    against: Annotated[
        Path | None, Parameter(help="A file of anchors, - for stdin.", allow_leading_hyphen=True)
    ] = None,
    json: Annotated[bool, Parameter(help="Print one JSON object a log.", negative="")] = False,
) -> None:
    """Walk a log from end to end, also while it is written to: checksums, hashes, dense offsets, ordered
    positions, whole transactions, indexes, segments.

    With --against it must also hold what each anchor has noted, under its hash; those from before its
    beginning are left out and counted, but one at least must be left. Where the environment has
    HEADRACE_ANCHOR_KEY, each must be signed with it. Exit code 0 when all holds, 1 with the first bad
    offset when not.
    """
    logs = find_logs(project, source)
    anchors = [] if against is None else _anchors(against)
    noted_of = {noted.source for noted in anchors}
    if strange := sorted(noted_of - {path.stem for path in find_logs(project)}):
        raise UserError(f"There is no log of {', '.join(strange)}.", "Is it the right project?")
    if anchors and noted_of.isdisjoint(path.stem for path in logs):
        raise UserError(f"There is no anchor of {source} in {against}.", "Name another file of anchors.")
    faults = 0
    for path in logs:
        try:
            with closing(SQLiteLog(path, read_only=True)) as log:
                mine = [noted for noted in anchors if noted.source == path.stem]
                report = _verify(log, mine)
        except HeadraceError as error:
            faults += 1
            report = {"source": path.stem, "verified": False, "error": str(error), "remedy": error.remedy}
        print(json_text.dumps(report) if json else _told(report))
    if faults:
        sys.exit(1)


def _verify(log: SQLiteLog, anchors: Sequence[Anchor]) -> dict[str, object]:
    began = time.monotonic()
    compared = [noted for noted in anchors if check_anchor(log, noted, os.environ.get(KEY, ""))]
    found = verify_log(log)
    if anchors and not compared:
        newest = max(noted.offset for noted in anchors)
        raise LogError(
            f"The chain holds, but it begins behind offset {found.begin.offset}: none of {len(anchors)} "
            f"anchors can be compared any more, the newest is of offset {newest}.",
            "Compare a newer anchor, or an export of that time.",
        )
    return {
        "source": log.source,
        "verified": True,
        "begin": found.begin.offset,
        "end": found.end.offset,
        "hash": found.end.hash,
        "entries": found.entries,
        "rows": found.rows,
        "bytes": found.bytes,
        "anchors": len(compared),
        "skipped": len(anchors) - len(compared),
        "seconds": round(time.monotonic() - began, 3),
    }


def _told(report: dict[str, object]) -> str:
    if not report["verified"]:
        return f"✘ log {report['source']}: {report['error']} {report['remedy']}"
    since = f" behind {report['begin']}" if report["begin"] else ""
    anchors = "an anchor" if report["anchors"] == 1 else f"{report['anchors']} anchors"
    held = f", and what {anchors} noted" if report["anchors"] else ""
    held += f" ({report['skipped']} more are from before its beginning)" if report["skipped"] else ""
    return (
        f"✔ log {report['source']}: the chain holds{since} to offset {report['end']}, hash "
        f"{str(report['hash'])[:12]}…{held}; {report['entries']} entries, {report['rows']} rows, "
        f"{size_text(int(str(report['bytes'])))} in {report['seconds']} s"
    )


def _anchors(path: Path) -> list[Anchor]:
    is_stdin = str(path) == "-"
    name = "stdin" if is_stdin else str(path)
    try:
        text = sys.stdin.read() if is_stdin else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{name} cannot be read: {type(error).__name__}.", "Name a file of anchors."
        ) from error
    return read_anchors(text, name)


def anchor(
    *,
    project: Annotated[Path, _FOLDER] = Path(),
    source: Annotated[str, _SOURCE] = "",
    output: Annotated[Path | None, Parameter(help="Append to this file instead of printing.")] = None,
) -> None:
    """Print the head of a log (offset and hash), to be kept where nobody who can write the log can write.

    A line of JSON for each log; signed with HMAC-SHA256 where the environment has HEADRACE_ANCHOR_KEY. The
    running pipeline does it on a schedule: see anchor_every in [log].
    """
    for path in find_logs(project, source):
        with closing(SQLiteLog(path, read_only=True)) as log:
            made = anchor_of(log, os.environ.get(KEY, ""))
        if output is None:
            print(made.to_json())
            continue
        try:
            append_anchor(output, made)
        except OSError as error:
            raise UserError(f"{output} cannot be written: {error.strerror}.", "Name another file.") from error
        print(f"anchored {made.source} at offset {made.offset} in {output}")
