"""The embedded store: the same rows as Cassandra's in one SQLite file, and every promise kept.

One connection writes, on one thread; batches that wait are committed together (WAL, synchronous=FULL). There are no
write times here: a balance row only moves forward by `last_sequence`, a state row by `sequence`, which gives the same
end as stamps do. Each transaction first checks that the decision log is no longer than its settler has read.

After a crash the file holds every acknowledged transaction, whole; one that was under way is there whole or not at all.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from sidecar.batch import BALANCE_COLUMNS, LEDGER_COLUMNS, REJECTED_COLUMNS, ROW_PAGE_WIDTH, TRADE_COLUMNS, Batch, Row
from sidecar.disk import DiskThread, insert_rows, transaction
from sidecar.errors import OutcomeUnknownError, StartOver, StoreRefusedError
from sidecar.events import I63_MAX, AccountKey, AccountValues, Balance, Decision, State
from sidecar.store.base import (
    KEYSPACE_STREAM,
    SCAN_ROWS,
    ProofFinding,
    ProofRun,
    StampedBalance,
    Store,
    by_partition,
    summed,
)

T = TypeVar("T")

_CACHE_KIB: Final = 65_536  # a million balance rows; with SQLite's own 2 MiB every trade of 300,000 users reads pages
_STATEMENTS_KEPT: Final = 2_048  # some for each symbol: with fewer, each of 200 symbols' is prepared anew each time
_READ_KEYS: Final = 400

_BALANCE_KEY: Final = ("user_id", "asset_id", "stream")

_TEXT: Final = {"stream": "TEXT", "event_type": "TEXT", "code": "TEXT", "reason": "TEXT", "payload": "BLOB"}


def _columns(names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {_TEXT.get(name, 'INTEGER')}" for name in names)


def _trades_table(symbol: str) -> str:
    return (
        f"CREATE TABLE IF NOT EXISTS settled_trades_{symbol} ({_columns(TRADE_COLUMNS)},"
        " PRIMARY KEY (page, trade_id, stream)) WITHOUT ROWID"
    )


_SCHEMA: Final = (
    f"CREATE TABLE IF NOT EXISTS user_balances ({_columns(BALANCE_COLUMNS)},"
    " PRIMARY KEY (user_id, asset_id, stream)) WITHOUT ROWID",
    f"CREATE TABLE IF NOT EXISTS ledger_events ({_columns(LEDGER_COLUMNS)},"
    " PRIMARY KEY (stream, page, output_sequence)) WITHOUT ROWID",
    f"CREATE TABLE IF NOT EXISTS rejected_events ({_columns(REJECTED_COLUMNS)}, resolution TEXT,"
    " PRIMARY KEY (stream, page, output_sequence)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS settlement_state (stream TEXT, kind TEXT, sequence INTEGER, stamp_us INTEGER,"
    " last_trade_ids TEXT, PRIMARY KEY (stream, kind)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS stream_decisions (stream TEXT, number INTEGER, kind TEXT, first_sequence INTEGER,"
    " last_sequence INTEGER, body TEXT, reason TEXT, decided_by TEXT, decided_at INTEGER,"
    " PRIMARY KEY (stream, number)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS reconciliation_runs (day TEXT, started_at INTEGER, run_id TEXT, stream TEXT,"
    " up_to_sequence INTEGER, accounts INTEGER, events INTEGER, findings INTEGER, finished_at INTEGER,"
    " PRIMARY KEY (day, started_at, run_id)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS reconciliation_findings (run_id TEXT, number INTEGER, code TEXT, stream TEXT,"
    " user_id INTEGER, asset_id INTEGER, sequence INTEGER, expected INTEGER, actual INTEGER, detail TEXT,"
    " fixed_at INTEGER, PRIMARY KEY (run_id, number)) WITHOUT ROWID",
)

# A newer release may have added columns: every statement names those that it means.
_DECISION_COLUMNS: Final = (
    "stream", "number", "kind", "first_sequence", "last_sequence", "body", "reason", "decided_by", "decided_at",
)  # fmt: skip
_RUN_COLUMNS: Final = (
    "day", "started_at", "run_id", "stream", "up_to_sequence", "accounts", "events", "findings", "finished_at",
)  # fmt: skip
_FINDING_COLUMNS: Final = (
    "number", "code", "stream", "user_id", "asset_id", "sequence", "expected", "actual", "detail", "fixed_at",
)  # fmt: skip


def _insert(where: str, columns: tuple[str, ...]) -> str:
    return f"INSERT {where} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


# Statements, beside their tables. A row that is there already is the same row: it is written in any case.
_BALANCES_HEAD: Final = f"INSERT INTO user_balances ({', '.join(BALANCE_COLUMNS)}) VALUES "
_BALANCES_FOOT: Final = (
    " ON CONFLICT (user_id, asset_id, stream) DO UPDATE SET available = excluded.available, version = excluded.version,"
    " last_sequence = excluded.last_sequence, updated_at = excluded.updated_at"
    " WHERE excluded.last_sequence > user_balances.last_sequence"
)
_LEDGER_HEAD: Final = f"INSERT OR REPLACE INTO ledger_events ({', '.join(LEDGER_COLUMNS)}) VALUES "
_REJECTED_HEAD: Final = f"INSERT INTO rejected_events ({', '.join(REJECTED_COLUMNS)}) VALUES "
_REJECTED_FOOT: Final = (
    " ON CONFLICT (stream, page, output_sequence) DO UPDATE SET code = excluded.code, reason = excluded.reason,"
    " payload = excluded.payload"
)
_STATE: Final = (
    "INSERT INTO settlement_state (stream, kind, sequence, stamp_us, last_trade_ids) VALUES (?, ?, ?, ?, ?)"
    " ON CONFLICT (stream, kind) DO UPDATE SET"
    " sequence = excluded.sequence, stamp_us = excluded.stamp_us, last_trade_ids = excluded.last_trade_ids"
    " WHERE excluded.sequence >= settlement_state.sequence"
)


class SQLiteStore(Store):
    """Rows in one file; `path` may be shared by several processes on this host."""

    name = "sqlite"
    durable_at_once = True

    def __init__(self, path: Path, page_widths: dict[str, int]) -> None:
        """Remember the file; `open` opens or creates it."""
        super().__init__(page_widths)
        self.path = path
        self._writer = DiskThread("sqlite-write")
        self._reader = DiskThread("sqlite-read")
        self._waiting: list[tuple[Batch, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None
        self._opened_at = 0.0
        self._trades_heads: dict[str, str] = {}

    async def open(self) -> None:
        """Open the file and create missing tables that no symbol is needed for."""
        self._opened_at = asyncio.get_running_loop().time()
        self._db = await self._write(self._connect)
        self._read_db = await self._read(self._connect)
        await self.apply_schema(())

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, timeout=5.0, cached_statements=_STATEMENTS_KEPT
        )
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        return db

    async def close(self) -> None:
        """Close the file; a transaction under way is finished first."""
        self._writer.close()
        self._reader.close()
        for db in (getattr(self, "_db", None), getattr(self, "_read_db", None)):
            if db is not None:
                db.close()

    @property
    def steady_since(self) -> float | None:
        """A file is always connected."""
        return self._opened_at

    @property
    def outages(self) -> int:
        """A file is never away."""
        return 0

    @property
    def nodes_away(self) -> list[str]:
        """A file has no nodes."""
        return []

    def schema(self, symbols: Iterable[str]) -> str:
        """Give the statements as text."""
        return "".join(f"{statement};\n" for statement in (*map(_trades_table, sorted(symbols)), *_SCHEMA))

    async def ready_for(self, symbols: Iterable[str]) -> None:
        """Create the tables that are missing: an embedded store needs no `schema apply`."""
        await self.apply_schema(symbols)

    async def apply_schema(self, symbols: Iterable[str]) -> list[str]:
        """Create missing tables, check the columns of those that are there."""
        if not hasattr(self, "_db"):
            await self.open()
        return await self._write(self._apply_schema, sorted(symbols))

    def _apply_schema(self, symbols: list[str]) -> list[str]:
        db = self._db
        have = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for statement in (*_SCHEMA, *map(_trades_table, symbols)):
            db.execute(statement)
        wanted: dict[str, tuple[str, ...]] = {f"settled_trades_{symbol}": TRADE_COLUMNS for symbol in symbols}
        wanted |= {"user_balances": BALANCE_COLUMNS, "ledger_events": LEDGER_COLUMNS}
        for table, columns in wanted.items():
            found = {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
            if missing := set(columns) - found:
                raise StoreRefusedError(
                    f"{self.path}: table {table} lacks {', '.join(sorted(missing))}; it was made by another program:"
                    " name another file as store.sqlite.path"
                )
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return sorted(set(names) - have)

    # --- threads ---

    async def _write(self, work: Callable[..., T], *args: object) -> T:
        return await self._run(self._writer, work, *args)

    async def _read(self, work: Callable[..., T], *args: object) -> T:
        return await self._run(self._reader, work, *args)

    async def _run(self, thread: DiskThread, work: Callable[..., T], *args: object) -> T:
        try:
            return await thread.run(work, *args)
        except sqlite3.Error as error:
            raise self._classified(error) from error

    def _classified(self, error: sqlite3.Error) -> Exception:
        """Say what is done about an error, by its class: the one place where SQLite's errors become ours."""
        message = f"{self.path}: {error} ({getattr(error, 'sqlite_errorname', '?')})"
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM):
            return OutcomeUnknownError(message)
        return StoreRefusedError(message)

    # --- the way of a trade ---

    async def load_accounts(self, stream: str, keys: Iterable[AccountKey]) -> dict[AccountKey, AccountValues]:
        """Read balance rows, many keys a query."""
        return await self._read(self._load_accounts, stream, list(keys))

    def _load_accounts(self, stream: str, keys: list[AccountKey]) -> dict[AccountKey, AccountValues]:
        found: dict[AccountKey, AccountValues] = {}
        for at in range(0, len(keys), _READ_KEYS):
            some = keys[at : at + _READ_KEYS]
            places = ", ".join(["(?, ?)"] * len(some))
            rows = self._read_db.execute(
                f"WITH wanted (u, a) AS (VALUES {places}) SELECT user_id, asset_id, available, version, last_sequence,"
                " updated_at FROM wanted JOIN user_balances ON user_id = u AND asset_id = a WHERE stream = ?",
                [value for key in some for value in key] + [stream],
            ).fetchall()
            found |= {(row[0], row[1]): row[2:] for row in rows}
        return found

    async def settle_batch_atomically(self, batch: Batch) -> None:
        """Commit a batch, together with the others that wait."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[None] = loop.create_future()
        self._waiting.append((batch, answer))
        if self._writing is None:
            self._writing = loop.create_task(self._settle_waiting())
        await answer

    async def _settle_waiting(self) -> None:
        try:
            while self._waiting:
                taken, self._waiting = self._waiting, []
                try:
                    error: BaseException | None = None
                    await self._write(self._settle, [batch for batch, _ in taken])
                except Exception as caught:  # noqa: BLE001 - it is the answer to every batch of the transaction
                    error = caught
                for _, answer in taken:
                    if answer.done():
                        continue
                    if error is None:
                        answer.set_result(None)
                    else:
                        answer.set_exception(error)
        finally:
            self._writing = None

    def _settle(self, batches: list[Batch]) -> None:
        trades: dict[str, list[Row]] = {}
        ledger_events: list[Row] = []
        rejected: list[Row] = []
        balances: dict[tuple[int, int, str], Row] = {}
        for batch in batches:
            for symbol, rows in batch.trades.items():
                trades.setdefault(symbol, []).extend(rows)
            ledger_events += batch.ledger_events
            rejected += batch.rejected
            for row in batch.balance_rows():
                place = row[:3]
                if place not in balances or balances[place][5] < row[5]:
                    balances[place] = row
        db = self._db
        with transaction(db):
            for stream, read in {(batch.stream, batch.decisions_read) for batch in batches}:
                query = "SELECT count(*) FROM stream_decisions WHERE stream = ?"
                if db.execute(query, (stream,)).fetchone()[0] > read:
                    raise StartOver(f"the decisions of stream {stream} are more than the {read} that were read")
            for symbol, rows in trades.items():
                insert_rows(db, self._trades_head(symbol), len(TRADE_COLUMNS), rows, repeatable=True)
            insert_rows(db, _LEDGER_HEAD, len(LEDGER_COLUMNS), ledger_events)
            insert_rows(db, _REJECTED_HEAD, len(REJECTED_COLUMNS), rejected, _REJECTED_FOOT)
            insert_rows(
                db, _BALANCES_HEAD, len(BALANCE_COLUMNS), list(balances.values()), _BALANCES_FOOT, repeatable=True
            )

    def _trades_head(self, symbol: str) -> str:
        head = self._trades_heads.get(symbol)
        if head is None:
            head = f"INSERT OR REPLACE INTO settled_trades_{symbol} ({', '.join(TRADE_COLUMNS)}) VALUES "
            self._trades_heads[symbol] = head
        return head

    async def load_state(self, stream: str) -> dict[str, State]:
        """Read the positions."""
        query = "SELECT kind, sequence, stamp_us, last_trade_ids FROM settlement_state WHERE stream = ?"
        rows = await self._read(self._select, query, (stream,))
        return {kind: State(sequence, stamp_us, json.loads(ids)) for kind, sequence, stamp_us, ids in rows}

    async def save_state(self, stream: str, kind: str, state: State) -> None:
        """Move one position forward."""
        row = (stream, kind, state.sequence, state.stamp_us, json.dumps(state.last_trade_ids))
        await self._write(self._db.execute, _STATE, row)

    # --- decisions ---

    async def read_decisions(self, stream: str) -> list[Decision]:
        """Read the whole log."""
        query = f"SELECT {', '.join(_DECISION_COLUMNS)} FROM stream_decisions WHERE stream = ? ORDER BY number"
        return [Decision(*row) for row in await self._read(self._select, query, (stream,))]

    async def append_decision(self, decision: Decision) -> bool:
        """Append, unless the number is taken."""
        return await self._write(self._append_decision, decision)

    def _append_decision(self, decision: Decision) -> bool:
        cursor = self._db.execute(_insert("OR IGNORE INTO stream_decisions", _DECISION_COLUMNS), decision)
        return cursor.rowcount == 1

    # --- look-ups and scans ---

    def _select(self, query: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._read_db.execute(query, values).fetchall()
        except sqlite3.OperationalError as error:
            if "no such table: settled_trades_" in str(error):
                return []
            raise

    async def _trades(self, symbol: str, trade_id: int, columns: str) -> list[tuple[Any, ...]]:
        page = self.page_of(symbol, trade_id)
        query = f"SELECT {columns} FROM settled_trades_{symbol} WHERE page = ? AND trade_id = ? ORDER BY stream"
        return await self._read(self._select, query, (page, trade_id))

    async def trade_exists(self, symbol: str, trade_id: int, stream: str | None = None) -> bool:
        """Read one partition."""
        rows = await self._trades(symbol, trade_id, "stream")
        return bool(rows) if stream is None else (stream,) in rows

    async def get_trade(self, symbol: str, trade_id: int) -> list[dict[str, Any]]:
        """Read one partition."""
        rows = await self._trades(symbol, trade_id, ", ".join(TRADE_COLUMNS))
        return [dict(zip(TRADE_COLUMNS, row, strict=True)) for row in rows]

    async def get_user_balance(self, user_id: int, asset_id: int) -> Balance | None:
        """Sum one account over streams."""
        return summed([row for row in await self.get_user_balances(user_id) if row.asset_id == asset_id])

    async def get_user_balances(self, user_id: int) -> list[Balance]:
        """Read one partition."""
        query = f"SELECT {', '.join(BALANCE_COLUMNS)} FROM user_balances WHERE user_id = ? ORDER BY asset_id, stream"
        return [Balance(*row) for row in await self._read(self._select, query, (user_id,))]

    async def _one(self, table: str, columns: tuple[str, ...], stream: str, sequence: int) -> dict[str, Any] | None:
        query = f"SELECT {', '.join(columns)} FROM {table} WHERE stream = ? AND page = ? AND output_sequence = ?"
        rows = await self._read(self._select, query, (stream, sequence // ROW_PAGE_WIDTH, sequence))
        return dict(zip(columns, rows[0], strict=True)) if rows else None

    async def get_rejected(self, stream: str, output_sequence: int) -> dict[str, Any] | None:
        """Read one row."""
        return await self._one("rejected_events", (*REJECTED_COLUMNS, "resolution"), stream, output_sequence)

    async def resolve_rejected(self, stream: str, output_sequence: int, resolution: str, now_us: int) -> None:
        """Write one column of one row."""
        del now_us  # there are no write times here
        statement = "UPDATE rejected_events SET resolution = ? WHERE stream = ? AND page = ? AND output_sequence = ?"
        values = (resolution, stream, output_sequence // ROW_PAGE_WIDTH, output_sequence)
        await self._write(self._db.execute, statement, values)

    async def get_ledger_event(self, stream: str, output_sequence: int) -> dict[str, Any] | None:
        """Read one row."""
        return await self._one("ledger_events", LEDGER_COLUMNS, stream, output_sequence)

    async def _scan(
        self,
        table: str,
        columns: tuple[str, ...],
        key: tuple[str, ...],
        where: str = "",
        values: tuple[Any, ...] = (),
        rows_a_page: int = SCAN_ROWS,
    ) -> AsyncIterator[list[tuple[Any, ...]]]:
        """Page through a table by its key, each page a query of its own: no read transaction stays open."""
        places = [columns.index(name) for name in key]
        after: tuple[Any, ...] | None = None
        while True:
            conditions = [where] if where else []
            if after is not None:
                conditions.append(f"({', '.join(key)}) > ({', '.join('?' * len(key))})")
            clause = f" WHERE {' AND '.join(conditions)}" if conditions else ""
            query = f"SELECT {', '.join(columns)} FROM {table}{clause} ORDER BY {', '.join(key)} LIMIT {rows_a_page}"
            rows = await self._read(self._select, query, values + (after or ()))
            if rows:
                yield rows
            if len(rows) < rows_a_page:
                return
            after = tuple(rows[-1][place] for place in places)

    def scan_trades(self, symbol: str) -> AsyncIterator[list[tuple[Any, ...]]]:
        """Go through a symbol's table."""
        return self._scan(f"settled_trades_{symbol}", TRADE_COLUMNS, ("page", "trade_id", "stream"))

    def scan_ledger_events(
        self, stream: str, first: int, last: int, *, rows_a_page: int = SCAN_ROWS
    ) -> AsyncIterator[list[tuple[Any, ...]]]:
        """Go through a stream's ledger events."""
        return self._by_sequence("ledger_events", LEDGER_COLUMNS, (stream, first, last), rows_a_page)

    def scan_rejected(
        self, stream: str, first: int, last: int, *, rows_a_page: int = SCAN_ROWS
    ) -> AsyncIterator[list[tuple[Any, ...]]]:
        """Go through a stream's rejected events."""
        return self._by_sequence("rejected_events", REJECTED_COLUMNS, (stream, first, last), rows_a_page)

    def _by_sequence(
        self, table: str, columns: tuple[str, ...], span: tuple[str, int, int], rows_a_page: int
    ) -> AsyncIterator[list[tuple[Any, ...]]]:
        where = "stream = ? AND output_sequence BETWEEN ? AND ?"
        return self._scan(table, columns, ("page", "output_sequence"), where, span, rows_a_page)

    async def scan_balances(self) -> AsyncIterator[list[Balance]]:
        """Go through all balance rows."""
        async for rows in self._scan("user_balances", BALANCE_COLUMNS, _BALANCE_KEY):
            yield [Balance(*row) for row in rows]

    # --- what a proof of the ledger reads and writes ---

    async def list_streams(self) -> list[str]:
        """Read the names in the decision log."""
        query = "SELECT DISTINCT stream FROM stream_decisions WHERE stream <> ? ORDER BY stream"
        return [row[0] for row in await self._read(self._select, query, (KEYSPACE_STREAM,))]

    async def scan_stamped_balances(self, *, rows_a_page: int = SCAN_ROWS) -> AsyncIterator[list[StampedBalance]]:
        """Go through all balance rows; a file keeps no write times."""
        async for rows in self._scan("user_balances", BALANCE_COLUMNS, _BALANCE_KEY, rows_a_page=rows_a_page):
            yield [StampedBalance._make((*row, 0)) for row in rows]

    async def get_stamped_balances(self, user_id: int) -> list[StampedBalance]:
        """Read one partition."""
        return [StampedBalance(*row, write_us=0) for row in await self.get_user_balances(user_id)]

    def scan_trades_after(
        self, symbol: str, after: int | None, *, rows_a_page: int = SCAN_ROWS
    ) -> AsyncIterator[tuple[int | None, list[tuple[Any, ...]]]]:
        """Go through a symbol's table, from behind a page."""
        where, values = ("page > ?", (after,)) if after is not None else ("", ())
        columns, key = ("page", *TRADE_COLUMNS), ("page", "trade_id", "stream")
        return by_partition(self._scan(f"settled_trades_{symbol}", columns, key, where, values, rows_a_page))

    def scan_trades_between(
        self, symbol: str, first: int, last: int | None, *, rows_a_page: int = SCAN_ROWS
    ) -> AsyncIterator[list[tuple[Any, ...]]]:
        """Go through the trades of some pages."""
        first_page, bound = self.page_of(symbol, first), I63_MAX if last is None else last
        where = "page BETWEEN ? AND ? AND trade_id BETWEEN ? AND ?"
        values = (first_page, self.page_of(symbol, bound), first, bound)
        key = ("page", "trade_id", "stream")
        return self._scan(f"settled_trades_{symbol}", TRADE_COLUMNS, key, where, values, rows_a_page)

    async def repair(
        self,
        stream: str,
        rows: Iterable[Balance],
        absent: Iterable[AccountKey],
        stamp_us: int,
        decision: Decision | None,
    ) -> bool:
        """Write the rows as they must be, and the decision, in one transaction; there are no write times."""
        del stamp_us
        return await self._write(self._repair, stream, list(rows), list(absent), decision)

    def _repair(self, stream: str, rows: list[Balance], absent: list[AccountKey], decision: Decision | None) -> bool:
        db = self._db
        with transaction(db):
            if decision is not None and not self._append_decision(decision):
                return False
            db.executemany(_insert("OR REPLACE INTO user_balances", BALANCE_COLUMNS), rows)
            delete = "DELETE FROM user_balances WHERE user_id = ? AND asset_id = ? AND stream = ?"
            db.executemany(delete, [(*key, stream) for key in absent])
        return True

    async def save_run(self, run: ProofRun) -> None:
        """Write a run's row."""
        day = datetime.fromtimestamp(run.started_at_ms / 1000, UTC).date().isoformat()
        row = (day, run.started_at_ms, run.run_id, run.stream, *run[3:])
        await self._write(self._db.execute, _insert("OR REPLACE INTO reconciliation_runs", _RUN_COLUMNS), row)

    async def save_findings(self, run_id: str, findings: Iterable[ProofFinding]) -> None:
        """Write a run's findings."""
        rows = [(run_id, *finding) for finding in findings]
        statement = _insert("OR REPLACE INTO reconciliation_findings", ("run_id", *_FINDING_COLUMNS))
        for at in range(0, len(rows), SCAN_ROWS):
            await self._write(self._db.executemany, statement, rows[at : at + SCAN_ROWS])

    async def load_findings(self, run_id: str) -> list[ProofFinding]:
        """Read a run's findings."""
        query = f"SELECT {', '.join(_FINDING_COLUMNS)} FROM reconciliation_findings WHERE run_id = ? ORDER BY number"
        return [ProofFinding(*row) for row in await self._read(self._select, query, (run_id,))]
