"""Releases in turn over one tape and one store: what is additive is let be, what is not known is refused and told.

There is one release so far. The older one is therefore this program as it stood in an early commit, which could settle
into Cassandra already; the newer one is played by what it would leave behind: columns and tables more, a decision of a
kind that is not known here, a tape of the next format.
"""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from bench.counts import lost_and_doubled
from bench.world import ENVIRONMENT, ROOT, World, until
from tests.fault.kit import is_run_by, taped
from tests.fault.tools import EARLY_COMMIT
from tests.stores import STORES, StoreUnderTest

SETTINGS = ["pipeline.durable_after_s=0.5"]
USERS = ("--users", "50")


def _changed(store: Path, *statements: str) -> None:
    with closing(sqlite3.connect(store, timeout=10)) as db, db:
        for statement in statements:
            db.execute(statement)


def _closes(world: World, last: int) -> None:
    """The store equals the journal, nothing is lost, nothing is there twice."""
    world.until_acked(last)
    verdict = world.judge()
    assert verdict["ok"], verdict
    assert lost_and_doubled(world.judged, last) == (0, 0)


def test_what_a_newer_release_has_added_to_the_tables_is_let_be(tmp_path: Path) -> None:
    """Columns and a table more, under load; settled, decided and proved as before. (Cassandra: F30.)"""
    store = tmp_path / "settlement.db"
    with World(tmp_path, source="generated", settings=SETTINGS) as world:
        run = world.start("run")
        engine = world.engine(*USERS, "--wrong-field", "900:quantity=abc", rate=1_000)
        world.until_acked(500)
        with closing(sqlite3.connect(store)) as db:
            tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        added = [f"ALTER TABLE {table} ADD COLUMN of_a_newer_release TEXT" for table in tables]
        _changed(store, *added, "CREATE TABLE newer (of_a_newer_release TEXT)")
        run.kill()
        run = world.start("run", log="again.log")
        until(lambda: is_run_by(world, run.pid), "it settles")
        engine.signal(signal.SIGTERM)
        last = int(engine.result()["last_sequence"])
        world.engine(*USERS, "--wrong-field", "900:quantity=abc", "--count", str(last)).result()
        world.until_acked(last)
        assert world.verb("schema", "apply", status=0) == {"created": []}
        assert world.verb("reconcile", status=0)["ok"]
        _changed(store, "UPDATE user_balances SET available = available + 1 WHERE user_id = 7 AND asset_id = 1")
        assert not world.verb("reconcile", "--full", status=1)["ok"]
        assert world.verb("reconcile", "--fix", "--all-findings", "--yes", status=0)["ok"]  # writes a decision
        _closes(world, last)
        assert run.term() == 0


@pytest.mark.long
def test_a_decision_of_a_newer_release_halts_and_recording_goes_on(tmp_path: Path) -> None:
    """Nobody here knows what it changes, so nothing is settled past it, or decided, until a release comes that does."""
    store = tmp_path / "settlement.db"
    with World(tmp_path, source="generated", settings=SETTINGS) as world:
        run = world.start("run")
        engine = world.engine(*USERS, rate=1_000)
        world.until_acked(500)
        _changed(
            store,
            "INSERT INTO stream_decisions SELECT stream, number + 1, 'netting', NULL, NULL, '{}', '', '', 0"
            " FROM stream_decisions WHERE stream = 'main' ORDER BY number DESC LIMIT 1",
        )
        said = until(lambda: (said := world.said()).get("halted") and said, "it halts")
        assert said["halted"]["code"] == "STORE_REFUSED"
        assert "is a 'netting', which this release does not know: a newer one made it" in said["halted"]["reason"]
        head = taped(world)
        until(lambda: taped(world) > head + 500, "recording goes on")
        refused = world.verb("gap", "accept", "1000000", "1000000", "--reason", "no", status=1)
        assert "'netting'" in refused["message"]
        assert "'netting'" in world.status()["store"]
        assert run.term() == 0
        _changed(store, "DELETE FROM stream_decisions WHERE kind = 'netting'")  # the release that knows it is not here
        run = world.start("run", log="again.log")
        until(lambda: is_run_by(world, run.pid), "it settles")
        engine.signal(signal.SIGTERM)
        last = int(engine.result()["last_sequence"])
        world.engine(*USERS, "--count", str(last)).result()
        _closes(world, last)
        assert run.term() == 0


def test_a_tape_of_a_newer_release_is_refused_and_not_touched(tmp_path: Path) -> None:
    """There is no way back over it: what to do is said, by either half."""
    tape = tmp_path / "tape.db"
    with World(tmp_path, source="generated", settings=SETTINGS) as world:
        run = world.start("run")
        world.engine(*USERS, "--count", "1000").result()
        world.until_acked(1_000)
        assert run.term() == 0
        _changed(tape, "PRAGMA user_version = 2")
        before = tape.read_bytes()
        for verb in ("run", "settle"):
            refused = world.start(verb, log=f"refused-{verb}.log")
            assert refused.wait(20) == 1
            text = refused.log.read_text()
            assert "has format 2, of a newer release; this one reads up to 1: start the newer release" in text
        assert tape.read_bytes() == before
        _changed(tape, "PRAGMA user_version = 1")
        run = world.start("run")
        world.engine(*USERS, "--count", "2000").result()
        _closes(world, 2_000)
        assert run.term() == 0


# --- a release that was ---------------------------------------------------------------------------------------------


@pytest.fixture
def earlier(tmp_path: Path) -> list[str]:
    """The program as it stood, unpacked out of the history; give what to start it under."""
    command = ["git", "-C", str(ROOT), "archive", EARLY_COMMIT, "sidecar"]
    packed = subprocess.run(command, capture_output=True, check=True)
    (tmp_path / "earlier").mkdir()
    subprocess.run(["tar", "-x", "-C", tmp_path / "earlier"], input=packed.stdout, check=True)
    under = ["env", f"PYTHONPATH={tmp_path / 'earlier'}"]
    asked = subprocess.run(
        [*under, sys.executable, "-c", "import sidecar; print(sidecar.__file__)"],
        check=True, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert asked.stdout.startswith(str(tmp_path)), "it is not the earlier one that would be started"
    return under


@pytest.mark.long
@pytest.mark.needs("history")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("under_test", STORES, indirect=True)
def test_an_earlier_release_is_taken_over_under_load_and_takes_over_again(
    tmp_path: Path, under_test: StoreUnderTest, earlier: list[str]
) -> None:
    """Settler and recorder are swapped in turn over one tape and its tables, there and back, twice."""
    with World(
        tmp_path, source="generated", settings=SETTINGS, store=under_test.settings, judged=under_test.judged
    ) as world:
        if under_test.node is not None:
            apply = [*earlier, sys.executable, "-m", "sidecar", "schema", "apply", *world.config()]
            subprocess.run(apply, check=True, env=ENVIRONMENT, cwd=tmp_path)
        running = {verb: world.start(verb, log=f"{verb}-0.log", under=earlier) for verb in ("record", "settle")}
        engine = world.engine(*USERS, "--pause-file", str(world.pause_file), rate=1_000)
        world.until_acked(1_000)
        under_test.prepare(world)  # by this release, while the earlier one settles
        for swap, (verb, under) in enumerate(
            [("settle", []), ("record", []), ("settle", earlier), ("record", earlier), ("settle", []), ("record", [])],
            1,
        ):
            acked = world.said()["acked"]
            if verb == "record":  # what is published while nobody listens is lost: nobody serves the past here
                world.pause_file.touch()
                until(lambda: _all_is_taped(world), "all that was published is on the tape")
            assert running[verb].term() == 0
            running[verb] = world.start(verb, log=f"{verb}-{swap}.log", under=under)
            world.pause_file.unlink(missing_ok=True)
            world.until_acked(acked + 1_000)
            assert world.said()["halted"] is None
        engine.signal(signal.SIGTERM)
        last = int(engine.result()["last_sequence"])
        _closes(world, last)
        assert world.verb("reconcile", "--full", status=0)["ok"]
        said = world.status()
        assert (said["sessions"], said["holes"], said["halted"]) == (1, [], None)
        assert [process.term() for process in running.values()] == [0, 0]


def _all_is_taped(world: World) -> bool:
    """Say whether the engine stands, and the tape has its last frame."""
    sent = world.pause_file.with_name(world.pause_file.name + ".paused")
    return sent.exists() and taped(world) >= int(sent.read_text())
