"""A tape beside a stream that it did not settle itself: a new host, a lost tape (design.md, The tape).

What such a tape holds at or below where the settler began is compared with the store's rows, a few events before each
burst: other content under a settled sequence is another session of the engine, which must not go on as this stream.
Nothing is kept of it: the next start compares again.
"""

from __future__ import annotations

from typing import Any, Final

from sidecar.batch import PAYLOAD_KEPT_BYTES_MAX
from sidecar.decisions import Agreed
from sidecar.errors import Halt
from sidecar.events import Event, LedgerEvent, Trade
from sidecar.store.base import Store
from sidecar.tape import Runs, TapeReader

EVENTS_MAX: Final = 64  # compared before each burst
SESSION_STEP: Final = (
    "look with `sidecar tape info`; to settle on what the engine publishes now, as a new stream beside this one:"
    " `sidecar stream next NAME`"
)
_NOT_IN_ROWS: Final = frozenset({"quote_amount", "session", "payload"})


class ForeignPart:
    """The part of a tape, up to `foreign_to`, that was settled from another one; remembers what is compared."""

    def __init__(self, store: Store, stream: str, agreed: Agreed, foreign_to: int) -> None:
        """Take the store to compare with, and where this tape's own part begins."""
        self._store = store
        self._stream = stream
        self._agreed = agreed
        self._foreign_to = foreign_to
        self._compared = Runs([])

    async def compare(self, reader: TapeReader) -> None:
        """Compare some of what is not compared yet, the newest first: sessions may begin alike, they don't go on so.

        Raises Halt (SESSION_CHANGED) at an event that the store does not know as it is.
        """
        for sequence in self._next(reader):
            gap = self._agreed.gap_at_or_after(sequence)
            events = [] if gap and gap[0] <= sequence else reader.read(self._agreed.session, sequence - 1, 1)
            for event in events:
                if not await self.is_settled(event):
                    reason = f"sequence {sequence} on this tape is not what stream {self._stream} settled under it"
                    raise Halt("SESSION_CHANGED", sequence, reason, SESSION_STEP)
            self._compared.add(sequence)

    def _next(self, reader: TapeReader) -> list[int]:
        first_of_stream = self._agreed.first_sequence
        wanted: list[int] = []
        for first, last in reversed(reader.runs(self._agreed.session).list()):
            missing = list(self._compared.holes(max(first, first_of_stream), min(last, self._foreign_to)))
            for low, high in reversed(missing):
                wanted += range(high, max(low, high - EVENTS_MAX + len(wanted)) - 1, -1)
                if len(wanted) >= EVENTS_MAX:
                    return wanted
        return wanted

    async def is_settled(self, event: Event) -> bool:
        """Say whether the store has an event under its sequence, as it is."""
        rejected = await self._store.get_rejected(self._stream, event.output_sequence)
        if rejected is not None:
            return bytes(rejected["payload"]) == event.payload[:PAYLOAD_KEPT_BYTES_MAX]
        row: dict[str, Any] | None = None
        not_in_row, other_names = _NOT_IN_ROWS, {"asset": "asset_id"}
        if isinstance(event, LedgerEvent):
            not_in_row = _NOT_IN_ROWS | {"ts_us"}
            row = await self._store.get_ledger_event(self._stream, event.output_sequence)
        elif isinstance(event, Trade):
            symbol = self._agreed.symbols.by_pair.get((event.base_asset, event.quote_asset))
            rows = await self._store.get_trade(symbol.name, event.trade_id) if symbol else []
            row = next((row for row in rows if row["stream"] == self._stream), None)
        if row is None:
            return False
        said = {key: value for key, value in event._asdict().items() if key not in not_in_row and value is not None}
        return all(row.get(other_names.get(key, key)) == value for key, value in said.items())
