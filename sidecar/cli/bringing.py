"""The verbs that bring in what a stream lacks: rejected resubmit, backfill, import-balances.

Each may be said again, after any crash.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from sidecar import decisions, opening, wire
from sidecar.cli.looking import _number, with_store
from sidecar.cli.running import load_here, session_here
from sidecar.cli.show import amount, table
from sidecar.config import Config
from sidecar.decisions import Agreed, DecisionRefusedError
from sidecar.errors import Halt, MalformedFrameError, TapeMissingError, UsageError
from sidecar.events import Event
from sidecar.foreign import EVENTS_MAX, ForeignPart
from sidecar.late import Claim, Late, LateTape, Poster, claim, decoded
from sidecar.life import TICK_S
from sidecar.service import bounds_of
from sidecar.store.base import Store
from sidecar.tape import TapeReader, is_locked

PIECE_EVENTS: Final = 500  # judged and appended together
_SQLITE: Final = b"SQLite format 3\0"
_SHOWN_MAX: Final = 20


def add_verbs(verb: Any, group: Any) -> None:
    """Add this room's verbs to the command line."""
    added = verb(
        "resubmit", resubmit, "settle a rejected event after all, as a late truth", _RESUBMIT, parents=group("rejected")
    )
    added.add_argument("sequence", type=_number, metavar="SEQ")
    added.add_argument("--with", type=Path, dest="corrected", metavar="FILE", help="the event made valid, see below")
    added.add_argument("--stream", metavar="NAME", help="whose event it is (default: the one that is settled)")
    added.add_argument("--lost-late-tape", action="store_true", help=_LOST)
    added = verb("backfill", backfill, "bring in what was given up as a gap, as late truths", _BACKFILL)
    added.add_argument("file", type=Path, metavar="FILE", help="archived events, or another host's tape, see below")
    added.add_argument("--session", type=_number, metavar="K", help="of that tape (default: the stream's, where known)")
    added.add_argument("--stream", metavar="NAME", help="whose events they are (default: the one that is settled)")
    added.add_argument("--lost-late-tape", action="store_true", help=_LOST)

    added = verb("import-balances", import_balances, "bring in the balances that users had before, once", _IMPORT)
    added.add_argument("file", type=Path, metavar="FILE", help="CSV: user_id,asset,amount; see below")
    added.add_argument("--decimals", action="store_true", help="amounts are whole units with a point: 1.5 is 1.5 btc")
    added.add_argument("--dry-run", action="store_true", help="read and check the file, show the sums, change nothing")


_IMPORT = """\
FILE is a CSV file with a line for each user and asset, a header `user_id,asset,amount` or these three columns:
  7,btc,150000000           asset by name or id; the amount in smallest units (with --decimals: 1.50000000)
the balances become ledger events (ADJUSTMENT) of the stream NAME/import, once: the same file again does nothing,
another one is refused, what was interrupted is gone on with. a balance may be negative. it may be done at any time.
"""
_LOST = "the late tape that numbers the late stream is lost for good: close it and begin another"
_FORM = """\
an event in JSON is the map of the wire's keys, {"output_sequence": 7, "trade_id": …}, or has it under "event" (as the
lines of `sidecar tape dump` do), or is the exact payload: {"payload_hex": "8e…"}.
"""
_RESUBMIT = f"""\
without --with, the payload that was kept is settled: for events that an operator rejected, or whose trade id did not
rise. with it, FILE holds the corrected event, in JSON or as the msgpack payload, under the same output_sequence:
`sidecar rejected show SEQ --json` gives the old one. it is settled on the stream NAME/late, exactly once however often
this is said; the running sidecar takes it up, else the next start does. balances are sums over streams.
{_FORM}"""
_BACKFILL = f"""\
FILE is a text file of one JSON event a line, or a tape file of another host (it may be in use). only what `sidecar gap
accept` gave up on the stream is taken, and nothing that is settled: each event is settled once on the stream NAME/late,
however often this is said, killed, and said again. holes that are still open are named, not filled.
{_FORM}"""


# --- what people bring ------------------------------------------------------------------------------------------------


def _payload(said: Any, where: str) -> bytes:
    """Give the payload that a JSON object stands for."""
    if not isinstance(said, dict):
        raise UsageError(f"{where}: {str(said)[:80]!r}; a JSON object is wanted, see --help")
    if "payload_hex" in said:
        try:
            return bytes.fromhex(said["payload_hex"])
        except (TypeError, ValueError):
            raise UsageError(f"{where}: payload_hex is not text of hexadecimal digits") from None
    fields = said.get("event", said)
    if not isinstance(fields, dict):
        raise UsageError(f"{where}: event={str(fields)[:80]!r}; a JSON object is wanted, see --help")
    try:
        return wire.encode(fields)
    except (OverflowError, TypeError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from None


def _event(payload: bytes, where: str) -> Event:
    try:
        return decoded(payload)
    except MalformedFrameError as malformed:
        raise UsageError(f"{where}: {malformed}") from None


def _lines(path: Path) -> Iterator[Event]:
    """Give the events of a text file. Raises UsageError at the first line that is none."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                said = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{where}: not JSON: {error}") from None
            yield _event(_payload(said, where), where)


def _is_tape(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_SQLITE)) == _SQLITE
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


class _Source:
    """What FILE has of a stream: events within accepted gaps; and whether the rest is what the stream settled."""

    def __init__(self, path: Path, session: int | None, stream: str, agreed: Agreed, store: Store) -> None:
        self._path = path
        self._stream = stream
        self._agreed = agreed
        self._store = store
        self._reader = TapeReader(path) if _is_tape(path) else None
        if self._reader is not None:
            self._session = self._find_session(self._reader, session)
        elif session is not None:
            raise UsageError(f"--session {session}: {path} is no tape, it has no sessions")
        else:
            for _ in _lines(path):  # every line, before anything is done with the first
                pass
        self.not_in_a_gap = 0
        self._others: list[int] = []

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()

    def _find_session(self, reader: TapeReader, given: int | None) -> int:
        rows = {row.session: row for row in reader.sessions()}
        if given is not None and given not in rows:
            raise UsageError(f"--session {given}: {self._path} has {', '.join(map(str, rows)) or 'none'}")
        if given is not None:
            return given
        if reader.tape_id == self._agreed.tape_id:
            return self._agreed.session
        key = self._agreed.engine_session
        keyed = [row.session for row in rows.values() if key is not None and row.engine_session == key]
        if len(found := keyed or list(rows)) != 1:
            many = f"{self._path} has sessions {', '.join(map(str, rows)) or 'none'}"
            raise UsageError(f"{many}; say which is stream {self._stream}'s: --session K")
        return found[0]

    async def check(self, durable: int) -> None:
        """Compare some of what is settled. Raises DecisionRefusedError when this is not the stream's past."""
        known = ForeignPart(self._store, self._stream, self._agreed, durable)
        try:
            if self._reader is not None:
                agreed = replace(self._agreed, session=self._session)
                await ForeignPart(self._store, self._stream, agreed, durable).compare(self._reader)
                return
            compared = 0
            for event in _lines(self._path):
                if compared == EVENTS_MAX:
                    return
                if self._agreed.first_sequence <= event.output_sequence <= durable and not self._in_gap(event):
                    compared += 1
                    if not await known.is_settled(event):
                        raise DecisionRefusedError(
                            f"sequence {event.output_sequence} in {self._path} is not what stream {self._stream}"
                            " settled under it: these are another stream's events, nothing was posted"
                        )
        except Halt as halt:
            raise DecisionRefusedError(
                f"{self._path}, session {self._session}: {halt.reason.replace('on this tape', 'there')}: another"
                " stream's events, nothing was posted"
            ) from None

    def _in_gap(self, event: Event) -> bool:
        gap = self._agreed.gap_at_or_after(event.output_sequence)
        return gap is not None and gap[0] <= event.output_sequence

    async def missing(self) -> AsyncIterator[list[Event]]:
        """Give the events within accepted gaps, piece by piece."""
        if self._reader is None:
            piece: list[Event] = []
            for event in _lines(self._path):
                if not self._in_gap(event):
                    self.not_in_a_gap += 1
                    self._others.append(event.output_sequence)
                    continue
                piece.append(event)
                if len(piece) == PIECE_EVENTS:
                    yield piece
                    piece = []
            if piece:
                yield piece
            return
        for first, last in self._agreed.gaps:
            after = first - 1
            while rows := self._reader.frames(self._session, after + 1, last, PIECE_EVENTS):
                yield [_event(payload, f"{self._path}, sequence {sequence}") for sequence, _, payload in rows]
                after = rows[-1][0]

    def has_of(self, holes: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Give those of the open holes that FILE has something of."""
        if self._reader is not None:
            return [hole for hole in holes if self._reader.frames(self._session, *hole, 1)]
        return [hole for hole in holes if any(hole[0] <= sequence <= hole[1] for sequence in self._others)]

    def total(self) -> int | None:
        """Count what the gaps are of, for the progress bar."""
        return sum(last - first + 1 for first, last in self._agreed.gaps) if self._reader is not None else None


# --- posting ----------------------------------------------------------------------------------------------------------


async def _claimed(config: Config, store: Store, stream: str, late: LateTape, *, lost_too: bool) -> Claim:
    """Claim the late stream; after closing a lost one, wait until nobody can be settling from it any more."""
    claimed = await claim(store, stream, late, lost_too=lost_too, now_us=_now_us())
    if claimed.closed:
        await asyncio.sleep(config.pipeline.durable_after_s + 2 * TICK_S)
    return claimed


async def _agreed(store: Store, stream: str) -> Agreed:
    agreed = await decisions.read_agreed(store, stream)
    if agreed is None:
        raise DecisionRefusedError(f"stream {stream} has no genesis yet: nothing of it can be late")
    return agreed


def _taken_up(config: Config) -> str:
    if is_locked(config.tape.path, "settler"):
        return "the running sidecar settles it: see `sidecar status`"
    return "no settler runs here: the next `sidecar run` or `sidecar settle` settles it"


def _now_us() -> int:
    return time.time_ns() // 1000


@contextmanager
def progress(what: str, total: int | None, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show how far long work is, on a terminal only: the function that is given takes how much more is done."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=total)
        yield lambda more: shown.advance(task, more)


def resubmit(given: argparse.Namespace) -> int:
    """Post one rejected event as a late truth."""
    config = load_here(given)
    stream, sequence = given.stream or config.stream.name, given.sequence

    async def ask(store: Store) -> dict[str, Any]:
        agreed = await _agreed(store, stream)
        row = await store.get_rejected(stream, sequence)
        if row is None:
            raise DecisionRefusedError(
                f"sequence {sequence} of stream {stream} was not rejected: see `rejected list`; what was given up as a"
                " gap comes in with `sidecar backfill`"
            )
        event = _corrected(given.corrected, sequence) if given.corrected else _kept(row)
        with closing(LateTape(config.tape.path)) as late:
            claimed = await _claimed(config, store, stream, late, lost_too=given.lost_late_tape)
            poster = Poster(store, late, stream, agreed, claimed)
            judged = await poster.judge(event)
            said = {"stream": stream, "output_sequence": sequence, "late_stream": claimed.name}
            if isinstance(judged, Late):
                poster.post([judged])
                state = "posted"
            elif judged.startswith(("posted before", "settled before")):
                state = judged
            else:
                raise DecisionRefusedError(f"sequence {sequence}: {judged}")
            number = late.number_of(claimed.name, sequence)
            if number is not None:
                resolution = f"resubmitted as {claimed.name} {number}"
                await store.resolve_rejected(stream, sequence, resolution, _now_us())
            return {**said, "late_sequence": number, "state": state}

    said = with_store(config, ask)
    text = f"sequence {sequence} of {stream}: {said['state']} ({said['late_stream']} {said['late_sequence'] or ''})"
    print(json.dumps(said) if given.json else f"{text}\n{_taken_up(config)}")
    return 0


def _kept(row: dict[str, Any]) -> Event:
    if row["code"] == "TOO_LARGE":
        raise DecisionRefusedError("its payload is kept in part only: bring a valid one with --with FILE")
    return decoded(bytes(row["payload"]))


def _corrected(path: Path, sequence: int) -> Event:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--with {path}: {error.strerror}") from None
    try:
        said = json.loads(content)
    except ValueError:
        said = None
    if isinstance(said, dict) and "payload_hex" not in said:
        fields = said.get("event", said.get("decoded", said))
        if isinstance(fields, dict):
            fields.setdefault("output_sequence", sequence)
    event = _event(content if said is None else _payload(said, str(path)), f"--with {path}")
    if event.output_sequence != sequence:
        raise UsageError(f"--with {path}: output_sequence={event.output_sequence}; {sequence} is wanted")
    return event


def backfill(given: argparse.Namespace) -> int:
    """Post what an archive has of accepted gaps."""
    config = load_here(given)
    stream = given.stream or config.stream.name

    async def ask(store: Store) -> dict[str, Any]:
        agreed = await _agreed(store, stream)
        positions = await store.load_state(stream)
        acked, durable = (positions[kind].sequence if kind in positions else 0 for kind in ("acked", "durable"))
        with closing(_Source(given.file, given.session, stream, agreed, store)) as source:
            await source.check(durable)
            return await _post_missing(config, given, store, stream, agreed, acked, source)

    said = with_store(config, ask)
    if given.json:
        print(json.dumps(said))
    else:
        print(_backfill_text(config, said))
    return 1 if said["refused"] or said["open_holes"] else 0


async def _post_missing(
    config: Config,
    given: argparse.Namespace,
    store: Store,
    stream: str,
    agreed: Agreed,
    acked: int,
    source: _Source,
) -> dict[str, Any]:
    said: dict[str, Any] = {"stream": stream, "late_stream": None, "posted": 0, "posted_before": 0, "refused": []}
    with (
        closing(LateTape(config.tape.path)) as late,
        progress("backfill", source.total(), quiet=given.json) as advance,
    ):
        poster: Poster | None = None
        async for events in source.missing():
            if poster is None:
                claimed = await _claimed(config, store, stream, late, lost_too=given.lost_late_tape)
                poster = Poster(store, late, stream, agreed, claimed)
                said["late_stream"] = claimed.name
            taken: dict[int, Late] = {}
            for event in events:
                judged = await poster.judge(event)
                if isinstance(judged, Late):
                    taken[event.output_sequence] = judged  # twice in a piece: once
                elif judged.startswith(("posted before", "settled before")):
                    said["posted_before"] += 1
                else:
                    said["refused"].append({"output_sequence": event.output_sequence, "reason": judged})
            poster.post(list(taken.values()))
            said["posted"] += len(taken)
            advance(len(events))
    open_holes = source.has_of(_open_holes(config, agreed, acked)) if stream == config.stream.name else []
    return said | {"not_in_a_gap": source.not_in_a_gap, "open_holes": [list(hole) for hole in open_holes]}


def _open_holes(config: Config, agreed: Agreed, acked: int) -> list[tuple[int, int]]:
    """Give the holes of this host's tape that nobody has accepted."""
    try:
        with closing(TapeReader(config.tape.path)) as reader:
            holes = reader.holes(session_here(config, agreed), max(acked, agreed.first_sequence - 1))
    except TapeMissingError:
        return []
    return [hole for hole in holes if not any(a <= hole[0] and hole[1] <= b for a, b in agreed.gaps)]


def import_balances(given: argparse.Namespace) -> int:
    """Settle opening balances."""
    config = load_here(given)
    stream = config.stream.name
    assets = {name: opening.Asset(asset.id, asset.decimals) for name, asset in config.assets.items()}
    rows = opening.read(given.file, assets, decimals=given.decimals)
    sums = {name: sum(row.amount for row in rows if row.asset_id == asset.id) for name, asset in assets.items()}

    async def ask(store: Store) -> tuple[str, str]:
        name = await opening.import_stream(store, stream)
        if await opening.imported(store, name, rows) >= len(rows):
            return name, "imported before"
        if given.dry_run:
            return name, "not imported: dry run"
        with progress("import", len(rows), quiet=given.json) as advance:
            await opening.settle(
                store,
                name,
                rows,
                rules=config.rules(),
                bounds=bounds_of(config),
                now_us=_now_us,
                advance=advance,
            )
        return name, "imported"

    name, state = with_store(config, ask)
    said = {"stream": name, "rows": len(rows), "sums": sums, "state": state}
    users = len({row.user_id for row in rows})
    lines = [f"{len(rows)} balances of {users} users: {state}, as stream {name}"]
    lines.append(table(("asset", "sum"), [(name, amount(sums[name], assets[name].decimals)) for name in sorted(sums)]))
    print(json.dumps(said) if given.json else "\n".join(lines))
    return 0


def _backfill_text(config: Config, said: dict[str, Any]) -> str:
    lines = [f"posted {said['posted']}, posted or settled before {said['posted_before']}, as {said['late_stream']}"]
    if said["late_stream"] is None:
        lines = ["nothing of it was given up as a gap: nothing to post"]
    for refused in said["refused"][:_SHOWN_MAX]:
        lines.append(f"refused {refused['output_sequence']}: {refused['reason']}")
    if len(said["refused"]) > _SHOWN_MAX:
        lines.append(f"and {len(said['refused']) - _SHOWN_MAX} more refused")
    for first, last in said["open_holes"]:
        accept = f"sidecar gap accept {first} {last} --reason '…'"
        lines.append(f"{first} to {last} is an open hole: replay may still fill it; else `{accept}`, then this again")
    if said["posted"]:
        lines.append(_taken_up(config))
    return "\n".join(lines)
