"""The law of the whole way, on real files: any cut into turns and batches, with any crashes, gives the same tables."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidecar import decisions
from sidecar.batch import Batch
from sidecar.errors import OutcomeUnknownError
from sidecar.events import Event, LedgerEvent
from sidecar.life import Bounds
from sidecar.settle import Settler
from sidecar.store.sqlite import SQLiteStore
from sidecar.tape import Tape
from tests.streams import BTC, ETH, REVENUE, RULES, USDT, event, ledger_fields, trade_fields
from tests.waiting import until

WIDTHS = {name: rule["page_width"] for name, rule in RULES["symbols"].items()}
TABLES = ("settled_trades_btc_usdt", "settled_trades_eth_usdt", "user_balances", "ledger_events", "rejected_events")


class Unsteady(SQLiteStore):
    """A store that loses answers, refuses at random for a while, and lets batches overtake each other."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        super().__init__(path, WIDTHS)
        self.rng = rng

    async def settle_batch_atomically(self, batch: Batch) -> None:
        for _ in range(self.rng.randrange(6)):
            await asyncio.sleep(0)
        if self.rng.random() < 0.1:
            raise OutcomeUnknownError("it was not done")
        await super().settle_batch_atomically(batch)
        if self.rng.random() < 0.1:
            await super().settle_batch_atomically(batch)
            raise OutcomeUnknownError("it was done, twice")


kinds = st.sampled_from(["trade", "trade", "eth", "self", "fee", "deposit", "withdrawal", "bad", "zero", "huge", "old"])
stories = st.lists(st.tuples(kinds, st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=60)


def stream_of(story: list[tuple[str, int, int]]) -> list[Event]:
    events = []
    for n, (kind, one, other) in enumerate(story, 1):
        both = {"buyer_user_id": one, "seller_user_id": other, "quantity": 100 * one + other, "ts_us": n * 1_000}
        fields: dict[str, Any] = {
            "trade": trade_fields(n, **both),
            "eth": trade_fields(n, **both, base_asset=ETH, trade_id=(n << 16) + 1),
            "self": trade_fields(n, buyer_user_id=one, seller_user_id=one),
            "fee": trade_fields(n, **both, buyer_fee=one, seller_fee=other),
            "deposit": ledger_fields(n, user_id=one, asset=[BTC, USDT, ETH][other % 3], amount=other),
            "withdrawal": ledger_fields(n, user_id=one, event_type="WITHDRAWAL", amount=other),
            "bad": trade_fields(n, **both, match_seq=None),
            "zero": trade_fields(n, **both) | {"price": 0},
            "huge": trade_fields(n, **both, pad=b"x" * 5_000),
            "old": trade_fields(n, **both) | {"trade_id": max(n - other, 1)},
        }[kind]
        events.append(event(fields))
    return events


def tables(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return {table: db.execute(f"SELECT * FROM {table} ORDER BY 1, 2, 3").fetchall() for table in TABLES}


def a_settler(
    store: SQLiteStore, tape: Tape, *, with_tail: bool = True, stream: str = "main", **bounds: Any
) -> Settler:
    quick = {"durable_after_s": 0.02, "retry_backoff_max_s": 0.02, "shutdown_timeout_s": 5.0}
    return Settler(
        store=store,
        tape_path=tape.path,
        tail=tape.tail if with_tail else None,
        stream=stream,
        first_sequence=1,
        rules=RULES,
        bounds=Bounds(**(quick | bounds)),
    )


async def settled_to(settler: Settler, sequence: int) -> None:
    await until(lambda: settler.life is not None and settler.life.pipeline.acked.sequence >= sequence)


async def finish(settler: Settler, sequence: int, timeout_s: float = 20.0) -> None:
    """Run until everything is acknowledged, then stop as SIGTERM does."""
    async with asyncio.timeout(timeout_s):
        running = asyncio.ensure_future(settler.run())
        arriving = asyncio.ensure_future(settled_to(settler, sequence))
        await asyncio.wait([running, arriving], return_when=asyncio.FIRST_COMPLETED)
        arriving.cancel()
        settler.stop()
        await running
        await settler.store.close()


async def at_once(folder: Path, events: list[Event]) -> None:
    """The plain way: one turn, a steady store, no crash."""
    tape = Tape(folder / "tape.db", size_bytes_max=1 << 40)
    for one in events:
        tape.append(one)
    await tape.commit(tape.take_turn())
    await finish(a_settler(SQLiteStore(folder / "rows.db", WIDTHS), tape), len(events))
    tape.close()


async def in_pieces(folder: Path, events: list[Event], rng: random.Random) -> int:
    """Small disordered turns with repeats, small batches, a store that loses answers; settlers dropped at random."""
    order = list(range(len(events)))
    for _ in range(rng.randrange(10)):
        at = rng.randrange(len(order))
        order.insert(rng.randrange(len(order)), order[at])
    ends = sorted({rng.randrange(len(order) + 1) for _ in range(5)} | {len(order)})
    tape = Tape(folder / "tape.db", size_bytes_max=1 << 40, tail_events_max=rng.randrange(1, 80))
    crashes, start = 0, 0
    for end in ends:
        for at in order[start:end]:
            tape.append(events[at])
        start = end
        if tape.has_pending:
            await tape.commit(tape.take_turn())
        if rng.random() < 0.3:  # the recorder is killed too
            tape.close()
            tape = Tape(folder / "tape.db", size_bytes_max=1 << 40, tail_events_max=rng.randrange(1, 80))
        settler = small(folder, tape, rng)
        running = asyncio.ensure_future(settler.run())
        await asyncio.sleep(rng.choice([0.0, 0.01, 0.02, 0.05]) * rng.random())
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert running.cancelled() or running.exception() is None, running
        await settler.store.close()
        crashes += 1
    await finish(small(folder, tape, rng), len(events))
    tape.close()
    return crashes


def small(folder: Path, tape: Tape, rng: random.Random) -> Settler:
    return a_settler(
        Unsteady(folder / "rows.db", rng),
        tape,
        with_tail=rng.random() < 0.5,
        batch_trades_max=rng.randrange(1, 6),
        batch_bytes_max=rng.choice([100, 2_000, 12_288]),
        inflight_batches_max=rng.randrange(1, 6),
        accounts_max=rng.choice([30, 1_000]),
    )


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(stories, st.integers(0, 2**32))
def test_two_cuts_of_one_stream_one_of_them_with_crashes_give_equal_tables(
    tmp_path_factory: pytest.TempPathFactory, story: list[tuple[str, int, int]], seed: int
) -> None:
    events = stream_of(story)
    plain, pieces = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("pieces")
    asyncio.run(at_once(plain, events))
    asyncio.run(in_pieces(pieces, events, random.Random(seed)))
    expected, got = tables(plain / "rows.db"), tables(pieces / "rows.db")
    for table in TABLES:
        assert got[table] == expected[table], table
    of_an_event = sum(len(got[table]) for table in TABLES if table != "user_balances")
    assert of_an_event == len(events)  # every sequence once
    deposits = dict.fromkeys((BTC, USDT, ETH), 0)
    for one in events:
        if isinstance(one, LedgerEvent):
            deposits[one.asset] += -one.amount if one.event_type == "WITHDRAWAL" else one.amount
    for asset, outside in deposits.items():
        assert sum(row[3] for row in got["user_balances"] if row[1] == asset) == outside


def test_with_room_for_fewer_accounts_than_a_burst_needs_settlement_goes_on(tmp_path: Path) -> None:
    events = [
        event(trade_fields(n, buyer_user_id=n % 50, seller_user_id=50 + n % 50, buyer_fee=1)) for n in range(1, 201)
    ]

    async def story() -> None:
        tape = Tape(tmp_path / "tape.db", size_bytes_max=1 << 40)
        settler = a_settler(SQLiteStore(tmp_path / "rows.db", WIDTHS), tape, accounts_max=40)
        running = asyncio.ensure_future(settler.run())
        for one in events:
            tape.append(one)
            if one.output_sequence % 10 == 0:
                await tape.commit(tape.take_turn())
                await asyncio.sleep(0.005)
        arriving = asyncio.ensure_future(settled_to(settler, 200))
        async with asyncio.timeout(20):
            await asyncio.wait([running, arriving], return_when=asyncio.FIRST_COMPLETED)
        assert arriving.done(), running
        settler.stop()
        await running
        await settler.store.close()
        tape.close()

    asyncio.run(story())
    balances = {row[:2]: row[3] for row in tables(tmp_path / "rows.db")["user_balances"]}
    assert balances[REVENUE, BTC] == 200
    assert sum(amount for (_, asset), amount in balances.items() if asset == BTC) == 0


def test_the_next_stream_begins_with_the_session_that_no_earlier_one_has_settled(tmp_path: Path) -> None:
    async def story() -> None:
        tape = Tape(tmp_path / "tape.db", size_bytes_max=1 << 40)
        for one in (trade_fields(1), trade_fields(2), trade_fields(1, price=5)):
            tape.append(event(one))
        await tape.commit(tape.take_turn())
        await finish(a_settler(SQLiteStore(tmp_path / "rows.db", WIDTHS), tape), 2)
        following = a_settler(SQLiteStore(tmp_path / "rows.db", WIDTHS), tape, stream="main2")
        await finish(following, 1)
        assert following.said()["session"] == 2
        tape.close()

    asyncio.run(story())


def test_a_settler_that_starts_again_over_its_own_tape_has_nothing_to_compare(tmp_path: Path) -> None:
    async def story() -> None:
        tape = Tape(tmp_path / "tape.db", size_bytes_max=1 << 40)
        for n in range(1, 6):
            tape.append(event(trade_fields(n)))
        await tape.commit(tape.take_turn())
        first = a_settler(SQLiteStore(tmp_path / "rows.db", WIDTHS), tape)
        running = asyncio.ensure_future(first.run())
        await until(lambda: first.said()["durable"] >= 5)
        first.stop()
        await running
        await first.store.close()
        again = a_settler(SQLiteStore(tmp_path / "rows.db", WIDTHS), tape)
        await finish(again, 5)
        assert again.said()["foreign_to"] == 0
        tape.close()

    asyncio.run(story())


class Away(SQLiteStore):
    """A store of which a node is away: nothing becomes durable until it is back."""

    back_since: float | None = None

    @property
    def steady_since(self) -> float | None:
        return self.back_since


def test_a_stream_that_has_ended_is_not_left_before_all_of_it_is_durable(tmp_path: Path) -> None:
    """Nobody would settle it again if the store lost the end of it."""

    async def story() -> None:
        tape = Tape(tmp_path / "tape.db", size_bytes_max=1 << 40)
        for one in (trade_fields(1), trade_fields(2), trade_fields(1, price=5)):
            tape.append(event(one))
        await tape.commit(tape.take_turn())
        store = Away(tmp_path / "rows.db", WIDTHS)
        settler = a_settler(store, tape)
        running = asyncio.ensure_future(settler.run())
        await until(lambda: settler.said()["halted"] is not None)
        assert settler.said()["halted"]["code"] == "SESSION_CHANGED"
        await decisions.begin_next(
            store,
            "main",
            "second",
            ends_at=2,
            first_sequence=1,
            session=2,
            engine_session=None,
            tape_id=settler.said()["tape_id"],
            now_us=1,
        )
        await until(lambda: settler.said()["halted"] is None)
        await settled_to(settler, 2)
        await asyncio.sleep(0.2)  # ten times what makes acknowledged events durable
        assert (settler.said()["stream"], settler.said()["durable"]) == ("main", 0)
        store.back_since = asyncio.get_running_loop().time()
        await until(lambda: settler.said()["stream"] != "main")
        await settled_to(settler, 1)
        said = settler.said()
        assert (said["stream"], said["session"]) == ("second", 2)
        assert said["streams"]["main"]["deletable"] in (0, 2)
        settler.stop()
        await running
        await store.close()
        tape.close()

    asyncio.run(story())


def test_what_lies_beyond_the_end_of_a_stream_is_not_settled_on_it_by_whoever_has_it(tmp_path: Path) -> None:
    async def story() -> None:
        tape = Tape(tmp_path / "tape.db", size_bytes_max=1 << 40)
        for one in (*(trade_fields(n) for n in range(1, 6)), trade_fields(1, price=5, trade_id=50)):
            tape.append(event(one))
        await tape.commit(tape.take_turn())
        of_another_host: dict[str, Any] = {"engine_session": None, "tape_id": 1, "now_us": 1, "first_sequence": 1}
        async with SQLiteStore(tmp_path / "rows.db", WIDTHS) as deciding:
            await decisions.agree(deciding, stream="main", session=1, rules=RULES, **of_another_host)
            await decisions.begin_next(deciding, "main", "second", ends_at=3, session=2, **of_another_host)
        store = SQLiteStore(tmp_path / "rows.db", WIDTHS)
        settler = a_settler(store, tape)
        running = asyncio.ensure_future(settler.run())
        async with asyncio.timeout(20):
            await until(lambda: settler.said()["stream"] != "main")
            await settled_to(settler, 1)
        assert settler.said()["session"] == 2  # found on this host's own tape
        settler.stop()
        await running
        await store.close()
        tape.close()

    asyncio.run(story())
    rows = tables(tmp_path / "rows.db")["settled_trades_btc_usdt"]
    assert sorted((row[2], row[3]) for row in rows) == [("main", 1), ("main", 2), ("main", 3), ("second", 1)]


class Listening(SQLiteStore):
    """A store during whose first answer the recorder hears more."""

    def __init__(self, path: Path, hear: Callable[[], Awaitable[None]]) -> None:
        super().__init__(path, WIDTHS)
        self.hear: Callable[[], Awaitable[None]] | None = hear

    async def get_trade(self, symbol: str, trade_id: int) -> list[dict[str, Any]]:
        found = await super().get_trade(symbol, trade_id)
        if self.hear is not None:
            hear, self.hear = self.hear, None
            await hear()
        return found


def test_what_is_recorded_while_another_tapes_part_is_compared_is_compared_before_it_is_settled(tmp_path: Path) -> None:
    """Sessions may begin alike: the first event is the settled stream's, the further ones are another session's."""

    async def story() -> None:
        first = Tape(tmp_path / "first.db", size_bytes_max=1 << 40)
        for n in range(1, 11):
            first.append(event(trade_fields(n)))
        await first.commit(first.take_turn())
        settler = a_settler(SQLiteStore(tmp_path / "rows.db", WIDTHS), first)
        running = asyncio.ensure_future(settler.run())
        await until(lambda: settler.said()["durable"] >= 10)
        settler.stop()
        await running
        await settler.store.close()
        first.close()

        tape = Tape(tmp_path / "other.db", size_bytes_max=1 << 40)
        tape.append(event(trade_fields(1)))
        await tape.commit(tape.take_turn())

        async def hear() -> None:
            for n in range(2, 30):
                tape.append(event(trade_fields(n, quantity=7)))
            await tape.commit(tape.take_turn())

        settler = a_settler(Listening(tmp_path / "rows.db", hear), tape)
        running = asyncio.ensure_future(settler.run())
        await until(lambda: settler.said()["halted"] is not None or settler.said()["acked"] >= 11)
        said = settler.said()
        assert said["halted"] is not None
        assert (said["halted"]["code"], said["acked"], said["deletable"]) == ("SESSION_CHANGED", 10, 0)
        settler.stop()
        await running
        await settler.store.close()
        tape.close()

    asyncio.run(story())
    assert [row[3] for row in tables(tmp_path / "rows.db")["settled_trades_btc_usdt"]] == list(range(1, 11))


def test_a_life_that_ended_holds_no_accounts(tmp_path: Path) -> None:
    async def story() -> None:
        store = Unsettled(tmp_path / "rows.db", WIDTHS)
        tape = Tape(tmp_path / "tape.db", size_bytes_max=1 << 40)
        tape.append(event(trade_fields(1)))
        await tape.commit(tape.take_turn())
        settler = a_settler(store, tape)
        running = asyncio.ensure_future(settler.run())
        await settled_to(settler, 1)
        assert settler.life is not None
        ended = settler.life.ledger
        assert len(ended.accounts) == 4
        store.were_away += 1  # a node was away and is back: memory is not trusted
        await until(lambda: settler.lives == 2 and settler.life is not None and settler.life.ledger is not ended)
        assert not ended.accounts
        settler.stop()
        await running
        await store.close()
        tape.close()

    asyncio.run(story())


class Unsettled(SQLiteStore):
    """Says how often a node was away."""

    were_away = 0

    @property
    def outages(self) -> int:
        return self.were_away
