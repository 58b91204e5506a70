"""Batches: bounds, coalescing, and the law that no cut changes the rows."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.batch import (
    BALANCE_COLUMNS,
    LEDGER_COLUMNS,
    PAYLOAD_KEPT_BYTES_MAX,
    REJECTED_COLUMNS,
    TRADE_COLUMNS,
    Batch,
    take,
)
from sidecar.events import EMPTY_ACCOUNT, Account, Event
from sidecar.ledger import Folded, Ledger, before
from tests.streams import BTC, ETH, SYMBOLS, USDT, event, ledger_event, ledger_fields, trade, trade_fields

BASE_US = 1_000_000


def folded(events: list[Event | int]) -> deque[Folded]:
    """Fold events; a number stands for accepted gaps up to it."""
    ledger = Ledger(symbols=SYMBOLS, first_sequence=1, base_us=BASE_US, state=before(1, BASE_US))
    line: deque[Folded] = deque()
    for one in events:
        if isinstance(one, int):
            line.append(ledger.pass_over(one))
            continue
        for key in ledger.accounts_of(one):
            ledger.accounts.setdefault(key, EMPTY_ACCOUNT)
        line.append(ledger.fold(one, 1 << 60))
    return line


def cut(line: deque[Folded], trades_max: int = 16, bytes_max: int = 1 << 30) -> list[Batch]:
    batches: list[Batch] = []
    first = 1
    while line:
        batch = take(
            line, stream="main", first_sequence=first, trades_max=trades_max, bytes_max=bytes_max, decisions_read=3
        )
        batches.append(batch)
        first = batch.last_sequence + 1
    return batches


def value_bytes(batch: Batch) -> int:
    """The bytes of all bound values, counted one by one: 8 for a bigint, 4 for an int, texts and blobs as they are."""
    ints = {"base_asset", "quote_asset", "asset_id"}

    def of(columns: tuple[str, ...], row: tuple[Any, ...]) -> int:
        total = 0
        for name, value in zip(columns, row, strict=True):
            if isinstance(value, str | bytes):
                total += len(value.encode() if isinstance(value, str) else value)
            else:
                total += 4 if name in ints else 8
        return total

    return (
        sum(of(TRADE_COLUMNS, row) for rows in batch.trades.values() for row in rows)
        + sum(of(LEDGER_COLUMNS, row) for row in batch.ledger_events)
        + sum(of(REJECTED_COLUMNS, row) for row in batch.rejected)
        + sum(of(BALANCE_COLUMNS, row) for row in batch.balance_rows())
    )


def test_a_trades_row_has_every_field_under_its_column() -> None:
    one = trade(7, trade_id=123_456, buyer_fee=4, seller_fee=8, ts_us=99, settled_at=5)
    ledger = Ledger(symbols=SYMBOLS, first_sequence=7, base_us=0, state=before(7, 0))
    ledger.accounts.update(dict.fromkeys(ledger.accounts_of(one), EMPTY_ACCOUNT))
    (batch,) = cut(deque([ledger.fold(one, 1 << 60)]))
    row = dict(zip(TRADE_COLUMNS, batch.trades["btc_usdt"][0], strict=True))
    fields = trade_fields(7, trade_id=123_456, buyer_fee=4, seller_fee=8, ts_us=99, settled_at=5)
    own = {"page": 12, "stream": "main", "quote_amount": 3_000, "origin_sequence": None}
    assert row == fields | own
    assert batch.last_trade_ids == {"btc_usdt": 123_456}


def test_what_a_frame_lacks_is_null_in_the_row_save_the_amount_that_was_posted() -> None:
    (batch,) = cut(folded([trade(1)]))
    row = dict(zip(TRADE_COLUMNS, batch.trades["btc_usdt"][0], strict=True))
    assert {name for name, value in row.items() if value is None} == {
        "buyer_fee",
        "seller_fee",
        "ts_us",
        "origin_sequence",
    }


def test_a_page_is_the_symbols_own_width() -> None:
    (batch,) = cut(folded([trade(1, base_asset=ETH, trade_id=65_536_000 * 3 - 1), trade(2, trade_id=20_000)]))
    assert batch.trades["eth_usdt"][0][0] == 2
    assert batch.trades["btc_usdt"][0][0] == 2


def test_ledger_and_rejected_rows_have_every_field_under_their_columns() -> None:
    bad = event(trade_fields(2, price=-1))
    line = folded([ledger_event(1, event_type="WITHDRAWAL", amount=9, created_at=4), bad])
    (batch,) = cut(line)
    assert dict(zip(LEDGER_COLUMNS, batch.ledger_events[0], strict=True)) == {
        "stream": "main",
        "page": 0,
        "output_sequence": 1,
        "event_type": "WITHDRAWAL",
        "user_id": 10,
        "asset_id": USDT,
        "amount": 9,
        "related_id": 77,
        "created_at": 4,
        "origin_sequence": None,
    }
    row = dict(zip(REJECTED_COLUMNS, batch.rejected[0], strict=True))
    assert (row["stream"], row["page"], row["output_sequence"]) == ("main", 0, 2)
    assert (row["code"], row["payload"]) == ("BAD_FIELD", bad.payload)
    assert "price=-1" in row["reason"]


def test_pages_of_events_change_every_10000_sequences() -> None:
    ledger = Ledger(symbols=SYMBOLS, first_sequence=9_999, base_us=0, state=before(9_999, 0))
    ledger.accounts[10, USDT] = EMPTY_ACCOUNT
    line = deque(ledger.fold(ledger_event(sequence), 1 << 60) for sequence in (9_999, 10_000))
    assert [row[1] for row in take_all(line, 9_999).ledger_events] == [0, 1]


def take_all(line: deque[Folded], first: int = 1) -> Batch:
    return take(line, stream="main", first_sequence=first, trades_max=99, bytes_max=1 << 30, decisions_read=1)


def test_each_touched_account_has_one_final_row_and_each_trade_its_own() -> None:
    (batch,) = cut(folded([trade(n) for n in range(1, 6)]))
    assert len(batch.trades["btc_usdt"]) == 5
    assert batch.balances == {
        (10, BTC): Account(5_000, 5, 5, 0),
        (10, USDT): Account(-15_000, 5, 5, 0),
        (20, BTC): Account(-5_000, 5, 5, 0),
        (20, USDT): Account(15_000, 5, 5, 0),
    }
    assert (10, BTC, "main", 5_000, 5, 5, 0) in batch.balance_rows()
    assert (batch.first_sequence, batch.last_sequence, batch.events) == (1, 5, 5)
    assert (batch.stamp_us, batch.decisions_read) == (BASE_US + 4, 3)


@pytest.mark.parametrize("trades_max", [1, 2, 3, 7, 100])
def test_no_batch_has_more_events_than_its_bound(trades_max: int) -> None:
    batches = cut(folded([trade(n) for n in range(1, 8)]), trades_max)
    assert [batch.events for batch in batches] == [trades_max] * (7 // trades_max) + [7 % trades_max] * (
        7 % trades_max > 0
    )
    assert [batch.first_sequence for batch in batches] == list(range(1, 8, trades_max))


def test_a_batch_takes_at_least_one_event_whatever_its_bytes() -> None:
    big = event(trade_fields(1, price=-1, pad=b"x" * 3_000))
    batches = cut(folded([big, trade(2), trade(3)]), bytes_max=1)
    assert [batch.events for batch in batches] == [1, 1, 1]


@given(st.integers(100, 3_000), st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_no_batch_of_several_events_is_over_its_bytes(bytes_max: int, kinds: list[int]) -> None:
    events: list[Event | int] = []
    for n, kind in enumerate(kinds, 1):
        fields: Any = [
            trade_fields(n, buyer_user_id=n % 7),
            ledger_fields(n, user_id=n % 5),
            trade_fields(n, price="🙂" * 20, buyer_user_id=10**9),
            trade_fields(n, buyer_fee=1),
        ][kind]
        events.append(event(fields))
    for batch in cut(folded(events), 100, bytes_max):
        assert batch.events == 1 or value_bytes(batch) <= bytes_max


def test_the_bytes_bound_is_used_not_undercut() -> None:
    batches = cut(folded([trade(n) for n in range(1, 101)]), 100, 12_288)
    assert all(value_bytes(batch) > 12_288 - 400 for batch in batches[:-1])


def test_a_too_large_event_is_alone_and_its_payload_cut() -> None:
    huge = event(trade_fields(3, pad=b"x" * 5_000))
    batches = cut(folded([trade(1), trade(2), huge, trade(4)]))
    assert [(batch.first_sequence, batch.last_sequence) for batch in batches] == [(1, 2), (3, 3), (4, 4)]
    (row,) = batches[1].rejected
    assert (row[3], row[5]) == ("TOO_LARGE", huge.payload[:PAYLOAD_KEPT_BYTES_MAX])
    assert str(len(huge.payload)) in row[4]
    assert [batch.events for batch in cut(folded([huge._replace(output_sequence=1)]))] == [1]


def test_a_gap_alone_is_an_empty_batch_and_rides_along_otherwise() -> None:
    (alone,) = cut(folded([4]))
    assert alone.is_empty
    assert (alone.first_sequence, alone.last_sequence, alone.stamp_us) == (1, 4, BASE_US + 3)
    (batch,) = cut(folded([2, trade(3), 9]))
    assert not batch.is_empty
    assert (batch.first_sequence, batch.last_sequence, batch.stamp_us) == (1, 9, BASE_US + 8)


def test_a_trade_whose_accounts_are_all_ahead_still_has_its_row() -> None:
    ledger = Ledger(symbols=SYMBOLS, first_sequence=1, base_us=0, state=before(1, 0))
    one = trade(1)
    ledger.accounts.update({key: Account(1, 1, 9, 0) for key in ledger.accounts_of(one)})
    batch = take_all(deque([ledger.fold(one, 1 << 60)]))
    assert not batch.is_empty
    assert not batch.balances
    assert len(batch.trades["btc_usdt"]) == 1


picked = st.lists(
    st.tuples(st.sampled_from(["trade", "eth", "self", "deposit", "bad", "huge", "zero", "gap"]), st.integers(1, 4)),
    max_size=30,
)


def drawn(kinds: list[tuple[str, int]]) -> list[Event | int]:
    events: list[Event | int] = []
    n = 0
    for kind, user in kinds:
        n += 1
        both = {"buyer_user_id": user, "seller_user_id": 5 - user}
        if kind == "gap":
            n += 1
            events.append(n)
            continue
        fields: dict[str, Any] = {
            "trade": trade_fields(n, **both, buyer_fee=user),
            "eth": trade_fields(n, **both, base_asset=ETH),
            "self": trade_fields(n, buyer_user_id=user, seller_user_id=user),
            "deposit": ledger_fields(n, user_id=user),
            "bad": trade_fields(n, price=None),
            "huge": trade_fields(n, pad=b"x" * 4_096),
            "zero": trade_fields(n, quantity=0),
        }[kind]
        events.append(event(fields))
    return events


def tables(batches: list[Batch], order: list[int]) -> tuple[dict[Any, tuple[int, Any]], ...]:
    """Apply batches as a database with write times does, in any order: per row the highest stamp wins."""
    kept: tuple[dict[Any, tuple[int, Any]], ...] = ({}, {}, {}, {})
    for at in order:
        batch = batches[at]
        rows: list[list[tuple[Any, Any]]] = [
            [((name, *row[:3]), row) for name, named in batch.trades.items() for row in named],
            [(row[:3], row) for row in batch.ledger_events],
            [(row[:3], row) for row in batch.rejected],
            [(row[:3], row) for row in batch.balance_rows()],
        ]
        for table, written in zip(kept, rows, strict=True):
            for key, row in written:
                if key not in table or table[key][0] < batch.stamp_us:
                    table[key] = (batch.stamp_us, row)
    return kept


@given(picked, st.integers(1, 9), st.integers(1, 4_000), st.data())
def test_any_cut_into_batches_landing_in_any_order_any_number_of_times_gives_the_same_rows(
    kinds: list[tuple[str, int]], trades_max: int, bytes_max: int, data: st.DataObject
) -> None:
    events = drawn(kinds)
    one_by_one = cut(folded(events), 1)
    batches = cut(folded(events), trades_max, bytes_max)
    order = data.draw(st.permutations(range(len(batches))))
    order = order + data.draw(st.lists(st.sampled_from(range(len(batches))), max_size=5)) if batches else order
    expected = tables(one_by_one, list(range(len(one_by_one))))
    got = tables(batches, order)
    assert [{key: row for key, (_, row) in table.items()} for table in got] == [
        {key: row for key, (_, row) in table.items()} for table in expected
    ]
    stamps = [batch.stamp_us for batch in batches]
    assert stamps == sorted(set(stamps))
    assert [batch.first_sequence for batch in batches] == [1, *(batch.last_sequence + 1 for batch in batches)][
        : len(batches)
    ]
