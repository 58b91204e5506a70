"""Watches the nodes of the local datacenter: do all stand, since when, and did one come back that was away?

A node that comes back may have lost the acknowledged writes of its last seconds (periodic commit-log sync), so memory
built before is not to be trusted. Everything that can tell is asked, because the driver alone may miss a quick restart:
- the connection: it can't outlive its node's process. Each close of one is reported by the connection itself, at once;
  and each look compares the object that serves a node with the one of the look before.
- the driver's word that a node is up, down, new or gone.
- `system.local.gossip_generation`, asked of each node every second: it grows with every start of a node.
A node counts as back when it answers over an open connection. Counting once too often costs a replay from `durable`;
once too rarely would cost rows. Until the first look is done, and when the last one is too old, nothing stands.

A node that falls silent though its connection stands is asked last from then on, and what it was asked is given up, so
that others are asked: the driver would notice ten seconds later, and by then every batch in flight waits for that node.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Final

from cassandra.policies import HostDistance, HostStateListener, TokenAwarePolicy

from sidecar.errors import StoreError, StoreRefusedError

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 1.0
STALE_S: Final = 6.0  # longer than a look takes when one node doesn't answer
ANSWER_S: Final = 2.0
REVIVE_AFTER_S: Final = 5.0

GENERATION: Final = "SELECT gossip_generation FROM system.local WHERE key = 'local'"


class Answering(TokenAwarePolicy):  # type: ignore[misc]
    """The driver's choice of nodes, but those that are `silent` come last."""

    silent: Collection[Any] = ()

    def make_query_plan(self, working_keyspace: Any = None, query: Any = None) -> Iterator[Any]:
        """Give the nodes in the order in which they are asked."""
        plan = super().make_query_plan(working_keyspace, query)
        return iter(sorted(plan, key=self.silent.__contains__)) if self.silent else plan


@dataclass
class _Node:
    """What the last look saw of a node; `generation` is None until it has answered once."""

    connection: Any = None
    generation: int | None = None
    stands: bool = False
    away_since: float = 0.0


class Nodes:
    """The nodes of one session; `outages` goes on counting from one session to the next."""

    def __init__(
        self,
        *,
        cluster: Any,
        session: Any,
        ask: Callable[[Any, float], Awaitable[list[tuple[Any, ...]]]],
        in_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
        count: Callable[[], None],
        avoid: Callable[[Collection[Any]], None],
        give_up: Callable[[Any], None],
    ) -> None:
        """`ask` sends GENERATION to one host, `count` counts an outage.

        `avoid` is told the hosts that don't answer, after each look; `give_up` each connection that fell silent, once.
        """
        self._cluster = cluster
        self._session = session
        self._ask = ask
        self._in_thread = in_thread
        self._count = count
        self._avoid = avoid
        self._give_up = give_up
        self._loop = asyncio.get_running_loop()
        self._nodes: dict[Any, _Node] = {}
        self._first = True
        self._steady_since: float | None = None
        self._looked_at: float | None = None
        self._wake = asyncio.Event()
        self._closing = False
        self._revived_at = 0.0
        self._listener = _Listener(self.suspect_from_thread)
        cluster.register_listener(self._listener)

    @property
    def steady_since(self) -> float | None:
        """The loop's time since when all nodes stand, None while one is away or that is not known."""
        looked_at = self._looked_at
        if looked_at is None or self._loop.time() - looked_at > STALE_S:
            return None
        return self._steady_since

    @property
    def away(self) -> list[str]:
        """Name the nodes that did not answer the last look."""
        return sorted(str(host.endpoint) for host, node in self._nodes.items() if not node.stands)

    def suspect_from_thread(self) -> None:
        """Something happened to a node or a connection: nothing stands before the next look has been."""
        if not self._closing and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._suspect)

    def _suspect(self) -> None:
        self._looked_at = None
        self._wake.set()

    def close(self) -> None:
        """Stop listening: what closes from now on is closed by us."""
        self._closing = True
        self._cluster.unregister_listener(self._listener)

    async def watch(self) -> None:
        """Look every second, and whenever there is reason to, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            await self.look()

    async def look(self) -> None:
        """Look at every node once, and judge."""
        self._wake.clear()
        hosts = [host for host in self._cluster.metadata.all_hosts() if self._is_local(host)]
        seen = await asyncio.gather(*(self._see(host) for host in hosts))
        now = self._loop.time()
        stood = {host for host, node in self._nodes.items() if node.stands}
        counted = sum(self._judge(host, *found, now) for host, found in zip(hosts, seen, strict=True))
        silenced = {host for host in stood if not self._nodes[host].stands}
        gone = self._nodes.keys() - set(hosts)
        for host in gone:
            del self._nodes[host]
        self._first = False
        self._avoid({host for host, node in self._nodes.items() if not node.stands})
        for host in silenced:
            for pool in self._pools(host):
                for connection in pool.get_connections():
                    self._give_up(connection)
        for _ in range(counted + len(gone)):
            self._count()
        if not hosts or not all(node.stands for node in self._nodes.values()):
            self._steady_since = None
        elif counted or gone or self._steady_since is None:
            self._steady_since = now
        if not self._wake.is_set():
            self._looked_at = now
        self._revive(hosts, now)

    def _is_local(self, host: Any) -> bool:
        return bool(self._cluster.profile_manager.distance(host) == HostDistance.LOCAL)

    async def _see(self, host: Any) -> tuple[Any, int | None]:
        """Give the open connection to a node and its generation; (None, None) when it doesn't answer."""
        connection = next((each for pool in self._pools(host) for each in pool.get_connections()), None)
        if connection is None or connection.is_closed or connection.is_defunct:
            return None, None
        try:
            rows = await self._ask(host, ANSWER_S)
        except StoreRefusedError:  # it answers, but this database keeps no such count
            return connection, 0
        except StoreError:
            return None, None
        return connection, int(rows[0][0] or 0) if rows else 0

    def _pools(self, host: Any) -> list[Any]:
        return [pool for pool in tuple(self._session.get_pools()) if pool.host == host]

    def _judge(self, host: Any, connection: Any, generation: int | None, now: float) -> bool:
        """Take down what was seen of a node; say whether it is back from having been away, known or unknown."""
        node = self._nodes.get(host)
        if node is None:
            node = self._nodes[host] = _Node(away_since=now)
            is_back = not self._first and generation is not None  # a node that was not there before
        else:
            same = node.connection is connection and node.generation == generation
            is_back = generation is not None and not same
        if generation is None:
            if node.stands:
                node.stands, node.away_since = False, now
                log.warning("node_away", extra={"node": str(host.endpoint)})
            return False
        if is_back:
            log.warning("node_back", extra={"node": str(host.endpoint), "generation": generation})
        node.stands, node.connection, node.generation = True, connection, generation
        return is_back

    def _revive(self, hosts: list[Any], now: float) -> None:
        """Make the driver try again where it has given up: after a failed authentication it never would.

        A node that has just started refuses everyone while it can't read the roles yet.
        """
        if now - self._revived_at < REVIVE_AFTER_S:
            return
        for host in hosts:
            node = self._nodes[host]
            if node.stands or now - node.away_since < REVIVE_AFTER_S or host.is_currently_reconnecting():
                continue
            if any(pool.open_count for pool in self._pools(host)):
                continue  # connected, but silent
            self._revived_at = now
            work = self._session.update_created_pools if host.is_up else lambda host=host: self._cluster.on_up(host)
            revival = asyncio.ensure_future(self._in_thread(work))
            revival.add_done_callback(lambda done: done.cancelled() or done.exception())


class _Listener(HostStateListener):  # type: ignore[misc]
    """Hears from the driver, on its threads."""

    def __init__(self, suspect: Callable[[], None]) -> None:
        self._suspect = suspect

    def on_up(self, _host: Any) -> None:
        self._suspect()

    on_down = on_add = on_remove = on_up
