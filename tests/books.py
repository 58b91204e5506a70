"""Books to prove: a stream settled into a store without sockets, hands that change its rows, and what they look like.

`Books` is a settler in small over the shipped ledger and batches: it obeys decisions, starts over from `durable` and
writes with T, so that what a repair does to a living settler can be seen without one's timing.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from typing import Any

from sidecar import decisions
from sidecar.batch import BALANCE_COLUMNS, LEDGER_COLUMNS, REJECTED_COLUMNS, TRADE_COLUMNS, Row, take
from sidecar.events import EMPTY_ACCOUNT, Event, State
from sidecar.ledger import Folded, Ledger, before
from sidecar.store.base import StampedBalance, Store
from tests.streams import BTC, ETH, RULES, USDT, event, ledger_fields, trade_fields

NOW_US = 1_700_000_000_000_000
SYMBOL_OF = {(BTC, USDT): "btc_usdt", (ETH, USDT): "eth_usdt"}


class Books:
    """One stream over an open store, settled event by event."""

    def __init__(
        self,
        store: Store,
        stream: str = "main",
        *,
        seed: int = 1,
        users: int = 40,
        born_us: int = NOW_US,
        rules: dict[str, Any] = RULES,
        source: Iterator[dict[str, Any]] | None = None,
    ) -> None:
        """Take what is settled from `source` (keys of wire.md, numbered here), or draw it."""
        self.store = store
        self.stream = stream
        self.rng = random.Random(seed)
        self.users = users
        self.born_us = born_us
        self.rules = rules
        self.source = source
        self.sequence = 0
        self.events: list[Event] = []
        self._ids = {BTC: 1_000, ETH: NOW_US // 1000 << 16}
        self._ledger: Ledger | None = None
        self._read = 0

    async def begin(self) -> None:
        """Agree, and start over from `durable`: memory is what the rows say."""
        agreed = await decisions.agree(
            self.store, stream=self.stream, first_sequence=1, session=1, engine_session=None, rules=self.rules,
            now_us=self.born_us,
        )  # fmt: skip
        await self.store.ready_for(agreed.symbols.symbols)
        state = (await self.store.load_state(self.stream)).get("durable") or before(1, agreed.base_us)
        self._agreed, self._read = agreed, agreed.decisions_read
        self._ledger = Ledger(
            symbols=agreed.symbols, first_sequence=1, base_us=agreed.base_us, state=state, rejects=agreed.rejects,
            trade_ids_rise="/late" not in self.stream,
        )  # fmt: skip

    def draw(self, count: int) -> list[Event]:
        """Draw the stream's next events: trades of two symbols, some with fees, self-trades, ledger events, rejects."""
        drawn: list[Event] = []
        rng = self.rng
        while self.source is not None and len(drawn) < count:
            self.sequence += 1
            drawn.append(event(next(self.source) | {"output_sequence": self.sequence}))
        if self.source is not None:
            return drawn
        for _ in range(count):
            self.sequence += 1
            dice, user = rng.random(), 1 + rng.randrange(self.users)
            if self.sequence <= 2 * self.users:
                user, dice = 1 + (self.sequence - 1) // 2, 0.0
            if dice < 0.1:
                kind = rng.choice(["DEPOSIT", "DEPOSIT", "WITHDRAWAL", "ADJUSTMENT"])
                asset = rng.choice([BTC, USDT, ETH])
                fields = ledger_fields(self.sequence, user_id=user, asset=asset, event_type=kind)
                fields["amount"] = rng.randint(1, 10**6)
            else:
                base = rng.choice([BTC, ETH])
                self._ids[base] += rng.randint(1, 3) if base == BTC else rng.randint(1, 3) << 16
                fields = trade_fields(
                    self.sequence, trade_id=self._ids[base], base_asset=base, buyer_user_id=user,
                    seller_user_id=1 + rng.randrange(self.users), price=rng.randint(1, 500),
                    quantity=rng.randint(1, 10**6),
                )  # fmt: skip
                if rng.random() < 0.3:
                    fields |= {"buyer_fee": rng.choice([0, 1]), "seller_fee": 0, "quote_amount": rng.randint(1, 900)}
                if dice > 0.99:
                    fields["price"] = 0
            drawn.append(event(fields))
        return drawn

    async def settle(self, events: list[Event], *, trades_max: int = 16, state: bool = True) -> None:
        """Settle events; start over first when there are decisions that were not read."""
        self.events += events
        log = await self.store.read_decisions(self.stream)
        if self._ledger is None or len(log) > self._read:
            await self.begin()
        ledger = self._ledger
        assert ledger is not None
        waiting: deque[Folded] = deque()
        first = ledger.sequence + 1
        left = bisect_right(self.events, ledger.sequence, key=lambda one: one.output_sequence)
        for each in self.events[left:]:
            gap = self._agreed.gap_at_or_after(ledger.sequence + 1)
            if gap is not None and gap[0] == ledger.sequence + 1:
                waiting.append(ledger.pass_over(gap[1]))
            if each.output_sequence <= ledger.sequence:
                continue
            missing = set(ledger.accounts_of(each)) - ledger.accounts.keys()
            found = await self.store.load_accounts(self.stream, missing) if missing else {}
            ledger.accounts.update({key: found.get(key, EMPTY_ACCOUNT) for key in missing})
            waiting.append(ledger.fold(each, NOW_US * 2))
        stamp = ledger.stamp_us
        while waiting:
            batch = take(
                waiting, stream=self.stream, first_sequence=first, trades_max=trades_max, bytes_max=12_288,
                decisions_read=self._read,
            )  # fmt: skip
            first = batch.last_sequence + 1
            if not batch.is_empty:
                await self.store.settle_batch_atomically(batch)
        if state:
            for kind in ("acked", "durable"):
                at = State(ledger.sequence, stamp, dict(ledger.last_trade_ids))
                await self.store.save_state(self.stream, kind, at)

    async def take(self, events: list[Event]) -> None:
        """Settle many events, and let the loop turn now and then: Cassandra's connections live on it."""
        for at in range(0, len(events), 1_000):
            await self.settle(events[at : at + 1_000])

    async def play(self, count: int) -> None:
        """Draw and settle; the last two batches are one user's deposits, so that all others' rows are older."""
        await self.take(self.draw(count))
        tail = []
        for _ in range(20):
            self.sequence += 1
            tail.append(event(ledger_fields(self.sequence, user_id=self.users + 1, asset=USDT)))
        await self.settle(tail)


class Hand:
    """Changes rows behind everybody's back, on either store.

    `quiet` writes take the row's own write time and one more, as damage would; others the wall clock's.
    """

    def __init__(self, store: Store) -> None:
        self.store: Any = store
        self.is_cassandra = store.name == "cassandra"

    async def _run(self, statement: str, values: tuple[Any, ...]) -> None:
        if self.is_cassandra:
            table = statement.replace(" INTO ", f" INTO {self.store._keyspace}.").replace(
                "DELETE FROM ", f"DELETE FROM {self.store._keyspace}."
            )
            await self.store._select(table, values)
        else:
            await self.store._write(self.store._db.execute, statement, values)

    async def write(self, table: str, columns: tuple[str, ...], row: Row, stamp_us: int | None) -> None:
        """Write a row, at a write time of its own where there are any."""
        insert = "INSERT" if self.is_cassandra else "INSERT OR REPLACE"
        statement = f"{insert} INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
        if self.is_cassandra and stamp_us is not None:
            statement, row = f"{statement} USING TIMESTAMP ?", (*row, stamp_us)
        await self._run(statement, row)

    async def delete(self, table: str, key: dict[str, Any], stamp_us: int | None = None) -> None:
        """Delete a row by its key."""
        statement = f"DELETE FROM {table} WHERE {' AND '.join(f'{column} = ?' for column in key)}"
        values = tuple(key.values())
        if self.is_cassandra and stamp_us is not None:
            using = statement.replace(" WHERE", " USING TIMESTAMP ? WHERE")
            await self._run(using, (stamp_us, *values))
        else:
            await self._run(statement, values)

    async def balance(self, user: int, asset: int, stream: str = "main") -> StampedBalance:
        """Read one row."""
        rows = await self.store.get_stamped_balances(user)
        return next(row for row in rows if (row.asset_id, row.stream) == (asset, stream))  # type: ignore[no-any-return]

    async def set_balance(self, row: StampedBalance, *, quiet: bool = True, **values: Any) -> None:
        """Write a balance row with some values changed."""
        changed = row._replace(**values)
        stamp = row.write_us + 1 if quiet and row.write_us else None
        await self.write("user_balances", BALANCE_COLUMNS, tuple(changed[:7]), stamp)

    async def delete_balance(self, row: StampedBalance) -> None:
        """Delete a balance row."""
        key = {"user_id": row.user_id, "asset_id": row.asset_id, "stream": row.stream}
        await self.delete("user_balances", key, row.write_us + 1 if row.write_us else None)

    async def write_trade(self, symbol: str, row: Row) -> None:
        """Write a trade's row at the wall clock's time."""
        await self.write(f"settled_trades_{symbol}", TRADE_COLUMNS, row, None)

    async def delete_trade(self, symbol: str, row: Row) -> None:
        """Delete a trade's row."""
        await self.delete(f"settled_trades_{symbol}", dict(zip(TRADE_COLUMNS[:3], row[:3], strict=True)))

    async def write_ledger_event(self, row: Row) -> None:
        """Write a ledger event's row."""
        await self.write("ledger_events", LEDGER_COLUMNS, row, None)

    async def delete_event(self, table: str, row: Row) -> None:
        """Delete a ledger event's, or a rejected event's row."""
        key = {"stream": row[0], "page": row[1], "output_sequence": row[2]}
        await self.delete(table, key)

    async def write_rejected(self, row: Row) -> None:
        """Write a rejected event's row."""
        await self.write("rejected_events", REJECTED_COLUMNS, row, None)
