"""A real Cassandra for tests: `Node` calls scripts/cassandra, so what people use by hand is what the tests use.

with Node(yaml={"commitlog_sync": "batch"}) as node:      # started; wiped at the end
    node.cql("CREATE KEYSPACE ...")
    node.kill()
    node.start()                                          # same port, same data
"""

import json
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "cassandra"
_COMMAND_S = 300  # the first start on a machine fetches Cassandra


def missing_tools() -> str | None:
    """What this machine lacks for a node, with how to get it, or None: the reason to skip or to fail."""
    done = subprocess.run([SCRIPT, "prepare", "--check"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip()


class CommandError(Exception):
    """scripts/cassandra ended with `status`; the message is what it said."""

    def __init__(self, verb: str, status: int, text: str) -> None:
        super().__init__(f"scripts/cassandra {verb} (exit {status}): {text}")
        self.status = status


@dataclass(frozen=True)
class Cut:
    """What kill(cut_commitlog=...) took from one node: writes to our tables, to Cassandra's own, bytes of both."""

    mutations: int
    system_mutations: int
    bytes: int


class Node:
    """One name of scripts/cassandra: a node, or a cluster of `nodes`. `number` is one of them (from 1), None all."""

    def __init__(
        self,
        name: str | None = None,
        *,
        nodes: int = 1,
        yaml: Mapping[str, str] | None = None,
        jvm: Sequence[str] = (),
        heap: str | None = None,
        bench: bool = False,
        secure: bool = False,
    ) -> None:
        self.name = name or f"test-{secrets.token_hex(4)}"
        self.nodes = nodes
        self.port = 0  # known once started
        self.ca_file: str | None = None  # of a secure one
        self._options = [
            *(f"--yaml={key}={value}" for key, value in (yaml or {}).items()),
            *(f"--jvm={argument}" for argument in jvm),
            *([f"--heap={heap}"] if heap else []),
            *(["--bench"] if bench else []),
            *(["--secure"] if secure else []),
        ]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.wipe()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wipe()

    @property
    def hosts(self) -> list[str]:
        """The contact points."""
        return [f"127.0.0.{number}" for number in range(1, self.nodes + 1)]

    @property
    def host(self) -> str:
        """The first contact point."""
        return self.hosts[0]

    def start(self, number: int | None = None) -> None:
        """Start, or start again with the same ports and data; returns when it answers CQL."""
        answer = self._run("start", *self._options, f"--nodes={self.nodes}", *_chosen(number))
        self.port = answer["nodes"][0]["port"]
        self.ca_file = answer["ca_file"]

    def stop(self, number: int | None = None) -> None:
        """SIGTERM, and wait for the end."""
        self._run("stop", *_chosen(number))

    def kill(self, number: int | None = None, *, cut_commitlog: int | None = None) -> list[Cut]:
        """SIGKILL; with `cut_commitlog` the last so many writes are lost, too (what was lost, by node)."""
        cut = [] if cut_commitlog is None else [f"--cut-commitlog={cut_commitlog}"]
        answer = self._run("kill", *cut, *_chosen(number))
        return [Cut(**each) for each in answer.get("cut", {}).values()]

    def pause(self, number: int | None = None) -> None:
        """SIGSTOP: connections stay, nothing answers."""
        self._run("pause", *_chosen(number))

    def resume(self, number: int | None = None) -> None:
        """SIGCONT."""
        self._run("resume", *_chosen(number))

    def wipe(self) -> None:
        """Kill and delete all of it. Fine when there is nothing."""
        self._run("wipe")

    def status(self) -> list[dict[str, Any]]:
        """Of each node: node, state, host, port, jmx_port, pid, rss_bytes, uptime_s, data, log."""
        nodes: list[dict[str, Any]] = self._run("status")["nodes"]
        return nodes

    def pids(self) -> list[int | None]:
        """Of each node, None for one that is dead."""
        return [each["pid"] for each in self.status()]

    def state(self, number: int = 1) -> str:
        """`running`, `paused` or `stopped`."""
        state: str = self.status()[number - 1]["state"]
        return state

    def cql(self, *texts: str) -> list[list[dict[str, Any]]]:
        """Run statements (each text may hold several); the rows of each. Half a second: speed needs the driver."""
        arguments = [argument for text in texts for argument in ("-e", text)]
        return [result["rows"] for result in self._run("cql", *arguments)]

    def nodetool(self, *arguments: str, number: int = 1) -> str:
        """What nodetool prints (takes about a second)."""
        return self._call("nodetool", f"--node={number}", "--", *arguments)

    def _run(self, verb: str, *arguments: str) -> Any:
        return json.loads(self._call(verb, "--json", *arguments))

    def _call(self, verb: str, *arguments: str) -> str:
        command = [str(SCRIPT), verb, f"--name={self.name}", *arguments]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_COMMAND_S
        )
        if done.returncode:
            raise CommandError(verb, done.returncode, done.stderr.strip())
        return str(done.stdout)


def _chosen(number: int | None) -> list[str]:
    return [] if number is None else [f"--node={number}"]
