"""`compare`: the sidecar beside the fastest and the plainest ways to write the same rows into Cassandra, in one run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import places, rows, runs
from bench.report import BenchError, Report, plotting, table
from bench.world import World

SAYS = "the sidecar beside the fastest and the plainest ways to write the same rows (Cassandra)"
STORES = ("cassandra",)
MORE = """\
On the same trades (1,000 users; about 4.9 rows a trade once 16 trades are coalesced; counted and printed):

  ceiling      the rows as pre-encoded LOGGED batches from a client that does nothing else: the two best of a sweep over
               batches of 8, 16, 32 events and 8, 16, 32 of them under way; the one with the better median counts
  sidecar      `sidecar settle` from a filled tape; from the beginning of its life to the last acknowledgement
  live         engine flat out -> socket -> `sidecar run`; from the first frame sent to the last acknowledgement
  sequential   exists? insert, four times read and write; every statement awaited (real driver, prepared)
  one_by_one   one LOGGED batch a trade, awaited
  concurrent   the same batches through execute_concurrent

Each of them once a round, in fresh tables, the order rotated; the median of the rounds counts. Before the first round
sidecar and live run once uncounted, as the sweep is for the ceiling: the first run of a kind meets a database that is
still compiling what it needs for it. All are processes of their own, on the cores that the database has too. The judge
compares every row that ceiling, sidecar and live have written with the engine's journal. The plain ways settle the
first trades only (they are bounded by time).

A run is valid when the ceiling reached 90 times the sequential way or more (else it is too slow to be one), when there
are 4.8 rows a trade or more, and everything was equal. sidecar_cpu_us is the CPU time of the settling process a trade.

examples:
  scripts/bench compare                        about seven minutes
  scripts/bench compare --trades 5000 --rounds 1 --seconds 1 --warm-up 1      only to see it work
  scripts/bench compare --only ceiling,sidecar --port 9042                    two of them, on a node that runs already
"""
WAYS = ("ceiling", "sidecar", "live", "sequential", "one_by_one", "concurrent")
PLAIN_TRADES = {"sequential": 2_000, "one_by_one": 5_000, "concurrent": 20_000}
WARMED = ("sidecar", "live")  # once, uncounted; the sweep does it for the ceiling
SWEEP_TRADES = 50_000
SWEEP = (8, 16, 32)
CANDIDATES = 2
CEILING_OVER_SEQUENTIAL = 90.0
ROWS_A_TRADE = 4.8


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this verb takes."""
    add = parser.add_argument
    add("--trades", type=int, default=100_000, metavar="N", help="Binance's 34,419, then generated (default 100,000)")
    add("--users", type=int, default=1_000, metavar="N", help="who trade (default 1,000)")
    add("--rounds", type=int, default=3, metavar="N", help="the median counts (default 3)")
    add("--seconds", type=float, default=20.0, metavar="S", help="at most for a plain way (default 20)")
    add("--only", default=",".join(WAYS), metavar="WAY,...", help="leave out the others")
    add("--ceiling", metavar="BATCHxWINDOW", help="no sweep: e.g. 16x16")
    add("--plot", type=Path, metavar="FILE", help="draw the rates as PNG")


class Comparison:
    """One run: the place, the tape, and each way's rounds."""

    def __init__(
        self, args: argparse.Namespace, report: Report, folder: Path, place: places.CassandraPlace, tape: runs.Tape
    ) -> None:
        self._args = args
        self._report = report
        self._folder = folder
        self._place = place
        self._tape = tape
        self.candidates = [(16, 16)]  # batch and window of the ceiling, the best of the sweep
        self.rounds: dict[str, list[dict[str, Any]]] = {}

    def ways(self) -> dict[str, Callable[[Path], dict[str, Any]]]:
        """Give each way by its name."""
        plain = {way: (lambda folder, way=way: self._plain(folder, way)) for way in PLAIN_TRADES}
        return {"ceiling": self._ceiling, "sidecar": self._sidecar, "live": self._live, **plain}

    def run(self, ways: list[str]) -> None:
        """Go through the rounds."""
        known = self.ways()
        for way in (way for way in WARMED if way in ways):
            done = known[way](self._folder / f"uncounted-{way}")
            self._report.note(f"uncounted: {way} {done['trades_per_s']:,.0f} trades/s")
        for number in range(self._args.rounds):
            turned = number * 2 % len(ways)
            for way in ways[turned:] + ways[:turned]:
                folder = self._folder / f"round-{number + 1}-{way}"
                done = known[way](folder)
                self.rounds.setdefault(way, []).append(done)
                judged = "" if done.get("equal") is not False else ", NOT EQUAL"
                self._report.note(f"round {number + 1}: {way} {done['trades_per_s']:,.0f} trades/s{judged}")

    def sweep(self) -> list[dict[str, Any]]:
        """Find the ceiling's best batch and window."""
        if self._args.ceiling:
            batch, _, window = self._args.ceiling.partition("x")
            self.candidates = [(int(batch), int(window))]
            return []
        trades = min(self._args.trades, SWEEP_TRADES)
        found = []
        for batch in SWEEP:
            for window in SWEEP:
                folder = self._folder / f"sweep-{batch}x{window}"
                done = self._write_rows(folder, batch, window, trades=trades, judge=False)
                found.append(done)
                self._report.note(f"ceiling, {batch} a batch, {window} under way: {done['trades_per_s']:,.0f} trades/s")
        best = sorted(found, key=lambda one: float(one["trades_per_s"]), reverse=True)[:CANDIDATES]
        self.candidates = [(one["batch"], one["window"]) for one in best]
        return found

    def _ceiling(self, folder: Path) -> dict[str, Any]:
        """Run both candidates: one lucky figure of the sweep must not lower the ceiling."""
        found = [
            self._write_rows(
                folder / f"{batch}x{window}", batch, window, trades=self._args.trades, judge=self._args.judge
            )
            for batch, window in self.candidates
        ]
        equal = all(one["equal"] for one in found) if self._args.judge else None
        return {"trades_per_s": max(one["trades_per_s"] for one in found), "equal": equal, "candidates": found}

    def _write_rows(self, folder: Path, batch: int, window: int, *, trades: int, judge: bool) -> dict[str, Any]:
        folder.mkdir(parents=True)
        with self._place.fresh(folder) as spot:
            more = ("--trades", trades, "--batch", batch, "--window", window)
            done = self._place.program("bench.ceiling", spot, self._tape.journal, *more)
            if judge:
                done["equal"] = self._judge(folder, spot)
        return {"batch": batch, "window": window, **done}

    def _plain(self, folder: Path, way: str) -> dict[str, Any]:
        folder.mkdir(parents=True)
        with self._place.fresh(folder) as spot:
            trades = min(PLAIN_TRADES[way], self._args.trades)
            more = (way, "--trades", trades, "--seconds", self._args.seconds)
            return self._place.program("bench.plain", spot, self._tape.journal, *more)

    def _sidecar(self, folder: Path) -> dict[str, Any]:
        done = runs.settle_tape(self._place, self._tape, folder, settings=self._args.set, judge=self._args.judge)
        return done.figures() | {"ends": sorted((one.first, one.last) for one in done.joined.batches)}

    def _live(self, folder: Path) -> dict[str, Any]:
        workload = runs.Workload(trades=self._args.trades, users=self._args.users)
        engine = [*workload.engine(), "--trades", str(workload.trades)]
        done = runs.settle_live(self._place, folder, engine, settings=self._args.set, judge=self._args.judge)
        return done.figures()

    def _judge(self, folder: Path, spot: places.Spot) -> bool:
        with World(folder, source="mixed", store=spot.settings, judged=spot.judged) as world:
            world.journal = self._tape.journal
            return bool(world.judge()["ok"])


def run(args: argparse.Namespace, report: Report, folder: Path) -> tuple[list[str], str, bool]:
    """Compare."""
    ways = args.only.split(",")
    if unknown := set(ways) - set(WAYS):
        raise BenchError(f"--only {','.join(sorted(unknown))}: there are {', '.join(WAYS)}")
    with places.place("cassandra", args.port, folder / "warm-up", report, args.warm_up) as place:
        assert isinstance(place, places.CassandraPlace)
        report.note(f"filling a tape with {args.trades:,} trades")
        tape = runs.fill_tape(folder / "tape", runs.Workload(trades=args.trades, users=args.users))
        comparison = Comparison(args, report, folder, place, tape)
        swept = comparison.sweep() if "ceiling" in ways else []
        comparison.run(ways)
    rounds = comparison.rounds
    candidates: dict[str, list[float]] = {}
    if "ceiling" in rounds:
        for one in (one for each in rounds["ceiling"] for one in each["candidates"]):
            candidates.setdefault(f"{one['batch']}x{one['window']}", []).append(one["trades_per_s"])
        rounds["ceiling"] = ceiling(rounds["ceiling"])
    folded = runs.folded(tape.journal)
    figures = report.figures
    figures |= {"store": "cassandra", "trades": tape.sent.trades, "events": len(folded), "users": args.users}
    figures |= {
        f"{way}_tps": runs.middle(one["trades_per_s"] for one in rounds[way]) if way in rounds else None for way in WAYS
    }
    figures["sidecar_cpu_us"] = runs.middle(one["cpu_us"] for one in rounds["sidecar"]) if "sidecar" in rounds else None
    figures["live_cpu_us"] = runs.middle(one["cpu_us"] for one in rounds["live"]) if "live" in rounds else None
    figures["ceiling_candidates"] = candidates
    figures["rows_a_trade"] = round(rows.rows_a_trade(rows.in_batches(folded, 16)), 3)
    if "sidecar" in rounds:
        ends = rounds["sidecar"][-1]["ends"]
        figures["sidecar_rows_a_trade"] = round(rows.written_rows_a_trade(folded, ends), 3)
    for one in rounds.get("sidecar", ()):
        del one["ends"]
    judge(figures, rounds)
    figures["rounds"], figures["sweep"] = rounds, swept
    if args.plot:
        draw(args.plot, figures)
        report.note(f"drawn: {args.plot}")
    return _tables(figures), _verdict(figures), bool(figures["valid"])


def ceiling(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the rounds of the candidate with the best median; a round is equal when all candidates were.

    The better of two in each round would be more than either can do: a machine's own noise lifts it.
    """
    best = max(
        zip(*(one["candidates"] for one in rounds), strict=True),
        key=lambda candidate: runs.middle(one["trades_per_s"] for one in candidate),
    )
    return [done | {"equal": one["equal"]} for done, one in zip(best, rounds, strict=True)]


def judge(figures: dict[str, Any], rounds: dict[str, list[dict[str, Any]]]) -> None:
    """Add the ratios, and whether the run is valid."""

    def ratio(way: str, other: str) -> float | None:
        above, below = figures[f"{way}_tps"], figures[f"{other}_tps"]
        return round(above / below, 3) if above and below else None

    figures["ratios"] = {
        f"{way}/{other}": ratio(way, other) for other in ("ceiling", "sequential") for way in WAYS if way != other
    }
    over = figures["ratios"]["ceiling/sequential"]
    invalid = []
    if over is None:
        invalid.append("the ceiling or the sequential way was left out")
    elif over < CEILING_OVER_SEQUENTIAL:
        invalid.append(f"ceiling / sequential is {over:.0f}, below {CEILING_OVER_SEQUENTIAL:.0f}: too slow a ceiling")
    if min(figures["rows_a_trade"], figures.get("sidecar_rows_a_trade", ROWS_A_TRADE)) < ROWS_A_TRADE:
        invalid.append(f"less than {ROWS_A_TRADE} rows a trade")
    if unequal := [way for way, done in rounds.items() if any(one.get("equal") is False for one in done)]:
        invalid.append(f"not equal to the journal: {', '.join(unequal)}")
    if not all(one.get("equal", True) for done in rounds.values() for one in done if "lives" in one):
        invalid.append("not judged")
    figures["valid"], figures["invalid_because"] = not invalid, invalid


def _tables(figures: dict[str, Any]) -> list[str]:
    lines = []
    for way in WAYS:
        done = figures["rounds"].get(way)
        if done:
            ratios = figures["ratios"]
            cpu = figures.get(f"{way}_cpu_us") or (
                runs.middle(one["cpu_us"] for one in done) if way == "ceiling" else None
            )
            row = [way, figures[f"{way}_tps"], ratios.get(f"{way}/ceiling"), ratios.get(f"{way}/sequential"), cpu]
            lines.append([*row, " ".join(f"{one['trades_per_s']:,.0f}" for one in done)])
    head = ("", "trades/s", "/ ceiling", "/ sequential", "CPU us a trade", "rounds")
    tables = [table(f"compare: {figures['trades']:,} trades, {figures['rows_a_trade']} rows a trade", head, lines)]
    if figures["sweep"]:
        by = {(one["batch"], one["window"]): one["trades_per_s"] for one in figures["sweep"]}
        lines = [[f"{batch} a batch", *(by[batch, window] for window in SWEEP)] for batch in SWEEP]
        heads = ("", *(f"{window} under way" for window in SWEEP))
        tables.append(table("the ceiling's sweep, trades/s", heads, lines))
    return tables


def _verdict(figures: dict[str, Any]) -> str:
    if figures["valid"]:
        return "valid: the ceiling is one, all rows are right"
    return "INVALID: " + "; ".join(figures["invalid_because"])


def draw(path: Path, figures: dict[str, Any]) -> None:
    """Draw the rates as bars, each round a dot."""
    pyplot = plotting()
    figure, axes = pyplot.subplots(figsize=(9, 4))
    ways = [way for way in WAYS if figures[f"{way}_tps"]][::-1]
    axes.barh(ways, [figures[f"{way}_tps"] for way in ways], color="#88aacc")
    for way in ways:
        rates = [one["trades_per_s"] for one in figures["rounds"][way]]
        axes.plot(rates, [way] * len(rates), "k.", markersize=4)
        axes.annotate(f" {figures[f'{way}_tps']:,.0f}", (max(rates), way), va="center")
    axes.set(xlabel="trades/s", title=f"{figures['trades']:,} trades, {figures['rows_a_trade']} rows a trade")
    axes.margins(x=0.12)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
