"""As much of the CQL binary protocol (v4) as it takes to know that a node answers: STARTUP, log in, one QUERY.

The standard library is enough for it, so that `start` works before any virtual environment exists.
"""

import socket
import ssl
import struct
from types import TracebackType
from typing import Self

_HEADER = struct.Struct(">BBhBI")  # version, flags, stream, opcode, length of the body
_REQUEST, _LENGTH_MAX = 0x04, 64 << 20
_ERROR, _STARTUP, _READY, _AUTHENTICATE, _QUERY, _AUTH_RESPONSE = 0x00, 0x01, 0x02, 0x03, 0x07, 0x0F

CONSISTENCY_ONE, CONSISTENCY_ALL = 0x0001, 0x0005


class RefusedError(Exception):
    """The server answered with an ERROR frame; `code` is its number (0x1000: unavailable)."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{message} (code 0x{code:04x})")
        self.code = code


class Connection:
    """One connection that has been through STARTUP; `logged_in` is false when the default superuser was refused."""

    def __init__(self, host: str, port: int, *, timeout_s: float, tls: bool = False) -> None:
        self._socket = socket.create_connection((host, port), timeout=timeout_s)
        try:
            if tls:
                self._socket = _any_certificate().wrap_socket(self._socket)
            self.logged_in = self._start_up()
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def query(self, statement: str, consistency: int = CONSISTENCY_ONE) -> None:
        """Run a statement and drop its result. Raises RefusedError, OSError."""
        text = statement.encode()
        opcode, body = self._ask(_QUERY, struct.pack(">I", len(text)) + text + struct.pack(">HB", consistency, 0))
        if opcode == _ERROR:
            raise _refusal(body)

    def _start_up(self) -> bool:
        opcode, body = self._ask(_STARTUP, struct.pack(">H", 1) + _string("CQL_VERSION") + _string("3.0.0"))
        if opcode == _AUTHENTICATE:
            token = b"\0cassandra\0cassandra"
            return self._ask(_AUTH_RESPONSE, struct.pack(">I", len(token)) + token)[0] != _ERROR
        if opcode == _ERROR:
            raise _refusal(body)
        if opcode != _READY:
            raise RefusedError(opcode, "STARTUP was answered with an unexpected opcode")
        return True

    def _ask(self, opcode: int, body: bytes) -> tuple[int, bytes]:
        self._socket.sendall(_HEADER.pack(_REQUEST, 0, 0, opcode, len(body)) + body)
        _, _, _, answer, length = _HEADER.unpack(self._receive(_HEADER.size))
        if length > _LENGTH_MAX:
            raise RefusedError(answer, f"a frame of {length} bytes: this is not CQL")
        return answer, self._receive(length)

    def _receive(self, length: int) -> bytes:
        received = b""
        while len(received) < length:
            part = self._socket.recv(length - len(received))
            if not part:
                raise ConnectionResetError("the node closed the connection")
            received += part
        return received


def _string(text: str) -> bytes:
    return struct.pack(">H", len(text)) + text.encode()


def _refusal(body: bytes) -> RefusedError:
    code, length = struct.unpack_from(">IH", body)
    return RefusedError(code, body[6 : 6 + length].decode(errors="replace"))


def _any_certificate() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = (
        ssl.CERT_NONE
    )  # it is our own node on loopback; whether its certificate is good is the test's matter
    return context
