"""The schema in Cassandra: the file for cqlsh is what the code says, and what is wrong with a table is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sidecar.store import tables

ROOT = Path(__file__).resolve().parent.parent.parent
FILE = ROOT / "schema" / "settlement_schema.cql"


def test_the_file_for_cqlsh_is_what_schema_print_says() -> None:
    text = tables.schema_text(["btc_usdt", "eth_usdt"], keyspace="trading", replication_factor=1)
    assert FILE.read_text(encoding="utf-8") == text, (
        "write it anew: sidecar schema print > schema/settlement_schema.cql"
    )


def _of(table: tables.Table) -> dict[str, tuple[str, str, int, str]]:
    """A table as system_schema.columns would tell it."""
    found = {name: (kind, "regular", -1, "none") for name, (kind, _) in table.columns.items()}
    for part, names in (("partition_key", table.partition), ("clustering", table.clustering)):
        for position, name in enumerate(names):
            order = "none" if part == "partition_key" else "desc" if name in table.descending else "asc"
            found[name] = (found[name][0], part, position, order)
    return found


def _faults(table: tables.Table, columns: dict[str, Any], **options: Any) -> str:
    return " ".join(tables.faults(table, keyspace="trading", columns=columns, options=options))


@pytest.mark.parametrize("table", tables.tables(["btc_usdt"]), ids=lambda table: table.name)
def test_a_table_as_created_has_no_fault(table: tables.Table) -> None:
    usual = {"default_time_to_live": 0, "gc_grace_seconds": 864_000, "read_repair": "BLOCKING"}
    assert not _faults(table, _of(table), **usual, compaction={"class": "org.apache.X.LeveledCompactionStrategy"})
    assert not _faults(table, _of(table) | {"added": ("text", "regular", -1, "none")})


def test_a_missing_column_is_told_with_the_statement_that_adds_it() -> None:
    columns = _of(tables.LEDGER_EVENTS)
    del columns["origin_sequence"]
    said = _faults(tables.LEDGER_EVENTS, columns)
    assert "run: ALTER TABLE trading.ledger_events ADD origin_sequence bigint;" in said


def test_another_type_another_key_another_order() -> None:
    columns = _of(tables.USER_BALANCES) | {"available": ("decimal", "regular", -1, "none")}
    assert "trading.user_balances.available is decimal, bigint is needed" in _faults(tables.USER_BALANCES, columns)
    columns = _of(tables.USER_BALANCES) | {"stream": ("text", "regular", -1, "none")}
    said = _faults(tables.USER_BALANCES, columns)
    assert "has the key ((user_id), asset_id), ((user_id), asset_id, stream) is needed" in said
    table = tables.trades_table("btc_usdt")
    columns = _of(table) | {"trade_id": ("bigint", "clustering", 0, "asc")}
    assert "((page), trade_id, stream), ((page), trade_id DESC, stream) is needed" in _faults(table, columns)


@pytest.mark.parametrize(
    "option",
    [
        {"default_time_to_live": 60},
        {"gc_grace_seconds": 0},
        {"compaction": {"class": "org.apache.cassandra.db.compaction.TimeWindowCompactionStrategy"}},
        {"read_repair": "NONE"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_must_never_be_is_named_with_what_is_allowed(option: dict[str, Any]) -> None:
    said = _faults(tables.USER_BALANCES, _of(tables.USER_BALANCES), **option)
    name = next(iter(option))
    assert re.fullmatch(
        rf"trading.user_balances has {name} = .*, .* is allowed; run: ALTER TABLE .* WITH {name} = .*;", said
    )


def test_every_table_keeps_within_what_is_allowed() -> None:
    text = FILE.read_text(encoding="utf-8")
    said = "\n".join(line for line in text.splitlines() if not line.startswith("--"))
    assert said.count("CREATE TABLE") == 9
    assert said.count("LZ4Compressor") == 9
    for forbidden in ("TimeWindow", "time_to_live", "gc_grace", "read_repair"):
        assert forbidden not in said
