"""`proofs`: what settling feels of `sidecar reconcile --full`, one proof after the other, under a steady load."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from bench import places, runs
from bench.report import Report, percentiles, table
from bench.world import Process, World

SAYS = "what settling feels of full reconciliations, one after the other"
MORE = """\
`sidecar run` settles a stream at --rate; `sidecar reconcile --full` proves all of it, --proofs times, each a process of
its own at `reconcile.rate_rows_s`. Before each proof lie --between seconds without one: so what the node does by itself
(collections, flushes, compaction) falls on both sides alike. Latencies count from the intended send. A finding fails
the run: there is nothing to find. Each proof reads all that was settled so far, so the last ones take the longest.

examples:
  scripts/bench proofs --store cassandra
  scripts/bench proofs --store cassandra --set reconcile.rate_rows_s=10000 --proofs 5
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this verb takes."""
    add = parser.add_argument
    add("--rate", type=float, default=1_000.0, metavar="R", help="events settled a second (default 1000)")
    add("--proofs", type=int, default=10, metavar="N", help="full reconciliations (default 10)")
    add("--between", type=float, default=8.0, metavar="S", help="without one, before each (default 8)")
    add("--ramp", type=float, default=10.0, metavar="S", help="settled before it counts (default 10)")
    add("--users", type=int, default=1_000, metavar="N", help="who trade (default 1,000)")


def run(args: argparse.Namespace, report: Report, folder: Path) -> tuple[list[str], str, bool]:
    """Measure."""
    workload = runs.Workload(trades=0, users=args.users)
    engine = workload.steady(args.rate)
    spans: dict[str, list[tuple[int, int]]] = {"without": [], "with": []}
    said: list[dict[str, Any]] = []

    def prove(world: World, sidecar: Process) -> None:
        runs.until_acked(world, sidecar, workload.deposits + int(args.rate * args.ramp))
        for number in range(args.proofs):
            begun_us = time.time_ns() // 1_000
            time.sleep(args.between)
            proof_us = time.time_ns() // 1_000
            one = world.verb("reconcile", "--full")
            end_us = time.time_ns() // 1_000
            spans["without"].append((begun_us, proof_us))
            spans["with"].append((proof_us, end_us))
            said.append(one)
            report.note(f"proof {number + 1}: {one['events']:,} events in {one['seconds']:.1f} s")

    with places.place(args.store, args.port, folder / "warm-up", report, args.warm_up) as place:
        report.note(f"settling {args.rate:,.0f} events/s")
        done = runs.settle_live(
            place, folder / "run", engine, settings=args.set, judge=args.judge,
            watch_every_s=0.25, meanwhile=prove,
        )  # fmt: skip
    findings = sum(len(one["findings"]) + len(one["not_checked"]) for one in said)
    found = {name: percentiles(_together(done.joined, those)) for name, those in spans.items()}
    ratio = round((found["with"]["p99_ms"] or 0.0) / (found["without"]["p99_ms"] or 1.0), 2)
    report.figures |= {
        "store": place.name, "proofs": len(said), "findings": findings, "p99_ratio": ratio, **found,
        "proof_seconds": [one["seconds"] for one in said], "events": said[-1]["events"], "equal": done.equal,
    }  # fmt: skip
    keys = ("p50_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms")
    lines = [[f"{name} proofs", *(one[key] for key in keys)] for name, one in found.items()]
    title = f"{args.rate:,.0f} events/s into {place.name}, with {len(said)} full proofs and without"
    verdict = f"p99 with / without: {ratio:.2f}; {findings} false findings"
    return (
        [table(title, ("", "p50 ms", "p90", "p99", "p99.9", "max"), lines)],
        verdict,
        not findings and done.equal is not False,
    )


def _together(joined: Any, spans: list[tuple[int, int]]) -> Any:
    first, *others = (joined.latencies(*span) for span in spans)
    for one in others:
        first.add(one)
    return first
