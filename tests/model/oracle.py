"""What the rows must be in the end: streams of events as plain values, and an independent fold of them.

Shares no code with sidecar, on purpose: rules, verdicts, postings and columns are written down a second time, from the
contract. `Spec` is one event as an engine would mean it; what the tape holds is made from it elsewhere.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Literal

Cells = dict[str, Any]
RowKey = tuple[Any, ...]  # (table, *primary key)
Rows = dict[RowKey, Cells]

STREAM = "main"
WALL_US = 1_700_000_000_000_000  # what the wall clock shows when the virtual one shows 0
I63_MAX = 2**63 - 1
UNKNOWN_ASSET = 9
RULES: dict[str, Any] = {
    "assets": {
        "btc": {"id": 1, "decimals": 3},
        "usdt": {"id": 2, "decimals": 2},
        "eth": {"id": 3, "decimals": 4},
    },
    "symbols": {
        "btc_usdt": {
            "base": "btc",
            "quote": "usdt",
            "price_decimals": 1,
            "quote_amount": "scaled",  # price x quantity / 10^(1 + 3 - 2)
            "trade_id_time": "none",
            "page_width": 100,
        },
        "eth_usdt": {
            "base": "eth",
            "quote": "usdt",
            "price_decimals": 0,
            "quote_amount": "raw",
            "trade_id_time": "none",
            "page_width": 7,
        },
    },
    "revenue_user_id": 0,
}
_SYMBOLS = {(1, 2): ("btc_usdt", 100, 100), (3, 2): ("eth_usdt", 1, 7)}  # name, divisor, page width
_ROW_PAGE = 10_000


@dataclass(frozen=True)
class Spec:
    """One event as an engine would mean it; `fields` are named as in the tables."""

    kind: Literal["trade", "ledger", "refused"]
    sequence: int
    fields: Cells = field(hash=False)

    @property
    def payload(self) -> bytes:
        """Bytes that are this event's alone."""
        return b"%s %d" % (self.kind.encode(), self.sequence)


@dataclass(frozen=True)
class Account:
    """A balance row's values."""

    available: int = 0
    version: int = 0
    last_sequence: int = 0
    updated_at: int = 0


@dataclass(frozen=True)
class Said:
    """What the decision log says of sequences, and what the rules say of an overflowing balance."""

    gaps: frozenset[int] = frozenset()
    rejects: frozenset[int] = frozenset()
    overflow_rejects: bool = False  # a mutant's rules


class Overflow(Exception):  # noqa: N818 - settlement stands here until an operator decides
    """No result: a balance leaves its range and nobody has rejected the event."""


def fold(specs: list[Spec], said: Said, up_to: int) -> tuple[Rows, dict[tuple[int, int], Account]]:
    """Give all rows that the events up to a sequence come to, and the accounts."""
    rows: Rows = {}
    accounts: dict[tuple[int, int], Account] = {}
    last_ids: dict[str, int] = {}
    for spec in specs:
        sequence, of = spec.sequence, spec.fields
        if sequence > up_to:
            break
        if sequence in said.gaps:
            continue
        code = of["code"] if spec.kind == "refused" else "OPERATOR" if sequence in said.rejects else ""
        postings: list[tuple[int, int, int]] = []
        row: Cells = {}
        key: RowKey = ()
        time_us = 0
        name = ""
        if not code and spec.kind == "trade":
            name, divisor, width = _SYMBOLS[of["base_asset"], of["quote_asset"]]
            quote = of["quote_amount"] if of["quote_amount"] is not None else of["price"] * of["quantity"] // divisor
            code = _refusal(of, quote, last_ids.get(name, 0))
            time_us = of["ts_us"] if of["ts_us"] is not None else of["settled_at"] * 1000
            postings = _trade_postings(of, quote)
            key = ("trade", name, of["trade_id"] // width, of["trade_id"], STREAM)
            row = {column: value for column, value in of.items() if column != "trade_id" and value is not None}
            row |= {"output_sequence": sequence, "quote_amount": quote}
        elif not code:
            time_us = of["ts_us"] if of["ts_us"] is not None else of["created_at"] * 1000
            signed = -of["amount"] if of["event_type"] == "WITHDRAWAL" else of["amount"]
            postings = [(of["user_id"], of["asset_id"], signed)]
            key = ("ledger", STREAM, sequence // _ROW_PAGE, sequence)
            row = {column: value for column, value in of.items() if column != "ts_us"}
        totals: dict[tuple[int, int], int] = {}
        for user, asset, amount in postings if not code else []:
            totals[user, asset] = totals.get((user, asset), 0) + amount
        after = {at: accounts.get(at, Account()).available + amount for at, amount in totals.items()}
        if any(not -I63_MAX - 1 <= available <= I63_MAX for available in after.values()):
            if not said.overflow_rejects:
                raise Overflow(sequence)
            code = "BALANCE_OVERFLOW"
        if code:
            key = ("rejected", STREAM, sequence // _ROW_PAGE, sequence)
            rows[key] = {"code": code, "payload": spec.payload}
            continue
        if name:
            last_ids[name] = of["trade_id"]
        rows[key] = row
        for at, available in after.items():
            accounts[at] = Account(available, accounts.get(at, Account()).version + 1, sequence, time_us)
    for (user, asset), account in accounts.items():
        rows["balance", user, asset, STREAM] = dict(vars(account))
    return rows, accounts


def _refusal(of: Cells, quote: int, last_id: int) -> str:
    if of["price"] == 0:
        return "ZERO_PRICE"
    if of["quantity"] == 0:
        return "ZERO_QUANTITY"
    if quote > I63_MAX:
        return "AMOUNT_OVERFLOW"
    if (of["buyer_fee"] or 0) > of["quantity"] or (of["seller_fee"] or 0) > quote:
        return "FEE_EXCEEDS_AMOUNT"
    return "TRADE_ID_NOT_RISING" if of["trade_id"] <= last_id else ""


def _trade_postings(of: Cells, quote: int) -> list[tuple[int, int, int]]:
    buyer, seller, base_id, quote_id = of["buyer_user_id"], of["seller_user_id"], of["base_asset"], of["quote_asset"]
    buyer_fee, seller_fee = of["buyer_fee"] or 0, of["seller_fee"] or 0
    postings = [
        (buyer, base_id, of["quantity"] - buyer_fee),
        (buyer, quote_id, -quote),
        (seller, base_id, -of["quantity"]),
        (seller, quote_id, quote - seller_fee),
    ]
    postings += [(0, base_id, buyer_fee)] if buyer_fee else []
    return postings + ([(0, quote_id, seller_fee)] if seller_fee else [])


# --- streams ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """How an engine's events are drawn."""

    users: int
    timed: float  # the share of events that carry ts_us
    skew_us: int  # of the engine's clock


def draw(rng: random.Random, engine: Engine, published_s: list[float]) -> list[Spec]:
    """Draw a stream: one event for each time of publication, sequences from 1."""
    ids = {pair: rng.randint(1, 40) for pair in _SYMBOLS}
    specs: list[Spec] = []
    for sequence, at_s in enumerate(published_s, 1):
        now_us = WALL_US + int(at_s * 1e6) + engine.skew_us
        ts_us = now_us if rng.random() < engine.timed else None
        dice = rng.random()
        if dice < 0.06:
            code = rng.choice(["UNKNOWN_EVENT", "BAD_FIELD", "TOO_LARGE"])
            specs.append(Spec("refused", sequence, {"code": code}))
        elif dice < 0.28:
            specs.append(deposit(rng, sequence, 1 + rng.randrange(engine.users), ts_us))
        else:
            specs.append(_trade(rng, sequence, engine, ids, ts_us, now_us))
    return specs


def deposit(
    rng: random.Random, sequence: int, user: int, ts_us: int | None, *, asset: int = 0, amount: int = 0, kind: str = ""
) -> Spec:
    """Draw a ledger event, or give the one that is asked for."""
    return Spec(
        "ledger",
        sequence,
        {
            "event_type": kind or rng.choice(["DEPOSIT", "DEPOSIT", "WITHDRAWAL", "ADJUSTMENT"]),
            "user_id": user,
            "asset_id": asset or rng.choice([1, 2, 3]),
            "amount": amount or rng.randint(1, 1000),
            "related_id": rng.randint(0, 9),
            "created_at": rng.choice([0, WALL_US // 1000 + sequence]),
            "ts_us": ts_us,
        },
    )


def _trade(
    rng: random.Random, sequence: int, engine: Engine, ids: dict[tuple[int, int], int], ts_us: int | None, now_us: int
) -> Spec:
    base, quote = pair = rng.choice(list(_SYMBOLS))
    if rng.random() < 0.93:
        ids[pair] += rng.randint(1, 3)
    buyer, seller = 1 + rng.randrange(engine.users), 1 + rng.randrange(engine.users)
    has_fees = rng.random() < 0.3
    return Spec(
        "trade",
        sequence,
        {
            "trade_id": ids[pair],
            "match_seq": sequence * 2,
            "buy_order_id": rng.randint(1, 99),
            "sell_order_id": rng.randint(1, 99),
            "buyer_user_id": buyer,
            "seller_user_id": seller,
            "base_asset": base,
            "quote_asset": quote,
            "price": rng.randint(0, 60) and rng.randint(1, 500),
            "quantity": rng.randint(0, 60) and rng.randint(1, 500),
            "quote_amount": rng.choice([None, None, rng.randint(1, 900)]),
            "buyer_fee": rng.choice([0, 1, 3]) if has_fees else None,
            "seller_fee": rng.choice([0, 2, 40]) if has_fees else None,
            "buyer_refund": rng.choice([0, 5]),
            "seller_refund": rng.choice([0, 5]),
            "buyer_quote_version": 1,
            "buyer_base_version": 2,
            "seller_base_version": 3,
            "seller_quote_version": 4,
            "settled_at": now_us // 1000 if engine.timed and rng.random() < 0.2 else 0,
            "ts_us": ts_us,
        },
    )
