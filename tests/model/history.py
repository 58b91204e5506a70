"""One seeded history: two settlers over their tapes and one database, everything going wrong that may, then calm.

The settlers are the shipped `Settler`, `Life`, `Ledger`, `take` and `Pipeline`; tape, database, clock and operator are
the model's. A history ends when all settlers stand at the stream's end and nothing is under way; then every cell must
be what the oracle says of the stream and its decisions.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest

import sidecar.decisions as decision_log
import sidecar.life
import sidecar.pipeline
import sidecar.settle
from sidecar.decisions import DecisionRefusedError, decision
from sidecar.errors import OutcomeUnknownError
from sidecar.events import Decision, Event, LedgerEvent, Refused, Trade
from sidecar.ledger import Ledger
from sidecar.life import Bounds
from sidecar.settle import Settler
from sidecar.store.base import Store
from sidecar.tape import Look, Runs, Session
from tests.model import virtual_time
from tests.model.cluster import Cluster, Connection, Faults
from tests.model.oracle import (
    I63_MAX,
    RULES,
    STREAM,
    UNKNOWN_ASSET,
    WALL_US,
    Account,
    Cells,
    Engine,
    RowKey,
    Said,
    Spec,
    deposit,
    draw,
    fold,
)

# What a history is about, besides the faults that all have. Its seed alone says which: `theme_of`.
THEMES: Final = ("plain", "outage", "evict", "gap", "race", "reject", "overflow", "repair")
DURABLE_AFTER_S: Final = 4.0  # 20 in earnest; what a power loss takes (3 for 15) and how late it is seen go with it
CALM_S: Final = 2.3  # nothing moved for so long: every settler has read decisions and outages since
STUCK_S: Final = 300.0
_PATIENCE: Final = 3  # a settler that waits for its tape looks up less often than in earnest


def theme_of(seed: int) -> str:
    """Name what a history is about."""
    return THEMES[seed % len(THEMES)]


@dataclass(frozen=True)
class Ways:
    """Where a mutant is in the model's hands: the repair, and what its rules would say."""

    repair_raises_base: bool = True
    repair_stamps_ahead: bool = True
    overflow_rejects: bool = False
    gaps_are_private: bool = False  # then either answer to a gap would be right, as long as it is one


@dataclass
class Outcome:
    """How a history ended: `diverged` cells, or what went wrong before there were any; both empty is good."""

    seed: int
    met: Counter[str]
    diverged: list[str]
    failed: str = ""

    @property
    def is_good(self) -> bool:
        return not (self.diverged or self.failed)

    def __str__(self) -> str:
        what = self.failed or "; ".join(self.diverged[:6])
        return f"history {self.seed} ({theme_of(self.seed)}): {what or 'converged'}"


class Tape:
    """What one host has heard; also its own reader, and the path the settler knows it by."""

    def __init__(self) -> None:
        self.heard: dict[int, Event] = {}
        self.newest = 0
        self.settled: dict[str, Any] | None = None  # what stands in `<tape>.settled`
        self._moved = asyncio.Event()

    def put(self, spec: Spec) -> None:
        self.heard[spec.sequence] = as_event(spec)
        self.newest = max(self.newest, spec.sequence)
        self._moved.set()

    def wake(self) -> None:
        self._moved.set()

    def exists(self) -> bool:
        """Say whether settlement is paused: never."""
        return False

    def close(self) -> None:
        pass

    @property
    def tape_id(self) -> int:
        return id(self)

    def runs(self, _session: int) -> Runs:
        runs = Runs([])
        for sequence in self.heard:
            runs.add(sequence)
        return runs

    def sessions(self) -> list[Session]:
        return [Session(1, None, 0, "first", 0, 0)] if self.heard else []

    def read(self, _session: int, after: int, events_max: int) -> list[Event]:
        frames, events = self.heard, list[Event]()
        while len(events) < events_max and (event := frames.get(after + 1 + len(events))) is not None:
            events.append(event)
        return events

    def frames(self, *_: int) -> list[tuple[int, int, bytes]]:
        return []  # what latency is sampled from: no part of the model

    def look(self, _session: int, after: int) -> Look:
        last = next((seq - 1 for seq in range(after + 1, self.newest + 1) if seq in self.heard), None)
        return Look((after + 1, last) if last is not None and last > after else None, None)

    async def moved(self, timeout_s: float) -> None:
        self._moved.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s * _PATIENCE):
                await self._moved.wait()


def as_event(spec: Spec) -> Event:
    """Give what the wire would have decoded."""
    of = dict(spec.fields)
    if spec.kind == "trade":
        return Trade(output_sequence=spec.sequence, session=None, payload=spec.payload, **of)
    if spec.kind == "ledger":
        of["asset"] = of.pop("asset_id")
        return LedgerEvent(output_sequence=spec.sequence, session=None, payload=spec.payload, **of)
    return Refused(spec.sequence, of["code"], "as drawn", None, spec.payload)


class Host:
    """One sidecar's host: its tape, and one settler after the other."""

    def __init__(self, history: History, number: int, on_gap: str) -> None:
        self.tape = Tape()
        self.number = number
        self.settler: Settler | None = None
        self.connection: Connection | None = None
        self._history = history
        self._on_gap = on_gap
        self._skew_us = history.rng.choice([0, 0, -700_000, 400_000])
        self._task: asyncio.Task[None] | None = None
        if number and history.theme != "race" and history.rng.random() < 0.2:  # a host that joins later
            history.met["hosts that joined later"] += 1
            asyncio.get_running_loop().call_later(history.rng.uniform(1.0, 9.0), self.start)
        else:
            self.start()

    def start(self) -> None:
        history = self._history
        self.connection = connection = history.cluster.connect()
        self.settler = Settler(
            store=cast("Store", connection),
            tape_path=cast("Path", self.tape),
            tail=None,
            stream=STREAM,
            first_sequence=1,
            rules=RULES,
            bounds=history.bounds,
            on_gap=self._on_gap,
            gap_after_s=history.gap_after_s,
            now_us=self._now_us,
        )
        history.settlers.append(self.settler)
        self._task = asyncio.create_task(self.settler.run())
        self._task.add_done_callback(self._ended)

    def _now_us(self) -> int:
        return self._history.now_us() + self._skew_us

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._history.fail("".join(traceback.format_exception(error)))

    @property
    def is_alive(self) -> bool:
        return self.connection is not None and not self.connection.dead

    def crash(self, restart_after_s: float) -> None:
        """Kill it between two steps; what it has sent is on its way all the same."""
        if not self.is_alive or self._history.is_calm:
            return
        assert self.connection is not None
        assert self._task is not None
        self._history.met["crashes"] += 1
        self.connection.dead = True
        self._task.cancel()
        asyncio.get_running_loop().call_later(restart_after_s, self.start)

    def crash_at_request(self, restart_after_s: float) -> None:
        """Kill it right after one of its next requests has left."""
        if self.connection is not None:
            at = self.connection.requests + self._history.rng.randint(1, 6)
            self.connection.dies_at_request = (at, lambda: self.crash(restart_after_s))

    async def restart(self) -> None:
        """Stop it as SIGTERM does, and start it again."""
        if not self.is_alive or self._history.is_calm:
            return
        assert self.settler is not None
        assert self._task is not None
        task = self._task
        self._history.met["stops"] += 1
        self.settler.stop()
        self.tape.wake()
        await asyncio.wait([task])
        if task is self._task and self.connection is not None and not self.connection.dead:
            self.connection.dead = True
            self.start()


class History:
    """Everything of one seed."""

    def __init__(self, seed: int, ways: Ways) -> None:
        self.seed = seed
        self.ways = ways
        self.theme = theme = theme_of(seed)
        self.rng = rng = random.Random(seed)
        self.met: Counter[str] = Counter()
        self.settlers: list[Settler] = []
        self.ledgers: list[Ledger] = []
        self.is_calm = False
        self._failed = ""
        self._busy = 0
        self._loop = asyncio.get_running_loop()
        self._halts: set[str] = set()

        # The stream.
        self.length_s = rng.uniform(2.5, 7.0)
        events = rng.randint(10, 34) if theme != "repair" else rng.randint(20, 50)
        at_s, self.published_s = 0.2, list[float]()
        pause_s = self.length_s / events / 0.5
        for _ in range(events):
            self.published_s.append(at_s)
            at_s += rng.choice([0.0, 0.01, rng.expovariate(1 / pause_s)])
            if theme == "evict" and rng.random() < 0.15:
                at_s += rng.uniform(1.0, DURABLE_AFTER_S + 1.5)  # so that accounts get durable meanwhile
        self.length_s = at_s
        users = {"evict": rng.randint(3, 8), "repair": rng.randint(1, 3)}.get(theme, rng.randint(2, 7))
        timed = rng.choice([0.0, 0.6, 1.0] if theme != "repair" else [0.6, 1.0, 1.0])
        self.engine = Engine(users, timed, rng.choice([0, 0, 900_000, -900_000]))
        self.specs = draw(rng, self.engine, self.published_s)
        self._holes: list[int] = []
        self._holes_left = True
        if theme in ("gap", "race"):
            self._draw_holes()
        elif theme == "reject":
            for sequence in rng.sample(range(2, events), rng.randint(1, 2)):
                spec = deposit(rng, sequence, 1, self.specs[sequence - 1].fields.get("ts_us"), asset=UNKNOWN_ASSET)
                self.specs[sequence - 1] = spec
        elif theme == "overflow":
            whale, (first, second, third) = users + 1, sorted(rng.sample(range(1, events + 1), 3))
            for sequence, amount, kind in (
                (first, I63_MAX - 10, "DEPOSIT"),
                (second, 50, "DEPOSIT"),
                (third, 100, "WITHDRAWAL"),
            ):
                ts_us = self.specs[sequence - 1].fields.get("ts_us")
                self.specs[sequence - 1] = deposit(rng, sequence, whale, ts_us, asset=1, amount=amount, kind=kind)

        # The settlers and their database.
        few = theme == "evict" or (rng.random() < 0.15 and theme not in ("race", "repair"))
        self.bounds = Bounds(
            batch_trades_max=rng.choice([1, 2, 3, 5]),
            batch_bytes_max=rng.choice([300, 1000, 12_288]),
            inflight_batches_max=rng.choice([1, 2, 4]) if theme != "race" else 1,
            durable_after_s=DURABLE_AFTER_S,
            accounts_max=rng.randint(4, 12) if few else 1000,
            shutdown_timeout_s=1.0,
            retry_backoff_max_s=0.4,
        )
        self.gap_after_s = 0.7
        quiet = theme == "race"
        self.faults = Faults(
            unknown=0.0 if quiet else rng.choice([0.0, 0.15, 0.4]),
            late=rng.choice([0.0, 0.2]),
            read_fails=0.0 if quiet else rng.choice([0.0, 0.05, 0.2]),
            hangs=0.0 if quiet else rng.choice([0.0, 0.0, 0.06]),
            slow_s=rng.choice([0.02, 0.15, 0.6]) if not quiet else 0.05,
        )
        self.cluster = Cluster(rng, self.faults, self.met)
        on_gap = rng.choice(["halt", "record"])
        two = theme == "race" or rng.random() < 0.7
        ways_of_gaps = ["halt", "record"] if quiet else [on_gap, on_gap]
        self.hosts = [Host(self, number, ways_of_gaps[number]) for number in range(1 + two)]
        self.met["two settlers"] += two

    def _draw_holes(self) -> None:
        rng, events = self.rng, len(self.specs)
        for _ in range(rng.randint(1, 2) if self.theme == "gap" else 1):
            first = rng.randint(2, events - 2)
            self._holes += range(first, min(first + rng.randint(1, 2), events - 1))
        self._holes = sorted(set(self._holes))

    # --- small things ---

    def now_us(self) -> int:
        """Give the true wall clock in us."""
        return WALL_US + int(self._loop.time() * 1e6)

    def fail(self, why: str) -> None:
        self._failed = self._failed or why

    def _later(self, at_s: float, what: Callable[..., object], *args: Any) -> None:
        self._loop.call_at(at_s, what, *args)

    def _start(self, at_s: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin something at a time; the history does not end before it has."""
        self._busy += 1

        async def to_its_end() -> None:
            try:
                await asyncio.sleep(at_s)
                await work()
            except Exception:  # noqa: BLE001 - a bug of the model is shown as one
                self.fail(traceback.format_exc())
            finally:
                self._busy -= 1

        self._tasks.append(asyncio.create_task(to_its_end()))

    # --- what happens ---

    async def run(self) -> Outcome:
        self._tasks: list[asyncio.Task[None]] = []
        rng = self.rng
        end_s = self.length_s + 2.0
        for spec, at_s in zip(self.specs, self.published_s, strict=True):
            if spec.sequence not in self._holes:
                for host in self.hosts:
                    self._later(at_s + rng.choice([0.0, 0.001, rng.random() * 0.3]), host.tape.put, spec)
        outages = rng.randint(1, 4) if self.theme in ("outage", "evict") else int(rng.random() < 0.3)
        for _ in range(outages):
            if rng.random() < 0.7:
                down_s = rng.choice([0.01, rng.random() * 0.5, rng.random() * 1.5])
                self._later(rng.uniform(0.5, end_s), self.cluster.fall, down_s)
            else:
                down_s = rng.uniform(0.1, DURABLE_AFTER_S * 2.5)
                self._later(rng.uniform(0.5, end_s), partial(self.cluster.fall, all_of_it=False), down_s)
        if self.theme != "race":
            for host in self.hosts:
                for _ in range(rng.choice([0, 0, 1, 2, 3])):
                    how = host.crash if rng.random() < 0.5 else host.crash_at_request
                    self._later(rng.uniform(0.3, end_s), how, rng.choice([0.01, 0.3, rng.random() * 3]))
                if rng.random() < 0.2:
                    self._start(rng.uniform(0.3, end_s), host.restart)
        if rng.random() < 0.3:
            self._later(rng.uniform(0.3, end_s), self._silence, rng.random() * 2.0)
        if self.theme in ("gap", "race") and (self.theme == "race" or rng.random() < 0.7 or self.ways.gaps_are_private):
            at_s = self.published_s[self._holes[0] - 1]
            self._start(at_s if self.theme == "gap" else max(at_s - 0.3, 0.1), self._turn_up)
        if self._holes:
            self._start(end_s + rng.choice([0.1, 5.0]), self._find_in_an_archive)
        if self.theme == "repair":
            self._start(rng.uniform(0.5, self.length_s * 0.6), self._corrupt_and_repair)
        operator = asyncio.create_task(self._operate())
        self._tasks.append(operator)

        await asyncio.sleep(end_s)
        self.is_calm = True
        self.cluster.calm()
        good = await self._quiescence()
        operator.cancel()
        self._count()
        outcome = Outcome(self.seed, self.met, [], self._failed)
        if self._failed:
            return outcome
        if "DECISION_CONFLICT" in self._halts:
            self.met["conflicts reported"] += 1
            return outcome
        if not good:
            outcome.failed = f"stuck: {[(s.state, s.said()) for s in self.settlers[-2:]]}"
            return outcome
        outcome.diverged = self._compare()
        return outcome

    def _silence(self, for_s: float) -> None:
        for host in self.hosts[:1]:
            if host.connection is not None:
                host.connection.silent_until_s = self._loop.time() + for_s

    async def _quiescence(self) -> bool:
        """Wait until every settler stands at the end and nothing moved for a while."""
        still_since: float | None = None
        was: object = None
        began_s = self._loop.time()
        while self._loop.time() < began_s + STUCK_S and not self._failed:
            if "DECISION_CONFLICT" in self._halts:
                return True
            now = [self.cluster.pending, self._busy, self.cluster.away, len(self.cluster.decisions.get(STREAM, ()))]
            at_end = not self.cluster.pending and not self._busy and not self.cluster.away
            for host in self.hosts:
                life = host.settler.life if host.settler is not None else None
                at_end = at_end and host.is_alive and life is not None
                at_end = at_end and life is not None and life.pipeline.acked.sequence == len(self.specs)
                now.append(host.settler.lives if host.settler is not None else 0)
            if not at_end or now != was:
                still_since = self._loop.time()
            elif still_since is not None and self._loop.time() >= still_since + CALM_S:
                return True
            was = now
            await asyncio.sleep(0.5)
        return False

    def _count(self) -> None:
        met = self.met
        met["skips"] += sum(ledger.skipped_total for ledger in self.ledgers)
        met["lives"] += sum(settler.lives for settler in self.settlers)
        met["start-overs"] += sum(settler.lives - 1 for settler in self.settlers)
        met["decisions"] += max(len(self.cluster.decisions.get(STREAM, ())) - 1, 0)
        for entry in self.cluster.decisions.get(STREAM, ()):
            met[f"decisions: {entry.kind}"] += 1

    # --- people ---

    async def _operate(self) -> None:
        """Watch what the settlers say, and decide what is theirs to decide."""
        connection = self.cluster.connect()
        while True:
            await asyncio.sleep(0.2)
            for host in self.hosts:
                halted = host.settler.halted if host.settler is not None else None
                if halted is None:
                    continue
                self._halts.add(halted.code)
                store = cast("Store", connection)
                with contextlib.suppress(OutcomeUnknownError, DecisionRefusedError):
                    if halted.code in ("UNKNOWN_ASSET", "BALANCE_OVERFLOW"):
                        await asyncio.sleep(self.rng.random())
                        await decision_log.reject(
                            store, STREAM, halted.sequence, reason="operator", now_us=self.now_us()
                        )
                    elif halted.code == "GAP" and self.theme != "race":
                        await asyncio.sleep(self.gap_after_s)
                        hole = host.tape.look(1, halted.sequence - 1).hole
                        if hole is not None:
                            await decision_log.accept_gap(
                                store, STREAM, *hole, present=[], reason="operator", now_us=self.now_us()
                            )

    async def _turn_up(self) -> None:
        """Let the frames of an accepted gap turn up after all: when everyone has read of it, or just about then."""
        rng = self.rng
        if self.theme == "race":
            host = self.hosts[0]
            assert host.connection is not None
            host.connection.deaf_until_s = self._loop.time() + rng.uniform(0.5, 4.0)
            await asyncio.sleep(rng.uniform(0.3, 1.6))
            for sequence in self._holes:
                host.tape.put(self.specs[sequence - 1])
            self.met["frames that turned up"] += 1
            return
        deadline_s = self._loop.time() + rng.uniform(2.0, 5.0) if self.ways.gaps_are_private else float("inf")
        while self._loop.time() < deadline_s and not self._all_know_of_the_gaps():
            await asyncio.sleep(0.2)
            if not self._holes_left:
                return
        for host in rng.choice([self.hosts, self.hosts[:1], self.hosts[-1:]]):
            for sequence in self._holes:
                host.tape.put(self.specs[sequence - 1])
        self.met["frames that turned up"] += 1

    async def _find_in_an_archive(self) -> None:
        """Fill the holes that nobody has given up."""
        self._holes_left = False
        for host in self.hosts:
            for sequence in sorted(set(self._holes) - self._said().gaps - host.tape.heard.keys()):
                host.tape.put(self.specs[sequence - 1])

    def _all_know_of_the_gaps(self) -> bool:
        log = self.cluster.decisions.get(STREAM, [])
        if not self._said().gaps.issuperset(self._holes):
            return False
        lives = [host.settler.life for host in self.hosts if host.is_alive and host.settler is not None]
        return all(life is not None and life.agreed.decisions_read >= len(log) for life in lives)

    async def _corrupt_and_repair(self) -> None:
        """Spoil a balance row behind everybody's back, and mend it by the protocol of `reconcile --fix`."""
        rng, rows = self.rng, self.cluster.rows
        while not (balances := [key for key, row in rows.items() if key[0] == "balance" and row.cells]):
            await asyncio.sleep(0.3)
            if self.is_calm and not any(key[0] == "balance" for key in rows):
                return  # nobody was ever paid
        key = rng.choice(balances)
        row = rows[key]
        if rng.random() < 0.6:  # by hand, at the wall clock's time
            row.write(self._loop.time(), self.now_us(), {"available": row.values["available"] + rng.randint(1, 9)})
        else:  # its newest write is gone, and no outage tells
            row.lose(row.writes[-1][0] - 1e-6)
        self.met["corruptions"] += 1
        if rng.random() < 0.8:  # so that somebody takes it for true
            for host in rng.choice([self.hosts, self.hosts, self.hosts[:1]]):
                host.crash(rng.random() * 0.3)
        await asyncio.sleep(rng.uniform(0.2, 1.2))
        store = self.cluster.connect()
        while True:
            await asyncio.sleep(0.1)
            with contextlib.suppress(OutcomeUnknownError):
                await store.open()
                outages, began_s = store.outages, self._loop.time()
                if not await self._fix(store, key) or self._loop.time() > began_s + DURABLE_AFTER_S * 0.75:
                    continue
                await asyncio.sleep(DURABLE_AFTER_S)  # a repair that an outage takes back is found and made again
                if store.outages == outages and store.steady_since is not None:
                    break
        self.met["repairs"] += 1

    async def _fix(self, store: Connection, key: RowKey) -> bool:
        """One pass of a repair (design.md, Reconciliation); False when it must begin again."""
        account = (key[1], key[2])
        began_s = self._loop.time()
        durable_after_us = int(DURABLE_AFTER_S * 1e6)
        try:
            row, write_us = await store.read_balance(STREAM, account)
            read_to = row.last_sequence if row is not None else 0
            while (acked := (await store.load_state(STREAM)).get("acked")) is None or acked.sequence < read_to:
                if self._loop.time() > began_s + DURABLE_AFTER_S / 2:
                    return False
                await asyncio.sleep(0.1)
            _, accounts = fold(self.specs, self._said(), acked.sequence)
            if account not in accounts:
                return False
            stamp_us = self.now_us() + 1
            if self.ways.repair_stamps_ahead:
                stamp_us = max(write_us, acked.stamp_us, self.now_us()) + durable_after_us
            await store.write_balance(STREAM, account, dict(vars(accounts[account])), stamp_us)
            if not self.ways.repair_raises_base:
                return True

            def judge(log: list[Decision]) -> Decision | None:
                said = [json.loads(entry.body)["base_us"] for entry in log if entry.kind == "stamp"]
                if max(said, default=0) > stamp_us:
                    return None
                return decision("stamp", self.now_us(), reason="repair", body={"base_us": stamp_us + 1})

            await decision_log.decide(cast("Store", store), STREAM, judge)
        except OutcomeUnknownError:
            return False
        return True

    # --- the verdict ---

    def _said(self) -> Said:
        """Read what the decision log says, without sidecar's help."""
        named: dict[str, set[int]] = {"gap": set(), "reject": set()}
        for entry in self.cluster.decisions.get(STREAM, ()):
            if entry.kind in named and entry.first_sequence is not None and entry.last_sequence is not None:
                named[entry.kind].update(range(entry.first_sequence, entry.last_sequence + 1))
        return Said(frozenset(named["gap"]), frozenset(named["reject"]), self.ways.overflow_rejects)

    def _compare(self) -> list[str]:
        said = self._said()
        differences = self._differences(said)
        if differences and self.ways.gaps_are_private:
            other = Said(said.gaps | set(self._holes), said.rejects, said.overflow_rejects)
            return self._differences(other) and differences
        return differences

    def _differences(self, said: Said) -> list[str]:
        expected, _ = fold(self.specs, said, len(self.specs))
        actual = {key: row.values for key, row in self.cluster.rows.items() if key[0] != "state" and row.cells}
        differences: list[str] = []
        for key in sorted(expected.keys() | actual.keys(), key=repr):
            want, have = expected.get(key), actual.get(key)
            if have is not None and key[0] == "rejected":
                have = {**have}
                if not have.pop("reason", ""):
                    differences.append(f"{key}: no reason")
            if want != have:
                differences.append(f"{key}: {_difference(want, have)}")
        return differences


def _difference(want: Cells | None, have: Cells | None) -> str:
    if want is None or have is None:
        return "is missing" if have is None else f"should not be there: {have}"
    return ", ".join(
        f"{name} is {have.get(name)}, should be {want.get(name)}"
        for name in sorted(want.keys() | have.keys())
        if want.get(name) != have.get(name)
    )


def _watched(history: History) -> type[Ledger]:
    class Watched(Ledger):
        """The shipped ledger; its counts are kept when its life ends."""

        def __init__(self, **named: Any) -> None:
            super().__init__(**named)
            history.ledgers.append(self)

        def evict(self, *given: Any, **named: Any) -> None:
            before = len(self.accounts)
            super().evict(*given, **named)
            history.met["evictions"] += before - len(self.accounts)

    return Watched


@contextlib.contextmanager
def in_the_model() -> Iterator[pytest.MonkeyPatch]:
    """Take the settle loop's files and its random number away; what else is patched meanwhile is undone after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sidecar.settle, "TapeReader", lambda tape, _tail: tape)
        patch.setattr(sidecar.settle, "paused_path", lambda tape: tape)
        patch.setattr(sidecar.settle, "read_settled", lambda tape: tape.settled)
        patch.setattr(sidecar.settle, "write_settled", lambda tape, said: setattr(tape, "settled", said))
        patch.setattr(sidecar.decisions, "decided_by", lambda: "model")
        yield patch


def run_history(seed: int, ways: Ways = Ways()) -> Outcome:
    """Run one history to its end."""

    async def main() -> Outcome:
        history = History(seed, ways)
        jitters = random.Random(seed)
        made = SimpleNamespace(Random=lambda: random.Random(jitters.random()))
        with pytest.MonkeyPatch.context() as patch:  # its own: what it undoes later, it keeps
            patch.setattr(sidecar.pipeline, "random", made)
            patch.setattr(sidecar.life, "Ledger", _watched(history))
            return await history.run()

    try:
        return virtual_time.run(main())
    except virtual_time.Deadlock:
        return Outcome(seed, Counter(), [], "deadlock")


__all__ = ["THEMES", "Account", "Outcome", "Ways", "in_the_model", "run_history", "theme_of"]
