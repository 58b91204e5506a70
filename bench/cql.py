"""A minimal client of the CQL native protocol (v4), for the bench alone: as little work for a request as there can be.

One blocking socket, one thread, no futures and no policies. Requests are whole frames, encoded before the clock starts;
`stream_through` keeps a window of them under way and does nothing but count the answers. An answer that is an error
ends the run: a ceiling with failed batches is none.
"""

from __future__ import annotations

import socket
import struct
import time
from array import array
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from bench.report import BenchError

_HEADER = struct.Struct(">BBhBI")  # version, flags, stream, opcode, length of the body
_REQUEST = 0x04
_ERROR, _STARTUP, _READY, _QUERY, _RESULT, _PREPARE, _EXECUTE, _BATCH = 0x00, 0x01, 0x02, 0x07, 0x08, 0x09, 0x0A, 0x0D
_SKIP_METADATA, _DEFAULT_TIMESTAMP = 0x02, 0x20
_ROWS, _PREPARED = 2, 4
LOCAL_QUORUM = 0x0006
STREAM_IDS = 32_768  # far more than any window: an id is free again long before its turn comes


class Connection:
    """One connection that has been through STARTUP."""

    def __init__(self, host: str, port: int, timeout_s: float = 60.0) -> None:
        self._socket = socket.create_connection((host, port), timeout=timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            opcode, _ = self._ask(_STARTUP, struct.pack(">H", 1) + _string("CQL_VERSION") + _string("3.0.0"))
            if opcode != _READY:
                raise BenchError(f"STARTUP was answered with opcode {opcode}: the bench knows no passwords")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def query(self, statement: str) -> list[bytes | None]:
        """Run a statement; give the cells of its rows, one after the other."""
        text = statement.encode()
        body = struct.pack(">I", len(text)) + text + struct.pack(">HB", LOCAL_QUORUM, _SKIP_METADATA)
        _, answer = self._ask(_QUERY, body)
        if answer[:4] != struct.pack(">I", _ROWS):
            return []
        _, _flags, columns = struct.unpack_from(">III", answer)
        at, cells = 12, []
        (rows,) = struct.unpack_from(">I", answer, at)
        at += 4
        for _ in range(rows * columns):
            (length,) = struct.unpack_from(">i", answer, at)
            at += 4
            cells.append(None if length < 0 else answer[at : at + length])
            at += max(length, 0)
        return cells

    def prepare(self, statement: str) -> bytes:
        """Prepare a statement; give its id."""
        text = statement.encode()
        _, answer = self._ask(_PREPARE, struct.pack(">I", len(text)) + text)
        kind, length = struct.unpack_from(">IH", answer)
        assert kind == _PREPARED
        return answer[6 : 6 + length]

    def execute(self, statement: bytes) -> None:
        """Run a prepared statement without values, and wait for its answer."""
        identity = struct.pack(">H", len(statement)) + statement
        self._ask(_EXECUTE, identity + struct.pack(">HB", LOCAL_QUORUM, _SKIP_METADATA))

    def stream_through(self, frames: Sequence[bytes], window: int) -> array[int]:
        """Send all frames, `window` of them under way at most; give the time of each answer in ns, in their order."""
        answered_ns = array("q")
        connection, header, clock = self._socket, _HEADER, time.perf_counter_ns
        size = header.size
        received = bytearray()
        sent = min(window, len(frames))
        connection.sendall(b"".join(frames[:sent]))
        while len(answered_ns) < len(frames):
            part = connection.recv(65_536)
            if not part:
                raise BenchError("the node closed the connection")
            now_ns = clock()
            received += part
            at = answers = 0
            while len(received) - at >= size:
                _, _, _, opcode, length = header.unpack_from(received, at)
                if len(received) - at < size + length:
                    break
                if opcode == _ERROR:
                    raise _refusal(bytes(received[at + size : at + size + length]))
                at += size + length
                answers += 1
            del received[:at]
            if answers:
                answered_ns.extend([now_ns] * answers)
                if sent < len(frames):
                    connection.sendall(b"".join(frames[sent : sent + answers]))
                    sent = min(sent + answers, len(frames))
        return answered_ns

    def _ask(self, opcode: int, body: bytes) -> tuple[int, bytes]:
        self._socket.sendall(_HEADER.pack(_REQUEST, 0, 0, opcode, len(body)) + body)
        _, _, _, answer, length = _HEADER.unpack(self._receive(_HEADER.size))
        received = self._receive(length)
        if answer == _ERROR:
            raise _refusal(received)
        return answer, received

    def _receive(self, length: int) -> bytes:
        received = b""
        while len(received) < length:
            part = self._socket.recv(length - len(received))
            if not part:
                raise BenchError("the node closed the connection")
            received += part
        return received


def batch_frame(number: int, statements: Sequence[bytes], stamp_us: int) -> bytes:
    """Give the frame of a LOGGED batch at LOCAL_QUORUM with its own write time; statements as `bound` made them."""
    body = b"".join(
        (
            struct.pack(">BH", 0, len(statements)),
            *statements,
            struct.pack(">HBq", LOCAL_QUORUM, _DEFAULT_TIMESTAMP, stamp_us),
        )
    )
    return _HEADER.pack(_REQUEST, 0, number % STREAM_IDS, _BATCH, len(body)) + body


def bound(statement: bytes, values: int) -> bytes:
    """Give what stands before the values of a prepared statement in a batch."""
    return struct.pack(">BH", 1, len(statement)) + statement + struct.pack(">H", values)


def _string(text: str) -> bytes:
    return struct.pack(">H", len(text)) + text.encode()


def _refusal(body: bytes) -> BenchError:
    code, length = struct.unpack_from(">IH", body)
    return BenchError(f"{body[6 : 6 + length].decode(errors='replace')} (code 0x{code:04x})")
