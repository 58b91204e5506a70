"""Proofs at size: the corruption table over 100,000 trades, ten proofs under load, a million in little memory."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench import acks
from bench.engine import mix, rules
from bench.world import ENVIRONMENT, World, until
from sidecar import decisions
from sidecar.batch import Batch, Row
from sidecar.events import Account, AccountKey, AccountValues, State
from sidecar.store.base import Store
from tests.proof.test_corruptions import Scene, prove_the_table
from tests.stores import STORES, StoreUnderTest

if TYPE_CHECKING:
    from tests.cassandra_node import Node

pytestmark = pytest.mark.long

RULES: dict[str, Any] = rules("binance") | {"revenue_user_id": 0}
TRADES, USERS, MORE = 1_000_000, 50_000, 10_000  # two assets: 100,000 accounts
MIB_MAX = 300
FIRST_US = 1_700_000_000_000_000


def binance() -> Iterator[dict[str, Any]]:
    """Binance trades with made-up users, then generated ones; one in 700 is rejected."""
    for place, event in enumerate(mix(users=1_000)):
        yield event | ({"price": 0} if place % 700 == 699 and "trade_id" in event else {})


@pytest.mark.cassandra
@pytest.mark.timeout(900)
def test_every_corruption_over_100_000_trades(tmp_path: Path, cassandra_node: Node) -> None:
    from sidecar.store.cassandra import CassandraStore

    widths = {name: rule["page_width"] for name, rule in RULES["symbols"].items()}
    store = CassandraStore(
        page_widths=widths, contact_points=[cassandra_node.host], port=cassandra_node.port,
        keyspace=f"t_{secrets.token_hex(6)}",
    )  # fmt: skip

    async def play() -> None:
        await store.apply_schema(widths)
        async with store:
            scene = Scene(store, tmp_path, rules=RULES, source=binance(), users=5_000)
            scene.proof._pace = type(scene.proof._pace)()
            await prove_the_table(scene, 102_000, then=10_000, again=False)

    asyncio.run(play())


@pytest.mark.parametrize("under_test", STORES, indirect=True)
@pytest.mark.timeout(1_500)
def test_ten_full_proofs_in_a_row_at_1_000_a_second(tmp_path: Path, under_test: StoreUnderTest) -> None:
    burst, quiet, events_max = 2_000, 3_000, 250_000  # the engine is stopped when the proofs are through
    ack_log = tmp_path / "acks.txt"
    settings = ["pipeline.durable_after_s=2", "reconcile.interval_s=0", f"pipeline.ack_log={ack_log}"]
    with World(
        tmp_path, source="mixed", settings=settings, store=under_test.settings, judged=under_test.judged
    ) as world:
        under_test.prepare(world)
        world.start("run")
        engine = world.engine("--count", str(events_max), "--burst", str(burst), rate=1_000)
        until(lambda: world.said().get("acked", 0) > quiet, "it settles", 60)
        proofs, under_load = [], 0
        for number in range(10):
            began_us = time.time_ns() // 1000
            said = world.verb("reconcile", "--full", status=0)
            proofs.append((began_us, time.time_ns() // 1000))
            assert (said["findings"], said["not_checked"]) == ([], []), number
            under_load += engine.running()  # on a slow machine the last ones may have none
            print(f"proof {number}: {said['events']} events, {said['seconds']} s")
        assert under_load > 0, "it was over before the first proof was"
        assert engine.term() == 0
        sent = acks.Sent(world.journal)
        world.until_acked(sent.last_sequence)
        joined = acks.Joined(sent, acks.read(ack_log))
        begin_us = joined.sent.meant_us[burst]
        for name, span in (("without", (begin_us, proofs[0][0])), ("with", (proofs[0][0], proofs[-1][1]))):
            found = joined.latencies(*span)
            p50, p99 = (found.get_value_at_percentile(share) / 1000 for share in (50, 99))
            print(f"{name} proofs: {found.get_total_count()} events, p50 {p50:.1f} ms, p99 {p99:.1f} ms")


# --- a million ---


class Million:
    """Trades between random users, written as batches without a settler: rows, balances, positions."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.rng = random.Random(7)
        self.accounts: dict[AccountKey, AccountValues] = {}
        self.sequence = 0

    async def begin(self) -> None:
        agreed = await decisions.agree(
            self.store, stream="main", first_sequence=1, session=1, engine_session=None, rules=RULES, now_us=FIRST_US
        )
        await self.store.ready_for(agreed.symbols.symbols)

    async def write(self, trades: int) -> None:
        batches = self._batches(trades)

        async def work() -> None:
            for batch in batches:
                await self.store.settle_batch_atomically(batch)

        await asyncio.gather(*(work() for _ in range(16)))
        for kind in ("acked", "durable"):
            at = State(self.sequence, FIRST_US + self.sequence, {"btc_usdt": self.sequence})
            await self.store.save_state("main", kind, at)

    def _batches(self, trades: int) -> Iterator[Batch]:
        numbers = iter(range(self.sequence + 1, self.sequence + trades + 1))
        size = 16 if self.store.name == "cassandra" else 500
        self.sequence += trades
        while some := list(itertools.islice(numbers, size)):
            rows: list[Row] = []
            touched: dict[AccountKey, AccountValues] = {}
            for number in some:
                buyer, seller = self.rng.sample(range(1, USERS + 1), 2)
                quantity, price = number % 977 + 1, 6_000_000 + number % 1_009
                amount = quantity * price // 100
                rows.append(
                    (number // 10_000, number, "main", number, 1, 2, 3, buyer, seller, 1, 2, price, quantity, amount,
                     None, None, 0, 0, 1, 2, 3, 4, 0, None, None)
                )  # fmt: skip
                for key, delta in (
                    ((buyer, 1), quantity), ((buyer, 2), -amount), ((seller, 1), -quantity), ((seller, 2), amount),
                ):  # fmt: skip
                    have = touched.get(key) or self.accounts.get(key) or (0, 0, 0, 0)
                    touched[key] = (have[0] + delta, have[1] + 1, number, 0)
            self.accounts.update(touched)
            balances: dict[AccountKey, AccountValues] = {key: Account(*at) for key, at in touched.items()}
            yield Batch(
                "main", some[0], some[-1], FIRST_US + some[-1], {"btc_usdt": rows}, [], [], balances,
                {"btc_usdt": some[-1]}, len(some), 1,
            )  # fmt: skip


def _proved(world: World, *more: str) -> tuple[dict[str, Any], float]:
    """Run the verb in a process of its own; give what it says and the most memory it held, in MiB."""
    out = world.folder / "said.json"
    command = [sys.executable, "-m", "sidecar", "reconcile", "--rate", "0", "--json", *more, *world.config()]
    with out.open("wb") as file:
        pid = os.posix_spawn(
            sys.executable, command, ENVIRONMENT, file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), 1)]
        )
        _, status, used = os.wait4(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    said: dict[str, Any] = json.loads(out.read_text())
    return said, used.ru_maxrss / 1024


@pytest.mark.parametrize("under_test", STORES, indirect=True)
@pytest.mark.timeout(900)
def test_a_million_trades_over_100_000_accounts(tmp_path: Path, under_test: StoreUnderTest) -> None:
    from sidecar import load, open_store

    with World(tmp_path, source="binance", store=under_test.settings, judged=under_test.judged) as world:
        under_test.prepare(world)
        million: Million | None = None

        async def write(trades: int) -> None:
            nonlocal million
            async with open_store(load(world.toml, world.settings)) as store:
                if million is None:
                    million = Million(store)
                    await million.begin()
                million.store = store
                await store.ready_for(["btc_usdt", "eth_usdt"])
                await million.write(trades)

        asyncio.run(write(TRADES))
        said, mib = _proved(world)
        assert (said["findings"], said["events"], said["accounts"], said["full"]) == ([], TRADES, USERS * 2, True)
        first_s = said["seconds"]
        print(f"full: {TRADES / first_s:,.0f} trades/s, {first_s:.1f} s, {mib:.0f} MiB at most")
        assert mib < MIB_MAX
        asyncio.run(write(MORE))
        said, mib = _proved(world)
        assert (said["findings"], said["events_read"], said["full"]) == ([], MORE, False)
        print(f"incremental: {said['seconds']:.2f} s, {said['seconds'] / first_s:.3f} of it, {mib:.0f} MiB at most")
        assert said["seconds"] < first_s / 10
        assert mib < MIB_MAX
