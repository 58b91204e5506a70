"""wire.md, key by key: what is an event, what keeps its place though it is refused, what has no place at all."""

from __future__ import annotations

import math
import struct
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sidecar import wire
from sidecar.errors import MalformedFrameError
from sidecar.events import Heartbeat, LedgerEvent, Refused, Trade
from tests.streams import ledger_fields, pack, trade_fields

I63 = 2**63 - 1
ASSET = 2**31 - 1
TS = 2**62 - 1

# wire.md's tables, written down once more: key, least, most, required, alias. Shares nothing with the decoder.
COMMON = [("session", 0, I63, False, None), ("ts_us", 0, TS, False, None)]
TRADE = [
    ("trade_id", 1, I63, True, None),
    ("match_seq", 0, I63, True, None),
    ("buy_order_id", 0, I63, True, None),
    ("sell_order_id", 0, I63, True, None),
    ("buyer_user_id", 0, I63, True, None),
    ("seller_user_id", 0, I63, True, None),
    ("base_asset", 0, ASSET, True, "base_asset_id"),
    ("quote_asset", 0, ASSET, True, "quote_asset_id"),
    ("price", 0, I63, True, None),
    ("quantity", 0, I63, True, None),
    ("buyer_refund", 0, I63, True, None),
    ("seller_refund", 0, I63, True, None),
    ("settled_at", 0, I63, True, None),
    ("buyer_quote_version", 0, I63, True, None),
    ("buyer_base_version", 0, I63, True, None),
    ("seller_base_version", 0, I63, True, None),
    ("seller_quote_version", 0, I63, True, None),
    ("quote_amount", 0, I63, False, None),
    ("buyer_fee", 0, I63, False, None),
    ("seller_fee", 0, I63, False, None),
    *COMMON,
]
LEDGER = [
    ("user_id", 0, I63, True, None),
    ("asset", 0, ASSET, True, "currency"),
    ("amount", 0, I63, True, None),
    ("related_id", 0, I63, True, None),
    ("created_at", 0, I63, True, None),
    *COMMON,
]
KEYS = [(trade_fields, row) for row in TRADE] + [(ledger_fields, row) for row in LEDGER]
each_key = pytest.mark.parametrize("build, row", KEYS, ids=lambda it: it[0] if isinstance(it, tuple) else it.__name__)
NOT_INTEGERS = [True, False, 1.0, 0.0, math.nan, "1", "", None, b"1", [1], {"a": 1}, msgpack.ExtType(5, b"1"), []]

# Anything a map may hold under a key that nobody knows.
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=8))
    | st.builds(msgpack.Timestamp, st.integers(0, 2**40), st.integers(0, 999_999_999))
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


def refused(fields: Any, code: str = "BAD_FIELD") -> Refused:
    payload = fields if isinstance(fields, bytes) else pack(fields)
    event = wire.decode(payload)
    assert isinstance(event, Refused), event
    assert (event.code, event.payload) == (code, payload)
    return event


def pairs(*pieces: tuple[bytes, bytes]) -> bytes:
    """A map of packed keys and values, whether or not the package would pack such a map."""
    return b"\xde" + struct.pack(">H", len(pieces)) + b"".join(key + value for key, value in pieces)


def with_pair(fields: dict[str, Any], key: bytes, value: bytes) -> bytes:
    return pairs(*((pack(name), pack(it)) for name, it in fields.items()), (key, value))


# --- every key, at its ends, beyond them, and with something else in its place ---


@each_key
def test_both_ends_of_a_range_are_taken(build: Any, row: Any) -> None:
    key, low, high, _, _ = row
    for value in (low, high):
        event = wire.decode(pack(build(**{key: value})))
        assert isinstance(event, Trade | LedgerEvent)
        assert getattr(event, key) == value


@each_key
def test_a_value_beyond_its_range_is_refused_by_name_and_value(build: Any, row: Any) -> None:
    key, low, high, _, _ = row
    for value in (low - 1, high + 1):
        reason = refused(build(**{key: value})).reason
        assert reason.startswith(f"{key}={value};")
        assert str(low) in reason
        assert str(high) in reason


@each_key
@pytest.mark.parametrize("value", NOT_INTEGERS, ids=repr)
def test_what_is_no_integer_is_refused_by_name_and_value(build: Any, row: Any, value: Any) -> None:
    key = row[0]
    reason = refused(build(**{key: value})).reason
    assert reason.startswith(f"{key}=")
    shown = {"[1]": "(1,)", "[]": "()"}.get(repr(value), repr(value))
    assert shown in reason


@each_key
def test_a_missing_key_is_refused_by_name_when_it_must_be_there(build: Any, row: Any) -> None:
    key, _, _, required, _ = row
    fields = build()
    fields.pop(key, None)
    if key == "trade_id":  # then it isn't known to be a trade
        refused(fields, "UNKNOWN_EVENT")
    elif required:
        assert refused(fields).reason.startswith(f"{key} is missing;")
    else:
        event = wire.decode(pack(fields))
        assert isinstance(event, Trade | LedgerEvent)
        assert getattr(event, key) is None


@pytest.mark.parametrize(
    "build, row",
    [(build, row) for build, row in KEYS if row[4]],
    ids=lambda it: str(it[4]) if type(it) is tuple else "",
)
def test_an_alias_is_its_key_but_not_beside_it(build: Any, row: Any) -> None:
    key, low, high, _, alias = row
    fields = build()
    value = fields.pop(key)
    event = wire.decode(pack(fields | {alias: value}))
    assert getattr(event, key) == value
    for beyond in (low - 1, high + 1, True, None, "2"):
        assert refused(fields | {alias: beyond}).reason.startswith(f"{alias}={beyond!r};")
    for both in (fields | {key: value, alias: value}, fields | {alias: 9, key: 8, "ts_us": 1}):
        reason = refused(both).reason
        assert f"{key}={both[key]}" in reason
        assert f"{alias}={both[alias]}" in reason


def test_an_adjustment_may_be_negative_a_deposit_not() -> None:
    for amount in (-I63, -1, 0, I63):
        event = wire.decode(pack(ledger_fields(event_type="ADJUSTMENT", amount=amount)))
        assert isinstance(event, LedgerEvent)
        assert event.amount == amount
    assert "amount=-9223372036854775808" in refused(ledger_fields(event_type="ADJUSTMENT", amount=-I63 - 1)).reason
    assert f"amount={I63 + 1}" in refused(ledger_fields(event_type="ADJUSTMENT", amount=I63 + 1)).reason
    for kind in ("DEPOSIT", "WITHDRAWAL"):
        assert "amount=-1" in refused(ledger_fields(event_type=kind, amount=-1)).reason


@pytest.mark.parametrize("kind", ["deposit", "", "TRADE", None, 1, True, b"DEPOSIT", ["DEPOSIT"], {"a": 1}], ids=repr)
def test_an_unknown_event_type_is_refused_by_its_value(kind: Any) -> None:
    assert refused(ledger_fields(event_type=kind)).reason.startswith("event_type=")


def test_an_event_is_either_a_trade_or_a_ledger_event() -> None:
    assert "neither" in refused({"output_sequence": 1}, "UNKNOWN_EVENT").reason
    assert "both" in refused(trade_fields(event_type="DEPOSIT"), "UNKNOWN_EVENT").reason
    assert "both" in refused(trade_fields(event_type=None), "UNKNOWN_EVENT").reason
    for dashes in range(2_600, 3_600, 100):  # however near it is to what the decoder would take for a trade's
        assert "both" in refused(trade_fields(event_type="-" * dashes), "UNKNOWN_EVENT").reason


def test_what_is_refused_keeps_a_usable_session_and_its_place() -> None:
    assert refused(trade_fields(9, price=-1, session=4))[:2] == (9, "BAD_FIELD")
    assert refused(trade_fields(9, price=-1, session=4)).session == 4
    assert refused(trade_fields(9, session=-1)).session is None
    assert refused(trade_fields(9, session="4")).session is None
    assert refused({"output_sequence": 9, "session": 4}, "UNKNOWN_EVENT").session == 4


# --- size ---


def padded(fields: dict[str, Any], size_bytes: int) -> bytes:
    empty = len(pack(fields | {"pad": b"\0" * 4_000}))
    payload = pack(fields | {"pad": b"\0" * (4_000 + size_bytes - empty)})
    assert len(payload) == size_bytes
    return payload


@pytest.mark.parametrize("build", [trade_fields, ledger_fields])
def test_a_payload_of_4096_bytes_is_taken_one_of_4097_refused_with_its_size(build: Any) -> None:
    assert isinstance(wire.decode(padded(build(3), 4_096)), Trade | LedgerEvent)
    event = refused(padded(build(3, session=8), 4_097), "TOO_LARGE")
    assert (event.output_sequence, event.session) == (3, 8)
    assert "4097" in event.reason


def test_too_large_comes_before_every_other_verdict() -> None:
    refused(padded({"output_sequence": 1}, 4_097), "TOO_LARGE")
    refused(padded(trade_fields(price=-1), 4_097), "TOO_LARGE")


# --- no place in the sequence ---


@pytest.mark.parametrize("value", [0, -1, I63 + 1, 2**64 - 1, *NOT_INTEGERS], ids=repr)
def test_an_unusable_sequence_is_malformed_and_named(value: Any) -> None:
    with pytest.raises(MalformedFrameError, match="output_sequence="):
        wire.decode(pack(trade_fields() | {"output_sequence": value}))
    with pytest.raises(MalformedFrameError, match="output_sequence="):  # it is no heartbeat either
        wire.decode(pack({"output_sequence": value, "next_sequence": 5}))


@pytest.mark.parametrize("value", [1, I63])
def test_a_sequence_may_stand_at_both_ends(value: int) -> None:
    event = wire.decode(pack(trade_fields(value)))
    assert isinstance(event, Trade)
    assert event.output_sequence == value


@pytest.mark.parametrize("value", [None, 1, "map", b"map", [], [["output_sequence", 1]], 1.5, True], ids=repr)
def test_what_is_no_map_is_malformed(value: Any) -> None:
    with pytest.raises(MalformedFrameError, match="map"):
        wire.decode(pack(value))


@pytest.mark.parametrize(
    "fields", [trade_fields(), ledger_fields(), {"next_sequence": 7}], ids=["trade", "ledger", "hb"]
)
def test_a_frame_cut_at_any_byte_is_malformed_and_so_is_one_with_bytes_after_it(fields: dict[str, Any]) -> None:
    payload = pack(fields)
    wire.decode(payload)
    for end in range(len(payload)):
        with pytest.raises(MalformedFrameError):
            wire.decode(payload[:end])
    for trailing in (b"\0", b"\xc0", b"\xc1", payload):
        with pytest.raises(MalformedFrameError):
            wire.decode(payload + trailing)
    odd = with_pair(fields, pack({}), pack(1))  # these go another way through the decoder
    wire.decode(odd)
    for end in range(len(odd)):
        with pytest.raises(MalformedFrameError):
            wire.decode(odd[:end])
    with pytest.raises(MalformedFrameError):
        wire.decode(odd + b"\0")


# --- heartbeats ---


def test_a_heartbeat_says_what_is_next() -> None:
    assert wire.decode(pack({"next_sequence": 1})) == Heartbeat(1, None, None)
    assert wire.decode(pack({"next_sequence": I63, "session": 0, "ts_us": TS})) == Heartbeat(I63, 0, TS)
    assert wire.decode(pack({"next_sequence": 4, "session": -1, "ts_us": True, "x": []})) == Heartbeat(4, None, None)


@pytest.mark.parametrize("value", [0, -1, I63 + 1, *NOT_INTEGERS], ids=repr)
def test_a_heartbeat_without_a_usable_next_sequence_is_malformed(value: Any) -> None:
    with pytest.raises(MalformedFrameError):
        wire.decode(pack({"next_sequence": value}))


def test_an_event_that_also_says_what_is_next_is_an_event() -> None:
    assert isinstance(wire.decode(pack(trade_fields(next_sequence=9))), Trade)


# --- keys nobody knows ---

STRANGE = {
    "a number": (pack(7), pack(1)),
    "nil": (pack(None), pack(1)),
    "a bool": (pack(True), pack(1)),
    "a float": (pack(1.5), pack(1)),
    "bytes that look like a key": (pack(b"price"), pack("x")),
    "an array": (pack([1, [2]]), pack(1)),
    "an array with a map": (pack([{}]), pack(1)),
    "a map": (pack({"a": 1}), pack(1)),
    "a map as a key further in": (pack("x"), b"\x81\x80\x01"),
    "no UTF-8": (b"\xa2\xff\xfe", pack(1)),
    "no UTF-8 as a value": (pack("x"), b"\xa2\xff\xfe"),
    "half a surrogate": (b"\xa3\xed\xa0\x80", pack(1)),
    "ext": (pack("x"), pack(msgpack.ExtType(42, b"..."))),
    "ext as a key": (pack(msgpack.ExtType(42, b"...")), pack(1)),
    "a timestamp": (pack("x"), pack(msgpack.Timestamp(1, 5))),
    "a timestamp of no known length": (pack("x"), b"\xd4\xff\x00"),
    "a timestamp out of range": (pack("x"), b"\xd7\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
    "an empty timestamp": (pack("x"), b"\xc7\x00\xff"),
    "nested 500 deep": (pack("x"), b"\x91" * 500 + b"\xc0"),
    "a wide array": (pack("x"), pack([0] * 2_000)),
    "a long string": (pack("x"), pack("é" * 1_500)),
}


@pytest.mark.parametrize("build", [trade_fields, ledger_fields])
@pytest.mark.parametrize("name", STRANGE)
def test_an_unknown_key_spoils_nothing_whatever_it_is(build: Any, name: str) -> None:
    plain = wire.decode(pack(build(4, ts_us=3)))
    payload = with_pair(build(4, ts_us=3), *STRANGE[name])
    event = wire.decode(payload)
    assert isinstance(event, Trade | LedgerEvent)
    assert isinstance(plain, Trade | LedgerEvent)
    assert event._replace(payload=b"") == plain._replace(payload=b"")
    assert event.payload == payload
    assert wire.same(payload, plain.payload)


@pytest.mark.parametrize("name", STRANGE)
def test_a_known_key_with_a_strange_value_is_refused_not_malformed(name: str) -> None:
    fields = trade_fields(4)
    del fields["price"]
    key, value = STRANGE[name]
    if key == pack("x"):
        assert refused(with_pair(fields, pack("price"), value)).reason.startswith("price=")


@pytest.mark.parametrize("key", [*trade_fields()])
def test_bytes_are_no_key(key: str) -> None:
    fields = trade_fields(4)
    value = fields.pop(key)
    payload = with_pair(fields, pack(key.encode()), pack(value))
    if key == "output_sequence":
        with pytest.raises(MalformedFrameError):
            wire.decode(payload)
    elif key == "trade_id":
        refused(payload, "UNKNOWN_EVENT")
    else:
        assert refused(payload).reason.startswith(f"{key} is missing;")


@pytest.mark.parametrize("first, last", [(5, 6), (-1, 6), ("x", 6), (None, 6)])
def test_of_a_key_that_is_there_twice_the_last_one_counts(first: Any, last: int) -> None:
    fields = trade_fields(4)
    del fields["price"]
    event = wire.decode(
        pairs(
            (pack("price"), pack(first)), *((pack(k), pack(v)) for k, v in fields.items()), (pack("price"), pack(last))
        )
    )
    assert isinstance(event, Trade)
    assert event.price == last
    refused(
        pairs(
            (pack("price"), pack(last)), *((pack(k), pack(v)) for k, v in fields.items()), (pack("price"), pack(True))
        )
    )


@given(values, st.integers(0, 100))
def test_any_unknown_value_is_ignored(value: Any, sequence: int) -> None:
    payload = pack(trade_fields(sequence + 1, unknown=value))
    event = wire.decode(payload)
    assert isinstance(event, Trade) or (isinstance(event, Refused) and event.code == "TOO_LARGE")


# --- bounds against hostile bytes ---


@pytest.mark.parametrize(
    "payload",
    [
        b"\x91" * 100_000 + b"\xc0",
        b"\x81\xa1x" + b"\x91" * 100_000 + b"\xc0",
        b"\x81\x91" * 50_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x81\xa1x\xdd\xff\xff\xff\xff",
        b"\x81\xa1x\xc9\xff\xff\xff\xff\x05",
    ],
    ids=lambda payload: payload[:6].hex(),
)
def test_headers_that_promise_more_than_there_is_are_malformed_at_once(payload: bytes) -> None:
    with pytest.raises(MalformedFrameError) as raised:
        wire.decode(payload)
    assert len(str(raised.value)) < 500


def test_reasons_are_short_whatever_is_in_the_field_and_the_same_each_time() -> None:
    huge: list[Any] = ["x" * 3_000, b"\xff" * 3_000, [list(range(300))] * 3, {str(n): n for n in range(300)}]
    for value in huge:
        first = refused(trade_fields(price=value)).reason
        assert first == refused(trade_fields(price=value)).reason
        assert len(first) < 600
        first.encode()  # it goes into a text column


@given(st.binary(max_size=300))
@example(b"")
@example(b"\xc1")
@example(b"\x80")
def test_arbitrary_bytes_raise_nothing_but_the_malformed_error(payload: bytes) -> None:
    try:
        event = wire.decode(payload)
    except MalformedFrameError:
        return
    assert isinstance(event, Trade | LedgerEvent | Refused | Heartbeat)


@given(st.data(), st.sampled_from([trade_fields, ledger_fields]))
def test_a_frame_with_bytes_changed_raises_nothing_but_the_malformed_error(data: st.DataObject, build: Any) -> None:
    payload = bytearray(pack(build(5, ts_us=1)))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        event = wire.decode(bytes(payload))
    except MalformedFrameError:
        return
    assert not isinstance(event, Refused) or (event.reason and 0 < event.output_sequence <= I63)


@given(st.data(), st.sampled_from([*TRADE, ("event_type", 0, 9, False, "base_asset_id")]))
def test_both_ways_through_the_decoder_give_the_same(data: st.DataObject, row: Any) -> None:
    """The one pass in C judges as the look at each key does."""
    odd = st.sampled_from([0, -1, 1, ASSET, ASSET + 1, TS, TS + 1, I63, I63 + 1, 2**64 - 1, -(2**63)]) | scalars
    fields = trade_fields(data.draw(st.sampled_from([0, 1, I63, I63 + 1, -1])))
    for key in data.draw(st.sampled_from([[row[0]], [row[4] or row[0]], [row[0], row[4] or "ts_us"], []])):
        fields[key] = data.draw(odd)
    payload = bytearray(pack(dict(data.draw(st.permutations(list(fields.items()))))))
    if data.draw(st.booleans()):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))

    def outcome() -> Any:
        try:
            return type(event := wire.decode(bytes(payload))), event
        except MalformedFrameError as malformed:
            return str(malformed)

    quick = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "_sound_trade", lambda _: msgspec.msgpack.decode(b""))
        assert quick == outcome()


# --- round trips ---


@st.composite
def frames(draw: st.DrawFn) -> dict[str, Any]:
    table, build = draw(st.sampled_from([(TRADE, trade_fields), (LEDGER, ledger_fields)]))
    fields: dict[str, Any] = {"output_sequence": draw(st.integers(1, I63))}
    if build is ledger_fields:
        fields["event_type"] = draw(st.sampled_from(["DEPOSIT", "WITHDRAWAL", "ADJUSTMENT"]))
    for key, low, high, required, alias in table:
        if required or draw(st.booleans()):
            least = -high if key == "amount" and fields["event_type"] == "ADJUSTMENT" else low
            name = alias if alias and draw(st.booleans()) else key
            fields[name] = draw(st.integers(least, high) | st.sampled_from([least, high]))
    for key in draw(st.lists(st.text(max_size=4), max_size=2)):
        fields.setdefault(key, draw(scalars))
    return dict(draw(st.permutations(list(fields.items()))))


@given(frames())
def test_every_valid_event_survives_the_round_trip_through_the_standard_package(fields: dict[str, Any]) -> None:
    payload = pack(fields)
    event = wire.decode(payload)
    assert isinstance(event, Trade | LedgerEvent), event
    aliases = {"base_asset": "base_asset_id", "quote_asset": "quote_asset_id", "asset": "currency"}
    for key, value in event._asdict().items():
        if key != "payload":
            assert value == fields.get(key, fields.get(aliases.get(key, key)))
            assert value is None or type(value) in {int, str}
    assert event.payload == payload


@given(frames())
def test_encode_is_what_the_standard_package_reads(fields: dict[str, Any]) -> None:
    assert msgpack.unpackb(wire.encode(fields), strict_map_key=False, timestamp=0) == msgpack.unpackb(
        pack(fields), strict_map_key=False, timestamp=0
    ) or any(isinstance(value, float) and math.isnan(value) for value in fields.values())


# --- the same event, or another ---


@given(frames(), st.randoms())
def test_the_order_of_keys_unknown_keys_and_wide_integers_make_no_other_event(fields: dict[str, Any], rng: Any) -> None:
    shuffled = list(fields.items())
    rng.shuffle(shuffled)
    assert wire.same(pack(fields), pack(dict(shuffled)))
    assert wire.same(pack(fields), pack(fields | {"unknown to all": {"a": [1]}}))
    wide = pairs(
        *(
            (pack(key), b"\xcf" + struct.pack(">Q", value) if type(value) is int and value >= 0 else pack(value))
            for key, value in fields.items()
        )
    )
    assert wire.same(pack(fields), wide)


@given(frames(), st.data())
def test_another_value_another_type_or_a_key_more_or_less_make_another_event(
    fields: dict[str, Any], data: st.DataObject
) -> None:
    known = [key for key in fields if type(fields[key]) is int and key in wire._KNOWN]
    key = data.draw(st.sampled_from(known))
    changed: list[Any] = [fields[key] + 1 if fields[key] < I63 else 0, float(fields[key]), str(fields[key]), None, [1]]
    for value in changed:
        assert not wire.same(pack(fields), pack(fields | {key: value}))
    assert not wire.same(pack(fields), pack({name: value for name, value in fields.items() if name != key}))


def test_types_count_where_python_calls_values_equal() -> None:
    assert not wire.same(pack(trade_fields(price=1)), pack(trade_fields(price=True)))
    assert not wire.same(pack(trade_fields(price=1)), pack(trade_fields(price=1.0)))
    assert not wire.same(pack(trade_fields(price=[1])), pack(trade_fields(price=[True])))
    assert not wire.same(pack(trade_fields(price="1")), pack(trade_fields(price=b"1")))
    assert not wire.same(pack(trade_fields(price=0.0)), pack(trade_fields(price=-0.0)))


def test_a_field_that_is_not_a_number_is_the_same_when_it_is_not_a_number_again() -> None:
    one = pack(trade_fields(price=math.nan))
    assert wire.same(one, pack(trade_fields(price=math.nan, unknown=1)))


def test_deep_nesting_in_a_known_key_is_compared_without_exhausting_the_stack() -> None:
    deep = with_pair({"output_sequence": 1, "trade_id": 2}, pack("price"), b"\x91" * 1_000 + b"\xc0")
    other = with_pair({"trade_id": 2, "output_sequence": 1}, pack("price"), b"\x91" * 1_000 + b"\xc0")
    assert wire.same(deep, other)
    assert not wire.same(deep, with_pair({"output_sequence": 1, "trade_id": 2}, pack("price"), b"\x91" * 999 + b"\xc0"))


def test_bytes_that_are_no_map_are_the_same_as_themselves_only() -> None:
    assert wire.same(b"\xc1", b"\xc1")
    assert not wire.same(b"", pack(trade_fields()))
    assert not wire.same(pack(trade_fields()), b"\xc1")
