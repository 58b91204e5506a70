"""How a fault is counted and closed: every fault test ends in `Fault.closes`, with the same three assertions.

- The store equals the journal, by bench/judge.py, which shares no code with the sidecar.
- Nothing twice and nothing lost: each published sequence has one row, each account counts as many events as touched it.
  Counted here from the store's rows alone, so that the figures are there even when the judge only says "not equal".
- Progress after healing: `acked` moves again, up to events that were published later.

def test_f21_full_disk(world: World, fault: Fault) -> None:
    ...                                    # until it is struck
    fault.strike()
    ...                                    # what must hold while it lasts
    fault.heals(world)
    fault.closes(world, last_sequence)
"""

from __future__ import annotations

import json
import signal
import time
from contextlib import closing
from typing import Any

from bench.counts import lost_and_doubled
from bench.world import Process, World, until
from sidecar.errors import TapeMissingError
from sidecar.tape import TapeReader

RATE = 500  # events a second, of a load


class Fault:
    """What one test injects, and what came of it: the line of the table that is printed at the end of a run."""

    def __init__(self) -> None:
        self.injected = 0
        self.lost: int | None = None  # None: the test ended before it was counted
        self.doubled: int | None = None
        self.recovered_s: float | None = None
        self._healed: tuple[float, int] | None = None

    def strike(self, times: int = 1) -> None:
        """Count what is injected now."""
        self.injected += times

    def heals(self, world: World, tape: str = "tape.db") -> None:
        """Say that what stands in the way is taken out of it next; from here on the seconds to recover count."""
        stood = int(world.status(tape)["acked"])  # of what the settler and the store say the higher one
        self._healed = time.monotonic(), stood

    def recovers(self, world: World, tape: str = "tape.db", timeout_s: float = 60.0) -> None:
        """Wait until settlement moves beyond where it stood when the fault was healed."""
        assert self._healed is not None, "a fault that was never healed can't be recovered from: call heals()"
        at, stood = self._healed
        if self.recovered_s is None:
            until(lambda: int(world.said(tape).get("acked", 0)) > stood, f"acked moves on from {stood}", timeout_s)
            self.recovered_s = time.monotonic() - at

    def closes(
        self, world: World, last_sequence: int, *judging: str, tape: str = "tape.db", gaps: int = 0,
        timeout_s: float = 90.0, stream: str = "main",
    ) -> dict[str, Any]:  # fmt: skip
        """Close the fault: progress, store equals journal, nothing lost and nothing twice; give the judge's verdict.

        `gaps` is how many sequences were given up on purpose; `judging` are further arguments of the judge.
        """
        assert self.injected, "nothing was injected: call strike()"
        self.recovers(world, tape, timeout_s)
        assert self._healed is not None
        assert last_sequence > self._healed[1], "nothing was published for progress to be made of"
        world.until_acked(last_sequence, timeout_s, tape=tape)
        self.lost, self.doubled = lost_and_doubled(world.judged, last_sequence, stream=stream)
        verdict = world.judge(*judging)
        assert verdict["ok"], verdict
        assert (self.lost, self.doubled) == (gaps, 0)
        return verdict


def under_load(world: World, *settings: str, rate: int = RATE) -> tuple[Process, Process]:
    """Start a sidecar and an engine; return when something is durable."""
    run = world.start("run", *settings)
    until(lambda: is_run_by(world, run.pid), "it runs")
    engine = world.engine("--users", "100", rate=rate)
    until(lambda: world.said().get("durable", 0) > 0, "something is durable")
    return run, engine


def closes_load(world: World, fault: Fault, run: Process, engine: Process, timeout_s: float = 90.0) -> None:
    """End the load some events after recovery, and close the fault."""
    fault.recovers(world, timeout_s=timeout_s)
    durable = int(world.said()["durable"])
    until(lambda: int(world.said()["durable"]) > durable, "durable moves again", timeout_s)
    engine.signal(signal.SIGTERM)
    fault.closes(world, engine.result()["last_sequence"], timeout_s=timeout_s)
    assert run.term() == 0


def taped(world: World, tape: str = "tape.db") -> int:
    """Give the head of the tape's newest session."""
    try:
        with closing(TapeReader(world.folder / tape)) as reader:  # in here: a process for each look would take a core
            sessions = reader.sessions()
            return reader.runs(sessions[-1].session).head if sessions else 0
    except TapeMissingError:
        return 0


def is_run_by(world: World, pid: int, tape: str = "tape.db") -> bool:
    """Say whether this process is the one that settles."""
    return world.said(tape).get("pid") == pid


def journal_events(world: World) -> list[dict[str, Any]]:
    """Give what the engine has published."""
    return [json.loads(line)["event"] for line in world.journal.read_text().splitlines()]
