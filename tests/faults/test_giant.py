"""A transaction of any size passes through memory in pieces, and arrives in one transaction."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from headrace.change import Column, CopyMark, Entry, Offset, Position, TableId, TableSchema
from headrace.config import load_project
from headrace.destinations.duckdb import DuckDBDestination
from headrace.failpoints import VARIABLE
from headrace.lane import Lane
from headrace.log.sqlite import SQLiteLog
from headrace.payload import encode_rows
from headrace.pipeline import open_lanes
from headrace.prepared import Prepared
from headrace.transform.model import RowModel

TABLE, OTHER = TableId("public", "orders"), TableId("public", "other")
SMALL = 7
"""The offset of the last entry before the giant."""

ENTRY_ROWS = 4_000
ROWS = 20_000
PIECE = 1 << 18

RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_giant
test_giant.bring_over(Path(sys.argv[2]), int(sys.argv[3]))
"""


def empty_copy(table: TableId) -> list[Entry]:
    """The copy of a table that had no rows."""
    shape = TableSchema(table, (Column("id", "bigint"), Column("v", "text")), ("id",))
    marks = [CopyMark("begin", shape), CopyMark("chunk"), CopyMark("end", floor=1, ceiling=1)]
    at = Position(0, 1, 0)
    return [Entry("marker", table, at, at, 7, 0, 1, mark.to_json().encode()) for mark in marks]


def rows(table: TableId, first: int, count: int, op: str, commit: int, ordinal: int, pad: int = 0) -> Entry:
    ids = range(first, first + count)
    batch = pa.RecordBatch.from_pydict(
        {
            "_op": pa.array([op] * count),
            "_commit": pa.array([commit] * count, pa.int64()),
            "_ordinal": pa.array(range(ordinal, ordinal + count), pa.int64()),
            "_committed_at": pa.array([7] * count, pa.int64()),
            "_txid": pa.array([9] * count, pa.int64()),
            "_lsn": pa.array([9] * count, pa.int64()),
            "id": pa.array([str(i) for i in ids]),
            "v": pa.array([f"{op}{i:0{pad}}" for i in ids]),
        }
    )
    first_at, last_at = Position(0, commit, ordinal), Position(0, commit, ordinal + count - 1)
    return Entry("rows", table, first_at, last_at, 7, count, 1, encode_rows(batch))


def giant(total: int, pad: int = 0) -> Iterator[Entry]:
    """One source transaction: `total` rows come, a row of another table among them, the first half is
    changed, a tenth goes again."""
    ordinal = 1
    for op, end in (("c", total), ("u", total // 2), ("d", total // 10)):
        for first in range(0, end, ENTRY_ROWS):
            count = min(ENTRY_ROWS, end - first)
            yield rows(TABLE, first, count, op, 20, ordinal, pad)
            ordinal += count
        yield rows(OTHER, ordinal, 1, "c", 20, ordinal, pad)
        ordinal += 1


def make(folder: Path, total: int, pad: int = 0) -> None:
    """A project whose log holds two copies, a small group, a giant one and a small one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "headrace.toml").write_text('[source.shop]\nurl = "postgresql://u@127.0.0.1:1/d"\n')
    path = load_project(folder).state / "log" / "shop.db"
    path.parent.mkdir(parents=True)
    log = SQLiteLog(path)
    log.append([*empty_copy(TABLE), *empty_copy(OTHER)])
    assert log.append([rows(TABLE, 0, 5, "c", 10, 1)]).offset == SMALL
    log.append(giant(total, pad))
    log.append([rows(TABLE, total, 3, "c", 30, 1)])
    log.close()


def lane_of(folder: Path, piece_bytes: int) -> Lane:
    (lane,) = open_lanes(load_project(folder))
    lane.staging.piece_bytes = piece_bytes
    return lane


def bring_over(folder: Path, piece_bytes: int) -> None:
    lane = lane_of(folder, piece_bytes)
    while lane.load():
        pass
    while lane.apply():
        pass
    lane.close()


def outcome(folder: Path) -> list[list[tuple[object, ...]]]:
    with duckdb.connect(str(load_project(folder).destination.path), read_only=True) as db:
        return [
            db.execute(query).fetchall()
            for query in (
                "SELECT count(*), min(id), max(id), sum(hash(id, v)), count(DISTINCT id) FROM shop.orders",
                "SELECT count(*), sum(hash(id, v)) FROM shop.other",
                "SELECT model, sum(read), sum(read - applied - superseded - filtered - quarantined) "
                "FROM headrace.ledger GROUP BY 1 ORDER BY 1",
                'SELECT model, state, "offset" FROM headrace.models ORDER BY 1',
                'SELECT "offset" FROM headrace.progress',
            )
        ]


def applied(folder: Path) -> Offset:
    progress = DuckDBDestination(load_project(folder).destination.path).progress("shop")
    return progress.offset if progress else 0


def child(folder: Path, piece_bytes: int, failpoints: str = "") -> int:
    command = [sys.executable, "-c", RUN, str(Path(__file__).parent), str(folder), str(piece_bytes)]
    environment = {**os.environ, VARIABLE: failpoints}
    return subprocess.run(command, env=environment, timeout=120, check=False).returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[object, ...]]]:
    """What comes of the giant when it is one piece."""
    folder = tmp_path_factory.mktemp("whole")
    make(folder, ROWS)
    bring_over(folder, 1 << 30)
    return outcome(folder)


def test_the_pieces_of_a_transaction_amount_to_the_whole(
    tmp_path: Path, whole: list[list[tuple[object, ...]]]
) -> None:
    make(tmp_path, ROWS)
    bring_over(tmp_path, PIECE)
    assert outcome(tmp_path) == whole
    (count, *_), orders = whole[0][0], whole[2][0]
    assert (count, orders) == (18_003, ("shop.orders", 20_000 + 10_000 + 2_000 + 8, 0))


def test_a_giant_becomes_visible_at_once_and_is_never_read_whole(tmp_path: Path) -> None:
    make(tmp_path, ROWS)
    lane = lane_of(tmp_path, PIECE)
    while lane.load():
        assert lane.staging.through() in {0, SMALL, lane.log.end().offset - 1, lane.log.end().offset}
        while lane.apply():
            pass
        assert applied(tmp_path) == lane.staging.through()
    sizes = [changes.nbytes for changes in lane.staging.pieces(TABLE, SMALL, lane.staging.through())]
    assert len(sizes) >= 4
    assert max(sizes) <= 2 * PIECE
    lane.close()


@pytest.mark.parametrize(
    "failpoint",
    [
        "staging.data_synced=kill@4",
        "staging.committed=kill@5",
        "staging.commit_synced=kill@6",
        "destination.apply.part=kill@5",
    ],
)
def test_killed_in_the_middle_of_a_giant_it_goes_on(
    tmp_path: Path, whole: list[list[tuple[object, ...]]], failpoint: str
) -> None:
    make(tmp_path, ROWS)
    assert child(tmp_path, PIECE, failpoint) == -signal.SIGKILL
    assert applied(tmp_path) <= SMALL, "nothing of a part of a transaction is to be seen"
    bring_over(tmp_path, PIECE)
    assert outcome(tmp_path) == whole


def test_a_model_that_breaks_in_the_middle_leaves_nothing_and_the_others_go_on(
    tmp_path: Path, whole: list[list[tuple[object, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, ROWS)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "fragile.sql").write_text("SELECT id::BIGINT AS id, v FROM raw.shop.orders\n")
    (tmp_path / "models" / "sound.sql").write_text("SELECT id::BIGINT AS id, v FROM raw.shop.orders\n")
    lane = lane_of(tmp_path, PIECE)
    prepared = 0
    prepare = RowModel.prepare

    def fragile(model: RowModel, changes: pa.Table) -> Prepared:
        nonlocal prepared
        if model.name == "fragile" and changes.num_rows > ENTRY_ROWS // 2:
            prepared += 1
            if prepared == 4:
                raise ValueError("no more")
        return prepare(model, changes)

    monkeypatch.setattr(RowModel, "prepare", fragile)
    while lane.load():
        pass
    while lane.apply():
        pass
    lane.close()
    assert list(lane.suspended()) == ["fragile"]
    with duckdb.connect(str(load_project(tmp_path).destination.path), read_only=True) as db:
        assert db.execute("SELECT count(*) FROM sound").fetchall() == [(18_003,)]
        for trace in ("count(*) FROM fragile", "sum(read) FROM headrace.ledger WHERE model = 'fragile'"):
            ((found,),) = db.execute(f"SELECT {trace}").fetchall()
            assert found in {0, 5}, "what was there before the giant"


PEAK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_giant
from headrace.memory import economise
from headrace.staging.delta import PIECE_BYTES
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
economise()
test_giant.bring_over(Path(sys.argv[2]), PIECE_BYTES)
test_giant.lane_of(Path(sys.argv[2]), PIECE_BYTES)
begin = status("VmRSS")
test_giant.bring_over(Path(sys.argv[3]), PIECE_BYTES)
print((status("VmHWM") - begin) // 1024)
"""


def test_the_peak_of_memory_does_not_follow_the_transaction(tmp_path: Path) -> None:
    """96,000 changes of 2.5 kB in one transaction, 260 MB decoded and more than that again in the engine."""
    make(tmp_path / "small", 1_000)
    make(tmp_path / "large", 60_000, pad=2_500)
    command = [sys.executable, "-c", PEAK, str(Path(__file__).parent)]
    done = subprocess.run(
        [*command, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 250, f"{done.stdout} MB"
    assert outcome(tmp_path / "large")[0][0][0] == 54_003
