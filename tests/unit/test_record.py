"""The recording half: from a real PUB socket to a real tape, through full disks and faults."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import zmq

from sidecar import record as record_module
from sidecar.errors import TapeError
from sidecar.events import Event, Refused
from sidecar.record import PENDING_TURNS_MAX, Recorder
from sidecar.tape import Tape, TapeReader, read_recorded, write_settled
from tests.streams import event, pack, trade_fields

Story = Callable[[zmq.Socket[bytes], Recorder, TapeReader], Coroutine[Any, Any, None]]


async def until(what: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not what():  # noqa: ASYNC110 - whatever it is, it tells nobody
            await asyncio.sleep(0.005)


def tell(path: Path, story: Story, *, size_bytes_max: int = 1 << 40, stops: bool = True, **other: Any) -> Tape:
    """Run a story between a publisher and a recorder; the recorder is stopped at its end, as by SIGTERM."""

    async def run() -> Tape:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        publisher = context.socket(zmq.XPUB)
        publisher.setsockopt(zmq.SNDHWM, 1_000_000)
        publisher.setsockopt(zmq.LINGER, 0)
        publisher.bind("tcp://127.0.0.1:*")
        tape = Tape(path, size_bytes_max=size_bytes_max)
        bounds: dict[str, Any] = {
            "topic": "settlement",
            "turn_frames_max": 100,
            "receive_hwm_frames": 500_000,
            "receive_buffer_bytes": 1 << 20,
            "frame_bytes_max": 1 << 16,
            "retention_s": 3_600.0,
        }
        recorder = Recorder(tape=tape, endpoint=publisher.getsockopt_string(zmq.LAST_ENDPOINT), **(bounds | other))
        try:
            running = asyncio.ensure_future(recorder.run())
            await until(lambda: bool(publisher.poll(0)) or running.done())
            publisher.recv()
            with contextlib.closing(TapeReader(path)) as reader:
                await story(publisher, recorder, reader)
            if stops:
                recorder.stop()
            async with asyncio.timeout(10):
                await running
        finally:
            tape.close()
            publisher.close()
            context.term()
        return tape

    return asyncio.run(run())


def send(publisher: zmq.Socket[bytes], first: int, last: int, **other: Any) -> None:
    for n in range(first, last + 1):
        publisher.send_multipart([b"settlement", pack(trade_fields(n, **other))])


def test_ten_thousand_frames_in_one_go_all_arrive_in_turns_of_a_hundred(tmp_path: Path) -> None:
    async def story(publisher: zmq.Socket[bytes], recorder: Recorder, reader: TapeReader) -> None:
        send(publisher, 1, 10_000)
        await until(lambda: reader.runs(1).list() == [(1, 10_000)])
        send(publisher, 10_001, 10_001)
        await until(lambda: reader.runs(1).list() == [(1, 10_001)])
        assert recorder.heard_at_us > 0

    tape = tell(tmp_path / "tape.db", story)
    assert tape.recorded_total == 10_001
    assert tape.malformed_total == 0


def test_turns_begin_apart_as_asked_and_the_first_after_a_pause_at_once(tmp_path: Path) -> None:
    apart_s, begun = 0.2, []

    async def story(publisher: zmq.Socket[bytes], recorder: Recorder, reader: TapeReader) -> None:
        take_turn = recorder.tape.take_turn

        def taken() -> Any:
            begun.append(time.monotonic())
            return take_turn()

        recorder.tape.take_turn = taken  # type: ignore[method-assign]
        send(publisher, 1, 1)
        await until(lambda: reader.runs(1).head == 1)
        assert len(begun) == 1
        for n in range(2, 40):
            send(publisher, n, n)
            await asyncio.sleep(0.01)

    tape = tell(tmp_path / "tape.db", story, turn_min_s=apart_s)
    assert tape.recorded_total == 39
    between = [later - earlier for earlier, later in pairwise(begun[:-1])]  # stopping waits for nothing
    assert between
    assert min(between) >= apart_s * 0.99


def test_what_was_taken_from_the_socket_is_on_disk_when_it_stops(tmp_path: Path) -> None:
    async def story(publisher: zmq.Socket[bytes], recorder: Recorder, reader: TapeReader) -> None:
        send(publisher, 1, 5_000)
        await until(lambda: recorder._feed.frames_total > 200)

    tape = tell(tmp_path / "tape.db", story)
    with contextlib.closing(TapeReader(tmp_path / "tape.db")) as reader:
        assert reader.runs(1).list() == [(1, tape.recorded_total)]


def test_frames_without_a_place_are_kept_aside_with_the_reason(tmp_path: Path) -> None:
    async def story(publisher: zmq.Socket[bytes], recorder: Recorder, reader: TapeReader) -> None:
        publisher.send_multipart([b"settlement"])
        publisher.send_multipart([b"settlement", pack(trade_fields(1)), b"more"])
        publisher.send_multipart([b"settlement", b"\xc1"])
        publisher.send_multipart([b"settlement", pack(trade_fields(1, price=-1))])  # this one has its place
        publisher.send_multipart([b"settlement", pack({"next_sequence": 4})])
        await until(lambda: reader.runs(1).list() == [(1, 1)])
        assert reader.malformed_total == 3
        reasons = [reason for _, _, reason, _ in reversed(reader.malformed(9))]
        assert reasons[0].startswith("1 frames;")
        assert reasons[1].startswith("3 frames;")
        assert "map" in reasons[2]
        await until(lambda: reader.holes(1, 0) == [(2, 3)])

    tell(tmp_path / "tape.db", story)


def test_a_huge_frame_is_malformed_a_merely_large_one_has_its_place_and_recording_goes_on(tmp_path: Path) -> None:
    async def story(publisher: zmq.Socket[bytes], recorder: Recorder, reader: TapeReader) -> None:
        send(publisher, 1, 1, pad=b"x" * 2_000_000)
        send(publisher, 2, 2, pad=b"x" * 50_000)
        send(publisher, 3, 3)
        await until(lambda: reader.runs(1).list() == [(2, 3)])
        (_, _, reason, frames) = reader.malformed(9)[0]
        assert "engine.frame_bytes_max, 65536" in reason
        assert len(frames) < 65_536
        event = reader.read(1, 1, 1)[0]
        assert isinstance(event, Refused)
        assert event.code == "TOO_LARGE"

    tell(tmp_path / "tape.db", story)


def test_a_full_tape_leaves_the_socket_alone_and_recording_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "FULL_RETRY_S", 0.02)

    async def story(publisher: zmq.Socket[bytes], recorder: Recorder, reader: TapeReader) -> None:
        tape = recorder.tape
        send(publisher, 1, 6_000)
        await until(lambda: tape.full is not None)
        assert "tape.size_bytes_max" in str(tape.full)
        await until(lambda: tape.pending_frames == 100 * PENDING_TURNS_MAX)
        await asyncio.sleep(0.1)
        taken, there = recorder._feed.frames_total, reader.runs(1).head
        assert taken <= there + 2 * 100 * PENDING_TURNS_MAX  # the turns that wait, and the one that can't be committed
        for _ in range(500):
            publisher.send_multipart([b"settlement", b"\xc1"])  # those wait in the socket too
        await asyncio.sleep(0.1)
        assert recorder._feed.frames_total == taken
        assert reader.runs(1).head == there
        tape._size_bytes_max = 1 << 40
        await until(lambda: reader.runs(1).list() == [(1, 6_000)] and reader.malformed_total == 500)
        assert tape.full is None

    tell(tmp_path / "tape.db", story, size_bytes_max=300_000)


def test_a_flood_of_malformed_frames_is_bounded_while_nothing_can_be_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "FULL_RETRY_S", 0.02)

    async def story(publisher: zmq.Socket[bytes], recorder: Recorder, reader: TapeReader) -> None:
        send(publisher, 1, 200)
        await until(lambda: recorder.tape.full is not None)
        for _ in range(5_000):
            publisher.send_multipart([b"settlement", b"\xc1"])
        await asyncio.sleep(0.2)
        assert recorder.tape.pending_frames <= 100 * PENDING_TURNS_MAX
        recorder.tape._size_bytes_max = 1 << 40
        await until(lambda: reader.malformed_total == 5_000)

    tell(tmp_path / "tape.db", story, size_bytes_max=1)


def test_a_disk_that_can_not_be_trusted_ends_the_recorder(tmp_path: Path) -> None:
    async def story(publisher: zmq.Socket[bytes], recorder: Recorder, reader: TapeReader) -> None:
        send(publisher, 1, 1)
        await until(lambda: reader.runs(1).head == 1)
        recorder.tape._db.execute("DROP TABLE frames")
        send(publisher, 2, 2)

    with pytest.raises(TapeError, match="no such table: frames"):
        tell(tmp_path / "tape.db", story, stops=False)


def test_an_error_while_frames_get_their_place_ends_the_recorder_instead_of_losing_the_turn(tmp_path: Path) -> None:
    async def story(publisher: zmq.Socket[bytes], recorder: Recorder, reader: TapeReader) -> None:
        send(publisher, 1, 1)
        await until(lambda: reader.runs(1).head == 1)
        recorder.tape._db.execute("ALTER TABLE frames RENAME TO gone")  # now a repeat can't be compared
        send(publisher, 1, 1)

    with pytest.raises(TapeError, match="can't be compared"):
        tell(tmp_path / "tape.db", story, stops=False)


def test_retention_follows_what_the_settler_says_and_survives_nonsense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "PRUNE_EVERY_S", 0.02)
    path = tmp_path / "tape.db"

    async def story(publisher: zmq.Socket[bytes], recorder: Recorder, reader: TapeReader) -> None:
        send(publisher, 1, 50)
        await until(lambda: reader.runs(1).head == 50)
        for nonsense in ({}, {"session": 1}, {"session": None, "deletable": "9"}):
            write_settled(path, nonsense)
            await asyncio.sleep(0.05)
        assert reader.sessions()[0].pruned_to == 0
        write_settled(path, {"session": 1, "deletable": 30})
        await until(lambda: reader.sessions()[0].pruned_to == 30)
        assert [n for n, _, _ in reader.frames(1, 1, 99, 99)] == list(range(31, 51))

    tell(path, story, retention_s=0.0)


def test_the_death_of_the_pruning_ends_an_idle_recorder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "PRUNE_EVERY_S", 0.02)
    path = tmp_path / "tape.db"

    async def story(publisher: zmq.Socket[bytes], recorder: Recorder, reader: TapeReader) -> None:
        send(publisher, 1, 5)
        await until(lambda: reader.runs(1).head == 5)
        recorder.tape._db.execute("DROP TABLE frames")
        write_settled(path, {"session": 1, "deletable": 3})

    with pytest.raises(Exception, match="no such table: frames"):
        tell(path, story, stops=False, retention_s=0.0)


def test_frames_that_repeat_while_they_wait_and_after_they_are_committed_are_counted(tmp_path: Path) -> None:
    async def story(publisher: zmq.Socket[bytes], recorder: Recorder, reader: TapeReader) -> None:
        for _ in range(3):
            send(publisher, 1, 300)
        send(publisher, 301, 301)
        await until(lambda: reader.runs(1).list() == [(1, 301)])
        assert recorder.tape.duplicates_total == 600

    tell(tmp_path / "tape.db", story)


def test_a_longer_topic_with_the_same_beginning_is_not_ours(tmp_path: Path) -> None:
    """SUB matches by prefix: `settlement` hears `settlement_test`, too."""

    async def story() -> None:
        tape = Tape(tmp_path / "tape.db", size_bytes_max=10**9)
        recorder = Recorder(
            tape=tape, endpoint="tcp://127.0.0.1:1", topic="settlement", turn_frames_max=10, receive_hwm_frames=10,
            receive_buffer_bytes=65_536, frame_bytes_max=65_536, retention_s=60,
        )  # fmt: skip
        recorder._take_turn([[b"settlement_test", b"\x80"], [b"settlement", b"\x80"]])
        assert recorder.other_topics_total == 1
        assert tape.malformed_total == 1
        recorder._feed.close()
        tape.close()

    asyncio.run(story())


def test_an_engine_that_falls_silent_is_reported_once_and_so_is_its_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(record_module, "WATCH_EVERY_S", 0.02)
    path = tmp_path / "tape.db"

    def lines(event: str) -> int:
        return sum(line.getMessage() == event for line in caplog.records)

    async def story(publisher: zmq.Socket[bytes], recorder: Recorder, reader: TapeReader) -> None:
        await until(lambda: bool(recorder.silent_since_us))  # also when it never said a word
        for spell in (1, 2):
            publisher.send_multipart([b"settlement_other", b"\x80"])  # somebody else's word
            await asyncio.sleep(0.1)
            assert recorder.silent_since_us
            assert (lines("engine_silent"), lines("engine_heard")) == (spell, spell - 1)
            publisher.send_multipart([b"settlement", pack({"next_sequence": 1})])  # a heartbeat is enough
            await until(lambda: not recorder.silent_since_us)
            await until(lambda: bool(recorder.silent_since_us))
            said = read_recorded(path)
            assert said is not None
            assert said["tape_id"] == recorder.tape.tape_id
            assert said["heard_at_us"] == recorder.heard_at_us
            assert lines("engine_heard") == spell

    with caplog.at_level("INFO"):
        tell(path, story, silence_s=0.2)


def test_an_engine_is_never_called_silent_when_nobody_minds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "WATCH_EVERY_S", 0.01)

    async def story(publisher: zmq.Socket[bytes], recorder: Recorder, reader: TapeReader) -> None:
        await asyncio.sleep(0.2)
        assert recorder.silent_since_us == 0

    tell(tmp_path / "tape.db", story, silence_s=0.0)


def test_a_refill_without_end_does_not_keep_a_recorder_that_is_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_module, "ROOM_WAIT_S", 0)  # always something pending

    class Endless:
        put_total = 0

        async def run(self, put: Callable[[int | None, list[Event]], Coroutine[Any, Any, int]]) -> None:
            await put(None, [event(trade_fields(1))])
            for first in range(2, 1 << 40, 100):
                self.put_total += await put(1, [event(trade_fields(n)) for n in range(first, first + 100)])

        def said(self) -> dict[str, Any]:
            return {}

    endless = Endless()

    async def story(publisher: zmq.Socket[bytes], recorder: Recorder, reader: TapeReader) -> None:
        await until(lambda: reader.runs(1).head > 1_000)

    tape = tell(tmp_path / "tape.db", story, refill=endless)
    with contextlib.closing(TapeReader(tmp_path / "tape.db")) as reader:
        assert reader.runs(1).list() == [(1, 1 + endless.put_total)]  # what was taken is on disk
    assert tape.recorded_total == 1 + endless.put_total
