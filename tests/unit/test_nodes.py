"""What counts as an outage, with a cluster of words: nodes that go, come, keep silent, or are new."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from cassandra import OperationTimedOut
from cassandra.policies import HostDistance

from sidecar.errors import OutcomeUnknownError
from sidecar.store.connection import ask, give_up
from sidecar.store.nodes import Answering, Nodes
from tests.waiting import until


class Host:
    def __init__(self, name: str, distance: int) -> None:
        self.name = self.endpoint = name
        self.distance = distance
        self.is_up = True
        self.is_reconnecting = False

    def is_currently_reconnecting(self) -> bool:
        return self.is_reconnecting


class Cluster:
    """Nodes by name, each with a connection and a generation; `silent` ones don't answer."""

    def __init__(self, *names: str) -> None:
        self.hosts: dict[str, Host] = {}
        self.pools: dict[str, Any] = {}
        self.generations: dict[str, int] = {}
        self.silent: set[str] = set()
        self.revived: list[str] = []
        self.metadata = SimpleNamespace(all_hosts=lambda: list(self.hosts.values()))
        self.profile_manager = SimpleNamespace(distance=lambda host: host.distance)
        for name in names:
            self.add(name)

    def add(self, name: str, distance: int = HostDistance.LOCAL) -> None:
        self.hosts[name] = Host(name, distance)
        self.generations[name] = 100
        self.connect(name)

    def connect(self, name: str) -> None:
        connection = SimpleNamespace(is_closed=False, is_defunct=False)
        self.pools[name] = SimpleNamespace(
            host=self.hosts[name], open_count=1, get_connections=lambda: [connection], connection=connection
        )

    def lose(self, name: str) -> None:
        self.pools[name].connection.is_closed = True
        self.pools[name].open_count = 0

    def get_pools(self) -> list[Any]:
        return list(self.pools.values())

    def update_created_pools(self) -> None:
        self.revived.append("pools")

    def on_up(self, host: Any) -> None:
        self.revived.append(host.name)

    def register_listener(self, listener: Any) -> None:
        self.listener = listener

    def unregister_listener(self, _listener: Any) -> None: ...


class Watched:
    def __init__(self, cluster: Cluster) -> None:
        self.outages = 0

        def count() -> None:
            self.outages += 1

        async def ask(host: Any, _timeout_s: float) -> list[tuple[Any, ...]]:
            if host.name in cluster.silent:
                raise OutcomeUnknownError("silent")
            return [(cluster.generations[host.name],)]

        async def in_thread(work: Any) -> Any:
            return work()

        self.avoided: Collection[Any] = ()
        self.given_up: list[Any] = []

        def avoid(hosts: Collection[Any]) -> None:
            self.avoided = [host.name for host in hosts]

        self.nodes = Nodes(
            cluster=cluster, session=cluster, ask=ask, in_thread=in_thread, count=count, avoid=avoid,
            give_up=self.given_up.append,
        )  # fmt: skip

    async def look(self) -> tuple[int, bool]:
        """Look once; give the outages so far, and whether all stand."""
        await self.nodes.look()
        return self.outages, self.nodes.steady_since is not None


def test_a_first_connect_is_no_outage() -> None:
    async def ask() -> None:
        cluster = Cluster("a", "b", "c")
        watched = Watched(cluster)
        assert watched.nodes.steady_since is None
        assert await watched.look() == (0, True)
        since = watched.nodes.steady_since
        assert await watched.look() == (0, True)
        assert watched.nodes.steady_since == since

    asyncio.run(ask())


def test_away_freezes_and_back_counts() -> None:
    async def ask() -> None:
        cluster = Cluster("a", "b", "c")
        watched = Watched(cluster)
        await watched.look()
        since = watched.nodes.steady_since
        cluster.lose("b")
        assert await watched.look() == (0, False)
        assert await watched.look() == (0, False)
        assert watched.nodes.away == ["b"]
        cluster.connect("b")
        assert await watched.look() == (1, True)
        assert watched.nodes.away == []
        assert (watched.nodes.steady_since or 0) > (since or 0)
        assert await watched.look() == (1, True)

    asyncio.run(ask())


def test_a_restart_between_two_looks_counts() -> None:
    async def ask() -> None:
        cluster = Cluster("a", "b")
        watched = Watched(cluster)
        await watched.look()
        cluster.connect("b")  # another connection, and nobody saw the old one close
        assert await watched.look() == (1, True)
        cluster.generations["a"] += 1  # not even the connection changed
        assert await watched.look() == (2, True)

    asyncio.run(ask())


def test_silence_freezes_and_does_not_count_when_the_node_is_the_same() -> None:
    async def ask() -> None:
        cluster = Cluster("a", "b")
        watched = Watched(cluster)
        await watched.look()
        cluster.silent = {"a"}
        assert await watched.look() == (0, False)
        cluster.silent = set()
        assert await watched.look() == (0, True)
        cluster.silent = {"a"}
        await watched.look()
        cluster.silent = set()
        cluster.generations["a"] += 1
        assert await watched.look() == (1, True)

    asyncio.run(ask())


def test_a_silent_node_is_avoided_until_it_answers_and_what_it_was_asked_is_given_up_once() -> None:
    async def ask() -> None:
        cluster = Cluster("a", "b")
        watched = Watched(cluster)
        await watched.look()
        assert (watched.avoided, watched.given_up) == ([], [])
        cluster.silent = {"a"}
        for _ in range(3):
            await watched.look()
            assert (watched.avoided, watched.given_up) == (["a"], [cluster.pools["a"].connection])
        cluster.silent = set()
        await watched.look()
        assert (watched.avoided, len(watched.given_up)) == ([], 1)

    asyncio.run(ask())


def test_silent_nodes_come_last_in_the_plan_and_are_in_it() -> None:
    class Plan:
        def make_query_plan(self, _keyspace: Any, _query: Any) -> Iterator[str]:
            return iter(["a", "b", "c"])

    policy = Answering(Plan())
    assert list(policy.make_query_plan()) == ["a", "b", "c"]
    policy.silent = {"a"}
    assert list(policy.make_query_plan()) == ["b", "c", "a"]
    policy.silent = {"a", "b", "c"}
    assert list(policy.make_query_plan()) == ["a", "b", "c"]


def test_a_request_that_is_given_up_ends_once_and_its_stream_stays_taken_until_the_late_answer() -> None:
    async def story() -> None:
        connection = SimpleNamespace(
            _requests={}, lock=threading.Lock(), orphaned_request_ids=set(), orphaned_threshold=99, endpoint="a"
        )
        returned: list[bool] = []
        pool = SimpleNamespace(
            is_shutdown=False,
            borrow_connection=lambda timeout: (connection, 7),
            return_connection=lambda _, stream_was_orphaned=False: returned.append(stream_was_orphaned),
        )

        def send_msg(_message: Any, stream: int, cb: Any, **_: Any) -> None:
            connection._requests[stream] = (cb, None, None)

        connection.send_msg = send_msg
        plan = SimpleNamespace(load_balancing_policy=SimpleNamespace(make_query_plan=lambda *_: iter(["a"])))
        cluster = SimpleNamespace(profile_manager=SimpleNamespace(default=plan))
        session = SimpleNamespace(cluster=cluster, _pools={"a": pool})
        handler = SimpleNamespace(encode_message=None, decode_message=None)
        asked = asyncio.ensure_future(ask(session, None, handler, 0.05))
        await asyncio.sleep(0)
        connection._requests[8] = (lambda _: None, None, None)  # the driver's own
        give_up(connection)
        with pytest.raises(OperationTimedOut):
            await asked
        assert (connection.orphaned_request_ids, returned, list(connection._requests)) == ({7}, [True], [8])
        connection._requests[7] = ("another request", None, None)  # the late answer came, the stream was free again
        await asyncio.sleep(0.1)
        assert 7 in connection._requests

    asyncio.run(story())


def test_a_node_away_at_the_first_connect_counts_when_it_comes() -> None:
    async def ask() -> None:
        cluster = Cluster("a", "b")
        cluster.lose("b")
        watched = Watched(cluster)
        assert await watched.look() == (0, False)
        cluster.connect("b")
        assert await watched.look() == (1, True)

    asyncio.run(ask())


def test_new_nodes_and_nodes_gone_count_those_elsewhere_do_not() -> None:
    async def ask() -> None:
        cluster = Cluster("a")
        cluster.add("far", HostDistance.REMOTE)
        cluster.lose("far")
        watched = Watched(cluster)
        assert await watched.look() == (0, True)
        cluster.add("b")
        assert await watched.look() == (1, True)
        del cluster.hosts["b"], cluster.pools["b"]
        assert await watched.look() == (2, True)
        cluster.connect("far")
        assert await watched.look() == (2, True)

    asyncio.run(ask())


def test_a_connection_that_closes_unsettles_at_once() -> None:
    async def ask() -> None:
        cluster = Cluster("a")
        watched = Watched(cluster)
        await watched.look()
        cluster.listener.on_down(cluster.hosts["a"])  # from a thread of the driver's
        await asyncio.sleep(0)
        assert watched.nodes.steady_since is None
        assert await watched.look() == (0, True)
        watched.nodes.close()
        cluster.listener.on_down(cluster.hosts["a"])  # closed by us
        await asyncio.sleep(0)
        assert watched.nodes.steady_since is not None

    asyncio.run(ask())


def test_where_the_driver_gave_up_it_is_told_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.store.nodes.REVIVE_AFTER_S", 0.0)

    async def ask() -> None:
        cluster = Cluster("a", "b")
        watched = Watched(cluster)
        await watched.look()
        cluster.lose("b")
        await watched.look()
        cluster.hosts["b"].is_up = False
        await watched.look()
        await until(lambda: cluster.revived == ["pools", "b"])
        cluster.hosts["b"].is_reconnecting = True
        await watched.look()
        await asyncio.sleep(0.01)
        assert len(cluster.revived) == 2

    asyncio.run(ask())
