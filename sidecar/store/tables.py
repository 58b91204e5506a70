"""The tables in Cassandra and ScyllaDB: their statements, and what is wrong with those that are already there.

This is the one source: `schema apply` runs these statements, `schema print` shows them, schema/settlement_schema.cql is
what `schema print` says of the default keyspace. Nothing here talks to a database.

Why these table options. Trades, ledger events and rejected events are written once and read by key or not at all, and a
partition is written within a short time: size-tiered compaction rewrites them least, and a look-up still meets one or
two files. Balances are a small table that is overwritten all the time: levels keep a look-up at about one file and
drop what was overwritten soon, and small compressed chunks keep it from reading 16 KiB for one row. (Unified compaction
would do both, but ScyllaDB lacks it, and this text is for both.)

What must never be is in `FORBIDDEN`: a write time is an ordering stamp here, not a time, and the batch log of a table
without grace is dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sidecar.batch import BALANCE_COLUMNS, LEDGER_COLUMNS, REJECTED_COLUMNS, TRADE_COLUMNS

TRADES_PREFIX: Final = "settled_trades_"

_ONCE: Final = {"compaction": "{'class': 'SizeTieredCompactionStrategy'}", "compression": "{'class': 'LZ4Compressor'}"}
_OVERWRITTEN: Final = {
    "compaction": "{'class': 'LeveledCompactionStrategy'}",
    "compression": "{'class': 'LZ4Compressor', 'chunk_length_in_kb': 4}",
}


@dataclass(frozen=True)
class Table:
    """One table: `key` as in CQL, `columns` with type and comment in their order, `order` of the clustering columns."""

    name: str
    about: str
    columns: Mapping[str, tuple[str, str]]
    partition: tuple[str, ...]
    clustering: tuple[str, ...]
    descending: frozenset[str] = frozenset()
    options: Mapping[str, str] = field(default_factory=lambda: _ONCE)

    def types(self, columns: Iterable[str]) -> tuple[str, ...]:
        """Give the CQL types of some columns."""
        return tuple(self.columns[column][0] for column in columns)

    def statement(self, keyspace: str) -> str:
        """Give the statement that creates it."""
        lines = []
        for name, (kind, comment) in self.columns.items():
            line = f"    {name} {kind},"
            lines.append(f"{line:<40}-- {comment}" if comment else line)
        key = ", ".join((f"({', '.join(self.partition)})", *self.clustering))
        lines.append(f"    PRIMARY KEY ({key})")
        options = [f"{name} = {value}" for name, value in self.options.items()]
        if self.descending:
            order = ", ".join(f"{name} {'DESC' if name in self.descending else 'ASC'}" for name in self.clustering)
            options.insert(0, f"CLUSTERING ORDER BY ({order})")
        body, end = "\n".join(lines), "\n  AND ".join(options)
        return f"CREATE TABLE IF NOT EXISTS {keyspace}.{self.name} (\n{body}\n) WITH {end}"


def _columns(names: Iterable[str], types: Mapping[str, str], comments: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    return {name: (types.get(name, "bigint"), comments.get(name, "")) for name in names}


def trades_table(symbol: str) -> Table:
    """Give the table of a symbol's trades."""
    return Table(
        f"{TRADES_PREFIX}{symbol}",
        f"The trades of {symbol}, one row each and stream.",
        _columns(
            TRADE_COLUMNS,
            {"stream": "text", "base_asset": "int", "quote_asset": "int"},
            {
                "page": "trade_id // page_width of the symbol",
                "output_sequence": "its place in the engine's stream",
                "quote_amount": "as posted, in smallest units",
                "buyer_quote_version": "the engine's own versions: kept, not relied on",
                "settled_at": "ms since 1970, as sent",
                "ts_us": "us since 1970, as sent",
                "origin_sequence": "only on a late stream: its sequence where it belongs",
            },
        ),
        ("page",),
        ("trade_id", "stream"),
        frozenset({"trade_id"}),
    )


USER_BALANCES: Final = Table(
    "user_balances",
    "The newest balance of each account on each stream; a user's balance is the sum over streams.",
    _columns(
        BALANCE_COLUMNS,
        {"asset_id": "int", "stream": "text"},
        {
            "available": "the settled total, in smallest units",
            "version": "events of this stream that touched the account",
            "last_sequence": "the newest of them",
            "updated_at": "us since 1970 of that event, 0 when it had no time",
        },
    ),
    ("user_id",),
    ("asset_id", "stream"),
    options=_OVERWRITTEN,
)

LEDGER_EVENTS: Final = Table(
    "ledger_events",
    "Deposits, withdrawals and adjustments.",
    _columns(
        LEDGER_COLUMNS,
        {"stream": "text", "event_type": "text", "asset_id": "int"},
        {
            "page": "output_sequence // 10000",
            "event_type": "DEPOSIT, WITHDRAWAL, ADJUSTMENT",
            "amount": "as sent: a withdrawal's amount is positive",
            "created_at": "ms since 1970, as sent",
            "origin_sequence": "only on a late stream: its sequence where it belongs",
        },
    ),
    ("stream", "page"),
    ("output_sequence",),
)

REJECTED_EVENTS: Final = Table(
    "rejected_events",
    "Events that can't be posted, kept with their frame.",
    _columns(
        (*REJECTED_COLUMNS, "resolution"),
        {"stream": "text", "code": "text", "reason": "text", "payload": "blob", "resolution": "text"},
        {
            "page": "output_sequence // 10000",
            "payload": "the frame as received, its first 4096 bytes",
            "resolution": "what an operator did about it; the only column written at wall-clock time",
        },
    ),
    ("stream", "page"),
    ("output_sequence",),
)

SETTLEMENT_STATE: Final = Table(
    "settlement_state",
    "How far a stream is settled: acknowledged, and safe from a loss of power.",
    _columns(
        ("stream", "kind", "sequence", "stamp_us", "last_trade_ids"),
        {"stream": "text", "kind": "text", "last_trade_ids": "frozen<map<text, bigint>>"},
        {
            "kind": "acked, durable",
            "stamp_us": "the stamp of that sequence, also the write time of this row",
            "last_trade_ids": "by symbol, of accepted trades",
        },
    ),
    ("stream",),
    ("kind",),
    options=_OVERWRITTEN,
)

STREAM_DECISIONS: Final = Table(
    "stream_decisions",
    "The append-only log of what people and configurations decided. Written by compare-and-set only.",
    _columns(
        (
            "stream", "number", "kind", "first_sequence", "last_sequence", "body", "reason", "decided_by", "decided_at",
        ),
        {
            "stream": "text", "number": "int", "kind": "text", "body": "text", "reason": "text", "decided_by": "text",
            "decided_at": "timestamp",
        },
        {
            "number": "1, 2, 3 ...",
            "kind": "genesis, rules, stamp, gap, reject, late_owner",
            "first_sequence": "what it is about, where it is about a range",
            "body": "JSON: the rules, the base stamp, ...",
        },
    ),
    ("stream",),
    ("number",),
)  # fmt: skip

RECONCILIATION_RUNS: Final = Table(
    "reconciliation_runs",
    "When the ledger was proved, and how far.",
    _columns(
        (
            "day", "started_at", "run_id", "stream", "up_to_sequence", "accounts", "events", "findings", "finished_at",
        ),
        {
            "day": "date", "started_at": "timestamp", "run_id": "uuid", "stream": "text", "findings": "int",
            "finished_at": "timestamp",
        },
        {},
    ),
    ("day",),
    ("started_at", "run_id"),
    frozenset({"started_at"}),
)  # fmt: skip

RECONCILIATION_FINDINGS: Final = Table(
    "reconciliation_findings",
    "What a proof found.",
    _columns(
        (
            "run_id", "number", "code", "stream", "user_id", "asset_id", "sequence", "expected", "actual", "detail",
            "fixed_at",
        ),
        {
            "run_id": "uuid", "number": "int", "code": "text", "stream": "text", "asset_id": "int", "detail": "text",
            "fixed_at": "timestamp",
        },
        {},
    ),
    ("run_id",),
    ("number",),
)  # fmt: skip

COMMON_TABLES: Final = (
    USER_BALANCES,
    LEDGER_EVENTS,
    REJECTED_EVENTS,
    SETTLEMENT_STATE,
    STREAM_DECISIONS,
    RECONCILIATION_RUNS,
    RECONCILIATION_FINDINGS,
)


def tables(symbols: Iterable[str]) -> list[Table]:
    """Give every table of a keyspace that settles these symbols."""
    return [*map(trades_table, sorted(set(symbols))), *COMMON_TABLES]


def keyspace_statement(keyspace: str, replication_factor: int) -> str:
    """Give the statement that creates the keyspace: so many copies in each datacenter."""
    return (
        f"CREATE KEYSPACE IF NOT EXISTS {keyspace}"
        f" WITH replication = {{'class': 'NetworkTopologyStrategy', 'replication_factor': {replication_factor}}}"
    )


def schema_text(symbols: Iterable[str], *, keyspace: str, replication_factor: int) -> str:
    """Give all statements as the text of a file for `cqlsh -f`."""
    parts = [
        "-- The tables of sidecar. Made by `sidecar schema print`; `sidecar schema apply` creates the same.\n"
        "-- Amounts and balances are integers in the asset's smallest unit. Rows but those of stream_decisions carry\n"
        "-- explicit write times that order them: never write to these tables by hand, and never set on them\n"
        "-- default_time_to_live, gc_grace_seconds = 0, TimeWindowCompactionStrategy or read_repair = 'NONE'.\n"
        f"-- More than one node: raise replication_factor (odd, 3 at best) before you load this.\n\n"
        f"{keyspace_statement(keyspace, replication_factor)};\n"
    ]
    parts += [f"-- {table.about}\n{table.statement(keyspace)};\n" for table in tables(symbols)]
    return "\n".join(parts)


def _forbidden(options: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    """Name what is forbidden among a table's options: what it is, what is allowed, how to change it."""
    if options.get("default_time_to_live"):
        yield f"default_time_to_live = {options['default_time_to_live']}", "0", "default_time_to_live = 0"
    if options.get("gc_grace_seconds") == 0:
        yield "gc_grace_seconds = 0", "above 0 (864000 is usual)", "gc_grace_seconds = 864000"
    compaction = str((options.get("compaction") or {}).get("class", ""))
    if compaction.endswith("TimeWindowCompactionStrategy"):
        allowed = "a strategy that doesn't sort by write time"
        yield f"compaction = {compaction}", allowed, f"compaction = {_ONCE['compaction']}"
    if str(options.get("read_repair", "BLOCKING")).upper() == "NONE":
        yield "read_repair = 'NONE'", "'BLOCKING'", "read_repair = 'BLOCKING'"


def _key(partition: tuple[str, ...], clustering: tuple[str, ...], descending: Collection[str]) -> str:
    rows = [f"{column} DESC" if column in descending else column for column in clustering]
    return f"(({', '.join(partition)}), {', '.join(rows)})"


def faults(
    table: Table,
    *,
    keyspace: str,
    columns: Mapping[str, tuple[str, str, int, str]],
    options: Mapping[str, Any],
) -> list[str]:
    """Compare a table that is there with what it must be: name what is, what is allowed, and the next step.

    `columns` as system_schema.columns has them: name to (type, kind, position, clustering_order). A column more than
    needed is let be.
    """
    found: list[str] = []
    name = f"{keyspace}.{table.name}"
    for column, (kind, _) in table.columns.items():
        if column not in columns:
            if column in (*table.partition, *table.clustering):
                continue  # said below, as the key's fault
            found.append(f"{name} lacks {column} {kind}; run: ALTER TABLE {name} ADD {column} {kind};")
        elif columns[column][0] != kind:
            found.append(
                f"{name}.{column} is {columns[column][0]}, {kind} is needed; a type can't be altered: move this table"
                " away, or name another store.cassandra.keyspace"
            )
    by_position = sorted(columns, key=lambda column: columns[column][2])
    partition, clustering = (
        tuple(column for column in by_position if columns[column][1] == part)
        for part in ("partition_key", "clustering")
    )
    descending = {column for column in clustering if columns[column][3].lower() == "desc"}
    has, needed = _key(partition, clustering, descending), _key(table.partition, table.clustering, table.descending)
    if has != needed:
        found.append(
            f"{name} has the key {has}, {needed} is needed; a key can't be altered: move this table away, or name"
            " another store.cassandra.keyspace"
        )
    for what, allowed, change in _forbidden(options):
        found.append(f"{name} has {what}, {allowed} is allowed; run: ALTER TABLE {name} WITH {change};")
    return found
