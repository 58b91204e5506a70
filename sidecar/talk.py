"""The sockets of the replay talk: a DEALER that asks, a ROUTER that answers. What is said on them is not theirs.

Both are bounded in what they hold: a few messages, each of a size that libzmq itself enforces by hanging up. A DEALER
that was hung up on, or heard nothing, is thrown away: the next question goes out on a new one, so that no old answer
can come after it.

A ROUTER with keys may be told which clients' keys it lets in. libzmq asks for that on a socket of the ROUTER's own
context (ZAP, https://rfc.zeromq.org/spec/27) at each handshake; as long as nobody answers there, nobody gets in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, Final

import zmq
import zmq.asyncio
from zmq.utils import z85

from sidecar.errors import SidecarError

log = logging.getLogger(__name__)

MESSAGES_MAX: Final = 16  # that wait in a socket, each way and for each peer
REFUSED_TOLD_MAX: Final = (
    100  # keys that were not let in and are named in the log; whoever brings more has made them up
)
_NEXT_STEP: Final = "a sidecar of yours? name its public key's file in replay_server.curve_client_key_files"


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


class Door:
    """Lets in the holders of some keys (CURVE has proved by then that they hold them), nobody else."""

    def __init__(self, context: zmq.asyncio.Context, clients: frozenset[bytes]) -> None:
        """Take the public keys, as Z85 texts; only then may the socket that it is for be bound."""
        self._clients = clients
        self._told: set[bytes] = set()  # whose refusal was logged: each of them tries again and again
        self._socket: zmq.Socket[bytes] = zmq.Context.shadow(context.underlying).socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind("inproc://zeromq.zap.01")
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._answer)

    def _answer(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                version, number, _, address, _, mechanism, *proved = self._socket.recv_multipart(zmq.NOBLOCK)
                key = z85.encode(proved[0]) if mechanism == b"CURVE" else b""
                answer = (b"200", b"") if key in self._clients else (b"400", b"not one of our clients")
                self._socket.send_multipart([version, number, *answer, b"", b""])
                if key not in self._clients and key not in self._told and len(self._told) < REFUSED_TOLD_MAX:
                    self._told.add(key)
                    said = {"address": address.decode(errors="replace"), "public_key": key.decode()}
                    log.warning("replay_client_refused", extra=said | {"next_step": _NEXT_STEP})

    def close(self) -> None:
        """Answer nobody more; the socket that it is for must be closed by then."""
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()


class Router:
    """The side that answers."""

    def __init__(
        self,
        endpoint: str,
        message_bytes_max: int,
        secure: Callable[[Any], None] = lambda _: None,
        clients: frozenset[bytes] = frozenset(),
    ) -> None:
        """Bind, with the keys that `secure` gives. Raises SidecarError when that can't be.

        `clients` are the public keys that are let in; none: whoever knows ours.
        """
        self._context = zmq.asyncio.Context(1)
        self._door = Door(self._context, clients) if clients else None
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
        if self._door is not None:
            self._door.close()
        self._context.term()
