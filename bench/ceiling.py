"""The ceiling: how fast the database takes the rows that the sidecar writes, from a client that does nothing else.

The stream is folded, coalesced and encoded before the clock starts: whole LOGGED batch frames with their write times,
one connection, a window of them under way. What is left is the kernel, the database, and some microseconds a batch
here. Whoever decodes, keeps a tape, folds and encodes as well can only be slower. A program: `python -m bench.ceiling`.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import engine, machine, rows
from bench.cql import Connection, batch_frame, bound

_UNSET = struct.pack(">i", -2)  # leaves the column alone; a null would be a tombstone
_INTS = {"base_asset", "quote_asset", "asset_id"}
_TEXTS = {"stream", "event_type"}


class Encoder:
    """Prepared statements of one keyspace, and how their rows become bytes."""

    def __init__(self, connection: Connection, keyspace: str, symbols: list[str]) -> None:
        """Prepare."""

        def plan(table: str, columns: tuple[str, ...]) -> Callable[[tuple[Any, ...]], bytes]:
            places = ", ".join("?" * len(columns))
            statement = connection.prepare(f"INSERT INTO {keyspace}.{table} ({', '.join(columns)}) VALUES ({places})")
            return _encoder(bound(statement, len(columns)), columns)

        self._trades = {name: plan(f"settled_trades_{name}", rows.TRADE_COLUMNS) for name in symbols}
        self._ledger = plan("ledger_events", rows.LEDGER_COLUMNS)
        self._balances = plan("user_balances", rows.BALANCE_COLUMNS)

    def frame(self, number: int, batch: rows.Batch) -> bytes:
        """Encode a batch."""
        balance = self._balances
        statements = [
            self._trades[one.symbol](one.row) if one.symbol else self._ledger(one.row) for one in batch.events
        ]
        statements += [balance((user, asset, rows.STREAM, *values)) for (user, asset), values in batch.balances.items()]
        return batch_frame(number, statements, batch.stamp_us)


def _encoder(head: bytes, columns: tuple[str, ...]) -> Callable[[tuple[Any, ...]], bytes]:
    """Give a function that packs a row after `head`; one struct for each set of absent values and text lengths."""
    plans: dict[tuple[Any, ...], struct.Struct] = {}
    texts = [at for at, column in enumerate(columns) if column in _TEXTS]

    def encode(row: tuple[Any, ...]) -> bytes:
        absent = tuple([at for at, value in enumerate(row) if value is None])
        key = absent, *[len(row[at]) for at in texts]
        plan = plans.get(key)
        if plan is None:
            plan = plans[key] = struct.Struct(">" + "".join(form(at, row) for at in range(len(columns))))
        values: list[Any] = []
        for at, value in enumerate(row):
            if value is None:
                values.append(-2)
            elif columns[at] in _TEXTS:
                values += (len(value), value.encode())
            else:
                values += (4 if columns[at] in _INTS else 8, value)
        return head + plan.pack(*values)

    def form(at: int, row: tuple[Any, ...]) -> str:
        if row[at] is None:
            return "i"
        if columns[at] in _TEXTS:
            return f"i{len(row[at])}s"
        return "ii" if columns[at] in _INTS else "iq"

    return encode


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Write all rows once, or for a time; give the rate."""
    rules = engine.rules("mixed")
    fold = rows.Fold(rules, time.time_ns() // 1_000)
    events = (
        rows.read_events(args.journal, args.trades)
        if args.journal
        else engine.up_to_trades(engine.generate(users=1_000), args.trades)
    )
    batches = list(rows.in_batches(map(fold.fold, events), args.batch))
    trades = sum(1 for batch in batches for one in batch.events if one.symbol)
    rows_a_trade = rows.rows_a_trade(batches)
    with Connection(args.host, args.port) as connection:
        encoder = Encoder(connection, args.keyspace, list(rules["symbols"]))
        frames = [encoder.frame(number, batch) for number, batch in enumerate(batches)]
        last_sequence = batches[-1].last
        del batches
        gc.collect()
        gc.freeze()
        gc.disable()
        end = time.monotonic() + args.warm_up
        while args.warm_up and time.monotonic() < end:
            connection.stream_through(frames, args.window)
        if args.warm_up:
            return {"warm_up_s": args.warm_up}
        machine_before = machine.cpu_s()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        begun_ns = time.perf_counter_ns()
        answered_ns = connection.stream_through(frames, args.window)
        seconds = (answered_ns[-1] - begun_ns) / 1e9
        used = resource.getrusage(resource.RUSAGE_SELF)
        machine_s, idle_s = (now - was for now, was in zip(machine.cpu_s(), machine_before, strict=True))
    cpu_s = used.ru_utime + used.ru_stime - usage.ru_utime - usage.ru_stime
    return {
        "trades": trades,
        "last_sequence": last_sequence,
        "seconds": round(seconds, 3),
        "trades_per_s": round(trades / seconds, 1),
        "cpu_us": round(cpu_s * 1e6 / trades, 2),
        "others_cpu_us": round((machine_s - cpu_s) * 1e6 / trades, 2),
        "idle_us": round(idle_s * 1e6 / trades, 2),
        "rows_a_trade": round(rows_a_trade, 3),
        "batches": len(frames),
        "batch_bytes": sum(map(len, frames)) // len(frames),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure; the last line is JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.ceiling", description=__doc__)
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, required=True)
    add("--keyspace", required=True, help="with fresh tables")
    add("--journal", type=Path, help="of an engine with --source mixed; default: generated trades")
    add("--trades", type=int, default=10_000, help="so many of them (default 10,000)")
    add("--batch", type=int, default=16, help="events a batch")
    add("--window", type=int, default=16, help="batches under way")
    add("--warm-up", type=float, default=0.0, metavar="S", help="write the same again for S seconds, measure nothing")
    print(json.dumps(measure(parser.parse_args(argv))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
