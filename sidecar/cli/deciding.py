"""The verbs by which an operator decides: pause, resume, gap, reject. Each says what it did, or why it must not."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from typing import Any

from sidecar import config as configuration
from sidecar import decisions
from sidecar.cli.looking import _number, status_of, with_store
from sidecar.cli.running import load, load_here, session_here
from sidecar.cli.show import table
from sidecar.config import Config
from sidecar.decisions import DecisionRefusedError
from sidecar.errors import TapeMissingError, UsageError
from sidecar.events import Decision
from sidecar.late import readings
from sidecar.store.base import Store
from sidecar.tape import TapeReader, is_locked, paused_path, read_settled

_NO_EVENT = (
    "GAP",
    "SESSION_CHANGED",
    "STORE_REFUSED",
    "DECISION_CONFLICT",
)  # halts that no single event is the cause of


def add_verbs(verb: Any, group: Any) -> None:
    """Add this room's verbs to the command line."""
    added = verb("pause", pause, "pause settlement; recording goes on, restarts do not end it")
    added.add_argument("--reason", required=True, metavar="TEXT")
    verb("resume", resume, "go on settling after a pause")
    added = verb("reject", reject, "reject the event at which settlement is halted, and go on", _REJECT)
    added.add_argument("sequence", type=_number, metavar="SEQ")
    added.add_argument("--reason", required=True, metavar="TEXT")
    added.add_argument("--stream", metavar="NAME", help="of a late stream that is halted, such as main/late")
    parts = group("stream", "which of the engine's sessions is settled")
    added = verb("next", stream_next, "go on with a new stream after SESSION_CHANGED", _NEXT, parents=parts)
    added.add_argument("name", metavar="NAME", help="the new stream: any that no rows are under yet")
    added.add_argument(
        "--first-sequence", type=_number, metavar="N", help="where it begins (default: the session's first frame)"
    )
    parts = group("gap", "sequences that never reached this host")
    verb("list", gap_list, "list holes of the tape, and accepted gaps", parents=parts)
    added = verb("accept", gap_accept, "decide that these sequences will never be posted on this stream", parents=parts)
    added.add_argument("first", type=_number, metavar="FROM")
    added.add_argument("last", type=_number, metavar="TO")
    added.add_argument("--reason", required=True, metavar="TEXT")


_NEXT = """\
the engine began anew, lost its journal or contradicted itself: what it publishes since then stands in another session
of the tape. this decides that the old stream ends where settlement stands, and that the new one goes on with that
session. a running sidecar follows once all of the old stream is durable, and so does every later start, until
stream.name in the configuration is changed, too. balances are the sum over both. look with `sidecar tape info` first.
"""
_REJECT = "the event is kept in rejected_events with its payload; decisions are never taken back"


def pause(given: argparse.Namespace) -> int:
    """Write the pause file."""
    path = paused_path(load_here(given).tape.path)
    said = {"reason": given.reason, "since_us": time.time_ns() // 1000, "by": decisions.decided_by()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(said))
    print(json.dumps({"paused": True}) if given.json else f"settlement pauses ({path}); `sidecar resume` ends it")
    return 0


def resume(given: argparse.Namespace) -> int:
    """Remove the pause file."""
    path = paused_path(load_here(given).tape.path)
    was = path.exists()
    path.unlink(missing_ok=True)
    print(json.dumps({"paused": False}) if given.json else ("settlement goes on" if was else "it was not paused"))
    return 0


def _decided(given: argparse.Namespace, made: Decision) -> int:
    said = made._asdict() | {"body": json.loads(made.body)}
    about = f"{made.first_sequence}" + (
        f" to {made.last_sequence}" if made.last_sequence != made.first_sequence else ""
    )
    print(json.dumps(said) if given.json else f"decision {made.number} of stream {made.stream}: {made.kind} {about}")
    return 0


def reject(given: argparse.Namespace) -> int:
    """Reject the event at which settlement is halted."""
    config = load_here(given)
    stream, told_path = given.stream or config.stream.name, config.tape.path
    for reading in readings(config.tape.path):
        if reading.stream == stream:
            told_path = reading.told_path
    told = read_settled(told_path) or {}
    halted = told.get("halted") if told.get("stream") == stream else None
    if not halted or halted["sequence"] != given.sequence or halted["code"] in _NO_EVENT:
        where = f"halted by {halted['code']} at {halted['sequence']}" if halted else "not halted"
        raise DecisionRefusedError(
            f"settlement is {where}; only an event at which it is halted can be rejected: see `sidecar status`"
        )

    async def ask(store: Store) -> Decision:
        return await decisions.reject(store, stream, given.sequence, reason=given.reason, now_us=time.time_ns() // 1000)

    return _decided(given, with_store(config, ask))


def stream_next(given: argparse.Namespace) -> int:
    """Begin the next stream."""
    config, name = load(given), given.name
    try:
        configuration.load(given.config, [*given.set, f"stream.name={name}"])
    except configuration.ConfigError as error:
        raise UsageError(f"NAME {name!r}: {error}") from None
    here = load_here(given)
    stream = config.stream.name if here.stream.name == name else here.stream.name  # asked again: it is followed already

    async def ask(store: Store) -> Decision:
        made = await decisions.read_next(store, stream)
        if made is not None and json.loads(made.body)["stream"] == name:
            return made
        with closing(TapeReader(config.tape.path)) as reader:
            return await _decide_next(stream, name, given.first_sequence, reader, store)

    made = with_store(config, ask)
    if given.json:
        return _decided(given, made)
    print(f"stream {stream} ends at {made.last_sequence}, stream {name} goes on")
    follows = "the running sidecar follows" if is_locked(config.tape.path, "settler") else "the next start follows"
    print(
        f"{follows} once all of {stream} is durable; set stream.name = {json.dumps(name)} when you have seen it do so"
    )
    return 0


async def _decide_next(
    stream: str, name: str, first_sequence: int | None, reader: TapeReader, store: Store
) -> Decision:
    told = read_settled(reader.path) or {}
    halted = told.get("halted")
    if told.get("stream") != stream or not halted or halted["code"] != "SESSION_CHANGED":
        where = f"halted by {halted['code']}" if halted else "not halted"
        raise DecisionRefusedError(
            f"settlement of {stream} is {where}; a stream ends where SESSION_CHANGED halts it: see `sidecar status`"
        )
    if halted["sequence"] <= told["foreign_to"]:  # what this tape holds never was the stream's
        session, ends_at = told["session"], (await store.load_state(stream))["durable"].sequence
    else:
        session = next(row.session for row in reader.sessions() if row.session > told["session"])
        ends_at = halted["sequence"] - 1
    runs = reader.runs(session).list()
    if first_sequence is None and not runs:
        raise DecisionRefusedError(f"session {session} has no frame yet; wait for one, or say --first-sequence")
    return await decisions.begin_next(
        store,
        stream,
        name,
        ends_at=ends_at,
        first_sequence=runs[0][0] if first_sequence is None else first_sequence,
        session=session,
        engine_session=next(row.engine_session for row in reader.sessions() if row.session == session),
        tape_id=reader.tape_id,
        now_us=time.time_ns() // 1000,
    )


def gap_accept(given: argparse.Namespace) -> int:
    """Accept a gap."""
    config = load_here(given)
    if not 1 <= given.first <= given.last:
        raise UsageError(f"FROM {given.first} TO {given.last}; 1 or more, and FROM at most TO, is allowed")

    async def ask(store: Store) -> Decision:
        agreed = await decisions.read_agreed(store, config.stream.name)
        return await decisions.accept_gap(
            store,
            config.stream.name,
            given.first,
            given.last,
            present=_present(config, session_here(config, agreed), given.first, given.last),
            reason=given.reason,
            now_us=time.time_ns() // 1000,
        )

    return _decided(given, with_store(config, ask))


def _present(config: Config, session: int, first: int, last: int) -> list[int]:
    """Give one sequence of first..last that is on the tape, if any is. Above what was heard of, nothing is a hole."""
    try:
        with closing(TapeReader(config.tape.path)) as reader:
            runs = reader.runs(session)
            rows = [row for row in reader.sessions() if row.session == session]
            known_to = max([runs.head, *(row.announced_to for row in rows)])
            pruned_to = max([0, *(row.pruned_to for row in rows)])  # what was deleted is not there either
            low = max(first, pruned_to + 1)
            holes = list(runs.holes(low, last))
    except TapeMissingError:
        return []
    if last > known_to:
        raise DecisionRefusedError(
            f"sequence {last} is above {known_to}, the last one that this tape heard of; it may still come"
        )
    if low > last or holes == [(low, last)]:
        return []
    return [low if low in runs else holes[0][1] + 1]


def gap_list(given: argparse.Namespace) -> int:
    """List holes and accepted gaps."""
    config = load_here(given)

    async def ask(store: Store) -> list[Decision]:
        return [entry for entry in await store.read_decisions(config.stream.name) if entry.kind == "gap"]

    said = status_of(config)
    gaps = with_store(config, ask)
    out = {
        "stream": config.stream.name,
        "holes": said["holes"],
        "accepted": [
            {"first": gap.first_sequence, "last": gap.last_sequence, "reason": gap.reason, "decided_by": gap.decided_by}
            for gap in gaps
        ],
    }
    rows = [("hole", first, last, "") for first, last in said["holes"]]
    rows += [("accepted", gap.first_sequence, gap.last_sequence, gap.reason) for gap in gaps]
    text = table(("what", "from", "to", "reason"), rows) if rows else "no holes, no gaps"
    print(json.dumps(out) if given.json else text)
    return 0
