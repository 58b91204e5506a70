"""The admin endpoint: health, metrics and the status page over HTTP, on the loop that settles.

    /healthz        200 while the loop turns
    /ready          200 while every half does its work, else 503 and why
    /metrics        for Prometheus
    /status.json    how it stands, as `sidecar status --json` says it
    /               the same and the last minutes, for people

It only reads, and it is small on purpose. One request a connection, heads of at most 8 KiB, no bodies, few connections
at once, a few seconds for each; every answer is made from the last look (watch.py). An address that others can reach is
served only with a token (configuration); without one, only to those who ask for this host by a loopback name, so that a
page in an operator's browser can't read it under a name of its own. When the address can't be had (another process has
it) that is logged and tried again: settlement does not depend on it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Final, NamedTuple

import h11
from prometheus_client.exposition import choose_encoder

from sidecar import __version__, metrics, page
from sidecar.config import host_and_port, is_loopback
from sidecar.watch import Watch

log = logging.getLogger(__name__)

HEAD_BYTES_MAX: Final = 8_192
CONNECTIONS_MAX: Final = 16
REQUEST_TIMEOUT_S: Final = 5.0
RETRY_S: Final = 5.0
TEXT: Final = "text/plain; charset=utf-8"


UNREAD_PIECES_MAX: Final = 32


class Answer(NamedTuple):
    """What is sent back."""

    status: int
    content_type: str
    body: bytes
    more: tuple[tuple[str, str], ...] = ()


BUSY: Final = Answer(503, TEXT, b"too many connections at once\n", (("Retry-After", "1"),))


class Admin:
    """Serves what `watch` saw; `token` is what askers must show, None on a loopback address."""

    def __init__(self, watch: Watch, *, listen: str, token: str | None) -> None:
        """Take where to listen, HOST:PORT."""
        self.address: tuple[str, int] | None = None
        self._watch = watch
        self._host, self._port = host_and_port(listen)
        self._token = token
        self._registry = metrics.registry(watch)
        self._connections = 0
        self._pages: dict[str, Callable[[h11.Request], Answer]] = {
            "/healthz": lambda _: Answer(200, TEXT, b"ok\n"),
            "/ready": self._ready,
            "/metrics": self._metrics,
            "/status.json": self._status,
            "/": self._page,
        }

    async def run(self) -> None:
        """Serve until cancelled; wait for the address when it is taken."""
        while True:
            try:
                server = await asyncio.start_server(self._serve, self._host, self._port, limit=HEAD_BYTES_MAX)
            except OSError as error:
                where = f"{self._host}:{self._port}"
                log.error("admin_not_served", extra={"listen": where, "error": str(error), "again_in_s": RETRY_S})  # noqa: TRY400 - the reason says it all
                await asyncio.sleep(RETRY_S)
                continue
            self.address = server.sockets[0].getsockname()[:2]
            log.info("admin_served", extra={"host": self.address[0], "port": self.address[1]})
            try:
                await asyncio.Event().wait()
            finally:
                server.close()

    # --- one connection: one request, one answer ---

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        end = writer.transport.abort
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await self._talk(reader, writer)
            end = writer.close
        except (TimeoutError, OSError, asyncio.CancelledError):
            pass  # whoever it was is slow or gone; or the process ends
        finally:
            self._connections -= 1
            end()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._connections > CONNECTIONS_MAX:
            writer.write(_written(BUSY))
            return
        try:
            request = await _request(reader)
        except h11.RemoteProtocolError as error:
            request, answer = (
                None,
                Answer(error.error_status_hint, TEXT, b"that is no request that is understood here\n"),
            )
        else:
            if request is None:
                return
            answer = self._answer(request)
        writer.write(_written(answer, head_only=request is not None and request.method == b"HEAD"))
        await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
        for _ in range(UNREAD_PIECES_MAX):  # what the peer still sends is taken: else it sees a reset, not the answer
            if not await reader.read(HEAD_BYTES_MAX):
                break

    # --- what is asked for ---

    def _answer(self, request: h11.Request) -> Answer:
        headers = {bytes(name): bytes(value) for name, value in request.headers}
        path = request.target.partition(b"?")[0].decode("latin-1")
        if not self._is_addressed_here(headers.get(b"host", b"").decode("latin-1")):
            return Answer(421, TEXT, b"ask for this host by a loopback name\n")
        if path != "/healthz" and not self._may(headers.get(b"authorization", b"")):
            ask = (("WWW-Authenticate", 'Basic realm="sidecar"'),)
            return Answer(401, TEXT, b"the token of admin.token_file is needed: Bearer, or as the password\n", ask)
        if path not in self._pages:
            return Answer(404, TEXT, f"not here; there are {' '.join(self._pages)}\n".encode())
        if request.method not in {b"GET", b"HEAD"}:
            return Answer(405, TEXT, b"only GET and HEAD\n", (("Allow", "GET, HEAD"),))
        try:
            return self._pages[path](request)
        except Exception:
            log.exception("admin_page_failed", extra={"path": path})
            return Answer(500, TEXT, b"this page could not be made; the log says why\n")

    def _is_addressed_here(self, host: str) -> bool:
        """Without a token: only by a loopback name (or address), whatever a name server says of other names."""
        if self._token is not None or not host:
            return True
        name = host if host.endswith("]") or ":" not in host else host.rpartition(":")[0]
        return is_loopback(name.removeprefix("[").removesuffix("]"))

    def _may(self, authorization: bytes) -> bool:
        if self._token is None:
            return True
        scheme, _, given = authorization.strip().partition(b" ")
        if scheme.lower() == b"basic":
            try:
                given = base64.b64decode(given.strip(), validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        return hmac.compare_digest(given.strip(), self._token.encode())

    def _ready(self, _: h11.Request) -> Answer:
        reason = self._watch.not_ready_because
        return Answer(503, TEXT, f"not ready: {reason}\n".encode()) if reason else Answer(200, TEXT, b"ready\n")

    def _metrics(self, request: h11.Request) -> Answer:
        accept = next((bytes(value) for name, value in request.headers if name == b"accept"), b"").decode("latin-1")
        encode, content_type = choose_encoder(accept)
        return Answer(200, content_type, encode(self._registry))

    def _status(self, _: h11.Request) -> Answer:
        return Answer(200, "application/json", json.dumps(self._watch.standing).encode() + b"\n")

    def _page(self, _: h11.Request) -> Answer:
        return Answer(200, "text/html; charset=utf-8", page.html(self._watch).encode())


async def _request(reader: asyncio.StreamReader) -> h11.Request | None:
    """Read one request's head; None when the peer leaves before it is whole. Raises h11.RemoteProtocolError."""
    talk = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
    left = HEAD_BYTES_MAX
    while (event := talk.next_event()) is h11.NEED_DATA:
        if not left:
            raise h11.RemoteProtocolError("the head is too long", error_status_hint=431)
        data = await reader.read(left)
        left -= len(data)
        if not data:
            return None
        talk.receive_data(data)
    return event if isinstance(event, h11.Request) else None


def _written(answer: Answer, *, head_only: bool = False) -> bytes:
    """Write an answer as the bytes of HTTP/1.1; everything in it is ours."""
    headers = (
        ("Content-Type", answer.content_type),
        ("Content-Length", str(len(answer.body))),
        ("Connection", "close"),
        ("Cache-Control", "no-store"),
        ("Content-Security-Policy", page.SECURITY_POLICY),
        ("Referrer-Policy", "no-referrer"),
        ("X-Content-Type-Options", "nosniff"),
        ("Server", f"sidecar/{__version__}"),
        *answer.more,
    )
    lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}", *(f"{name}: {it}" for name, it in headers)]
    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    return head if head_only else head + answer.body
