"""Maintenance of the raw tables: fewer files and commits, the same rows, whatever dies and whoever reads."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from hypothesis import given, settings
from hypothesis import strategies as st

from entries import rows, schema, shape
from headrace.change import Entry, LoggedEntry, TableId
from headrace.failpoints import VARIABLE
from headrace.staging import maintenance, table
from headrace.staging.checkpoints import newest_checkpoint
from headrace.staging.delta import DeltaStaging
from headrace.staging.maintenance import FAN, HEAD_FILES, Maintenance, movable, next_run
from headrace.staging.table import DataFile, RawTable

T = TableId("public", "t")
NARROW, WIDE = shape(T, "id", "v"), shape(T, "id", "v", "w", version=2)
LOG = "f" * 32
END = 1 << 40


def entry(offset: int) -> Entry:
    """Offset 1 is the table's shape, 30 a wider one; the others change one to three rows."""
    if offset in (1, 30):
        return schema(offset, NARROW if offset == 1 else WIDE)
    of = NARROW if offset < 30 else WIDE
    cells = [(f"{offset}.{i}", f"v{offset}", "w")[: len(of.columns)] for i in range(offset % 3 + 1)]
    return rows(of, [("c", offset, i + 1, cell) for i, cell in enumerate(cells)])


def load(staging: DeltaStaging, begin: int, end: int) -> None:
    """Load offsets one by one, each as a group of its own."""
    for offset in range(begin, end + 1):
        staging.write([LoggedEntry(offset, entry(offset), 7, True, "")])


def opened(folder: Path, *, read_only: bool = False) -> DeltaStaging:
    return DeltaStaging(folder, "shop", LOG, read_only=read_only)


def expected(begin: int, end: int) -> list[tuple[int, str]]:
    return [(o, f"{o}.{i}") for o in range(begin, end + 1) if o not in (1, 30) for i in range(o % 3 + 1)]


def content(found: pa.Table) -> list[tuple[int, str]]:
    return list(zip(found["_offset"].to_pylist(), found["id"].to_pylist(), strict=True))


def maintain(staging: DeltaStaging, grace: float = 0.0) -> Maintenance:
    """Maintain until nothing is due, as if everything had used all there is."""
    staging.forget(END)
    made = Maintenance(staging, threading.Event(), share=1.0, grace=grace)
    while made.step():
        pass
    return made


def raw(staging: DeltaStaging) -> RawTable:
    return staging.tables()[T]


# -- what is merged --------------------------------------------------------------------------------------


def sized(counts: Sequence[int], width: int = 100, first: int = 1) -> list[DataFile]:
    return [DataFile("", i, i, count, 5000 + count * width, 0) for i, count in enumerate(counts, first)]


def merged(files: list[DataFile], run: Sequence[DataFile]) -> list[DataFile]:
    at = files.index(run[0])
    assert files[at : at + len(run)] == list(run), "neighbours, in order"
    total = sum(file.rows for file in run)
    size = sum(file.bytes for file in run) - 5000 * (len(run) - 1)
    return [*files[:at], DataFile("", run[0].first, run[-1].last, total, size, 0), *files[at + len(run) :]]


@settings(max_examples=20)
@given(
    bursts=st.lists(st.tuples(st.integers(1, 60), st.sampled_from([1, 1, 3, 900, 60_000])), max_size=8),
    width=st.sampled_from([10, 100, 20_000]),
)
def test_any_history_of_loads_ends_in_few_files_that_were_rarely_rewritten(
    bursts: list[tuple[int, int]], width: int
) -> None:
    files: list[DataFile] = []
    loaded = written = 0
    for count, size in bursts:
        for _ in range(count):
            files = [*files, *sized([size], width, files[-1].last + 1 if files else 1)]
            loaded += size
            while run := next_run(files):
                assert len(run) > 1
                written += sum(file.rows for file in run)
                files = merged(files, run)
    large = [file for file in files if file.bytes >= maintenance.TARGET_BYTES // 2]
    assert all(file.bytes <= maintenance.TARGET_BYTES for file in files if file.rows > 60_000)
    assert len(files) <= (FAN - 1) * 7 * (len(large) + 1)
    assert written <= 6 * loaded
    assert sum(file.rows for file in files) == loaded


def test_a_day_of_one_row_a_second_is_at_most_200_files() -> None:
    files: list[DataFile] = []
    most = 0
    for second in range(86_400):
        files += sized([1], first=second)
        if len(files) % FAN == 0:
            while run := next_run(files):
                files = merged(files, run)
        most = max(most, len(files))
    assert most <= 200


def test_files_that_a_model_has_yet_to_use_wait_but_only_so_many() -> None:
    files = sized([1] * 100)
    assert movable(files, 100) == 100
    assert movable(files, 70) == 70
    assert movable(files, 0) == 100 - HEAD_FILES


def test_a_large_file_is_not_written_again_for_a_few_rows() -> None:
    assert next_run(sized([60_000, *[1] * (FAN - 1)])) == ()
    assert len(next_run(sized([60_000, *[1] * FAN]))) == FAN


# -- the same rows ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compacted(tmp_path_factory: pytest.TempPathFactory) -> DeltaStaging:
    """A table of 100 loads whose files hold several row groups, with a column that came on the way."""
    folder = tmp_path_factory.mktemp("compacted")
    staging = opened(folder)
    load(staging, 1, 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maintenance, "_GROUP_ROWS", 9)
        maintain(staging).compact(T)
    return opened(folder)


def test_a_compacted_table_holds_the_same_rows_in_one_file(compacted: DeltaStaging) -> None:
    (file,) = raw(compacted).files
    assert content(compacted.read(T, 0, END)) == expected(1, 100)
    assert (file.first, file.last, raw(compacted).version) == (2, 100, 100)
    assert compacted.read(T, 28, 31)["w"].to_pylist() == [None] * 3 + ["w", "w"]
    assert list(raw(compacted).path.glob("*.parquet")) == [raw(compacted).path / file.name]


@given(cut=st.tuples(st.integers(0, 105), st.integers(0, 105)))
def test_any_range_of_a_compacted_table_reads_the_same(compacted: DeltaStaging, cut: tuple[int, int]) -> None:
    after, through = cut
    wanted = [row for row in expected(1, 100) if after < row[0] <= through]
    assert content(compacted.read(T, after, through)) == wanted
    assert compacted.count(T, after, through) == len(wanted)
    assert [row for piece in compacted.pieces(T, after, through) for row in content(piece)] == wanted
    back: list[tuple[int, str]] = []
    while through > 0:
        part, through = compacted.read_back(T, through, ["_offset", "id"], 12)
        back = content(part) + back
    assert back == [row for row in expected(1, 100) if row[0] <= cut[1]]


def test_a_slice_decodes_only_the_row_groups_that_it_needs(
    compacted: DeltaStaging, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, i: int, **options: object) -> pa.Table:
        read.append(i)
        return real(self, i, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    groups = pq.ParquetFile(raw(compacted).path / raw(compacted).files[0].name).num_row_groups
    assert groups > 20
    compacted.read(T, 49, 51)
    assert 1 <= len(read) <= 2
    read.clear()
    compacted.read_back(T, 100, ["id"], 1)
    assert read == [groups - 1]


def test_a_compacted_table_is_plain_delta(compacted: DeltaStaging) -> None:
    delta = DeltaTable(raw(compacted).path)
    wanted = sorted(name for _, name in expected(1, 100))
    assert sorted(pa.table(delta.to_pyarrow_table())["id"].to_pylist()) == wanted
    with duckdb.connect() as db:
        found = db.execute("SELECT id FROM read_parquet(?) ORDER BY 1", [delta.file_uris()]).fetchall()
        dataset = delta.to_pyarrow_dataset()
        newest = db.execute("SELECT max(_offset), count(w) FROM dataset").fetchall()
    assert [name for (name,) in found] == wanted
    assert newest == [(100, len(expected(31, 100)))]
    del dataset


def test_loads_go_on_after_a_merge(tmp_path: Path) -> None:
    staging = opened(tmp_path)
    for begin in range(1, 60, 20):
        load(staging, begin, begin + 19)
        maintain(staging)
    assert content(staging.read(T, 0, END)) == expected(1, 60)
    again = opened(tmp_path)
    load(again, 55, 65)  # what is staged already changes nothing
    assert content(again.read(T, 0, END)) == expected(1, 65)


def test_files_commits_and_checkpoints_stay_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "CHECKPOINT_EVERY", 20)
    staging = opened(tmp_path)
    for end in range(16, 193, 16):
        load(staging, end - 15, end)
        maintain(staging)
        assert len(list(raw(staging).path.glob("*.parquet"))) <= 3 * FAN
        assert len(list((raw(staging).path / "_delta_log").iterdir())) <= 2 * 20 + 10
    again = opened(tmp_path)
    assert content(again.read(T, 0, END)) == expected(1, 192)
    assert newest_checkpoint(raw(again).path / "_delta_log") > 150


# -- who reads meanwhile ---------------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [False, True])
def test_a_reader_goes_on_where_files_are_replaced_and_deleted(tmp_path: Path, *, read_only: bool) -> None:
    staging = opened(tmp_path)
    staging.piece_bytes = 1
    load(staging, 1, 100)
    reader = opened(tmp_path, read_only=True) if read_only else staging
    reader.piece_bytes = 1
    staging.forget(END)
    pieces = reader.pieces(T, 0, END)
    found = [*content(next(pieces)), *content(next(pieces))]
    files = list(raw(staging).path.glob("*.parquet"))
    maintain(staging).compact(T)
    assert not any(file.exists() for file in files), "all that the reader has yet to read is gone"
    assert found + [row for piece in pieces for row in content(piece)] == expected(1, 100)
    assert content(reader.read(T, 40, 60)) == expected(41, 60)


def test_a_file_that_is_listed_and_missing_is_an_error(tmp_path: Path) -> None:
    staging = opened(tmp_path)
    load(staging, 1, 4)
    staging.forget(END)
    (raw(staging).path / raw(staging).files[1].name).unlink()
    with pytest.raises(FileNotFoundError, match="missing, and the Delta log names it"):
        staging.read(T, 0, END)


def test_replaced_files_stay_for_the_grace_period_also_over_a_restart(tmp_path: Path) -> None:
    staging = opened(tmp_path)
    load(staging, 1, 40)
    before = set(raw(staging).path.glob("*.parquet"))
    maintain(staging, grace=60)
    assert before <= set(raw(staging).path.glob("*.parquet"))
    again = opened(tmp_path)
    maintain(again, grace=60)
    assert before <= set(raw(again).path.glob("*.parquet"))
    for file in before:
        os.utime(file, (time.time() - 61,) * 2)
    maintain(again, grace=60)
    assert not before & set(raw(again).path.glob("*.parquet")) - {
        raw(again).path / file.name for file in raw(again).files
    }
    assert content(again.read(T, 0, END)) == expected(1, 40)


def test_readers_loads_and_merges_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "CHECKPOINT_EVERY", 10)
    staging = opened(tmp_path)
    load(staging, 1, 5)
    stop, faults, reads = threading.Event(), [], 0
    work = Maintenance(staging, stop, share=1.0, grace=0.0)

    def repeat(step: object) -> None:
        try:
            while not stop.is_set():
                step()  # type: ignore[operator]
        except BaseException as error:
            faults.append(error)
            stop.set()

    def read() -> None:
        nonlocal reads
        end = staging.through()
        staging.forget(end)
        found = [row for piece in staging.pieces(T, 0, end) for row in content(piece)]
        assert found == expected(1, end)
        reads += 1

    threads = [threading.Thread(target=repeat, args=(step,)) for step in (work.step, read, read)]
    for thread in threads:
        thread.start()
    try:
        load(staging, 6, 80)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not faults
    assert reads > 3
    assert len(raw(staging).files) < 60


# -- crashes ---------------------------------------------------------------------------------------------

PLACES = [
    "staging.merge_written",
    "staging.data_synced",
    "staging.committed",
    "staging.merge_synced",
    "staging.checkpoint_written",
    "staging.checkpoint_synced",
    "staging.checkpoint_proven",
    "staging.commit_cleaned",
    "staging.swept",
]

MAINTAINER = """
import sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
import test_maintenance as t
t.maintenance.CHECKPOINT_EVERY = 3
t.maintenance.FAN, t.maintenance._MOST_FILES = 4, 20
t.maintain(t.opened(Path(sys.argv[3])))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loaded")
    load(opened(folder), 1, 60)
    return folder


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_maintenance_killed_anywhere_leaves_the_same_rows(
    loaded: Path, tmp_path: Path, place: str, at: int
) -> None:
    shutil.copytree(loaded, tmp_path, dirs_exist_ok=True)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", MAINTAINER, str(here), str(here.parent), str(tmp_path)],
        env={**os.environ, VARIABLE: f"{place}=kill@{at}"},
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert content(opened(tmp_path, read_only=True).read(T, 0, END)) == expected(1, 60)
    staging = opened(tmp_path)
    assert (content(staging.read(T, 0, END)), raw(staging).version) == (expected(1, 60), 60)
    load(staging, 61, 65)
    maintain(staging).compact(T)
    assert content(opened(tmp_path).read(T, 0, END)) == expected(1, 65)
    assert len(list(raw(staging).path.glob("*.parquet"))) == len(raw(staging).files) == 1, "nothing is left"


@pytest.mark.parametrize("place", PLACES)
def test_maintenance_that_fails_anywhere_goes_on_in_the_same_process(
    loaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(maintenance, "CHECKPOINT_EVERY", 10)
    shutil.copytree(loaded, tmp_path, dirs_exist_ok=True)
    staging = opened(tmp_path)
    failed = []

    def fail(name: str) -> None:
        if name == place and not failed:
            failed.append(name)
            raise OSError(name)

    for module in (table, sys.modules["headrace.staging.checkpoints"]):
        monkeypatch.setattr(module, "failpoint", fail)
    with pytest.raises(OSError, match=place):
        maintain(staging)
    assert content(staging.read(T, 0, END)) == expected(1, 60)
    load(staging, 61, 65)
    maintain(staging)
    assert content(staging.read(T, 0, END)) == content(opened(tmp_path).read(T, 0, END)) == expected(1, 65)


@pytest.mark.parametrize("how", ["truncated", "zeros", "empty", "absent"])
def test_a_torn_checkpoint_is_dropped_while_all_commits_are_there(tmp_path: Path, how: str) -> None:
    staging = opened(tmp_path)
    load(staging, 1, 40)
    Maintenance(staging, threading.Event(), share=1.0, grace=3600).compact(T)
    log = raw(staging).path / "_delta_log"
    (checkpoint,) = log.glob("*.checkpoint.parquet")
    whole = checkpoint.read_bytes()
    torn = {"truncated": whole[:-30], "zeros": b"\0" * len(whole), "empty": b""}
    checkpoint.write_bytes(torn[how]) if how in torn else checkpoint.unlink()
    again = opened(tmp_path)
    assert content(again.read(T, 0, END)) == expected(1, 40)
    assert newest_checkpoint(log) == -1
    maintain(again)
    DeltaTable(raw(again).path)
    assert content(opened(tmp_path).read(T, 0, END)) == expected(1, 40)


def test_a_checkpoint_without_its_commits_is_kept(tmp_path: Path) -> None:
    staging = opened(tmp_path)
    load(staging, 1, 40)
    maintain(staging).compact(T)
    log = raw(staging).path / "_delta_log"
    version = newest_checkpoint(log)
    assert [path.name for path in log.glob("*.json")] == [f"{version:020d}.json"]
    load(staging, 41, 45)
    again = opened(tmp_path)
    assert newest_checkpoint(log) == version
    assert content(again.read(T, 0, END)) == expected(1, 45)


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A table with two checkpoints in its past, and all that was ever deleted from its log."""
    folder = tmp_path_factory.mktemp("cleaned")
    staging = opened(folder)
    deleted: dict[str, bytes] = {}
    for begin in (1, 13):
        load(staging, begin, begin + 11)
        Maintenance(staging, threading.Event(), share=1.0, grace=3600).compact(T)
        log = raw(staging).path / "_delta_log"
        deleted |= {path.name: path.read_bytes() for path in log.glob("*[0-9].*")}
        maintain(staging).compact(T)
    load(staging, 25, 28)
    left = {path.name for path in log.iterdir()}
    return folder, {name: content for name, content in deleted.items() if name not in left}


@given(data=st.data())
def test_any_deletion_that_a_power_cut_undoes_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, cleaned: tuple[Path, dict[str, bytes]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    shutil.copytree(cleaned[0], folder, dirs_exist_ok=True)
    log = folder / "raw/shop/public/t/_delta_log"
    most = data.draw(st.sampled_from([0, 1, 2, len(cleaned[1])]))
    lost = data.draw(st.sets(st.sampled_from(sorted(cleaned[1])), max_size=most))
    for name in cleaned[1].keys() - lost:
        (log / name).write_bytes(cleaned[1][name])
    staging = opened(folder)
    assert (content(staging.read(T, 0, END)), raw(staging).version) == (expected(1, 28), 28)
    load(staging, 29, 31)
    maintain(staging).compact(T)
    assert content(opened(folder).read(T, 0, END)) == expected(1, 31)
    shutil.rmtree(folder)


def test_a_table_that_an_older_version_made_gets_the_properties_of_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "delta.deletedFileRetentionDuration"
    with monkeypatch.context() as older:
        older.delitem(table._PROPERTIES, name)
        staging = opened(tmp_path)
        load(staging, 1, 20)
    path = raw(staging).path
    assert name not in DeltaTable(path).metadata().configuration
    maintain(staging).compact(T)
    assert DeltaTable(path).metadata().configuration[name] == "interval 1 hours"
    load(staging, 21, 24)
    assert content(opened(tmp_path).read(T, 0, END)) == expected(1, 24)


@pytest.mark.parametrize("how", ["truncated", "empty"])
def test_a_merge_whose_commit_was_torn_is_undone(tmp_path: Path, how: str) -> None:
    staging = opened(tmp_path)
    load(staging, 1, 40)
    files = raw(staging).files
    staging.forget(END)
    Maintenance(staging, threading.Event(), share=1.0).step()
    assert len(raw(staging).files) < len(files)
    commit = max((raw(staging).path / "_delta_log").glob("*.json"))
    commit.write_bytes(commit.read_bytes()[:-20] if how == "truncated" else b"")
    again = opened(tmp_path)
    assert content(again.read(T, 0, END)) == expected(1, 40)
    maintain(again).compact(T)
    assert content(opened(tmp_path).read(T, 0, END)) == expected(1, 40)


def test_nothing_goes_before_what_replaces_it_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = opened(tmp_path)
    load(staging, 1, 40)
    done: list[tuple[str, Path]] = []
    fsync, unlink = os.fsync, Path.unlink

    def synced(descriptor: int) -> None:
        done.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def unlinked(path: Path, missing_ok: bool = False) -> None:
        done.append(("delete", path))
        unlink(path, missing_ok)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "unlink", unlinked)
    maintain(staging).compact(T)
    folder = raw(staging).path
    log = folder / "_delta_log"
    first = min(i for i, (what, path) in enumerate(done) if what == "delete" and path.parent == folder)
    before = [path for what, path in done[:first] if what == "sync" and path.is_relative_to(folder)]
    assert [path.suffix for path in before][:4] == [".parquet", "", ".json", ".json"]
    cleaned = min(i for i, (what, path) in enumerate(done) if what == "delete" and path.parent == log)
    before = [path for what, path in done[:cleaned] if what == "sync" and path.parent in (log, folder)]
    assert [path.name.partition(".")[2] or path.name for path in before][-3:] == [
        "checkpoint.parquet",
        "_last_checkpoint",
        "_delta_log",
    ]


# -- its share -------------------------------------------------------------------------------------------


def test_it_takes_no_more_than_its_share(tmp_path: Path) -> None:
    staging = opened(tmp_path)
    load(staging, 1, 60)
    staging.forget(END)
    work = Maintenance(staging, threading.Event(), share=0.2)
    begin, cpu = time.monotonic(), time.process_time()
    work.step()
    assert time.process_time() - cpu <= 0.3 * (time.monotonic() - begin)


def test_a_share_of_nothing_does_nothing_and_a_stop_ends_a_merge(tmp_path: Path) -> None:
    staging = opened(tmp_path)
    load(staging, 1, 60)
    staging.forget(END)
    files = list(raw(staging).files)
    assert not Maintenance(staging, threading.Event(), share=0).step()
    stop = threading.Event()
    stop.set()
    Maintenance(staging, stop, share=0.0001).step()
    assert list(raw(staging).files)[-10:] == files[-10:]
    assert content(opened(tmp_path).read(T, 0, END)) == expected(1, 60)
