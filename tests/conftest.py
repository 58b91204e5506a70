"""What all tests share: seeds that are printed, tests that take minutes, tests that need a real Cassandra node or tool.

Every random choice of a run comes from one seed, printed at its head: Hypothesis is forced to it, other tests take the
`seed` fixture. Tests against a node need JDK 17 and Maven; where they are missing that is said before and after the
run, and with CI=true it is a failure. Tools that faults are caused with (tests/fault/tools.py) are missed as loudly.
Tests marked `tool` use a program of the system (chromium, promtool, systemd-analyze); where it is missing they are
left out, which the run says at its beginning and its end.
"""

from __future__ import annotations

import os
import secrets
import shutil
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:  # imported where it is used: only those who want a node need its file
    from tests.cassandra_node import Node
    from tests.stores import StoreUnderTest

pytest_plugins = ["tests.fault.results"]

HYPOTHESIS_SEED = "hypothesis_seed"  # the plugin's option, --hypothesis-seed

# Timing decides no test: neither a deadline nor a slow machine is a failure.
settings.register_profile("house", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", parent=settings.get_profile("house"), max_examples=2_000)

_missing_tools = pytest.StashKey[str | None]()
_left_out = pytest.StashKey[dict[str, int]]()
_reasons = pytest.StashKey[set[str]]()  # of the skips that are counted in it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also the tests that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    # Called before Hypothesis' own plugin (last registered, first called), which takes the seed from its option.
    if getattr(config.option, HYPOTHESIS_SEED, None) is None:
        setattr(config.option, HYPOTHESIS_SEED, str(secrets.randbits(63)))
    settings.load_profile("long" if config.option.long else "house")
    config.stash[_missing_tools] = None
    config.stash[_left_out] = {}
    config.stash[_reasons] = set()


def pytest_report_header(config: pytest.Config) -> str:
    seed = getattr(config.option, HYPOTHESIS_SEED)
    return f"seed: {seed} (the same again: scripts/test --hypothesis-seed={seed})"


@pytest.hookimpl(trylast=True)  # after -k and -m have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("long") and not config.option.long:
            _leave_out(
                item, "takes minutes: scripts/test --long", "tests that take minutes; scripts/test --long runs them"
            )
    for item in items:
        absent = [name for mark in item.iter_markers("tool") for name in mark.args if shutil.which(name) is None]
        if absent:
            names = ", ".join(absent)
            _leave_out(item, f"not installed here: {names}", f"tests with real tools: {names} not installed here")
    _leave_out_what_lacks_a_tool(items)
    on_a_node = [item for item in items if item.get_closest_marker("cassandra") and not item.get_closest_marker("skip")]
    if not on_a_node:
        return
    from tests.cassandra_node import missing_tools

    missing = missing_tools()
    if missing is None:
        return
    config.stash[_missing_tools] = missing
    why = f"tests on a real Cassandra node: {missing}"
    if os.environ.get("CI") == "true":  # each fails, see below
        config.stash[_left_out][why] = len(on_a_node)
    else:
        for item in on_a_node:
            _leave_out(item, f"no Cassandra node: {missing}", why)


def _leave_out(item: pytest.Item, reason: str, why: str) -> None:
    """Skip a test, and count it under what the run's beginning and end say of all that are alike."""
    left_out = item.config.stash[_left_out]
    left_out[why] = left_out.get(why, 0) + 1
    item.config.stash[_reasons].add(reason)
    item.add_marker(pytest.mark.skip(reason=reason))


def _leave_out_what_lacks_a_tool(items: list[pytest.Item]) -> None:
    """Skip, loudly, the tests whose faults can't be caused here."""
    for item in items:
        for name in (name for mark in item.iter_markers("needs") for name in mark.args):
            from tests.fault.tools import TOOLS

            if item.get_closest_marker("skip") or (lacks := TOOLS[name]()) is None:
                continue
            _leave_out(item, lacks, f"faults that need {name}: {lacks}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    missing = item.config.stash[_missing_tools]
    if missing is not None and item.get_closest_marker("cassandra"):
        pytest.fail(f"CI=true, and this can't be run: {missing}", pytrace=False)


def _banner(left_out: dict[str, int]) -> list[str]:
    return [f"NOT RUN ({count}): {why}" for why, count in left_out.items()]


def _is_lacking(left_out: dict[str, int]) -> bool:
    """Say whether something can't be run here, beside what is left out by wish."""
    return any(": " in why for why in left_out)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    left_out = config.stash[_left_out]
    bar = "!" * 80
    return [bar, *_banner(left_out), bar] if _is_lacking(left_out) else _banner(left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash[_left_out].copy()
    for report in terminalreporter.stats.get("skipped", []):  # what a test itself found that it can't do here
        why = report.longrepr[2].removeprefix("Skipped: ")
        if why not in config.stash[_reasons]:
            why = f"skipped by the test: {why}"
            left_out[why] = left_out.get(why, 0) + 1
    if left_out:
        terminalreporter.section("not run", sep="!" if _is_lacking(left_out) else "-", bold=True)
        for line in _banner(left_out):
            terminalreporter.line(line)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A number of this test's own, drawn from the run's seed; printed, so that a failure shows it."""
    run = getattr(request.config.option, HYPOTHESIS_SEED)
    own = zlib.crc32(f"{run}:{request.node.nodeid}".encode())
    print(f"seed of this test: {own}")
    return own


@pytest.fixture(scope="session")
def cassandra_node() -> Iterator[Node]:
    """One real node for all tests that are content with any; those that kill or starve it start their own."""
    from tests.cassandra_node import Node

    with Node() as node:
        yield node


@pytest.fixture
def under_test(request: pytest.FixtureRequest) -> StoreUnderTest:
    """The store that an end-to-end test is parametrized with; see tests/stores.py."""
    from tests.stores import store_under_test

    return store_under_test(request.param, lambda: request.getfixturevalue("cassandra_node"))
