"""Statements against an independent fold of the same events: order, roles, running balance, and what is shown of it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sidecar.events import Event, LedgerEvent, Trade
from sidecar.proof.reconcile import Pace, Progress
from sidecar.proof.statement import Entry, Span, Statement, state
from sidecar.store.base import Store
from sidecar.store.sqlite import SQLiteStore
from tests.books import Books, Hand
from tests.streams import BTC, ETH, REVENUE, USDT

Line = tuple[int, str, int, int]  # sequence, role, delta, balance


def expected(events: list[Event], user: int) -> dict[int, list[Line]]:
    """Fold by hand what touches a user, by asset; the rules written down once more."""
    lines: dict[int, list[Line]] = {}

    def touch(asset: int, sequence: int, role: str, delta: int) -> None:
        mine = lines.setdefault(asset, [])
        if mine and mine[-1][0] == sequence:
            last = mine.pop()
            mine.append((sequence, f"{last[1]}+{role}", last[2] + delta, last[3] + delta))
        else:
            mine.append((sequence, role, delta, (mine[-1][3] if mine else 0) + delta))

    for event in events:
        number = event.output_sequence
        if isinstance(event, LedgerEvent) and event.user_id == user:
            touch(event.asset, number, event.event_type.lower(), event.amount * (-1) ** (event.event_type[0] == "W"))
        if not isinstance(event, Trade) or not event.price:
            continue
        divisor = 10**2 if event.base_asset == BTC else 1
        quote = event.quote_amount if event.quote_amount is not None else event.price * event.quantity // divisor
        base_fee, quote_fee = event.buyer_fee or 0, event.seller_fee or 0
        for asset, bought, sold, fee in (
            (event.base_asset, event.quantity - base_fee, -event.quantity, base_fee),
            (USDT, -quote, quote - quote_fee, quote_fee),
        ):
            if event.buyer_user_id == user:
                touch(asset, number, "buyer", bought)
            if event.seller_user_id == user:
                touch(asset, number, "seller", sold)
            if user == REVENUE and fee:
                touch(asset, number, "fee", fee)
    return lines


async def _stated(
    store: Store, user: int, asset: int | None = None, **span: Any
) -> tuple[Statement, list[list[Entry]]]:
    within = Span(**span)
    made = await state(store, user, asset, within, pace=Pace(rows_a_page=70), progress=Progress(), wait_s=0.1)
    return made, [list(made.entries(account, within)) for account in made.accounts]


def test_every_users_statement_is_what_the_events_come_to(tmp_path: Path, seed: int) -> None:
    async def play() -> None:
        async with SQLiteStore(tmp_path / "settlement.db", {}) as store:
            books = Books(store, seed=seed, users=12)
            await books.begin()
            await books.play(1_500)
            for user in (*range(1, 13), REVENUE):
                made, entries = await _stated(store, user)
                lines = expected(books.events, user)
                assert {account.asset_id for account in made.accounts} == set(lines)
                for account, some in zip(made.accounts, entries, strict=True):
                    assert [(e.sequence, e.role, e.delta, e.balance) for e in some] == lines[account.asset_id], user
                    assert account.agrees
                    assert account.stored is not None
                    assert account.closing == account.stored.available == lines[account.asset_id][-1][3]
                made.close()

    asyncio.run(play())


def test_a_part_of_a_statement_opens_and_closes_where_it_must(tmp_path: Path) -> None:
    async def play() -> None:
        async with SQLiteStore(tmp_path / "settlement.db", {}) as store:
            books = Books(store, users=6)
            await books.begin()
            await books.play(600)
            whole = expected(books.events, 3)[ETH]
            made, (entries,) = await _stated(store, 3, ETH, first_sequence=200, last_sequence=400)
            wanted = [line for line in whole if 200 <= line[0] <= 400]
            assert [(e.sequence, e.role, e.delta, e.balance) for e in entries] == wanted
            (account,) = made.accounts
            assert account.opening == wanted[0][3] - wanted[0][2]
            assert account.closing == wanted[-1][3]
            assert account.agrees
            made.close()
            # Trades of this symbol have their time in their id; by time the same part.
            first_us, last_us = entries[0].time_us, entries[-1].time_us
            timed = [e for e in entries if e.time_us]
            if timed and first_us and last_us:
                made, (again,) = await _stated(store, 3, ETH, first_us=first_us, last_us=last_us)
                assert again == [e for e in again if first_us <= e.time_us <= last_us]
                made.close()

    asyncio.run(play())


@pytest.mark.parametrize("spoil", ["raised", "behind", "gone"])
def test_a_statement_that_does_not_end_at_the_stored_balance_says_so(tmp_path: Path, spoil: str) -> None:
    async def play() -> None:
        async with SQLiteStore(tmp_path / "settlement.db", {}) as store:
            books, hand = Books(store, users=6), Hand(store)
            await books.begin()
            await books.play(300)
            row = await hand.balance(2, USDT)
            before = expected(books.events, 2)[USDT][-2]
            if spoil == "raised":
                await hand.set_balance(row, available=(row.available or 0) + 1)
            elif spoil == "behind":
                behind = {"available": before[3], "version": (row.version or 0) - 1, "last_sequence": before[0]}
                await hand.set_balance(row, **behind)  # type: ignore[arg-type]
            else:
                await hand.delete_balance(row)
            made, _ = await _stated(store, 2, USDT)
            assert [account.agrees for account in made.accounts] == [False]
            made.close()
            made, _ = await _stated(store, 3, USDT)
            assert [account.agrees for account in made.accounts] == [True]
            made.close()

    asyncio.run(play())


def test_a_user_without_events_has_no_account(tmp_path: Path) -> None:
    async def play() -> None:
        async with SQLiteStore(tmp_path / "settlement.db", {}) as store:
            books = Books(store, users=6)
            await books.begin()
            await books.play(50)
            made, _ = await _stated(store, 77)
            assert made.accounts == []
            made.close()

    asyncio.run(play())
