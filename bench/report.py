"""What a run leaves: tables for people, one JSON line in the results file, and its figures last with --json."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from bench import machine

LOAD_QUIET_MAX = 0.7
RESULTS = Path(__file__).resolve().parent / "results.jsonl"


class BenchError(Exception):
    """A run can't be had, or its result can't be trusted; the message says what to do."""


class Report:
    """One run of a verb: says what it does on stderr while it lasts, and what came of it at its end."""

    def __init__(self, verb: str, parameters: dict[str, Any], *, results: Path | None, as_json: bool) -> None:
        self.figures: dict[str, Any] = {}
        self.database: dict[str, Any] = {}
        self.histograms: dict[str, str] = {}  # encoded; they go to the results file alone
        self._verb = verb
        self._parameters = parameters
        self._results = results
        self._as_json = as_json
        self._machine = machine.describe()
        self._ticks = machine.ticks()
        self._begun = datetime.now(UTC)

    @staticmethod
    def now() -> str:
        """Give the time as a part of a file's name."""
        return datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")

    def note(self, text: str) -> None:
        """Say what is going on."""
        seconds = (datetime.now(UTC) - self._begun).total_seconds()
        print(f"[{seconds:6.1f} s] {text}", file=sys.stderr, flush=True)

    def line(self) -> dict[str, Any]:
        """Give the whole result."""
        return {
            "verb": self._verb,
            "at": self._begun.isoformat(timespec="seconds"),
            "machine": self._machine | {"stolen_percent": machine.stolen_percent(self._ticks)},
            "versions": {**machine.versions(), **self.database},
            "commit": machine.commit(),
            "parameters": self._parameters,
            "figures": self.figures,
        }

    def end(self, tables: Iterable[str], verdict: str = "") -> None:
        """Print the tables, append the line, and with --json print the figures as the last line."""
        line = self.line()
        told = line["machine"]
        print(
            f"\n{told['cpu']}, {told['cores']} cores ({told['stolen_percent']} % stolen by the host), "
            f"{told['memory_bytes'] / 2**30:.0f} GiB; commit {line['commit']}"
        )
        if told["load_1m"] > LOAD_QUIET_MAX:
            print(f"NOISY: the machine was not idle at the start (load {told['load_1m']}); figures are too low")
        print(", ".join(f"{name} {version}" for name, version in line["versions"].items() if version))
        for text in tables:
            print(f"\n{text}")
        if verdict:
            print(f"\n{verdict}")
        if self._results is not None:
            self._results.parent.mkdir(parents=True, exist_ok=True)
            kept = {**line, "histograms": self.histograms} if self.histograms else line
            with self._results.open("a") as file:
                file.write(json.dumps(kept) + "\n")
            self.note(f"appended to {_near(self._results)}")
        sys.stdout.flush()
        if self._as_json:
            print(json.dumps({"verb": self._verb, **self.figures}), flush=True)


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lay out rows under their heads: texts to the left, numbers to the right."""
    cells = [[*map(_shown, row)] for row in rows]
    widths = [max(len(row[column]) for row in [list(head), *cells]) for column in range(len(head))]
    lines = [title, _laid([*head], widths), "  ".join("-" * width for width in widths)]
    return "\n".join(lines + [_laid(row, widths) for row in cells])


def _laid(row: list[str], widths: list[int]) -> str:
    first, *others = (
        cell.ljust(width) if at == 0 else cell.rjust(width)
        for at, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:,.1f}" if abs(value) >= 100 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _near(path: Path) -> str:
    try:
        return str(path.relative_to(machine.ROOT))
    except ValueError:
        return str(path)


def histogram() -> Any:
    """Give an empty latency histogram in us, up to ten minutes, exact to three digits (HdrHistogram)."""
    return _extra("hdrh.histogram").HdrHistogram(1, 600_000_000, 3)


def percentiles(found: Any) -> dict[str, float | None]:
    """Give what a histogram in us says, in ms."""
    shares = {"p50_ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0, "p999_ms": 99.9, "max_ms": 100.0}
    if not found.get_total_count():
        return dict.fromkeys(shares)
    return {name: found.get_value_at_percentile(share) / 1_000 for name, share in shares.items()}


def plotting() -> Any:
    """Give matplotlib's pyplot, for files only."""
    matplotlib = _extra("matplotlib")
    matplotlib.use("Agg")
    return import_module("matplotlib.pyplot")


def _extra(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise BenchError(f"{error}: it comes with the extra `bench`: pip install -e '.[bench]'") from error
