"""The nodes of one name, from their folder: made, started together, found answering, stopped, killed, paused, wiped.

`nodes/NAME/settings.json` says how they were made, so a stopped name starts again on its ports with its data. A single
node lives in `nodes/NAME` itself, the members of a cluster in `nodes/NAME/1`, `2`, `3`. A crash of this program leaves
at worst a folder of files that the next start writes again, and nodes that `status` finds by their pid files.
"""

import contextlib
import ctypes
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import certificates
import commitlog
import protocol
import runtime
from failures import NodeError, PortTakenError
from process import Process
from runtime import say
from settings import LOGBACK, LOGBACK_QUIET, Settings, identity, jvm_arguments, yaml_text

NODES = runtime.STATE / "nodes"
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PORTS = range(
    20_000, 31_000
)  # below the ports the kernel hands out by itself, so that no client takes one between choice and use
STOP_S, READY_S = 60.0, 120.0
LOG_IN_S = 10.0
BENCH_TIMER_SLACK_NS = 200_000  # measured (ARCHITECTURE.md, Chosen from sweeps): idle threads look for work less often
PR_SET_TIMERSLACK, PR_GET_TIMERSLACK = 29, 30  # linux/prctl.h
_STATEMENTS_TO_LEARN = (
    "CREATE KEYSPACE k WITH replication = {'class': 'NetworkTopologyStrategy', 'replication_factor': 1}",
    "CREATE TABLE k.t (a bigint, b text, c bigint, d blob, f frozen<map<text, bigint>>, PRIMARY KEY (a, b))",
    """BEGIN BATCH USING TIMESTAMP 1 INSERT INTO k.t (a, b, c, f) VALUES (1, 'x', 1, {'y': 1});
       INSERT INTO k.t (a, b, d) VALUES (2, 'x', 0x00); APPLY BATCH""",
    "INSERT INTO k.t (a, b) VALUES (3, 'x') IF NOT EXISTS",
    "SELECT * FROM k.t WHERE a = 1 AND b = 'x'",
    "SELECT a, b FROM k.t WHERE token(a) > -1 LIMIT 5",
    "TRUNCATE k.t",
)


@dataclass(frozen=True)
class Member:
    """One node: its number from 1 on, its address, its folder, its process."""

    number: int
    host: str
    home: Path
    jmx_port: int

    @property
    def process(self) -> Process:
        """The JVM."""
        return Process(self.home / "pid", identity(self.home))

    @property
    def log(self) -> Path:
        """What Cassandra logs."""
        return self.home / "system.log"

    @property
    def console(self) -> Path:
        """What the JVM prints: empty unless it fails early."""
        return self.home / "console.log"


class Cluster:
    """The nodes of one name. `settings` is None until it was started once."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        self.name = name
        self.folder = folder or NODES / name
        self._file = self.folder / "settings.json"
        self.settings = Settings.load(self._file) if self._file.is_file() else None

    def made(self) -> Settings:
        """Its settings. Raises NodeError when there is no such name."""
        if self.settings is None:
            known = ", ".join(sorted(cluster.name for cluster in all_clusters())) or "none"
            raise NodeError(
                f"no node named {self.name!r}, only: {known}; next: scripts/cassandra start --name {self.name}"
            )
        return self.settings

    def members(self, number: int | None = None) -> list[Member]:
        """All nodes, or the one with this number."""
        settings = self.made()
        if number is not None and not 1 <= number <= settings.nodes:
            raise NodeError(f"{self.name} has no node {number}; allowed: 1 to {settings.nodes}")
        numbers = range(1, settings.nodes + 1) if number is None else [number]
        homes = {each: self.folder if settings.nodes == 1 else self.folder / str(each) for each in numbers}
        return [Member(each, settings.host(each), homes[each], settings.jmx_ports[each - 1]) for each in numbers]

    def start(self, wanted: Settings, number: int | None, timeout_s: float, *, port_is_a_must: bool = False) -> bool:
        """Start what is not running and wait until it answers; false when all of it ran already. Raises NodeError."""
        if self.settings is not None:
            members = self.members(number)
            if paused := [each.host for each in members if each.process.state == "paused"]:
                raise NodeError(
                    f"{', '.join(paused)} of {self.name} is paused; next: scripts/cassandra resume --name {self.name}"
                )
            asleep = [each for each in members if each.process.state == "stopped"]
            if not asleep:
                return False
        self.settings = wanted
        if wanted.secure:
            hosts = [wanted.host(each) for each in range(1, wanted.nodes + 1)]
            certificates.make(certificates.Files(self.folder), hosts)
        archive = prepare(timeout_s)
        for attempt in (1, 2, 3):
            self._choose_ports(port_is_a_must=port_is_a_must)
            try:
                self._launch_all(number, archive, timeout_s)
            except PortTakenError as taken:
                self.kill(number)
                if attempt == 3 or port_is_a_must or self._someone_runs():
                    raise
                say(f"{taken}; trying other ports")
                self.made().port = self.made().storage_port = 0
            else:
                return True
        return True

    def stop(self, number: int | None) -> list[Member]:
        """SIGTERM all at once and wait for their end; what ran. Raises NodeError after STOP_S."""
        # A paused process takes the SIGTERM only once it goes on.
        return self._end(number, [signal.SIGTERM, signal.SIGCONT])

    def kill(self, number: int | None) -> list[Member]:
        """SIGKILL and wait for their end; what ran."""
        return self._end(number, [signal.SIGKILL])

    def _end(self, number: int | None, signals: list[signal.Signals]) -> list[Member]:
        with ExitStack() as stack:
            pinned = [
                (each, stack.enter_context(process)) for each in self.members(number) if (process := each.process.pin())
            ]
            for _, process in pinned:
                for kind in signals:
                    process.signal(kind)
            for each, process in pinned:
                if not process.wait_for_end(STOP_S):
                    raise NodeError(
                        f"{each.host} of {self.name} lives after {STOP_S:g} s; next: kill --name {self.name}"
                    )
            return [each for each, _ in pinned]

    def cut_commitlog(self, number: int | None, mutations: int) -> dict[int, commitlog.Cut]:
        """Drop the last writes of dead nodes, by node."""
        return {each.number: commitlog.cut_tail(each.home / "commitlog", mutations) for each in self.members(number)}

    def signal(self, number: int | None, kind: signal.Signals) -> list[Member]:
        """Pause (SIGSTOP) or resume (SIGCONT); returns once the kernel shows it. Raises NodeError when nothing runs."""
        members = [each for each in self.members(number) if each.process.signal(kind)]
        if not members:
            raise NodeError(f"{self.name} is not running; next: scripts/cassandra start --name {self.name}")
        wanted = "paused" if kind == signal.SIGSTOP else "running"
        for each in members:
            deadline = time.monotonic() + 5
            while each.process.state != wanted and time.monotonic() < deadline:
                time.sleep(0.005)
        return members

    def wipe(self) -> bool:
        """Kill what runs and delete all of it; false when there was nothing."""
        if self.settings is not None:
            self.kill(None)
        if not self.folder.exists():
            return False
        shutil.rmtree(self.folder)
        return True

    def _someone_runs(self) -> bool:
        return any(each.process.pid for each in self.members())

    def _choose_ports(self, *, port_is_a_must: bool = False) -> None:
        """Keep the ports there are when they are free or ours, else choose others; JMX ports likewise."""
        settings = self.made()
        hosts = [settings.host(number) for number in range(1, settings.nodes + 1)]
        with runtime.locked("ports", "a choice of ports"):
            running = self._someone_runs() if settings.port and settings.jmx_ports else False
            reserved = _reserved_ports(self.name)
            if not running:
                for field in ("port", "storage_port"):
                    before = getattr(settings, field)
                    if not before or not _is_free(hosts, before):
                        if before and port_is_a_must and field == "port":
                            raise PortTakenError(
                                f"--port {before} is taken on {' '.join(hosts)}; next: leave it out, or free it"
                            )
                        setattr(settings, field, _free_port(hosts, reserved))
                        if before:
                            say(f"port {before} of {self.name} is taken; now {getattr(settings, field)}")
                    reserved.add(getattr(settings, field))
            while len(settings.jmx_ports) < settings.nodes:
                settings.jmx_ports.append(0)
            for index, before in enumerate(settings.jmx_ports):
                if before and (_is_free(["127.0.0.1"], before) or running):
                    continue
                settings.jmx_ports[index] = _free_port(["127.0.0.1"], reserved)
                reserved.add(settings.jmx_ports[index])
            self.folder.mkdir(parents=True, exist_ok=True)
            settings.save(self._file)

    def _launch_all(self, number: int | None, archive: Mapping[str, Path], timeout_s: float) -> None:
        settings = self.made()
        members = [each for each in self.members(number) if each.process.pid is None]
        deadline = time.monotonic() + timeout_s
        # The first is the others' seed: on a busy machine they would give up before it answers them.
        for together in (members[:1], members[1:]) if settings.nodes > 1 else (members,):
            for each in together:
                launch(settings, each, archive)
            for each in together:
                with wait_until_it_answers(settings, each, deadline):
                    pass
        if settings.nodes > 1 and all(each.process.state == "running" for each in self.members()):
            for each in self.members():
                _wait_until_it_sees_all(settings, each, deadline)


def all_clusters() -> list[Cluster]:
    """Every name there is."""
    return [Cluster(file.parent.name) for file in sorted(NODES.glob("*/settings.json"))]


def launch(settings: Settings, member: Member, archive: Mapping[str, Path]) -> None:
    """Write its files and start its JVM in a session of its own, so that it outlives us and our terminal."""
    home = member.home
    home.mkdir(parents=True, exist_ok=True)
    (home / "cassandra.yaml").write_text(yaml_text(settings, member.number, home))
    (home / "logback.xml").write_text(LOGBACK)
    (home / "logback-quiet.xml").write_text(LOGBACK_QUIET)
    arguments = [*jvm_arguments(settings, member.number, home, archive), "-cp", runtime.class_path()]
    (home / "jvm.args").write_text("".join(f'"{text}"\n' for text in arguments))
    if member.log.exists():
        member.log.rename(member.log.with_name("system.log.before"))
    command = [
        str(runtime.find_java()),
        identity(home),
        f"@{home}/jvm.args",
        "org.apache.cassandra.service.CassandraDaemon",
    ]
    with member.console.open("w") as console:
        environment = {
            key: value for key, value in os.environ.items() if key not in ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS")
        }
        with timer_slack(BENCH_TIMER_SLACK_NS if settings.bench else 0):
            started = subprocess.Popen(
                command,
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
                env=environment,
            )
    (home / "pid").write_text(f"{started.pid}\n")
    while member.process.pid is None and started.poll() is None:
        time.sleep(0.001)  # Popen returns a moment before the kernel shows the new command line


@contextlib.contextmanager
def timer_slack(ns: int) -> Iterator[None]:
    """Let the timers of processes started in here fire so late, in ns (systemd: TimerSlackNSec=); 0: as it is."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    before = prctl(PR_GET_TIMERSLACK)
    if ns and prctl(PR_SET_TIMERSLACK, ctypes.c_ulong(ns)):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_TIMERSLACK)")
    try:
        yield
    finally:
        prctl(PR_SET_TIMERSLACK, ctypes.c_ulong(before))


def wait_until_it_answers(settings: Settings, member: Member, deadline: float) -> protocol.Connection:
    """A connection that has been through STARTUP. Raises NodeError with the last lines of the log."""
    log_in_until = time.monotonic() + LOG_IN_S
    while True:
        try:
            connection = protocol.Connection(member.host, settings.port, timeout_s=5, tls=settings.tls)
            if connection.logged_in or not settings.secure or time.monotonic() > log_in_until:
                return connection  # the caller closes it
            connection.close()  # the first superuser is not there yet; or somebody has given it another password
        except (OSError, protocol.RefusedError) as error:
            if member.process.pid is None:
                raise _why_it_failed(settings, member, "ended before it answered") from error
            if time.monotonic() > deadline:
                raise _why_it_failed(settings, member, f"does not answer ({error}), though it runs") from error
        time.sleep(0.03)


def prepare(timeout_s: float) -> dict[str, Path]:
    """Make jars and class-data archive when missing; the JVM options that use the archive.

    Raises ToolMissingError, NodeError.
    """
    runtime.check_tools()
    runtime.fetch_jars()
    archive = runtime.archive_path(runtime.find_java())
    if not archive.exists():
        with runtime.locked("archive", "the class-data archive"):
            if not archive.exists():
                _build_archive(archive, timeout_s)
    return {"SharedArchiveFile": archive} if archive.exists() else {}


def _build_archive(archive: Path, timeout_s: float) -> None:
    """Run a node once, use what tests use, and have its JVM write the classes down when it ends."""
    say("building the class-data archive (once for each Java and set of jars, about 15 s)")
    part = archive.with_suffix(".part")
    trial = Cluster("archive", runtime.STATE / "archive-trial")
    shutil.rmtree(trial.folder, ignore_errors=True)
    trial.settings = settings = Settings("archive")
    trial._choose_ports()  # noqa: SLF001  (same module)
    (member,) = trial.members()
    try:
        launch(settings, member, {"ArchiveClassesAtExit": part})
        with wait_until_it_answers(settings, member, time.monotonic() + timeout_s) as connection:
            for statement in _STATEMENTS_TO_LEARN:
                connection.query(statement)
        trial.stop(None)
        part.rename(archive)
    except (NodeError, OSError, protocol.RefusedError) as error:
        say(f"no class-data archive: {error}\nGoing on without; every start takes a second longer.")
    finally:
        trial.wipe()
        part.unlink(missing_ok=True)
    for old in runtime.STATE.glob("classes-*.jsa"):
        if old != archive:
            old.unlink()


def _wait_until_it_sees_all(settings: Settings, member: Member, deadline: float) -> None:
    """Read at ALL from a keyspace of Cassandra's own with two replicas: it answers once all nodes count as up."""
    while True:
        try:
            with protocol.Connection(member.host, settings.port, timeout_s=10, tls=settings.tls) as connection:
                if connection.logged_in:
                    connection.query("SELECT session_id FROM system_traces.sessions", protocol.CONSISTENCY_ALL)
                return
        except (OSError, protocol.RefusedError) as error:
            if time.monotonic() > deadline:
                raise _why_it_failed(settings, member, f"does not see the other nodes ({error})") from error
        time.sleep(0.1)


def _why_it_failed(settings: Settings, member: Member, what: str) -> NodeError:
    lines = [line for file in (member.log, member.console) for line in _last_lines(file)]
    text = "\n".join(lines)
    kind, step = NodeError, f"read {member.log}"
    if re.search(r"Address already in use|is in use by another process", text):
        kind, step = PortTakenError, "start again with another --port"
    elif "CommitLogReadException" in text or "CommitLogReplayException" in text:
        ignore = "--jvm=-Dcassandra.commitlog.ignorereplayerrors=true"
        step = f"scripts/cassandra wipe --name {settings.name}, or start with {ignore}"
    elif "ConfigurationException" in text or "YAMLException" in text:
        step = "correct the --yaml settings (KEY= removes one)"
    elif "OutOfMemoryError" in text:
        step = "start with more --heap"
    return kind(f"{text}\n{member.host} of {settings.name} {what}; next: {step}")


def _last_lines(file: Path) -> Iterator[str]:
    """The last errors of a log and what followed them, without the stack."""
    if file.exists():
        lines = [
            line for line in file.read_text(errors="replace").splitlines() if not line.startswith(("\tat ", "\t..."))
        ]
        yield from lines[-15:]


def _reserved_ports(but: str) -> set[int]:
    """Ports of the other names, running or not."""
    others = [cluster.settings for cluster in all_clusters() if cluster.name != but and cluster.settings]
    return {port for other in others for port in (other.port, other.storage_port, *other.jmx_ports)}


def _free_port(hosts: list[str], reserved: set[int]) -> int:
    for _ in range(1000):
        port = random.choice(PORTS)  # noqa: S311
        if port not in reserved and _is_free(hosts, port):
            return port
    raise NodeError(
        f"no free port found from {PORTS.start} to {PORTS.stop}; next: stop other nodes, or choose with --port"
    )


def _is_free(hosts: list[str], port: int) -> bool:
    for host in hosts:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                return False
    return True
