"""The tables that Headrace keeps in a destination, beside the data and in its transactions."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from headrace.errors import DestinationError

if TYPE_CHECKING:
    from headrace.destinations.session import Session

LEDGER_COUNTS = (
    "read",
    "applied",
    "superseded",
    "filtered",
    "quarantined",
    "waiting",
    "blocked",
    "warned",
    "nulled",
)

RECORD_COLUMNS = (
    "id, issue, source, model, table_name, stage, reason, columns, message, op, is_partial, key, epoch, "
    'commit, ordinal, txid, committed_at, "offset", preview, model_version, status, attempts, '
    "first_seen, last_attempt, blocked, key_is_masked, waiting_on, waiting_since, sqlstate, constraint_name, "
    "schema_version"
)

QUARANTINE = "headrace.quarantine"
JOINING = "headrace.joining"
"""Where open records are; and those of the tables that grow beside live ones."""

OPEN = "status IN ('quarantined', 'waiting', 'blocked')"

CREATE = """
CREATE SCHEMA IF NOT EXISTS headrace;
CREATE TABLE IF NOT EXISTS headrace.progress (
  source VARCHAR, log_id VARCHAR, "offset" BIGINT, hash VARCHAR,
  epoch BIGINT, commit BIGINT, committed_at BIGINT, applied_at TIMESTAMPTZ
);
CREATE TABLE IF NOT EXISTS headrace.models (
  model VARCHAR, source VARCHAR, version VARCHAR, state VARCHAR, reason VARCHAR, "offset" BIGINT,
  epoch BIGINT, commit BIGINT, committed_at BIGINT, open_records BIGINT, updated_at TIMESTAMPTZ
);
CREATE TABLE IF NOT EXISTS headrace.quarantine (
  id UUID, issue VARCHAR, source VARCHAR, model VARCHAR, table_name VARCHAR, stage VARCHAR,
  reason VARCHAR, columns VARCHAR, message VARCHAR, op VARCHAR, is_partial BOOLEAN, key VARCHAR,
  epoch BIGINT, commit BIGINT, ordinal BIGINT, txid BIGINT, committed_at TIMESTAMPTZ,
  "offset" BIGINT, preview VARCHAR, model_version VARCHAR, status VARCHAR, superseded_by BIGINT,
  attempts INTEGER, first_seen TIMESTAMPTZ, last_attempt TIMESTAMPTZ, resolution VARCHAR,
  resolved_at TIMESTAMPTZ, blocked BIGINT, key_is_masked BOOLEAN, waiting_on VARCHAR,
  waiting_since TIMESTAMPTZ, sqlstate VARCHAR, constraint_name VARCHAR, schema_version INTEGER, actor VARCHAR
);
CREATE TABLE IF NOT EXISTS headrace.joining AS SELECT * FROM headrace.quarantine WHERE false;
CREATE TABLE IF NOT EXISTS headrace.ledger (
  source VARCHAR, model VARCHAR, kind VARCHAR, "after" BIGINT, "through" BIGINT,
  read BIGINT, applied BIGINT, superseded BIGINT, filtered BIGINT, quarantined BIGINT,
  waiting BIGINT, blocked BIGINT, warned BIGINT, nulled BIGINT, model_version VARCHAR, recorded_at TIMESTAMPTZ
);
CREATE TABLE IF NOT EXISTS headrace.joins (
  model VARCHAR, source VARCHAR, version VARCHAR, "begin" BIGINT, "end" BIGINT, stands BIGINT,
  phase VARCHAR, "offset" BIGINT, target BIGINT, why VARCHAR
);
CREATE TABLE IF NOT EXISTS headrace.rebuilds (
  model VARCHAR, source VARCHAR, version VARCHAR, dry_run BOOLEAN, "offset" BIGINT, rows BIGINT,
  open_records BIGINT, added BIGINT, removed BIGINT, changed BIGINT, examples VARCHAR, rebuilt_at TIMESTAMPTZ
);
CREATE TABLE IF NOT EXISTS headrace.changes (name VARCHAR, changes BIGINT);
CREATE TABLE IF NOT EXISTS headrace.marts (
  mart VARCHAR, version VARCHAR, kind VARCHAR, state VARCHAR, reason VARCHAR, incomplete BOOLEAN,
  missing VARCHAR, positions VARCHAR, "rows" BIGINT, seconds DOUBLE PRECISION, made BOOLEAN,
  inputs VARCHAR, refreshed_at TIMESTAMPTZ
);
CREATE TABLE IF NOT EXISTS headrace.issues (
  issue VARCHAR, source VARCHAR, model VARCHAR, stage VARCHAR, reason VARCHAR, columns VARCHAR,
  constraint_name VARCHAR, message VARCHAR, state VARCHAR, records BIGINT, open BIGINT,
  first_seen TIMESTAMPTZ, last_seen TIMESTAMPTZ, first_version VARCHAR, last_version VARCHAR,
  resolved_version VARCHAR, resolved_at TIMESTAMPTZ, state_since TIMESTAMPTZ, window_began TIMESTAMPTZ,
  window_records BIGINT, actor VARCHAR, changed_at TIMESTAMPTZ
);
CREATE TABLE IF NOT EXISTS headrace.decided (model VARCHAR, "offset" BIGINT);
CREATE TABLE IF NOT EXISTS headrace.shapes (model VARCHAR, columns VARCHAR, numbered VARCHAR);
CREATE TABLE IF NOT EXISTS headrace.suspensions (
  model VARCHAR, suspended_by VARCHAR, state VARCHAR, suspended_at TIMESTAMPTZ
);
CREATE TABLE IF NOT EXISTS headrace.foreign_keys (
  model VARCHAR, source VARCHAR, name VARCHAR, "references" VARCHAR, definition VARCHAR,
  unchecked_since BIGINT, recorded_at TIMESTAMPTZ
);
"""


@cache
def _columns() -> dict[str, list[str]]:
    """Return the tables that `CREATE` makes, with the names of their columns."""
    import duckdb

    with duckdb.connect() as db:
        db.execute(CREATE)
        return dict(
            db.execute(
                "SELECT table_name, list(column_name ORDER BY ordinal_position) "
                "FROM information_schema.columns WHERE table_schema = 'headrace' GROUP BY table_name"
            ).fetchall()
        )


def refuse_other_version(db: Session, name: str, fresh: str) -> None:
    """Raise DestinationError for tables that another version of Headrace has made, with other columns."""
    for table, columns in sorted(_columns().items()):
        found = list(db.columns("headrace", table, hidden=True))
        if found != columns:
            lacks = [column for column in columns if column not in found]
            more = [column for column in found if column not in columns]
            differs = [f"lacks {', '.join(lacks)}"] * bool(lacks) + [f"has {', '.join(more)}"] * bool(more)
            what = " and ".join(differs) or "has its columns in another order"
            raise DestinationError(
                f"{name} was filled by another version of Headrace: headrace.{table} {what}.",
                f"Use that version, or {fresh} and let it be filled again from staging.",
            )
