"""The replay talk, by wire.md: what is asked for, what is answered, and whether an answer may be believed.

No socket and no clock. `Client` is the side that asks: one request under way, an id of its own for each. `hear` judges
what came: nothing that is not the answer to that request, and nothing in it that was not asked for, gets past it. The
other side reads requests with `read_request` and answers with the functions below it.

A server is somebody else's program. Whatever it says, what `hear` gives is safe to look at: typed, in range, the frames
decoded, in rising order, of the session asked for. One wrong frame and the whole answer is refused: who is wrong in one
is not believed in the next.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Final, NamedTuple

import msgspec

from sidecar import wire
from sidecar.errors import AnswerRefusedError, MalformedFrameError, RequestRefusedError
from sidecar.events import I63_MAX, Event, Heartbeat

PROTOCOL: Final = 1
FRAMES_MAX: Final = 2_000  # in one answer
ANSWER_BYTES_MAX: Final = 1_048_576
REQUEST_BYTES_MAX: Final = 4_096
RETRY_AFTER_MS_MAX: Final = 5_000  # a server that is busy for longer is asked again all the same
# A server that counts its frames' bytes without what msgpack adds to each is not a liar.
_HEARD_BYTES_MAX: Final = ANSWER_BYTES_MAX + 16 * FRAMES_MAX

_I63 = Annotated[int, msgspec.Meta(ge=0, le=I63_MAX)]
_Sequence = Annotated[int, msgspec.Meta(ge=1, le=I63_MAX)]
_Frames = Annotated[list[bytes], msgspec.Meta(max_length=FRAMES_MAX)]
_Limit = Annotated[int, msgspec.Meta(ge=1, le=FRAMES_MAX)]


# --- what is said on the wire -----------------------------------------------------------------------------------------


class HelloRequest(msgspec.Struct, tag_field="op", tag="hello", kw_only=True):
    """Who are you, and what do you have?"""

    id: Any  # whatever it is, it is said again in the answer
    protocol: int
    stream: str


class ReplayRequest(msgspec.Struct, tag_field="op", tag="replay", kw_only=True, rename={"first": "from"}):
    """At most `limit` frames of a session, from a sequence on."""

    id: Any
    stream: str
    session: _I63
    first: _Sequence
    limit: _Limit


class Hello(msgspec.Struct, tag_field="op", tag="hello", kw_only=True):
    """The session that the server's frames carry (0: none), the first sequence it keeps, the one after its last."""

    id: Any
    stream: str
    session: _I63
    first_available: _I63
    next_sequence: _Sequence


class Data(msgspec.Struct, tag_field="op", tag="data", kw_only=True, rename={"first": "from"}):
    """Frames as they were published; those that the server lacks are left out."""

    id: Any
    first: _Sequence
    frames: _Frames
    next_sequence: _Sequence


class Gone(msgspec.Struct, tag_field="op", tag="gone", kw_only=True):
    """What was asked for is older than what is kept, or of another session."""

    id: Any
    first_available: _I63


class Busy(msgspec.Struct, tag_field="op", tag="busy", kw_only=True):
    """Not now."""

    id: Any
    retry_after_ms: _I63


class Failed(msgspec.Struct, tag_field="op", tag="error", kw_only=True):
    """The request can't be answered."""

    id: Any
    code: str
    reason: str


Request = HelloRequest | ReplayRequest
Reply = Hello | Data | Gone | Busy | Failed
_encode = msgspec.msgpack.Encoder().encode
_reply = msgspec.msgpack.Decoder(Reply).decode
_request = msgspec.msgpack.Decoder(Request).decode


class _AnyId(msgspec.Struct):
    id: Any


_any_id = msgspec.msgpack.Decoder(_AnyId).decode


# --- the side that asks -----------------------------------------------------------------------------------------------


class Frames(NamedTuple):
    """The events of a `data` answer, rising; none when the server has nothing from there on."""

    events: list[Event]
    next_sequence: int


Answer = Hello | Frames | Gone | Busy | Failed


class Client:
    """The side that asks about one stream. `counts` says what came of it, by kind; `last_refused` why, lately."""

    def __init__(self, *, stream: str, first_id: int, frame_bytes_max: int) -> None:
        """Begin with a request id that an earlier process did not use; a larger frame is none (`frame_bytes_max`)."""
        self.counts: Counter[str] = Counter()
        self.last_refused = ""
        self._stream = stream
        self._id = first_id
        self._frame_bytes_max = frame_bytes_max
        self._asked: Request | None = None

    def ask_hello(self) -> bytes:
        """Give the request that begins a conversation; an older request is forgotten."""
        self._id += 1
        self._asked = HelloRequest(id=self._id, protocol=PROTOCOL, stream=self._stream)
        return _encode(self._asked)

    def ask_replay(self, session: int, first: int, limit: int) -> bytes:
        """Give the request for up to `limit` frames from `first` on, of what the frames call their session (0: none).

        An older request is forgotten: its answer, should it still come, is stale.
        """
        self._id += 1
        self._asked = ReplayRequest(id=self._id, stream=self._stream, session=session, first=first, limit=limit)
        return _encode(self._asked)

    def hear(self, message: bytes) -> Answer | None:
        """Give the answer to the request under way; None for anything else, which is counted and dropped.

        Raises AnswerRefusedError when it is the answer, and can't be true.
        """
        asked = self._asked
        if len(message) > _HEARD_BYTES_MAX:
            self._drop("oversized", f"{len(message)} bytes; at most {ANSWER_BYTES_MAX} are allowed")
            return None
        try:
            reply = _reply(message)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            self._drop("garbage", f"no answer that wire.md knows: {error}")
            return None
        if asked is None or type(reply.id) is not int or reply.id != asked.id:
            self.counts["stale"] += 1
            return None
        self._asked = None
        try:
            answer = self._judge(asked, reply)
        except AnswerRefusedError as refused:
            self.counts["refused"] += 1
            self.last_refused = str(refused)
            raise
        self.counts["answers"] += 1
        return answer

    def _drop(self, kind: str, why: str) -> None:
        self.counts[kind] += 1
        self.last_refused = why

    def _judge(self, asked: Request, reply: Reply) -> Answer:
        if isinstance(reply, Busy):
            reply.retry_after_ms = min(reply.retry_after_ms, RETRY_AFTER_MS_MAX)
        elif isinstance(reply, Hello):
            if not isinstance(asked, HelloRequest):
                raise AnswerRefusedError("a hello, where frames were asked for")
            if reply.stream != self._stream:
                raise AnswerRefusedError(f"it serves stream {reply.stream!r}, not {self._stream!r}")
            if reply.next_sequence < reply.first_available:
                span = f"next_sequence {reply.next_sequence} lies below first_available {reply.first_available}"
                raise AnswerRefusedError(span)
        elif isinstance(reply, Data):
            if not isinstance(asked, ReplayRequest):
                raise AnswerRefusedError("frames, where a hello was asked for")
            return Frames(self._events(asked, reply), reply.next_sequence)
        elif isinstance(reply, Gone) and not isinstance(asked, ReplayRequest):
            raise AnswerRefusedError("gone, where a hello was asked for")
        return reply

    def _events(self, asked: ReplayRequest, data: Data) -> list[Event]:
        """Judge a `data` answer; every event in it is then one that was asked for."""
        if len(data.frames) > asked.limit:
            raise AnswerRefusedError(f"{len(data.frames)} frames, {asked.limit} were asked for")
        events = [self._event(payload) for payload in data.frames]
        before = asked.first - 1
        for event in events:
            sequence = event.output_sequence
            if sequence <= before:
                raise AnswerRefusedError(f"sequence {sequence} came after {before}, from {asked.first} on was asked")
            if event.session not in (None, asked.session):
                raise AnswerRefusedError(f"sequence {sequence} is of session {event.session}, not {asked.session}")
            before = sequence
        first_there = events[0].output_sequence if events else I63_MAX
        if not asked.first <= data.first <= first_there:
            raise AnswerRefusedError(f"it says from {data.first}, {asked.first} was asked, {first_there} comes first")
        if before >= data.next_sequence and events:
            raise AnswerRefusedError(f"sequence {before} came, which by its next_sequence {data.next_sequence} isn't")
        return events

    def _event(self, payload: bytes) -> Event:
        if len(payload) > self._frame_bytes_max:
            raise AnswerRefusedError(f"a frame of {len(payload)} bytes; engine.frame_bytes_max is the most")
        try:
            event = wire.decode(payload)
        except MalformedFrameError as malformed:
            raise AnswerRefusedError(f"a frame that is none: {malformed}") from malformed
        if isinstance(event, Heartbeat):
            raise AnswerRefusedError("a heartbeat among the frames")
        return event


# --- the side that answers --------------------------------------------------------------------------------------------


def read_request(message: bytes, stream: str) -> Request:
    """Give what is asked for; raises RequestRefusedError, which `error` answers."""
    try:
        request: Request = _request(message)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise RequestRefusedError(_id_of(message), "BAD_REQUEST", str(error)) from error
    if request.stream != stream:
        why = f"stream {request.stream!r} is not served here, {stream!r} is"
        raise RequestRefusedError(request.id, "WRONG_STREAM", why)
    if isinstance(request, HelloRequest) and request.protocol != PROTOCOL:
        why = f"protocol {request.protocol} is not spoken here, {PROTOCOL} is"
        raise RequestRefusedError(request.id, "WRONG_PROTOCOL", why)
    return request


def _id_of(message: bytes) -> Any:
    try:
        return _any_id(message).id
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None


def hello(request: HelloRequest, *, session: int, first_available: int, next_sequence: int) -> bytes:
    """Answer a hello."""
    reply = Hello(
        id=request.id,
        stream=request.stream,
        session=session,
        first_available=first_available,
        next_sequence=next_sequence,
    )
    return _encode(reply)


def data(request: ReplayRequest, frames: list[bytes], next_sequence: int) -> bytes:
    """Answer with frames: at most FRAMES_BYTES_MAX, each with FRAME_HEAD_BYTES."""
    return _encode(Data(id=request.id, first=request.first, frames=frames, next_sequence=next_sequence))


def gone(request: ReplayRequest, first_available: int) -> bytes:
    """Answer that it isn't kept, or is of another session."""
    return _encode(Gone(id=request.id, first_available=first_available))


def busy(message: bytes, retry_after_ms: int) -> bytes:
    """Answer a request, unread but for its id, with: not now."""
    return _encode(Busy(id=_id_of(message), retry_after_ms=retry_after_ms))


def error(refused: RequestRefusedError) -> bytes:
    """Answer what can't be answered."""
    return _encode(Failed(id=refused.request_id, code=refused.code, reason=str(refused)))


FRAME_HEAD_BYTES: Final = 5  # what msgpack puts before a frame's bytes, at most
FRAMES_BYTES_MAX: Final = ANSWER_BYTES_MAX - 256  # what is left for frames beside an answer's keys, numbers and id
