"""One of three database nodes is killed, cut, paused under load (RF = 3, LOCAL_QUORUM): settlement goes on without it,
`durable` waits for it, and when it is back nothing is lost and nothing there twice."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.world import ENVIRONMENT, World, until
from tests.cassandra_node import Node
from tests.fault.kit import Fault, closes_load, under_load

pytestmark = [pytest.mark.cassandra, pytest.mark.long, pytest.mark.timeout(600)]

NODES = 3
RATE = 300  # three nodes share the machine
DURABLE_AFTER_S = 2
ON_S = 3 * DURABLE_AFTER_S  # were it not frozen, `durable` would have moved while so much is settled
REQUEST = "store.cassandra.request_timeout_s=2"  # of settling alone: tables may take longer
AWAY_S = 90.0  # until the others have called a dead node down: 20 s on an idle machine


@pytest.fixture(scope="module")
def cluster() -> Iterator[Node]:
    with Node(nodes=NODES) as cluster:
        yield cluster


@pytest.fixture(params=["logged"])
def world(request: pytest.FixtureRequest, tmp_path: Path, cluster: Node) -> Iterator[World]:
    keyspace = f"t_{secrets.token_hex(6)}"
    store = [
        "store.backend=cassandra",
        f"store.cassandra.contact_points={','.join(cluster.hosts)}",
        f"store.cassandra.port={cluster.port}",
        f"store.cassandra.keyspace={keyspace}",
        f"store.cassandra.replication_factor={NODES}",
        f"store.cassandra.batch={request.param}",
    ]
    settings = [f"pipeline.durable_after_s={DURABLE_AFTER_S}"]
    judged = f"cassandra:{cluster.host}:{cluster.port}/{keyspace}"
    with World(tmp_path, source="generated", settings=settings, store=store, judged=judged) as world:
        world.verb("schema", "apply", status=0)
        yield world


both = pytest.mark.parametrize("world", ["logged", "unlogged"], indirect=True)


def _settles_on(world: World, seconds: float) -> None:
    """Wait until as much is acknowledged as comes in so many seconds."""
    acked = int(world.said()["acked"])
    until(lambda: int(world.said()["acked"]) > acked + RATE * seconds, f"it settles on from {acked}", AWAY_S)


def _is_frozen_without(world: World, cluster: Node, number: int) -> int:
    """Wait until settlement goes on without a node; see that `durable` does not, and that `status` says why."""
    name = f"{cluster.hosts[number - 1]}:{cluster.port}"
    until(lambda: world.said()["nodes_away"] == [name], f"{name} is missed", AWAY_S)
    _settles_on(world, 1)
    durable = int(world.said()["durable"])
    _settles_on(world, ON_S)
    said = world.status()
    assert (said["durable"], said["nodes_away"], said["state"]) == (durable, [name], "running")
    command = [sys.executable, "-m", "sidecar", "status", *world.config()]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT).stdout
    assert f"database nodes AWAY: {name}" in text
    assert "next step: start or mend them" in text
    return durable


def _moves_again(world: World, durable: int) -> None:
    """Wait until all nodes stand and `durable` is beyond where it was frozen."""
    until(lambda: not world.said()["nodes_away"], "all nodes stand", AWAY_S)
    until(lambda: int(world.said()["durable"]) > durable, f"durable moves on from {durable}", AWAY_S)


@both
def test_f37_node_killed_and_back(world: World, fault: Fault, cluster: Node) -> None:
    """SIGKILL of one node under load, with LOGGED batches and with UNLOGGED ones; it is started again."""
    run, engine = under_load(world, REQUEST, rate=RATE)
    cluster.kill(3)
    fault.strike()
    durable = _is_frozen_without(world, cluster, 3)
    fault.heals(world)
    cluster.start(3)
    _moves_again(world, durable)
    assert run.logged("start_over"), "memory is not trusted after an outage"
    closes_load(world, fault, run, engine, AWAY_S)


def test_f37_node_back_with_a_cut_commit_log(world: World, fault: Fault, cluster: Node) -> None:
    """SIGKILL of one node, which has lost its last two thousand writes when it is back at once."""
    run, engine = under_load(world, REQUEST, rate=RATE)
    (lost,) = cluster.kill(2, cut_commitlog=2_000)
    print(f"lost with the commit log: {lost}")
    assert lost.mutations > 500
    fault.strike()
    fault.heals(world)
    cluster.start(2)
    closes_load(world, fault, run, engine, AWAY_S)
    assert run.logged("start_over"), "memory is not trusted after an outage"


def test_f37_node_paused_and_resumed(world: World, fault: Fault, cluster: Node) -> None:
    """SIGSTOP of one node under load, until the driver has given it up; SIGCONT."""
    run, engine = under_load(world, REQUEST, rate=RATE)
    cluster.pause(2)
    fault.strike()
    durable = _is_frozen_without(world, cluster, 2)
    fault.heals(world)
    cluster.resume(2)
    _moves_again(world, durable)
    closes_load(world, fault, run, engine, AWAY_S)


def test_f37_what_only_one_node_still_has(world: World, fault: Fault, cluster: Node) -> None:
    """One node is paused, so that two have what is acknowledged; then one of these is killed and loses it. What the
    third alone still has is there without it in the end."""
    for number in range(1, NODES + 1):
        cluster.nodetool("disablehandoff", number=number)  # nobody brings the paused one what it missed
    try:
        run, engine = under_load(world, REQUEST, rate=RATE)
        _settles_on(world, 1)
        cluster.pause(1)
        fault.strike()
        until(lambda: world.said()["nodes_away"], "it is missed", AWAY_S)
        _settles_on(world, 3)
        cluster.resume(1)
        (lost,) = cluster.kill(2, cut_commitlog=3_000)
        print(f"lost with the commit log: {lost}")
        fault.strike()
        fault.heals(world)
        cluster.start(2)
        fault.recovers(world, timeout_s=AWAY_S)
        durable = int(world.said()["durable"])
        _moves_again(world, durable)
        engine.signal(signal.SIGTERM)
        last = engine.result()["last_sequence"]
        world.until_acked(last, AWAY_S)
        assert run.term() == 0
        cluster.stop(3)  # not a kill: the others know at once, and answer
        fault.closes(world, last, timeout_s=AWAY_S)  # by a quorum of the two others
    finally:
        cluster.start()
        for number in range(1, NODES + 1):
            cluster.nodetool("enablehandoff", number=number)
