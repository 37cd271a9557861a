"""Python models, with real worker processes: what rows become, who is at fault, and what dies with whom."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from datetime import time as time_of_day
from decimal import Decimal
from pathlib import Path
from textwrap import dedent
from uuid import UUID

import pyarrow as pa
import pytest

from headrace.change import Column, TableId, TableSchema
from headrace.destinations.duckdb import DuckDBDestination
from headrace.errors import ModelBroken, ModelError
from headrace.payload import BEFORE, UNCHANGED
from headrace.prepared import Prepared
from headrace.transform import trial
from headrace.transform.folder import ModelFolder
from headrace.transform.model import RowModel, bind
from headrace.transform.python import evaluate, process, worker
from headrace.transform.python.text import PythonText, read_python

SCHEMA = TableSchema(TableId("public", "t"), (Column("id", "bigint"), Column("v", "text")), ("id",))
HEAD = """
from __future__ import annotations
import ctypes, os, sys, time
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Annotated
import pyarrow as pa
import pyarrow.compute as pc
import headrace
from headrace import Row, contract, model

@dataclass
class Out:
    id: int
    x: str | None
"""
SECRET = "topsecret"
FOLD = DuckDBDestination(Path("warehouse.duckdb")).folded


def read(folder: Path, text: str, head: str = HEAD) -> PythonText:
    path = folder / "m.py"
    path.write_text(head + dedent(text))
    return read_python(path)


def staged(values: Sequence[str | None]) -> pa.Table:
    n = len(values)
    numbers = pa.array(range(1, n + 1), pa.int64())
    return pa.table(
        {
            "id": pa.array([str(i) for i in range(1, n + 1)]),
            "v": pa.array(values, pa.string()),
            "_op": pa.array(["c"] * n),
            "_epoch": pa.array([0] * n, pa.int64()),
            "_commit": numbers,
            "_ordinal": numbers,
            "_offset": numbers,
            "_committed_at": pa.array([86_400_000_000] * n, pa.int64()),
            "_txid": numbers,
            "_unchanged": pa.nulls(n, UNCHANGED),
            "_before": pa.nulls(n, BEFORE),
        }
    )


def good(made: Prepared, column: str = "x") -> dict[str, object]:
    assert made.counts.closes()
    return dict(zip(made.rows["_source_key"].to_pylist(), made.rows[column].to_pylist(), strict=True))


def bad(made: Prepared) -> dict[str, tuple[str, str]]:
    return {r["key"]: (r["reason"], r["columns"]) for r in made.records.to_pylist()}


@pytest.fixture
def bound(tmp_path: Path) -> Iterator[object]:
    """A way to bind a file's text, whose workers are gone after the test."""
    made: list[RowModel] = []

    def make(text: str, schema: TableSchema = SCHEMA) -> RowModel:
        made.append(bind(read(tmp_path, text), schema))
        return made[-1]

    yield make
    for model in made:
        assert model.python is not None
        model.python.close()


# ------------------------------------------------------------------------------------ single rows


ROWS = """
# A library, as far as its file goes.
LIBRARY = "def library(v): raise ValueError('no ' + v + ' here, ' + repr(v) + ' 17')"
exec(compile(LIBRARY, "library.py", "exec"))

@dataclass
class Order:
    id: int
    amount: Annotated[Decimal, contract("DECIMAL(12,2) CHECK (amount >= 0)")]
    x: str | None

@model(reads="raw.shop.t", key=["id"])
def orders(row: Row) -> Order | None:
    v = row["v"]
    if v == "skip":
        return None
    if v == "strange":
        return Order(int(row["id"]), 1.5, v)
    if v == "key":
        return Order(99, Decimal(1), v)
    if v == "other":
        return {"id": 1}
    if v == "huge":
        return Order(2**63, Decimal(1), v)
    if v == "raise":
        raise ValueError(f"no {v} topsecret")
    if v == "null":
        return Order(int(row["id"]), None, v)
    if v == "exit":
        sys.exit(3)
    if v == "topsecret":
        library(v)
    return Order(int(row["id"]), Decimal(v), row["_op"])
"""


def test_a_row_is_typed_filtered_or_put_aside_with_its_reason_and_without_its_values(bound) -> None:
    values = [
        "1.005",
        "skip",
        "strange",
        "key",
        "other",
        "huge",
        "raise",
        "null",
        "exit",
        "-1",
        SECRET,
        "NaN",
        "7",
    ]
    made = bound(ROWS).prepare(staged(values))
    assert good(made, "amount") == {"1": Decimal("1.01"), "13": Decimal("7.00")}
    assert good(made) == {"1": "c", "13": "c"}
    assert made.counts.filtered == 1
    assert bad(made) == {
        "3": ("transform.cast", "amount"),
        "4": ("constraint.check", "id"),
        "5": ("transform.cast", ""),
        "6": ("transform.cast", "id"),
        "7": ("transform.python", ""),
        "8": ("constraint.not_null", "amount"),
        "9": ("transform.python", ""),
        "10": ("constraint.check", "amount"),
        "11": ("transform.python", ""),
        "12": ("transform.cast", "amount"),
    }
    said = {r["key"]: r["message"] for r in made.records.to_pylist()}
    assert said["3"] == "amount: float is no Decimal"
    line = HEAD.count("\n") + 1 + ROWS[: ROWS.index("raise ValueError(f")].count("\n")
    assert said["7"] == f'ValueError (models/m.py:{line}: raise ValueError(f"no {{v}} topsecret"))'
    assert said["11"].startswith("ValueError: no … here, '…' … (models/m.py:")


def test_every_type_arrives_as_it_was(bound) -> None:
    made = bound(
        """
        import enum, uuid
        from datetime import time as clock, timezone
        from typing import Any, Literal

        class State(enum.Enum):
            NEW = "new"

        @dataclass
        class All:
            b: bool
            i: int
            h: Annotated[int, contract("HUGEINT")]
            f: float
            s: str
            y: bytes
            d: date
            at: datetime
            naive: Annotated[datetime, contract("TIMESTAMP")]
            t: clock
            u: uuid.UUID
            j: dict[str, Any]
            l: list[int]
            e: State
            o: Literal["a", "b"]
            n: float | None

        @model(reads="raw.shop.t")
        def all_types(row: Row) -> All:
            at = datetime(2024, 1, 2, 3, 4, 5, 6, tzinfo=timezone.utc)
            return All(True, -1, 2**100, 0.1, "é\\0", b"\\xff", date(1, 1, 1), at, at.replace(tzinfo=None),
                       clock(23, 59), uuid.UUID(int=7), {"k": [1, None]}, [1, 2], State.NEW, row["v"], None)
        """
    ).prepare(staged(["a", "c"]))
    assert made.rows.to_pylist() == [
        {
            "_source_key": "1",
            "b": True,
            "i": -1,
            "h": Decimal(2**100),
            "f": 0.1,
            "s": "é\0",
            "y": b"\xff",
            "d": date(1, 1, 1),
            "at": datetime(2024, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
            "naive": datetime(2024, 1, 2, 3, 4, 5, 6),
            "t": time_of_day(23, 59),
            "u": str(UUID(int=7)),
            "j": '{"k": [1, null]}',
            "l": [1, 2],
            "e": "new",
            "o": "a",
            "n": None,
        }
    ]
    assert bad(made) == {"2": ("transform.cast", "o")}


def test_inputs_may_be_typed_by_a_dataclass(bound) -> None:
    model = bound(
        """
        @dataclass
        class In:
            id: int
            v: date
            _committed_at: datetime

        @model(reads="raw.shop.t")
        def typed(row: In) -> Out | None:
            return Out(row.id, f"{row.v.year} {row._committed_at.isoformat()}")
        """
    )
    made = model.prepare(staged(["2024-02-29", "2023-02-29", None]))
    assert good(made) == {"1": "2024 1970-01-02T00:00:00+00:00"}
    assert bad(made) == {"2": ("transform.cast", "v"), "3": ("transform.cast", "v")}


def test_inputs_and_outputs_may_be_pydantic_models(bound) -> None:
    pytest.importorskip("pydantic")
    model = bound(
        """
        from pydantic import BaseModel, Field, field_validator

        class In(BaseModel):
            id: int
            v: Decimal
            at: datetime
            tags: list[str]
            raw: bytes | None

        class Priced(BaseModel):
            id: int
            x: Decimal = Field(max_digits=5, decimal_places=1, lt=100)

        @model(reads="raw.shop.t", key=["id"])
        def priced(row: In) -> Priced:
            assert (row.at.utcoffset(), row.tags, row.raw) == (row.at - row.at, ["a"], b"\\0\\xff")
            return Priced(id=row.id, x=row.v)
        """,
        TableSchema(
            SCHEMA.table, (*SCHEMA.columns, *(Column(n, "text") for n in ("at", "tags", "raw"))), ("id",)
        ),
    )
    assert model.types() == {"id": "BIGINT", "x": "DECIMAL(5,1)"}
    changes = staged(["1.5", SECRET, "100", None])
    for name, text in (("at", "2024-01-01 12:00:00.5+00"), ("tags", '["a"]'), ("raw", r"\x00ff")):
        changes = changes.append_column(name, pa.array([text] * 4))
    made = model.prepare(changes)
    assert good(made) == {"1": Decimal("1.5")}
    assert bad(made) == {
        "2": ("transform.cast", "v"),
        "3": ("transform.python", "x"),
        "4": ("transform.cast", "v"),
    }
    assert all(SECRET not in message for message in made.records["message"].to_pylist())


# ---------------------------------------------------------------------------------------- batches


BATCH = """
@model(reads="raw.shop.t", key=["id"], contract={"id": "BIGINT", "x": "INTEGER CHECK (x < 1000)"})
def doubled(batch: pa.RecordBatch) -> pa.Table:
    if pc.any(pc.equal(batch["v"], "boom")).as_py():
        raise ValueError("no boom")
    error = pc.if_else(pc.equal(batch["v"], "strange"), "it is strange", pa.scalar(None, pa.string()))
    keep = pc.not_equal(batch["v"], "skip")
    return pa.table({"id": batch["id"], "x": batch["v"], "_keep": keep, "_error": error})
"""


def test_a_batch_function_types_filters_and_refuses_rows_and_is_bisected_where_it_raises(bound) -> None:
    values: list[str | None] = [str(i % 1000) for i in range(1000)]
    for i, value in {
        3: "skip",
        5: "boom",
        6: "boom",
        500: "strange",
        700: "free",
        701: "1000",
        999: "boom",
    }.items():
        values[i] = value
    values[10] = None  # what _keep is not true for is left out
    made = bound(BATCH).prepare(staged(values))
    assert len(good(made)) == 1000 - 8
    assert made.counts.filtered == 2
    assert bad(made) == {
        "6": ("transform.python", ""),
        "7": ("transform.python", ""),
        "501": ("transform.python", ""),
        "701": ("transform.cast", "x"),
        "702": ("constraint.check", "x"),
        "1000": ("transform.python", ""),
    }


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return batch.slice(1)", "returned 1 rows for 2"),
        ('return pa.table({"id": batch["id"]})', "no column x"),
        ("return batch.to_pylist()", "returned list"),
        ('return pa.table({"id": batch["id"], "x": batch["w"]})', "models/m.py:"),
        ('return pa.table({"id": batch["id"], "x": batch["v"], "_keep": batch["v"]})', "_keep as string"),
        ('return pa.table({"id": batch["id"], "x": batch["v"], "_error": batch})', "_error as struct"),
    ],
)
def test_a_batch_function_that_can_serve_no_row_is_broken_and_blames_no_record(
    bound, body: str, why: str
) -> None:
    definition = '@model(reads="raw.shop.t", contract={"id": "BIGINT", "x": "VARCHAR"})'
    model = bound(f"{definition}\ndef f(batch: pa.RecordBatch) -> pa.Table:\n    {body}\n")
    with pytest.raises(ModelBroken, match=why):
        model.prepare(staged(["a", "b"]))


# ---------------------------------------------------------------------------------------- crashes


CRASHES = """
def crash(v):
    if v == "segfault":
        ctypes.string_at(0)
    if v == "exit":
        os._exit(0)
    if v == "loop":
        while True:
            pass
    if v == "memory":
        held = []
        while True:
            held.append(bytearray(1 << 20))
    if v == "kill":
        os.kill(os.getpid(), 9)
    if v == "print":
        print("printed", v)
        os.write(1, b"\\0 raw \\n" * 1000)
"""
DIES = {
    "segfault": ("crash.signal", ""),
    "exit": ("crash.exit", ""),
    "loop": ("crash.timeout", ""),
    "memory": ("crash.memory", ""),
    "kill": ("crash.signal", ""),
}
BY_ROW = (
    CRASHES
    + """
@model(reads="raw.shop.t", key=["id"], memory="100MiB", timeout="500ms")
def f(row: Row) -> Out:
    crash(row["v"])
    return Out(int(row["id"]), row["v"])
"""
)
BY_BATCH = (
    CRASHES
    + """
@model(reads="raw.shop.t", key=["id"], memory="100MiB", timeout="500ms", contract=Out)
def f(batch: pa.RecordBatch) -> pa.RecordBatch:
    for v in batch["v"].to_pylist():
        crash(v)
    return pa.RecordBatch.from_pydict({"id": batch["id"], "x": batch["v"]})
"""
)


@pytest.mark.parametrize(("text", "kinds"), [(BY_ROW, list(DIES)), (BY_BATCH, ["loop", "memory"])])
def test_what_ends_its_worker_is_put_aside_alone_and_all_else_is_applied(
    bound, text: str, kinds: Sequence[str], caplog: pytest.LogCaptureFixture
) -> None:
    values = [f"v{i}" for i in range(16)]
    where = dict(zip((0, 6, 7, 10, 15), kinds, strict=False))
    for i, value in {**where, 12: "print"}.items():
        values[i] = value
    models = logging.getLogger("headrace.models")
    models.addHandler(caplog.handler)
    models.setLevel(logging.INFO)
    try:
        made = bound(text).prepare(staged(values))
    finally:
        models.removeHandler(caplog.handler)
    assert bad(made) == {str(i + 1): DIES[value] for i, value in where.items()}
    assert set(made.records["stage"].to_pylist()) == {"crash"}
    assert good(made) == {str(i + 1): value for i, value in enumerate(values) if i not in where}
    assert "m: printed print" in {record.getMessage() for record in caplog.records}


@pytest.mark.parametrize(("types", "asked"), [(("string", "string"), [9]), (("string", "int32"), [4, 4, 1])])
def test_what_is_made_of_suspect_changes_is_tried_at_once_if_it_is_of_one_kind(
    bound, monkeypatch: pytest.MonkeyPatch, types: tuple[str, str], asked: list[int]
) -> None:
    model = bound(
        f"""
        @model(reads="raw.shop.t", key=["id"], contract=Out)
        def f(batch: pa.RecordBatch) -> pa.RecordBatch:
            type_ = {types!r}["5" in batch["v"].to_pylist()]
            return pa.RecordBatch.from_pydict({{"id": batch["id"], "x": batch["v"].cast(type_)}})
        """
    )
    tried, ends = list[int](), trial.trial
    monkeypatch.setattr(evaluate, "_PART_ROWS", 4)
    noted = lambda query, events: tried.append(len(events)) or ends(query, events)  # noqa: E731
    monkeypatch.setattr(trial, "trial", noted)
    made = replace(model, suspect=True).prepare(staged([str(i) for i in range(9)]))
    assert good(made) == {str(i + 1): str(i) for i in range(9)}
    assert tried == asked


def test_an_innocent_row_is_not_blamed_for_the_memory_that_others_kept(bound) -> None:
    model = bound(
        """
        held = []

        @model(reads="raw.shop.t", memory="40MiB")
        def leaks(row: Row) -> Out:
            held.append(bytearray(1 << 20))
            return Out(int(row["id"]), row["v"])
        """
    )
    made = model.prepare(staged(["a"] * 100))
    assert len(good(made)) == 100


def test_a_model_that_ends_its_worker_over_and_over_is_broken(bound, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_MOST_CRASHES", 2)
    text = '@model(reads="raw.shop.t")\ndef f(row: Row) -> Out:\n    os._exit(5)\n'
    with pytest.raises(ModelBroken, match=r"ended its worker on 3 records of one slice, .*exit code 5"):
        bound(text).prepare(staged(["a"] * 100))


# ---------------------------------------------------------------------------------- broken models


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import nowhere_to_be_found\n", r"models/m.py:17: ModuleNotFoundError: No module named 'nowhere"),
        ("sys.exit(1)\n", r"models/m.py:17: SystemExit"),
        ("os._exit(1)\n", r"importing models/m.py: it ended its worker with exit code 1"),
    ],
)
def test_a_file_that_cannot_be_imported_is_broken_and_its_table_is_known_still(
    tmp_path: Path, text: str, why: str
) -> None:
    made = read(tmp_path, text + '@model(reads="raw.shop.t")\ndef f(row: Row) -> Out: ...\n')
    assert (made.source, made.table) == ("shop", "t")
    with pytest.raises(ModelBroken, match=why):
        bind(made, SCHEMA)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("def f(row: Row) -> Out: ...", "no functions marked with @headrace.model"),
        ("x =", r"models/m.py:17: invalid syntax"),
        ("@model(reads=TABLE)\ndef f(row: Row) -> Out: ...", "models/m.py:17: the model does not say which"),
        ('@model(reads="raw.shop.t", key=["k"])\ndef f(row: Row) -> Out: ...', "key names 'k'"),
        (
            '@dataclass\nclass D:\n    d: Decimal\n@model(reads="raw.shop.t")\ndef f(row: Row) -> D: ...',
            r"type of column d is not known.*",
        ),
        ('@model(reads="raw.shop.t", memory="much")\ndef f(row: Row) -> Out: ...', "memory or timeout"),
    ],
)
def test_what_a_file_says_wrongly_is_told_with_its_place(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('@model(reads="raw.shop.t")\ndef f(row: Row): ...', "does not say what it returns"),
        ('@model(reads="raw.shop.t")\ndef f(a: pa.RecordBatch): ...', "does not say what its columns are"),
        ('@model(reads="raw.shop.t")\ndef f(a, b) -> Out: ...', "takes 2 arguments"),
        (
            '@dataclass\nclass D:\n    d: complex\n@model(reads="raw.shop.t")\ndef f(row: Row) -> D: ...',
            "D.d: complex is no type of a column",
        ),
        (
            '@dataclass\nclass I:\n    w: str\n@model(reads="raw.shop.t")\ndef f(row: I) -> Out: ...',
            "reads w, which raw.shop.t does not have",
        ),
        ('@model(reads="raw.shop.t", contract={"x": "NOSUCH"})\ndef f(row: Row) -> Out: ...', "NOSUCH"),
        ('@model(reads="raw.shop.t", contract={"x": "CHECK (y > 0)"})\ndef f(row: Row) -> Out: ...', '"y"'),
    ],
)
def test_what_does_not_fit_is_broken(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ModelBroken, match=why):
        bind(read(tmp_path, text), SCHEMA)


def test_a_column_that_the_table_does_not_have_breaks_the_model_and_blames_no_record(bound) -> None:
    model = bound('@model(reads="raw.shop.t")\ndef f(row: Row) -> Out:\n    return Out(1, row["w"])\n')
    with pytest.raises(ModelBroken, match=r"models/m.py:19: the raw table has no column w"):
        model.prepare(staged(["a"]))


def test_equal_rows_of_a_table_without_a_key_come_out_equal(bound) -> None:
    text = '@model(reads="raw.shop.t")\ndef f(row: Row) -> Out:\n    return Out(1, ",".join(row))\n'
    schema = TableSchema(SCHEMA.table, SCHEMA.columns, ())
    twice = pa.concat_tables([staged(["a"]), staged(["a"])])
    made = bound(text, schema).prepare(twice)
    assert made.rows["x"].to_pylist() == ["id,v", "id,v"]


def test_a_history_has_a_version_of_each_good_state_and_stops_at_a_bad_one(bound) -> None:
    text = """
    @model(reads="raw.shop.t", key=["id"], materialize="history")
    def f(row: Row) -> Out | None:
        if row["v"] == "bad":
            raise ValueError
        return Out(int(row["id"]), row["v"])
    """
    changes = staged(["a", "b", "bad"])
    changes = changes.set_column(0, "id", pa.array(["1", "1", "1"]))
    model = bound(text)
    made = model.whole(changes)
    assert set(model.types()) == {"id", "x", "valid_from", "valid_to", "is_current"}
    assert made.rows["x"].to_pylist() == ["a", "b"]
    assert bad(made) == {"1": ("transform.python", "")}


# ---------------------------------------------------------------------------- versions and helpers


def test_the_version_is_of_the_text_and_of_the_helpers_that_it_imports(tmp_path: Path) -> None:
    (tmp_path / "_words.py").write_text(
        "from _deeper import SUFFIX\n\ndef word(text): return text + SUFFIX\n"
    )
    (tmp_path / "_deeper.py").write_text("SUFFIX = '!'\n")
    (tmp_path / "_other.py").write_text("")
    function = "def f(row: Row) -> Out: return Out(1, _words.word(row['v']))"
    (tmp_path / "m.py").write_text(f'{HEAD}\nimport _words\n@model(reads="raw.shop.t")\n{function}\n')
    folder = ModelFolder(tmp_path, {"shop"}, FOLD)
    (before,) = folder.current(now=True)
    model = bind(before, SCHEMA)
    (tmp_path / "_other.py").write_text("X = 1\n")
    assert folder.current(now=True) == (before,)
    (tmp_path / "_deeper.py").write_text("SUFFIX = '?'\n")
    (after,) = folder.current(now=True)
    assert after.version != before.version
    # A version runs the texts that it was read with, whatever stands on the disk by now.
    for text, word in ((model, "a!"), (bind(after, SCHEMA), "a?")):
        assert good(text.prepare(staged(["a"]))) == {"1": word}
        text.python.close()


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(HEAD + '@model(reads="raw.shop.t")\ndef f(row: Row) -> Out: ...\n')
    (tmp_path / "m.sql").write_text("SELECT id FROM raw.shop.t")
    with pytest.raises(
        ModelError, match=r"m.py and m.sql would be one model|m.sql and m.py would be one model"
    ):
        ModelFolder(tmp_path, {"shop"}, FOLD)


# -------------------------------------------------------------------------------------- processes


PID = """
@model(reads="raw.shop.t")
def f(row: Row) -> Out:
    return Out(os.getpid(), ";".join(sorted(os.environ)))
"""


def test_the_worker_lives_from_batch_to_batch_and_sees_nothing_of_the_environment(
    bound, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_URL", f"postgresql://u:{SECRET}@h/db")
    model = bound(PID)
    first, second = (model.prepare(staged(["a"])).rows.to_pylist()[0] for _ in range(2))
    assert first == second
    assert first["id"] != os.getpid()
    assert set(first["x"].split(";")) <= {*process._KEPT, *process._SET, "ARROW_DEFAULT_MEMORY_POOL"}


def test_an_idle_worker_ends_and_the_next_batch_starts_another(
    bound, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bound(PID)
    pid = model.prepare(staged(["a"])).rows["id"][0].as_py()
    os.kill(pid, signal.SIGKILL)  # at rest, as one is that ends for want of work
    assert ended(pid)
    assert model.prepare(staged(["a"])).rows["id"][0].as_py() != pid


def test_a_worker_ends_with_its_caller_even_in_a_loop_that_never_lets_go(tmp_path: Path) -> None:
    caller = dedent(
        f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_python_models import SCHEMA, bind, read, staged
        text = '''@model(reads="raw.shop.t", timeout="1h")\\ndef f(row: Row) -> Out:
            Path = __import__("pathlib").Path
            Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
            while True: ctypes.PyDLL(None).sleep(1000)
        '''
        bind(read(Path({str(tmp_path)!r}), text), SCHEMA).prepare(staged(["a"]))
        """
    )
    running = subprocess.Popen([sys.executable, "-c", caller])
    pid_file = tmp_path / "pid"
    try:
        until = time.monotonic() + 30
        while not (pid_file.is_file() and pid_file.read_text()):
            assert time.monotonic() < until
            assert running.poll() is None
            time.sleep(0.05)
    finally:
        running.kill()
        running.wait()
    assert ended(int(pid_file.read_text()))


def test_a_model_that_is_forgotten_takes_its_worker_along(tmp_path: Path) -> None:
    model = bind(read(tmp_path, PID), SCHEMA)
    pid = model.prepare(staged(["a"])).rows["id"][0].as_py()
    del model
    gc.collect()
    assert ended(pid)


def ended(pid: int) -> bool:
    """Whether a process is gone, or soon is."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            if " Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def test_a_worker_without_work_stays_for_a_while_only() -> None:
    assert 10 <= worker._IDLE_SECONDS <= 300


def test_the_examples_of_the_documentation_run(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "python-models.md").read_text()
    codes = [
        code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "@headrace.model" in code
    ]
    assert len(codes) == 2
    columns = (Column("id", "integer"), Column("amount", "text"), Column("status", "text"))
    for code in codes:
        (tmp_path / "sales.py").write_text(code)
        model = bind(read_python(tmp_path / "sales.py"), TableSchema(SCHEMA.table, columns, ("id",)))
        changes = staged(["9.90", "2", "free"]).rename_columns(["id", "amount", *staged([]).column_names[2:]])
        made = model.prepare(changes.append_column("status", pa.array(["paid", "draft", "paid"])))
        assert made.rows.drop_columns("_source_key").to_pylist() == [
            {"order_id": 1, "amount": Decimal("9.90"), "status": "paid"}
        ]
        assert list(bad(made)) == ["3"]
        model.python.close()
