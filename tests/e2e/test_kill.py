"""SIGKILL at any instruction, again and again: at the end the judge finds every row and balance equal."""

from __future__ import annotations

import random
import time
from functools import partial
from pathlib import Path

import pytest

from bench.world import Process, World, until
from tests.stores import MOSTLY_CASSANDRA, MOSTLY_SQLITE, StoreUnderTest

KILLS = 12


def _unacked(acks: Path) -> int:
    """Count the batches that were submitted and not acknowledged when the process died: its last life's log says."""
    open_batches = set()
    for line in acks.read_text().splitlines():
        words = line.split()
        if words[0] == "#":
            open_batches.add(words[2])
        elif len(words) == 3:
            open_batches.discard(words[0])
    return len(open_batches)


def _wait_for_submission(acks: Path) -> None:
    """Wait, half a second at most, until the newest thing that was said is that a batch was submitted."""
    deadline = time.monotonic() + 0.5
    with acks.open("rb") as said:
        while time.monotonic() < deadline:
            said.seek(-min(acks.stat().st_size, 80), 2)
            if said.read().rstrip(b"\n").rpartition(b"\n")[2].startswith(b"#"):
                return


def _restarts_above_1(process: Process) -> bool:
    return any(line["durable"] > 0 for line in process.logged("life_begins"))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("under_test", MOSTLY_CASSANDRA, indirect=True)
def test_settler_killed_while_it_settles(tmp_path: Path, seed: int, under_test: StoreUnderTest) -> None:
    chance = random.Random(seed)
    with World(
        tmp_path, source="generated", settings=["pipeline.durable_after_s=0.5"], store=under_test.settings,
        judged=under_test.judged,
    ) as world:  # fmt: skip
        under_test.prepare(world)
        record = world.start("record")
        engine = world.engine("--count", "60000", "--users", "200", "--seed", str(seed % 1000), rate=2000)
        began_above_1 = with_unacked = 0
        for kill in range(KILLS):
            acks = tmp_path / f"acks-{kill}.txt"
            settle = world.start("settle", f"pipeline.ack_log={acks}", log=f"settle-{kill}.log")
            until(partial(_has_content, acks), "it settles", 30)
            time.sleep(chance.uniform(2.0, 2.6) - 0.6)
            if kill % 3:  # a commit takes a millisecond: a moment out of the blue seldom strikes one
                _wait_for_submission(acks)
            settle.kill()
            with_unacked += _unacked(acks) > 0
            began_above_1 += _restarts_above_1(settle)
        settle = world.start("settle", log="settle-last.log")
        last = engine.result()["last_sequence"]
        world.until_acked(last, 90)
        assert settle.term() == 0
        assert record.term() == 0
        verdict = world.judge()
        assert verdict["ok"], verdict
        print(f"{KILLS} kills, {with_unacked} with unacknowledged batches, {began_above_1} restarts above sequence 1")
        assert began_above_1 >= 8
        assert with_unacked >= 5


@pytest.mark.timeout(180)
@pytest.mark.parametrize("under_test", MOSTLY_SQLITE, indirect=True)
def test_run_killed_whole_while_the_engine_pauses(tmp_path: Path, seed: int, under_test: StoreUnderTest) -> None:
    chance = random.Random(seed)
    with World(
        tmp_path, source="generated", settings=["pipeline.durable_after_s=0.5"], store=under_test.settings,
        judged=under_test.judged,
    ) as world:  # fmt: skip
        under_test.prepare(world)
        run = world.start("run", log="run-0.log")
        until(lambda: world.said().get("pid") == run.pid, "it runs")
        engine = world.engine(
            "--count", "24000", "--users", "200", "--pause-file", str(world.pause_file), "--linger-s", "4", rate=2000
        )
        paused = world.pause_file.with_name(world.pause_file.name + ".paused")
        for kill in range(10):
            time.sleep(chance.uniform(0.6, 1.2))
            world.pause_file.touch()
            last_sent = int(until(lambda: paused.exists() and paused.read_text(), "the engine pauses"))
            until(partial(_has_taped, world, last_sent), "everything that was sent is taped")
            run.kill()
            run = world.start("run", log=f"run-{kill + 1}.log")
            until(partial(_is_run_by, world, run.pid), "it runs again")
            world.pause_file.unlink()  # the engine goes on when the subscription is there: nobody replays in this test
            until(partial(_is_gone, paused), "the pause ends")
        world.until_acked(engine.result()["last_sequence"], 60)
        assert run.term() == 0
        verdict = world.judge()
        assert verdict["ok"], verdict


def _has_content(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def _has_taped(world: World, sequence: int) -> bool:
    sessions = world.verb("tape", "info")["sessions"]
    return (int(sessions[0]["head"]) if sessions else 0) >= sequence


def _is_gone(file: Path) -> bool:
    return not file.exists()


def _is_run_by(world: World, pid: int) -> bool:
    return world.said().get("pid") == pid
