"""Our log, and what others say happened: another decoder of the same WAL, and the tables' triggers."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import witness
from hypothesis import Phase, given, settings
from witness import Change, History, Told

from headrace.sources.postgres.connection import connect
from headrace.testing.postgres import PostgresServer

DEBIAN = Path("/usr/lib/postgresql/15/bin")
numbers = itertools.count()

# Not made smaller when one fails: each try takes a server half a second.
bounded = settings(
    max_examples=settings.default.max_examples // 5,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("pg"), 15, bin_folder=DEBIAN) as server:
        yield server


@pytest.fixture(scope="module", params=[16, 18])
def audited(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    settings = {"track_commit_timestamp": "on"}
    with PostgresServer(tmp_path_factory.mktemp("pg"), request.param, settings) as server:
        yield server


class Scene:
    """The tables of a history in a schema of its own, captured from their birth on."""

    def __init__(self, url: str, history: History, folder: Path) -> None:
        self.url, self.history = url, history
        self.schema = f"h{next(numbers)}"
        self.admin = connect(url)
        self.admin.execute(f"CREATE SCHEMA {self.schema}".encode())
        self.admin.execute(f"SET search_path = {self.schema}, pg_catalog".encode())
        for table in history.tables:
            self.admin.execute(table.definition().encode())
        tables = [f"{self.schema}.{table.name}" for table in history.tables]
        self.project = witness.project_of(folder, url, tables, self.schema)
        with witness.captured(self.project):
            pass

    def play(self) -> None:
        options = f"-c search_path={self.schema},pg_catalog -c lock_timeout=20ms -c TimeZone=UTC"
        sessions = [psycopg.connect(self.url, autocommit=True, options=options) for _ in range(2)]
        witness.play(self.history, sessions)
        for session in sessions:
            session.close()

    def close(self) -> None:
        self.admin.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active"
        )
        self.admin.execute(f"DROP PUBLICATION {self.schema}; DROP SCHEMA {self.schema} CASCADE".encode())
        self.admin.close()


# -- another decoder: test_decoding --------------------------------------------------------------------

CELL = re.compile(
    r""" ?(?:"((?:[^"]|"")+)"|([^\s"\[]+))\[(.+?)\]:(null|unchanged-toast-datum|B?'(?:[^']|'')*'|[^\s']+)""",
    re.DOTALL,
)


def cells_of(text: str) -> tuple[dict[str, str | None], frozenset[str]]:
    """Parse `name[type]:value …`; returns cells, and the names of those that are unchanged."""
    cells: dict[str, str | None] = {}
    unchanged = set()
    at = 0
    while at < len(text):
        found = CELL.match(text, at)
        assert found is not None, text[at:]
        at = found.end()
        name = found[1].replace('""', '"') if found[1] else found[2]
        value: str | None = found[4]
        assert value is not None
        if value == "unchanged-toast-datum":
            unchanged.add(name)
        if value in ("null", "unchanged-toast-datum"):
            value = None
        elif found[3] == "boolean":
            value = value[0]
        elif value.endswith("'"):
            value = value[value.index("'") + 1 : -1].replace("''", "'")
        cells[name] = value
    return cells, frozenset(unchanged)


def by_test_decoding(db: psycopg.Connection[Any], slot: str) -> list[Told]:
    found: list[Told] = []
    options = "'include-xids', '1', 'skip-empty-xacts', '1'"
    query = f"SELECT data FROM pg_logical_slot_get_changes(%s, NULL, NULL, {options})"
    for (line,) in db.execute(query.encode(), [slot]):
        kind, _, rest = line.partition(" ")
        if kind == "BEGIN":
            found.append(Told(int(rest), 0, []))
        elif kind == "table":
            found[-1].changes.append(change_of(rest))
    return [told for told in found if told.changes]


def change_of(text: str) -> Change:
    found = re.fullmatch(r"(.*?): (INSERT|UPDATE|DELETE|TRUNCATE):(.*)", text, re.DOTALL)
    assert found is not None
    names, op, rest = found.groups()
    tables = tuple(name.rpartition(".")[2] for name in names.split(", "))
    if op == "TRUNCATE":
        return Change(tables, "t")
    old, new = "", rest
    if op == "UPDATE" and rest.startswith(" old-key: "):
        old, _, new = rest.removeprefix(" old-key:").partition(" new-tuple:")
    cells, unchanged = cells_of(new)
    before = cells_of(old)[0] if old else None
    return Change(tables, op[0].lower().replace("i", "c"), cells, unchanged, before)


def told_alike(ours: Change, theirs: Change) -> None:
    """They leave out nulls of old rows, and we fill what is unchanged from an old row that tells it."""
    assert (sorted(ours.tables), ours.op) == (sorted(theirs.tables), theirs.op)
    filled = theirs.unchanged & (theirs.before or {}).keys()
    assert ours.unchanged == theirs.unchanged - filled
    if ours.op == "d":
        assert without_nulls(ours.cells) == theirs.cells
    else:
        assert ours.cells == {**theirs.cells, **{name: (theirs.before or {})[name] for name in filled}}
    assert without_nulls(ours.before) == theirs.before


def without_nulls(cells: dict[str, str | None] | None) -> dict[str, str | None] | None:
    return None if cells is None else {name: cell for name, cell in cells.items() if cell is not None}


@bounded
@given(witness.histories())
def test_another_decoder_tells_the_same(debian: PostgresServer, history: History) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(debian.url, history, Path(folder))
        try:
            scene.admin.execute(
                "SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", [f"w_{scene.schema}"]
            )
            scene.play()
            theirs = by_test_decoding(scene.admin, f"w_{scene.schema}")
            ours = witness.in_our_log(scene.project)
        finally:
            scene.close()
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert len(mine.changes) == len(other.changes)
        if any(change.op != "t" for change in mine.changes):
            assert mine.xid == other.xid
        for one, two in zip(mine.changes, other.changes, strict=True):
            told_alike(one, two)


# -- the tables' own triggers --------------------------------------------------------------------------

AUDIT = """
CREATE TABLE audit (seq bigserial PRIMARY KEY, xid bigint DEFAULT txid_current(), tbl text, op text,
  old jsonb, new jsonb)
"""


def audit(db: psycopg.Connection[Any], table: witness.Table) -> None:
    """Have the table write each of its changes down, every cell as text."""

    def cells(row: str) -> str:
        parts = ", ".join(
            f"'{name}', CASE WHEN num_nulls({row}.{witness.quoted(name)}) = 0 "
            f"THEN format('%s', {row}.{witness.quoted(name)}) END"
            for name in table.columns
        )
        return f"jsonb_build_object({parts})"

    def trigger(when: str, old: str, new: str) -> None:
        op = {"TRUNCATE": "t", "DELETE": "d", "UPDATE": "u", "INSERT": "c"}[when]
        level = "STATEMENT" if when == "TRUNCATE" else "ROW"
        function = f"{table.name}_{op}"
        db.execute(
            f"CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"INSERT INTO audit (tbl, op, old, new) VALUES ('{table.name}', '{op}', {old}, {new}); "
            f"RETURN NULL; END $$; CREATE TRIGGER {function} AFTER {when} ON {table.name} "
            f"FOR EACH {level} EXECUTE FUNCTION {function}()".encode()
        )

    trigger("INSERT", "NULL", cells("NEW"))
    trigger("UPDATE", cells("OLD"), cells("NEW"))
    trigger("DELETE", cells("OLD"), "NULL")
    trigger("TRUNCATE", "NULL", "NULL")


def by_audit(db: psycopg.Connection[Any]) -> list[Told]:
    """What the triggers wrote, transactions by the time of their commit."""
    found: dict[int, Told] = {}
    for xid, at, table, op, old, new in db.execute(
        "SELECT xid, (extract(epoch FROM pg_xact_commit_timestamp(xid::text::xid)) * 1000000)::bigint, "
        "tbl, op, old, new FROM audit ORDER BY seq"
    ):
        told = found.setdefault(xid, Told(xid, at, []))
        told.changes.append(Change((table,), op, new or {}, frozenset(), old))
    return sorted(found.values(), key=lambda told: told.committed_at)


def keyed_alike(ours: Change, theirs: Change, table: witness.Table) -> None:
    """The triggers know every cell of both rows; what we say must be so, and enough."""
    assert (ours.tables, ours.op) == (theirs.tables, theirs.op)
    old = theirs.before
    whole = table.identity == "FULL"
    if ours.op == "d":
        assert old is not None
        known = old if whole else {name: old[name] for name in table.keys}
        assert ours.cells == {name: known.get(name) for name in table.columns}
    elif ours.op != "t":
        for name, cell in theirs.cells.items():
            if name in ours.unchanged:
                assert old is not None
                assert ours.cells[name] is None
                assert cell == old[name], f"{name} is not unchanged"
            else:
                assert ours.cells[name] == cell
        assert ours.cells.keys() == theirs.cells.keys()
    if ours.op == "u":
        assert old is not None
        moved = any(old[name] != theirs.cells[name] for name in table.keys)
        assert not (moved or whole) or ours.before is not None, "the key that a row had is not known"
        told = ours.before or {}
        assert told == {name: old[name] for name in told}
        assert set(told) >= (set(table.columns) if whole else set(table.keys) if moved else set())


@bounded
@given(witness.histories())
def test_the_tables_own_triggers_tell_the_same(audited: PostgresServer, history: History) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(audited.url, history, Path(folder))
        try:
            scene.admin.execute(AUDIT.encode())
            for table in history.tables:
                audit(scene.admin, table)
            scene.play()
            theirs = by_audit(scene.admin)
            ours = witness.in_our_log(scene.project)
        finally:
            scene.close()
    tables = {table.name: table for table in history.tables}
    assert [told.committed_at for told in ours] == [told.committed_at for told in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        flat = [Change((t,), c.op, c.cells, c.unchanged, c.before) for c in mine.changes for t in c.tables]
        assert len(flat) == len(other.changes)
        if any(change.op != "t" for change in flat):
            assert mine.xid == other.xid
        for one, two in zip(flat, other.changes, strict=True):
            keyed_alike(one, two, tables[one.tables[0]])
