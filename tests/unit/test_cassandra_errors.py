"""Every error of the driver is one of three answers: give the same again, halt, or make the batch smaller."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import cassandra
import pytest
from cassandra import cluster, connection, pool, protocol

from sidecar.errors import BatchTooLargeError, OutcomeUnknownError, StoreError, StoreRefusedError
from sidecar.store.cassandra import classified
from sidecar.store.connection import NodeNotTrustedError

if TYPE_CHECKING:
    from collections.abc import Iterable

WRITES = ("SIMPLE", "BATCH", "UNLOGGED_BATCH", "COUNTER", "BATCH_LOG", "CAS", "VIEW", "CDC")


def answer(error_code: int, message: str = "said", info: Any = None) -> BaseException:
    """An error as it comes from the server: some become exceptions of another type."""
    kind = protocol.error_classes.get(error_code, protocol.ErrorMessage)
    error = kind(code=error_code, message=message, info=info or {})
    made: BaseException = error.to_exception()
    return made


def unknown() -> Iterable[BaseException]:
    yield cassandra.OperationTimedOut()
    yield connection.ConnectionShutdown("closed")
    yield connection.ConnectionBusy("busy")
    yield connection.ConnectionException("broken")
    yield pool.NoConnectionsAvailable()
    yield cluster.NoHostAvailable("none", {})
    yield cluster.NoHostAvailable("none", ["127.0.0.1"])
    yield cluster.NoHostAvailable("none", {"127.0.0.1": connection.ConnectionShutdown("closed")})
    yield answer(0x1000, info={"consistency": 6, "required_replicas": 2, "alive_replicas": 1})
    for kind in WRITES:
        yield cassandra.WriteTimeout("slow", write_type=getattr(cassandra.WriteType, kind), received_responses=0)
    yield cassandra.ReadTimeout("slow")
    yield cassandra.WriteFailure("failed")
    yield cassandra.ReadFailure("failed")
    # a server's error, overloaded, bootstrapping, truncating, CDC full, CAS unknown, not prepared
    for code in (0x0000, 0x1001, 0x1002, 0x1003, 0x1600, 0x1700, 0x2500):
        yield answer(code)


def refused() -> Iterable[BaseException]:
    for code in (0x0100, 0x2000, 0x2100, 0x2200, 0x2300):
        yield answer(code)
    yield answer(0x2400, info={"keyspace": "trading", "table": "t"})
    yield cassandra.AuthenticationFailed("wrong")
    yield cassandra.UnsupportedOperation("not here")
    yield cluster.NoHostAvailable("none", {"127.0.0.1": cassandra.AuthenticationFailed("wrong")})
    yield NodeNotTrustedError("another authority")
    yield cluster.NoHostAvailable("none", {"127.0.0.1": NodeNotTrustedError("another authority")})


@pytest.mark.parametrize("error", list(unknown()), ids=repr)
def test_may_have_happened(error: BaseException) -> None:
    names: Counter[str] = Counter()
    assert type(classified(error, names)) is OutcomeUnknownError
    assert not names


@pytest.mark.parametrize("error", list(refused()), ids=repr)
def test_will_never_be_accepted(error: BaseException) -> None:
    names: Counter[str] = Counter()
    assert type(classified(error, names)) is StoreRefusedError
    assert not names


def test_too_large_is_known_by_its_text_alone() -> None:
    assert type(classified(answer(0x2200, "Batch too large"), Counter())) is BatchTooLargeError
    assert type(classified(answer(0x1001, "Batch too large"), Counter())) is OutcomeUnknownError


@pytest.mark.parametrize("text", ["unconfigured table settled_trades_a", "table trading.user_balances does not exist"])
def test_a_missing_table_has_a_next_step(text: str) -> None:
    found = classified(answer(0x2200, text), Counter())
    assert type(found) is StoreRefusedError
    assert "sidecar schema apply" in str(found)


@pytest.mark.parametrize("error", [RuntimeError("?"), AttributeError("in the driver"), answer(0x7777)], ids=repr)
def test_what_nobody_knows_may_have_happened_and_is_counted_by_name(error: BaseException) -> None:
    names: Counter[str] = Counter()
    assert type(classified(error, names)) is OutcomeUnknownError
    assert names == {type(error).__name__: 1}


def test_our_own_stay_what_they_are() -> None:
    own = StoreError("ours")
    assert classified(own, Counter()) is own
