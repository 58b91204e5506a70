"""The database is stopped under load and comes back: nothing lost, nothing twice. Worse faults are in tests/fault."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from bench.world import Process, World, until
from tests.cassandra_node import Node
from tests.stores import StoreUnderTest

pytestmark = [pytest.mark.cassandra, pytest.mark.timeout(300)]

RATE = 500


def _stop(node: Node) -> None:
    node.stop()
    node.start()


def _kill(node: Node) -> None:
    node.kill()
    node.start()


@pytest.mark.parametrize("fault", [_stop, _kill], ids=["SIGTERM", "SIGKILL"])
def test_database_away_under_load(tmp_path: Path, fault: Callable[[Node], None]) -> None:
    with Node() as node:
        under_test = StoreUnderTest(node)
        settings = ["pipeline.durable_after_s=4", "store.cassandra.request_timeout_s=2"]
        with World(
            tmp_path, source="generated", settings=settings, store=under_test.settings, judged=under_test.judged
        ) as world:
            under_test.prepare(world)
            run = world.start("run")
            until(partial(_runs, world, run), "it runs")
            engine = world.engine("--users", "100", rate=RATE)
            until(lambda: world.said().get("durable", 0) > 0, "something is durable", 60)
            fault(node)
            back_at = int(world.said()["acked"])
            until(lambda: int(world.said()["acked"]) > back_at + RATE, "it settles again by itself", 90)
            durable = int(world.said()["durable"])
            until(lambda: int(world.said()["durable"]) > durable, "durable moves again", 60)
            engine.signal(15)
            last = engine.result()["last_sequence"]
            world.until_acked(last, 120)
            assert [line["reason"] for line in run.logged("start_over")], "memory is not trusted after an outage"
            assert run.term() == 0
            verdict = world.judge()
            assert verdict["ok"], verdict
            assert verdict["events"] == last


def test_sigterm_while_the_database_is_away_ends_in_time(tmp_path: Path) -> None:
    with Node() as node:
        under_test = StoreUnderTest(node)
        settings = ["pipeline.shutdown_timeout_s=3", "store.cassandra.request_timeout_s=2"]
        with World(
            tmp_path, source="generated", settings=settings, store=under_test.settings, judged=under_test.judged
        ) as world:
            under_test.prepare(world)
            run = world.start("run")
            until(partial(_runs, world, run), "it runs")
            engine = world.engine("--users", "100", "--count", "4000", rate=RATE)
            world.until_acked(500)
            node.kill()
            assert engine.result()["last_sequence"] == 4000
            until(lambda: world.verb("tape", "info")["sessions"][0]["head"] == 4000, "recording went on")
            began = time.monotonic()
            assert run.term() == 0
            assert time.monotonic() - began < 15
            node.start()
            run = world.start("run", log="again.log")
            world.until_acked(4000)
            assert run.term() == 0
            verdict = world.judge()
            assert verdict["ok"], verdict


def _runs(world: World, process: Process) -> bool:
    return world.said().get("pid") == process.pid
