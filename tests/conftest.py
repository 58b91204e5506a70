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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also the tests that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    # Called before Hypothesis' own plugin (last registered, first called), which takes the seed from its option.
    if getattr(config.option, HYPOTHESIS_SEED, None) is None:
        setattr(config.option, HYPOTHESIS_SEED, str(secrets.randbits(63)))
    settings.load_profile("long" if config.option.long else "house")
    config.stash[_missing_tools] = None
    config.stash[_left_out] = {}


def pytest_report_header(config: pytest.Config) -> str:
    seed = getattr(config.option, HYPOTHESIS_SEED)
    return f"seed: {seed} (the same again: scripts/test --hypothesis-seed={seed})"


@pytest.hookimpl(trylast=True)  # after -k and -m have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = config.stash[_left_out]
    if not config.option.long:
        long = [item for item in items if item.get_closest_marker("long")]
        for item in long:
            item.add_marker(pytest.mark.skip(reason="takes minutes: scripts/test --long"))
        if long:
            left_out["tests that take minutes; scripts/test --long runs them"] = len(long)
    for item in items:
        absent = [name for mark in item.iter_markers("tool") for name in mark.args if shutil.which(name) is None]
        if absent:
            item.add_marker(pytest.mark.skip(reason=f"not installed here: {', '.join(absent)}"))
            why = f"tests with real tools: {', '.join(absent)} not installed here"
            left_out[why] = left_out.get(why, 0) + 1
    _leave_out_what_lacks_a_tool(items, left_out)
    on_a_node = [item for item in items if item.get_closest_marker("cassandra") and not item.get_closest_marker("skip")]
    if not on_a_node:
        return
    from tests.cassandra_node import missing_tools

    missing = missing_tools()
    if missing is None:
        return
    config.stash[_missing_tools] = missing
    left_out[f"tests on a real Cassandra node: {missing}"] = len(on_a_node)
    if os.environ.get("CI") != "true":
        for item in on_a_node:
            item.add_marker(pytest.mark.skip(reason=f"no Cassandra node: {missing}"))


def _leave_out_what_lacks_a_tool(items: list[pytest.Item], left_out: dict[str, int]) -> None:
    """Skip, loudly, the tests whose faults can't be caused here."""
    for item in items:
        for name in (name for mark in item.iter_markers("needs") for name in mark.args):
            from tests.fault.tools import TOOLS

            if item.get_closest_marker("skip") or (lacks := TOOLS[name]()) is None:
                continue
            why = f"faults that need {name}: {lacks}"
            left_out[why] = left_out.get(why, 0) + 1
            item.add_marker(pytest.mark.skip(reason=lacks))


def pytest_runtest_setup(item: pytest.Item) -> None:
    missing = item.config.stash[_missing_tools]
    if missing is not None and item.get_closest_marker("cassandra"):
        pytest.fail(f"CI=true, and this can't be run: {missing}", pytrace=False)


def _banner(config: pytest.Config) -> list[str]:
    return [f"NOT RUN ({count}): {why}" for why, count in config.stash[_left_out].items()]


def _is_lacking(config: pytest.Config) -> bool:
    """Say whether something can't be run here, beside what is left out by wish."""
    return any(": " in why for why in config.stash[_left_out])


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    lines = _banner(config)
    bar = "!" * 80
    return [bar, *lines, bar] if _is_lacking(config) else lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = _banner(config)
    if lines:
        terminalreporter.section("not run", sep="!" if _is_lacking(config) else "-", bold=True)
        for line in lines:
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
