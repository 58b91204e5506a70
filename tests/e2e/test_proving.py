"""reconcile, audit and statement as an operator calls them, beside a sidecar that settles; judged by the journal."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import random
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import sidecar
from bench.world import ENVIRONMENT, World, until
from sidecar.proof.reconcile import Pace, Progress, Proof, Report
from sidecar.proof.statement import Span, state
from sidecar.proof.work import Work
from tests.stores import MOSTLY_SQLITE, StoreUnderTest

USERS = 50
Lines = dict[tuple[int, int], list[tuple[int, int]]]  # (user, asset): sequence, delta


def _text(world: World, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "sidecar", *arguments, *world.config()]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        cwd=world.folder,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout + done.stderr


def folded(journal: Path) -> Lines:
    """Fold the engine's journal: what touched each account, in order (no fees, no rejected events in this source)."""
    lines: Lines = {}
    for text in journal.read_text().splitlines():
        event = json.loads(text)["event"]
        sequence = event["output_sequence"]
        if "event_type" in event:
            amount = -event["amount"] if event["event_type"] == "WITHDRAWAL" else event["amount"]
            asset = event["asset"] if "asset" in event else event["currency"]
            lines.setdefault((event["user_id"], asset), []).append((sequence, amount))
            continue
        buyer, seller, base, quote = (
            event["buyer_user_id"], event["seller_user_id"], event["base_asset"], event["quote_asset"],
        )  # fmt: skip
        money = event["price"] * event["quantity"] // 10**2
        deltas: dict[tuple[int, int], int] = {}
        for key, delta in (
            ((buyer, base), event["quantity"]), ((buyer, quote), -money),
            ((seller, base), -event["quantity"]), ((seller, quote), money),
        ):  # fmt: skip
            deltas[key] = deltas.get(key, 0) + delta
        for key, delta in deltas.items():
            lines.setdefault(key, []).append((sequence, delta))
    return lines


async def _statements(world: World, lines: Lines, seed: int) -> None:
    config = sidecar.load(world.toml, world.settings)
    users = sorted({user for user, _ in lines})
    async with sidecar.open_store(config) as store:
        for user in random.Random(seed).sample(users, min(USERS, len(users))):
            made = await state(store, user, None, Span(), pace=Pace(), progress=Progress(), wait_s=5.0)
            assert {account.asset_id for account in made.accounts} == {asset for who, asset in lines if who == user}
            for account in made.accounts:
                entries = list(made.entries(account, Span()))
                wanted = lines[user, account.asset_id]
                assert [(entry.sequence, entry.delta) for entry in entries] == wanted, (user, account.asset_id)
                assert entries[-1].balance == sum(delta for _, delta in wanted)
                assert account.agrees
            made.close()


@pytest.mark.parametrize("under_test", MOSTLY_SQLITE, indirect=True)
def test_the_ledger_is_proved_beside_settlement(tmp_path: Path, under_test: StoreUnderTest, seed: int) -> None:
    settings = ["pipeline.durable_after_s=0.5", "reconcile.interval_s=0.5", "reconcile.rate_rows_s=0"]
    with World(
        tmp_path, source="binance", settings=settings, store=under_test.settings, judged=under_test.judged
    ) as world:
        under_test.prepare(world)
        assert world.verb("reconcile", status=0)["accounts"] == 0
        run = world.start("run")
        engine = world.engine("--count", "4000", rate=1_000)
        until(lambda: world.said().get("acked", 0) > 500, "it settles", 30)
        for more in ((), ("--full",), ("--rate", "100000")):
            said = world.verb("reconcile", *more, status=0)
            assert set(said) >= {"ok", "streams", "accounts", "events", "up_to", "findings"}
            assert (said["ok"], said["findings"], said["not_checked"]) == (True, [], [])
        sent = 4_000
        engine.result()
        world.until_acked(sent)

        lines = folded(world.journal)
        said = until(lambda: (s := world.verb("reconcile", status=0))["up_to"] == {"main": sent} and s, "all of it", 30)
        assert (said["events"], said["accounts"]) == (sent, len(lines))
        audited = world.verb("audit", "--out", str(tmp_path / "audit.json"), status=0)
        assert audited["streams"]["main"]["sequences"] == sent
        assert json.loads((tmp_path / "audit.json").read_text()) == audited
        assert _text(world, "audit", "--out", str(tmp_path / "audit.json"))[0] == 2
        asyncio.run(_statements(world, lines, seed))
        _one_statement_in_every_form(world, lines)
        _usage(world)

        until(lambda: run.logged("reconciled"), "it proves by itself", 30)
        assert run.logged("reconciled_with_findings") == []
        assert run.logged("reconcile_failed") == []
        assert run.term() == 0


def _one_statement_in_every_form(world: World, lines: Lines) -> None:
    (user, asset), wanted = max(lines.items(), key=lambda item: len(item[1]))
    said = world.verb("statement", str(user), str(asset), status=0)
    (account,) = said["accounts"]
    assert said["ok"]
    assert [(entry["sequence"], entry["delta"]) for entry in account["entries"]] == wanted
    assert account["closing"] == account["stored"] == sum(delta for _, delta in wanted)
    middle = wanted[len(wanted) // 2][0]
    status, text = _text(world, "statement", str(user), str(asset), "--from", str(middle), "--csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert status == 0
    assert [(int(row["sequence"]), int(row["delta"])) for row in rows] == [line for line in wanted if line[0] >= middle]
    status, text = _text(world, "statement", str(user), str(asset), "--to", str(middle))
    assert status == 0
    assert f"all {len(wanted)} events end at the stored balance" in text
    assert _text(world, "statement", "999999999")[0] == 1


def _usage(world: World) -> None:
    status, text = _text(world, "reconcile", "--explain", "update_missing")
    assert status == 0
    assert "next step" in text
    assert _text(world, "reconcile", "--explain", "NO_SUCH")[0] == 2
    assert _text(world, "reconcile", "--fix")[0] == 2
    assert _text(world, "reconcile", "--fix", "1")[0] == 2
    assert _text(world, "reconcile", "--fix", "--all-findings", "--run", "x")[0] == 2
    assert _text(world, "reconcile", "--fix", "--all-findings")[1].strip() == "there is nothing to mend"
    assert _text(world, "statement", "1", "--from", "yesterday")[0] == 2
    assert world.verb("reconcile", "--user", "1", status=0)["user_id"] == 1


@pytest.mark.parametrize("under_test", MOSTLY_SQLITE, indirect=True)
def test_a_wrong_row_is_mended_while_trades_go_on(tmp_path: Path, under_test: StoreUnderTest) -> None:
    """The settler is killed in between and takes the wrong row for true; nothing is lost of what comes after."""
    settings = ["pipeline.durable_after_s=1", "reconcile.interval_s=0"]
    with World(
        tmp_path, source="binance", settings=settings, store=under_test.settings, judged=under_test.judged
    ) as world:
        under_test.prepare(world)
        world.start("record")
        run = world.start("settle")
        engine = world.engine("--count", "6000", rate=600)
        until(lambda: world.said().get("acked", 0) > 1_500, "it settles", 30)
        _spoil(world, under_test)
        run.kill()
        run = world.start("settle")
        until(lambda: world.said().get("acked", 0) > 2_000, "it settles on", 30)
        said = until(lambda: (s := world.verb("reconcile", "--full")) and s["findings"] and s, "it is found", 60)
        assert {each["user_id"] for each in said["findings"]} == {_victim(world)[0]}
        assert _text(world, "reconcile", "--fix", "--all-findings")[0] == 2  # without --yes nobody is asked here
        fixed = world.verb("reconcile", "--fix", "--all-findings", "--yes", status=0)
        assert {each["number"] for each in fixed["fixed"]} == {each["number"] for each in said["findings"]}
        assert all(each["after"]["version"] > 0 for each in fixed["fixed"])
        engine.result()
        world.until_acked(6_000)
        assert world.verb("reconcile", status=0)["ok"]
        assert world.verb("reconcile", "--full", status=0)["ok"]
        assert world.verb("audit", status=0)["ok"]
        assert world.judge()["ok"]
        assert run.term() == 0


def test_a_changed_deposit_is_not_taken_for_a_changed_balance_while_the_tape_has_it(tmp_path: Path) -> None:
    settings = ["pipeline.durable_after_s=0.2", "reconcile.interval_s=0"]
    with World(tmp_path, source="binance", settings=settings) as world:
        run = world.start("run")
        world.engine("--count", "600").result()
        world.until_acked(600)
        assert run.term() == 0
        deposits = [event for event in _events(world) if "event_type" in event]
        victim, other = deposits[0], next(event for event in deposits if event["user_id"] != deposits[0]["user_id"])
        where = f"WHERE stream = 'main' AND output_sequence = {victim['output_sequence']}"
        _change(world, f"UPDATE ledger_events SET amount = amount + 1000 {where}")
        account = f"user_id = {other['user_id']} AND asset_id = {other['asset']}"
        _change(world, f"UPDATE user_balances SET available = available + 7 WHERE {account}")
        changed = ("EVENT_DIFFERS", victim["user_id"], victim["asset"], victim["output_sequence"])
        balance = ("BALANCE_DIFFERS", other["user_id"], other["asset"], _last_sequence(world, other))

        said = world.verb("reconcile", "--full", status=1)["findings"]
        assert {each["code"]: each["fixable"] for each in said} == {"EVENT_DIFFERS": False, "BALANCE_DIFFERS": True}
        tape = tmp_path / "tape.db"
        for full in (True, False):  # what the full proof has found the next one still knows
            assert _found(world, tape, full=full) == {changed, balance}
        # The tables alone can't tell.
        taken_for = ("BALANCE_DIFFERS", victim["user_id"], victim["asset"], _last_sequence(world, victim))
        assert _found(world, tmp_path / "none.db", full=True) == {taken_for, balance}
        told = json.loads((settled := tmp_path / "tape.db.settled").read_text())
        for another in ({"foreign_to": 600}, {"tape_id": 1}, {"stream": "other"}):  # nor does another stream's tape
            settled.write_text(json.dumps(told | another))
            assert _found(world, tape, full=True) == {taken_for, balance}, another
        settled.write_text(json.dumps(told))
        _change(world, f"UPDATE ledger_events SET amount = amount - 1000 {where}")
        assert _found(world, tape, full=True) == {balance}


def _found(world: World, tape_path: Path, *, full: bool) -> set[tuple[str, int | None, int | None, int | None]]:
    async def prove() -> Report:
        async with sidecar.open_store(sidecar.load(world.toml, world.settings)) as store:
            work = Work(world.folder / "work")
            proof = Proof(store=store, work=work, pace=Pace(), wait_s=5.0, tape_path=tape_path)
            try:
                return await proof.run(full=full)
            finally:
                proof.close()
                work.close()

    return {(each.code, each.user_id, each.asset_id, each.sequence) for each in asyncio.run(prove()).findings}


def _events(world: World) -> list[dict[str, Any]]:
    return [json.loads(line)["event"] for line in world.journal.read_text().splitlines()]


def _last_sequence(world: World, event: dict[str, Any]) -> int:
    where = f"user_id = {event['user_id']} AND asset_id = {event['asset']}"
    with closing(sqlite3.connect(world.folder / "settlement.db")) as db:
        sequence: int = db.execute(f"SELECT last_sequence FROM user_balances WHERE {where}").fetchone()[0]
    return sequence


def _change(world: World, statement: str) -> None:
    with closing(sqlite3.connect(world.folder / "settlement.db", timeout=20)) as db, db:
        assert db.execute(statement).rowcount == 1


def _victim(world: World) -> tuple[int, int]:
    """A user whose account has been there for long."""
    event = json.loads(world.journal.read_text().splitlines()[0])["event"]
    return event["user_id"], event["asset"]


def _spoil(world: World, under_test: StoreUnderTest) -> None:
    user, asset = _victim(world)
    where = f"user_id = {user} AND asset_id = {asset} AND stream = 'main'"
    if under_test.node is None:
        _change(world, f"UPDATE user_balances SET available = available + 1000 WHERE {where}")
        return
    keyspace = under_test.settings[2].partition("=")[2]
    rows = under_test.node.cql(f"SELECT available FROM {keyspace}.user_balances WHERE {where}")
    wrong = rows[0][0]["available"] + 1000
    under_test.node.cql(f"UPDATE {keyspace}.user_balances SET available = {wrong} WHERE {where}")
