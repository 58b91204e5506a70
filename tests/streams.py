"""Frames, events and rules that the tests of the pure rooms and of the tape are made of; nothing in here judges."""

from __future__ import annotations

from typing import Any

import msgpack

from sidecar import wire
from sidecar.events import Event, Heartbeat, LedgerEvent, Trade
from sidecar.symbols import Symbols

BTC, USDT, ETH = 1, 2, 3
REVENUE = 999
RULES: dict[str, Any] = {
    "assets": {
        "btc": {"id": BTC, "decimals": 8},
        "usdt": {"id": USDT, "decimals": 8},
        "eth": {"id": ETH, "decimals": 2},
    },
    "symbols": {
        "btc_usdt": {
            "base": "btc",
            "quote": "usdt",
            "price_decimals": 2,
            "quote_amount": "scaled",
            "trade_id_time": "none",
            "page_width": 10_000,
        },
        "eth_usdt": {
            "base": "eth",
            "quote": "usdt",
            "price_decimals": 0,
            "quote_amount": "raw",
            "trade_id_time": "ms16",
            "page_width": 65_536_000,
        },
    },
    "revenue_user_id": REVENUE,
}
SYMBOLS = Symbols(RULES)
# A configuration's rules, as TOML; the last table is open, for further keys of the symbol.
RULES_TOML = """
[assets.btc]
id = 1
decimals = 8
[assets.usdt]
id = 2
decimals = 8
[symbols.btc_usdt]
base = "btc"
quote = "usdt"
price_decimals = 2
"""


def trade_fields(sequence: int = 1, **other: Any) -> dict[str, Any]:
    """The keys of a trade's frame; `other` replaces or adds keys."""
    return {
        "output_sequence": sequence,
        "trade_id": sequence,
        "match_seq": 5,
        "buy_order_id": 6,
        "sell_order_id": 7,
        "buyer_user_id": 10,
        "seller_user_id": 20,
        "base_asset": BTC,
        "quote_asset": USDT,
        "price": 300,
        "quantity": 1_000,
        "buyer_refund": 1,
        "seller_refund": 2,
        "buyer_quote_version": 3,
        "buyer_base_version": 4,
        "seller_base_version": 5,
        "seller_quote_version": 6,
        "settled_at": 0,
    } | other


def ledger_fields(sequence: int = 1, **other: Any) -> dict[str, Any]:
    """The keys of a ledger event's frame."""
    return {
        "output_sequence": sequence,
        "event_type": "DEPOSIT",
        "user_id": 10,
        "asset": USDT,
        "amount": 500,
        "related_id": 77,
        "created_at": 0,
    } | other


def pack(fields: Any) -> bytes:
    """The payload, by the standard package."""
    payload: bytes = msgpack.packb(fields)
    return payload


def trade(sequence: int = 1, **other: Any) -> Trade:
    """A trade as decoded."""
    event = wire.decode(pack(trade_fields(sequence, **other)))
    assert isinstance(event, Trade), event
    return event


def ledger_event(sequence: int = 1, **other: Any) -> LedgerEvent:
    """A ledger event as decoded."""
    event = wire.decode(pack(ledger_fields(sequence, **other)))
    assert isinstance(event, LedgerEvent), event
    return event


def event(fields: dict[str, Any]) -> Event:
    """Whatever event a frame of these keys is."""
    decoded = wire.decode(pack(fields))
    assert not isinstance(decoded, Heartbeat), decoded
    return decoded
