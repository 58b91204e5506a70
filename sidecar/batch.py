"""Folded events to closed batches of rows: each trade has its row, each touched account one final row.

A batch is a value: once closed it never changes, so a retry sends the identical rows with the identical stamp. It holds
a contiguous run of the stream; nothing of it is known to be on disk until the store has answered.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final, NamedTuple

from sidecar.events import AccountKey, AccountValues, Event, LedgerEvent, Refused
from sidecar.ledger import Folded

ROW_PAGE_WIDTH: Final = 10_000  # ledger_events, rejected_events: output_sequence // 10000 (schema.cql)
PAYLOAD_KEPT_BYTES_MAX: Final = 4096

# Columns of each table, in the order of the rows below (schema.cql). Stores build their statements from these.
TRADE_COLUMNS: Final = (
    "page", "trade_id", "stream", "output_sequence", "match_seq", "buy_order_id", "sell_order_id", "buyer_user_id",
    "seller_user_id", "base_asset", "quote_asset", "price", "quantity", "quote_amount", "buyer_fee", "seller_fee",
    "buyer_refund", "seller_refund", "buyer_quote_version", "buyer_base_version", "seller_base_version",
    "seller_quote_version", "settled_at", "ts_us", "origin_sequence",
)  # fmt: skip
LEDGER_COLUMNS: Final = (
    "stream", "page", "output_sequence", "event_type", "user_id", "asset_id", "amount", "related_id", "created_at",
    "origin_sequence",
)  # fmt: skip
REJECTED_COLUMNS: Final = ("stream", "page", "output_sequence", "code", "reason", "payload")
BALANCE_COLUMNS: Final = (
    "user_id", "asset_id", "stream", "available", "version", "last_sequence", "updated_at",
)  # fmt: skip

# Bound value bytes of a row, without its texts and payload: 8 for a bigint, 4 for an int.
_TRADE_BYTES: Final = 22 * 8 + 2 * 4
_LEDGER_BYTES: Final = 7 * 8 + 4 + 10
_REJECTED_BYTES: Final = 2 * 8
_BALANCE_BYTES: Final = 5 * 8 + 4

Row = tuple[Any, ...]


class Span(NamedTuple):
    """What is remembered of a batch under way: which events it holds and where they lead to, not its rows."""

    first_sequence: int
    last_sequence: int
    stamp_us: int
    last_trade_ids: dict[str, int]
    events: int


class Batch(NamedTuple):
    """What is written together: `stamp_us` is T(last_sequence), the write time of every row.

    `trades` holds each symbol's rows; `last_trade_ids` the ids this batch moved on; `events` counts what it took.
    `decisions_read` is the length of the decision log that its verdicts rest on.
    """

    stream: str
    first_sequence: int
    last_sequence: int
    stamp_us: int
    trades: dict[str, list[Row]]
    ledger_events: list[Row]
    rejected: list[Row]
    balances: dict[AccountKey, AccountValues]
    last_trade_ids: dict[str, int]
    events: int
    decisions_read: int

    @property
    def is_empty(self) -> bool:
        """Say whether there is nothing to write: accepted gaps only."""
        return not (self.trades or self.ledger_events or self.rejected or self.balances)

    @property
    def span(self) -> Span:
        """Give what is left of it once its rows are on their way."""
        return Span(self.first_sequence, self.last_sequence, self.stamp_us, self.last_trade_ids, self.events)

    def balance_rows(self) -> list[Row]:
        """Give the rows of `user_balances`, in the order of BALANCE_COLUMNS."""
        stream = self.stream
        return [(user, asset, stream, *account) for (user, asset), account in self.balances.items()]


def take(
    waiting: deque[Folded],
    *,
    stream: str,
    first_sequence: int,
    trades_max: int,
    bytes_max: int,
    decisions_read: int,
) -> Batch:
    """Close a batch from the head of `waiting`: as many events as the bounds allow, at least one.

    `bytes_max` bounds the bound values' bytes; a TOO_LARGE event is alone in its batch.
    """
    trades: dict[str, list[Row]] = {}
    ledger_events: list[Row] = []
    rejected: list[Row] = []
    balances: dict[AccountKey, AccountValues] = {}
    last_trade_ids: dict[str, int] = {}
    balance_bytes = _BALANCE_BYTES + len(stream)
    rows_bytes = events = 0
    stamp_us = last_sequence = 0
    while waiting and events < trades_max:
        head = waiting[0]
        event, symbol, moved = head.event, head.symbol, head.balances
        row_bytes, alone = _TRADE_BYTES, False
        if symbol is None:
            row_bytes, alone = _row_bytes(event), type(event) is Refused and event.code == "TOO_LARGE"
        row_bytes += len(stream)
        if events:
            if alone:
                break
            if rows_bytes + row_bytes + balance_bytes * (len(balances) + len(moved)) > bytes_max:
                accounts = len(balances) + sum(key not in balances for key in moved)  # one in the batch costs no more
                if rows_bytes + row_bytes + balance_bytes * accounts > bytes_max:
                    break
        waiting.popleft()
        events += 1
        rows_bytes += row_bytes
        last_sequence, stamp_us = head.last_sequence, head.stamp_us
        balances |= moved
        if symbol is not None:
            # By name: slices of it would cost twice as much.
            (
                sequence, trade_id, match_seq, buy_order, sell_order, buyer, seller, base, quote, price, quantity, _,
                buyer_fee, seller_fee, buyer_refund, seller_refund, buyer_quote_version, buyer_base_version,
                seller_base_version, seller_quote_version, settled_at, ts_us, _, _, origin,
            ) = event  # type: ignore[misc]  # a trade, since it has a symbol  # fmt: skip
            row = (
                trade_id // symbol.page_width, trade_id, stream, sequence, match_seq, buy_order, sell_order, buyer,
                seller, base, quote, price, quantity, head.quote_amount, buyer_fee, seller_fee, buyer_refund,
                seller_refund, buyer_quote_version, buyer_base_version, seller_base_version, seller_quote_version,
                settled_at, ts_us, origin,
            )  # fmt: skip
            name = symbol.name
            if name in trades:
                trades[name].append(row)
            else:
                trades[name] = [row]
            last_trade_ids[name] = trade_id
        elif type(event) is LedgerEvent:
            ledger_events.append((stream, last_sequence // ROW_PAGE_WIDTH, last_sequence, *event[1:7], event[10]))
        elif type(event) is Refused:
            kept = event.payload[:PAYLOAD_KEPT_BYTES_MAX]
            page = last_sequence // ROW_PAGE_WIDTH
            rejected.append((stream, page, last_sequence, event.code, event.reason, kept))
        if alone:
            break
    return Batch(
        stream, first_sequence, last_sequence, stamp_us, trades, ledger_events, rejected, balances, last_trade_ids,
        events, decisions_read,
    )  # fmt: skip


def _row_bytes(event: Event | None) -> int:
    """Give the bytes of the row of what is no trade, without its stream's name; an accepted gap has none."""
    if type(event) is LedgerEvent:
        return _LEDGER_BYTES
    if type(event) is Refused:
        kept_bytes = min(len(event.payload), PAYLOAD_KEPT_BYTES_MAX)
        return _REJECTED_BYTES + len(event.code) + len(event.reason.encode()) + kept_bytes
    return 0
