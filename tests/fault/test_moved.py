"""A stream moves to another host, by the steps of OPERATIONS.md ("Moving to another host"): nothing lost, none twice.

A host is here a tape of its own beside the same store. Real processes; each test ends with `Fault.closes`.
"""

from __future__ import annotations

import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.counts import lost_and_doubled
from bench.world import Process, World, free_port, until
from tests.fault.kit import Fault, is_run_by, taped
from tests.stores import MOSTLY_SQLITE, STORES, StoreUnderTest

OLD, NEW = "old.db", "new.db"
RATE = 800
USERS = ("--users", "50")
ON_EACH_STORE = pytest.mark.parametrize("under_test", STORES, indirect=True)


def _world(folder: Path, under_test: StoreUnderTest, durable_after_s: float = 0.5) -> World:
    settings = [f"pipeline.durable_after_s={durable_after_s}"]
    world = World(folder, source="generated", settings=settings, store=under_test.settings, judged=under_test.judged)
    under_test.prepare(world)
    return world


def _run(world: World, tape: str, life: int, *settings: str) -> Process:
    run = world.start("run", *settings, tape=tape, log=f"{tape}-{life}.log")
    until(partial(is_run_by, world, run.pid, tape), f"{tape} settles")
    return run


def _asks(endpoint: str) -> list[str]:
    return [f"replay.endpoint={endpoint}", "replay.retry_backoff_max_s=0.5"]


def _first_taped(world: World, tape: str) -> int:
    """Give the first sequence that a tape holds, 0 while it holds none."""
    sessions = world.verb("tape", "info", tape=tape).get("sessions")
    return int(sessions[0]["head"]) - int(sessions[0]["frames"]) + 1 if sessions else 0


def _ends(world: World, engine: Process, fault: Fault, tape: str, *judging: str, gaps: int = 0) -> Any:
    """Let the load go on a little, end it, and close the fault."""
    fault.recovers(world, tape)
    engine.signal(signal.SIGTERM)
    fault.closes(world, engine.result()["last_sequence"], *judging, tape=tape, gaps=gaps)
    said = world.status(tape)
    assert (said["state"], said["halted"], said["sessions"]) == ("running", None, 1)
    return said


@pytest.mark.fault("F01")
@pytest.mark.parametrize("under_test", MOSTLY_SQLITE, indirect=True)
def test_moved_while_the_old_host_serves_its_tape(tmp_path: Path, fault: Fault, under_test: StoreUnderTest) -> None:
    """Moved to a host with an empty tape, which the old one's replay server fills; then the old one is stopped."""
    served = f"tcp://127.0.0.1:{free_port()}"
    with _world(tmp_path, under_test, durable_after_s=2) as world:
        old = _run(world, OLD, 1, f"replay_server.endpoint={served}")
        engine = world.engine(*USERS, rate=RATE)
        until(lambda: world.said(OLD).get("durable", 0) > 0, "something is durable")
        new = _run(world, NEW, 1, *_asks(served))

        def has_all() -> bool:
            said = world.status(NEW)
            return said["state"] == "running" and not said["holes"] and said["acked"] >= world.said(OLD)["acked"] - RATE

        until(has_all, "the new host has what the old one has", 40)
        fault.heals(world, NEW)
        assert old.term() == 0
        fault.strike()
        assert new.logged("replay_filled")[0]["frames"] > 0
        assert _first_taped(world, NEW) > 1, "what is durable was not asked for"
        said = _ends(world, engine, fault, NEW)
        assert said["holes"] == []
        assert new.term() == 0


@pytest.mark.long
@pytest.mark.fault("F01")
@ON_EACH_STORE
def test_moved_to_a_host_that_stood_by(tmp_path: Path, fault: Fault, under_test: StoreUnderTest) -> None:
    """Nobody serves the past; a second host begins with an empty tape beside the first, which is killed later."""
    with _world(tmp_path, under_test) as world:
        old, engine = _far_on(world)
        new = _run(world, NEW, 1, "stream.gap_after_s=0.2")  # what it did not hear is settled, and soon durable
        first = int(until(lambda: _first_taped(world, NEW), "it hears the engine"))
        assert first > RATE
        world.until_acked(first, tape=NEW)
        until(lambda: world.said(OLD)["durable"] >= first, "all that it did not hear is durable")
        old.kill()
        fault.strike()
        fault.heals(world, NEW)
        said = _ends(world, engine, fault, NEW)
        assert (said["holes"], _first_taped(world, NEW)) == ([], first)
        assert [halt["code"] for halt in new.logged("halted")] in ([], ["GAP"])
        assert new.term() == 0


@pytest.mark.long
@pytest.mark.fault("F01")
@ON_EACH_STORE
def test_moved_when_nobody_has_the_past(tmp_path: Path, fault: Fault, under_test: StoreUnderTest) -> None:
    """The old host is gone with its disk; an empty tape begins at what is settled, what came meanwhile is given up."""
    with _world(tmp_path, under_test) as world:
        old, engine = _far_on(world)
        assert old.term() == 0  # its disk is lost with it
        fault.strike()
        run = _run(world, NEW, 1, "stream.gap_after_s=0.5")
        first, last = _what_nobody_has(world)
        fault.heals(world, NEW)
        world.verb("gap", "accept", str(first), str(last), "--reason", "the old host is gone", status=0, tape=NEW)
        given_up = last - first + 1
        said = _ends(world, engine, fault, NEW, "--accepted-gaps", f"{first}-{last}", gaps=given_up)
        assert said["holes"] == []
        assert run.term() == 0


@pytest.mark.long
@pytest.mark.fault("F01")
def test_moved_from_a_killed_host_when_nobody_has_the_past(tmp_path: Path, fault: Fault) -> None:
    """The same with SIGKILL: what was written beyond `acked` is given up, too, and named; balances are mended."""
    with _world(tmp_path, StoreUnderTest(None)) as world:
        old, engine = _far_on(world)
        old.kill()
        fault.strike()
        run = _run(world, NEW, 1, "stream.gap_after_s=0.5")
        first, last = _what_nobody_has(world)
        fault.heals(world, NEW)
        world.verb("gap", "accept", str(first), str(last), "--reason", "the old host is gone", status=0, tape=NEW)
        fault.recovers(world, NEW)
        engine.signal(signal.SIGTERM)
        world.until_acked(engine.result()["last_sequence"], tape=NEW)
        found = world.verb("reconcile", "--full", tape=NEW)["findings"]
        assert {each["code"] for each in found} <= {"EVENT_AGAINST_DECISION"}
        rows = {each["sequence"] for each in found if each["user_id"] is None}
        assert all(first <= sequence <= last for sequence in rows)
        world.verb("reconcile", "--fix", "--all-findings", "--yes", tape=NEW)
        verdict = world.judge("--accepted-gaps", f"{first}-{last}")
        assert verdict["balances_equal"] == verdict["balances"]
        assert verdict["difference_count"] == len(rows), "the rows stay, and stay reported"
        assert {difference["what"] for difference in verdict["differences"]} <= {"EXTRA_ROW"}
        assert run.term() == 0


@pytest.mark.long
@pytest.mark.fault("F06")
def test_moved_beside_an_engine_that_began_anew(tmp_path: Path, fault: Fault) -> None:
    """While the stream moved its engine lost its journal: what the new tape has of settled numbers is compared."""
    with _world(tmp_path, StoreUnderTest(None), durable_after_s=600) as world:
        old = _run(world, OLD, 1)
        world.engine(*USERS, "--count", "2000").result()
        world.until_acked(2_000, tape=OLD)
        assert old.term() == 0
        assert world.status(OLD)["durable"] == 0
        new = _run(world, NEW, 1, "pipeline.durable_after_s=0.5")
        fault.strike()
        other = tmp_path / "other.jsonl"
        other_past = ("--seed", "77", "--first-sequence", "1500", "--count", "1000")
        world.engine(*USERS, *other_past, journal=other).result()

        def is_told() -> bool:
            return (world.said(NEW).get("halted") or {}).get("code") == "SESSION_CHANGED"

        until(is_told, "the other past is told", 40)
        assert world.status(NEW)["acked"] == 2_000
        verdict = world.judge()
        assert verdict["ok"], verdict
        fault.lost, fault.doubled = lost_and_doubled(world.judged, 2_000)
        assert (fault.lost, fault.doubled) == (0, 0)
        assert new.term() == 0


def _what_nobody_has(world: World) -> tuple[int, int]:
    """Wait until settlement stands before it. What is settled and not yet durable is missed at first, too."""

    def stands() -> Any:
        said = world.status(NEW)
        return said if said["halted"] and said["halted"]["sequence"] == said["acked"] + 1 else None

    said = until(stands, "what nobody has is missed", 40)
    ((first, last),) = said["holes"]
    assert (said["halted"]["code"], said["halted"]["sequence"]) == ("GAP", first)
    assert first > RATE
    assert f"gap accept {first} {last}" in said["halted"]["next_step"]
    return first, last


def _far_on(world: World) -> tuple[Process, Process]:
    """Start a host and an engine; return when much is durable."""
    old = _run(world, OLD, 1)
    engine = world.engine(*USERS, rate=RATE)
    until(lambda: world.said(OLD).get("durable", 0) > RATE, "much is durable")
    return old, engine


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.fault("F01")
@ON_EACH_STORE
def test_hosts_in_turn_killed_at_random(tmp_path: Path, seed: int, fault: Fault, under_test: StoreUnderTest) -> None:
    """Two hosts take turns, each killed at random, before or after the other begins, with its tape or an empty one."""
    chance = random.Random(seed)
    served, past = f"tcp://127.0.0.1:{free_port()}", f"tcp://127.0.0.1:{free_port()}"
    with _world(tmp_path, under_test) as world:
        engine = world.engine(*USERS, "--linger-s", "600", "--replay", past, rate=RATE)
        here, there = OLD, NEW
        running = _run(world, here, 0, f"replay_server.endpoint={served}", *_asks(past))
        for turn in range(1, 13):
            acked = world.status(here)["acked"]
            time.sleep(chance.uniform(0.2, 1.5))
            overlaps = chance.random() < 0.5
            if not overlaps:
                running.kill()
                fault.strike()
            if chance.random() < 0.5:  # a host that was never here, or lost its disk
                for file in tmp_path.glob(f"{there}*"):
                    if not file.name.endswith(".log"):
                        file.unlink()
            # Who serves the past: the host before, while it is there; else the engine.
            asked = served if overlaps else past
            own = f"tcp://127.0.0.1:{free_port()}"
            coming = _run(world, there, turn, f"replay_server.endpoint={own}", *_asks(asked))
            if overlaps:
                time.sleep(chance.uniform(0.0, 1.0))
                running.kill()
                fault.strike()
                coming.kill()  # the host that it asked is gone: from here on it asks the engine
                fault.strike()
                time.sleep(chance.uniform(0.0, 0.5))
                coming = _run(world, there, turn, f"replay_server.endpoint={own}", *_asks(past))
            world.until_acked(acked + 1, tape=there)
            running, served, here, there = coming, own, there, here
        fault.heals(world, here)
        head = taped(world, here)
        until(lambda: taped(world, here) > head, "it records")
        # The engine serves the past only as long as it runs: what the last start missed is asked for before it ends.
        until(lambda: not world.status(here)["holes"], "what was missed is fetched")
        said = _ends(world, engine, fault, here)
        assert said["holes"] == []
        assert running.term() == 0
