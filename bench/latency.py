"""`latency`: from the moment an event was meant to be sent to its acknowledgement, at fixed rates, open loop."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench import places, runs
from bench.report import BenchError, Report, percentiles, plotting, table

SAYS = "how long an event takes to be acknowledged, at fixed rates"
MORE = """\
The engine decides beforehand when each event is due and never waits for anybody (open loop); an event's latency
counts from when it was *meant* to be sent, so waiting in any queue is in it, the engine's own lateness too (it is
shown). The deposits are sent at once, then comes a ramp that is not measured. Each rate has fresh tables. The judge
compares every row afterwards.

A rate in percent is of what the same store held just before: a burst of some seconds is settled flat out, twice; then
what the second came to is offered for --seconds, and a quarter more each time that all of it was acknowledged as it
came. What is acknowledged a second when it was not is what is held. (The burst's own rate is mostly more: nothing of it
was flushed and compacted yet.)

examples:
  scripts/bench latency --rate 1000                                     SQLite, for 60 s
  scripts/bench latency --store cassandra --rates 100,1000,5000,10000,80% --plot latency.png
"""
MORE_OFFERED, ALL_OF_IT = 1.25, 0.99  # times, each time that so much was held


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this verb takes."""
    add = parser.add_argument
    add("--rate", "--rates", default="1000", metavar="R[,R...]", help="events a second, or percent (default 1000)")
    add("--seconds", type=float, default=60.0, metavar="S", help="measured at each rate (default 60)")
    add("--ramp", type=float, default=10.0, metavar="S", help="at the rate, before it counts (default 10)")
    add("--users", type=int, default=1_000, metavar="N", help="who trade (default 1,000)")
    add("--plot", type=Path, metavar="FILE", help="draw the percentiles as PNG")


def parse_rates(text: str) -> list[tuple[float, bool]]:
    """Read rates: (value, whether it is a percentage)."""
    try:
        found = [(float(part.rstrip("%")), part.endswith("%")) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found)[0] <= 0:
        raise BenchError(f"--rates {text}: wanted like 100,1000,80%")
    return found


def run(args: argparse.Namespace, report: Report, folder: Path) -> tuple[list[str], str, bool]:
    """Measure each rate."""
    rates = parse_rates(args.rate)
    drawn: dict[str, Any] = {}
    figures: list[dict[str, Any]] = []
    with places.place(args.store, args.port, folder / "warm-up", report, args.warm_up) as place:
        live_tps = None
        if any(percent for _, percent in rates):
            live_tps = held_live(place, folder / "held", args, report)
            report.figures["live_tps"] = live_tps
        for number, (value, percent) in enumerate(rates, 1):
            rate = value / 100 * live_tps if percent and live_tps else value
            report.note(f"{rate:,.0f} events/s for {args.ramp:g} + {args.seconds:g} s")
            found, one = measure(place, folder / f"rate-{number}", rate, args)
            drawn[f"{rate:,.0f}/s"] = found
            report.histograms[f"{rate:g}"] = found.encode().decode()
            figures.append({"rate": round(rate, 1), "asked": f"{value:g}{'%' if percent else ''}", **one})
            report.note(f"p50 {one['p50_ms']:.2f} ms, p99 {one['p99_ms']:.2f} ms, max {one['max_ms']:.1f} ms")
    equal = all(one["equal"] is not False for one in figures)
    report.figures |= {"store": place.name, "rates": figures, "equal": equal}
    if len(figures) == 1:
        report.figures |= figures[0]
    if args.plot:
        draw(args.plot, drawn, f"From the intended send to acknowledged, {place.name}")
        report.note(f"drawn: {args.plot}")
    head = (
        "events/s", "held", "p50 ms", "p90", "p99", "p99.9", "max", "engine late", "CPU %", "RSS MiB", "mid", "end",
        "equal",
    )  # fmt: skip
    keys = (
        "rate", "acked_per_s", "p50_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms", "engine_late_ms_max", "cpu_percent",
        "rss_mib_begin", "rss_mib_mid", "rss_mib_end", "equal",
    )  # fmt: skip
    lines = [[one[key] for key in keys] for one in figures]
    text = table(f"latency into {place.name}: intended send to acknowledged, {args.seconds:g} s each", head, lines)
    return [text], "", bool(report.figures["equal"])


def held_live(place: places.Place, folder: Path, args: argparse.Namespace, report: Report) -> float:
    """Measure how many events a second are held live: what percentages are of."""
    workload = runs.Workload(trades=60_000, users=args.users)
    engine = [*workload.engine(), "--trades", str(workload.trades)]
    runs.settle_live(place, folder / "warm-up", engine, settings=args.set, judge=False)
    offered = runs.settle_live(place, folder / "burst", engine, settings=args.set, judge=False).trades_per_s
    report.figures["live_burst_tps"] = round(offered, 1)
    report.note(f"a burst, live and flat out: {offered:,.0f} trades/s")
    unjudged = argparse.Namespace(**vars(args) | {"judge": False})
    while True:
        _, found = measure(place, folder / f"offered-{offered:.0f}", offered, unjudged)
        held: float = found["acked_per_s"]
        report.note(f"held: {held:,.0f} of {offered:,.0f} events/s")
        if held < ALL_OF_IT * offered:
            return held
        offered *= MORE_OFFERED


def measure(place: places.Place, folder: Path, rate: float, args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Measure one rate; give the histogram and the figures."""
    workload = runs.Workload(trades=0, users=args.users)
    engine = workload.steady(rate, args.ramp + args.seconds)
    done = runs.settle_live(place, folder, engine, settings=args.set, judge=args.judge, watch_every_s=0.25)
    sent, joined, watch = done.joined.sent, done.joined, done.watch
    begin_us = sent.meant_us[workload.deposits] + int(args.ramp * 1e6)
    end_us = begin_us + int(args.seconds * 1e6)
    found = joined.latencies(begin_us, end_us)
    late_us = max(
        actual - meant
        for actual, meant in zip(sent.actual_us, sent.meant_us, strict=True)
        if begin_us <= meant < end_us
    )
    acked = sum(begin_us <= at_us < end_us for at_us in joined.acked_us)
    mib = [round(watch.rss_bytes(at_us) / 2**20, 1) for at_us in (begin_us, (begin_us + end_us) // 2, end_us)]
    cpu_s = watch.cpu_s(begin_us, end_us)
    return found, {
        **percentiles(found),
        "events": found.get_total_count(),
        "acked_per_s": round(acked / args.seconds, 1),
        "engine_late_ms_max": late_us / 1_000,
        "cpu_percent": round(cpu_s * 100 / args.seconds, 1),
        "cpu_us": round(cpu_s * 1e6 / max(acked, 1), 1),
        **dict(zip(("rss_mib_begin", "rss_mib_mid", "rss_mib_end"), mib, strict=True)),
        "equal": done.equal,
    }


def draw(path: Path, drawn: dict[str, Any], title: str) -> None:
    """Draw percentiles against a scale of nines."""
    pyplot = plotting()
    figure, axes = pyplot.subplots(figsize=(9, 5))
    shares = [0.0, *(100 - 100 / 10 ** (step / 10) for step in range(1, 46))]
    for label, found in drawn.items():
        places_ = [1 / (1 - share / 100) for share in shares]
        axes.plot(places_, [found.get_value_at_percentile(share) / 1_000 for share in shares], label=label)
    axes.set(xscale="log", yscale="log", xlabel="percentile", ylabel="ms", title=title)
    axes.set_xticks([1, 2, 10, 100, 1_000, 10_000], ["0", "50", "90", "99", "99.9", "99.99"])
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
