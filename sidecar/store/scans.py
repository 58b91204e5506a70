"""What a proof of the ledger reads from Cassandra and writes to it: whole tables, write times, repairs, what it found.

A part of the Cassandra store (cassandra.py asks and classifies; nothing here touches the driver). Scans go partition by
partition in the ring's order, a page at a time, so that what the cluster bears is up to whoever asks for the next one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sidecar.batch import BALANCE_COLUMNS, TRADE_COLUMNS
from sidecar.events import I63_MAX, AccountKey, Balance, Decision
from sidecar.store import tables
from sidecar.store.base import (
    KEYSPACE_STREAM,
    SCAN_ROWS,
    ProofFinding,
    ProofRun,
    StampedBalance,
    Store,
    by_partition,
)

PAGES_WALKED_MAX: Final = 10_000  # visited, there or not (0.5 ms each); of more it is asked first which there are

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_STAMPS: Final = tuple(f"WRITETIME({column})" for column in BALANCE_COLUMNS[3:])


class ProofRows(Store):
    """The proof's side of the Cassandra store."""

    _keyspace: str

    @abstractmethod
    def _pages(
        self, text: str, values: Sequence[Any] = (), *, rows_a_page: int = SCAN_ROWS
    ) -> AsyncIterator[list[tuple[Any, ...]]]:
        """Ask page by page; pages without rows are left out."""

    @abstractmethod
    async def _select(self, text: str, values: Sequence[Any], **how: int) -> list[tuple[Any, ...]]:
        """Ask for all rows, however many pages they are."""

    def _trades(self, symbol: str) -> str:
        return f"{self._keyspace}.{tables.TRADES_PREFIX}{symbol}"

    async def list_streams(self) -> list[str]:
        """Read the partitions of the decision log."""
        names: set[str] = set()
        async for rows in self._pages(f"SELECT DISTINCT stream FROM {self._keyspace}.stream_decisions"):
            names.update(row[0] for row in rows)
        return sorted(names - {KEYSPACE_STREAM})

    # --- balances with their write times ---

    @property
    def _stamped_balances(self) -> str:
        return f"SELECT {', '.join(BALANCE_COLUMNS + _STAMPS)} FROM {self._keyspace}.user_balances"

    async def scan_stamped_balances(self, *, rows_a_page: int = SCAN_ROWS) -> AsyncIterator[list[StampedBalance]]:
        """Go through all balance rows, in the ring's order of users."""
        async for rows in self._pages(self._stamped_balances, rows_a_page=rows_a_page):
            yield [_stamped(row) for row in rows]

    async def get_stamped_balances(self, user_id: int) -> list[StampedBalance]:
        """Read one partition."""
        rows = await self._select(f"{self._stamped_balances} WHERE user_id = ?", (user_id,))
        return [_stamped(row) for row in rows]

    # --- trades ---

    def scan_trades_after(
        self, symbol: str, after: int | None, *, rows_a_page: int = SCAN_ROWS
    ) -> AsyncIterator[tuple[int | None, list[tuple[Any, ...]]]]:
        """Go through a symbol's table in the ring's order, from behind a token."""
        query, values = f"SELECT TOKEN(page), {', '.join(TRADE_COLUMNS)} FROM {self._trades(symbol)}", ()
        if after is not None:
            query, values = f"{query} WHERE TOKEN(page) > ?", (after,)  # type: ignore[assignment]
        return by_partition(self._pages(query, values, rows_a_page=rows_a_page))

    async def scan_trades_between(
        self, symbol: str, first: int, last: int | None, *, rows_a_page: int = SCAN_ROWS
    ) -> AsyncIterator[list[tuple[Any, ...]]]:
        """Go from page to page; over a long range only to those that are there."""
        first_page = self.page_of(symbol, first)
        last_page = None if last is None else self.page_of(symbol, last)
        there: Iterable[int]
        if last_page is not None and last_page - first_page < PAGES_WALKED_MAX:
            there = range(first_page, last_page + 1)
        else:
            some = self._pages(f"SELECT DISTINCT page FROM {self._trades(symbol)}")
            pages = [page async for rows in some for (page,) in rows]
            there = sorted(page for page in pages if page >= first_page and (last_page is None or page <= last_page))
        query = (
            f"SELECT {', '.join(TRADE_COLUMNS)} FROM {self._trades(symbol)}"
            " WHERE page = ? AND trade_id >= ? AND trade_id <= ?"
        )
        bound = I63_MAX if last is None else last
        for page in there:
            async for rows in self._pages(query, (page, first, bound), rows_a_page=rows_a_page):
                yield rows

    # --- repairs ---

    async def repair(
        self,
        stream: str,
        rows: Iterable[Balance],
        absent: Iterable[AccountKey],
        stamp_us: int,
        decision: Decision | None,
    ) -> bool:
        """Write each row with the stamp, then append the decision by compare-and-set."""
        table = f"{self._keyspace}.user_balances"
        places = ", ".join("?" * len(BALANCE_COLUMNS))
        insert = f"INSERT INTO {table} ({', '.join(BALANCE_COLUMNS)}) VALUES ({places}) USING TIMESTAMP ?"
        for row in rows:
            await self._select(insert, (*row, stamp_us))
        delete = f"DELETE FROM {table} USING TIMESTAMP ? WHERE user_id = ? AND asset_id = ? AND stream = ?"
        for key in absent:
            await self._select(delete, (stamp_us, *key, stream))
        return decision is None or await self.append_decision(decision)

    # --- what was found ---

    async def save_run(self, run: ProofRun) -> None:
        """Write a run's row."""
        columns = ("day", "started_at", "run_id", "stream", *ProofRun._fields[3:-1], "finished_at")
        insert = (
            f"INSERT INTO {self._keyspace}.reconciliation_runs ({', '.join(columns)})"
            f" VALUES ({', '.join('?' * len(columns))})"
        )
        started = _moment(run.started_at_ms)
        finished = None if run.finished_at_ms is None else _moment(run.finished_at_ms)
        await self._select(insert, (started.date(), started, UUID(run.run_id), run.stream, *run[3:-1], finished))

    async def save_findings(self, run_id: str, findings: Iterable[ProofFinding]) -> None:
        """Write a run's findings."""
        columns = ("run_id", *ProofFinding._fields[:-1], "fixed_at")
        insert = (
            f"INSERT INTO {self._keyspace}.reconciliation_findings ({', '.join(columns)})"
            f" VALUES ({', '.join('?' * len(columns))})"
        )
        for finding in findings:
            fixed = None if finding.fixed_at_ms is None else _moment(finding.fixed_at_ms)
            await self._select(insert, (UUID(run_id), *finding[:-1], fixed))

    async def load_findings(self, run_id: str) -> list[ProofFinding]:
        """Read one partition."""
        columns = (*ProofFinding._fields[:-1], "fixed_at")
        query = f"SELECT {', '.join(columns)} FROM {self._keyspace}.reconciliation_findings WHERE run_id = ?"
        rows = await self._select(query, (UUID(run_id),))
        return [ProofFinding._make((*row[:-1], None if row[-1] is None else ms_of(row[-1]))) for row in rows]


def _stamped(row: tuple[Any, ...]) -> StampedBalance:
    columns = len(BALANCE_COLUMNS)
    newest = max([stamp for stamp in row[columns:] if stamp is not None], default=0)
    return StampedBalance._make((*row[:columns], newest))


def _moment(at_ms: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=at_ms)


def ms_of(moment: datetime) -> int:
    """Give a timestamp of the driver's (naive, UTC) in ms since 1970."""
    return (moment.replace(tzinfo=UTC) - _EPOCH) // timedelta(milliseconds=1)
