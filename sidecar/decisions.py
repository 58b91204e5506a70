"""What is not in the stream but changes its result: the append-only log that all settlers of a stream obey.

Every entry takes the number after the last one that was read, by compare-and-set; whoever loses reads again and judges
again. So there is one log, the same for every host, and a stream's rows are a function of its prefix and this log.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from sidecar.errors import SidecarError, StoreRefusedError
from sidecar.events import Decision
from sidecar.store.base import KEYSPACE_STREAM, Store
from sidecar.symbols import Symbols, added_rules, merge_rules

KINDS: Final = frozenset({"genesis", "rules", "gap", "reject", "stamp", "next", "late_owner"})


@dataclass(frozen=True)
class Agreed:
    """What a log says, all together: what a life of the settle loop is bound by.

    `session` is the stream's on the tape `tape_id`, whose settler wrote the genesis; `engine_session` the key that its
    frames carried there. Other tapes count their sessions for themselves. `ends_at` is the last sequence that is ever
    settled on the stream, once `next_stream` goes on after it. `late_tape_id` is the tape that numbers a late stream;
    0 when that one was lost and the stream is closed.
    """

    symbols: Symbols
    first_sequence: int
    session: int
    engine_session: int | None
    tape_id: int | None
    base_us: int
    gaps: tuple[tuple[int, int], ...]
    rejects: frozenset[int]
    decisions_read: int
    ends_at: int | None = None
    next_stream: str | None = None
    late_tape_id: int | None = None
    warnings: tuple[str, ...] = ()

    def gap_at_or_after(self, sequence: int) -> tuple[int, int] | None:
        """Give the accepted gap that `sequence` is in, or the next one after it."""
        return next(((first, last) for first, last in self.gaps if last >= sequence), None)


class DecisionRefusedError(SidecarError):
    """A decision that may not be made as things stand; the message says why."""


def decided_by() -> str:
    """Name who decides, for the log: user, host and process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}:{os.getpid()}"


async def decide(
    store: Store,
    stream: str,
    judge: Callable[[list[Decision]], Decision | None],
) -> list[Decision]:
    """Append what `judge` makes of the log, until it is in or `judge` wants nothing; give the log as it then is.

    `judge` sees the whole log each time and may raise; the number and stream of what it gives are set here.
    Raises StoreRefusedError when the log has an entry that this release does not know.
    """
    while True:
        log = await read_log(store, stream)
        wanted = judge(log)
        if wanted is None:
            return log
        numbered = wanted._replace(stream=stream, number=len(log) + 1, decided_by=decided_by())
        if await store.append_decision(numbered):
            return [*log, numbered]


async def read_log(store: Store, stream: str) -> list[Decision]:
    """Read a stream's whole log, to obey it or to add to it.

    Raises StoreRefusedError at an entry that this release does not know: nobody here knows what it changes.
    """
    log = await store.read_decisions(stream)
    for entry in log:
        if entry.kind not in KINDS:
            raise StoreRefusedError(
                f"decision {entry.number} of stream {entry.stream} is a {entry.kind!r}, which this release does not"
                " know: a newer one made it; start that one, or a newer one still"
            )
    return log


def decision(
    kind: str, now_us: int, *, reason: str, body: Any = None, about: tuple[int, int] | None = None
) -> Decision:
    """Make an entry that still lacks its number: `about` is the range of sequences, `body` is kept as JSON."""
    first, last = about or (None, None)
    text = json.dumps(body or {}, sort_keys=True)
    return Decision("", 0, kind, first, last, text, reason, "", now_us // 1000)


async def agree(
    store: Store,
    *,
    stream: str,
    first_sequence: int,
    session: int,
    engine_session: int | None,
    tape_id: int | None = None,
    rules: dict[str, Any],
    now_us: int,
    also: dict[str, Any] | None = None,
) -> Agreed:
    """Read the stream's log, writing its genesis or the configuration's additions first where they are missing.

    `also` is kept in the genesis. Raises RulesChangedError when the configuration contradicts the log.
    """
    assets = {"assets": rules["assets"], "symbols": {}}

    def judge_keyspace(log: list[Decision]) -> Decision | None:
        added, _ = added_rules(rules_of(log), assets)
        if not added["assets"]:
            return None
        return decision("rules", now_us, reason="assets configured", body={"assets": added["assets"]})

    def judge_stream(log: list[Decision]) -> Decision | None:
        if not log:
            return genesis(
                now_us,
                reason="first settler",
                first_sequence=first_sequence,
                session=session,
                engine_session=engine_session,
                tape_id=tape_id,
                rules=rules,
                **(also or {}),
            )
        added, lacking = added_rules(rules_of(log), rules)
        warnings.extend(line for line in lacking if line not in warnings)
        if not (added["assets"] or added["symbols"]):
            return None
        return decision("rules", now_us, reason="configuration", body={"rules": added})

    warnings: list[str] = []
    await decide(store, KEYSPACE_STREAM, judge_keyspace)
    log = await decide(store, stream, judge_stream)
    if log[0].first_sequence != first_sequence:
        warnings.append(f"stream.first_sequence = {first_sequence}, but the stream began at {log[0].first_sequence}")
    return Agreed(warnings=tuple(warnings), **_said(log))


def genesis(now_us: int, *, reason: str, first_sequence: int, rules: dict[str, Any], **of_the_tape: Any) -> Decision:
    """Make a stream's first entry; `of_the_tape`: its session, engine_session and tape_id there."""
    body = {**of_the_tape, "base_us": now_us, "rules": rules}
    return decision("genesis", now_us, reason=reason, body=body, about=(first_sequence, first_sequence))


async def read_agreed(store: Store, stream: str) -> Agreed | None:
    """Read what a stream's log says, without writing to it; None when the stream has no genesis.

    Raises StoreRefusedError when the log has an entry that this release does not know.
    """
    log = await read_log(store, stream)
    return Agreed(**_said(log)) if log else None


def _said(log: list[Decision]) -> dict[str, Any]:
    assert log[0].kind == "genesis"
    begun = json.loads(log[0].body)
    following = next((entry for entry in log if entry.kind == "next"), None)
    owners = [json.loads(entry.body) for entry in log if entry.kind == "late_owner"]
    ranges = [(d.kind, d.first_sequence or 0, d.last_sequence or 0) for d in log if d.kind in ("gap", "reject")]
    stamps = [json.loads(entry.body)["base_us"] for entry in log if entry.kind == "stamp"]
    return {
        "symbols": Symbols(rules_of(log)),
        "first_sequence": log[0].first_sequence,
        "session": begun["session"],
        "engine_session": begun.get("engine_session"),
        "tape_id": begun.get("tape_id"),
        "base_us": max([begun["base_us"], *stamps]),
        "gaps": tuple(sorted((first, last) for kind, first, last in ranges if kind == "gap")),
        "rejects": frozenset(
            sequence for kind, first, last in ranges if kind == "reject" for sequence in range(first, last + 1)
        ),
        "decisions_read": len(log),
        "ends_at": following and following.last_sequence,
        "next_stream": following and json.loads(following.body)["stream"],
        "late_tape_id": owners[-1]["tape_id"] if owners else None,
    }


def rules_of(log: list[Decision]) -> dict[str, Any]:
    """Give the rules that a log has agreed on: its genesis and what was added."""
    entries = []
    for entry in log:
        if entry.kind in ("genesis", "rules"):
            body = json.loads(entry.body)
            entries.append(body.get("rules", body))
    return merge_rules(entries)


async def begin_next(
    store: Store,
    stream: str,
    name: str,
    *,
    ends_at: int,
    first_sequence: int,
    session: int,
    engine_session: int | None,
    tape_id: int,
    now_us: int,
) -> Decision:
    """Decide that `stream` ends at `ends_at` and that `name` goes on, with a session of the tape `tape_id`.

    The new stream's genesis (with the rules of the old one) is written first, so that whoever reads of its name finds
    it; repeated, nothing changes. Raises DecisionRefusedError when either stream was decided about otherwise.
    """
    old = await read_log(store, stream)
    if not old:
        raise DecisionRefusedError(f"stream {stream} has no genesis; there is nothing to go on from")
    rules = rules_of(old)

    def judge_new(log: list[Decision]) -> Decision | None:
        if not log:
            return genesis(
                now_us,
                reason=f"goes on after stream {stream}",
                first_sequence=first_sequence,
                session=session,
                engine_session=engine_session,
                tape_id=tape_id,
                rules=rules,
                after=stream,
            )
        begun = json.loads(log[0].body)
        if begun.get("after") != stream:
            raise DecisionRefusedError(f"stream {name} is there already, and not after {stream}; name a new one")
        if log[0].first_sequence != first_sequence:
            raise DecisionRefusedError(f"stream {name} has begun already, at sequence {log[0].first_sequence}")
        return None

    def judge_old(log: list[Decision]) -> Decision | None:
        made = next((entry for entry in log if entry.kind == "next"), None)
        if made is not None and json.loads(made.body)["stream"] != name:
            raise DecisionRefusedError(f"stream {stream} goes on as {json.loads(made.body)['stream']} already")
        if made is not None:
            return None
        return decision("next", now_us, reason="a new stream", body={"stream": name}, about=(ends_at, ends_at))

    judge_old(old)
    await decide(store, name, judge_new)
    return next(entry for entry in await decide(store, stream, judge_old) if entry.kind == "next")


async def read_next(store: Store, stream: str) -> Decision | None:
    """Read the decision that ended a stream, None while it goes on."""
    return next((entry for entry in await read_log(store, stream) if entry.kind == "next"), None)


async def accept_gap(
    store: Store, stream: str, first: int, last: int, *, present: list[int], reason: str, now_us: int
) -> Decision:
    """Decide that these sequences will never be posted on the stream, even if they turn up.

    `present` are those of them that the tape holds. Raises DecisionRefusedError when one is no hole, or settled.
    """
    if present:
        raise DecisionRefusedError(f"sequence {present[0]} is on the tape; only holes can be accepted: see `gap list`")
    return await _about_unsettled(store, stream, "gap", first, last, reason, now_us)


async def reject(store: Store, stream: str, sequence: int, *, reason: str, now_us: int) -> Decision:
    """Decide that one event, at which settlement is halted, is rejected (OPERATOR). Raises DecisionRefusedError."""
    return await _about_unsettled(store, stream, "reject", sequence, sequence, reason, now_us)


async def _about_unsettled(
    store: Store, stream: str, kind: str, first: int, last: int, reason: str, now_us: int
) -> Decision:
    positions = await store.load_state(stream)
    acked = max((state.sequence for state in positions.values()), default=0)
    if first <= acked:
        raise DecisionRefusedError(f"sequence {first} is settled already (acked is {acked}); nothing was decided")

    def judge(log: list[Decision]) -> Decision | None:
        if not log:
            raise DecisionRefusedError(f"stream {stream} has no genesis yet; start `sidecar settle` once first")
        if any(d.kind == kind and (d.first_sequence, d.last_sequence) == (first, last) for d in log):
            return None
        return decision(kind, now_us, reason=reason, about=(first, last))

    log = await decide(store, stream, judge)
    return next(d for d in reversed(log) if d.kind == kind and (d.first_sequence, d.last_sequence) == (first, last))
