"""`queries`: `trade_exists` and a balance, asked by another process while trades settle."""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

from bench import places, runs
from bench.asker import ask_steadily
from bench.cql import Connection
from bench.report import BenchError, Report, percentiles, table
from bench.world import Process, World

SAYS = "how long `trade_exists` and a balance take while trades settle"
MORE = """\
`sidecar run` settles a stream at --rate. Once it runs steadily, a process of its own asks through `sidecar.open_store`,
both kinds at once and steadily: whether trades exist (a fifth do not), and users' balances. Wrong answers are counted
and fail the run. For --ask-first seconds each kind is asked before it counts, so that the node has compiled what
answers. The settling's own latency in the same seconds stands beside it.

Before anything settles, the node alone is asked for one row of its own at the same pace, by a client that does nothing
else (bench/cql.py): what this machine takes for a question and an answer, whoever asks.

examples:
  scripts/bench queries --store cassandra
  scripts/bench queries --rate 5000 --per-s 500 --seconds 30
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this verb takes."""
    add = parser.add_argument
    add("--rate", type=float, default=1_000.0, metavar="R", help="events settled a second (default 1000)")
    add("--per-s", type=float, default=100.0, metavar="Q", help="questions of each kind a second (default 100)")
    add("--seconds", type=float, default=60.0, metavar="S", help="measured (default 60)")
    add("--ramp", type=float, default=10.0, metavar="S", help="settled before questions are asked (default 10)")
    add("--ask-first", type=float, default=10.0, metavar="S", help="of each kind, ten times as often, not measured")
    add("--users", type=int, default=1_000, metavar="N", help="who trade (default 1,000)")


def run(args: argparse.Namespace, report: Report, folder: Path) -> tuple[list[str], str, bool]:
    """Measure."""
    workload = runs.Workload(trades=0, users=args.users)
    engine = workload.steady(args.rate)  # until all was asked
    asked: dict[str, Any] = {}
    asked_us = [0, 0]

    def ask(world: World, sidecar: Process) -> None:
        runs.until_acked(world, sidecar, workload.deposits + int(args.rate * args.ramp))
        acked = world.said()["acked"]
        time.sleep(1.0)  # the journal is written once a second
        report.note("asking")
        asked_us[0] = time.time_ns() // 1_000
        answers = places.program(
            "bench.asker", *world.config(), "--journal", str(world.journal), "--acked", str(acked),
            "--per-s", str(args.per_s), "--seconds", str(args.seconds), "--warm-up", str(args.ask_first),
            timeout_s=args.seconds * 2 + 60,
        )  # fmt: skip
        asked_us[1] = time.time_ns() // 1_000
        asked_us[0] = max(asked_us[0], asked_us[1] - int(args.seconds * 1e6))
        asked.update(answers)

    with places.place(args.store, args.port, folder / "warm-up", report, args.warm_up) as place:
        alone = _ask_alone(place, args, report) if isinstance(place, places.CassandraPlace) else None
        report.note(f"settling {args.rate:,.0f} events/s")
        done = runs.settle_live(
            place, folder / "run", engine, settings=args.set, judge=args.judge, watch_every_s=0.25, meanwhile=ask
        )
    if not asked:
        raise BenchError("nothing was asked")
    settled = percentiles(done.joined.latencies(*asked_us))
    wrong = sum(one["wrong"] for one in asked.values())
    report.figures |= {
        "store": place.name,
        **asked,
        "settled": settled,
        "alone": alone,
        "wrong": wrong,
        "equal": done.equal,
    }
    head = ("", "asked", "p50 ms", "p90", "p99", "p99.9", "max", "wrong")
    keys = ("p50_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms")
    lines = [[name, one["asked"], *(one[key] for key in keys), one["wrong"]] for name, one in asked.items()]
    lines.append(["(an event settled)", "", *(settled[key] for key in keys), ""])
    if alone is not None:
        lines.append(["(the node alone)", alone["asked"], *(alone[key] for key in keys), ""])
    title = f"queries to {place.name} while {args.rate:,.0f} events/s settle"
    return [table(title, head, lines)], "", not wrong and done.equal is not False


def _ask_alone(place: places.CassandraPlace, args: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Ask a node that does nothing else for one row, at the pace of both kinds together."""
    report.note("asking the node alone")
    with Connection(place.host, place.port) as connection:
        statement = connection.prepare("SELECT key FROM system.local WHERE key = 'local'")

        async def ask() -> bool:
            connection.execute(statement)  # blocks: nothing else is on this loop
            return True

        asyncio.run(ask_steadily(ask, 20 * args.per_s, args.ask_first))
        return asyncio.run(ask_steadily(ask, 2 * args.per_s, args.seconds / 2))
