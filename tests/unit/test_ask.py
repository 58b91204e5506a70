"""A question and its answer, with stand-ins for hosts: its bytes, its plan, and what a host has forgotten."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Awaitable
from types import SimpleNamespace
from typing import Any

import pytest
from cassandra import ConsistencyLevel, protocol
from cassandra.cluster import NoHostAvailable
from cassandra.cqltypes import Int32Type, LongType, UTF8Type
from cassandra.protocol import ColumnMetadata, PreparedQueryNotFound, PrepareMessage
from cassandra.query import BoundStatement, PreparedStatement

from sidecar.store.cassandra import CassandraStore, _Question, _Wire
from sidecar.store.connection import ask, connection_class

TYPES = {"user_id": LongType, "asset_id": Int32Type, "stream": UTF8Type}
COLUMNS = [ColumnMetadata("trading", "user_balances", name, kind) for name, kind in TYPES.items()]


def prepared(routing: list[int] | None, columns: list[Any] = COLUMNS) -> Any:
    return PreparedStatement(columns, b"0123456789abcdef", routing, "SELECT", None, 4, [], None)


@pytest.mark.parametrize("state", [None, b"where the next page begins"], ids=["first page", "further page"])
@pytest.mark.parametrize("values", [(7, 1, "main"), (-1, None, ""), (2**62, 0, "é" * 300)])
def test_a_question_is_what_the_protocol_says_byte_for_byte(values: tuple[Any, ...], state: bytes | None) -> None:
    bound = BoundStatement(prepared([0])).bind(values)
    sent: list[Any] = []

    class Said(CassandraStore):
        async def _prepared(self, _text: str) -> Any:
            return bound.prepared_statement

        async def _ask(self, message: Any, *_: Any, **__: Any) -> Any:
            sent.append(message)
            return SimpleNamespace(parsed_rows=None, paging_state=None)

    async def story() -> None:
        store = Said(page_widths={})
        levels = {"consistency": ConsistencyLevel.SERIAL, "serial_consistency": ConsistencyLevel.LOCAL_SERIAL}
        question = await store._question("SELECT", values, rows_a_page=77, **levels)
        assert await store._page(question, state) == ([], None)

    asyncio.run(story())
    body = struct.pack(">H16sHBH", 16, bound.prepared_statement.query_id, 8, 0x1D if state else 0x15, 3)
    for value in bound.values:
        body += struct.pack(">i", -1) if value is None else struct.pack(f">i{len(value)}s", len(value), value)
    body += struct.pack(">i", 77) + (struct.pack(f">i{len(state)}s", len(state), state) if state else b"")
    body += struct.pack(">H", 9)
    head = struct.pack(">BBhBi", 4, 0, 300, 0x0A, len(body))  # native_protocol_v4.spec, 4.1.6
    assert _Wire().encode_message(sent[0], 300, 4, compressor=None, allow_beta_protocol_version=False) == head + body


@pytest.mark.parametrize("routing", [[0], [2, 0], None], ids=["one column", "two columns", "none"])
def test_a_question_goes_to_the_nodes_that_the_drivers_own_statement_would(routing: list[int] | None) -> None:
    bound = BoundStatement(prepared(routing)).bind((7, 1, "main"))
    question = _Question(bound.prepared_statement, bound.values)
    assert (question.keyspace, question.routing_key) == (bound.keyspace, bound.routing_key)
    assert _Question(prepared(None, []), []).keyspace is None


class Hosts:
    """Hosts that answer one message after the other, by `answers`, and a session that knows them."""

    def __init__(self, *hosts: str, answers: list[Any], known: dict[bytes, str] | None = None) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.queries: list[Any] = []
        self._answers = answers
        texts = {key: SimpleNamespace(query_string=text) for key, text in (known or {}).items()}
        policy = SimpleNamespace(make_query_plan=self._plan)
        self._hosts = hosts
        manager = SimpleNamespace(default=SimpleNamespace(load_balancing_policy=policy))
        cluster = SimpleNamespace(profile_manager=manager, _prepared_statements=texts)
        self.session = SimpleNamespace(cluster=cluster, _pools={host: self._pool(host) for host in hosts})

    def _plan(self, _keyspace: Any, query: Any) -> Any:
        self.queries.append(query)
        return iter(self._hosts)

    def _pool(self, host: str) -> Any:
        def send_msg(message: Any, _stream: int, cb: Any, **_: Any) -> None:
            self.asked.append((host, getattr(message, "query", message)))
            cb(self._answers.pop(0))

        connection = SimpleNamespace(send_msg=send_msg, _requests={}, endpoint=host)
        return SimpleNamespace(
            is_shutdown=False, borrow_connection=lambda timeout: (connection, 7), return_connection=lambda _: None
        )

    def answer(self, **given: Any) -> Awaitable[Any]:
        handler = SimpleNamespace(encode_message=None, decode_message=None)
        return ask(self.session, "message", handler, 5.0, **given)


def forgotten(statement: bytes) -> PreparedQueryNotFound:
    return PreparedQueryNotFound(0x2500, "forgotten", statement)


def test_what_a_host_has_forgotten_is_prepared_there_and_asked_there_again() -> None:
    async def story() -> None:
        known = {b"1": "SELECT 1", b"2": "SELECT 2"}
        hosts = Hosts("a", "b", answers=[forgotten(b"2"), "prepared", forgotten(b"1"), "prepared", "rows"], known=known)
        assert await hosts.answer(query="query") == "rows"
        assert [text for _, text in hosts.asked] == ["message", "SELECT 2", "message", "SELECT 1", "message"]
        assert {host for host, _ in hosts.asked} == {"a"}
        assert hosts.queries[0] == "query"

    asyncio.run(story())


@pytest.mark.parametrize("known, times", [({}, 1), ({b"1": "SELECT 1"}, 3)], ids=["unknown", "again and again"])
def test_what_can_not_be_prepared_for_good_is_an_error(known: dict[bytes, str], times: int) -> None:
    async def story() -> None:
        answers = [forgotten(b"1"), "prepared", forgotten(b"1"), "prepared", forgotten(b"1")]
        hosts = Hosts("a", answers=answers, known=known)
        with pytest.raises(PreparedQueryNotFound):
            await hosts.answer()
        assert len(hosts.asked) == times

    asyncio.run(story())


def test_a_statement_that_no_longer_prepares_gives_the_hosts_own_error() -> None:
    async def story() -> None:
        refusal = protocol.InvalidRequest(0x2200, "unconfigured table", None)
        hosts = Hosts("a", answers=[forgotten(b"1"), refusal], known={b"1": "SELECT 1"})
        with pytest.raises(protocol.InvalidRequest):
            await hosts.answer()

    asyncio.run(story())


def test_a_host_that_is_named_is_the_only_one_asked() -> None:
    async def story() -> None:
        hosts = Hosts("a", "b", answers=["rows"])
        assert await hosts.answer(host="b") == "rows"
        assert hosts.asked == [("b", "message")]
        hosts.session._pools["b"].is_shutdown = True
        with pytest.raises(NoHostAvailable):
            await hosts.answer(host="b")
        assert len(hosts.asked) == 1
        assert PrepareMessage("SELECT").query == "SELECT"  # by which these hosts know what they are asked to prepare

    asyncio.run(story())


def test_connections_are_of_the_loop_they_are_made_on_and_of_no_other_thread() -> None:
    async def story() -> None:
        made = connection_class(lambda: None)
        assert (made.loop, made.loop_thread) == (asyncio.get_running_loop(), threading.get_ident())
        with pytest.raises(RuntimeError, match="no running event loop"):
            await asyncio.to_thread(connection_class, lambda: None)

    asyncio.run(story())
