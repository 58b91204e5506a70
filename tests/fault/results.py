"""What came of the faults of a run: printed at its end, and kept in results.json beside this file (not in git).

A test that takes the fixture `fault` tells how often it struck and how long recovery took; of the others it is known
that they ran, and how they ended.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.fault.kit import Fault
from tests.fault.table import FAULTS, faults_of

KEPT: Final = Path(__file__).with_name("results.json")

_of_test = pytest.StashKey[Fault]()
_of_run = pytest.StashKey[dict[str, dict[str, Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_of_run] = {}


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Fault:
    """The line that this test writes into the table of results."""
    item: pytest.Item = request.node
    item.stash[_of_test] = mine = Fault()
    return mine


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" or report.outcome == "failed":
        marked = tuple(fault for mark in item.iter_markers("fault") for fault in mark.args)
        faults = faults_of(getattr(item, "originalname", item.name), marked)
        if faults and report.outcome != "skipped":
            item.config.stash[_of_run][item.nodeid] = _line(faults, report, item.stash.get(_of_test, None))
    return report


def _line(faults: tuple[str, ...], report: pytest.TestReport, told: Fault | None) -> dict[str, Any]:
    return {
        "faults": list(faults),
        "ok": report.outcome == "passed",
        "injected": told.injected if told is not None else 1,
        "lost": told.lost if told is not None else None,
        "doubled": told.doubled if told is not None else None,
        "recovered_s": round(told.recovered_s, 1) if told is not None and told.recovered_s is not None else None,
        "took_s": round(report.duration, 1),
    }


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash[_of_run]
    if not run:
        return
    keep(KEPT, run)
    terminalreporter.section("faults")
    terminalreporter.line(f"{'fault':<46} {'times':>5} {'lost':>5} {'twice':>5} {'recovered':>9}  test")
    for name, line in sorted(run.items(), key=lambda each: (each[1]["faults"], each[0])):
        seconds = "-" if line["recovered_s"] is None else f"{line['recovered_s']:.1f} s"
        shown = [_shown(line[key]) for key in ("injected", "lost", "doubled")]
        for number in line["faults"]:
            what = f"{number} {FAULTS[number]}"
            figures = f"{shown[0]:>5} {shown[1]:>5} {shown[2]:>5} {seconds:>9}"
            terminalreporter.line(
                f"{what:<46.46} {figures}  {'' if line['ok'] else 'FAILED '}{name.rpartition('::')[2]}"
            )
    terminalreporter.line(
        f"kept in {KEPT.relative_to(config.rootpath) if KEPT.is_relative_to(config.rootpath) else KEPT}"
    )


def _shown(value: int | None) -> str:
    return "-" if value is None else str(value)


def keep(file: Path, run: dict[str, dict[str, Any]]) -> None:
    """Put a run's lines into the file; those of tests that were not run stay."""
    try:
        kept: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        kept = {}
    file.write_text(json.dumps(kept | run, indent=1, sort_keys=True) + "\n")
