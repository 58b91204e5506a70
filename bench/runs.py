"""The runs that every verb is made of: a tape is filled, a tape is settled, a stream is settled live.

Always real processes: the engine on its socket, `sidecar record|settle|run`, the store; each run in a folder and in
tables of its own. After a run the judge, which shares no code with the sidecar, compares the store with the engine's
journal: a figure for rows that are not right is worth nothing.
"""

from __future__ import annotations

import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from bench import acks, rows
from bench.engine import rules
from bench.places import Place
from bench.report import BenchError
from bench.watch import Watch
from bench.world import Process, World

STALL_S = 60.0  # nothing was recorded or acknowledged for so long: it will not go on by itself
STARTED_S = 60.0
# Else the hourly proof begins five minutes after the start, in the very process that is measured. `proofs` measures it.
NO_PROOF = "reconcile.interval_s=0"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the engine publishes: `mixed`, real Binance trades and then generated ones, between so many users."""

    trades: int
    users: int = 1_000
    seed: int = 1

    def engine(self) -> list[str]:
        """Give the engine's arguments."""
        return ["--users", str(self.users), "--seed", str(self.seed)]

    def steady(self, rate: float, seconds: float | None = None) -> list[str]:
        """Give the arguments of a steady rate (events a second) after the deposits, sent at once; None: without end."""
        count = [] if seconds is None else ["--count", str(self.deposits + int(rate * seconds))]
        return [*self.engine(), *count, "--rate", str(rate), "--burst", str(self.deposits)]

    @property
    def deposits(self) -> int:
        """Count the ledger events that the stream begins with."""
        return self.users * 3


@dataclass
class Tape:
    """A filled tape with the journal of what is on it."""

    path: Path
    journal: Path
    sent: acks.Sent


@dataclass
class Settled:
    """What became of one stream, and what it cost."""

    joined: acks.Joined
    begin_us: int  # from here on it counts
    watch: Watch
    verdict: dict[str, Any] | None
    process_started_us: int
    lives: int
    logged: list[dict[str, Any]] = field(default_factory=list)

    @property
    def trades_per_s(self) -> float:
        """Trades a second, to the last acknowledgement."""
        return self.joined.trades_per_s(self.begin_us)

    @property
    def cpu_us(self) -> float:
        """CPU time of the sidecar's process a trade, in us, from the beginning to the last acknowledgement."""
        return self.watch.cpu_s(*self._span) * 1e6 / self.joined.sent.trades

    @property
    def _span(self) -> tuple[int, int]:
        return self.begin_us, self.joined.last_ack_us

    @property
    def equal(self) -> bool | None:
        """What the judge said; None: it was not asked."""
        return None if self.verdict is None else bool(self.verdict["ok"])

    def figures(self) -> dict[str, Any]:
        """Give the figures of this run."""
        joined = self.joined
        return {
            "trades_per_s": round(self.trades_per_s, 1),
            "cpu_us": round(self.cpu_us, 2),
            "others_cpu_us": round(self.watch.others_cpu_s(*self._span) * 1e6 / joined.sent.trades, 2),
            "idle_us": round(self.watch.idle_s(*self._span) * 1e6 / joined.sent.trades, 2),
            "seconds": round((joined.last_ack_us - self.begin_us) / 1e6, 3),
            "seconds_before": round((self.begin_us - self.process_started_us) / 1e6, 3),
            "events_a_batch": round(len(joined.acked_us) / len(joined.batches), 2),
            "rss_mib_max": round(self.watch.rss_bytes_max / 2**20, 1),
            "lives": self.lives,
            "equal": self.equal,
        }


def fill_tape(folder: Path, workload: Workload, timeout_s: float = 900.0) -> Tape:
    """Let an engine publish flat out to `sidecar record`; give the tape."""
    folder.mkdir(parents=True)
    with World(folder, source="mixed") as world:
        record = world.start("record")
        result = world.engine(*workload.engine(), "--trades", str(workload.trades)).result(timeout_s)
        until_taped(world, record, result["last_sequence"])
        record.term()
    return Tape(folder / "tape.db", world.journal, acks.Sent(world.journal))


def copy_tape(tape: Tape, folder: Path) -> None:
    """Copy a filled tape, which nobody writes to, into a folder."""
    for path in tape.path.parent.glob("tape.db*"):
        if path.name in ("tape.db", "tape.db-wal"):
            shutil.copyfile(path, folder / path.name)


def until_taped(world: World, record: Process, sequence: int) -> None:
    """Wait until the recorder has put a sequence on disk, without a hole before it."""
    seen, seen_at, pause_s = 0, time.monotonic(), 0.2
    while time.monotonic() - seen_at < STALL_S:
        _still_running(record, "sidecar record")
        sessions = world.verb("tape", "info", status=0)["sessions"]
        head = sessions[-1]["head"] if sessions else 0
        if head >= sequence:
            return
        if head > seen:
            seen, seen_at = head, time.monotonic()
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 2.0)  # asking takes a process, and a core of two
    raise BenchError(f"the recorder stands at {seen}, before sequence {sequence}, for {STALL_S:.0f} s: {record.log}")


def until_acked(world: World, settling: Process, sequence: int) -> None:
    """Wait until a sequence is acknowledged; BenchError when settlement ends, halts or stands still."""
    seen, moved_at = -1, time.monotonic()
    while True:
        said = world.said()
        acked = said.get("acked", 0)
        if acked >= sequence:
            return
        if said.get("halted"):
            raise BenchError(f"settlement halted: {said['halted']}")
        _still_running(settling, "the sidecar")
        if acked != seen:
            seen, moved_at = acked, time.monotonic()
        elif time.monotonic() - moved_at > STALL_S:
            raise BenchError(f"nothing was acknowledged for {STALL_S:.0f} s, at {acked} of {sequence}")
        time.sleep(0.05)


def _still_running(process: Process, what: str) -> None:
    if not process.running():
        raise BenchError(f"{what} ended by itself: {process.log.read_text()[-2_000:]}")


def settle_tape(
    place: Place, tape: Tape, folder: Path, *, settings: Sequence[str] = (), judge: bool = True,
    module: Sequence[str] = ("sidecar",),
) -> Settled:  # fmt: skip
    """Settle a copy of a filled tape with `sidecar settle` into fresh tables.

    The clock starts when the settler has connected and begins its life, as the ceiling's does after it has connected.
    """
    folder.mkdir(parents=True)
    copy_tape(tape, folder)
    ack_log = folder / "acks"
    with (
        place.fresh(folder) as spot,
        World(folder, source="mixed", store=spot.settings, judged=spot.judged, settings=[NO_PROOF, *settings]) as world,
    ):
        world.journal = tape.journal
        started_us = time.time_ns() // 1_000
        settle = world.start("settle", f"pipeline.ack_log={ack_log}", module=module)
        with Watch(settle.pid) as watch:
            until_acked(world, settle, tape.sent.last_sequence)
        settle.term()
        return Settled(
            joined=acks.Joined(tape.sent, acks.read(ack_log)),
            begin_us=life_began_us(settle),
            watch=watch,
            verdict=world.judge() if judge else None,
            process_started_us=started_us,
            lives=len(settle.logged("life_begins")),
        )


def life_began_us(settling: Process) -> int:
    """Give the moment at which the first life began, from the sidecar's log."""
    return int(datetime.fromisoformat(settling.logged("life_begins")[0]["ts"]).timestamp() * 1e6)


def settle_live(
    place: Place, folder: Path, engine: Sequence[str], *, settings: Sequence[str] = (), judge: bool = True,
    watch_every_s: float = 0.05, module: Sequence[str] = ("sidecar",), timeout_s: float = 900.0,
    meanwhile: Callable[[World, Process], None] = lambda _, __: None,
    afterwards: Callable[[World, int], None] = lambda _, __: None,
) -> Settled:  # fmt: skip
    """Settle a stream with `sidecar run` while an engine publishes it; the clock starts with the first frame.

    `meanwhile` is called with the world and the sidecar while the engine is at it; an engine without a bound ends with
    it. `afterwards` is called with the world and the last sequence when all is settled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ack_log = folder / "acks"
    with (
        place.fresh(folder) as spot,
        World(folder, source="mixed", store=spot.settings, judged=spot.judged, settings=[NO_PROOF, *settings]) as world,
    ):
        started_us = time.time_ns() // 1_000
        sidecar = world.start("run", f"pipeline.ack_log={ack_log}", module=module)
        with Watch(sidecar.pid, every_s=watch_every_s) as watch:
            publishing = world.engine(*engine)
            meanwhile(world, sidecar)
            if not {"--count", "--trades"} & {*engine}:
                publishing.signal(signal.SIGTERM)  # it would never end
            result = publishing.result(timeout_s)
            until_acked(world, sidecar, result["last_sequence"])
        sidecar.term()
        afterwards(world, result["last_sequence"])
        sent = acks.Sent(world.journal)
        return Settled(
            joined=acks.Joined(sent, acks.read(ack_log)),
            begin_us=min(sent.actual_us),
            watch=watch,
            verdict=world.judge() if judge else None,
            process_started_us=started_us,
            lives=len(sidecar.logged("life_begins")),
        )


def folded(journal: Path) -> list[rows.Folded]:
    """Fold a journal of `mixed` once more, for counting rows."""
    return [*map(rows.Fold(rules("mixed"), 1).fold, rows.read_events(journal))]


def middle(values: Iterable[float]) -> float:
    """Give the median, rounded for people."""
    return round(statistics.median(values), 2)
