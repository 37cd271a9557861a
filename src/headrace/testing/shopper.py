"""The kinds of transactions that the shop's workload commits."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, LiteralString

import psycopg
from psycopg.types.json import Jsonb

JUNK = ("ten percent", "N/A", "10%", "0,10", "", "see invoice")
"""What some customers typed as `orders.discount`, and no cast to a number accepts."""

JUNK_SHARE = 0.005
STATUSES = ("new", "paid", "packed", "shipped", "returned")
TAGS = ("sale", "new in", "fragile", "größe L", 'so "called"', "a,b", "{x}", "NULL", "")
CITIES = ("Lyon", "Zürich", "東京", "São Paulo", "O'Fallon", "Nul\\l", "Two\nLines", "🚰 Springs")

REMEMBERED = 5_000
"""How many of the newest orders the workload changes and deletes; older ones stay as they are."""

NEW_ORDER: LiteralString = """
INSERT INTO orders (customer_id, amount, discount, due, details) VALUES (%s, %s, %s, %s, %s) RETURNING id
"""
NEW_ITEMS: LiteralString = """
INSERT INTO order_items
SELECT %s, n, sku, quantity, price
FROM unnest(%s::text[], %s::int[], %s::numeric[]) WITH ORDINALITY i (sku, quantity, price, n)
"""


class Shopper:
    """The kinds of transactions, each a method that runs inside one; knows what there is to change.

    What it knows is read from the database at the start, so after any error a new one is made.
    """

    def __init__(self, conn: psycopg.Connection[Any], rng: random.Random) -> None:
        self.conn = conn
        self.rows = 0
        self.rolled_back = False
        self.new_order_id: int | None = None
        self._rng = rng
        self._customers = self._numbers("SELECT id FROM customers ORDER BY id")
        self._accounts = self._numbers("SELECT id FROM accounts ORDER BY id")
        self._orders = self._numbers(f"SELECT id FROM orders ORDER BY id DESC LIMIT {REMEMBERED}")[::-1]
        self._skus: list[str] = [row[0] for row in conn.execute("SELECT sku FROM products ORDER BY sku")]

    def begin(self) -> None:
        """Forget the last transaction's figures."""
        self.rows, self.rolled_back, self.new_order_id = 0, False, None

    def kinds(self) -> list[tuple[float, Callable[[], None]]]:
        """Return all kinds with their weights, which add up to about 100."""
        return [
            (36.0, self.order),
            (22.0, self.move_status),
            (12.0, self.transfer),
            (8.0, self.change_product),
            (7.0, self.change_customer),
            (4.0, self.delete_order),
            (2.5, self.roll_back),
            (2.5, self.roll_back_part),
            (2.0, self.touch_repeatedly),
            (1.5, self.new_customer),
            (1.5, self.renumber_items),
            (0.5, self.rewrite_description),
            (0.4, self.rename_product),
            (0.1, self.change_many),
        ]

    def small_kinds(self) -> list[tuple[float, Callable[[], None]]]:
        """Return the kinds of a few rows each."""
        return [(40.0, self.order), (30.0, self.move_status), (27.0, self.transfer), (3.0, self.delete_order)]

    def order(self) -> None:
        """Insert an order with one to four items."""
        self.new_order_id = self._insert_order()
        self._orders.append(self.new_order_id)
        if len(self._orders) > 2 * REMEMBERED:
            del self._orders[:REMEMBERED]

    def move_status(self) -> None:
        """Set an order's status, sometimes without its discount any more."""
        status = self._rng.choice(STATUSES)
        if self._rng.random() < 0.05:
            self._do(
                "UPDATE orders SET status = %s, discount = NULL WHERE id = %s",
                status,
                self._rng.choice(self._orders),
            )
        else:
            self._do("UPDATE orders SET status = %s WHERE id = %s", status, self._rng.choice(self._orders))

    def transfer(self) -> None:
        """Move money between two accounts; the sum over all stays."""
        giver, taker = self._rng.sample(self._accounts, 2)
        cents = Decimal(self._rng.randint(1, 5_000)) / 100
        self._do("UPDATE accounts SET balance = balance - %s WHERE id = %s", cents, giver)
        self._do("UPDATE accounts SET balance = balance + %s WHERE id = %s", cents, taker)

    def change_product(self) -> None:
        """Update price, tags and attributes: Postgres sends the long description as unchanged."""
        tags: list[str | None] = list(self._rng.sample(TAGS, self._rng.randint(0, 3)))
        if self._rng.random() < 0.1:
            tags.append(None)
        sql: LiteralString = """
            UPDATE products SET price = %s, tags = %s, attributes = %s, active = %s, updated_at = now()
            WHERE sku = %s"""
        self._do(
            sql,
            self._price(),
            tags,
            self._json(),
            self._rng.random() < 0.9,
            self._rng.choice(self._skus),
        )

    def change_customer(self) -> None:
        """Update a customer's city, preferences and standing."""
        self._do(
            "UPDATE customers SET city = %s, preferences = %s, vip = %s WHERE id = %s",
            self._rng.choice((*CITIES, None)),
            self._json(),
            self._rng.random() < 0.1,
            self._rng.choice(self._customers),
        )

    def new_customer(self) -> None:
        """Insert a customer and an order."""
        mail = f"{self._rng.getrandbits(48):x}@example.com"
        born = date(1950, 1, 1) + timedelta(days=self._rng.randrange(20_000))
        sql: LiteralString = "INSERT INTO customers (email, name, born) VALUES (%s, %s, %s) RETURNING id"
        self._customers.append(self._do_returning(sql, mail, f"New {mail}", born))
        self.order()

    def delete_order(self) -> None:
        """Delete an order with its items."""
        if len(self._orders) < 50:
            return self.order()
        # The last takes the gap: the list's order does not matter.
        place = self._rng.randrange(len(self._orders))
        gone, self._orders[place] = self._orders[place], self._orders[-1]
        self._orders.pop()
        self._do("DELETE FROM order_items WHERE order_id = %s", gone)
        return self._do("DELETE FROM orders WHERE id = %s", gone)

    def renumber_items(self) -> None:
        """Change the keys of an order's items, to and fro."""
        sql: LiteralString = "UPDATE order_items SET line = (line + 10) %% 20 WHERE order_id = %s"
        self._do(sql, self._rng.choice(self._orders))

    def rename_product(self) -> None:
        """Change a product's key, and the items that name it."""
        place = self._rng.randrange(len(self._skus))
        old = self._skus[place]
        new = f"{old[:10]}-{self._rng.getrandbits(40):010x}"
        self._skus[place] = new
        self._do("UPDATE products SET sku = %s, updated_at = now() WHERE sku = %s", new, old)
        self._do("UPDATE order_items SET sku = %s WHERE sku = %s", new, old)

    def rewrite_description(self) -> None:
        """Give a product a new long text."""
        text = base64.b64encode(self._rng.randbytes(self._rng.randint(6_200, 9_000))).decode()
        self._do("UPDATE products SET description = %s WHERE sku = %s", text, self._rng.choice(self._skus))

    def roll_back(self) -> None:
        """Insert an order and take it all back."""
        self._insert_order()
        self.rolled_back = True
        raise psycopg.Rollback

    def roll_back_part(self) -> None:
        """Insert an order, undo changes after a savepoint, and commit."""
        self.order()
        kept = self.rows
        with self.conn.transaction():
            self.move_status()
            self._insert_order()
            raise psycopg.Rollback
        self.rows = kept
        self.transfer()

    def touch_repeatedly(self) -> None:
        """Change one order several times in a transaction; or insert, change and delete one."""
        if self._rng.random() < 0.3:
            fleeting = self._insert_order()
            self._do("UPDATE orders SET amount = amount + 1 WHERE id = %s", fleeting)
            self._do("DELETE FROM order_items WHERE order_id = %s", fleeting)
            return self._do("DELETE FROM orders WHERE id = %s", fleeting)
        touched = self._rng.choice(self._orders)
        for status in self._rng.sample(STATUSES, 3):
            self._do(
                "UPDATE orders SET status = %s, amount = %s WHERE id = %s", status, self._price(), touched
            )
        return None

    def change_many(self) -> None:
        """Update about 200 orders at once."""
        chosen = self._rng.sample(self._orders, min(200, len(self._orders)))
        self._do("UPDATE orders SET status = 'shipped', due = current_date WHERE id = ANY(%s)", chosen)

    def _insert_order(self) -> int:
        lines = self._rng.randint(1, 4)
        skus = self._rng.choices(self._skus, k=lines)
        quantities = [self._rng.randint(1, 9) for _ in skus]
        prices = [self._price() for _ in skus]
        amount = sum((q * p for q, p in zip(quantities, prices, strict=True)), Decimal())
        due = datetime.now(UTC).date() + timedelta(days=self._rng.randint(1, 30))
        number = self._do_returning(
            NEW_ORDER, self._rng.choice(self._customers), amount, self._discount(), due, self._json()
        )
        self._do(NEW_ITEMS, number, skus, quantities, prices)
        return number

    def _discount(self) -> str | None:
        if self._rng.random() < JUNK_SHARE:
            return self._rng.choice(JUNK)
        return f"{self._rng.randint(0, 30) / 100:.2f}" if self._rng.random() < 0.7 else None

    def _price(self) -> Decimal:
        return Decimal(self._rng.randint(1, 99_999)) / 100

    def _json(self) -> Jsonb | None:
        if self._rng.random() < 0.3:
            return None
        return Jsonb(
            {"channel": self._rng.choice(("web", "télé", "shop")), "score": self._rng.randint(0, 999) / 8}
        )

    def _do(self, sql: LiteralString, *values: object) -> None:
        self.rows += self.conn.execute(sql, values).rowcount

    def _do_returning(self, sql: LiteralString, *values: object) -> int:
        row = self.conn.execute(sql, values).fetchone()
        assert row is not None
        self.rows += 1
        return int(row[0])

    def _numbers(self, sql: str) -> list[int]:
        return [row[0] for row in self.conn.execute(sql.encode())]
