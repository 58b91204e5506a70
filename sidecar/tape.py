"""The tape: everything that was heard, durable and in order, before anything is done with it.

One SQLite file (WAL, synchronous=FULL). `Tape` is the recorder's side: it alone writes, on one thread, one commit a
turn, and hands an event on only after its commit. `TapeReader` is the settler's and everybody else's: it opens the file
read-only and takes short looks. In one process the two are joined by `Tail`, the newest committed events in memory.

A frame's place is (session, output_sequence); it may come in any order and more than once. A frame that contradicts the
tape opens a new session: recording goes on there, settlement halts at its border. `runs` keeps which sequences are
there as intervals, in the same commit as the frames, so a start never scans the file.

After a crash the file holds every committed turn, whole; of an uncommitted one nothing. What had not been committed was
handed to nobody, and shows as a hole that replay fills or a decision accepts.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import secrets
import sqlite3
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from sidecar import wire
from sidecar.disk import DiskThread, insert_rows, transaction
from sidecar.errors import (
    AnswerRefusedError,
    TapeDamagedError,
    TapeError,
    TapeFullError,
    TapeLockedError,
    TapeMissingError,
)
from sidecar.events import Event, Heartbeat

log = logging.getLogger(__name__)

FORMAT: Final = 1
APPLICATION_ID: Final = 0x53434152  # "SCAR"
_UPGRADES: Final[dict[int, str]] = {}  # by format: what makes the next one of it, in the same transaction
_PRUNE_ROWS: Final = 5_000
_SIZE_LOOK_FRAMES: Final = 64  # the size is looked at once in so many frames: at most 256 KiB over its bound
_NO_SPACE: Final = (sqlite3.SQLITE_FULL,)
_DAMAGE: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR)
_LOCK_TRIES: Final = 10  # 0.2 s in all: a look at who holds it (`is_locked`) takes it for an instant

_TABLES: Final = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sessions (
    session INTEGER PRIMARY KEY,
    engine_session INTEGER,             -- the frames' own session key, where they carry one
    opened_at_us INTEGER NOT NULL,
    reason TEXT NOT NULL,               -- why it began
    pruned_to INTEGER NOT NULL,         -- everything up to here was durable and is deleted
    announced_to INTEGER NOT NULL       -- the highest sequence that a heartbeat says was published
);
CREATE TABLE IF NOT EXISTS runs (       -- which sequences are on the tape (or were, up to pruned_to)
    session INTEGER NOT NULL, first_sequence INTEGER NOT NULL, last_sequence INTEGER NOT NULL,
    PRIMARY KEY (session, first_sequence)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS frames (
    session INTEGER NOT NULL, output_sequence INTEGER NOT NULL,
    recorded_at_us INTEGER NOT NULL, checksum INTEGER NOT NULL, payload BLOB NOT NULL,
    PRIMARY KEY (session, output_sequence)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS malformed (
    number INTEGER PRIMARY KEY, recorded_at_us INTEGER NOT NULL, reason TEXT NOT NULL, frames BLOB NOT NULL
);
"""

FrameRow = tuple[int, int, int, int, bytes]


class Session(NamedTuple):
    """One incarnation of the engine as the tape tells them apart."""

    session: int
    engine_session: int | None
    opened_at_us: int
    reason: str
    pruned_to: int
    announced_to: int


class Look(NamedTuple):
    """What is there after a position: `hole`, a missing range below something newer; `newer_session`, a border."""

    hole: tuple[int, int] | None
    newer_session: int | None


def checksum(session: int, sequence: int, payload: bytes) -> int:
    """Give the CRC-32 over a frame's payload, begun with its place: a frame in another's place does not match."""
    return zlib.crc32(payload, (sequence * 0x9E3779B1 + session) & 0xFFFFFFFF)


class Runs:
    """Which sequences are there: sorted, disjoint, never adjacent intervals."""

    def __init__(self, intervals: list[tuple[int, int]]) -> None:
        """Begin with intervals as `list()` gives them."""
        self._firsts = [first for first, _ in intervals]
        self._lasts = [last for _, last in intervals]

    def list(self) -> list[tuple[int, int]]:
        """Give all intervals, both ends included."""
        return list(zip(self._firsts, self._lasts, strict=True))

    @property
    def head(self) -> int:
        """Give the highest sequence that is there, 0 when none is."""
        return self._lasts[-1] if self._lasts else 0

    def __contains__(self, sequence: int) -> bool:
        """Say whether a sequence is there."""
        at = bisect_right(self._firsts, sequence) - 1
        return at >= 0 and sequence <= self._lasts[at]

    def last_up_to(self, sequence: int) -> int:
        """Give the highest sequence that is there, at or below another; 0 when none is."""
        at = bisect_right(self._firsts, sequence) - 1
        return min(self._lasts[at], sequence) if at >= 0 else 0

    def add(self, sequence: int) -> tuple[int, int]:
        """Put in a sequence that isn't there; give the interval that it is now in."""
        firsts, lasts = self._firsts, self._lasts
        if lasts and sequence == lasts[-1] + 1:
            lasts[-1] = sequence
            return firsts[-1], sequence
        at = bisect_right(firsts, sequence)
        joins_left = at > 0 and lasts[at - 1] == sequence - 1
        joins_right = at < len(firsts) and firsts[at] == sequence + 1
        if joins_left and joins_right:
            lasts[at - 1] = lasts.pop(at)
            del firsts[at]
        elif joins_left:
            lasts[at - 1] = sequence
        elif joins_right:
            firsts[at] = sequence
            return sequence, lasts[at]
        else:
            firsts.insert(at, sequence)
            lasts.insert(at, sequence)
            return sequence, sequence
        return firsts[at - 1], lasts[at - 1]

    def holes(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Give the missing ranges within first..last."""
        at = max(bisect_right(self._firsts, first) - 1, 0)
        for run_first, run_last in zip(self._firsts[at:], self._lasts[at:], strict=True):
            if run_first > last:
                break
            if run_first > first:
                yield first, run_first - 1
            first = max(first, run_last + 1)
        if first <= last:
            yield first, last


class Tail:
    """The newest committed events of the newest session, for a settler in the same process; bounded by `events_max`."""

    def __init__(self, events_max: int) -> None:
        """Keep at most `events_max` events; a settler that is further behind reads the disk."""
        self.session = 0
        self.newest = 0
        self._events: dict[int, Event] = {}
        self._events_max = events_max
        self.moved = asyncio.Event()

    def put(self, session: int, events: list[Event], head: int) -> None:
        """Add committed events, and wake whoever waits; `head` is the highest sequence the session has on disk."""
        if session != self.session:
            self.session = session
            self._events = {}
        # Not the highest of `events`: a hole filled late is low, while the disk holds more above it.
        self.newest = head
        if len(self._events) + len(events) > self._events_max:
            self._events = {}  # the settler is far behind and on the disk: begin again with the newest
        self._events.update([(event.output_sequence, event) for event in events[-self._events_max :]])
        self.moved.set()

    def get(self, session: int, after: int, events_max: int) -> list[Event]:
        """Take out the contiguous events right after a position, as far as they are here."""
        events = self._events
        if session != self.session or after + 1 not in events:
            if events and next(reversed(events)) <= after:
                events.clear()  # all of it was read from disk meanwhile
            return []
        taken: list[Event] = []
        sequence = after + 1
        while len(taken) < events_max and (event := events.pop(sequence, None)) is not None:
            taken.append(event)
            sequence += 1
        return taken


class OpenSession:
    """The recorder's knowledge of one session; others only look at it."""

    def __init__(self, row: Session, runs: Runs) -> None:
        self.session = row.session
        self.engine_session = row.engine_session
        self.pruned_to = row.pruned_to
        self.announced_to = row.announced_to
        self.runs = runs


class _Turn(NamedTuple):
    """What one commit writes."""

    frames: list[FrameRow]
    sessions: list[Session]
    keyed: list[tuple[int, int]]
    announced: dict[int, int]
    runs: dict[int, dict[int, int]]
    malformed: list[tuple[int, str, bytes]]
    events: list[tuple[int, Event]]
    counts: dict[str, int]


class Tape:
    """The recorder's side: decides a frame's place, and puts it on disk. One process at a time."""

    def __init__(
        self,
        path: Path,
        *,
        size_bytes_max: int,
        malformed_kept_max: int = 10_000,
        tail_events_max: int = 20_000,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        """Open or create the tape at `path`. Raises TapeLockedError when another recorder has it, else TapeError."""
        self.path = path
        self.tail = Tail(tail_events_max)
        self.duplicates_total = 0
        self.recorded_total = 0
        self.full: str | None = None
        self._size_bytes_max = size_bytes_max
        self._size_countdown = self._used = 0
        self._malformed_kept_max = malformed_kept_max
        self._now_us = now_us
        self._lock = lock(path, "recorder")
        try:
            self._db = connect_writer(path)
            self._load()
        except BaseException:
            self._lock.close()
            raise
        self._comparing: sqlite3.Connection | None = None
        self._thread = DiskThread("tape")
        self._pending_by_place: dict[tuple[int, int], bytes] = {}
        self._begin_turn()

    def _load(self) -> None:
        db = self._db
        try:
            self._sessions = {row.session: OpenSession(row, _load_runs(db, row.session)) for row in _sessions(db)}
            self.malformed_total = _meta(db, "malformed_total")
            self.tape_id = _meta(db, "tape_id")
        except sqlite3.Error as error:
            db.close()
            step = "restore it from a copy, or name another file as tape.path and fill that from replay or an archive"
            raise TapeError(f"{self.path} can't be read: {error}; {step}") from error
        self._runs_on_disk = {number: dict(opened.runs.list()) for number, opened in self._sessions.items()}

    # --- what a frame becomes: decided on the loop, in memory ---------------------------------------------------------

    @property
    def pending_frames(self) -> int:
        """Count the frames, malformed ones too, that wait for the next commit: the bound for draining the socket."""
        return len(self._frames) + len(self._malformed)

    @property
    def sessions(self) -> dict[int, OpenSession]:
        """Give what is known of each session, by its number."""
        return self._sessions

    def append(self, event: Event, into: OpenSession | None = None) -> None:
        """Give an event its place; it is on disk after `commit`. A repeated one is counted and forgotten.

        `into` names its session (see `fill`); without it the event says where it belongs.
        """
        sequence = event.output_sequence
        open_session = into or self._session_of(event.session)
        runs = open_session.runs
        lasts = runs._lasts  # noqa: SLF001 - the one comparison that every live frame takes
        if not (lasts and sequence == lasts[-1] + 1):
            if sequence <= open_session.pruned_to:
                if event.session is not None and event.session == open_session.engine_session:
                    self.duplicates_total += 1
                    return
                below = f"sequence {sequence} lies at or below {open_session.pruned_to}, which was settled and deleted"
                open_session = self._open(event.session, below)
            elif sequence in runs:
                if self._is_repeated(open_session.session, sequence, event.payload):
                    self.duplicates_total += 1
                    return
                open_session = self._open(event.session, f"sequence {sequence} came again with other content")
            runs = open_session.runs
        runs.add(sequence)
        session = open_session.session
        payload = event.payload
        if not self._frames:
            self._turn_at_us = self._now_us()  # not when the last turn was taken: that may be an hour ago
        self._touched.add(session)
        self._frames.append((session, sequence, self._turn_at_us, checksum(session, sequence, payload), payload))
        self._events.append((session, event))
        self._pending_by_place[session, sequence] = payload

    def fill(self, session: int, events: list[Event]) -> int:
        """Put events that were asked for where a session lacks them; give how many it lacked.

        It never opens a session: raises AnswerRefusedError, and puts none in, when one differs from what is there.
        """
        opened = self._sessions[session]
        missing = []
        for event in events:
            sequence = event.output_sequence
            if sequence <= opened.pruned_to:
                continue
            if sequence not in opened.runs:
                missing.append(event)
            elif not self._is_repeated(session, sequence, event.payload):
                raise AnswerRefusedError(f"sequence {sequence} came with other content than is on the tape")
        for event in missing:
            if event.session is not None and opened.engine_session is None:
                self._name(opened, event.session)
            self.append(event, opened)
        return len(missing)

    def append_malformed(self, frames: list[bytes], reason: str) -> None:
        """Keep a frame aside that has no place, with its bytes; `malformed_kept_max` bounds what is kept."""
        self.malformed_total += 1
        self._malformed.append((self._now_us(), reason, b"\0".join(frames)[: wire.PAYLOAD_BYTES_MAX * 4]))

    def announce(self, heartbeat: Heartbeat) -> None:
        """Learn from a heartbeat how far the engine has published: what is missing up to there is a hole.

        A session of which only heartbeats were heard is opened too, once there is something that it has lost.
        """
        published = heartbeat.next_sequence - 1
        if not published:
            return
        open_session = self._sessions[max(self._sessions)] if self._sessions else None
        if open_session is None or None not in (heartbeat.session, open_session.engine_session):
            open_session = self._session_of(heartbeat.session)
        if published > max(open_session.runs.head, open_session.announced_to):
            open_session.announced_to = published
            self._announced[open_session.session] = published

    def _session_of(self, engine_session: int | None) -> OpenSession:
        sessions = self._sessions
        if not sessions:
            return self._open(engine_session, "the first frame")
        current = sessions[max(sessions)] if len(sessions) > 1 else next(iter(sessions.values()))
        if engine_session is None or engine_session == current.engine_session:
            return current
        for number in sorted(sessions, reverse=True):
            if sessions[number].engine_session == engine_session:
                return sessions[number]
        if current.engine_session is None:
            self._name(current, engine_session)
            return current
        changed = f"the engine's session changed from {current.engine_session} to {engine_session}"
        return self._open(engine_session, changed)

    def _name(self, opened: OpenSession, engine_session: int) -> None:
        opened.engine_session = engine_session
        self._keyed.append((engine_session, opened.session))

    def _open(self, engine_session: int | None, reason: str) -> OpenSession:
        row = Session(max(self._sessions, default=0) + 1, engine_session, self._now_us(), reason, 0, 0)
        self._sessions[row.session] = opened = OpenSession(row, Runs([]))
        self._new_sessions.append(row)
        (log.info if row.session == 1 else log.error)(
            "session_opened", extra={"session": row.session, "engine_session": engine_session, "reason": reason}
        )
        return opened

    def _is_repeated(self, session: int, sequence: int, payload: bytes) -> bool:
        """Compare a frame with the one that is on the tape under its sequence."""
        pending = self._pending_by_place.get((session, sequence))
        if pending is not None:
            return wire.same(pending, payload)
        query = "SELECT checksum, payload FROM frames WHERE session = ? AND output_sequence = ?"
        try:
            if self._comparing is None:  # kept open: opening it for each of a storm of repeats would hold up the socket
                self._comparing = _connect_reader(self.path)
            found = self._comparing.execute(query, (session, sequence)).fetchall()
        except sqlite3.Error as error:
            raise TapeError(f"{self.path}: {error}; sequence {sequence} can't be compared with what's there") from error
        if not found:
            return False  # deleted a moment ago: as any that lies below what the tape holds
        stored, kept = found[0]
        if checksum(session, sequence, kept) == stored:
            return wire.same(kept, payload)
        if checksum(session, sequence, payload) != stored:
            log.error("tape_damaged", extra={"session": session, "sequence": sequence})
        return True  # the tape is at fault, not the engine: settlement halts at the damage, not at a new session

    # --- to disk: one thread, one commit a turn -----------------------------------------------------------------------

    def _begin_turn(self) -> None:
        self._frames: list[FrameRow] = []
        self._events: list[tuple[int, Event]] = []
        self._new_sessions: list[Session] = []
        self._keyed: list[tuple[int, int]] = []
        self._announced: dict[int, int] = {}
        self._touched: set[int] = set()
        self._malformed: list[tuple[int, str, bytes]] = []
        self._turn_at_us = self._now_us()

    @property
    def has_pending(self) -> bool:
        """Say whether there is something to commit."""
        return bool(self._frames or self._malformed or self._announced or self._new_sessions or self._keyed)

    def take_turn(self) -> _Turn:
        """Close the turn that has been collected, for `commit`; the next one begins."""
        turn = _Turn(
            self._frames,
            self._new_sessions,
            self._keyed,
            self._announced,
            {session: dict(self._sessions[session].runs.list()) for session in self._touched},
            self._malformed,
            self._events,
            {"malformed_total": self.malformed_total},
        )
        self._begin_turn()
        return turn

    async def commit(self, turn: _Turn) -> None:
        """Put a turn on disk, then hand its events on. Raises TapeFullError (nothing written; commit it again later).

        Any other error of the disk is raised as TapeError: after a failed fsync the next one lies, so the process ends.
        """
        await self._thread.run(self._write, turn)
        for session, sequence, _, _, _ in turn.frames:
            self._pending_by_place.pop((session, sequence), None)
        self.recorded_total += len(turn.frames)
        if turn.events:
            session = turn.events[-1][0]
            head = next(reversed(turn.runs[session].values()))
            self.tail.put(session, [event for at, event in turn.events if at == session], head)

    def _write(self, turn: _Turn) -> None:
        db = self._db
        try:
            self._size_countdown -= len(turn.frames)
            if self._size_countdown <= 0 or self.full is not None:
                self._size_countdown = _SIZE_LOOK_FRAMES
                self._used = _used_bytes(db)
            if (used := self._used) > self._size_bytes_max and turn.frames:
                raise TapeFullError(
                    f"{self.path} holds {used} bytes, tape.size_bytes_max is {self._size_bytes_max}; recording stands"
                    " still until what is durable is deleted (tape.retention_s) or the bound is raised"
                )
            with transaction(db):
                if turn.sessions or turn.keyed or turn.announced:
                    self._write_sessions(turn)
                for session, runs in turn.runs.items():
                    _write_runs(db, session, self._runs_on_disk.get(session, {}), runs)
                insert_rows(db, "INSERT INTO frames VALUES ", 5, turn.frames)
                if turn.malformed:
                    db.executemany(
                        "INSERT INTO malformed (recorded_at_us, reason, frames) VALUES (?, ?, ?)", turn.malformed
                    )
                    db.execute(
                        "DELETE FROM malformed WHERE number <= (SELECT max(number) FROM malformed) - ?",
                        (self._malformed_kept_max,),
                    )
                    db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(turn.counts.items()))
            self._runs_on_disk.update(turn.runs)
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", None)
            if code in _NO_SPACE:
                raise TapeFullError(f"the disk of {self.path} is full ({error}); recording stands still") from error
            raise TapeError(f"{self.path}: {error} ({getattr(error, 'sqlite_errorname', '?')})") from error

    def _write_sessions(self, turn: _Turn) -> None:
        db = self._db
        db.executemany("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?)", turn.sessions)
        db.executemany("UPDATE sessions SET engine_session = ? WHERE session = ?", turn.keyed)
        db.executemany(
            "UPDATE sessions SET announced_to = ? WHERE session = ?",
            [(to, session) for session, to in turn.announced.items()],
        )

    async def prune(self, session: int, deletable: int, older_than_us: int) -> int:
        """Delete frames up to `deletable` that were recorded before `older_than_us`; give how many, bounded a call."""
        if session not in self._sessions:
            return 0
        count, pruned_to = await self._thread.run(self._prune, session, deletable, older_than_us)
        if pruned_to:
            self._sessions[session].pruned_to = pruned_to
        return count

    def _prune(self, session: int, deletable: int, older_than_us: int) -> tuple[int, int]:
        db = self._db
        try:
            rows = db.execute(
                "SELECT output_sequence, recorded_at_us FROM frames WHERE session = ? AND output_sequence <= ?"
                " ORDER BY output_sequence LIMIT ?",
                (session, deletable, _PRUNE_ROWS),
            ).fetchall()
            pruned_to = count = 0
            now_us = self._now_us()
            for sequence, recorded_at_us in rows:
                if older_than_us <= recorded_at_us <= now_us:  # one of the future: the clock was set back since
                    break
                pruned_to, count = sequence, count + 1
            if not count:
                return 0, 0
            with transaction(db):
                db.execute("DELETE FROM frames WHERE session = ? AND output_sequence <= ?", (session, pruned_to))
                db.execute("UPDATE sessions SET pruned_to = ? WHERE session = ?", (pruned_to, session))
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) in _NO_SPACE:  # a full disk refuses deletes too
                return 0, 0
            raise TapeError(f"{self.path}: {error}") from error
        return count, pruned_to

    def close(self) -> None:
        """Close the file and let another recorder have it; what was not committed is given up."""
        self._thread.close()
        if self._comparing is not None:
            self._comparing.close()
        self._db.close()
        self._lock.close()


class TapeReader:
    """Everybody else's side: short looks at a tape that a recorder may be writing."""

    def __init__(self, path: Path, tail: Tail | None = None) -> None:
        """Open read-only. Raises TapeMissingError when there is no tape yet."""
        self.path = path
        self._tail = tail
        self._db = _connect_reader(path)
        self._version = -1

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def sessions(self) -> list[Session]:
        """Give all sessions, oldest first. Raises TapeDamagedError when they can't be read."""
        with _damage(0, "the sessions"):
            return _sessions(self._db)

    def runs(self, session: int) -> Runs:
        """Give what is there of a session. Raises TapeDamagedError when that can't be read."""
        with _damage(session, "which sequences are there"):
            return _load_runs(self._db, session)

    @property
    def tape_id(self) -> int:
        """Give the number that this tape got when it was made: another file in its place has another."""
        with _damage(0, "the tape's own number"):
            return _meta(self._db, "tape_id")

    def used_bytes(self) -> int:
        """Give the bytes that the tape's content takes, without pages it can use again."""
        return _used_bytes(self._db)

    @property
    def malformed_total(self) -> int:
        """Count the malformed frames this tape has heard."""
        with _damage(0, "the count of malformed frames"):
            return _meta(self._db, "malformed_total")

    def malformed(self, rows_max: int) -> list[tuple[int, int, str, bytes]]:
        """Give the newest malformed frames: number, recorded_at_us, reason, bytes."""
        query = "SELECT number, recorded_at_us, reason, frames FROM malformed ORDER BY number DESC LIMIT ?"
        return self._db.execute(query, (rows_max,)).fetchall()

    def frames(self, session: int, first: int, last: int, frames_max: int) -> list[tuple[int, int, bytes]]:
        """Give (output_sequence, recorded_at_us, payload) of what is there in first..last, checked.

        Raises TapeDamagedError at a frame that does not match its checksum.
        """
        query = (
            "SELECT output_sequence, recorded_at_us, payload, checksum FROM frames"
            " WHERE session = ? AND output_sequence BETWEEN ? AND ? ORDER BY output_sequence LIMIT ?"
        )
        found: list[tuple[int, int, bytes]] = []
        for sequence, at_us, payload, stored in self._db.execute(query, (session, first, last, frames_max)).fetchall():
            if type(sequence) is not int or type(payload) is not bytes:  # a page's bits say what is what, too
                raise TapeDamagedError(session, found[-1][0] + 1 if found else first)
            if checksum(session, sequence, payload) != stored:
                raise TapeDamagedError(session, sequence)
            found.append((sequence, at_us, payload))
        return found

    def read(self, session: int, after: int, events_max: int) -> list[Event]:
        """Give the contiguous events right after a position: from memory when they are new, else from disk.

        Raises TapeDamagedError when the next frame does not match its checksum, can't be read, or is not there though
        `runs` says it is.
        """
        tail = self._tail
        if tail is not None and tail.session == session:
            if tail.newest <= after:
                return []
            if taken := tail.get(session, after, events_max):
                return taken
        events: list[Event] = []
        try:
            for sequence, _, payload in self.frames(session, after + 1, after + events_max, events_max):
                if sequence != after + 1 + len(events):
                    break
                events.append(decode_recorded(payload))
        except TapeDamagedError as damaged:
            if damaged.sequence == after + 1:
                raise
            return self.read(session, after, damaged.sequence - after - 1)  # what stands before it is sound
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGE:
                raise
            if events_max == 1:
                raise TapeDamagedError(session, after + 1, str(error)) from error
            return self.read(session, after, events_max // 2)  # down to the frame that can't be read
        if not events and self._lacks(session, after + 1):
            raise TapeDamagedError(session, after + 1, "the frame is gone from the tape, and nobody deleted it")
        return events

    def _lacks(self, session: int, sequence: int) -> bool:
        """Say whether a frame that `runs` names is missing; one statement, so one moment of the tape.

        It looks the way `frames` does: where a page of the tree is damaged, a frame that can't be read as one of a
        range may be found all the same when it is asked for by its number.
        """
        query = (
            "SELECT EXISTS (SELECT 1 FROM runs WHERE session = ?1 AND first_sequence <= ?2 AND last_sequence >= ?2)"
            " AND EXISTS (SELECT 1 FROM sessions WHERE session = ?1 AND pruned_to < ?2)"
            " AND NOT EXISTS (SELECT 1 FROM frames WHERE session = ?1 AND output_sequence BETWEEN ?2 AND ?2)"
        )
        with _damage(session, "which sequences are there"):
            return bool(self._db.execute(query, (session, sequence)).fetchone()[0])

    def look(self, session: int, after: int) -> Look:
        """Say what stands after a position at which `read` gives nothing: a hole, a newer session, or nothing yet."""
        rows = {row.session: row for row in self.sessions()}
        newer = next((number for number in sorted(rows) if number > session), None)
        row = rows.get(session)
        if row is None:
            return Look(None, newer)
        if after < row.pruned_to:
            return Look((after + 1, row.pruned_to), newer)
        runs = self.runs(session)
        hole = next(runs.holes(after + 1, max(runs.head, row.announced_to)), None)
        return Look(hole if hole and hole[0] == after + 1 else None, newer)

    def holes(self, session: int, after: int) -> list[tuple[int, int]]:
        """Give the missing ranges of a session above a position; what was deleted is missing, too."""
        row = next((row for row in self.sessions() if row.session == session), None)
        if row is None:
            return []
        runs = self.runs(session)
        pruned = [(after + 1, row.pruned_to)] if after < row.pruned_to else []
        return pruned + list(runs.holes(max(after, row.pruned_to) + 1, max(runs.head, row.announced_to)))

    async def moved(self, timeout_s: float) -> None:
        """Wait until there may be something new (or the time is up): told by the recorder here, else asked for."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        if self._tail is not None:
            moved = self._tail.moved
            moved.clear()
            waking = loop.call_at(deadline, moved.set)  # a third of what a timeout around the wait costs
            try:
                await moved.wait()
            finally:
                waking.cancel()
            return
        while loop.time() < deadline:
            version = self._db.execute("PRAGMA data_version").fetchone()[0]
            if version != self._version:
                self._version = version
                return
            await asyncio.sleep(_POLL_S)


_POLL_S: Final = 0.004  # a settler in a process of its own: half of it is what polling adds to a trade's way


def decode_recorded(payload: bytes) -> Event:
    """Decode a payload that was an event when it was recorded."""
    event = wire.decode(payload)
    assert not isinstance(event, Heartbeat)
    return event


# --- side files: what the two halves tell each other ----------------------------------------------------------------


def settled_path(path: Path) -> Path:
    """Name the file in which the settler tells what is durable, and how it stands."""
    return path.with_name(path.name + ".settled")


def paused_path(path: Path) -> Path:
    """Name the file that pauses settlement while it exists."""
    return path.with_name(path.name + ".paused")


def recorded_path(path: Path) -> Path:
    """Name the file in which the recorder tells what it hears, and how the talk with the replay server stands."""
    return path.with_name(path.name + ".recorded")


def write_settled(path: Path, said: dict[str, Any]) -> None:
    """Replace `<tape>.settled` atomically. Raises OSError when it can't be (a full disk): the old one stays."""
    _replace(settled_path(path), said)


def read_settled(path: Path) -> dict[str, Any] | None:
    """Read `<tape>.settled`; None when it isn't there or isn't readable."""
    return _read(settled_path(path))


def write_recorded(path: Path, said: dict[str, Any]) -> None:
    """Replace `<tape>.recorded` atomically. Raises OSError as `write_settled` does."""
    _replace(recorded_path(path), said)


def read_recorded(path: Path) -> dict[str, Any] | None:
    """Read `<tape>.recorded`; None when it isn't there or isn't readable."""
    return _read(recorded_path(path))


def _replace(target: Path, said: dict[str, Any]) -> None:
    draft = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(said))
        draft.replace(target)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def _read(target: Path) -> dict[str, Any] | None:
    try:
        said = json.loads(target.read_text())
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None


class Lock:
    """A lock that dies with its process."""

    def __init__(self, descriptor: int) -> None:
        """Hold an open, locked descriptor."""
        self._descriptor = descriptor

    def close(self) -> None:
        """Let it go."""
        os.close(self._descriptor)


def lock(path: Path, role: str) -> Lock:
    """Become the tape's one `role` (recorder, settler). Raises TapeLockedError when there is one."""
    name = path.with_name(f"{path.name}.{role}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # a settler may be here before there is a tape
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise TapeError(f"{name}: {error.strerror}; is tape.path in a folder that this user may write to?") from error
    for tries_left in reversed(range(_LOCK_TRIES)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if tries_left:
                time.sleep(0.02)
                continue
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise TapeLockedError(
                f"{path} has a {role} already, process {holder or '?'}; one at a time is allowed"
            ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return Lock(descriptor)


def is_locked(path: Path, role: str) -> bool:
    """Say whether a process is the tape's `role` right now."""
    try:
        descriptor = os.open(path.with_name(f"{path.name}.{role}"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


# --- SQLite ---------------------------------------------------------------------------------------------------------


def connect_writer(path: Path) -> sqlite3.Connection:
    """Open or make a file of the tape's form, to write to. Raises TapeError when it is another's, or can't be used."""
    db = None
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        found, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        if (found, version) == (0, 0) and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            tape_id = f"INSERT INTO meta VALUES ('tape_id', {secrets.randbits(62)});"  # noqa: S608 - a number
            marks = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT};"
            db.executescript(f"BEGIN; {_TABLES} {tape_id} {marks} COMMIT;")
            version = FORMAT
        elif found != APPLICATION_ID:
            raise TapeError(f"{_no_tape(path, found)}; name another file as tape.path")
        elif version > FORMAT:
            raise _too_new(path, version)
        while version < FORMAT:
            log.warning("tape_upgraded", extra={"path": str(path), "from": version, "to": version + 1})
            version += 1
            db.executescript(f"BEGIN IMMEDIATE; {_UPGRADES[version - 1]} PRAGMA user_version = {version}; COMMIT;")
    except sqlite3.Error as error:
        if db is not None:
            db.close()
        raise TapeError(f"{path}: {error}; is tape.path a writable file on a local disk?") from error
    except BaseException:
        if db is not None:
            db.close()
        raise
    return db


def _too_new(path: Path, version: int) -> TapeError:
    return TapeError(
        f"{path} has format {version}, of a newer release; this one reads up to {FORMAT}: start the newer release, or"
        " name another file as tape.path"
    )


def _connect_reader(path: Path) -> sqlite3.Connection:
    if not path.exists():
        raise TapeMissingError(f"there is no tape at {path} yet; `sidecar record` or `sidecar run` makes it")
    db = None
    try:
        db = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False, timeout=5.0
        )
        found, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        if (found, version) == (0, 0) and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise TapeMissingError(f"{path} is not made yet")
        if found != APPLICATION_ID:  # waiting for it to become one would be waiting for ever
            raise TapeDamagedError(0, 0, _no_tape(path, found))
        if version > FORMAT:
            raise _too_new(path, version)
        if version != FORMAT:
            raise TapeMissingError(f"{path} has format {version}: a start of the recorder makes {FORMAT} of it")
    except sqlite3.Error as error:
        if db is not None:
            db.close()
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE:
            raise TapeDamagedError(0, 0, f"{path} can't be read: {error}") from error
        raise TapeMissingError(f"{path}: {error}") from error
    except TapeError:
        if db is not None:
            db.close()
        raise
    return db


def _no_tape(path: Path, found: int) -> str:
    return f"{path} is no tape (application_id {found:#x}, {APPLICATION_ID:#x} is wanted)"


@contextlib.contextmanager
def _damage(session: int, what: str) -> Iterator[None]:
    """Call it damage when SQLite can't read what is asked for in here."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise TapeDamagedError(session, 0, f"{what} can't be read: {error}") from error


def _sessions(db: sqlite3.Connection) -> list[Session]:
    return [Session(*row) for row in db.execute("SELECT * FROM sessions ORDER BY session")]


def _load_runs(db: sqlite3.Connection, session: int) -> Runs:
    query = "SELECT first_sequence, last_sequence FROM runs WHERE session = ? ORDER BY first_sequence"
    return Runs(db.execute(query, (session,)).fetchall())


def _write_runs(db: sqlite3.Connection, session: int, before: dict[int, int], after: dict[int, int]) -> None:
    gone = [(session, first) for first in before if first not in after]
    moved = [(session, first, last) for first, last in after.items() if before.get(first) != last]
    if gone:
        db.executemany("DELETE FROM runs WHERE session = ? AND first_sequence = ?", gone)
    insert_rows(db, "INSERT OR REPLACE INTO runs VALUES ", 3, moved)


def _meta(db: sqlite3.Connection, key: str) -> int:
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return row[0] if row else 0


def _used_bytes(db: sqlite3.Connection) -> int:
    names = ("page_count", "freelist_count", "page_size")
    pages, free, size = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
    used: int = (pages - free) * size
    return used
