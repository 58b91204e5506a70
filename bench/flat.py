"""`flat`: a filled tape, settled as fast as it goes."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import places, rows, runs
from bench.report import Report, table

SAYS = "how fast a filled tape is settled"
MORE = """\
An engine publishes Binance trades, then generated ones (1,000 users) to `sidecar record`; then `sidecar settle` settles
that tape into fresh tables, once a round. The clock runs from the settler's first life (it has connected) to the last
acknowledgement; CPU is that of the settling process alone. After each round the judge compares every row.

examples:
  scripts/bench flat                                     SQLite, 100,000 trades, three rounds
  scripts/bench flat --store cassandra --trades 200000   a node is started, warmed up, and wiped
  scripts/bench flat --set pipeline.batch_trades_max=32  another setting of the sidecar
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this verb takes."""
    parser.add_argument("--trades", type=int, default=100_000, metavar="N", help="on the tape (default 100,000)")
    parser.add_argument("--users", type=int, default=1_000, metavar="N", help="who trade (default 1,000)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="the median counts (default 3)")


def run(args: argparse.Namespace, report: Report, folder: Path) -> tuple[list[str], str, bool]:
    """Measure."""
    with places.place(args.store, args.port, folder / "warm-up", report, args.warm_up) as place:
        report.note(f"filling a tape with {args.trades:,} trades")
        tape = runs.fill_tape(folder / "tape", runs.Workload(trades=args.trades, users=args.users))
        found = []
        for number in range(1, args.rounds + 1):
            done = runs.settle_tape(place, tape, folder / f"round-{number}", settings=args.set, judge=args.judge)
            found.append(done)
            report.note(f"round {number}: {done.trades_per_s:,.0f} trades/s, {done.cpu_us:.1f} us CPU a trade")
    ends = sorted((batch.first, batch.last) for batch in found[-1].joined.batches)
    report.figures |= {
        "store": place.name,
        "trades": tape.sent.trades,
        "events": len(tape.sent.meant_us),
        "trades_per_s": runs.middle(one.trades_per_s for one in found),
        "cpu_us": runs.middle(one.cpu_us for one in found),
        "rows_a_trade": round(rows.written_rows_a_trade(runs.folded(tape.journal), ends), 3),
        "rss_mib_max": max(one.figures()["rss_mib_max"] for one in found),
        "equal": all(one.equal is not False for one in found),
        "rounds": [one.figures() for one in found],
    }
    head = ("round", "trades/s", "CPU us a trade", "events a batch", "RSS MiB", "lives", "equal")
    keys = ("trades_per_s", "cpu_us", "events_a_batch", "rss_mib_max", "lives", "equal")
    lines = [(number, *(one[key] for key in keys)) for number, one in enumerate(report.figures["rounds"], 1)]
    figures = report.figures
    verdict = (
        f"{figures['trades_per_s']:,.0f} trades/s into {place.name}, {figures['cpu_us']:.1f} us CPU a trade, "
        f"{figures['rows_a_trade']} rows a trade (median of {args.rounds})"
    )
    text = table(f"flat: {args.trades:,} trades from a filled tape into {place.name}", head, lines)
    return [text], verdict, bool(figures["equal"])
