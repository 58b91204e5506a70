"""The refill: fills a tape's holes from whoever serves the past, while recording goes on beyond them.

A conversation begins with `hello` and goes through what the tape lacks, lowest first: at the start (then also what the
server has above the tape's end), whenever a hole has stood for a moment (a frame that comes late is not one), and above
the tape's end again while the engine is silent: when the last frames were lost and nothing follows, no number shows it.
The subscription is open before the first hello, so nothing falls between. What fails is tried again, with backoff, for
ever: silence on a new socket, a lie with half as many frames at a time, what the server lacks with the next pass.

What must not happen: that a server's word becomes a frame, a session or a hole. Only frames that were asked for reach
the tape, only where it lacks them, and before the first of them the newest frame that both have is compared: where
frames carry no session, a server that began anew is known by nothing else. What it says of its own end is never
written down.

A crash loses only what this room remembers: the next start asks again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, NamedTuple

from sidecar.errors import AnswerRefusedError, SidecarError
from sidecar.events import I63_MAX, Event
from sidecar.replay import ANSWER_BYTES_MAX, Answer, Busy, Client, Failed, Frames, Gone, Hello
from sidecar.talk import Dealer
from sidecar.tape import OpenSession, Tape, is_locked, read_settled

log = logging.getLogger(__name__)

ASK_FRAMES_MAX: Final = 500  # at once: judged and placed in about 5 ms, for which the socket waits
LOOK_S: Final = 0.1  # between two looks at the tape; a hole that is there at both is asked for
SETTLED_LOOK_S: Final = 0.5
SETTLER_WAIT_S: Final = 2.0  # at the start: for the settler to say what the store has already
BUSY_S_MIN: Final = 0.01
BACKOFF_S: Final = 0.1
FIRST_SESSION: Final = 1  # what the first frame of an empty tape opens

Put = Callable[[int | None, list[Event]], Awaitable[int]]


class UnansweredError(SidecarError):
    """A conversation ended without what was asked for; `state` says how, for people and for the settler."""

    def __init__(self, state: str, reason: str) -> None:
        """Take the word for `status`, and the sentence."""
        super().__init__(reason)
        self.state = state


class Need(NamedTuple):
    """What is missing: a range of a session of the tape (0: the one that the first frame will open).

    `key` is what the frames of that session carry as their `session`, 0 when they carry none.
    """

    session: int
    key: int
    first: int
    last: int


class Refill:
    """The talk about one tape with one replay server. `state`: idle, asking, busy, silent, refused, error, unfilled."""

    def __init__(
        self,
        *,
        tape: Tape,
        stream: str,
        first_sequence: int,
        endpoint: str,
        timeout_s: float,
        retry_backoff_max_s: float,
        frame_bytes_max: int,
        secure: Callable[[Any], None] = lambda _: None,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        """Take the tape, the stream and where it begins, the server, how long it may take, and we wait at most."""
        self.state = "idle"
        self.failures = 0  # conversations in a row that brought nothing
        self.filled_total = 0
        self.conversations_total = 0
        self.last_error: str | None = None
        self.answered_at_us = 0
        self.need: Need | None = None
        self.gone: dict[int, int] = {}  # by session: the server says that what lies below is gone
        self._tape = tape
        self._first_sequence = first_sequence
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._retry_backoff_max_s = retry_backoff_max_s
        self._now_us = now_us
        self._begun_us = now_us()
        self._client = Client(stream=stream, first_id=self._begun_us, frame_bytes_max=frame_bytes_max)
        self._dealer = Dealer(endpoint, ANSWER_BYTES_MAX, secure)
        self._limit = ASK_FRAMES_MAX
        self._asked_beyond = False  # what the server has above the tape's end
        self._settled: dict[str, Any] = {}
        self._settled_looked_at = -SETTLED_LOOK_S

    def ask_beyond(self) -> None:
        """Ask once more what lies above the tape's end: the engine says nothing, or nothing arrives."""
        self._asked_beyond = False

    async def run(self, put: Put) -> None:
        """Fill until cancelled. `put` gives frames to the recorder, and how many of them the tape lacked."""
        try:
            await self._hear_settler()
            seen: Need | None = None
            while True:
                need = self._need({}, None)
                if not self._asked_beyond or (need is not None and seen is not None and need.first == seen.first):
                    self._asked_beyond = await self._try_to_converse(put) or self._asked_beyond
                seen = need
                await asyncio.sleep(LOOK_S)
        finally:
            self._dealer.close()

    async def _try_to_converse(self, put: Put) -> bool:
        """Hold one conversation; say whether nothing is left to ask for. When something is, wait before the next."""
        self.conversations_total += 1
        attempts = self.failures
        try:
            await self._converse(put)
        except (UnansweredError, AnswerRefusedError) as why:
            self._fail(why)
            await asyncio.sleep(min(BACKOFF_S * 2 ** min(self.failures - 1, 16), self._retry_backoff_max_s))
            return False
        if attempts:
            log.info("replay_answers", extra={"endpoint": self._endpoint, "attempts": attempts})
        self.state, self.failures, self.last_error, self.need = "idle", 0, None, None
        return True

    def _fail(self, why: UnansweredError | AnswerRefusedError) -> None:
        self.failures += 1
        self.last_error = str(why)
        self.state = why.state if isinstance(why, UnansweredError) else "refused"
        if isinstance(why, AnswerRefusedError):
            self._limit = max(self._limit // 2, 1)  # what stands before the lie may be had
        if self.state in {"silent", "refused"}:
            self._dealer.renew()
        if self.failures & (self.failures - 1) == 0:  # the 1st, 2nd, 4th, 8th … in a row: it may go on for days
            log.warning(
                "replay_failed",
                extra={
                    "endpoint": self._endpoint,
                    "state": self.state,
                    "reason": self.last_error,
                    "attempts": self.failures,
                    "first": self.need.first if self.need else None,
                    "last": self.need.last if self.need else None,
                },
            )

    async def _converse(self, put: Put) -> None:
        """Ask for all that the tape lacks. Raises UnansweredError, AnswerRefusedError."""
        hello = await self._ask(self._client.ask_hello)
        assert isinstance(hello, Hello)  # the client refuses any other answer to it
        await self._compare(hello, put)
        passed: dict[int, int] = {}
        filled_before = self.filled_total
        while (need := self._need(passed, hello)) is not None:
            self.need = need
            answer = await self._ask_for(need, min(self._limit, need.last - need.first + 1))
            if isinstance(answer, Gone):
                passed[need.session] = self._note_gone(need, answer.first_available)
            elif answer.next_sequence < hello.next_sequence:  # another engine behind the same address: begin again
                fell = f"next_sequence fell from {hello.next_sequence} to {answer.next_sequence}: it began anew"
                raise AnswerRefusedError(fell)
            else:
                passed[need.session] = await self._put(need, answer.events, put)
        if self.filled_total > filled_before:
            log.info("replay_filled", extra={"frames": self.filled_total - filled_before, "endpoint": self._endpoint})
        self.need = self._need({}, hello)
        if self.need is not None:
            first, last = self.need.first, self.need.last
            below = self.gone.get(self.need.session or FIRST_SESSION, 0)
            has = f"lacks {first} to {last}"
            if below > first:
                has = f"says that {first} to {min(last, below - 1)} is gone"
            raise UnansweredError("unfilled", f"{self._endpoint} {has}")
        if sessions := self._tape.sessions:
            key = sessions[max(sessions)].engine_session or 0
            if key != hello.session:  # its end says nothing about ours
                why = f"{self._endpoint} serves session {hello.session}, the newest frames here are of session {key}"
                raise UnansweredError("unfilled", why)

    async def _ask_for(self, need: Need, limit: int) -> Frames | Gone:
        answer = await self._ask(partial(self._client.ask_replay, need.key, need.first, limit))
        assert isinstance(answer, Frames | Gone)  # the client refuses any other answer to it
        return answer

    async def _ask(self, request: Callable[[], bytes]) -> Answer:
        loop = asyncio.get_running_loop()
        while True:
            try:
                await self._dealer.send(request())
            except ConnectionError as error:
                raise UnansweredError("silent", str(error)) from error
            deadline = loop.time() + self._timeout_s
            answer = None
            while answer is None:
                message = await self._dealer.receive(deadline)
                if message is None:
                    self._client.counts["silences"] += 1
                    raise UnansweredError("silent", self._silence())
                answer = self._client.hear(message)
            self.answered_at_us = self._now_us()
            if isinstance(answer, Failed):
                raise UnansweredError("error", f"{self._endpoint} answers {answer.code}: {answer.reason}")
            if not isinstance(answer, Busy):
                self.state = "asking"
                return answer
            self.state = "busy"
            await asyncio.sleep(max(answer.retry_after_ms / 1000, BUSY_S_MIN))

    def _silence(self) -> str:
        instead, self._client.last_refused = self._client.last_refused, ""
        text = f"{self._endpoint} does not answer within {self._timeout_s:g} s"
        return f"{text}; what came instead: {instead}" if instead else text

    async def _compare(self, hello: Hello, put: Put) -> None:
        """Compare the newest frame that both have; raises AnswerRefusedError when the server's past is another one."""
        sessions = self._tape.sessions
        if not sessions:
            return
        number = max(sessions)
        opened = sessions[number]
        newest = opened.runs.last_up_to(hello.next_sequence - 1)
        if hello.session != (opened.engine_session or 0) or newest <= max(opened.pruned_to, hello.first_available - 1):
            return
        answer = await self._ask_for(Need(number, hello.session, newest, newest), 1)
        if isinstance(answer, Frames) and answer.events and answer.events[0].output_sequence == newest:
            await self._place(number, answer.events, put)

    async def _place(self, session: int | None, events: list[Event], put: Put) -> int:
        try:
            return await put(session, events)
        except AnswerRefusedError:
            self._client.counts["contradictions"] += 1
            raise

    async def _put(self, need: Need, events: list[Event], put: Put) -> int:
        """Hand the events on; give the sequence from which on to look for the next need."""
        filled = await self._place(need.session or None, events, put) if events else 0
        if need.session == 0 and not filled and self._tape.sessions:
            return 0  # a live frame has opened the session meanwhile: ask again, for that one
        if filled:
            self.filled_total += filled
            self.failures, self.last_error = 0, None
            self._limit = min(self._limit * 2, ASK_FRAMES_MAX)
            if events[0].output_sequence < self.gone.get(need.session or FIRST_SESSION, 0):
                del self.gone[need.session or FIRST_SESSION]
        return events[-1].output_sequence + 1 if events else need.last + 1

    def _note_gone(self, need: Need, first_available: int) -> int:
        # Not older than what is kept, so of another session: then all that was asked for is gone.
        below = min(first_available, need.last + 1) if first_available > need.first else need.last + 1
        session = need.session or FIRST_SESSION
        if self.gone.get(session, 0) < below:
            log.warning(
                "replay_gone", extra={"session": session, "first": need.first, "last": below - 1,
                                      "endpoint": self._endpoint},
            )  # fmt: skip
        self.gone[session] = max(below, self.gone.get(session, 0))
        return below

    # --- what the tape lacks ---

    def _need(self, passed: dict[int, int], hello: Hello | None) -> Need | None:
        """Give the lowest range that is missing and not yet passed over; above the tape's end as far as hello goes."""
        sessions = self._tape.sessions
        if not sessions:
            first = max(self._first_wanted(FIRST_SESSION), passed.get(0, 0))
            if hello is None or first >= hello.next_sequence:
                return None
            return Need(0, hello.session, first, hello.next_sequence - 1)
        oldest, newest = min(sessions), max(sessions)
        for number in sorted(sessions):
            opened = sessions[number]
            if number < self._look_at_settled().get("session", 0):
                continue  # of an earlier stream
            first = self._first_of(number, opened, is_oldest=number == oldest)
            key = opened.engine_session or 0
            last = max(opened.runs.head, opened.announced_to)
            if number == newest and hello is not None:
                if not opened.runs.head and opened.engine_session is None:
                    key = hello.session  # only heartbeats were heard of it, and they don't say
                if hello.session == key:
                    last = max(last, hello.next_sequence - 1)
            hole = next(opened.runs.holes(max(first, passed.get(number, 0)), last), None)
            if hole is None:
                continue
            if opened.engine_session is None and number != newest:
                # Whatever a server has now is of the newest session, and nothing in its frames would say so.
                self._note_gone(Need(number, key, *hole), 0)
                continue
            return Need(number, key, *hole)
        return None

    def _first_of(self, number: int, opened: OpenSession, *, is_oldest: bool) -> int:
        """Give the sequence from which on a session has to be whole."""
        settling = self._look_at_settled().get("session")
        runs = opened.runs.list()
        if number == settling or (settling is None and is_oldest):
            first = self._first_wanted(number)
        else:
            first = runs[0][0] if runs else 1
        return max(first, opened.pruned_to + 1)

    def _first_wanted(self, session: int) -> int:
        """Give the first sequence of the stream's session that the store does not have, as far as the settler said."""
        said = self._look_at_settled()
        acked = said["acked"] if said.get("session") == session else 0
        return max(acked + 1, self._first_sequence)

    def _look_at_settled(self) -> dict[str, Any]:
        """Give what the settler said of this very tape; empty when it has not."""
        now = asyncio.get_running_loop().time()
        if now >= self._settled_looked_at + SETTLED_LOOK_S:
            self._settled_looked_at = now
            said = read_settled(self._tape.path) or {}
            numbers = ("session", "acked", "tape_id", "said_at_us")
            sound = all(type(said.get(key)) is int and 0 <= said[key] <= I63_MAX for key in numbers)
            self._settled = said if sound and said["session"] and said["tape_id"] == self._tape.tape_id else {}
        return self._settled

    async def _hear_settler(self) -> None:
        """Wait a little for a settler that has just started: what it says is settled need not be asked for."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + SETTLER_WAIT_S
        while loop.time() < deadline and is_locked(self._tape.path, "settler"):
            if self._look_at_settled().get("said_at_us", 0) >= self._begun_us:
                return
            self._settled_looked_at = -SETTLED_LOOK_S
            await asyncio.sleep(LOOK_S)

    def said(self) -> dict[str, Any]:
        """Tell how the talk stands: a part of `<tape>.recorded`."""
        return {
            "endpoint": self._endpoint,
            "state": self.state,
            "session": self.need.session if self.need else 0,
            "need": [self.need.first, self.need.last] if self.need else None,
            "gone": {str(session): below for session, below in self.gone.items()},
            "attempts": self.failures,
            "last_error": self.last_error,
            "answered_at_us": self.answered_at_us,
            "conversations_total": self.conversations_total,
            "filled_total": self.filled_total,
            "counts": dict(self._client.counts),
        }
