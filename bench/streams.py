"""`streams`: one, two, three streams settle at once into one store, each by a settler of its own."""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import acks, places, runs
from bench.report import Report, plotting, table
from bench.watch import Watch
from bench.world import World, until

SAYS = "one, two, three streams settled at once into one store"
STORES = ("cassandra", "sqlite")
MORE = """\
A tape is filled for each stream, from an engine of its own, with the same users. Then one, two, … `sidecar settle`
settle as many of them at once into fresh tables. They have connected and stand paused before the clock starts.

  trades/s in all   the trades of all streams, from the end of the pause to the last acknowledgement of all
  each              a stream's own trades, to its own last acknowledgement
  CPU us a trade    of the settling processes, without the database

Each number of streams once a round, the order rotated; the round with the middle rate counts. The judge compares every
row of every stream with its engine's journal, and every user's balance with the sum over the journals.

examples:
  scripts/bench streams                              three rounds of 1, 2, 3 streams: about five minutes
  scripts/bench streams --trades 3000 --rounds 1 --warm-up 1      only to see it work
  scripts/bench streams --streams 5 --port 9042      on a node that runs already
"""
NAMES = ("main", *(f"stream{number}" for number in range(2, 10)))


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this verb takes."""
    add = parser.add_argument
    add("--streams", type=int, choices=range(1, len(NAMES) + 1), default=3, metavar="N", help="at most (default 3)")
    add("--trades", type=int, default=100_000, metavar="N", help="on each tape (default 100,000)")
    add("--users", type=int, default=1_000, metavar="N", help="who trade, on every stream (default 1,000)")
    add("--rounds", type=int, default=3, metavar="N", help="the middle one counts (default 3)")
    add("--plot", type=Path, metavar="FILE", help="draw the rates as PNG")


def settle_together(
    place: places.Place, tapes: list[runs.Tape], folder: Path, *, settings: list[str], judge: bool
) -> dict[str, Any]:
    """Settle copies of some tapes at once into fresh tables, a stream each; give the figures."""
    folder.mkdir()
    with place.fresh(folder) as spot, ExitStack() as stack:
        settling, watches = [], []
        for name, tape in zip(NAMES, tapes, strict=False):
            own = folder / name
            own.mkdir()
            runs.copy_tape(tape, own)
            (own / "tape.db.paused").touch()
            of_stream = [f"stream.name={name}", runs.NO_PROOF, *settings]
            world = World(own, source="mixed", store=spot.settings, judged=spot.judged, settings=of_stream)
            stack.enter_context(world).journal = tape.journal
            process = world.start("settle", f"pipeline.ack_log={own / 'acks'}")
            settling.append((tape, world, process))
            watches.append(stack.enter_context(Watch(process.pid)))
        for _, world, _ in settling:
            until(lambda world=world: world.said().get("state") == "paused", "it stands ready")  # type: ignore[misc]
        begin_us = time.time_ns() // 1_000
        for _, world, _ in settling:
            (world.folder / "tape.db.paused").unlink()
        for tape, world, process in settling:
            runs.until_acked(world, process, tape.sent.last_sequence)
        for _, _, process in settling:
            process.term()
        joined = [acks.Joined(tape.sent, acks.read(world.folder / "acks")) for tape, world, _ in settling]
        trades = sum(one.sent.trades for one in joined)
        last_us = max(one.last_ack_us for one in joined)
        cpu_s = sum(watch.cpu_s(begin_us, one.last_ack_us) for watch, one in zip(watches, joined, strict=True))
        (_, first, _), *others = settling
        beside = [part for _, world, _ in others for part in ("--beside", f"{world.folder.name}={world.journal}")]
        return {
            "streams": len(tapes),
            "trades_per_s": round(trades * 1e6 / (last_us - begin_us), 1),
            "each": [round(one.trades_per_s(begin_us), 1) for one in joined],
            "cpu_us": round(cpu_s * 1e6 / trades, 2),
            "rss_mib_max": round(max(watch.rss_bytes_max for watch in watches) / 2**20, 1),
            "equal": bool(first.judge(*beside)["ok"]) if judge else None,
        }


def run(args: argparse.Namespace, report: Report, folder: Path) -> tuple[list[str], str, bool]:
    """Measure each number of streams."""
    counts = list(range(1, args.streams + 1))
    rounds: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    with places.place(args.store, args.port, folder / "warm-up", report, args.warm_up) as place:
        tapes = []
        for name, seed in zip(NAMES, counts, strict=False):
            report.note(f"filling the tape of {name} with {args.trades:,} trades")
            workload = runs.Workload(trades=args.trades, users=args.users, seed=seed)
            tapes.append(runs.fill_tape(folder / f"tape-{name}", workload))
        for number in range(args.rounds):
            turned = number % len(counts)
            for count in counts[turned:] + counts[:turned]:
                own = folder / f"round-{number + 1}-of-{count}"
                done = settle_together(place, tapes[:count], own, settings=args.set, judge=args.judge)
                rounds[count].append(done)
                unequal = ", NOT EQUAL" if done["equal"] is False else ""
                report.note(f"round {number + 1}, {count} at once: {done['trades_per_s']:,.0f} trades/s{unequal}")
    points = [middle(rounds[count]) for count in counts]
    alone = points[0]["trades_per_s"]
    equal = all(done["equal"] is not False for found in rounds.values() for done in found)
    report.figures |= {
        "store": place.name,
        "trades": args.trades,
        "users": args.users,
        "points": [point | {"over_one": round(point["trades_per_s"] / alone, 3)} for point in points],
        "equal": equal,
        "rounds": [done for found in rounds.values() for done in found],
    }
    if args.plot:
        draw(args.plot, report.figures)
        report.note(f"drawn: {args.plot}")
    head = ("streams", "trades/s in all", "/ one", "each: slowest", "fastest", "CPU us a trade", "RSS MiB", "rounds")
    lines = [
        [
            point["streams"], point["trades_per_s"], point["over_one"], min(point["each"]), max(point["each"]),
            point["cpu_us"], point["rss_mib_max"],
            " ".join(f"{done['trades_per_s']:,.0f}" for done in rounds[point["streams"]]),
        ]
        for point in report.figures["points"]
    ]  # fmt: skip
    text = table(f"streams: {args.trades:,} trades each from filled tapes into {place.name}", head, lines)
    judged = "all rows and sums are right" if equal else "NOT EQUAL"
    return [text], judged if args.judge else "not judged", equal


def middle(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Give the round with the middle rate (of an even number the lower one)."""
    return sorted(found, key=lambda done: float(done["trades_per_s"]))[(len(found) - 1) // 2]


def draw(path: Path, figures: dict[str, Any]) -> None:
    """Draw the rate in all as bars, each round a dot, and the CPU a trade."""
    pyplot = plotting()
    figure, (rates, cpu) = pyplot.subplots(1, 2, figsize=(9, 4))
    at = [point["streams"] for point in figures["points"]]
    for axes, key, label, colour in (
        (rates, "trades_per_s", "trades/s in all", "#88aacc"),
        (cpu, "cpu_us", "CPU us a trade, settling processes", "#ccaa88"),
    ):
        axes.bar(at, [point[key] for point in figures["points"]], color=colour, width=0.6)
        axes.plot([done["streams"] for done in figures["rounds"]], [done[key] for done in figures["rounds"]], "k.")
        axes.set(xlabel="streams at once", ylabel=label, xticks=at)
        axes.margins(y=0.12)
        for point in figures["points"]:
            shown = f"{point[key]:,.0f}" if key == "trades_per_s" else f"{point[key]:.1f}"
            axes.annotate(shown, (point["streams"], point[key] / 2), ha="center")
    figure.suptitle(f"{figures['trades']:,} trades a stream, {figures['users']:,} users in common, {figures['store']}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
