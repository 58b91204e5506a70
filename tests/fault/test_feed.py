"""What comes over the socket is wrong, comes twice, comes from somebody else, or can't be taken for a while."""

from __future__ import annotations

import itertools
import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

from bench.world import World, free_port, until
from tests.fault.kit import Fault, is_run_by, taped
from tests.fault.relay import Frames, Relay

TOPIC = b"settlement"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_f02_recorder_stopped_for_a_minute(tmp_path: Path, fault: Fault) -> None:
    """SIGSTOP for a minute while 5,000 frames/s come: they wait in both sockets and in the kernel, none is missing."""
    with World(tmp_path, source="generated") as world:
        run = world.start("run")
        until(lambda: is_run_by(world, run.pid), "it runs")
        engine = world.engine("--users", "100", rate=5_000)
        world.until_acked(5_000)
        run.signal(signal.SIGSTOP)
        fault.strike()
        time.sleep(60)
        fault.heals(world)
        run.signal(signal.SIGCONT)
        fault.recovers(world)
        until(lambda: taped(world) > 310_000, "what waited in the engine's queue has come", 120)
        engine.signal(signal.SIGTERM)
        fault.closes(world, engine.result()["last_sequence"], timeout_s=240)
        said = world.status()
        assert (said["holes"], said["sessions"]) == ([], 1)
        assert run.term() == 0


def test_f09_duplicates(tmp_path: Path, seed: int, fault: Fault) -> None:
    """Frames come twice: at once, much later, in another order of arrival, and after a restart all of them again."""
    chance = random.Random(seed)
    count = 3_000
    with World(tmp_path, source="generated", settings=["pipeline.durable_after_s=0.3"]) as world:
        run = world.start("run")
        for again in range(4):
            twice = sorted(chance.sample(range(1, count), 300))
            fault.strike(len(twice) + count * bool(again))
            if again == 3:
                fault.heals(world)
                count += 1_000
            world.engine(
                "--users", "50", "--count", str(count), *(text for n in twice for text in ("--duplicate", str(n)))
            ).result()
            world.until_acked(count)
            if again == 1:
                assert run.term() == 0
                run = world.start("run", log="again.log")
                until(lambda: is_run_by(world, run.pid), "it runs again")  # noqa: B023 - asked at once
        fault.closes(world, count)
        said = world.status()
        assert (said["taped"], said["sessions"], said["halted"]) == (count, 1, None)
        assert run.term() == 0


def _map(**fields: object) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed


def _nested(levels: int) -> bytes:
    return b"\x91" * levels + b"\xc0"


def _with_key(payload: bytes, key: str, value: bytes) -> bytes:
    """Add a key whose value is packed already."""
    fields = msgpack.unpackb(payload)
    packed = b"".join(msgpack.packb(each) for pair in fields.items() for each in pair)
    head: bytes = msgpack.Packer().pack_map_header(len(fields) + 1)
    return head + packed + bytes(msgpack.packb(key)) + value


def _malformed(chance: random.Random, good: bytes) -> Iterator[Frames]:
    """Messages without a place in the sequence, again and again; `good` is cut and lengthened."""
    yield [TOPIC]
    yield [TOPIC, good, good]
    yield [TOPIC, b""]
    yield [TOPIC, b"\xc1"]
    yield [TOPIC, chance.randbytes(2 << 20)]  # over engine.frame_bytes_max
    yield [TOPIC, _nested(100_000)]
    yield [TOPIC, b"\x81\xa1a" * 100_000]
    yield [TOPIC, _with_key(good, "deep", _nested(100_000))]  # its sequence is the next one, but not to be had
    yield [TOPIC, b"\xdf\xff\xff\xff\xff" + good[1:]]  # promises 4,294,967,295 keys
    yield [TOPIC, b"\xdd\xff\xff\xff\xff"]
    yield [TOPIC, b"\xc6\xff\xff\xff\xff"]
    yield [TOPIC, b"\x81" + msgpack.packb("output_sequence") + b"\xc9\xff\xff\xff\xff\x01"]
    yield [TOPIC, good[: chance.randrange(len(good))]]
    yield [TOPIC, good + b"\x00"]
    for wrong in (True, "7", -1, 0, 2**63, 2**64 - 1, 7.0, None, [7], {"7": 7}, b"7"):
        yield [TOPIC, _map(output_sequence=wrong, trade_id=1)]
    yield [TOPIC, _map(next_sequence="soon")]
    yield [TOPIC, msgpack.packb([1, 2, 3])]
    yield [TOPIC, chance.randbytes(chance.randrange(1, 300))]


def test_f16_malformed_oversized_and_deeply_nested_frames(tmp_path: Path, seed: int, fault: Fault) -> None:
    """Between good frames: cut, lengthened, 2 MiB, 100,000 levels deep, promising 4 GiB, without a usable sequence.
    Good ones carry unknown keys, nested deeply, or are larger than allowed."""
    chance = random.Random(seed)
    engine_endpoint = f"tcp://127.0.0.1:{free_port()}"
    count, malformed, padded, heard = 4_000, 0, set(), itertools.count(1)
    healed = threading.Event()

    def change(frames: Frames) -> list[Frames]:
        nonlocal malformed
        number, payload = next(heard), frames[1]
        if number > 3_000:  # healed: progress is made of good frames alone
            healed.wait(60)
            return [frames]
        sent: list[Frames] = []
        if number % 40 == 0:
            bad = list(_malformed(chance, payload))
            sent += [bad[number // 40 % len(bad)], [b"settlement_of_others", b"\xc1"]]
            malformed += 1
        if number % 31 == 0:
            payload = _with_key(payload, "unknown", _nested(500))
        elif number % 33 == 0:
            padded.add(msgpack.unpackb(payload)["output_sequence"])
            payload = _with_key(payload, "pad", msgpack.packb("x" * 5_000))
        return [*sent, [TOPIC, payload]]

    with (
        World(tmp_path, source="generated") as world,
        Relay(upstream=engine_endpoint, endpoint=world.endpoint, change=change),
    ):
        run = world.start("run")
        engine = world.engine("--users", "50", "--count", str(count), "--endpoint", engine_endpoint, rate=1_500)
        world.until_acked(2_900)
        fault.strike(malformed + len(padded))
        fault.heals(world)
        healed.set()
        engine.result()
        _note_pads(world.journal, padded)
        fault.closes(world, count)
        said = world.status()
        assert (said["malformed"], said["rejected"]) == (malformed, len(padded))
        assert (said["halted"], said["holes"], said["sessions"]) == (None, [], 1)
        assert malformed >= 70
        rejected = world.verb("rejected", "list", status=0)["rejected"]
        assert {row["code"] for row in rejected} == {"TOO_LARGE"}
        assert run.term() == 0


def _note_pads(journal: Path, sequences: set[int]) -> None:
    """Let the journal say what was published in the end."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        if line["seq"] in sequences:
            line["event"]["pad"] = "x" * 5_000
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_f17_ipc_path_taken_over(tmp_path: Path, fault: Fault) -> None:
    """Another process binds the engine's ipc path: who is connected stays with the engine, who connects anew hears the
    other; nothing of that is settled, and when the engine has its path back settlement moves on by itself."""
    path = f"ipc://{tmp_path}/engine.ipc"
    with World(tmp_path, source="generated", settings=[f"engine.endpoint={path}"]) as world:
        mine = ("--endpoint", path, "--session", "7", "--users", "50")
        run = world.start("run")
        engine = world.engine(*mine, rate=1_500)
        world.until_acked(500)
        thief = world.engine(
            "--endpoint", path, "--session", "8", "--seed", "99", "--users", "50", "--linger-s", "60",
            journal=tmp_path / "of-the-thief.jsonl", rate=1_500,
        )  # fmt: skip
        until((tmp_path / "of-the-thief.jsonl").exists, "the thief has the path")
        fault.strike()
        world.until_acked(int(world.said()["acked"]) + 1_000)  # still the engine's
        assert run.term() == 0
        stood = int(world.said()["acked"])
        run = world.start("run", log="again.log")
        said = world.until_halted("it hears somebody else, and halts")
        assert (said["halted"]["code"], said["sessions"]) == ("SESSION_CHANGED", 2)
        heard = world.verb("tape", "info", status=0)["sessions"][0]["head"]
        assert heard >= stood
        until(lambda: world.said().get("acked") == heard, "what the engine had said is settled, nothing else")
        thief.kill()
        engine.signal(signal.SIGTERM)
        last = engine.result()["last_sequence"]
        assert last > heard
        fault.heals(world)
        world.engine(*mine, "--count", str(last + 500)).result()
        fault.closes(world, last + 500)
        said = world.status()  # what the other has published stands on the tape: that goes on being said
        assert (said["halted"]["code"], said["halted"]["sequence"], said["holes"]) == (
            "SESSION_CHANGED",
            last + 501,
            [],
        )
        assert run.term() == 0
