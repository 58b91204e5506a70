"""An older copy of the database is put back beside a newer tape: what the tape still has is settled again, and the rest
is named; from another host's tape it comes in late. SQLite, whose copy is a file; what is tested is above the store.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from bench.world import Process, World, until


def _at_2000_with_a_copy_at_800(world: World, run: Process, *, listeners: int = 1) -> Process:
    """Settle 800 events, copy the database at rest, settle up to 2,000."""
    heard = ["--wait-subscribers", str(listeners), "--session", "7"]
    world.engine("--count", "800", *heard).result()
    until(lambda: world.said().get("durable") == 800, "all of it is durable")
    assert run.term() == 0
    shutil.copy(world.folder / "settlement.db", world.folder / "copy.db")
    run = world.start("run")
    world.engine("--count", "2000", *heard).result()
    until(lambda: world.said().get("durable") == 2000, "all of it is durable")
    return run


def _restore(world: World) -> None:
    for name in ("settlement.db", "settlement.db-wal", "settlement.db-shm"):
        (world.folder / name).unlink(missing_ok=True)
    shutil.copy(world.folder / "copy.db", world.folder / "settlement.db")


def test_an_older_database_is_settled_again_from_the_tape(tmp_path: Path) -> None:
    with World(tmp_path, source="generated", settings=["pipeline.durable_after_s=0.5"]) as world:
        run = _at_2000_with_a_copy_at_800(world, world.start("run"))
        assert run.term() == 0
        _restore(world)
        run = world.start("run", log="restored.log")
        until(lambda: world.said().get("pid") == run.pid and world.said().get("acked") == 2000, "all is there again")
        older = run.logged("store_is_older")
        assert [(line["durable"], line["durable_was"]) for line in older] == [(800, 2000)]
        assert run.term() == 0
        verdict = world.judge()
        assert verdict["ok"], verdict


def test_what_the_tape_has_deleted_is_named_and_comes_in_late(tmp_path: Path) -> None:
    settings = ["pipeline.durable_after_s=0.5", "tape.retention_s=0"]
    with World(tmp_path, source="generated", settings=settings) as world:
        whole = world.start("record", "tape.retention_s=3600", tape="whole.db", log="whole.log")
        run = _at_2000_with_a_copy_at_800(world, world.start("run"), listeners=2)

        def pruned() -> Any:
            return world.verb("tape", "info")["sessions"][0]["pruned_to"] == 2000

        until(pruned, "the tape has deleted what is durable", 60)
        assert run.term() == 0
        _restore(world)
        run = world.start("run", log="restored.log")
        halted = world.until_halted("it halts")["halted"]
        assert (halted["code"], halted["sequence"]) == ("GAP", 801)
        assert "sequences 801 to 2000 were settled, durable and deleted from this tape" in halted["reason"]
        assert "sidecar gap accept 801 2000" in halted["next_step"]
        assert "sidecar backfill" in halted["next_step"]
        assert world.status()["holes"] == [[801, 2000]]
        world.verb("gap", "accept", "801", "2000", "--reason", "the database was restored", status=0)
        # The engine repeats itself from the first event on: by its session key what was deleted is known as repeated.
        world.engine("--count", "2100", "--wait-subscribers", "2", "--session", "7").result()
        world.until_acked(2100)
        until(lambda: world.verb("tape", "info", tape="whole.db")["sessions"][0]["head"] == 2100, "all is recorded")
        assert whole.term() == 0
        assert world.verb("backfill", str(tmp_path / "whole.db"), status=0)["posted"] == 1200
        until(lambda: world.said("tape.db.late").get("acked") == 1200, "all of it is settled late")
        assert run.term() == 0
        verdict = world.judge("--accepted-gaps", "801-2000", "--also-stream", "main/late")
        assert verdict["ok"], verdict
        origins = [str(n) for n in range(801, 2001)]
        late = world.judge("--stream", "main/late", "--also-stream", "main", "--origins", *origins)
        assert late["ok"], late
