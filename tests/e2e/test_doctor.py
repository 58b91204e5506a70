"""`sidecar doctor` beside a real engine, and beside what can be wrong around a sidecar."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from bench.world import ENVIRONMENT, World
from sidecar import trust
from sidecar.cli import doctor
from sidecar.cli.doctor import FINE, NOTE, WRONG, Finding
from sidecar.config import Config, parse
from tests.streams import RULES_TOML, pack, trade_fields


def examined(folder: Path, *settings: str, listen_s: float = 0.3) -> dict[str, list[Finding]]:
    """All findings, by what was looked at."""
    path = folder / "sidecar.toml"
    path.write_text(RULES_TOML)
    given = [f"tape.path={folder / 'tape.db'}", f"store.sqlite.path={folder / 'settlement.db'}", *settings]
    found: dict[str, list[Finding]] = {}
    for finding in doctor.examine(parse(RULES_TOML, given), path, listen_s):
        found.setdefault(finding.check, []).append(finding)
        assert bool(finding.next_step) == (finding.verdict != FINE), finding
    return found


def only(found: dict[str, list[Finding]], check: str) -> Finding:
    assert len(found[check]) == 1, found[check]
    return found[check][0]


@contextmanager
def publishing(topic: bytes, *more: bytes, secure: trust.Secure = trust.plain, **fields: Any) -> Iterator[str]:
    """A publisher of trades, over and over; give the setting that names it."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publisher = context.socket(zmq.PUB)
    publisher.setsockopt(zmq.LINGER, 0)
    secure(publisher)
    publisher.bind("tcp://127.0.0.1:*")
    endpoint = publisher.getsockopt_string(zmq.LAST_ENDPOINT)
    done = threading.Event()

    def publish() -> None:
        n = 0
        while not done.is_set():
            n += 1
            publisher.send_multipart([topic, pack(trade_fields(n, **fields)), *more])
            time.sleep(0.001)

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield f"engine.endpoint={endpoint}"
    finally:
        done.set()
        thread.join()
        publisher.close()
        context.term()


def test_beside_a_running_sidecar_all_is_well(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        run = world.start("run")
        engine = world.engine("--count", "30000", rate=300)
        world.until_acked(500)
        said = world.verb("doctor", status=(0, 1))
        found = {finding["check"]: finding for finding in said["findings"]}
        assert set(found) == {
            "configuration", "endpoint", "frames", "schema", "clock", "disk", "limits", "high-water marks",
            "permissions", "page width",
        }  # fmt: skip
        for check in ("configuration", "endpoint", "frames", "schema", "permissions", "page width"):
            assert found[check]["verdict"] == FINE, found[check]
        assert f"process {run.pid}" in found["limits"]["found"], "its limits count, not the shell's"
        assert said["ok"] == all(finding["verdict"] != WRONG for finding in said["findings"])
        engine.kill()


def test_it_hears_an_engine_that_speaks_curve(tmp_path: Path) -> None:
    engine, own = tmp_path / "engine.key_secret", tmp_path / "own.key_secret"
    trust.write_keys(tmp_path / "engine.key", engine)
    trust.write_keys(tmp_path / "own.key", own)
    keys = [f"engine.curve_server_key_file={tmp_path / 'engine.key'}", f"engine.curve_key_file={own}"]
    with publishing(b"settlement", secure=trust.as_server(engine)) as endpoint:
        assert only(examined(tmp_path, endpoint, *keys, listen_s=1.0), "frames").verdict == FINE
        assert only(examined(tmp_path, endpoint, listen_s=1.0), "frames").verdict != FINE
    own.chmod(0o644)
    (finding,) = (one for one in examined(tmp_path, *keys)["permissions"] if "engine.curve_key_file" in one.found)
    assert finding.verdict == WRONG


def test_without_an_engine_it_says_so_in_words_and_ends_with_1(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        command = [sys.executable, "-m", "sidecar", "doctor", *world.config()]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=tmp_path)
        assert done.returncode == 1
        assert f"WRONG  endpoint: {world.endpoint} is not reachable" in done.stdout
        assert "next step: start the engine, or mend engine.endpoint" in done.stdout
        assert not list(tmp_path.glob("*.db*")), "it makes nothing"
        done = subprocess.run(
            [*command, "--listen-s", "0"], capture_output=True, text=True, check=False, env=ENVIRONMENT
        )
        assert done.returncode == 2


def test_frames_of_another_topic_are_named(tmp_path: Path) -> None:
    with publishing(b"trades") as engine:
        found = only(examined(tmp_path, engine), "frames")
    assert (found.verdict, "'trades'" in found.found) == (WRONG, True)


def test_frames_of_three_parts_are_not_ours(tmp_path: Path) -> None:
    with publishing(b"settlement", b"third") as engine:
        found = only(examined(tmp_path, engine), "frames")
    assert (found.verdict, "two parts" in found.next_step) == (WRONG, True)


def test_a_quiet_engine_is_a_note(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context.socket(zmq.PUB) as publisher:
        publisher.bind(f"ipc://{tmp_path / 'engine'}")
        found = examined(tmp_path, f"engine.endpoint=ipc://{tmp_path / 'engine'}")
        assert only(found, "endpoint").verdict == FINE
        assert only(found, "frames").verdict == NOTE
    context.term()


def test_engine_stamps_far_ahead_are_a_clock_that_is_wrong(tmp_path: Path) -> None:
    with publishing(b"settlement", ts_us=time.time_ns() // 1000 + 3_600_000_000) as engine:
        found = only(examined(tmp_path, engine), "clock")
    assert (found.verdict, "ahead of this clock" in found.found) == (WRONG, True)


def test_a_store_that_is_away_or_lacks_its_tables_is_wrong(tmp_path: Path) -> None:
    cassandra = ["store.backend=cassandra", "store.cassandra.port=1", "pipeline.durable_after_s=20"]
    found = only(examined(tmp_path, *cassandra), "schema")
    assert (found.verdict, "not reachable" in found.found) == (WRONG, True)
    (tmp_path / "settlement.db").write_text("not a database, but long enough to be looked at" * 100)
    assert only(examined(tmp_path), "schema").verdict == WRONG


def test_files_of_somebody_else_and_open_secrets_are_wrong(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    (tmp_path / "tape.db").touch()
    (tmp_path / "tape.db.settled").touch()
    (tmp_path / "tape.db.paused").touch()
    os.chown(tmp_path / "tape.db", 4321, 4321)
    token = tmp_path / "token"
    token.write_text("a-token-of-24-characters")
    token.chmod(0o644)
    found = examined(tmp_path, f"admin.token_file={token}")["permissions"]
    assert [one.verdict for one in found] == [WRONG, WRONG]
    assert "tape.db.settled: not of the owner of tape.db (uid 4321)" in found[0].found
    assert found[1].next_step == f"chmod 600 {token}"
    (tmp_path / "tape.db").unlink()
    token.chmod(0o600)
    assert only(examined(tmp_path, f"admin.token_file={token}"), "permissions").verdict == FINE


def test_a_configuration_that_everybody_may_write_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "open.toml"
    path.write_text(RULES_TOML)
    path.chmod(0o666)
    config = parse(RULES_TOML, [f"tape.path={tmp_path / 'tape.db'}", "engine.endpoint=tcp://127.0.0.1:1"])
    assert next(doctor.examine(config, path, 0.1)).verdict == WRONG


def test_a_disk_in_memory_or_without_room_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk(kind: str, free_bytes: int) -> list[str]:
        monkeypatch.setattr(doctor, "_file_system", lambda folder: kind)
        room = os.statvfs_result((4096, 4096, 0, 0, free_bytes // 4096, 0, 0, 0, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda path: room)
        config = parse(RULES_TOML, [f"tape.path={tmp_path / 'tape.db'}", "tape.size_bytes_max=10_000_000_000"])
        return [finding.verdict for finding in doctor._disk(config) if "safe after" not in finding.found]

    assert disk("ext4", 20_000_000_000) == [FINE]
    assert disk("ext4", 5_000_000_000) == [NOTE]
    assert disk("ext4", 500_000_000) == [WRONG]
    assert disk("tmpfs", 20_000_000_000) == [WRONG, FINE]
    assert disk("nfs4", 20_000_000_000) == [WRONG, FINE]


def test_a_mount_is_told_from_the_folder_above_it() -> None:
    assert doctor._file_system(Path("/proc/self")) == "proc"
    assert doctor._file_system(Path("/")) not in {"proc", "unknown"}


def test_limits_and_high_water_marks_that_are_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse(RULES_TOML, ["tape.path=/none/tape.db"])
    monkeypatch.setattr(resource, "prlimit", lambda pid, number: (512, 512))
    limits = doctor._limits(config)
    assert limits.verdict == WRONG
    assert "open files 512" in limits.found
    monkeypatch.setattr(resource, "prlimit", lambda pid, number: (-1, -1))
    assert doctor._limits(config).verdict == FINE
    monkeypatch.setattr(doctor, "_available_bytes", lambda: 100_000_000)
    marks = list(doctor._high_water_marks(config))
    assert marks[-1].verdict == WRONG
    assert "receive_hwm_frames" in marks[-1].found


def ids(first: int, step: int, count: int = 200) -> list[bytes]:
    return [pack(trade_fields(n + 1, trade_id=first + n * step)) for n in range(count)]


@pytest.mark.parametrize(
    "settings, seen, verdict, said",
    [
        ([], ids(1, 1), FINE, "about 10,000 rows"),
        ([], ids(1, 1, count=50), NOTE, "nothing can be said"),
        (["symbols.btc_usdt.page_width=1_000_000"], ids(1, 1), WRONG, "about 1,000,000 rows"),
        (["symbols.btc_usdt.page_width=1_000_000"], ids(1, 1_000), FINE, "about 1,005 rows"),
        (["symbols.btc_usdt.page_width=10"], ids(1, 1_000), NOTE, "200 trades seen in 200 pages"),
        ([], ids((time.time_ns() // 1_000_000) << 16, 1 << 16), WRONG, "milliseconds << 16"),
        (
            ["symbols.btc_usdt.trade_id_time=ms16", "symbols.btc_usdt.page_width=65_536_000"],
            ids((time.time_ns() // 1_000_000) << 16, 1 << 16),
            FINE,
            "about 1,00",
        ),
    ],
)
def test_the_page_width_is_judged_by_the_ids_that_were_seen(
    settings: list[str], seen: list[bytes], verdict: str, said: str
) -> None:
    config: Config = parse(RULES_TOML, settings)
    (finding,) = doctor._pages(config, seen)
    assert finding.verdict == verdict, finding
    assert said in finding.found


def test_json_and_text_say_the_same(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        command = [sys.executable, "-m", "sidecar", "doctor", *world.config(), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=tmp_path)
        said = json.loads(done.stdout)
        assert (done.returncode, said["ok"]) == (1, False)
        assert set(said["findings"][0]) == {"check", "verdict", "found", "next_step"}
