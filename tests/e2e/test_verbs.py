"""Every verb that looks or decides, on each store, as an operator calls it: the shapes of the contract, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.world import ENVIRONMENT, World, until
from tests.stores import STORES, StoreUnderTest


def _text(world: World, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "sidecar", *arguments, *world.config()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=world.folder)
    return done.returncode, done.stdout + done.stderr


def _events(world: World) -> list[dict[str, Any]]:
    return [json.loads(line)["event"] for line in world.journal.read_text().splitlines()]


@pytest.mark.parametrize("under_test", STORES, indirect=True)
def test_look_ups_and_decisions(tmp_path: Path, under_test: StoreUnderTest) -> None:
    settings = ["pipeline.durable_after_s=0.5"]
    with World(tmp_path, settings=settings, store=under_test.settings, judged=under_test.judged) as world:
        under_test.prepare(world)
        assert under_test.prepare(world) == {"created": []}
        assert "settled_trades_btc_usdt" in _text(world, "schema", "print")[1]
        assert world.status()["state"] == "idle"
        run = world.start("run")
        faults = ["--wrong-field", "500:quantity=abc", "--corrupt", "700", "--wrong-field", "800:base_asset=77"]
        world.engine("--count", "1000", *faults).result()

        said = world.until_halted("it halts")
        assert set(said) >= {
            "stream", "state", "halted", "session", "taped", "acked", "durable", "lag_events", "holes", "rejected",
            "malformed",
        }  # fmt: skip
        assert (said["halted"]["code"], said["halted"]["sequence"], said["state"]) == ("GAP", 700, "halted")
        status, text = _text(world, "status")
        assert status == 1
        assert "next step: " in text
        assert world.verb("gap", "accept", "699", "700", "--reason", "no", status=1)["error"] == "DecisionRefusedError"
        assert world.verb("gap", "accept", "700", "700", "--reason", "garbage", status=0)["kind"] == "gap"

        world.until_halted("it halts again", "UNKNOWN_SYMBOL")
        assert world.verb("reject", "800", "--reason", "no such asset", status=0)["kind"] == "reject"
        world.until_acked(1000)
        until(lambda: world.status()["state"] == "running", "it runs", 30)
        rejected = world.verb("rejected", "list", status=0)["rejected"]
        assert [(row["output_sequence"], row["code"]) for row in rejected] == [(500, "BAD_FIELD"), (800, "OPERATOR")]
        assert world.verb("rejected", "show", "500", status=0)["decoded"]["quantity"] == "abc"
        assert _text(world, "rejected", "show", "501")[0] == 1
        gap = world.verb("gap", "list", status=0)["accepted"][0]
        assert (gap["first"], gap["last"], gap["reason"]) == (700, 700, "garbage")

        event = next(event for event in reversed(_events(world)) if "trade_id" in event)
        symbol = {1: "btc_usdt", 3: "eth_usdt"}[event["base_asset"]]
        found = world.verb("trade", symbol, str(event["trade_id"]), status=0)
        assert found["rows"][0]["output_sequence"] == event["output_sequence"]
        assert found["rows"][0]["quantity"] == event["quantity"]
        assert _text(world, "trade", symbol, "1")[0] == 1
        assert _text(world, "trade", "doge_usdt", "1")[0] == 2

        user = str(event["buyer_user_id"])
        balances = world.verb("balance", user, status=0)
        assert balances["user_id"] == int(user)
        one = world.verb("balance", user, "usdt", status=0)["balances"]
        assert one == [each for each in balances["balances"] if each["asset_id"] == 2]
        assert one[0]["total"] == one[0]["streams"]["main"]["available"]
        assert world.verb("balance", user, "2", status=0)["balances"] == one
        whole, point, decimals = _text(world, "balance", user, "usdt")[1].split()[8].partition(".")
        assert (point, len(decimals), int(whole + decimals)) == (".", 8, one[0]["total"])
        assert _text(world, "balance", "999999999")[0] == 1
        assert _text(world, "balance", user, "doge")[0] == 2

        assert world.verb("tape", "info", status=0)["sessions"][0]["head"] == 1000
        status, dump = _text(world, "tape", "dump", "--from", "500", "--to", "500")
        assert (status, json.loads(dump)["event"]["quantity"]) == (0, "abc")
        assert len(_text(world, "tape", "dump", "--malformed")[1].splitlines()) == 1
        assert run.term() == 0
        assert (world.status()["state"], world.status()["acked"]) == ("idle", 1000)
        verdict = world.judge("--accepted-gaps", "700-700", "--rejected", "800:OPERATOR")
        assert verdict["ok"], verdict
