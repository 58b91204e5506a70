"""What every store promises, and what it is told: rows in, rows out, one failure class for each answer to a failure.

`settle_batch_atomically` is atomic and idempotent: the same batch may be given any number of times, in any order with
others, by several processes; the rows end as if the batch with the highest stamp had come last (Cassandra: by write
time; SQLite: balances by `last_sequence`, state by `sequence`). Failures are only ever `OutcomeUnknownError` (give the
identical batch again), `StoreRefusedError` (halt), `BatchTooLargeError` and `StartOver`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable
from functools import partial
from typing import Any, Final, NamedTuple, Self

from sidecar.batch import Batch
from sidecar.errors import StoreRefusedError
from sidecar.events import AccountKey, AccountValues, Balance, Decision, State

KEYSPACE_STREAM = "*"  # decisions that hold for every stream: the decimals of assets
SCAN_ROWS: Final = 2_000  # a page of a scan, unless asked for less


class StampedBalance(NamedTuple):
    """A balance row as it stands, whoever wrote it: a value may be lacking (None).

    `write_us` is the newest write time of its cells in us since 1970, 0 in a store that keeps none.
    """

    user_id: int
    asset_id: int
    stream: str
    available: int | None
    version: int | None
    last_sequence: int | None
    updated_at: int | None
    write_us: int


class ProofRun(NamedTuple):
    """One reconciliation (schema.cql, reconciliation_runs); times in ms since 1970, None: not finished."""

    run_id: str
    stream: str
    started_at_ms: int
    up_to_sequence: int
    accounts: int
    events: int
    findings: int
    finished_at_ms: int | None


class ProofFinding(NamedTuple):
    """What a reconciliation found (schema.cql, reconciliation_findings); `fixed_at_ms` since 1970."""

    number: int
    code: str
    stream: str
    user_id: int | None
    asset_id: int | None
    sequence: int | None
    expected: int | None
    actual: int | None
    detail: str
    fixed_at_ms: int | None


class Store(ABC):
    """The rows of one keyspace (schema.cql). All methods are coroutines on one loop; none blocks it."""

    name: str
    durable_at_once = False  # whether what is acknowledged can no longer be lost with the power

    def __init__(self, page_widths: dict[str, int]) -> None:
        """Take the page width of each symbol that is looked up or settled; further ones may be added later."""
        self.page_widths = page_widths

    def page_of(self, symbol: str, trade_id: int) -> int:
        """Give the page of a trade's row. Raises StoreRefusedError for a symbol that nothing is known of."""
        width = self.page_widths.get(symbol)
        if width is None:
            raise StoreRefusedError(f"symbol {symbol!r} is not configured; {', '.join(sorted(self.page_widths))} are")
        return trade_id // width

    def __await__(self) -> Generator[Any, None, Self]:
        """Open: `store = await open_store(config)`."""
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Self:
        """Open, to be closed at the block's end: `async with open_store(config) as store`."""
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.close()

    @abstractmethod
    async def open(self) -> None:
        """Connect, and prepare what is known. Raises OutcomeUnknownError while the database can't be reached."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of every connection; what is under way is not waited for."""

    @abstractmethod
    async def apply_schema(self, symbols: Iterable[str]) -> list[str]:
        """Create what is missing, check what is there; give the names of the tables created.

        Needs no `open` before it: there may be nothing to open yet.
        Raises StoreRefusedError, with the next step, when an existing table has other keys or types.
        """

    @abstractmethod
    def schema(self, symbols: Iterable[str]) -> str:
        """Give the statements of `apply_schema` as text."""

    @abstractmethod
    async def ready_for(self, symbols: Iterable[str]) -> None:
        """Get ready to settle these symbols. Raises StoreRefusedError, with the next step, when a table is missing."""

    @property
    @abstractmethod
    def steady_since(self) -> float | None:
        """The loop's time since when all known nodes have been connected, None while one is away.

        `durable` does not move before this is `durable_after_s` ago (design.md).
        """

    @property
    @abstractmethod
    def outages(self) -> int:
        """Count how often a node was away and is back, or started anew: memory is then not to be trusted."""

    @property
    @abstractmethod
    def nodes_away(self) -> list[str]:
        """Name the nodes, by address and port, that are known and don't answer."""

    # --- the way of a trade ---

    @abstractmethod
    async def load_accounts(self, stream: str, keys: Iterable[AccountKey]) -> dict[AccountKey, AccountValues]:
        """Read balance rows of one stream, concurrently; keys without a row are not in the answer."""

    @abstractmethod
    async def settle_batch_atomically(self, batch: Batch) -> None:
        """Write all rows of a batch with its stamp, or none; returns once they are acknowledged."""

    def attempt(self, batch: Batch) -> Callable[[], Awaitable[None]]:
        """Give what `settle_batch_atomically` does with a batch, to be called until it is known to have been done.

        Each call sends the identical rows. It may keep less than the batch: thousands of trades wait for their answer.
        """
        return partial(self.settle_batch_atomically, batch)

    @abstractmethod
    async def load_state(self, stream: str) -> dict[str, State]:
        """Read the positions that are there: `acked`, `durable`."""

    @abstractmethod
    async def save_state(self, stream: str, kind: str, state: State) -> None:
        """Write one position, stamped with its T."""

    # --- decisions ---

    @abstractmethod
    async def read_decisions(self, stream: str) -> list[Decision]:
        """Read the whole log of a stream, in order, at SERIAL."""

    @abstractmethod
    async def append_decision(self, decision: Decision) -> bool:
        """Append under the decision's own number, if that number is free: False when another was faster."""

    # --- look-ups ---

    @abstractmethod
    async def trade_exists(self, symbol: str, trade_id: int, stream: str | None = None) -> bool:
        """Say whether a trade's row is there (on `stream`, or on any): one partition read."""

    @abstractmethod
    async def get_trade(self, symbol: str, trade_id: int) -> list[dict[str, Any]]:
        """Give a trade's rows, one for each stream that has it, by column name."""

    @abstractmethod
    async def get_user_balance(self, user_id: int, asset_id: int) -> Balance | None:
        """Give a user's balance of one asset, summed over streams (stream `*`), None when there is no row."""

    @abstractmethod
    async def get_user_balances(self, user_id: int) -> list[Balance]:
        """Give all balance rows of a user, one for each asset and stream."""

    @abstractmethod
    async def get_rejected(self, stream: str, output_sequence: int) -> dict[str, Any] | None:
        """Give one rejected event's row by column name."""

    @abstractmethod
    async def resolve_rejected(self, stream: str, output_sequence: int, resolution: str, now_us: int) -> None:
        """Say at a rejected event's row what was done about it, written at the wall-clock time `now_us`."""

    @abstractmethod
    async def get_ledger_event(self, stream: str, output_sequence: int) -> dict[str, Any] | None:
        """Give one ledger event's row by column name."""

    # --- scans: pages of rows, by column name order of batch.py ---

    @abstractmethod
    def scan_trades(self, symbol: str) -> AsyncIterator[list[tuple[Any, ...]]]:
        """Go through a symbol's table, in pages of rows as TRADE_COLUMNS."""

    @abstractmethod
    def scan_ledger_events(
        self, stream: str, first: int, last: int, *, rows_a_page: int = SCAN_ROWS
    ) -> AsyncIterator[list[tuple[Any, ...]]]:
        """Go through a stream's ledger events of a range of sequences, in pages of rows as LEDGER_COLUMNS."""

    @abstractmethod
    def scan_rejected(
        self, stream: str, first: int, last: int, *, rows_a_page: int = SCAN_ROWS
    ) -> AsyncIterator[list[tuple[Any, ...]]]:
        """Go through a stream's rejected events of a range of sequences, in pages of rows as REJECTED_COLUMNS."""

    @abstractmethod
    def scan_balances(self) -> AsyncIterator[list[Balance]]:
        """Go through all balance rows, in pages."""

    # --- what a proof of the ledger reads and writes ---

    @abstractmethod
    async def list_streams(self) -> list[str]:
        """Name every stream that the decision log knows, sorted; not KEYSPACE_STREAM."""

    @abstractmethod
    def scan_stamped_balances(self, *, rows_a_page: int = SCAN_ROWS) -> AsyncIterator[list[StampedBalance]]:
        """Go through all balance rows with their write times."""

    @abstractmethod
    async def get_stamped_balances(self, user_id: int) -> list[StampedBalance]:
        """Give all balance rows of a user with their write times."""

    @abstractmethod
    def scan_trades_after(
        self, symbol: str, after: int | None, *, rows_a_page: int = SCAN_ROWS
    ) -> AsyncIterator[tuple[int | None, list[tuple[Any, ...]]]]:
        """Go through a symbol's table, partition after partition in the store's own order, from behind a cursor.

        Each piece comes with the cursor from behind which a later scan goes on without a row twice or missing; with
        None when it ends within a partition.
        """

    @abstractmethod
    def scan_trades_between(
        self, symbol: str, first: int, last: int | None, *, rows_a_page: int = SCAN_ROWS
    ) -> AsyncIterator[list[tuple[Any, ...]]]:
        """Go through the trades with ids from `first` to `last` (None: no bound) that stand in their own page."""

    @abstractmethod
    async def repair(
        self,
        stream: str,
        rows: Iterable[Balance],
        absent: Iterable[AccountKey],
        stamp_us: int,
        decision: Decision | None,
    ) -> bool:
        """Make balance rows what they must be, whatever is there, then append the decision that makes settlers obey.

        `absent` are accounts without a row. False when the decision's number is taken: then it is not appended, and the
        same may be given again with another number. Everything is written with the time `stamp_us`; a store
        without write times makes one transaction of it all.
        """

    @abstractmethod
    async def save_run(self, run: ProofRun) -> None:
        """Write a reconciliation's row; again when it is finished."""

    @abstractmethod
    async def save_findings(self, run_id: str, findings: Iterable[ProofFinding]) -> None:
        """Write what a reconciliation found; the same number again replaces it."""

    @abstractmethod
    async def load_findings(self, run_id: str) -> list[ProofFinding]:
        """Read what a reconciliation found, by number."""


def summed(rows: list[Balance]) -> Balance | None:
    """Add up one account's rows over streams: a user's balance is their sum (design.md, Postings)."""
    if not rows:
        return None
    newest = max(rows, key=lambda row: row.updated_at)
    return Balance(
        rows[0].user_id,
        rows[0].asset_id,
        KEYSPACE_STREAM,
        sum(row.available for row in rows),
        sum(row.version for row in rows),
        newest.last_sequence,
        newest.updated_at,
    )


async def by_partition(
    pieces: AsyncIterator[list[tuple[Any, ...]]],
) -> AsyncIterator[tuple[int | None, list[tuple[Any, ...]]]]:
    """Cut what `scan_trades_after` reads where a partition ends: its place stands before the columns of each row."""
    place: int | None = None
    async for rows in pieces:
        last = rows[-1][0]
        cut = len(rows) - 1
        while cut > 0 and rows[cut - 1][0] == last:
            cut -= 1
        if cut > 0:
            yield rows[cut - 1][0], [row[1:] for row in rows[:cut]]
        elif place is not None and place != last:
            yield place, []
        yield None, [row[1:] for row in rows[cut:]]
        place = last
    if place is not None:
        yield place, []
