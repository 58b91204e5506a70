"""The recording half: feed → wire → tape. It never waits for the database.

A turn's frames are decoded, given their place, and committed together; while one turn is being committed the next is
collected. When the tape has no room the socket is left alone: frames wait in libzmq, then are dropped by the publisher,
which shows as a hole. Nothing that was committed is ever harmed by it.

What it hears, and does not hear, it tells others through `<tape>.recorded` (JSON, atomic rename).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from typing import Any, Final

from sidecar.errors import MalformedFrameError, TapeFullError
from sidecar.events import Event, Heartbeat
from sidecar.feed import Feed
from sidecar.refill import Refill
from sidecar.tape import Tape, read_settled, write_recorded
from sidecar.wire import decode

log = logging.getLogger(__name__)

PENDING_TURNS_MAX: Final = 2  # turns collected while one is being committed
FULL_RETRY_S: Final = 1.0
PRUNE_EVERY_S: Final = 5.0
WATCH_EVERY_S: Final = 0.5
ROOM_WAIT_S: Final = 0.005


class Recorder:
    """Records one engine's stream on one tape."""

    def __init__(
        self,
        *,
        tape: Tape,
        endpoint: str,
        topic: str,
        turn_frames_max: int,
        receive_hwm_frames: int,
        receive_buffer_bytes: int,
        frame_bytes_max: int,
        retention_s: float,
        turn_min_s: float = 0.0,
        silence_s: float = 0.0,
        refill: Refill | None = None,
        secure: Callable[[Any], None] = lambda _: None,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        """Take an open tape and the feed's bounds; `retention_s` is how long durable frames are kept.

        A payload above `frame_bytes_max` is malformed; one between wire.md's 4 KiB and that is recorded, and rejected.
        A turn begins `turn_min_s` after the one before it, at the earliest, so that a busy stream shares commits; what
        comes after a pause is recorded at once.

        An engine that is not heard for `silence_s` (0: never mind) is called silent, and the refill then looks each
        `silence_s` whether the last frames were lost. `refill` fills holes, if anybody serves the past. `secure` gives
        the feed's socket its keys.
        """
        self.tape = tape
        self.heard_at_us = 0
        self.silent_since_us = 0  # when the silence that lasts was noticed to have begun; 0: the engine is heard
        self.other_topics_total = 0
        self.refill = refill
        self._topic = topic.encode()
        self._pending_max = turn_frames_max * PENDING_TURNS_MAX
        self._frame_bytes_max = frame_bytes_max
        self._retention_s = retention_s
        self._silence_s = silence_s
        self._turn_min_s = turn_min_s
        self._now_us = now_us
        self._wake = asyncio.Event()
        self._stopping = False
        self._failed: Exception | None = None
        self._feed = Feed(
            endpoint=endpoint,
            topic=topic,
            turn_frames_max=turn_frames_max,
            receive_hwm_frames=receive_hwm_frames,
            receive_buffer_bytes=receive_buffer_bytes,
            on_turn=self._take_turn,
            may_take=self._room,
            secure=secure,
        )

    @property
    def frames_total(self) -> int:
        """Count the frames taken from the socket, of whatever kind."""
        return self._feed.frames_total

    @property
    def refused(self) -> str | None:
        """Say why whoever answers as the engine is not listened to; None: he is, or nobody is there."""
        return self._feed.refused

    def stop(self) -> None:
        """Take nothing more from the socket; `run` returns when what was taken is on disk."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Record until `stop`. Raises TapeError when the disk can't be trusted: the process must end (design.md)."""
        now = asyncio.get_running_loop().time
        self._feed.start()
        beside = [asyncio.create_task(self._prune()), asyncio.create_task(self._watch())]
        if self.refill is not None:  # the subscription is open: nothing falls between it and the refill's hello
            beside.append(asyncio.create_task(self.refill.run(self._put)))
        for task in beside:
            task.add_done_callback(lambda _: self._wake.set())
        try:
            while not (self._stopping and not self.tape.has_pending):
                if self._failed is not None:
                    raise self._failed
                for task in beside:
                    if task.done():
                        task.result()
                if not self.tape.has_pending:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                begun = now()
                await self._commit()
                self._feed.resume()
                rest_s = begun + self._turn_min_s - now()
                if rest_s > 0 and not self._stopping:
                    await asyncio.sleep(rest_s)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            self._feed.close()
            self._say()

    async def _commit(self) -> None:
        turn = self.tape.take_turn()
        while True:
            try:
                await self.tape.commit(turn)
            except TapeFullError as full:
                if self.tape.full is None:
                    log.error("tape_full", extra={"reason": str(full)})  # noqa: TRY400 - the reason says it all
                self.tape.full = str(full)
                if self._stopping:
                    raise
                await asyncio.sleep(FULL_RETRY_S)
                continue
            if self.tape.full is not None:
                log.warning("tape_has_room", extra={"path": str(self.tape.path)})
                self.tape.full = None
            return

    def _room(self) -> int:
        return 0 if self._stopping else max(self._pending_max - self.tape.pending_frames, 0)

    def _take_turn(self, turn: list[list[bytes]]) -> None:
        # Called by the event loop, which would log an error, forget the rest of the turn, and go on: `run` raises it.
        try:
            self._hear(turn)
        except Exception as error:  # noqa: BLE001 - whatever it is, the process ends with it
            self._failed = error
            self._wake.set()

    def _hear(self, turn: list[list[bytes]]) -> None:
        tape = self.tape
        self.heard_at_us = self._now_us()
        malformed_frames, reason = 0, ""
        for frames in turn:
            if frames[0] != self._topic and frames[0].startswith(self._topic):
                self.other_topics_total += 1  # SUB matches by prefix: `settlement` hears `settlement_test`, too
                continue
            try:
                event = self._decoded(frames)
            except MalformedFrameError as malformed:
                malformed_frames, reason = malformed_frames + 1, str(malformed)
                tape.append_malformed(frames, reason)
                continue
            if type(event) is Heartbeat:
                tape.announce(event)
            else:
                tape.append(event)  # type: ignore[arg-type]
        if malformed_frames:  # one line a turn: a flood of them must not become a flood of lines
            log.warning("frame_malformed", extra={"frames": malformed_frames, "last_reason": reason})
        self._wake.set()

    def _decoded(self, frames: list[bytes]) -> Event | Heartbeat:
        if len(frames) != 2:  # [topic, payload], wire.md
            raise MalformedFrameError(f"{len(frames)} frames; exactly two, topic and payload, are allowed")
        payload = frames[1]
        if len(payload) > self._frame_bytes_max:
            raise MalformedFrameError(
                f"payload is {len(payload)} bytes; engine.frame_bytes_max, {self._frame_bytes_max}, is allowed"
            )
        return decode(payload)

    async def _put(self, session: int | None, events: list[Event]) -> int:
        """Put frames that were asked for onto the tape, when there is room; give how many of them it lacked.

        Once it is to stop there is none: a refill of hours must not hold it up.
        `session` is the tape's; None when the first of them opens it. Raises AnswerRefusedError, see `Tape.fill`.
        """
        while not self._room() or self.tape.full is not None:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(ROOM_WAIT_S)
        if session is not None:
            filled = self.tape.fill(session, events)
        elif self.tape.sessions:  # a live frame was quicker
            filled = 0
        else:
            for event in events:
                self.tape.append(event)
            filled = len(events)
        self._wake.set()
        return filled

    async def _watch(self) -> None:
        """Notice when the engine falls silent and when it is heard again; tell how recording stands."""
        loop = asyncio.get_running_loop()
        heard, since = 0, loop.time()  # since when nothing came, or since the refill was last told so
        while True:
            self._say()
            await asyncio.sleep(min(WATCH_EVERY_S, self._silence_s or WATCH_EVERY_S))
            total, now = self._feed.frames_total - self.other_topics_total, loop.time()
            if total != heard:
                if self.silent_since_us:
                    silent_s = (self._now_us() - self.silent_since_us) / 1_000_000
                    log.warning("engine_heard", extra={"silent_s": round(silent_s, 1)})
                heard, since, self.silent_since_us = total, now, 0
            elif self._silence_s and now - since >= self._silence_s:
                if not self.silent_since_us:
                    self.silent_since_us = self._now_us() - int((now - since) * 1_000_000)
                    log.warning("engine_silent", extra={"silence_s": self._silence_s, "heard_at_us": self.heard_at_us})
                if self.refill is not None:
                    self.refill.ask_beyond()
                since = now

    def said(self) -> dict[str, Any]:
        """Tell how recording stands: what `<tape>.recorded` holds."""
        return {
            "tape_id": self.tape.tape_id,
            "heard_at_us": self.heard_at_us,
            "silent_since_us": self.silent_since_us,
            "full": self.tape.full,
            "replay": self.refill.said() if self.refill is not None else None,
            "pid": os.getpid(),
            "said_at_us": self._now_us(),
        }

    def _say(self) -> None:
        try:
            write_recorded(self.tape.path, self.said())
        except OSError as error:  # a full disk: told elsewhere, and no reason to stop recording
            log.debug("recorded_not_told", extra={"error": str(error)})

    async def _prune(self) -> None:
        """Delete what is durable and older than `retention_s`, a bounded piece at a time."""
        while True:
            await asyncio.sleep(PRUNE_EVERY_S)
            said = read_settled(self.tape.path)
            if said is None or not all(type(said.get(key)) is int for key in ("session", "deletable")):
                continue
            older_than_us = self._now_us() - int(self._retention_s * 1_000_000)
            for kept in (said, *said.get("streams", {}).values()):  # earlier streams of this tape have their sessions
                while await self.tape.prune(kept["session"], kept["deletable"], older_than_us):  # noqa: ASYNC110 - works
                    await asyncio.sleep(0)
