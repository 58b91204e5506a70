"""Killed at every named point of a trade's way, or asked to end under load: the next life goes on where it must."""

from __future__ import annotations

import itertools
import random
import signal
import time
from pathlib import Path

import pytest

from bench.world import Process, World, until
from tests.fault.crash import MOMENTS, POINTS
from tests.fault.kit import Fault, is_run_by, taped
from tests.stores import StoreUnderTest

RECORDING = ("receive", "append", "sync")
# How often a point is passed before it is fatal, at most; drawn anew for each life.
TIMES_MAX = {
    "receive": 500, "append": 500, "sync": 8, "fold": 2_000, "submit": 60, "ack": 60, "acked": 3, "durable": 3,
}  # fmt: skip
USERS = ("--users", "50")


def _killed_at(world: World, verb: str, point: str, moment: str, chance: random.Random, life: int) -> Process:
    times = chance.randint(1, TIMES_MAX[point])
    module = ("tests.fault.crash", f"{point}:{moment}:{times}")
    return world.start(verb, module=module, log=f"{verb}-{life}-{point}-{moment}-{times}.log")


def _died_there(process: Process) -> None:
    assert process.wait(30) == -signal.SIGKILL, f"{process.log}: {process.log.read_text()[-2000:]}"


def _lives(points: tuple[str, ...], times: int, chance: random.Random) -> list[tuple[str, str]]:
    """Each point before and after, so often; in any order, since what a life leaves the next one finds."""
    lives = [*itertools.product(points, MOMENTS)] * times
    chance.shuffle(lives)
    return lives


@pytest.mark.parametrize(
    "times",
    [
        pytest.param(2, marks=pytest.mark.timeout(600)),
        pytest.param(20, marks=[pytest.mark.long, pytest.mark.timeout(1_800)]),
    ],
)
def test_f18_recorder_killed_at_each_point(tmp_path: Path, seed: int, fault: Fault, times: int) -> None:
    """Before and after it receives, appends, syncs: what a settler was handed is on disk, the rest comes again."""
    chance = random.Random(seed)
    with World(tmp_path, source="generated", settings=["pipeline.durable_after_s=0.3"]) as world:
        settle = world.start("settle")
        events = 0
        for life, (point, moment) in enumerate(_lives(RECORDING, times, chance)):
            record = _killed_at(world, "record", point, moment, chance, life)
            engine = world.engine(*USERS, "--burst", str(events), rate=500)  # until it has struck, on any machine
            _died_there(record)
            fault.strike()
            engine.signal(signal.SIGTERM)
            events = max(events, engine.result()["last_sequence"])
            assert taped(world) >= int(world.said().get("acked", 0)), "nobody was handed what is not on disk"
        fault.heals(world)
        record = world.start("record")
        world.engine(*USERS, "--count", str(events)).result()
        fault.closes(world, events)
        said = world.status()
        assert (said["sessions"], said["holes"]) == (1, [])
        assert [settle.term(), record.term()] == [0, 0]


@pytest.mark.parametrize(
    "under_test, times",
    [
        pytest.param("sqlite", 2, marks=pytest.mark.timeout(600)),
        pytest.param("sqlite", 20, marks=[pytest.mark.long, pytest.mark.timeout(1_800)]),
        pytest.param("cassandra", 10, marks=[pytest.mark.long, pytest.mark.timeout(1_800), pytest.mark.cassandra]),
    ],
    indirect=["under_test"],
)
def test_f18_settler_killed_at_each_point(
    tmp_path: Path, seed: int, fault: Fault, under_test: StoreUnderTest, times: int
) -> None:
    """Before and after it folds, submits, hears the answer, saves `acked`, saves `durable`."""
    chance = random.Random(seed)
    points = tuple(point for point in POINTS if point not in RECORDING)
    with World(
        tmp_path, source="generated", settings=["pipeline.durable_after_s=0.2"], store=under_test.settings,
        judged=under_test.judged,
    ) as world:  # fmt: skip
        under_test.prepare(world)
        record = world.start("record")
        engine = world.engine(*USERS, rate=1_500)
        for life, (point, moment) in enumerate(_lives(points, times, chance)):
            _died_there(_killed_at(world, "settle", point, moment, chance, life))
            fault.strike()
        engine.signal(signal.SIGTERM)
        last = engine.result()["last_sequence"]
        fault.heals(world)
        settle = world.start("settle")
        fault.closes(world, last)
        assert [settle.term(), record.term()] == [0, 0]


def test_f34_sigterm_under_load(tmp_path: Path, seed: int, fault: Fault) -> None:
    """SIGTERM while 3,000 frames/s come, again and again: exit 0 in time, the store at a border, the tape ahead."""
    chance = random.Random(seed)
    with World(tmp_path, source="generated", settings=["pipeline.durable_after_s=0.3"]) as world:
        events = 0
        for life in range(4):
            run = world.start("run", log=f"run-{life}.log")
            until(lambda: is_run_by(world, run.pid), "it runs")  # noqa: B023 - asked at once
            burst, events = events, events + 6_000
            engine = world.engine(*USERS, "--count", str(events), "--burst", str(burst), rate=3_000)
            world.until_acked(burst + 500)
            time.sleep(chance.uniform(0, 0.3))
            assert engine.running(), "it must be under load"
            fault.strike()
            began = time.monotonic()
            assert run.term() == 0
            assert time.monotonic() - began < 20
            said = world.said()
            assert (said["unacked_batches"], run.logged("shutdown_timeout")) == (0, [])
            assert world.status()["taped"] >= said["acked"] > burst
            engine.signal(signal.SIGTERM)
            engine.result()
            verdict = world.judge("--up-to", str(said["acked"]))
            assert verdict["ok"], verdict
        fault.heals(world)
        run = world.start("run")
        world.engine(*USERS, "--count", str(events)).result()
        fault.closes(world, events)
        assert world.status()["holes"] == []
        assert run.term() == 0
