"""What only a real node can show: away, killed, silent, refusing; and one trade settled, to the write time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from sidecar.batch import TRADE_COLUMNS, Batch, Row
from sidecar.config import load
from sidecar.errors import BatchTooLargeError, OutcomeUnknownError, StoreRefusedError
from sidecar.events import Account, Balance, Decision, State
from sidecar.service import Settlement
from sidecar.store.base import Store
from tests.cassandra_node import Node
from tests.streams import RULES_TOML, trade_fields

if TYPE_CHECKING:
    from sidecar.store.cassandra import CassandraStore

pytestmark = [pytest.mark.cassandra, pytest.mark.timeout(180)]

SYMBOLS = ["btc_usdt"]
STREAM = "main"


def make_store(node: Node, keyspace: str, **other: Any) -> CassandraStore:
    from sidecar.store.cassandra import CassandraStore

    values: dict[str, Any] = {"request_timeout_s": 5.0} | other
    return CassandraStore(page_widths={"btc_usdt": 10_000}, port=node.port, keyspace=keyspace, **values)


@pytest.fixture(scope="module")
def own_node() -> Iterator[Node]:
    """A node that these tests may kill; it loses nothing when killed, and warns of every batch."""
    with Node(yaml={"commitlog_sync": "batch", "batch_size_warn_threshold": "1KiB"}) as node:
        yield node


@pytest.fixture(scope="module")
def own_keyspace(own_node: Node) -> str:
    """Tables in there, shared: each test's sequences are above those of the tests before it."""
    return new_keyspace(own_node)


@pytest.fixture(scope="module")
def keyspace(cassandra_node: Node) -> str:
    """The same on the node of all tests, for those that leave the tables as they are."""
    return new_keyspace(cassandra_node)


_begins = itertools.count(1_000, 1_000)


@pytest.fixture
def begin() -> int:
    """The sequence before this test's first."""
    return next(_begins)


async def apply(node: Node, keyspace: str) -> None:
    store = make_store(node, keyspace)
    try:
        await store.apply_schema(SYMBOLS)
    finally:
        await store.close()


def new_keyspace(node: Node) -> str:
    keyspace = f"t_{secrets.token_hex(6)}"
    asyncio.run(apply(node, keyspace))
    return keyspace


@contextlib.asynccontextmanager
async def opened(node: Node, keyspace: str, **other: Any) -> AsyncIterator[CassandraStore]:
    async with make_store(node, keyspace, **other) as store:
        await store.ready_for(SYMBOLS)
        yield store


def make_batch(last: int, trades: int = 1, balances: int = 1) -> Batch:
    rows: list[Row] = []
    for number in range(trades):
        values = {name: place for place, name in enumerate(TRADE_COLUMNS)}
        keys = {
            "stream": STREAM,
            "page": last // 100,
            "trade_id": last * 100 + number,
            "buyer_fee": None,
            "ts_us": None,
        }
        rows.append(tuple((values | keys).values()))
    accounts = {(user, 1): (last, last, last, last) for user in range(balances)}
    trades_by_symbol = {"btc_usdt": rows} if rows else {}
    return Batch(STREAM, last, last, 1_000_000 + last, trades_by_symbol, [], [], accounts, {}, 1, 0)


async def settle_until_known(store: Store, batch: Batch) -> int:
    """As the pipeline does: give the identical batch until it is answered; give the number of unknown outcomes."""
    unknown = 0
    while True:
        try:
            await store.settle_batch_atomically(batch)
        except OutcomeUnknownError:
            unknown += 1
            await asyncio.sleep(0.1)
        else:
            return unknown


async def until(holds: Callable[[], object], what: str, within_s: float = 20.0) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + within_s
    while not holds():
        assert loop.time() < end, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def heartbeat(late_s_max: float) -> AsyncIterator[None]:
    """Assert that the loop is never blocked for longer."""
    loop = asyncio.get_running_loop()
    worst = 0.0

    async def tick() -> None:
        nonlocal worst
        while True:
            began = loop.time()
            await asyncio.sleep(0.01)
            worst = max(worst, loop.time() - began - 0.01)

    ticking = asyncio.create_task(tick())
    yield
    ticking.cancel()
    assert worst < late_s_max, f"the loop stood still for {worst * 1000:.0f} ms"


def stands(store: Store) -> bool:
    return store.steady_since is not None


# --- the node is away, and comes back ---


def test_node_killed_and_restarted_under_an_open_store(own_node: Node, own_keyspace: str, begin: int) -> None:
    keyspace = own_keyspace

    async def ask() -> None:
        async with opened(own_node, keyspace) as store:
            await store.settle_batch_atomically(make_batch(begin + 1))
            assert stands(store)
            assert store.outages == 0
            await asyncio.to_thread(own_node.kill)
            async with heartbeat(0.25):
                with pytest.raises(OutcomeUnknownError):
                    await store.settle_batch_atomically(make_batch(begin + 2))
                assert not stands(store)
                with pytest.raises(OutcomeUnknownError):
                    await store.read_decisions(f"{begin}")
                with pytest.raises(OutcomeUnknownError):
                    await store.load_accounts(STREAM, [(0, 1)])
                with pytest.raises(OutcomeUnknownError):
                    await store.trade_exists("btc_usdt", begin)
                await asyncio.to_thread(own_node.start)
                back = asyncio.get_running_loop().time()
                await settle_until_known(store, make_batch(begin + 2))
                await until(lambda: store.outages, "the outage is counted")
                await until(lambda: stands(store), "the node stands again")
            assert (store.steady_since or 0) >= back - 5
            assert await store.load_accounts(STREAM, [(0, 1)]) == {(0, 1): Account(*[begin + 2] * 4)}
            assert await store.trade_exists("btc_usdt", (begin + 2) * 100)
            assert await store.append_decision(Decision(f"{begin}", 1, "gap", 1, 1, "{}", "", "me", 0))
            await store.save_state(STREAM, "acked", State(begin + 2, 1_000_002 + begin, {}))
            assert store.outages == 1
            assert not store.unknown_errors

    asyncio.run(ask())


def test_node_restarted_while_nothing_is_asked(own_node: Node, own_keyspace: str, begin: int) -> None:
    keyspace = own_keyspace

    async def ask() -> None:
        async with opened(own_node, keyspace) as store:
            await asyncio.to_thread(own_node.kill)
            await until(lambda: not stands(store), "it is noticed at once", 1.0)
            await asyncio.to_thread(own_node.start)
            await until(lambda: store.outages == 1, "the outage is counted")
            await settle_until_known(store, make_batch(begin + 1))

    asyncio.run(ask())


def test_connections_lost_for_a_moment_count_as_an_outage(own_node: Node, own_keyspace: str, begin: int) -> None:
    keyspace = own_keyspace

    async def ask() -> None:
        async with opened(own_node, keyspace) as store:
            connected = store._connected
            assert connected is not None
            (pool,) = connected.session.get_pools()
            (connection,) = pool.get_connections()
            connection._socket.shutdown(socket.SHUT_RDWR)
            await until(lambda: not stands(store), "it is noticed at once", 1.0)
            await settle_until_known(store, make_batch(begin + 1))
            await until(lambda: store.outages == 1, "the outage is counted")
            await until(lambda: stands(store), "it stands again")

    asyncio.run(ask())


def test_a_generation_that_changed_counts_even_when_nothing_else_was_noticed(
    own_node: Node, own_keyspace: str, begin: int
) -> None:
    keyspace = own_keyspace

    async def ask() -> None:
        async with opened(own_node, keyspace) as store:
            assert store._connected is not None
            assert store._connected.nodes is not None
            (node,) = store._connected.nodes._nodes.values()
            assert node.generation
            node.generation -= 1  # as if it had been another life of the node that was seen last
            await until(lambda: store.outages == 1, "the outage is counted", 3.0)

    asyncio.run(ask())


def test_steady_for_seconds_without_an_outage(own_node: Node, own_keyspace: str, begin: int) -> None:
    keyspace = own_keyspace

    async def ask() -> None:
        async with opened(own_node, keyspace) as store:
            since = store.steady_since
            for number in range(1, 25):
                await store.settle_batch_atomically(make_batch(begin + number))
                await store.read_decisions(f"{begin}")
                await asyncio.sleep(0.1)
                assert store.steady_since == since
            assert store.outages == 0

    asyncio.run(ask())


def test_silent_node_gives_an_unknown_outcome_in_time_and_blocks_nothing(
    own_node: Node, own_keyspace: str, begin: int
) -> None:
    keyspace = own_keyspace

    async def ask() -> None:
        async with opened(own_node, keyspace, request_timeout_s=1.0) as store:
            await store.settle_batch_atomically(make_batch(begin + 1))
            await asyncio.to_thread(own_node.pause)
            try:
                loop = asyncio.get_running_loop()
                batches = [make_batch(begin + number, 16, 50) for number in range(2, 18)]
                async with heartbeat(0.1):
                    began = loop.time()
                    answers = await asyncio.gather(
                        *(store.settle_batch_atomically(batch) for batch in batches),
                        store.read_decisions(f"{begin}"),
                        store.load_accounts(STREAM, [(user, 1) for user in range(500)]),
                        *(store.get_user_balance(user, 1) for user in range(50)),
                        store.append_decision(Decision(f"{begin}", 1, "gap", 1, 1, "{}", "", "me", 0)),
                        return_exceptions=True,
                    )
                    took_s = loop.time() - began
                    assert {type(answer) for answer in answers} == {OutcomeUnknownError}
                    assert took_s < 3.5  # a decision is asked for twice
                    await until(lambda: not stands(store), "a silent node does not stand", 10.0)
            finally:
                await asyncio.to_thread(own_node.resume)
            await asyncio.gather(*(settle_until_known(store, batch) for batch in batches))
            assert await store.get_user_balance(0, 1) == Balance(0, 1, "*", *[begin + 17] * 4)
            await until(lambda: stands(store), "it stands again")
            assert not store.unknown_errors

    asyncio.run(ask())


def test_closing_is_quick_while_the_node_is_silent(own_node: Node, own_keyspace: str, begin: int) -> None:
    keyspace = own_keyspace

    async def ask() -> None:
        loop = asyncio.get_running_loop()
        store = make_store(own_node, keyspace)
        await store.open()
        await asyncio.to_thread(own_node.pause)
        try:
            began = loop.time()
            await store.close()
            assert loop.time() - began < 2
        finally:
            await asyncio.to_thread(own_node.resume)

    asyncio.run(ask())


def test_opening_again_and_again_until_the_node_is_there(own_node: Node, own_keyspace: str, begin: int) -> None:
    keyspace = own_keyspace

    async def ask() -> None:
        store = make_store(own_node, keyspace)
        await asyncio.to_thread(own_node.kill)
        try:
            for _ in range(2):
                with pytest.raises(OutcomeUnknownError, match=str(own_node.port)):
                    await store.open()
        finally:
            await asyncio.to_thread(own_node.start)
        await store.open()
        assert store.outages == 0
        assert stands(store)
        await settle_until_known(store, make_batch(begin + 1))
        await store.close()

    asyncio.run(ask())


# --- what a node refuses ---


def test_a_batch_over_the_limit_is_told_from_other_refusals(cassandra_node: Node, keyspace: str, begin: int) -> None:

    async def ask() -> None:
        async with opened(cassandra_node, keyspace) as store:
            with pytest.raises(BatchTooLargeError):
                await store.settle_batch_atomically(make_batch(begin + 1, 100, 400))
            await store.settle_batch_atomically(make_batch(begin + 1, 16, 64))

    asyncio.run(ask())


def test_warnings_are_counted_and_not_logged_one_by_one(
    own_node: Node, own_keyspace: str, begin: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def ask() -> None:
        async with opened(own_node, own_keyspace) as store:
            for number in range(1, 6):
                await store.settle_batch_atomically(make_batch(begin + number, 16, 64))
            assert store.warnings_total == 5

    with caplog.at_level(logging.INFO):
        asyncio.run(ask())
    assert len([record for record in caplog.records if "exceeding specified" in str(record.__dict__)]) == 1


def test_a_table_dropped_under_an_open_store_is_refused_with_the_next_step(cassandra_node: Node) -> None:
    keyspace = new_keyspace(cassandra_node)

    async def ask() -> None:
        async with opened(cassandra_node, keyspace) as store:
            await store.settle_batch_atomically(make_batch(1))
            assert await store.trade_exists("btc_usdt", 100)
            await asyncio.to_thread(cassandra_node.cql, f"DROP TABLE {keyspace}.settled_trades_btc_usdt")
            with pytest.raises(StoreRefusedError, match="sidecar schema apply"):
                await store.settle_batch_atomically(make_batch(2))
            with pytest.raises(StoreRefusedError, match="sidecar schema apply"):
                await store.trade_exists("btc_usdt", 100)
            with pytest.raises(StoreRefusedError, match=r"settled_trades_btc_usdt.*sidecar schema apply"):
                await store.ready_for(SYMBOLS)
            assert await store.apply_schema(SYMBOLS) == ["settled_trades_btc_usdt"]
            assert not await store.trade_exists("btc_usdt", 100)
            await store.settle_batch_atomically(make_batch(2))
            assert await store.trade_exists("btc_usdt", 200)

    asyncio.run(ask())


def test_look_ups_whose_connection_is_lost_have_an_unknown_outcome_and_are_answered_later(
    own_node: Node, own_keyspace: str, begin: int
) -> None:
    keyspace = own_keyspace

    async def ask() -> None:
        async with opened(own_node, keyspace) as store:
            await store.settle_batch_atomically(make_batch(begin + 1))
            trade_id = (begin + 1) * 100
            assert await store.trade_exists("btc_usdt", trade_id)
            await asyncio.to_thread(own_node.pause)
            try:
                asked = [asyncio.ensure_future(store.trade_exists("btc_usdt", trade_id)) for _ in range(20)]
                await asyncio.sleep(0)
                assert store._connected is not None
                (pool,) = store._connected.session.get_pools()
                (connection,) = pool.get_connections()
                connection._socket.shutdown(socket.SHUT_RDWR)
                answers = await asyncio.gather(*asked, return_exceptions=True)
            finally:
                await asyncio.to_thread(own_node.resume)
            assert {type(answer) for answer in answers} == {OutcomeUnknownError}
            assert not any("OperationTimedOut" in str(answer) for answer in answers)  # it is known at once
            await until(lambda: stands(store), "it stands again")
            assert await store.trade_exists("btc_usdt", trade_id)
            assert not store.unknown_errors

    asyncio.run(ask())


def test_a_store_that_is_closed_says_so(cassandra_node: Node, keyspace: str) -> None:
    async def ask() -> None:
        async with opened(cassandra_node, keyspace) as store:
            assert not await store.trade_exists("btc_usdt", 1)
        with pytest.raises(OutcomeUnknownError, match=f"{cassandra_node.port}: not connected"):
            await store.trade_exists("btc_usdt", 1)
        with pytest.raises(OutcomeUnknownError, match="not connected"):
            await store.get_user_balance(1, 1)

    asyncio.run(ask())


def test_a_look_up_under_way_when_the_store_is_closed_ends(own_node: Node, own_keyspace: str) -> None:
    async def ask() -> None:
        async with opened(own_node, own_keyspace) as store:
            assert not await store.trade_exists("btc_usdt", 1)
            await asyncio.to_thread(own_node.pause)
            try:
                asked = asyncio.ensure_future(store.trade_exists("btc_usdt", 1))
                await asyncio.sleep(0)
                await store.close()
                with pytest.raises(OutcomeUnknownError):
                    await asked
            finally:
                await asyncio.to_thread(own_node.resume)

    asyncio.run(ask())


def test_a_table_altered_under_an_open_store_goes_on(cassandra_node: Node) -> None:
    keyspace = new_keyspace(cassandra_node)

    async def ask() -> None:
        async with opened(cassandra_node, keyspace) as store:
            await store.settle_batch_atomically(make_batch(1))
            assert await store.get_trade("btc_usdt", 100)
            assert await store.trade_exists("btc_usdt", 100)
            assert await store.get_user_balance(0, 1) == Balance(0, 1, "*", 1, 1, 1, 1)
            for table in ("settled_trades_btc_usdt", "user_balances"):
                await asyncio.to_thread(cassandra_node.cql, f"ALTER TABLE {keyspace}.{table} ADD remark text")
            assert await store.trade_exists("btc_usdt", 100)
            assert await store.get_user_balance(0, 1) == Balance(0, 1, "*", 1, 1, 1, 1)
            await store.settle_batch_atomically(make_batch(2))
            (row,) = await store.get_trade("btc_usdt", 200)
            assert tuple(row) == TRADE_COLUMNS
            assert await store.load_accounts(STREAM, [(0, 1)]) == {(0, 1): Account(2, 2, 2, 2)}
            await store.ready_for(SYMBOLS)

    asyncio.run(ask())


def test_a_keyspace_that_is_not_there_is_told_with_the_next_step(cassandra_node: Node) -> None:
    async def ask() -> None:
        store = make_store(cassandra_node, "nowhere")
        with pytest.raises(StoreRefusedError, match=r"no keyspace nowhere in .*; run `sidecar schema apply`"):
            await store.open()
        await store.close()

    asyncio.run(ask())


def test_another_datacenter_is_told_by_its_name(cassandra_node: Node) -> None:
    async def ask() -> None:
        store = make_store(cassandra_node, "nowhere", local_dc="mars")
        with pytest.raises(StoreRefusedError, match=r"local_dc = 'mars'.*datacenter1"):
            await store.open()

    asyncio.run(ask())


def test_a_forbidden_table_option_is_refused_with_the_statement_that_mends_it(cassandra_node: Node) -> None:
    keyspace = new_keyspace(cassandra_node)
    cassandra_node.cql(f"ALTER TABLE {keyspace}.user_balances WITH gc_grace_seconds = 0")

    async def ask() -> None:
        with pytest.raises(StoreRefusedError, match=r"gc_grace_seconds = 0, above 0 .* is allowed; run: ALTER TABLE"):
            await apply(cassandra_node, keyspace)
        store = make_store(cassandra_node, keyspace)
        with pytest.raises(StoreRefusedError, match="gc_grace_seconds"):
            await store.open()

    asyncio.run(ask())


def test_the_schema_file_loads_and_is_what_is_checked(cassandra_node: Node) -> None:
    keyspace = f"t_{secrets.token_hex(6)}"
    text = make_store(cassandra_node, keyspace).schema(["btc_usdt", "eth_usdt"])
    cassandra_node.cql(text)

    async def ask() -> None:
        store = make_store(cassandra_node, keyspace)
        assert await store.apply_schema(["btc_usdt", "eth_usdt"]) == []
        await store.close()

    asyncio.run(ask())


# --- decisions ---


def test_an_entry_that_got_there_without_an_answer_is_ours(cassandra_node: Node, keyspace: str, begin: int) -> None:
    entry = Decision(f"{begin}", 1, "gap", 1, 2, "{}", "why", "me@here:1", 1_700_000_000_000)

    async def ask() -> None:
        async with opened(cassandra_node, keyspace) as store:
            assert await store.append_decision(entry)
            assert await store.append_decision(entry)  # the first answer was lost
            assert not await store.append_decision(entry._replace(decided_by="me@here:2"))
            ask_node = store._rows

            async def lose_the_answer(question: Any) -> Any:
                rows = await ask_node(question)
                if "IF NOT EXISTS" in question.prepared_statement.query_string:
                    raise OutcomeUnknownError("lost on its way")
                return rows

            store._rows = lose_the_answer  # type: ignore[method-assign]
            assert await store.append_decision(entry._replace(number=2))
            assert not await store.append_decision(entry._replace(number=2, body='{"other": 1}'))
            assert [known.number for known in await store.read_decisions(f"{begin}")] == [1, 2]

    asyncio.run(ask())


# --- one trade, whole ---

CONFIG = (
    """
[store]
backend = "cassandra"
[store.cassandra]
port = {port}
keyspace = "{keyspace}"
"""
    + RULES_TOML
    + 'quote_amount = "raw"\n'
)


def test_atomic_settlement(cassandra_node: Node, tmp_path: Any) -> None:
    keyspace = new_keyspace(cassandra_node)
    file = tmp_path / "sidecar.toml"
    file.write_text(CONFIG.format(port=cassandra_node.port, keyspace=keyspace))
    config = load(file)
    trade = trade_fields(1, trade_id=77, price=300, quantity=1_000, ts_us=1_700_000_000_000_000)

    def stored() -> Any:
        values = ", ".join(
            f"{name}, writetime({name})" for name in ("available", "version", "last_sequence", "updated_at")
        )
        others = [name for name in TRADE_COLUMNS if name not in {"page", "trade_id", "stream"}]
        return cassandra_node.cql(
            f"SELECT user_id, asset_id, stream, {values} FROM {keyspace}.user_balances",
            f"SELECT page, trade_id, stream, {', '.join(f'{name}, writetime({name})' for name in others)}"
            f" FROM {keyspace}.settled_trades_btc_usdt",
        )

    async def ask() -> None:
        sent: list[Batch] = []
        async with Settlement(config) as settlement:
            store = settlement.store

            def noted(batch: Batch) -> Callable[[], Awaitable[None]]:
                sent.append(batch)
                return store.attempt(batch)

            assert settlement._life is not None
            settlement._life.pipeline._attempt = noted
            assert not await store.trade_exists("btc_usdt", 77)
            assert await settlement.settle_trade_atomically(trade)
            assert await store.trade_exists("btc_usdt", 77)
            assert await store.trade_exists("btc_usdt", 77, STREAM)
            (row,) = await store.get_trade("btc_usdt", 77)
            assert {name: row[name] for name in trade if name in row} == {
                name: value for name, value in trade.items() if name in row
            }
            assert (row["page"], row["stream"], row["quote_amount"]) == (0, STREAM, 300_000)
            buyer, seller = trade["buyer_user_id"], trade["seller_user_id"]
            for user, asset, available in (
                (buyer, 1, 1_000), (buyer, 2, -300_000), (seller, 1, -1_000), (seller, 2, 300_000),
            ):  # fmt: skip
                found = await store.get_user_balance(user, asset)
                assert found == Balance(user, asset, "*", available, 1, 1, 1_700_000_000_000_000)
            once = await asyncio.to_thread(stored)
            assert len(once[0]) == 4
            stamps = {value for row in once[0] for name, value in row.items() if name.startswith("writetime")}
            assert len(stamps) == 1
            assert not await settlement.settle_trade_atomically(trade)
            await store.settle_batch_atomically(sent[0])  # a retry whose first answer was lost
        async with Settlement(config) as settlement:  # another process, later
            assert not await settlement.settle_trade_atomically(trade)
        assert await asyncio.to_thread(stored) == once

        async def nothing(_stream: str) -> dict[str, State]:
            return {}

        replay = Settlement(config)
        replay.store.load_state = nothing  # type: ignore[method-assign, assignment]  # `durable` is before the trade
        async with replay:
            await replay.settle_trade_atomically(trade)
        assert await asyncio.to_thread(stored) == once

    asyncio.run(ask())
