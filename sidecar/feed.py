"""The feed: a SUB socket drained on its file descriptor, in bounded turns, without a task a message.

The descriptor is edge-triggered: it speaks once when something comes, not again while something is left. So a drain
goes on until the socket is empty, and one that stops at its bound schedules itself. Nothing is lost to a slow turn:
frames wait in libzmq's queue (`receive_hwm_frames`) and in the kernel (`receive_buffer_bytes`); beyond both the
publisher drops, which the sequence numbers show.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
from collections.abc import Callable
from typing import Any, Final

import zmq
from zmq.utils.monitor import parse_monitor_message

log = logging.getLogger(__name__)

BACKLOG_FRAMES: Final = 10_000  # taken without finding the queue empty: it held some MiB, which are given back
RECONNECT_MS: Final = 100
RECONNECT_MAX_MS: Final = 2_000
_NEXT_STEP: Final = "check engine.curve_server_key_file and engine.curve_key_file against what the engine speaks"
# What the other end's first words were not, by libzmq's event.
_NOT_UNDERSTOOD: Final[dict[int, str]] = {
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "it hung up before it proved to be who it should be",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "one of the two speaks CURVE and the other does not, or it is no ZeroMQ",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "it does not let our key in",
}
# glibc's; where another C library stands, what it does with freed memory is its own affair.
_give_back: Final[Callable[[int], int]] = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)


class Feed:
    """One subscription; `on_turn` gets the frames of each turn, `may_take` says how many it has room for."""

    def __init__(
        self,
        *,
        endpoint: str,
        topic: str,
        turn_frames_max: int,
        receive_hwm_frames: int,
        receive_buffer_bytes: int,
        on_turn: Callable[[list[list[bytes]]], None],
        may_take: Callable[[], int],
        secure: Callable[[Any], None] = lambda _: None,
    ) -> None:
        """Set the socket up, with the keys that `secure` gives it; `start` connects.

        `receive_hwm_frames` bounds libzmq's queue: a minute of 5,000 frames/s is 300,000. Two options are left out on
        purpose. A heartbeat on this socket: a paused engine would be disconnected, and what it then says is lost; TCP
        keep-alive finds a dead peer. MAXMSGSIZE: one message over it and libzmq 4.3.5 hangs up for good, it does not
        connect again (measured); what is too large is judged after it has come.
        """
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
        self._socket = self._context.socket(zmq.SUB)
        options = {
            zmq.RCVHWM: receive_hwm_frames,
            zmq.RCVBUF: receive_buffer_bytes,
            zmq.RECONNECT_IVL: RECONNECT_MS,
            zmq.RECONNECT_IVL_MAX: RECONNECT_MAX_MS,
            zmq.TCP_KEEPALIVE: 1,
            zmq.TCP_KEEPALIVE_IDLE: 30,
            zmq.LINGER: 0,
        }
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        self._socket.setsockopt(zmq.SUBSCRIBE, topic.encode())
        secure(self._socket)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | sum(_NOT_UNDERSTOOD))
        self.refused: str | None = None  # why the other end is not listened to; None: it is, or nobody is there
        self._endpoint = endpoint
        self._turn_frames_max = turn_frames_max
        self._on_turn = on_turn
        self._may_take = may_take
        self._again: asyncio.Handle | None = None
        self._stands = False  # no room: frames wait in libzmq until `resume`
        self._loop: asyncio.AbstractEventLoop | None = None
        self._backlog_frames = 0  # taken since the queue was last found empty
        self.frames_total = 0

    def start(self) -> None:
        """Connect, and begin to drain; the engine may come and go at any time."""
        self._loop = asyncio.get_running_loop()
        self._socket.connect(self._endpoint)
        self._loop.add_reader(self._socket.fileno(), self._drain)
        self._loop.add_reader(self._monitor.fileno(), self._hear_monitor)
        self._loop.call_soon(self._hear_monitor)
        self._schedule()  # what came before the reader was there is not announced again

    def resume(self) -> None:
        """Drain on, if `may_take` had no room."""
        if self._stands:
            self._schedule()

    def close(self) -> None:
        """Stop draining and let the socket go."""
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_reader(self._monitor.fileno())
        if self._again is not None:
            self._again.cancel()
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._context.term()

    def _hear_monitor(self) -> None:
        """Tell once when the other end is not the one we look for; each try to connect says it again."""
        with contextlib.suppress(zmq.Again, zmq.ZMQError):
            while True:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
                reason = _NOT_UNDERSTOOD.get(event)
                if reason is not None and self.refused is None:
                    said = {"endpoint": self._endpoint, "reason": reason, "next_step": _NEXT_STEP}
                    log.error("engine_not_trusted", extra=said)
                elif reason is None and self.refused is not None:
                    log.warning("engine_trusted", extra={"endpoint": self._endpoint})
                self.refused = reason

    def _schedule(self) -> None:
        if self._again is None and self._loop is not None:
            self._again = self._loop.call_soon(self._drain_again)

    def _drain_again(self) -> None:
        self._again = None
        self._drain()

    def _drain(self) -> None:
        receive = self._socket.recv
        turn: list[list[bytes]] = []
        take = min(self._turn_frames_max, self._may_take())
        with contextlib.suppress(zmq.Again):
            for _ in range(take):
                frames = [frame := receive(zmq.NOBLOCK, copy=False)]
                while frame.more:  # a frame knows it: `recv_multipart` asks the socket, which takes as long again
                    frames.append(frame := receive(zmq.NOBLOCK, copy=False))
                turn.append([frame.bytes for frame in frames])
        self._stands = not take
        if turn:
            self.frames_total += len(turn)
            self._backlog_frames += len(turn)
            self._on_turn(turn)
        if len(turn) == take:
            if take:
                self._schedule()
            return
        # Empty. malloc keeps what a long queue took, for ever: 50 MiB after 300,000 frames, which this gives back in
        # 10 ms.
        if self._backlog_frames >= BACKLOG_FRAMES:
            _give_back(0)
        self._backlog_frames = 0
