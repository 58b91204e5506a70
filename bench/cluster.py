"""`cluster`: how long an event takes while one of three nodes is killed, comes back, is paused, goes on."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench import acks, places, runs
from bench.counts import lost_and_doubled
from bench.report import BenchError, Report, histogram, percentiles, plotting, table
from bench.world import Process, World

SAYS = "latency while one of three nodes is killed, comes back, is paused, goes on: LOGGED beside UNLOGGED"
MORE = """\
Three nodes on this machine, every row on each (RF = 3), settled at LOCAL_QUORUM, open loop (see `latency`):

  calm      all three stand
  killed    SIGKILL of the third
  back      it was started again, and answers
  paused    SIGSTOP of the second
  resumed   SIGCONT

once with LOGGED batches and once with UNLOGGED ones, into fresh tables; the nodes are small (512 MiB), so that a few
cores are enough for three. A phase lasts from its event to the next one,
by when an event of the stream was meant to be sent; `stall` is the longest time without an acknowledgement, `durable`
how far that position moved meanwhile. Judged afterwards; lost and doubled are counted from the rows alone.

examples:
  scripts/bench cluster
  scripts/bench cluster --rate 1000 --away 60 --plot cluster.png
"""
STORES = ("cassandra",)
BATCHES = ("logged", "unlogged")
NODES = 3
PHASES = ("calm", "killed", "back", "paused", "resumed")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this verb takes."""
    add = parser.add_argument
    add("--rate", type=float, default=300.0, metavar="R", help="events a second (default 300)")
    add("--users", type=int, default=200, metavar="N", help="who trade (default 200)")
    add("--ramp", type=float, default=10.0, metavar="S", help="at the rate, before it counts (default 10)")
    add("--calm", type=float, default=20.0, metavar="S", help="before the first event (default 20)")
    add("--away", type=float, default=30.0, metavar="S", help="until the killed node is started again (default 30)")
    add("--back", type=float, default=40.0, metavar="S", help="before the pause, and after it (default 40)")
    add("--paused", type=float, default=25.0, metavar="S", help="(default 25)")
    add("--plot", type=Path, metavar="FILE", help="draw the seconds as PNG, LOGGED above UNLOGGED")


def run(args: argparse.Namespace, report: Report, folder: Path) -> tuple[list[str], str, bool]:
    """Measure both kinds of batches."""
    if args.port is not None:
        raise BenchError("--port: nodes are killed and paused here, so it takes its own only")
    found: dict[str, dict[str, Any]] = {}
    with places.nodes(NODES, folder / "warm-up", report, args.warm_up) as place:
        for batch in BATCHES:
            report.note(f"{batch.upper()}: {args.rate:,.0f} events/s")
            found[batch] = measure(place, folder / batch, batch, args, report)
    equal = all(one["equal"] is not False for one in found.values())
    whole = all((one["lost"], one["doubled"]) == (0, 0) for one in found.values())
    report.figures |= {"rate": args.rate, **found, "equal": equal}
    if args.plot:
        draw(args.plot, found, args.rate)
        report.note(f"drawn: {args.plot}")
    head = ("", "phase", "seconds", "p50 ms", "p99", "max", "stall s", "durable +")
    keys = ("seconds", "p50_ms", "p99_ms", "max_ms", "stall_s", "durable")
    lines = [
        [batch.upper() if phase is one["phases"][0] else "", phase["phase"], *(phase[key] for key in keys)]
        for batch, one in found.items()
        for phase in one["phases"]
    ]
    text = table(f"one of three nodes away, {args.rate:,.0f} events/s: intended send to acknowledged", head, lines)
    counted = "; ".join(
        f"{batch.upper()}: {one['lost']} lost, {one['doubled']} doubled, {one['lives']} lives"
        for batch, one in found.items()
    )
    return [text], counted + {True: "; all equal", False: "; NOT EQUAL"}[equal], equal and whole


class Story:
    """What happens to the nodes while the engine publishes; when each phase began, and `durable` then."""

    def __init__(self, place: places.CassandraPlace, args: argparse.Namespace) -> None:
        self.marks: list[tuple[int, int]] = []  # us since 1970, durable
        self._name = str(place.started_as)
        self._ramp_s = args.ramp
        self._phases_s = (args.calm, args.away, args.back, args.paused)
        self._last_s = args.back

    def happens(self, world: World, _sidecar: Process) -> None:
        """Wait until it settles, then let it happen."""
        while not world.said().get("acked"):
            time.sleep(0.05)
        time.sleep(self._ramp_s)
        self._mark(world)
        events = (("kill", 3), ("start", 3), ("pause", 2), ("resume", 2))
        for phase_s, (verb, number) in zip(self._phases_s, events, strict=True):
            time.sleep(phase_s)
            if verb != "start":
                self._mark(world)
            places.script(verb, "--name", self._name, "--node", str(number), "--json")
            if verb == "start":  # which returns when the node answers
                self._mark(world)
        time.sleep(self._last_s)
        self._mark(world)

    def _mark(self, world: World) -> None:
        self.marks.append((time.time_ns() // 1_000, int(world.said().get("durable", 0))))


def measure(
    place: places.CassandraPlace, folder: Path, batch: str, args: argparse.Namespace, report: Report
) -> dict[str, Any]:
    """Let the story happen to one kind of batches; give the figures."""
    workload = runs.Workload(trades=0, users=args.users)
    engine = workload.steady(args.rate)
    story, counted = Story(place, args), (0, 0)

    def count(world: World, last_sequence: int) -> None:
        nonlocal counted
        counted = lost_and_doubled(str(world.judged), last_sequence)

    settings = [f"store.cassandra.batch={batch}", *args.set]
    done = runs.settle_live(
        place, folder, engine, settings=settings, judge=args.judge, watch_every_s=0.25,
        meanwhile=story.happens, afterwards=count,
    )  # fmt: skip
    phases = [
        {"phase": phase, **figures(done.joined, begin[0], end[0]), "durable": end[1] - begin[1]}
        for phase, (begin, end) in zip(PHASES, pairwise(story.marks), strict=True)
    ]
    for one in phases:
        report.note(f"{batch} {one['phase']}: p50 {one['p50_ms']} ms, p99 {one['p99_ms']}, stall {one['stall_s']} s")
    lost, doubled = counted
    return {
        "phases": phases, "lost": lost, "doubled": doubled, "lives": done.lives, "equal": done.equal,
        "seconds": by_second(done.joined, story.marks[0][0], story.marks[-1][0]),
    }  # fmt: skip


def figures(joined: acks.Joined, begin_us: int, end_us: int) -> dict[str, Any]:
    """Say how the events between two moments fared."""
    found = percentiles(joined.latencies(begin_us, end_us))
    return {
        "seconds": round((end_us - begin_us) / 1e6, 1),
        "stall_s": longest_stall_s(joined.acked_us, begin_us, end_us),
        **{key: found[key] for key in ("p50_ms", "p99_ms", "max_ms")},
    }


def longest_stall_s(acked_us: Sequence[int], begin_us: int, end_us: int) -> float:
    """Give the longest time without an acknowledgement that began between two moments; the last one may end later."""
    times = sorted(at_us for at_us in acked_us if at_us >= begin_us)
    longest, before = 0, begin_us
    for at_us in times:
        longest, before = max(longest, at_us - before), at_us
        if at_us >= end_us:
            break
    return round(longest / 1e6, 2)


def by_second(joined: acks.Joined, begin_us: int, end_us: int) -> list[list[float | None]]:
    """Give p50, p99 and max in ms of the events meant to be sent in each second."""
    seconds = [histogram() for _ in range(max(-(-(end_us - begin_us) // 1_000_000), 1))]
    for meant, acked in zip(joined.sent.meant_us, joined.acked_us, strict=True):
        if begin_us <= meant < end_us:
            seconds[(meant - begin_us) // 1_000_000].record_value(max(acked - meant, 1))
    said = map(percentiles, seconds)
    return [[one[key] for key in ("p50_ms", "p99_ms", "max_ms")] for one in said]


def draw(path: Path, found: dict[str, dict[str, Any]], rate: float) -> None:
    """Draw each second's p50, p99 and max, with what happened when."""
    pyplot = plotting()
    figure, all_axes = pyplot.subplots(len(found), 1, sharex=True, sharey=True, figsize=(9, 7))
    for axes, (batch, one) in zip(all_axes, found.items(), strict=True):
        for place, (label, colour) in enumerate((("p50", "tab:green"), ("p99", "tab:orange"), ("max", "tab:red"))):
            axes.plot([second[place] for second in one["seconds"]], label=label, color=colour, linewidth=1)
        at = 0.0
        for phase in one["phases"]:
            axes.axvline(at, color="0.5", linestyle=":", linewidth=1)
            axes.text(at + 0.5, 0.98, phase["phase"], transform=axes.get_xaxis_transform(), va="top", fontsize=9)
            at += phase["seconds"]
        axes.set(ylabel="ms", yscale="log", title=f"{batch.upper()}: {one['lost']} lost, {one['doubled']} doubled")
        axes.grid(which="major", alpha=0.3)
    all_axes[0].legend(loc="center right")
    all_axes[-1].set_xlabel("seconds, by when an event was meant to be sent")
    figure.suptitle(f"One of three nodes away: {rate:,.0f} events/s, intended send to acknowledged")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
