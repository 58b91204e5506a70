"""`growth`: does it stay flat? Trades a second, CPU a trade and memory as stored trades, accounts or symbols grow."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import acks, places, runs
from bench.report import Report, plotting, table
from bench.watch import Watch
from bench.world import Process, World

SAYS = "trades/s, CPU a trade and memory as what is stored grows"
MORE = """\
  trades     one store and one settling process, grown to --to trades; at each size a probe. At the end a second store
             with --beside trades stands beside it (if that is a tenth or less): probes of both in turns, so that a host
             that gets slower meanwhile is not taken for growth. The ratio is that of their medians
  accounts   fresh tables for each size, up to --to accounts (user and asset), all of them in the sidecar's memory
  symbols    fresh tables for each number of symbols, up to --to; as many accounts each time, so the fewer symbols the
             more users

A probe: settlement is paused, an engine publishes --probe trades, they are recorded; then settlement goes on, and rate,
CPU and memory of the settling process count from the first acknowledgement to the last. What lies between two probes is
settled the same way but not counted. The engine's trades are generated, between 1,000 users (accounts: as many as it
takes). The tape keeps nothing that is durable, and durable_after_s is 1, so that the tape doesn't grow as well.

examples:
  scripts/bench growth                                     trades in SQLite to 1,000,000: some minutes
  scripts/bench growth --of trades --to 10000000           an hour's quarter; 6 GB of disk
  scripts/bench growth --of trades --store cassandra --plot growth.png
  scripts/bench growth --of accounts --to 1000000
  scripts/bench growth --of symbols --to 200
"""
TO = {"trades": 1_000_000, "accounts": 1_000_000, "symbols": 200}
FROM = {"trades": 10_000, "accounts": 100, "symbols": 2}
CHUNK_EVENTS = 250_000
DEPOSITS_PER_S = 15_000.0  # a million at once would overflow the queues: nobody replays them here
JUDGED_TRADES_MAX = 2_000_000  # more takes the judge many gigabytes
ASSETS_A_USER = 3
TURNS = 5  # of probes in the large store and in the small one, in the end
TOGETHER_US = 5_000  # acknowledgements of one transaction lie closer together


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this verb takes."""
    add = parser.add_argument
    add("--of", choices=tuple(TO), default="trades", help="what grows (default trades)")
    add("--from", type=int, dest="begin", metavar="N", help="default: trades 10,000, accounts 100, symbols 2")
    add("--to", type=int, metavar="N", help="default: trades and accounts 1,000,000, symbols 200")
    add("--probe", type=int, default=50_000, metavar="N", help="trades measured at each size (default 50,000)")
    add("--users", type=int, default=1_000, metavar="N", help="of trades, and of the most symbols (default 1,000)")
    add("--beside", type=int, default=100_000, metavar="N", help="trades in the small store (default 100,000; 0: none)")
    add("--plot", type=Path, metavar="FILE", help="draw it as PNG")


def sizes(begin: int, end: int, steps: Sequence[float] = (1, 2, 5)) -> list[int]:
    """Give sizes from one to the other, about three a decade."""
    found, scale = {begin, end}, 1
    while scale <= end:
        found |= {int(step * scale) for step in steps if begin < step * scale < end}
        scale *= 10
    return sorted(found)


def span(args: argparse.Namespace) -> tuple[int, int]:
    """Give the first size and the last."""
    end = args.to or TO[args.of]
    return args.begin or min(FROM[args.of], end), end


class Grower:
    """One store with a recorder and a settler that stay, and the engines that come and go."""

    def __init__(self, world: World, users: int) -> None:
        self.world = world
        self.trades = self.sequence = 0
        self._users = users
        self._seed = 1
        self._ack_log = world.folder / "acks"
        self._pieces = world.folder / "pieces"
        self.record = world.start("record")
        self.settle = world.start("settle", f"pipeline.ack_log={self._ack_log}")
        self._read_to = 0

    def publish(self, trades: int, *, deposits: int = 0) -> None:
        """Let an engine publish some more, and have it recorded."""
        what = ["--count", str(deposits)] if deposits else ["--trades", str(trades), "--no-deposits"]
        self._seed += 1
        piece = self._pieces.with_suffix(f".{self.sequence}")
        result = self.world.engine(
            *what, "--users", str(self._users), "--seed", str(self._seed), "--first-sequence", str(self.sequence + 1),
            "--first-trade-id", str(self.trades + 1), journal=piece, rate=DEPOSITS_PER_S if deposits else None,
        ).result(900)  # fmt: skip
        with self.world.journal.open("ab") as whole, piece.open("rb") as part:
            shutil.copyfileobj(part, whole)
        piece.unlink()
        self.sequence = result["last_sequence"]
        self.trades += result["trades"]
        runs.until_taped(self.world, self.record, self.sequence)

    def settle_all(self) -> None:
        """Wait until all that was published is acknowledged."""
        runs.until_acked(self.world, self.settle, self.sequence)

    def grow(self, trades: int) -> None:
        """Settle some more trades that are not measured."""
        while trades > 0:
            piece = min(trades, CHUNK_EVENTS)
            self.publish(piece)
            self.settle_all()
            trades -= piece
        self.acked_batches()

    def acked_batches(self) -> list[acks.Batch]:
        """Give the batches acknowledged since the last call."""
        with self._ack_log.open() as lines:
            lines.seek(self._read_to)
            text = lines.read()
            self._read_to = lines.tell()
        return [acks.Batch(*map(int, line.split())) for line in text.splitlines() if not line.startswith("#")]

    def probe(self, trades: int, watch: Watch) -> dict[str, Any]:
        """Measure: record trades while settlement is paused, then let it settle them.

        What was acknowledged with the first batch (SQLite: in its transaction) is not counted: it began earlier.
        """
        paused = self.world.folder / "tape.db.paused"
        paused.touch()
        self.publish(trades)
        begin_us = time.time_ns() // 1_000
        paused.unlink()
        self.settle_all()
        batches = self.acked_batches()
        first_us, last_us = min(batch.acked_us for batch in batches), max(batch.acked_us for batch in batches)
        events = sum(batch.last - batch.first + 1 for batch in batches)
        counted = sum(batch.last - batch.first + 1 for batch in batches if batch.acked_us > first_us + TOGETHER_US)
        if counted < events / 2:  # a small probe
            counted, first_us = events, begin_us
        share = trades * counted / events
        return {
            "trades_per_s": round(share * 1e6 / (last_us - first_us), 1),
            "cpu_us": round(watch.cpu_s(first_us, last_us) * 1e6 / share, 2),
            "rss_mib": round(watch.rss_bytes(last_us) / 2**20, 1),
            "events_a_batch": round(events / len(batches), 2),
        }


def run(args: argparse.Namespace, report: Report, folder: Path) -> tuple[list[str], str, bool]:
    """Measure each size."""
    begin, end = span(args)
    with places.place(args.store, args.port, folder / "warm-up", report, args.warm_up) as place:
        grow = {"trades": grow_trades, "accounts": grow_accounts, "symbols": grow_symbols}[args.of]
        points, equal = grow(args, report, folder, place, sizes(begin, end))
    first, last = points[0], points[-1]
    # Flatness is judged from 100,000 stored on: below it the caches of everything are still cold.
    base = next((one for one in points if one["size"] >= 100_000), first) if args.of == "trades" else first
    if "beside" in last:
        base, last = last["beside"], last["again"]
    report.figures |= {
        "store": place.name,
        "of": args.of,
        "points": points,
        "cpu_growth": round(last["cpu_us"] / max(base["cpu_us"], 0.01), 3),
        "cpu_growth_from": base["size"],
        "rate_growth": round(last["trades_per_s"] / base["trades_per_s"], 3),
        "equal": equal,
    }
    if args.of == "accounts":
        spread = last["accounts"] - first["accounts"]
        grown = (last["rss_mib"] - first["rss_mib"]) * 2**20
        report.figures["bytes_an_account"] = round(grown / spread) if spread else None
    if args.plot:
        draw(args.plot, args.of, place.name, points)
        report.note(f"drawn: {args.plot}")
    if "again" in points[-1]:
        points = [*points, base, last]
    head = (args.of, "trades/s", "CPU us a trade", "RSS MiB", "events a batch")
    lines = [[one["size"], one["trades_per_s"], one["cpu_us"], one["rss_mib"], one["events_a_batch"]] for one in points]
    text = table(f"growth of {args.of} in {place.name}; {args.probe:,} trades a probe", head, lines)
    verdict = f"CPU a trade at {last['size']:,} / at {base['size']:,}: {report.figures['cpu_growth']:.2f}"
    if args.of == "accounts":
        verdict += f"; {report.figures['bytes_an_account']} bytes an account, {last['rss_mib']:,.0f} MiB with the most"
    verdict += {True: "; all equal", False: "; NOT EQUAL", None: "; not judged"}[equal]
    return [text], verdict, equal is not False


def world_of(
    args: argparse.Namespace, folder: Path, spot: places.Spot, *, symbols: int = 2, accounts_max: int = 2_000_000
) -> World:
    """Give a world whose tape keeps nothing that is durable."""
    settings = [
        "tape.retention_s=0", "pipeline.durable_after_s=1", f"pipeline.accounts_max={accounts_max}", runs.NO_PROOF,
        *args.set,
    ]  # fmt: skip
    return World(
        folder, source="generated", store=spot.settings, judged=spot.judged, settings=settings, symbols=symbols
    )


Points = tuple[list[dict[str, Any]], bool | None]


def grow_trades(
    args: argparse.Namespace, report: Report, folder: Path, place: places.Place, wanted: list[int]
) -> Points:
    """One store that grows, and in the end a small one beside it."""
    points: list[dict[str, Any]] = []
    end = wanted[-1]
    with _store_of_trades(args, folder / "run", place) as (large, probe_large):
        for size in wanted:
            probe = min(args.probe, size - large.trades)
            large.grow(size - probe - large.trades)
            points.append({"size": size, **probe_large(probe)})
            report.note("{size:,} trades: {trades_per_s:,.0f}/s, {cpu_us} us, {rss_mib} MiB".format(**points[-1]))
        if args.beside and end >= 10 * args.beside:
            with _store_of_trades(args, folder / "small", place) as (small, probe_small):
                small.grow(args.beside)
                found: dict[str, list[dict[str, Any]]] = {"beside": [], "again": []}
                for turn in range(TURNS):
                    for name, one in (("beside", probe_small), ("again", probe_large)):
                        found[name].append(one(args.probe))
                        cpu_us, rate = found[name][-1]["cpu_us"], found[name][-1]["trades_per_s"]
                        report.note(f"turn {turn + 1} of {TURNS}, {name}: {rate:,.0f}/s, {cpu_us} us")
                for name, size in (("beside", args.beside), ("again", end)):
                    points[-1][name] = {
                        "size": size, **{key: runs.middle(one[key] for one in found[name]) for key in found[name][0]}
                    }  # fmt: skip
                if judged(args, small, small.settle) is False:
                    return points, False
        return points, judged(args, large, large.settle)


@contextlib.contextmanager
def _store_of_trades(
    args: argparse.Namespace, folder: Path, place: places.Place
) -> Iterator[tuple[Grower, Callable[[int], dict[str, Any]]]]:
    """A fresh store with accounts that hold something, and how to probe it."""
    folder.mkdir()
    with place.fresh(folder) as spot, world_of(args, folder, spot) as world:
        grower = Grower(world, args.users)
        with Watch(grower.settle.pid, every_s=0.1) as watch:
            grower.publish(0, deposits=args.users * ASSETS_A_USER)
            grower.settle_all()
            yield grower, lambda trades: grower.probe(trades, watch)


def grow_accounts(
    args: argparse.Namespace, report: Report, folder: Path, place: places.Place, wanted: list[int]
) -> Points:
    """Fresh tables for each number of accounts."""
    points, equal = [], []
    for size in wanted:
        users = max(size // ASSETS_A_USER, 2)
        run_folder = folder / f"accounts-{size}"
        run_folder.mkdir()
        with place.fresh(run_folder) as spot, world_of(args, run_folder, spot) as world:
            grower = Grower(world, users)
            with Watch(grower.settle.pid, every_s=0.1) as watch:
                grower.publish(0, deposits=users * ASSETS_A_USER)
                grower.settle_all()
                grower.acked_batches()
                point = {"size": size, "accounts": users * ASSETS_A_USER, **grower.probe(args.probe, watch)}
            points.append(point)
            report.note(
                f"{size:,} accounts: {point['trades_per_s']:,.0f}/s, {point['cpu_us']} us, {point['rss_mib']} MiB"
            )
            equal.append(judged(args, grower, grower.settle))
    return points, None if None in equal else all(equal)


def grow_symbols(
    args: argparse.Namespace, report: Report, folder: Path, place: places.Place, wanted: list[int]
) -> Points:
    """Fresh tables for each number of symbols, which share one asset; the accounts stay as many."""
    points, equal = [], []
    accounts = args.users * (wanted[-1] + 1)
    for size in wanted:
        users = accounts // (size + 1)
        run_folder = folder / f"symbols-{size}"
        run_folder.mkdir()
        with (
            place.fresh(run_folder, symbols=size) as spot,
            world_of(args, run_folder, spot, symbols=size) as world,
        ):
            grower = Grower(world, users)
            with Watch(grower.settle.pid, every_s=0.1) as watch:
                grower.publish(0, deposits=users * (size + 1))
                grower.settle_all()
                grower.acked_batches()
                point = {"size": size, "accounts": users * (size + 1), **grower.probe(args.probe, watch)}
            points.append(point)
            report.note(f"{size} symbols: {point['trades_per_s']:,.0f}/s, {point['cpu_us']} us, {point['rss_mib']} MiB")
            equal.append(judged(args, grower, grower.settle))
    return points, None if None in equal else all(equal)


def judged(args: argparse.Namespace, grower: Grower, settle: Process) -> bool | None:
    """Stop both halves, and let the judge compare; None when it was not asked or it is too much."""
    settle.term()
    grower.record.term()
    if not args.judge or grower.trades > JUDGED_TRADES_MAX:
        return None
    return bool(grower.world.judge()["ok"])


def draw(path: Path, of: str, store: str, points: list[dict[str, Any]]) -> None:
    """Draw rate, CPU and memory over what grows."""
    pyplot = plotting()
    figure, all_axes = pyplot.subplots(3, 1, sharex=True, figsize=(8, 8))
    at = [one["size"] for one in points]
    kinds = (("trades_per_s", "trades/s"), ("cpu_us", "CPU us a trade"), ("rss_mib", "RSS MiB"))
    for axes, (key, label) in zip(all_axes, kinds, strict=True):
        axes.plot(at, [one[key] for one in points], "o-")
        axes.set(ylabel=label, ylim=(0, None), xscale="log")
        axes.grid(which="both", alpha=0.3)
    all_axes[0].set_title(f"growth of {of} in {store}")
    all_axes[-1].set_xlabel(of)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
