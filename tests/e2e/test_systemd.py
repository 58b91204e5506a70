"""A sidecar as a service: ready, status, watchdog, restart, exit 78.

First under a small manager of our own that does what systemd.service(5) says, on a real notify socket, with real
processes: it runs everywhere. Then, in a container as root, under systemd itself with the unit as installed: its
sandbox, its filter of system calls, its credentials.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

import pytest

from bench.world import ENVIRONMENT, ROOT, World, free_port, until


class Manager:
    """Type=notify, WatchdogSec, Restart=always, RestartPreventExitStatus=78, as systemd.service(5) says them."""

    def __init__(self, folder: Path, command: list[str], *, watchdog_s: float) -> None:
        self.log = folder / "managed.log"
        self.starts = self.feeds = self.killed_by_watchdog = 0
        self.ready = False
        self.statuses: list[str] = []
        self.told: list[str] = []
        self.exits: list[int] = []
        self._ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ear.bind(str(folder / "notify"))
        self._ear.settimeout(0.05)
        self._command = command
        self._watchdog_s = watchdog_s
        self._environment = ENVIRONMENT | {
            "NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": str(int(watchdog_s * 1e6)),
        }  # fmt: skip
        self._stopping = False
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._manage)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._ear.close()

    def stop(self) -> int:
        """`systemctl stop`: SIGTERM, no restart; give the exit status."""
        self._stopping = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._thread.join(40)
        if self._thread.is_alive() and self._process is not None:
            self._process.kill()  # TimeoutStopSec
            self._thread.join(20)
        return self.exits[-1] if self.exits else 0

    def _manage(self) -> None:
        while not self._stopping:
            self._watch_over_one_life()
            if self.exits[-1] == 78:
                return
            time.sleep(0.1)

    def _watch_over_one_life(self) -> None:
        with self.log.open("ab") as log:
            self._process = process = subprocess.Popen(
                self._command, env=self._environment, stdout=subprocess.DEVNULL, stderr=log, cwd=self.log.parent
            )
        self.starts += 1
        self.ready, fed_at = False, None
        while process.poll() is None:
            try:
                lines = self._ear.recv(65_536).decode().splitlines()
            except TimeoutError:
                lines = []
            self.told += lines
            self.statuses += [line.partition("=")[2] for line in lines if line.startswith("STATUS=")]
            self.ready |= "READY=1" in lines
            self.feeds += lines.count("WATCHDOG=1")
            if "READY=1" in lines or "WATCHDOG=1" in lines:
                fed_at = time.monotonic()
            if self.ready and not self._stopping and fed_at and time.monotonic() - fed_at > self._watchdog_s:
                self.killed_by_watchdog += 1
                process.send_signal(signal.SIGABRT)
                process.wait(30)
        self.exits.append(process.returncode)


def command(world: World, *settings: str) -> list[str]:
    given = [sys.executable, "-m", "sidecar", "run", *world.config()]
    for setting in settings:
        given += ["--set", setting]
    return given


def drain(path: Path) -> None:
    """Read what a process writes into a pipe, until this test's process ends."""

    def read() -> None:
        with path.open("rb", buffering=0) as pipe:
            while pipe.read(65_536):
                pass

    threading.Thread(target=read, daemon=True).start()


def test_a_frozen_loop_is_killed_and_the_next_process_settles_all(tmp_path: Path) -> None:
    pipe = tmp_path / "acks"
    os.mkfifo(pipe)
    ear = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # lets the sidecar open it, and then never reads
    settings = [f"pipeline.ack_log={pipe}", "pipeline.batch_trades_max=1", "pipeline.durable_after_s=0.5"]
    with World(tmp_path) as world, Manager(tmp_path, command(world, *settings), watchdog_s=3) as manager:
        until(lambda: manager.ready, "it is ready")
        engine = world.engine(
            "--count", "8000", rate=2000
        )  # a pipe holds 64 KiB, an acknowledgement is 12 bytes and more
        until(lambda: manager.killed_by_watchdog, "the loop writes into a full pipe, which freezes it", 60)
        log = until(lambda: "Fatal Python error: Aborted" in (text := manager.log.read_text()) and text, "the stack")
        assert "_write_notes" in log, "the journal says where the loop was"
        assert until(lambda: manager.exits, "it is gone")[0] == -signal.SIGABRT
        drain(pipe)
        os.close(ear)
        engine.result()
        head = until(lambda: (said := world.status())["taped"] and said, "the tape is there")["taped"]
        until(lambda: world.said().get("acked", 0) >= min(head, until_hole(world.status())), "the rest is settled", 60)
        until(lambda: manager.ready, "the next one is ready")
        assert manager.starts >= 2
        assert manager.stop() == 0


def until_hole(said: dict[str, Any]) -> int:
    """What the engine published between two processes is a hole here: nobody replays in this test."""
    holes: list[list[int]] = said["holes"]
    return holes[0][0] - 1 if holes else int(said["taped"])


@pytest.mark.long
def test_waiting_halted_and_paused_are_no_reason_to_restart(tmp_path: Path) -> None:
    with World(tmp_path) as world, Manager(tmp_path, command(world), watchdog_s=5) as manager:

        def goes_on_being_fed(state: str) -> None:
            until(lambda: manager.statuses and manager.statuses[-1].startswith(state), f"it says {state}", 30)
            fed = manager.feeds
            until(lambda: manager.feeds >= fed + 2, "the watchdog is fed", 30)

        goes_on_being_fed("waiting: taped 0, acked 0, durable 0, 0 behind")
        world.engine("--count", "1000", "--corrupt", "700").result()
        goes_on_being_fed("halted: ")
        assert "HALTED GAP at 700; next step: " in manager.statuses[-1]
        world.verb("gap", "accept", "700", "700", "--reason", "garbage", status=0)
        goes_on_being_fed("running: taped 1000, acked 1000")
        world.verb("pause", "--reason", "an upgrade", status=0)
        goes_on_being_fed("paused: ")
        assert (manager.starts, manager.killed_by_watchdog) == (1, 0)
        assert manager.told[0] == "READY=1" or "READY=1" in manager.told
        assert manager.stop() == 0
        assert "STOPPING=1" in manager.told


def test_a_killed_process_is_started_again_and_a_wrong_configuration_is_not(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        with Manager(tmp_path, command(world), watchdog_s=30) as manager:
            until(lambda: manager.ready, "it is ready")
            assert manager._process is not None
            manager._process.kill()
            until(lambda: manager.starts == 2 and manager.ready, "the next one is ready")
            assert manager.stop() == 0
        (tmp_path / "notify").unlink()
        with Manager(tmp_path, command(world, "admin.listen=0.0.0.0:1"), watchdog_s=30) as manager:
            until(lambda: manager.exits, "it ends")
            manager._thread.join(10)
            assert (manager.exits, manager.starts, manager.ready) == ([78], 1, False)


# --- systemd itself, in namespaces of its own -------------------------------------------------------------------------

# Its cgroups begin at one of our own, and it sees a /run of its own: nothing of this host is touched.
_NAMESPACES = """
mkdir -p "$CGROUP" && echo $$ > "$CGROUP/cgroup.procs"
exec unshare --mount --cgroup --propagation private bash -c '
    umount -R /sys/fs/cgroup; mount -t tmpfs tmpfs /sys/fs/cgroup; mkdir /sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
    mount -t tmpfs tmpfs /run; mkdir -p /run/systemd/system; mount --make-rshared /
    exec /lib/systemd/systemd --user'
"""
_HIERARCHY = Path("/sys/fs/cgroup/systemd")


def _why_not() -> str:
    if os.geteuid() != 0:
        return "only root may make the namespaces"
    if Path("/run/systemd/system").exists() or not _HIERARCHY.is_dir() or not Path("/lib/systemd/systemd").exists():
        return "wants a container with systemd installed but not running, and cgroups of version 1"
    return ""


class Systemd:
    """A real service manager (a user's, which needs not be the first process) with our unit as installed.

    Changed for it: the paths, no User=, no OOMScoreAdjust=, no PrivateTmp= and ProtectHome= (the tests live there).
    """

    def __init__(self, folder: Path, command: list[str], credentials: Path) -> None:
        self.folder = folder
        root = folder / "root"
        subprocess.run(
            [ROOT / "scripts/install", "--root", root, "--program", command[0]], check=True, capture_output=True
        )
        text = (root / "etc/systemd/system/sidecar.service").read_text()
        text = re.sub(
            r"^(User|Group|OOMScoreAdjust|PrivateTmp|ProtectHome|WorkingDirectory|ExecStart)=.*\n",
            "",
            text,
            flags=re.MULTILINE,
        )
        text = text.replace("/etc/sidecar/credentials", str(credentials)).replace("WatchdogSec=30", "WatchdogSec=5")
        own = [
            f"ExecStart={' '.join(command)}", f"ReadWritePaths={folder}", f"WorkingDirectory={folder}",
            f"StandardError=append:{folder / 'unit.log'}", f"Environment=PYTHONPATH={ROOT}",
        ]  # fmt: skip
        units = folder / "config/systemd/user"
        units.mkdir(parents=True)
        (units / "sidecar.service").write_text(text.replace("[Service]\n", "[Service]\n" + "\n".join(own) + "\n"))
        self._run = Path(tempfile.mkdtemp(prefix="sidecar"))  # a socket's path is short
        self._cgroup = _HIERARCHY / self._run.name
        self._environment = os.environ | {
            "XDG_RUNTIME_DIR": str(self._run), "XDG_CONFIG_HOME": str(folder / "config"), "HOME": str(folder),
            "CGROUP": str(self._cgroup), "SYSTEMD_LOG_TARGET": "console",
        }  # fmt: skip
        with (folder / "systemd.log").open("wb") as log:
            self._manager = subprocess.Popen(["bash", "-c", _NAMESPACES], env=self._environment, stdout=log, stderr=log)
        until((self._run / "systemd/private").exists, f"systemd runs: {(folder / 'systemd.log').read_text()}", 20)

    def control(self, *arguments: str, status: int | None = 0) -> str:
        command = ["systemctl", "--user", "--no-pager", *arguments]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False, timeout=100)
        assert status is None or done.returncode == status, done.stdout + done.stderr + self.log()
        return done.stdout

    def show(self, name: str) -> str:
        return self.control("show", "--value", "--property", name, "sidecar").strip()

    def log(self) -> str:
        path = self.folder / "unit.log"
        return path.read_text() if path.exists() else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.control("stop", "sidecar", status=None)
        self.control("exit", status=None)
        try:
            self._manager.wait(30)
        finally:
            self._manager.kill()
            self._manager.wait()
            until(self._cgroups_are_gone, "its cgroups are empty, and removed", 20)
            shutil.rmtree(self._run, ignore_errors=True)

    def _cgroups_are_gone(self) -> bool:
        for folder in [*sorted(self._cgroup.rglob("*"), reverse=True), self._cgroup]:
            if folder.is_dir():
                with contextlib.suppress(OSError):  # the last process in it is not quite gone
                    folder.rmdir()
        return not self._cgroup.exists()


@pytest.mark.long
@pytest.mark.tool("systemctl", "unshare")
@pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "can be run")
def test_systemd_itself_runs_the_unit_in_its_sandbox_and_restarts_a_frozen_one(tmp_path: Path) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir(mode=0o700)
    (credentials / "admin").write_text("a-token-of-24-characters\n")
    at = free_port()
    settings = [f"admin.listen=127.0.0.1:{at}", "admin.token_file=admin", "pipeline.durable_after_s=0.5"]
    with World(tmp_path) as world:
        program = [str(Path(sys.executable).with_name("sidecar")), *command(world, *settings)[3:]]
        with Systemd(tmp_path, program, credentials) as systemd:
            systemd.control("start", "sidecar")  # returns with READY
            status = systemd.control("status", "sidecar")
            assert 'Status: "waiting: taped 0, acked 0, durable 0, 0 behind"' in status
            pid = int(systemd.show("MainPID"))
            inside = Path(f"/proc/{pid}/status").read_text()
            assert re.search(r"^Seccomp:\t2$", inside, re.MULTILINE), "the filter of system calls is in force"
            assert re.search(r"^CapEff:\t0+$", inside, re.MULTILINE), "it has no capability"
            request = urllib.request.Request(f"http://127.0.0.1:{at}/ready")
            with pytest.raises(urllib.error.HTTPError, match="401"):  # so the credential was found by its bare name
                urllib.request.urlopen(request, timeout=10)  # noqa: S310 - our own process
            world.engine("--count", "1000").result()
            world.until_acked(1000)
            until(lambda: "running: taped 1000, acked 1000" in systemd.show("StatusText"), "it says so", 30)
            os.kill(pid, signal.SIGSTOP)
            until(lambda: systemd.show("NRestarts") == "1", "the watchdog has it killed, and the next one started", 60)
            until(lambda: "running: taped 1000, acked 1000" in systemd.show("StatusText"), "the next one runs", 60)
            assert int(systemd.show("MainPID")) != pid
            systemd.control("stop", "sidecar")
            assert (systemd.show("Result"), systemd.show("ExecMainStatus")) == ("success", "0")
            assert '"event": "stopped"' in systemd.log()
        assert world.judge()["ok"]
