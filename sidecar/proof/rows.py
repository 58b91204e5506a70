"""What one row of the tables posts, computed from the row's own columns by design.md's table of postings.

Written down a second time on purpose: a proof that used the ledger's fold would share its mistakes.
"""

from __future__ import annotations

from typing import Any, Final

from sidecar.batch import LEDGER_COLUMNS, TRADE_COLUMNS
from sidecar.symbols import Symbol

Row = tuple[Any, ...]
AccountKey = tuple[int, int]  # (user_id, asset_id)

# Places of the columns that are used more than once, by name.
PAGE, TRADE_ID, STREAM, SEQUENCE = (TRADE_COLUMNS.index(n) for n in ("page", "trade_id", "stream", "output_sequence"))
BUYER, SELLER, BASE, QUOTE = (
    TRADE_COLUMNS.index(name) for name in ("buyer_user_id", "seller_user_id", "base_asset", "quote_asset")
)
QUANTITY, QUOTE_AMOUNT, BUYER_FEE, SELLER_FEE = (
    TRADE_COLUMNS.index(name) for name in ("quantity", "quote_amount", "buyer_fee", "seller_fee")
)
SETTLED_AT, TS_US = TRADE_COLUMNS.index("settled_at"), TRADE_COLUMNS.index("ts_us")
LEDGER_PAGE, LEDGER_SEQUENCE, EVENT_TYPE, USER, ASSET, AMOUNT, RELATED, CREATED_AT = (
    LEDGER_COLUMNS.index(name)
    for name in ("page", "output_sequence", "event_type", "user_id", "asset_id", "amount", "related_id", "created_at")
)
_SIGNS: Final = {"DEPOSIT": 1, "WITHDRAWAL": -1, "ADJUSTMENT": 1}


def trade_sides(row: Row, revenue_user_id: int) -> list[tuple[str, AccountKey, int]]:
    """Give what a trade posts, side by side: role, account, amount. A side of zero still touches its account."""
    buyer, seller, base, quote = row[BUYER], row[SELLER], row[BASE], row[QUOTE]
    quantity, quote_amount = row[QUANTITY], row[QUOTE_AMOUNT]
    buyer_fee, seller_fee = row[BUYER_FEE] or 0, row[SELLER_FEE] or 0
    sides = [
        ("buyer", (buyer, base), quantity - buyer_fee),
        ("buyer", (buyer, quote), -quote_amount),
        ("seller", (seller, base), -quantity),
        ("seller", (seller, quote), quote_amount - seller_fee),
    ]
    if buyer_fee > 0:
        sides.append(("fee", (revenue_user_id, base), buyer_fee))
    if seller_fee > 0:
        sides.append(("fee", (revenue_user_id, quote), seller_fee))
    return sides


def trade_postings(row: Row, revenue_user_id: int) -> dict[AccountKey, int]:
    """Give what a trade adds to each account that it touches; one event touches an account once."""
    postings: dict[AccountKey, int] = {}
    for _, key, amount in trade_sides(row, revenue_user_id):
        postings[key] = postings.get(key, 0) + amount
    return postings


def trade_is_whole(row: Row) -> bool:
    """Say whether a trade's row has everything that is posted by."""
    return None not in row[BUYER:BUYER_FEE] and row[SEQUENCE] is not None


def trade_time_us(row: Row, symbol: Symbol | None) -> int:
    """Give a trade's own time in us since 1970, 0 when it has none (schema.cql, updated_at)."""
    if row[TS_US] is not None:
        time_us: int = row[TS_US]
        return time_us
    if row[SETTLED_AT]:
        return int(row[SETTLED_AT]) * 1000
    return (int(row[TRADE_ID]) >> 16) * 1000 if symbol is not None and symbol.trade_id_is_time else 0


def ledger_amount(row: Row) -> int | None:
    """Give what a ledger event adds to its account; None when the row is not whole."""
    sign = _SIGNS.get(row[EVENT_TYPE])
    if sign is None or row[AMOUNT] is None or row[USER] is None or row[ASSET] is None:
        return None
    return sign * int(row[AMOUNT])


def ledger_time_us(row: Row) -> int:
    """Give a ledger event's own time in us since 1970, as far as its row keeps it; 0 when it has none."""
    return (row[CREATED_AT] or 0) * 1000
