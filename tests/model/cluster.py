"""A database that keeps its contract and nothing more: cells with write times, and every fault they allow.

Each cell is last-write-wins by its stamp, the larger value on equal stamps. A batch's rows land one by one, late,
again, or in part; an answer may be lost. A node that goes down takes, row by row, the writes of its own last seconds
with it, acknowledged ones too. Decisions are linearizable and survive (they are not rows with stamps).
`Cluster` is the database, `Connection` what one process has of it: its own delays, its own view of outages.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from sidecar.batch import BALANCE_COLUMNS, LEDGER_COLUMNS, REJECTED_COLUMNS, ROW_PAGE_WIDTH, TRADE_COLUMNS, Batch
from sidecar.errors import OutcomeUnknownError
from sidecar.events import Account, AccountKey, Decision, State
from tests.model.oracle import Cells, RowKey

_SAFE = -math.inf  # the time of a write that no power loss can take back
_STATE_COLUMNS = ("sequence", "stamp_us", "last_trade_ids")

Writes = list[tuple[RowKey, Cells]]


@dataclass(frozen=True)
class Faults:
    """How bad things are: probabilities for each request, bounds for each delay."""

    unknown: float = 0.0  # a batch's outcome stays unknown
    late: float = 0.0  # an answered batch lands again, later, whole or in part
    hangs: float = 0.0  # a batch is lost, and that is told late
    read_fails: float = 0.0
    late_s_max: float = 5.0
    slow_s: float = 0.15
    lost_s_max: float = 3.0
    unnoticed_s_max: float = 0.6


class Row:
    """The cells of one row, and the writes they came from while those may still be lost."""

    __slots__ = ("cells", "writes")

    def __init__(self) -> None:
        self.cells: dict[str, tuple[int, Any]] = {}
        self.writes: list[tuple[float, int, Cells]] = []

    def write(self, now_s: float, stamp_us: int, cells: Cells) -> None:
        self.writes.append((now_s, stamp_us, cells))
        self._merge(stamp_us, cells)

    def _merge(self, stamp_us: int, cells: Cells) -> None:
        mine = self.cells
        for name, value in cells.items():
            have = mine.get(name)
            if have is None or stamp_us > have[0] or (stamp_us == have[0] and value > have[1]):
                mine[name] = (stamp_us, value)

    def lose(self, after_s: float, up_to_s: float = math.inf) -> bool:
        """Forget the writes that came within a time; say whether a cell changed. What is left before it is safe."""
        before = self.cells
        kept = [write for write in self.writes if not after_s < write[0] <= up_to_s]
        self.writes = [(_SAFE if at_s <= after_s else at_s, stamp_us, cells) for at_s, stamp_us, cells in kept]
        self.cells = {}
        for _, stamp_us, cells in kept:
            self._merge(stamp_us, cells)
        return self.cells != before

    @property
    def values(self) -> Cells:
        return {name: value for name, (_, value) in self.cells.items()}


class Cluster:
    """The database, and the clock of its faults."""

    def __init__(self, rng: random.Random, faults: Faults, met: Counter[str]) -> None:
        self.loop = asyncio.get_running_loop()
        self.rng = rng
        self.faults = faults
        self.met = met
        self.rows: dict[RowKey, Row] = {}
        self.decisions: dict[str, list[Decision]] = {}
        self.up = True
        self.away = False
        self.falls = 0  # after which nothing that was asked before is answered
        self.pending = 0  # writes that will still land
        self._connections: list[Connection] = []

    def connect(self) -> Connection:
        connection = Connection(self)
        self._connections = [other for other in self._connections if not other.dead]
        self._connections.append(connection)
        return connection

    def calm(self) -> None:
        """From here on nothing new goes wrong."""
        self.faults = Faults(slow_s=0.02)

    # --- outages ---

    def fall(self, for_s: float, *, all_of_it: bool = True) -> None:
        """Lose power: each row loses its own last seconds; come back after `for_s`.

        With `all_of_it` nobody answers meanwhile. Without, other nodes do, and have what this one lost; once it is back
        it is asked again, and the loss shows.
        """
        if self.away:
            return
        now, rng = self.loop.time(), self.rng
        self.away = True
        self.met["outages"] += 1
        if all_of_it:
            self.up = False
            self.falls += 1
            self._lose(now)
        for connection in self._connections:
            self.loop.call_later(rng.random() * min(0.3, for_s), connection.notice_away)
        self.loop.call_later(for_s, self._rise, now)

    def _lose(self, fell_s: float) -> None:
        lost = False
        for row in self.rows.values():
            if self.rng.random() < 0.6:
                lost |= row.lose(fell_s - self.rng.random() * self.faults.lost_s_max, fell_s)
        self.met["losses"] += lost

    def _rise(self, fell_s: float) -> None:
        if self.up:
            self._lose(fell_s)
        self.up = True
        self.away = False
        for connection in self._connections:
            unnoticed_s = self.rng.random() * self.faults.unnoticed_s_max
            self.loop.call_later(unnoticed_s, connection.notice_back)

    # --- writes under way: whatever becomes of those who sent them ---

    def land(self, delay_s: float, stamp_us: int, writes: Writes, *, stubborn: bool = False) -> list[bool]:
        """Let rows land after a delay; what is given back holds True once they have.

        A node that is down does not take them; a `stubborn` write (a replayed batch log) then comes again.
        """
        landed: list[bool] = []
        self.pending += 1
        self.loop.call_later(delay_s, self._land, stamp_us, writes, stubborn, landed)
        return landed

    def _land(self, stamp_us: int, writes: Writes, stubborn: bool, landed: list[bool]) -> None:
        if not self.up:
            if stubborn:
                self.loop.call_later(0.5, self._land, stamp_us, writes, stubborn, landed)
            else:
                self.pending -= 1
            return
        self.pending -= 1
        now = self.loop.time()
        for key, cells in writes:
            row = self.rows.get(key)
            if row is None:
                row = self.rows[key] = Row()
            row.write(now, stamp_us, cells)
        landed.append(True)


def writes_of(batch: Batch) -> Writes:
    """Give the rows of a batch as cells; what is None is not written."""
    writes: Writes = []
    for symbol, rows in batch.trades.items():
        writes += [(("trade", symbol, *row[:3]), _cells(TRADE_COLUMNS[3:], row[3:])) for row in rows]
    writes += [(("ledger", *row[:3]), _cells(LEDGER_COLUMNS[3:], row[3:])) for row in batch.ledger_events]
    writes += [(("rejected", *row[:3]), _cells(REJECTED_COLUMNS[3:], row[3:])) for row in batch.rejected]
    writes += [(("balance", *row[:3]), _cells(BALANCE_COLUMNS[3:], row[3:])) for row in batch.balance_rows()]
    return writes


def _cells(columns: tuple[str, ...], values: tuple[Any, ...]) -> Cells:
    return {column: value for column, value in zip(columns, values, strict=True) if value is not None}


class Connection:
    """One process's store. Not a subclass of `Store`: only what a settler asks for, so a new question shows at once."""

    name = "model"

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.dead = False
        self.outages = 0
        self.steady_since: float | None = None
        self.nodes_away: list[str] = []
        self.deaf_until_s = 0.0  # batches get no answer and don't land
        self.silent_until_s = 0.0  # decisions can't be read
        self.requests = 0
        self.dies_at_request: tuple[int, Any] | None = None

    def notice_away(self) -> None:
        if self.cluster.away:
            self.steady_since = None

    def notice_back(self) -> None:
        self.outages += 1
        self.steady_since = None if self.cluster.away else self.cluster.loop.time()

    async def open(self) -> None:
        await self._ask(0.0)
        self.steady_since = None if self.cluster.away else self.cluster.loop.time()

    async def ready_for(self, _symbols: Iterable[str]) -> None:
        pass

    async def close(self) -> None:
        pass

    async def _pause(self, least_s: float = 0.0) -> None:
        rng, slow_s = self.cluster.rng, self.cluster.faults.slow_s
        await asyncio.sleep(least_s + slow_s * rng.random() ** 4)
        if self.dead:
            raise asyncio.CancelledError

    def _count(self) -> None:
        """A process may die right before a request; what it sent before stays sent."""
        if self.dead:
            raise asyncio.CancelledError
        self.requests += 1
        if self.dies_at_request is not None and self.requests >= self.dies_at_request[0]:
            dies, self.dies_at_request = self.dies_at_request[1], None
            self.cluster.loop.call_soon(dies)

    async def _ask(self, fails: float) -> None:
        """A question's way there and back."""
        self._count()
        fall = self.cluster.falls
        await self._pause()
        if not self.cluster.up or self.cluster.falls != fall or self.cluster.rng.random() < fails:
            raise OutcomeUnknownError("no answer")

    # --- the way of a trade ---

    async def load_accounts(self, stream: str, keys: Iterable[AccountKey]) -> dict[AccountKey, Account]:
        found: dict[AccountKey, Account] = {}
        wanted = list(keys)
        cut = self.cluster.rng.randint(0, len(wanted))
        for some in (wanted[:cut], wanted[cut:]):  # rows are read at their own instants
            if not some:
                continue
            await self._ask(self.cluster.faults.read_fails)
            for key in some:
                row = self.cluster.rows.get(("balance", *key, stream))
                if row is not None and row.cells:
                    found[key] = Account(**row.values)
        return found

    def attempt(self, batch: Batch) -> Callable[[], Awaitable[None]]:
        return partial(self.settle_batch_atomically, batch)

    async def settle_batch_atomically(self, batch: Batch) -> None:
        cluster, rng = self.cluster, self.cluster.rng
        self._count()
        faults, met, fall = cluster.faults, cluster.met, cluster.falls
        if self.deaf_until_s > cluster.loop.time():
            await asyncio.sleep(0.1)
            raise OutcomeUnknownError("timed out")
        if rng.random() < faults.hangs:
            met["hanging batches"] += 1
            await asyncio.sleep(rng.random() * 7.0)
            raise OutcomeUnknownError("timed out")
        writes = writes_of(batch)
        rng.shuffle(writes)
        cut = rng.randint(0, len(writes)) if rng.random() < 0.3 else len(writes)
        first_s, then_s = faults.slow_s * rng.random() ** 4, faults.slow_s * rng.random() ** 4
        landed: list[list[bool]] = []
        if rng.random() < faults.unknown:
            fate = rng.random()
            if fate < 0.3:  # it landed whole, only the answer is lost
                cluster.land(first_s, batch.stamp_us, writes)
            elif fate < 0.8:  # a part of it landed; the rest is replayed later, or never
                cut = rng.randint(0, len(writes))
                met["partial batches"] += 0 < cut < len(writes)
                cluster.land(first_s, batch.stamp_us, writes[:cut])
                if rng.random() < 0.5:
                    met["late writes"] += 1
                    late_s = rng.random() * faults.late_s_max
                    cluster.land(late_s, batch.stamp_us, writes[cut:], stubborn=True)
            elif fate < 0.9:
                met["late writes"] += 1
                cluster.land(rng.random() * faults.late_s_max, batch.stamp_us, writes, stubborn=True)
            landed.append([])
        else:
            landed.append(cluster.land(first_s, batch.stamp_us, writes[:cut]))
            if cut < len(writes):
                landed.append(cluster.land(first_s + then_s, batch.stamp_us, writes[cut:]))
            if rng.random() < faults.late:
                met["repeated writes"] += 1
                some = writes[: rng.randint(1, len(writes))]
                cluster.land(rng.random() * faults.late_s_max, batch.stamp_us, some, stubborn=True)
        await self._pause(first_s + then_s)
        if not all(landed) or cluster.falls != fall:
            met["unknown outcomes"] += 1
            raise OutcomeUnknownError("timed out")

    async def load_state(self, stream: str) -> dict[str, State]:
        await self._ask(self.cluster.faults.read_fails)
        found: dict[str, State] = {}
        for kind in ("acked", "durable"):
            row = self.cluster.rows.get(("state", stream, kind))
            if row is not None and row.cells:
                of = row.values
                found[kind] = State(of["sequence"], of["stamp_us"], json.loads(of["last_trade_ids"]))
        return found

    async def save_state(self, stream: str, kind: str, state: State) -> None:
        ids = json.dumps(state.last_trade_ids, sort_keys=True)
        cells = _cells(_STATE_COLUMNS, (state.sequence, state.stamp_us, ids))
        await self._write([(("state", stream, kind), cells)], state.stamp_us)

    async def _write(self, writes: Writes, stamp_us: int) -> None:
        cluster, fall = self.cluster, self.cluster.falls
        self._count()
        delay_s = cluster.faults.slow_s * cluster.rng.random() ** 4
        landed = cluster.land(delay_s, stamp_us, writes)
        await self._pause(delay_s)
        if not landed or cluster.falls != fall or cluster.rng.random() < cluster.faults.read_fails:
            raise OutcomeUnknownError("timed out")

    # --- look-ups ---

    async def get_trade(self, symbol: str, trade_id: int) -> list[Cells]:
        await self._ask(self.cluster.faults.read_fails)
        keys = [key for key in self.cluster.rows if key[:2] == ("trade", symbol) and key[3] == trade_id]
        return [{**self._row(key), "trade_id": trade_id, "stream": key[4]} for key in keys]

    async def get_rejected(self, stream: str, output_sequence: int) -> Cells | None:
        await self._ask(self.cluster.faults.read_fails)
        return self._row(("rejected", stream, output_sequence // ROW_PAGE_WIDTH, output_sequence)) or None

    async def get_ledger_event(self, stream: str, output_sequence: int) -> Cells | None:
        await self._ask(self.cluster.faults.read_fails)
        found = self._row(("ledger", stream, output_sequence // ROW_PAGE_WIDTH, output_sequence))
        return {**found, "output_sequence": output_sequence} if found else None

    def _row(self, key: RowKey) -> Cells:
        row = self.cluster.rows.get(key)
        return row.values if row is not None else {}

    # --- decisions ---

    async def read_decisions(self, stream: str) -> list[Decision]:
        await self._ask(self.cluster.faults.read_fails)
        if self.silent_until_s > self.cluster.loop.time():
            raise OutcomeUnknownError("no serial answer")
        log = list(self.cluster.decisions.get(stream, ()))
        await self._pause()  # what is told may be old when it arrives
        return log

    async def append_decision(self, decision: Decision) -> bool:
        await self._ask(self.cluster.faults.read_fails)
        log = self.cluster.decisions.setdefault(decision.stream, [])
        if decision.number != len(log) + 1:
            return False
        log.append(decision)
        await self._ask(self.cluster.faults.read_fails)  # it is in, whatever becomes of the answer
        return True

    # --- what a repair needs ---

    async def read_balance(self, stream: str, key: AccountKey) -> tuple[Account | None, int]:
        """Give a balance row and its newest write time in us."""
        await self._ask(0.0)
        row = self.cluster.rows.get(("balance", *key, stream))
        if row is None or not row.cells:
            return None, 0
        return Account(**row.values), max(stamp_us for stamp_us, _ in row.cells.values())

    async def write_balance(self, stream: str, key: AccountKey, cells: Cells, stamp_us: int) -> None:
        """Write a balance row as it must be, with a stamp of its own."""
        await self._write([(("balance", *key, stream), cells)], stamp_us)
