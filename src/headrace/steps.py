"""From the steps of source keys to what a table keeps of each: the versions of a row, or every change.

A **step** is what one change says of one source key: a row, or that the row is gone. Steps are judged, and
made into versions, as sets, by SQL that every engine has: in a destination on top of what stands there, and
over whole histories on top of nothing.

- Of several steps of a key in one source transaction a history takes the last: the others were never seen.
- The first bad step of a key blocks those that follow it, in later slices too: they wait for a redrive.
- A version begins where a key's state is another than before. Its time is the commit time of that step, but
  never before the last time that stands for the key: commit times need not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from headrace.keys import literal, quoted

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = {
    "_source_key": "VARCHAR",
    "_epoch": "BIGINT",
    "_commit": "BIGINT",
    "_ordinal": "BIGINT",
    "_moment": "TIMESTAMP WITH TIME ZONE",
    "_what": "VARCHAR",
    "_own": "BOOLEAN",
}
"""Of a relation of steps, besides the model's outputs: the key, the place and the commit time of the change,
whether it is the key that the change is counted under, and what it says:

- `row`: the outputs are the row.     - `bad`: there is a row, and the model cannot take it.
- `gone`, `filtered`: there is none.  - `deleted`: there is none, and the outputs tell of it.
- `over`: nothing, since a later step of the transaction counts.     - `same`: nothing new.
- `truncate`: all rows are gone; it has no key.
"""


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of some changes, and what is made of them. `table` has `COLUMNS` and the outputs."""

    makes: Literal["history", "append"]
    table: pa.Table

    @property
    def outputs(self) -> list[str]:
        """The names of the output columns."""
        return [name for name in self.table.column_names if name not in COLUMNS]


@dataclass(frozen=True, slots=True)
class Standing:
    """What stands already: the rows of `source` in `table`; keys with an open record are in the query `open`.

    `same_key` is the engine's condition that a key of the table is another key.
    """

    table: str
    source: str
    open: str
    same_key: Callable[[str, str], str]

    @property
    def rows(self) -> str:
        """The rows, as a relation."""
        return f"(SELECT * FROM {self.table} WHERE _source = {literal(self.source)})"


Keep = Callable[[str, str], None]
"""Keeps what a query returns as a temporary relation of a name."""

_PLACE = "_epoch, _commit, _ordinal"


def judge(keep: Keep, makes: str, steps: str, standing: Standing | None, *, truncated: bool) -> None:
    """Judge the steps of the relation `steps`: makes `_hr_judged` with their key `k`, their place in order
    `n`, and `outcome`: applied, superseded, filtered, quarantined or blocked. Truncates are steps of every
    key."""
    keep(
        "_hr_numbered",
        f"SELECT _source_key AS k, dense_rank() OVER (ORDER BY {_PLACE}) AS n, {_PLACE}, _moment AS moment, "
        f"_what AS what, _own AS own FROM {steps}",
    )
    if truncated and makes == "history":
        keep("_hr_truncates", f"SELECT n, {_PLACE}, moment FROM _hr_numbered WHERE what = 'truncate'")
        there = f"UNION SELECT _source_key FROM {standing.rows} t WHERE is_current" if standing else ""
        # Of each key the first truncate behind each of its steps, and the first of all.
        keep(
            "_hr_cleared",
            f"""SELECT DISTINCT x.k, t.n, {_PLACE}, t.moment, 'gone' AS what, false AS own FROM (
              SELECT s.k, (SELECT min(t.n) FROM _hr_truncates t WHERE t.n > s.n) AS n
              FROM _hr_numbered s WHERE s.k IS NOT NULL
              UNION ALL SELECT a.k, (SELECT min(n) FROM _hr_truncates)
              FROM (SELECT k FROM _hr_numbered WHERE k IS NOT NULL {there}) a
            ) x JOIN _hr_truncates t ON t.n = x.n""",
        )
        keep("_hr_keyed", "SELECT * FROM _hr_numbered UNION ALL SELECT * FROM _hr_cleared")
    else:
        keep("_hr_keyed", "SELECT * FROM _hr_numbered")
    # Two copies under one commit have a row at one place.
    order = "n DESC, CASE WHEN what = 'over' THEN 1 ELSE 0 END"
    last = f"row_number() OVER (PARTITION BY k, {_PLACE.rpartition(',')[0]} ORDER BY {order}) = 1"
    is_open = f"k IN ({standing.open})" if standing else "false"
    keep(
        "_hr_judged",
        f"""SELECT *, CASE WHEN NOT last OR what IN ('over', 'same') THEN 'superseded'
          WHEN is_open OR n > first_bad THEN 'blocked' WHEN what = 'bad' THEN 'quarantined'
          WHEN what = 'filtered' THEN 'filtered' ELSE 'applied' END AS outcome
        FROM (SELECT *, min(CASE WHEN last AND what = 'bad' THEN n END) OVER (PARTITION BY k) AS first_bad
          FROM (SELECT *, {last if makes == "history" else "true"} AS last, {is_open} AS is_open
            FROM _hr_keyed WHERE k IS NOT NULL) a) b""",
    )


def make_versions(keep: Keep, steps: str, standing: Standing | None, fingerprints: Sequence[str]) -> None:
    """Make versions of what was judged: `_hr_versions` with key `k`, place `n`, `since` and `until` (null
    while it is current), and whether it `is_row`; those with n = 0 stand already.

    `fingerprints` are two numbers over the outputs that are equal where the rows are.
    """
    first, second = fingerprints
    counts = "j.outcome IN ('applied', 'filtered')"
    there = ""
    if standing:
        there = f"""UNION ALL SELECT t._source_key, 0, NULL, NULL, NULL,
          max(coalesce(valid_to, valid_from)), max(CASE WHEN is_current THEN {first} END),
          max(CASE WHEN is_current THEN {second} END), bool_or(is_current)
        FROM {standing.rows} t JOIN (SELECT DISTINCT k AS _hr_k FROM _hr_judged j WHERE {counts}) s
        ON {standing.same_key("t._source_key", "s._hr_k")} GROUP BY t._source_key"""
    keep(
        "_hr_states",
        f"""SELECT j.k, j.n, j._epoch, j._commit, j._ordinal, j.moment, s.h0, s.h1, j.what = 'row' AS is_row
        FROM _hr_judged j LEFT JOIN (
          SELECT _source_key, {_PLACE}, {first} AS h0, {second} AS h1 FROM {steps} WHERE _what = 'row'
        ) s ON {_same("j", "s")} AND j.what = 'row' WHERE {counts} {there}""",
    )
    keep(
        "_hr_versions",
        """SELECT *, lead(since) OVER (PARTITION BY k ORDER BY n) AS until FROM (
          SELECT *, max(moment) OVER (PARTITION BY k ORDER BY n) AS since FROM (
            SELECT *, lag(h0) OVER w AS p0, lag(h1) OVER w AS p1, coalesce(lag(is_row) OVER w, false) AS was
            FROM _hr_states WINDOW w AS (PARTITION BY k ORDER BY n)
          ) a WHERE n = 0 OR is_row <> was OR (is_row AND (h0 <> p0 OR h1 <> p1))) b""",
    )


def _same(judged: str, steps: str) -> str:
    places = (f"{judged}.{name} = {steps}.{name}" for name in _PLACE.split(", "))
    return " AND ".join([f"{judged}.k = {steps}._source_key", *places])


def made_rows(makes: str, steps: str, outputs: Sequence[str], standing: Standing | None) -> str:
    """Return the query of the rows that come: `_source_key`, the outputs, and the columns of the kind."""
    cells = ", ".join(f"s.{quoted(name)}" for name in outputs)
    of_steps = f"(SELECT * FROM {steps} WHERE _what IN ('row', 'deleted')) s"
    if makes == "history":
        return (
            f"SELECT s._source_key, {cells}, v.since AS valid_from, v.until AS valid_to, "
            f"v.until IS NULL AS is_current FROM _hr_versions v JOIN {of_steps} ON {_same('v', 's')} "
            "WHERE v.n > 0 AND v.is_row"
        )
    # A delete tells of a row that there was.
    was, known = "j.first_row < j.n", ""
    if standing:
        known = (
            f"LEFT JOIN (SELECT DISTINCT d.k FROM {standing.rows} t JOIN (SELECT DISTINCT k FROM _hr_judged "
            f"WHERE what = 'deleted') d ON {standing.same_key('t._source_key', 'd.k')}) w ON w.k = j.k"
        )
        was += " OR w.k IS NOT NULL"
    return (
        f"SELECT s._source_key, {cells}, j._epoch, j._commit, j._ordinal FROM (SELECT *, "
        "min(CASE WHEN what = 'row' AND outcome = 'applied' THEN n END) OVER (PARTITION BY k) AS first_row "
        f"FROM _hr_judged) j JOIN {of_steps} ON {_same('j', 's')} AND s._what = j.what {known} "
        f"WHERE j.outcome = 'applied' AND (j.what = 'row' OR {was}) ORDER BY j.n"
    )
