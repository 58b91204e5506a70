"""The disk fails: cut off, damaged, full, not syncing. What was recorded is settled once, or settlement halts."""

from __future__ import annotations

import random
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from bench.world import Process, World, until
from tests.fault.kit import Fault, is_run_by, taped
from tests.fault.tools import SYNC_CALLS, SmallDisk, failing

USERS = ("--users", "50", "--wait-timeout-s", "20")


def _world(folder: Path, *settings: str, **other: Any) -> World:
    return World(folder, source="generated", settings=["pipeline.durable_after_s=0.3", *settings], **other)


def _again_from_1(world: World, count: int, *more: str, rate: float | None = None) -> Process:
    """Publish `count` events from the first on: to a tape that lost something it is the engine's past once more."""
    return world.engine("--count", str(count), *USERS, *more, rate=rate)


@pytest.mark.parametrize("settled_further", [False, True], ids=["settled-so-far", "settled-further"])
def test_f19_torn_tape_tail(tmp_path: Path, seed: int, fault: Fault, settled_further: bool) -> None:
    """Killed while recording; the end of the file's log is cut off, or overwritten, as a lying disk would leave it.
    Once what is lost was settled already, once not."""
    chance = random.Random(seed)
    wal = tmp_path / "tape.db-wal"
    with _world(tmp_path) as world:
        events = shorter = 0
        for life in range(4):
            record = world.start("record", log=f"record-{life}.log")
            settle = world.start("settle", log=f"settle-{life}.log") if settled_further else None
            engine = _again_from_1(world, events + 3_000, "--burst", str(events), rate=3_000)
            until(lambda: taped(world) > events + 200, "it records on", 30)  # noqa: B023 - asked at once
            if settle is not None:
                world.until_acked(events + 100)
                settle.kill()
            record.kill()
            engine.end()
            before = taped(world)
            _tear(wal, chance)
            fault.strike()
            after = taped(world)
            assert after <= before
            shorter += after < before
            events = before + 1_000
        assert shorter >= 2, "what was torn off must have mattered"
        fault.heals(world)
        run = world.start("run", log="run.log")
        _again_from_1(world, events).result()
        fault.closes(world, events)
        assert run.term() == 0


def _tear(wal: Path, chance: random.Random) -> None:
    """Cut off, or overwrite, what was written last, up to 200 KiB of it."""
    end = _newest_end(wal.read_bytes())
    at = max(end - chance.randint(1, 200_000), 32)
    with wal.open("r+b") as file:
        if chance.random() < 0.5:
            file.truncate(at)
        else:
            file.seek(at)
            file.write(chance.randbytes(end - at))


def _newest_end(wal: bytes) -> int:
    """Find where the newest frame of SQLite's log ends: behind it stand older ones, with other salts (fileformat2)."""
    page_bytes = int.from_bytes(wal[8:12], "big")
    at = 32
    while wal[at + 8 : at + 16] == wal[16:24]:
        at += 24 + page_bytes
    return min(at, len(wal))


def test_f20_flipped_bit(tmp_path: Path, seed: int, fault: Fault) -> None:
    """One bit of a frame that waits to be settled is flipped; later it is put right from a copy."""
    chance = random.Random(seed)
    tape, copy = tmp_path / "tape.db", tmp_path / "copy.db"
    with _world(tmp_path) as world:
        world.verb("pause", "--reason", "so that there is something to damage", status=0)
        run = world.start("run")
        _again_from_1(world, 2_000).result()
        until(lambda: taped(world) == 2_000, "all of it is recorded")
        assert run.term() == 0
        shutil.copyfile(tape, copy)
        sequence = chance.randrange(2, 2_000)
        _flip_in_frame(tape, sequence, chance)
        fault.strike()
        world.verb("resume", status=0)
        run = world.start("run", log="damaged.log")
        said = world.until_halted("it halts")
        assert (said["halted"]["code"], said["halted"]["sequence"]) == ("TAPE_DAMAGED", sequence)
        until(lambda: world.said().get("acked") == sequence - 1, "what stands before it is settled")
        _again_from_1(world, 3_000).result()
        until(lambda: taped(world) == 3_000, "recording goes on")
        assert world.status()["sessions"] == 1, "the damage is the tape's, not a new session of the engine"
        assert run.term() == 0
        verdict = world.judge("--up-to", str(sequence - 1))
        assert verdict["ok"], verdict
        shutil.copyfile(copy, tape)
        fault.heals(world)
        run = world.start("run", log="healed.log")
        _again_from_1(world, 3_000).result()
        fault.closes(world, 3_000)
        assert run.term() == 0


def _flip_in_frame(tape: Path, sequence: int, chance: random.Random) -> None:
    with sqlite3.connect(tape) as db:
        (payload,) = db.execute("SELECT payload FROM frames WHERE output_sequence = ?", (sequence,)).fetchone()
    db.close()
    content = bytearray(tape.read_bytes())
    at = content.index(payload) + chance.randrange(len(payload))
    content[at] ^= 1 << chance.randrange(8)
    tape.write_bytes(content)


@pytest.mark.parametrize("times", [6, pytest.param(60, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
def test_f20_bits_flipped_anywhere_in_the_file(tmp_path: Path, seed: int, fault: Fault, times: int) -> None:
    """Bits anywhere in the tape's file are flipped: settlement may halt or end, but settles no garbage."""
    chance = random.Random(seed)
    tape, copy = tmp_path / "tape.db", tmp_path / "copy.db"
    with _world(tmp_path) as world:
        record = world.start("record")
        _again_from_1(world, 1_500).result()
        until(lambda: taped(world) == 1_500, "all of it is recorded")
        assert record.term() == 0
        shutil.copyfile(tape, copy)
        size = copy.stat().st_size
        ends, acked = [], 1
        for life in range(times):
            _flip_anywhere(copy, tape, [chance.randrange(100 if life % 3 == 0 else size) for _ in range(3)], chance)
            fault.strike()
            settle = world.start("settle", log=f"settle-{life}.log")
            ends.append(_how_it_ends(world, settle, 1_500))
            if settle.running():
                settle.term()  # finishes what is under way
            acked = max(acked, int(world.status()["acked"]))
            if acked > 1:
                verdict = world.judge("--up-to", str(acked))
                assert verdict["ok"], (ends, verdict)
        print(f"ended: {ends}")
        shutil.copyfile(copy, tape)
        fault.heals(world)
        run = world.start("run")
        _again_from_1(world, 2_000).result()
        fault.closes(world, 2_000)
        assert run.term() == 0


_FORMAT = range(60, 64)  # SQLite's user_version: another number there is an older release's tape, not damage


def _flip_anywhere(copy: Path, tape: Path, places: list[int], chance: random.Random) -> None:
    content = bytearray(copy.read_bytes())
    for at in places:
        if at in _FORMAT:
            continue
        content[at] ^= 1 << chance.randrange(8)
    for name in (tape.name + "-wal", tape.name + "-shm"):
        tape.with_name(name).unlink(missing_ok=True)
    tape.write_bytes(content)


def _how_it_ends(world: World, settle: Process, last: int) -> str:
    """Wait until it has settled all, halted or ended: it must not stand there and say nothing."""

    def ended() -> str | None:
        said = world.said()
        if not settle.running():
            return "ended"
        if said.get("pid") != settle.pid:
            return None
        if said.get("halted"):
            return str(said["halted"]["code"])
        return "settled" if said.get("acked", 0) >= last else None

    return str(until(ended, f"it settles, halts or ends: {world.said()}", 20))


@pytest.mark.needs("mount")
def test_f21_full_disk(tmp_path: Path, fault: Fault) -> None:
    """The tape's disk gets full, is made larger, gets full again; killed and started there, and at last given room."""
    with SmallDisk(tmp_path / "small", 2_048) as disk, _world(tmp_path) as world:
        tape = "small/tape.db"
        run = world.start("run", tape=tape)
        until(lambda: is_run_by(world, run.pid, tape), "it runs")
        engine = world.engine("--linger-s", "30", "--users", "50", rate=4_000)
        until(lambda: run.logged("tape_full"), "the disk is full", 30)
        fault.strike()
        until(lambda: _all_taped_is_acked(world, tape), "what is on the tape is settled", 15)
        assert world.judge("--up-to", str(taped(world, tape)))["ok"]

        fault.heals(world, tape)
        disk.resize(8_192)
        fault.recovers(world, tape)  # without a restart, and without a hole: the engine and its socket held the rest
        until(lambda: run.logged("tape_has_room"), "it says that there is room")
        until(lambda: len(run.logged("tape_full")) == 2, "the disk is full again", 30)
        fault.strike()
        engine.signal(15)
        last = engine.result()["last_sequence"]
        run.kill()

        run = world.start("run", log="on-a-full-disk.log", tape=tape)
        until(lambda: not run.running() or world.status(tape)["settling"], "it starts there, or says why not", 10)
        assert run.running(), run.log.read_text()
        until(lambda: _all_taped_is_acked(world, tape), "what is on the tape is settled", 15)
        fault.heals(world, tape)
        disk.resize(65_536)
        _again_from_1(world, last + 500).result()
        fault.closes(world, last + 500, tape=tape)
        assert run.term() == 0
        assert world.status(tape)["holes"] == []


@pytest.mark.needs("mount")
def test_f21_full_disk_of_the_store(tmp_path: Path, fault: Fault) -> None:
    """The disk of the embedded store gets full while the tape's has room; then somebody tidies up."""
    small = tmp_path / "small"
    store = ["store.backend=sqlite", f"store.sqlite.path={small / 'settlement.db'}"]
    with (
        SmallDisk(small, 3_072) as disk,
        _world(tmp_path, store=store, judged=f"sqlite:{small / 'settlement.db'}") as world,
    ):
        run = world.start("run")
        _again_from_1(world, 1_000).result()
        world.until_acked(1_000)
        filler = disk.fill()
        fault.strike()
        _again_from_1(world, 12_000).result()
        until(lambda: taped(world) == 12_000, "recording goes on")
        until(lambda: run.logged("batch_outcome_unknown"), "the store has no room")
        stood = world.said()["acked"]
        assert stood < 12_000
        fault.heals(world)
        disk.resize(65_536)
        filler.unlink()
        fault.closes(world, 12_000)
        assert run.term() == 0


def _all_taped_is_acked(world: World, tape: str) -> bool:
    said = world.status(tape)
    return bool(said["acked"] >= said["taped"] > 0)


@pytest.mark.needs("strace")
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_f22_fsync_error(tmp_path: Path, seed: int, fault: Fault, error: str) -> None:
    """A sync of the tape fails, once: the process ends at once and never asks again, as the next answer would lie."""
    chance = random.Random(seed)
    syncs = tmp_path / "syncs.txt"
    with _world(tmp_path) as world:
        settle = world.start("settle")
        events = 0
        for life in range(3):
            events += 2_000
            under = failing(syncs, "fdatasync", error, chance.randint(5, 60))
            syncs.unlink(missing_ok=True)
            record = world.start("record", log=f"record-{life}.log", under=under)
            # Spread over seconds, so that a busy machine, whose turns are large, syncs often enough, too.
            engine = _again_from_1(world, events, "--burst", str(events - 2_000), rate=500)
            assert record.wait(30) == 1
            fault.strike()
            engine.end()
            assert "disk I/O error" in record.log.read_text()
            _no_sync_after_the_failed_one(until(lambda: _lines_once_quiet(syncs), "strace has written all", 10))
        fault.heals(world)
        record = world.start("record", log="record.log")
        _again_from_1(world, events).result()
        fault.closes(world, events)
        assert [settle.term(), record.term()] == [0, 0]


def _lines_once_quiet(log: Path) -> list[str] | None:
    lines = log.read_text().splitlines()
    return lines if any("exited with" in line for line in lines) else None


def _no_sync_after_the_failed_one(lines: list[str]) -> None:
    failed = next(number for number, line in enumerate(lines) if "(INJECTED)" in line)
    after = [line for line in lines[failed + 1 :] if any(f" {call}(" in line for call in SYNC_CALLS)]
    assert not after, f"synced again after {lines[failed]}: {after}"


@pytest.mark.needs("strace")
def test_f22_fsync_error_of_the_store(tmp_path: Path, seed: int, fault: Fault) -> None:
    """A sync of the embedded store's file fails: settlement stops or ends, and nothing that was not synced counts."""
    chance = random.Random(seed)
    with _world(tmp_path) as world:
        record = world.start("record")
        engine = _again_from_1(world, 6_000, rate=1_500)
        wal = tmp_path / "settlement.db-wal"
        for life in range(2):
            under = failing(tmp_path / "syncs.txt", "fdatasync", "EIO", chance.randint(8, 60))
            settle = world.start("settle", log=f"settle-{life}.log", under=under)
            how = until(lambda: _stands_still(world, settle), "it ends or halts", 30)  # noqa: B023 - asked at once
            assert how in {"ended", "STORE_REFUSED"}
            fault.strike()
            settle.kill()
        assert wal.exists()
        fault.heals(world)
        settle = world.start("settle")
        assert engine.result()["last_sequence"] == 6_000
        fault.closes(world, 6_000)
        assert [settle.term(), record.term()] == [0, 0]


def _stands_still(world: World, settle: Process) -> str | None:
    said = world.said()
    if not settle.running():
        return "ended"
    return str(said["halted"]["code"]) if said.get("pid") == settle.pid and said.get("halted") else None
