"""Late truths: events that their stream has gone past for good, settled on a stream of their own (design.md, Postings).

An accepted gap that was found in an archive, or a rejected event made valid, is appended to `<tape>.late`, a file of
the tape's form, with a number of its own; the settle loop settles it as the stream `<stream>/late`. What makes it
exactly once:

- One late tape numbers a late stream: the decision `late_owner` names it. Whoever comes from another host is refused.
- On the late tape an origin (its sequence on the stream where it belongs) has one number, and so has a trade. Looking
  and appending are under the late tape's lock, and one commit.
- What the store has already is refused: the trade on any stream, the origin on any of the stream's late streams.

A crash before the commit leaves nothing, one after it a number that the settler takes up; said again, it is there.
A late tape that was lost is never continued: the decision that closes its stream comes first, then `<stream>/late2`
begins, with what the store does not have.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Final, NamedTuple

from sidecar import decisions, wire
from sidecar.decisions import Agreed, DecisionRefusedError
from sidecar.disk import transaction
from sidecar.errors import Halt, MalformedFrameError, TapeError, TapeMissingError
from sidecar.events import I63_MAX, Decision, Event, Heartbeat, LedgerEvent, Refused, Trade
from sidecar.store.base import Store
from sidecar.tape import Session, TapeReader, checksum, connect_writer, lock, read_settled

LOOK_EVERY_S: Final = 0.5  # a settler looks for what was appended: nobody waits for a late truth by the millisecond
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS late_streams (session INTEGER PRIMARY KEY, stream TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS origins (
    session INTEGER NOT NULL, origin_sequence INTEGER NOT NULL, number INTEGER NOT NULL,
    symbol TEXT, trade_id INTEGER,
    PRIMARY KEY (session, origin_sequence)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS origins_by_trade ON origins (symbol, trade_id);
"""


def late_path(tape_path: Path) -> Path:
    """Name the tape of late truths beside a tape."""
    return tape_path.with_name(tape_path.name + ".late")


class LateReader(TapeReader):
    """A late stream as the settle loop reads it: the numbers of the late tape, with the origin in each event."""

    def __init__(self, path: Path, stream: str) -> None:
        """Open read-only. Raises TapeMissingError when there is no late tape, or nothing of this stream on it."""
        super().__init__(path)
        self._session = dict(_late_streams(self._db)).get(stream, 0)
        if not self._session:
            self.close()
            raise TapeMissingError(f"{path} holds nothing of stream {stream}")

    def sessions(self) -> list[Session]:
        """Give the stream's own."""
        return [row for row in super().sessions() if row.session == self._session]

    def read(self, session: int, after: int, events_max: int) -> list[Event]:
        """Give the events right after a position, as TapeReader.read, under their late numbers."""
        return [_numbered(event, after + 1 + at) for at, event in enumerate(super().read(session, after, events_max))]

    async def moved(self, timeout_s: float) -> None:
        """Wait a while."""
        await asyncio.sleep(max(timeout_s, LOOK_EVERY_S))


def _numbered(event: Event, number: int) -> Event:
    if isinstance(event, Refused):  # its row has no column for the origin
        return event._replace(
            output_sequence=number, reason=f"{event.reason} (origin_sequence={event.output_sequence})"
        )
    return event._replace(output_sequence=number, origin_sequence=event.output_sequence)


def _late_streams(db: sqlite3.Connection) -> list[tuple[str, int]]:
    if not db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'late_streams'").fetchone()[0]:
        return []
    return db.execute("SELECT stream, session FROM late_streams ORDER BY session").fetchall()


class LateReading(NamedTuple):
    """Where a late stream is read from, and under which name its settler tells how it stands."""

    path: Path
    stream: str
    told_path: Path

    def reader(self) -> LateReader:
        """Open the late tape. Raises TapeMissingError."""
        return LateReader(self.path, self.stream)


def readings(tape_path: Path) -> list[LateReading]:
    """Name the late streams on the late tape beside a tape, none when there is no late tape."""
    path = late_path(tape_path)
    if not path.exists():
        return []
    try:
        with closing(TapeReader(path)) as reader:
            streams = _late_streams(reader._db)  # noqa: SLF001 - a table that only a late tape has
    except TapeMissingError:  # it is being made
        return []
    return [
        LateReading(path, stream, path if session == 1 else path.with_name(f"{path.name}.{session}"))
        for stream, session in streams
    ]


def standing(tape_path: Path) -> list[dict[str, Any]]:
    """Say how each late stream of a tape stands, from its files: for `status`."""
    said = []
    for reading in readings(tape_path):
        told = read_settled(reading.told_path) or {}
        with closing(reading.reader()) as reader:
            taped = reader.runs(reader.sessions()[0].session).head
        acked, durable = told.get("acked", 0), told.get("durable", 0)
        said.append(
            {
                "stream": reading.stream, "state": told.get("state") or "waiting", "halted": told.get("halted"),
                "taped": taped, "acked": acked, "durable": durable, "lag_events": max(taped - acked, 0),
            }
        )  # fmt: skip
    return said


def not_ours(stream: str, reader: TapeReader, late_tape_id: int | None) -> Halt:
    """Say why a late tape is not settled: another one numbers the stream, or it was given up as lost."""
    if late_tape_id is None:
        reason = (
            f"the store knows of no late tape of stream {stream}: it was set back to an older copy, or is another one"
        )
        step = (
            "when its gaps and rejections are decided again, say one of the posts again (`sidecar backfill`, `sidecar"
            " rejected resubmit`): all that is on this late tape is settled then"
        )
    else:
        reason = f"{reader.path} was given up as lost: nothing more of it is settled as stream {stream}"
        step = "move the file away; what it held beyond what was settled is posted again with `sidecar backfill`"
    return Halt("DECISION_CONFLICT", 1, reason, step)


class Late(NamedTuple):
    """A late truth to post: the event with its origin as output_sequence, and its trade's symbol."""

    event: Trade | LedgerEvent
    symbol: str | None


class LateTape:
    """The posting side of `<tape>.late`; one process at a time. Raises TapeLockedError when another one posts."""

    def __init__(self, tape_path: Path) -> None:
        """Open, or make, the late tape beside a tape."""
        self.path = late_path(tape_path)
        self._lock = lock(self.path, "poster")
        try:
            self._db = connect_writer(self.path)
            self._db.executescript(_TABLES)
        except BaseException:
            self._lock.close()
            raise
        self.tape_id: int = self._db.execute("SELECT value FROM meta WHERE key = 'tape_id'").fetchone()[0]

    def close(self) -> None:
        """Close the file, let another process post."""
        self._db.close()
        self._lock.close()

    def number_of(self, stream: str, origin: int) -> int | None:
        """Give the number that an origin has on a late stream, None when it was never posted."""
        query = "SELECT number FROM origins JOIN late_streams USING (session) WHERE stream = ? AND origin_sequence = ?"
        row = self._db.execute(query, (stream, origin)).fetchone()
        return row and int(row[0])

    def origin_of_trade(self, stream: str, symbol: str | None, trade_id: int) -> int | None:
        """Give the origin under which a trade was posted on a late stream."""
        query = (
            "SELECT origin_sequence FROM origins JOIN late_streams USING (session)"
            " WHERE stream = ? AND symbol = ? AND trade_id = ?"
        )
        row = self._db.execute(query, (stream, symbol, trade_id)).fetchone()
        return row and int(row[0])

    def append(self, stream: str, events: list[Late]) -> dict[int, int]:
        """Append in one commit; give the numbers by origin. One that was there gets another (see `Poster`)."""
        db, now_us = self._db, time.time_ns() // 1000
        numbers: dict[int, int] = {}
        try:
            with transaction(db):
                session = dict(_late_streams(db)).get(stream)
                if session is None:
                    session = int(db.execute("SELECT ifnull(max(session), 0) + 1 FROM late_streams").fetchone()[0])
                    db.execute("INSERT INTO late_streams VALUES (?, ?)", (session, stream))
                    db.execute(
                        "INSERT INTO sessions VALUES (?, NULL, ?, ?, 0, 0)", (session, now_us, f"stream {stream}")
                    )
                query = "SELECT ifnull(max(output_sequence), 0) FROM frames WHERE session = ?"
                number = last = int(db.execute(query, (session,)).fetchone()[0])
                for event, symbol in events:
                    number += 1
                    payload = event.payload
                    frame = (session, number, now_us, checksum(session, number, payload), payload)
                    db.execute("INSERT INTO frames VALUES (?, ?, ?, ?, ?)", frame)
                    trade_id = event.trade_id if isinstance(event, Trade) else None
                    origin = (session, event.output_sequence, number, symbol, trade_id)
                    db.execute("INSERT OR REPLACE INTO origins VALUES (?, ?, ?, ?, ?)", origin)
                    numbers[event.output_sequence] = number
                if number > last:
                    db.execute("INSERT OR REPLACE INTO runs VALUES (?, 1, ?)", (session, number))
        except sqlite3.Error as error:
            raise TapeError(f"{self.path}: {error}; nothing of this piece was posted, say it again") from error
        return numbers


class Claim(NamedTuple):
    """The late stream that a late tape numbers, all names there were up to it, and whether one was closed for it."""

    name: str
    names: list[str]
    closed: bool


async def claim(store: Store, stream: str, late: LateTape, *, lost_too: bool, now_us: int) -> Claim:
    """Find the late stream that this late tape numbers, deciding it where nobody has.

    Raises DecisionRefusedError when another late tape numbers it, unless `lost_too`: then that one is closed for good,
    and its successor begins. Whoever closed one must wait until no settler of it can be at work any more.
    """
    begun = await decisions.read_log(store, stream)
    if not begun:
        raise DecisionRefusedError(f"stream {stream} has no genesis yet: nothing of it can be late")
    rules = decisions.rules_of(begun)
    owner = {"tape_id": late.tape_id, "host": socket.gethostname(), "path": str(late.path)}
    closed = False

    def judge(log: list[Decision]) -> Decision | None:
        nonlocal closed
        if not log:
            return decisions.genesis(
                now_us,
                reason=f"late truths of {stream}",
                first_sequence=1,
                session=1,
                engine_session=None,
                tape_id=late.tape_id,
                rules=rules,
            )
        last = _owner(log)
        if last is None:
            return decisions.decision("late_owner", now_us, reason="the first late post", body=owner)
        if last["tape_id"] in (0, late.tape_id):
            return None
        if not lost_too:
            raise DecisionRefusedError(
                f"late truths of {stream} are numbered by {last['path']} of host {last['host']}: post there; if that"
                " file is lost for good, say --lost-late-tape, which closes it and begins another"
            )
        closed = True
        return decisions.decision("late_owner", now_us, reason="the late tape is lost", body={"tape_id": 0})

    names: list[str] = []
    while True:
        name = f"{stream}/late{len(names) + 1 if names else ''}"
        names.append(name)
        owned: dict[str, Any] | None = None
        while owned is None:  # the genesis comes first, then the owner
            owned = _owner(await decisions.decide(store, name, judge))
        if owned["tape_id"] == late.tape_id:
            return Claim(name, names, closed)


def _owner(log: list[Decision]) -> dict[str, Any] | None:
    """Give the last word on who numbers a late stream; tape_id 0 when it is closed."""
    said = [json.loads(entry.body) for entry in log if entry.kind == "late_owner"]
    return said[-1] if said else None


class Poster:
    """Judges late truths and posts them; what it judged wrong is not posted, whatever else is."""

    def __init__(self, store: Store, late: LateTape, stream: str, agreed: Agreed, claimed: Claim) -> None:
        """Take the stream that the truths are of, what its log says, and the late stream that they are posted to."""
        self._store = store
        self._late = late
        self._stream = stream
        self._agreed = agreed
        self._names = claimed.names
        self.name = claimed.name
        self._settled_origins: set[int] | None = None
        self._judged: dict[tuple[str, int], int] = {}  # origin by trade: what one call brings is not on the tape yet

    async def judge(self, event: Event) -> Late | str:
        """Give what is to be posted, or why not: a sentence that begins with "posted" or "settled" is no fault."""
        origin = event.output_sequence
        if isinstance(event, Refused):
            return f"still {event.code}: {event.reason}"
        if (number := self._late.number_of(self.name, origin)) is not None:
            again = await self._store.get_rejected(self.name, number)
            if again is None:
                return f"posted before, as {self.name} {number}"
        symbol = None
        if isinstance(event, Trade):
            found = self._agreed.symbols.by_pair.get((event.base_asset, event.quote_asset))
            if found is None:
                pair = f"base_asset={event.base_asset}, quote_asset={event.quote_asset}"
                return f"{pair} is no symbol of stream {self._stream}: add it to the configuration and restart first"
            symbol = found.name
            if await self._store.trade_exists(symbol, event.trade_id):
                rows = await self._store.get_trade(symbol, event.trade_id)
                return await self._settled_trade(event, symbol, rows)
            other = self._late.origin_of_trade(self.name, symbol, event.trade_id)
            if other is None:
                other = self._judged.setdefault((symbol, event.trade_id), origin)
            if other != origin:
                return f"trade {event.trade_id} of {symbol} was posted as origin {other}; one trade has one sequence"
        elif event.asset not in self._agreed.symbols.assets_by_id:
            return f"asset={event.asset} is not of stream {self._stream}: add it to the configuration and restart first"
        elif origin in await self._origins():
            return "settled before, on a late stream"
        return Late(event, symbol)

    async def _settled_trade(self, event: Trade, symbol: str, rows: list[dict[str, Any]]) -> str:
        for row in rows:
            if row["stream"] in self._names and row["origin_sequence"] == event.output_sequence:
                return f"settled before, as {row['stream']} {row['output_sequence']}"
        row = rows[0]
        return (
            f"trade {event.trade_id} of {symbol} is settled already, under another sequence:"
            f" stream {row['stream']}, {row['output_sequence']}"
        )

    async def _origins(self) -> set[int]:
        """Read once which ledger events' origins are settled on the late streams."""
        if self._settled_origins is None:
            self._settled_origins = set()
            for name in self._names:
                async for rows in self._store.scan_ledger_events(name, 1, I63_MAX):
                    self._settled_origins.update(row[-1] for row in rows if row[-1] is not None)
        return self._settled_origins

    def post(self, events: list[Late]) -> dict[int, int]:
        """Append; give the late numbers by origin."""
        return self._late.append(self.name, events)


def decoded(payload: bytes) -> Event:
    """Decode a payload that somebody brought. Raises MalformedFrameError when it is no event."""
    event = wire.decode(payload)
    if isinstance(event, Heartbeat):
        raise MalformedFrameError("a heartbeat; an event with an output_sequence is wanted")
    return event
