"""The replay talk: what is asked, what is believed, what a liar can do to a tape, and what a tape serves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sidecar import replay, wire
from sidecar.errors import AnswerRefusedError, RequestRefusedError
from sidecar.events import Event, Heartbeat
from sidecar.refill import Refill
from sidecar.replay import Client, Frames, Gone, Hello
from sidecar.replay_server import ReplayServer
from sidecar.talk import Dealer
from sidecar.tape import Tape, TapeReader, lock, write_settled
from tests.model import virtual_time
from tests.streams import event as event_of
from tests.streams import pack, trade, trade_fields
from tests.waiting import until

FIRST_ID = 100


def client(frame_bytes_max: int = 8_192) -> Client:
    return Client(stream="main", first_id=FIRST_ID, frame_bytes_max=frame_bytes_max)


def frame(sequence: int, **other: Any) -> bytes:
    return pack(trade_fields(sequence, **other))


def said(op: str, **keys: Any) -> bytes:
    return pack({"op": op, "id": FIRST_ID + 1} | keys)


def data(*frames: Any, first: Any = 5, following: int = 100, **other: Any) -> bytes:
    return said("data", **({"from": first, "frames": list(frames), "next_sequence": following} | other))


# --- what is asked, and what is believed ------------------------------------------------------------------------------


def test_what_is_asked_is_what_wire_md_says() -> None:
    asking = client()
    assert msgpack.unpackb(asking.ask_hello()) == {"op": "hello", "id": 101, "protocol": 1, "stream": "main"}
    asked = msgpack.unpackb(asking.ask_replay(7, 5, 3))
    assert asked == {"op": "replay", "id": 102, "stream": "main", "session": 7, "from": 5, "limit": 3}


def test_a_true_answer_is_believed() -> None:
    asking = client()
    asking.ask_hello()
    hello = asking.hear(said("hello", stream="main", session=7, first_available=3, next_sequence=9, more="unknown"))
    assert isinstance(hello, Hello)
    assert (hello.session, hello.first_available, hello.next_sequence) == (7, 3, 9)
    asking = client()
    asking.ask_replay(7, 5, 3)
    answer = asking.hear(data(frame(5, session=7), frame(6), frame(9, session=7)))
    assert isinstance(answer, Frames)
    assert [event.output_sequence for event in answer.events] == [5, 6, 9]
    assert asking.counts == {"answers": 1}
    for message, kind in ((data(), Frames), (said("gone", first_available=50), Gone)):
        asking = client()
        asking.ask_replay(7, 5, 3)
        assert isinstance(asking.hear(message), kind)


def test_a_busy_server_is_not_waited_for_longer_than_is_sane() -> None:
    asking = client()
    asking.ask_hello()
    answer = asking.hear(said("busy", retry_after_ms=1 << 60))
    assert isinstance(answer, replay.Busy)
    assert answer.retry_after_ms == replay.RETRY_AFTER_MS_MAX


LIES = {
    "too many frames": data(*(frame(n) for n in range(5, 9))),
    "below what was asked": data(frame(4), frame(5)),
    "far from what it says": data(frame(5), first=6),
    "from below": data(frame(5), first=4),
    "twice": data(frame(5), frame(5)),
    "falling": data(frame(6), frame(5)),
    "another session": data(frame(5, session=8)),
    "another session in one frame": data(frame(5, session=7), frame(6, session=0)),
    "garbage": data(frame(5), b"\xc1"),
    "no map": data(pack([1, 2])),
    "a heartbeat": data(pack({"next_sequence": 5})),
    "no sequence": data(pack({"trade_id": 5})),
    "a huge frame": data(frame(5, pad=b"x" * 9_000)),
    "frames that aren't there yet": data(frame(5), frame(6), following=6),
    "a hello": said("hello", stream="main", session=7, first_available=1, next_sequence=9),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_lie_is_refused_whole(lie: bytes) -> None:
    asking = client()
    asking.ask_replay(7, 5, 3)
    with pytest.raises(AnswerRefusedError):
        asking.hear(lie)
    assert asking.counts == {"refused": 1}
    assert asking.hear(data(frame(5))) is None  # the request is answered: whatever comes now is stale


@pytest.mark.parametrize(
    "message",
    [
        *(b"", b"\xc1", b"\x80", pack([1]), b"\xde", b"\x91" * 3_000, pack({"op": "data"}), said("what")),
        *(
            said("hello"),
            data(5),
            data("text"),
            data(b"x", following=-1),
            data(first="5"),
            data(first=0),
            data(first=True),
        ),
        *(said("gone"), said("gone", first_available=-1), said("gone", first_available=None)),
        *(said("busy", retry_after_ms=-1), said("busy", retry_after_ms=0.5), said("error", code=5, reason="x")),
        data(*[b"x"] * 2_001),
        data(b"x" * 1_200_000),
    ],
)
def test_what_is_no_answer_is_dropped_and_the_answer_still_counts(message: bytes) -> None:
    asking = client()
    asking.ask_replay(7, 5, 3)
    assert asking.hear(message) is None
    assert asking.counts["garbage"] + asking.counts["oversized"] == 1
    assert asking.last_refused
    assert isinstance(asking.hear(data(frame(5))), Frames)


@pytest.mark.parametrize("stale", [FIRST_ID, FIRST_ID + 2, True])
def test_an_answer_to_another_request_is_dropped(stale: int) -> None:
    asking = client()
    asking.ask_replay(7, 5, 3)
    assert asking.hear(data(frame(5), id=stale)) is None
    assert asking.counts == {"stale": 1}
    asking.ask_replay(7, 5, 3)  # asked again, with a new id
    assert asking.hear(data(frame(5))) is None
    assert isinstance(asking.hear(data(frame(5), id=FIRST_ID + 2)), Frames)


def test_a_hello_of_another_stream_or_with_its_end_before_its_beginning_is_refused() -> None:
    for wrong in ({"stream": "other"}, {"next_sequence": 2}):
        asking = client()
        asking.ask_hello()
        keys = {"stream": "main", "session": 0, "first_available": 3, "next_sequence": 9} | wrong
        with pytest.raises(AnswerRefusedError):
            asking.hear(said("hello", **keys))


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=5), st.binary(max_size=9),
    st.lists(st.integers(0, 9), max_size=3),
)  # fmt: skip
FRAMES = st.one_of(
    st.builds(frame, st.integers(1, 12), session=st.integers(6, 8)), st.builds(frame, st.integers(1, 12)), VALUES,
    st.builds(pack, VALUES), st.builds(lambda n: pack({"next_sequence": n}), st.integers(1, 9)),
)  # fmt: skip
ANSWERS = st.one_of(
    st.binary(max_size=50),
    st.builds(
        lambda op, number, first, frames, following: pack(
            {"op": op, "id": number, "from": first, "frames": frames, "next_sequence": following, "stream": "main",
             "session": 7, "first_available": first, "retry_after_ms": first, "code": "x", "reason": "y"}
        ),
        st.sampled_from(["data", "data", "data", "hello", "gone", "busy", "error", "x"]),
        st.sampled_from([FIRST_ID + 1, FIRST_ID + 1, FIRST_ID + 1, 0, None]),
        st.one_of(st.just(5), st.integers(0, 9), VALUES),
        st.one_of(st.lists(FRAMES, max_size=5), VALUES),
        st.one_of(st.integers(1, 20), VALUES),
    ),
)  # fmt: skip


@given(st.lists(ANSWERS, max_size=4))
@example([data(frame(5, session=7), frame(6, session=7))])
def test_whatever_a_liar_says_only_what_was_asked_for_gets_through(messages: list[bytes]) -> None:
    asking = client()
    asking.ask_replay(7, 5, 3)
    for number, message in enumerate(messages, 1):
        with contextlib.suppress(AnswerRefusedError):
            answer = asking.hear(message)
            if isinstance(answer, Frames):
                plain = [msgpack.unpackb(event.payload) for event in answer.events]
                sequences = [fields["output_sequence"] for fields in plain]
                assert sequences == sorted(set(sequences))
                assert len(sequences) <= 3
                assert all(5 <= sequence < answer.next_sequence for sequence in sequences)
                assert {fields.get("session", 7) for fields in plain} <= {7}
                assert msgpack.unpackb(message)["id"] == FIRST_ID + 1
        assert sum(asking.counts.values()) == number  # each is counted, as what it was


# --- what is answered -------------------------------------------------------------------------------------------------


@given(
    st.one_of(st.binary(max_size=60), st.dictionaries(st.sampled_from(["op", "id", "from", "limit"]), VALUES).map(pack))
)
def test_whatever_is_asked_there_is_an_answer(message: bytes) -> None:
    try:
        replay.read_request(message, "main")
    except RequestRefusedError as refused:
        answer = msgpack.unpackb(replay.error(refused))
        assert (answer["op"], answer["code"]) == ("error", "BAD_REQUEST")


@pytest.mark.parametrize(
    "request_keys, code",
    [
        ({"op": "hello", "protocol": 2, "stream": "main"}, "WRONG_PROTOCOL"),
        ({"op": "hello", "protocol": 1, "stream": "x"}, "WRONG_STREAM"),
        ({"op": "replay", "stream": "main", "session": 0, "from": 1, "limit": 2_001}, "BAD_REQUEST"),
        ({"op": "replay", "stream": "main", "session": 0, "from": 0, "limit": 1}, "BAD_REQUEST"),
        ({"op": "drop"}, "BAD_REQUEST"),
    ],
)
def test_what_can_not_be_answered_is_an_error_with_its_id_and_code(request_keys: dict[str, Any], code: str) -> None:
    for number in (7, "a text", None):
        with pytest.raises(RequestRefusedError) as refused:
            replay.read_request(pack(request_keys | {"id": number}), "main")
        assert (refused.value.request_id, refused.value.code) == (number, code)


# --- a tape that is filled by a liar, in virtual time -----------------------------------------------------------------


class Engine:
    """A server without a socket: answers as wire.md says, or as `lies` (one a request, then the truth) want it."""

    def __init__(self, frames: dict[int, bytes], session: int, lies: list[str], seed: int) -> None:
        self.frames = frames
        self.session = session
        self.lies = lies
        self.asked: list[dict[str, Any]] = []
        self.sockets = 0
        self._chance = random.Random(seed)
        self._waiting: list[bytes] = []

    async def send(self, message: bytes) -> None:
        request = msgpack.unpackb(message)
        self.asked.append(request)
        lie = self.lies.pop(0) if self.lies else ""
        self._waiting += [pack(answer) for answer in self._answers(request, lie)]

    async def receive(self, deadline: float) -> bytes | None:
        if self._waiting:
            await asyncio.sleep(0)
            return self._waiting.pop(0)
        await asyncio.sleep(deadline - asyncio.get_running_loop().time())
        return None

    def renew(self) -> None:
        self.sockets += 1
        self._waiting.clear()

    def close(self) -> None:
        pass

    def _answers(self, request: dict[str, Any], lie: str) -> list[dict[str, Any]]:
        chance = self._chance
        following = max(self.frames, default=0) + 1
        answer: dict[str, Any]
        if request["op"] == "hello":
            first = min(self.frames, default=1)
            answer = {"op": "hello", "stream": "main", "session": self.session, "first_available": first}
        elif request["session"] != self.session:
            return [{"op": "gone", "id": request["id"], "first_available": 1}]
        else:
            there = [n for n in sorted(self.frames) if n >= request["from"]][: request["limit"]]
            answer = {"op": "data", "from": request["from"], "frames": [self.frames[n] for n in there]}
        answer |= {"id": request["id"], "next_sequence": following}
        frames = answer.get("frames") or [b""]
        at = chance.randrange(len(frames))
        some = self.frames[chance.choice(list(self.frames))]
        another = {"session": 9, "frames": [pack(msgpack.unpackb(f) | {"session": 9}) for f in frames if f]}
        number = {"id": request["id"]}
        lied: dict[str, list[dict[str, Any]]] = {
            "silent": [],
            "stale": [answer | {"id": number["id"] - 1, "frames": [frame(n, price=1) for n in range(1, 9)]}, answer],
            "busy": [number | {"op": "busy", "retry_after_ms": chance.randrange(100)}],
            "error": [number | {"op": "error", "code": "X", "reason": "y"}],
            "gone": [number | {"op": "gone", "first_available": chance.randrange(60)}],
            "far-ahead": [answer | {"next_sequence": 1 << 62}],
            "session": [answer | another],
            "shifted": [answer | {"frames": [some, *frames]}],
            "garbage": [answer | {"frames": [*frames[:at], chance.randbytes(20), *frames[at + 1 :]]}],
            "reversed": [answer | {"frames": frames[::-1]}],
            "empty": [answer | {"frames": []}],
            "types": [answer | {"frames": [7], "session": "x"}],
        }
        return lied.get(lie, [answer])


KINDS = (
    "", "silent", "stale", "busy", "error", "gone", "far-ahead", "session", "shifted", "garbage", "reversed", "empty",
    "types",
)  # fmt: skip


def true_frames(session: int, count: int) -> dict[int, bytes]:
    key = {"session": session} if session else {}
    return {n: frame(n, price=300 + n, **key) for n in range(1, count + 1)}


def decoded(payload: bytes) -> Event:
    event = wire.decode(payload)
    assert not isinstance(event, Heartbeat)
    return event


def refilling(tape: Tape, engine: Engine, **other: Any) -> Refill:
    given: dict[str, Any] = {
        "stream": "main",
        "first_sequence": 1,
        "endpoint": "tcp://x:1",
        "timeout_s": 1.0,
        "retry_backoff_max_s": 5.0,
    }
    filling = Refill(tape=tape, frame_bytes_max=8_192, **(given | other))
    filling._dealer = engine  # type: ignore[assignment]
    return filling


def put_on(tape: Tape) -> Callable[[int | None, list[Event]], Coroutine[Any, Any, int]]:
    async def put(session: int | None, events: list[Event]) -> int:
        if session is not None:
            return tape.fill(session, events)
        for event in events:
            tape.append(event)
        return len(events)

    return put


@contextlib.contextmanager
def tape_at(path: Path) -> Iterator[Tape]:
    tape = Tape(path, size_bytes_max=1 << 40)
    try:
        yield tape
    finally:
        tape.close()


def on_tape(tape: Tape, session: int = 1) -> dict[int, bytes]:
    """What will be on disk: these tapes are never committed."""
    return {n: payload for at, n, _, _, payload in tape._frames if at == session}


@given(
    st.lists(st.sampled_from(KINDS), max_size=12), st.sets(st.integers(1, 40)), st.sampled_from([0, 7]),
    st.integers(0, 99),
)  # fmt: skip
@example(["session"], {12, 21}, 7, 0)
@example(["far-ahead", "stale", "gone", "shifted"], set(), 0, 0)
def test_a_tape_filled_by_a_liar_who_mends_his_ways_holds_the_truth(
    tmp_path_factory: pytest.TempPathFactory, lies: list[str], heard: set[int], session: int, seed: int
) -> None:
    frames = true_frames(session, 40)
    with tape_at(tmp_path_factory.mktemp("tape") / "tape.db") as tape:
        for n in sorted(heard):
            tape.append(decoded(frames[n]))

        async def story() -> None:
            engine = Engine(frames, session, list(lies), seed)
            filling = refilling(tape, engine)
            running = asyncio.create_task(filling.run(put_on(tape)))
            for _ in range(1_200):
                await asyncio.sleep(0.1)
                if len(on_tape(tape)) == 40 and filling.state == "idle":
                    break
            assert not running.done(), running
            running.cancel()

        virtual_time.run(story())
        assert on_tape(tape) == frames
        assert len(tape.sessions) == 1
        assert tape.sessions[1].announced_to == 0  # nobody's word became a hole


def run_for(filling: Refill, tape: Tape, seconds: float, then: Callable[[], None] = lambda: None) -> None:
    async def story() -> None:
        running = asyncio.create_task(filling.run(put_on(tape)))
        await asyncio.sleep(seconds / 2)
        then()
        await asyncio.sleep(seconds / 2)
        assert not running.done(), running
        running.cancel()

    virtual_time.run(story())


def test_lost_last_frames_are_asked_for_when_told_that_the_engine_is_silent(tmp_path: Path) -> None:
    frames = true_frames(0, 9)
    with tape_at(tmp_path / "tape.db") as tape:
        for n in range(1, 8):
            tape.append(decoded(frames[n]))
        engine = Engine({n: frames[n] for n in range(1, 8)}, 0, [], 1)
        filling = refilling(tape, engine)
        run_for(filling, tape, 60, lambda: engine.frames.update(frames))
        assert (len(on_tape(tape)), filling.conversations_total) == (7, 1)  # no number says that more was published

        def silence() -> None:
            engine.lies = ["silent"]  # the first try fails: it is asked again without being told again
            engine.frames.update(frames)
            filling.ask_beyond()

        run_for(filling, tape, 60, silence)
        assert on_tape(tape) == frames
        assert (filling.conversations_total, filling.state) == (3, "idle")
        assert tape.sessions[1].announced_to == 0  # its word about its end is not written down


def test_a_server_that_never_answers_is_asked_for_ever_with_backoff_on_new_sockets(tmp_path: Path) -> None:
    with tape_at(tmp_path / "tape.db") as tape:
        engine = Engine(true_frames(0, 9), 0, ["silent"] * 10**6, 1)
        filling = refilling(tape, engine)
        run_for(filling, tape, 3_600)
        assert 550 < len(engine.asked) < 650  # 1 s of waiting and 5 s of backoff each
        assert engine.sockets == pytest.approx(len(engine.asked), abs=1)
        assert len({request["id"] for request in engine.asked}) == len(engine.asked)
        assert filling.said()["state"] == "silent"
        assert filling.failures == engine.sockets


@pytest.mark.parametrize("endpoint", ["tcp://no.such.host.invalid:1", "tcp://[::1%nowhere]:1", "ipc:///no/such/path"])
def test_a_server_that_can_not_be_reached_at_all_does_not_end_the_recorder(tmp_path: Path, endpoint: str) -> None:
    async def story(tape: Tape) -> None:
        filling = Refill(
            tape=tape, stream="main", first_sequence=1, endpoint=endpoint, timeout_s=0.05, retry_backoff_max_s=0.05,
            frame_bytes_max=8_192,
        )  # fmt: skip
        running = asyncio.create_task(filling.run(put_on(tape)))
        await until(lambda: filling.failures >= 3 or running.done())
        assert not running.done(), running
        assert (filling.state, endpoint in str(filling.last_error)) == ("silent", True)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    with tape_at(tmp_path / "tape.db") as tape:
        asyncio.run(story(tape))


def test_an_unkeyed_server_with_another_past_fills_nothing(tmp_path: Path) -> None:
    """An engine that began anew and whose frames say no session is known by its content alone."""
    frames = true_frames(0, 40)
    with tape_at(tmp_path / "tape.db") as tape:
        for n in (1, 2, 3, 20):
            tape.append(decoded(frames[n]))
        before = on_tape(tape)
        anew = {n: frame(n, price=7) for n in range(1, 31)}
        filling = refilling(tape, Engine(anew, 0, [], 1))
        run_for(filling, tape, 60)
        assert on_tape(tape) == before
        assert len(tape.sessions) == 1
        assert "other content" in str(filling.last_error)
        assert filling.said()["counts"]["contradictions"] > 5
        assert filling.gone == {}


def test_an_engine_that_begins_anew_behind_the_same_address_fills_nothing(tmp_path: Path) -> None:
    frames = true_frames(0, 40)
    anew = {n: frame(n, price=7) for n in range(1, 31)}
    with tape_at(tmp_path / "tape.db") as tape:
        for n in (1, 2, 40):
            tape.append(decoded(frames[n]))
        engine = Engine(frames, 0, [], 1)
        filling = refilling(tape, engine)
        filling._limit = 1

        def then(request: dict[str, Any], lie: str) -> list[dict[str, Any]]:
            if len(engine.asked) == 5:  # it was compared, and some is filled
                engine.frames = anew
            return Engine._answers(engine, request, lie)

        engine._answers = then  # type: ignore[method-assign]
        run_for(filling, tape, 60)
        filled = on_tape(tape)
        assert len(filled) > 4
        assert filled == {n: frames[n] for n in filled}
        assert len(tape.sessions) == 1


def test_holes_of_an_older_session_are_asked_for_by_its_key_and_never_without_one(tmp_path: Path) -> None:
    for key in (7, 0):
        old, new = true_frames(key, 20), {n: frame(n, price=9, **({"session": 8} if key else {})) for n in range(1, 11)}
        with tape_at(tmp_path / f"tape-{key}.db") as tape:
            for n in (1, 2, 3, 20):
                tape.append(decoded(old[n]))
            for n in (1, 2, 10):
                tape.append(decoded(new[n]))
            assert len(tape.sessions) == 2
            engine = Engine(old, key, [], 1) if key else Engine(new, 0, [], 1)
            filling = refilling(tape, engine)
            run_for(filling, tape, 60)
            if key:
                assert on_tape(tape, 1) == old
                assert sorted(on_tape(tape, 2)) == [1, 2, 10]
                assert filling.gone == {2: 10}
            else:
                assert sorted(on_tape(tape, 1)) == [1, 2, 3, 20]
                assert on_tape(tape, 2) == new
                assert filling.gone == {1: 20}


def test_a_session_of_which_only_a_heartbeat_was_heard_is_filled_and_gets_its_key(tmp_path: Path) -> None:
    frames = true_frames(7, 40)
    with tape_at(tmp_path / "tape.db") as tape:
        tape.announce(Heartbeat(41, None, None))
        filling = refilling(tape, Engine(frames, 7, ["", "", "garbage"], 1))
        filling._limit = 10
        run_for(filling, tape, 10)
        assert on_tape(tape) == frames
        assert tape.sessions[1].engine_session == 7
        assert (filling.gone, filling.state) == ({}, "idle")


def test_gone_is_remembered_up_to_what_was_asked_and_what_is_there_is_filled(tmp_path: Path) -> None:
    frames = true_frames(0, 40)
    with tape_at(tmp_path / "tape.db") as tape:
        for n in (30, 40):
            tape.append(decoded(frames[n]))
        engine = Engine({n: payload for n, payload in frames.items() if n > 10}, 0, [], 1)

        def gone(request: dict[str, Any], lie: str) -> list[dict[str, Any]]:
            if request["op"] == "replay" and request["from"] <= 10:
                return [{"op": "gone", "id": request["id"], "first_available": 11}]
            return Engine._answers(engine, request, lie)

        engine._answers = gone  # type: ignore[method-assign]
        filling = refilling(tape, engine)
        run_for(filling, tape, 10)
        assert sorted(on_tape(tape)) == list(range(11, 41))
        assert filling.said()["gone"] == {"1": 11}
        assert filling.said()["need"] == [1, 10]
        del engine._answers
        engine.frames = frames  # somebody has found the archive
        run_for(filling, tape, 20)
        assert on_tape(tape) == frames
        assert (filling.gone, filling.state) == ({}, "idle")


def test_what_the_settler_says_is_settled_is_not_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "tape.db"
    frames = true_frames(0, 40)
    with tape_at(path) as tape, contextlib.closing(lock(path, "settler")):
        engine = Engine(frames, 0, [], 1)
        filling = refilling(tape, engine)

        def say() -> None:
            assert engine.asked == []  # a settler is there and has not said anything yet
            settled = {"tape_id": tape.tape_id, "session": 1, "acked": 30, "said_at_us": filling._begun_us + 1}
            write_settled(path, settled)

        run_for(filling, tape, 4, say)
        assert sorted(on_tape(tape)) == list(range(31, 41))
        assert min(request.get("from", 99) for request in engine.asked) == 31
    for other in ({"tape_id": 1}, {"session": 0}, {"acked": "9"}):  # another tape's, none yet, nonsense
        with tape_at(tmp_path / f"{len(str(other))}.db") as tape:
            settled = {"tape_id": tape.tape_id, "session": 1, "acked": 30, "said_at_us": 0} | other
            write_settled(tape.path, settled)
            run_for(refilling(tape, Engine(frames, 0, [], 1)), tape, 4)
            assert on_tape(tape) == frames


def test_a_frame_that_comes_a_moment_late_is_not_asked_for(tmp_path: Path) -> None:
    frames = true_frames(0, 9)
    with tape_at(tmp_path / "tape.db") as tape:
        for n in (1, 2):
            tape.append(decoded(frames[n]))
        engine = Engine({n: frames[n] for n in (1, 2)}, 0, [], 1)
        filling = refilling(tape, engine)

        async def story() -> None:
            running = asyncio.create_task(filling.run(put_on(tape)))
            await asyncio.sleep(1.05)
            asked = len(engine.asked)
            tape.append(decoded(frames[4]))
            await asyncio.sleep(0.09)  # one look in between
            tape.append(decoded(frames[3]))
            await asyncio.sleep(5)
            assert len(engine.asked) == asked
            running.cancel()

        virtual_time.run(story())


# --- a tape that serves its past: real sockets, real disks ------------------------------------------------------------


@contextlib.asynccontextmanager
async def served(path: Path, **other: Any) -> AsyncIterator[tuple[ReplayServer, Dealer]]:
    endpoint = f"ipc://{path}.replay-socket"
    server = ReplayServer(tape_path=path, stream="main", endpoint=endpoint, **({"answers_per_s_max": 10_000} | other))
    running = asyncio.create_task(server.run())
    asking = Dealer(endpoint, replay.ANSWER_BYTES_MAX)
    try:
        yield server, asking
    finally:
        asking.close()
        server.stop()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def ask(asking: Dealer, message: bytes) -> dict[str, Any]:
    await asking.send(message)
    answer = await asking.receive(asyncio.get_running_loop().time() + 10)
    assert answer is not None
    assert len(answer) <= replay.ANSWER_BYTES_MAX
    said: dict[str, Any] = msgpack.unpackb(answer)
    return said


async def record(tape: Tape, *events: Event) -> None:
    for event in events:
        tape.append(event)
    await tape.commit(tape.take_turn())


def test_a_tape_serves_what_it_holds_and_says_what_is_gone(tmp_path: Path) -> None:
    async def story(tape: Tape) -> None:
        async with served(tape.path) as (_, asking):
            ids = client()
            hello = await ask(asking, ids.ask_hello())
            assert (hello["session"], hello["first_available"], hello["next_sequence"]) == (0, 1, 1)
            assert (await ask(asking, ids.ask_replay(0, 1, 9)))["op"] == "gone"
            await record(tape, *(trade(n) for n in (*range(1, 21), *range(25, 31))))
            hello = await ask(asking, ids.ask_hello())
            assert (hello["session"], hello["first_available"], hello["next_sequence"]) == (0, 1, 31)
            answer = await ask(asking, ids.ask_replay(0, 19, 4))
            assert answer["frames"] == [trade(n).payload for n in (19, 20, 25, 26)]
            assert (answer["from"], answer["next_sequence"]) == (19, 31)
            assert (await ask(asking, ids.ask_replay(0, 31, 4)))["frames"] == []
            assert await tape.prune(1, 10, 1 << 62) == 10
            gone = await ask(asking, ids.ask_replay(0, 10, 4))
            assert (gone["op"], gone["first_available"]) == ("gone", 11)
            assert (await ask(asking, ids.ask_replay(9, 15, 4)))["op"] == "gone"
            tape.append(trade(5, price=1))  # an engine that began anew: its frames carry no session either
            await record(tape, trade(6, price=1))
            gone = await ask(asking, ids.ask_replay(0, 2, 9))
            assert (gone["op"], gone["first_available"]) == ("gone", 5)
            assert len((await ask(asking, ids.ask_replay(0, 5, 9)))["frames"]) == 2
            await record(tape, trade(1, session=4), trade(1, session=5))
            assert (await ask(asking, ids.ask_hello()))["session"] == 5
            assert len((await ask(asking, ids.ask_replay(4, 1, 9)))["frames"]) == 3  # the older one, by its key
            assert (await ask(asking, ids.ask_replay(0, 15, 9)))["op"] == "gone"  # and none without

    with tape_at(tmp_path / "tape.db") as tape:
        asyncio.run(story(tape))


def test_an_answer_is_bounded_in_frames_and_bytes(tmp_path: Path) -> None:
    async def story(tape: Tape) -> None:
        await record(
            tape, *(trade(n) for n in range(1, 2_501)), *(trade(n, pad=b"x" * 3_500) for n in range(2_501, 3_001))
        )
        await record(tape, event_of(trade_fields(3_001, pad=b"x" * 1_100_000)))
        async with served(tape.path) as (_, asking):
            ids = client()
            assert len((await ask(asking, ids.ask_replay(0, 1, 2_000)))["frames"]) == 2_000
            large = (await ask(asking, ids.ask_replay(0, 2_501, 2_000)))["frames"]
            assert 250 < len(large) < 300
            assert (await ask(asking, ids.ask_replay(0, 3_001, 1)))["code"] == "FRAME_TOO_LARGE"
            assert (await ask(asking, b"\xc1"))["op"] == "error"

    with tape_at(tmp_path / "tape.db") as tape:
        asyncio.run(story(tape))


def test_what_was_asked_for_and_is_settled_and_deleted_meanwhile_is_left_out(tmp_path: Path) -> None:
    async def story(tape: Tape) -> None:
        await record(tape, *(trade(n) for n in range(1, 11)), trade(20))
        assert await tape.prune(1, 5, 1 << 62) == 5
        assert tape.fill(1, [trade(n) for n in range(3, 13)]) == 2
        assert len(tape.sessions) == 1

    with tape_at(tmp_path / "tape.db") as tape:
        asyncio.run(story(tape))


def test_a_damaged_frame_is_never_served(tmp_path: Path) -> None:
    async def story(tape: Tape) -> None:
        await record(tape, *(trade(n) for n in range(1, 11)))
        tape._db.execute("UPDATE frames SET payload = x'80' WHERE output_sequence = 6")
        async with served(tape.path) as (_, asking):
            ids = client()
            assert len((await ask(asking, ids.ask_replay(0, 1, 9)))["frames"]) == 5
            assert (await ask(asking, ids.ask_replay(0, 6, 9)))["code"] == "TAPE_UNREADABLE"
            assert len((await ask(asking, ids.ask_replay(0, 7, 9)))["frames"]) == 4

    with tape_at(tmp_path / "tape.db") as tape:
        asyncio.run(story(tape))


def test_whoever_asks_too_much_is_told_when_to_come_again(tmp_path: Path) -> None:
    async def story(tape: Tape) -> None:
        await record(tape, trade(1))
        async with served(tape.path, answers_per_s_max=5) as (server, asking):
            ids = client()
            answers = [await ask(asking, ids.ask_replay(0, 1, 1)) for _ in range(8)]
            assert [answer["op"] for answer in answers[:5]] == ["data"] * 5
            busy = [answer for answer in answers if answer["op"] == "busy"]
            assert busy
            assert 0 < busy[-1]["retry_after_ms"] <= 201
            await asyncio.sleep(busy[-1]["retry_after_ms"] / 1000)
            assert (await ask(asking, ids.ask_replay(0, 1, 1)))["op"] == "data"
            assert server.counts["busy"] == len(busy)

    with tape_at(tmp_path / "tape.db") as tape:
        asyncio.run(story(tape))


def test_two_tapes_with_different_holes_fill_each_other(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    lost = [set(chance.sample(range(1, 3_000), 200)) for _ in range(2)]
    both = lost[0] & lost[1]

    async def fill(tape: Tape, endpoint: str, other: set[int]) -> None:
        filling = Refill(
            tape=tape,
            stream="main",
            first_sequence=1,
            endpoint=endpoint,
            timeout_s=1.0,
            retry_backoff_max_s=0.1,
            frame_bytes_max=8_192,
        )
        running = asyncio.create_task(filling.run(put_on(tape)))
        await until(lambda: filling.state == ("unfilled" if both else "idle"))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await tape.commit(tape.take_turn())
        with contextlib.closing(TapeReader(tape.path)) as reader:
            there = [n for n, _, _ in reader.frames(1, 1, 1 << 40, 10_000)]
            missing = set(range(1, 3_001)) - set(there)
        assert missing == both
        assert filling.filled_total == len(other - both)

    async def story(one: Tape, other: Tape) -> None:
        for tape, holes in ((one, lost[0]), (other, lost[1])):
            await record(tape, *(trade(n) for n in range(1, 3_001) if n not in holes))
        async with served(one.path), served(other.path):
            await fill(one, f"ipc://{other.path}.replay-socket", lost[0])
            await fill(other, f"ipc://{one.path}.replay-socket", lost[1])

    with tape_at(tmp_path / "one.db") as one, tape_at(tmp_path / "other.db") as other:
        asyncio.run(story(one, other))


def test_the_failures_of_hours_are_a_handful_of_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tape_at(tmp_path / "tape.db") as tape:
        run_for(refilling(tape, Engine(true_frames(0, 9), 0, ["silent"] * 10**6, 1)), tape, 8_640)
    lines = [line for line in caplog.records if line.getMessage() == "replay_failed"]
    assert len(lines) == 11  # the 1st, 2nd, 4th … 1024th
    assert json.loads(json.dumps(lines[-1].__dict__["attempts"])) == 1_024
