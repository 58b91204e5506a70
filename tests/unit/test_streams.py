"""Which session is which stream, which stream comes next, who numbers late truths: decided once, read alike."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidecar import decisions
from sidecar.batch import take
from sidecar.decisions import Agreed, DecisionRefusedError
from sidecar.errors import StoreRefusedError, TapeLockedError, TapeMissingError
from sidecar.events import Decision, Refused, State, Trade
from sidecar.late import Claim, Late, LateReader, LateTape, Poster, claim, late_path, readings
from sidecar.ledger import Ledger
from sidecar.store.base import KEYSPACE_STREAM, Store
from sidecar.store.sqlite import SQLiteStore
from sidecar.streams import Streams
from sidecar.tape import Session
from tests.streams import RULES, SYMBOLS, event, ledger_event, trade, trade_fields

NOW_US = 1_700_000_000_000_000


@pytest.fixture
def ask(tmp_path: Path) -> Callable[[Callable[[Store], Awaitable[Any]]], Any]:
    """Ask a store that two hosts share; each question opens it anew, as a process would."""

    def asked(question: Callable[[Store], Awaitable[Any]]) -> Any:
        async def story() -> Any:
            async with SQLiteStore(tmp_path / "rows.db", {"btc_usdt": 10_000, "eth_usdt": 10_000}) as store:
                await store.ready_for(["btc_usdt", "eth_usdt"])
                return await question(store)

        return asyncio.run(story())

    return asked


async def _agree(store: Store, stream: str = "main", **other: Any) -> Agreed:
    given = {"first_sequence": 1, "session": 1, "engine_session": None, "tape_id": 11, "rules": RULES, "now_us": NOW_US}
    return await decisions.agree(store, stream=stream, **(given | other))


async def _next(store: Store, name: str = "second", **other: Any) -> Any:
    given = {"ends_at": 9, "first_sequence": 1, "session": 2, "engine_session": None, "tape_id": 11, "now_us": NOW_US}
    return await decisions.begin_next(store, "main", name, **(given | other))


# --- a newer release's decisions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["main", KEYSPACE_STREAM])
def test_nothing_is_read_from_or_decided_after_a_decision_that_is_not_known(ask: Any, stream: str) -> None:
    async def story(store: Store) -> None:
        await _agree(store)
        number = len(await store.read_decisions(stream)) + 1
        newer = Decision(stream, number, "netting", None, None, "{}", "", "a newer release", 0)
        assert await store.append_decision(newer)
        told = rf"decision {number} of stream .* is a 'netting', which this release does not know: a newer one made it"
        more = RULES | {"assets": RULES["assets"] | {"sol": {"id": 9, "decimals": 2}}}
        with pytest.raises(StoreRefusedError, match=told):
            await _agree(store, rules=more)
        if stream == "main":
            with pytest.raises(StoreRefusedError, match=told):
                await decisions.read_agreed(store, "main")
            with pytest.raises(StoreRefusedError, match=told):
                await decisions.accept_gap(store, "main", 5, 6, present=[], reason="no", now_us=NOW_US)
        assert len(await store.read_decisions(stream)) == number

    ask(story)


# --- the next stream ------------------------------------------------------------------------------------------------


def test_the_next_stream_has_the_old_ones_rules_and_is_decided_once(ask: Any) -> None:
    async def story(store: Store) -> None:
        await _agree(store)
        made = await _next(store)
        assert await _next(store) == made
        old = await decisions.read_agreed(store, "main")
        new = await decisions.read_agreed(store, "second")
        assert old is not None
        assert new is not None
        assert (old.ends_at, old.next_stream) == (9, "second")
        assert (new.session, new.first_sequence, new.ends_at) == (2, 1, None)
        assert new.symbols.symbols == old.symbols.symbols
        assert (await _agree(store, "second", session=7)).session == 2  # whoever settles it finds its genesis there
        for other in ({"name": "third"}, {"first_sequence": 5}):
            with pytest.raises(DecisionRefusedError):
                await _next(store, **other)

    ask(story)


def test_a_stream_that_is_there_already_is_no_next_one(ask: Any) -> None:
    async def story(store: Store) -> None:
        with pytest.raises(DecisionRefusedError, match="stream main has no genesis"):
            await _next(store)
        await _agree(store)
        await _agree(store, "taken")
        with pytest.raises(DecisionRefusedError, match="stream taken is there already"):
            await _next(store, "taken")
        agreed = await decisions.read_agreed(store, "main")
        assert agreed is not None
        assert agreed.next_stream is None

    ask(story)


class _Sessions:
    def __init__(self, *keys: int | None) -> None:
        self._rows = [Session(number, key, 0, "", 0, 0) for number, key in enumerate(keys, 1)]

    def sessions(self) -> list[Session]:
        return self._rows


def _found(streams: Streams, stream: str, agreed: Agreed, *keys: int | None) -> int | None:
    return streams.session_of(stream, agreed, _Sessions(*keys))  # type: ignore[arg-type]


def test_a_streams_session_is_found_on_its_own_tape_and_on_others(ask: Any) -> None:
    agreed: Agreed = ask(lambda store: _agree(store, session=2))
    own = Streams({"tape_id": 11})
    assert _found(own, "main", agreed, None, None) == 2
    other = Streams({"tape_id": 12})
    assert _found(other, "main", agreed) is None  # nothing was heard yet
    assert _found(other, "main", agreed, None, None) == 1
    settled = {"tape_id": 12, "stream": "first", "session": 1, "foreign_to": 0, "deletable": 5}
    assert _found(Streams(settled), "main", agreed, None, None) == 2  # the first one is another stream's
    assert _found(Streams(settled), "main", agreed, None) is None
    assert _found(Streams(settled | {"stream": "main", "session": 3}), "main", agreed, None, None, None) == 3
    keyed = replace(agreed, engine_session=70)
    assert _found(other, "main", keyed, 69, 70, 71) == 2
    assert _found(other, "main", keyed, 69) is None
    assert _found(other, "main", keyed, None) == 1  # the engine sends no keys here


def test_what_is_remembered_of_other_streams_survives_and_ends_with_the_tape() -> None:
    streams = Streams({"tape_id": 1, "stream": "main", "session": 1, "foreign_to": 0, "deletable": 90})
    streams.keep("second", session=2, foreign_to=0, deletable=3)
    said = {"tape_id": 1, "stream": "second", "session": 2, "deletable": 4, "streams": streams.others("second")}
    again = Streams(said)
    assert again.of("main") == {"session": 1, "foreign_to": 0, "deletable": 90}
    assert again.of("second") == {"session": 2, "foreign_to": 0, "deletable": 4}
    again.is_on(1)
    assert again.of("main") is not None
    again.is_on(2)
    assert again.of("main") is None
    assert Streams(None).of("main") is None


# --- late truths ----------------------------------------------------------------------------------------------------


def test_one_late_tape_numbers_a_stream_until_it_is_lost(tmp_path: Path, ask: Any) -> None:
    async def story(store: Store) -> None:
        await _agree(store)
        with closing(LateTape(tmp_path / "a")) as one, closing(LateTape(tmp_path / "b")) as other:
            first = await claim(store, "main", one, lost_too=False, now_us=NOW_US)
            assert (first.name, first.closed) == ("main/late", False)
            assert await claim(store, "main", one, lost_too=True, now_us=NOW_US) == first
            with pytest.raises(DecisionRefusedError, match="post there"):
                await claim(store, "main", other, lost_too=False, now_us=NOW_US)
            second = await claim(store, "main", other, lost_too=True, now_us=NOW_US)
            assert (second.name, second.names, second.closed) == ("main/late2", ["main/late", "main/late2"], True)
            assert not (await claim(store, "main", other, lost_too=True, now_us=NOW_US)).closed
            closed = await decisions.read_agreed(store, "main/late")
            begun = await decisions.read_agreed(store, "main/late2")
            assert closed is not None
            assert begun is not None
            assert (closed.late_tape_id, begun.late_tape_id) == (0, other.tape_id)
            with pytest.raises(DecisionRefusedError, match="post there"):
                await claim(store, "main", one, lost_too=False, now_us=NOW_US)

    ask(story)


def test_two_who_post_first_at_once_are_one(tmp_path: Path, ask: Any) -> None:
    async def story(store: Store) -> None:
        await _agree(store)
        with closing(LateTape(tmp_path / "a")) as one, closing(LateTape(tmp_path / "b")) as other:
            claims = [claim(store, "main", tape, lost_too=False, now_us=NOW_US) for tape in (one, other)]
            ends = await asyncio.gather(*claims, return_exceptions=True)
        assert {type(end) for end in ends} == {Claim, DecisionRefusedError}

    ask(story)


def test_each_origin_and_each_trade_is_posted_once(tmp_path: Path, ask: Any) -> None:
    async def story(store: Store) -> None:
        agreed = await _agree(store)
        with closing(LateTape(tmp_path / "tape")) as tape:
            claimed = await claim(store, "main", tape, lost_too=False, now_us=NOW_US)
            poster = Poster(store, tape, "main", agreed, claimed)

            async def posted(one: Any) -> Any:
                judged = await poster.judge(one)
                return poster.post([judged]) if isinstance(judged, Late) else judged

            assert await posted(trade(70)) == {70: 1}
            assert await posted(ledger_event(60)) == {60: 2}
            assert await posted(trade(70)) == "posted before, as main/late 1"
            assert await posted(ledger_event(60, amount=1)) == "posted before, as main/late 2"
            assert "was posted as origin 70" in await posted(trade(71, trade_id=70))
            assert "still BAD_FIELD: price='x'" in await posted(event(trade_fields(72, price="x")))
            assert "is no symbol of stream main" in await posted(trade(73, base_asset=77))
            assert "asset=77 is not of stream main" in await posted(ledger_event(74, asset=77))
            # In one call, too: what it brings is not on the tape yet.
            assert isinstance(await poster.judge(trade(80, trade_id=500)), Late)
            assert "was posted as origin 80" in await poster.judge(trade(81, trade_id=500))
            with pytest.raises(TapeLockedError):
                LateTape(tmp_path / "tape")

    ask(story)


def test_the_late_tape_is_read_under_its_own_numbers(tmp_path: Path) -> None:
    path = tmp_path / "tape"
    assert readings(path) == []
    with closing(LateTape(path)) as tape:
        assert readings(path) == []
        tape.append("main/late", [Late(trade(900), "btc_usdt"), Late(ledger_event(7), None)])
        tape.append("second/late", [Late(trade(3), "btc_usdt")])
        tape.append("main/late", [Late(trade(8, trade_id=4), "btc_usdt")])
        assert (tape.number_of("main/late", 8), tape.number_of("second/late", 8)) == (3, None)
    found = readings(path)
    assert [(one.stream, one.told_path.name) for one in found] == [
        ("main/late", "tape.late"), ("second/late", "tape.late.2"),
    ]  # fmt: skip
    with closing(found[0].reader()) as reader:
        events = reader.read(reader.sessions()[0].session, 0, 10)
        assert [(one.output_sequence, one.origin_sequence) for one in events if not isinstance(one, Refused)] == [
            (1, 900), (2, 7), (3, 8),
        ]  # fmt: skip
        assert reader.read(1, 2, 10)[0].output_sequence == 3
        assert reader.runs(1).list() == [(1, 3)]
    with pytest.raises(TapeMissingError, match="holds nothing of stream third/late"):
        LateReader(late_path(path), "third/late")
    # On a late stream trade ids need not rise, and each row says where it belongs.
    ledger = Ledger(
        symbols=SYMBOLS, first_sequence=1, base_us=0, state=State(0, 0, {"btc_usdt": 10**6}), trade_ids_rise=False
    )
    for one in events:
        ledger.accounts.update(dict.fromkeys(ledger.accounts_of(one), (0, 0, 0, 0)))
    folded = deque(ledger.fold(one, NOW_US) for one in events)
    batch = take(
        folded, stream="main/late", first_sequence=1, trades_max=9, bytes_max=10**6, decisions_read=1
    )  # fmt: skip
    assert [row[-1] for row in batch.trades["btc_usdt"]] == [900, 8]
    assert [row[-1] for row in batch.ledger_events] == [7]
    assert isinstance(events[0], Trade)
