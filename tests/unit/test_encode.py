"""The fast encoder against the plain one: the driver's own way of binding and of writing a BATCH message."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.batch import BALANCE_COLUMNS, LEDGER_COLUMNS, REJECTED_COLUMNS, TRADE_COLUMNS, Batch
from sidecar.events import Account
from sidecar.store.encode import LOGGED, UNLOGGED, BatchEncoder
from sidecar.store.tables import LEDGER_EVENTS, REJECTED_EVENTS, USER_BALANCES, Table, trades_table

IDS = {"user_balances": b"balances" * 2, "ledger_events": b"ledger__" * 2, "rejected_events": b"rejected" * 2}
SYMBOLS = {"btc_usdt": b"btc_usdt" * 2, "eth_usdt": b"eth_usdt" * 3}
OPTIONAL = {"buyer_fee", "seller_fee", "ts_us", "origin_sequence"}

i64 = st.integers(-(2**63), 2**63 - 1)
i32 = st.integers(-(2**31), 2**31 - 1)
VALUES = {"bigint": i64, "int": i32, "text": st.text(max_size=12), "blob": st.binary(max_size=40)}


def rows_of(table: Table, columns: tuple[str, ...], stream: str) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.tuples(*(
        st.just(stream) if name == "stream"
        else st.none() | VALUES[kind] if name in OPTIONAL
        else VALUES[kind]
        for name, kind in zip(columns, table.types(columns), strict=True)
    ))  # fmt: skip


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    stream = draw(st.sampled_from(["main", "main/late", "ström"]) | st.text(min_size=1, max_size=20))
    trades = st.dictionaries(
        st.sampled_from(sorted(SYMBOLS)),
        st.lists(rows_of(trades_table(""), TRADE_COLUMNS, stream), min_size=1, max_size=4),
    )
    accounts = st.builds(Account, i64, i64, i64, i64)
    return Batch(
        stream, 1, 2, draw(st.integers(0, 2**63 - 1)), draw(trades),
        draw(st.lists(rows_of(LEDGER_EVENTS, LEDGER_COLUMNS, stream), max_size=3)),
        draw(st.lists(rows_of(REJECTED_EVENTS, REJECTED_COLUMNS, stream), max_size=3)),
        draw(st.dictionaries(st.tuples(i64, i32), accounts, max_size=6)), {}, 1, 0,
    )  # fmt: skip


def encoder(kind: int = LOGGED) -> BatchEncoder:
    made = BatchEncoder(
        kind=kind,
        balances_id=IDS["user_balances"],
        ledger_id=IDS["ledger_events"],
        rejected_id=IDS["rejected_events"],
    )
    made.trade_ids.update(SYMBOLS)
    return made


def plainly(batch: Batch, kind: int) -> bytes:
    """The same batch as the driver encodes it, value by value."""
    from cassandra import ConsistencyLevel
    from cassandra.cqltypes import BytesType, Int32Type, LongType, UTF8Type
    from cassandra.protocol import BatchMessage, ColumnMetadata
    from cassandra.query import UNSET_VALUE, BatchType, PreparedStatement

    types = {"bigint": LongType, "int": Int32Type, "text": UTF8Type, "blob": BytesType}

    def bound(table: Table, columns: tuple[str, ...], statement_id: bytes, row: tuple[Any, ...]) -> tuple[Any, ...]:
        metadata = [
            ColumnMetadata("ks", table.name, name, types[kind])
            for name, kind in zip(columns, table.types(columns), strict=True)
        ]
        prepared = PreparedStatement(metadata, statement_id, None, "", "ks", 4, None, None)
        values = prepared.bind([UNSET_VALUE if value is None else value for value in row]).values
        return (True, statement_id, values)

    queries = [
        bound(trades_table(symbol), TRADE_COLUMNS, SYMBOLS[symbol], row)
        for symbol, rows in batch.trades.items()
        for row in rows
    ]
    queries += [bound(LEDGER_EVENTS, LEDGER_COLUMNS, IDS["ledger_events"], row) for row in batch.ledger_events]
    queries += [bound(REJECTED_EVENTS, REJECTED_COLUMNS, IDS["rejected_events"], row) for row in batch.rejected]
    queries += [bound(USER_BALANCES, BALANCE_COLUMNS, IDS["user_balances"], row) for row in batch.balance_rows()]
    message = BatchMessage(
        BatchType.LOGGED if kind == LOGGED else BatchType.UNLOGGED,
        queries,
        ConsistencyLevel.LOCAL_QUORUM,
        timestamp=batch.stamp_us,
    )
    body = io.BytesIO()
    message.send_body(body, 4)
    return body.getvalue()


@given(st.lists(batches(), min_size=1, max_size=3), st.sampled_from([LOGGED, UNLOGGED]))
def test_any_batch_has_the_bytes_that_the_driver_would_send(some: list[Batch], kind: int) -> None:
    ours = encoder(kind)
    for batch in some:
        body = ours.encode(batch)
        assert body == plainly(batch, kind)
        assert ours.encode(batch) == body


def test_a_value_that_no_column_holds_is_a_bug() -> None:
    batch = Batch("main", 1, 1, 1, {}, [], [], {(1, 1): Account(2**63, 1, 1, 1)}, {}, 1, 0)
    with pytest.raises(Exception, match=r"int too large|out of range|format requires"):
        encoder().encode(batch)
