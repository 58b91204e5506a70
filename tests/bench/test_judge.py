"""The judge against stores made by hand, and against the balances of a real engine."""

from __future__ import annotations

import json
import secrets
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import pytest

from bench import engine, judge

if TYPE_CHECKING:
    from tests.cassandra_node import Node

RULES = {
    "assets": {"btc": {"id": 1, "decimals": 8}, "usdt": {"id": 2, "decimals": 8}},
    "symbols": {
        "btc_usdt": {
            "base": "btc",
            "quote": "usdt",
            "price_decimals": 2,
            "quote_amount": "scaled",
            "trade_id_time": "none",
            "page_width": 10,
        }
    },
    "revenue_user_id": 0,
}


def trade(
    sequence: int, trade_id: int, users: tuple[int, int], *, price: int, quantity: Any, **others: int
) -> dict[str, Any]:
    return {
        "output_sequence": sequence,
        "trade_id": trade_id,
        "match_seq": 51,
        "buy_order_id": 52,
        "sell_order_id": 53,
        "buyer_user_id": users[0],
        "seller_user_id": users[1],
        "base_asset": 1,
        "quote_asset": 2,
        "price": price,
        "quantity": quantity,
        "buyer_refund": 54,
        "seller_refund": 55,
        "settled_at": 9,
        "buyer_quote_version": 56,
        "buyer_base_version": 57,
        "seller_base_version": 58,
        "seller_quote_version": 59,
        **others,
    }


def transfer(
    sequence: int, kind: str, account: tuple[int, int], amount: int, *, created_at: int, key: str = "asset"
) -> dict[str, Any]:
    return {
        "output_sequence": sequence,
        "event_type": kind,
        "user_id": account[0],
        key: account[1],
        "amount": amount,
        "related_id": 60,
        "created_at": created_at,
    }


BAD = trade(5, 32, (1, 2), price=300, quantity="abc")
REPEATED = trade(7, 31, (1, 2), price=300, quantity=150)
EVENTS = [
    transfer(1, "DEPOSIT", (1, 1), 500, created_at=7),
    transfer(2, "DEPOSIT", (2, 2), 100_000, created_at=8),
    trade(3, 25, (2, 1), price=300, quantity=150),
    trade(4, 31, (1, 1), price=1, quantity=10, buyer_fee=1, ts_us=12_345),
    BAD,
    transfer(6, "WITHDRAWAL", (2, 2), 50, created_at=0),
    REPEATED,
    transfer(8, "ADJUSTMENT", (1, 1), -7, created_at=11),
    transfer(9, "DEPOSIT", (1, 1), 999, created_at=12),  # withheld and given up
    transfer(10, "DEPOSIT", (3, 1), 5, created_at=13, key="currency"),
]
# On paper: 300 x 150 / 100 = 450; 1 x 10 / 100 = 0; the self-trade costs user 1 its fee of 1, which user 0 gets.
TRADE_ROWS = [
    (2, 25, "main", 3, 51, 52, 53, 2, 1, 1, 2, 300, 150, 450, None, None, 54, 55, 56, 57, 58, 59, 9, None, None),
    (3, 31, "main", 4, 51, 52, 53, 1, 1, 1, 2, 1, 10, 0, 1, None, 54, 55, 56, 57, 58, 59, 9, 12_345, None),
]
EVENT_ROWS = [
    ("main", 0, 1, "DEPOSIT", 1, 1, 500, 60, 7, None),
    ("main", 0, 2, "DEPOSIT", 2, 2, 100_000, 60, 8, None),
    ("main", 0, 6, "WITHDRAWAL", 2, 2, 50, 60, 0, None),
    ("main", 0, 8, "ADJUSTMENT", 1, 1, -7, 60, 11, None),
    ("main", 0, 10, "DEPOSIT", 3, 1, 5, 60, 13, None),
]
REJECTED_ROWS = [
    ("main", 0, 5, "BAD_FIELD", "quantity", msgpack.packb(BAD), None),
    ("main", 0, 7, "TRADE_ID_NOT_RISING", "31 after 31", msgpack.packb(REPEATED), None),
]
BALANCE_ROWS = [
    (1, 1, "main", 342, 4, 8, 11_000),
    (1, 2, "main", 450, 2, 4, 12_345),
    (2, 1, "main", 150, 1, 3, 9_000),
    (2, 2, "main", 99_500, 3, 6, 0),
    (0, 1, "main", 1, 1, 4, 12_345),
    (3, 1, "main", 5, 1, 10, 13_000),
]
SCHEMA = """
CREATE TABLE settled_trades_btc_usdt (page, trade_id, stream, output_sequence, match_seq, buy_order_id, sell_order_id,
    buyer_user_id, seller_user_id, base_asset, quote_asset, price, quantity, quote_amount, buyer_fee, seller_fee,
    buyer_refund, seller_refund, buyer_quote_version, buyer_base_version, seller_base_version, seller_quote_version,
    settled_at, ts_us, origin_sequence);
CREATE TABLE user_balances (user_id, asset_id, stream, available, version, last_sequence, updated_at);
CREATE TABLE ledger_events (stream, page, output_sequence, event_type, user_id, asset_id, amount, related_id,
    created_at, origin_sequence);
CREATE TABLE rejected_events (stream, page, output_sequence, code, reason, payload, resolution);
CREATE TABLE settlement_state (stream, kind, sequence, stamp_us, last_trade_ids);
CREATE TABLE stream_decisions (stream, number, kind, first_sequence, last_sequence, body, reason, decided_by,
    decided_at);
INSERT INTO settlement_state VALUES ('main', 'acked', 10, 1, '{}'), ('main', 'durable', 3, 1, '{}');
INSERT INTO stream_decisions VALUES ('*', 1, 'rules', NULL, NULL, '{}', '', '', 0),
    ('main', 1, 'genesis', 1, NULL, '{}', '', '', 0), ('main', 2, 'gap', 9, 9, '{}', '', '', 0);
"""


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A journal, its rules and a right store."""
    (tmp_path / "rules").write_text(json.dumps(RULES))
    write_journal(tmp_path / "journal", EVENTS, {9: "withheld"})
    with closing(sqlite3.connect(tmp_path / "store")) as store:
        store.execute("PRAGMA journal_mode = WAL")
        store.executescript(SCHEMA)
        for table, rows in (
            ("settled_trades_btc_usdt", TRADE_ROWS),
            ("ledger_events", EVENT_ROWS),
            ("rejected_events", REJECTED_ROWS),
            ("user_balances", BALANCE_ROWS),
        ):
            store.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
        store.commit()
    return tmp_path


def write_journal(path: Path, events: list[dict[str, Any]], faults: dict[int, str] | None = None) -> None:
    with path.open("w") as lines:
        for event in events:
            sequence = event["output_sequence"]
            entry = {"seq": sequence, "sent_us": 1_000 * sequence, "actual_us": 1_000 * sequence, "event": event}
            if faults and sequence in faults:
                entry["fault"] = faults[sequence]
            lines.write(json.dumps(entry) + "\n")


def ask(
    bench: Path, capsys: pytest.CaptureFixture[str], *options: str, gaps: str = "9-9"
) -> tuple[int, dict[str, Any]]:
    paths = [
        "--journal",
        str(bench / "journal"),
        "--rules",
        str(bench / "rules"),
        "--store",
        f"sqlite:{bench / 'store'}",
    ]
    accepted = ["--accepted-gaps", gaps] if gaps else []
    code = judge.main([*paths, *accepted, "--json", *options])
    return code, json.loads(capsys.readouterr().out)


def change(bench: Path, statement: str) -> None:
    with closing(sqlite3.connect(bench / "store")) as store:
        assert store.execute(statement).rowcount != 0
        store.commit()


def test_a_right_store_passes(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = ask(bench, capsys)
    assert report == {
        "ok": True,
        "trades": 2,
        "events": 9,
        "rejected": 2,
        "rows_compared": 15,
        "balances_equal": 6,
        "balances": 6,
        "accounts": 6,
        "halted": None,
        "differences": [],
        "difference_count": 0,
    }
    assert code == 0


@pytest.mark.parametrize(
    "statement, what",
    [
        ("UPDATE settled_trades_btc_usdt SET quantity = quantity + 1 WHERE trade_id = 25", "VALUE"),
        ("UPDATE settled_trades_btc_usdt SET quote_amount = 451 WHERE trade_id = 25", "VALUE"),
        ("UPDATE settled_trades_btc_usdt SET page = 3 WHERE trade_id = 25", "VALUE"),
        ("UPDATE settled_trades_btc_usdt SET seller_fee = 0 WHERE trade_id = 25", "VALUE"),
        ("UPDATE settled_trades_btc_usdt SET price = 300.0 WHERE trade_id = 25", "VALUE"),
        ("UPDATE settled_trades_btc_usdt SET trade_id = 26 WHERE trade_id = 25", "EXTRA_ROW"),
        ("DELETE FROM settled_trades_btc_usdt WHERE trade_id = 31", "MISSING_ROW"),
        ("INSERT INTO settled_trades_btc_usdt SELECT * FROM settled_trades_btc_usdt WHERE trade_id = 31", "EXTRA_ROW"),
        ("UPDATE settled_trades_btc_usdt SET stream = 'other' WHERE trade_id = 31", "STRANGE_STREAM"),
        ("DROP TABLE settled_trades_btc_usdt", "MISSING_TABLE"),
        ("CREATE TABLE settled_trades_x_usdt AS SELECT * FROM settled_trades_btc_usdt", "EXTRA_ROW"),
        ("UPDATE user_balances SET available = available + 1 WHERE user_id = 1 AND asset_id = 2", "VALUE"),
        ("UPDATE user_balances SET version = 3 WHERE user_id = 1 AND asset_id = 2", "VALUE"),
        ("UPDATE user_balances SET last_sequence = 3 WHERE user_id = 1 AND asset_id = 2", "VALUE"),
        ("UPDATE user_balances SET updated_at = 0 WHERE user_id = 1 AND asset_id = 2", "VALUE"),
        ("DELETE FROM user_balances WHERE user_id = 0", "MISSING_ROW"),
        ("INSERT INTO user_balances VALUES (9, 1, 'main', 0, 1, 1, 0)", "EXTRA_ROW"),
        ("INSERT INTO user_balances VALUES (1, 1, 'second', 0, 1, 1, 0)", "STRANGE_STREAM"),
        ("UPDATE ledger_events SET amount = 501 WHERE output_sequence = 1", "VALUE"),
        ("UPDATE ledger_events SET page = 1 WHERE output_sequence = 1", "VALUE"),
        ("DELETE FROM ledger_events WHERE output_sequence = 6", "MISSING_ROW"),
        ("INSERT INTO ledger_events VALUES ('main', 0, 9, 'DEPOSIT', 1, 1, 999, 60, 12, NULL)", "EXTRA_ROW"),
        ("UPDATE rejected_events SET code = 'ZERO_PRICE' WHERE output_sequence = 5", "VALUE"),
        ("UPDATE rejected_events SET payload = x'80' WHERE output_sequence = 5", "VALUE"),
        ("UPDATE rejected_events SET reason = '' WHERE output_sequence = 5", "VALUE"),
        ("DELETE FROM rejected_events WHERE output_sequence = 7", "MISSING_ROW"),
        ("UPDATE stream_decisions SET last_sequence = 10 WHERE kind = 'gap'", "GAP_DECISIONS"),
        ("UPDATE settlement_state SET sequence = 11 WHERE kind = 'acked'", "POSITION_AHEAD"),
        ("UPDATE settlement_state SET sequence = 4 WHERE kind = 'acked'", None),
        ("UPDATE settlement_state SET sequence = 2 WHERE kind = 'acked'", "POSITION_AHEAD"),
    ],
)
def test_a_wrong_store_is_told(
    bench: Path, capsys: pytest.CaptureFixture[str], statement: str, what: str | None
) -> None:
    change(bench, statement)
    code, report = ask(bench, capsys)
    if what is None:
        assert code == 0
        return
    assert code == 1
    assert not report["ok"]
    assert what in {difference["what"] for difference in report["differences"]}


def test_sums_that_do_not_balance_are_told(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(bench, "UPDATE user_balances SET available = 6 WHERE user_id = 3")
    _, report = ask(bench, capsys)
    assert {"what": "SUM_BY_ASSET", "asset_id": 1, "balances_less_ledger_events": 1} in report["differences"]
    assert report["balances_equal"] == 5


def test_a_trade_of_another_stream_is_a_trade_twice(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = ", ".join(("page", "trade_id", "stream", *judge.TRADE_COLUMNS[2:]))
    copied = columns.replace("stream", "'main/late'")
    change(
        bench,
        f"INSERT INTO settled_trades_btc_usdt ({columns}) "
        f"SELECT {copied} FROM settled_trades_btc_usdt WHERE trade_id = 25",
    )
    _, report = ask(bench, capsys, "--also-stream", "main/late")
    assert [difference["what"] for difference in report["differences"]] == ["TRADE_TWICE"]


def test_final_balances_are_sums_over_streams(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    final = [[user, asset, amount] for user, asset, _, amount, *_ in BALANCE_ROWS]
    (bench / "final").write_text(json.dumps(final))
    change(bench, "INSERT INTO user_balances VALUES (1, 1, 'main/late', 3, 1, 1, 0)")
    options = "--balances", str(bench / "final"), "--also-stream", "main/late"
    code, report = ask(bench, capsys, *options)
    assert (code, report["balances_equal"], report["balances"]) == (1, 5, 6)
    final[0][2] += 3
    (bench / "final").write_text(json.dumps(final))
    code, report = ask(bench, capsys, *options)
    assert (code, report["balances_equal"], report["balances"]) == (0, 6, 6)


def test_a_hole_is_expected_to_be_filled_unless_it_was_accepted(
    bench: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = ask(bench, capsys, gaps="")
    assert code == 1
    assert {"what": "MISSING_ROW", "table": "ledger_events", "key": 9} in report["differences"]


def test_a_journal_with_a_hole_or_a_repetition_is_told(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_journal(bench / "journal", [event for event in EVENTS if event["output_sequence"] != 8], {9: "withheld"})
    _, report = ask(bench, capsys)
    assert {"what": "JOURNAL_HOLE", "sequence": 8} in report["differences"]
    write_journal(bench / "journal", [*EVENTS, EVENTS[0]], {9: "withheld"})
    _, report = ask(bench, capsys)
    assert report["differences"] == [{"what": "JOURNAL_TWICE", "sequence": 1}]


def test_the_order_of_the_journal_does_not_matter_and_a_contradiction_is_left_out(
    bench: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [EVENTS[1], EVENTS[0], *EVENTS[2:8], EVENTS[9], EVENTS[8]]
    write_journal(bench / "journal", events, {9: "withheld"})
    with (bench / "journal").open("a") as journal:
        journal.write(
            json.dumps(
                {"seq": 3, "sent_us": 1, "event": trade(3, 25, (2, 1), price=300, quantity=151), "fault": "contradict"}
            )
            + "\n"
        )
        journal.write(
            json.dumps({"seq": 1, "sent_us": 1, "event": trade(1, 99, (2, 1), price=300, quantity=151), "run": 2})
            + "\n"
        )
        journal.write('{"seq": 11, "sent_')
    code, _ = ask(bench, capsys)
    assert code == 0


def test_up_to_judges_a_prefix(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(bench, "DELETE FROM ledger_events WHERE output_sequence = 10")
    change(bench, "DELETE FROM user_balances WHERE user_id = 3")
    change(bench, "UPDATE settlement_state SET sequence = 9 WHERE kind = 'acked'")
    assert ask(bench, capsys)[0] == 1
    assert ask(bench, capsys, "--up-to", "9")[0] == 0


def test_a_late_stream_is_judged_by_its_origins(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Event 9, given up, came first; then 7, its trade id made another: lower than the one before it on main."""
    corrected = trade(7, 30, (1, 2), price=300, quantity=150)
    (bench / "corrected").write_text(json.dumps(corrected) + "\n")
    late = "main/late"
    with closing(sqlite3.connect(bench / "store")) as store:
        store.execute("INSERT INTO ledger_events VALUES (?, 0, 1, 'DEPOSIT', 1, 1, 999, 60, 12, 9)", (late,))
        row = (3, 30, late, 2, 51, 52, 53, 1, 2, 1, 2, 300, 150, 450, None, None, 54, 55, 56, 57, 58, 59, 9, None, 7)
        store.execute(f"INSERT INTO settled_trades_btc_usdt VALUES ({', '.join('?' * len(row))})", row)
        store.executemany(
            "INSERT INTO user_balances VALUES (?, ?, 'main/late', ?, ?, 2, 9000)",
            [(1, 1, 1_149, 2), (1, 2, -450, 1), (2, 1, -150, 1), (2, 2, 450, 1)],
        )
        store.execute("INSERT INTO settlement_state VALUES ('main/late', 'acked', 2, 1, '{}')")
        store.commit()
    options = ["--stream", late, "--also-stream", "main", "--corrected", str(bench / "corrected"), "--origins"]
    code, report = ask(bench, capsys, *options, "9", "7", gaps="")
    assert (code, report["events"], report["differences"]) == (0, 2, [])
    assert ask(bench, capsys, *options, "7", "9", gaps="")[0] == 1
    assert ask(bench, capsys, *options, "9", gaps="")[0] == 1
    change(bench, "UPDATE ledger_events SET origin_sequence = 10 WHERE stream = 'main/late'")
    _, report = ask(bench, capsys, *options, "9", "7", gaps="")
    assert [difference["column"] for difference in report["differences"]] == ["origin_sequence"]
    assert ask(bench, capsys, "--also-stream", late)[0] == 0


@pytest.fixture
def two_engines(bench: Path) -> Path:
    """The same store with a second engine's stream: users in common, and a trade whose id the first one has, too."""
    write_journal(
        bench / "journal-eu",
        [transfer(1, "DEPOSIT", (1, 1), 70, created_at=7), trade(2, 25, (3, 1), price=100, quantity=20)],
    )
    with closing(sqlite3.connect(bench / "store")) as store:
        store.execute("INSERT INTO ledger_events VALUES ('eu', 0, 1, 'DEPOSIT', 1, 1, 70, 60, 7, NULL)")
        row = (2, 25, "eu", 2, 51, 52, 53, 3, 1, 1, 2, 100, 20, 20, None, None, 54, 55, 56, 57, 58, 59, 9, None, None)
        store.execute(f"INSERT INTO settled_trades_btc_usdt VALUES ({', '.join('?' * len(row))})", row)
        store.executemany(
            "INSERT INTO user_balances VALUES (?, ?, 'eu', ?, ?, 2, 9000)",
            [(1, 1, 50, 2), (1, 2, 20, 1), (3, 1, 20, 1), (3, 2, -20, 1)],
        )
        store.execute("INSERT INTO settlement_state VALUES ('eu', 'acked', 2, 1, '{}')")
        store.commit()
    return bench


def test_several_engines_are_judged_by_their_journals_and_balances_are_sums(
    two_engines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sums = two_engines / "sums"
    beside = ["--beside", f"eu={two_engines / 'journal-eu'}", "--sums", str(sums)]
    code, report = ask(two_engines, capsys, *beside)
    assert (code, report["differences"]) == (0, [])
    assert (report["streams"], report["trades"], report["events"]) == ({"main": 9, "eu": 2}, 3, 11)
    assert (report["balances_equal"], report["balances"], report["accounts"]) == (7, 7, 10)
    assert json.loads(sums.read_text()) == [
        [0, 1, 1], [1, 1, 392], [1, 2, 470], [2, 1, 150], [2, 2, 99_500], [3, 1, 25], [3, 2, -20]
    ]  # fmt: skip
    assert ask(two_engines, capsys)[0] == 1  # a stream that the judge was not told of


@pytest.mark.parametrize(
    "statement, what",
    [
        ("UPDATE settled_trades_btc_usdt SET price = 101 WHERE stream = 'eu'", {"VALUE"}),
        ("DELETE FROM settled_trades_btc_usdt WHERE stream = 'eu'", {"MISSING_ROW"}),
        ("UPDATE settled_trades_btc_usdt SET stream = 'main' WHERE stream = 'eu'", {"EXTRA_ROW", "MISSING_ROW"}),
        (
            "UPDATE user_balances SET available = 51 WHERE stream = 'eu' AND user_id = 1 AND asset_id = 1",
            {"VALUE", "SUM_BY_ASSET", "FINAL_BALANCE"},
        ),
        ("INSERT INTO user_balances VALUES (1, 1, 'us', 1, 1, 1, 0)", {"STRANGE_STREAM", "FINAL_BALANCE"}),
        ("UPDATE settlement_state SET sequence = 3 WHERE stream = 'eu'", {"POSITION_AHEAD"}),
    ],
)
def test_what_is_wrong_with_any_engine_s_stream_is_told(
    two_engines: Path, capsys: pytest.CaptureFixture[str], statement: str, what: set[str]
) -> None:
    change(two_engines, statement)
    code, report = ask(two_engines, capsys, "--beside", f"eu={two_engines / 'journal-eu'}")
    assert code == 1
    assert {difference["what"] for difference in report["differences"]} == what


def test_a_decision_rejects_what_would_have_been_settled(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(bench, "DELETE FROM ledger_events WHERE output_sequence = 10")
    change(bench, "DELETE FROM user_balances WHERE user_id = 3")
    payload = msgpack.packb(EVENTS[9]).hex()
    change(bench, f"INSERT INTO rejected_events VALUES ('main', 0, 10, 'OPERATOR', 'wrong', x'{payload}', NULL)")
    assert ask(bench, capsys)[0] == 1
    assert ask(bench, capsys, "--rejected", "10:OPERATOR")[0] == 0


def test_settlement_is_expected_to_stop_before_an_unknown_asset(
    bench: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_journal(
        bench / "journal",
        [*EVENTS, transfer(11, "DEPOSIT", (1, 77), 1, created_at=1), transfer(12, "DEPOSIT", (1, 1), 1, created_at=1)],
        {9: "withheld"},
    )
    code, report = ask(bench, capsys)
    assert (code, report["halted"]) == (0, {"sequence": 11, "code": "UNKNOWN_ASSET"})


def test_acks_give_latencies_from_the_intended_time_to_the_first_acknowledgement(
    bench: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["1 2 5000", "3 8 13000", "1 8 900000", "10 10 1003000"]  # the third: a second life, again from the start
    (bench / "acks").write_text("\n".join(lines) + "\n10 10 1")
    code, report = ask(bench, capsys, "--acks", str(bench / "acks"))
    assert code == 0
    # 4, 3; 10, 9, 8, 7, 6, 5; 993 ms
    assert (report["acked_events"], report["unacked_events"]) == (9, 0)
    assert (report["p50_ms"], report["p90_ms"], report["max_ms"]) == (7.0, 993.0, 993.0)
    assert report["trades_per_s"] == pytest.approx(4 / 0.998, abs=0.1)


@pytest.mark.parametrize(
    "change_of, code",
    [
        ({"price": 0}, "ZERO_PRICE"),
        ({"quantity": 0}, "ZERO_QUANTITY"),
        ({"quantity": 0, "price": 0}, "ZERO_PRICE"),
        ({"quantity": True}, "BAD_FIELD"),
        ({"quantity": 1.0}, "BAD_FIELD"),
        ({"quantity": None}, "BAD_FIELD"),
        ({"quantity": -1}, "BAD_FIELD"),
        ({"quantity": 2**63}, "BAD_FIELD"),
        ({"trade_id": 0}, "BAD_FIELD"),
        ({"base_asset": 2**31}, "BAD_FIELD"),
        ({"base_asset_id": 1}, "BAD_FIELD"),
        ({"buyer_fee": None}, "BAD_FIELD"),
        ({"ts_us": 2**62}, "BAD_FIELD"),
        ({"session": "a"}, "BAD_FIELD"),
        ({"event_type": "DEPOSIT"}, "UNKNOWN_EVENT"),
        ({"note": "x" * 4_096}, "TOO_LARGE"),
        ({"note": "x" * 3_000}, None),
        ({"price": 2**62, "quantity": 201}, "AMOUNT_OVERFLOW"),
        ({"price": 2**62, "quantity": 200}, "AMOUNT_OVERFLOW"),
        ({"price": 2**62 - 1, "quantity": 200, "buyer_user_id": 5, "seller_user_id": 6}, None),
        ({"price": 2**62, "quantity": 201, "quote_amount": 4}, None),
        ({"buyer_fee": 151}, "FEE_EXCEEDS_AMOUNT"),
        ({"buyer_fee": 150}, None),
        ({"seller_fee": 451}, "FEE_EXCEEDS_AMOUNT"),
        ({"trade_id": 24}, "TRADE_ID_NOT_RISING"),
        ({"trade_id": 25}, "TRADE_ID_NOT_RISING"),
    ],
)
def test_verdicts(change_of: dict[str, Any], code: str | None) -> None:
    fold = judge.Fold(judge.Rules(RULES))
    fold.add(trade(1, 25, (2, 1), price=300, quantity=150))
    fold.add({**trade(2, 26, (2, 1), price=300, quantity=150), **change_of})
    assert fold.rejected.get(2, (None,))[0] == code


@pytest.mark.parametrize(
    "change_of", [{"event_type": "GIFT"}, {"event_type": []}, {"amount": -1}, {"currency": 1}, {"user_id": None}]
)
def test_verdicts_of_ledger_events(change_of: dict[str, Any]) -> None:
    fold = judge.Fold(judge.Rules(RULES))
    fold.add({**transfer(1, "DEPOSIT", (1, 1), 5, created_at=0), **change_of})
    assert fold.rejected[1][0] == "BAD_FIELD"


def test_the_recorded_session_folds_to_the_engines_own_balances() -> None:
    fold = judge.Fold(judge.Rules(engine.rules("session")))
    for event in engine.load_session():
        fold.add(event)
    final = json.loads((engine.DATA / "engine-session-balances.json").read_text())
    assert len(final) == 192
    assert {key: account.available for key, account in fold.accounts.items()} == {
        (u, a): amount for u, a, amount in final
    }
    assert (fold.trades, fold.events, fold.rejected) == (30_002, 30_340, {})


def test_what_can_not_be_judged_exits_2(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = ["--journal", str(bench / "journal"), "--rules", str(bench / "rules")]
    assert judge.main([*paths, "--store", f"sqlite:{bench / 'none'}"]) == 2
    assert judge.main([*paths, "--store", "cassandra:127.0.0.1:1/trading"]) == 2
    assert judge.main([*paths, "--store", "postgres:x"]) == 2
    assert judge.main(["--journal", str(bench / "none"), *paths[2:], "--store", f"sqlite:{bench / 'store'}"]) == 2
    assert capsys.readouterr().out == ""
    assert not (bench / "none").exists()


CQL = (
    (
        "CREATE TABLE settled_trades_btc_usdt (page bigint, trade_id bigint, stream text, output_sequence bigint,"
        " match_seq bigint, buy_order_id bigint, sell_order_id bigint, buyer_user_id bigint, seller_user_id bigint,"
        " base_asset int, quote_asset int, price bigint, quantity bigint, quote_amount bigint, buyer_fee bigint,"
        " seller_fee bigint, buyer_refund bigint, seller_refund bigint, buyer_quote_version bigint,"
        " buyer_base_version bigint, seller_base_version bigint, seller_quote_version bigint, settled_at bigint,"
        " ts_us bigint, origin_sequence bigint, PRIMARY KEY ((page), trade_id, stream))"
    ),
    (
        "CREATE TABLE user_balances (user_id bigint, asset_id int, stream text, available bigint, version bigint,"
        " last_sequence bigint, updated_at bigint, PRIMARY KEY ((user_id), asset_id, stream))"
    ),
    (
        "CREATE TABLE ledger_events (stream text, page bigint, output_sequence bigint, event_type text, user_id bigint,"
        " asset_id int, amount bigint, related_id bigint, created_at bigint, origin_sequence bigint,"
        " PRIMARY KEY ((stream, page), output_sequence))"
    ),
    (
        "CREATE TABLE rejected_events (stream text, page bigint, output_sequence bigint, code text, reason text,"
        " payload blob, resolution text, PRIMARY KEY ((stream, page), output_sequence))"
    ),
    (
        "CREATE TABLE settlement_state (stream text, kind text, sequence bigint, stamp_us bigint,"
        " last_trade_ids frozen<map<text, bigint>>, PRIMARY KEY ((stream), kind))"
    ),
    (
        "CREATE TABLE stream_decisions (stream text, number int, kind text, first_sequence bigint,"
        " last_sequence bigint, body text, reason text, decided_by text, decided_at timestamp,"
        " PRIMARY KEY ((stream), number))"
    ),
)


@pytest.mark.cassandra
def test_a_store_in_cassandra(bench: Path, capsys: pytest.CaptureFixture[str], cassandra_node: Node) -> None:
    from cassandra.cluster import Cluster

    keyspace = f"judge_{secrets.token_hex(4)}"
    with Cluster([cassandra_node.host], port=cassandra_node.port) as cluster:
        session = cluster.connect()
        session.execute(
            f"CREATE KEYSPACE {keyspace} WITH replication = {{'class': 'SimpleStrategy', 'replication_factor': 1}}"
        )
        session.set_keyspace(keyspace)
        for statement in CQL:
            session.execute(statement)
        with closing(sqlite3.connect(bench / "store")) as store:
            for table in (table for (table,) in store.execute("SELECT name FROM sqlite_master").fetchall()):
                if table == "settlement_state":
                    continue
                rows = store.execute(f"SELECT * FROM {table}")
                names = ", ".join(name for name, *_ in rows.description)
                places = ", ".join(["%s"] * len(rows.description))
                for row in rows:
                    session.execute(f"INSERT INTO {table} ({names}) VALUES ({places})", row)
        url = f"cassandra:{cassandra_node.host}:{cassandra_node.port}/{keyspace}"
        code, report = ask(bench, capsys, "--store", url)
        assert (code, report["differences"], report["rows_compared"]) == (0, [], 15)
        session.execute("UPDATE user_balances SET available = 0 WHERE user_id = 1 AND asset_id = 2 AND stream = 'main'")
        code, report = ask(bench, capsys, "--store", url)
        assert (code, {difference["what"] for difference in report["differences"]}) == (1, {"VALUE", "SUM_BY_ASSET"})
        session.execute(f"DROP KEYSPACE {keyspace}")
