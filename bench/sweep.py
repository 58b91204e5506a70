"""`sweep`: one setting after the other, side by side in one run: what defaults are chosen from."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import latency, places, runs
from bench.cql import Connection
from bench.report import BenchError, Report, plotting, table

SAYS = "settings side by side: batch, window, turn, table options, JVM arguments"
STORES = ("cassandra",)
MORE = """\
Every combination of the values given (--vary may be repeated), or each variant of --tables or --jvm, settles the same
tape once a round, in fresh tables; the rounds rotate the order, the median counts. The ceiling (pre-encoded batches, 16
a batch, 16 under way) is measured in each round too: it tells how the machine and the node have drifted meanwhile.
With --latency each variant is also given events at a fixed rate, after the last round.

  --tables  as shipped, and with other compaction and compression of all tables (ALTER TABLE, before the first row)
  --jvm     each in a node of its own, warmed up (these can't share a --port): g1 (2 GiB, 50 ms, old after one
            collection), g1-shipped (300 ms, old after fifteen, as Cassandra has it), g1-300 and g1-late (only the
            one or the other), parallel, zgc, and g1-young (half of the heap for new objects), c1 (the first
            compiler tier only)

examples:
  scripts/bench sweep --vary pipeline.batch_trades_max=8,16,32,48 --vary pipeline.inflight_batches_max=8,16,32,64 \\
      --set pipeline.batch_bytes_max=36_864 --plot sweep.png
  scripts/bench sweep --vary tape.turn_min_s=0,0.001,0.002 --latency 20
  scripts/bench sweep --tables shipped,stcs,lcs,ucs,plain,zstd
  scripts/bench sweep --jvm g1,g1-shipped,g1-young,parallel --latency 20 --rounds 2
"""
CEILING = (16, 16)
LATENCY_RAMP_S = 5.0
TABLES = {
    "shipped": "",
    "stcs": "compaction = {'class': 'SizeTieredCompactionStrategy'}",
    "lcs": "compaction = {'class': 'LeveledCompactionStrategy'}",
    "ucs": "compaction = {'class': 'UnifiedCompactionStrategy'}",
    "plain": "compression = {'enabled': false}",
    "zstd": "compression = {'class': 'ZstdCompressor'}",
}
JVMS = {
    "g1": [],
    "g1-shipped": ["-XX:MaxGCPauseMillis=300", "-XX:MaxTenuringThreshold=15"],
    "g1-300": ["-XX:MaxGCPauseMillis=300"],
    "g1-late": ["-XX:MaxTenuringThreshold=15"],
    "g1-young": ["-Xmn1G"],
    "parallel": ["-XX:-UseG1GC", "-XX:+UseParallelGC"],
    "zgc": ["-XX:-UseG1GC", "-XX:+UseZGC"],
    "c1": ["-XX:TieredStopAtLevel=1"],
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this verb takes."""
    add = parser.add_argument
    add("--vary", action="append", default=[], metavar="KEY=V1,V2,...", help="a setting of the sidecar; repeatable")
    add("--tables", metavar="NAME,...", help=f"table options: {', '.join(TABLES)}")
    add("--jvm", metavar="NAME,...", help=f"JVM arguments: {', '.join(JVMS)}")
    add("--trades", type=int, default=50_000, metavar="N", help="on the tape (default 50,000)")
    add("--users", type=int, default=1_000, metavar="N", help="who trade (default 1,000)")
    add("--rounds", type=int, default=3, metavar="N", help="the median counts (default 3)")
    add("--latency", type=float, default=0.0, metavar="S", help="so many seconds at --rate, too (default 0: no)")
    add("--rate", type=float, default=1_000.0, metavar="R", help="events a second for --latency (default 1,000)")
    add("--plot", type=Path, metavar="FILE", help="draw the rates as PNG")


class _AlteredPlace(places.CassandraPlace):
    """The node, with other options for every table of a run."""

    def __init__(self, place: places.CassandraPlace, options: str) -> None:
        super().__init__(place.host, place.port)
        self._options = options

    @contextmanager
    def fresh(self, folder: Path, *, symbols: int = 2) -> Iterator[places.Spot]:
        with super().fresh(folder, symbols=symbols) as spot:
            with Connection(self.host, self.port) as connection:
                tables = connection.query(
                    f"SELECT table_name FROM system_schema.tables WHERE keyspace_name = '{spot.keyspace}'"
                )
                for name in tables if self._options else ():
                    connection.query(f"ALTER TABLE {spot.keyspace}.{(name or b'').decode()} WITH {self._options}")
            yield spot


def variants(args: argparse.Namespace) -> dict[str, list[str]]:
    """Give each variant's name and settings. Raises BenchError for what can't be understood."""
    if sum((bool(args.vary), bool(args.tables), bool(args.jvm))) != 1:
        raise BenchError("wanted: --vary KEY=V1,V2 (once or more), or --tables, or --jvm")
    for name, known in (("tables", TABLES), ("jvm", JVMS)):
        if getattr(args, name):
            named = getattr(args, name).split(",")
            if unknown := sorted(set(named) - set(known)):
                raise BenchError(f"--{name} {','.join(unknown)}: there are {', '.join(known)}")
            return {one: [] for one in named}
    axes = []
    for text in args.vary:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise BenchError(f"--vary {text}: wanted like pipeline.batch_trades_max=8,16,32")
        axes.append([f"{key}={value}" for value in values.split(",")])
    short = [[setting.rpartition(".")[2] for setting in axis] for axis in axes]
    names = [" ".join(point) for point in itertools.product(*short)]
    return dict(zip(names, map(list, itertools.product(*axes)), strict=True))


class Sweep:
    """The rounds on one node."""

    def __init__(self, args: argparse.Namespace, report: Report, folder: Path, tape: runs.Tape) -> None:
        self._args = args
        self._report = report
        self._folder = folder
        self._tape = tape
        self.found: dict[str, dict[str, Any]] = {}

    def rounds(self, place: places.CassandraPlace, points: dict[str, list[str]]) -> None:
        """Measure each variant once a round, the ceiling first, then each at a fixed rate."""
        names = list(points)
        ceilings = []
        done: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number in range(self._args.rounds):
            ceilings.append(self._ceiling(place, number))
            turned = number * len(names) // self._args.rounds
            for at, name in enumerate(names[turned:] + names[:turned]):
                folder = self._folder / f"{place.port}-{number}-{names.index(name)}-{at}"
                settled = runs.settle_tape(
                    self._placed(place, name), self._tape, folder,
                    settings=[*self._args.set, *points[name]], judge=self._args.judge,
                )  # fmt: skip
                done[name].append(settled.figures())
                self._report.note(f"round {number + 1}: {name} {settled.trades_per_s:,.0f} trades/s")
        ceiling_tps = runs.middle(ceilings)
        for name, figures in done.items():
            tps = runs.middle(one["trades_per_s"] for one in figures)
            self.found[name] = {
                "settings": points[name],
                "trades_per_s": tps,
                "over_ceiling": round(tps / ceiling_tps, 3),
                "cpu_us": runs.middle(one["cpu_us"] for one in figures),
                "ceiling_tps": ceiling_tps,
                "rounds": [one["trades_per_s"] for one in figures],
                "equal": all(one["equal"] is not False for one in figures),
            }
            if self._args.latency:
                self.found[name] |= self._latency(self._placed(place, name), name, points[name])

    def _placed(self, place: places.CassandraPlace, name: str) -> places.CassandraPlace:
        return _AlteredPlace(place, TABLES[name]) if self._args.tables else place

    def _ceiling(self, place: places.CassandraPlace, number: int) -> float:
        folder = self._folder / f"{place.port}-{number}-ceiling"
        folder.mkdir()
        batch, window = CEILING
        with place.fresh(folder) as spot:
            more = ("--trades", self._args.trades, "--batch", batch, "--window", window)
            done = place.program("bench.ceiling", spot, self._tape.journal, *more)
        self._report.note(f"round {number + 1}: ceiling {done['trades_per_s']:,.0f} trades/s")
        return float(done["trades_per_s"])

    def _latency(self, place: places.CassandraPlace, name: str, settings: list[str]) -> dict[str, Any]:
        given = argparse.Namespace(**vars(self._args) | {
            "ramp": LATENCY_RAMP_S, "seconds": self._args.latency, "set": [*self._args.set, *settings],
        })  # fmt: skip
        folder = self._folder / f"{place.port}-latency-{len(self.found)}"
        _, found = latency.measure(place, folder, self._args.rate, given)
        self._report.note(f"{name}: {self._args.rate:,.0f}/s, p50 {found['p50_ms']:.2f}, p99 {found['p99_ms']:.2f} ms")
        return {
            **{key: found[key] for key in ("p50_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms", "cpu_percent")},
            "live_equal": found["equal"] is not False,
        }


def run(args: argparse.Namespace, report: Report, folder: Path) -> tuple[list[str], str, bool]:
    """Sweep."""
    points = variants(args)
    if args.jvm and args.port is not None:
        raise BenchError("--jvm starts nodes of its own: leave --port away")
    report.note(f"filling a tape with {args.trades:,} trades")
    sweep = Sweep(
        args, report, folder, runs.fill_tape(folder / "tape", runs.Workload(trades=args.trades, users=args.users))
    )
    for group in [{name: points[name]} for name in points] if args.jvm else [points]:
        jvm = JVMS[next(iter(group))] if args.jvm else []
        with places.place(
            "cassandra", args.port, folder / f"warm-up-{len(sweep.found)}", report, args.warm_up, jvm
        ) as place:
            assert isinstance(place, places.CassandraPlace)
            sweep.rounds(place, group)
    found = sweep.found
    equal = all(one["equal"] and one.get("live_equal", True) for one in found.values())
    report.figures |= {
        "store": "cassandra",
        "trades": args.trades,
        "users": args.users,
        "points": found,
        "equal": equal,
    }
    if args.plot:
        draw(args.plot, found)
        report.note(f"drawn: {args.plot}")
    heads, keys = ["", "trades/s", "/ ceiling", "CPU us a trade"], ["trades_per_s", "over_ceiling", "cpu_us"]
    if args.latency:
        heads += ["p50 ms", "p99", "p99.9", "CPU %"]
        keys += ["p50_ms", "p99_ms", "p999_ms", "cpu_percent"]
    lines = [[name, *(one[key] for key in keys)] for name, one in found.items()]
    title = f"sweep: {args.trades:,} trades" + (f"; then {args.rate:,.0f} events/s" if args.latency else "")
    return [table(title, heads, lines)], "" if equal else "NOT EQUAL to the journal", equal


def draw(path: Path, found: dict[str, dict[str, Any]]) -> None:
    """Draw rate and CPU of each variant, each round a dot."""
    pyplot = plotting()
    names = list(found)[::-1]
    figure, (rates, cpu) = pyplot.subplots(1, 2, sharey=True, figsize=(10, 1.5 + 0.28 * len(names)))
    rates.barh(names, [found[name]["over_ceiling"] for name in names], color="#88aacc")
    for name in names:
        one = found[name]
        dots = [rate / one["ceiling_tps"] for rate in one["rounds"]]
        rates.plot(dots, [name] * len(dots), "k.", markersize=4)
    rates.set(xlabel="trades/s over the ceiling's")
    cpu.barh(names, [found[name]["cpu_us"] for name in names], color="#ccaa88")
    cpu.set(xlabel="CPU us a trade")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
