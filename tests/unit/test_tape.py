"""The tape on real files: places, sessions, holes, readers, damage, a full disk, and what a SIGKILL leaves."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidecar import tape as tape_module
from sidecar.errors import TapeDamagedError, TapeError, TapeFullError, TapeLockedError, TapeMissingError
from sidecar.events import Event, Heartbeat
from sidecar.tape import (
    Look,
    Runs,
    Tape,
    TapeReader,
    checksum,
    is_locked,
    lock,
    read_settled,
    settled_path,
    write_settled,
)
from tests.streams import event, ledger_event, trade, trade_fields

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    def __init__(self) -> None:
        self.now_us = 1_000

    def __call__(self) -> int:
        return self.now_us


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tape.db"


@contextlib.contextmanager
def recorder(path: Path, **other: Any) -> Iterator[Tape]:
    tape = Tape(path, **({"size_bytes_max": 1 << 40} | other))
    try:
        yield tape
    finally:
        tape.close()


def commit(tape: Tape) -> None:
    asyncio.run(tape.commit(tape.take_turn()))


def record(tape: Tape, *events: Event) -> None:
    for one in events:
        tape.append(one)
    commit(tape)


def looking(path: Path, tape: Tape | None = None) -> contextlib.closing[TapeReader]:
    return contextlib.closing(TapeReader(path, tape.tail if tape is not None else None))


def held(path: Path) -> dict[int, list[int]]:
    """Which sequences are on the tape, by session; checked: the runs say what the frames are."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        frames: dict[int, list[int]] = {}
        for session, sequence, stored, payload in db.execute(
            "SELECT session, output_sequence, checksum, payload FROM frames ORDER BY session, output_sequence"
        ):
            assert checksum(session, sequence, payload) == stored
            frames.setdefault(session, []).append(sequence)
        for session, pruned_to in db.execute("SELECT session, pruned_to FROM sessions").fetchall():
            runs = db.execute(
                "SELECT first_sequence, last_sequence FROM runs WHERE session = ? ORDER BY 1", (session,)
            ).fetchall()
            named = [n for first, last in runs for n in range(first, last + 1) if n > pruned_to]
            assert named == frames.get(session, [])
            assert all(one[1] + 1 < other[0] for one, other in pairwise(runs))
        return frames


def follow(reader: TapeReader, session: int, after: int = 0, events_max: int = 7) -> list[Event]:
    found: list[Event] = []
    while burst := reader.read(session, after, events_max):
        assert len(burst) <= events_max
        found += burst
        after = burst[-1].output_sequence
    return found


def numbers(events: list[Event]) -> list[int]:
    return [one.output_sequence for one in events]


# --- places ---


def test_what_was_committed_is_read_back_in_order_and_whole(path: Path) -> None:
    events: list[Event] = [trade(1), ledger_event(2), event(trade_fields(3, price=-1)), trade(4, ts_us=5)]
    with recorder(path) as tape:
        record(tape, *events)
        with looking(path) as reader:
            assert follow(reader, 1) == events
            assert reader.read(1, 4, 10) == []
            assert reader.read(2, 0, 10) == []
            assert reader.look(1, 4) == Look(None, None)
    assert held(path) == {1: [1, 2, 3, 4]}


def test_nothing_is_handed_on_before_its_commit(path: Path) -> None:
    with recorder(path) as tape, looking(path) as disk, looking(path, tape) as memory:
        tape.append(trade(1))
        turn = tape.take_turn()
        tape.append(trade(2))
        assert disk.read(1, 0, 9) == memory.read(1, 0, 9) == []
        asyncio.run(tape.commit(turn))
        assert numbers(disk.read(1, 0, 9)) == [1]
        assert numbers(memory.read(1, 0, 9)) == [1]
    assert held(path) == {1: [1]}  # the second was never committed: given up


def test_frames_may_come_in_any_order_and_more_than_once(path: Path) -> None:
    with recorder(path) as tape:
        record(tape, trade(3), trade(1), trade(3))
        record(tape, trade(5), trade(2), trade(1))
        with looking(path) as reader:
            assert numbers(follow(reader, 1)) == [1, 2, 3]
            assert reader.look(1, 3) == Look((4, 4), None)
            assert reader.holes(1, 0) == [(4, 4)]
            record(tape, trade(4))
            assert numbers(follow(reader, 1, 3)) == [4, 5]
            assert reader.holes(1, 0) == []
        assert (tape.recorded_total, tape.duplicates_total) == (5, 2)
    assert held(path) == {1: [1, 2, 3, 4, 5]}


def test_a_repeat_is_known_after_a_restart_too(path: Path) -> None:
    with recorder(path) as tape:
        record(tape, trade(1), trade(2))
    with recorder(path) as tape:
        record(tape, trade(1), trade(2, unknown="x"), trade(3))
        assert tape.duplicates_total == 2
    assert held(path) == {1: [1, 2, 3]}


def test_the_first_frame_is_wherever_the_engine_is(path: Path) -> None:
    with recorder(path) as tape:
        record(tape, trade(2**63 - 1), trade(7))
        with looking(path) as reader:
            assert reader.look(1, 0) == Look((1, 6), None)
            assert reader.read(1, 6, 9) == [trade(7)]
            assert reader.look(1, 7) == Look((8, 2**63 - 2), None)


@given(st.lists(st.integers(1, 40), max_size=60))
def test_runs_are_the_intervals_of_a_set(sequences: list[int]) -> None:
    runs, there = Runs([]), set[int]()
    for sequence in sequences:
        assert (sequence in runs) == (sequence in there)
        if sequence in there:
            continue
        there.add(sequence)
        first, last = runs.add(sequence)
        assert set(range(first, last + 1)) <= there
        assert first <= sequence <= last
        assert first - 1 not in there
        assert last + 1 not in there
    assert runs.head == max(there, default=0)
    assert {n for first, last in runs.list() for n in range(first, last + 1)} == there
    for first, last in [(1, 40), (5, 20), (13, 13), (30, 60), (41, 50), (9, 8)]:
        missing = [n for a, b in runs.holes(first, last) for n in range(a, b + 1)]
        assert missing == [n for n in range(first, last + 1) if n not in there]


# --- sessions ---


def sessions(path: Path) -> list[tuple[int, int | None]]:
    with looking(path) as reader:
        return [(row.session, row.engine_session) for row in reader.sessions()]


def test_other_content_under_a_sequence_opens_a_session_and_recording_goes_on_there(path: Path) -> None:
    with recorder(path) as tape:
        record(tape, trade(1), trade(2), trade(3))
        record(tape, trade(2, price=301), trade(3, price=301), trade(4))
        with looking(path) as reader:
            assert numbers(follow(reader, 1)) == [1, 2, 3]
            assert reader.look(1, 3) == Look(None, 2)
            assert "sequence 2 came again with other content" in reader.sessions()[1].reason
            assert numbers(follow(reader, 2, 1)) == [2, 3, 4]
            assert reader.holes(2, 0) == [(1, 1)]
    assert held(path) == {1: [1, 2, 3], 2: [2, 3, 4]}


def test_a_contradiction_within_one_turn_is_seen_too(path: Path) -> None:
    with recorder(path) as tape:
        record(tape, trade(1), trade(1), trade(1, price=301))
        assert tape.duplicates_total == 1
    assert held(path) == {1: [1], 2: [1]}


def test_a_contradiction_between_a_turn_under_way_and_the_next_is_seen_too(path: Path) -> None:
    with recorder(path) as tape:
        tape.append(trade(1))
        turn = tape.take_turn()
        tape.append(trade(1))
        tape.append(trade(1, price=301))
        asyncio.run(tape.commit(turn))
        commit(tape)
        assert tape.duplicates_total == 1
    assert held(path) == {1: [1], 2: [1]}


def test_a_hole_stands_before_the_border(path: Path) -> None:
    with recorder(path) as tape:
        record(tape, trade(1), trade(3))
        record(tape, trade(1, price=5))
        with looking(path) as reader:
            assert reader.look(1, 1) == Look((2, 2), 2)
            assert reader.look(1, 3) == Look(None, 2)
            assert reader.look(9, 0) == Look(None, None)
            assert reader.look(0, 0) == Look(None, 1)


def test_a_changed_session_key_opens_a_session_and_late_frames_find_their_own(path: Path) -> None:
    with recorder(path) as tape:
        record(tape, trade(1, session=7), trade(3, session=7))
        record(tape, trade(1, session=8), trade(2, session=7), trade(2, session=8))
        assert tape.duplicates_total == 0
    assert held(path) == {1: [1, 2, 3], 2: [1, 2]}
    assert sessions(path) == [(1, 7), (2, 8)]
    with recorder(path) as tape:  # the keys are known after a restart
        record(tape, trade(3, session=8), trade(4, session=7))
    assert held(path) == {1: [1, 2, 3, 4], 2: [1, 2, 3]}


def test_a_frame_without_the_key_belongs_to_the_newest_session_and_the_first_key_names_it(path: Path) -> None:
    with recorder(path) as tape:
        record(tape, trade(1))
        record(tape, trade(2, session=7))
        record(tape, trade(3), trade(4, session=7))
    assert held(path) == {1: [1, 2, 3, 4]}
    assert sessions(path) == [(1, 7)]
    with recorder(path) as tape:
        record(tape, trade(5, session=0))  # 0 is a key as any other
    assert sessions(path) == [(1, 7), (2, 0)]


def test_what_lies_below_the_pruned_part_opens_a_session_unless_the_key_is_unchanged(path: Path) -> None:
    with recorder(path) as tape:
        record(tape, *[trade(n, session=7) for n in range(1, 6)])
        assert asyncio.run(tape.prune(1, 4, 1 << 60)) == 4
        record(tape, trade(3, session=7, price=12345))
        assert tape.duplicates_total == 1
        record(tape, trade(4))
        assert held(path) == {1: [5], 2: [4]}


def test_a_repeat_that_was_pruned_a_moment_ago_is_no_reason_to_fall_over(path: Path) -> None:
    with recorder(path) as tape:
        record(tape, *[trade(n) for n in range(1, 6)])
        tape._prune(1, 4, 1 << 60)  # on the writing thread; the loop has not heard of it yet
        record(tape, trade(3), trade(6))
    assert held(path) == {1: [5], 2: [3, 6]}


# --- heartbeats ---


def beat(following: int, session: int | None = None) -> Heartbeat:
    return Heartbeat(following, session, None)


def test_a_heartbeat_shows_that_the_last_frames_were_lost(path: Path) -> None:
    with recorder(path) as tape:
        record(tape, trade(1), trade(2))
        tape.announce(beat(3))
        assert not tape.has_pending
        tape.announce(beat(6))
        assert len(tape._announced) == 1
        commit(tape)
        with looking(path) as reader:
            assert reader.look(1, 2) == Look((3, 5), None)
            assert reader.holes(1, 0) == [(3, 5)]
            tape.announce(beat(4))  # an older one takes nothing back
            record(tape, trade(4))
            assert reader.holes(1, 0) == [(3, 3), (5, 5)]
    with recorder(path) as tape:
        tape.announce(beat(6))
        assert not tape.has_pending  # it was known


def test_heartbeats_alone_show_what_was_lost_before_the_first_frame(path: Path) -> None:
    with recorder(path) as tape:
        tape.announce(beat(1))
        assert not tape.has_pending  # nothing was published yet
        tape.announce(beat(4, session=7))
        commit(tape)
        with looking(path) as reader:
            assert reader.look(1, 0) == Look((1, 3), None)
        record(tape, trade(4, session=7), trade(2, session=7))
        with looking(path) as reader:
            assert reader.holes(1, 0) == [(1, 1), (3, 3)]
    assert sessions(path) == [(1, 7)]


def test_a_heartbeat_speaks_for_its_own_session(path: Path) -> None:
    with recorder(path) as tape:
        record(tape, trade(1, session=7), trade(1, session=8))
        tape.announce(beat(4, session=7))
        tape.announce(beat(3))
        commit(tape)
        with looking(path) as reader:
            assert reader.holes(1, 0) == [(2, 3)]
            assert reader.holes(2, 0) == [(2, 2)]
        tape.announce(beat(1, session=9))
        assert not tape.has_pending
        tape.announce(beat(3, session=9))  # an engine that began anew, and of which two frames are lost
        commit(tape)
        with looking(path) as reader:
            assert reader.holes(3, 0) == [(1, 2)]
            assert reader.look(2, 2) == Look(None, 3)


def test_keys_in_heartbeats_alone_open_no_session(path: Path) -> None:
    with recorder(path) as tape:
        record(tape, trade(1))
        tape.announce(beat(4, session=7))
        commit(tape)
        with looking(path) as reader:
            assert reader.holes(1, 0) == [(2, 3)]
    assert sessions(path) == [(1, None)]


# --- turns and memory ---


def test_a_commit_is_on_disk_when_it_is_told(path: Path) -> None:
    with recorder(path) as tape:
        assert tape._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert tape._db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL


def test_a_turn_is_one_commit_however_many_frames(path: Path) -> None:
    with recorder(path) as tape, contextlib.closing(sqlite3.connect(path)) as db:
        version = db.execute("PRAGMA data_version").fetchone()[0]
        for n in range(1, 1_001):
            tape.append(trade(n))
            assert db.execute("PRAGMA data_version").fetchone()[0] == version
        commit(tape)
        assert db.execute("PRAGMA data_version").fetchone()[0] == version + 1
        assert db.execute("SELECT count(*) FROM frames").fetchone()[0] == 1_000


def test_the_recording_time_is_that_of_the_turns_first_frame_not_of_the_last_turn(path: Path) -> None:
    clock = Clock()
    with recorder(path, now_us=clock) as tape:
        record(tape, trade(1))
        clock.now_us = 3_600_000_000
        tape.append_malformed([b"x"], "why")
        record(tape, trade(2))
        with looking(path) as reader:
            assert [at_us for _, at_us, _ in reader.frames(1, 1, 2, 9)] == [1_000, 3_600_000_000]
            assert reader.malformed(1)[0][1] == 3_600_000_000


def test_memory_and_disk_tell_the_same_whoever_reads_how_much(path: Path) -> None:
    with recorder(path, tail_events_max=10) as tape, looking(path) as disk, looking(path, tape) as memory:
        after = 0
        for first in range(1, 100, 6):
            record(tape, *[trade(n) for n in range(first, first + 6)])
            if first % 4 == 1:
                burst = memory.read(1, after, 5)
                assert burst == disk.read(1, after, 5)
                after = burst[-1].output_sequence
        assert numbers(follow(memory, 1, after)) == list(range(after + 1, 103))


def test_a_hole_filled_after_a_restart_hides_nothing_that_is_on_disk_above_it(path: Path) -> None:
    with recorder(path) as tape:
        record(tape, *[trade(n) for n in range(1, 10) if n != 3])
    with recorder(path) as tape, looking(path, tape) as reader:
        assert numbers(follow(reader, 1)) == [1, 2]
        record(tape, trade(3))
        assert numbers(follow(reader, 1, 2)) == [3, 4, 5, 6, 7, 8, 9]


def test_a_late_frame_of_an_older_session_hides_nothing_of_either(path: Path) -> None:
    with recorder(path) as tape, looking(path, tape) as reader:
        record(tape, trade(1, session=7), trade(2, session=7), trade(4, session=7))
        record(tape, trade(1, session=8), trade(3, session=7), trade(2, session=8), trade(5, session=7))
        assert numbers(follow(reader, 1)) == [1, 2, 3, 4, 5]
        record(tape, trade(3, session=8))
        record(tape, trade(7, session=7))
        assert numbers(follow(reader, 2)) == [1, 2, 3]
        assert numbers(follow(reader, 1, 2)) == [3, 4, 5]


def test_memory_is_bounded_while_nobody_reads(path: Path) -> None:
    with recorder(path, tail_events_max=10) as tape, looking(path, tape) as reader:
        for first in range(1, 200, 4):
            record(tape, *[trade(n) for n in range(first, first + 4)])
            assert len(tape.tail._events) <= 10
        record(tape, *[trade(n) for n in range(201, 251)])
        assert len(tape.tail._events) <= 10
        assert numbers(follow(reader, 1)) == list(range(1, 251))


def test_a_follower_in_the_process_is_woken_and_one_outside_sees_it_soon(path: Path) -> None:
    async def story(tape: Tape) -> None:
        with looking(path) as outside, looking(path, tape) as inside:
            await outside.moved(1.0)  # the first look is always new
            started = time.monotonic()
            await outside.moved(0.05)
            assert time.monotonic() - started >= 0.04
            for reader in (inside, outside):
                started = time.monotonic()
                waiting = asyncio.ensure_future(reader.moved(5.0))
                await asyncio.sleep(0.01)
                tape.append(trade(tape.recorded_total + 1))
                await tape.commit(tape.take_turn())
                await waiting
                assert time.monotonic() - started < 2.0

    with recorder(path) as tape:
        asyncio.run(story(tape))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_cut_into_turns_with_repeats_disorder_and_restarts_gives_the_same_tape(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("law") / "tape.db"
    count = data.draw(st.integers(1, 25))
    order = data.draw(st.permutations(range(1, count + 1)))
    order = order + data.draw(st.lists(st.sampled_from(order), max_size=10))
    ends = sorted(data.draw(st.sets(st.integers(1, len(order)), max_size=6)) | {len(order)})
    restarts = data.draw(st.sets(st.sampled_from(ends)))
    start, seen = 0, list[Event]()
    while start < len(order):
        with recorder(path, tail_events_max=data.draw(st.integers(1, 30))) as tape, looking(path, tape) as reader:
            for end in [end for end in ends if end > start]:
                record(tape, *[trade(n) for n in order[start:end]])
                start = end
                if data.draw(st.booleans()):
                    seen += follow(reader, 1, len(seen), data.draw(st.integers(1, 9)))
                if end in restarts:
                    break
            seen += follow(reader, 1, len(seen))
    assert seen == [trade(n) for n in range(1, count + 1)]
    assert held(path) == {1: list(range(1, count + 1))}


# --- other processes ---

READER = """
import sys, time
from pathlib import Path
from sidecar.tape import TapeReader
reader, after, end = TapeReader(Path(sys.argv[1])), 0, time.monotonic() + 30
while after < int(sys.argv[2]) and time.monotonic() < end:
    for event in reader.read(1, after, 64):
        assert event.output_sequence == after + 1
        after += 1
print(after)
"""


def program(source: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", source, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def test_readers_in_other_processes_follow_while_it_is_written(path: Path) -> None:
    with recorder(path) as tape:
        commit_first = [trade(1)]
        record(tape, *commit_first)
        readers = [program(READER, path, 2_001) for _ in range(2)]
        for first in range(2, 2_002, 20):
            record(tape, *[trade(n) for n in range(first, first + 20)])
        assert [reader.communicate(timeout=40)[0].strip() for reader in readers] == ["2001", "2001"]


def test_there_is_one_recorder_at_a_time_also_across_processes(path: Path) -> None:
    with recorder(path):
        with pytest.raises(TapeLockedError, match=f"process {os.getpid()}"):
            Tape(path, size_bytes_max=1)
        assert is_locked(path, "recorder")
        assert not is_locked(path, "settler")
        other = program(
            "import sys\nfrom pathlib import Path\nfrom sidecar.tape import Tape\n"
            "try: Tape(Path(sys.argv[1]), size_bytes_max=1)\nexcept Exception as error: print(type(error).__name__)",
            path,
        )
        assert other.communicate(timeout=30)[0].strip() == "TapeLockedError"
    assert not is_locked(path, "recorder")
    with recorder(path):
        pass


def test_a_look_at_the_lock_does_not_keep_a_recorder_from_it(path: Path) -> None:
    lock(path, "recorder").close()
    looker = program(
        "import sys, time\nfrom pathlib import Path\nimport fcntl\n"
        "held = open(sys.argv[1])\nfcntl.flock(held, fcntl.LOCK_SH)\nprint('held', flush=True)\ntime.sleep(0.05)",
        path.with_name("tape.db.recorder"),
    )
    assert looker.stdout is not None
    assert looker.stdout.readline().strip() == "held"
    with recorder(path):
        pass
    looker.communicate(timeout=10)


def test_a_settler_may_take_its_lock_before_there_is_a_tape(tmp_path: Path) -> None:
    lock(tmp_path / "not" / "yet" / "tape.db", "settler").close()
    with pytest.raises(TapeError, match="folder"):
        lock(Path("/proc/none/tape.db"), "settler")


WRITER = """
import asyncio, sys
from pathlib import Path
from sidecar.tape import Tape, TapeReader
from tests.streams import trade
tape = Tape(Path(sys.argv[1]), size_bytes_max=1 << 40)
async def write():
    n = max((runs.head for runs in (TapeReader(tape.path).runs(1),)), default=0)
    while True:
        for _ in range(1 + n % 17):
            n += 1
            tape.append(trade(n))
        await tape.commit(tape.take_turn())
        print(n, flush=True)
asyncio.run(write())
"""


def test_after_a_sigkill_every_event_that_was_handed_on_is_there(path: Path) -> None:
    sequences: list[int] = []
    for _ in range(4):
        writer = program(WRITER, path)
        assert writer.stdout is not None
        last = writer.stdout.readline()
        until = time.monotonic() + 0.25
        while time.monotonic() < until:
            last = writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        rest = writer.communicate()[0].splitlines()
        handed_on = int(rest[-1] if rest and rest[-1].isdigit() else last)
        sequences = held(path)[1]
        assert sequences == list(range(1, len(sequences) + 1))
        assert len(sequences) >= handed_on > 0
    with recorder(path) as tape, looking(path) as reader:
        following = len(sequences) + 1
        record(tape, trade(following), trade(1))
        assert tape.duplicates_total == 1
        assert numbers(follow(reader, 1, 0, 500)) == list(range(1, following + 1))


# --- malformed frames ---


def test_malformed_frames_are_kept_aside_with_their_bytes_and_counted(path: Path) -> None:
    with recorder(path) as tape:
        tape.append_malformed([b"topic", b"\xc1\0"], "no map")
        assert tape.pending_frames == 1  # they count for the bound on what waits
        commit(tape)
    with recorder(path) as tape:
        tape.append_malformed([b"t" * 100_000], "one frame")
        commit(tape)
        assert tape.malformed_total == 2
    with looking(path) as reader:
        newest, oldest = reader.malformed(10)
        assert oldest[2:] == ("no map", b"topic\0\xc1\0")
        assert newest[2] == "one frame"
        assert 4_096 <= len(newest[3]) <= 65_536
        assert reader.malformed_total == 2
        assert len(reader.malformed(1)) == 1


def test_no_more_than_a_bound_of_malformed_frames_is_kept_all_are_counted(path: Path) -> None:
    with recorder(path, malformed_kept_max=5) as tape:
        for n in range(12):
            tape.append_malformed([b"%d" % n], "why")
            if n % 4 == 3:
                commit(tape)
        with looking(path) as reader:
            assert [frames for _, _, _, frames in reader.malformed(99)] == [b"11", b"10", b"9", b"8", b"7"]
            assert reader.malformed_total == 12


# --- damage ---


def edit(path: Path, statement: str, *values: Any) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        assert db.execute(statement, values).rowcount == 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE frames SET payload = CAST(substr(payload, 1, 40) || x'00' || substr(payload, 42) AS BLOB)"
        " WHERE output_sequence = 5",
        "UPDATE frames SET checksum = checksum + 1 WHERE output_sequence = 5",
        "UPDATE frames SET output_sequence = 50 WHERE output_sequence = 5",
        "DELETE FROM frames WHERE output_sequence = 5",
        "UPDATE frames SET payload = (SELECT payload FROM frames WHERE output_sequence = 6) WHERE output_sequence = 5",
    ],
)
def test_a_damaged_frame_is_noticed_and_what_stands_before_it_is_read(path: Path, statement: str) -> None:
    with recorder(path) as tape:
        record(tape, *[trade(n) for n in range(1, 10)])
        edit(path, statement)
        with looking(path) as reader:
            assert numbers(reader.read(1, 0, 100)) == [1, 2, 3, 4]
            assert numbers(reader.read(1, 2, 100)) == [3, 4]
            for _ in range(2):
                with pytest.raises(TapeDamagedError) as raised:
                    reader.read(1, 4, 100)
                assert raised.value.sequence == 5
            assert numbers(reader.read(1, 5, 100)) == [6, 7, 8, 9]
            record(tape, trade(10))  # recording goes on
            assert numbers(reader.read(1, 9, 100)) == [10]


def test_damage_behind_a_hole_waits_for_its_turn(path: Path) -> None:
    with recorder(path) as tape:
        record(tape, trade(1), trade(3))
        edit(path, "UPDATE frames SET checksum = checksum + 1 WHERE output_sequence = 3")
        with looking(path) as reader:
            assert numbers(reader.read(1, 0, 100)) == [1]
            assert reader.read(1, 1, 100) == []
            assert reader.look(1, 1) == Look((2, 2), None)


def test_a_page_that_can_not_be_read_is_damage_of_the_frame_that_is_on_it(path: Path) -> None:
    with recorder(path) as tape:
        record(tape, *[trade(n) for n in range(1, 400)])
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(path.read_bytes())
    at = content.index(trade(200).payload) // 4_096 * 4_096
    content[at : at + 4_096] = b"\xff" * 4_096
    path.write_bytes(content)
    with looking(path) as reader:
        found = numbers(follow_until_damaged(reader))
        assert found == list(range(1, len(found) + 1))
        assert 100 < len(found) < 200


def follow_until_damaged(reader: TapeReader) -> list[Event]:
    found: list[Event] = []
    with pytest.raises(TapeDamagedError) as raised:  # noqa: PT012 - it may come at any frame
        while burst := reader.read(1, len(found), 64):
            found += burst
    assert raised.value.sequence == len(found) + 1
    return found


def test_a_frame_whose_bytes_became_something_else_is_damage(path: Path) -> None:
    with recorder(path) as tape:
        record(tape, trade(1), trade(2), trade(3))
    edit(path, "UPDATE frames SET payload = 'text' WHERE output_sequence = 2")
    with looking(path) as reader:
        assert numbers(reader.read(1, 0, 100)) == [1]
        with pytest.raises(TapeDamagedError) as raised:
            reader.read(1, 1, 100)
        assert raised.value.sequence == 2


def test_a_flipped_bit_in_a_page_s_head_never_makes_frames_that_are_there_look_as_if_none_came_yet(
    path: Path, seed: int
) -> None:
    """A range of the tree may then read as empty though each frame in it is found by its number."""
    chance = random.Random(seed)
    with recorder(path) as tape:
        record(tape, *(trade(number) for number in range(1, 401)))
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    sound = path.read_bytes()
    page_bytes = int.from_bytes(sound[16:18], "big")
    ends = Counter[str]()
    for _ in range(600):
        damaged = bytearray(sound)
        page = chance.randrange(1, len(sound) // page_bytes)
        damaged[page * page_bytes + chance.randrange(12)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        ends[_how_reading_ends(path, 400)] += 1
    print(ends)
    assert ends["damage told"] > 0
    assert not [end for end in ends if end.startswith("waits")]


def _how_reading_ends(path: Path, last: int) -> str:
    try:
        with looking(path) as reader:
            found = numbers(follow(reader, 1, events_max=64))
            assert found == list(range(1, len(found) + 1))
            if len(found) < last and reader.look(1, len(found)) == Look(None, None) and last in reader.runs(1):
                return f"waits after {len(found)} as if nothing had come yet"
    except TapeError:
        return "damage told"
    return "all read" if len(found) == last else "a hole told"


def test_a_repeat_of_a_damaged_frame_is_no_contradiction_by_the_engine(path: Path) -> None:
    with recorder(path) as tape:
        record(tape, trade(1), trade(2))
        edit(path, "UPDATE frames SET payload = x'c1' WHERE output_sequence = 2")
        record(tape, trade(2), trade(2, price=5), trade(3))
        assert tape.duplicates_total == 2
    with looking(path) as reader:
        assert [row.session for row in reader.sessions()] == [1]


# --- room ---


def test_a_full_tape_takes_nothing_loses_nothing_and_goes_on_when_there_is_room(path: Path) -> None:
    with recorder(path, size_bytes_max=200_000) as tape, looking(path, tape) as reader:
        n, turn = 0, tape.take_turn()
        with pytest.raises(TapeFullError, match=r"tape\.size_bytes_max is 200000"):  # noqa: PT012 - at any turn
            while True:
                for _ in range(100):
                    n += 1
                    tape.append(trade(n))
                turn = tape.take_turn()
                asyncio.run(tape.commit(turn))
        assert reader.used_bytes() > 200_000
        assert numbers(follow(reader, 1)) == list(range(1, n - 99))
        with pytest.raises(TapeFullError):
            asyncio.run(tape.commit(turn))
        tape.append(trade(n))  # a repeat of what is waiting
        tape.append(trade(n + 1))
        assert tape.duplicates_total == 1
        tape._size_bytes_max = 1 << 40
        asyncio.run(tape.commit(turn))
        commit(tape)
        assert numbers(follow(reader, 1, n - 100)) == list(range(n - 99, n + 2))
    assert held(path) == {1: list(range(1, n + 2))}


def test_deleting_what_is_durable_makes_room(path: Path) -> None:
    with recorder(path, size_bytes_max=200_000) as tape:
        n, turn = 0, tape.take_turn()
        with pytest.raises(TapeFullError):  # noqa: PT012 - at any turn
            while True:
                n += 1
                tape.append(trade(n))
                if n % 100 == 0:
                    turn = tape.take_turn()
                    asyncio.run(tape.commit(turn))
        assert asyncio.run(tape.prune(1, n - 200, 1 << 62)) == n - 200
        asyncio.run(tape.commit(turn))


def test_a_disk_that_is_full_is_a_full_tape_and_nothing_is_half(path: Path) -> None:
    with recorder(path) as tape:
        record(tape, trade(1))
        pages = tape._db.execute("PRAGMA page_count").fetchone()[0]
        tape._db.execute(f"PRAGMA max_page_count = {pages + 1}")  # SQLITE_FULL, as ENOSPC gives
        for n in range(2, 400):
            tape.append(trade(n))
        turn = tape.take_turn()
        with pytest.raises(TapeFullError, match="full"):
            asyncio.run(tape.commit(turn))
        assert held(path) == {1: [1]}
        tape._db.execute("PRAGMA max_page_count = 1000000")
        asyncio.run(tape.commit(turn))
    assert held(path) == {1: list(range(1, 400))}


# --- retention ---


def test_only_what_is_durable_and_old_is_deleted(path: Path) -> None:
    clock = Clock()
    with recorder(path, now_us=clock) as tape:
        record(tape, trade(1), trade(2), trade(3))
        clock.now_us = 2_000
        record(tape, trade(4), trade(6))
        assert asyncio.run(tape.prune(1, 3, 1_000)) == 0  # too young
        assert asyncio.run(tape.prune(9, 3, 9_999)) == 0  # no such session
        assert asyncio.run(tape.prune(1, 2, 9_999)) == 2
        assert held(path) == {1: [3, 4, 6]}
        assert asyncio.run(tape.prune(1, 6, 1_500)) == 1
        assert held(path) == {1: [4, 6]}
        with looking(path) as reader:
            assert reader.sessions()[0].pruned_to == 3
            assert reader.look(1, 0) == Look((1, 3), None)  # a settler that far back has lost its tape
            assert reader.read(1, 0, 9) == []
            assert numbers(reader.read(1, 3, 9)) == [4]
            assert reader.holes(1, 3) == [(5, 5)]
    with recorder(path) as tape:
        record(tape, trade(5))
    assert held(path) == {1: [4, 5, 6]}


def test_a_piece_of_retention_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape_module, "_PRUNE_ROWS", 10)
    with recorder(path) as tape:
        record(tape, *[trade(n) for n in range(1, 26)])
        assert [asyncio.run(tape.prune(1, 25, 1 << 60)) for _ in range(4)] == [10, 10, 5, 0]


# --- files ---


def test_no_tape_is_an_error_of_its_own_and_another_file_is_left_alone(path: Path) -> None:
    with pytest.raises(TapeMissingError):
        TapeReader(path)
    path.write_bytes(b"")
    with pytest.raises(TapeMissingError):
        TapeReader(path)
    path.write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(TapeDamagedError, match="can't be read: file is not a database"):
        TapeReader(path)  # whoever waited for it to become a tape would wait for ever, and say nothing
    with pytest.raises(TapeError, match=r"is tape\.path a writable file"):
        Tape(path, size_bytes_max=1)
    assert path.read_bytes().startswith(b"not a database")
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE mine (x)")
    with pytest.raises(TapeDamagedError, match="is no tape"):
        TapeReader(path)
    with pytest.raises(TapeError, match="is no tape"):
        Tape(path, size_bytes_max=1)
    assert not is_locked(path, "recorder")


@pytest.mark.parametrize("table", ["sessions", "runs", "meta"])
def test_what_is_damaged_beside_the_frames_is_told_by_reader_and_recorder(path: Path, table: str) -> None:
    with recorder(path) as tape:
        record(tape, trade(1))
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(f"DROP TABLE {table}")
    with pytest.raises(TapeError, match=rf"can't be read: no such table: {table}; restore it"):
        Tape(path, size_bytes_max=1)
    assert not is_locked(path, "recorder")
    with looking(path) as reader, pytest.raises(TapeDamagedError, match=f"no such table: {table}"):
        _ = (reader.sessions(), reader.runs(1), reader.tape_id)


def test_settled_is_replaced_as_a_whole(path: Path) -> None:
    assert read_settled(path) is None
    write_settled(path, {"durable": 1})
    reader = program(
        "import sys\nfrom pathlib import Path\nfrom sidecar.tape import read_settled\n"
        "seen = [read_settled(Path(sys.argv[1])) for _ in range(3000)]\n"
        "assert all(said and len(said['pad']) == said['durable'] % 5000 for said in seen[5:] if 'pad' in said)\n"
        "print(seen.count(None))",
        path,
    )
    n = 0
    while reader.poll() is None:
        n += 1
        write_settled(path, {"durable": n, "pad": "x" * (n % 5000)})
    assert reader.communicate()[0].strip() == "0"
    assert read_settled(path) == {"durable": n, "pad": "x" * (n % 5000)}
    assert [name.name for name in path.parent.iterdir()] == ["tape.db.settled"]
    with pytest.raises(OSError, match="too long"):
        write_settled(path.with_name("x" * 250), {})
    settled_path(path).unlink()
    settled_path(path).mkdir()
    with pytest.raises(OSError, match="directory"):
        write_settled(path, {"durable": 1})
    assert [name.name for name in path.parent.iterdir()] == ["tape.db.settled"], "no draft is left lying about"
    settled_path(path).rmdir()
    settled_path(path).write_text("[1")
    assert read_settled(path) is None
    settled_path(path).write_text(json.dumps([1]))
    assert read_settled(path) is None


def test_an_older_tape_is_upgraded_in_place_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The day the format changes: a transaction a step, the frames stay, readers wait, a failed step leaves nothing."""
    with recorder(path) as tape:
        record(tape, trade(1), trade(2))
    monkeypatch.setattr(tape_module, "FORMAT", 3)
    steps = {1: "ALTER TABLE meta ADD COLUMN note TEXT;", 2: "CREATE TABLE sessions (x);"}  # the second one fails
    monkeypatch.setattr(tape_module, "_UPGRADES", steps)
    with pytest.raises(TapeMissingError, match="has format 1: a start of the recorder makes 3 of it"):
        TapeReader(path)
    with pytest.raises(TapeError, match="table sessions already exists"):
        Tape(path, size_bytes_max=1 << 30)
    assert not is_locked(path, "recorder")
    steps[2] = "CREATE TABLE further (x);"
    Tape(path, size_bytes_max=1 << 30).close()
    with contextlib.closing(TapeReader(path)) as reader:
        assert [one.output_sequence for one in reader.read(1, 0, 9)] == [1, 2]
    monkeypatch.setattr(tape_module, "FORMAT", 1)
    for opened in (TapeReader, functools.partial(Tape, size_bytes_max=1 << 30)):
        with pytest.raises(TapeError, match="has format 3, of a newer release; this one reads up to 1"):
            opened(path)


def test_a_clock_that_was_set_back_does_not_keep_old_frames_for_ever(path: Path) -> None:
    now = [1_000_000_000]
    tape = Tape(path, size_bytes_max=1 << 30, now_us=lambda: now[0])

    async def story() -> None:
        for n in (1, 2, 3):
            tape.append(event(trade_fields(n)))
            await tape.commit(tape.take_turn())
            now[0] = 500_000_000 if n == 1 else now[0] + 1  # after the first one it is set back
        assert await tape.prune(1, 3, now[0] - 10) == 1
        now[0] += 20
        assert await tape.prune(1, 3, now[0] - 10) == 2

    asyncio.run(story())
    tape.close()


def test_what_was_deleted_is_a_hole_for_a_store_that_was_set_back(path: Path) -> None:
    tape = Tape(path, size_bytes_max=1 << 30, now_us=lambda: 100)

    async def story() -> None:
        for n in (1, 2, 3, 4, 7):
            tape.append(event(trade_fields(n)))
        await tape.commit(tape.take_turn())
        assert await tape.prune(1, 3, 101) == 3

    asyncio.run(story())
    with contextlib.closing(TapeReader(path)) as reader:
        assert reader.holes(1, 1) == [(2, 3), (5, 6)]
        assert reader.holes(1, 3) == [(5, 6)]
        assert reader.look(1, 1).hole == (2, 3)
    tape.close()
