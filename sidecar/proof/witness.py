"""The tape as a witness: what it still holds of a ledger event says whether the event's row was changed.

From the tables alone a deposit whose amount was changed looks like a balance that was. The tape is believed where it
was settled from as this stream (`<tape>.settled` says so). What it has deleted, and what another host's tape, an import
or a late tape brought, it says nothing of; that is no fault.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from sidecar.errors import TapeError
from sidecar.events import Event, LedgerEvent
from sidecar.proof.rows import AMOUNT, ASSET, EVENT_TYPE, LEDGER_SEQUENCE, USER, Row
from sidecar.streams import Streams
from sidecar.tape import TapeReader, decode_recorded, read_settled


def contradicted(tape_path: Path, stream: str, rows: Iterable[Row]) -> list[int]:
    """Give the sequences of those of a stream's ledger rows that say otherwise than the frame on the tape."""
    streams = Streams(read_settled(tape_path))
    kept = streams.of(stream)
    if kept is None:
        return []
    found = []
    try:
        with closing(TapeReader(tape_path)) as reader:
            if reader.tape_id != streams.tape_id:
                return []
            for row in rows:
                sequence = row[LEDGER_SEQUENCE]
                if sequence > kept["foreign_to"]:
                    frames = reader.frames(kept["session"], sequence, sequence, 1)
                    found += [sequence for _, _, payload in frames if not _is_of(row, decode_recorded(payload))]
    except (TapeError, sqlite3.Error):  # a tape that can't be read is settlement's to tell of
        pass
    return found


def _is_of(row: Row, event: Event) -> bool:
    said = (row[EVENT_TYPE], row[USER], row[ASSET], row[AMOUNT])
    return isinstance(event, LedgerEvent) and said == (event.event_type, event.user_id, event.asset, event.amount)
