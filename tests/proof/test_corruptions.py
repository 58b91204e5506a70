"""Rows changed behind everybody's back, one at a time: found by the right code and account, mended where it can be."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sidecar.events import LedgerEvent, Refused, Trade
from sidecar.proof.fix import Fixer
from sidecar.proof.reconcile import Pace, Proof
from sidecar.proof.work import Work
from sidecar.store.base import Store
from sidecar.store.sqlite import SQLiteStore
from tests.books import SYMBOL_OF, Books, Hand
from tests.stores import STORES
from tests.streams import BTC, SYMBOLS, USDT

if TYPE_CHECKING:
    from tests.cassandra_node import Node

EVENTS = 3_000
DURABLE_AFTER_S = 0.4
Finding = tuple[str, int | None, int | None, int | None]  # code, user, asset, sequence
Expected = set[Finding]


class Scene:
    """Settled books, hands on their rows, and a proof of them."""

    def __init__(self, store: Store, folder: Path, **of_books: Any) -> None:
        self.store = store
        self.of_books = of_books
        self.books = Books(store, **of_books)
        self.hand = Hand(store)
        self.work = Work(folder / "work")
        self.proof = Proof(store=store, work=self.work, pace=Pace(rows_a_page=300), wait_s=0.1)
        self.run_id = ""

    async def found(self, *, full: bool) -> Expected:
        report = await self.proof.run(full=full)
        self.run_id = report.run_id
        assert report.not_checked == []
        assert report.as_dict()["ok"] == (not report.findings)
        assert len(await self.store.load_findings(report.run_id)) == len(report.findings)
        return {(each.code, each.user_id, each.asset_id, each.sequence) for each in report.findings}

    async def fix(self) -> dict[str, Any]:
        fixer = Fixer(
            store=self.store, work=self.work, proof=self.proof, durable_after_s=DURABLE_AFTER_S, look_after_s=0.0
        )
        return (await fixer.fix(self.run_id, None)).as_dict()

    def trade(self, *, at: int = 1_500, symbol: str = "btc_usdt") -> Trade:
        """A trade of two users without fees, away from the ends of the stream."""
        for event in self.books.events[at:]:
            if not isinstance(event, Trade) or not event.price or event.buyer_fee:
                continue
            of = SYMBOL_OF[event.base_asset, event.quote_asset]
            if of == symbol and event.buyer_user_id != event.seller_user_id:
                return event
        raise AssertionError("no such trade")

    def first(self, kind: type, *, at: int = 1_500) -> Any:
        return next(event for event in self.books.events[at:] if isinstance(event, kind) or _is_rejected(event, kind))

    async def as_of(self, user: int, asset: int, last: int) -> dict[str, Any]:
        """Settle the stream's beginning into another file, and read the account there."""
        async with SQLiteStore(Path(self.work.path or "").with_name(f"as-of-{last}.db"), {}) as store:
            books = Books(store, **self.of_books)
            await books.begin()
            await books.take(self.books.events[:last])
            row = await Hand(store).balance(user, asset)
            return {name: getattr(row, name) for name in ("available", "version", "last_sequence", "updated_at")}

    async def row_of(self, trade: Trade) -> tuple[str, tuple[Any, ...]]:
        symbol = SYMBOL_OF[trade.base_asset, trade.quote_asset]
        (row,) = await self.store.get_trade(symbol, trade.trade_id)
        return symbol, tuple(row.values())

    def events_of(self, user: int, asset: int) -> list[int]:
        """The sequences that touch an account."""
        found = []
        for event in self.books.events:
            if isinstance(event, Trade) and event.price and asset in (event.base_asset, event.quote_asset):
                if user in (event.buyer_user_id, event.seller_user_id):
                    found.append(event.output_sequence)
            elif isinstance(event, LedgerEvent) and (event.user_id, event.asset) == (user, asset):
                found.append(event.output_sequence)
        return found

    def accounts_of(self, trade: Trade) -> list[tuple[int, int]]:
        users, assets = (trade.buyer_user_id, trade.seller_user_id), (trade.base_asset, trade.quote_asset)
        return [(user, asset) for user in users for asset in assets]


def _is_rejected(event: Any, kind: type) -> bool:
    return kind is Refused and isinstance(event, Trade) and event.price == 0


Undo = Callable[[], Awaitable[None]]
Corruption = Callable[[Scene], Awaitable[tuple[Expected, Undo | None]]]


# --- each changes one thing, and says what is to be found; with a way back when no fix is possible ---


async def balance_raised(scene: Scene) -> tuple[Expected, Undo | None]:
    row = await scene.hand.balance(3, USDT)
    await scene.hand.set_balance(row, available=(row.available or 0) + 7)
    return {("BALANCE_DIFFERS", 3, USDT, row.last_sequence)}, None


async def balance_lowered(scene: Scene) -> tuple[Expected, Undo | None]:
    row = await scene.hand.balance(4, BTC)
    await scene.hand.set_balance(row, available=(row.available or 0) - 1)
    return {("BALANCE_DIFFERS", 4, BTC, row.last_sequence)}, None


async def version_changed(scene: Scene) -> tuple[Expected, Undo | None]:
    row = await scene.hand.balance(5, USDT)
    await scene.hand.set_balance(row, version=(row.version or 0) + 1)
    return {("VERSION_DIFFERS", 5, USDT, row.last_sequence)}, None


async def row_deleted(scene: Scene) -> tuple[Expected, Undo | None]:
    row = await scene.hand.balance(6, USDT)
    await scene.hand.delete_balance(row)
    return {("BALANCE_MISSING", 6, USDT, row.last_sequence)}, None


async def row_under_a_stream_that_is_none(scene: Scene) -> tuple[Expected, Undo | None]:
    row = await scene.hand.balance(7, USDT)
    await scene.hand.set_balance(row, stream="other")
    return {("BALANCE_WITHOUT_EVENTS", 7, USDT, row.last_sequence)}, None


async def row_under_another_stream(scene: Scene) -> tuple[Expected, Undo | None]:
    row = await scene.hand.balance(7, BTC)
    await scene.hand.set_balance(row, stream="main/late", last_sequence=2, version=1)
    return {("BALANCE_WITHOUT_EVENTS", 7, BTC, 2)}, None


async def update_lost(scene: Scene) -> tuple[Expected, Undo | None]:
    """The row as it was some events ago, as if the newest writes had never been."""
    user, asset = 8, USDT
    row = await scene.hand.balance(user, asset)
    sequences = scene.events_of(user, asset)
    lost = sequences[-3]
    before = await scene.as_of(user, asset, lost - 1)
    await scene.hand.set_balance(row, **before)
    return {("UPDATE_MISSING", user, asset, lost)}, None


async def last_sequence_raised(scene: Scene) -> tuple[Expected, Undo | None]:
    row = await scene.hand.balance(9, USDT)
    raised = scene.books.sequence
    assert row.last_sequence is not None
    assert raised > row.last_sequence
    await scene.hand.set_balance(row, last_sequence=raised)
    return {("LAST_SEQUENCE_DIFFERS", 9, USDT, raised)}, None


async def last_sequence_above_all(scene: Scene) -> tuple[Expected, Undo | None]:
    row = await scene.hand.balance(10, USDT)
    raised = scene.books.sequence + 500
    await scene.hand.set_balance(row, last_sequence=raised)
    return {("LAST_SEQUENCE_DIFFERS", 10, USDT, raised)}, None


async def last_sequence_lowered(scene: Scene) -> tuple[Expected, Undo | None]:
    row = await scene.hand.balance(11, USDT)
    lowered = scene.events_of(11, USDT)[-4]
    await scene.hand.set_balance(row, last_sequence=lowered)
    return {("LAST_SEQUENCE_DIFFERS", 11, USDT, lowered)}, None


async def written_by_hand(scene: Scene) -> tuple[Expected, Undo | None]:
    """With the wall clock's time, at a wrong value."""
    row = await scene.hand.balance(12, USDT)
    await scene.hand.set_balance(row, quiet=False, available=(row.available or 0) + 1)
    found: Expected = {("BALANCE_DIFFERS", 12, USDT, row.last_sequence)}
    if scene.hand.is_cassandra:
        found.add(("FUTURE_STAMPED", 12, USDT, row.last_sequence))
    return found, None


async def written_by_hand_as_it_was(scene: Scene) -> tuple[Expected, Undo | None]:
    """The right value, with the wall clock's time: it shadows what comes."""
    row = await scene.hand.balance(13, USDT)
    await scene.hand.set_balance(row, quiet=False)
    return ({("FUTURE_STAMPED", 13, USDT, row.last_sequence)} if scene.hand.is_cassandra else set()), None


async def trade_deleted(scene: Scene) -> tuple[Expected, Undo | None]:
    trade = scene.trade()
    symbol, row = await scene.row_of(trade)
    await scene.hand.delete_trade(symbol, row)
    found: Expected = {("EVENT_MISSING", *key, trade.output_sequence) for key in scene.accounts_of(trade)}
    return found, lambda: scene.hand.write_trade(symbol, row)


async def trade_amount_changed(scene: Scene) -> tuple[Expected, Undo | None]:
    trade = scene.trade(at=1_700)
    symbol, row = await scene.row_of(trade)
    changed = list(row)
    changed[12] += 5
    await scene.hand.write_trade(symbol, tuple(changed))
    at: Expected = {
        ("EVENT_DIFFERS", user, asset, None) for user, asset in scene.accounts_of(trade) if asset == trade.base_asset
    }
    return at, lambda: scene.hand.write_trade(symbol, row)


async def trade_in_another_page(scene: Scene) -> tuple[Expected, Undo | None]:
    trade = scene.trade(at=1_900)
    symbol, row = await scene.row_of(trade)
    moved = (row[0] + 3, *row[1:])
    await scene.hand.delete_trade(symbol, row)
    await scene.hand.write_trade(symbol, moved)

    async def undo() -> None:
        await scene.hand.delete_trade(symbol, moved)
        await scene.hand.write_trade(symbol, row)

    return {("WRONG_PAGE", None, None, trade.output_sequence)}, undo


async def trade_copied_to_another_page(scene: Scene) -> tuple[Expected, Undo | None]:
    trade = scene.trade(at=2_100, symbol="eth_usdt")
    symbol, row = await scene.row_of(trade)
    copy = (row[0] + 1, *row[1:])
    await scene.hand.write_trade(symbol, copy)
    found: Expected = {(code, None, None, trade.output_sequence) for code in ("WRONG_PAGE", "EVENT_TWICE")}
    return found, lambda: scene.hand.delete_trade(symbol, copy)


async def trade_of_a_stream_that_is_none(scene: Scene) -> tuple[Expected, Undo | None]:
    trade = scene.trade(at=2_200)
    symbol, row = await scene.row_of(trade)
    copy = (*row[:2], "nobody", *row[3:])
    await scene.hand.write_trade(symbol, copy)
    found: Expected = {("UNKNOWN_STREAM", None, None, trade.output_sequence)}
    return found, lambda: scene.hand.delete_trade(symbol, copy)


async def ledger_event_deleted(scene: Scene) -> tuple[Expected, Undo | None]:
    event = scene.first(LedgerEvent)
    row = tuple((await scene.store.get_ledger_event("main", event.output_sequence) or {}).values())
    await scene.hand.delete_event("ledger_events", row)
    found: Expected = {("EVENT_MISSING", event.user_id, event.asset, event.output_sequence)}
    return found, lambda: scene.hand.write_ledger_event(row)


async def ledger_event_in_another_page(scene: Scene) -> tuple[Expected, Undo | None]:
    event = scene.first(LedgerEvent, at=1_800)
    row = tuple((await scene.store.get_ledger_event("main", event.output_sequence) or {}).values())
    await scene.hand.delete_event("ledger_events", row)
    moved = (row[0], row[1] + 1, *row[2:])
    await scene.hand.write_ledger_event(moved)

    async def undo() -> None:
        await scene.hand.delete_event("ledger_events", moved)
        await scene.hand.write_ledger_event(row)

    return {("WRONG_PAGE", None, None, event.output_sequence)}, undo


async def rejected_event_deleted(scene: Scene) -> tuple[Expected, Undo | None]:
    event = scene.first(Refused)
    row = tuple((await scene.store.get_rejected("main", event.output_sequence) or {}).values())[:6]
    await scene.hand.delete_event("rejected_events", row)
    found: Expected = {("EVENT_MISSING", None, None, event.output_sequence)}
    return found, lambda: scene.hand.write_rejected(row)


async def rejected_beside_a_trade(scene: Scene) -> tuple[Expected, Undo | None]:
    trade = scene.trade(at=2_000)
    page = trade.output_sequence // 10_000
    row = ("main", page, trade.output_sequence, "BAD_FIELD", "by hand", b"frame")
    await scene.hand.write_rejected(row)
    found: Expected = {("EVENT_TWICE", None, None, trade.output_sequence)}
    return found, lambda: scene.hand.delete_event("rejected_events", row)


IN_BALANCES: list[Corruption] = [
    balance_raised, balance_lowered, version_changed, row_deleted, row_under_a_stream_that_is_none,
    row_under_another_stream, update_lost, last_sequence_raised, last_sequence_above_all, last_sequence_lowered,
    written_by_hand, written_by_hand_as_it_was,
]  # fmt: skip
IN_EVENTS: list[Corruption] = [
    trade_deleted, trade_amount_changed, trade_in_another_page, trade_copied_to_another_page,
    trade_of_a_stream_that_is_none, ledger_event_deleted, ledger_event_in_another_page, rejected_event_deleted,
    rejected_beside_a_trade,
]  # fmt: skip


@contextmanager
def a_store(kind: str, folder: Path, node: Node | None) -> Iterator[Store]:
    """An empty store of a kind, still to be opened."""
    widths = {name: symbol.page_width for name, symbol in SYMBOLS.symbols.items()}
    if kind == "sqlite":
        yield SQLiteStore(folder / "settlement.db", widths)
        return
    from sidecar.store.cassandra import CassandraStore

    assert node is not None
    keyspace = f"t_{secrets.token_hex(6)}"
    yield CassandraStore(page_widths=widths, contact_points=[node.host], port=node.port, keyspace=keyspace)


@pytest.mark.parametrize("kind", STORES)
def test_every_corruption_is_found_and_mended(tmp_path: Path, request: pytest.FixtureRequest, kind: str) -> None:
    node = request.getfixturevalue("cassandra_node") if kind == "cassandra" else None

    async def play(store: Store) -> None:
        await store.apply_schema(SYMBOLS.symbols)
        async with store:
            scene = Scene(store, tmp_path)
            await prove_the_table(scene, EVENTS, then=300)

    with a_store(kind, tmp_path, node) as store:
        asyncio.run(play(store))


async def prove_the_table(scene: Scene, events: int, *, then: int, again: bool = True) -> None:
    """Corrupt one thing after the other; `then` settle so many more, and find nothing. `again`: full proofs, too."""
    books = scene.books
    await books.begin()
    await books.play(events)
    late = Books(scene.store, "main/late", users=3, rules=books.rules)
    await late.begin()
    assert await scene.found(full=True) == set()
    for corruption in IN_BALANCES:
        expected, _ = await corruption(scene)
        name = corruption.__name__
        found = await scene.found(full=False)
        if corruption is update_lost:  # which of the lost ones it names
            found = {(*each[:3], next(iter(expected))[3]) for each in found}
        assert found == expected, name
        if again or corruption is update_lost:
            assert await scene.found(full=True) == expected, name
        fixed = await scene.fix()
        assert fixed["ok"], (name, fixed)
        assert len(fixed["fixed"]) == len(expected), (name, fixed)
        assert all(each.fixed_at_ms for each in await scene.store.load_findings(scene.run_id)), name
        assert await scene.found(full=again) == set(), name
    for corruption in IN_EVENTS:
        expected, undo = await corruption(scene)
        name = corruption.__name__
        found = await scene.found(full=True)
        if corruption is trade_amount_changed:
            found = {(code, user, asset, None) for code, user, asset, _ in found}
        assert found == expected, name
        stays = await scene.found(full=False)
        assert {each[:3] for each in stays} == {each[:3] for each in expected}, f"{name}: it stays reported"
        fixed = await scene.fix()
        assert not fixed["ok"], (name, fixed)
        assert fixed["fixed"] == [], name
        assert undo is not None
        await undo()
        assert await scene.found(full=True) == set(), name
    await books.play(then)
    assert await scene.found(full=False) == set()
    assert await scene.found(full=True) == set()
