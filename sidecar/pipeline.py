"""The pipeline: folded events to batches in flight, and the `acked` position behind them.

No timer: when a slot is free it takes what is waiting. At low load one trade is a batch at once; at high load all slots
are taken and batches fill up by themselves. A batch whose outcome is unknown is given again, the identical value, until
it is answered. One pipeline is one life of the settle loop: when that ends its tasks end with it, and an answer that
comes later moves nothing.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

from sidecar.batch import Batch, Span, take
from sidecar.errors import OutcomeUnknownError
from sidecar.events import State
from sidecar.ledger import Folded

log = logging.getLogger(__name__)

BACKOFF_FIRST_S: Final = 0.05
WAITING_BATCHES_MAX: Final = 4  # folded ahead: more would only leave the processor's cache before its turn comes
UNACKED_FACTOR_MAX: Final = 16  # times the slots: acknowledged batches that wait for one before them have a bound, too


class Pipeline:
    """Up to `inflight_batches_max` batches under way; `acked` is the end of the contiguous acknowledged run."""

    def __init__(
        self,
        *,
        stream: str,
        state: State,
        decisions_read: int,
        attempt: Callable[[Batch], Callable[[], Awaitable[None]]],
        spawn: Callable[[Awaitable[None]], object],
        batch_trades_max: int,
        batch_bytes_max: int,
        inflight_batches_max: int,
        retry_backoff_max_s: float,
        on_submit: Callable[[Span], None] = lambda _: None,
        on_ack: Callable[[Span], None] = lambda _: None,
        jitter: random.Random | None = None,
    ) -> None:
        """Begin after `state`. `spawn` runs a coroutine in the life's task group: its errors end that life.

        `attempt` is the store's: it gives for a batch what settles it, as often as that is called.
        """
        self.acked = state
        self.submitted = state.sequence
        self.retries_total = 0
        self._stream = stream
        self._decisions_read = decisions_read
        self._attempt = attempt
        self._spawn = spawn
        self._trades_max = batch_trades_max
        self._bytes_max = batch_bytes_max
        self._inflight_max = inflight_batches_max
        self._waiting_max = batch_trades_max * WAITING_BATCHES_MAX
        self._unacked_max = inflight_batches_max * UNACKED_FACTOR_MAX
        self._backoff_max_s = retry_backoff_max_s
        self._on_submit = on_submit
        self._on_ack = on_ack
        self._jitter = jitter or random.Random()  # noqa: S311 - spreads retries, guards nothing
        self._waiting: deque[Folded] = deque()
        self._unacked: deque[Span] = deque()  # in order, those acknowledged out of order too
        self._answered: set[int] = set()
        self._inflight = 0
        self._changed = asyncio.Event()

    def add(self, folded: Folded) -> None:
        """Put a folded event in line; it leaves with `room` or when a slot gets free."""
        self._waiting.append(folded)

    async def room(self) -> None:
        """Send what can be sent, and wait while more is waiting than a few batches take."""
        self._fill()
        while len(self._waiting) > self._waiting_max:
            self._changed.clear()
            await self._changed.wait()

    async def drained(self) -> None:
        """Wait until everything that was added is acknowledged."""
        self._fill()
        while self._waiting or self._unacked:
            self._changed.clear()
            await self._changed.wait()

    @property
    def unacked_batches(self) -> int:
        """Count the batches under way."""
        return self._inflight

    def _fill(self) -> None:
        while self._waiting and self._inflight < self._inflight_max and len(self._unacked) < self._unacked_max:
            batch = take(
                self._waiting,
                stream=self._stream,
                first_sequence=self.submitted + 1,
                trades_max=self._trades_max,
                bytes_max=self._bytes_max,
                decisions_read=self._decisions_read,
            )
            span = batch.span
            self.submitted = span.last_sequence
            self._unacked.append(span)
            if batch.is_empty:
                self._ack(span)
                continue
            self._inflight += 1
            self._on_submit(span)
            self._spawn(self._send(span, self._attempt(batch)))

    async def _send(self, span: Span, attempt: Callable[[], Awaitable[None]]) -> None:
        backoff_s = BACKOFF_FIRST_S
        while True:
            try:
                await attempt()
                break
            except OutcomeUnknownError as unknown:
                self.retries_total += 1
                log.warning(
                    "batch_outcome_unknown",
                    extra={"first": span.first_sequence, "last": span.last_sequence, "error": str(unknown)},
                )
            await asyncio.sleep(backoff_s * self._jitter.uniform(0.5, 1.0))
            backoff_s = min(backoff_s * 2, self._backoff_max_s)
        self._inflight -= 1
        self._ack(span)
        self._fill()

    def _ack(self, span: Span) -> None:
        self._answered.add(span.first_sequence)
        self._on_ack(span)
        unacked = self._unacked
        while unacked and unacked[0].first_sequence in self._answered:
            done = unacked.popleft()
            self._answered.remove(done.first_sequence)
            ids = self.acked.last_trade_ids
            if done.last_trade_ids:
                ids = {**ids, **done.last_trade_ids}
            self.acked = State(done.last_sequence, done.stamp_us, ids)
        self._changed.set()
