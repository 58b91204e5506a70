"""Asks a store what a user of it asks, while a sidecar settles into it: the other process of `queries`.

`trade_exists` and `get_user_balance` through `sidecar.open_store`, each at its own steady pace. A question's time
counts from when it was due, unless nothing held it up but this process's own timer; then from when it was put.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop

import sidecar
from bench import engine, rows
from bench.report import histogram, percentiles

ABSENT = 10**15  # added to a trade id: one that never comes


async def ask_steadily(
    ask: Callable[[], Awaitable[bool]], per_s: float, seconds: float, after_s: float = 0.0
) -> dict[str, Any]:
    """Ask at a pace, from `after_s` on; give the percentiles, and how many answers were wrong."""
    await asyncio.sleep(after_s)
    clock = time.perf_counter_ns
    found = histogram()
    begun_ns = free_ns = clock()
    wrong = asked = 0
    while (due_ns := begun_ns + int(asked / per_s * 1e9)) < begun_ns + seconds * 1e9:
        if (wait_ns := due_ns - clock()) > 0:
            await asyncio.sleep(wait_ns / 1e9)
        put_ns = due_ns if free_ns > due_ns else clock()
        wrong += not await ask()
        free_ns = clock()
        found.record_value(max((free_ns - put_ns) // 1_000, 1))
        asked += 1
    return {**percentiles(found), "asked": asked, "wrong": wrong}


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Ask both kinds at once."""
    rng = random.Random(args.seed)
    bases = {}
    rules = engine.rules("mixed")
    for name, symbol in rules["symbols"].items():
        bases[rules["assets"][symbol["base"]]["id"]] = name
    trades, accounts = [], set()
    for event in rows.read_events(args.journal):
        if "trade_id" in event and event["output_sequence"] <= args.acked:
            trades.append((bases[event["base_asset"]], event["trade_id"]))
            accounts.add((event["buyer_user_id"], event["base_asset"]))
    known = sorted(accounts)
    config = sidecar.load(args.config, args.set)
    async with sidecar.open_store(config) as store:

        async def exists() -> bool:
            symbol, trade_id = rng.choice(trades)
            if rng.random() < args.absent:
                return not await store.trade_exists(symbol, trade_id + ABSENT)
            return await store.trade_exists(symbol, trade_id)

        async def balance() -> bool:
            return await store.get_user_balance(*rng.choice(known)) is not None

        gc.collect()
        gc.freeze()  # a look through the journal's events would be a pause of this process, not of the store
        # The first questions open connections and files, and have the node compile what answers them.
        for ask in (exists, balance):
            await ask_steadily(ask, args.per_s * 10, args.warm_up)
        async with asyncio.TaskGroup() as tasks:
            # In turns: two questions that are due at the same moment would wait for each other in this process.
            kinds = {
                name: tasks.create_task(ask_steadily(ask, args.per_s, args.seconds, place / args.per_s / 2))
                for place, (name, ask) in enumerate((("trade_exists", exists), ("balance", balance)))
            }
    return {name: task.result() for name, task in kinds.items()}


def main(argv: list[str] | None = None) -> int:
    """Ask; the last line is JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.asker", description=__doc__)
    add = parser.add_argument
    add("--config", type=Path, required=True)
    add("--set", action="append", default=[])
    add("--journal", type=Path, required=True, help="of the engine that is at it")
    add("--acked", type=int, required=True, help="ask about events up to this sequence")
    add("--per-s", type=float, required=True)
    add("--seconds", type=float, required=True)
    add("--warm-up", type=float, default=1.0, help="seconds of each kind, ten times as often, that are not measured")
    add("--absent", type=float, default=0.2, help="share of the trades asked for that are not there")
    add("--seed", type=int, default=1)
    print(json.dumps(uvloop.run(measure(parser.parse_args(argv)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
