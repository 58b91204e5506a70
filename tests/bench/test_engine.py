"""The stand-in engine as others meet it: its own process, a real socket, a real journal."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
import zmq

from bench import engine

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]


class Listener:
    """A subscriber of one engine process."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "bench/engine.py", "--endpoint", "tcp://127.0.0.1:*", "--json", "--quiet", *options]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.endpoint: str = json.loads(self.process.stdout.readline())["endpoint"]
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(self.endpoint)
        self._socket.subscribe(b"settlement")

    def receive(self, timeout_s: float = 5.0) -> tuple[int, bytes] | None:
        """Return time of arrival in us and payload of the next message."""
        if not self._socket.poll(int(timeout_s * 1000)):
            return None
        topic, payload = self._socket.recv_multipart()
        assert topic == b"settlement"
        return time.time_ns() // 1000, payload

    def receive_all(self) -> list[tuple[int, bytes]]:
        """Return everything until the engine is gone."""
        messages = []
        while True:
            message = self.receive(0.2)
            if message is not None:
                messages.append(message)
            elif self.process.poll() is not None:
                return messages

    def result(self) -> dict[str, Any]:
        """Wait for the end and return the last line."""
        out, err = self.process.communicate(timeout=20)
        assert self.process.returncode == 0, err
        result: dict[str, Any] = json.loads(out.splitlines()[-1])
        return result

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self._context.destroy(linger=0)


@pytest.fixture
def listen() -> Iterator[Any]:
    listeners: list[Listener] = []

    def begin(*options: str) -> Listener:
        listeners.append(Listener(*options))
        return listeners[-1]

    yield begin
    for listener in listeners:
        listener.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sequences(messages: list[tuple[int, bytes]]) -> list[Any]:
    """Sequences in order of arrival; a heartbeat and garbage by name."""
    found: list[Any] = []
    for _, payload in messages:
        try:
            event = msgpack.unpackb(payload)
        except ValueError:
            found.append("garbage")
        else:
            found.append(event.get("output_sequence", "heartbeat"))
    return found


def test_session_arrives_whole_and_the_journal_is_what_arrived(listen: Any, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    listener = listen("--source", "session", "--journal", str(journal), "--linger-s", "0.2")
    messages = listener.receive_all()
    result = listener.result()
    assert (result["events"], result["trades"], result["last_sequence"]) == (30_340, 30_002, 30_340)
    assert [msgpack.unpackb(payload) for _, payload in messages] == engine.load_session()
    entries = read_journal(journal)
    assert [entry["event"] for entry in entries] == engine.load_session()
    assert all(entry["seq"] == entry["event"]["output_sequence"] and "fault" not in entry for entry in entries)


def test_rate_is_an_open_loop_and_stamps_are_the_intended_times(listen: Any, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    listener = listen(
        *("--source", "generated", "--users", "20", "--count", "500", "--rate", "1000", "--stamp", "--session", "7"),
        *("--journal", str(journal), "--linger-s", "0.1", "--first-sequence", "100"),
    )
    messages = listener.receive_all()
    events = [msgpack.unpackb(payload) for _, payload in messages]
    stamps = [event["ts_us"] for event in events]
    assert [event["output_sequence"] for event in events] == list(range(100, 600))
    assert {after - before for before, after in itertools.pairwise(stamps)} == {1000}
    assert {event["session"] for event in events} == {7}
    assert min(arrival - stamp for (arrival, _), stamp in zip(messages, stamps, strict=True)) > -1000
    entries = read_journal(journal)
    assert [entry["event"] for entry in entries] == events
    assert [entry["sent_us"] for entry in entries] == stamps
    assert all(entry["actual_us"] >= entry["sent_us"] for entry in entries)


def test_recorded_pace_is_kept_and_sped_up(listen: Any) -> None:
    listener = listen("--source", "binance", "--users", "5", "--count", "515", "--pace", "x20", "--linger-s", "0.1")
    messages = listener.receive_all()
    events = [msgpack.unpackb(payload) for _, payload in messages]
    recorded_s = (events[-1]["settled_at"] - events[0]["created_at"]) / 1000
    assert len(events) == 515
    assert listener.result()["seconds"] == pytest.approx(recorded_s / 20, abs=0.3)


def test_each_fault_changes_what_leaves_and_is_named_in_the_journal(listen: Any, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    listener = listen(
        *("--source", "session", "--count", "30", "--journal", str(journal), "--linger-s", "0.1", "--stamp"),
        *("--duplicate", "3", "--withhold", "5", "--withhold-until", "7:10", "--swap", "12", "--corrupt", "15"),
        *(
            "--wrong-field",
            '17:amount="abc"',
            "--wrong-field",
            "18:!user_id",
            "--contradict",
            "20",
            "--restart-at",
            "25",
        ),
    )
    messages = listener.receive_all()
    expected: list[Any] = [1, 2, 3, 3, 4, 6, 8, 9, 10, 7, 11, 13, 12, 14, "garbage", 16, 17, 18, 19, 20, 20]
    assert sequences(messages) == [*expected, 21, 22, 23, 24, 25, 1, 2, 3, 4, 5]
    payloads = [payload for _, payload in messages]
    assert payloads[2] == payloads[3]
    first, second = (msgpack.unpackb(payload) for payload in payloads[19:21])
    assert {key for key in first if first[key] != second[key]} == {"amount"}
    assert msgpack.unpackb(payloads[16])["amount"] == "abc"
    assert "user_id" not in msgpack.unpackb(payloads[17])
    faults = [
        (entry["seq"], entry.get("run", 1), entry["fault"]) for entry in read_journal(journal) if "fault" in entry
    ]
    assert faults == [
        (3, 1, "duplicate"),
        (5, 1, "withheld"),
        (7, 1, "late"),
        (15, 1, "corrupt"),
        (17, 1, "wrong_field"),
        (18, 1, "wrong_field"),
        (20, 1, "contradict"),
    ]
    assert [entry["seq"] for entry in read_journal(journal) if entry.get("run") == 2] == [1, 2, 3, 4, 5]
    assert listener.result()["events"] == 30


def test_a_frame_held_back_beyond_the_end_still_leaves(listen: Any) -> None:
    listener = listen(
        "--source", "session", "--count", "5", "--linger-s", "0.1", "--withhold-until", "2:99", "--swap", "5"
    )
    assert sequences(listener.receive_all()) == [1, 3, 4, 2, 5]


def test_heartbeats_when_idle_and_at_the_end_name_the_next_sequence(listen: Any) -> None:
    listener = listen(
        *("--source", "session", "--count", "2", "--rate", "4", "--heartbeat-s", "0.06", "--linger-s", "0.1"),
        *("--session", "9", "--withhold", "2"),
    )
    messages = listener.receive_all()
    beats = [msgpack.unpackb(payload) for _, payload in messages]
    beats = [beat for beat in beats if "next_sequence" in beat]
    assert beats[0] == {"next_sequence": 2, "session": 9}
    assert beats[-1] == {"next_sequence": 3, "session": 9}  # shows that the last frame was lost
    assert len(beats) > 2


def test_pause_file_quiets_the_stream_and_shifts_the_times(listen: Any, tmp_path: Path) -> None:
    pause = tmp_path / "pause"
    reply = tmp_path / "pause.paused"
    journal = tmp_path / "journal"
    listener = listen(
        *("--source", "session", "--count", "400", "--rate", "500", "--stamp", "--linger-s", "0.1"),
        *("--pause-file", str(pause), "--journal", str(journal)),
    )
    assert listener.receive() is not None
    pause.touch()
    end = time.monotonic() + 5
    while not reply.exists() and time.monotonic() < end:
        time.sleep(0.01)
    last = int(reply.read_text())
    assert len(read_journal(journal)) == last  # flushed
    received = 1
    while listener.receive(0.3) is not None:
        received += 1
    assert received == last < 400
    pause.unlink()
    rest = listener.receive_all()
    assert sequences(rest) == list(range(last + 1, 401))
    assert not reply.exists()
    stamps = [entry["sent_us"] for entry in read_journal(journal)]
    gaps = [after - before for before, after in itertools.pairwise(stamps)]
    assert max(gaps) > 300_000
    assert sum(1 for gap in gaps if gap > 2_100) == 1


def test_the_past_is_served_from_the_journal_as_it_was_published(listen: Any, tmp_path: Path) -> None:
    journal, faults, endpoint = tmp_path / "journal", tmp_path / "faults", f"ipc://{tmp_path}/past"
    listener = listen(
        *("--source", "generated", "--users", "10", "--count", "300", "--stamp", "--session", "7", "--linger-s", "60"),
        *("--journal", str(journal), "--replay", endpoint, "--replay-faults", str(faults), "--withhold", "250"),
    )
    heard = {msgpack.unpackb(payload)["output_sequence"]: payload for _, payload in iter(listener.receive, None)}
    assert set(heard) == set(range(1, 301)) - {250}
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(endpoint)

    def ask(op: str, **keys: Any) -> Any:
        socket.send(msgpack.packb({"op": op, "id": 5, "stream": "main"} | keys))
        assert socket.poll(5_000)
        return msgpack.unpackb(socket.recv())

    try:
        hello = {"op": "hello", "id": 5, "stream": "main", "session": 7, "first_available": 1, "next_sequence": 301}
        assert ask("hello", protocol=1) == hello
        data = ask("replay", session=7, limit=2_000, **{"from": 241})
        assert (data["op"], data["id"], data["from"], data["next_sequence"]) == ("data", 5, 241, 301)
        assert {n: data["frames"][n - 241] for n in range(241, 301) if n != 250} == {
            n: heard[n] for n in range(241, 301) if n != 250
        }
        assert msgpack.unpackb(data["frames"][9])["output_sequence"] == 250
        assert ask("replay", session=8, limit=1, **{"from": 1})["op"] == "gone"
        for fault, op in (("gone 100", "gone"), ("busy 9", "busy"), ("error", "error"), ("wrong-range", "data")):
            faults.write_text(fault)
            assert ask("replay", session=7, limit=5, **{"from": 50})["op"] == op
        faults.unlink()
        assert len(ask("replay", session=7, limit=5, **{"from": 50})["frames"]) == 5
    finally:
        socket.close(linger=0)
        context.term()


def test_sigterm_stops_an_endless_stream_and_leaves_a_whole_journal(listen: Any, tmp_path: Path) -> None:
    journal, status = tmp_path / "journal", tmp_path / "status"
    listener = listen(
        *("--source", "generated", "--users", "10", "--rate", "2000", "--fees", "--linger-s", "0.1"),
        *("--journal", str(journal), "--status-file", str(status)),
    )
    while (message := listener.receive()) is not None and msgpack.unpackb(message[1])["output_sequence"] < 600:
        pass
    listener.process.send_signal(signal.SIGTERM)
    listener.receive_all()
    result = listener.result()
    assert result["stopped"]
    assert json.loads(status.read_text()) == result
    entries = read_journal(journal)
    assert [entry["seq"] for entry in entries] == list(range(1, result["last_sequence"] + 1))


def test_without_a_subscriber_it_says_so_and_exits_1() -> None:
    command = [
        sys.executable,
        "bench/engine.py",
        "--endpoint",
        "tcp://127.0.0.1:0",
        "--count",
        "1",
        "--wait-timeout-s",
        "0.1",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert "no 1 subscriber(s) to 'settlement'" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--pace", "fast"),
        ("--pace", "realtime", "--rate", "5"),
        ("--source", "generated", "--pace", "realtime"),
        ("--fees",),
        ("--withhold", "3", "--corrupt", "3"),
        ("--withhold-until", "9:3"),
        ("--wrong-field", "price=1"),
        ("--wrong-field", "3:output_sequence=1"),
        ("--replay", "ipc:///x"),
    ],
)
def test_wrong_usage_is_refused(options: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as refused:
        engine.main([*options, "--wait-subscribers", "0", "--endpoint", "tcp://127.0.0.1:0"])
    assert refused.value.code == 2


def test_binance_deposits_cover_every_trade_and_ids_rise() -> None:
    events = engine.load_binance(users=7, seed=3)
    assert events == engine.load_binance(users=7, seed=3)
    assert [event["output_sequence"] for event in events] == list(range(1, len(events) + 1))
    balances: dict[tuple[int, int], int] = {}
    ids: dict[int, int] = {}
    trades = 0
    for event in events:
        if "event_type" in event:
            assert trades == 0
            balances[event["user_id"], event["asset"]] = event["amount"]
            continue
        trades += 1
        base, quote_amount = event["base_asset"], event["price"] * event["quantity"] // 100
        assert event["price"] * event["quantity"] % 100 == 0
        assert ids.get(base, 0) < event["trade_id"]
        ids[base] = event["trade_id"]
        balances[event["buyer_user_id"], base] += event["quantity"]
        balances[event["buyer_user_id"], 2] -= quote_amount
        balances[event["seller_user_id"], base] -= event["quantity"]
        balances[event["seller_user_id"], 2] += quote_amount
        assert min(balances[event["buyer_user_id"], 2], balances[event["seller_user_id"], base]) >= 0
    assert trades == 34_419


def test_generated_trades_touch_many_accounts_and_repeat_by_seed() -> None:
    events = list(engine.generate(5, 1_000, 40_000, symbols=3, fees=True))
    assert events == list(engine.generate(5, 1_000, 40_000, symbols=3, fees=True))
    assert events != list(engine.generate(6, 1_000, 40_000, symbols=3, fees=True))
    trades = [event for event in events if "trade_id" in event]
    kinds = {event["event_type"] for event in events if "event_type" in event}
    assert kinds == {"DEPOSIT", "WITHDRAWAL", "ADJUSTMENT"}
    assert {trade["base_asset"] for trade in trades} == {1, 3, 4}
    assert all(trade["price"] > 0 and trade["quantity"] > 0 for trade in trades)
    own = sum(trade["buyer_user_id"] == trade["seller_user_id"] for trade in trades) / len(trades)
    assert 0.012 < own < 0.022
    batches = [trades[start : start + 16] for start in range(0, len(trades), 16)]
    rows = 0
    for batch in batches:
        users = [
            (trade[side], trade[asset])
            for trade in batch
            for side in ("buyer_user_id", "seller_user_id")
            for asset in ("base_asset", "quote_asset")
        ]
        rows += len(batch) + len(set(users))
    assert rows / len(trades) >= 4.8
