"""Which session of a tape is which stream: what `<tape>.settled` remembers, and what else tells.

A tape counts the sessions it heard for itself, so a stream's genesis names one of the tape of the host that wrote it.
On that tape it is this one. On another it is, in this order: the one that was settled as this stream before, the one
whose frames carry the same `session` key, the oldest that no other stream has settled from this tape. The last is a
guess that foreign.py proves: other content under a settled sequence halts.

After a crash `<tape>.settled` says what it said last; a tape without it (or with another's) is one that was not settled
from: its content is compared with the store, nothing of it is deleted meanwhile.
"""

from __future__ import annotations

from typing import Any, Final

from sidecar.decisions import Agreed
from sidecar.tape import TapeReader

# What is remembered of a stream: `foreign_to` is up to where it was settled from another tape, `deletable` up to where
# this tape need not keep it.
_KEPT: Final = ("session", "foreign_to", "deletable")


class Streams:
    """The streams that were settled from one tape."""

    def __init__(self, said: dict[str, Any] | None) -> None:
        """Begin with what `<tape>.settled` holds (Settler.said)."""
        said = said or {}
        self.tape_id: int = said.get("tape_id", 0)
        self._kept: dict[str, dict[str, int]] = {
            name: {key: entry.get(key, 0) for key in _KEPT} for name, entry in said.get("streams", {}).items()
        }
        if "stream" in said:
            self._kept[said["stream"]] = {key: said.get(key, 0) for key in _KEPT}

    def is_on(self, tape_id: int) -> None:
        """Take notice of the tape that is there now: what was remembered of another is forgotten."""
        if tape_id != self.tape_id:
            self.tape_id, self._kept = tape_id, {}

    def of(self, stream: str) -> dict[str, int] | None:
        """Give what is remembered of a stream, None when it was never settled from this tape."""
        return self._kept.get(stream)

    def keep(self, stream: str, **known: int) -> None:
        """Remember a stream's session, foreign_to and deletable."""
        self._kept[stream] = known

    def others(self, stream: str) -> dict[str, dict[str, int]]:
        """Give what is remembered of all other streams."""
        return {name: kept for name, kept in self._kept.items() if name != stream}

    def session_of(self, stream: str, agreed: Agreed, reader: TapeReader) -> int | None:
        """Find a stream's session on the tape that is there now; None when it has none yet."""
        if agreed.tape_id in (None, self.tape_id):
            return agreed.session
        kept = self.of(stream)
        if kept is not None and kept["session"]:
            return kept["session"]
        sessions = reader.sessions()
        if agreed.engine_session is not None and any(row.engine_session is not None for row in sessions):
            keyed = (row.session for row in sessions if row.engine_session == agreed.engine_session)
            return next(keyed, None)
        first = self.unclaimed(stream, reader)
        return first and first[0]

    def unclaimed(self, stream: str, reader: TapeReader) -> tuple[int, int | None] | None:
        """Give the oldest session, with its key, after those that other streams have settled from this tape."""
        claimed = max((kept["session"] for kept in self.others(stream).values()), default=0)
        return next(((row.session, row.engine_session) for row in reader.sessions() if row.session > claimed), None)
