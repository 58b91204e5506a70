"""A statement of one user's accounts: every event that touched them, in order, folded from the tables on demand.

The balance runs from zero and must end at the stored one. Tables have no index by user (the way of a trade would pay
for it), so all pages of the symbols are read; the entries found lie in a file without a name, sorted by SQLite.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from sidecar.events import I63_MAX
from sidecar.proof.positions import Known, positions, reached
from sidecar.proof.reconcile import Pace, Progress, Throttle
from sidecar.proof.rows import (
    ASSET,
    BASE,
    BUYER,
    BUYER_FEE,
    EVENT_TYPE,
    LEDGER_SEQUENCE,
    QUOTE,
    RELATED,
    SELLER,
    SELLER_FEE,
    SEQUENCE,
    STREAM,
    TRADE_ID,
    USER,
    Row,
    ledger_amount,
    ledger_time_us,
    trade_is_whole,
    trade_sides,
    trade_time_us,
)
from sidecar.store.base import StampedBalance, Store
from sidecar.symbols import Symbol


class Entry(NamedTuple):
    """One event on one account; `delta` and `balance` (after it) in smallest units, `time_us` 0 when it had none."""

    sequence: int
    time_us: int
    role: str  # buyer, seller, fee, or several with +; deposit, withdrawal, adjustment
    symbol: str | None
    reference: int  # the trade's id, or the ledger event's related_id
    delta: int
    balance: int


@dataclass(kw_only=True)
class Account:
    """One account's part of a statement."""

    asset_id: int
    stream: str
    stored: StampedBalance | None
    up_to: int  # the row's last_sequence: entries end there
    opening: int = 0
    closing: int = 0  # after the last entry shown
    final: int = 0  # after the last entry of all
    entries_total: int = 0
    later: int = 0  # acknowledged events that are not in the stored row

    @property
    def agrees(self) -> bool:
        """Say whether the balance ends at the stored one."""
        stored = self.stored
        if stored is None:
            return self.entries_total == 0 and not self.later
        same = (stored.available, stored.version) == (self.final, self.entries_total)
        return same and not self.later


@dataclass(frozen=True, kw_only=True)
class Span:
    """Which entries are shown: sequences, or times in us since 1970; what has no time is outside every span of time."""

    first_sequence: int = 0
    last_sequence: int = I63_MAX
    first_us: int | None = None
    last_us: int | None = None

    def has(self, sequence: int, time_us: int) -> bool:
        """Say whether an entry is shown."""
        if not self.first_sequence <= sequence <= self.last_sequence:
            return False
        if self.first_us is not None and (not time_us or time_us < self.first_us):
            return False
        return self.last_us is None or (0 < time_us <= self.last_us)


class Statement:
    """One user's entries. Close it: they lie in a file."""

    def __init__(self, user_id: int) -> None:
        """Begin with nothing."""
        self.user_id = user_id
        self.accounts: list[Account] = []
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute(
            "CREATE TABLE entries (stream TEXT, asset_id INTEGER, sequence INTEGER, time_us INTEGER, role TEXT,"
            " symbol TEXT, reference INTEGER, delta INTEGER, PRIMARY KEY (stream, asset_id, sequence)) WITHOUT ROWID"
        )
        self._db.execute("BEGIN")

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def add_trades(self, symbol: str, rows: list[Row], known: dict[str, Known], asset_id: int | None) -> None:
        """Take the entries out of a piece of a symbol's table."""
        user = self.user_id
        for row in rows:
            stream = row[STREAM]
            if stream not in known or not trade_is_whole(row):
                continue
            symbols = known[stream].agreed.symbols
            has_fee = user == symbols.revenue_user_id and (row[BUYER_FEE] or row[SELLER_FEE])
            if user not in (row[BUYER], row[SELLER]) and not has_fee:
                continue
            if asset_id is not None and asset_id not in (row[BASE], row[QUOTE]):
                continue
            if is_posted(known[stream], row[SEQUENCE]):
                self._add_trade(symbol, symbols.symbols.get(symbol), row, asset_id, symbols.revenue_user_id)

    def _add_trade(self, name: str, rule: Symbol | None, row: Row, asset_id: int | None, revenue: int) -> None:
        mine: dict[int, list[tuple[str, int]]] = {}
        for role, (user, asset), amount in trade_sides(row, revenue):
            if user == self.user_id and asset_id in (None, asset):
                mine.setdefault(asset, []).append((role, amount))
        for asset, sides in mine.items():
            role, delta = "+".join(side for side, _ in sides), sum(amount for _, amount in sides)
            time_us = trade_time_us(row, rule)
            self._add(row[STREAM], asset, row[SEQUENCE], time_us, role, name, row[TRADE_ID], delta)

    def add_ledger_events(self, stream: str, rows: list[Row], known: Known, asset_id: int | None) -> None:
        """Take the entries out of some ledger events."""
        for row in rows:
            amount = ledger_amount(row)
            if amount is None or row[USER] != self.user_id or asset_id not in (None, row[ASSET]):
                continue
            if is_posted(known, row[LEDGER_SEQUENCE]):
                time_us, role = ledger_time_us(row), row[EVENT_TYPE].lower()
                self._add(stream, row[ASSET], row[LEDGER_SEQUENCE], time_us, role, None, row[RELATED] or 0, amount)

    def _add(self, *values: Any) -> None:
        self._db.execute("INSERT OR IGNORE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)

    def settle_up(self, rows: list[StampedBalance], before: dict[str, int], span: Span) -> None:
        """Add every account up; `before` are the positions that were acknowledged before the rows were read."""
        there = {(row.stream, row.asset_id): row for row in rows}
        keys = set(there) | set(self._db.execute("SELECT DISTINCT stream, asset_id FROM entries"))
        for stream, asset in sorted(keys, key=lambda key: (key[1], key[0])):
            row = there.get((stream, asset))
            up_to = (row.last_sequence or 0) if row is not None else 0
            account = Account(asset_id=asset, stream=stream, stored=row, up_to=up_to)
            is_begun = False
            for sequence, time_us, delta in self._deltas(stream, asset):
                if sequence > up_to:
                    account.later += sequence <= before.get(stream, 0)
                    continue
                account.entries_total += 1
                if span.has(sequence, time_us):
                    account.opening = account.opening if is_begun else account.final
                    is_begun = True
                    account.closing = account.final + delta
                account.final += delta
            if not is_begun:
                account.opening = account.closing = account.final
            self.accounts.append(account)

    def _deltas(self, stream: str, asset: int) -> Iterator[tuple[int, int, int]]:
        query = "SELECT sequence, time_us, delta FROM entries WHERE stream = ? AND asset_id = ? ORDER BY sequence"
        yield from self._db.execute(query, (stream, asset))

    def entries(self, account: Account, span: Span) -> Iterator[Entry]:
        """Go through an account's entries that are shown, in order, with the balance after each."""
        query = (
            "SELECT sequence, time_us, role, symbol, reference, delta FROM entries"
            " WHERE stream = ? AND asset_id = ? AND sequence <= ? ORDER BY sequence"
        )
        balance = 0
        for row in self._db.execute(query, (account.stream, account.asset_id, account.up_to)):
            balance += row[5]
            if span.has(row[0], row[1]):
                yield Entry._make((*row, balance))


def is_posted(known: Known, sequence: int) -> bool:
    """Say whether no decision forbids an event."""
    gap = known.agreed.gap_at_or_after(sequence)
    return not (gap is not None and gap[0] <= sequence) and sequence not in known.agreed.rejects


async def state(
    store: Store,
    user_id: int,
    asset_id: int | None,
    span: Span,
    *,
    pace: Pace,
    progress: Progress,
    wait_s: float,
) -> Statement:
    """Make the statement of a user's accounts (of all, or of one asset); exact while settlement goes on."""
    throttle = Throttle(pace.rate_rows_s)
    known = await positions(store)
    before = {name: each.sequence for name, each in known.items()}
    rows = [row for row in await store.get_stamped_balances(user_id) if asset_id in (None, row.asset_id)]
    known |= await positions(store)
    wanted: dict[str, int] = {}
    for row in rows:
        wanted[row.stream] = max(wanted.get(row.stream, 0), row.last_sequence or 0)
    known = await reached(store, known, wanted, wait_s)
    progress.rows_expected = sum(each.sequence - each.agreed.first_sequence + 1 for each in known.values())
    progress.doing = "reading trades"
    symbols = {
        name: rule
        for each in known.values()
        for name, rule in each.agreed.symbols.symbols.items()
        if asset_id in (None, rule.base, rule.quote)
    }
    statement = Statement(user_id)
    try:
        await store.ready_for(symbols)
        for symbol in sorted(symbols):
            async for _, some in store.scan_trades_after(symbol, None, rows_a_page=pace.rows_a_page):
                statement.add_trades(symbol, some, known, asset_id)
                progress.rows += len(some)
                await throttle.spend(len(some))
        progress.doing = "reading ledger events"
        for name, each in known.items():
            async for some in store.scan_ledger_events(name, 0, I63_MAX, rows_a_page=pace.rows_a_page):
                statement.add_ledger_events(name, some, each, asset_id)
                progress.rows += len(some)
                await throttle.spend(len(some))
        statement.settle_up(rows, before, span)
    except BaseException:
        statement.close()
        raise
    return statement
