"""`soak`: a steady load for minutes or hours; memory, files, threads and latency must not drift."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from bench import places, runs
from bench.report import Report, percentiles, plotting, table
from bench.watch import Sample

SAYS = "a steady load for minutes or hours: fails when memory, files, threads or latency drift"
MORE = """\
`sidecar run` settles a stream at --rate. The time is cut into intervals; the last third of them is compared with the
first third (after the ramp, by when the tape's events in memory have filled). It fails, exit 1, when

  RSS        the median has grown by more than --rss-mib-max
  files      there are more than 5 more open
  threads    there are more than 2 more
  latency    the median p99 is more than twice what it was, and more than 10 ms longer
  rows       the judge finds a difference

The tape keeps what is durable for 60 s only, so that its pruning is under load as well. The hourly proof is off, as in
every verb (its files and threads, from five minutes after the start, would be drift); for a soak of hours
--set reconcile.interval_s=3600 has it back.

examples:
  scripts/bench soak --minutes 10
  scripts/bench soak --minutes 480 --rate 2000 --store cassandra --plot soak.png
"""
INTERVALS = 12
FILES_MORE_MAX, THREADS_MORE_MAX = 5, 2
P99_FACTOR_MAX, P99_MORE_MS_MAX = 2.0, 10.0


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this verb takes."""
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, metavar="M", help="measured (default 10)")
    add("--rate", type=float, default=1_000.0, metavar="R", help="events a second (default 1000)")
    add("--ramp", type=float, default=60.0, metavar="S", help="at the rate, before it counts (default 60)")
    add("--users", type=int, default=1_000, metavar="N", help="who trade (default 1,000)")
    add("--rss-mib-max", type=float, default=16.0, metavar="N", help="how much more memory is no drift (default 16)")
    add("--plot", type=Path, metavar="FILE", help="draw the intervals as PNG")


def run(args: argparse.Namespace, report: Report, folder: Path) -> tuple[list[str], str, bool]:
    """Measure."""
    workload = runs.Workload(trades=0, users=args.users)
    seconds = args.minutes * 60
    engine = workload.steady(args.rate, args.ramp + seconds)
    with places.place(args.store, args.port, folder / "warm-up", report, args.warm_up) as place:
        report.note(f"settling {args.rate:,.0f} events/s for {args.minutes:g} minutes")
        done = runs.settle_live(
            place, folder / "run", engine, settings=["tape.retention_s=60", *args.set], judge=args.judge,
            watch_every_s=min(1.0, seconds / INTERVALS / 4), timeout_s=seconds + args.ramp + 900,
        )  # fmt: skip
    begin_us = done.joined.sent.meant_us[workload.deposits] + int(args.ramp * 1e6)
    spans = [
        (begin_us + int(number * seconds / INTERVALS * 1e6), begin_us + int((number + 1) * seconds / INTERVALS * 1e6))
        for number in range(INTERVALS)
    ]
    intervals = [{"at_s": round((span[0] - begin_us) / 1e6), **interval(done, *span)} for span in spans]
    drifts = drifting(intervals, args.rss_mib_max)
    if done.equal is False:
        drifts.append("the judge found differences")
    report.figures |= {
        "store": place.name, "events": done.joined.sent.last_sequence, "intervals": intervals, "drifts": drifts,
        "lives": done.lives, "equal": done.equal, "ok": not drifts,
    }  # fmt: skip
    if args.plot:
        draw(args.plot, place.name, intervals)
        report.note(f"drawn: {args.plot}")
    keys = ("at_s", "rss_mib", "files", "threads", "cpu_percent", "p50_ms", "p99_ms", "max_ms")
    head = ("from s", "RSS MiB", "files", "threads", "CPU %", "p50 ms", "p99", "max")
    lines = [[one[key] for key in keys] for one in intervals]
    text = table(f"soak: {args.rate:,.0f} events/s into {place.name} for {args.minutes:g} minutes", head, lines)
    return [text], "DRIFTS: " + "; ".join(drifts) if drifts else "no drift", not drifts


def interval(done: runs.Settled, begin_us: int, end_us: int) -> dict[str, Any]:
    """Give what one interval was like."""
    samples: list[Sample] = [one for one in done.watch.samples if begin_us <= one.at_us < end_us]
    cpu_s = done.watch.cpu_s(begin_us, end_us)
    return {
        "rss_mib": round(statistics.median(one.rss_bytes for one in samples) / 2**20, 1),
        "files": max(one.files for one in samples),
        "threads": max(one.threads for one in samples),
        "cpu_percent": round(cpu_s * 1e8 / (end_us - begin_us), 1),
        **percentiles(done.joined.latencies(begin_us, end_us)),
    }


def drifting(intervals: list[dict[str, Any]], rss_mib_max: float) -> list[str]:
    """Compare the last third with the first; give what has drifted, in words."""
    third = len(intervals) // 3

    def medians(key: str) -> tuple[float, float]:
        return (
            statistics.median(one[key] for one in intervals[:third]),
            statistics.median(one[key] for one in intervals[-third:]),
        )

    found = []
    for key, more_max in (("rss_mib", rss_mib_max), ("files", FILES_MORE_MAX), ("threads", THREADS_MORE_MAX)):
        before, after = medians(key)
        if after - before > more_max:
            found.append(f"{key} from {before:g} to {after:g}")
    before, after = medians("p99_ms")
    if after > before * P99_FACTOR_MAX and after - before > P99_MORE_MS_MAX:
        found.append(f"p99 from {before:.1f} to {after:.1f} ms")
    return found


def draw(path: Path, store: str, intervals: list[dict[str, Any]]) -> None:
    """Draw memory and latency over time."""
    pyplot = plotting()
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6))
    above.plot([one["rss_mib"] for one in intervals], "o-")
    above.set(ylabel="RSS MiB", ylim=(0, None), title=f"soak into {store}")
    for key in ("p50_ms", "p99_ms", "max_ms"):
        below.plot([one[key] for one in intervals], "o-", label=key.removesuffix("_ms"))
    below.set(ylabel="ms", yscale="log", xlabel="interval")
    below.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
