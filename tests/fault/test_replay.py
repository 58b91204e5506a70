"""Faults that replay heals, each caused for real: an engine or its past in a process of its own, a sidecar in another.

Each test ends with `closed`: the store equals the journal by the independent judge, nothing is in it twice, and
settlement goes on after the healing.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.counts import lost_and_doubled
from bench.world import ROOT, Process, World, free_port, until
from tests.fault.kit import Fault


class Past(World):
    """A world in which somebody serves the past; what he lies stands in a file."""

    def __init__(self, folder: Path, *settings: str, timeout_s: float = 0.5, **other: Any) -> None:
        self.replay = f"tcp://127.0.0.1:{free_port()}"
        self.faults = folder / "replay-faults"
        asked = [
            f"replay.endpoint={self.replay}",
            f"replay.timeout_s={timeout_s}",
            "replay.retry_backoff_max_s=0.5",
            *settings,
        ]
        super().__init__(folder, source="generated", settings=asked, **other)

    def publish(self, *arguments: str, rate: float | None = None, served: bool = True) -> Process:
        """Start an engine that serves its own past, and stays so that it can."""
        past = ["--replay", self.replay, "--replay-faults", str(self.faults)] if served else []
        return self.engine("--linger-s", "600", *past, *arguments, rate=rate)

    def serve(self) -> Process:
        """Serve the journal without its engine."""
        command = [sys.executable, str(ROOT / "bench" / "past.py"), "--journal", str(self.journal)]
        command += ["--endpoint", self.replay, "--faults", str(self.faults)]
        return self._start(command, self.folder / "past.log")

    def lie(self, fault: str) -> None:
        draft = self.faults.with_suffix(".new")
        draft.write_text(fault)
        draft.replace(self.faults)

    def heal(self) -> None:
        self.faults.unlink()

    def recorded(self, tape: str = "tape.db") -> dict[str, Any]:
        """Read what the recorder says of replay, which is quicker than `status`."""
        try:
            said: dict[str, Any] = json.loads((self.folder / f"{tape}.recorded").read_text())
        except (OSError, ValueError):
            return {}
        return said.get("replay") or {}

    def status_when(self, true: Callable[[Any], Any], what: str, tape: str = "tape.db") -> Any:
        return until(lambda: (said := self.status(tape)) and true(said) and said, what, 40)


def attempts(said: Any) -> int:
    """Count the conversations in a row that brought nothing, by what status says."""
    return int((said["replay"] or {}).get("attempts", 0))


def published(world: World) -> int:
    """Give the last sequence that the engine's journal holds; it is flushed once a second, now and then mid-line."""
    lines = world.journal.read_text().splitlines(keepends=True) if world.journal.exists() else []
    return max((int(json.loads(line)["seq"]) for line in lines if line.endswith("\n")), default=0)


def closed(
    fault: Fault,
    world: Past,
    *running: Process,
    last: int,
    struck: int,
    gaps: Sequence[str] = (),
    tape: str = "tape.db",
) -> None:
    """Assert the three things that every fault must end with; what stood in the way was taken out of it just now."""
    fault.strike(struck)
    healed = time.monotonic()
    # 1. Progress: all that was published is settled, nothing is missing and nothing halted.
    world.until_acked(last, 40, tape=tape)
    fault.recovered_s = time.monotonic() - healed
    said = world.status_when(lambda said: said["state"] == "running", "it runs", tape)
    assert (said["halted"], said["holes"], said["sessions"]) == (None, [], 1)
    for process in running:
        assert process.term() == 0
    # 2. The store equals the journal.
    verdict = world.judge(*(part for gap in gaps for part in ("--accepted-gaps", gap)))
    assert verdict["ok"], verdict
    # 3. Nothing lost but what was given up, nothing twice: by the rows and versions alone.
    given_up = sum(int(to) - int(first) + 1 for first, to in (gap.split("-") for gap in gaps))
    fault.lost, fault.doubled = lost_and_doubled(world.judged, last)
    assert (fault.lost, fault.doubled) == (given_up, 0)


def test_f01_late_join(tmp_path: Path, fault: Fault) -> None:
    """The sidecar starts when the engine is 1,500 events on: it fetches what it missed while live frames come."""
    with Past(tmp_path) as world:
        world.publish("--count", "6000", "--wait-subscribers", "0", rate=2000)
        until(lambda: published(world) > 1500, "the engine is far on")
        run = world.start("run")
        closed(fault, world, run, last=6000, struck=1)
        assert run.logged("replay_filled")[0]["frames"] > 1000


def test_f01_late_join_of_an_engine_that_has_fallen_silent(tmp_path: Path, fault: Fault) -> None:
    """All was said before the sidecar started, and nothing more comes: it asks without being told of a hole."""
    with Past(tmp_path, "engine.silence_s=1.0") as world:
        world.publish("--count", "3000", "--wait-subscribers", "0")
        until(lambda: published(world) == 3000, "all is said")
        run = world.start("run")
        world.until_acked(3000)
        said = world.status_when(lambda said: said["silent_since_us"], "the silence shows")
        assert said["replay"]["filled_total"] == 3000
        closed(fault, world, run, last=3000, struck=1)
        assert len(run.logged("engine_silent")) == 1


def test_f01_late_join_of_a_new_host_asks_only_for_what_is_not_durable(tmp_path: Path, fault: Fault) -> None:
    """A new host with an empty tape beside a stream that is far on: what is durable is not asked for."""
    with Past(tmp_path, "pipeline.durable_after_s=0.5") as world:
        world.publish("--count", "4000", rate=1000)
        run = world.start("run")
        until(lambda: world.said().get("durable", 0) >= 1000, "much is durable")
        assert run.term() == 0
        durable = world.said()["durable"]
        until(lambda: published(world) > durable + 1000, "it goes on without a sidecar")
        run = world.start("run", tape="new.db")
        closed(fault, world, run, last=4000, struck=1, tape="new.db")
        assert 0 < world.recorded("new.db")["filled_total"] <= 4000 - durable


def test_f03_burst_beyond_the_high_water_mark(tmp_path: Path, fault: Fault) -> None:
    """30,000 frames at once against a mark of 200: what both sockets dropped is fetched, the last ones too."""
    small = ["engine.receive_hwm_frames=200", "engine.receive_buffer_bytes=4096", "engine.silence_s=1.0"]
    with Past(tmp_path, *small) as world:
        run = world.start("run")
        until(lambda: world.recorded().get("state"), "it records")
        world.publish("--count", "30000", "--hwm", "500")
        closed(fault, world, run, last=30000, struck=1)
        assert sum(line["frames"] for line in run.logged("replay_filled")) > 500


def test_f04_last_frames_dropped(tmp_path: Path, fault: Fault) -> None:
    """The last five frames never arrive; a heartbeat says that they were published."""
    with Past(tmp_path) as world:
        run = world.start("run")
        until(lambda: world.recorded().get("state"), "it records")
        dropped = [part for sequence in range(996, 1001) for part in ("--withhold", str(sequence))]
        world.publish("--count", "1000", "--heartbeat-s", "0.2", *dropped)
        closed(fault, world, run, last=1000, struck=len(dropped) // 2)
        assert world.recorded()["filled_total"] == 5


def test_f04_last_frames_dropped_and_nothing_follows(tmp_path: Path, fault: Fault) -> None:
    """The last five frames never arrive, and no heartbeat says so: the engine's silence does."""
    with Past(tmp_path, "engine.silence_s=1.0") as world:
        run = world.start("run")
        until(lambda: world.recorded().get("conversations_total") == 1, "what was there at the start is asked for")
        dropped = [part for sequence in range(996, 1001) for part in ("--withhold", str(sequence))]
        world.publish("--count", "1000", *dropped)
        closed(fault, world, run, last=1000, struck=len(dropped) // 2)
        assert world.recorded()["filled_total"] == 5


def test_f10_reordered_frames(tmp_path: Path, fault: Fault) -> None:
    """Neighbours change places, and some frames come 250 events later."""
    with Past(tmp_path) as world:
        run = world.start("run")
        swapped = [part for sequence in range(100, 2000, 50) for part in ("--swap", str(sequence))]
        late = [
            part for sequence in range(510, 2000, 300) for part in ("--withhold-until", f"{sequence}:{sequence + 250}")
        ]
        world.publish("--count", "3000", *swapped, *late, rate=1000)
        closed(fault, world, run, last=3000, struck=(len(swapped) + len(late)) // 2)


@pytest.mark.parametrize("on_gap", ["halt", "record"])
def test_f11_router_dead(tmp_path: Path, fault: Fault, on_gap: str) -> None:
    """Nobody answers: the hole halts settlement, or waits, recording goes on; then the past is served."""
    with Past(tmp_path, f"stream.on_gap={on_gap}", "stream.gap_after_s=0.5") as world:
        run = world.start("run")
        world.publish("--count", "2000", "--withhold", "400", "--withhold", "401", served=False)
        said = world.status_when(lambda said: said["halted"] and attempts(said) > 2, "it stands, and says so")
        assert (said["halted"]["code"], said["halted"]["sequence"]) == ("GAP", 400)  # a dead server has not said "gone"
        assert world.replay in said["halted"]["reason"]
        assert (said["taped"], said["holes"], said["acked"]) == (2000, [[400, 401]], 399)
        assert said["replay"]["state"] == "silent"
        world.serve()
        closed(fault, world, run, last=2000, struck=2)
        assert run.logged("replay_answers")


def test_f12_router_slow(tmp_path: Path, fault: Fault) -> None:
    """Answers come after the time to wait for them, then `busy`, then slowly."""
    with Past(tmp_path, "stream.gap_after_s=30", timeout_s=0.3) as world:
        world.lie("slow 0.5")
        run = world.start("run")
        engine = world.publish("--withhold", "400", rate=500)
        said = world.status_when(lambda said: attempts(said) > 2 and said["taped"] > 600, "it is too slow")
        assert (said["state"], said["holes"], said["acked"]) == ("running", [[400, 400]], 399)
        world.lie("busy 50")
        world.status_when(lambda said: said["replay"]["counts"].get("answers", 0) > 5, "it is told to come again")
        world.lie("slow 0.1")
        world.until_acked(said["taped"])
        engine.signal(signal.SIGTERM)
        closed(fault, world, run, last=engine.result()["last_sequence"], struck=1)


LIES = (
    "wrong-session", "wrong-range", "too-many", "oversized", "garbage", "garbage-frame", "wrong-types", "other-past",
    "huge", "error", "far-ahead",
)  # fmt: skip


def test_f13_router_lies(tmp_path: Path, fault: Fault) -> None:
    """Eleven lies one after the other, of session, range, size, type and content, while live frames come."""
    with Past(tmp_path, "stream.gap_after_s=60", "replay.retry_backoff_max_s=0.2", timeout_s=0.2) as world:
        world.lie("garbage")
        world.serve()
        run = world.start("run")
        until(lambda: world.recorded().get("counts"), "it has heard garbage")
        withheld = [part for sequence in range(400, 420) for part in ("--withhold", str(sequence))]
        engine = world.publish(*withheld, rate=500, served=False)
        said = world.status_when(lambda said: said["acked"] == 399 and said["taped"] > 450, "it stands before the hole")
        for lie in LIES[:-1]:
            world.lie(lie)
            time.sleep(0.3)  # an answer to the lie before may still be on its way
            heard = world.recorded()["conversations_total"]
            until(lambda heard=heard: world.recorded()["conversations_total"] > heard + 1, f"it hears {lie}", 30)  # type: ignore[misc]
            assert (world.said()["acked"], world.recorded()["filled_total"]) == (399, 0), lie
        said = world.status()
        assert (said["acked"], said["holes"], said["sessions"]) == (399, [[400, 419]], 1)
        counts = said["replay"]["counts"]
        assert counts["refused"] > 5
        assert counts["garbage"] > 1
        assert counts["oversized"] > 0
        world.lie(LIES[-1])  # its frames are true, its end is not
        said = world.status_when(lambda said: said["acked"] > 450, "the hole is filled")
        assert said["holes"] == []  # nobody's word for 2^62 frames is on the tape
        world.heal()
        engine.signal(signal.SIGTERM)
        closed(fault, world, run, last=engine.result()["last_sequence"], struck=len(LIES))


@pytest.mark.parametrize("lie", ["wrong-range", "far-ahead"])
def test_f13_router_lies_to_an_empty_tape(tmp_path: Path, fault: Fault, lie: str) -> None:
    """A tape that knows nothing yet is lied to; nothing of it is kept."""
    with Past(tmp_path, timeout_s=0.2) as world:
        world.lie(lie)
        world.publish("--count", "2500", "--wait-subscribers", "0", "--session", "7")
        until(lambda: published(world) == 2500, "all is said")
        run = world.start("run")
        until(lambda: world.recorded().get("attempts", 0) > 2, "it has heard the lie")
        if lie != "far-ahead":
            assert world.status()["taped"] == 0
        world.heal()
        closed(fault, world, run, last=2500, struck=1)


def test_f14_stale_answer(tmp_path: Path, fault: Fault) -> None:
    """Answers to earlier questions come first, with forged frames in them."""
    with Past(tmp_path) as world:
        world.lie("stale")  # with forged frames: who takes them is found by the judge
        run = world.start("run")
        withheld = [part for sequence in range(400, 420) for part in ("--withhold", str(sequence))]
        world.publish("--count", "2000", *withheld)
        closed(fault, world, run, last=2000, struck=len(withheld) // 2)
        assert world.recorded()["counts"]["stale"] > 2


def test_f15_history_gone_halts_until_it_is_accepted(tmp_path: Path, fault: Fault) -> None:
    """The server keeps no more than the newer part of the hole: the rest is accepted by an operator."""
    with Past(tmp_path, "stream.gap_after_s=60") as world:
        world.lie("gone 501")
        run = world.start("run")
        withheld = [part for sequence in range(480, 520) for part in ("--withhold", str(sequence))]
        world.publish("--count", "2000", *withheld)
        said = world.status_when(
            lambda said: said["halted"] and said["holes"] == [[480, 500]], "what is there is filled"
        )
        assert "gone" in said["halted"]["reason"]  # it did not wait for gap_after_s
        assert "gap accept 480 500" in said["halted"]["next_step"]
        world.verb("gap", "accept", "480", "500", "--reason", "gone", status=0)
        closed(fault, world, run, last=2000, struck=21, gaps=["480-500"])


def test_f15_history_gone_is_recorded_by_a_settler_in_a_process_of_its_own(tmp_path: Path, fault: Fault) -> None:
    """The same with `on_gap = record`, which a settler in another process has to learn of."""
    with Past(tmp_path, "stream.on_gap=record", "stream.gap_after_s=1") as world:
        world.lie("gone 501")
        world.publish("--count", "2000", "--wait-subscribers", "0")
        until(lambda: published(world) == 2000, "all is said")
        record = world.start("record")
        settle = world.start("settle")
        closed(fault, world, settle, record, last=2000, struck=500, gaps=["1-500"])
        assert "says that 1 to 500 is gone" in settle.logged("gap_recorded")[0]["reason"]


def test_f32_two_sidecars_with_different_holes_fill_from_each_other(tmp_path: Path, fault: Fault) -> None:
    """Each serves the other its tape: one missed the beginning, the other the middle."""
    one, other = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    with Past(tmp_path, "stream.gap_after_s=60") as world:

        def start(verb: str, tape: str, served: str, asked: str) -> Process:
            more = [f"replay_server.endpoint={served}", f"replay.endpoint={asked}"]
            return world.start(verb, *more, tape=tape, log=f"{tape}.log")

        first = start("run", "one.db", one, other)
        engine = world.publish("--count", "6000", "--pause-file", str(world.pause_file), rate=1500, served=False)
        until(lambda: world.said("one.db").get("acked", 0) > 1000, "one has the beginning")
        second = start("record", "other.db", other, one)  # too late for the beginning
        until(lambda: world.recorded("other.db").get("filled_total", 0) > 1000, "the other has it from the one")
        first.kill()  # and misses some of the middle
        time.sleep(0.7)
        first = start("run", "one.db", one, other)
        closed(fault, world, first, last=6000, struck=2, tape="one.db")
        assert world.recorded("one.db")["filled_total"] > 100
        assert second.term() == 0
        engine.kill()
