"""Part of the suite of a destination: tables that somebody else has altered or dropped."""

# ruff: noqa: D102 - the name of a test says what it tests

from __future__ import annotations

import pytest

from headrace.change import Mark
from headrace.errors import ModelBroken
from headrace.protocols import Destination
from headrace.testing.destinations import LOG, MODEL, Destinations, model_of, row, shape, slice_of, table
from headrace.transform.model import mirror

CHANGES = [
    ("ALTER TABLE {t} DROP COLUMN v", "column v is gone"),
    ("ALTER TABLE {t} RENAME COLUMN v TO w", "column v is gone, column w was added"),
    ("ALTER TABLE {t} ADD COLUMN extra INTEGER", "column extra was added"),
    ("ALTER TABLE {t} ALTER COLUMN id TYPE INTEGER", "column id is integer, and was bigint"),
    ("ALTER TABLE {t} DROP COLUMN _source_key", "column _source_key is gone"),
    ("ALTER TABLE {t} RENAME TO elsewhere", "was dropped"),
    ("DROP TABLE {t}", "was dropped"),
]
"""What a user does to a model's table, and what is said of it."""

OTHER = model_of("other", "SELECT id::BIGINT AS id, v FROM raw.shop.t")


class DriftSuite:
    """What is not as Headrace left it is found, and not written over."""

    @pytest.mark.parametrize("is_new", [False, True], ids=["running", "started anew"])
    @pytest.mark.parametrize(("statement", "words"), CHANGES)
    def test_a_table_that_was_changed_is_told_of_and_breaks_its_model_alone(
        self,
        destination: Destination,
        destinations: Destinations,
        statement: str,
        words: str,
        is_new: bool,
    ) -> None:
        destination.apply(slice_of(0, (MODEL, [row(1)]), (OTHER, [row(1)])))
        assert [finding for finding in destination.inspect() if finding.level == "fail"] == []
        destinations.alter(destination, statement.format(t=destination.table_of(MODEL.name)))
        if is_new:
            destination = destinations.reopen(destination)
        (found,) = (finding for finding in destination.inspect() if finding.level == "fail")
        assert words in found.what.lower()
        for work in ((MODEL, [row(2)]), (MODEL, [row(1, None, _op="d")])):
            with pytest.raises(ModelBroken) as caught:
                destination.apply(slice_of(1, (OTHER, [row(2)]), work))
            assert caught.value.model == MODEL.name
            assert (str(caught.value), caught.value.remedy) == (found.what, found.remedy)
            assert "headrace rebuild shop.t" in found.remedy
        assert destination.progress("shop") == Mark(LOG, 1, "h1")
        destination.apply(slice_of(1, (OTHER, [row(2)])))
        rows = f"SELECT id FROM {destination.table_of('other')} ORDER BY id"
        assert table(destination, rows) == [(1,), (2,)]
        destination.close()

    def test_what_is_undone_goes_on_where_it_stood(
        self, destination: Destination, destinations: Destinations
    ) -> None:
        destination.apply(slice_of(0, (MODEL, [row(1)])))
        target = destination.table_of(MODEL.name)
        destinations.alter(destination, f"ALTER TABLE {target} ADD COLUMN extra INTEGER")
        with pytest.raises(ModelBroken, match="column extra was added"):
            destination.apply(slice_of(1, (MODEL, [row(2)])))
        destinations.alter(destination, f"ALTER TABLE {target} DROP COLUMN extra")
        destination.apply(slice_of(1, (MODEL, [row(2)])))
        assert table(destination) == [(1, "a"), (2, "a")]
        assert [finding for finding in destination.inspect() if finding.level == "fail"] == []

    @pytest.mark.parametrize("statement", ["ALTER TABLE {t} ADD COLUMN extra INTEGER", "DROP TABLE {t}"])
    def test_what_is_not_undone_is_built_anew_when_a_person_says_so(
        self, destination: Destination, destinations: Destinations, statement: str
    ) -> None:
        destination.apply(slice_of(0, (MODEL, [row(1)])))
        assert not destination.forget_if_reshaped(MODEL, mend=True)
        destinations.alter(destination, statement.format(t=destination.table_of(MODEL.name)))
        with pytest.raises(ModelBroken, match="somebody else"):
            destination.forget_if_reshaped(mirror("shop", shape(("w", "integer"))))
        assert destination.forget_if_reshaped(MODEL, mend=True, dry_run=True)
        assert destination.forget_if_reshaped(MODEL, mend=True)
        assert not destination.forget_if_reshaped(MODEL, mend=True)
        assert destination.models("shop") == {}
        assert [finding for finding in destination.inspect() if finding.level == "fail"] == []

    def test_what_the_model_itself_has_changed_is_none_of_it(self, destination: Destination) -> None:
        destination.apply(slice_of(0, (MODEL, [row(1)])))
        wider = mirror("shop", shape(("v", "text"), ("w", "integer")))
        destination.apply(slice_of(1, (wider, [row(2, w="7")])))
        destination.apply(slice_of(2, (MODEL, [row(3)])))
        destination.retire(MODEL.name, "shop")
        assert [finding for finding in destination.inspect() if finding.level == "fail"] == []
