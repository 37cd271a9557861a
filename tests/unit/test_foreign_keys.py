"""Foreign keys between models: what refers to a row that is not there waits for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from family import Family, gone, put, shape_of

CUSTOMERS = shape_of("customers", "name")
ORDERS = shape_of("orders", "customer_id", "amount")
ORDERS_SQL = """/* headrace
key = ["order_id"]
orphan_after = "{after}"
[[foreign_key]]
columns = ["customer_id"]
references = "shop.customers"
*/
SELECT id::BIGINT AS order_id, customer_id::BIGINT AS customer_id, amount::INTEGER AS amount
FROM raw.shop.orders"""


@pytest.fixture
def shop(tmp_path: Path) -> Family:
    family = Family(tmp_path, [CUSTOMERS, ORDERS], {"orders": ORDERS_SQL.format(after="15m")})
    family.bring()
    return family


def order(key: str, customer: str | None, amount: str = "1") -> tuple:
    return put("orders", key, customer_id=customer, amount=amount)


def test_a_child_waits_for_its_parent(shop: Family) -> None:
    shop.takes(order("1", "7"), order("2", None))
    assert shop.keys("orders") == ["2"]
    assert shop.opened() == [("orders", "1", "waiting")]
    (record,) = shop.ask("SELECT stage, reason, columns, message, waiting_on FROM headrace.quarantine")
    assert record == (
        "constraint",
        "constraint.foreign_key",
        "customer_id",
        "customer_id: shop.customers has no such row",
        '{"constraint":"customer_id_fkey","model":"shop.customers","columns":["id"],"values":["7"],"key":"7"}',
    )
    shop.verified()
    shop.takes(put("customers", "7", name="Ada"))
    assert shop.keys("orders") == ["1", "2"]
    assert shop.opened() == []
    shop.verified()


def test_a_parent_that_goes_takes_no_row_for_granted(shop: Family) -> None:
    shop.takes(put("customers", "7", name="Ada"), order("1", "7"), order("2", "7", "5"))
    shop.takes(order("2", "7", "6"))
    shop.takes(gone("customers", "7"))
    assert (shop.keys("orders"), len(shop.opened())) == ([], 3)
    shop.verified()
    shop.takes(put("customers", "7", name="Eve"))
    assert (shop.keys("orders"), shop.opened()) == (["1", "2"], [])
    shop.verified()
    # In the source's own order nothing waits.
    shop.takes(gone("orders", "1"), gone("orders", "2"), gone("customers", "7"))
    assert (shop.keys("orders"), shop.opened()) == ([], [])
    shop.verified()
