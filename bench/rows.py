"""The rows that a stream must become, folded once more: in plain code that shares nothing with the sidecar.

It knows what the bench's own workload needs: trades and ledger events that are all valid, no fees. The ceiling and the
simple ways of `compare` write these rows; the judge finds them equal to what the sidecar writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Event = dict[str, Any]
Account = tuple[int, int]  # user_id, asset_id
Balance = tuple[int, int, int, int]  # available, version, last_sequence, updated_at

STREAM = "main"
EVENT_PAGE = 10_000  # sequences a page of ledger_events

TRADE_COLUMNS = (
    "page", "trade_id", "stream", "output_sequence", "match_seq", "buy_order_id", "sell_order_id", "buyer_user_id",
    "seller_user_id", "base_asset", "quote_asset", "price", "quantity", "quote_amount", "buyer_fee", "seller_fee",
    "buyer_refund", "seller_refund", "buyer_quote_version", "buyer_base_version", "seller_base_version",
    "seller_quote_version", "settled_at", "ts_us", "origin_sequence",
)  # fmt: skip
LEDGER_COLUMNS = (
    "stream", "page", "output_sequence", "event_type", "user_id", "asset_id", "amount", "related_id", "created_at",
    "origin_sequence",
)  # fmt: skip
BALANCE_COLUMNS = ("user_id", "asset_id", "stream", "available", "version", "last_sequence", "updated_at")


class Folded(NamedTuple):
    """One event and the balances after it."""

    sequence: int
    stamp_us: int
    symbol: str | None  # None: a ledger event
    row: tuple[Any, ...]  # TRADE_COLUMNS or LEDGER_COLUMNS
    balances: dict[Account, Balance]
    postings: dict[Account, int]


class Batch(NamedTuple):
    """What is written together."""

    first: int
    last: int
    stamp_us: int
    events: list[Folded]
    balances: dict[Account, Balance]  # one final row an account

    @property
    def rows(self) -> int:
        """Count the rows."""
        return len(self.events) + len(self.balances)


class Fold:
    """Folds events in order."""

    def __init__(self, rules: dict[str, Any], base_us: int) -> None:
        """Take the rules as `bench/engine.py --print-rules` gives them, and the stream's base_us."""
        ids = {name: asset["id"] for name, asset in rules["assets"].items()}
        decimals = {asset["id"]: asset["decimals"] for asset in rules["assets"].values()}
        self._symbols = {}
        for name, symbol in rules["symbols"].items():
            base, quote = ids[symbol["base"]], ids[symbol["quote"]]
            scale = 10 ** (symbol["price_decimals"] + decimals[base] - decimals[quote])
            divisor = scale if symbol["quote_amount"] == "scaled" else 1
            self._symbols[base, quote] = (name, divisor, symbol["page_width"])
        self._stamp_us = self._base_us = base_us
        self._base_us -= 1  # less the first sequence
        self.accounts: dict[Account, Balance] = {}

    def fold(self, event: Event) -> Folded:
        """Fold the next event."""
        sequence = event["output_sequence"]
        time_us = event.get("ts_us") or 1_000 * (event.get("settled_at") or event.get("created_at") or 0)
        self._stamp_us = max(self._stamp_us + 1, time_us, self._base_us + sequence)
        postings: dict[Account, int] = {}
        symbol = None
        if "trade_id" in event:
            assert "buyer_fee" not in event, "the bench's trades carry no fees"
            base, quote, quantity = event["base_asset"], event["quote_asset"], event["quantity"]
            symbol, divisor, width = self._symbols[base, quote]
            amount = event["price"] * quantity // divisor
            buyer, seller = event["buyer_user_id"], event["seller_user_id"]
            for account, units in (
                ((buyer, base), quantity),
                ((buyer, quote), -amount),
                ((seller, base), -quantity),
                ((seller, quote), amount),
            ):
                if units:
                    postings[account] = postings.get(account, 0) + units
            head = event["trade_id"] // width, event["trade_id"], STREAM
            given = {"quote_amount": amount, **event}
            row = (*head, *(given.get(column) for column in TRADE_COLUMNS[3:]))
        else:
            units = -event["amount"] if event["event_type"] == "WITHDRAWAL" else event["amount"]
            if units:
                postings[event["user_id"], event["asset"]] = units
            row = (
                STREAM, sequence // EVENT_PAGE, sequence, event["event_type"], event["user_id"], event["asset"],
                event["amount"], event["related_id"], event["created_at"], None,
            )  # fmt: skip
        moved = {}
        for account, units in postings.items():
            available, version, _, _ = self.accounts.get(account, (0, 0, 0, 0))
            moved[account] = available + units, version + 1, sequence, time_us
        self.accounts |= moved
        return Folded(sequence, self._stamp_us, symbol, row, moved, postings)


def read_events(journal: Path, trades_max: int | None = None) -> Iterator[Event]:
    """Read the events of a journal, up to a number of trades."""
    trades = 0
    with journal.open() as lines:
        for line in lines:
            event: Event = json.loads(line)["event"]
            trades += "trade_id" in event
            yield event
            if trades == trades_max:
                return


def in_batches(folded: Iterable[Folded], events_max: int) -> Iterator[Batch]:
    """Coalesce, `events_max` events a batch."""
    waiting: list[Folded] = []
    for one in folded:
        waiting.append(one)
        if len(waiting) == events_max:
            yield _batch(waiting)
            waiting = []
    if waiting:
        yield _batch(waiting)


def _batch(events: list[Folded]) -> Batch:
    balances: dict[Account, Balance] = {}
    for one in events:
        balances |= one.balances
    return Batch(events[0].sequence, events[-1].sequence, events[-1].stamp_us, events, balances)


def rows_a_trade(batches: Iterable[Batch]) -> float:
    """Count the rows a trade in the batches that hold nothing but trades."""
    rows = trades = 0
    for batch in batches:
        if all(one.symbol for one in batch.events):
            rows += batch.rows
            trades += len(batch.events)
    return rows / trades if trades else 0.0


def written_rows_a_trade(folded: Sequence[Folded], ends: Iterable[tuple[int, int]]) -> float:
    """Count the rows a trade that were written when the batches were cut as an ack log has it (first, last)."""
    first_sequence = folded[0].sequence
    return rows_a_trade(_batch([*folded[first - first_sequence : last - first_sequence + 1]]) for first, last in ends)
