"""Where a run's rows go: a SQLite file, or a keyspace of a real Cassandra; fresh for each run, gone after it."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import machine
from bench.cql import Connection
from bench.report import BenchError, Report
from bench.world import ENVIRONMENT, ROOT, World

SCRIPT = ROOT / "scripts" / "cassandra"
WARM_UP_S = 30.0


class Spot:
    """Empty tables of one run."""

    def __init__(self, settings: list[str], judged: str | None, keyspace: str = "") -> None:
        self.settings = settings  # for the sidecar
        self.judged = judged  # for the judge
        self.keyspace = keyspace


class SqlitePlace:
    """Files in the run's own folder."""

    name = "sqlite"

    @contextmanager
    def fresh(self, folder: Path, *, symbols: int = 2) -> Iterator[Spot]:  # noqa: ARG002 - Cassandra's needs it
        """Give empty tables; SQLite's are made by whoever settles first."""
        path = folder / "settlement.db"
        yield Spot(["store.backend=sqlite", f"store.sqlite.path={path}"], f"sqlite:{path}")


class CassandraPlace:
    """A node or several, each with all rows, and a keyspace for each run."""

    name = "cassandra"

    def __init__(self, host: str, port: int, hosts: Sequence[str] = (), started_as: str | None = None) -> None:
        """`started_as` is its name with scripts/cassandra, when it is one of our own."""
        self.host = host
        self.port = port
        self.hosts = [*hosts] or [host]
        self.started_as = started_as

    @contextmanager
    def fresh(self, folder: Path, *, symbols: int = 2) -> Iterator[Spot]:
        """Give empty tables, made by `sidecar schema apply`."""
        keyspace = f"bench_{secrets.token_hex(4)}"
        settings = [
            "store.backend=cassandra",
            f"store.cassandra.contact_points={','.join(self.hosts)}",
            f"store.cassandra.port={self.port}",
            f"store.cassandra.replication_factor={len(self.hosts)}",
            f"store.cassandra.keyspace={keyspace}",
        ]
        spot = Spot(settings, f"cassandra:{self.host}:{self.port}/{keyspace}", keyspace)
        try:
            source = "mixed" if symbols == 2 else "generated"
            with World(folder, source=source, store=settings, judged=spot.judged, symbols=symbols) as world:
                world.verb("schema", "apply", status=0)
            yield spot
        finally:
            with Connection(self.host, self.port) as connection:
                connection.query(f"DROP KEYSPACE IF EXISTS {keyspace}")

    def program(self, module: str, spot: Spot, journal: Path, *more: object) -> dict[str, Any]:
        """Run a program of the bench that writes a journal's rows into a run's tables by itself."""
        return program(
            module, *map(str, more), "--host", self.host, "--port", str(self.port), "--keyspace", spot.keyspace,
            "--journal", str(journal),
        )  # fmt: skip

    def version(self) -> str:
        """Ask the node for its version."""
        with Connection(self.host, self.port) as connection:
            (cell,) = connection.query("SELECT release_version FROM system.local")
        return (cell or b"").decode()

    def warm_up(self, folder: Path, seconds: float) -> None:
        """Write for some seconds, so that the node has compiled what it runs."""
        folder.mkdir(parents=True, exist_ok=True)
        with self.fresh(folder) as spot:
            program(
                "bench.ceiling", "--host", self.host, "--port", str(self.port), "--keyspace", spot.keyspace,
                "--warm-up", str(seconds),
            )  # fmt: skip


Place = SqlitePlace | CassandraPlace


@contextmanager
def place(
    name: str, port: int | None, folder: Path, report: Report, warm_up_s: float = WARM_UP_S, jvm: Sequence[str] = ()
) -> Iterator[Place]:
    """Give the store that is asked for; a Cassandra node is started, warmed up and wiped at the end.

    With `port` a running node on 127.0.0.1 is used, and left as it was; else its JVM is given `jvm`, too.
    """
    if name == "sqlite":
        yield SqlitePlace()
    elif port is not None:
        yield _known(CassandraPlace("127.0.0.1", port), folder, report, warm_up_s)
    else:
        with nodes(1, folder, report, warm_up_s, "--bench", *(f"--jvm={argument}" for argument in jvm)) as started:
            yield started


@contextmanager
def nodes(count: int, folder: Path, report: Report, warm_up_s: float, *options: str) -> Iterator[CassandraPlace]:
    """Start so many nodes of a cluster, warm them up, wipe them at the end; `options` of `scripts/cassandra start`."""
    name = f"bench-{os.getpid()}"
    try:
        report.note(f"starting {'a Cassandra node' if count == 1 else f'{count} Cassandra nodes'}")
        told = script("start", "--name", name, "--nodes", str(count), *options, "--json")["nodes"]
        report.database["jdk"] = machine.jdk()
        hosts = [one["host"] for one in told]
        yield _known(CassandraPlace(hosts[0], told[0]["port"], hosts, name), folder, report, warm_up_s)
    finally:
        script("wipe", "--name", name, "--json")


def _known(found: CassandraPlace, folder: Path, report: Report, warm_up_s: float) -> CassandraPlace:
    report.database["cassandra"] = found.version()
    if warm_up_s:
        report.note(f"warming up for {warm_up_s:g} s")
        found.warm_up(folder, warm_up_s)
    return found


def script(*arguments: str) -> Any:
    """Call scripts/cassandra; give what it says as JSON."""
    done = subprocess.run(
        [SCRIPT, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        raise BenchError(f"scripts/cassandra {arguments[0]}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def program(module: str, *arguments: str, timeout_s: float = 600.0) -> dict[str, Any]:
    """Run a program of the bench in a process of its own; give the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=timeout_s,
    )  # fmt: skip
    if done.returncode:
        raise BenchError(f"{module} ended with {done.returncode}: {done.stderr.strip()[-2_000:]}")
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last
