"""Part of the suite of a destination: marts, which are computed from its tables."""

# ruff: noqa: D102 - the name of a test says what it tests

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from headrace.mart import Mart, MartState
from headrace.protocols import Destination
from headrace.testing.destinations import NUMBERS, row, slice_of, table
from headrace.testing.logs import armed


def mart(destination: Destination, name: str = "total", **more: object) -> Mart:
    """Return a mart that sums the model's rows; `{}` in its query is their table."""
    query = str(more.pop("query", "SELECT count(*) AS n, sum(v) AS v FROM {}"))
    made = Mart(name, query.format(destination.table_of(NUMBERS.name)), ("shop.t",), "table", 0.0, "v1")
    return replace(made, **more)  # type: ignore[arg-type]


class MartSuite:
    """A mart is changed in one transaction with what is said of it."""

    def test_views_follow_and_tables_are_of_a_position(self, destination: Destination) -> None:
        destination.apply(slice_of(0, (NUMBERS, [row(1, "1"), row(2, "2")])))
        view, made = mart(destination, "now", kind="view"), mart(destination)
        marts = destination.marts
        states = {each.name: marts.make(each, None, ["shop.t"]) for each in (view, made)}
        assert marts.all() == states
        assert (states["total"].rows, json.loads(states["total"].positions)["shop"]["offset"]) == (1, 1)
        destination.apply(slice_of(1, (NUMBERS, [row(3, "5")])))
        of = "SELECT CAST(n AS BIGINT), CAST(v AS BIGINT) FROM {}"
        sums = [table(destination, of.format(destination.table_of(name))) for name in ("now", "total")]
        assert sums == [[(3, 8)], [(2, 3)]]
        again = marts.make(made, states["total"], ["shop.t"])
        assert json.loads(again.positions)["shop"]["offset"] == 2
        assert table(destination, of.format(destination.table_of("total"))) == [(3, 8)]

    def test_what_it_holds_and_what_it_is_of_are_one_state(
        self, destination: Destination, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A slice that is applied in the middle is in neither."""
        destination.apply(slice_of(0, (NUMBERS, [row(1, "1")])))
        from headrace.destinations import marts

        positions, applied = marts._positions, list[object]()

        def meanwhile(db: object) -> str:
            if not applied:
                applied.append(destination.apply(slice_of(1, (NUMBERS, [row(2, "2")]))))
            return positions(db)  # type: ignore[arg-type]

        monkeypatch.setattr(marts, "_positions", meanwhile)
        state = destination.marts.make(mart(destination), None, ["shop.t"])
        assert json.loads(state.positions)["shop"]["offset"] == 1
        assert table(destination, f"SELECT n FROM {destination.table_of('total')}") == [(1,)]
        assert len(table(destination)) == 2

    def test_a_refresh_keeps_the_table_and_what_reads_it(self, destination: Destination) -> None:
        destination.apply(slice_of(0, (NUMBERS, [row(1, "1")])))
        made = mart(destination)
        state = destination.marts.make(made, None, ["shop.t"])
        over = mart(destination, "over", kind="view", query=f"SELECT n FROM {destination.table_of('total')}")
        destination.marts.make(over, None, ["shop.t"])
        destination.apply(slice_of(1, (NUMBERS, [row(2, "2")])))
        destination.marts.make(made, state, ["shop.t"])
        assert table(destination, f"SELECT n FROM {destination.table_of('over')}") == [(2,)]

    def test_what_cannot_be_made_is_suspended_and_stays_as_it_was(self, destination: Destination) -> None:
        destination.apply(slice_of(0, (NUMBERS, [row(1, "1")])))
        state = destination.marts.make(mart(destination), None, ["shop.t"])
        for query in ("SELECT nothing FROM {}", "SELECT 1 / 0 AS n, CAST('secret' AS INT) AS m FROM {}"):
            broken = destination.marts.make(mart(destination, query=query, version="v2"), state, ["shop.t"])
            assert (broken.state, broken.incomplete, broken.rows) == ("suspended", True, 1)
            assert broken.reason
            assert "secret" not in broken.reason
            assert destination.marts.all() == {"total": broken}
            assert table(destination, f"SELECT n FROM {destination.table_of('total')}") == [(1,)]

    def test_other_columns_and_another_kind_take_its_place(self, destination: Destination) -> None:
        destination.apply(slice_of(0, (NUMBERS, [row(1, "1")])))
        state: MartState | None = None
        for n, (kind, query) in enumerate(
            [
                ("table", "SELECT 1 AS a FROM {}"),
                ("table", "SELECT 1 AS a, 'x' AS b FROM {}"),
                ("view", "SELECT 1 AS a, 2 AS b, 3 AS c FROM {}"),
                ("view", "SELECT 'y' AS a FROM {}"),
                ("table", "SELECT 4 AS a FROM {}"),
            ]
        ):
            state = destination.marts.make(
                mart(destination, kind=kind, query=query, version=f"v{n}"), state, ["shop.t"]
            )
            assert state.state == "ok", state.reason
        assert table(destination, f"SELECT a FROM {destination.table_of('total')}") == [(4,)]

    def test_a_failure_at_its_commit_leaves_nothing(self, destination: Destination) -> None:
        destination.apply(slice_of(0, (NUMBERS, [row(1, "1")])))
        with armed("destination.mart.commit=raise"), pytest.raises(OSError, match="mart"):
            destination.marts.make(mart(destination), None, ["shop.t"])
        assert destination.marts.all() == {}
        assert destination.marts.make(mart(destination), None, ["shop.t"]).state == "ok"

    def test_a_table_that_is_somebody_elses_is_never_taken(self, destination: Destination) -> None:
        destination.apply(slice_of(0, (NUMBERS, [row(1, "1")])))
        held = table(destination)
        for kind in ("table", "view"):
            state = destination.marts.make(mart(destination, NUMBERS.name, kind=kind), None, ["shop.t"])
            assert state.state == "suspended"
            assert "is no mart's" in state.reason
            assert table(destination) == held
