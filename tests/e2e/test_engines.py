"""Three engines with users in common, three streams, one store: balances are sums, and every verb knows all streams."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from bench.world import ENVIRONMENT, Process, World, until
from tests.stores import STORES, StoreUnderTest

STREAMS = ("main", "eu", "us")
USERS = 30
# Their events, and how fast: each engine numbers its trades for itself from 1 on, so all ids are there three times.
EVENTS = {"main": (3_000, 1_500), "eu": (1_800, 900), "us": (2_400, 1_200)}


@pytest.fixture
def worlds(tmp_path: Path, under_test: StoreUnderTest) -> Iterator[dict[str, World]]:
    """Three hosts with an engine each, over one store whose tables are there."""
    shared = under_test.settings or ["store.backend=sqlite", f"store.sqlite.path={tmp_path / 'settlement.db'}"]
    judged = under_test.judged or f"sqlite:{tmp_path / 'settlement.db'}"
    with ExitStack() as stack:
        made = {}
        for name in STREAMS:
            (tmp_path / name).mkdir()
            settings = [f"stream.name={name}", "pipeline.durable_after_s=0.5"]
            world = World(tmp_path / name, source="generated", settings=settings, store=shared, judged=judged)
            made[name] = stack.enter_context(world)
        under_test.prepare(made["main"])
        yield made


def _engine(world: World, seed: int, events: int, rate: float | None = None) -> Process:
    return world.engine("--users", str(USERS), "--seed", str(seed), "--count", str(events), rate=rate)


def _text(world: World, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "sidecar", *arguments, *world.config()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=world.folder)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.timeout(180)
@pytest.mark.parametrize("under_test", STORES, indirect=True)
def test_three_engines_with_users_in_common_settle_into_one_store(
    tmp_path: Path, seed: int, under_test: StoreUnderTest, worlds: dict[str, World]
) -> None:
    main = worlds["main"]
    running = {name: world.start("run") for name, world in worlds.items()}
    seeds = {name: seed % 1_000 + place for place, name in enumerate(STREAMS)}
    engines = [_engine(world, seeds[name], *EVENTS[name]) for name, world in worlds.items()]
    for name, world in worlds.items():
        until(lambda world=world: world.said().get("acked", 0) > 500, f"{name} settles")  # type: ignore[misc]
    running["eu"].kill()  # what becomes of one is nothing to the others
    running["eu"] = worlds["eu"].start("run")
    meanwhile = main.verb("reconcile", "--full", "--rate", "0", status=0)
    assert (meanwhile["streams"], meanwhile["findings"]) == (sorted(STREAMS), [])
    for engine in engines:
        engine.result()
    _engine(worlds["eu"], seeds["eu"], EVENTS["eu"][0]).result()  # what it missed is said again
    for name, world in worlds.items():
        world.until_acked(EVENTS[name][0])
    _knows_all_streams(main, worlds["us"])
    assert [process.term() for process in running.values()] == [0, 0, 0]

    sums = tmp_path / "sums.json"
    beside = [part for name in STREAMS[1:] for part in ("--beside", f"{name}={worlds[name].journal}")]
    verdict = main.judge(*beside, "--sums", str(sums))
    assert verdict["ok"], verdict
    assert verdict["streams"] == {name: events for name, (events, _) in EVENTS.items()}
    assert verdict["balances_equal"] == verdict["balances"] == USERS * 3
    _balances_are(main, json.loads(sums.read_text()))
    if under_test.node is None:
        _one_unit_too_many_on_another_stream_is_found(main, tmp_path / "settlement.db", beside)


def _knows_all_streams(main: World, us: World) -> None:
    ends = {name: events for name, (events, _) in EVENTS.items()}
    until(lambda: _acked_of_all(main) == ends, f"the store knows all positions: {_acked_of_all(main)}")
    said = main.status()
    assert (said["stream"], said["acked"]) == ("main", ends["main"])
    assert all(0 <= each["durable"] <= each["acked"] for each in said["streams"].values())
    status, text = _text(us, "status")
    assert status == 0
    assert "stream us: running" in text
    assert f"stream main in this store: acked {ends['main']}" in text
    assert "stream us in this store" not in text

    said = main.verb("reconcile", "--full", status=0)
    assert (said["ok"], said["findings"], said["not_checked"]) == (True, [], [])
    assert (said["streams"], said["up_to"], said["events"]) == (sorted(STREAMS), ends, sum(ends.values()))
    assert said["accounts"] == USERS * 3 * len(STREAMS)
    text = _text(us, "reconcile", "--full")[1]
    assert "nothing differs" in text
    assert all(f"{name} up to {last}" in text for name, last in ends.items())

    said = main.verb("audit", status=0)
    assert {name: stream["sequences"] for name, stream in said["streams"].items()} == ends
    assert all(stream["missing"] == stream["twice"] == 0 for stream in said["streams"].values())
    text = _text(us, "audit")[1]
    assert all(f"stream {name}: sequences 1 to {last}" in text for name, last in ends.items())


def _acked_of_all(world: World) -> dict[str, int]:
    return {name: each["acked"] for name, each in world.status()["streams"].items()}


def _balances_are(world: World, sums: list[list[int]]) -> None:
    """Some users' balances are the sums, to the unit, and the parts are shown."""
    for user in (1, USERS):
        said = world.verb("balance", str(user), status=0)["balances"]
        totals = {asset: amount for of, asset, amount in sums if of == user}
        assert {each["asset_id"]: each["total"] for each in said} == totals
        for each in said:
            assert sorted(each["streams"]) == sorted(STREAMS)
            assert sum(row["available"] for row in each["streams"].values()) == each["total"]
    heads, *lines = [line.split() for line in _text(world, "balance", "1", "usdt")[1].splitlines()]
    rows = [dict(zip(heads, line, strict=True)) for line in lines]
    assert {row["stream"] for row in rows} == set(STREAMS)
    units = [int(row["available"].replace(".", "")) for row in rows]
    total = next(amount for of, asset, amount in sums if (of, asset) == (1, 2))
    assert {int(row["total"].replace(".", "")) for row in rows} == {sum(units)} == {total}


def _one_unit_too_many_on_another_stream_is_found(main: World, store: Path, beside: list[str]) -> None:
    with closing(sqlite3.connect(store)) as rows, rows:
        rows.execute("UPDATE user_balances SET available = available + 1 WHERE stream = 'eu' AND user_id = 7")
    assert not main.judge(*beside)["ok"]
    found: list[dict[str, Any]] = main.verb("reconcile", "--full", status=1)["findings"]
    assert {each["stream"] for each in found if each["user_id"] == 7} == {"eu"}
