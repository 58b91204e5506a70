"""The value types that travel: what an engine says, and nothing about how it is sent or stored.

Named tuples, because one is made for every frame: cheap to build and immutable. A trade's fields stand in the order of
its table's columns (schema.cql). Amounts are integers in the asset's smallest unit.
"""

from __future__ import annotations

from typing import NamedTuple

I63_MAX = 2**63 - 1


class Trade(NamedTuple):
    """An executed trade (wire.md, Trade). Optional fields that the frame lacked are None.

    `origin_sequence` is only known on a late stream: its sequence where it belongs (late.py).
    """

    output_sequence: int
    trade_id: int
    match_seq: int
    buy_order_id: int
    sell_order_id: int
    buyer_user_id: int
    seller_user_id: int
    base_asset: int
    quote_asset: int
    price: int
    quantity: int
    quote_amount: int | None
    buyer_fee: int | None
    seller_fee: int | None
    buyer_refund: int
    seller_refund: int
    buyer_quote_version: int
    buyer_base_version: int
    seller_base_version: int
    seller_quote_version: int
    settled_at: int
    ts_us: int | None
    session: int | None
    payload: bytes
    origin_sequence: int | None = None


class LedgerEvent(NamedTuple):
    """A deposit, withdrawal or adjustment (wire.md, Ledger event); `amount` as sent, in smallest units.

    `origin_sequence` as of a Trade.
    """

    output_sequence: int
    event_type: str
    user_id: int
    asset: int
    amount: int
    related_id: int
    created_at: int
    ts_us: int | None
    session: int | None
    payload: bytes
    origin_sequence: int | None = None


class Refused(NamedTuple):
    """An event that has its place in the sequence but can never be posted; `code` as in design.md, Verdicts."""

    output_sequence: int
    code: str
    reason: str
    session: int | None
    payload: bytes


class Heartbeat(NamedTuple):
    """Nothing at or above `next_sequence` was published yet."""

    next_sequence: int
    session: int | None
    ts_us: int | None


Event = Trade | LedgerEvent | Refused


class Account(NamedTuple):
    """A balance row's values for one (user, asset) on one stream.

    `available` in smallest units; `version` counts the events that touched it; `last_sequence` is the newest of them;
    `updated_at` is that event's own time in us since 1970, 0 when it had none.
    """

    available: int
    version: int
    last_sequence: int
    updated_at: int


# An account as the ledger keeps it: an Account's values in a plain tuple, a fifth of the price to make, and one which
# the collector stops looking at (a million of them are in memory).
AccountValues = tuple[int, int, int, int]
EMPTY_ACCOUNT: AccountValues = (0, 0, 0, 0)

AccountKey = tuple[int, int]  # (user_id, asset_id)


class Balance(NamedTuple):
    """One stored balance row with its key."""

    user_id: int
    asset_id: int
    stream: str
    available: int
    version: int
    last_sequence: int
    updated_at: int


class State(NamedTuple):
    """A position of a stream and what a start from there needs: T(sequence) in us, the last trade id of each symbol."""

    sequence: int
    stamp_us: int
    last_trade_ids: dict[str, int]


class Decision(NamedTuple):
    """An entry of the log `stream_decisions` (design.md, Decisions). `body` is JSON; `decided_at_ms` since 1970."""

    stream: str
    number: int
    kind: str
    first_sequence: int | None
    last_sequence: int | None
    body: str
    reason: str
    decided_by: str
    decided_at_ms: int
