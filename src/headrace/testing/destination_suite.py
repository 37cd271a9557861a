"""The contract of a destination, as tests: whoever writes one runs this suite on it.

class TestMine(DestinationSuite):
    @pytest.fixture
    def destinations(self, tmp_path): ...  # see headrace.testing.destinations.Destinations
"""

# ruff: noqa: D102 - the name of a test says what it tests

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import duckdb
import pyarrow as pa
import pytest

from headrace.change import Mark
from headrace.errors import DestinationError, ForeignDestination, ModelBroken, UserError
from headrace.failpoints import VARIABLE
from headrace.keys import quoted
from headrace.protocols import Destination, Slice
from headrace.testing.destination_drift_suite import DriftSuite
from headrace.testing.destination_joins_suite import BagSuite, JoinSuite
from headrace.testing.destination_kinds_suite import KindSuite
from headrace.testing.destination_marts_suite import MartSuite
from headrace.testing.destination_references_suite import ReferenceSuite
from headrace.testing.destination_unique_suite import UniqueSuite
from headrace.testing.destinations import (
    LOG,
    MODEL,
    NUMBERS,
    Cells,
    Destinations,
    limited,
    model_of,
    row,
    shape,
    slice_of,
    staged,
    table,
)
from headrace.testing.logs import armed
from headrace.transform.model import RowModel, mirror
from headrace.verify import as_type


class OwnerSuite:
    """One owner, each slice once."""

    def test_progress_moves_with_the_data(self, destination: Destination) -> None:
        assert not destination.exists()
        assert destination.progress("shop") is None
        assert destination.exists()
        assert destination.models("shop") == {}
        destination.apply(slice_of(0, (MODEL, [row(1)])))
        assert destination.progress("shop") == Mark(LOG, 1, "h1")
        state = destination.models("shop")["shop.t"]
        assert (state.offset, state.state, state.version, state.open_records) == (
            1, "in_sync", MODEL.version, 0,
        )  # fmt: skip
        assert destination.progress("other") is None

    @pytest.mark.parametrize(
        ("after", "log", "error"),
        [
            (0, LOG, DestinationError),  # the same slice again
            (2, LOG, ForeignDestination),  # a slice too far
            (1, "f" * 32, ForeignDestination),  # another log
        ],
    )
    def test_a_slice_that_does_not_continue_is_refused_and_changes_nothing(
        self, destination: Destination, after: int, log: str, error: type[Exception]
    ) -> None:
        destination.apply(slice_of(0, (MODEL, [row(1)])))
        with pytest.raises(error):
            destination.apply(slice_of(after, (MODEL, [row(2)]), log=log))
        assert table(destination) == [(1, "a")]
        assert destination.progress("shop") == Mark(LOG, 1, "h1")
        assert table(destination, "SELECT count(*) FROM headrace.ledger") == [(1,)]

    def test_an_owner_whose_log_took_another_turn_is_refused(self, destination: Destination) -> None:
        destination.apply(slice_of(0, (MODEL, [row(1)])))
        work = slice_of(1, (MODEL, [row(2)]))
        turned = Slice(work.source, Mark(LOG, 1, "other"), work.through, work.position, 0, work.parts)
        with pytest.raises(ForeignDestination, match="another pipeline"):
            destination.apply(turned)

    def test_a_stale_second_owner_is_refused(
        self, destination: Destination, destinations: Destinations
    ) -> None:
        destination.apply(slice_of(0, (MODEL, [row(1)])))
        mine, theirs = slice_of(1, (MODEL, [row(2)])), slice_of(1, (MODEL, [row(3)]), size=2)
        destinations.reopen(destination).apply(theirs)
        with pytest.raises(DestinationError):
            destination.apply(mine)
        assert table(destination) == [(1, "a"), (3, "a")]

    def test_progress_without_a_beginning_is_refused(self, destination: Destination) -> None:
        with pytest.raises(ForeignDestination, match="has no progress"):
            destination.apply(slice_of(5, (MODEL, [row(1)])))

    def test_a_killed_apply_takes_effect_exactly_once(
        self, destination: Destination, destinations: Destinations
    ) -> None:
        for n, (place, applied) in enumerate(destinations.steps, 1):
            destination.apply(slice_of(2 * n - 2, (MODEL, [row(2 * n)])))
            code = (
                f"{destinations.code(destination)}\n"
                "from headrace.testing.destinations import MODEL, row, slice_of\n"
                f"destination.apply(slice_of({2 * n - 1}, (MODEL, [row({2 * n + 1})])))"
            )
            environment = {**os.environ, VARIABLE: f"{place}=kill"}
            done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False)
            assert done.returncode == -signal.SIGKILL
            progress = destination.progress("shop")
            assert progress is not None
            assert progress.offset == (2 * n if applied else 2 * n - 1), place
            if not applied:
                destination.apply(slice_of(2 * n - 1, (MODEL, [row(2 * n + 1)])))
        ends = range(2, 2 * len(destinations.steps) + 2)
        assert table(destination) == [(n, "a") for n in ends]
        assert table(destination, 'SELECT "through" FROM headrace.ledger ORDER BY 1') == [
            (n - 1,) for n in ends
        ]

    def test_an_apply_that_fails_on_its_way_leaves_nothing(
        self, destination: Destination, destinations: Destinations
    ) -> None:
        destination.apply(slice_of(0, (NUMBERS, [row(1, "1")])))
        asked = ("progress", "models", "quarantine", "ledger")
        queries = [f"SELECT * FROM headrace.{name}" for name in asked]
        queries.append(f"SELECT * FROM {destination.table_of(MODEL.name)}")
        before = destination.read(queries)
        work = slice_of(1, (NUMBERS, [row(1, "x"), row(2, "2")]), size=2)
        for place, applied in destinations.steps:
            if not applied:
                with armed(f"{place}=raise"), pytest.raises(OSError, match=place):
                    destination.apply(work)
                assert destination.read(queries) == before, place

    def test_a_table_that_cannot_take_its_model_breaks_this_model_alone(
        self, destination: Destination, destinations: Destinations
    ) -> None:
        second = model_of("second", "SELECT id::BIGINT AS id, v FROM raw.shop.t")
        other = model_of("second", "SELECT v AS id FROM raw.shop.t")
        destination.apply(slice_of(0, (MODEL, [row(1)]), (other, [row(1, "no number")])))
        target = destination.table_of("second")
        # A user's, of which the one or the other stands in the way of another type.
        for statement in ("CREATE INDEX of_id ON {t} (id)", "CREATE VIEW seen AS SELECT id FROM {t}"):
            destinations.alter(destination, statement.format(t=target))
        with pytest.raises(ModelBroken, match="Table second cannot take the model's columns") as caught:
            destination.apply(slice_of(1, (MODEL, [row(2)]), (second, [row(1)])))
        assert caught.value.model == "second"
        assert "no number" not in caught.value.paragraph()
        assert destination.progress("shop") == Mark(LOG, 1, "h1")
        assert table(destination) == [(1, "a")]
        destination.apply(slice_of(1, (MODEL, [row(2)])))
        assert table(destination) == [(1, "a"), (2, "a")]

    def test_a_model_is_suspended_once_and_retired(self, destination: Destination) -> None:
        assert destination.suspend("shop.t", "shop", "v1", "a reason")
        assert not destination.suspend("shop.t", "shop", "v1", "a reason")
        assert destination.suspend("shop.t", "shop", "v2", "a reason")
        state = destination.models("shop")["shop.t"]
        assert (state.state, state.version, state.reason) == ("suspended", "v2", "a reason")
        destination.reconsider("other")
        assert destination.models("shop")["shop.t"].version == "v2"
        destination.reconsider("shop")
        assert destination.models("shop")["shop.t"].version not in ("v1", "v2"), "so it is tried again"
        destination.retire("shop.t", "shop")
        assert destination.models("shop")["shop.t"].state == "retired"

    @pytest.mark.parametrize(
        "query",
        [
            "DELETE FROM {t}",
            "DROP TABLE {t}",
            "SELECT 1; DELETE FROM {t}",
            "CREATE TABLE x (a INT)",
            "INSERT INTO {t} SELECT * FROM {t}",
            "COMMIT",
            "COPY {t} TO '/dev/null'",
            "SELECT 1) TO PROGRAM 'false' --",
            "nonsense",
            "SELECT * FROM absent",
        ],
    )
    def test_only_queries_are_answered(self, destination: Destination, query: str) -> None:
        destination.apply(slice_of(0, (MODEL, [row(1)])))
        with pytest.raises(UserError):
            destination.read([query.format(t=destination.table_of(MODEL.name))])
        assert table(destination) == [(1, "a")]

    def test_queries_of_one_call_see_one_state_and_may_have_any_shape(self, destination: Destination) -> None:
        destination.apply(slice_of(0, (MODEL, [row(1, None), row(2, "")]), size=2))
        target = destination.table_of(MODEL.name)
        empty, twins, commented = destination.read(
            [
                f"SELECT id, v FROM {target} WHERE false",
                f"SELECT v, v IS NULL AS n FROM {target} ORDER BY id;",
                "SELECT 1 AS one -- a comment",
            ]
        )
        assert (empty.num_rows, empty.column_names) == (0, ["id", "v"])
        assert [tuple(r.values()) for r in twins.to_pylist()] == [(None, True), ("", False)]
        assert commented.to_pylist() == [{"one": 1}]


class BooksSuite:
    """Quarantine and ledger."""

    def test_a_bad_change_is_recorded_and_told_once_and_a_good_one_heals_it(
        self, destination: Destination
    ) -> None:
        first = destination.apply(slice_of(0, (NUMBERS, [row(1, "x"), row(2, "y"), row(3, "3")]), size=3))
        assert len(first) == 1
        assert destination.apply(slice_of(3, (NUMBERS, [row(4, "z")]))) == []
        model, reason, columns, _, count = destination.issue(first[0])
        assert (model, reason, columns, count) == ("shop.t", "transform.cast", "v", 3)
        assert table(destination) == [(3, 3)]
        assert destination.models("shop")["shop.t"].open_records == 3
        destination.apply(slice_of(4, (NUMBERS, [row(1, "1"), row(2, None, _op="d")]), size=2))
        records = "SELECT key, status, superseded_by, attempts FROM headrace.quarantine ORDER BY key"
        assert table(destination, records) == [
            ("1", "superseded", 6, 1),
            ("2", "superseded", 6, 1),
            ("4", "quarantined", None, 1),
        ]
        assert destination.models("shop")["shop.t"].open_records == 1
        sums = (
            "SELECT sum(read)::BIGINT, sum(quarantined)::BIGINT, "
            "sum(applied + superseded + filtered + quarantined)::BIGINT FROM headrace.ledger"
        )
        assert table(destination, sums) == [(6, 1, 6)]

    @pytest.mark.parametrize("bad", [1, 2_500])
    def test_a_redrive_resolves_what_a_mended_model_takes(self, destination: Destination, bad: int) -> None:
        cells = [row(key, "x" if key else "also x") for key in range(bad)] + [row(bad, "7")]
        destination.apply(slice_of(0, (NUMBERS, cells), size=bad + 1))
        text = "SELECT id::BIGINT AS id, TRY_CAST(v AS INTEGER) AS v FROM raw.shop.t WHERE v <> 'also x'"
        mended = replace(model_of("x", text, NUMBERS.schema), name="shop.t")
        prepared = mended.prepare(staged(mended, cells[:-1], 0))
        opened = "SELECT count(*) FROM headrace.quarantine WHERE status = 'quarantined'"
        target = destination.table_of("shop.t")
        wanted = {"resolved": bad, "still_quarantined": 0}
        assert destination.redrive(mended, prepared, dry_run=True) == wanted
        assert table(destination, opened) == [(bad,)]
        assert table(destination, f"SELECT count(*) FROM {target}") == [(1,)]
        with armed("destination.redrive.commit=raise"), pytest.raises(OSError, match="redrive"):
            destination.redrive(mended, prepared)
        assert table(destination, opened) == [(bad,)]
        assert destination.redrive(mended, prepared) == wanted
        assert destination.redrive(mended, prepared) == {"resolved": 0, "still_quarantined": 0}
        assert table(destination, opened) == [(0,)]
        assert table(destination, f"SELECT count(*) FROM {target}") == [(bad,)]
        assert destination.models("shop")["shop.t"].open_records == 0

    def test_what_stays_bad_counts_one_more_attempt(self, destination: Destination) -> None:
        destination.apply(slice_of(0, (NUMBERS, [row(1, "x")])))
        prepared = NUMBERS.prepare(staged(NUMBERS, [row(1, "x")], 0))
        keys = pa.array(["1"])
        outcome = destination.redrive(NUMBERS, replace(prepared, removed=keys))
        assert outcome == {"resolved": 0, "still_quarantined": 1}
        records = "SELECT attempts, first_seen < last_attempt, status FROM headrace.quarantine"
        assert table(destination, records) == [(2, True, "quarantined")]


class TableSuite:
    """Tables, their columns and their values."""

    def test_a_truncate_takes_what_was_there_and_a_slice_may_be_large(self, destination: Destination) -> None:
        many = [row(key, f"v{key}") for key in range(5_000)]
        destination.apply(slice_of(0, (MODEL, many), size=5_000))
        again = [row(key, "new") for key in range(0, 5_000, 2)]
        destination.apply(slice_of(5_000, (MODEL, again), size=2_500))
        target = destination.table_of(MODEL.name)
        counts = f"SELECT count(*), count(DISTINCT id), count(*) FILTER (WHERE v = 'new') FROM {target}"
        assert table(destination, counts) == [(5_000, 5_000, 2_500)]
        destination.apply(slice_of(7_500, (MODEL, [row(0, None, _op="t"), row(1)]), size=2))
        assert table(destination) == [(1, "a")]

    def test_a_new_column_appears_and_a_lost_one_is_null_from_then_on(self, destination: Destination) -> None:
        destination.apply(slice_of(0, (MODEL, [row(1)])))
        wider = mirror("shop", shape(("w", "integer")))
        destination.apply(slice_of(1, (wider, [{"id": "2", "w": "7"}])))
        query = f"SELECT id, v, w FROM {destination.table_of('shop.t')} ORDER BY id"
        assert table(destination, query) == [(1, "a", None), (2, None, 7)]

    def test_a_column_changes_its_type_with_the_rows_that_are_there(self, destination: Destination) -> None:
        wide = mirror("shop", shape(("v", "bigint"), ("w", "text")))
        destination.apply(slice_of(0, (NUMBERS, [row(1, "7"), row(2, "8")]), size=2))
        destination.apply(slice_of(2, (wide, [row(2, str(2**40), w="x")])))
        assert table(destination) == [(1, 7), (2, 2**40)]

    def test_a_table_of_other_columns_is_forgotten_with_its_records(self, destination: Destination) -> None:
        destination.apply(slice_of(0, (NUMBERS, [row(1, "7"), row(2, "x")]), size=2))
        assert not destination.forget_if_reshaped(NUMBERS)
        other = mirror("shop", shape(("w", "integer")))
        assert destination.forget_if_reshaped(other)
        assert not destination.forget_if_reshaped(other)
        assert destination.models("shop") == {}
        assert table(destination, "SELECT status, resolution FROM headrace.quarantine") == [
            ("superseded", "rebuilt")
        ]
        assert table(destination, "SELECT DISTINCT kind FROM headrace.ledger") == [("void",)]

    @pytest.mark.parametrize(
        "name", ["records", "incoming", "Mixed Case", 'quo"te', "order", "headrace", "é" * 31]
    )
    def test_a_model_may_have_any_name(self, destination: Destination, name: str) -> None:
        text = "SELECT id::BIGINT AS id, v::INTEGER AS v FROM raw.shop.t"
        one, two = model_of("first", text), model_of(name, text)
        for after, value in ((0, "1"), (2, "x"), (4, "3")):
            cells = [row(1, value), row(2, "5")]
            destination.apply(slice_of(after, (one, cells), (two, cells), size=2))
        query = f"SELECT id, v FROM {destination.table_of(name)} ORDER BY id"
        assert table(destination, query) == [(1, 3), (2, 5)]
        statuses = table(
            destination, "SELECT model, status FROM headrace.quarantine ORDER BY model = 'first'"
        )
        assert statuses == [(name, "superseded"), ("first", "superseded")]

    @pytest.mark.parametrize(
        "column", ["key", "k", "n", "status", "removed", "order", "Mixed", 'a"b', "r", "h0", "é" * 31]
    )
    def test_a_column_may_have_any_name(self, destination: Destination, column: str) -> None:
        model = mirror("shop", shape((column, "text")))
        for after, value in ((0, "a"), (1, "b")):
            destination.apply(slice_of(after, (model, [{"id": "1", column: value}])))
        query = f"SELECT id, {quoted(column)} FROM {destination.table_of('shop.t')}"
        assert table(destination, query) == [(1, "b")]

    def test_every_source_type_comes_back_as_it_was_made(self, destination: Destination) -> None:
        columns = [(f"c{i}", type_) for i, (type_, _) in enumerate(VALUES)]
        cells = [
            {f"c{i}": values[n] for i, (_, values) in enumerate(VALUES) if n < len(values)} | {"id": str(n)}
            for n in range(max(len(values) for _, values in VALUES) + 1)
        ]
        model = limited(destination, mirror("shop", shape(*columns)))
        same_rows(destination, model, cells)

    def test_types_of_models_come_back_as_they_were_made(self, destination: Destination) -> None:
        outputs = ", ".join(f"{expression} AS c{i}" for i, expression in enumerate(EXPRESSIONS))
        text = f"SELECT id::BIGINT AS id, {outputs} FROM raw.shop.t"
        model = limited(destination, model_of("typed", text))
        same_rows(destination, model, [row(1, "7"), row(2, None)])

    def test_a_row_goes_by_its_source_key_whatever_number_a_model_has_made_of_it(
        self, destination: Destination
    ) -> None:
        plain = model_of("m", "SELECT id::BIGINT AS id, v FROM raw.shop.t")
        moved = model_of("m", "SELECT id::BIGINT + 1 AS id, v FROM raw.shop.t")
        assert (plain.numbered, moved.numbered) == ("id", None)
        query = f"SELECT id, v, _source_key FROM {destination.table_of('m')} ORDER BY _source_key"
        destination.apply(slice_of(0, (plain, [row(1), row(2), row(3)]), size=3))
        destination.apply(slice_of(3, (plain, [row(1, "b"), row(3, None, _op="d")]), size=2))
        assert table(destination, query) == [(1, "b", "1"), (2, "a", "2")]
        destination.apply(slice_of(5, (moved, [row(1, "c")])))
        destination.apply(slice_of(6, (plain, [row(2, "d")])))
        assert table(destination, query) == [(2, "c", "1"), (2, "d", "2")]

    def test_a_source_key_may_be_of_any_length(self, destination: Destination) -> None:
        model = mirror("shop", shape(("v", "text"), key=("v",)))
        keys = [os.urandom(4_000).hex() + end for end in "ab"]
        destination.apply(slice_of(0, (model, [row(1, keys[0]), row(2, keys[1])]), size=2))
        destination.apply(slice_of(2, (model, [row(3, keys[0])])))
        target = destination.table_of("shop.t")
        assert table(destination, f"SELECT id FROM {target} ORDER BY id") == [(2,), (3,)]


VALUES: list[tuple[str, list[str]]] = [
    ("smallint", ["-32768", "32767"]),
    ("integer", ["-2147483648", "2147483647"]),
    ("bigint", ["-9223372036854775808", "9223372036854775807"]),
    ("oid", ["0", "4294967295"]),
    ("real", ["1e-45", "3.4028235e+38", "NaN", "-Infinity", "-0", "0.1"]),
    ("double precision", ["5e-324", "1.7976931348623157e+308", "NaN", "Infinity", "-0", "0.1"]),
    ("numeric(12,2)", ["-9999999999.99", "0.01"]),
    ("numeric(38,10)", ["1234567890123456789012345678.0123456789"]),
    ("numeric", ["NaN", "1e400", "0.10"]),
    ("boolean", ["t", "f"]),
    ("uuid", ["00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"]),
    ("date", ["infinity", "-infinity", "0044-03-15 BC", "2024-02-29", "12024-01-01"]),
    (
        "timestamp without time zone",
        ["infinity", "-infinity", "0044-03-15 10:00:00.5 BC", "2024-02-29 23:59:59.999999",
         "12024-01-01 00:00:07"],
    ),
    ("timestamp with time zone", ["infinity", "0044-03-15 10:00:00+00 BC", "2024-02-29 23:59:59.999999+00"]),
    ("time without time zone", ["00:00:00", "24:00:00", "23:59:59.999999"]),
    ("interval", ["1 year 2 mons -3 days +04:05:06.7"]),
    ("json", ['{"a": [1,  2.50]}', "null", '"\\u0000"']),
    ("jsonb", ['{"a": "\\"\\\\"}', "[]"]),
    ("bytea", ["\\x", "\\x00ff5c22"]),
    ("integer[]", ["{}", "{1,NULL,-3}"]),
    ("text[]", ['{}', '{"",NULL,"NULL","a\\"b\\\\c,d",é}', '{"{x}","\n"}']),
    ("numeric(12,2)[]", ["{1.00,2.50}"]),
    ("timestamp with time zone[]", ['{"2024-02-29 23:59:59.5+00",infinity}']),
    ("text", ["", " ", 'a"b,c\nd\r\n\\.\ne\\', "\\N", "NULL", "é\U0001f600\x01\x7f", "\n\\.\n", "'"]),
]  # fmt: skip
"""Types of a source, with values as it writes them."""

EXPRESSIONS = [
    "v::TINYINT", "v::UTINYINT", "v::USMALLINT", "v::UBIGINT", "(v || '0000000000000000000000')::HUGEINT",
    "to_days(v::INTEGER)",
    "INTERVAL '-1 year 2 months -3 days 04:05:06.789'", "v::DECIMAL(38,5)", "v::VARCHAR::BLOB",
    "CASE WHEN v = '7' THEN 'x' ELSE 'y' END::ENUM('x', 'y')", "{'a': v, 'b': [v::INTEGER]}",
    "MAP {'k': v}", "[[v::INTEGER], []]", "[v::DOUBLE, NULL]", "[DATE '2024-01-01', NULL]",
    "make_timestamp(v::BIGINT)", "TIMESTAMP_S '2024-01-01 00:00:07'",
    "TIMESTAMP_NS '2024-01-01 00:00:07.123456789'",
    "json_object('a', v)", "['x', v]::VARCHAR[2]",
]  # fmt: skip
"""What models may make of `v`, a number or null."""


def same_rows(destination: Destination, model: RowModel, cells: Sequence[Cells]) -> None:
    """Apply rows and compare what comes back with what was prepared, as the model's own types."""
    work = slice_of(0, (model, cells), size=len(cells))
    (part,) = work.parts
    assert part.prepared.records.num_rows == 0, part.prepared.records.to_pylist()
    destination.apply(work)
    names = ", ".join(quoted(name) for name in model.types())
    (found,) = destination.read([f"SELECT {names} FROM {destination.table_of(model.name)}"])
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        columns = ", ".join(f"{quoted(name)} {type_}" for name, type_ in model.types().items())
        expected = part.prepared.rows.drop_columns(["_source_key"])
        for name, rows in (("expected", expected), ("found", found)):
            db.execute(f"CREATE TABLE {name} ({columns})")
            db.register("arrow", rows)
            casts = (
                f"{as_type(rows, cell, type_)} AS {quoted(cell)}" for cell, type_ in model.types().items()
            )
            db.execute(f"INSERT INTO {name} BY NAME SELECT {', '.join(casts)} FROM arrow")
        for column in model.types():
            cell = quoted(column)
            both = [
                db.sql(f"SELECT {cell}::VARCHAR FROM {name} ORDER BY id").fetchall()
                for name in ("found", "expected")
            ]
            assert both[0] == both[1], (column, model.types()[column])
            assert (
                db.sql(f"SELECT {cell}, id FROM found EXCEPT SELECT {cell}, id FROM expected").fetchall()
                == []
            )


class DestinationSuite(
    OwnerSuite,
    BooksSuite,
    TableSuite,
    UniqueSuite,
    ReferenceSuite,
    DriftSuite,
    BagSuite,
    JoinSuite,
    KindSuite,
    MartSuite,
):
    """The contract as a whole."""

    @pytest.fixture
    def destination(self, destinations: Destinations) -> Iterator[Destination]:
        made = destinations.make()
        yield made
        made.close()
