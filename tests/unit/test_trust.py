"""Keys: made once, read with care, never shown; and who could take the engine's place on an ipc path."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import stat
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
import zmq
from zmq.auth import create_certificates, load_certificate

from bench.world import free_port
from sidecar import trust
from sidecar.cli import main
from sidecar.config import parse
from sidecar.errors import KeyFileError
from sidecar.feed import Feed
from sidecar.service import make_replay_server
from sidecar.talk import Dealer, Router
from tests.streams import RULES_TOML
from tests.waiting import until


def pair(folder: Path, name: str) -> tuple[Path, Path]:
    files = folder / f"{name}.key", folder / f"{name}.key_secret"
    trust.write_keys(*files)
    return files


# --- files ------------------------------------------------------------------------------------------------------------


def test_keygen_writes_two_files_for_their_owner_alone_and_shows_only_the_public_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keygen", str(tmp_path / "engine"), "--json"]) == 0
    out = capsys.readouterr().out
    said = json.loads(out)
    public, secret = (load_certificate(said[key]) for key in ("public_key_file", "secret_key_file"))  # as others do
    assert public == (said["public_key"].encode(), None)
    assert secret[0] == public[0]
    assert secret[1] is not None
    assert zmq.curve_public(secret[1]) == public[0]
    assert secret[1].decode() not in out
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine.key", "engine.key_secret"]


@pytest.mark.parametrize("there", ["a.key", "a.key_secret"])
def test_nothing_is_overwritten_and_nothing_left_behind(
    there: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / there).write_text("precious")
    assert main(["keygen", str(tmp_path / "a")]) == 78
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "precious"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keygen", str(tmp_path / "none" / "a")]) == 78
    assert "none/a.key_secret: can't be written" in capsys.readouterr().err


def test_files_of_other_tools_are_read(tmp_path: Path) -> None:
    public_file, secret_file = create_certificates(tmp_path, "other", metadata={"name": "an = engine"})
    keys = trust.read_keys(Path(secret_file))
    assert (keys.public, keys.secret) == load_certificate(secret_file)
    assert trust.read_keys(Path(public_file)).secret is None


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "can't be read: No such file"),
        (b"\xff\xfe", "is not text"),
        (b"", "holds no public-key"),
        (b'curve\n    public-key = "short"\n', "its public-key is none"),
        (b'curve\n    public-key = "' + b"~" * 40 + b'"\n', "its public-key is none"),
        (b'curve\n    public-key = "' + b"#" * 40 + b'"\n', "its public-key is none"),  # past 2^32 in each five
    ],
)
def test_what_is_no_key_file_is_named_and_not_shown(text: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.key"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(KeyFileError, match=said) as raised:
        trust.read_keys(path)
    assert raised.value.exit_code == 78
    assert "~~~" not in str(raised.value)
    assert "###" not in str(raised.value)


def test_our_own_file_must_hold_the_secret(tmp_path: Path) -> None:
    public, _ = pair(tmp_path, "a")
    with pytest.raises(KeyFileError, match="holds no secret key"):
        trust.as_server(public)
    with pytest.raises(KeyFileError, match="holds no secret key"):
        trust.as_client(public, public)


def test_a_secret_that_everybody_may_read_is_seen(tmp_path: Path) -> None:
    _, secret = pair(tmp_path, "a")
    assert not trust.is_exposed(secret)
    secret.chmod(0o604)
    assert trust.is_exposed(secret)
    assert not trust.is_exposed(tmp_path / "none")


# --- sockets ----------------------------------------------------------------------------------------------------------


async def _heard(folder: Path, server: trust.Secure, client: trust.Secure, caplog: pytest.LogCaptureFixture) -> Any:
    """Publish until something is heard, or the feed says why not: the payloads and that."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publisher = context.socket(zmq.PUB)
    publisher.setsockopt(zmq.LINGER, 0)
    server(publisher)
    publisher.bind(f"ipc://{folder}/engine.ipc")
    heard: list[bytes] = []
    feed = Feed(
        endpoint=f"ipc://{folder}/engine.ipc", topic="t", turn_frames_max=10, receive_hwm_frames=10,
        receive_buffer_bytes=1 << 16, on_turn=lambda turn: heard.extend(frames[1] for frames in turn),
        may_take=lambda: 10, secure=client,
    )  # fmt: skip
    feed.start()
    try:
        async with asyncio.timeout(20):
            while not heard and feed.refused is None:
                publisher.send_multipart([b"t", b"said"])
                await asyncio.sleep(0.01)
            for _ in range(40):  # further tries to connect, further refusals
                publisher.send_multipart([b"t", b"said"])
                await asyncio.sleep(0.01)
    finally:
        feed.close()
        publisher.close()
        context.term()
    return heard[:1], feed.refused, [record for record in caplog.records if record.message == "engine_not_trusted"]


@pytest.mark.parametrize(
    "server, client, why",
    [
        ("engine", "engine", None),
        ("plain", "plain", None),
        ("engine", "other", "it hung up"),
        ("engine", "plain", "one of the two speaks CURVE|it hung up"),  # whichever of the two is quicker to close
        ("plain", "engine", "one of the two speaks CURVE|it hung up"),
    ],
)
def test_only_the_holder_of_the_key_is_heard(
    server: str, client: str, why: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    files = {name: pair(tmp_path, name) for name in ("engine", "other", "sidecar")}
    ours = trust.plain if server == "plain" else trust.as_server(files[server][1])
    theirs = trust.plain if client == "plain" else trust.as_client(files[client][0], files["sidecar"][1])
    heard, refused, logged = asyncio.run(_heard(tmp_path, ours, theirs, caplog))
    if why is None:
        assert (heard, refused, logged) == ([b"said"], None, [])
        return
    assert heard == []
    assert re.search(why, refused)
    assert len(logged) == 1  # once, not with each try
    assert "curve_server_key_file" in logged[0].__dict__["next_step"]


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, found", [(0o755, []), (0o770, []), (0o777, [True]), (0o1777, [False]), (0o703, [True])])
def test_who_could_take_the_place_of_an_ipc_path(mode: int, found: list[bool], tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    (folder / "below").mkdir(parents=True)
    folder.chmod(mode)
    for endpoint in (f"ipc://{folder}/pub", f"ipc://{folder}/below/pub", f"ipc://{folder}/none/pub"):
        assert [place.anybody for place in trust.replaceable(endpoint) if place.directory == folder] == found
    assert list(trust.replaceable(f"tcp://{folder}:1")) == []


# --- replay -----------------------------------------------------------------------------------------------------------


async def _asked(endpoint: str, client: trust.Secure, wait_s: float) -> bytes | None:
    dealer = Dealer(endpoint, 1_000, client)
    try:
        await dealer.send(b"hello")
        return await dealer.receive(asyncio.get_running_loop().time() + wait_s)
    finally:
        dealer.close()


@contextlib.asynccontextmanager
async def answering(endpoint: str, server: trust.Secure, clients: Iterable[Path] = ()) -> AsyncIterator[None]:
    router = Router(endpoint, 1_000, server, frozenset(trust.read_keys(path).public for path in clients))

    async def answer() -> None:
        while True:
            peer, message = await router.receive()
            await router.send(peer, message + b"!")

    running = asyncio.create_task(answer())
    try:
        yield
    finally:
        running.cancel()
        router.close()


@pytest.mark.parametrize("known, answered", [("server", True), ("other", False)])
def test_replay_is_answered_to_those_who_know_the_key(known: str, answered: bool, tmp_path: Path) -> None:
    files = {name: pair(tmp_path, name) for name in ("server", "other", "sidecar")}
    endpoint = f"ipc://{tmp_path}/replay.ipc"

    async def story() -> bytes | None:
        async with answering(endpoint, trust.as_server(files["server"][1])):
            return await _asked(endpoint, trust.as_client(files[known][0], files["sidecar"][1]), 20 if answered else 1)

    assert asyncio.run(story()) == (b"hello!" if answered else None)


@pytest.mark.parametrize("endpoint", ["ipc://{folder}/replay.ipc", "tcp://127.0.0.1:{port}"])
def test_replay_is_answered_only_to_those_who_are_named(
    endpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    files = {name: pair(tmp_path, name) for name in ("server", "one", "two", "stranger")}
    endpoint = endpoint.format(folder=tmp_path, port=free_port())

    def of(name: str) -> trust.Secure:
        return trust.as_client(files["server"][0], files[name][1])

    async def story() -> None:
        named = [files[name][0] for name in ("one", "two")]
        async with answering(endpoint, trust.as_server(files["server"][1]), named):
            stranger = asyncio.create_task(_asked(endpoint, of("stranger"), 1.0))  # tries to connect again and again
            assert await _asked(endpoint, of("one"), 20) == b"hello!"
            assert await _asked(endpoint, of("two"), 20) == b"hello!"
            await until(lambda: refused(caplog))
            assert await stranger is None
            assert await _asked(endpoint, of("stranger"), 0.3) is None
            assert await _asked(endpoint, trust.plain, 0.3) is None
            assert await _asked(endpoint, of("one"), 20) == b"hello!"
        async with answering(endpoint, trust.as_server(files["server"][1])):  # without names: who knows the key
            assert await _asked(endpoint, of("stranger"), 20) == b"hello!"

    asyncio.run(story())
    (told,) = refused(caplog)
    assert told["public_key"] == trust.read_keys(files["stranger"][0]).public.decode()
    assert "curve_client_key_files" in told["next_step"]


def refused(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.__dict__ for record in caplog.records if record.message == "replay_client_refused"]


def test_keys_that_somebody_makes_up_do_not_fill_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("sidecar.talk.REFUSED_TOLD_MAX", 3)
    files = {name: pair(tmp_path, name) for name in ("server", "one", *map(str, range(6)))}
    endpoint = f"ipc://{tmp_path}/replay.ipc"

    async def story() -> None:
        async with answering(endpoint, trust.as_server(files["server"][1]), [files["one"][0]]):
            asking = [_asked(endpoint, trust.as_client(files["server"][0], files[str(n)][1]), 0.7) for n in range(6)]
            assert await asyncio.gather(until(lambda: refused(caplog)), *asking) == [None] * 7

    asyncio.run(story())
    assert len(refused(caplog)) <= 3


def test_the_configured_clients_are_the_ones_let_in(tmp_path: Path) -> None:
    files = {name: pair(tmp_path, name) for name in ("server", "one", "two")}
    text = f'''{RULES_TOML}
[replay_server]
endpoint = "ipc://{tmp_path}/replay.ipc"
curve_key_file = "{files["server"][1]}"'''
    for names in (["one", "two"], ["one"], []):
        config = parse(
            text, [f"replay_server.curve_client_key_files={','.join(str(files[name][0]) for name in names)}"]
        )
        assert config.replay_server is not None
        named = {trust.read_keys(files[name][0]).public for name in names}
        assert make_replay_server(config, config.replay_server)._clients == named
    config = parse(text, ["replay_server.curve_client_key_files=none.key"])
    assert config.replay_server is not None
    with pytest.raises(KeyFileError, match=r"none\.key: can't be read"):
        make_replay_server(config, config.replay_server)
