"""Where every stream stands: what its log says, what is acknowledged, and waiting for that to reach what was read."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final, NamedTuple

from sidecar import decisions
from sidecar.decisions import Agreed
from sidecar.events import State
from sidecar.store.base import Store

WAIT_S: Final = 10.0  # for `acked` to reach the rows, while it does not move (design.md: with no settler running)
WAIT_MOVING_S: Final = 60.0  # the same while it moves: a row further ahead than that was not written by settlement
POLL_S: Final = 0.25


class Known(NamedTuple):
    """A stream's log, when its genesis was decided (ms since 1970), and the acknowledged position, if there is one."""

    agreed: Agreed
    born_ms: int
    acked: State | None

    @property
    def sequence(self) -> int:
        """Give the last sequence that is acknowledged."""
        return self.acked.sequence if self.acked else self.agreed.first_sequence - 1


async def positions(store: Store) -> dict[str, Known]:
    """Read where all streams of the keyspace stand; the store learns the page widths of their symbols."""
    known: dict[str, Known] = {}
    for name in await store.list_streams():
        agreed = await decisions.read_agreed(store, name)
        log = await store.read_decisions(name)
        if agreed is None or not log:
            continue
        known[name] = Known(agreed, log[0].decided_at_ms, (await store.load_state(name)).get("acked"))
        for symbol in agreed.symbols.symbols.values():
            store.page_widths.setdefault(symbol.name, symbol.page_width)
    return known


async def reached(
    store: Store, known: Mapping[str, Known], wanted: Mapping[str, int], wait_s: float
) -> dict[str, Known]:
    """Wait until every stream is acknowledged up to what is wanted of it; give how they stand when it is over.

    A stream that does not move is waited for `wait_s`, one that moves for WAIT_MOVING_S. The logs are read after the
    positions: a gap that lies below an acknowledged position was decided before it.
    """
    loop = asyncio.get_running_loop()
    began = moved_at = loop.time()
    was: dict[str, int] | None = None
    while True:
        now_known = {
            name: each._replace(acked=(await store.load_state(name)).get("acked")) for name, each in known.items()
        }
        at = {name: each.sequence for name, each in now_known.items()}
        behind = [name for name in known if at[name] < wanted.get(name, 0)]
        now = loop.time()
        if was is not None and any(at[name] != was[name] for name in behind):
            moved_at = now
        was = at
        if not behind or now - moved_at >= wait_s or now - began >= max(WAIT_MOVING_S, wait_s):
            logs = await positions(store)
            return {name: logs[name]._replace(acked=each.acked) for name, each in now_known.items()}
        await asyncio.sleep(min(POLL_S, wait_s / 4))


def trade_ids_rise(stream: str) -> bool:
    """Say whether trade ids rise within a symbol on a stream: not on a late one (design.md, Decisions)."""
    return "/late" not in stream
