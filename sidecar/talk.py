"""The sockets of the replay talk: a DEALER that asks, a ROUTER that answers. What is said on them is not theirs.

Both are bounded in what they hold: a few messages, each of a size that libzmq itself enforces by hanging up. A DEALER
that was hung up on, or heard nothing, is thrown away: the next question goes out on a new one, so that no old answer
can come after it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Final

import zmq
import zmq.asyncio

from sidecar.errors import SidecarError

MESSAGES_MAX: Final = 16  # that wait in a socket, each way and for each peer


class Dealer:
    """The side that asks; a socket is made when there is something to ask."""

    def __init__(self, endpoint: str, message_bytes_max: int, secure: Callable[[Any], None] = lambda _: None) -> None:
        """Take where the server is, what a sound message has at most (one far larger is not received), the keys."""
        self._secure = secure
        self._endpoint = endpoint
        self._message_bytes_max = message_bytes_max
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None

    async def send(self, message: bytes) -> None:
        """Ask; what can't be delivered now waits for the server. Raises ConnectionError when that can't be."""
        try:
            await self._connected().send(message)
        except zmq.ZMQError as error:
            raise ConnectionError(f"{self._endpoint}: {error.strerror}") from error

    def _connected(self) -> zmq.asyncio.Socket:
        if self._context is None:
            self._context = zmq.asyncio.Context(1)
        if self._socket is None:
            self._socket = self._context.socket(zmq.DEALER)
            options = {
                zmq.LINGER: 0,
                zmq.RCVHWM: MESSAGES_MAX,
                zmq.SNDHWM: MESSAGES_MAX,
                zmq.MAXMSGSIZE: 2 * self._message_bytes_max,  # up to that a larger one is named in the log
                zmq.RECONNECT_IVL: 100,
                zmq.RECONNECT_IVL_MAX: 1_000,
            }
            for option, value in options.items():
                self._socket.setsockopt(option, value)
            self._secure(self._socket)
            self._socket.connect(self._endpoint)
        return self._socket

    async def receive(self, deadline: float) -> bytes | None:
        """Give the next message; None when there was none up to `deadline` (the loop's time)."""
        assert self._socket is not None, "ask first"
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.sleep(0)  # a flood of them must not keep the loop
                return b"".join(await self._socket.recv_multipart())
        except TimeoutError:
            return None

    def renew(self) -> None:
        """Throw the socket away, and with it whatever may still come on it."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        """Let everything go."""
        self.renew()
        if self._context is not None:
            self._context.term()
            self._context = None


class Router:
    """The side that answers."""

    def __init__(self, endpoint: str, message_bytes_max: int, secure: Callable[[Any], None] = lambda _: None) -> None:
        """Bind, with the keys that `secure` gives. Raises SidecarError when that can't be."""
        self._context = zmq.asyncio.Context(1)
        self._socket = self._context.socket(zmq.ROUTER)
        options = {
            zmq.LINGER: 0,
            zmq.RCVHWM: MESSAGES_MAX,
            zmq.SNDHWM: MESSAGES_MAX,
            zmq.MAXMSGSIZE: message_bytes_max,
        }
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        secure(self._socket)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise SidecarError(f"replay_server.endpoint = {endpoint!r} can't be bound: {error.strerror}") from error

    async def receive(self) -> tuple[list[bytes], bytes]:
        """Give the next message and whom to answer."""
        *peer, message = await self._socket.recv_multipart()
        return peer, message

    async def send(self, peer: list[bytes], message: bytes) -> None:
        """Answer; whoever does not take his answers loses them."""
        with contextlib.suppress(zmq.ZMQError):
            await self._socket.send_multipart([*peer, message])

    def close(self) -> None:
        """Let everything go."""
        self._socket.close()
        self._context.term()
