"""An engine that dies, begins anew, loses its journal, goes back or contradicts itself, and what an operator does.

Real processes, killed for real. Each test ends with the same three: the store equals the journal by the independent
judge (bench/judge.py), which also sees what stands twice, and settlement makes progress after healing.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.counts import lost_and_doubled
from bench.world import ROOT, Process, World, until
from tests.fault.kit import Fault
from tests.stores import MOSTLY_SQLITE, StoreUnderTest

QUICKLY_DURABLE = ["pipeline.durable_after_s=0.5"]


def _closes(fault: Fault, world: World, run: Process, before: int, *judged: Sequence[str]) -> None:
    """The three assertions: equal to the journal (each stream by its own judgement), nothing twice, progress."""
    fault.strike()
    assert world.said()["acked"] > before, "no progress after healing"
    assert world.verb("reconcile", status=0)["ok"]  # the operator's own proof says so, too
    assert run.term() == 0
    asked = [{"--stream": "main", **dict(zip(words[::2], words[1::2], strict=True))} for words in judged]
    fault.lost = fault.doubled = 0
    for one in asked:
        others = [word for other in asked if other is not one for word in ("--also-stream", other["--stream"])]
        verdict = world.judge(*(word for pair in one.items() for word in pair), *others)
        assert verdict["ok"], verdict
        assert verdict["events"] > 0
        journal = Path(one.get("--journal", world.journal)).read_text().splitlines()
        last = min(max(int(json.loads(line)["seq"]) for line in journal), int(one.get("--up-to", 2**63)))
        first = int(one.get("--first-sequence", 1))
        lost, doubled = lost_and_doubled(world.judged, last, first, one["--stream"])
        fault.lost, fault.doubled = fault.lost + lost, fault.doubled + doubled
    assert (fault.lost, fault.doubled) == (0, 0)


def _halts(world: World, code: str = "SESSION_CHANGED") -> dict[str, Any]:
    halted: dict[str, Any] = world.until_halted(f"{code}: {world.said()}", code)["halted"]
    return halted


def _until_stream(fault: Fault, world: World, run: Process, stream: str, sequence: int) -> None:
    def there() -> bool:
        said = world.said()
        return (said.get("pid"), said.get("stream")) == (run.pid, stream) and said.get("acked", 0) >= sequence

    _recovers(fault, there, f"{stream} acked {sequence}: {world.said()}")


def _recovers(fault: Fault, there: Callable[[], bool], what: str) -> None:
    """Wait for progress right after the healing; the seconds count."""
    healed = time.monotonic()
    until(there, what, 60)
    if fault.recovered_s is None:
        fault.recovered_s = time.monotonic() - healed


def _other(folder: Path) -> tuple[Path, list[str]]:
    """A second incarnation of the engine: other trades, in a journal of its own."""
    arguments = ["--seed", "99", "--no-deposits", "--first-trade-id", "5000000"]
    return folder / "other.jsonl", arguments


def test_f05_engine_killed_and_back(tmp_path: Path, fault: Fault) -> None:
    """Killed in the middle; it comes back with its journal and publishes from there on, what was lost with it too."""
    with World(tmp_path, source="generated", settings=QUICKLY_DURABLE) as world:
        run = world.start("run")
        engine = world.engine("--count", "4000", rate=2_000, journal=tmp_path / "killed.jsonl")
        world.until_acked(800)
        engine.kill()
        stood = world.said()["acked"]
        world.engine("--count", "4000").result()
        _recovers(fault, lambda: world.said()["acked"] == 4000, "all of it is acknowledged")
        assert world.status()["state"] == "running"
        assert world.status()["sessions"] == 1
        _closes(fault, world, run, stood, [])


@pytest.mark.parametrize("under_test", MOSTLY_SQLITE, indirect=True)
@pytest.mark.parametrize("keyed", [False, True], ids=["without the key", "with the key"])
def test_f06_engine_back_with_empty_journal(
    tmp_path: Path, fault: Fault, under_test: StoreUnderTest, keyed: bool
) -> None:
    """It comes back without its journal and numbers other events from 1 on; an operator begins the next stream."""
    with World(
        tmp_path, source="generated", settings=QUICKLY_DURABLE, store=under_test.settings, judged=under_test.judged
    ) as world:
        under_test.prepare(world)
        other, another_engine = _other(tmp_path)
        sessions = (["--session", "70"], ["--session", "71"]) if keyed else ([], [])
        run = world.start("run")
        world.engine("--count", "1500", *sessions[0]).result()
        world.until_acked(1500)
        assert world.verb("stream", "next", "second", status=1)["error"] == "DecisionRefusedError"
        world.engine("--count", "1000", *another_engine, *sessions[1], journal=other).result()
        halted = _halts(world)
        assert halted["sequence"] == 1501
        assert "sidecar stream next" in halted["next_step"]
        assert world.said()["acked"] == 1500
        assert world.verb("stream", "next", "no/slash", status=2)["error"] == "UsageError"
        made = world.verb("stream", "next", "second", status=0)
        assert (made["kind"], made["last_sequence"], made["body"]) == ("next", 1500, {"stream": "second"})
        assert world.verb("stream", "next", "second", status=0)["number"] == made["number"]  # said again
        _until_stream(fault, world, run, "second", 1000)
        said = world.status()  # asked with the configuration as it was
        assert (said["stream"], said["state"], said["session"], said["holes"]) == ("second", "running", 2, [])
        assert world.verb("stream", "next", "second", status=0)["number"] == made["number"]
        run.kill()
        # With the configuration as it was a start follows, too; and it may be changed.
        run = world.start("run")
        _until_stream(fault, world, run, "second", 1000)
        assert run.term() == 0
        run = world.start("run", "stream.name=second")
        world.engine("--count", "1200", *another_engine, *sessions[1], journal=other).result()
        _until_stream(fault, world, run, "second", 1200)
        _closes(fault, world, run, 1000, [], ["--stream", "second", "--journal", str(other)])


def test_f07_sequence_regression_midway(tmp_path: Path, fault: Fault) -> None:
    """It goes back to an earlier number and on from there, with other content."""
    with World(tmp_path, source="generated", settings=QUICKLY_DURABLE) as world:
        other, another_engine = _other(tmp_path)
        run = world.start("run")
        world.engine("--count", "2000").result()
        world.until_acked(2000)
        goes_back = ["--count", "800", "--first-sequence", "1700", *another_engine]
        world.engine(*goes_back, journal=other).result()
        assert _halts(world)["sequence"] == 2001
        world.verb("stream", "next", "second", status=0)
        _until_stream(fault, world, run, "second", 2499)
        assert world.verb("gap", "list")["holes"] == []
        _closes(
            fault, world, run, 2000, [], ["--stream", "second", "--journal", str(other), "--first-sequence", "1700"]
        )  # fmt: skip


def test_f08_same_sequence_other_payload(tmp_path: Path, fault: Fault) -> None:
    """One number twice, with other content; which one counts is the operator's to say."""
    with World(tmp_path, source="generated", settings=QUICKLY_DURABLE) as world:
        run = world.start("run")
        world.engine("--count", "2000", "--contradict", "900").result()
        assert _halts(world)["sequence"] == 901
        world.until_acked(900)
        world.verb("stream", "next", "second", "--first-sequence", "901", status=0)
        _until_stream(fault, world, run, "second", 2000)
        _closes(fault, world, run, 900, ["--up-to", "900"], ["--stream", "second", "--first-sequence", "901"])


def test_f36_symbol_added_between_lives(tmp_path: Path, fault: Fault) -> None:
    """The engine trades a symbol that the configuration lacks; it is added, the process killed, started again."""
    with World(tmp_path, source="generated", symbols=4, settings=QUICKLY_DURABLE) as world:
        with_it, world.toml = world.toml, ROOT / "bench" / "binance.toml"
        run = world.start("run")
        engine = world.engine("--count", "3000", rate=1_500)
        halted = world.until_halted("it halts at the symbol it doesn't know")["halted"]
        assert halted["code"] in ("UNKNOWN_SYMBOL", "UNKNOWN_ASSET")
        stood = halted["sequence"] - 1
        world.until_acked(stood)
        assert world.said()["acked"] == stood
        run.kill()
        world.toml = with_it
        run = world.start("run")
        until(lambda: world.said().get("acked", 0) > stood, "it goes on")
        run.signal(signal.SIGKILL)
        assert run.wait() != 0
        run = world.start("run")
        engine.result()
        # What was published while nothing listened is missing: the engine repeats it from its journal.
        world.engine("--count", "3000").result()
        _recovers(fault, lambda: world.said()["acked"] == 3000, "all of it is acknowledged")
        _closes(fault, world, run, stood, [])


def test_a_session_of_another_tape_is_not_mistaken_for_the_streams(tmp_path: Path, fault: Fault) -> None:
    """A lost tape after the engine began anew: the new tape's first session is the second stream's."""
    with World(tmp_path, source="generated", settings=QUICKLY_DURABLE) as world:
        other, another_engine = _other(tmp_path)
        run = world.start("run")
        world.engine("--count", "1500").result()
        world.until_acked(1500)
        world.engine("--count", "1000", *another_engine, journal=other).result()
        _halts(world)
        world.verb("stream", "next", "second", status=0)
        _until_stream(fault, world, run, "second", 1000)
        until(lambda: world.said()["durable"] == 1000, "all of it is durable")
        assert run.term() == 0
        for name in ("tape.db", "tape.db.settled"):
            (tmp_path / name).unlink()
        run = world.start("run")
        world.engine("--count", "1300", *another_engine, journal=other).result()
        _until_stream(fault, world, run, "second", 1300)
        assert world.said()["session"] == 1
        assert json.loads((tmp_path / "tape.db.settled").read_text())["foreign_to"] == 1000
        _closes(fault, world, run, 1000, [], ["--stream", "second", "--journal", str(other)])


def test_a_tape_that_holds_another_session_goes_on_as_a_new_stream(tmp_path: Path, fault: Fault) -> None:
    """A new host beside a settled stream hears an engine that began anew: its own session was never the stream's."""
    with World(tmp_path, source="generated", settings=[*QUICKLY_DURABLE, "tape.retention_s=0"]) as world:
        other, another_engine = _other(tmp_path)
        run = world.start("run")
        world.engine("--count", "1500").result()
        until(lambda: world.said().get("durable") == 1500, "all of it is durable")
        assert run.term() == 0
        for name in ("tape.db", "tape.db.settled"):
            (tmp_path / name).unlink()
        run = world.start("run")
        world.engine("--count", "1800", *another_engine, journal=other).result()
        _halts(world)
        assert world.said()["deletable"] == 0  # none of it is settled
        world.verb("stream", "next", "second", status=0)
        _until_stream(fault, world, run, "second", 1800)
        _closes(fault, world, run, 1500, [], ["--stream", "second", "--journal", str(other)])
