"""A TCP proxy in front of a database: goes silent, delays, cuts, refuses, swallows answers, and comes back.

with Proxy(node.port) as proxy:
    world.settings.append(f"store.cassandra.port={proxy.port}")
    proxy.silence()           # connections stay, nothing passes
    proxy.swallow()           # requests pass, their answers don't
    proxy.refuse()            # connections are cut, new ones refused
    proxy.resume()
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, Self

_HEAD_BYTES: Final = 9  # of a message of the native protocol, v4: version, flags, stream, opcode, length of the body
_READ_BYTES: Final = 65_536


def every_answer(_head: bytes) -> bool:
    """Which answers are swallowed: all."""
    return True


class Proxy:
    """Passes connections to 127.0.0.1:`target`; answers are passed message by message, so that one can be left out."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.swallowed = 0
        self.connections = 0
        self._swallows: Callable[[bytes], bool] | None = None
        self._delay_s = 0.0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._begin())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._refuse())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- what a test wants ---

    def silence(self) -> None:
        """Pass nothing, either way; connections stay, and new ones are taken."""
        self._call(self._set(passing=False))

    def delay(self, seconds: float) -> None:
        """Pass each answer so much later."""
        self._delay_s = seconds

    def swallow(self, which: Callable[[bytes], bool] = every_answer) -> None:
        """Pass requests, and of the answers those that `which` says False of, by their first nine bytes."""
        self._swallows = which

    def cut(self) -> None:
        """Break all connections; new ones are taken."""
        self._call(self._cut())

    def refuse(self) -> None:
        """Break all connections, and refuse new ones."""
        self._call(self._refuse())

    def resume(self) -> None:
        """Pass everything, as at the beginning."""
        self._swallows, self._delay_s = None, 0.0
        self._call(self._set(passing=True))
        self._call(self._begin())

    # --- in the proxy's thread ---

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _begin(self) -> None:
        if self._server is None:
            if not self.port:
                self._passing = asyncio.Event()
                self._passing.set()
            self._server = await asyncio.start_server(self._take, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _set(self, *, passing: bool) -> None:
        (self._passing.set if passing else self._passing.clear)()

    async def _cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._cut()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            from_node, to_node = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, to_node}
        self._writers |= both
        try:
            await asyncio.gather(self._pass_requests(reader, to_node), self._pass_answers(from_node, writer))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers -= both
            for each in both:
                each.transport.abort()

    async def _pass_requests(self, reader: asyncio.StreamReader, to_node: asyncio.StreamWriter) -> None:
        while piece := await reader.read(_READ_BYTES):
            await self._passing.wait()
            to_node.write(piece)
            await to_node.drain()
        raise ConnectionAbortedError  # one side has closed: so does the other

    async def _pass_answers(self, from_node: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await from_node.readexactly(_HEAD_BYTES)
            body = await from_node.readexactly(int.from_bytes(head[5:9], "big"))
            await self._passing.wait()
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            if self._swallows is not None and self._swallows(head):
                self.swallowed += 1
                continue
            writer.write(head + body)
            await writer.drain()
