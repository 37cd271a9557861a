"""What differs between two shapes of a table, what a policy makes of it, and how it is written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace.change import Column, TableId, TableSchema
from headrace.config import load_project
from headrace.errors import ConfigError
from headrace.evolution import Evolution, Evolutions, accept, changes_between
from headrace.schema_policy import action
from headrace.testing.memory_log import MemoryLog

T = TableId("public", "t")


def shape(version: int, *columns: str, key: tuple[str, ...] = ("id",)) -> TableSchema:
    """`columns` are names with types, such as `v integer`."""
    pairs = (column.split(" ", 1) for column in columns)
    return TableSchema(T, tuple(Column(name, type_) for name, type_ in pairs), key, version)


ONE = shape(1, "id integer", "v integer", "w text")

CHANGES: dict[str, tuple[TableSchema, list[tuple[str, str]]]] = {
    "added": (
        shape(2, "id integer", "v integer", "w text", "n date"), [("column_added", "n added: date")]
    ),
    "dropped": (shape(2, "id integer", "w text"), [("column_dropped", "v dropped")]),
    "renamed": (
        shape(2, "id integer", "x integer", "w text"), [("column_renamed", "v renamed to x")]
    ),
    "another in its place": (
        shape(2, "id integer", "x date", "w text"),
        [("column_dropped", "v dropped"), ("column_added", "x added: date")],
    ),
    "wider": (shape(2, "id integer", "v bigint", "w text"), [("type_widened", "v: integer is bigint")]),
    "narrower": (
        shape(2, "id integer", "v smallint", "w text"), [("type_changed", "v: integer is smallint")]
    ),
    "key": (
        shape(2, "id integer", "v integer", "w text", key=("v",)), [("key_changed", "key (id) is key (v)")]
    ),
    "order": (shape(2, "id integer", "w text", "v integer"), []),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_between_two_shapes(name: str) -> None:
    after, expected = CHANGES[name]
    assert [(change.kind, change.what) for change in changes_between(ONE, after)] == expected


FROZEN: dict[str, tuple[list[TableSchema], list[str]]] = {
    "added": (
        [shape(2, "id integer", "v integer", "w text", "n date")], ["id integer", "v integer", "w text"]
    ),
    "added, then another": (
        [
            shape(2, "id integer", "v integer", "w text", "n date"),
            shape(3, "id integer", "v integer", "w text", "n date", "m date"),
        ],
        ["id integer", "v integer", "w text"],
    ),
    "dropped": ([shape(2, "id integer", "w text")], ["id integer", "w text", "v integer"]),
    "dropped, then something else": (
        [shape(2, "id integer", "w text"), shape(3, "id bigint", "w text")],
        ["id integer", "w text", "v integer"],
    ),
    "renamed": ([shape(2, "id integer", "x integer", "w text")], ["id integer", "w text", "v integer"]),
    "type": ([shape(2, "id integer", "v text", "w text")], ["id integer", "v integer", "w text"]),
    "type, then another column": (
        [shape(2, "id integer", "v text", "w text"), shape(3, "id integer", "v text", "w text", "n date")],
        ["id integer", "v integer", "w text"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_destination_keeps_its_shape(name: str) -> None:
    shapes, expected = FROZEN[name]
    found = Evolution(ONE, ONE)
    for after in shapes:
        found = found.follow(after, lambda _: "freeze")
    assert [f"{column.name} {column.type}" for column in found.shown.columns] == expected
    assert found.raw == shapes[-1]
    assert not found.awaits


def test_an_evolving_destination_follows_and_a_frozen_part_stays_so() -> None:
    found = Evolution(ONE, ONE).follow(CHANGES["added"][0], lambda _: "freeze")
    last = shape(3, "id integer", "w text", "n date", "m date")
    found = found.follow(last, lambda _: "evolve")
    assert [column.name for column in found.shown.columns] == ["id", "w", "m"]
    assert [(judged.version, judged.kind, judged.action) for judged in found.judged] == [
        (2, "column_added", "freeze"), (3, "column_dropped", "evolve"), (3, "column_added", "evolve"),
    ]  # fmt: skip


def test_a_change_is_judged_once_and_waits_until_a_person_accepts_it() -> None:
    log: Any = MemoryLog("shop")
    actions = ["suspend"]
    evolutions = Evolutions(log, lambda _, __: actions[0])  # type: ignore[arg-type,return-value]
    evolutions.of([ONE], keep=True)
    after = CHANGES["dropped"][0]
    found, fresh = evolutions.of([after], keep=False)[T]
    assert found.awaits == "v dropped"
    assert evolutions.of([after], keep=True) == {T: (found, fresh)}, "who only looks leaves it to be judged"
    actions[0] = "evolve"
    again = Evolutions(log, lambda _, __: "evolve")
    assert again.of([after], keep=True) == {T: (found, ())}
    accept(log, [T, TableId("public", "other")])
    assert evolutions.reload()
    assert evolutions.of([after], keep=True)[T][0].awaits == ""
    assert not evolutions.reload()


def test_many_tables_are_noted_in_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    log: Any = MemoryLog("shop")
    written: list[str] = []
    write = log.set_note
    monkeypatch.setattr(log, "set_note", lambda key, text: (written.append(key), write(key, text)))
    shapes = [replace(ONE, table=TableId("public", f"t{i}")) for i in range(100)]
    evolutions = Evolutions(log, lambda _, __: "evolve")
    evolutions.of(shapes, keep=True)
    evolutions.of(shapes, keep=True)
    assert written == ["evolution"], "the note holds every table: a write for each would be quadratic"
    assert not evolutions.reload()
    assert Evolutions(log, lambda _, __: "evolve").of(shapes, keep=False).keys() == {s.table for s in shapes}


SOURCE = '[source.shop]\nurl = "postgresql://u@h/d"\n'


def project(folder: Path, text: str) -> Any:
    (folder / "headrace.toml").write_text(SOURCE + text)
    return load_project(folder).sources[0].schema_changes


def test_the_policy_is_read_and_the_pattern_that_fits_last_decides(tmp_path: Path) -> None:
    rules = project(
        tmp_path,
        '[source.shop.schema_changes]\ncolumn_added = "freeze"\n'
        '"public.order*" = { column_added = "suspend", key_changed = "suspend" }\n'
        '"public.orders_old" = { column_added = "evolve" }\n',
    )
    orders, old, other = (TableId("public", name) for name in ("orders", "orders_old", "other"))
    assert [action(rules, table, "column_added") for table in (orders, old, other)] == [
        "suspend", "evolve", "freeze",
    ]  # fmt: skip
    assert [action(rules, table, "key_changed") for table in (orders, other)] == ["suspend", "evolve"]


def test_what_is_wrong_with_a_policy_is_told_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        project(
            tmp_path,
            '[source.shop.schema_changes]\ncolumn_add = "freeze"\ncolumn_dropped = "ignore"\n'
            'key_changed = "freeze"\n"!public.a" = { column_added = "freeze" }\n"b.c" = "freeze"\n',
        )
    told = str(caught.value).splitlines()
    assert told == [
        'headrace.toml:4: [source.shop.schema_changes] column_add: unknown key; did you mean "column_added"?',
        'headrace.toml:5: [source.shop.schema_changes] column_dropped: "ignore" is not supported; it must be '
        '"evolve" or "freeze" or "suspend"',
        'headrace.toml:6: [source.shop.schema_changes] key_changed: "freeze" is not supported; it must be '
        '"evolve" or "suspend"',
        "headrace.toml:7: [source.shop.schema_changes] !public.a: a pattern of schema_changes cannot begin "
        "with !",
        "headrace.toml:8: [source.shop.schema_changes.b.c]: must be a table, not a string",
    ]
