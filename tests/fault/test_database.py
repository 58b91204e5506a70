"""The database is away, silent, killed, not what it was: what was recorded is settled once, as soon as it is back."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.watch import look
from bench.world import World, until
from tests.cassandra_node import Node
from tests.fault.kit import RATE, Fault, closes_load, taped, under_load
from tests.fault.proxy import Proxy
from tests.stores import StoreUnderTest

pytestmark = [pytest.mark.cassandra, pytest.mark.timeout(300)]

SETTINGS = ("pipeline.durable_after_s=1", "store.cassandra.request_timeout_s=2")
RESULT = 0x08  # the opcode of an answer to a statement (native_protocol_v4.spec, section 2.4)


@pytest.fixture(scope="module")
def own_node() -> Iterator[Node]:
    """A node that these tests kill, pause, and cut the commit log of; each has a keyspace of its own.

    Its batch log is replayed at the second look, 20 s after a start: late enough for F28 on any machine.
    """
    with Node(jvm=["-Dcassandra.batchlog.replay_timeout_in_ms=15000"]) as node:
        yield node


@pytest.fixture
def world(tmp_path: Path, own_node: Node) -> Iterator[World]:
    with _world(tmp_path, own_node, own_node.port) as world:
        yield world


def _world(folder: Path, node: Node, port: int, *settings: str) -> World:
    """A world over an empty keyspace of the node, reached at `port`; the judge goes to the node itself."""
    under_test = StoreUnderTest(node)
    through = [f"store.cassandra.port={port}" if ".port=" in each else each for each in under_test.settings]
    world = World(folder, source="generated", settings=[*SETTINGS, *settings], store=through, judged=under_test.judged)
    under_test.prepare(world)
    return world


@pytest.mark.long
def test_f23_database_away_at_start(tmp_path: Path, fault: Fault, own_node: Node) -> None:
    """The sidecar starts while nothing listens where the database should be; recording does not wait for it."""
    with Proxy(own_node.port) as proxy, _world(tmp_path, own_node, proxy.port) as world:
        proxy.refuse()
        fault.strike()
        run = world.start("run")
        world.engine("--users", "100", "--count", "3000").result()
        until(lambda: taped(world) == 3_000, "all of it is recorded")
        said = world.said()
        assert (said["state"], said["acked"], run.running()) == ("waiting", 0, True)
        assert world.status()["store"].startswith("not reachable")
        fault.heals(world)
        proxy.resume()
        fault.closes(world, 3_000)
        assert run.term() == 0


@pytest.mark.long
@pytest.mark.timeout(3_000)
@pytest.mark.parametrize("frames", [2_000_000])
def test_f24_database_away_for_ten_minutes(tmp_path: Path, fault: Fault, own_node: Node, frames: int) -> None:
    """What ten minutes bring, 2,000,000 frames, is recorded in a tenth of the time while the database is away: silent
    first, then gone. Memory stays as it is, within 10 %.

    What is bounded has been full once before memory is measured: the recorder stands for two seconds, as a slow disk
    makes it stand now and then, and the frames that wait take their room (4,000 to be written, 4 MiB).
    """
    with Proxy(own_node.port) as proxy, _world(tmp_path, own_node, proxy.port) as world:
        run = world.start("run")
        engine = world.engine("--users", "1000", "--count", str(frames + 1_000), "--burst", "3000", rate=25_000)
        world.until_acked(1_000)
        proxy.silence()
        fault.strike()
        run.signal(signal.SIGSTOP)
        time.sleep(2)
        run.signal(signal.SIGCONT)
        until(lambda: taped(world) > max(frames // 10, 100_000), "a tenth is recorded", 300)
        resident = _resident_kib(run.pid)
        proxy.refuse()
        last = engine.result(600)["last_sequence"]
        until(lambda: taped(world) == last, "all of it is recorded", 120)
        grown = _resident_kib(run.pid) / resident
        print(f"{resident} KiB at a tenth, {grown:.3f} times that at the end")
        assert grown < 1.1
        fault.heals(world)
        proxy.resume()
        fault.closes(world, last, timeout_s=1_500)
        said = world.status()
        assert (said["holes"], said["sessions"]) == ([], 1)
        assert run.term() == 0
    own_node.stop()  # flushes: whoever kills it next would wait for all of this to be replayed from its commit log
    own_node.start()


def _resident_kib(pid: int) -> int:
    sample = look(pid)
    assert sample is not None
    return sample.rss_bytes // 1024


def test_f25_database_paused(world: World, fault: Fault, own_node: Node) -> None:
    """SIGSTOP of the node under load, until the driver has given it up; SIGCONT."""
    run, engine = under_load(world)
    own_node.pause()
    fault.strike()
    time.sleep(12)  # 5 s until the driver asks whether it lives, 5 s until it gives up
    fault.heals(world)
    own_node.resume()
    closes_load(world, fault, run, engine)
    assert run.logged("start_over"), "memory is not trusted after an outage"


@pytest.mark.long
def test_f26_database_killed_after_it_received_before_it_answered(tmp_path: Path, fault: Fault, own_node: Node) -> None:
    """Batches reach the node, their answers don't leave the proxy; then the node is killed."""
    with Proxy(own_node.port) as proxy, _world(tmp_path, own_node, proxy.port) as world:
        run, engine = under_load(world)
        proxy.swallow(lambda head: head[4] == RESULT)
        until(lambda: proxy.swallowed >= 5, "batches are under way without an answer")
        own_node.kill()
        fault.strike()
        fault.heals(world)
        proxy.resume()
        own_node.start()
        closes_load(world, fault, run, engine)
        assert run.logged("batch_outcome_unknown")


@pytest.mark.long
def test_f27_answers_dropped(tmp_path: Path, seed: int, fault: Fault, own_node: Node) -> None:
    """Every third answer to a statement, then every one, is lost on its way though the node has done what was asked."""
    chance = random.Random(seed)
    with Proxy(own_node.port) as proxy, _world(tmp_path, own_node, proxy.port) as world:
        run, engine = under_load(world, "store.cassandra.request_timeout_s=1")
        acked = int(world.said()["acked"])
        proxy.swallow(lambda head: head[4] == RESULT and chance.random() < 1 / 3)
        time.sleep(4)
        proxy.swallow(lambda head: head[4] == RESULT)
        time.sleep(2)
        fault.strike(proxy.swallowed)
        fault.heals(world)
        proxy.resume()
        assert int(world.said()["acked"]) > acked, "it got on meanwhile"
        closes_load(world, fault, run, engine)
        assert len(run.logged("batch_outcome_unknown")) > 5


@pytest.mark.long
def test_f28_batch_log_replayed_late(world: World, seed: int, fault: Fault, own_node: Node) -> None:
    """The node is killed and loses the end of its commit log, but not the batch log's record of it: seconds later,
    when the sidecar has long settled on, the node applies those batches once more."""
    chance = random.Random(seed)
    run, engine = under_load(world)
    still: set[str] = set()
    for attempt in range(6):
        acked = int(world.said()["acked"])
        own_node.kill(cut_commitlog=chance.randint(2, 30))
        own_node.start()
        in_log = {row["id"] for row in own_node.cql("SELECT id FROM system.batches")[0]}
        print(f"attempt {attempt}: {len(in_log)} batches in the batch log")
        until(lambda: int(world.said()["acked"]) > acked + 100, "it settles on", 60)  # noqa: B023 - asked at once
        still = {row["id"] for row in own_node.cql("SELECT id FROM system.batches")[0]} & in_log
        if still:
            break
    assert still, "no batch was to be replayed late"
    fault.strike(len(still))
    until(
        lambda: not {row["id"] for row in own_node.cql("SELECT id FROM system.batches")[0]} & still,
        "the node has replayed them",
        60,
    )
    fault.heals(world)
    closes_load(world, fault, run, engine)


def test_f29_node_back_with_a_cut_commit_log(world: World, fault: Fault, own_node: Node) -> None:
    """The node is killed and has lost its last thousand writes when it is back, acknowledged ones among them."""
    run, engine = under_load(world)
    (lost,) = own_node.kill(cut_commitlog=1_000)
    print(f"lost with the commit log: {lost}")
    assert lost.mutations > 500
    fault.strike()
    fault.heals(world)
    own_node.start()
    closes_load(world, fault, run, engine)
    assert run.logged("start_over"), "memory is not trusted after an outage"


@pytest.mark.long
def test_f30_table_altered_or_dropped_beneath(world: World, fault: Fault, own_node: Node) -> None:
    """Columns are added under load, then a table is dropped; in the end all of them are gone and made anew, and the
    tape settles the whole stream again."""
    keyspace = str(world.judged).rpartition("/")[2]
    run, engine = under_load(world)
    for table in ("settled_trades_btc_usdt", "user_balances", "settlement_state", "stream_decisions"):
        own_node.cql(f"ALTER TABLE {keyspace}.{table} ADD remark text")
        fault.strike()
    acked = int(world.said()["acked"])
    world.until_acked(acked + RATE)
    assert world.said()["halted"] is None
    own_node.cql(f"DROP TABLE {keyspace}.settled_trades_eth_usdt")
    fault.strike()
    said = world.until_halted("it halts")
    assert said["halted"]["code"] == "STORE_REFUSED"
    assert "schema apply" in said["halted"]["reason"]
    until(lambda: taped(world) > said["taped"] + RATE, "recording goes on")
    engine.signal(signal.SIGTERM)
    last = engine.result()["last_sequence"]
    until(lambda: taped(world) == last, "all of it is recorded")
    assert run.term() == 0
    own_node.cql(f"DROP KEYSPACE {keyspace}")
    world.verb("schema", "apply", status=0)
    fault.heals(world)
    run = world.start("run", log="again.log")
    fault.recovers(world)
    world.engine("--users", "100", "--count", str(last + 500)).result()
    fault.closes(world, last + 500)
    assert run.term() == 0


def test_f31_two_sidecars_with_complete_tapes(tmp_path: Path, seed: int, fault: Fault, own_node: Node) -> None:
    """Two sidecars settle one stream from two tapes, and their settlers are killed at random, both at once too."""
    chance = random.Random(seed)
    tapes = ("a.db", "b.db")
    with _world(tmp_path, own_node, own_node.port, "pipeline.durable_after_s=1") as world:
        recorders = [world.start("record", tape=tape, log=f"record-{tape}.log") for tape in tapes]
        settlers = {tape: world.start("settle", tape=tape, log=f"settle-{tape}.log") for tape in tapes}
        engine = world.engine("--users", "100", "--wait-subscribers", "2", rate=RATE)
        for _ in range(6):
            time.sleep(chance.uniform(1.5, 2.5))
            for tape in chance.sample(tapes, chance.choice((1, 1, 2))):
                settlers[tape].kill()
                fault.strike()
                settlers[tape] = world.start("settle", tape=tape, log=f"settle-{tape}.log")
        fault.heals(world, "a.db")
        time.sleep(1)
        engine.signal(signal.SIGTERM)
        last = engine.result()["last_sequence"]
        for tape in tapes:
            fault.closes(world, last, tape=tape)
        assert [settler.term() for settler in settlers.values()] == [0, 0]
        assert [recorder.term() for recorder in recorders] == [0, 0]


@pytest.mark.long
def test_f35_driver_future_that_never_completes(tmp_path: Path, seed: int, fault: Fault, own_node: Node) -> None:
    """A tenth of the driver's futures stays without result, error, timeout: of connecting, reading, settling."""
    with _world(tmp_path, own_node, own_node.port, "store.cassandra.request_timeout_s=0.5") as world:
        record = world.start("record")
        engine = world.engine("--users", "100", rate=RATE)
        settle = world.start("settle", module=("tests.fault.hang", f"0.1:{seed}"))
        until(lambda: int(world.said().get("acked", 0)) > 2 * RATE, "it gets on nevertheless", 90)
        struck = settle.logged("never_completes")
        fault.strike(len(struck))
        assert {line["where"] for line in struck} >= {"rows", "answered"}
        fault.heals(world)
        settle.term()
        settle = world.start("settle", log="settle.log")
        engine.signal(signal.SIGTERM)
        fault.closes(world, engine.result()["last_sequence"])
        assert [settle.term(), record.term()] == [0, 0]
