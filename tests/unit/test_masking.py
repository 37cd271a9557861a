"""What is marked, what follows from it, and that a masked cell is nowhere in a record."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_evaluate import staged

from headrace.change import Column, TableId, TableSchema
from headrace.errors import ModelError
from headrace.masking import marked_in
from headrace.transform.model import RowModel, bind, mirror
from headrace.transform.pii import marked
from headrace.transform.sql import read_model

SCHEMA = TableSchema(
    TableId("public", "t"), (Column("id", "bigint"), Column("v", "text"), Column("w", "text")), ("id",)
)


def model(folder: Path, header: str, patterns: tuple[str, ...] = ()) -> RowModel:
    (folder / "m.sql").write_text(
        f"/* headrace\n{header}\n*/\nSELECT id::INT AS id, v::INT AS x, left(V, 2) AS head, w FROM raw.s.t"
    )
    text = read_model(folder / "m.sql")
    return marked(bind(text, SCHEMA), text, patterns)


def test_patterns_name_columns_of_public_or_of_a_schema() -> None:
    columns = ["id", "email", "Email2"]
    users, crm = TableId("public", "users"), TableId("crm", "a.b")
    assert marked_in(["users.email"], users, columns) == {"email"}
    assert marked_in(["public.users.*mail*"], users, columns) == {"email", "Email2"}
    assert marked_in(["users.email", "crm.a.b.id"], crm, columns) == {"id"}
    assert marked_in(["*.email"], crm, columns) == frozenset()


def test_a_marked_output_masks_what_it_reads_and_all_that_reads_that(tmp_path: Path) -> None:
    masked = model(tmp_path, 'pii = ["x"]').masked
    assert (masked.cells, masked.outputs, masked.key) == ({"v"}, {"x", "head"}, False)
    masked = model(tmp_path, "", ("t.id",)).masked
    assert (masked.cells, masked.outputs, masked.key) == ({"id"}, {"id"}, True)
    assert model(tmp_path, "").masked.cells == frozenset()
    with pytest.raises(ModelError, match="pii names 'nope', which is no output column"):
        model(tmp_path, 'pii = ["nope"]')
    keyless = mirror("s", TableSchema(TableId("public", "t"), SCHEMA.columns, ()))
    assert marked(keyless, None, ("t.w",)).masked.key  # its key is all of the row


def test_a_record_has_the_mask_and_a_null_stays_one(tmp_path: Path) -> None:
    changes = staged(["secret one", None, "3"]).append_column("w", [["plain", "x", "y"]])
    (record,) = model(tmp_path, 'pii = ["x"]').prepare(changes).records.to_pylist()
    assert record["preview"] == '{"id":"1","v":"***","w":"plain"}'
    assert not record["key_is_masked"]
    assert "secret" not in str(record)
