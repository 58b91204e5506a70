"""The ledger: postings, verdicts in their order, T, skips, and halts that change nothing."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import AccountMissingError, Halt
from sidecar.events import EMPTY_ACCOUNT, Account, AccountValues, Event, Refused, State, Trade
from sidecar.ledger import Accounts, Folded, Ledger, before, trade_postings
from tests.streams import (
    BTC,
    ETH,
    REVENUE,
    SYMBOLS,
    USDT,
    event,
    ledger_event,
    ledger_fields,
    trade,
    trade_fields,
)

I63 = 2**63 - 1
NOW = 2_000_000_000_000_000
DAY = 86_400_000_000
BASE_US = 1_700_000_000_000_000


def a_ledger(first: int = 1, base_us: int = BASE_US, **other: Any) -> Ledger:
    given_state = {"state": before(first, base_us)} | other
    return Ledger(symbols=SYMBOLS, first_sequence=first, base_us=base_us, **given_state)


def fold(ledger: Ledger, one: Event, now_us: int = NOW) -> Folded:
    for key in ledger.accounts_of(one):
        ledger.accounts.setdefault(key, EMPTY_ACCOUNT)
    return ledger.fold(one, now_us)


def available(folded: Folded) -> dict[tuple[int, int], int]:
    return {key: Account(*account).available for key, account in folded.balances.items()}


def code(folded: Folded) -> str:
    assert isinstance(folded.event, Refused), folded.event
    assert folded.balances == {}
    assert folded.symbol is None
    return folded.event.code


# --- postings ---


@pytest.mark.parametrize(
    "fields, quote_amount, moved",
    [
        ({}, 3_000, {(10, BTC): 1_000, (10, USDT): -3_000, (20, BTC): -1_000, (20, USDT): 3_000}),
        ({"quote_amount": 7}, 7, {(10, BTC): 1_000, (10, USDT): -7, (20, BTC): -1_000, (20, USDT): 7}),
        ({"quote_amount": 0}, 0, {(10, BTC): 1_000, (10, USDT): 0, (20, BTC): -1_000, (20, USDT): 0}),
        ({"price": 1, "quantity": 99}, 0, {(10, BTC): 99, (10, USDT): 0, (20, BTC): -99, (20, USDT): 0}),
        (
            {"base_asset": ETH},  # raw
            300_000,
            {(10, ETH): 1_000, (10, USDT): -300_000, (20, ETH): -1_000, (20, USDT): 300_000},
        ),
        (
            {"buyer_fee": 10, "seller_fee": 20},
            3_000,
            {
                (10, BTC): 990,
                (10, USDT): -3_000,
                (20, BTC): -1_000,
                (20, USDT): 2_980,
                (REVENUE, BTC): 10,
                (REVENUE, USDT): 20,
            },
        ),
        (
            {"buyer_fee": 0, "seller_fee": 20},
            3_000,
            {(10, BTC): 1_000, (10, USDT): -3_000, (20, BTC): -1_000, (20, USDT): 2_980, (REVENUE, USDT): 20},
        ),
        (
            {"buyer_fee": 1_000, "seller_fee": 0},
            3_000,
            {(10, BTC): 0, (10, USDT): -3_000, (20, BTC): -1_000, (20, USDT): 3_000, (REVENUE, BTC): 1_000},
        ),
        ({"seller_user_id": 10}, 3_000, {(10, BTC): 0, (10, USDT): 0}),
        (
            {"seller_user_id": 10, "buyer_fee": 1, "seller_fee": 2},
            3_000,
            {(10, BTC): -1, (10, USDT): -2, (REVENUE, BTC): 1, (REVENUE, USDT): 2},
        ),
        (
            {"buyer_user_id": REVENUE, "buyer_fee": 1, "seller_fee": 2},
            3_000,
            {(REVENUE, BTC): 1_000, (REVENUE, USDT): -2_998, (20, BTC): -1_000, (20, USDT): 2_998},
        ),
        (
            {"seller_user_id": REVENUE, "buyer_fee": 1, "seller_fee": 2},
            3_000,
            {(10, BTC): 999, (10, USDT): -3_000, (REVENUE, BTC): -999, (REVENUE, USDT): 3_000},
        ),
        (
            {"buyer_user_id": REVENUE, "seller_user_id": REVENUE, "buyer_fee": 1, "seller_fee": 2},
            3_000,
            {(REVENUE, BTC): 0, (REVENUE, USDT): 0},
        ),
    ],
)
def test_postings_are_those_of_the_table(
    fields: dict[str, int], quote_amount: int, moved: dict[tuple[int, int], int]
) -> None:
    one = trade(1, **fields)
    folded = fold(a_ledger(), one)
    assert folded.quote_amount == quote_amount
    assert available(folded) == moved
    postings = trade_postings(one, quote_amount, REVENUE)
    assert dict(postings) == moved
    assert len(postings) == len(moved)
    assert {account[1:3] for account in folded.balances.values()} == {(1, 1)}


@pytest.mark.parametrize(
    "kind, amount, moved",
    [("DEPOSIT", 5, 5), ("WITHDRAWAL", 5, -5), ("ADJUSTMENT", -5, -5), ("ADJUSTMENT", 5, 5), ("DEPOSIT", 0, 0)],
)
def test_a_ledger_event_moves_one_account(kind: str, amount: int, moved: int) -> None:
    ledger = a_ledger()
    folded = fold(ledger, ledger_event(1, event_type=kind, amount=amount, ts_us=9))
    assert folded.balances == {(10, USDT): Account(moved, 1, 1, 9)}
    assert ledger.accounts_of(ledger_event(1)) == ((10, USDT),)


def test_refunds_are_not_posted() -> None:
    one = fold(a_ledger(), trade(1, buyer_refund=I63, seller_refund=I63))
    assert available(one) == available(fold(a_ledger(), trade(1, buyer_refund=0, seller_refund=0)))


users = st.sampled_from([1, 2, 3, REVENUE])
trades = st.builds(
    lambda **fields: fields,
    buyer_user_id=users,
    seller_user_id=users,
    base_asset=st.sampled_from([BTC, ETH]),
    price=st.integers(0, 10**9),
    quantity=st.integers(0, 10**9),
    buyer_fee=st.none() | st.integers(0, 50),
    seller_fee=st.none() | st.integers(0, 50),
    quote_amount=st.none() | st.integers(0, 10**12),
)
ledgers = st.builds(
    lambda **fields: fields,
    event_type=st.sampled_from(["DEPOSIT", "WITHDRAWAL", "ADJUSTMENT"]),
    user_id=users,
    asset=st.sampled_from([BTC, USDT, ETH]),
    amount=st.integers(0, 10**12),
)


def stream_of(picked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in fields.items() if value is not None}
        for sequence, one in enumerate(picked, 1)
        for fields in [(ledger_fields if "event_type" in one else trade_fields)(sequence, **one)]
    ]


def judged_by_hand(stream: list[dict[str, Any]]) -> tuple[dict[tuple[int, int], list[int]], dict[int, str]]:
    """design.md's table and verdicts, written down once more in another way: balances and codes."""
    accounts: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0, 0])
    codes: dict[int, str] = {}
    outside: dict[int, int] = defaultdict(int)
    for fields in stream:
        sequence = fields["output_sequence"]
        moves: list[tuple[int, int, int]] = []
        if "event_type" in fields:
            sign = -1 if fields["event_type"] == "WITHDRAWAL" else 1
            moves.append((fields["user_id"], fields["asset"], sign * fields["amount"]))
            outside[fields["asset"]] += sign * fields["amount"]
        else:
            price, quantity = fields["price"], fields["quantity"]
            if fields["base_asset"] == BTC:
                worth = fields.get("quote_amount", price * quantity // 100)
            else:
                worth = fields.get("quote_amount", price * quantity)
            buyer_fee, seller_fee = fields.get("buyer_fee", 0), fields.get("seller_fee", 0)
            if not price:
                codes[sequence] = "ZERO_PRICE"
            elif not quantity:
                codes[sequence] = "ZERO_QUANTITY"
            elif buyer_fee > quantity or seller_fee > worth:
                codes[sequence] = "FEE_EXCEEDS_AMOUNT"
            else:
                buyer, seller, base = fields["buyer_user_id"], fields["seller_user_id"], fields["base_asset"]
                moves += [(buyer, base, quantity), (buyer, base, -buyer_fee), (buyer, USDT, -worth)]
                moves += [(seller, base, -quantity), (seller, USDT, worth), (seller, USDT, -seller_fee)]
                moves += [(REVENUE, base, buyer_fee)] if buyer_fee else []
                moves += [(REVENUE, USDT, seller_fee)] if seller_fee else []
        for user, asset, amount in moves:
            accounts[user, asset][0] += amount
        for key in {(user, asset) for user, asset, _ in moves}:
            accounts[key][1] += 1
            accounts[key][2] = sequence
    assert all(
        sum(account[0] for key, account in accounts.items() if key[1] == asset) == outside[asset]
        for asset in (BTC, USDT, ETH)
    )
    return accounts, codes


@given(st.lists(trades | ledgers, max_size=25))
def test_a_stream_folds_to_what_an_independent_fold_says_and_trades_sum_to_zero(picked: list[dict[str, Any]]) -> None:
    stream = stream_of(picked)
    accounts, codes = judged_by_hand(stream)
    ledger = a_ledger()
    for fields in stream:
        one = event(fields)
        held = {key: ledger.accounts.get(key, EMPTY_ACCOUNT)[0] for key in ledger.accounts_of(one)}
        folded = fold(ledger, one)
        if isinstance(folded.event, Refused):
            assert codes.pop(fields["output_sequence"]) == folded.event.code
        elif isinstance(folded.event, Trade):
            for asset in {key[1] for key in folded.balances}:
                gained = [now - held[key] for key, now in available(folded).items() if key[1] == asset]
                assert sum(gained) == 0
    assert not codes
    touched = {key: list(account[:3]) for key, account in ledger.accounts.items() if account[1]}
    assert touched == dict(accounts)


USUAL: dict[str, Any] = {"buyer_user_id": 1, "seller_user_id": 2, "trade_id": 6, "settled_at": 9}
FOUR = [(user, asset) for user in (1, 2) for asset in (BTC, USDT)]
FIELDS: dict[str, list[Any]] = {
    "buyer_user_id": [2, REVENUE], "seller_user_id": [1, REVENUE], "base_asset": [ETH, 77],
    "price": [0, 1, I63], "quantity": [0, 1, I63], "quote_amount": [0, 3_000, I63],
    "buyer_fee": [0, 1, I63], "seller_fee": [0, 1, I63], "trade_id": [4, 5],
    "ts_us": [0, 5, NOW + DAY, NOW + DAY + 1], "settled_at": [0, I63], "rejects": [frozenset({7})], "rise": [False],
}  # fmt: skip
DEPARTURES: list[tuple[Any, Any]] = [
    *((name, value) for name, values in FIELDS.items() for value in values),
    *((key, Account(available, 4, last, 0)) for key in FOUR for available, last in [
        *((amount, 6) for amount in (0, 999, 1_000, 2_999, 3_000, -1, -1_000, -1_001, -3_000, -3_001, -I63 - 1)),
        *((I63 - amount, 6) for amount in (0, 999, 1_000, 2_999, 3_000)), (10**6, 0), (10**6, 7), (10**6, 8),
    ]),
    *((key, None) for key in FOUR),
]  # fmt: skip


def test_the_common_trade_in_one_pass_comes_to_what_all_steps_come_to() -> None:
    taken = 0
    for departures in itertools.combinations_with_replacement(DEPARTURES, 2):
        made: dict[Any, Any] = {"rejects": frozenset(), "rise": True} | USUAL
        made |= {key: Account(10**6, 4, 6, 0) for key in [*FOUR, (1, ETH), (2, ETH)]} | dict(departures)
        one = trade(7, **{key: value for key, value in made.items() if key in Trade._fields})
        came_to = []
        for step_by_step in (False, True):
            state = State(6, BASE_US + 5, {"btc_usdt": 5})
            ledger = a_ledger(state=state, rejects=made["rejects"], trade_ids_rise=made["rise"])
            ledger.accounts.update({key: made[key] for key in made if type(key) is tuple and made[key] is not None})
            if step_by_step:
                ledger._fold_common = lambda *_: None  # type: ignore[method-assign]
            else:
                taken += copy.deepcopy(ledger)._fold_common(one, NOW) is not None
            try:
                outcome: object = ledger.fold(one, NOW)
            except (Halt, AccountMissingError) as error:
                outcome = repr(error)
            left = {name: value for name, value in vars(ledger).items() if name not in {"symbols", "_fold_common"}}
            came_to.append((outcome, left))
        assert came_to[0] == came_to[1], departures
    assert taken > 500


# --- verdicts, and which comes first ---

VERDICTS: list[tuple[str, dict[str, Any]]] = [  # each entry's trade deserves its own verdict and all that come after it
    ("ZERO_PRICE", {"price": 0}),
    ("ZERO_QUANTITY", {"quantity": 0}),
    ("UNKNOWN_SYMBOL", {"quote_asset": 77}),
    ("AMOUNT_OVERFLOW", {"price": I63, "quantity": I63}),
    ("FEE_EXCEEDS_AMOUNT", {"buyer_fee": I63, "seller_fee": I63}),
    ("TRADE_ID_NOT_RISING", {"trade_id": 5}),
    ("BALANCE_OVERFLOW", {}),
    ("ENGINE_TIME_AHEAD", {"ts_us": NOW + DAY + 1}),
]


def overfull() -> Ledger:
    ledger = a_ledger(state=State(0, BASE_US - 1, {"btc_usdt": 5}))
    ledger.accounts = Accounts({key: Account(I63, 3, 0, 0) for key in [(10, BTC), (20, USDT)]})
    return ledger


@pytest.mark.parametrize("at", range(len(VERDICTS)), ids=lambda at: VERDICTS[at][0])
def test_the_first_verdict_of_the_list_wins(at: int) -> None:
    wanted = VERDICTS[at][0]
    fields: dict[str, Any] = {}
    for _, faults in reversed(VERDICTS[at:]):
        fields |= faults
    if wanted == "FEE_EXCEEDS_AMOUNT":
        fields |= {"price": 300, "quantity": 1_000}
    one = trade(1, **({"trade_id": 6} | fields))
    ledger = overfull()
    if wanted in {"UNKNOWN_SYMBOL", "BALANCE_OVERFLOW", "ENGINE_TIME_AHEAD"}:
        if wanted == "ENGINE_TIME_AHEAD":
            ledger.accounts = Accounts()
        with pytest.raises(Halt) as raised:
            fold(ledger, one)
        assert (raised.value.code, raised.value.sequence) == (wanted, 1)
        assert raised.value.next_step
    else:
        assert code(fold(ledger, one)) == wanted


def test_what_the_wire_refused_stays_as_it_is_even_when_an_operator_rejects_it() -> None:
    one = event(trade_fields(1, price=-1))
    assert fold(a_ledger(rejects=frozenset({1})), one).event is one


def test_a_decision_comes_before_every_verdict_and_posts_nothing() -> None:
    for one in (trade(1), trade(1, price=0), trade(1, quote_asset=77), ledger_event(1, asset=77)):
        folded = fold(a_ledger(rejects=frozenset({1})), one)
        assert code(folded) == "OPERATOR"
        assert isinstance(folded.event, Refused)
        assert folded.event.payload == one.payload


@pytest.mark.parametrize(
    "fields, verdict",
    [
        ({"price": 0}, "ZERO_PRICE"),
        ({"quantity": 0}, "ZERO_QUANTITY"),
        ({"price": I63, "quantity": 101}, "AMOUNT_OVERFLOW"),
        ({"price": I63, "quantity": 100}, None),  # exactly 2^63-1
        ({"quote_amount": I63}, None),
        ({"price": I63, "quantity": I63, "quote_amount": 5}, None),  # its own amount counts
        ({"buyer_fee": 1_000, "seller_fee": 3_000}, None),
        ({"buyer_fee": 1_001}, "FEE_EXCEEDS_AMOUNT"),
        ({"seller_fee": 3_001}, "FEE_EXCEEDS_AMOUNT"),
        ({"seller_fee": 1, "quote_amount": 0}, "FEE_EXCEEDS_AMOUNT"),
    ],
)
def test_verdicts_at_the_ends_of_what_is_allowed(fields: dict[str, int], verdict: str | None) -> None:
    folded = fold(a_ledger(), trade(1, **fields))
    if verdict:
        assert code(folded) == verdict
        assert isinstance(folded.event, Refused)
        assert str(next(iter(fields.values()))) in folded.event.reason or verdict == "AMOUNT_OVERFLOW"
    else:
        assert isinstance(folded.event, Trade)


def test_an_unknown_asset_halts_before_anything_of_the_event() -> None:
    with pytest.raises(Halt) as raised:
        fold(a_ledger(), ledger_event(1, asset=77))
    assert (raised.value.code, raised.value.sequence) == ("UNKNOWN_ASSET", 1)
    assert "asset=77" in raised.value.reason


def test_trade_ids_rise_within_a_symbol_and_only_accepted_trades_raise_them() -> None:
    ledger = a_ledger()
    fold(ledger, trade(1, trade_id=10))
    assert code(fold(ledger, trade(2, trade_id=10))) == "TRADE_ID_NOT_RISING"
    assert code(fold(ledger, trade(3, trade_id=9))) == "TRADE_ID_NOT_RISING"
    assert code(fold(ledger, trade(4, trade_id=100, price=0))) == "ZERO_PRICE"
    assert code(fold(ledger, trade(5, trade_id=100, buyer_fee=I63))) == "FEE_EXCEEDS_AMOUNT"
    fold(ledger, ledger_event(6))
    assert isinstance(fold(ledger, trade(7, trade_id=11)).event, Trade)
    assert isinstance(fold(ledger, trade(8, trade_id=3, base_asset=ETH)).event, Trade)  # another symbol
    assert ledger.last_trade_ids == {"btc_usdt": 11, "eth_usdt": 3}


def test_on_a_late_stream_trade_ids_need_not_rise() -> None:
    ledger = a_ledger(trade_ids_rise=False)
    for sequence, trade_id in enumerate([10, 10, 3], 1):
        assert isinstance(fold(ledger, trade(sequence, trade_id=trade_id)).event, Trade)


def test_a_start_knows_the_last_trade_ids() -> None:
    ledger = a_ledger(state=State(4, BASE_US, {"btc_usdt": 50}))
    assert code(fold(ledger, trade(5, trade_id=50))) == "TRADE_ID_NOT_RISING"


# --- halts ---


@pytest.mark.parametrize(
    "one",
    [
        trade(1, quote_asset=77),
        ledger_event(1, asset=77),
        trade(1, ts_us=NOW + DAY + 1),
        trade(1, settled_at=(NOW + DAY) // 1_000 + 1),
        trade(1, settled_at=I63),
        ledger_event(1, created_at=I63),
        ledger_event(1, ts_us=NOW + DAY + 1),
        trade(1, seller_user_id=8, price=I63, quantity=100),
    ],
)
def test_a_halt_changes_nothing_and_the_event_can_be_folded_once_its_cause_is_gone(one: Event) -> None:
    ledger = a_ledger()
    ledger.accounts = Accounts(
        {(8, USDT): Account(1, 1, 0, 0), (20, USDT): Account(1, 1, 0, 0), (20, BTC): Account(0, 9, 50, 0)}
    )
    for key in ledger.accounts_of(one):
        ledger.accounts.setdefault(key, EMPTY_ACCOUNT)
    was = copy.deepcopy({name: value for name, value in vars(ledger).items() if name not in {"symbols", "_rejects"}})
    for _ in range(2):
        with pytest.raises(Halt):
            ledger.fold(one, NOW)
        assert {name: vars(ledger)[name] for name in was} == was
    ledger._rejects = frozenset({1})
    assert code(fold(ledger, one)) == "OPERATOR"


def test_an_engine_may_be_a_day_ahead_not_more() -> None:
    assert fold(a_ledger(), trade(1, ts_us=NOW + DAY)).stamp_us == NOW + DAY
    with pytest.raises(Halt, match=f"ENGINE_TIME_AHEAD.*{NOW + DAY + 1} us"):
        fold(a_ledger(), trade(1, ts_us=NOW + DAY + 1))


@pytest.mark.parametrize(
    "held, amount, halts",
    [(I63, 1, True), (I63 - 1, 1, False), (I63, 0, False), (-(2**63), -1, True), (-(2**63) + 1, -1, False)],
)
def test_a_balance_may_reach_the_ends_of_a_bigint_not_pass_them(held: int, amount: int, halts: bool) -> None:
    ledger = a_ledger()
    ledger.accounts[10, USDT] = Account(held, 1, 0, 0)
    one = ledger_event(1, event_type="ADJUSTMENT", amount=amount)
    if halts:
        with pytest.raises(Halt, match=f"BALANCE_OVERFLOW.*user 10, asset {USDT} would hold {held + amount}"):
            fold(ledger, one)
    else:
        assert available(fold(ledger, one)) == {(10, USDT): held + amount}


def test_balances_that_fall_below_zero_are_counted_once_each_not_refused() -> None:
    ledger = a_ledger()
    fold(ledger, trade(1))  # buyer's quote and seller's base
    assert ledger.negative_total == 2
    fold(ledger, trade(2))
    assert ledger.negative_total == 2
    fold(ledger, ledger_event(3, amount=10_000))
    fold(ledger, ledger_event(4, event_type="WITHDRAWAL", amount=10_000))
    assert ledger.negative_total == 3


# --- T ---


@pytest.mark.parametrize(
    "fields, time_us",
    [
        ({"ts_us": 5}, 5),
        ({"ts_us": 0, "settled_at": 9}, 0),
        ({"settled_at": 9}, 9_000),
        ({}, None),
        ({"base_asset": ETH, "trade_id": (123 << 16) + 7}, 123_000),  # ms16
        ({"base_asset": ETH, "trade_id": (123 << 16) + 7, "settled_at": 4}, 4_000),
        ({"base_asset": ETH, "trade_id": (123 << 16) + 7, "ts_us": 3, "settled_at": 4}, 3),
    ],
)
def test_a_trades_time(fields: dict[str, int], time_us: int | None) -> None:
    folded = fold(a_ledger(base_us=0), trade(1, **fields))
    assert {account[3] for account in folded.balances.values()} == {time_us or 0}
    assert folded.stamp_us == (time_us or 0)


@pytest.mark.parametrize(
    "fields, time_us", [({"ts_us": 5, "created_at": 9}, 5), ({"created_at": 9}, 9_000), ({"created_at": 0}, None)]
)
def test_a_ledger_events_time(fields: dict[str, int], time_us: int | None) -> None:
    folded = fold(a_ledger(base_us=0), ledger_event(1, **fields))
    assert next(iter(folded.balances.values()))[3] == (time_us or 0)
    assert folded.stamp_us == (time_us or 0)


def test_t_steps_through_every_sequence_gaps_and_rejected_ones_too() -> None:
    ledger = a_ledger(first=5, base_us=1_000)
    assert fold(ledger, trade(5)).stamp_us == 1_000
    assert fold(ledger, trade(6, price=0, ts_us=9_999)).stamp_us == 1_001  # rejected: it has no time
    assert fold(ledger, trade(7, ts_us=5_000)).stamp_us == 5_000
    assert fold(ledger, trade(8, ts_us=3)).stamp_us == 5_001
    gap = ledger.pass_over(20)
    assert (gap.last_sequence, gap.stamp_us, gap.event, gap.balances) == (20, 5_013, None, {})
    assert fold(ledger, trade(21)).stamp_us == 5_014
    assert ledger.sequence == 21


steps = st.lists(
    st.tuples(st.sampled_from(["trade", "deposit", "zero", "gap"]), st.none() | st.integers(0, 3_000)), max_size=30
)


@given(steps, st.integers(1, 50), st.integers(0, 2_000))
def test_t_is_what_its_formula_says_for_every_prefix(
    picked: list[tuple[str, int | None]], first: int, base_us: int
) -> None:
    ledger = a_ledger(first=first, base_us=base_us)
    stamps = [base_us - 1]  # T(first-1): then T(first) is at least base_us
    sequence = first
    for what, ts_us in picked:
        for n in range(sequence, sequence + (3 if what == "gap" else 1)):
            time_us = ts_us if what in {"trade", "deposit"} and ts_us is not None else 0
            stamps.append(max(stamps[-1] + 1, time_us, base_us + n - first))
        timed = {} if ts_us is None else {"ts_us": ts_us}
        if what == "gap":
            folded = ledger.pass_over(sequence + 2)
        elif what == "deposit":
            folded = fold(ledger, ledger_event(sequence, **timed))
        else:
            folded = fold(ledger, trade(sequence, price=0 if what == "zero" else 1, **timed))
        sequence = folded.last_sequence + 1
        assert folded.stamp_us == stamps[-1]
    assert ledger.stamp_us == stamps[-1]


def test_a_raised_base_raises_t_from_a_state_on() -> None:
    ledger = a_ledger(first=1, base_us=50_000, state=State(4, 1_004, {}))
    assert fold(ledger, trade(5)).stamp_us == 50_004
    ledger = a_ledger(first=1, base_us=50_000, state=State(4, 1_004, {}))
    assert ledger.pass_over(7).stamp_us == 50_006


# --- rows that are ahead ---


def test_an_account_whose_row_is_ahead_is_skipped_until_the_position_has_passed_it() -> None:
    ledger = a_ledger(state=State(4, BASE_US, {}))
    ahead = Account(123, 7, 6, 55)
    ledger.accounts = Accounts(
        {(10, BTC): ahead, (10, USDT): EMPTY_ACCOUNT, (20, BTC): EMPTY_ACCOUNT, (20, USDT): EMPTY_ACCOUNT}
    )
    for sequence in (5, 6):
        folded = fold(ledger, trade(sequence))
        assert isinstance(folded.event, Trade)  # its row is written in any case
        assert (10, BTC) not in folded.balances
        assert len(folded.balances) == 3
        assert ledger.accounts[10, BTC] == ahead
    assert ledger.skipped_total == 2
    assert fold(ledger, trade(7)).balances[10, BTC] == Account(1_123, 8, 7, 0)
    assert ledger.skipped_total == 2


def test_an_overflow_that_was_counted_already_halts_nobody() -> None:
    ledger = a_ledger()
    ledger.accounts[10, USDT] = Account(I63, 3, 1, 0)
    assert fold(ledger, ledger_event(1)).balances == {}


@given(st.lists(trades | ledgers, min_size=1, max_size=20), st.data())
def test_any_rows_ahead_give_the_same_end(picked: list[dict[str, Any]], data: st.DataObject) -> None:
    stream = [event(fields) for fields in stream_of(picked)]
    whole, states, snapshots = a_ledger(), [before(1, BASE_US)], [dict[tuple[int, int], AccountValues]()]
    for one in stream:
        folded = fold(whole, one)
        states.append(State(folded.last_sequence, folded.stamp_us, dict(whole.last_trade_ids)))
        snapshots.append(dict(whole.accounts))
    start = data.draw(st.integers(0, len(stream)))
    rows = {
        key: snapshots[data.draw(st.integers(start, len(stream)))].get(key, EMPTY_ACCOUNT) for key in whole.accounts
    }
    again = a_ledger(state=states[start])
    again.accounts = Accounts(rows)
    for one in stream[start:]:
        fold(again, one)
    assert again.accounts == whole.accounts
    assert (again.stamp_us, again.last_trade_ids) == (whole.stamp_us, whole.last_trade_ids)


# --- memory ---


def test_eviction_never_takes_an_account_whose_newest_event_is_above_durable() -> None:
    ledger = a_ledger()
    ledger.accounts = Accounts({(user, BTC): Account(0, 1, user, 0) for user in range(10)})
    ledger.evict(durable=4, accounts_max=8)
    assert sorted(user for user, _ in ledger.accounts) == [2, 3, 4, 5, 6, 7, 8, 9]
    ledger.evict(durable=4, accounts_max=0)
    assert sorted(user for user, _ in ledger.accounts) == [5, 6, 7, 8, 9]
    ledger.evict(durable=4, accounts_max=0)
    assert len(ledger.accounts) == 5
    ledger.evict(durable=99, accounts_max=5)
    assert len(ledger.accounts) == 5


@given(trades | ledgers)
def test_accounts_of_names_all_that_folding_touches(fields: dict[str, Any]) -> None:
    one = event(stream_of([fields])[0])
    ledger = a_ledger()
    assert set(fold(ledger, one).balances) <= set(ledger.accounts_of(one))


def test_events_come_in_order_or_not_at_all() -> None:
    for sequence in (1, 3, 0):
        ledger = a_ledger(state=State(1, BASE_US, {}))
        with pytest.raises(AssertionError):
            fold(ledger, ledger_event(2)._replace(output_sequence=sequence))
    with pytest.raises(AssertionError):
        a_ledger().pass_over(0)
