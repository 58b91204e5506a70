"""`profile`: where the sidecar's CPU goes, stage by stage, in us a trade."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from bench import places, runs
from bench.report import Report, table

SAYS = "where the sidecar's CPU goes, by stage, in us a trade"
MORE = """\
The sidecar runs with a sampler inside (bench/sampled.py: a look at a thread every few milliseconds of its CPU, weighted
by what it has used since); the rate beside it shows what the looking costs. CPU between the first frame (or, from a
tape, the first life) and the last acknowledgement counts.

  receive      socket, frames, the recording half     encode       batches and their bytes
  decode       msgpack and validation                 driver       the store's own work, and its driver
  tape         appending, committing, reading         ack          positions, and the bench's ack log
  fold         ledger: postings, balances             collector    Python's, for cycles
                                                      pipeline, settle loop, event loop, log: what is between them

examples:
  scripts/bench profile                              live: receive to ack in one process
  scripts/bench profile --from-tape --store cassandra
  scripts/bench profile --rate 1000 --trades 20000   what one trade costs at a low rate
  scripts/bench profile --top 40                     the functions and lines, too
"""
STAGES = (
    "receive", "decode", "tape", "fold", "encode", "pipeline", "driver", "ack", "settle loop", "event loop", "log",
    "collector", "native", "other",
)  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this verb takes."""
    add = parser.add_argument
    add("--trades", type=int, default=100_000, metavar="N", help="settled under the sampler (default 100,000)")
    add("--users", type=int, default=1_000, metavar="N", help="who trade (default 1,000)")
    add("--rate", type=float, metavar="R", help="events a second; default: flat out")
    add("--from-tape", action="store_true", help="only `sidecar settle`, from a filled tape")
    add("--top", type=int, default=15, metavar="N", help="functions shown (default 15)")


def run(args: argparse.Namespace, report: Report, folder: Path) -> tuple[list[str], str, bool]:
    """Measure."""
    out = folder / "samples.json"
    module = ("bench.sampled", str(out))
    workload = runs.Workload(trades=args.trades, users=args.users)
    with places.place(args.store, args.port, folder / "warm-up", report, args.warm_up) as place:
        if args.from_tape:
            report.note(f"filling a tape with {args.trades:,} trades")
            tape = runs.fill_tape(folder / "tape", workload)
            report.note("settling it")
            done = runs.settle_tape(place, tape, folder / "run", settings=args.set, judge=args.judge, module=module)
        else:
            report.note(f"settling {args.trades:,} trades live")
            engine = [*workload.engine(), "--trades", str(args.trades)]
            if args.rate:
                engine += ["--rate", str(args.rate), "--burst", str(workload.deposits)]
            done = runs.settle_live(place, folder / "run", engine, settings=args.set, judge=args.judge, module=module)
    by_stage, by_thread, by_function, looks = read(out, done.begin_us, done.joined.last_ack_us)
    trades = done.joined.sent.trades

    def us(ns: int) -> float:
        return round(ns / 1_000 / trades, 2)

    total = sum(by_stage.values())
    report.figures |= {
        "store": place.name,
        "from_tape": args.from_tape,
        "trades": trades,
        **done.figures(),
        "looks": looks,
        "sampled_us": us(total),
        "stages_us": {stage: us(by_stage[stage]) for stage in STAGES if by_stage[stage]},
        "threads_us": {thread: us(ns) for thread, ns in by_thread.most_common()},
        "functions_us": {function: us(ns) for function, ns in by_function.most_common(args.top)},
    }
    lines = [[stage, us(by_stage[stage]), 100 * by_stage[stage] / total] for stage in STAGES if by_stage[stage]]
    lines.append(["together", us(total), 100.0])
    tables = [
        table(f"profile: {trades:,} trades into {place.name}, {looks:,} looks", ("stage", "us a trade", "%"), lines),
        table("by thread", ("thread", "us a trade"), [[name, us(ns)] for name, ns in by_thread.most_common()]),
        table(
            "the most expensive places (function of the stage, its line > innermost function)",
            ("place", "us a trade"),
            [[name, us(ns)] for name, ns in by_function.most_common(args.top)],
        ),
    ]
    verdict = f"{done.trades_per_s:,.0f} trades/s under the sampler, {done.cpu_us:.1f} us CPU a trade, its own included"
    return tables, verdict, done.equal is not False


def read(out: Path, begin_us: int, end_us: int) -> tuple[Counter[str], Counter[str], Counter[str], int]:
    """Add up the samples of a span of time, in ns: by stage, thread and function; and count the looks."""
    by_stage: Counter[str] = Counter()
    by_thread: Counter[str] = Counter()
    by_function: Counter[str] = Counter()
    looks = 0
    samples: list[Any] = json.loads(out.read_text())
    for at_us, thread, stage, function, used_ns in samples:
        if begin_us <= at_us <= end_us:
            looks += 1
            by_stage[stage] += used_ns
            by_thread[thread] += used_ns
            by_function[f"{stage}: {function}"] += used_ns
    return by_stage, by_thread, by_function, looks
