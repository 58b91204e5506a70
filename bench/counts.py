"""What a store holds too little or too much of, counted from its rows alone: lost and doubled, whatever the values."""

from __future__ import annotations

from collections import Counter
from contextlib import closing

from bench.judge import open_store

_ROW_TABLES = ("ledger_events", "rejected_events")
_TRADE_USERS = (
    "output_sequence",
    "buyer_user_id",
    "seller_user_id",
    "base_asset",
    "quote_asset",
    "buyer_fee",
    "seller_fee",
)


def lost_and_doubled(
    store_url: str, last_sequence: int, first_sequence: int = 1, stream: str = "main"
) -> tuple[int, int]:
    """Count the sequences of a stream without a row, and what is there more than once, from the store's rows alone.

    A row too many, and an account's version above the number of rows that touch it, are doubled; a version below is
    lost.
    """
    rows: Counter[int] = Counter()
    touches: Counter[tuple[int, int]] = Counter()
    versions: Counter[tuple[int, int]] = Counter()
    with closing(open_store(store_url)) as store:
        tables = store.tables()
        for table in sorted(tables):
            if table.startswith("settled_trades_"):
                for *values, of in store.rows(table, (*_TRADE_USERS, "stream")):
                    if of == stream:
                        sequence, buyer, seller, base, quote, buyer_fee, seller_fee = values
                        fees = buyer_fee or seller_fee
                        assert not fees, "they go to a further account: teach this count of it"
                        rows[sequence] += 1
                        touches.update({(user, asset) for user in (buyer, seller) for asset in (base, quote)})
        for table in _ROW_TABLES:
            columns = ("output_sequence", "stream") if table == "rejected_events" else (
                "output_sequence", "user_id", "asset_id", "stream",
            )  # fmt: skip
            for sequence, *account, of in store.rows(table, columns):
                if of == stream:
                    rows[sequence] += 1
                    if account:
                        touches[account[0], account[1]] += 1
        for user, asset, version, of in store.rows("user_balances", ("user_id", "asset_id", "version", "stream")):
            if of == stream:
                versions[user, asset] += version
    lost = sum(sequence not in rows for sequence in range(first_sequence, last_sequence + 1))
    doubled = sum(count - 1 for count in rows.values())
    return lost + (touches - versions).total(), doubled + (versions - touches).total()
