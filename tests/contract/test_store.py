"""What store/base.py promises, asked of every store in the same words."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sidecar.batch import BALANCE_COLUMNS, LEDGER_COLUMNS, REJECTED_COLUMNS, ROW_PAGE_WIDTH, TRADE_COLUMNS, Batch, Row
from sidecar.errors import StoreRefusedError
from sidecar.events import I63_MAX, Account, AccountKey, Balance, Decision, State
from sidecar.store.base import SCAN_ROWS, ProofFinding, ProofRun, StampedBalance, Store
from sidecar.store.sqlite import SQLiteStore
from tests.stores import STORES

if TYPE_CHECKING:
    from tests.cassandra_node import Node

I64_MIN = -(2**63)
SYMBOLS = ("btc_usdt", "eth_usdt")
PAGE_WIDTHS = {"btc_usdt": 10_000, "eth_usdt": 7}
OPTIONAL = {"buyer_fee", "seller_fee", "ts_us", "origin_sequence"}
TABLES = {
    *(f"settled_trades_{symbol}" for symbol in SYMBOLS), "user_balances", "ledger_events", "rejected_events",
    "settlement_state", "stream_decisions", "reconciliation_runs", "reconciliation_findings",
}  # fmt: skip


class Rows:
    """Rows that outlive a store's object: `store()` gives another object over the same ones, `fresh()` other rows."""

    def __init__(self, folder: Path, node: Node | None) -> None:
        self.folder = folder
        self.node = node
        self.place = f"t_{secrets.token_hex(6)}"

    def store(self) -> Store:
        if self.node is None:
            return SQLiteStore(self.folder / f"{self.place}.db", dict(PAGE_WIDTHS))
        from sidecar.store.cassandra import CassandraStore

        return CassandraStore(
            page_widths=dict(PAGE_WIDTHS), contact_points=[self.node.host], port=self.node.port, keyspace=self.place
        )

    def fresh(self) -> Rows:
        return Rows(self.folder, self.node)

    def spoil(self) -> None:
        """Make user_balances as an older program had it: without `updated_at`."""
        if self.node is None:
            with contextlib.closing(sqlite3.connect(self.folder / f"{self.place}.db")) as db:
                db.execute("ALTER TABLE user_balances DROP COLUMN updated_at")
        else:
            self.node.cql(f"ALTER TABLE {self.place}.user_balances DROP updated_at")

    @contextlib.asynccontextmanager
    async def opened(self, *symbols: str) -> AsyncIterator[Store]:
        async with self.store() as store:
            await store.ready_for(symbols or SYMBOLS)
            yield store

    def run(self, ask: Callable[[Store], Awaitable[None]]) -> None:
        """Ask an open store on a loop of its own."""

        async def asked() -> None:
            async with self.opened() as store:
                await ask(store)

        asyncio.run(asked())


@pytest.fixture(scope="module", params=STORES)
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The rows of one store, shared by this module's tests: each keeps to its own stream, users and trade ids."""
    node = request.getfixturevalue("cassandra_node") if request.param == "cassandra" else None
    made = Rows(tmp_path_factory.mktemp("store"), node)
    created = asyncio.run(_apply(made))
    assert {f"settled_trades_{symbol}" for symbol in SYMBOLS} <= set(created) <= TABLES  # `open` may create the rest
    return made


async def _apply(rows: Rows) -> list[str]:
    store = rows.store()
    try:
        return await store.apply_schema(SYMBOLS)
    finally:
        await store.close()


_places = itertools.count(1)


@pytest.fixture
def first() -> int:
    """The first of a million user and trade ids that are this test's own."""
    return next(_places) * 1_000_000


@pytest.fixture
def stream(first: int) -> str:
    return f"stream-{first}"


def trade_row(stream: str, trade_id: int, sequence: int, symbol: str = "btc_usdt", **other: Any) -> Row:
    values: dict[str, Any] = {name: place * 1_000 + sequence % 1_000 for place, name in enumerate(TRADE_COLUMNS)}
    values |= dict.fromkeys(OPTIONAL)
    values |= {"stream": stream, "trade_id": trade_id, "output_sequence": sequence}
    values |= {"page": trade_id // PAGE_WIDTHS[symbol], "base_asset": 1, "quote_asset": 2}
    return tuple((values | other).values())


def ledger_row(stream: str, sequence: int, **other: Any) -> Row:
    values = {
        "stream": stream, "page": sequence // ROW_PAGE_WIDTH, "output_sequence": sequence, "event_type": "DEPOSIT",
        "user_id": 1, "asset_id": 2, "amount": 3, "related_id": 4, "created_at": 5, "origin_sequence": None,
    }  # fmt: skip
    assert tuple(values) == LEDGER_COLUMNS
    return tuple((values | other).values())


def rejected_row(stream: str, sequence: int, payload: bytes = b"frame") -> Row:
    return (stream, sequence // ROW_PAGE_WIDTH, sequence, "BAD_FIELD", "a = 1; 2 is allowed – ü", payload)


def make_batch(stream: str, last: int, *, symbol: str = "btc_usdt", **other: Any) -> Batch:
    """A batch that ends with sequence `last`, by which it is stamped."""
    trades = other.pop("trades", [])
    values: dict[str, Any] = {
        "stream": stream, "first_sequence": last, "last_sequence": last, "stamp_us": 1_700_000_000_000_000 + last,
        "trades": {symbol: trades} if trades else {}, "ledger_events": [], "rejected": [], "balances": {},
        "last_trade_ids": {}, "events": 1, "decisions_read": 0,
    }  # fmt: skip
    return Batch(**(values | other))


async def collected(pages: AsyncIterator[list[Any]]) -> list[Any]:
    return [row async for page in pages for row in page]


def test_what_was_never_settled_is_not_there(rows: Rows, first: int, stream: str) -> None:
    async def ask(store: Store) -> None:
        assert not await store.trade_exists("btc_usdt", first)
        assert not await store.trade_exists("btc_usdt", first, stream)
        assert await store.get_trade("btc_usdt", first) == []
        assert await store.get_user_balance(first, 1) is None
        assert await store.get_user_balances(first) == []
        assert await store.get_rejected(stream, 1) is None
        assert await store.get_ledger_event(stream, 1) is None
        assert await store.load_accounts(stream, [(first, 1)]) == {}
        assert await store.load_accounts(stream, []) == {}
        assert await store.load_state(stream) == {}
        assert await store.read_decisions(stream) == []
        assert await collected(store.scan_ledger_events(stream, 0, I63_MAX)) == []
        assert await collected(store.scan_rejected(stream, 0, I63_MAX)) == []

    rows.run(ask)


def test_a_batch_is_there_as_it_was_written(rows: Rows, first: int, stream: str) -> None:
    trade = trade_row(stream, first, 7, buyer_fee=3, ts_us=99)
    event = ledger_row(stream, 8, user_id=first)
    payload = bytes(range(256)) * 16
    batch = make_batch(
        stream,
        9,
        trades=[trade],
        ledger_events=[event],
        rejected=[rejected_row(stream, 9, payload)],
        balances={(first, 1): Account(5, 2, 7, 99)},
    )

    async def ask(store: Store) -> None:
        await store.settle_batch_atomically(batch)
        assert await store.trade_exists("btc_usdt", first)
        assert await store.get_trade("btc_usdt", first) == [dict(zip(TRADE_COLUMNS, trade, strict=True))]
        assert await store.get_ledger_event(stream, 8) == dict(zip(LEDGER_COLUMNS, event, strict=True))
        rejected = dict(zip(REJECTED_COLUMNS, batch.rejected[0], strict=True)) | {"resolution": None}
        assert await store.get_rejected(stream, 9) == rejected
        assert await store.get_user_balances(first) == [Balance(first, 1, stream, 5, 2, 7, 99)]
        assert await store.load_accounts(stream, [(first, 1)]) == {(first, 1): Account(5, 2, 7, 99)}

    rows.run(ask)


def test_what_was_done_about_a_rejected_event_stays_whatever_is_replayed_after_it(rows: Rows, stream: str) -> None:
    batch = make_batch(stream, 9, rejected=[rejected_row(stream, 9, b"as received")])

    async def ask(store: Store) -> None:
        await store.settle_batch_atomically(batch)
        await store.resolve_rejected(stream, 9, "resubmitted as a 1", 1_700_000_000_000_000)
        await store.resolve_rejected(stream, 9, "resubmitted as a 2", 1_700_000_000_000_001)
        await store.settle_batch_atomically(batch)
        found = await store.get_rejected(stream, 9)
        assert found is not None
        assert (found["resolution"], bytes(found["payload"])) == ("resubmitted as a 2", b"as received")

    rows.run(ask)


@pytest.mark.parametrize("absent", [OPTIONAL, OPTIONAL - {"buyer_fee"}, OPTIONAL - {"ts_us", "seller_fee"}, set()])
def test_absent_fields_are_absent(rows: Rows, first: int, stream: str, absent: set[str]) -> None:
    present: dict[str, Any] = dict.fromkeys(OPTIONAL - absent, 0)
    trade = trade_row(stream, first, 1, **present)

    async def ask(store: Store) -> None:
        await store.settle_batch_atomically(make_batch(stream, 1, trades=[trade]))
        (found,) = await store.get_trade("btc_usdt", first)
        assert {name for name in found if found[name] is None} == absent

    rows.run(ask)


@pytest.mark.parametrize("extreme", [I63_MAX, I64_MIN, -1, 0])
def test_amounts_of_every_size(rows: Rows, first: int, stream: str, extreme: int) -> None:
    account = Account(extreme, I63_MAX, I63_MAX, I63_MAX)
    trade = trade_row(stream, first, 1, price=extreme, quote_amount=extreme, seller_quote_version=extreme)

    async def ask(store: Store) -> None:
        await store.settle_batch_atomically(make_batch(stream, 1, trades=[trade], balances={(first, 1): account}))
        assert await store.load_accounts(stream, [(first, 1)]) == {(first, 1): account}
        (found,) = await store.get_trade("btc_usdt", first)
        assert (found["price"], found["quote_amount"], found["seller_quote_version"]) == (extreme,) * 3

    rows.run(ask)


def test_keys_of_every_size(rows: Rows, stream: str) -> None:
    async def ask(store: Store) -> None:
        key = (I63_MAX, 2**31 - 1)
        trade = trade_row(stream, I63_MAX, I63_MAX)
        batch = make_batch(stream, 1, trades=[trade], balances={key: Account(1, 1, 1, 1)})
        await store.settle_batch_atomically(batch)
        await store.settle_batch_atomically(make_batch(stream, 2, rejected=[rejected_row(stream, I63_MAX)]))
        assert await store.trade_exists("btc_usdt", I63_MAX, stream)
        assert key in await store.load_accounts(stream, [key])
        assert len(await collected(store.scan_rejected(stream, I63_MAX, I63_MAX))) == 1

    rows.run(ask)


def test_the_same_batch_again_changes_nothing(rows: Rows, first: int, stream: str) -> None:
    batch = make_batch(
        stream,
        3,
        trades=[trade_row(stream, first, 1), trade_row(stream, first + 1, 2)],
        rejected=[rejected_row(stream, 3)],
        balances={(first, 1): Account(5, 1, 1, 1), (first, 2): Account(-5, 2, 2, 1)},
    )

    async def ask(store: Store) -> None:
        await store.settle_batch_atomically(batch)
        before = await _everything(store, first, stream)
        await store.settle_batch_atomically(batch)
        await asyncio.gather(*(store.settle_batch_atomically(batch) for _ in range(5)))
        assert await _everything(store, first, stream) == before

    rows.run(ask)


async def _everything(store: Store, user: int, stream: str) -> Any:
    return (
        await store.get_user_balances(user),
        [await store.get_trade("btc_usdt", user + n) for n in range(3)],
        await collected(store.scan_rejected(stream, 0, I63_MAX)),
        await collected(store.scan_ledger_events(stream, 0, I63_MAX)),
    )


def test_batches_that_overlap_end_the_same_in_any_order(rows: Rows, first: int, stream: str) -> None:
    async def ask(store: Store) -> None:
        for number, order in enumerate(itertools.permutations((1, 2, 3, 2))):
            user = first + number * 10
            batches = {
                last: make_batch(
                    stream,
                    last,
                    trades=[trade_row(stream, user + last, last)],
                    balances={(user, asset): Account(100 * last, last, last, last) for asset in range(1, last + 1)},
                )
                for last in (1, 2, 3)
            }
            for last in order:
                await store.settle_batch_atomically(batches[last])
            found = await store.load_accounts(stream, [(user, asset) for asset in (1, 2, 3)])
            assert found == {(user, asset): Account(300, 3, 3, 3) for asset in (1, 2, 3)}, order
            for last in (1, 2, 3):
                assert await store.trade_exists("btc_usdt", user + last, stream), order

    rows.run(ask)


def test_a_balance_that_was_skipped_is_left_alone_and_the_trade_is_written(rows: Rows, first: int, stream: str) -> None:
    async def ask(store: Store) -> None:
        ahead = make_batch(stream, 9, balances={(first, 1): Account(9, 9, 9, 9)})
        replayed = make_batch(
            stream, 5, trades=[trade_row(stream, first, 5)], balances={(first, 2): Account(1, 1, 5, 5)}
        )
        await store.settle_batch_atomically(ahead)
        await store.settle_batch_atomically(replayed)
        assert await store.trade_exists("btc_usdt", first, stream)
        found = await store.load_accounts(stream, [(first, 1), (first, 2)])
        assert found == {(first, 1): Account(9, 9, 9, 9), (first, 2): Account(1, 1, 5, 5)}

    rows.run(ask)


def test_two_stores_at_once_over_the_same_rows(rows: Rows, first: int, stream: str) -> None:
    async def ask() -> None:
        async with rows.opened() as one, rows.opened() as other:
            batches = [
                make_batch(
                    stream,
                    last,
                    trades=[trade_row(stream, first + last, last)],
                    balances={(first + user, 1): Account(last, last, last, last) for user in range(5)},
                )
                for last in range(1, 60)
            ]
            await asyncio.gather(
                *(one.settle_batch_atomically(batch) for batch in batches),
                *(other.settle_batch_atomically(batch) for batch in reversed(batches)),
            )
            for store in (one, other):
                found = await store.load_accounts(stream, [(first + user, 1) for user in range(5)])
                assert found == {(first + user, 1): Account(59, 59, 59, 59) for user in range(5)}
                assert all([await store.trade_exists("btc_usdt", first + last, stream) for last in range(1, 60)])

    asyncio.run(ask())


def test_accounts_by_the_thousand(rows: Rows, first: int, stream: str) -> None:
    written: dict[AccountKey, Account] = {
        (first + user, asset): Account(user, asset, 1, 1) for user in range(1_000) for asset in (1, 2, 3)
    }
    asked = [key for key in written if key[1] != 3] + [(first + 5_000, 1), (first, 9)]

    async def ask(store: Store) -> None:
        keys = list(written)
        for at in range(0, len(keys), 200):
            some = {key: written[key] for key in keys[at : at + 200]}
            await store.settle_batch_atomically(make_batch(stream, 1, balances=some))
        await store.settle_batch_atomically(
            make_batch("another", 1, balances={(first + 5_000, 1): Account(1, 1, 1, 1)})
        )
        began = time.monotonic()
        found = await store.load_accounts(stream, asked)
        took_s = time.monotonic() - began
        assert found == {key: written[key] for key in asked if key in written}
        assert took_s < 3, f"{len(asked)} accounts in {took_s:.2f} s"

    rows.run(ask)


def test_positions_only_move_forward(rows: Rows, stream: str) -> None:
    older, newer = State(5, 1_005, {"btc_usdt": 4}), State(9, 1_009, {"btc_usdt": 8, "eth_usdt": 1})

    async def ask(store: Store) -> None:
        await store.save_state(stream, "acked", older)
        assert await store.load_state(stream) == {"acked": older}
        await store.save_state(stream, "durable", State(1, 1_001, {}))
        await store.save_state(stream, "acked", newer)
        await store.save_state(stream, "acked", newer)
        await store.save_state(stream, "acked", older)
        assert await store.load_state(stream) == {"acked": newer, "durable": State(1, 1_001, {})}

    rows.run(ask)


def decision(stream: str, number: int, by: str = "me", **other: Any) -> Decision:
    made = Decision(stream, number, "gap", 4, I63_MAX, '{"a": "ü"}', "why", by, 1_700_000_000_123)
    return made._replace(**other)


def test_the_decision_log_is_read_in_order(rows: Rows, stream: str) -> None:
    log = [decision(stream, number) for number in range(1, 30)]
    log[0] = log[0]._replace(first_sequence=None, last_sequence=None, decided_at_ms=0)

    async def ask(store: Store) -> None:
        for entry in log:
            assert await store.append_decision(entry)
        assert await store.append_decision(decision("*" + stream, 1))
        assert await store.read_decisions(stream) == log

    rows.run(ask)


def test_a_number_that_is_taken_stays_with_its_first_entry(rows: Rows, stream: str) -> None:
    async def ask(store: Store) -> None:
        assert await store.append_decision(decision(stream, 1))
        assert not await store.append_decision(decision(stream, 1, by="another"))
        assert not await store.append_decision(decision(stream, 1, body="{}"))
        assert await store.read_decisions(stream) == [decision(stream, 1)]

    rows.run(ask)


def test_of_two_that_decide_at_once_exactly_one_wins(rows: Rows, stream: str) -> None:
    async def ask() -> None:
        async with rows.opened() as one, rows.opened() as other:
            for number in range(1, 11):
                entries = [decision(stream, number, by=who) for who in ("one", "other", "third")]
                stores = (one, other, one)
                won = await asyncio.gather(
                    *(store.append_decision(entry) for store, entry in zip(stores, entries, strict=True))
                )
                assert sorted(won) == [False, False, True]
                assert (await other.read_decisions(stream))[-1] == entries[won.index(True)]

    asyncio.run(ask())


def test_a_trade_is_found_by_stream_and_on_any(rows: Rows, first: int, stream: str) -> None:
    late = f"{stream}/late"

    async def ask(store: Store) -> None:
        await store.settle_batch_atomically(make_batch(late, 1, trades=[trade_row(late, first, 1, origin_sequence=77)]))
        assert await store.trade_exists("btc_usdt", first)
        assert not await store.trade_exists("btc_usdt", first, stream)
        assert not await store.trade_exists("eth_usdt", first)
        await store.settle_batch_atomically(make_batch(stream, 1, trades=[trade_row(stream, first, 1)]))
        assert await store.trade_exists("btc_usdt", first, stream)
        found = await store.get_trade("btc_usdt", first)
        assert [(row["stream"], row["origin_sequence"]) for row in found] == [(stream, None), (late, 77)]

    rows.run(ask)


def test_trades_of_several_symbols_in_one_batch(rows: Rows, first: int, stream: str) -> None:
    async def ask(store: Store) -> None:
        trades = {symbol: [trade_row(stream, first + 1, 1, symbol)] for symbol in SYMBOLS}
        await store.settle_batch_atomically(make_batch(stream, 1)._replace(trades=trades))
        for symbol in SYMBOLS:
            assert await store.trade_exists(symbol, first + 1, stream)
            assert not await store.trade_exists(symbol, first, stream)

    rows.run(ask)


def test_a_users_balance_is_the_sum_over_streams(rows: Rows, first: int, stream: str) -> None:
    async def ask(store: Store) -> None:
        for name, account in (
            ("a", Account(10, 2, 50, 500)),
            ("b", Account(-3, 1, 20, 900)),
            ("c", Account(0, 1, 1, 0)),
        ):
            await store.settle_batch_atomically(
                make_batch(stream + name, 50, balances={(first, 1): account, (first, 2): Account(1, 1, 1, 1)})
            )
        assert await store.get_user_balance(first, 1) == Balance(first, 1, "*", 7, 4, 20, 900)
        assert await store.get_user_balance(first, 3) is None
        found = await store.get_user_balances(first)
        assert [(row.asset_id, row.stream) for row in found] == [(asset, stream + x) for asset in (1, 2) for x in "abc"]

    rows.run(ask)


def test_scans_go_through_all_trades_and_balances(rows: Rows, first: int, stream: str) -> None:
    trades = {trade_row(stream, first + number * 3, number) for number in range(1, 2_401)}
    balances = {Balance(first + number, 1, stream, number, 1, 1, 1) for number in range(2_400)}

    async def ask(store: Store) -> None:
        left, accounts = sorted(trades), sorted(balances)
        batches = [
            make_batch(
                stream,
                1,
                trades=left[at : at + 16],
                balances={(row.user_id, row.asset_id): Account(*row[3:]) for row in accounts[at : at + 16]},
            )
            for at in range(0, len(left), 16)
        ]
        await asyncio.gather(*map(store.settle_batch_atomically, batches))
        pages = [page async for page in store.scan_trades("btc_usdt")]
        assert len(pages) > 1
        assert all(pages)
        found = [row for page in pages for row in page if row[2] == stream]
        assert len(found) == len(trades)
        assert set(found) == trades
        found_balances = [row for row in await collected(store.scan_balances()) if row.stream == stream]
        assert len(found_balances) == len(balances)
        assert set(found_balances) == balances
        assert all(isinstance(row, Balance) for row in found_balances)

    rows.run(ask)


def test_a_user_with_more_balances_than_a_page_holds_gets_them_all(rows: Rows, first: int, stream: str) -> None:
    accounts = {(first, asset): Account(asset, 1, 1, 1) for asset in range(1, SCAN_ROWS + 101)}
    keys = sorted(accounts)

    async def ask(store: Store) -> None:
        batches = [
            make_batch(stream, 1, balances={key: accounts[key] for key in keys[at : at + 100]})
            for at in range(0, len(keys), 100)
        ]
        await asyncio.gather(*map(store.settle_batch_atomically, batches))
        assert await store.get_user_balances(first) == [Balance(*key, stream, *accounts[key]) for key in keys]
        assert await store.load_accounts(stream, keys) == accounts

    rows.run(ask)


@pytest.mark.parametrize("table", ["ledger_events", "rejected_events"])
def test_scans_by_sequence_are_in_order_and_keep_to_their_range(rows: Rows, stream: str, table: str) -> None:
    # Three pages close to each other, one far away, and another stream in between.
    sequences = [*range(9_900, 10_100), *range(19_999, 20_002), 10**12, I63_MAX]
    key, make = ("rejected", rejected_row) if table == "rejected_events" else ("ledger_events", ledger_row)

    async def ask(store: Store) -> None:
        written = {sequence: make(stream, sequence) for sequence in sequences}
        for at in range(0, len(sequences), 50):
            some: dict[str, Any] = {key: [written[sequence] for sequence in sequences[at : at + 50]]}
            await store.settle_batch_atomically(make_batch(stream, 1, **some))
        other: dict[str, Any] = {key: [make("b" + stream, 10_000)]}
        await store.settle_batch_atomically(make_batch("b" + stream, 1, **other))
        scan = store.scan_rejected if key == "rejected" else store.scan_ledger_events
        for low, high in (
            (0, I63_MAX),
            (9_950, 20_000),
            (10_000, 10_000),
            (20_002, I63_MAX),
            (0, 9_899),
            (9_999, 10**12),
        ):
            wanted = [written[sequence] for sequence in sequences if low <= sequence <= high]
            assert await collected(scan(stream, low, high)) == wanted, (low, high)

    rows.run(ask)


def test_more_ledger_events_than_a_page(rows: Rows, stream: str) -> None:
    written = [ledger_row(stream, sequence) for sequence in range(1, 2_301)]

    async def ask(store: Store) -> None:
        await asyncio.gather(
            *(
                store.settle_batch_atomically(make_batch(stream, 1, ledger_events=written[at : at + 100]))
                for at in range(0, len(written), 100)
            )
        )
        pages = [page async for page in store.scan_ledger_events(stream, 1, 2_300)]
        assert len(pages) > 1
        assert [row for page in pages for row in page] == written

    rows.run(ask)


# --- what a proof of the ledger reads and writes ---


def test_streams_are_listed_by_their_decisions(rows: Rows, stream: str) -> None:
    async def ask(store: Store) -> None:
        assert await store.append_decision(decision(stream, 1))
        assert await store.append_decision(decision(f"{stream}/late", 1))
        await store.append_decision(decision("*", 1))
        found = await store.list_streams()
        assert {stream, f"{stream}/late"} <= set(found)
        assert "*" not in found
        assert found == sorted(found)

    rows.run(ask)


def test_a_table_of_trades_is_gone_through_from_any_cursor(rows: Rows, first: int, stream: str) -> None:
    """In every page size: from behind each cursor come exactly the rows that had not come with or before it."""
    trades = {trade_row(stream, first + number, number, "eth_usdt") for number in range(50)}  # pages of 7

    async def ask(store: Store) -> None:
        batch = make_batch(stream, 1, symbol="eth_usdt", trades=sorted(trades))
        await store.settle_batch_atomically(batch)
        for rows_a_page in (1, 3, 7, 10, 1_000):
            pieces = [piece async for piece in store.scan_trades_after("eth_usdt", None, rows_a_page=rows_a_page)]
            all_rows = [row for _, some in pieces for row in some]
            assert len(set(all_rows)) == len(all_rows)
            assert {row for row in all_rows if row[2] == stream} == trades
            come: list[Row] = []
            for cursor, some in pieces:
                come += some
                if cursor is not None and (rows_a_page != 1 or len(come) % 5 == 0):
                    left = store.scan_trades_after("eth_usdt", cursor, rows_a_page=rows_a_page)
                    assert [row async for _, more in left for row in more] == all_rows[len(come) :]
            assert pieces[-1][0] is not None

    rows.run(ask)


def test_trades_between_two_ids(rows: Rows, first: int, stream: str) -> None:
    near = {trade_row(stream, first + number, number) for number in range(0, 30_000, 1_000)}
    far = trade_row(stream, first + 10**12, 5)

    async def ask(store: Store) -> None:
        await store.settle_batch_atomically(make_batch(stream, 1, trades=[*sorted(near), far]))
        for low, high, rows_a_page in ((0, 30_000, 4), (5_000, 5_000, 1), (5_001, 19_999, 2), (29_001, None, 100)):
            last = None if high is None else first + high
            found = await collected(store.scan_trades_between("btc_usdt", first + low, last, rows_a_page=rows_a_page))
            wanted = [row for row in (*sorted(near), far) if first + low <= row[1] <= (last or I63_MAX)]
            assert sorted(row for row in found if row[2] == stream) == wanted, (low, high)
        assert far in await collected(store.scan_trades_between("btc_usdt", 0, I63_MAX))

    rows.run(ask)


def test_balances_come_with_their_write_times(rows: Rows, first: int, stream: str) -> None:
    async def ask(store: Store) -> None:
        batch = make_batch(stream, 7, balances={(first + n, 1): Account(n, 1, 7, 0) for n in range(5)})
        await store.settle_batch_atomically(batch)
        stamp = batch.stamp_us if store.name == "cassandra" else 0
        wanted = {StampedBalance(first + n, 1, stream, n, 1, 7, 0, stamp) for n in range(5)}
        found = await collected(store.scan_stamped_balances(rows_a_page=2))
        assert {row for row in found if row.stream == stream} == wanted
        assert await store.get_stamped_balances(first + 3) == [StampedBalance(first + 3, 1, stream, 3, 1, 7, 0, stamp)]

    rows.run(ask)


def test_a_repair_goes_backwards_and_is_followed_by_its_decision(rows: Rows, first: int, stream: str) -> None:
    right, wrong = (
        Balance(first, 1, stream, 5, 1, 3, 9),
        {(first, 1): Account(99, 4, 8, 9), (first, 2): Account(1, 1, 8, 0)},
    )

    async def ask(store: Store) -> None:
        genesis = decision(stream, 1)
        assert await store.append_decision(genesis)
        batch = make_batch(stream, 8, balances=wrong, decisions_read=2)
        await store.settle_batch_atomically(batch)
        stamp_us = batch.stamp_us + 1_000_000
        assert not await store.repair(stream, [right], [(first, 2)], stamp_us, decision(stream, 1, by="repair"))
        assert await store.read_decisions(stream) == [genesis]
        assert await store.repair(stream, [right], [(first, 2)], stamp_us, decision(stream, 2))
        assert await store.get_user_balances(first) == [right]
        assert len(await store.read_decisions(stream)) == 2
        # An update of a settler that has not read it yet loses; one stamped above it wins.
        if store.name == "cassandra":
            await store.settle_batch_atomically(batch)
            assert await store.get_user_balances(first) == [right]
        later = make_batch(stream, 9, balances={(first, 1): Account(6, 2, 9, 9)}, decisions_read=2)
        await store.settle_batch_atomically(later._replace(stamp_us=stamp_us + 1))
        assert await store.get_user_balances(first) == [Balance(first, 1, stream, 6, 2, 9, 9)]
        assert await store.repair(stream, [], [(first, 1)], stamp_us + 2, None)
        assert await store.get_user_balances(first) == []

    rows.run(ask)


def test_runs_and_findings_are_kept(rows: Rows, stream: str) -> None:
    run = ProofRun(str(uuid.uuid4()), stream, 1_700_000_000_123, 8, 2, 8, 2, None)
    findings = [
        ProofFinding(1, "BALANCE_DIFFERS", stream, 1, 2, 3, -(2**63), I63_MAX, "–", None),
        ProofFinding(2, "EVENT_MISSING", stream, None, None, 7, None, None, "", None),
    ]

    async def ask(store: Store) -> None:
        await store.save_run(run)
        await store.save_run(run._replace(finished_at_ms=1_700_000_001_000))
        await store.save_findings(run.run_id, findings)
        assert await store.load_findings(run.run_id) == findings
        mended = findings[0]._replace(fixed_at_ms=1_700_000_002_345, detail="before, after")
        await store.save_findings(run.run_id, [mended])
        assert await store.load_findings(run.run_id) == [mended, findings[1]]
        assert await store.load_findings(str(uuid.uuid4())) == []

    rows.run(ask)


def test_an_unknown_symbol_is_refused_by_name(rows: Rows) -> None:
    async def ask(store: Store) -> None:
        with pytest.raises(StoreRefusedError, match=r"'doge_usdt' is not configured; btc_usdt, eth_usdt are"):
            await store.trade_exists("doge_usdt", 1)
        with pytest.raises(StoreRefusedError, match="doge_usdt"):
            await store.get_trade("doge_usdt", 1)

    rows.run(ask)


def test_a_batch_for_a_table_that_is_not_there_is_refused_whole(rows: Rows, first: int, stream: str) -> None:
    async def ask(store: Store) -> None:
        batch = make_batch(stream, 1, trades=[trade_row(stream, first, 1)], balances={(first, 1): Account(1, 1, 1, 1)})
        with pytest.raises(StoreRefusedError, match="settled_trades_doge_usdt"):
            await store.settle_batch_atomically(batch._replace(trades={"doge_usdt": batch.trades["btc_usdt"]}))
        assert await store.load_accounts(stream, [(first, 1)]) == {}

    rows.run(ask)


def test_the_schema_applied_again_creates_nothing(rows: Rows) -> None:
    assert asyncio.run(_apply(rows)) == []

    async def ask(store: Store) -> None:
        assert await store.apply_schema(SYMBOLS) == []

    rows.run(ask)


def test_a_symbol_that_is_added_gets_its_table(rows: Rows, first: int, stream: str) -> None:
    async def ask(store: Store) -> None:
        store.page_widths["sol_usdt"] = 10
        assert await store.apply_schema(["sol_usdt"]) in (["settled_trades_sol_usdt"], [])
        await store.ready_for([*SYMBOLS, "sol_usdt"])
        trade = trade_row(stream, first, 1, page=first // 10)
        await store.settle_batch_atomically(make_batch(stream, 1, symbol="sol_usdt", trades=[trade]))
        assert await store.trade_exists("sol_usdt", first, stream)

    rows.run(ask)


def test_a_schema_of_another_program_is_refused_with_the_next_step(rows: Rows) -> None:
    other = rows.fresh()
    asyncio.run(_apply(other))
    other.spoil()
    with pytest.raises(StoreRefusedError, match=r"user_balances lacks updated_at.*(ALTER TABLE|name another file)"):
        asyncio.run(_apply(other))


def test_the_schema_as_text_names_every_table(rows: Rows) -> None:
    text = rows.store().schema(SYMBOLS)
    assert all(f"{table} (" in text for table in TABLES)
    assert all(column in text for column in (*TRADE_COLUMNS, *BALANCE_COLUMNS, *LEDGER_COLUMNS, *REJECTED_COLUMNS))


def test_an_open_store_stands_and_closes_twice(rows: Rows) -> None:
    async def ask() -> None:
        store = rows.store()
        await store.open()
        began = asyncio.get_running_loop().time()
        assert store.steady_since is not None
        assert store.steady_since <= began
        assert store.outages == 0
        await store.close()
        await store.close()

    asyncio.run(ask())


def test_a_store_that_was_never_opened_can_be_closed(rows: Rows) -> None:
    asyncio.run(rows.store().close())
