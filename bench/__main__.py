"""The bench's command line: `scripts/bench VERB`; what each verb measures and how stands in its own room."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.report import RESULTS, BenchError, Report

VERBS = {
    "compare": "compare",
    "flat": "flat",
    "latency": "latency",
    "queries": "queries",
    "growth": "growth",
    "streams": "streams",
    "proofs": "proofs",
    "sweep": "sweep",
    "profile": "stages",
    "soak": "soak",
    "cluster": "cluster",
}  # verb: its room
OUT = Path(__file__).resolve().parent / "out"

_EPILOG = """\
examples:
  scripts/bench compare                                beside the fastest and the plainest ways, on a real Cassandra
  scripts/bench flat                                   how fast, on the embedded store
  scripts/bench flat --store cassandra                 and into a real Cassandra
  scripts/bench latency --store cassandra --rate 1000  how long an event takes
  scripts/bench sweep --tables shipped,ucs,zstd        settings side by side

Everything is measured with real processes, sockets and databases, in fresh tables, and judged afterwards: each row and
balance against the engine's journal, by code that shares nothing with the sidecar. A figure belongs to its machine:
trust ratios of one run, and have nothing else running. Every run appends one JSON line with machine, versions, commit,
parameters and figures to bench/results.jsonl.

exit status: 0 done, 1 failed, not equal or not valid, 2 wrong usage
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measures the sidecar: throughput, latency, and what they cost on this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, room in VERBS.items():
        module = import_module(f"bench.{room}")
        added = verbs.add_parser(
            name,
            help=module.SAYS,
            description=f"{module.SAYS[0].upper()}{module.SAYS[1:]}.",
            epilog=module.MORE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(room=module)
        module.arguments(added)
        _common(added, stores=getattr(module, "STORES", ("sqlite", "cassandra")))
    return parser


def _common(parser: argparse.ArgumentParser, stores: tuple[str, ...]) -> None:
    add = parser.add_argument_group("every verb").add_argument
    add("--store", choices=stores, default=stores[0], help="where it is settled (default %(default)s)")
    add(
        "--port",
        type=int,
        metavar="P",
        help="a running Cassandra on 127.0.0.1, which is left as it was; default: one of its own, wiped at the end",
    )
    add(
        "--warm-up",
        type=float,
        default=30.0,
        metavar="S",
        help="of the Cassandra node, before anything is measured (default 30)",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the sidecar; repeatable")
    add("--no-judge", action="store_false", dest="judge", help="don't compare the rows afterwards")
    add("--json", action="store_true", help="the last line is one JSON object with the figures")
    add("--results", type=Path, default=RESULTS, metavar="FILE", help="gets a line (default bench/results.jsonl)")
    add("--no-results", action="store_const", const=None, dest="results", help="append nothing")
    add("--keep", type=Path, metavar="DIR", help="keep tapes, logs and journals in DIR, which must not exist")


def main(argv: list[str] | None = None) -> int:
    """Run a verb; give the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.verb is None:
        parser.print_help(sys.stderr)
        return 2
    folder = args.keep or OUT / f"{args.verb}-{Report.now()}"
    if folder.exists():
        parser.error(f"--keep {folder}: is there already")
    hidden = {"verb", "room", "json", "results", "keep", "plot"}
    parameters: dict[str, Any] = {name: value for name, value in vars(args).items() if name not in hidden}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing that was started is left behind
    report = Report(args.verb, parameters, results=args.results, as_json=args.json)
    keep = args.keep is not None
    try:
        folder.mkdir(parents=True)
        tables, verdict, ok = args.room.run(args, report, folder.resolve())
        report.end(tables, verdict)
    except BenchError as error:
        keep = True  # the message may name a log
        print(f"scripts/bench {args.verb}: {error}\ntapes and logs are kept in {folder}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
