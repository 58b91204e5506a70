"""Opening balances: a file of them becomes ledger events of a stream of their own, once, whatever happens meanwhile."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from bench.judge import open_store
from bench.world import ENVIRONMENT, World, until
from tests.stores import MOSTLY_SQLITE, StoreUnderTest

USERS = 3_000
STREAM = "main/import"


def _journal(world: World, rows: list[tuple[int, int, int]]) -> Path:
    """What the judge folds: the events that the rows stand for, made when the stream's genesis says."""
    with closing(open_store(world.judged)) as store:
        decisions = list(store.rows("stream_decisions", ("stream", "kind", "body")))
        body = next(body for stream, kind, body in decisions if (stream, kind) == (STREAM, "genesis"))
    created_at = json.loads(body)["base_us"] // 1_000
    path = world.folder / "import.jsonl"
    with path.open("w") as lines:
        for sequence, (user, asset, amount) in enumerate(sorted(rows), 1):
            event = {
                "output_sequence": sequence, "event_type": "ADJUSTMENT", "user_id": user, "asset": asset,
                "amount": amount, "related_id": 0, "created_at": created_at,
            }  # fmt: skip
            lines.write(json.dumps({"seq": sequence, "sent_us": 1, "event": event}) + "\n")
    return path


@pytest.mark.parametrize("under_test", MOSTLY_SQLITE, indirect=True)
def test_an_import_that_is_killed_and_repeated_is_there_once(
    tmp_path: Path, under_test: StoreUnderTest, seed: int
) -> None:
    chance = random.Random(seed)
    rows = [(user, asset, chance.randrange(-(10**9), 10**15)) for user in range(1, USERS + 1) for asset in (1, 2)]
    names = {1: "btc", 2: "usdt"}
    shuffled = chance.sample(rows, len(rows))
    file = tmp_path / "balances.csv"
    file.write_text("user_id,asset,amount\n" + "".join(f"{u},{names[a]},{n}\n" for u, a, n in shuffled))
    settings = ["pipeline.durable_after_s=0.5"]
    with World(
        tmp_path, source="generated", settings=settings, store=under_test.settings, judged=under_test.judged
    ) as world:
        under_test.prepare(world)
        dry = world.verb("import-balances", str(file), "--dry-run", status=0)
        assert (dry["rows"], dry["state"], dry["stream"]) == (2 * USERS, "not imported: dry run", STREAM)
        assert dry["sums"]["btc"] == sum(n for _, a, n in rows if a == 1)
        run = world.start("run")  # an engine's events are settled meanwhile
        world.engine("--count", "1000", "--users", "50").result()
        for _ in range(4):
            command = [sys.executable, "-m", "sidecar", "import-balances", str(file), *world.config()]
            with subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.DEVNULL) as verb:
                time.sleep(0.3 + chance.random() * 0.7)  # where it strikes is chance: no outcome hangs on it
                verb.kill()
        done = world.verb("import-balances", str(file), status=0)
        assert done["state"] in ("imported", "imported before")
        assert world.verb("import-balances", str(file), status=0)["state"] == "imported before"
        other = tmp_path / "other.csv"
        other.write_text("1,btc,5\n")
        refused = world.verb("import-balances", str(other), status=1)
        assert f"{STREAM} was made of another file: {2 * USERS} rows" in refused["message"]
        assert world.verb("import-balances", str(other), "--dry-run", status=1)["error"] == "DecisionRefusedError"

        world.until_acked(1000)
        one = world.verb("balance", "7", "btc", status=0)["balances"][0]
        assert one["streams"][STREAM]["available"] == next(n for u, a, n in rows if (u, a) == (7, 1))
        assert one["total"] == sum(row["available"] for row in one["streams"].values())
        proved = world.verb("reconcile", status=0)
        assert (proved["ok"], proved["streams"]) == (True, ["main", STREAM])
        assert run.term() == 0
        verdict = world.judge("--also-stream", STREAM)
        assert verdict["ok"], verdict
        verdict = world.judge("--stream", STREAM, "--also-stream", "main", "--journal", str(_journal(world, rows)))
        assert verdict["ok"], verdict
        assert verdict["balances_equal"] == 2 * USERS


def test_an_import_before_the_first_start_and_a_wrong_file(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        file = tmp_path / "balances.csv"
        file.write_text("7,btc,1.5\n")
        refused = world.verb("import-balances", str(file), status=1)
        assert refused["error"] == "OpeningRefusedError"
        assert "--decimals" in refused["message"]
        assert world.verb("balance", "7", status=1)["balances"] == []
        assert world.verb("import-balances", str(file), "--decimals", status=0)["sums"] == {
            "btc": 150_000_000, "eth": 0, "usdt": 0,
        }  # fmt: skip
        assert world.verb("balance", "7", "btc", status=0)["balances"][0]["total"] == 150_000_000
        assert world.status()["state"] == "idle"


def test_the_stream_that_goes_on_after_another_has_its_opening_balances_already(tmp_path: Path) -> None:
    with World(tmp_path, source="generated", settings=["pipeline.durable_after_s=0.5"]) as world:
        file = tmp_path / "balances.csv"
        file.write_text("7,btc,150\n")
        run = world.start("run")
        world.engine("--count", "500").result()
        world.until_acked(500)
        assert world.verb("import-balances", str(file), status=0)["state"] == "imported"
        begun_anew = ["--count", "300", "--seed", "9", "--no-deposits", "--first-trade-id", "900000"]
        world.engine(*begun_anew, journal=tmp_path / "other.jsonl").result()
        world.until_halted("it halts", "SESSION_CHANGED")
        world.verb("stream", "next", "second", status=0)
        until(lambda: world.said().get("stream") == "second", "it goes on")
        again = world.verb("import-balances", str(file), status=0)
        assert (again["stream"], again["state"]) == (STREAM, "imported before")
        assert run.term() == 0
