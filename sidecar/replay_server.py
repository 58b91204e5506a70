"""The replay server: serves a tape's past to others, by wire.md; read-only, bounded, never in the way of recording.

One request at a time is read from the disk, on a thread of its own and in short looks; what comes above
`answers_per_s_max` is answered `busy` without a look. What is on the tape is served as it was recorded; a frame that
does not match its checksum never is.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from sidecar import replay
from sidecar.errors import RequestRefusedError, TapeDamagedError, TapeError
from sidecar.replay import HelloRequest, ReplayRequest
from sidecar.talk import Router
from sidecar.tape import Session, TapeReader

log = logging.getLogger(__name__)

LOOK_FRAMES: Final = 128  # read from the disk at once: bounds what is in memory when frames are large


class ReplayServer:
    """Serves one tape. `counts` says what was answered, by kind."""

    def __init__(
        self,
        *,
        tape_path: Path,
        stream: str,
        endpoint: str,
        answers_per_s_max: int,
        secure: Callable[[Any], None] = lambda _: None,
        clients: frozenset[bytes] = frozenset(),
    ) -> None:
        """Take the tape, the stream it is of, where to bind (with the keys of `secure`), and how much may be asked.

        `clients` are the public keys that may ask; none: whoever knows ours.
        """
        self._secure = secure
        self._clients = clients
        self.counts: Counter[str] = Counter()
        self._tape_path = tape_path
        self._stream = stream
        self._endpoint = endpoint
        self._answers_per_s_max = answers_per_s_max
        self._allowance = float(answers_per_s_max)  # a second's worth may be saved up
        self._allowed_at = 0.0
        self._running: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """Answer nothing more."""
        if self._running is not None:
            self._running.cancel()

    async def run(self) -> None:
        """Serve until `stop`. Raises SidecarError when the endpoint can't be bound."""
        self._running = asyncio.current_task()
        router = Router(self._endpoint, replay.REQUEST_BYTES_MAX, self._secure, self._clients)
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="replay")
        log.info("replay_served", extra={"endpoint": self._endpoint})
        try:
            while True:
                peer, message = await router.receive()
                wait_ms = self._wait_ms(loop.time())
                if wait_ms:
                    kind, answer = "busy", replay.busy(message, wait_ms)
                else:
                    kind, answer = await loop.run_in_executor(thread, self._answer, message)
                self.counts[kind] += 1
                await router.send(peer, answer)
        finally:
            thread.shutdown()
            router.close()

    def _wait_ms(self, now: float) -> int:
        """Take one answer from the allowance, or say when there is one again."""
        rate = self._answers_per_s_max
        self._allowance = min(self._allowance + (now - self._allowed_at) * rate, rate)
        self._allowed_at = now
        if self._allowance < 1:
            return int((1 - self._allowance) * 1000 / rate) + 1
        self._allowance -= 1
        return 0

    def _answer(self, message: bytes) -> tuple[str, bytes]:
        """Read and answer one request; on the thread. Whatever goes wrong is an answer too."""
        request_id = None
        try:
            request = replay.read_request(message, self._stream)
            request_id = request.id
            reader = TapeReader(self._tape_path)
            try:
                if isinstance(request, HelloRequest):
                    return "hello", self._hello(reader, request)
                return self._replay(reader, request)
            finally:
                reader.close()
        except RequestRefusedError as refused:
            return "error", replay.error(refused)
        except (TapeError, sqlite3.Error) as error:
            log.warning("replay_not_served", extra={"reason": str(error)})
            return "error", replay.error(RequestRefusedError(request_id, "TAPE_UNREADABLE", str(error)))

    def _hello(self, reader: TapeReader, request: HelloRequest) -> bytes:
        sessions = reader.sessions()
        if not sessions:
            return replay.hello(request, session=0, first_available=1, next_sequence=1)
        first, head = _span(reader, sessions[-1])
        session = sessions[-1].engine_session or 0
        return replay.hello(request, session=session, first_available=first, next_sequence=head + 1)

    def _replay(self, reader: TapeReader, request: ReplayRequest) -> tuple[str, bytes]:
        sessions = reader.sessions()
        # Without a session of their own frames can't be told apart: only those of the newest are served as such.
        known = [row for row in sessions if (row.engine_session or 0) == request.session]
        if known and known[-1].engine_session is None and known[-1] != sessions[-1]:
            known = []
        if not known:
            return "gone", replay.gone(request, _span(reader, sessions[-1])[0] if sessions else 1)
        first, head = _span(reader, known[-1])
        if request.first < first:
            return "gone", replay.gone(request, first)
        frames = _frames(reader, known[-1].session, request, head)
        return "data", replay.data(request, frames, head + 1)


def _span(reader: TapeReader, row: Session) -> tuple[int, int]:
    """Give the first sequence that a session still holds, and its last."""
    runs = reader.runs(row.session)
    first = next((first for first, last in runs.list() if last > row.pruned_to), row.pruned_to + 1)
    return max(first, row.pruned_to + 1), runs.head


def _frames(reader: TapeReader, session: int, request: ReplayRequest, head: int) -> list[bytes]:
    """Read up to `limit` payloads, as many as fit an answer; at a damaged one only what stands before it."""
    frames: list[bytes] = []
    first, room = request.first, replay.FRAMES_BYTES_MAX
    while len(frames) < request.limit and first <= head:
        look = min(LOOK_FRAMES, request.limit - len(frames))
        try:
            rows = reader.frames(session, first, head, look)
        except TapeDamagedError as damaged:
            if damaged.sequence > first:
                head = damaged.sequence - 1
                continue
            if frames:
                break
            raise
        for sequence, _, payload in rows:
            room -= len(payload) + replay.FRAME_HEAD_BYTES
            if room < 0 and not frames:
                why = f"sequence {sequence} has {len(payload)} bytes, too many for an answer"
                raise RequestRefusedError(request.id, "FRAME_TOO_LARGE", why)
            if room < 0:
                return frames
            frames.append(payload)
        if len(rows) < look:
            break
        first = rows[-1][0] + 1
    return frames
