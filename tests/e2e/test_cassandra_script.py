"""scripts/cassandra with real processes: what it starts answers, what it kills comes back, strangers live."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.cassandra_node import SCRIPT, CommandError, Node, missing_tools

KEYSPACE = "CREATE KEYSPACE k WITH replication = {'class': 'NetworkTopologyStrategy', 'replication_factor': 1}"
TABLE = "CREATE TABLE k.t (id bigint PRIMARY KEY, text text)"


def load(name: str) -> ModuleType:
    """A module of the folder beside the script."""
    folder = SCRIPT.with_name("cassandra.d")
    spec = importlib.util.spec_from_file_location(f"cassandra_d_{name}", folder / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node(yaml={"commitlog_sync": "batch", "commitlog_segment_size": "1MiB"}) as node:
        node.cql(KEYSPACE, TABLE)
        yield node


@pytest.fixture
def running(node: Node) -> Node:
    """The node, running again, whatever the test before did, and with no rows."""
    state = node.state()
    if state == "paused":
        node.resume()
    elif state == "stopped":
        node.start()
    node.cql("TRUNCATE k.t")
    return node


def insert(node: Node, ids: range) -> None:
    node.cql(*(f"INSERT INTO k.t (id, text) VALUES ({each}, 'text {each}')" for each in ids))


def ids(node: Node) -> set[int]:
    return {row["id"] for row in node.cql("SELECT id FROM k.t")[0]}


@pytest.mark.cassandra
def test_a_killed_node_comes_back_on_its_port_with_every_acknowledged_row_when_commitlog_sync_is_batch(
    running: Node,
) -> None:
    port = running.port
    insert(running, range(200))
    running.kill()
    assert running.state() == "stopped"
    with pytest.raises(CommandError, match="next: scripts/cassandra start"):
        running.cql("SELECT id FROM k.t")
    running.start()
    assert running.port == port
    assert ids(running) == set(range(200))


@pytest.mark.cassandra
def test_a_commitlog_cut_inside_a_batch_loses_exactly_what_came_later_and_the_node_starts(running: Node) -> None:
    insert(running, range(70))
    running.cql("BEGIN BATCH INSERT INTO k.t (id) VALUES (1000); INSERT INTO k.t (id) VALUES (1001); APPLY BATCH")
    insert(running, range(70, 99))
    (cut,) = running.kill(cut_commitlog=30)
    assert cut.mutations == 30
    running.start()
    # Half of the batch is left, or all of it when the batch log has been replayed.
    assert ids(running) - {1000, 1001} == set(range(70))


@pytest.mark.cassandra
def test_a_cut_of_more_writes_than_there_are_leaves_a_node_that_starts_with_its_tables(running: Node) -> None:
    running.cql(*(f"INSERT INTO k.t (id, text) VALUES ({each}, '{'x' * 20_000}')" for each in range(60)))
    (cut,) = running.kill(cut_commitlog=10_000)  # over two segments
    assert 60 <= cut.mutations < 10_000
    running.start()
    assert ids(running) == set()


@pytest.mark.cassandra
def test_a_paused_node_is_silent_until_it_is_resumed_and_loses_nothing(running: Node) -> None:
    insert(running, range(5))
    running.pause()
    assert running.state() == "paused"
    with pytest.raises(CommandError, match="is paused"):
        running.cql("SELECT id FROM k.t")
    with pytest.raises(CommandError, match="next: scripts/cassandra resume"):
        running.start()
    running.resume()
    assert ids(running) == set(range(5))


@pytest.mark.cassandra
def test_a_node_stopped_while_paused_starts_again_with_its_data_and_a_second_start_changes_nothing(
    running: Node,
) -> None:
    insert(running, range(5))
    running.pause()
    running.stop()
    assert running.state() == "stopped"
    assert running.pids() == [None]
    running.start()
    pids = running.pids()
    running.start()
    assert running.pids() == pids
    assert ids(running) == set(range(5))


@pytest.mark.cassandra
def test_a_failing_statement_is_named_and_those_before_it_stand(running: Node) -> None:
    with pytest.raises(CommandError, match=r"SyntaxException.*\nin: SELEC id FROM k\.t") as failed:
        running.cql("INSERT INTO k.t (id) VALUES (1); SELEC id  FROM k.t; INSERT INTO k.t (id) VALUES (2)")
    assert failed.value.status == 1
    assert ids(running) == {1}


@pytest.mark.cassandra
def test_values_are_told_as_json_can_say_them(running: Node) -> None:
    ((row,),) = running.cql(
        "SELECT (blob) 0xab01 AS blob, (bigint) 9007199254740993 AS big,"
        " (timestamp) '2024-02-29 12:00:00.250+0000' AS moment,"
        " (map<text, bigint>) {'a': 1} AS pairs, (uuid) 7ad54392-bcdd-35a6-8417-4e047860b377 AS id FROM system.local"
    )
    assert row == {
        "blob": "0xab01",
        "big": 9007199254740993,
        "moment": "2024-02-29T12:00:00.250Z",
        "pairs": {"a": 1},
        "id": "7ad54392-bcdd-35a6-8417-4e047860b377",
    }


@pytest.mark.cassandra
def test_a_stale_pid_file_is_never_signalled(running: Node) -> None:
    pid_file = Path(running.status()[0]["data"]) / "pid"
    running.kill()
    with subprocess.Popen(["sleep", "60"]) as stranger:
        try:
            pid_file.write_text(f"{stranger.pid}\n")
            assert running.state() == "stopped"
            running.kill()
            running.stop()
            with pytest.raises(CommandError, match="is not running"):
                running.pause()
            time.sleep(0.05)
            assert stranger.poll() is None
            assert Path(f"/proc/{stranger.pid}/stat").read_text().split()[2] == "S"
        finally:
            stranger.kill()


@pytest.mark.cassandra
def test_a_wrong_setting_fails_with_the_reason_and_the_next_step_and_wipe_leaves_nothing() -> None:
    node = Node(yaml={"no_such_setting": "1"})
    try:
        with pytest.raises(CommandError, match=r"(?s)no_such_setting.*next: correct the --yaml"):
            node.start()
        folder = Path(node.status()[0]["data"])
        assert folder.is_dir()
    finally:
        node.wipe()
    assert not folder.exists()
    node.wipe()


def test_a_machine_without_java_or_maven_is_told_both_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = load("runtime")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr(runtime, "JARS", tmp_path / "jars")
    monkeypatch.setattr(runtime, "JVMS", tmp_path)
    missing = runtime.find_missing()
    assert "apt install openjdk-17-jdk-headless" in missing
    assert "apt install maven" in missing


def test_missing_tools_and_the_exit_status_agree(tmp_path: Path) -> None:
    environment = {**os.environ, "JAVA_HOME": str(tmp_path)}
    done = subprocess.run(
        [str(SCRIPT), "prepare", "--check"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == (3 if missing_tools() else 0)


@pytest.mark.parametrize(
    "text, statements",
    [
        ("", []),
        (" ;; ; ", []),
        ("a; b", ["a", "b"]),
        ("a 'x;''y;' b; c", ["a 'x;''y;' b", "c"]),
        ('a "x;""y" ; c', ['a "x;""y"', "c"]),
        ("a $$ ; ' $$; b", ["a $$ ; ' $$", "b"]),
        ("a -- ; '\n b; // ; \n c /* ; \n ' */ d", ["a  \n b", "c   d"]),
        ("a '--x'; b '/*'; c '*/'", ["a '--x'", "b '/*'", "c '*/'"]),
        ("begin batch a; b 'apply batch'; apply batch; c", ["begin batch a; b 'apply batch'; apply batch", "c"]),
        ("BEGIN UNLOGGED BATCH USING TIMESTAMP 1 a; b APPLY /* ; */ BATCH ; c", None),
        ("a 'never closed; b", ["a 'never closed; b"]),
    ],
)
def test_statements_are_split_outside_of_quotes_comments_and_batches(text: str, statements: list[str] | None) -> None:
    split = load("cql").split_statements(text)
    if statements is None:
        assert split == ["BEGIN UNLOGGED BATCH USING TIMESTAMP 1 a; b APPLY   BATCH", "c"]
    else:
        assert split == statements


@pytest.mark.parametrize("bench, slack_ns", [(True, 200_000), (False, None)])
def test_a_node_to_measure_has_patient_timers_and_others_have_the_systems(*, bench: bool, slack_ns: int | None) -> None:
    cluster = load("cluster")
    with cluster.timer_slack(cluster.BENCH_TIMER_SLACK_NS if bench else 0):
        read = [sys.executable, "-c", "print(open('/proc/self/timerslack_ns').read())"]
        given = int(subprocess.run(read, capture_output=True, text=True, check=True).stdout)
    assert given == (slack_ns or int(Path("/proc/self/timerslack_ns").read_text()))
