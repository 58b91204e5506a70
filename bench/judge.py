"""The independent judge: folds an engine's journal in its own plain code and compares a store with it, row by row.

It shares no code with the sidecar: it is written from the contract alone (verdicts, postings, tables), with plain
dictionaries and loops, so that a mistake of the sidecar is not repeated here. It reads the journal of
`bench/engine.py`, and a store as any client would.

Compared are, for each stream whose journal it gets: every column of every trade and ledger event, code and payload of
every rejected event, every balance with its version, last_sequence and updated_at; that there is no row besides, no
trade twice and no other stream; that the store's own balances sum to its own deposits - withdrawals + adjustments; that
the gaps it decided are those which the judge was told of; that its positions are not ahead of the journal. With several
engines' journals (--beside) also: that each user's balance, summed over all streams of the store, is the sum over all
journals. Engines number their trades for themselves: one id on two engines' streams is two trades. One difference: exit
1.

An event that can't be settled without an operator (unknown asset, balance overflow) ends the fold, as it halts
settlement: the store must then hold what was before it, and nothing else.
"""

from __future__ import annotations

import argparse
import gc
import json
import marshal
import math
import sqlite3
import sys
from array import array
from collections import Counter
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgpack

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Event = dict[str, Any]
Row = tuple[Any, ...]

I63_MAX = 2**63 - 1
I31_MAX = 2**31 - 1
PAYLOAD_BYTES_MAX = 4_096
EVENT_PAGE = 10_000  # sequences a page of ledger_events and rejected_events
DIFFERENCES_SHOWN_MAX = 20

TRADE_COLUMNS = (
    "page",
    "trade_id",
    "output_sequence",
    "match_seq",
    "buy_order_id",
    "sell_order_id",
    "buyer_user_id",
    "seller_user_id",
    "base_asset",
    "quote_asset",
    "price",
    "quantity",
    "quote_amount",
    "buyer_fee",
    "seller_fee",
    "buyer_refund",
    "seller_refund",
    "buyer_quote_version",
    "buyer_base_version",
    "seller_base_version",
    "seller_quote_version",
    "settled_at",
    "ts_us",
    "origin_sequence",
)
EVENT_COLUMNS = (
    "page",
    "output_sequence",
    "event_type",
    "user_id",
    "asset_id",
    "amount",
    "related_id",
    "created_at",
    "origin_sequence",
)
BALANCE_COLUMNS = ("user_id", "asset_id", "available", "version", "last_sequence", "updated_at")
REJECTED_COLUMNS = ("page", "output_sequence", "code", "reason", "payload")

# Key: lowest and highest value. What is optional may be absent, not wrong.
_COMMON_OPTIONAL = {"session": (0, I63_MAX), "ts_us": (0, 2**62 - 1)}
_TRADE_REQUIRED = {
    "trade_id": (1, I63_MAX),
    **dict.fromkeys(
        (
            "match_seq",
            "buy_order_id",
            "sell_order_id",
            "buyer_user_id",
            "seller_user_id",
            "price",
            "quantity",
            "buyer_refund",
            "seller_refund",
            "settled_at",
            "buyer_quote_version",
            "buyer_base_version",
            "seller_base_version",
            "seller_quote_version",
        ),
        (0, I63_MAX),
    ),
}
_TRADE_OPTIONAL = {**_COMMON_OPTIONAL, **dict.fromkeys(("quote_amount", "buyer_fee", "seller_fee"), (0, I63_MAX))}
_LEDGER_REQUIRED = dict.fromkeys(("user_id", "related_id", "created_at"), (0, I63_MAX))


# --- the rules ------------------------------------------------------------------------------------------------------


class Symbol(NamedTuple):
    """What a trade of one pair of assets is settled by."""

    name: str
    scale_exponent: int | None  # None: the raw product
    ms16: bool
    page_width: int


class Rules:
    """Assets and symbols by the engine's ids, as the RULES file says them."""

    def __init__(self, rules: dict[str, Any]) -> None:
        """Read the rules; KeyError when something is missing."""
        assets = rules["assets"]
        self.assets = {asset["id"] for asset in assets.values()}
        self.revenue_user_id: int = rules["revenue_user_id"]
        self.symbols: dict[tuple[int, int], Symbol] = {}
        for name, symbol in rules["symbols"].items():
            base, quote = assets[symbol["base"]], assets[symbol["quote"]]
            exponent = None
            if symbol["quote_amount"] == "scaled":
                exponent = symbol["price_decimals"] + base["decimals"] - quote["decimals"]
            ms16 = symbol["trade_id_time"] == "ms16"
            self.symbols[base["id"], quote["id"]] = Symbol(name, exponent, ms16, symbol["page_width"])


# --- the fold -------------------------------------------------------------------------------------------------------


def aliased(event: Event, key: str, alias: str) -> Any:
    """Return the value under a key or its other name; None, which is never right, for both or neither."""
    if (key in event) == (alias in event):
        return None
    return event[key] if key in event else event[alias]


def is_in(value: object, low: int, high: int) -> bool:
    """Tell whether a value is an integer (no bool) within bounds."""
    return type(value) is int and low <= value <= high


def form_code(event: Event) -> str | None:
    """Return the code by which an event is rejected for its form alone, or None."""
    is_trade, is_ledger_event = "trade_id" in event, "event_type" in event
    if is_trade == is_ledger_event:
        return "UNKNOWN_EVENT"
    required = _TRADE_REQUIRED if is_trade else _LEDGER_REQUIRED
    for key, (low, high) in required.items():
        value = event.get(key)
        if type(value) is not int or not low <= value <= high:
            return "BAD_FIELD"
    optional = _TRADE_OPTIONAL if is_trade else _COMMON_OPTIONAL
    for key, (low, high) in optional.items():
        if key in event and not is_in(event[key], low, high):
            return "BAD_FIELD"
    if is_trade:
        assets = [aliased(event, "base_asset", "base_asset_id"), aliased(event, "quote_asset", "quote_asset_id")]
    else:
        assets = [aliased(event, "asset", "currency")]
        lowest = {"DEPOSIT": 0, "WITHDRAWAL": 0, "ADJUSTMENT": -I63_MAX}
        kind = event["event_type"]
        if not isinstance(kind, str) or kind not in lowest or not is_in(event.get("amount"), lowest[kind], I63_MAX):
            return "BAD_FIELD"
    if not all(is_in(asset, 0, I31_MAX) for asset in assets):
        return "BAD_FIELD"
    if is_trade and event["price"] == 0:
        return "ZERO_PRICE"
    if is_trade and event["quantity"] == 0:
        return "ZERO_QUANTITY"
    return None


_pack = msgpack.Packer().pack


class Halt(Exception):  # noqa: N818 - not an error of the judge
    """Settlement can't go on at this event without an operator."""


class Account:
    """One balance row in the making."""

    __slots__ = ("available", "last_sequence", "updated_at", "version")

    def __init__(self) -> None:
        """Begin untouched."""
        self.available = self.version = self.last_sequence = self.updated_at = 0


class Fold:
    """What the tables of one stream must hold after its events; takes each event once, in order."""

    def __init__(self, rules: Rules, *, rejected: dict[int, str] | None = None, late: bool = False) -> None:
        """Begin an empty stream; `rejected` says what a person has decided to reject, and the codes.

        On a late stream trade ids need not rise, and each row says its origin.
        """
        self._rules = rules
        self._late = late
        self._origin: int | None = None
        self._told = rejected or {}
        self._last_trade_ids: dict[str, int] = {}
        self.accounts: dict[tuple[int, int], Account] = {}
        # Marshalled, since a million tuples of 24 numbers would take three times the memory. Version 2 of the format
        # depends on values alone (later ones on how often an object is referenced): equal bytes are equal rows.
        self.trade_rows: dict[str, dict[int, bytes]] = {symbol.name: {} for symbol in rules.symbols.values()}
        self.event_rows: dict[int, Row] = {}
        self.rejected: dict[int, tuple[str, Event]] = {}
        self.events = self.trades = self.last_sequence = 0

    def add(self, event: Event, number: int | None = None) -> None:
        """Fold the next event; Halt when settlement can't go on here. On a late stream it has another number."""
        sequence: int = event["output_sequence"]
        if number is not None:
            self._origin, sequence = sequence, number
        code = self._told.get(sequence)
        if code is None and len(_pack(event)) > PAYLOAD_BYTES_MAX:
            code = "TOO_LARGE"
        code = code or form_code(event)
        if code is None:
            code = self._trade(sequence, event) if "trade_id" in event else self._ledger_event(sequence, event)
        if code is not None:
            self.rejected[sequence] = code, event
        self.events += 1
        self.last_sequence = sequence

    def _trade(self, sequence: int, event: Event) -> str | None:
        base = event["base_asset"] if "base_asset" in event else event["base_asset_id"]
        quote = event["quote_asset"] if "quote_asset" in event else event["quote_asset_id"]
        if not {base, quote} <= self._rules.assets:
            raise Halt("UNKNOWN_ASSET")
        symbol = self._rules.symbols.get((base, quote))
        if symbol is None:
            raise Halt("UNKNOWN_SYMBOL")
        price, quantity, trade_id = event["price"], event["quantity"], event["trade_id"]
        buyer_fee, seller_fee = event.get("buyer_fee") or 0, event.get("seller_fee") or 0
        quote_amount = event.get("quote_amount")
        if quote_amount is None:
            quote_amount = price * quantity
            if symbol.scale_exponent is not None:
                exponent = symbol.scale_exponent
                quote_amount = quote_amount // 10**exponent if exponent >= 0 else quote_amount * 10**-exponent
        if quote_amount > I63_MAX:
            return "AMOUNT_OVERFLOW"
        if buyer_fee > quantity or seller_fee > quote_amount:
            return "FEE_EXCEEDS_AMOUNT"
        if not self._late and trade_id <= self._last_trade_ids.get(symbol.name, 0):
            return "TRADE_ID_NOT_RISING"
        buyer, seller, revenue = event["buyer_user_id"], event["seller_user_id"], self._rules.revenue_user_id
        postings = [
            (buyer, base, quantity - buyer_fee),
            (buyer, quote, -quote_amount),
            (seller, base, -quantity),
            (seller, quote, quote_amount - seller_fee),
        ]
        if buyer_fee > 0:
            postings.append((revenue, base, buyer_fee))
        if seller_fee > 0:
            postings.append((revenue, quote, seller_fee))
        time_us = event.get("ts_us")
        if time_us is None:
            time_us = event["settled_at"] * 1_000 or ((trade_id >> 16) * 1_000 if symbol.ms16 else 0)
        self._post(sequence, time_us, postings)
        self._last_trade_ids[symbol.name] = trade_id
        self.trades += 1
        row = (
            trade_id // symbol.page_width,
            trade_id,
            sequence,
            event["match_seq"],
            event["buy_order_id"],
            event["sell_order_id"],
            buyer,
            seller,
            base,
            quote,
            price,
            quantity,
            quote_amount,
            event.get("buyer_fee"),
            event.get("seller_fee"),
            event["buyer_refund"],
            event["seller_refund"],
            event["buyer_quote_version"],
            event["buyer_base_version"],
            event["seller_base_version"],
            event["seller_quote_version"],
            event["settled_at"],
            event.get("ts_us"),
            self._origin,
        )
        self.trade_rows[symbol.name][trade_id] = marshal.dumps(row, 2)
        return None

    def _ledger_event(self, sequence: int, event: Event) -> str | None:
        asset = event["asset"] if "asset" in event else event["currency"]
        if asset not in self._rules.assets:
            raise Halt("UNKNOWN_ASSET")
        user, kind, amount = event["user_id"], event["event_type"], event["amount"]
        time_us = event.get("ts_us")
        if time_us is None:
            time_us = event["created_at"] * 1_000
        self._post(sequence, time_us, [(user, asset, -amount if kind == "WITHDRAWAL" else amount)])
        self.event_rows[sequence] = (
            sequence // EVENT_PAGE,
            sequence,
            kind,
            user,
            asset,
            amount,
            event["related_id"],
            event["created_at"],
            self._origin,
        )
        return None

    def _post(self, sequence: int, time_us: int, postings: list[tuple[int, int, int]]) -> None:
        """Add the postings of one event: each account it touches counts it once."""
        changes: dict[tuple[int, int], int] = {}
        for user, asset, amount in postings:
            key = user, asset
            changes[key] = changes.get(key, 0) + amount
        for key, change in changes.items():
            available = self.accounts[key].available if key in self.accounts else 0
            if not -(2**63) <= available + change <= I63_MAX:
                raise Halt("BALANCE_OVERFLOW")
        for key, change in changes.items():
            account = self.accounts.get(key)
            if account is None:
                account = self.accounts[key] = Account()
            account.available += change
            account.version += 1
            account.last_sequence = sequence
            account.updated_at = time_us


# --- the journal ----------------------------------------------------------------------------------------------------


class Journal:
    """An engine's journal, put into the order of the sequence; remembers when each event was sent."""

    def __init__(
        self, path: Path, *, run: int, first_sequence: int, up_to: int | None, gaps: list[tuple[int, int]]
    ) -> None:
        """Take one run of a journal from `first_sequence` to `up_to`; gaps are sequences that were given up."""
        self._path = path
        self._run = run
        self._next = first_sequence
        self._up_to = I63_MAX if up_to is None else up_to
        self._gaps = gaps
        self.first_sequence = first_sequence
        self.sent_us = array("q")  # by sequence - first_sequence; 0: not sent, or given up
        self.is_trade = bytearray()
        self.faults: list[tuple[str, int]] = []  # what is wrong with the journal itself

    @property
    def next_sequence(self) -> int:
        """The sequence after the last one that was given out or given up."""
        return self._next

    def events(self) -> Iterator[Event]:
        """Yield the events in order, without those that were given up."""
        waiting: dict[int, Event] = {}
        decode = json.JSONDecoder().decode
        with self._path.open(encoding="utf-8") as lines:
            for line in lines:
                if not line.endswith("\n"):
                    break  # an engine that was killed while it wrote
                entry = decode(line)
                sequence, event = entry["seq"], entry["event"]
                fault = entry.get("fault")
                if entry.get("run", 1) != self._run or fault == "contradict":
                    continue
                if not self.first_sequence <= sequence <= self._up_to:
                    continue
                if sequence < self._next or sequence in waiting:
                    if not self._given_up(sequence):
                        self.faults.append(("JOURNAL_TWICE", sequence))
                    continue
                self._note(sequence, 0 if fault == "withheld" else entry["sent_us"], "trade_id" in event)
                waiting[sequence] = event
                while waiting:
                    if self._given_up(self._next):
                        waiting.pop(self._next, None)
                        self._note(self._next, 0, False)
                    elif self._next in waiting:
                        yield waiting.pop(self._next)
                    else:
                        break
                    self._next += 1
        if waiting:
            self.faults.append(("JOURNAL_HOLE", self._next))
        while self._given_up(self._next) and self._next <= self._up_to:
            self._next += 1

    def late_events(self, origins: list[int], corrected: Path | None) -> Iterator[Event]:
        """Yield the events of these sequences, in this order: what a late stream holds; corrected ones as they are."""
        with self._path.open(encoding="utf-8") as lines:
            entries = [json.loads(line) for line in lines if line.endswith("\n")]
        known = {entry["seq"]: entry["event"] for entry in entries if entry.get("run", 1) == self._run}
        if corrected is not None:
            for line in corrected.read_text().splitlines():
                event = json.loads(line)
                known[event["output_sequence"]] = event
        for self._next, origin in enumerate(origins, 2):
            yield known[origin]

    def _given_up(self, sequence: int) -> bool:
        return bool(self._gaps) and any(first <= sequence <= last for first, last in self._gaps)

    def _note(self, sequence: int, sent_us: int, is_trade: bool) -> None:
        place = sequence - self.first_sequence
        missing = place + 1 - len(self.sent_us)
        if missing > 0:
            self.sent_us.extend([0] * missing)
            self.is_trade.extend(bytes(missing))
        self.sent_us[place] = sent_us
        self.is_trade[place] = is_trade


# --- stores ---------------------------------------------------------------------------------------------------------


class Store(Protocol):
    """What the judge asks of a store."""

    def tables(self) -> set[str]:
        """Return the names of all tables."""

    def rows(self, table: str, columns: Iterable[str]) -> Iterator[Row]:
        """Yield all rows of a table, the columns in this order."""

    def close(self) -> None:
        """Let go of it."""


class SqliteStore:
    """A store in a SQLite file, read at one moment and never written."""

    def __init__(self, path: str) -> None:
        """Open it; sqlite3.Error when that fails."""
        self._connection = sqlite3.connect(Path(path).resolve().as_uri() + "?mode=ro", uri=True, isolation_level=None)
        self._connection.execute("BEGIN")

    def tables(self) -> set[str]:
        """Return the names of all tables."""
        return {name for (name,) in self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}

    def rows(self, table: str, columns: Iterable[str]) -> Iterator[Row]:
        """Yield all rows of a table, the columns in this order."""
        yield from self._connection.execute(f"SELECT {', '.join(columns)} FROM {table}")

    def close(self) -> None:
        """Let go of it."""
        self._connection.close()


class CassandraStore:
    """A store in a keyspace of Cassandra or ScyllaDB, read by plain paged SELECTs."""

    def __init__(self, host: str, port: int, keyspace: str, local_dc: str = "datacenter1") -> None:
        """Connect; ConnectionError when that fails."""
        driver, policies = import_module("cassandra.cluster"), import_module("cassandra.policies")
        query = import_module("cassandra.query")
        base = import_module("cassandra")
        profile = driver.ExecutionProfile(
            load_balancing_policy=policies.TokenAwarePolicy(policies.DCAwareRoundRobinPolicy(local_dc=local_dc)),
            consistency_level=base.ConsistencyLevel.LOCAL_QUORUM,
            request_timeout=60.0,
            row_factory=query.tuple_factory,
        )
        self._cluster = driver.Cluster([host], port=port, execution_profiles={driver.EXEC_PROFILE_DEFAULT: profile})
        try:
            self._session = self._cluster.connect(keyspace)
        except (driver.NoHostAvailable, base.DriverException) as error:
            self._cluster.shutdown()
            raise ConnectionError(f"can't use keyspace {keyspace} at {host}:{port}: {error}") from error
        self._keyspace = keyspace
        self._statement = query.SimpleStatement

    def tables(self) -> set[str]:
        """Return the names of all tables."""
        return set(self._cluster.metadata.keyspaces[self._keyspace].tables)

    def rows(self, table: str, columns: Iterable[str]) -> Iterator[Row]:
        """Yield all rows of a table, the columns in this order."""
        yield from self._session.execute(self._statement(f"SELECT {', '.join(columns)} FROM {table}", fetch_size=5_000))

    def close(self) -> None:
        """Let go of it."""
        self._cluster.shutdown()


def open_store(url: str) -> Store:
    """Open `sqlite:PATH` or `cassandra:HOST:PORT/KEYSPACE`; ValueError when it is neither."""
    kind, _, rest = url.partition(":")
    if kind == "sqlite" and rest:
        return SqliteStore(rest)
    address, _, keyspace = rest.partition("/")
    host, _, port = address.rpartition(":")
    if kind == "cassandra" and host and port.isdigit() and keyspace:
        return CassandraStore(host, int(port), keyspace)
    raise ValueError(f"--store {url}: wanted sqlite:PATH or cassandra:HOST:PORT/KEYSPACE")


# --- the comparison -------------------------------------------------------------------------------------------------


class Comparison:
    """Compares a store with a fold and collects the differences."""

    def __init__(
        self, store: Store, fold: Fold, stream: str, also_streams: Iterable[str] = (), engines: Iterable[str] = ()
    ) -> None:
        """Take what is to be compared; rows of `also_streams` are allowed, others are differences.

        `engines` are streams of other engines, which are compared with journals of their own.
        """
        self._store = store
        self._fold = fold
        self._stream = stream
        self._engines = set(engines)
        self._also_streams = self._engines | set(also_streams)
        self._tables = store.tables()
        self._strange: Counter[tuple[str, str]] = Counter()
        self._sums: Counter[int] = (
            Counter()
        )  # by asset: balances less deposits, withdrawals and adjustments, all as stored
        self.totals: Counter[tuple[int, int]] = Counter()  # by account, over all streams
        self.rows_compared = self.balances_equal = self.difference_count = 0
        self.differences: list[dict[str, Any]] = []

    def difference(self, what: str, **where: Any) -> None:
        """Note a difference."""
        self.difference_count += 1
        if len(self.differences) < DIFFERENCES_SHOWN_MAX:
            self.differences.append({"what": what, **where})

    def run(self, *, gaps: list[tuple[int, int]], next_sequence: int) -> None:
        """Compare every table."""
        self._compare_trades()
        self._compare_ledger_events()
        self._compare_rejected()
        self._compare_balances()
        self._compare_gaps(gaps)
        self._compare_positions(next_sequence)
        for asset, amount in self._sums.items():
            if amount:
                self.difference("SUM_BY_ASSET", asset_id=asset, balances_less_ledger_events=amount)
        for (table, stream), rows in self._strange.items():
            self.difference("STRANGE_STREAM", table=table, stream=stream, rows=rows)

    def compare_final(self, final: list[list[int]]) -> int:
        """Compare the sums over streams with the engine's own final balances; return how many are equal."""
        equal = 0
        listed = set()
        for user, asset, amount in final:
            listed.add((user, asset))
            actual = self.totals.get((user, asset))
            if actual == amount:
                equal += 1
            else:
                self.difference("FINAL_BALANCE", user_id=user, asset_id=asset, expected=amount, actual=actual)
        for (user, asset), actual in self.totals.items():
            if actual and (user, asset) not in listed:
                self.difference("FINAL_BALANCE", user_id=user, asset_id=asset, expected=None, actual=actual)
        return equal

    def _rows(
        self, table: str, columns: tuple[str, ...], *, own_streams_only: bool = True
    ) -> Iterator[tuple[str, Row]]:
        """Yield stream and row of a table; a missing one is a difference."""
        if table not in self._tables:
            self.difference("MISSING_TABLE", table=table)
            return
        for row in self._store.rows(table, (*columns, "stream")):
            stream = row[-1]
            if own_streams_only and stream != self._stream and stream not in self._also_streams:
                self._strange[table, stream] += 1
            yield stream, row[:-1]

    def _compare_row(self, table: str, columns: tuple[str, ...], key: object, expected: Row, actual: Row) -> None:
        """Name each column that differs, also by its type."""
        for column, wanted, found in zip(columns, expected, actual, strict=True):
            if wanted != found or type(wanted) is not type(found):
                self.difference("VALUE", table=table, key=key, column=column, expected=wanted, actual=found)

    def _compare_trades(self) -> None:
        prefix = "settled_trades_"
        for table in sorted(self._tables):
            if table.startswith(prefix) and table.removeprefix(prefix) not in self._fold.trade_rows:
                for stream, row in self._rows(table, TRADE_COLUMNS):
                    if stream == self._stream:
                        self.difference("EXTRA_ROW", table=table, key=row[1])
        for name, expected_rows in self._fold.trade_rows.items():
            table = prefix + name
            missing = expected_rows.copy()
            for stream, row in self._rows(table, TRADE_COLUMNS):
                trade_id = row[1]
                if stream != self._stream:
                    if trade_id in expected_rows and stream not in self._engines:
                        self.difference("TRADE_TWICE", table=table, key=trade_id, stream=stream)
                    continue
                self.rows_compared += 1
                expected = missing.pop(trade_id, None)
                if expected is None:
                    self.difference("EXTRA_ROW", table=table, key=trade_id, page=row[0], output_sequence=row[2])
                elif expected != marshal.dumps(row, 2):
                    self._compare_row(table, TRADE_COLUMNS, trade_id, marshal.loads(expected), row)  # noqa: S302
            for trade_id in missing:
                self.difference("MISSING_ROW", table=table, key=trade_id)

    def _compare_ledger_events(self) -> None:
        missing = self._fold.event_rows.copy()
        for stream, row in self._rows("ledger_events", EVENT_COLUMNS):
            if stream != self._stream:
                continue
            self.rows_compared += 1
            _, sequence, kind, _, asset, amount, *_ = row
            self._sums[asset] -= -amount if kind == "WITHDRAWAL" else amount
            expected = missing.pop(sequence, None)
            if expected is None:
                self.difference("EXTRA_ROW", table="ledger_events", key=sequence)
            elif expected != row:
                self._compare_row("ledger_events", EVENT_COLUMNS, sequence, expected, row)
        for sequence in missing:
            self.difference("MISSING_ROW", table="ledger_events", key=sequence)

    def _compare_rejected(self) -> None:
        table = "rejected_events"
        missing = self._fold.rejected.copy()
        for stream, row in self._rows(table, REJECTED_COLUMNS):
            if stream != self._stream:
                continue
            self.rows_compared += 1
            page, sequence, code, reason, payload = row
            expected = missing.pop(sequence, None)
            if expected is None:
                self.difference("EXTRA_ROW", table=table, key=sequence, code=code, reason=reason)
                continue
            wanted = sequence // EVENT_PAGE, sequence, expected[0]
            self._compare_row(table, REJECTED_COLUMNS[:3], sequence, wanted, (page, sequence, code))
            if not reason:
                self.difference("VALUE", table=table, key=sequence, column="reason", expected="any", actual=reason)
            if not _same_payload(expected[1], payload):
                self.difference("VALUE", table=table, key=sequence, column="payload", expected=str(expected[1])[:200])
        for sequence, (code, _) in missing.items():
            self.difference("MISSING_ROW", table=table, key=sequence, code=code)

    def _compare_balances(self) -> None:
        table = "user_balances"
        missing = self._fold.accounts.copy()
        for stream, row in self._rows(table, BALANCE_COLUMNS):
            user, asset, available, *_ = row
            self.totals[user, asset] += available
            if stream != self._stream:
                continue
            self.rows_compared += 1
            self._sums[asset] += available
            account = missing.pop((user, asset), None)
            if account is None:
                self.difference("EXTRA_ROW", table=table, key=[user, asset], available=available)
                continue
            wanted = user, asset, account.available, account.version, account.last_sequence, account.updated_at
            self.balances_equal += available == account.available
            if wanted != row:
                self._compare_row(table, BALANCE_COLUMNS, [user, asset], wanted, row)
        for key in missing:
            self.difference("MISSING_ROW", table=table, key=list(key))

    def _compare_gaps(self, gaps: list[tuple[int, int]]) -> None:
        columns = ("kind", "first_sequence", "last_sequence")
        decided = [
            (first, last)
            for stream, (kind, first, last) in self._rows("stream_decisions", columns, own_streams_only=False)
            if stream == self._stream and kind == "gap"
        ]
        wanted, found = _merged(gaps), _merged(decided)
        if wanted != found:
            self.difference("GAP_DECISIONS", expected=wanted, actual=found)

    def _compare_positions(self, next_sequence: int) -> None:
        rows = self._rows("settlement_state", ("kind", "sequence"), own_streams_only=False)
        positions = {kind: sequence for stream, (kind, sequence) in rows if stream == self._stream}
        acked, durable = positions.get("acked"), positions.get("durable")
        if acked is not None and acked >= next_sequence:
            self.difference("POSITION_AHEAD", kind="acked", expected=next_sequence - 1, actual=acked)
        if durable is not None and (acked is None or durable > acked):
            self.difference("POSITION_AHEAD", kind="durable", expected=acked, actual=durable)


def _same_payload(event: Event, payload: object) -> bool:
    """Tell whether a kept payload is the event as it was sent."""
    if not isinstance(payload, bytes):
        return False
    packed: bytes = _pack(event)
    if len(packed) > PAYLOAD_BYTES_MAX:
        return payload == packed[:PAYLOAD_BYTES_MAX]
    try:
        return bool(msgpack.unpackb(payload) == event)
    except ValueError:
        return False


def _merged(ranges: list[tuple[int, int]]) -> list[list[int]]:
    merged: list[list[int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return merged


# --- times ----------------------------------------------------------------------------------------------------------


def measure_acks(path: Path, journal: Journal) -> dict[str, Any]:
    """Return latencies from the intended send time to the first acknowledgement, and trades a second.

    The rate counts all acknowledged trades from the first to the last acknowledgement. An event without one is counted,
    not measured.
    """
    first = journal.first_sequence
    acked_us = array("q", bytes(8 * len(journal.sent_us)))
    first_ack_us, last_ack_us = math.inf, -math.inf
    with path.open() as lines:
        for line in lines:
            fields = line.split()
            if not line.endswith("\n") or len(fields) != 3:
                continue  # the last line of a process that was killed
            begin, end, at_us = (int(field) for field in fields)
            first_ack_us, last_ack_us = min(first_ack_us, at_us), max(last_ack_us, at_us)
            for place in range(max(begin - first, 0), min(end - first + 1, len(acked_us))):
                if not acked_us[place] or at_us < acked_us[place]:
                    acked_us[place] = at_us
    latencies = sorted(ack - sent for ack, sent in zip(acked_us, journal.sent_us, strict=True) if ack and sent)
    trades = sum(1 for ack, is_trade in zip(acked_us, journal.is_trade, strict=True) if ack and is_trade)
    unacked = sum(1 for ack, sent in zip(acked_us, journal.sent_us, strict=True) if sent and not ack)
    seconds = (last_ack_us - first_ack_us) / 1e6
    result: dict[str, Any] = {"acked_events": len(latencies), "unacked_events": unacked}
    for name, share in (("p50_ms", 0.5), ("p90_ms", 0.9), ("p99_ms", 0.99), ("p999_ms", 0.999), ("max_ms", 1.0)):
        place = max(math.ceil(share * len(latencies)) - 1, 0)
        result[name] = latencies[place] / 1_000 if latencies else None
    result["trades_per_s"] = round(trades / seconds, 1) if seconds > 0 else None
    return result


# --- command line ---------------------------------------------------------------------------------------------------

_EPILOG = """\
RULES.json, as `bench/engine.py --source binance --print-rules` writes it:
  {"assets": {"btc": {"id": 1, "decimals": 8}, ...},
   "symbols": {"btc_usdt": {"base": "btc", "quote": "usdt", "price_decimals": 2, "quote_amount": "raw" or "scaled",
                            "trade_id_time": "none" or "ms16", "page_width": 10000}, ...},
   "revenue_user_id": 0}

The store must be at rest: nothing may settle while it is judged. Faults in the journal: a withheld or corrupt event is
expected to be settled (it was fetched by replay), unless it is named by --accepted-gaps; what the contract rejects is
predicted; a contradiction is left out. Settlement halts there and at a restart: judge what was settled with --up-to,
the life after a restart with --run 2 and its --stream.

example:
  python bench/judge.py --journal journal.jsonl --rules rules.json --store sqlite:settlement.db \\
      --balances bench/data/engine-session-balances.json --json
"""


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    pair = int(first), int(last or first)
    if pair[1] < pair[0]:
        raise argparse.ArgumentTypeError(f"{text}: wanted FROM-TO")
    return pair


def _rejection(text: str) -> tuple[int, str]:
    sequence, _, code = text.partition(":")
    if not sequence.isdigit() or not code:
        raise argparse.ArgumentTypeError(f"{text}: wanted SEQ:CODE")
    return int(sequence), code


def _engine(text: str) -> tuple[str, Path]:
    stream, _, journal = text.partition("=")
    if not stream or not journal:
        raise argparse.ArgumentTypeError(f"{text}: wanted STREAM=FILE")
    return stream, Path(journal)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/judge.py",
        description="Folds an engine's journal by the contract and compares a store with it. Exit 0: all is equal.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--journal", type=Path, required=True, metavar="FILE", help="what the engine published")
    add("--rules", type=Path, required=True, metavar="FILE", help="assets and symbols, see below")
    add("--store", required=True, metavar="STORE", help="sqlite:PATH or cassandra:HOST:PORT/KEYSPACE")
    add("--stream", default="main", help="the stream to judge (default main)")
    add(
        "--beside",
        type=_engine,
        action="append",
        default=[],
        metavar="STREAM=FILE",
        help="another engine's stream and its journal, judged as well; balances are sums over all of them",
    )
    add("--sums", type=Path, metavar="FILE", help="write each user's summed balances, [[user, asset, amount], ...]")
    add(
        "--also-stream",
        action="append",
        default=[],
        metavar="NAME",
        help="may be there too; is not judged",
    )
    add("--first-sequence", type=int, default=1, metavar="N", help="where the stream begins (default 1)")
    add("--up-to", type=int, metavar="N", help="judge the journal up to this sequence (default: all)")
    add(
        "--run",
        type=int,
        default=1,
        metavar="N",
        help="run of an engine that restarted (default 1)",
    )
    add(
        "--accepted-gaps",
        type=_range,
        nargs="+",
        action="extend",
        default=[],
        metavar="FROM-TO",
        help="sequences given up",
    )
    add(
        "--rejected",
        type=_rejection,
        nargs="+",
        action="extend",
        default=[],
        metavar="SEQ:CODE",
        help="rejected by decision",
    )
    add(
        "--origins",
        type=int,
        nargs="+",
        metavar="SEQ",
        help="judge a late stream: these sequences of the journal, in this order",
    )
    add("--corrected", type=Path, metavar="FILE", help="with --origins: JSON lines of events that were made valid")
    add("--balances", type=Path, metavar="FILE", help="the engine's own final balances, [[user, asset, amount], ...]")
    add("--acks", type=Path, metavar="FILE", help='acknowledged batches, lines "first_sequence last_sequence acked_us"')
    add("--json", action="store_true", help="one JSON object on stdout")
    return parser


class Folded(NamedTuple):
    """One stream as its journal says it must be."""

    stream: str
    fold: Fold
    journal: Journal
    gaps: list[tuple[int, int]]
    halted: dict[str, Any] | None  # by which event, where settlement can't go on without an operator

    @property
    def next_sequence(self) -> int:
        """The sequence after the last one that can be settled."""
        return self.halted["sequence"] if self.halted else self.journal.next_sequence


def fold_stream(
    stream: str, fold: Fold, journal: Journal, events: Iterable[Event], *, gaps: list[tuple[int, int]], late: bool
) -> Folded:
    """Fold a stream's events up to the one at which settlement halts."""
    halted: dict[str, Any] | None = None
    for number, event in enumerate(events, 1):
        if halted is None:
            try:
                fold.add(event, number if late else None)
            except Halt as halt:
                halted = {"sequence": event["output_sequence"], "code": str(halt)}
        if fold.events % 100_000 == 0 and sys.stderr.isatty():
            print(f"judge: {fold.events:,} events folded", file=sys.stderr)
    return Folded(stream, fold, journal, gaps, halted)


def _folded(args: argparse.Namespace) -> list[Folded]:
    """Fold every stream that is judged, first the one that all options are about."""
    late = args.origins is not None
    rules = Rules(json.loads(args.rules.read_text()))
    fold = Fold(rules, rejected=dict(args.rejected), late=late)
    journal = Journal(
        args.journal, run=args.run, first_sequence=args.first_sequence, up_to=args.up_to, gaps=args.accepted_gaps
    )
    events = journal.late_events(args.origins, args.corrected) if late else journal.events()
    folded = [fold_stream(args.stream, fold, journal, events, gaps=args.accepted_gaps, late=late)]
    for stream, path in args.beside:
        journal = Journal(path, run=1, first_sequence=1, up_to=None, gaps=[])
        folded.append(fold_stream(stream, Fold(rules), journal, journal.events(), gaps=[], late=False))
    return folded


def judge(args: argparse.Namespace) -> dict[str, Any]:
    """Return the report; errors of files, JSON and stores pass through."""
    folded = _folded(args)
    first = folded[0]
    streams = {one.stream for one in folded}
    if len(streams) < len(folded):
        raise ValueError(f"--beside: {', '.join(one.stream for one in folded)}: each stream once")
    sums: Counter[tuple[int, int]] = Counter()
    for one in folded:
        for account, row in one.fold.accounts.items():
            sums[account] += row.available
    compared = []
    with closing(open_store(args.store)) as store:
        for one in folded:
            comparison = Comparison(store, one.fold, one.stream, args.also_stream, streams - {one.stream})
            for what, sequence in one.journal.faults:
                comparison.difference(what, sequence=sequence)
            comparison.run(gaps=one.gaps, next_sequence=one.next_sequence)
            compared.append(comparison)
    final = [[*account, amount] for account, amount in sorted(sums.items())]
    if args.sums:
        args.sums.write_text(json.dumps(final))
    balances, balances_equal = len(first.fold.accounts), compared[0].balances_equal
    if args.balances:
        final = json.loads(args.balances.read_text())
    if args.balances or args.beside:
        balances, balances_equal = len(final), compared[0].compare_final(final)
    report = {
        "ok": not any(comparison.difference_count for comparison in compared),
        "trades": sum(one.fold.trades for one in folded),
        "events": sum(one.fold.events for one in folded),
        "rejected": sum(len(one.fold.rejected) for one in folded),
        "rows_compared": sum(comparison.rows_compared for comparison in compared),
        "balances_equal": balances_equal,
        "balances": balances,
        "accounts": sum(len(one.fold.accounts) for one in folded),
        "halted": next((one.halted for one in folded if one.halted), None),
        "differences": [difference for comparison in compared for difference in comparison.differences],
        "difference_count": sum(comparison.difference_count for comparison in compared),
    }
    if args.beside:
        report["streams"] = {one.stream: one.fold.events for one in folded}
    if args.acks:
        report |= measure_acks(args.acks, first.journal)
    return report


def main(argv: list[str] | None = None) -> int:
    """Judge; 0 when all is equal, 1 when not, 2 when that can't be told."""
    args = _parser().parse_args(argv)
    gc.disable()  # nothing here makes cycles, and there is much to keep
    try:
        report = judge(args)
    except (OSError, ValueError, KeyError, sqlite3.Error) as error:
        print(f"judge: can't judge: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(report, default=repr))
        return 0 if report["ok"] else 1
    print("equal" if report["ok"] else f"NOT EQUAL: {report['difference_count']} differences")
    for name, value in report.items():
        if name not in ("ok", "differences"):
            print(f"  {name}: {value}")
    for difference in report["differences"]:
        print("  " + ", ".join(f"{name} {value}" for name, value in difference.items()))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
