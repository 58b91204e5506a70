"""The settling half: tape → ledger → pipeline → store → acked → durable, in lives (life.py), one after the other.

A halt ends no life: what stands before it is settled, positions move on, decisions are read, and recording never hears
of it. What a crash leaves behind, and how the next start takes it up, is said in life.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Final

from sidecar import decisions as decision_log
from sidecar.batch import Span
from sidecar.decisions import Agreed, DecisionRefusedError
from sidecar.errors import (
    BatchTooLargeError,
    Halt,
    OutcomeUnknownError,
    StartOver,
    StoreRefusedError,
    TapeDamagedError,
    TapeMissingError,
)
from sidecar.events import I63_MAX, Event, State
from sidecar.foreign import SESSION_STEP, ForeignPart
from sidecar.late import LateReading, not_ours
from sidecar.latency import Acknowledged
from sidecar.ledger import before
from sidecar.life import TICK_S, WAIT_S, Bounds, Life, until_known
from sidecar.store.base import Store
from sidecar.streams import Streams
from sidecar.tape import Tail, TapeReader, paused_path, read_recorded, read_settled, write_settled

log = logging.getLogger(__name__)

BURST_EVENTS_MAX: Final = 128  # read from the tape, and folded, without giving the loop away: answers wait meanwhile
_CONFLICT_STEP: Final = "run `sidecar reconcile`; two operators or hosts disagree about these sequences"


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
        replay_endpoint: str | None = None,
        ack_log: Path | None = None,
        late: LateReading | None = None,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        """Take the store, the tape's path (and its tail, with the recorder in this process), the stream, its rules.

        `replay_endpoint` is whom the recorder asks for what is missing, None when nobody serves the past.
        With `late` it is a late stream that is settled, from the late tape beside that path.
        """
        self.store = store
        self.state = "waiting"
        self.halted: Halt | None = None
        self.life: Life | None = None
        self.lives = 0
        self.acknowledged = Acknowledged(now_us)
        self.agreed: Agreed | None = None
        self._earlier_lives = Counter[str]()
        self._tape_path = tape_path
        self._tail = tail
        self._configured = self._stream = stream
        self._first_sequence = first_sequence
        self._rules = rules
        self._bounds = bounds
        self._batch_trades_max = bounds.batch_trades_max
        self._on_gap = on_gap
        self._gap_after_s = gap_after_s
        self._replay_endpoint = replay_endpoint
        self._now_us = now_us
        self._stopping = asyncio.Event()
        self._limit: asyncio.Timeout | None = None
        self._submitted = 0
        self._hole_since: tuple[int, float] | None = None
        self._pause_looked_at = 0.0
        self._paused = False
        self._session = 0
        self._streams = Streams(None)
        self._was = 0, 0  # durable and decisions, as the settler before said: a store that knows less was set back
        self._unsaid = False
        self._foreign_to = 0
        self._foreign: ForeignPart | None = None
        self._ack_log: IO[bytes] | None = None
        self._notes = bytearray()
        self._ack_log_path = ack_log
        self._late = late
        self._told_path = late.told_path if late is not None else tape_path
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
        told = read_settled(self._told_path) or {}
        self._streams = Streams(told)
        if told.get("stream") == self._stream:
            self._was = told.get("durable", 0), told.get("decisions", 0)
        self._remember()  # so that a kill right after the next line forgets nothing
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
                except* TapeDamagedError as damaged:
                    halted = _damaged(_innermost(damaged), self._next_sequence())
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
            self._streams.is_on(reader.tape_id)
            self._remember()
            agreed = await self._agree(reader)
            if agreed is None:
                return
            self._check_decisions(agreed)
            if self._late is not None and agreed.late_tape_id != reader.tape_id:
                raise not_ours(self._stream, reader, agreed.late_tape_id)
            await self.store.ready_for(agreed.symbols.symbols)
            state = await self.store.load_state(self._stream)
            start = state.get("durable") or before(agreed.first_sequence, agreed.base_us)
            if agreed.ends_at is not None and start.sequence >= agreed.ends_at:
                self._go_on(agreed, start.sequence)
                return
            known, was, self._was = (start.sequence, agreed.decisions_read), self._was, (0, 0)
            if known[0] < was[0] or known[1] < was[1]:
                about = {"durable": known[0], "durable_was": was[0], "decisions": known[1], "decisions_were": was[1]}
                log.warning("store_is_older", extra={"stream": self._stream, **about})
            if not await self._find_session(reader, agreed):
                return
            agreed = replace(agreed, session=self._session)
            self.acknowledged.begin(reader, agreed.session, state.get("acked", start).sequence)
            self._know_tape(agreed, start)
            async with asyncio.TaskGroup() as tasks:
                self._earlier_lives = self.counts()
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
                    trade_ids_rise=self._late is None,
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
            if self.life is not None:  # what ended it holds it, in a circle, until the collector comes
                self.life.ledger.accounts.clear()

    async def _settle_until_stopped(self, life: Life, reader: TapeReader) -> None:
        try:
            async with asyncio.timeout(None) as self._limit:
                try:
                    await self._settle(life, reader)
                except (Halt, TapeDamagedError) as why:
                    self._halt(why if isinstance(why, Halt) else _damaged(why, life.ledger.sequence + 1))
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
        ends_at = I63_MAX if agreed.ends_at is None else agreed.ends_at
        while not self._stopping.is_set():
            if self._is_paused():
                self._stand("paused")
                await self._stopped_within(WAIT_S)
                continue
            if life.is_out_of_touch:
                await self._stopped_within(WAIT_S)
                continue
            gap = agreed.gap_at_or_after(position + 1)
            if position >= ends_at:
                await self._end_stream(life)
                continue
            if gap is not None and gap[0] <= position + 1:
                await life.pass_over(gap[1])
                position = gap[1]
                continue
            events_max = min(BURST_EVENTS_MAX, ends_at - position, gap[0] - position - 1 if gap else I63_MAX)
            burst = reader.read(agreed.session, position, events_max)
            if self._foreign is not None:  # after the reading: what lies below the burst was recorded before it
                await until_known(partial(self._foreign.compare, reader), self._bounds)
            if burst:
                life.lacks = None
                self._stand("running")
                yield burst
                position = burst[-1].output_sequence
                await asyncio.sleep(0)  # a long backlog must not keep the recorder from its socket
                continue
            if stood_at == position:
                await self._stand_before(life, reader, position)
            stood_at = position
            await reader.moved(WAIT_S)

    async def _end_stream(self, life: Life) -> None:
        """All that is ever settled on the stream is submitted: go on with the next one, once all of this is durable.

        Not earlier: nobody would settle it again if the store lost its last seconds.
        """
        self._stand("running")
        await life.pipeline.drained()
        if life.durable.sequence < life.ledger.sequence:
            await self._stopped_within(WAIT_S)
            return
        self._go_on(life.agreed, life.deletable)
        raise StartOver(f"the stream has ended; {self._stream} goes on")

    def _go_on(self, agreed: Agreed, deletable: int) -> None:
        """Begin with the next stream: the next life is its."""
        assert agreed.next_stream is not None
        log.info("stream_ends", extra={"stream": self._stream, "ends_at": agreed.ends_at, "next": agreed.next_stream})
        if self._session:
            deletable = self._deletable(deletable)
            self._streams.keep(self._stream, session=self._session, foreign_to=self._foreign_to, deletable=deletable)
        self._stream = agreed.next_stream
        self._remember()
        self._earlier_lives = self.counts()
        self.life = self.agreed = self._hole_since = self._foreign = None
        self._submitted, self._was = 0, (0, 0)
        self._say()

    def _remember(self) -> None:
        kept = self._streams.of(self._stream) or {}
        self._session, self._foreign_to = kept.get("session", 0), kept.get("foreign_to", 0)

    def _deletable(self, durable: int) -> int:
        """Give up to where this tape need not keep the stream's session: nothing while all of it is another tape's.

        It may turn out to be another session of the engine, of which nothing is settled.
        """
        return durable if durable > self._foreign_to else 0

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
            life.lacks = first
            await self._judge_hole(life, reader, first, last, stood_s=now - self._hole_since[1])
        elif look.newer_session is not None:
            reason = f"the engine began anew or contradicted itself: the tape goes on in session {look.newer_session}"
            self._halt(Halt("SESSION_CHANGED", position + 1, reason, SESSION_STEP))
        else:
            self._hole_since = None
            self._stand("running")

    async def _judge_hole(self, life: Life, reader: TapeReader, first: int, last: int, *, stood_s: float) -> None:
        """Wait for replay while it may still come; then record the gap where that is configured, else halt at it.

        What others have settled can't be given up: it is waited for until it is durable (Life.tick).
        """
        gone_to, replay_says = self._replay_says(life.agreed.session, first, last)
        if life.elsewhere >= first:
            if stood_s >= self._gap_after_s:
                self._halt(self._settled_elsewhere(first, life.elsewhere))
        elif self._on_gap == "record" and gone_to >= first:
            if stood_s >= self._gap_after_s:
                await self._record_gap(first, gone_to, replay_says)
        elif stood_s >= self._gap_after_s or gone_to >= last:
            accept = f"sidecar gap accept {first} {last} --reason '…'"
            step = f"find the frames (an archive, another host's tape), or give them up: `{accept}`"
            reason = f"sequences {first} to {last} never reached this tape; {replay_says}"
            reason, step = self._deleted(reader, first, last) or (reason, step)
            self._halt(Halt("GAP", first, reason, step))

    def _replay_says(self, session: int, first: int, last: int) -> tuple[int, str]:
        """Give how far a hole is gone from its beginning on (`first - 1`: not at all), and what is known of replay."""
        if self._replay_endpoint is None:
            return last, "nobody serves the past"
        recorder = read_recorded(self._tape_path) or {}
        said = recorder.get("replay") or {}
        if recorder.get("tape_id") != self._streams.tape_id or said.get("endpoint") != self._replay_endpoint:
            return first - 1, f"no recorder has asked {self._replay_endpoint} yet"
        below = said["gone"].get(str(session), 0)
        if below > first:
            gone_to = min(last, below - 1)
            return gone_to, f"{self._replay_endpoint} says that {first} to {gone_to} is gone"
        if said["last_error"]:
            return first - 1, f"replay, attempt {said['attempts']}: {said['last_error']}"
        return first - 1, f"{self._replay_endpoint} is being asked"

    def _settled_elsewhere(self, first: int, last: int) -> Halt:
        reason = (
            f"sequences {first} to {last} never reached this tape; another host has settled them. Settlement goes on"
            f" behind them once they are durable: when all nodes have stood for {self._bounds.durable_after_s:g} s"
        )
        return Halt("GAP", first, reason, "wait; is a database node away? (`sidecar doctor`)")

    def _deleted(self, reader: TapeReader, first: int, last: int) -> tuple[str, str] | None:
        """Say what is known of a hole that was on this tape once: the store that had settled it has it no more."""
        pruned_to = next((row.pruned_to for row in reader.sessions() if row.session == self._session), 0)
        if first > pruned_to:
            return None
        reason = (
            f"sequences {first} to {last} were settled, durable and deleted from this tape, but the store does not have"
            " them: it was set back to an older copy, or is another one"
        )
        step = (
            f"the right store, or a newer copy of it; else `sidecar gap accept {first} {last} --reason '…'`, then bring"
            " them in with `sidecar backfill FILE` from another host's tape or an archive"
        )
        return reason, step

    async def _record_gap(self, first: int, last: int, replay_says: str) -> None:
        reason = f"on_gap = record: stood for {self._gap_after_s} s; {replay_says}"
        try:
            await decision_log.accept_gap(
                self.store, self._stream, first, last, present=[], reason=reason, now_us=self._now_us()
            )
        except DecisionRefusedError as refused:  # another host has settled them: they exist
            step = f"bring sequences {first} to {last} from the tape of the host that has settled them"
            self._halt(Halt("GAP", first, f"sequences {first} to {last} never reached this tape; {refused}", step))
            self._hole_since = None  # and ask again
            return
        log.error("gap_recorded", extra={"first": first, "last": last, "reason": reason})
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
                return self._late.reader() if self._late is not None else TapeReader(self._tape_path, self._tail)
            except TapeMissingError:
                self._stand("waiting")
                await self._stopped_within(WAIT_S)
        return None

    async def _agree(self, reader: TapeReader) -> Agreed | None:
        """Agree with the stream's log; before its genesis there must be a session on the tape to name in it."""
        known = await decision_log.read_agreed(self.store, self._stream)
        session = engine_session = None
        while known is None and not self._stopping.is_set():
            if (first := self._streams.unclaimed(self._stream, reader)) is not None:
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
            tape_id=reader.tape_id,
            rules=self._rules,
            now_us=self._now_us(),
        )
        self._first_sequence = agreed.first_sequence
        for warning in agreed.warnings:
            log.warning("configuration_differs", extra={"warning": warning})
        return agreed

    async def _find_session(self, reader: TapeReader, agreed: Agreed) -> bool:
        """Wait until the tape has the stream's session; False when the settler is stopped before."""
        while not self._stopping.is_set():
            session = self._streams.session_of(self._stream, agreed, reader)
            if session is not None:
                self._session = session
                return True
            self._stand("waiting")
            await reader.moved(WAIT_S)
        return False

    def _check_decisions(self, agreed: Agreed) -> None:
        """Halt at a new decision about what an earlier life has submitted, whatever ended that life."""
        read, self.agreed = self.agreed, agreed
        if read is None:
            return
        if agreed.ends_at is not None and self._submitted > agreed.ends_at:
            reason = f"the stream was ended at {agreed.ends_at} when up to {self._submitted} was submitted already"
            raise Halt("DECISION_CONFLICT", agreed.ends_at + 1, reason, _CONFLICT_STEP)
        for kind, first, last in (*(("gap", *gap) for gap in agreed.gaps), *(("reject", n, n) for n in agreed.rejects)):
            new = first
            while (gap := read.gap_at_or_after(new)) is not None and gap[0] <= new:
                new = gap[1] + 1
            if new <= min(last, self._submitted) and new not in read.rejects:
                reason = f"a {kind} of {first} to {last} was decided when up to {self._submitted} was submitted already"
                raise Halt("DECISION_CONFLICT", new, reason, _CONFLICT_STEP)

    # --- a tape that did not settle what the store holds: a new host, a lost tape ---

    def _know_tape(self, agreed: Agreed, start: State) -> None:
        """Find out up to where the stream was settled from another tape than this one."""
        kept = self._streams.of(self._stream)
        foreign_to = kept["foreign_to"] if kept is not None else start.sequence
        if self.life is not None and start.sequence > self.life.ledger.sequence:  # settled elsewhere meanwhile
            foreign_to = start.sequence
        self._foreign_to = foreign_to if foreign_to >= agreed.first_sequence else 0
        self._streams.keep(self._stream, session=agreed.session, foreign_to=self._foreign_to, deletable=0)
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
        if self._late is not None:
            halt.next_step = halt.next_step.replace("reject SEQ", f"reject SEQ --stream {self._stream}")
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
                if len(known) > read and (halt.code != "DECISION_CONFLICT" or self._late is not None):
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

    def _note_submit(self, span: Span) -> None:
        self._submitted = max(self._submitted, span.last_sequence)
        if self._ack_log is not None:
            self._note(b"# submitted %d %d\n" % (span.first_sequence, span.last_sequence))

    def _note_ack(self, span: Span) -> None:
        self.acknowledged.note(span)
        if self._ack_log is not None:
            self._note(b"%d %d %d\n" % (span.first_sequence, span.last_sequence, self._now_us()))

    def _note(self, line: bytes) -> None:
        if not self._notes:  # one write for all that a turn of the loop has to say
            asyncio.get_running_loop().call_soon(self._write_notes)
        self._notes += line

    def _write_notes(self) -> None:
        if self._ack_log is not None:
            self._ack_log.write(self._notes)
        self._notes.clear()

    def counts(self) -> Counter[str]:
        """Count over all lives of this process: batches sent again, postings skipped and below zero."""
        life = self.life
        if life is None:
            return self._earlier_lives
        ledger = life.ledger
        of_life = {"retries": life.pipeline.retries_total, "skipped": ledger.skipped_total}
        return self._earlier_lives + Counter(of_life | {"negative": ledger.negative_total})

    def said(self) -> dict[str, Any]:
        """Tell how settlement stands: what `<tape>.settled` holds."""
        halt, life = self.halted, self.life
        return {
            "stream": self._stream,
            "configured": self._configured,
            "first_sequence": self._first_sequence,
            "session": self._session,
            "tape_id": self._streams.tape_id,
            "foreign_to": self._foreign_to,
            "streams": self._streams.others(self._stream),
            "state": self.state,
            "halted": halt
            and {"code": halt.code, "sequence": halt.sequence, "reason": halt.reason, "next_step": halt.next_step},
            "acked": life.pipeline.acked.sequence if life else 0,
            "durable": life.durable.sequence if life else 0,
            "deletable": self._deletable(life.deletable) if life else 0,
            "life": self.lives,
            "decisions": life.agreed.decisions_read if life else 0,
            "unacked_batches": life.pipeline.unacked_batches if life else 0,
            "negative_balances": life.ledger.negative_total if life else 0,
            "nodes_away": self.store.nodes_away,
            "pid": os.getpid(),
            "said_at_us": self._now_us(),
        }

    def _say(self) -> None:
        try:
            write_settled(self._told_path, self.said())
        except OSError as error:  # a full disk: the store has the positions, this file only tells of them
            if not self._unsaid:
                extra = {"path": str(self._told_path), "error": str(error)}
                log.error("settled_not_written", extra=extra)  # noqa: TRY400 - the error says it all
            self._unsaid = True
        else:
            self._unsaid = False


def _damaged(damaged: TapeDamagedError, next_sequence: int) -> Halt:
    step = "restore the tape from a copy, or begin a new one that another host or an archive fills; then restart"
    return Halt("TAPE_DAMAGED", damaged.sequence or next_sequence, str(damaged), step)


def _innermost(group: BaseExceptionGroup[Any]) -> Any:
    error: Any = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _first(group: BaseExceptionGroup[Any]) -> str:
    return str(_innermost(group))
