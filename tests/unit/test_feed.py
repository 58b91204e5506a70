"""The feed on real sockets: bounded turns that never stall, publishers that come and go."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop
import zmq

from bench.watch import look
from sidecar.feed import Feed
from tests.waiting import until

Turns = list[list[list[bytes]]]


class Publisher:
    """An XPUB socket on this host; it knows when its subscriber is there."""

    def __init__(self, endpoint: str = "tcp://127.0.0.1:*") -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.XPUB)
        self.socket.setsockopt(zmq.SNDHWM, 1_000_000)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(endpoint)
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    async def subscribed(self) -> bytes:
        await until(lambda: self.socket.poll(0))
        return self.socket.recv()

    def send(self, *payloads: bytes, topic: bytes = b"settlement") -> None:
        for payload in payloads:
            self.socket.send_multipart([topic, payload])

    def close(self) -> None:
        self.socket.close()
        self._context.term()


@asynccontextmanager
async def feeding(endpoint: str, on_turn: Callable[[list[list[bytes]]], None], **other: Any) -> AsyncIterator[Feed]:
    bounds: dict[str, Any] = {
        "topic": "settlement",
        "turn_frames_max": 100,
        "receive_hwm_frames": 500_000,
        "receive_buffer_bytes": 1 << 20,
        "may_take": lambda: 1_000_000,
    }
    feed = Feed(endpoint=endpoint, on_turn=on_turn, **(bounds | other))
    feed.start()
    try:
        yield feed
    finally:
        feed.close()


def payloads(turns: Turns) -> list[bytes]:
    return [frames[1] for turn in turns for frames in turn]


def resident_kib() -> int:
    sample = look(os.getpid())
    assert sample is not None
    return sample.rss_bytes // 1024


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("turn_frames_max", [1, 100, 10_000, 20_000])
def test_a_bounded_turn_does_not_stall_though_the_descriptor_speaks_once(run: Any, turn_frames_max: int) -> None:
    async def story() -> None:
        publisher, turns = Publisher(), Turns()
        async with feeding(publisher.endpoint, turns.append, turn_frames_max=turn_frames_max) as feed:
            assert await publisher.subscribed() == b"\1settlement"
            sent = [b"%d" % n for n in range(10_000)]
            publisher.send(*sent)
            await until(lambda: feed.frames_total == 10_000)
            assert payloads(turns) == sent
            assert max(map(len, turns)) <= turn_frames_max
            publisher.send(b"one more")  # and it still listens
            await until(lambda: feed.frames_total == 10_001)
        publisher.close()

    run(story())


def test_others_on_the_loop_get_their_turn_while_it_drains() -> None:
    async def story() -> None:
        publisher, turns, others = Publisher(), Turns(), 0
        async with feeding(publisher.endpoint, turns.append, turn_frames_max=10) as feed:
            await publisher.subscribed()
            publisher.send(*[b"x"] * 5_000)
            while feed.frames_total < 5_000:
                await asyncio.sleep(0)
                others += 1
        assert others > 100
        publisher.close()

    asyncio.run(story())


def test_without_room_the_socket_is_left_alone_and_nothing_is_lost_until_there_is_room_again() -> None:
    async def story() -> None:
        publisher, turns, room = Publisher(), Turns(), 250
        async with feeding(
            publisher.endpoint, turns.append, may_take=lambda: max(room - len(payloads(turns)), 0)
        ) as feed:
            await publisher.subscribed()
            sent = [b"%d" % n for n in range(1_000)]
            publisher.send(*sent)
            await until(lambda: feed.frames_total == 250)
            await asyncio.sleep(0.1)
            assert feed.frames_total == 250
            room = 600
            feed.resume()
            await until(lambda: feed.frames_total == 600)
            room = 10_000
            feed.resume()
            feed.resume()  # twice is no harm
            await until(lambda: feed.frames_total == 1_000)
            assert payloads(turns) == sent
        publisher.close()

    asyncio.run(story())


def test_what_a_long_queue_took_is_given_back_once_it_is_empty() -> None:
    async def story() -> None:
        publisher, room, taken = Publisher(), 0, 0

        def take(turn: list[list[bytes]]) -> None:
            nonlocal taken
            taken += len(turn)

        async with feeding(publisher.endpoint, take, may_take=lambda: room) as feed:
            await publisher.subscribed()
            before_kib = resident_kib()
            for _ in range(60_000):
                publisher.send(bytes(1_000))
            await until(lambda: resident_kib() > before_kib + 50_000)
            room = 1_000
            feed.resume()
            await until(lambda: taken == 60_000)
            await until(lambda: resident_kib() < before_kib + 10_000)
        publisher.close()

    asyncio.run(story())


def test_the_engine_may_start_later_and_come_back() -> None:
    async def story() -> None:
        publisher, turns = Publisher(), Turns()
        endpoint = publisher.endpoint
        publisher.close()
        async with feeding(endpoint, turns.append):
            for life in range(3):
                await asyncio.sleep(0.15)
                publisher = Publisher(endpoint)
                await publisher.subscribed()
                publisher.send(b"%d" % life)
                await until(lambda life=life: len(payloads(turns)) == life + 1)  # type: ignore[misc]
                publisher.close()
        assert payloads(turns) == [b"0", b"1", b"2"]

    asyncio.run(story())


def test_other_topics_do_not_come_and_whole_messages_do_whatever_their_parts() -> None:
    async def story() -> None:
        publisher, turns = Publisher(), Turns()
        async with feeding(publisher.endpoint, turns.append):
            await publisher.subscribed()
            publisher.send(b"no", topic=b"market")
            publisher.socket.send_multipart([b"settlement"])
            publisher.socket.send_multipart([b"settlement", b"a", b"b"])
            publisher.send(b"", b"yes")
            await until(lambda: sum(map(len, turns)) == 4)
        assert [frames for turn in turns for frames in turn] == [
            [b"settlement"],
            [b"settlement", b"a", b"b"],
            [b"settlement", b""],
            [b"settlement", b"yes"],
        ]
        publisher.close()

    asyncio.run(story())


def test_a_huge_frame_neither_hangs_up_nor_hides_what_comes_after_it() -> None:
    async def story() -> None:
        publisher, turns = Publisher(), Turns()
        async with feeding(publisher.endpoint, turns.append):
            await publisher.subscribed()
            publisher.send(b"before", b"x" * 5_000_000, b"after")
            await until(lambda: b"after" in payloads(turns))
        assert list(map(len, payloads(turns))) == [6, 5_000_000, 5]
        publisher.close()

    asyncio.run(story())


def test_closing_right_after_starting_leaves_nothing_behind() -> None:
    async def story() -> None:
        for _ in range(20):
            async with feeding("tcp://127.0.0.1:9", lambda _: None) as feed:
                feed.resume()
        await asyncio.sleep(0)

    asyncio.run(story())
