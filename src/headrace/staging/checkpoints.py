"""Checkpoints of a Delta log, so that a table opens without replaying every commit, and the log's clean-up.

delta-rs does not fsync what it writes, and a torn checkpoint destroys the table. So:

1. the checkpoint is written, beside all commits behind it;
2. it is fsynced with `_last_checkpoint` and the folder;
3. it is read back, and must say what the table is;
4. only then do the commits and the checkpoint before it go, once they are older than the grace period.

Hence a checkpoint is proven exactly if something behind it is missing. One with everything behind it may
be torn: at the start it is dropped, and the table is what the commits say.
"""

from __future__ import annotations

import time
from collections.abc import Set
from pathlib import Path

import pyarrow.parquet as pq
from deltalake import DeltaTable

from headrace.errors import HeadraceError
from headrace.failpoints import failpoint
from headrace.staging.folders import commit_name, fsync

_HINT = "_last_checkpoint"
_MOST_AT_ONCE = 5_000  # files that one clean-up deletes


def newest_checkpoint(log: Path) -> int:
    """Return the version of the newest checkpoint in a folder `_delta_log`, -1 if there is none."""
    return max(_checkpoints(log), default=-1)


def drop_unproven(log: Path) -> None:
    """Drop the checkpoints that a power cut may have torn: those with all commits behind them."""
    found = sorted(_checkpoints(log))
    commits = _commits(log)
    while found and commits.issuperset(range(found[-2] + 1 if found[1:] else 0, found[-1] + 1)):
        (log / _HINT).unlink(missing_ok=True)
        _path(log, found.pop()).unlink()
    if not found:
        (log / _HINT).unlink(missing_ok=True)


def write_checkpoint(delta: DeltaTable) -> int:
    """Write a checkpoint of a table at the version of `delta`, not synced; return that version."""
    version = delta.version()
    delta.create_checkpoint()
    failpoint("staging.checkpoint_written")
    return version


def prove_checkpoint(log: Path, version: int, files: Set[str], log_id: str, through: int) -> None:
    """Make a checkpoint durable and read it back: it must list `files` and that `through` is staged.

    Raises HeadraceError where it does not, and drops it.
    """
    for path in (_path(log, version), log / _HINT, log):
        fsync(path)
    failpoint("staging.checkpoint_synced")
    rows = pq.read_table(_path(log, version), columns=["add", "txn", "metaData"])
    listed = {add["path"] for add in rows["add"].to_pylist() if add}
    staged = [txn["version"] for txn in rows["txn"].to_pylist() if txn and txn["appId"] == log_id]
    shapes = [shape for shape in rows["metaData"].to_pylist() if shape]
    if listed != files or staged != ([through] if through else []) or len(shapes) != 1:
        (log / _HINT).unlink(missing_ok=True)
        _path(log, version).unlink(missing_ok=True)
        raise HeadraceError(
            f"The checkpoint of {log.parent} at version {version} does not read back as it was written; "
            "it was dropped, and every commit is still there.",
            "Look for faults of the disk.",
        )
    failpoint("staging.checkpoint_proven")


def clean_log(log: Path, version: int, grace: float) -> int:
    """Delete what a proven checkpoint replaces and is older than `grace` seconds; return how many files."""
    before = time.time() - grace
    replaced = [log / commit_name(commit) for commit in sorted(_commits(log)) if commit < version]
    replaced += [_path(log, older) for older in sorted(_checkpoints(log)) if older < version]
    due = [path for path in replaced[:_MOST_AT_ONCE] if path.stat().st_mtime <= before]
    for path in due:
        path.unlink()
        failpoint("staging.commit_cleaned")
    return len(due)


def _path(log: Path, version: int) -> Path:
    return log / f"{version:020d}.checkpoint.parquet"


def _checkpoints(log: Path) -> set[int]:
    return {int(path.name.partition(".")[0]) for path in log.glob("*.checkpoint.parquet")}


def _commits(log: Path) -> set[int]:
    return {int(path.stem) for path in log.glob("*.json") if path.stem.isdigit()}
