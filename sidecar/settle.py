"""The settling half: tape → ledger → pipeline → store → acked → durable, in lives.

A life begins at `durable` with empty memory and ends when memory might no longer agree with the store: a new decision,
a database node that was away, a batch the server finds too large. The next life begins at `durable` again; replaying is
harmless (ledger.py, batch.py). A halt ends no life: what stands before it is settled, positions move on, decisions are
read, and recording never hears of it.

After a crash the store holds some of the batches in flight, whole, in any combination; the next start folds from
`durable` and skips, account by account, what they have counted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, Final, TypeVar

from sidecar import decisions as decision_log
from sidecar.batch import Batch
from sidecar.decisions import Agreed, DecisionRefusedError
from sidecar.errors import (
    AccountMissingError,
    BatchTooLargeError,
    Halt,
    OutcomeUnknownError,
    StartOver,
    StoreRefusedError,
    TapeDamagedError,
    TapeMissingError,
)
from sidecar.events import EMPTY_ACCOUNT, AccountKey, Event, State
from sidecar.foreign import SESSION_STEP, ForeignPart
from sidecar.ledger import Ledger, before
from sidecar.pipeline import Pipeline
from sidecar.store.base import Store
from sidecar.tape import Tail, TapeReader, paused_path, read_settled, write_settled

log = logging.getLogger(__name__)
T = TypeVar("T")

BURST_EVENTS_MAX: Final = 512  # read from the tape, and folded, without giving the loop away
TICK_S: Final = 1.0  # decisions are read, positions are saved
WAIT_S: Final = 0.1  # for the tape to move, before signals and the pause file are looked at again
ACCOUNTS_READ_MAX: Final = 2_000  # in one question to the store


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The bounds of the settling half, named as in the configuration (design.md)."""

    batch_trades_max: int = 16
    batch_bytes_max: int = 12_288
    inflight_batches_max: int = 16
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
        on_submit: Callable[[Batch], None] = lambda _: None,
        on_ack: Callable[[Batch], None] = lambda _: None,
    ) -> None:
        self.agreed = agreed
        self.durable = start
        self.deletable = start.sequence
        self.ledger = Ledger(
            symbols=agreed.symbols,
            first_sequence=agreed.first_sequence,
            base_us=agreed.base_us,
            state=start,
            rejects=agreed.rejects,
        )
        self.pipeline = Pipeline(
            stream=stream,
            state=start,
            decisions_read=agreed.decisions_read,
            settle_batch=store.settle_batch_atomically,
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
        missing = needed.difference(accounts)  # `- accounts.keys()` would walk through all accounts
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
            durable = self._steadily_acked(now)
            if acked.sequence > self._saved_acked:
                await self._store.save_state(self._stream, "acked", acked)
                self._saved_acked = acked.sequence
            if durable is not None and durable.sequence > self.durable.sequence:
                await self._store.save_state(self._stream, "durable", durable)
                self.durable = durable
                self._durables.append((now, durable.sequence))
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


class Settler:
    """The settle loop of one stream over one tape: lives, one after the other, until it is told to stop."""

    def __init__(
        self,
        *,
        store: Store,
        tape_path: Path,
        tail: Tail | None,
        stream: str,
        first_sequence: int,
        rules: dict[str, Any],
        bounds: Bounds,
        on_gap: str = "halt",
        gap_after_s: float = 5.0,
        replay_configured: bool = False,
        ack_log: Path | None = None,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        """Take the store, the tape's path (and its tail, with the recorder in this process), the stream, its rules."""
        self.store = store
        self.state = "waiting"
        self.halted: Halt | None = None
        self.life: Life | None = None
        self.lives = 0
        self._tape_path = tape_path
        self._tail = tail
        self._stream = stream
        self._first_sequence = first_sequence
        self._rules = rules
        self._bounds = bounds
        self._batch_trades_max = bounds.batch_trades_max
        self._on_gap = on_gap
        self._gap_after_s = gap_after_s
        self._replay_configured = replay_configured
        self._now_us = now_us
        self._stopping = asyncio.Event()
        self._limit: asyncio.Timeout | None = None
        self._agreed: Agreed | None = None
        self._submitted = 0
        self._hole_since: tuple[int, float] | None = None
        self._pause_looked_at = 0.0
        self._paused = False
        self._session = 0
        self._said_before: dict[str, Any] = {}
        self._tape_id = 0
        self._foreign_to = 0
        self._foreign: ForeignPart | None = None
        self._ack_log: IO[bytes] | None = None
        self._notes = bytearray()
        self._ack_log_path = ack_log
        self._tick_s = min(TICK_S, bounds.durable_after_s / 2)

    def stop(self) -> None:
        """Take nothing more; `run` returns when what is under way is acknowledged, or `shutdown_timeout_s` is over."""
        self._stopping.set()
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + self._bounds.shutdown_timeout_s)

    async def run(self) -> None:
        """Settle until `stop`. Raises only what no new life can mend (RulesChangedError, bugs)."""
        if self._ack_log_path is not None:
            self._ack_log = self._ack_log_path.open("ab", buffering=0)  # a kill loses no line
        self._said_before = read_settled(self._tape_path) or {}
        if self._said_before.get("stream") == self._stream:  # so that a kill right after the next line forgets nothing
            self._tape_id = self._said_before.get("tape_id", 0)
            self._foreign_to = self._said_before.get("foreign_to", 0)
        self._say()
        try:
            await self._open_store()
            while not self._stopping.is_set():
                self.lives += 1
                halted: Halt | None = None
                try:
                    await self._live()
                except* StartOver as over:
                    log.info("start_over", extra={"life": self.lives, "reason": _first(over)})
                except* BatchTooLargeError as too_large:
                    if self._batch_trades_max == 1:
                        step = "raise the server's batch_size_fail_threshold, then restart the sidecar"
                        halted = Halt("STORE_REFUSED", self._next_sequence(), _first(too_large), step)
                    self._batch_trades_max = max(self._batch_trades_max // 2, 1)
                    log.warning(
                        "start_over",
                        extra={
                            "life": self.lives,
                            "reason": _first(too_large),
                            "batch_trades_max": self._batch_trades_max,
                        },
                    )
                except* StoreRefusedError as refused:
                    step = "make the database accept it (schema, rights), then restart the sidecar"
                    halted = Halt("STORE_REFUSED", self._next_sequence(), _first(refused), step)
                except* Halt as halt:
                    halted = _innermost(halt)
                except* OutcomeUnknownError as unknown:
                    self._stand("waiting")
                    log.warning("store_unreachable", extra={"error": _first(unknown)})
                    await self._stopped_within(self._tick_s)
                if halted is not None:
                    await self._stay_halted(halted)
        finally:
            self._say()
            if self._ack_log is not None:
                self._write_notes()
                self._ack_log.close()
                self._ack_log = None

    def _next_sequence(self) -> int:
        return self.life.pipeline.acked.sequence + 1 if self.life else self._first_sequence

    async def _live(self) -> None:
        """Live one life: agree, begin at `durable`, settle what the tape holds and goes on to hold."""
        reader = await self._tape()
        if reader is None:
            return
        try:
            agreed = await self._agree(reader)
            if agreed is None:
                return
            self._check_decisions(agreed)
            await self.store.ready_for(agreed.symbols.symbols)
            state = (await self.store.load_state(self._stream)).get("durable")
            start = state or before(agreed.first_sequence, agreed.base_us)
            self._know_tape(reader, agreed, start)
            async with asyncio.TaskGroup() as tasks:
                self.life = life = Life(
                    store=self.store,
                    stream=self._stream,
                    agreed=agreed,
                    start=start,
                    bounds=self._bounds,
                    batch_trades_max=self._batch_trades_max,
                    spawn=tasks.create_task,  # type: ignore[arg-type]
                    on_submit=self._note_submit,
                    on_ack=self._note_ack,
                    now_us=self._now_us,
                )
                log.info("life_begins", extra={"life": self.lives, "durable": start.sequence, "stream": self._stream})
                self._stand("running")
                ticking = tasks.create_task(self._tick(life))
                await self._settle_until_stopped(life, reader)
                ticking.cancel()
                if life.pipeline.unacked_batches:
                    raise StartOver("stopped with batches under way")  # ends them with the life
        finally:
            reader.close()

    async def _settle_until_stopped(self, life: Life, reader: TapeReader) -> None:
        try:
            async with asyncio.timeout(None) as self._limit:
                try:
                    await self._settle(life, reader)
                except (Halt, TapeDamagedError) as why:
                    self._halt(why if isinstance(why, Halt) else _damaged(why, life))
                    await self._stopping.wait()  # a new decision ends this life: see Life.tick
                await life.pipeline.drained()
                await life.save_acked()
        except TimeoutError:
            log.warning("shutdown_timeout", extra={"unacked_batches": life.pipeline.unacked_batches})
        except OutcomeUnknownError as error:
            log.warning("acked_not_saved", extra={"error": str(error)})
        finally:
            self._limit = None

    async def _settle(self, life: Life, reader: TapeReader) -> None:
        async for burst in self._bursts(life, reader):
            await life.settle(burst)

    async def _bursts(self, life: Life, reader: TapeReader) -> AsyncIterator[list[Event]]:
        """Give the contiguous run of the stream's session, burst by burst; stand before holes and borders."""
        agreed, position, stood_at = life.agreed, life.ledger.sequence, -1
        while not self._stopping.is_set():
            if self._is_paused():
                self._stand("paused")
                await self._stopped_within(WAIT_S)
                continue
            if life.is_out_of_touch:
                await self._stopped_within(WAIT_S)
                continue
            if self._foreign is not None:
                await until_known(partial(self._foreign.compare, reader), self._bounds)
            gap = agreed.gap_at_or_after(position + 1)
            if gap is not None and gap[0] <= position + 1:
                await life.pass_over(gap[1])
                position = gap[1]
                continue
            events_max = min(BURST_EVENTS_MAX, gap[0] - position - 1) if gap else BURST_EVENTS_MAX
            burst = reader.read(agreed.session, position, events_max)
            if burst:
                self._stand("running")
                yield burst
                position = burst[-1].output_sequence
                await asyncio.sleep(0)  # a long backlog must not keep the recorder from its socket
                continue
            if stood_at == position:
                await self._stand_before(life, reader, position)
            stood_at = position
            await reader.moved(WAIT_S)

    def _is_paused(self) -> bool:
        """Look for the pause file, now and then: a look at every trade would cost more than the trade."""
        now = asyncio.get_running_loop().time()
        if now >= self._pause_looked_at + WAIT_S:
            self._pause_looked_at, self._paused = now, paused_path(self._tape_path).exists()
        return self._paused

    async def _stand_before(self, life: Life, reader: TapeReader, position: int) -> None:
        """Nothing contiguous is left: say what stands in the way, and do what the configuration says about a hole."""
        look = reader.look(life.agreed.session, position)
        now = asyncio.get_running_loop().time()
        if look.hole is not None:
            first, last = look.hole
            if self._hole_since is None or self._hole_since[0] != first:
                self._hole_since = (first, now)
            stood_s = now - self._hole_since[1]
            if self._on_gap == "record" and stood_s >= self._gap_after_s and not self._replay_configured:
                await self._record_gap(first, last)
            elif self._on_gap == "halt" and (stood_s >= self._gap_after_s or not self._replay_configured):
                accept = f"sidecar gap accept {first} {last} --reason '…'"
                step = f"find the frames (an archive, another host's tape), or give them up: `{accept}`"
                self._halt(Halt("GAP", first, f"sequences {first} to {last} never reached this tape", step))
        elif look.newer_session is not None:
            reason = f"the engine began anew or contradicted itself: the tape goes on in session {look.newer_session}"
            self._halt(Halt("SESSION_CHANGED", position + 1, reason, SESSION_STEP))
        else:
            self._hole_since = None
            self._stand("running")

    async def _record_gap(self, first: int, last: int) -> None:
        reason = f"on_gap = record: stood for {self._gap_after_s} s, nobody serves the past"
        try:
            await decision_log.accept_gap(
                self.store, self._stream, first, last, present=[], reason=reason, now_us=self._now_us()
            )
        except DecisionRefusedError as refused:  # another host has settled them: they exist
            step = f"bring sequences {first} to {last} from the tape of the host that has settled them"
            self._halt(Halt("GAP", first, f"sequences {first} to {last} never reached this tape; {refused}", step))
            self._hole_since = None  # and ask again
            return
        log.error("gap_recorded", extra={"first": first, "last": last})
        raise StartOver(f"gap {first}…{last} recorded")

    async def _tick(self, life: Life) -> None:
        while True:
            await asyncio.sleep(self._tick_s)
            await life.tick()
            self._say()

    # --- beginnings ---

    async def _open_store(self) -> None:
        while not self._stopping.is_set():
            try:
                await self.store.open()
            except OutcomeUnknownError as unknown:
                self._stand("waiting")
                log.warning("store_unreachable", extra={"error": str(unknown)})
                await self._stopped_within(self._bounds.retry_backoff_max_s)
            except StoreRefusedError as refused:
                step = "make the database accept it (schema, rights): it is tried again"
                self._halt(Halt("STORE_REFUSED", self._next_sequence(), str(refused), step))
                await self._stopped_within(self._bounds.retry_backoff_max_s)
            else:
                return

    async def _tape(self) -> TapeReader | None:
        while not self._stopping.is_set():
            try:
                return TapeReader(self._tape_path, self._tail)
            except TapeMissingError:
                self._stand("waiting")
                await self._stopped_within(WAIT_S)
        return None

    async def _agree(self, reader: TapeReader) -> Agreed | None:
        """Agree with the stream's log; before its genesis there must be a session on the tape to name in it."""
        known = await decision_log.read_agreed(self.store, self._stream)
        session = engine_session = None
        while known is None and not self._stopping.is_set():
            if (first := self._unclaimed_session(reader)) is not None:
                session, engine_session = first
                break
            self._stand("waiting")
            await reader.moved(WAIT_S)
        if known is None and session is None:
            return None
        agreed = await decision_log.agree(
            self.store,
            stream=self._stream,
            first_sequence=self._first_sequence,
            session=session or 0,
            engine_session=engine_session,
            rules=self._rules,
            now_us=self._now_us(),
        )
        self._session = agreed.session
        for warning in agreed.warnings:
            log.warning("configuration_differs", extra={"warning": warning})
        return agreed

    def _check_decisions(self, agreed: Agreed) -> None:
        """Halt at a new decision about what an earlier life has submitted, whatever ended that life."""
        read, self._agreed = self._agreed, agreed
        if read is None:
            return
        for kind, first, last in (*(("gap", *gap) for gap in agreed.gaps), *(("reject", n, n) for n in agreed.rejects)):
            new = first
            while (gap := read.gap_at_or_after(new)) is not None and gap[0] <= new:
                new = gap[1] + 1
            if new <= min(last, self._submitted) and new not in read.rejects:
                reason = f"a {kind} of {first} to {last} was decided when up to {self._submitted} was submitted already"
                step = "run `sidecar reconcile`; two operators or hosts disagree about these sequences"
                raise Halt("DECISION_CONFLICT", new, reason, step)

    def _unclaimed_session(self, reader: TapeReader) -> tuple[int, int | None] | None:
        """Give the oldest session of the tape that no earlier stream has settled from it."""
        said = self._said_before
        claimed = said.get("session", 0) if said.get("stream") != self._stream else 0
        return next(((row.session, row.engine_session) for row in reader.sessions() if row.session > claimed), None)

    # --- a tape that did not settle what the store holds: a new host, a lost tape ---

    def _know_tape(self, reader: TapeReader, agreed: Agreed, start: State) -> None:
        """Find out up to where the stream was settled from another tape than this one."""
        said = self._said_before
        self._tape_id = reader.tape_id
        own = said.get("tape_id") == self._tape_id and said.get("stream") == self._stream
        foreign_to = said.get("foreign_to", 0) if own else start.sequence
        self._foreign_to = foreign_to if foreign_to >= agreed.first_sequence else 0
        self._said_before = self.said()
        if self._foreign_to:
            self._foreign = ForeignPart(self.store, self._stream, agreed, self._foreign_to)

    # --- how it stands: told to the recorder and to `status` ---

    def _stand(self, state: str) -> None:
        if state != "halted" and self.halted is not None:
            log.info("halt_ends", extra={"code": self.halted.code, "sequence": self.halted.sequence})
            self.halted = None
        if state != self.state:
            self.state = state
            self._say()

    def _halt(self, halt: Halt) -> None:
        if self.halted is None or (self.halted.code, self.halted.sequence) != (halt.code, halt.sequence):
            log.error(
                "halted",
                extra={
                    "code": halt.code,
                    "sequence": halt.sequence,
                    "reason": halt.reason,
                    "next_step": halt.next_step,
                },
            )
            self.halted, self.state = halt, "halted"
            self._say()

    async def _stay_halted(self, halt: Halt) -> None:
        """Stay, between two lives, until there is a new decision or the process is stopped."""
        self._halt(halt)
        read = self.life.agreed.decisions_read if self.life else 0
        while not await self._stopped_within(self._tick_s):
            try:
                known = await self.store.read_decisions(self._stream)
                if len(known) > read and halt.code != "DECISION_CONFLICT":
                    return
            except (OutcomeUnknownError, StoreRefusedError) as error:
                log.warning("store_unreachable", extra={"error": str(error)})
            self._say()

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return False
        return True

    def _note_submit(self, batch: Batch) -> None:
        self._submitted = max(self._submitted, batch.last_sequence)
        if self._ack_log is not None:
            self._note(b"# submitted %d %d\n" % (batch.first_sequence, batch.last_sequence))

    def _note_ack(self, batch: Batch) -> None:
        if self._ack_log is not None:
            self._note(b"%d %d %d\n" % (batch.first_sequence, batch.last_sequence, self._now_us()))

    def _note(self, line: bytes) -> None:
        if not self._notes:  # one write for all that a turn of the loop has to say
            asyncio.get_running_loop().call_soon(self._write_notes)
        self._notes += line

    def _write_notes(self) -> None:
        if self._ack_log is not None:
            self._ack_log.write(self._notes)
        self._notes.clear()

    def said(self) -> dict[str, Any]:
        """Tell how settlement stands: what `<tape>.settled` holds."""
        halt, life = self.halted, self.life
        return {
            "stream": self._stream,
            "session": self._session,
            "tape_id": self._tape_id,
            "foreign_to": self._foreign_to,
            "state": self.state,
            "halted": halt
            and {"code": halt.code, "sequence": halt.sequence, "reason": halt.reason, "next_step": halt.next_step},
            "acked": life.pipeline.acked.sequence if life else 0,
            "durable": life.durable.sequence if life else 0,
            "deletable": life.deletable if life else 0,
            "life": self.lives,
            "unacked_batches": life.pipeline.unacked_batches if life else 0,
            "negative_balances": life.ledger.negative_total if life else 0,
            "pid": os.getpid(),
            "said_at_us": self._now_us(),
        }

    def _say(self) -> None:
        write_settled(self._tape_path, self.said())


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


def _damaged(damaged: TapeDamagedError, life: Life) -> Halt:
    step = "restore the tape from a copy, or begin a new one that another host or an archive fills"
    return Halt("TAPE_DAMAGED", damaged.sequence or life.ledger.sequence + 1, str(damaged), step)


def _innermost(group: BaseExceptionGroup[Any]) -> Any:
    error: Any = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _first(group: BaseExceptionGroup[Any]) -> str:
    return str(_innermost(group))
