"""`headrace log export`, `import` and `backup`: the log as files elsewhere, and back again.

Nothing here asks the source, so that none of the project's secrets is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from headrace.cli.tables import print_table
from headrace.config import state_folder
from headrace.errors import UserError
from headrace.log.sqlite import SQLiteLog
from headrace.reading import only_log

if TYPE_CHECKING:
    from headrace.log.archive import Archived

_FOLDER = Parameter(help="The project's folder.")
_SOURCE = Parameter(help="The source, where the project has several.")


def export(
    output_dir: Path,
    *,
    project: Annotated[Path, _FOLDER] = Path(),
    source: Annotated[str, _SOURCE] = "",
    after: Annotated[int | None, Parameter(help="The offset behind which a new archive begins.")] = None,
) -> None:
    """Write the log to Parquet files, one for each day (UTC), beside a running pipeline or without one.

    Run again it goes on: days that are whole stay as they are, the last one is replaced if there is more.
    Every payload is compared with its hash on the way.

    Parameters
    ----------
    output_dir
        The folder of the files; made if it is not there.
    """
    from headrace.log.archive import export as write

    with closing(SQLiteLog(only_log(project, source), read_only=True)) as log:
        done = write(log, output_dir, after)
    there = f" ({done.found} more there already)" if done.found else ""
    print(f"Exported the log of {log.source} to {output_dir}{there}.")
    _show(done)


def import_(
    *files: Annotated[Path, Parameter(help="Files of an export, or their folder.")],
    into: Annotated[
        Path | None, Parameter(help="The log to make, SOURCE.db; without it, the project's own.")
    ] = None,
    project: Annotated[Path, _FOLDER] = Path(),
    source: Annotated[str, Parameter(help="The source, where the folder has files of several.")] = "",
) -> None:
    """Make a log of exported files: the same offsets, times, hashes and id. It is verified at the end.

    Where anything is missing or not what was exported, it says where, and makes nothing. A log that is there
    already is never touched.
    """
    from headrace.log.archive import restore

    paths = _files(files, source)
    with ExitStack() as held:
        if into is None:
            from headrace.log.archive_file import read_part
            from headrace.state import take_state

            name = read_part(paths[0]).source
            state = state_folder(_root(project))
            held.enter_context(take_state(state))
            into = state / "log" / f"{name}.db"
        done = restore(paths, into)
    print(f"Imported to {into}: every hash holds.")
    _show(done)


def backup(
    dest_dir: Path,
    *,
    project: Annotated[Path, _FOLDER] = Path(),
    source: Annotated[str, _SOURCE] = "",
) -> None:
    """Copy a log, also while it is written to; the copy is verified from end to end.

    Parameters
    ----------
    dest_dir
        An empty folder, or one that is not there yet. To restore, its files go to .headrace/log.
    """
    from headrace.log.backup import backup as copy

    with closing(SQLiteLog(only_log(project, source), read_only=True)) as log:
        done = copy(log, dest_dir)
    print(f"Backed up the log of {log.source} to {dest_dir}: every hash holds.")
    _show(done)


def _root(project: Path) -> Path:
    root = project.expanduser().resolve()
    if not (root / "headrace.toml").exists() and not state_folder(root).exists():
        raise UserError(f"{root} is no project of Headrace.", "Name its folder with --project.")
    return root


def _files(given: Sequence[Path], source: str) -> list[Path]:
    from headrace.log.archive import files_in

    found = [file for path in given for file in (files_in(path, source) if path.is_dir() else [path])]
    if not found:
        where = ", ".join(map(str, given)) or "nothing"
        raise UserError(f"There is no file of an export in {where}.", "Name files of one, or their folder.")
    return found


def _show(done: Archived) -> None:
    columns = ("files", "entries", "rows", "bytes", "head", "hash")
    print_table(
        columns, [(done.files, done.entries, done.rows, done.bytes, done.head.offset, done.head.hash)]
    )
