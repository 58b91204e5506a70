"""How a fault is counted and closed: every fault test ends in `Fault.closes`, with the same three assertions.

- The store equals the journal, by bench/judge.py, which shares no code with the sidecar.
- Nothing twice and nothing lost: each published sequence has one row, each account counts as many events as touched it.
  Counted here from the store's rows alone, so that the figures are there even when the judge only says "not equal".
- Progress after healing: `acked` moves again, up to events that were published later.

def test_f21_full_disk(world: World, fault: Fault) -> None:
    ...                                    # until it is struck
    fault.strike()
    ...                                    # what must hold while it lasts
    fault.heals(world)
    fault.closes(world, last_sequence)
"""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import closing
from typing import Any

from bench.judge import open_store
from bench.world import World, until
from sidecar.errors import TapeMissingError
from sidecar.tape import TapeReader

_ROW_TABLES = ("ledger_events", "rejected_events")
_TRADE_USERS = (
    "output_sequence",
    "buyer_user_id",
    "seller_user_id",
    "base_asset",
    "quote_asset",
    "buyer_fee",
    "seller_fee",
)


class Fault:
    """What one test injects, and what came of it: the line of the table that is printed at the end of a run."""

    def __init__(self) -> None:
        self.injected = 0
        self.lost: int | None = None  # None: the test ended before it was counted
        self.doubled: int | None = None
        self.recovered_s: float | None = None
        self._healed: tuple[float, int] | None = None

    def strike(self, times: int = 1) -> None:
        """Count what is injected now."""
        self.injected += times

    def heals(self, world: World, tape: str = "tape.db") -> None:
        """Say that what stands in the way is taken out of it next; from here on the seconds to recover count."""
        stood = int(world.status(tape)["acked"])  # of what the settler and the store say the higher one
        self._healed = time.monotonic(), stood

    def recovers(self, world: World, tape: str = "tape.db", timeout_s: float = 60.0) -> None:
        """Wait until settlement moves beyond where it stood when the fault was healed."""
        assert self._healed is not None, "a fault that was never healed can't be recovered from: call heals()"
        at, stood = self._healed
        if self.recovered_s is None:
            until(lambda: int(world.said(tape).get("acked", 0)) > stood, f"acked moves on from {stood}", timeout_s)
            self.recovered_s = time.monotonic() - at

    def closes(
        self, world: World, last_sequence: int, *judging: str, tape: str = "tape.db", gaps: int = 0,
        timeout_s: float = 90.0, stream: str = "main",
    ) -> dict[str, Any]:  # fmt: skip
        """Close the fault: progress, store equals journal, nothing lost and nothing twice; give the judge's verdict.

        `gaps` is how many sequences were given up on purpose; `judging` are further arguments of the judge.
        """
        assert self.injected, "nothing was injected: call strike()"
        self.recovers(world, tape, timeout_s)
        assert self._healed is not None
        assert last_sequence > self._healed[1], "nothing was published for progress to be made of"
        world.until_acked(last_sequence, timeout_s, tape=tape)
        self.lost, self.doubled = lost_and_doubled(world.judged, last_sequence, stream=stream)
        verdict = world.judge(*judging)
        assert verdict["ok"], verdict
        assert (self.lost, self.doubled) == (gaps, 0)
        return verdict


def lost_and_doubled(
    store_url: str, last_sequence: int, first_sequence: int = 1, stream: str = "main"
) -> tuple[int, int]:
    """Count the sequences of a stream without a row, and what is there more than once, from the store's rows alone.

    A row too many, and an account's version above the number of rows that touch it, are doubled; a version below is
    lost.
    """
    rows: Counter[int] = Counter()
    touches: Counter[tuple[int, int]] = Counter()
    versions: Counter[tuple[int, int]] = Counter()
    with closing(open_store(store_url)) as store:
        tables = store.tables()
        for table in sorted(tables):
            if table.startswith("settled_trades_"):
                for *values, of in store.rows(table, (*_TRADE_USERS, "stream")):
                    if of == stream:
                        sequence, buyer, seller, base, quote, buyer_fee, seller_fee = values
                        fees = buyer_fee or seller_fee
                        assert not fees, "they go to a further account: teach this count of it"
                        rows[sequence] += 1
                        touches.update({(user, asset) for user in (buyer, seller) for asset in (base, quote)})
        for table in _ROW_TABLES:
            columns = ("output_sequence", "stream") if table == "rejected_events" else (
                "output_sequence", "user_id", "asset_id", "stream",
            )  # fmt: skip
            for sequence, *account, of in store.rows(table, columns):
                if of == stream:
                    rows[sequence] += 1
                    if account:
                        touches[account[0], account[1]] += 1
        for user, asset, version, of in store.rows("user_balances", ("user_id", "asset_id", "version", "stream")):
            if of == stream:
                versions[user, asset] += version
    lost = sum(sequence not in rows for sequence in range(first_sequence, last_sequence + 1))
    doubled = sum(count - 1 for count in rows.values())
    return lost + (touches - versions).total(), doubled + (versions - touches).total()


def taped(world: World, tape: str = "tape.db") -> int:
    """Give the head of the tape's newest session."""
    try:
        with closing(TapeReader(world.folder / tape)) as reader:  # in here: a process for each look would take a core
            sessions = reader.sessions()
            return reader.runs(sessions[-1].session).head if sessions else 0
    except TapeMissingError:
        return 0


def is_run_by(world: World, pid: int, tape: str = "tape.db") -> bool:
    """Say whether this process is the one that settles."""
    return world.said(tape).get("pid") == pid


def journal_events(world: World) -> list[dict[str, Any]]:
    """Give what the engine has published."""
    return [json.loads(line)["event"] for line in world.journal.read_text().splitlines()]
