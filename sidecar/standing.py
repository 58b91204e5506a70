"""How a sidecar stands: state, positions, lag, holes, why it halted; put together from what each of its parts knows.

The settler tells its side in `<tape>.settled` (or, in the same process, directly); the tape knows what was recorded;
the store knows what was settled before. Each may be away: what is known is said all the same. `sidecar status` and the
status page say the same, by this room.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from sidecar import decisions
from sidecar.errors import TapeError
from sidecar.events import I63_MAX
from sidecar.store.base import Store
from sidecar.tape import TapeReader, is_locked, paused_path, read_recorded, read_settled

NODES_AWAY_MEANS = "durable stands still until they are back; with fewer than the quorum settlement does, too"
NODES_AWAY_STEP = (
    "start or mend them: settlement then starts over from durable by itself. One that is gone for good:"
    " `nodetool removenode`"
)


def told_by_settler(path: Path, stream: str) -> dict[str, Any]:
    """Read what the settler of this stream last said on the tape at `path`; empty when there is nothing."""
    told = read_settled(path) or {}
    return told if told.get("stream") == stream else {}


async def from_store(store: Store, stream: str, first_sequence: int) -> dict[str, Any]:
    """Ask the store for positions, session, accepted gaps, count of rejected events, and where all streams stand."""
    state = await store.load_state(stream)
    known: dict[str, Any] = {kind: position.sequence for kind, position in state.items()}
    agreed = await decisions.read_agreed(store, stream)
    if agreed is not None:
        known |= {"session": agreed.session, "gaps": agreed.gaps}
    first = agreed.first_sequence if agreed else first_sequence
    known["rejected"] = await count_rejected(store, stream, first, I63_MAX)
    return known | {"streams": {name: await _position(store, name) for name in await store.list_streams()}}


async def _position(store: Store, stream: str) -> dict[str, Any]:
    """Say how far a stream is settled, whoever settles it; `next`: the stream that goes on after it, once it ended."""
    state, agreed = await store.load_state(stream), await decisions.read_agreed(store, stream)
    positions = {kind: state[kind].sequence if kind in state else 0 for kind in ("acked", "durable")}
    return {**positions, "next": agreed.next_stream if agreed else None}


async def count_rejected(store: Store, stream: str, first: int, last: int) -> int:
    """Count a stream's rejected events of a range of sequences."""
    count = 0
    async for rows in store.scan_rejected(stream, first, last):
        count += len(rows)
    return count


def put_together(
    path: Path,
    stream: str,
    first_sequence: int,
    told: dict[str, Any],
    in_store: dict[str, Any],
    *,
    replay_configured: bool,
) -> dict[str, Any]:
    """Say how it stands: design.md's `status` and a little more; `told` by the settler, `in_store` as `from_store`.

    Reads the tape at `path`, briefly.
    """
    settling = is_locked(path, "settler")
    acked = max(told.get("acked", 0), in_store.get("acked", 0))
    durable = max(told.get("durable", 0), in_store.get("durable", 0))
    halted = told.get("halted")
    state = told.get("state", "idle") if settling or halted else "idle"
    paused = _pause(path)
    if paused is not None and not halted:
        state = "paused"
    session = told.get("session") or in_store.get("session") or 0
    said: dict[str, Any] = {
        "stream": stream,
        "state": state,
        "halted": halted,
        "paused": paused,
        "session": session,
        "taped": 0,
        "acked": acked,
        "durable": durable,
        "lag_events": 0,
        "holes": [],
        "rejected": in_store.get("rejected", 0),
        "malformed": 0,
        "settling": settling,
        "nodes_away": told.get("nodes_away", []) if settling else [],
        **_recorder_says(path, replay_configured=replay_configured),
        "sessions": 0,
        "negative_balances": told.get("negative_balances", 0),
    }
    try:
        with closing(TapeReader(path)) as reader:
            sessions = reader.sessions()
            session = session or (sessions[0].session if sessions else 0)
            runs = reader.runs(session)
            settled_to = max(acked, first_sequence - 1)
            gaps = in_store.get("gaps", ())
            holes = [hole for hole in reader.holes(session, settled_to) if not _is_accepted(hole, gaps)]
            said |= {
                "session": session,
                "taped": runs.head,
                "lag_events": max(runs.head - settled_to, 0)
                - sum(last - first + 1 for first, last in holes if first <= runs.head),
                "holes": [list(hole) for hole in holes],
                "malformed": reader.malformed_total,
                "sessions": len(sessions),
            }
    except TapeError as missing:
        said["tape"] = str(missing)
        if state == "idle" and settling:
            said["state"] = "waiting"
    return said


def _recorder_says(path: Path, *, replay_configured: bool) -> dict[str, Any]:
    """Give what a running recorder hears, and how its talk with the replay server stands."""
    recording = is_locked(path, "recorder")
    told = (read_recorded(path) or {}) if recording else {}
    return {
        "recording": recording,
        "heard_at_us": told.get("heard_at_us", 0),
        "silent_since_us": told.get("silent_since_us", 0),
        "replay": told.get("replay") if replay_configured else None,
    }


def _pause(path: Path) -> dict[str, Any] | None:
    """Give what `sidecar pause` left on the tape at `path`: reason, by, since_us; empty when made by hand."""
    try:
        said = json.loads(paused_path(path).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _is_accepted(hole: tuple[int, int], gaps: tuple[tuple[int, int], ...]) -> bool:
    return any(first <= hole[0] and hole[1] <= last for first, last in gaps)
