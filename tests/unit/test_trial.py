"""A value that ends the process in which it is judged costs its own record, and nothing else. The expressions
are real: the engine's stack overflows on deep JSON, lists take all memory, a distance takes for ever."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from headrace.change import Column, TableId, TableSchema
from headrace.errors import ModelBroken
from headrace.payload import BEFORE, UNCHANGED
from headrace.transform import evaluate, trial
from headrace.transform.attempts import Attempts
from headrace.transform.model import RowModel, bind
from headrace.transform.sql import read_model

OVERFLOWS = "json_contains(repeat('[', v::INT) || repeat(']', v::INT), '1')"
HUNGRY = "len(range(v::BIGINT))"
ENDLESS = "levenshtein(repeat('a', v::INT), repeat('b', v::INT))"


def model_of(folder: Path, expression: str) -> RowModel:
    path = folder / "m.sql"
    path.write_text(f"SELECT id::BIGINT AS id, {expression} AS x FROM raw.shop.t")
    columns = (Column("id", "bigint"), Column("v", "text"))
    return bind(read_model(path), TableSchema(TableId("public", "t"), columns, ("id",)))


def changes(cells: list[int]) -> pa.Table:
    n = len(cells)
    numbers = pa.array(range(1, n + 1), pa.int64())
    meta = ("_epoch", "_commit", "_ordinal", "_offset", "_committed_at", "_txid")
    return pa.table(
        {
            "id": numbers.cast(pa.string()),
            "v": pa.array(cells, pa.int64()).cast(pa.string()),
            "_op": pa.array(["c"] * n),
            **dict.fromkeys(meta, numbers),
            "_unchanged": pa.nulls(n, UNCHANGED),
            "_before": pa.nulls(n, BEFORE),
        }
    )


def test_what_has_killed_two_processes_is_found_by_the_third_and_quarantined_alone(tmp_path: Path) -> None:
    program = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from dataclasses import replace
import test_trial as t
folder = Path({str(tmp_path)!r})
model = replace(t.model_of(folder, t.OVERFLOWS), attempts=t.Attempts(folder / "a"))
for cells in ([1, 2], [5, 1, 1000000, 3]):
    made = model.prepare(t.changes(cells))
print(json.dumps([made.rows["id"].to_pylist(), made.records.select(["key", "stage", "reason"]).to_pylist()]))
"""
    codes = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        codes.append(done.returncode)
        if done.returncode == 0:
            rows, records = json.loads(done.stdout)
            assert rows == [1, 2, 4]
            assert [tuple(record.values()) for record in records] == [("3", "crash", "crash.signal")]
    assert codes == [-signal.SIGSEGV, -signal.SIGSEGV, 0], done.stderr
    assert not list((tmp_path / "a").glob("*.attempt"))


@pytest.mark.parametrize(
    ("expression", "cell", "reason"),
    [(HUNGRY, 100_000_000, "crash.memory"), (ENDLESS, 1_000_000, "crash.timeout")],
)
def test_memory_and_time_have_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expression: str, cell: int, reason: str
) -> None:
    monkeypatch.setattr(trial, "MEMORY", 256 << 20)
    monkeypatch.setattr(trial, "SECONDS", 2.0)
    model = replace(model_of(tmp_path, expression), suspect=True)
    made = model.prepare(changes([3, cell]))
    assert made.rows["id"].to_pylist() == [1]
    assert made.records.select(["key", "reason"]).to_pylist() == [{"key": "2", "reason": reason}]
    assert made.counts.closes()


def test_an_allocation_that_fails_in_the_pipeline_s_own_process_costs_one_record(tmp_path: Path) -> None:
    program = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_trial as t
from headrace.transform.python.worker import limit_memory
model = t.model_of(Path({str(tmp_path)!r}), t.HUNGRY)
model.prepare(t.changes([1]))
limit_memory(256 << 20)
t.trial.MEMORY = 256 << 20
made = model.prepare(t.changes([3, 100_000_000, 4]))
print(json.dumps([made.rows["id"].to_pylist(), made.records["reason"].to_pylist()]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[1, 3], ["crash.memory"]]


def test_a_row_that_another_process_can_judge_is_not_blamed_for_an_engine_that_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def exhausted(*_: object) -> Iterator[None]:
        raise duckdb.OutOfMemoryException("Out of Memory Error: failed to allocate")
        yield

    monkeypatch.setattr(evaluate, "within", exhausted)
    with pytest.raises(duckdb.OutOfMemoryException):
        model_of(tmp_path, "v::INT").prepare(changes([1, 2]))


def test_a_query_that_needs_no_row_to_end_its_process_is_the_model_s_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trial, "trial", lambda *_: ("crash.signal", "its process was ended by SIGSEGV"))
    with pytest.raises(ModelBroken, match="Model m ends its process without any row"):
        trial.killers("m", "SELECT 1", changes([1, 2]).append_column("_hr_n", pa.array([0, 1])))


def test_only_the_same_changes_of_the_same_version_are_suspect(tmp_path: Path) -> None:
    for _ in range(2):
        dying = Attempts(tmp_path).attempt("m", "v1", changes([1, 2, 3]))
        dying.__enter__()  # and never left
    attempts = Attempts(tmp_path)
    beyond = changes([1, 2, 3, 4]).slice(3)
    for model, version, part, expected in (
        ("m", "v1", changes([1]), True),
        ("m", "v1", beyond, False),
        ("m", "v2", changes([1]), False),
        ("n", "v1", changes([1]), False),
    ):
        with attempts.attempt(model, version, part) as suspect:
            assert suspect is expected
    with Attempts(tmp_path, read_only=True).attempt("m", "v1", changes([1])) as suspect:
        assert suspect
