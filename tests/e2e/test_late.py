"""Late truths: what was given up or rejected comes in after all, exactly once, however often it is said or interrupted.

Real engine and sidecar processes; verbs are killed in the middle. Judged by bench/judge.py, which folds the late stream
from the engine's journal, too.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from bench.world import ENVIRONMENT, World, until
from tests.stores import MOSTLY_SQLITE, StoreUnderTest

SETTINGS = ["pipeline.durable_after_s=0.5"]


def _entries(world: World) -> dict[int, dict[str, Any]]:
    lines = map(json.loads, world.journal.read_text().splitlines())
    return {line["seq"]: line["event"] for line in lines}


def _archive(world: World, sequences: list[int], name: str = "archive.jsonl") -> Path:
    path, events = world.folder / name, _entries(world)
    path.write_text("".join(json.dumps({"event": events[sequence]}) + "\n" for sequence in sequences))
    return path


def _until_late(world: World, number: int, stream: str = "main/late") -> None:
    def there() -> bool:
        said = world.said("tape.db.late")
        return said.get("stream") == stream and said.get("acked", 0) >= number

    until(there, f"{stream} {number}: {world.said('tape.db.late')}", 30)


@pytest.mark.parametrize("under_test", MOSTLY_SQLITE, indirect=True)
def test_a_gap_found_in_an_archive_and_rejected_events_made_valid(tmp_path: Path, under_test: StoreUnderTest) -> None:
    with World(
        tmp_path, source="generated", settings=SETTINGS, store=under_test.settings, judged=under_test.judged
    ) as world:
        under_test.prepare(world)
        run = world.start("run")
        withheld = [word for n in range(700, 711) for word in ("--withhold", str(n))]
        world.engine("--count", "1000", "--wrong-field", "500:quantity=abc", *withheld).result()
        world.until_halted("it halts", "GAP")
        archive = _archive(world, [*range(650, 720)])
        early = world.verb("backfill", str(archive), status=1)
        assert (early["posted"], early["open_holes"]) == (0, [[700, 710]])
        assert "sequence 700" in world.verb("rejected", "resubmit", "700", status=1)["message"]
        world.verb("gap", "accept", "700", "710", "--reason", "lost", status=0)
        world.until_acked(1000)

        # The gap: what the archive has of it, whoever says it how often.
        said = world.verb("backfill", str(archive), status=0)
        assert (said["posted"], said["posted_before"], said["refused"], said["not_in_a_gap"]) == (11, 0, [], 59)
        _until_late(world, 11)
        for _ in range(2):
            said = world.verb("backfill", str(archive), status=0)
            assert (said["posted"], said["posted_before"]) == (0, 11)

        # The rejected one: as it was it can't be settled; corrected it can, once. Its trade id is lower than those.
        refused = world.verb("rejected", "resubmit", "500", status=1)
        assert "still BAD_FIELD: quantity='abc'" in refused["message"]
        corrected = tmp_path / "corrected.json"
        corrected.write_text(json.dumps(_entries(world)[500] | {"quantity": 77}))
        posted = world.verb("rejected", "resubmit", "500", "--with", str(corrected), status=0)
        assert (posted["late_stream"], posted["late_sequence"], posted["state"]) == ("main/late", 12, "posted")
        _until_late(world, 12)
        again = world.verb("rejected", "resubmit", "500", "--with", str(corrected), status=0)
        assert (again["late_sequence"], again["state"]) == (12, "posted before, as main/late 12")
        assert world.verb("rejected", "show", "500")["resolution"] == "resubmitted as main/late 12"
        event = _entries(world)[705]
        symbol = {1: "btc_usdt", 3: "eth_usdt"}[event["base_asset"]]
        rows = world.verb("trade", symbol, str(event["trade_id"]), status=0)["rows"]
        assert [(row["stream"], row["output_sequence"], row["origin_sequence"]) for row in rows] == [
            ("main/late", 6, 705)
        ]
        status = world.status()
        (late,) = status["late"]
        assert late | {"durable": 0} == {
            "stream": "main/late", "taped": 12, "state": "running", "halted": None, "acked": 12, "durable": 0,
            "lag_events": 0,
        }  # fmt: skip
        assert (status["stream"], status["acked"]) == ("main", 1000)
        balances = world.verb("balance", str(event["buyer_user_id"]), status=0)["balances"]
        assert all(one["total"] == sum(row["available"] for row in one["streams"].values()) for one in balances)
        assert any("main/late" in one["streams"] for one in balances)
        proved = world.verb("reconcile", status=0)
        assert (proved["ok"], proved["streams"]) == (True, ["main", "main/late"])
        assert run.term() == 0
        verdict = world.judge("--accepted-gaps", "700-710", "--also-stream", "main/late")
        assert verdict["ok"], verdict
        fixed = tmp_path / "fixed.jsonl"
        fixed.write_text(corrected.read_text().replace("\n", "") + "\n")
        origins = [str(n) for n in (*range(700, 711), 500)]
        late = world.judge(
            "--stream", "main/late", "--also-stream", "main", "--origins", *origins, "--corrected", str(fixed)
        )
        assert late["ok"], late
        assert late["events"] == 12


def test_a_backfill_that_is_killed_again_and_again_posts_everything_once(tmp_path: Path, seed: int) -> None:
    """SIGKILL at any instruction of the verb, and of the sidecar that settles what it has posted."""
    chance = random.Random(seed)
    with World(tmp_path, source="generated", settings=SETTINGS) as world:
        run = world.start("run")
        withheld = [word for n in range(1_000, 3_600) for word in ("--withhold", str(n))]
        world.engine("--count", "4000", *withheld).result()
        world.until_halted("it halts", "GAP")
        world.verb("gap", "accept", "1000", "3599", "--reason", "lost", status=0)
        world.until_acked(4000)
        archive = _archive(world, list(range(1_000, 3_600)))
        kills = posted = 0
        while kills < 6 or posted < 2_600:
            command = [sys.executable, "-m", "sidecar", "backfill", str(archive), *world.config(), "--json"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT, cwd=tmp_path) as verb:
                if kills < 6:
                    time.sleep(0.3 + chance.random() * 0.5)  # where it strikes is chance: no outcome hangs on it
                    verb.kill()
                    kills += 1
                    if chance.random() < 0.5:
                        run.kill()
                        run = world.start("run")
                else:
                    assert verb.wait() == 0
            posted = _posted(tmp_path)
        _until_late(world, 2_600)
        assert run.term() == 0
        verdict = world.judge("--accepted-gaps", "1000-3599", "--also-stream", "main/late")
        assert verdict["ok"], verdict
        origins = [str(n) for n in range(1_000, 3_600)]
        late_verdict = world.judge("--stream", "main/late", "--also-stream", "main", "--origins", *origins)
        assert late_verdict["ok"], late_verdict
        assert late_verdict["events"] == 2_600


def _posted(folder: Path) -> int:
    if not (folder / "tape.db.late").exists():
        return 0
    with closing(sqlite3.connect(folder / "tape.db.late", timeout=5)) as db:
        try:
            return int(db.execute("SELECT count(*) FROM origins").fetchone()[0])
        except sqlite3.OperationalError:  # it is being made
            return 0


def test_the_tape_of_another_host_fills_gaps_and_another_late_tape_numbers_nothing(tmp_path: Path) -> None:
    with World(tmp_path, source="generated", settings=SETTINGS) as world:
        whole = world.start("record", tape="whole.db", log="whole.log")  # heard everything, settles nothing
        world.engine("--count", "2000").result()
        until(lambda: world.verb("tape", "info", tape="whole.db")["sessions"][0]["head"] == 2_000, "all is recorded")
        assert whole.term() == 0
        run = world.start("run")
        journal = tmp_path / "again.jsonl"
        withheld = [word for n in (100, *range(500, 520)) for word in ("--withhold", str(n))]
        world.engine("--count", "2000", *withheld, journal=journal).result()
        world.until_halted("it halts", "GAP")
        for gap in ("100", "100"), ("500", "519"):
            world.verb("gap", "accept", *gap, "--reason", "lost", status=0)
        world.until_acked(2000)
        until(lambda: world.said().get("durable") == 2_000, "all is durable")
        # Another engine's tape is known by what is settled, and nothing of it is posted.
        strange = world.start("record", tape="strange.db", log="strange.log")
        run.signal(signal.SIGSTOP)
        world.engine("--count", "600", "--seed", "99", journal=tmp_path / "strange.jsonl").result()
        until(lambda: world.verb("tape", "info", tape="strange.db")["sessions"][0]["head"] == 600, "it is recorded")
        assert strange.term() == 0
        run.kill()
        refused = world.verb("backfill", str(tmp_path / "strange.db"), status=1)
        assert "another stream's events, nothing was posted" in refused["message"]
        run = world.start("run")
        said = world.verb("backfill", str(tmp_path / "whole.db"), status=0)
        assert (said["posted"], said["refused"]) == (21, [])
        _until_late(world, 21)

        # From another host's configuration: the late tape is not there, and it says where it is.
        elsewhere = world.verb("backfill", str(tmp_path / "whole.db"), tape="other.db", status=1)
        assert f"{tmp_path / 'tape.db.late'} of host" in elsewhere["message"]
        assert "--lost-late-tape" in elsewhere["message"]
        # The late tape is lost for good: its stream is closed, what it had settled is known.
        assert run.term() == 0
        shutil.move(tmp_path / "tape.db.late", tmp_path / "found-again")
        run = world.start("run")
        world.verb("backfill", str(tmp_path / "whole.db"), status=1)
        said = world.verb("backfill", str(tmp_path / "whole.db"), "--lost-late-tape", status=0)
        assert (said["late_stream"], said["posted"], said["posted_before"]) == ("main/late2", 0, 21)
        assert run.term() == 0
        verdict = world.judge("--accepted-gaps", "100", "500-519", "--also-stream", "main/late")
        assert verdict["ok"], verdict
        origins = [str(n) for n in (100, *range(500, 520))]
        late = world.judge("--stream", "main/late", "--also-stream", "main", "--origins", *origins)
        assert late["ok"], late
        # It turns up again: it is never continued.
        (tmp_path / "tape.db.late").unlink()
        shutil.move(tmp_path / "found-again", tmp_path / "tape.db.late")
        run = world.start("run")
        halted = until(lambda: (s := world.status()["late"]) and s[0]["halted"], "the late stream halts")
        assert halted["code"] == "DECISION_CONFLICT"
        assert run.term() == 0


@pytest.mark.parametrize(
    "line, fault",
    [
        ("nonsense", "line 2: not JSON"),
        ("[1]", "line 2: '[1]'; a JSON object is wanted"),
        ('{"payload_hex": "zz"}', "line 2: payload_hex is not text of hexadecimal digits"),
        ('{"trade_id": 1}', "line 2: no output_sequence"),
        ('{"next_sequence": 7}', "line 2: a heartbeat"),
    ],
)
def test_an_archive_with_a_line_that_is_no_event_is_refused_whole(tmp_path: Path, line: str, fault: str) -> None:
    with World(tmp_path, source="generated", settings=SETTINGS) as world:
        archive = tmp_path / "archive.jsonl"
        run = world.start("run")
        world.engine("--count", "20").result()
        world.until_acked(20)
        assert run.term() == 0
        archive.write_text(_archive(world, [5]).read_text() + line + "\n")
        refused = world.verb("backfill", str(archive), status=2)
        assert fault in refused["message"], refused
        assert not (tmp_path / "tape.db.late").exists()
