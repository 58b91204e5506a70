"""Bytes to events, by wire.md: one frame's payload in, one typed and validated value out.

Three outcomes, never a fourth: an event (or heartbeat), a `Refused` event that keeps its place in the sequence, or
`MalformedFrameError` when there is no place to give it. Which of them, depends on the bytes alone, so every host and
every replay judges alike. The common case (all fields right) is a handful of passes in C over one tuple; only a frame
that fails them is looked at field by field, to name the key and the value.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Final, NamedTuple

import msgpack
import msgspec
from msgspec.structs import astuple

from sidecar.errors import MalformedFrameError
from sidecar.events import I63_MAX, Event, Heartbeat, LedgerEvent, Refused, Trade

PAYLOAD_BYTES_MAX: Final = 4096
ASSET_MAX: Final = 2**31 - 1
TS_US_MAX: Final = 2**62 - 1
EVENT_TYPES: Final = ("DEPOSIT", "WITHDRAWAL", "ADJUSTMENT")


class _Field(NamedTuple):
    """An integer field: its name on the wire, another accepted name, its range, whether it must be there."""

    name: str
    alias: str | None = None
    low: int = 0
    high: int = I63_MAX
    required: bool = True


_COMMON = (_Field("session", required=False), _Field("ts_us", high=TS_US_MAX, required=False))
_TRADE = (
    _Field("trade_id", low=1),
    _Field("match_seq"),
    _Field("buy_order_id"),
    _Field("sell_order_id"),
    _Field("buyer_user_id"),
    _Field("seller_user_id"),
    _Field("base_asset", alias="base_asset_id", high=ASSET_MAX),
    _Field("quote_asset", alias="quote_asset_id", high=ASSET_MAX),
    _Field("price"),
    _Field("quantity"),
    _Field("buyer_refund"),
    _Field("seller_refund"),
    _Field("buyer_quote_version"),
    _Field("buyer_base_version"),
    _Field("seller_base_version"),
    _Field("seller_quote_version"),
    _Field("settled_at"),
    _Field("quote_amount", required=False),
    _Field("buyer_fee", required=False),
    _Field("seller_fee", required=False),
    *_COMMON,
)
_LEDGER = (
    _Field("user_id"),
    _Field("asset", alias="currency", high=ASSET_MAX),
    _Field("related_id"),
    _Field("created_at"),
    *_COMMON,
)
_AMOUNT = _Field("amount")
_ADJUSTMENT = _Field("amount", low=-I63_MAX)

_KNOWN: Final = frozenset(
    {"output_sequence", "next_sequence", "event_type", "amount"}
    | {field.name for field in (*_TRADE, *_LEDGER)}
    | {field.alias for field in (*_TRADE, *_LEDGER) if field.alias}
)
# The common case in one pass of C: a trade whose every key is right. Its fields are those of events.Trade, in that
# order: the two that no frame says stand in the way of keys that a sound trade lacks (on the wire they would be the
# aliases, and their range is empty), and an event_type is wanted that no frame of this size has room for. What it
# refuses is looked at key by key, to name the fault. 1.1 us a trade; unpacking with msgpack and checking types and
# ranges in Python was 6.1 us.
_Positive = Annotated[int, msgspec.Meta(ge=1, le=I63_MAX)]
_I63 = Annotated[int, msgspec.Meta(ge=0, le=I63_MAX)]
_AssetId = Annotated[int, msgspec.Meta(ge=0, le=ASSET_MAX)]
_Stamp = Annotated[int, msgspec.Meta(ge=0, le=TS_US_MAX)]
_Never = Annotated[int, msgspec.Meta(ge=1, le=0)]


class _TradeFrame(
    msgspec.Struct, kw_only=True, gc=False, tag_field="event_type", tag="-" * (PAYLOAD_BYTES_MAX + 1),
    rename={"payload": "base_asset_id", "origin_sequence": "quote_asset_id"},
):  # fmt: skip
    output_sequence: _Positive
    trade_id: _Positive
    match_seq: _I63
    buy_order_id: _I63
    sell_order_id: _I63
    buyer_user_id: _I63
    seller_user_id: _I63
    base_asset: _AssetId
    quote_asset: _AssetId
    price: _I63
    quantity: _I63
    quote_amount: _I63 = None  # type: ignore[assignment]  # absent; nil on the wire is refused, unlike `| None`
    buyer_fee: _I63 = None  # type: ignore[assignment]
    seller_fee: _I63 = None  # type: ignore[assignment]
    buyer_refund: _I63
    seller_refund: _I63
    buyer_quote_version: _I63
    buyer_base_version: _I63
    seller_base_version: _I63
    seller_quote_version: _I63
    settled_at: _I63
    ts_us: _Stamp = None  # type: ignore[assignment]
    session: _I63 = None  # type: ignore[assignment]
    payload: _Never = None  # type: ignore[assignment]
    origin_sequence: _Never = None  # type: ignore[assignment]


_sound_trade = msgspec.msgpack.Decoder(_TradeFrame).decode
_trade_of: Final[Callable[[tuple[Any, ...]], Trade]] = partial(tuple.__new__, Trade)  # half of what `_make` costs
assert _TradeFrame.__struct_fields__ == Trade._fields

_SCALARS: Final = frozenset({int, bool, float, str, bytes, type(None)})
_show = reprlib.Repr()
_show.maxlevel, _show.maxstring, _show.maxother, _show.maxlong, _show.maxdict, _show.maxtuple = 2, 80, 80, 80, 3, 3


def decode(payload: bytes) -> Event | Heartbeat:
    """Give the event or heartbeat in a frame's payload.

    Raises MalformedFrameError when it is not one msgpack map or has no usable `output_sequence` (and is no heartbeat).
    """
    if len(payload) <= PAYLOAD_BYTES_MAX:
        try:
            trade = _sound_trade(payload)
            trade.payload = payload  # type: ignore[assignment]
            return _trade_of(astuple(trade))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            pass
    fields = _unpack(payload)
    sequence = fields.get("output_sequence")
    if type(sequence) is not int or not 0 < sequence <= I63_MAX:
        return _heartbeat(fields)
    if len(payload) > PAYLOAD_BYTES_MAX:
        reason = f"payload is {len(payload)} bytes; at most {PAYLOAD_BYTES_MAX}"
        return Refused(sequence, "TOO_LARGE", reason, _session(fields), payload)
    if ("trade_id" in fields) == ("event_type" in fields):
        reason = f"{'both' if 'trade_id' in fields else 'neither'} of trade_id and event_type; exactly one is allowed"
        return Refused(sequence, "UNKNOWN_EVENT", reason, _session(fields), payload)
    if "trade_id" in fields:
        return _trade(fields, sequence, payload)
    return _ledger_event(fields, sequence, payload)


def encode(fields: Mapping[str, Any]) -> bytes:
    """Give the payload of a frame that carries these keys."""
    payload: bytes = msgpack.packb(dict(fields))
    return payload


def same(one: bytes, other: bytes) -> bool:
    """Say whether two payloads are one event: the same bytes, or the same known keys in type and value (design.md).

    Bytes that are no msgpack map are the same as themselves only.
    """
    if one == other:
        return True
    try:
        return _known(one) == _known(other)
    except MalformedFrameError:
        return False


def _known(payload: bytes) -> dict[str, tuple[str, Any]]:
    # A scalar by its value, however it was packed (a float by its digits: NaN is itself); anything else by its bytes,
    # since comparing what is nested deeply would exhaust the stack.
    return {
        key: (type(value).__name__, repr(value) if type(value) in _SCALARS else piece)
        for key, value, piece in _known_pieces(payload)
    }


def _unpack(payload: bytes) -> dict[Any, Any]:
    # Tuples for arrays and any key type, so that nothing in an unknown key can spoil a frame that has its place.
    try:
        fields = msgpack.unpackb(
            payload, raw=False, use_list=False, strict_map_key=False, unicode_errors="surrogateescape"
        )
    except (ValueError, TypeError, OverflowError, RecursionError):
        return {key: value for key, value, _ in _known_pieces(payload)}
    if type(fields) is not dict:
        raise MalformedFrameError(f"not a msgpack map: {_show.repr(fields)}")
    return fields


def _known_pieces(payload: bytes) -> Iterator[tuple[str, Any, bytes]]:
    """Give the known keys of a map, their values and the values' bytes, whatever the other keys and values are.

    For maps that can't be unpacked whole though they are sound msgpack: a map as a key, a timestamp of a wrong length.
    A value that can't be unpacked is given as its bytes. Nesting is bounded by msgpack (1,024 levels).
    """
    unpacker = msgpack.Unpacker(None, max_buffer_size=max(len(payload), 1))
    unpacker.feed(payload)
    try:
        for _ in range(unpacker.read_map_header()):
            start = unpacker.tell()
            unpacker.skip()
            middle = unpacker.tell()
            unpacker.skip()
            end = unpacker.tell()
            key = _unpack_piece(payload[start:middle])
            if type(key) is str and key in _KNOWN:
                yield key, _unpack_piece(payload[middle:end]), payload[middle:end]
        if unpacker.tell() != len(payload):
            raise ValueError(f"{len(payload) - unpacker.tell()} bytes after its end")
    except (ValueError, msgpack.UnpackException) as error:
        raise MalformedFrameError(f"not one msgpack map: {type(error).__name__}: {error}") from error


def _unpack_piece(piece: bytes) -> Any:
    try:
        return msgpack.unpackb(piece, raw=False, use_list=False, strict_map_key=False, unicode_errors="surrogateescape")
    except (ValueError, TypeError, OverflowError, RecursionError):
        return piece


def _heartbeat(fields: dict[Any, Any]) -> Heartbeat:
    if "output_sequence" in fields:
        value = _show.repr(fields["output_sequence"])
        raise MalformedFrameError(f"output_sequence={value}; an integer from 1 to {I63_MAX} is allowed")
    following = fields.get("next_sequence")
    if type(following) is not int or not 0 < following <= I63_MAX:
        raise MalformedFrameError("no output_sequence, and no usable next_sequence that would make it a heartbeat")
    stamp = fields.get("ts_us")
    return Heartbeat(following, _session(fields), stamp if type(stamp) is int and 0 <= stamp <= TS_US_MAX else None)


def _session(fields: dict[Any, Any]) -> int | None:
    value = fields.get("session")
    return value if type(value) is int and 0 <= value <= I63_MAX else None


def _trade(fields: dict[Any, Any], sequence: int, payload: bytes) -> Event:
    """Validate a trade field by field: it has an alias, a key of an unusual form, or a fault that wants a name."""
    fault = _fault(fields, _TRADE)
    if fault:
        return Refused(sequence, "BAD_FIELD", fault, _session(fields), payload)
    value = {field.name: _value(fields, field) for field in _TRADE}
    return Trade(output_sequence=sequence, payload=payload, **value)


def _ledger_event(fields: dict[Any, Any], sequence: int, payload: bytes) -> Event:
    kind = fields["event_type"]
    fault = None
    if kind not in EVENT_TYPES:
        fault = f"event_type={_show.repr(kind)}; {', '.join(EVENT_TYPES)} are allowed"
    fault = fault or _fault(fields, (*_LEDGER, _ADJUSTMENT if kind == "ADJUSTMENT" else _AMOUNT))
    if fault:
        return Refused(sequence, "BAD_FIELD", fault, _session(fields), payload)
    value = {field.name: _value(fields, field) for field in _LEDGER}
    return LedgerEvent(output_sequence=sequence, event_type=kind, amount=fields["amount"], payload=payload, **value)


def _value(fields: dict[Any, Any], field: _Field) -> Any:
    if field.alias is not None and field.alias in fields:
        return fields[field.alias]
    return fields.get(field.name)


def _fault(fields: dict[Any, Any], specification: tuple[_Field, ...]) -> str | None:
    for field in specification:
        key = field.name
        if field.alias is not None and field.alias in fields:
            if key in fields:
                return f"{key}={_show.repr(fields[key])} and its alias {field.alias}={_show.repr(fields[field.alias])}"
            key = field.alias
        if key not in fields:
            if field.required:
                return f"{key} is missing; an integer from {field.low} to {field.high} is required"
            continue
        value = fields[key]
        if type(value) is not int or not field.low <= value <= field.high:
            return f"{key}={_show.repr(value)}; an integer from {field.low} to {field.high} is allowed"
    return None
