"""The driver's connection on the application's own event loop, and the shortest way to send a message over it.

cassandra-driver brings a reactor of its own, in a thread that fights the loop for the interpreter's lock with every
answer. Here the loop watches the socket: an answer is decoded, and its future set, where it is waited for. Connecting
and closing stay blocking calls on the driver's threads, as the driver means them.

`ask` does for one message what the driver's ResponseFuture does (borrow a stream of a host's pool, send, give it back,
orphan it when time is up, prepare anew what the node has forgotten) without the locks, events and timers that a caller
on another thread would need: 5 of 37 us CPU a trade, at 16 trades a batch; 80 of 260 us a look-up.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final

import cassandra
from cassandra import protocol
from cassandra.cluster import NoHostAvailable
from cassandra.connection import Connection, ConnectionBusy, ConnectionException, ConnectionShutdown
from cassandra.pool import NoConnectionsAvailable

_PIECE_BYTES: Final = 65_536
_LATER: Final = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def connection_class(on_close: Callable[[], None]) -> Any:
    """Make the class of connections on the loop that is running in this thread; `on_close` hears of every end."""
    attributes = {
        "loop": asyncio.get_running_loop(),
        "loop_thread": threading.get_ident(),
        "on_close": staticmethod(on_close),
    }
    return type("LoopConnectionHere", (LoopConnection,), attributes)


class NodeNotTrustedError(ConnectionException):  # type: ignore[misc]  # the driver is untyped
    """A node's certificate is not signed by the authority that we trust, or names another node."""


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
        self._turn: list[bytes] = []
        self._unsent = bytearray()
        self._connect_socket()
        self._socket.setblocking(False)
        self.loop.call_soon_threadsafe(self._watch)
        self._send_options_message()

    def _initiate_connection(self, sockaddr: Any) -> None:
        try:
            super()._initiate_connection(sockaddr)
        except ssl.SSLCertVerificationError as error:
            self._socket.close()
            raise NodeNotTrustedError(str(error), self.endpoint) from error  # as an OSError it would lose its type

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
        if not self._turn:  # one call of the kernel for all that a turn of the loop has to say
            self.loop.call_soon(self._send_turn)
        self._turn.append(data)

    def _send_turn(self) -> None:
        data = self._turn[0] if len(self._turn) == 1 else b"".join(self._turn)
        self._turn.clear()
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
            self._unsent += memoryview(data)[sent:]
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


async def ask(
    session: Any, message: Any, handler: Any, timeout_s: float, *, query: Any = None, host: Any = None
) -> Any:
    """Send a message to `host`, or to the next host of the plan for `query` that takes it; give its answer.

    What the host has forgotten of the prepared statements (it, or a table, was made anew) is prepared there once more.
    Raises NoHostAvailable when no host takes the message, OperationTimedOut when it isn't answered in time,
    ConnectionException when the connection is lost meanwhile, protocol.ErrorMessage as the node's own answer. To be
    called on the loop.
    """
    plan = session.cluster.profile_manager.default.load_balancing_policy.make_query_plan(None, query)
    host, answer = _send(session, message, handler, timeout_s, plan if host is None else (host,))
    try:
        return await answer
    except protocol.PreparedQueryNotFound as error:
        forgotten = error
    prepared = set()
    while forgotten.info not in prepared:  # a batch has several statements, and each answer names one
        prepared.add(forgotten.info)
        statement = session.cluster._prepared_statements.get(forgotten.info)  # noqa: SLF001 - as ResponseFuture finds it
        if statement is None:
            break
        _, answer = _send(session, protocol.PrepareMessage(statement.query_string), handler, timeout_s, (host,))
        await answer
        _, answer = _send(session, message, handler, timeout_s, (host,))
        try:
            return await answer
        except protocol.PreparedQueryNotFound as error:
            forgotten = error
    raise forgotten


def _send(
    session: Any, message: Any, handler: Any, timeout_s: float, hosts: Iterable[Any]
) -> tuple[Any, asyncio.Future[Any]]:
    """Send a message to the first of the hosts that takes it; give that host, and what its answer will be."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Any] = loop.create_future()
    errors: dict[Any, Exception] = {}
    for host in hosts:
        pool = session._pools.get(host)  # noqa: SLF001 - as ResponseFuture looks it up
        if pool is None or pool.is_shutdown:
            errors[host] = ConnectionException("has no open pool", host)
            continue
        try:
            connection, stream = pool.borrow_connection(timeout=0)  # waiting for a stream would hold up the loop
        except (NoConnectionsAvailable, ConnectionException) as error:
            errors[host] = error
            continue
        shot = _Shot(loop, answer, pool, connection, stream, timeout_s)
        try:
            connection.send_msg(
                message, stream, cb=shot.answered, encoder=handler.encode_message, decoder=handler.decode_message
            )
        except (ConnectionException, ConnectionBusy) as error:
            shot.unsent()
            errors[host] = error
            continue
        return host, answer
    raise NoHostAvailable("no host takes a request", errors)


def give_up(connection: Any) -> None:
    """End the requests of `ask` that are under way on a connection, as if their time were over."""
    for callback, *_ in tuple(connection._requests.values()):  # noqa: SLF001 - where send_msg keeps them
        shot = getattr(callback, "__self__", None)
        if isinstance(shot, _Shot):
            shot.give_up()


class _Shot:
    """One request under way, on a stream of a connection."""

    __slots__ = ("_answer", "_connection", "_loop", "_over", "_pool", "_stream", "_thread")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        answer: asyncio.Future[Any],
        pool: Any,
        connection: Any,
        stream: int,
        timeout_s: float,
    ) -> None:
        self._loop = loop
        self._thread = threading.get_ident()
        self._answer = answer
        self._pool = pool
        self._connection = connection
        self._stream = stream
        self._over = loop.call_later(timeout_s, self._time_is_up)

    def answered(self, response: Any) -> None:
        """Take the answer, or the error that ended the connection: on the loop, or on a thread that closed it."""
        if not self._pool.is_shutdown:
            self._pool.return_connection(self._connection)
        if threading.get_ident() == self._thread:
            self._tell(response)
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._tell, response)

    def give_up(self) -> None:
        """Wait no longer."""
        self._over.cancel()  # the stream may be another request's by then
        self._time_is_up()

    def unsent(self) -> None:
        """Give the stream back: nothing was sent on it."""
        self._over.cancel()
        self._connection._requests.pop(self._stream, None)  # noqa: SLF001 - as ResponseFuture does
        self._pool.return_connection(self._connection)

    def _tell(self, response: Any) -> None:
        self._over.cancel()
        if self._answer.done():  # the life that asked has ended
            return
        if isinstance(response, Exception):
            self._answer.set_exception(response)
        else:
            self._answer.set_result(response)

    def _time_is_up(self) -> None:
        # The stream stays taken until its late answer comes: another request must not get that.
        connection = self._connection
        if connection._requests.pop(self._stream, None) is not None and not self._pool.is_shutdown:  # noqa: SLF001
            with connection.lock:
                connection.orphaned_request_ids.add(self._stream)
                if len(connection.orphaned_request_ids) >= connection.orphaned_threshold:
                    connection.orphaned_threshold_reached = True
            self._pool.return_connection(connection, stream_was_orphaned=True)
        if not self._answer.done():
            self._answer.set_exception(cassandra.OperationTimedOut({}, connection.endpoint))
