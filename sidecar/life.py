"""One life of the settle loop: a ledger and a pipeline that agree with what the store and its decisions said.

A life begins at `durable` with empty memory and ends when memory might no longer agree with the store: a new decision,
a database node that was away, a batch the server finds too large. The next life begins at `durable` again; replaying is
harmless (ledger.py, batch.py).

After a crash the store holds some of the batches in flight, whole, in any combination; the next start folds from
`durable` and skips, account by account, what they have counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, TypeVar

from sidecar.batch import Span
from sidecar.decisions import Agreed
from sidecar.errors import AccountMissingError, Halt, OutcomeUnknownError, StartOver
from sidecar.events import EMPTY_ACCOUNT, AccountKey, Event, State
from sidecar.ledger import Ledger
from sidecar.pipeline import Pipeline
from sidecar.store.base import Store

log = logging.getLogger(__name__)
T = TypeVar("T")

TICK_S: Final = 1.0  # decisions are read, positions are saved
WAIT_S: Final = 0.1  # for the tape to move, before signals and the pause file are looked at again
ACCOUNTS_READ_MAX: Final = 2_000  # in one question to the store


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The bounds of the settling half, named as in the configuration (design.md)."""

    batch_trades_max: int = 32
    batch_bytes_max: int = 12_288
    inflight_batches_max: int = 32
    durable_after_s: float = 20.0
    accounts_max: int = 2_000_000
    shutdown_timeout_s: float = 20.0
    retry_backoff_max_s: float = 2.0


class Life:
    """One life: a ledger and a pipeline that agree with what the store and its decisions said at its start."""

    def __init__(
        self,
        *,
        store: Store,
        stream: str,
        agreed: Agreed,
        start: State,
        bounds: Bounds,
        batch_trades_max: int,
        spawn: Callable[[Awaitable[None]], object],
        now_us: Callable[[], int],
        trade_ids_rise: bool = True,
        on_submit: Callable[[Span], None] = lambda _: None,
        on_ack: Callable[[Span], None] = lambda _: None,
    ) -> None:
        self.agreed = agreed
        self.durable = start
        self.deletable = start.sequence
        self.lacks: int | None = None  # the sequence before which settlement stands, because the tape lacks it
        self.elsewhere = 0  # up to where others are acknowledged, as far as that was asked: while something is lacking
        self.ledger = Ledger(
            symbols=agreed.symbols,
            first_sequence=agreed.first_sequence,
            base_us=agreed.base_us,
            state=start,
            rejects=agreed.rejects,
            trade_ids_rise=trade_ids_rise,
        )
        self.pipeline = Pipeline(
            stream=stream,
            state=start,
            decisions_read=agreed.decisions_read,
            attempt=store.attempt,
            spawn=spawn,
            batch_trades_max=batch_trades_max,
            batch_bytes_max=bounds.batch_bytes_max,
            inflight_batches_max=bounds.inflight_batches_max,
            retry_backoff_max_s=bounds.retry_backoff_max_s,
            on_submit=on_submit,
            on_ack=on_ack,
        )
        self._store = store
        self._stream = stream
        self._bounds = bounds
        self._now_us = now_us
        self._outages = store.outages
        self._saved_acked = start.sequence
        self._read_at = asyncio.get_running_loop().time()
        self._checkpoints: deque[tuple[float, State]] = deque()
        self._durables: deque[tuple[float, int]] = deque()

    async def settle(self, events: list[Event]) -> None:
        """Settle the stream's next events: fold without giving the loop away, then back-pressure.

        At the first event that needs an account which memory lacks, those of all that follow are read together. Raises
        Halt at an event that can't be settled; those before it are on their way.
        """
        fold, pipeline, now_us = self.ledger.fold, self.pipeline, self._now_us()
        try:
            for place, event in enumerate(events):
                try:
                    folded = fold(event, now_us)
                except AccountMissingError:
                    await self._load_missing(events[place:])
                    folded = fold(event, now_us)
                pipeline.add(folded)
        except Halt:
            await pipeline.room()
            raise
        await pipeline.room()

    async def pass_over(self, last_sequence: int) -> None:
        """Step over an accepted gap."""
        self.pipeline.add(self.ledger.pass_over(last_sequence))
        await self.pipeline.room()

    async def _load_missing(self, events: list[Event]) -> None:
        accounts, accounts_of = self.ledger.accounts, self.ledger.accounts_of
        needed = set(chain.from_iterable(map(accounts_of, events)))
        missing = {key for key in needed if key not in accounts}  # `-` would walk through all accounts
        await self._make_room(len(missing), needed)
        keys = sorted(missing)
        for at in range(0, len(keys), ACCOUNTS_READ_MAX):
            some = keys[at : at + ACCOUNTS_READ_MAX]
            found = await until_known(lambda some=some: self._store.load_accounts(self._stream, some), self._bounds)  # type: ignore[misc]
            accounts.update({key: found.get(key, EMPTY_ACCOUNT) for key in some})

    async def _make_room(self, wanted: int, needed: set[AccountKey]) -> None:
        """Evict what is durable and not needed now; while more of it may become durable, settlement waits.

        What remains then goes over the bound: it is needed together, or its rows are ahead of all that is settled.
        """
        ledger, accounts_max = self.ledger, self._bounds.accounts_max
        while len(ledger.accounts) + wanted > accounts_max:
            ledger.evict(self.durable.sequence, max(accounts_max - wanted - accounts_max // 20, 0), needed)
            fits = len(ledger.accounts) + wanted <= accounts_max
            if fits or self.durable.sequence >= ledger.sequence or ledger.accounts.keys() <= needed:
                return
            await self.pipeline.drained()
            await asyncio.sleep(WAIT_S)

    async def tick(self) -> None:
        """Read decisions, save positions, move `durable`. Raises StartOver or Halt; skipped while unreachable."""
        now = asyncio.get_running_loop().time()
        acked = self.pipeline.acked
        try:
            known = await self._store.read_decisions(self._stream)
            self._read_at = now
            self._obey(known)
            self._checkpoints.append((now, acked))
            await self._look_elsewhere(now)
            durable = self._steadily_acked(now)
            if acked.sequence > self._saved_acked:
                await self._store.save_state(self._stream, "acked", acked)
                self._saved_acked = acked.sequence
            if durable is not None and durable.sequence > self.durable.sequence:
                await self._store.save_state(self._stream, "durable", durable)
                self.durable = durable
                self._durables.append((now, durable.sequence))
                if durable.sequence > self.ledger.sequence:
                    raise StartOver(
                        f"up to {durable.sequence} was settled elsewhere, and is durable: the tape lacks it"
                    )
            while self._durables and self._durables[0][0] <= now - self._bounds.durable_after_s:
                self.deletable = self._durables.popleft()[1]
        except OutcomeUnknownError as unknown:
            log.warning("store_unreachable", extra={"error": str(unknown)})

    @property
    def is_out_of_touch(self) -> bool:
        """Say whether the decisions were last read so long ago that a repair may have been made meanwhile.

        A repair is written and decided within `durable_after_s`; whoever settles on without having read it would write
        over it (found by the model in tests/model).
        """
        return asyncio.get_running_loop().time() - self._read_at > self._bounds.durable_after_s + TICK_S

    async def save_acked(self) -> None:
        """Save the `acked` position, at the end of a life."""
        if self.pipeline.acked.sequence > self._saved_acked:
            await self._store.save_state(self._stream, "acked", self.pipeline.acked)
            self._saved_acked = self.pipeline.acked.sequence

    def _obey(self, known: list[Any]) -> None:
        if self._store.outages != self._outages:
            raise StartOver("a database node was away and is back")
        fresh = known[self.agreed.decisions_read :]
        if fresh:
            raise StartOver(f"{len(fresh)} new decision(s): {', '.join(entry.kind for entry in fresh)}")

    async def _look_elsewhere(self, now: float) -> None:
        """Where the tape lacks what another host has settled: that becomes durable as what is settled here does.

        Otherwise a tape that begins between `durable` and `acked` could never be gone on with: nothing of it may be
        given up, since it is settled, and nobody would be there to make it durable.
        """
        lacks = self.lacks  # replay may fill it meanwhile
        if lacks is None:
            return
        acked = (await self._store.load_state(self._stream)).get("acked")
        if acked is not None and acked.sequence >= lacks:
            self.elsewhere = acked.sequence
            self._checkpoints.append((now, acked))

    def _steadily_acked(self, now: float) -> State | None:
        """Give the newest position acknowledged at least `durable_after_s` ago, if all nodes stood since then."""
        since = self._store.steady_since
        settled_by = now - self._bounds.durable_after_s
        if since is None:
            self._checkpoints.clear()  # what was acknowledged before the node is back counts from then on
        if since is None or since > settled_by:
            return None
        durable = None
        while self._checkpoints and self._checkpoints[0][0] <= settled_by:
            durable = self._checkpoints.popleft()[1]
        return durable


async def until_known(ask: Callable[[], Awaitable[T]], bounds: Bounds) -> T:
    """Ask the store until it answers; any unknown outcome is asked again with backoff."""
    backoff_s = 0.05
    while True:
        try:
            return await ask()
        except OutcomeUnknownError as unknown:
            log.warning("store_unreachable", extra={"error": str(unknown)})
        await asyncio.sleep(backoff_s)
        backoff_s = min(backoff_s * 2, bounds.retry_backoff_max_s)
