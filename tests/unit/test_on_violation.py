"""What a violated check does: each action by itself and beside others, and which cannot be meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_evaluate import bound, prepare, staged

from headrace.errors import ModelBroken, ModelError
from headrace.prepared import Contested, Refused
from headrace.transform.model import RowModel
from headrace.transform.sql import read_model

BODY = "SELECT id::INT AS id, v::INT AS x, v AS y FROM raw.s.t"


def text(contract: str = "", header: str = "", body: str = BODY) -> str:
    return f"/* headrace\n{header}\n[contract]\n{contract}\n*/\n{body}\n"


def test_warn_applies_and_counts_null_takes_the_cell_alone_and_quarantine_has_the_last_word(
    tmp_path: Path,
) -> None:
    contract = (
        'x = "CHECK (x > 0) ON VIOLATION warn CHECK (x < 100) ON VIOLATION null"\n'
        "y = \"NOT NULL on violation WARN CHECK (y <> '666')\""
    )
    made = prepare(tmp_path, text(contract), ["1", "-2", "300", "666", None, "x"])
    rows = {row["_source_key"]: (row["x"], row["y"], row["_nulled"]) for row in made.rows.to_pylist()}
    assert rows == {
        "1": (1, "1", None), "2": (-2, "-2", None), "3": (None, "300", "x"), "5": (None, None, None),
    }  # fmt: skip
    # 666 violates two checks; the one that quarantines decides, and names itself.
    assert {r["key"]: r["message"] for r in made.records.to_pylist()} == {
        "4": "y: CHECK (y <> '666') is violated",
        "6": made.records.to_pylist()[1]["message"],
    }
    assert (made.counts.applied, made.counts.quarantined, made.counts.closes()) == (4, 2, True)
    assert (made.counts.warned, made.counts.nulled) == (2, 1)


def test_a_row_names_each_of_its_nulled_columns_once(tmp_path: Path) -> None:
    contract = (
        'x = "CHECK (x < 5) ON VIOLATION null CHECK (x < 7) ON VIOLATION null"\n'
        'y = "CHECK (length(y) = 1) ON VIOLATION null"'
    )
    made = prepare(tmp_path, text(contract), ["1", "6", "10"])
    assert made.rows.select(["x", "y", "_nulled"]).to_pylist() == [
        {"x": 1, "y": "1", "_nulled": None},
        {"x": None, "y": "6", "_nulled": "x"},
        {"x": None, "y": None, "_nulled": "x, y"},
    ]
    assert made.counts.nulled == 2
    assert "_nulled" not in bound(tmp_path, text('x = "CHECK (x < 5)"')).types()


@pytest.mark.parametrize("kind", ['delete = "soft"', 'materialize = "history"', 'materialize = "append"'])
def test_every_kind_of_table_counts(tmp_path: Path, kind: str) -> None:
    contract = 'x = "CHECK (x > 0) ON VIOLATION warn"\ny = "CHECK (y <> \'7\') ON VIOLATION null"'
    made = prepare(tmp_path, text(contract, kind), ["1", "-2", "7"])
    assert (made.counts.warned, made.counts.nulled) == (1, 1)


def test_a_check_that_suspends_raises_with_what_and_how_many_and_no_value(tmp_path: Path) -> None:
    contract = 'x = "CHECK (x < 100) ON VIOLATION suspend"'
    assert prepare(tmp_path, text(contract), ["1", "2"]).counts.applied == 2
    with pytest.raises(ModelBroken, match=r"2 changes violate x: CHECK \(x < 100\)") as raised:
        prepare(tmp_path, text(contract), ["1", "4711", "4711"])
    assert "4711" not in raised.value.paragraph()


def test_the_header_says_it_for_all_checks_and_for_the_key_where_that_can_be(tmp_path: Path) -> None:
    header = 'key = ["y"]\non_violation = "{}"'
    checks = 'x = "CHECK (x > 0) CHECK (x < 5) ON VIOLATION quarantine"'

    def actions(word: str) -> list[tuple[str, str]]:
        (tmp_path / "m.sql").write_text(text(checks, header.format(word)))
        return [(check.column, check.on_violation) for check in read_model(tmp_path / "m.sql").checks]

    assert actions("warn") == [("y", "quarantine"), ("x", "warn"), ("x", "quarantine")]
    assert actions("suspend") == [("y", "suspend"), ("x", "suspend"), ("x", "quarantine")]
    # So a contested key suspends as well.
    model: RowModel = bound(tmp_path, text(checks, header.format("suspend")))
    places = [Refused(0, 1, 1, None)]
    with pytest.raises(ModelBroken, match=r"1 changes would give their rows the key \(y\) of others"):
        model.refusing(Contested({"m": places}))
    quarantining = bound(tmp_path, text(checks, header.format("warn")))
    assert quarantining.refusing(Contested({"m": places})).prepare(staged(["1"])).counts.quarantined == 1


@pytest.mark.parametrize(
    ("contract", "header", "words"),
    [
        ('x = "CHECK (x > 0) ON VIOLATION ignore"', "", "ON VIOLATION must be one of quarantine, warn, null"),
        ("", 'on_violation = "drop"', "on_violation must be one of"),
        ('x = "NOT NULL ON VIOLATION null"', "", "x must not be null"),
        ('x = "NOT NULL CHECK (x > 0) ON VIOLATION null"', "", "x must not be null"),
        ('id = "NOT NULL ON VIOLATION warn"', 'key = ["id"]', "id must not be null"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, contract: str, header: str, words: str) -> None:
    (tmp_path / "m.sql").write_text(text(contract, header))
    with pytest.raises(ModelError, match=words):
        read_model(tmp_path / "m.sql")
