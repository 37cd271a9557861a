"""The issues of a destination: one for each cause of records, counted in the transactions of the records.

Counts move with each statement that changes records; an issue's state is settled once, at the transaction's
end, so that what closes and opens in one transaction changes nothing. The first that fits:

- `resolved`: no record of it is open.
- `regressed`: it was resolved, and a new record came of the model version that resolved it, or of one that
  was first seen later. Of an earlier version, late data say, it is `ongoing`.
- what it was, where no new record came.
- `escalating`: in its newest window, of an hour, came more than ten times as many records as in an hour of
  before, on the mean, of which there has to be one at least.
- `archived`: a person has put it aside.
- `new`, `regressed`: for an hour.
- `ongoing`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.destinations.session import Session
from headrace.destinations.tables import QUARANTINE
from headrace.errors import UserError
from headrace.keys import literal

if TYPE_CHECKING:
    import pyarrow as pa

ESCALATION = 10
"""How many times its mean of before a rate is when an issue escalates, and the records it takes at least."""

_COUNTED = "('quarantined', 'blocked', 'redriving')"
"""What is open of an issue: what only waits is no failure."""

_WINDOW = "INTERVAL '1' HOUR"
_HOURS = "greatest(1, extract(epoch FROM window_began - first_seen) / 3600)"
_ESCALATES = (
    f"(window_records >= {ESCALATION} AND window_began >= first_seen + {_WINDOW} "
    f"AND window_records > {ESCALATION} * (records - window_records) / {_HOURS})"
)
_COLUMNS = (
    "issue, source, model, stage, reason, columns, constraint_name, message, state, records, open, "
    "first_seen, last_seen, first_version, last_version, resolved_version, resolved_at, state_since, "
    "window_began, window_records, actor, changed_at"
)


def count_opening(db: Session, version: str, incoming: str) -> None:
    """Count the records of the relation `incoming`, before they take the place of those of the same id."""
    is_open = f"q.status IN {_COUNTED}"
    db.keep(
        "_hr_moved",
        f"""SELECT issue, sum(came)::BIGINT AS came, sum(opened)::BIGINT AS opened FROM (
          SELECT r.issue, CASE WHEN q.issue = r.issue THEN 0 ELSE 1 END AS came,
            CASE WHEN {is_open} AND q.issue = r.issue THEN 0 ELSE 1 END AS opened
          FROM {incoming} r LEFT JOIN {QUARANTINE} q ON q.id = r.id WHERE r.status IN {_COUNTED}
          UNION ALL SELECT q.issue, 0, -1 FROM {incoming} r JOIN {QUARANTINE} q ON q.id = r.id
          WHERE {is_open} AND (q.issue <> r.issue OR r.status NOT IN {_COUNTED})
        ) m GROUP BY issue HAVING sum(came) <> 0 OR sum(opened) <> 0""",
    )
    # Before those that are new, of which every count is right already.
    _move(db, literal(version))
    what = ("source", "model", "stage", "reason", "columns", "constraint_name", "message")
    db.execute(
        f"""INSERT INTO headrace.issues ({_COLUMNS})
        SELECT m.issue, {", ".join(f"r.{name}" for name in what)}, 'new', came, opened, now(), now(),
          {literal(version)}, {literal(version)}, NULL, NULL, now(), now(), came, NULL, now()
        FROM _hr_moved m JOIN (
          SELECT issue, {", ".join(f"min({name}) AS {name}" for name in what)} FROM {incoming} GROUP BY issue
        ) r ON r.issue = m.issue WHERE m.issue NOT IN (SELECT issue FROM headrace.issues)"""
    )
    db.counts_issues = True


def count_closing(
    db: Session, condition: str, version: str | None = None, given: pa.Table | None = None
) -> None:
    """Count the open records that meet a condition, before they are closed, under a model version; None for
    the one that the model stands at."""
    db.keep(
        "_hr_moved",
        f"SELECT issue, 0::BIGINT AS came, -count(*)::BIGINT AS opened FROM {QUARANTINE} "
        f"WHERE status IN {_COUNTED} AND ({condition}) GROUP BY issue",
        given,
    )
    stands = "(SELECT max(version) FROM headrace.models s WHERE s.model = i.model)"
    _move(db, f"coalesce({stands}, i.last_version)" if version is None else literal(version))
    db.counts_issues = True


def _move(db: Session, version: str) -> None:
    is_over = f"(came > 0 AND now() >= window_began + {_WINDOW})"
    db.execute(
        f"""UPDATE headrace.issues AS i SET records = records + came, open = open + opened,
          last_seen = CASE WHEN came > 0 THEN now() ELSE last_seen END, last_version = {version},
          window_began = CASE WHEN {is_over} THEN now() ELSE window_began END,
          window_records = CASE WHEN {is_over} THEN came ELSE window_records + came END, changed_at = now()
        FROM _hr_moved m WHERE m.issue = i.issue"""
    )


def settle(db: Session) -> None:
    """Give each issue that was counted in this transaction the state that its counts come to."""
    is_later = """(last_version = resolved_version OR coalesce((SELECT min(l.recorded_at)
      FROM headrace.ledger l WHERE l.model = i.model AND l.model_version = i.last_version), now())
      >= resolved_at)"""
    is_young = f"state IN ('new', 'regressed') AND now() < state_since + {_WINDOW}"
    state = f"""CASE WHEN open <= 0 THEN 'resolved'
      WHEN state = 'resolved' THEN CASE WHEN last_seen = now() AND {is_later} THEN 'regressed'
        ELSE 'ongoing' END
      WHEN last_seen < now() THEN state WHEN {_ESCALATES} THEN 'escalating'
      WHEN state = 'archived' OR {is_young} THEN state ELSE 'ongoing' END"""
    db.keep(
        "_hr_states",
        f"SELECT issue, {state} AS state FROM headrace.issues AS i WHERE changed_at = now()",
    )
    db.execute(
        """UPDATE headrace.issues AS i SET state = s.state, state_since = now(),
          resolved_at = CASE WHEN s.state = 'resolved' THEN now() ELSE resolved_at END,
          resolved_version = CASE WHEN s.state = 'resolved' THEN last_version ELSE resolved_version END
        FROM _hr_states s WHERE s.issue = i.issue AND s.state <> i.state"""
    )


def archive(db: Session, issue: str, actor: str) -> None:
    """Put an issue aside until it escalates, is resolved, or comes again. Raises UserError for one that is
    not there, or that is resolved."""
    known = db.execute("SELECT state FROM headrace.issues WHERE issue = $1", [issue])
    if not known or known == [("resolved",)]:
        what = "is resolved" if known else "is not there"
        raise UserError(f"Issue {issue} {what}.", "`headrace quarantine issues` lists them.")
    db.execute(
        "UPDATE headrace.issues SET state = 'archived', state_since = now(), actor = $1 "
        "WHERE issue = $2 AND state <> 'archived'",
        [actor, issue],
    )
