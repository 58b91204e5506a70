"""cassandra-driver and scylla-driver install one package and differ in what they hand around: each is met as it is."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.store.cassandra import _EncodedBatch, _Wire

VOID = b"\x00\x00\x00\x01"
RESULT, WARNING = 0x08, 0x08


class Handler:
    """The driver's own encoder and decoder, which says what it was given."""

    def encode_message(self, *given: Any, **named: Any) -> Any:
        return given, named

    def decode_message(self, *given: Any) -> Any:
        return given


@pytest.mark.parametrize("before", [(4, "types", 7), (4, "features", "types", 7)], ids=["cassandra", "scylla"])
def test_answers_are_decoded_whatever_a_driver_says_before_the_flags(before: tuple[Any, ...]) -> None:
    wire = _Wire()
    wire._handler = Handler()
    assert wire.decode_message(*before, 0, RESULT, b"body", None, "meta") == (*before, 0, RESULT, b"body", None, "meta")
    assert wire.decode_message(*before, 0, RESULT, VOID, None, None) is wire._void
    warned = b"\x00\x01\x00\x05large" + VOID
    assert wire.decode_message(*before, WARNING, RESULT, warned, None, None) is wire._void
    assert wire.warnings_total == 1


@pytest.mark.parametrize(
    "named", [{"compressor": None}, {"compressor": None, "protocol_features": "f"}], ids=["cassandra", "scylla"]
)
def test_requests_are_encoded_whatever_a_driver_says_besides(named: dict[str, Any]) -> None:
    wire = _Wire()
    wire._handler = Handler()
    said: Any = wire.encode_message("message", 7, 4, **named)
    assert said == (("message", 7, 4), named)
    encoded = wire.encode_message(_EncodedBatch(b"rows"), 7, 4, **named)
    assert encoded == b"\x04\x00\x00\x07\x0d\x00\x00\x00\x04rows"
