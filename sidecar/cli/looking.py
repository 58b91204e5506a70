"""The verbs that look: status, doctor, balance, trade, schema, rejected, tape. They change nothing of the stream."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any, TypeVar

from sidecar.batch import REJECTED_COLUMNS
from sidecar.cli.running import load_here
from sidecar.cli.show import amount, moment, table
from sidecar.config import Config
from sidecar.errors import OutcomeUnknownError, SidecarError, StoreRefusedError, UsageError
from sidecar.events import I63_MAX
from sidecar.late import standing
from sidecar.service import open_store
from sidecar.standing import NODES_AWAY_MEANS, NODES_AWAY_STEP, from_store, put_together, told_by_settler
from sidecar.store.base import Store
from sidecar.tape import TapeReader, is_locked, read_settled
from sidecar.wire import decode

T = TypeVar("T")
LISTEN_MAX_S = 3_600.0
STATUS_STORE_S = 5.0  # status answers without the store when that takes longer


def add_verbs(verb: Any, group: Any) -> None:
    """Add this room's verbs to the command line."""
    verb("status", status, "say how it stands: state, positions, lag, holes, why halted and what to do", _STATUS)
    added = verb("balance", balance, "look up a user's balances: the sum over streams; exit 1 when there is none")
    added.add_argument("user", type=_number, metavar="USER", help="user id")
    added.add_argument("asset", nargs="?", metavar="ASSET", help="an asset's name or id")
    added = verb("trade", trade, "look up a trade's rows; exit 1 when there is none")
    added.add_argument("symbol", metavar="SYMBOL", help="as configured: btc_usdt")
    added.add_argument("trade_id", type=_number, metavar="TRADE_ID")

    added = verb(
        "doctor", doctor, "look at everything around it; each thing with the next step; exit 1 when one is wrong"
    )
    added.add_argument("--listen-s", type=_seconds, default=3.0, metavar="S", help="listen to the engine so long (3)")

    parts = group("schema", "the tables: create or show them")
    verb("apply", schema_apply, "create missing tables, check existing ones", parents=parts)
    verb("print", schema_print, "show the statements that create the tables", parents=parts)

    parts = group("rejected", "events that were refused, kept with their payload")
    added = verb("list", rejected_list, "list rejected events", parents=parts)
    added.add_argument("--limit", type=_number, default=100, metavar="N", help="the newest N (default 100)")
    added.add_argument("--stream", metavar="NAME", help="of another stream, such as main/late")
    added = verb(
        "show", rejected_show, "show one rejected event and its payload; exit 1 when there is none", parents=parts
    )
    added.add_argument("sequence", type=_number, metavar="SEQ")
    added.add_argument("--stream", metavar="NAME", help="of another stream, such as main/late")

    parts = group("tape", "the recorded stream on this host's disk")
    verb("info", tape_info, "sessions, positions, holes, sizes", parents=parts)
    added = verb("dump", tape_dump, "show recorded frames, one JSON object a line", parents=parts)
    added.add_argument("--session", type=_number, metavar="K", help="default: the stream's")
    added.add_argument("--from", type=_number, default=0, dest="first", metavar="SEQ")
    added.add_argument("--to", type=_number, default=I63_MAX, dest="last", metavar="SEQ")
    added.add_argument("--limit", type=_number, default=1_000, metavar="N", help="frames (default 1000)")
    added.add_argument("--malformed", action="store_true", help="the newest malformed frames instead")


_STATUS = "works while nothing runs; exit 1 when halted"


def _number(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= I63_MAX:
        raise argparse.ArgumentTypeError(f"{text!r}; an integer from 0 to {I63_MAX} is allowed")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= LISTEN_MAX_S:
        raise argparse.ArgumentTypeError(f"{text!r}; a number of seconds above 0, at most {LISTEN_MAX_S:g}, is allowed")
    return value


def with_store(config: Config, ask: Callable[[Store], Awaitable[T]]) -> T:
    """Open the store, ask it one thing, close it."""

    async def asked() -> T:
        async with open_store(config) as store:
            return await ask(store)

    return asyncio.run(asked())


def _print(given: argparse.Namespace, said: Any, text: str) -> None:
    print(json.dumps(said) if given.json else text)


def doctor(given: argparse.Namespace) -> int:
    """Look at everything around."""
    from sidecar.cli import doctor as examining

    return examining.doctor(given, load_here)


# --- status -----------------------------------------------------------------------------------------------------------


def status(given: argparse.Namespace) -> int:
    """Put together what the settler, the tape and the store say."""
    config = load_here(given)
    said = status_of(config) | {"late": standing(config.tape.path)}
    _print(given, said, _status_text(said))
    return 1 if said["state"] == "halted" or any(late["halted"] for late in said["late"]) else 0


def status_of(config: Config) -> dict[str, Any]:
    """Say how a sidecar stands, from its files and its store; works while nothing runs."""
    stream, first_sequence = config.stream.name, config.stream.first_sequence

    async def in_time(store: Store) -> dict[str, Any]:
        async with asyncio.timeout(STATUS_STORE_S):
            return await from_store(store, stream, first_sequence)

    store_says = "reachable"
    try:
        in_store = with_store(config, in_time)
    except (OutcomeUnknownError, StoreRefusedError, TimeoutError) as error:
        in_store, store_says = {}, f"not reachable: {error}"
    told = told_by_settler(config.tape.path, stream)
    replayed = config.replay is not None
    said = put_together(config.tape.path, stream, first_sequence, told, in_store, replay_configured=replayed)
    return said | {"store": store_says, "streams": in_store.get("streams", {})}


def _status_text(said: dict[str, Any]) -> str:
    holes = said["holes"]
    lines = [
        f"stream {said['stream']}: {said['state']}",
        f"  taped {said['taped']}, acked {said['acked']}, durable {said['durable']}, {said['lag_events']} behind",
        f"  recorder {'runs' if said['recording'] else 'does not run'}, settler"
        f" {'runs' if said['settling'] else 'does not run'}, store {said['store']}",
        f"  rejected {said['rejected']}, malformed {said['malformed']},"
        f" session {said['session']} of {said['sessions']}",
    ]
    if holes:
        shown = ", ".join(f"{first}–{last}" if first != last else str(first) for first, last in holes[:10])
        lines.append(f"  holes: {shown}{f' and {len(holes) - 10} more' if len(holes) > 10 else ''}")
    if said["silent_since_us"]:
        lines.append(f"  the engine is SILENT since {moment(said['silent_since_us'])}: neither frame nor heartbeat")
    if said["replay"]:
        replay = said["replay"]
        why = f", attempt {replay['attempts']}: {replay['last_error']}" if replay["last_error"] else ""
        lines.append(f"  replay {replay['endpoint']}: {replay['state']}, {replay['filled_total']} frames filled{why}")
    if said["nodes_away"]:
        lines += [f"  database nodes AWAY: {', '.join(said['nodes_away'])}: {NODES_AWAY_MEANS}"]
        lines += [f"  next step: {NODES_AWAY_STEP}"]
    if said["halted"]:
        halted = said["halted"]
        lines += [f"  HALTED: {halted['code']} at sequence {halted['sequence']}: {halted['reason']}"]
        lines += [f"  next step: {halted['next_step']}"]
    for late in said["late"]:
        halted = late["halted"]
        about = f"HALTED: {halted['reason']}; next step: {halted['next_step']}" if halted else late["state"]
        lines.append(f"  late truths, {late['stream']}: taped {late['taped']}, acked {late['acked']}, {about}")
    if "tape" in said:
        lines.append(f"  {said['tape']}")
    late = {late["stream"] for late in said["late"]}
    for name, at in said["streams"].items():
        if name != said["stream"] and name not in late:
            ended = f", ended: {at['next']} goes on" if at["next"] else ""
            lines.append(f"  stream {name} in this store: acked {at['acked']}, durable {at['durable']}{ended}")
    return "\n".join(lines)


# --- look-ups ---------------------------------------------------------------------------------------------------------


def _asset_id(config: Config, text: str) -> int:
    if text in config.assets:
        return config.assets[text].id
    if text.isdigit():
        return int(text)
    raise UsageError(f"asset {text!r} is not configured; {', '.join(sorted(config.assets))}, or an id, are allowed")


def balance(given: argparse.Namespace) -> int:
    """Look up balances."""
    config = load_here(given)
    wanted = _asset_id(config, given.asset) if given.asset is not None else None
    rows = with_store(config, lambda store: store.get_user_balances(given.user))
    named = {asset.id: (name, asset.decimals) for name, asset in config.assets.items()}
    balances: dict[int, dict[str, Any]] = {}
    for row in rows:
        if wanted is not None and row.asset_id != wanted:
            continue
        one = balances.setdefault(
            row.asset_id,
            {"asset": named.get(row.asset_id, (None, 0))[0], "asset_id": row.asset_id, "total": 0, "streams": {}},
        )
        one["total"] += row.available
        one["streams"][row.stream] = {
            "available": row.available,
            "version": row.version,
            "last_sequence": row.last_sequence,
            "updated_at": row.updated_at,
        }
    said = {"user_id": given.user, "balances": list(balances.values())}
    lines = [
        (one["asset"] or one["asset_id"], amount(one["total"], decimals), stream, amount(row["available"], decimals),
         row["version"], row["last_sequence"], moment(row["updated_at"]))
        for one in balances.values()
        for decimals in [named.get(one["asset_id"], ("", 0))[1]]
        for stream, row in one["streams"].items()
    ]  # fmt: skip
    text = table(("asset", "total", "stream", "available", "version", "last_sequence", "updated_at"), lines)
    if not balances:
        asset = "" if given.asset is None else f" of {given.asset}"
        text = f"user {given.user} has no balance{asset}"
    _print(given, said, text)
    return 0 if balances else 1


def trade(given: argparse.Namespace) -> int:
    """Look up a trade."""
    config = load_here(given)
    if given.symbol not in config.symbols:
        allowed = ", ".join(sorted(config.symbols))
        raise UsageError(f"symbol {given.symbol!r} is not configured; {allowed} are allowed")
    rows = with_store(config, lambda store: store.get_trade(given.symbol, given.trade_id))
    said = {"symbol": given.symbol, "trade_id": given.trade_id, "rows": rows}
    text = "\n\n".join(table(("column", "value"), row.items()) for row in rows)
    _print(given, said, text or f"{given.symbol} has no trade {given.trade_id}")
    return 0 if rows else 1


# --- schema -----------------------------------------------------------------------------------------------------------


def schema_apply(given: argparse.Namespace) -> int:
    """Create missing tables."""
    config = load_here(given)

    async def apply() -> list[str]:
        store = open_store(config)
        try:
            return await store.apply_schema(config.symbols)  # not opened: there may be nothing to open yet
        finally:
            await store.close()

    created = asyncio.run(apply())
    _print(given, {"created": created}, "\n".join(f"created {name}" for name in created) or "every table is there")
    return 0


def schema_print(given: argparse.Namespace) -> int:
    """Show the statements."""
    config = load_here(given)
    sys.stdout.write(open_store(config).schema(config.symbols))
    return 0


# --- rejected ---------------------------------------------------------------------------------------------------------


def rejected_list(given: argparse.Namespace) -> int:
    """List the newest rejected events."""
    config = load_here(given)
    stream = given.stream or config.stream.name

    async def ask(store: Store) -> list[tuple[Any, ...]]:
        newest: list[tuple[Any, ...]] = []
        async for rows in store.scan_rejected(stream, 0, I63_MAX):
            newest = [*newest, *rows][-given.limit :] if given.limit else []
        return newest

    rows = [dict(zip(REJECTED_COLUMNS, row, strict=True)) for row in with_store(config, ask)]
    said = [{key: row[key] for key in ("output_sequence", "code", "reason")} for row in rows]
    text = table(("sequence", "code", "reason"), [row.values() for row in said])  # type: ignore[misc]
    _print(given, {"stream": stream, "rejected": said}, text if said else "nothing was rejected")
    return 0


def rejected_show(given: argparse.Namespace) -> int:
    """Show one rejected event."""
    config = load_here(given)
    stream = given.stream or config.stream.name
    row = with_store(config, lambda store: store.get_rejected(stream, given.sequence))
    if row is None:
        _print(given, None, f"sequence {given.sequence} of stream {stream} was not rejected")
        return 1
    payload = bytes(row.pop("payload"))
    said = row | {"payload_hex": payload.hex(), "decoded": _readable(payload)}
    _print(given, said, table(("column", "value"), said.items()))
    return 0


def _readable(payload: bytes) -> Any:
    """Give a payload's keys and values as far as JSON can say them."""
    import msgpack

    try:
        return json.loads(json.dumps(msgpack.unpackb(payload, strict_map_key=False), default=repr))
    except (ValueError, TypeError):
        return None


# --- tape -------------------------------------------------------------------------------------------------------------


def tape_info(given: argparse.Namespace) -> int:
    """Describe the tape."""
    config = load_here(given)
    with closing(TapeReader(config.tape.path)) as reader:
        sessions = [
            row._asdict()
            | {
                "head": (runs := reader.runs(row.session)).head,
                "frames": sum(last - first + 1 for first, last in runs.list() if last > row.pruned_to),
                "holes": [
                    list(hole)
                    for hole in reader.holes(row.session, max(row.pruned_to, runs.list()[0][0] if runs.list() else 0))
                ],
            }
            for row in reader.sessions()
        ]
        said = {
            "path": str(config.tape.path),
            "size_bytes": config.tape.path.stat().st_size,
            "recording": is_locked(config.tape.path, "recorder"),
            "malformed": reader.malformed_total,
            "sessions": sessions,
        }
    heads = ("session", "engine_session", "frames", "head", "pruned_to", "announced_to", "holes", "opened_at", "reason")
    rows = [
        [row[head] if head != "opened_at" else moment(row["opened_at_us"]) for head in heads[:6]]
        + [len(row["holes"]), moment(row["opened_at_us"]), row["reason"]]
        for row in sessions
    ]
    _print(
        given, said, f"{said['path']}: {said['size_bytes']} bytes, malformed {said['malformed']}\n{table(heads, rows)}"
    )
    return 0


def tape_dump(given: argparse.Namespace) -> int:
    """Show recorded frames as JSON lines."""
    config = load_here(given)
    with closing(TapeReader(config.tape.path)) as reader:
        if given.malformed:
            for number, at_us, reason, frames in reader.malformed(given.limit):
                print(
                    json.dumps(
                        {"number": number, "recorded_at_us": at_us, "reason": reason, "frames_hex": frames.hex()}
                    )
                )
            return 0
        told = read_settled(config.tape.path) or {}
        session = given.session if given.session is not None else told.get("session") or 1
        if session not in {row.session for row in reader.sessions()}:
            raise SidecarError(f"{config.tape.path} has no session {session}; see `sidecar tape info`")
        left, first = given.limit, given.first
        while left > 0:
            rows = reader.frames(session, first, given.last, min(left, 500))
            for sequence, at_us, payload in rows:
                kind = type(decode(payload)).__name__
                print(
                    json.dumps(
                        {
                            "output_sequence": sequence,
                            "recorded_at_us": at_us,
                            "kind": kind,
                            "event": _readable(payload),
                        }
                    )
                )
            if not rows:
                break
            left, first = left - len(rows), rows[-1][0] + 1
    return 0
