"""A stand-in matching engine: publishes recorded or generated events on a ZeroMQ socket, paced, with faults on request.

It shares no code with the sidecar, so that it may feed a test of it. What it has published stands in a journal (JSON
lines) that `bench/judge.py` folds for itself. Four sources: the recorded session of a real engine, real Binance trades
with made-up users, a seeded generator without end, and Binance trades that the generator goes on after (mixed).

Time. The pace is an *open loop*: the intended time of each event is fixed before the run (start + i / rate, or the
recorded distances), and lateness of this process or of its subscriber never moves it. A latency measured from the
intended time therefore includes the waiting that a slow run causes, which one from the moment of sending hides.

Order. One event has one place in the source and one sequence; a fault changes what leaves and when, no numbers.

A kill loses at most the last second of the journal; SIGTERM stops publishing, flushes it and exits with 0.
"""

from __future__ import annotations

import argparse
import csv
import gc
import gzip
import itertools
import json
import os
import random
import signal
import struct
import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack
import zmq
from zmq.auth import load_certificate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Event = dict[str, Any]

DATA = Path(__file__).resolve().parent / "data"
SESSION = DATA / "engine-session.jsonl.gz"
BINANCE = DATA / "binance-spot-2024-08-08.csv.gz"

BTC, USDT, ETH = 1, 2, 3
COIN = 10**8  # every asset has 8 decimals
PREPARED_EVENTS_MAX = 1_000_000  # encoded before the start, about 1.3 KiB each; what is beyond is encoded as it goes
JOURNAL_LINES_MAX = 256  # a block is written in a fraction of a millisecond: it delays the events that are due
POLL_S = 0.005  # how often the pause file and the stop flag are looked at
PAUSE_SUBSCRIBERS_S = 30.0  # as many as before a pause must be there again before it ends; so long it waits for them
SLEEP_S_MIN = 0.0003  # a shorter sleep costs more than it gives: ticks, not a spin

# PUB never blocks: at its high-water mark it drops, silently. A run flat out would then be judged for frames that never
# left this process. The default is larger than any run of the bench; what waits costs memory here instead (about half
# a KiB a frame). Give `--hwm 1000` to see what an engine with the library's default does to a slow subscriber.
HWM_FRAMES = 10_000_000

_STAMP_PLACE = (
    1 << 63
)  # packs into nine bytes as every real time in us does; its last eight are cut off and written anew for each send
_PACK_U64 = struct.Struct(">Q").pack
_GARBAGE = b"\xc1\xc1not msgpack\x00\xff"  # 0xc1 never occurs in msgpack


class Frame(NamedTuple):
    """One frame to publish (or, with `payload` None, to withhold), encoded but for its time."""

    place: int  # in the source: fixes the intended time
    sequence: int
    run: int  # 1, and one more after each restart
    payload: bytes | None  # without the last eight bytes (the time) when stamped
    stamped: bool
    text: str | None  # the event as JSON without its closing brace; None: not in the journal
    text_stamped: bool
    trade: bool
    held: bool  # by a fault, until a later one was sent
    fault: str


class Fault(NamedTuple):
    """What is to happen to one sequence of the first run."""

    kind: str  # duplicate, withheld, late, swap, corrupt, wrong_field, contradict
    later: int = 0
    key: str = ""
    value: Any = None
    remove: bool = False


# --- sources --------------------------------------------------------------------------------------------------------


def load_session(path: Path | str = SESSION) -> list[Event]:
    """Return the recorded session of a real engine, in publication order."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def load_binance(path: Path | str = BINANCE, users: int = 64, seed: int = 1) -> list[Event]:
    """Return real trades between users 1 to `users`, deposits first: just so large that no balance falls below zero."""
    rng = random.Random(seed)
    balances: dict[tuple[int, int], int] = {}
    lowest: dict[tuple[int, int], int] = {}
    versions: dict[tuple[int, int], int] = {}
    trades: list[Event] = []
    match_seq = {"btc_usdt": 0, "eth_usdt": 0}
    first_ms = 0

    def post(user: int, asset: int, amount: int) -> None:
        balance = balances.get((user, asset), 0) + amount
        balances[user, asset] = balance
        if balance < lowest.get((user, asset), 0):
            lowest[user, asset] = balance

    def touch(user: int, asset: int) -> int:
        version = versions.get((user, asset), 1)  # the deposit was the first
        versions[user, asset] = version + 1
        return version

    with gzip.open(path, "rt", encoding="utf-8", newline="") as text:
        for number, row in enumerate(csv.DictReader(text), 1):
            symbol = row["symbol"]
            base = {"btc_usdt": BTC, "eth_usdt": ETH}[symbol]
            price, quantity = _units(row["price"], 2), _units(row["quantity"], 8)
            buyer, seller = rng.randint(1, users), rng.randint(1, users)
            first_ms = first_ms or int(row["time_ms"])
            match_seq[symbol] += 1
            quote_amount = price * quantity // 100  # exact, see data/README.md
            trades.append(
                {
                    "output_sequence": 0,
                    "trade_id": int(row["trade_id"]),
                    "match_seq": match_seq[symbol],
                    "buy_order_id": 2 * number,
                    "sell_order_id": 2 * number + 1,
                    "buyer_user_id": buyer,
                    "seller_user_id": seller,
                    "base_asset": base,
                    "quote_asset": USDT,
                    "price": price,
                    "quantity": quantity,
                    "buyer_refund": 0,
                    "seller_refund": 0,
                    "settled_at": int(row["time_ms"]),
                    "buyer_quote_version": touch(buyer, USDT),
                    "buyer_base_version": touch(buyer, base),
                    "seller_base_version": touch(seller, base),
                    "seller_quote_version": touch(seller, USDT),
                }
            )
            post(buyer, base, quantity)
            post(buyer, USDT, -quote_amount)
            post(seller, base, -quantity)
            post(seller, USDT, quote_amount)
    needs = ((user, asset, -lowest.get((user, asset), 0)) for user in range(1, users + 1) for asset in (BTC, USDT, ETH))
    events = [
        _ledger_event("DEPOSIT", user, asset, (need // COIN + 1) * COIN, related_id=0, created_at=first_ms)
        for user, asset, need in needs
    ]
    events += trades
    return list(number_events(events, 1))


def generate(
    seed: int = 1,
    users: int = 1_000,
    count: int | None = None,
    *,
    symbols: int = 2,
    fees: bool = False,
    first_sequence: int = 1,
    first_trade_id: int = 1,
    deposits: bool = True,
) -> Iterator[Event]:
    """Yield `count` events (None: without end): deposits of users 1 to `users`, then trades and few ledger events.

    Users are drawn uniformly; 1.6 % of the trades are of a user with himself and 60 % carry a refund, as in the
    recorded session.
    """
    rng = random.Random(seed)
    events = _generate(rng, users, symbols, fees, first_trade_id)
    if deposits:
        events = itertools.chain(_deposits(users, symbols), events)
    return itertools.islice(number_events(events, first_sequence), count)


def mix(users: int = 1_000, seed: int = 1) -> Iterator[Event]:
    """Yield the Binance trades and then generated ones without end; the deposits before them are enough for both."""
    events = load_binance(users=users, seed=seed)
    more = {USDT: 5_000_000, BTC: 1_000, ETH: 20_000}
    last_trade_id = 0
    for event in events:
        if "trade_id" in event:
            last_trade_id = max(last_trade_id, event["trade_id"])
        else:
            event["amount"] += more[event["asset"]] * COIN
    generated = _generate(random.Random(seed), users, 2, False, last_trade_id + 1)
    return number_events(itertools.chain(events, generated), 1)


def up_to_trades(events: Iterable[Event], trades_max: int) -> Iterator[Event]:
    """Yield events until so many trades were among them."""
    trades = 0
    for event in events:
        trades += "trade_id" in event
        yield event
        if trades >= trades_max:
            return


_STARTED_MS = 1_723_161_255_000


def _deposits(users: int, symbols: int) -> Iterator[Event]:
    """Yield what the generated trades are paid with: each asset for each user."""
    amounts = [(USDT, 5_000_000), *((base, 1_000 if base == BTC else 20_000) for base in _base_assets(symbols))]
    for user in range(1, users + 1):
        for asset, coins in amounts:
            yield _ledger_event("DEPOSIT", user, asset, coins * COIN, related_id=user, created_at=_STARTED_MS)


def _generate(rng: random.Random, users: int, symbols: int, fees: bool, trade_id: int) -> Iterator[Event]:
    uniform = rng.random
    books = [
        (asset, 6_183_763 if asset == BTC else max(268_380 // number, 100))
        for number, asset in enumerate(_base_assets(symbols))
    ]
    prices = [price for _, price in books]
    matched = [0] * len(books)
    versions: dict[int, int] = {}
    assets = [USDT, *(base for base, _ in books)]
    width = max(assets) + 1
    for number in itertools.count():
        now_ms = _STARTED_MS + number // 10
        if uniform() < 0.003:
            user, asset = int(uniform() * users) + 1, assets[int(uniform() * len(assets))]
            amount = int(uniform() * COIN) + 1
            kind = "WITHDRAWAL"
            if uniform() < 0.25:
                kind, amount = "ADJUSTMENT", amount if uniform() < 0.5 else -amount
            versions[user * width + asset] = versions.get(user * width + asset, 1) + 1
            yield _ledger_event(kind, user, asset, amount, related_id=number, created_at=now_ms)
        book = int(uniform() * len(books))
        base = books[book][0]
        price = prices[book] = max(1, prices[book] + int((uniform() - 0.5) * prices[book] * 0.0004))
        quantity = int(10 ** (3 + 4.5 * uniform())) * (1 if base == BTC else 20)  # 0.00001 to 0.3 btc, mostly small
        buyer = int(uniform() * users) + 1
        seller = buyer if uniform() < 0.016 else int(uniform() * users) + 1
        matched[book] += 1
        keys = buyer * width + USDT, buyer * width + base, seller * width + base, seller * width + USDT
        before = [versions.get(key, 1) for key in keys]
        for key, version in zip(keys, before, strict=True):
            versions[key] = version + 1
        event = {
            "output_sequence": 0,
            "trade_id": trade_id,
            "match_seq": matched[book],
            "buy_order_id": 2 * trade_id,
            "sell_order_id": 2 * trade_id + 1,
            "buyer_user_id": buyer,
            "seller_user_id": seller,
            "base_asset": base,
            "quote_asset": USDT,
            "price": price,
            "quantity": quantity,
            "buyer_refund": int(uniform() * 10**10) if uniform() < 0.6 else 0,
            "seller_refund": 0,
            "settled_at": now_ms,
            "buyer_quote_version": before[0],
            "buyer_base_version": before[1],
            "seller_base_version": before[2],
            "seller_quote_version": before[3],
        }
        if fees:
            event["buyer_fee"] = quantity // 1_000
            event["seller_fee"] = price * quantity // 100 // 1_000
        trade_id += 1
        yield event


def number_events(events: Iterable[Event], first_sequence: int) -> Iterator[Event]:
    """Number the events from `first_sequence` without a hole (in place)."""
    for sequence, event in enumerate(events, first_sequence):
        event["output_sequence"] = sequence
        yield event


def rules(source: str, symbols: int = 2) -> dict[str, Any]:
    """Return the rules that a source was made for, in the shape that the judge reads."""
    names = {BTC: "btc", USDT: "usdt", ETH: "eth"}
    bases = _base_assets(symbols if source == "generated" else 2)
    session = source == "session"
    return {
        "assets": {names.get(asset, f"coin{asset}"): {"id": asset, "decimals": 8} for asset in sorted([USDT, *bases])},
        "symbols": {
            f"{names.get(base, f'coin{base}')}_usdt": {
                "base": names.get(base, f"coin{base}"),
                "quote": "usdt",
                "price_decimals": 2,
                "quote_amount": "raw" if session else "scaled",
                "trade_id_time": "ms16" if session else "none",
                "page_width": 65_536_000 if session else 10_000,
            }
            for base in bases
        },
        "revenue_user_id": 0,
    }


def event_ms(event: Event) -> int:
    """Return the engine's time of a recorded event in ms, 0 when it has none."""
    ms: int = event.get("settled_at") or event.get("created_at") or 0
    if not ms and "trade_id" in event:
        ms = event["trade_id"] >> 16  # the recorded session draws its trade ids as ms << 16 + counter
    return ms


def _base_assets(symbols: int) -> list[int]:
    return [BTC, *range(ETH, ETH + symbols - 1)]


def _units(text: str, decimals: int) -> int:
    units = Decimal(text).scaleb(decimals)
    if units != int(units):
        raise ValueError(f"{text} has more than {decimals} decimals")
    return int(units)


def _ledger_event(kind: str, user: int, asset: int, amount: int, *, related_id: int, created_at: int) -> Event:
    return {
        "output_sequence": 0,
        "event_type": kind,
        "user_id": user,
        "asset": asset,
        "amount": amount,
        "related_id": related_id,
        "created_at": created_at,
    }


# --- events to frames -----------------------------------------------------------------------------------------------


class FramePlan:
    """Turns events into frames in the order in which they leave; owns the numbering of restarts and every fault."""

    def __init__(
        self,
        *,
        faults: dict[int, Fault] | None = None,
        restarts: Iterable[int] = (),
        stamp: bool = False,
        session: int | None = None,
    ) -> None:
        """Faults and restarts name sequences of the first run; a session key and the stamp go into every event."""
        self._faults = faults or {}
        self._restarts = sorted(restarts)
        self._stamp = stamp
        self._session = session
        self._pack = msgpack.Packer().pack
        self._json = json.JSONEncoder(separators=(",", ":")).encode

    def frames(self, events: Iterable[Event]) -> Iterator[Frame]:
        """Yield the frames of the events, in sending order."""
        held: dict[int, list[Frame]] = {}
        restarts = list(self._restarts)
        run, shift = 1, 0
        for place, event in enumerate(events):
            sequence = event["output_sequence"]
            if shift:
                event["output_sequence"] = sequence = sequence - shift
            if self._session is not None:
                event["session"] = self._session
            fault = self._faults.get(sequence) if run == 1 else None
            if fault is None:
                yield self._frame(place, sequence, run, event, "")
            else:
                for frame in self._faulty(fault, place, sequence, event):
                    if fault.kind in ("late", "swap"):
                        held.setdefault(fault.later, []).append(frame._replace(held=True))
                    else:
                        yield frame
            if run == 1 and held:
                yield from held.pop(sequence, ())
            if restarts and sequence == restarts[0]:
                restarts.pop(0)
                yield from itertools.chain.from_iterable(held.values())
                held.clear()
                run, shift = run + 1, shift + sequence
        yield from itertools.chain.from_iterable(held.values())  # the source ended before what they were to wait for

    def _faulty(self, fault: Fault, place: int, sequence: int, event: Event) -> Iterator[Frame]:
        if fault.kind == "wrong_field":
            event = {**event, fault.key: fault.value}
            if fault.remove:
                del event[fault.key]
            yield self._frame(place, sequence, 1, event, "wrong_field")
            return
        frame = self._frame(place, sequence, 1, event, "" if fault.kind in ("contradict", "swap") else fault.kind)
        if fault.kind == "withheld":
            yield frame._replace(payload=None)
        elif fault.kind == "corrupt":
            yield frame._replace(payload=_GARBAGE, stamped=False)
        elif fault.kind == "duplicate":
            yield frame
            yield frame._replace(text=None)
        elif fault.kind == "contradict":
            key = "quantity" if "quantity" in event else "amount"
            yield frame
            yield self._frame(place, sequence, 1, {**event, key: event[key] + 1}, "contradict")
        else:  # late, swap: held back by the caller
            yield frame

    def _frame(self, place: int, sequence: int, run: int, event: Event, fault: str) -> Frame:
        text, trade = self._json(event)[:-1], "trade_id" in event
        if self._stamp and "ts_us" not in event:
            payload: bytes = self._pack({**event, "ts_us": _STAMP_PLACE})[:-8]
            return Frame(place, sequence, run, payload, True, text, True, trade, False, fault)
        return Frame(place, sequence, run, self._pack(event), False, text, False, trade, False, fault)


class Journal:
    """The file of what was published: one JSON line an event, written in blocks, at least once a second."""

    def __init__(self, path: Path | str) -> None:
        """Begin an empty journal."""
        self._file = Path(path).open("wb", buffering=0)  # noqa: SIM115
        self._lines: list[str] = []
        self._flushed_at = time.monotonic()

    def append(self, frame: Frame, sent_us: int, actual_us: int) -> None:
        """Note a frame with its intended and its actual time."""
        end = f',"ts_us":{sent_us}}}' if frame.text_stamped else "}"
        extra = (f',"run":{frame.run}' if frame.run > 1 else "") + (f',"fault":"{frame.fault}"' if frame.fault else "")
        line = (
            f'{{"seq":{frame.sequence},"sent_us":{sent_us},"actual_us":{actual_us},"event":{frame.text}{end}{extra}}}\n'
        )
        self._lines.append(line)
        if len(self._lines) >= JOURNAL_LINES_MAX:
            self.flush()

    def flush_when_due(self) -> None:
        """Write out what is a second old."""
        if time.monotonic() - self._flushed_at > 0.9:
            self.flush()

    def flush(self) -> None:
        """Write out everything (to the operating system, not through to the disk)."""
        if self._lines:
            block = memoryview("".join(self._lines).encode())
            while block:
                block = block[self._file.write(block) :]
            self._lines.clear()
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        self._file.close()


# --- publishing -----------------------------------------------------------------------------------------------------


class Clock:
    """Microseconds since 1970 that neither jump nor run backwards while the engine runs."""

    def __init__(self) -> None:
        """Take the wall clock once and count on from there."""
        self._offset_ns = time.time_ns() - time.perf_counter_ns()

    def now_us(self) -> int:
        """Return the time."""
        return (time.perf_counter_ns() + self._offset_ns) // 1_000


class Pause:
    """The pause file: while it exists nothing is published; `<file>.paused` then holds the last sequence sent."""

    def __init__(self, path: Path | None) -> None:
        """Take the path, None for never."""
        self._path = path
        self._reply = path.with_name(path.name + ".paused") if path else None

    def wanted(self) -> bool:
        """Tell whether the file is there."""
        return self._path is not None and self._path.exists()

    def begin(self, last_sequence: int) -> None:
        """Tell the outside that the stream is quiet now."""
        assert self._reply
        new = self._reply.with_name(self._reply.name + ".new")
        new.write_text(f"{last_sequence}\n")
        new.replace(self._reply)

    def end(self) -> None:
        """Take the answer back."""
        assert self._reply
        self._reply.unlink(missing_ok=True)


class Schedule:
    """Intended times in us after the start: none for flat out; else at a rate, or as recorded and sped up.

    A rate may begin with a burst: so many events at once, then the others, one interval after the other.
    """

    def __init__(self, *, rate: float | None = None, burst: int = 0, offsets_us: list[int] | None = None) -> None:
        """Take either or neither."""
        self._interval_us = 1e6 / rate if rate else None
        self._burst = burst
        self._offsets_us = offsets_us

    @classmethod
    def recorded(cls, events: list[Event], factor: float) -> Schedule:
        """Take the distances between the engine's own times, `factor` times as fast."""
        offsets, first, newest = [], 0, 0
        for event in events:
            newest = max(newest, event_ms(event))
            first = first or newest
            offsets.append(int((newest - first) * 1_000 / factor))
        return cls(offsets_us=offsets)

    def offset_us(self, place: int) -> int | None:
        """Return when the event is due after the start; None: at once."""
        if self._interval_us is not None:
            return int(max(place - self._burst, 0) * self._interval_us)
        return self._offsets_us[place] if self._offsets_us is not None else None


class Publisher:
    """Sends frames when they are due, minds pauses, heartbeats and the stop flag, and keeps the journal."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        topic: bytes,
        *,
        schedule: Schedule,
        journal: Journal | None,
        pause: Pause,
        first_sequence: int,
        heartbeat_s: float | None = None,
        session: int | None = None,
        stamp: bool = False,
        quiet: bool = False,
    ) -> None:
        """Publish on a bound XPUB socket."""
        self._socket = socket
        self._topic = topic
        self._schedule = schedule
        self._journal = journal
        self._pause = pause
        self._heartbeat_us = int(heartbeat_s * 1e6) if heartbeat_s else None
        self._session = session
        self._stamp = stamp
        self._quiet = quiet
        self._clock = Clock()
        self._subscribers = 0
        self._next_sequence = first_sequence
        self._begun_us = self._sent_at_us = self._clock.now_us()
        self._report_us = self._begun_us + 1_000_000
        self.stopped = False
        self.frames = self.events = self.trades = self.last_sequence = self.late_us_max = 0
        self.seconds = 0.0

    def stop(self) -> None:
        """Let the run end before its next frame (called by a signal)."""
        self.stopped = True

    def wait_for_subscribers(self, wanted: int, timeout_s: float) -> bool:
        """Wait until that many subscriptions to the topic have arrived; False when time ran out."""
        end = time.monotonic() + timeout_s
        while not self.stopped:
            self._read_subscriptions()
            if self._subscribers >= wanted:
                return True
            if time.monotonic() > end:
                return False
            self._socket.poll(50)
        return True

    def publish(self, frames: Iterable[Frame]) -> None:
        """Send everything, each frame at its time."""
        send, topic, more, now = self._socket.send, self._topic, zmq.SNDMORE, self._clock.now_us
        append = self._journal.append if self._journal else None
        start_us = self._begun_us = self._sent_at_us = now()
        poll_us, poll_interval_us = start_us, int(POLL_S * 1e6)
        place_before, sent_us = -1, 0
        for frame in frames:
            now_us = now()
            if now_us >= poll_us:
                start_us += self._look_around()
                now_us = now()
                poll_us = now_us + poll_interval_us
            if frame.place != place_before:  # a repetition keeps the time of the first
                place_before = frame.place
                offset_us = self._schedule.offset_us(place_before)
                if offset_us is None:
                    sent_us = now_us
                else:
                    if start_us + offset_us > now_us:
                        start_us += self._sleep_until(start_us, offset_us)
                        now_us = now()
                    sent_us = start_us + offset_us
            if self.stopped:
                break
            payload = frame.payload
            if payload is not None:
                send(topic, more)
                send(payload + _PACK_U64(sent_us) if frame.stamped else payload)
                self._sent_at_us = now_us
            if append is not None and frame.text is not None:
                append(frame, sent_us, now_us)
            self._count(frame, now_us - sent_us)
        self.seconds = (now() - self._begun_us) / 1e6
        self._report()
        self._report_us = sys.maxsize  # all is said
        if self._journal:
            self._journal.flush()

    def _count(self, frame: Frame, late_us: int) -> None:
        if frame.payload is not None:
            self.frames += 1
        if frame.text is not None and frame.fault != "contradict":
            self.events += 1
            self.trades += frame.trade
        if not frame.held or frame.sequence >= self._next_sequence:
            self.last_sequence = frame.sequence
            self._next_sequence = frame.sequence + 1
            self.late_us_max = max(self.late_us_max, late_us)

    def linger(self, linger_s: float) -> None:
        """Say where the stream ends, and stay for a while."""
        if self._heartbeat_us:
            self._heartbeat()
        end = time.monotonic() + linger_s
        while time.monotonic() < end and not self.stopped:
            self._look_around()
            time.sleep(min(POLL_S, linger_s))

    def _sleep_until(self, start_us: int, offset_us: int) -> int:
        """Sleep until an event is due; return by how much pauses have moved the start."""
        moved_us = 0
        while not self.stopped:
            wait_s = (start_us + moved_us + offset_us - self._clock.now_us()) / 1e6
            if wait_s <= 0:
                break
            time.sleep(min(max(wait_s, SLEEP_S_MIN), POLL_S))
            if wait_s > POLL_S:
                moved_us += self._look_around()
        return moved_us

    def _look_around(self) -> int:
        """Do what is done now and then; return how long a pause has lasted, in us."""
        self._read_subscriptions()
        if self._clock.now_us() >= self._report_us:
            self._report()
        if self._journal:
            self._journal.flush_when_due()
        if self._pause.wanted():
            return self._rest()
        if self._heartbeat_us and self._clock.now_us() - self._sent_at_us > self._heartbeat_us:
            self._heartbeat()
        return 0

    def _rest(self) -> int:
        begun_us, subscribers = self._clock.now_us(), self._subscribers
        if self._journal:
            self._journal.flush()
        self._pause.begin(self.last_sequence)
        while self._pause.wanted() and not self.stopped:
            self._read_subscriptions()
            time.sleep(POLL_S)
        if not self.wait_for_subscribers(subscribers, PAUSE_SUBSCRIBERS_S):  # one may have been killed meanwhile
            note(f"goes on with {self._subscribers} of {subscribers} subscribers after the pause")
        self._pause.end()
        return self._clock.now_us() - begun_us

    def _heartbeat(self) -> None:
        now_us = self._clock.now_us()
        beat = {"next_sequence": self._next_sequence}
        if self._session is not None:
            beat["session"] = self._session
        if self._stamp:
            beat["ts_us"] = now_us
        self._socket.send_multipart([self._topic, msgpack.packb(beat)])
        self._sent_at_us = now_us

    def _read_subscriptions(self) -> None:
        while self._socket.poll(0):
            message = self._socket.recv()
            if message[:1] in (b"\x00", b"\x01") and self._topic.startswith(message[1:]):
                self._subscribers += 1 if message[0] else -1

    def _report(self) -> None:
        now_us = self._clock.now_us()
        self._report_us = now_us + 1_000_000
        if not self._quiet and self.events:
            rate = self.events * 1e6 / max(now_us - self._begun_us, 1)
            late_ms = self.late_us_max / 1_000
            note(f"sent {self.events:,} events to {self.last_sequence}, {rate:,.0f}/s, at most {late_ms:.1f} ms late")


def note(text: str) -> None:
    """Say something on stderr."""
    print(f"engine: {text}", file=sys.stderr, flush=True)


# --- command line ---------------------------------------------------------------------------------------------------

_EPILOG = """\
examples:
  # the recorded session of a real engine, as fast as it goes, with a journal for the judge
  python bench/engine.py --source session --journal journal.jsonl
  # real trades as they happened, ten times as fast, between 1,000 made-up users
  python bench/engine.py --source binance --users 1000 --pace x10 --stamp
  # 1,000 generated trades a second until SIGTERM, open loop, times in the payload for measuring latency
  python bench/engine.py --source generated --rate 1000 --stamp --journal journal.jsonl
  # 200,000 trades between 1,000 users, real ones first
  python bench/engine.py --source mixed --users 1000 --trades 200000
  # one frame twice, one never, one ten late, one unreadable, one with a wrong field
  python bench/engine.py --count 2000 --duplicate 300 --withhold 400 \\
    --withhold-until 500:510 --corrupt 600 --wrong-field 700:quantity=abc

Events are numbered from --first-sequence without a hole. --print-rules shows the rules to settle a source by. The
journal has one line an event: {"seq", "sent_us" (intended), "actual_us", "event": {...}}, "run" from the first
restart on, and "fault" where there was one (a withheld or corrupt event stands there as it was meant; "contradict" is
the second content of a sequence, and an extra line). While the --pause-file exists nothing is published; FILE.paused
then holds the last sequence that was sent.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/engine.py",
        description="A stand-in matching engine: publishes [topic, msgpack map] on a ZeroMQ XPUB socket.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("where").add_argument
    add(
        "--endpoint",
        default="tcp://127.0.0.1:5557",
        help="address to bind; port 0 or * takes a free one (default %(default)s)",
    )
    add("--topic", default="settlement", help="first frame of each message (default %(default)s)")
    add(
        "--wait-subscribers",
        type=int,
        default=1,
        metavar="N",
        help="begin when N have subscribed (default 1); 0: do not wait",
    )
    add("--wait-timeout-s", type=float, default=60.0, metavar="S", help="give up waiting for them (default 60)")
    add(
        "--hwm",
        type=int,
        default=HWM_FRAMES,
        metavar="FRAMES",
        help="drop beyond so many unsent frames, as PUB does (default %(default)s)",
    )
    add("--curve-key-file", type=Path, metavar="FILE", help="speak CURVE as the owner of FILE (NAME.key_secret)")
    add = parser.add_argument_group("what").add_argument
    add("--source", choices=("session", "binance", "generated", "mixed"), default="session", help="default: session")
    add("--users", type=int, default=64, metavar="N", help="users of all but the session (default 64)")
    add("--seed", type=int, default=1, metavar="S", help="seed of all but the session (default 1)")
    add("--symbols", type=int, default=2, metavar="N", help="symbols of generated (default 2)")
    add("--fees", action="store_true", help="generated trades carry fees of 0.1 %%")
    add("--no-deposits", action="store_true", help="generated begins with trades: it goes on after an earlier run")
    add("--first-trade-id", type=int, default=1, metavar="N", help="of generated (default 1)")
    add("--count", type=int, metavar="N", help="stop after N events; without it generated and mixed never end")
    add("--trades", type=int, metavar="N", help="stop after N trades")
    add("--first-sequence", type=int, default=1, metavar="N", help="number of the first event (default 1)")
    add("--session", type=int, metavar="K", help="put the session key into every frame")
    add("--stamp", action="store_true", help="put the intended send time into every event as ts_us")
    add("--print-rules", action="store_true", help="print the rules of the source as JSON and exit")
    add = parser.add_argument_group("when").add_argument
    add(
        "--pace",
        default="flat",
        metavar="flat|realtime|xN",
        help="at once, as recorded, or N times as fast (default flat)",
    )
    add("--rate", type=float, metavar="R", help="R events a second, open loop")
    add("--burst", type=int, default=0, metavar="N", help="with --rate: the first N events at once (the deposits)")
    add("--heartbeat-s", type=float, metavar="S", help="send a heartbeat when idle for S seconds, and at the end")
    add(
        "--linger-s",
        type=float,
        default=1.0,
        metavar="S",
        help="stay after the last frame, so that nothing is lost (default 1)",
    )
    add("--pause-file", type=Path, metavar="FILE", help="publish nothing while FILE exists")
    add = parser.add_argument_group("faults (each names a sequence; repeatable; one fault a sequence)").add_argument
    add("--duplicate", type=int, action="append", default=[], metavar="SEQ", help="send it twice")
    add("--withhold", type=int, action="append", default=[], metavar="SEQ", help="never send it")
    add("--withhold-until", action="append", default=[], metavar="SEQ:LATER", help="send it after LATER")
    add("--swap", type=int, action="append", default=[], metavar="SEQ", help="send it after the next one")
    add("--corrupt", type=int, action="append", default=[], metavar="SEQ", help="send garbage in its place")
    add(
        "--wrong-field",
        action="append",
        default=[],
        metavar="SEQ:KEY=VALUE",
        help="VALUE in JSON, else text; SEQ:!KEY leaves KEY out",
    )
    add(
        "--contradict",
        type=int,
        action="append",
        default=[],
        metavar="SEQ",
        help="send it, then other content with the same number",
    )
    add(
        "--restart-at",
        type=int,
        action="append",
        default=[],
        metavar="SEQ",
        help="number from 1 again after SEQ, as without a journal",
    )
    add = parser.add_argument_group("the past (needs --journal)").add_argument
    add("--replay", metavar="ENDPOINT", help="serve what was published to those who missed it: see bench/past.py")
    add("--replay-faults", type=Path, metavar="FILE", help="lie about it as FILE says, while it exists")
    add = parser.add_argument_group("reports").add_argument
    add("--journal", type=Path, metavar="FILE", help="JSON lines of what was published")
    add(
        "--json", action="store_true", help="stdout gets one JSON line with the endpoint and, last, one with the result"
    )
    add("--status-file", type=Path, metavar="FILE", help="the last JSON line goes to FILE, too")
    add("--quiet", action="store_true", help="no progress on stderr")
    return parser


def _faults(args: argparse.Namespace) -> dict[int, Fault]:
    """Read the fault options; ValueError when one can't be read or two name the same sequence."""
    named: list[tuple[int, Fault]] = []
    named += [(sequence, Fault("duplicate")) for sequence in args.duplicate]
    named += [(sequence, Fault("withheld")) for sequence in args.withhold]
    named += [(sequence, Fault("corrupt")) for sequence in args.corrupt]
    named += [(sequence, Fault("contradict")) for sequence in args.contradict]
    named += [(sequence, Fault("swap", later=sequence + 1)) for sequence in args.swap]
    for text in args.withhold_until:
        sequence, _, later = text.partition(":")
        if not (sequence.isdigit() and later.isdigit() and int(later) > int(sequence)):
            raise ValueError(f"--withhold-until {text}: wanted SEQ:LATER with LATER > SEQ")
        named.append((int(sequence), Fault("late", later=int(later))))
    for text in args.wrong_field:
        sequence, _, change = text.partition(":")
        key, equals, value = change.partition("=")
        if not sequence.isdigit() or not (equals or key.startswith("!")):
            raise ValueError(f"--wrong-field {text}: wanted SEQ:KEY=VALUE or SEQ:!KEY")
        if key.lstrip("!") == "output_sequence":
            raise ValueError(
                "--wrong-field output_sequence: a frame without its sequence is a malformed one; use --corrupt"
            )
        if equals:
            named.append((int(sequence), Fault("wrong_field", key=key, value=_json_or_text(value))))
        else:
            named.append((int(sequence), Fault("wrong_field", key=key[1:], remove=True)))
    faults = dict(named)
    if len(faults) < len(named):
        raise ValueError("two faults name the same sequence; give one a sequence")
    return faults


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _schedule(args: argparse.Namespace, events: list[Event] | None) -> Schedule:
    """Read the pace; ValueError when it can't be had."""
    if args.burst and not args.rate:
        raise ValueError("--burst goes with --rate only")
    if args.pace == "flat":
        return Schedule(rate=args.rate, burst=args.burst)
    factor = 1.0 if args.pace == "realtime" else float(args.pace[1:]) if args.pace.startswith("x") else 0.0
    if factor <= 0:
        raise ValueError(f"--pace {args.pace}: wanted flat, realtime or xN with N > 0")
    if args.rate:
        raise ValueError("--rate goes with --pace flat only")
    if events is None:
        raise ValueError(f"--source {args.source} has no times of its own; use --rate")
    return Schedule.recorded(events, factor)


def _bind(context: zmq.Context[zmq.Socket[bytes]], args: argparse.Namespace) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.XPUB)
    socket.setsockopt(zmq.SNDHWM, args.hwm)
    socket.setsockopt(zmq.XPUB_VERBOSER, 1)  # every subscriber is told, not only the first
    socket.setsockopt(zmq.LINGER, int(args.linger_s * 10_000))
    if args.curve_key_file:
        _secure(socket, args.curve_key_file)
    endpoint: str = args.endpoint
    socket.bind(endpoint[:-2] + ":*" if endpoint.endswith(":0") else endpoint)
    return socket


def _secure(socket: zmq.Socket[bytes], key_file: Path) -> None:
    """Make a socket speak CURVE as the owner of a ZeroMQ certificate."""
    public, secret = load_certificate(key_file)
    assert secret is not None, f"{key_file} holds no secret key"
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)


def main(argv: list[str] | None = None) -> int:
    """Run the engine; 0 also after SIGTERM, 1 when no subscriber came or it can't bind, 2 for wrong usage."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.print_rules:
        print(json.dumps(rules(args.source, args.symbols)))
        return 0
    if args.source != "generated" and (args.fees or args.no_deposits or args.first_trade_id != 1):
        parser.error("--fees, --no-deposits and --first-trade-id go with --source generated only")
    if args.replay and not args.journal:
        parser.error("--replay serves what the --journal holds; give both")
    if args.users < 1 or args.symbols < 1 or args.first_sequence < 1 or (args.rate is not None and args.rate <= 0):
        parser.error("--users, --symbols, --first-sequence and --rate must be positive")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until there is something to stop
    events: list[Event] | None = None
    if args.source in ("session", "binance"):
        events = load_session() if args.source == "session" else load_binance(users=args.users, seed=args.seed)
        events = events[: args.count]
    try:
        faults = _faults(args)
        schedule = _schedule(args, events)
    except ValueError as error:
        parser.error(str(error))
    numbered: Iterable[Event]
    if events is not None:
        numbered = number_events(events, args.first_sequence)
    elif args.source == "mixed":
        numbered = itertools.islice(number_events(mix(args.users, args.seed), args.first_sequence), args.count)
    else:
        numbered = generate(
            args.seed,
            args.users,
            args.count,
            symbols=args.symbols,
            fees=args.fees,
            first_sequence=args.first_sequence,
            first_trade_id=args.first_trade_id,
            deposits=not args.no_deposits,
        )
    if args.trades is not None:
        numbered = up_to_trades(numbered, args.trades)
    frames: Iterable[Frame] = FramePlan(
        faults=faults, restarts=args.restart_at, stamp=args.stamp, session=args.session
    ).frames(numbered)
    if events is not None or args.count is not None or args.trades is not None:
        frames = itertools.chain(list(itertools.islice(frames, PREPARED_EVENTS_MAX)), frames)
    events = None
    gc.freeze()
    gc.disable()  # nothing below makes cycles, and a collection over all the frames would be a pause of its own
    return _run(args, frames, schedule)


def _run(args: argparse.Namespace, frames: Iterable[Frame], schedule: Schedule) -> int:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        socket = _bind(context, args)
    except zmq.ZMQError as error:
        note(f"can't bind {args.endpoint}: {error}; choose another --endpoint")
        return 1
    journal = Journal(args.journal) if args.journal else None
    if args.replay:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a program, this file knows only its folder
        from bench import past

        past.start(args.journal, args.replay, args.replay_faults)
    publisher = Publisher(
        socket,
        args.topic.encode(),
        schedule=schedule,
        journal=journal,
        pause=Pause(args.pause_file),
        first_sequence=args.first_sequence,
        heartbeat_s=args.heartbeat_s,
        session=args.session,
        stamp=args.stamp,
        quiet=args.quiet,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: publisher.stop())
    endpoint = socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # type: ignore[union-attr]
    print(json.dumps({"endpoint": endpoint}) if args.json else f"publishing on {endpoint}", flush=True)
    try:
        if not publisher.wait_for_subscribers(args.wait_subscribers, args.wait_timeout_s):
            note(
                f"no {args.wait_subscribers} subscriber(s) to {args.topic!r} on {endpoint} within "
                f"{args.wait_timeout_s:g} s; start the subscriber, or give --wait-subscribers 0"
            )
            return 1
        if not publisher.stopped:
            publisher.publish(frames)
            publisher.linger(args.linger_s)
    finally:
        if journal:
            journal.close()
        socket.close()
        context.term()  # waits for what is unsent, at most ten times --linger-s
    result = json.dumps(
        {
            "events": publisher.events,
            "trades": publisher.trades,
            "frames": publisher.frames,
            "first_sequence": args.first_sequence,
            "last_sequence": publisher.last_sequence,
            "seconds": round(publisher.seconds, 3),
            "rate": round(publisher.events / publisher.seconds, 1) if publisher.seconds else 0.0,
            "late_ms_max": publisher.late_us_max / 1_000,
            "stopped": publisher.stopped,
        }
    )
    if args.status_file:
        args.status_file.write_text(result + "\n")
    print(result, flush=True) if args.json else note(result)
    return 0


if __name__ == "__main__":
    # The exit code is all that a caller needs; a large heap of frames is not worth tearing down.
    code = main()
    sys.stdout.flush()
    os._exit(code)
