"""The admin endpoint on a real socket: what it answers, to whom, and what it does about bad and slow askers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sidecar import admin as admin_module
from sidecar import page
from sidecar.admin import CONNECTIONS_MAX, HEAD_BYTES_MAX, Admin
from sidecar.late import Late, LateTape, decoded, late_path
from sidecar.record import Recorder
from sidecar.tape import Tape, write_settled
from sidecar.watch import Watch
from tests.streams import pack, trade_fields
from tests.waiting import until

TOKEN = "a-token-of-24-characters"


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: str


@contextlib.asynccontextmanager
async def serving(folder: Path, **other: Any) -> AsyncIterator[tuple[Admin, Watch]]:
    """An endpoint over a recorder that hears nothing, on a free port."""
    tape = Tape(folder / "tape.db", size_bytes_max=1 << 30)
    recorder = Recorder(
        tape=tape, endpoint="tcp://127.0.0.1:1", topic="settlement", turn_frames_max=10, receive_hwm_frames=10,
        receive_buffer_bytes=4096, frame_bytes_max=4096, retention_s=1.0,
    )  # fmt: skip
    watch = Watch(
        stream="main", first_sequence=1, tape_path=tape.path, tape_size_bytes_max=1 << 30, store_name="sqlite",
        recorder=recorder, settler=None,
    )  # fmt: skip
    await watch.look()
    admin = Admin(watch, **({"listen": "127.0.0.1:0", "token": None} | other))
    running = asyncio.ensure_future(admin.run())
    try:
        await until(lambda: admin.address is not None or running.done())
        yield admin, watch
    finally:
        running.cancel()
        recorder._feed.close()
        tape.close()


async def say(admin: Admin, text: str | bytes) -> Reply:
    """Send bytes; read all that comes back."""
    assert admin.address is not None
    reader, writer = await asyncio.open_connection(*admin.address)
    writer.write(text.encode() if isinstance(text, str) else text)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    raw = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    head, _, body = raw.decode().partition("\r\n\r\n")
    lines = head.split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:])
    return Reply(int(lines[0].split()[1]) if head else 0, headers, body)


async def get(admin: Admin, path: str, *headers: str, method: str = "GET", host: str = "localhost") -> Reply:
    return await say(admin, "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]))


def tell(folder: Path, story: Callable[[Admin, Watch], Coroutine[Any, Any, None]], **other: Any) -> None:
    async def run() -> None:
        async with serving(folder, **other) as (admin, watch):
            await story(admin, watch)

    asyncio.run(run())


def test_each_page_answers_in_its_form(tmp_path: Path) -> None:
    async def story(admin: Admin, watch: Watch) -> None:
        assert (await get(admin, "/healthz")).body == "ok\n"
        ready = await get(admin, "/ready")
        assert (ready.status, ready.body) == (200, "ready\n")
        said = await get(admin, "/status.json?pretty=1")
        assert said.headers["Content-Type"] == "application/json"
        assert set(json.loads(said.body)) >= {
            "stream", "state", "halted", "session", "taped", "acked", "durable", "lag_events", "holes", "rejected",
            "malformed",
        }  # fmt: skip
        shown = await get(admin, "/")
        assert shown.headers["Content-Type"].startswith("text/html")
        assert "<h1>sidecar main" in shown.body
        assert (shown.headers["Cache-Control"], shown.headers["Connection"]) == ("no-store", "close")
        head = await get(admin, "/", method="HEAD")
        assert (head.status, head.body) == (200, "")
        assert abs(int(head.headers["Content-Length"]) - len(shown.body.encode())) < 50
        assert (await get(admin, "/else")).status == 404
        refused = await get(admin, "/status.json", method="DELETE")
        assert (refused.status, refused.headers["Allow"]) == (405, "GET, HEAD")

    tell(tmp_path, story)


def test_metrics_are_what_prometheus_reads(tmp_path: Path) -> None:
    async def story(admin: Admin, watch: Watch) -> None:
        plain = await get(admin, "/metrics")
        families = {family.name: family for family in text_string_to_metric_families(plain.body)}
        assert families["sidecar_frames_received"].type == "counter"
        assert families["sidecar_tape_full"].samples[0].value == 0
        assert families["sidecar_tape_full"].samples[0].labels == {"stream": "main"}
        assert families["sidecar_engine_not_trusted"].samples[0].value == 0
        assert watch.recorder is not None
        watch.recorder._feed.refused = "it hung up"
        assert 'sidecar_engine_not_trusted{stream="main"} 1.0' in (await get(admin, "/metrics")).body
        assert "process_resident_memory_bytes" in families
        assert "sidecar_batches_in_flight" not in families, "a recorder alone does not settle"
        assert "sidecar_last_frame_timestamp_seconds" not in families, "nothing was heard: no time is better than 1970"
        assert all(family.documentation for family in families.values())
        modern = await get(admin, "/metrics", "Accept: application/openmetrics-text; version=1.0.0")
        assert modern.headers["Content-Type"].startswith("application/openmetrics-text")
        assert modern.body.endswith("# EOF\n")

    tell(tmp_path, story)


def test_late_streams_have_their_numbers_beside_the_engines_own(tmp_path: Path) -> None:
    async def story(admin: Admin, watch: Watch) -> None:
        posted = LateTape(watch.tape_path)
        posted.append("main/late", [Late(decoded(pack(trade_fields(n))), "btc_usdt") for n in (7, 9)])  # type: ignore[arg-type]
        posted.close()
        write_settled(late_path(watch.tape_path), {"state": "running", "acked": 1, "durable": 0, "halted": None})
        await watch.look()
        body = (await get(admin, "/metrics")).body
        said = {
            (sample.name, frozenset(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(body)
            for sample in family.samples
        }

        def late(name: str, *more: str) -> float | None:
            return said.get((f"sidecar_{name}", frozenset({"main/late", *more})))

        assert (late("taped_sequence"), late("acked_sequence"), late("durable_sequence")) == (2, 1, 0)
        assert (late("lag_events"), late("holes")) == (1, None)
        assert [late("state", name) for name in ("running", "waiting", "halted")] == [1, 0, 0]
        assert said["sidecar_taped_sequence", frozenset({"main"})] == 0
        for name in ("sidecar_taped_sequence", "sidecar_state"):
            assert body.count(f"# HELP {name} ") == 1, "one family, whatever streams there are"

    tell(tmp_path, story)


@pytest.mark.parametrize(
    "sent, status",
    [
        ("HELLO\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\n\r\n", 400),  # 1.1 must say whom it asks
        ("GET / HTTP/1.1\r\nHost: localhost\r\nX: " + "x" * HEAD_BYTES_MAX + "\r\n\r\n", 431),
        ("x" * (HEAD_BYTES_MAX + 1_000), 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n", 400),  # TLS, at the wrong door
        ("GET / HTTP/1.0\r\n\r\n", 200),
        ("GET /%2e%2e/etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        ("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 200000\r\n\r\n" + "x" * 200_000, 405),
    ],
)
def test_odd_requests_are_answered_and_the_next_one_too(tmp_path: Path, sent: str | bytes, status: int) -> None:
    async def story(admin: Admin, watch: Watch) -> None:
        assert (await say(admin, sent)).status == status
        assert (await get(admin, "/healthz")).status == 200

    tell(tmp_path, story)


def test_a_silent_asker_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_module, "REQUEST_TIMEOUT_S", 0.2)

    async def story(admin: Admin, watch: Watch) -> None:
        for begun in (b"", b"GET / HTTP/1.1\r\nHost: loc"):
            reader, writer = await asyncio.open_connection(*admin.address)  # type: ignore[misc]
            writer.write(begun)
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()
        assert admin._connections == 0

    tell(tmp_path, story)


def test_beyond_so_many_connections_is_busy_and_then_well_again(tmp_path: Path) -> None:
    async def story(admin: Admin, watch: Watch) -> None:
        assert admin.address is not None
        idle = [await asyncio.open_connection(*admin.address) for _ in range(CONNECTIONS_MAX)]
        await until(lambda: admin._connections == CONNECTIONS_MAX)
        _, writer = full = await asyncio.open_connection(*admin.address)  # says nothing, so that nothing is reset
        assert b"503" in await asyncio.wait_for(full[0].read(), 10)
        writer.close()
        for _, writer in idle:
            writer.close()
        await until(lambda: not admin._connections)
        assert (await get(admin, "/healthz")).status == 200

    tell(tmp_path, story)


def test_with_a_token_only_who_shows_it_is_answered(tmp_path: Path) -> None:
    def basic(password: str) -> str:
        return "Authorization: Basic " + base64.b64encode(f"anyone:{password}".encode()).decode()

    async def story(admin: Admin, watch: Watch) -> None:
        for path in ("/", "/status.json", "/metrics", "/ready", "/else"):
            refused = await get(admin, path)
            assert refused.status == 401
            assert refused.headers["WWW-Authenticate"].startswith("Basic")
            assert "main" not in refused.body
        assert (await get(admin, "/healthz")).status == 200
        for right in (f"Authorization: Bearer {TOKEN}", f"authorization: bearer {TOKEN}", basic(TOKEN)):
            assert (await get(admin, "/status.json", right, host="sidecar.example:9464")).status == 200
        for wrong in (
            "Authorization: Bearer", f"Authorization: Bearer {TOKEN}x", f"Authorization: {TOKEN}", basic(""),
            "Authorization: Basic %%%", f"Authorization: Digest {TOKEN}", "Authorization: Bearer \xe9",
        ):  # fmt: skip
            assert (await get(admin, "/status.json", wrong)).status in {400, 401}, wrong

    tell(tmp_path, story, token=TOKEN)


def test_without_a_token_only_a_loopback_name_is_answered(tmp_path: Path) -> None:
    async def story(admin: Admin, watch: Watch) -> None:
        for name in ("localhost", "LocalHost:9464", "127.0.0.1", "127.0.0.1:9464", "[::1]:9464", "[::1]"):
            assert (await get(admin, "/", host=name)).status == 200, name
        for name in ("evil.example", "evil.example:9464", "192.0.2.1", "localhost.evil.example", "[2001:db8::1]:9464"):
            assert (await get(admin, "/", host=name)).status == 421, name

    tell(tmp_path, story)


def test_an_address_that_is_taken_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(admin_module, "RETRY_S", 0.05)

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as holder:
            port = holder.getsockname()[1]
            waiting = asyncio.ensure_future(free_later(holder))
            async with serving(tmp_path, listen=f"127.0.0.1:{port}") as (admin, _):
                assert (await get(admin, "/healthz")).status == 200
            await waiting

    async def free_later(holder: socket.socket) -> None:
        await until(lambda: "admin_not_served" in caplog.messages)
        holder.close()

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())


def test_a_page_that_fails_is_an_answer_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: Watch) -> str:
        raise RuntimeError("a bug")

    async def story(admin: Admin, watch: Watch) -> None:
        assert (await get(admin, "/")).status == 500
        assert (await get(admin, "/status.json")).status == 200

    monkeypatch.setattr(page, "html", fails)
    tell(tmp_path, story)
    assert "admin_page_failed" in caplog.messages


def test_what_comes_from_outside_is_text_on_the_page(tmp_path: Path) -> None:
    async def story(admin: Admin, watch: Watch) -> None:
        reason = "<script>alert(1)</script>"
        halted = {"code": "GAP", "sequence": 7, "reason": reason, "next_step": "`sidecar gap accept 7 7`, or <b>"}
        watch.standing |= {"state": "halted", "halted": halted, "paused": None}
        body = (await get(admin, "/")).body
        assert reason not in body
        assert "&lt;script&gt;alert(1)" in body
        assert "Halted: GAP at sequence 7" in body
        assert "<code>sidecar gap accept 7 7</code>, or &lt;b&gt;" in body
        watch.standing |= {"state": "paused", "halted": None, "paused": {"reason": reason, "by": "me"}}
        assert reason not in (await get(admin, "/")).body

    tell(tmp_path, story)


def test_nodes_that_are_away_are_named_with_the_next_step(tmp_path: Path) -> None:
    async def story(admin: Admin, watch: Watch) -> None:
        assert json.loads((await get(admin, "/status.json")).body)["nodes_away"] == []
        assert "nodes are away" not in (await get(admin, "/")).body
        watch.standing |= {"nodes_away": ["127.0.0.3:9042"]}
        body = (await get(admin, "/")).body
        assert "Database nodes are away." in body
        assert "127.0.0.3:9042" in body
        assert "<code>nodetool removenode</code>" in body

    tell(tmp_path, story)


def test_a_full_tape_is_not_ready_and_says_what_to_do(tmp_path: Path) -> None:
    async def story(admin: Admin, watch: Watch) -> None:
        assert watch.recorder is not None
        watch.recorder.tape.full = "the disk is full"
        ready = await get(admin, "/ready")
        assert (ready.status, ready.body) == (503, "not ready: tape full\n")
        body = (await get(admin, "/")).body
        assert "Recording stands still." in body
        assert "make room" in body

    tell(tmp_path, story)
