"""The kit itself sees what it is there for: rows that are missing, rows and postings that are there twice."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from bench.counts import lost_and_doubled
from bench.world import World, until
from tests.fault.kit import Fault, is_run_by
from tests.fault.results import keep

COUNT = 400


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small store, settled by a real sidecar."""
    folder = tmp_path_factory.mktemp("settled")
    with World(folder, source="generated") as world:
        run = world.start("run")
        until(lambda: is_run_by(world, run.pid), "it runs")
        world.engine("--users", "5", "--count", str(COUNT)).result()
        world.until_acked(COUNT)
        assert run.term() == 0
    return folder / "settlement.db"


@pytest.mark.parametrize(
    "statement, counted",
    [
        ("SELECT 1", (0, 0)),
        ("DELETE FROM settled_trades_btc_usdt WHERE output_sequence = (SELECT max(output_sequence) FROM"
         " settled_trades_btc_usdt WHERE buyer_user_id <> seller_user_id)", (1, 4)),
        ("UPDATE settled_trades_btc_usdt SET output_sequence = output_sequence - 1 WHERE output_sequence ="
         " (SELECT max(output_sequence) FROM settled_trades_btc_usdt)", (1, 1)),
        ("UPDATE user_balances SET version = version + 1 WHERE user_id = 1 AND asset_id = 2", (0, 1)),
        ("UPDATE user_balances SET version = version - 2 WHERE user_id = 1 AND asset_id = 2", (2, 0)),
        ("DELETE FROM ledger_events WHERE output_sequence = 3", (1, 1)),
    ],
)  # fmt: skip
def test_what_is_lost_and_what_is_doubled_is_counted(
    settled: Path, tmp_path: Path, statement: str, counted: tuple[int, int]
) -> None:
    copy = tmp_path / "copy.db"
    with closing(sqlite3.connect(settled)) as db, closing(sqlite3.connect(copy)) as other:
        db.backup(other)
        other.execute(statement)
        other.commit()
    assert lost_and_doubled(f"sqlite:{copy}", COUNT) == counted


class _Standing:
    """A world in which nothing moves."""

    judged = "sqlite:nowhere"

    def said(self, tape: str = "tape.db") -> dict[str, int]:
        return {"acked": 7}

    status = said


def test_a_fault_without_injection_or_without_progress_does_not_close() -> None:
    world, fault = _Standing(), Fault()
    with pytest.raises(AssertionError, match="nothing was injected"):
        fault.closes(world, 9)  # type: ignore[arg-type]
    fault.strike()
    with pytest.raises(AssertionError, match="never healed"):
        fault.closes(world, 9)  # type: ignore[arg-type]
    fault.heals(world)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="acked moves on from 7"):
        fault.closes(world, 9, timeout_s=0.2)  # type: ignore[arg-type]


def test_results_of_other_tests_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    keep(file, {"a": {"lost": 1}, "b": {"lost": 0}})
    keep(file, {"a": {"lost": 0}})
    assert json.loads(file.read_text()) == {"a": {"lost": 0}, "b": {"lost": 0}}
    file.write_text("cut of")
    keep(file, {"c": {}})
    assert json.loads(file.read_text()) == {"c": {}}
