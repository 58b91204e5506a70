"""What systemd hears, on a real notify socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.notify import FEEDS_A_DEADLINE, Notifier, status_line


@contextlib.contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind("\0" + address[1:] if address.startswith("@") else address)
        ear.settimeout(10)
        yield ear


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_fields_are_lines_of_one_datagram(tmp_path: Path, kind: str) -> None:
    address = str(tmp_path / "notify") if kind == "path" else f"@sidecar-test-{os.getpid()}"
    with listening(address) as ear:
        Notifier({"NOTIFY_SOCKET": address}).tell(READY=1, STATUS="two\nlines")
        assert ear.recv(4096) == b"READY=1\nSTATUS=two lines\n"


def test_without_a_manager_nothing_is_told() -> None:
    silent = Notifier({})
    assert not silent.is_wanted
    silent.tell(READY=1)
    asyncio.run(silent.feed_watchdog())


def test_a_manager_that_does_not_listen_fails_nothing_and_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    for _ in range(3):
        lost.tell(WATCHDOG=1)
    assert caplog.messages == ["notify_failed"]


def test_a_manager_that_does_not_read_holds_up_nothing(tmp_path: Path) -> None:
    with listening(str(tmp_path / "notify")):
        deaf = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        for _ in range(5_000):  # more than the socket's queue takes
            deaf.tell(WATCHDOG=1)


def test_ready_comes_with_the_first_look_and_status_only_when_it_changes(tmp_path: Path) -> None:
    with listening(str(tmp_path / "notify")) as ear:
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        running = {"state": "running", "taped": 10, "acked": 9, "durable": 5, "lag_events": 1, "holes": []}
        for standing in (running, running, running | {"taped": 11}):
            notifier.look(standing)
        assert ear.recv(4096) == b"READY=1\nSTATUS=running: taped 10, acked 9, durable 5, 1 behind\n"
        assert ear.recv(4096) == b"STATUS=running: taped 11, acked 9, durable 5, 1 behind\n"


def test_the_line_of_a_halt_has_the_next_step() -> None:
    halted = {"code": "GAP", "sequence": 3, "reason": "-", "next_step": "`sidecar gap accept 3 4`"}
    line = status_line(
        {"state": "halted", "taped": 9, "acked": 2, "lag_events": 5, "holes": [[3, 4]], "halted": halted}
    )
    assert line == (
        "halted: taped 9, acked 2, durable 0, 5 behind, 1 hole(s); HALTED GAP at 3; next step: `sidecar gap accept 3 4`"
    )


def test_the_line_names_the_database_nodes_that_are_away() -> None:
    line = status_line({"state": "running", "nodes_away": ["10.0.0.2:9042", "10.0.0.3:9042"]})
    assert line.endswith("0 behind, database nodes away: 10.0.0.2:9042, 10.0.0.3:9042")


def test_the_watchdog_is_fed_several_times_a_deadline_by_the_loop_alone(tmp_path: Path) -> None:
    with listening(str(tmp_path / "notify")) as ear:
        given = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "80000"}

        async def run() -> None:
            feeding = asyncio.create_task(Notifier(given).feed_watchdog())
            loop = asyncio.get_running_loop()
            began = loop.time()
            for _ in range(FEEDS_A_DEADLINE + 1):
                assert await asyncio.to_thread(ear.recv, 64) == b"WATCHDOG=1\n"
            assert loop.time() - began >= 0.06, "four pauses of a quarter each, not a flood"
            feeding.cancel()

        asyncio.run(run())


def test_a_watchdog_of_another_process_is_not_ours() -> None:
    assert Notifier({"NOTIFY_SOCKET": "x", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}).deadline_s == 0
    assert (
        Notifier({"NOTIFY_SOCKET": "x", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid())}).deadline_s == 1
    )
    assert Notifier({"NOTIFY_SOCKET": "x", "WATCHDOG_USEC": "1000000"}).deadline_s == 1
