"""The host's clock jumps, while everything runs and between two lives: rows, positions and stamps do not care."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from bench.world import World, until
from tests.fault.kit import Fault, is_run_by
from tests.fault.tools import Clock
from tests.stores import MOSTLY_SQLITE, StoreUnderTest

STEPS = ("-2h", "+2d", "-2h", "+0")


@pytest.mark.needs("faketime")
@pytest.mark.parametrize("under_test", MOSTLY_SQLITE, indirect=True)
def test_f33_clock_two_hours_back_and_two_days_ahead(tmp_path: Path, fault: Fault, under_test: StoreUnderTest) -> None:
    """The clock is set two hours back and two days ahead while frames with true times come, with restarts there; the
    stream itself was begun two days ahead."""
    clock = Clock(tmp_path / "offset")
    settings = ["pipeline.durable_after_s=0.3", "tape.retention_s=0"]
    with World(
        tmp_path, source="generated", settings=settings, store=under_test.settings, judged=under_test.judged
    ) as world:
        under_test.prepare(world)
        clock.set("+2d")
        record = world.start("record", under=clock.under)
        settle = world.start("settle", under=clock.under)
        engine = world.engine("--users", "50", "--stamp", rate=1_000)
        for number, offset in enumerate(STEPS):
            world.until_acked(int(world.said().get("acked", 0)) + 400)
            if number == len(STEPS) - 1:
                fault.heals(world)
            clock.set(offset)
            fault.strike()
            world.until_acked(int(world.said()["acked"]) + 400)
            assert settle.term() == 0
            settle = world.start("settle", log=f"settle-{number}.log", under=clock.under)
            until(lambda: is_run_by(world, settle.pid), "it settles again")  # noqa: B023 - asked at once
        said = world.status()
        assert (said["halted"], said["sessions"], said["holes"]) == (None, 1, [])
        engine.signal(signal.SIGTERM)
        last = engine.result()["last_sequence"]
        fault.closes(world, last)
        assert [settle.term(), record.term()] == [0, 0]
