"""The plain ways to settle into Cassandra, as services are written: what the sidecar is compared with.

All use the real driver with prepared statements at LOCAL_QUORUM, and write what the sidecar writes. Its own process:
`python -m bench.plain WAY`. The deposits are written before the clock starts; a way ends after --trades or --seconds.

sequential   for each trade: SELECT whether it exists, INSERT it, then for each of the four balances SELECT and write it
             anew; every statement is awaited before the next. No batch, nothing atomic.
one_by_one   for each trade one LOGGED batch of its row and its balances (known in memory), awaited
concurrent   the same batches through execute_concurrent, --concurrency of them under way
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from bench import engine, rows


class Plain:
    """A session and its prepared statements."""

    def __init__(self, host: str, port: int, keyspace: str) -> None:
        base, cluster = import_module("cassandra"), import_module("cassandra.cluster")
        policies, self._query = import_module("cassandra.policies"), import_module("cassandra.query")
        self.execute_concurrent = import_module("cassandra.concurrent").execute_concurrent
        balancing = policies.TokenAwarePolicy(policies.DCAwareRoundRobinPolicy(local_dc="datacenter1"))
        profile = cluster.ExecutionProfile(
            load_balancing_policy=balancing,
            consistency_level=base.ConsistencyLevel.LOCAL_QUORUM,
            request_timeout=60.0,
            row_factory=self._query.tuple_factory,
        )
        self._quorum = base.ConsistencyLevel.LOCAL_QUORUM
        self._unset = self._query.UNSET_VALUE
        self.cluster = cluster.Cluster(
            [host], port=port, execution_profiles={cluster.EXEC_PROFILE_DEFAULT: profile}, protocol_version=4
        )
        self.session = self.cluster.connect(keyspace)
        prepare = self.session.prepare
        symbols = engine.rules("mixed")["symbols"]
        self._trade = {name: prepare(_insert(f"settled_trades_{name}", rows.TRADE_COLUMNS)) for name in symbols}
        self._ledger = prepare(_insert("ledger_events", rows.LEDGER_COLUMNS))
        self._balance = prepare(_insert("user_balances", rows.BALANCE_COLUMNS))
        self._exists = {
            name: prepare(f"SELECT trade_id FROM settled_trades_{name} WHERE page = ? AND trade_id = ? LIMIT 1")
            for name in symbols
        }
        self._read = prepare(
            "SELECT available, version FROM user_balances WHERE user_id = ? AND asset_id = ? AND stream = ?"
        )

    def deposit(self, deposits: list[rows.Folded]) -> None:
        """Write ledger events and their balances."""
        self.execute_concurrent(self.session, [(self.batch(one), None) for one in deposits])

    def batch(self, one: rows.Folded) -> Any:
        """Make the LOGGED batch of one event."""
        batch = self._query.BatchStatement(self._query.BatchType.LOGGED, consistency_level=self._quorum)
        batch.add(self._bind(one))
        for (user, asset), values in one.balances.items():
            batch.add(self._balance, (user, asset, rows.STREAM, *values))
        return batch

    def _bind(self, one: rows.Folded) -> Any:
        statement = self._trade[one.symbol] if one.symbol else self._ledger
        return statement.bind([self._unset if value is None else value for value in one.row])

    def settle_sequentially(self, one: rows.Folded) -> None:
        """Settle one trade as if nobody else did: ask, insert, and four times read, add, write."""
        execute = self.session.execute
        if execute(self._exists[one.symbol or ""], one.row[:2]).one() is not None:
            return
        execute(self._bind(one))
        for (user, asset), units in one.postings.items():
            found = execute(self._read, (user, asset, rows.STREAM)).one()
            available, version = found or (0, 0)
            _, _, sequence, updated_at = one.balances[user, asset]
            values = (user, asset, rows.STREAM, available + units, version + 1, sequence, updated_at)
            execute(self._balance, values)


def _insert(table: str, columns: tuple[str, ...]) -> str:
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


def until(deadline: float, trades: list[rows.Folded]) -> Iterator[rows.Folded]:
    """Give trades until time is over."""
    return itertools.takewhile(lambda _: time.monotonic() < deadline, trades)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Settle one way; give the rate."""
    fold = rows.Fold(engine.rules("mixed"), 1)
    folded = [*map(fold.fold, rows.read_events(args.journal, args.trades))]
    deposits, trades = [one for one in folded if not one.symbol], [one for one in folded if one.symbol]
    plain = Plain(args.host, args.port, args.keyspace)
    try:
        plain.deposit(deposits)
        gc.collect()
        gc.freeze()
        begun = time.monotonic()
        settled = settlers(plain, args.concurrency)[args.way](until(begun + args.seconds, trades))
        seconds = time.monotonic() - begun
    finally:
        plain.cluster.shutdown()
    return {
        "trades": settled,
        "last_sequence": trades[settled - 1].sequence,
        "seconds": round(seconds, 3),
        "trades_per_s": round(settled / seconds, 1),
    }


def settlers(plain: Plain, concurrency: int) -> dict[str, Callable[[Iterator[rows.Folded]], int]]:
    """Give the ways by name; each settles trades and counts them."""

    def sequential(trades: Iterator[rows.Folded]) -> int:
        count = 0
        for one in trades:
            plain.settle_sequentially(one)
            count += 1
        return count

    def one_by_one(trades: Iterator[rows.Folded]) -> int:
        count = 0
        for one in trades:
            plain.session.execute(plain.batch(one))
            count += 1
        return count

    def concurrent(trades: Iterator[rows.Folded]) -> int:
        batches = ((plain.batch(one), None) for one in trades)
        return len(plain.execute_concurrent(plain.session, batches, concurrency=concurrency))

    return {"sequential": sequential, "one_by_one": one_by_one, "concurrent": concurrent}


def main(argv: list[str] | None = None) -> int:
    """Measure; the last line is JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.plain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("way", choices=("sequential", "one_by_one", "concurrent"))
    add("--host", default="127.0.0.1")
    add("--port", type=int, required=True)
    add("--keyspace", required=True, help="with fresh tables")
    add("--journal", type=Path, required=True, help="of an engine with --source mixed")
    add("--trades", type=int, default=2_000, help="at most (default 2,000)")
    add("--seconds", type=float, default=20.0, help="at most (default 20)")
    add("--concurrency", type=int, default=100, help="of execute_concurrent (default 100, as the driver's)")
    print(json.dumps(measure(parser.parse_args(argv))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
