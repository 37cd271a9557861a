"""A lane over tables that refer to each other, whose log a test writes itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entries import rows as entry
from entries import schema, truncate
from headrace.change import Column, CopyMark, Entry, Position, TableId, TableSchema
from headrace.config import load_project
from headrace.lane import Lane
from headrace.pipeline import open_lanes
from headrace.verify import verify_destination

Row = tuple[str, str, str, Mapping[str, str | None]]
"""Operation, table, key, and the other cells; with `before` the key that the row had."""


def shape_of(table: str, *columns: str, key: Sequence[str] = ("id",)) -> TableSchema:
    cells = [Column(name, "bigint" if name.endswith("id") else "text") for name in (*key, *columns)]
    return TableSchema(TableId("public", table), tuple(cells), tuple(key), 1)


def put(table: str, key: str, **cells: str | None) -> Row:
    return ("u", table, key, cells)


def gone(table: str, key: str) -> Row:
    return ("d", table, key, {})


class Family:
    """A source's log, its staging, its models (by name, or by file name those of Python) and its destination;
    no source."""

    def __init__(
        self, folder: Path, shapes: Sequence[TableSchema], models: Mapping[str, str], more: str = ""
    ) -> None:
        self.folder = folder
        self.shapes = {shape.table.name: shape for shape in shapes}
        (folder / "models").mkdir()
        url = '[source.shop]\nurl = "postgresql://nobody@127.0.0.1:1/x"\n'
        (folder / "headrace.toml").write_text(url + more)
        (folder / ".headrace" / "log").mkdir(parents=True)
        for name, text in models.items():
            (folder / "models" / (name if name.endswith(".py") else f"{name}.sql")).write_text(text)
        self.commit = 10
        self.lane = self.open()
        for shape in shapes:
            self.copied(shape.table.name)

    def open(self) -> Lane:
        (lane,) = open_lanes(load_project(self.folder))
        return lane

    def reopen(self) -> None:
        self.lane.close()
        self.lane = self.open()

    def copied(self, table: str, *rows: Row) -> None:
        """Capture a copy of a table: whole, of these rows."""
        shape, at = self.shapes[table], Position(0, 1, 0)
        marks = [
            CopyMark("begin", shape),
            CopyMark("chunk", rows=len(rows)),
            CopyMark("end", floor=1, ceiling=1),
        ]
        for mark in marks:
            entries = [Entry("marker", shape.table, at, at, 1, 0, 1, mark.to_json().encode())]
            if mark.kind == "chunk" and rows:
                made = [("r", 1, n, self._cells(row)) for n, row in enumerate(rows, 1)]
                entries.insert(0, entry(shape, made, "copy"))
            self.lane.log.append(entries)

    def _cells(self, row: Row) -> tuple[str | None, ...]:
        shape, (_, _, key, cells) = self.shapes[row[1]], row
        keys = key.split(",")
        return tuple(
            keys[shape.key.index(column.name)] if column.name in shape.key else cells.get(column.name)
            for column in shape.columns
        )

    def commits(self, *rows: Row) -> None:
        """Commit a transaction at the source, and capture it."""
        self.commit += 1
        entries = []
        for ordinal, row in enumerate(rows, 1):
            op, table, _, cells = row
            shape = self.shapes[table]
            if op == "t":
                entries.append(truncate(shape, self.commit, ordinal))
                continue
            before = {"id": cells["before"]} if "before" in cells else None
            entries.append(entry(shape, [(op, self.commit, ordinal, self._cells(row), None, before)]))
        self.lane.log.append(entries)

    def becomes(self, shape: TableSchema) -> None:
        """Have the source say that a table looks otherwise from here on."""
        self.commit += 1
        self.shapes[shape.table.name] = shape
        self.lane.log.append([schema(self.commit, shape)])

    def load(self) -> None:
        while self.lane.load():
            pass

    def bring(self) -> None:
        self.load()
        while self.lane.apply():
            pass

    def takes(self, *rows: Row) -> None:
        """Commit a transaction at the source, and bring it to the destination."""
        self.commits(*rows)
        self.bring()

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        (table,) = self.lane.destination.read([query])
        return sorted(tuple(row.values()) for row in table.to_pylist())

    def keys(self, model: str) -> list[str]:
        table = self.lane.destination.table_of(model)
        return [key for (key,) in self.ask(f"SELECT _source_key FROM {table}")]

    def opened(self) -> list[tuple[str, str, str]]:
        """Return model, key and status of the open records."""
        return self.ask(
            "SELECT model, key, status FROM headrace.quarantine "
            "WHERE status IN ('quarantined', 'waiting', 'blocked')"
        )

    def verified(self) -> None:
        findings = verify_destination(load_project(self.folder), "shop")
        assert all(finding.ok for finding in findings), [each for each in findings if not each.ok]
