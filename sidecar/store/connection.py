"""The driver's connection on the application's own event loop: no second thread reads answers.

cassandra-driver brings a reactor of its own, in a thread that fights the loop for the interpreter's lock with every
answer. Here the loop watches the socket: an answer is decoded, and its future set, where it is waited for. Connecting
and closing stay blocking calls on the driver's threads, as the driver means them.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable
from typing import Any, Final

from cassandra.connection import Connection, ConnectionShutdown

_PIECE_BYTES: Final = 65_536
_LATER: Final = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def connection_class(loop: asyncio.AbstractEventLoop, on_close: Callable[[], None]) -> Any:
    """Make the class of connections on `loop`, which is running in this thread; `on_close` hears of every end."""
    attributes = {"loop": loop, "loop_thread": threading.get_ident(), "on_close": staticmethod(on_close)}
    return type("LoopConnectionHere", (LoopConnection,), attributes)


class _Timer:
    """A timer that may be set and cancelled from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout_s: float, callback: Callable[[], object]) -> None:
        self._cancelled = False
        self._callback = callback
        loop.call_soon_threadsafe(loop.call_later, timeout_s, self._over)

    def _over(self) -> None:
        if not self._cancelled:
            self._callback()

    def cancel(self) -> None:
        self._cancelled = True


class LoopConnection(Connection):  # type: ignore[misc]  # the driver is untyped
    """One connection; only the loop's thread touches its socket once it is connected."""

    loop: asyncio.AbstractEventLoop
    loop_thread: int
    on_close: Callable[[], None]
    is_closed: bool
    is_defunct: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Connect, on one of the driver's threads."""
        Connection.__init__(self, *args, **kwargs)
        self._unsent = bytearray()
        self._connect_socket()
        self._socket.setblocking(False)
        self.loop.call_soon_threadsafe(self._watch)
        self._send_options_message()

    @classmethod
    def initialize_reactor(cls) -> None:
        """There is nothing to start: the loop runs."""

    @classmethod
    def create_timer(cls, timeout: float, callback: Callable[[], object]) -> _Timer:
        """Make a timer as the driver wants it."""
        return _Timer(cls.loop, timeout, callback)

    def close(self) -> None:
        """Close, from any thread; requests under way get ConnectionShutdown."""
        with self.lock:
            if self.is_closed:
                return
            self.is_closed = True
        try:
            self.loop.call_soon_threadsafe(self._unwatch)
        except RuntimeError:  # the loop is closed: nobody watches any more
            self._socket.close()
        if not self.is_defunct:
            self.error_all_requests(ConnectionShutdown(f"Connection to {self.endpoint} was closed"))
            self.connected_event.set()  # whoever waits for it to be ready
        self.on_close()

    def push(self, data: bytes) -> None:
        """Send, from any thread; in order."""
        if threading.get_ident() == self.loop_thread:
            self._send(data)
        else:
            self.loop.call_soon_threadsafe(self._send, data)

    def _watch(self) -> None:
        if not self.is_closed:
            self.loop.add_reader(self._socket.fileno(), self._readable)

    def _unwatch(self) -> None:
        descriptor = self._socket.fileno()
        if descriptor >= 0:
            self.loop.remove_reader(descriptor)
            self.loop.remove_writer(descriptor)
        self._socket.close()

    def _send(self, data: bytes) -> None:
        if self.is_closed:
            return
        if self._unsent:
            self._unsent += data
            return
        sent = 0
        try:
            sent = self._socket.send(data)
        except _LATER:
            pass
        except OSError as error:
            self.defunct(error)
            return
        if sent < len(data):
            self._unsent += data[sent:]
            self.loop.add_writer(self._socket.fileno(), self._writable)

    def _writable(self) -> None:
        try:
            del self._unsent[: self._socket.send(self._unsent)]
        except _LATER:
            return
        except OSError as error:
            self.defunct(error)
            return
        if not self._unsent:
            self.loop.remove_writer(self._socket.fileno())

    def _readable(self) -> None:
        ended = False
        while not (self.is_closed or ended):
            try:
                piece = self._socket.recv(_PIECE_BYTES)
            except _LATER:
                break
            except OSError as error:
                self.defunct(error)
                return
            self._iobuf.write(piece)
            ended = not piece
            if len(piece) < _PIECE_BYTES and not self._is_pending():
                break
        if self._iobuf.tell():
            self.process_io_buffer()
        if ended:
            self.close()

    def _is_pending(self) -> bool:
        """Say whether TLS holds decrypted bytes that the descriptor will not speak of."""
        return isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0
