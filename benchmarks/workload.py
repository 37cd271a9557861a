"""The workloads: one table of orders, and ways to change it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from rig import Rig

TRANSACTION = 50
_INSERTS, _UPDATES_OLD, _UPDATES_NEW, _DELETES = 17, 20, 5, 8  # changes of each mixed transaction

_TABLE = """CREATE TABLE orders (id bigserial PRIMARY KEY, customer_id int, status text,
amount numeric(12,2), note text, placed_at timestamptz DEFAULT now())"""
_ROWS = """INSERT INTO orders (customer_id, status, amount, note) SELECT g % 1000, 'paid',
(g % 100000) / 7.0, 'note for order number ' || g FROM generate_series(1, {}) g"""
_INSERT = f"""CREATE PROCEDURE insert_small(n int) LANGUAGE plpgsql AS $$ BEGIN FOR i IN 1..n LOOP
{_ROWS.format(TRANSACTION)}; COMMIT; END LOOP; END $$"""
# Old rows are deleted from the lowest key up, those above are updated in scattered order, and so are
# some that were just inserted: every statement finds all its rows, so the number of changes is exact.
_MIXED = f"""CREATE PROCEDURE mix(n int, keys int) LANGUAGE plpgsql AS $$
DECLARE gone int := n * {_DELETES}; fresh bigint;
BEGIN
  FOR i IN 1..n LOOP
    fresh := keys + (i - 1) * {_INSERTS};
    INSERT INTO orders (id, customer_id, status, amount, note) SELECT fresh + g, g % 1000, 'new',
      (i % 1000) / 7.0, 'note for new order ' || g FROM generate_series(1, {_INSERTS}) g;
    UPDATE orders SET status = 'shipped', amount = amount + 1, note = 'shipped in ' || i WHERE id = ANY (
      SELECT gone + 1 + ((i * {_UPDATES_OLD} + g)::bigint * 7919) % (keys - gone)
      FROM generate_series(1, {_UPDATES_OLD}) g);
    UPDATE orders SET status = 'paid', amount = amount + 2
      WHERE id BETWEEN fresh + 1 AND fresh + {_UPDATES_NEW};
    DELETE FROM orders WHERE id BETWEEN (i - 1) * {_DELETES} + 1 AND i * {_DELETES};
    COMMIT;
  END LOOP;
END $$"""
SUMMARY = (
    "count(*), coalesce(md5(string_agg(concat_ws('|', id, customer_id, status, amount, note), ',' "
    "ORDER BY id)), '')"
)
"""Number of rows and checksum of all columns but the time, in the words of both Postgres and DuckDB."""


def create(rig: Rig) -> None:
    """Make the empty table, and what writes to it."""
    for statement in (_TABLE, _INSERT, _MIXED):
        rig.db.execute(statement)


def insert_small(rig: Rig, rows: int) -> None:
    """Insert rows in transactions of 50."""
    rig.db.execute("CALL insert_small(%s)", [rows // TRANSACTION])


def insert_big(rig: Rig, rows: int) -> None:
    """Insert rows in one transaction."""
    rig.db.execute(_ROWS.format(rows))


def mix(rig: Rig, changes: int, keys: int) -> None:
    """Change a table of `keys` rows: 34 % inserts, 50 % updates, 16 % deletes, 50 to a transaction."""
    transactions = changes // TRANSACTION
    assert transactions * _DELETES < keys // 2, "there must be rows left to update"
    rig.db.execute("CALL mix(%s, %s)", [transactions, keys])


@contextmanager
def left_open(rig: Rig) -> Iterator[None]:
    """Hold a transaction open that has written, to a table that nobody captures: the slot's
    restart_lsn stays behind it."""
    rig.db.execute("CREATE SCHEMA IF NOT EXISTS aside")
    rig.db.execute("CREATE TABLE IF NOT EXISTS aside.held (n int)")
    with psycopg.connect(rig.server.url) as holder:
        holder.execute("INSERT INTO aside.held VALUES (1)")
        yield
        holder.rollback()
