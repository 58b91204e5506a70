"""The verbs of scripts/cassandra: reads the command line, does one verb, prints what came of it, as text or JSON."""

import argparse
import copy
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import certificates
import cql
import runtime
from cluster import NAME_PATTERN, NODES, READY_S, Cluster, Member, all_clusters, prepare
from failures import NodeError
from settings import BENCH_HEAP, OPEN_MODULES, TEST_HEAP, Settings

_DESCRIPTION = """\
A real Cassandra 5.0.6 for tests, development and benchmarks: one node, or a cluster on 127.0.0.1, 127.0.0.2 ...
Each --name is a node (or cluster) of its own, with its own ports, data and log in .cassandra/nodes/NAME.
"""
_EXAMPLES = """\
examples:
  scripts/cassandra start                              one small node; prints 127.0.0.1:PORT (about 3 s)
  scripts/cassandra cql -e "SELECT release_version FROM system.local"
  scripts/cassandra cql -f schema.cql
  scripts/cassandra status
  scripts/cassandra stop                               its data stays; `start` brings it back on the same port
  scripts/cassandra wipe                               and now its data is gone

  scripts/cassandra start --name b --bench --port 9042 a node to measure: 2 GiB, G1
  scripts/cassandra start --name t --yaml commitlog_sync=batch
  scripts/cassandra kill --name t                      SIGKILL, as a crash
  scripts/cassandra kill --name t --cut-commitlog 50   and as a power failure: the last 50 writes are lost
  scripts/cassandra start --name s --secure            TLS, passwords, rights; its ca.pem is in its folder
  scripts/cassandra start --name c --nodes 3           three nodes; then e.g. pause --name c --node 2

exit status: 0 done, 1 failed, 2 wrong usage, 3 no Java 17 or no Maven on this machine
"""
_BAD_USAGE = 2
_FLAGS = argparse.RawDescriptionHelpFormatter


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says; the exit status."""
    asked = _parser().parse_args(arguments)
    if not NAME_PATTERN.fullmatch(asked.name or "all"):
        print(f"--name {asked.name!r}; allowed: letters, digits, '.', '_', '-', at most 64", file=sys.stderr)
        return _BAD_USAGE
    try:
        verb: Callable[[argparse.Namespace], int] = asked.run
        return verb(asked)
    except NodeError as error:
        print(f"scripts/cassandra {asked.verb}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "scripts/cassandra", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=_FLAGS
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(
        name: str, run: Callable[[argparse.Namespace], int], text: str, *, more: str = "", node: bool = True
    ) -> argparse.ArgumentParser:
        verb = verbs.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.\n{more}", formatter_class=_FLAGS
        )
        verb.set_defaults(run=run)
        verb.add_argument("--name", default="default", help="which node or cluster (default: %(default)s)")
        verb.add_argument("--json", action="store_true", help="print JSON")
        if node:
            verb.add_argument(
                "--node", type=int, metavar="I", help="only this node of a cluster: 1, 2, 3 ... (default: all)"
            )
        return verb

    start = add(
        "start",
        _start,
        "start a node or a cluster and wait until it answers",
        more="A stopped or killed name starts again with its data, options and ports; options given anew replace it.\n"
        "The first start on a machine fetches Cassandra with Maven (66 MB) and builds a class archive: a minute.",
    )
    start.add_argument("--nodes", type=int, metavar="N", help="how many nodes (default: 1); fixed until wiped")
    start.add_argument("--port", type=int, metavar="P", help="CQL port, the same on all nodes (default: a free one)")
    start.add_argument("--heap", metavar="SIZE", help=f"512M, 2G ... (default: {TEST_HEAP}, with --bench {BENCH_HEAP})")
    start.add_argument(
        "--bench",
        action="store_true",
        default=None,
        help="a node to measure: G1, all compiler tiers, fixed heap, threads for the cores",
    )
    start.add_argument(
        "--secure",
        action="store_true",
        default=None,
        help="TLS with a certificate of its own, passwords, rights; cassandra/cassandra may log in, and `cql` does",
    )
    start.add_argument(
        "--yaml",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="cassandra.yaml settings, values in YAML or JSON; KEY= leaves ours out (commitlog_sync=batch the period)",
    )
    start.add_argument(
        "--jvm", action="append", default=[], metavar="ARGUMENT", help="a JVM argument, as in --jvm=-Dcassandra.x=y"
    )
    start.add_argument(
        "--timeout",
        type=float,
        default=READY_S,
        metavar="S",
        help="give up after this many seconds (default: %(default)g)",
    )

    add("stop", _stop, "stop it in order (SIGTERM: flushes, takes a few seconds); its data stays").add_argument(
        "--all", action="store_true", help="stop every name"
    )
    kill = add("kill", _kill, "kill it (SIGKILL), as a crash would")
    kill.add_argument(
        "--cut-commitlog",
        nargs="?",
        type=int,
        const=100,
        metavar="WRITES",
        help="then drop the last WRITES (default: %(const)s) from its commit log, acknowledged or not, as a power"
        " failure would; what was flushed stays. Works on a node that is dead already, too",
    )
    add("pause", _pause, "stop its processes where they are (SIGSTOP): connections stay, nothing answers")
    add("resume", _resume, "let paused processes go on (SIGCONT)")
    add(
        "status",
        _status,
        "show every name: state, address, pid, memory, age",
        more="With --name: that one alone.",
        node=False,
    ).set_defaults(name="", run=_status)
    add("wipe", _wipe, "kill it if it runs and delete its data", node=False).add_argument(
        "--all", action="store_true", help="wipe every name"
    )

    query = add(
        "cql", _cql, "run CQL statements and print their results", more="With neither -e nor -f: reads standard input."
    )
    query.add_argument(
        "-e",
        dest="sources",
        action="append",
        type=lambda text: ("-e", text),
        metavar="CQL",
        help="statements; may be repeated",
    )
    query.add_argument(
        "-f",
        dest="sources",
        action="append",
        type=lambda text: ("-f", text),
        metavar="FILE",
        help="a file of statements ('-': standard input)",
    )
    query.add_argument("--host", help="another database than ours, with --port")
    query.add_argument("--port", type=int, default=9042, help="its port (default: %(default)s)")
    query.add_argument("--user", "-u", help="user name")
    query.add_argument("--password", "-p", help="password")
    query.add_argument("--ca-file", metavar="PEM", help="speak TLS and trust this certificate")
    query.add_argument("--keyspace", "-k", help="keyspace to use")
    query.add_argument(
        "--consistency", default="LOCAL_ONE", type=str.upper, help="of reads and writes (default: %(default)s)"
    )
    query.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="for one statement (default: %(default)g)"
    )

    tool = add("nodetool", _nodetool, "run Cassandra's nodetool, e.g. nodetool -- flush trading")
    tool.add_argument("arguments", nargs="+", metavar="ARGUMENT", help="for nodetool; put -- before options")
    add(
        "prepare", _prepare, "fetch Cassandra and build the class archive now; start does it by itself", node=False
    ).add_argument("--check", action="store_true", help="only say what this machine lacks (exit 3)")
    return parser


def _start(asked: argparse.Namespace) -> int:
    cluster = Cluster(asked.name)
    runtime.check_tools()
    with runtime.locked(f"name-{asked.name}", f"a start or stop of {asked.name}"):
        cluster = Cluster(asked.name)
        began = cluster.start(
            _wanted(asked, cluster.settings), asked.node, asked.timeout, port_is_a_must=asked.port is not None
        )
        _print_nodes(
            cluster,
            cluster.members(asked.node),
            asked,
            "" if began else f"{asked.name} runs already, as it was started",
        )
    return 0


def _wanted(asked: argparse.Namespace, kept: Settings | None) -> Settings:
    """The kept settings with what was asked for now."""
    wanted = copy.deepcopy(kept) if kept else Settings(asked.name)
    if asked.nodes is not None:
        if not 1 <= asked.nodes <= 250:
            raise NodeError(f"--nodes {asked.nodes}; allowed: 1 to 250")
        if kept and kept.nodes != asked.nodes:
            raise NodeError(f"{asked.name} has {kept.nodes} node(s); next: another --name, or wipe this one")
        wanted.nodes = asked.nodes
    if asked.bench:
        wanted.bench, wanted.heap = True, BENCH_HEAP
    if asked.secure:
        wanted.secure = True
    if asked.heap:
        if not re.fullmatch(r"[1-9][0-9]*[MmGg]", asked.heap):
            raise NodeError(f"--heap {asked.heap}; allowed: a number with M or G, as in 512M")
        wanted.heap = asked.heap
    for setting in asked.yaml:
        key, sign, value = setting.partition("=")
        if not sign or not re.fullmatch(r"[a-z0-9_]+", key):
            raise NodeError(f"--yaml {setting!r}; allowed: KEY=VALUE with a key of cassandra.yaml")
        wanted.yaml[key] = value
    if asked.jvm:
        wanted.jvm = asked.jvm
    if asked.port is not None:
        wanted.port = asked.port
    return wanted


def _stop(asked: argparse.Namespace) -> int:
    for cluster in all_clusters() if asked.all else [Cluster(asked.name)]:
        with runtime.locked(f"name-{cluster.name}", f"a start or stop of {cluster.name}"):
            stopped = cluster.stop(asked.node)
        _print_done(cluster, stopped, asked, "stopped")
    return 0


def _kill(asked: argparse.Namespace) -> int:
    cluster = Cluster(asked.name)
    killed = cluster.kill(asked.node)
    if asked.cut_commitlog is None:
        _print_done(cluster, killed, asked, "killed")
        return 0
    cuts = cluster.cut_commitlog(asked.node, asked.cut_commitlog)
    if asked.json:
        print(
            json.dumps(
                {
                    "name": cluster.name,
                    "killed": [each.number for each in killed],
                    "cut": {key: asdict(cut) for key, cut in cuts.items()},
                }
            )
        )
        return 0
    _print_done(cluster, killed, asked, "killed")
    for number, cut in cuts.items():
        print(
            f"node {number} lost {cut.mutations} writes and {cut.system_mutations} of Cassandra's own"
            f" ({cut.bytes} bytes of commit log)"
        )
    return 0


def _pause(asked: argparse.Namespace) -> int:
    cluster = Cluster(asked.name)
    _print_done(cluster, cluster.signal(asked.node, signal.SIGSTOP), asked, "paused")
    return 0


def _resume(asked: argparse.Namespace) -> int:
    cluster = Cluster(asked.name)
    _print_done(cluster, cluster.signal(asked.node, signal.SIGCONT), asked, "resumed")
    return 0


def _wipe(asked: argparse.Namespace) -> int:
    for cluster in all_clusters() if asked.all else [Cluster(asked.name)]:
        with runtime.locked(f"name-{cluster.name}", f"a start or stop of {cluster.name}"):
            was_there = Cluster(cluster.name).wipe()
        if asked.json:
            print(json.dumps({"name": cluster.name, "wiped": was_there}))
        else:
            print(f"{cluster.name} is wiped" if was_there else f"there was no {cluster.name}")
    return 0


def _status(asked: argparse.Namespace) -> int:
    clusters = [Cluster(asked.name)] if asked.name else all_clusters()
    found = [_describe(cluster, member) for cluster in clusters for member in cluster.members()]
    if asked.json:
        print(json.dumps({"nodes": found}))
        return 0
    if not found:
        print("no nodes; next: scripts/cassandra start")
        return 0
    print(f"{'NAME':<20} {'NODE':>4} {'STATE':<8} {'ADDRESS':<16} {'PID':>8} {'RSS':>8} {'UP':>9}")
    for each in found:
        rss, up = each["rss_bytes"], each["uptime_s"]
        memory = f"{rss / 2**20:.0f} MB" if isinstance(rss, int) else "-"
        age = f"{up:.0f} s" if isinstance(up, float) else "-"
        address = f"{each['host']}:{each['port']}"
        who = f"{each['name']:<20} {each['node']:>4} {each['state']:<8} {address:<16}"
        print(f"{who} {each['pid'] or '-':>8} {memory:>8} {age:>9}")
    return 0


def _describe(cluster: Cluster, member: Member) -> dict[str, object]:
    process = member.process
    return {
        "name": cluster.name,
        "node": member.number,
        "state": process.state,
        "host": member.host,
        "port": cluster.made().port,
        "jmx_port": member.jmx_port,
        "pid": process.pid,
        "rss_bytes": process.rss_bytes(),
        "uptime_s": process.uptime_s(),
        "data": str(member.home),
        "log": str(member.log),
    }


def _cql(asked: argparse.Namespace) -> int:
    if importlib.util.find_spec("cassandra.cluster" if importlib.util.find_spec("cassandra") else "cassandra") is None:
        python = runtime.REPOSITORY / ".venv" / "bin" / "python"
        if not python.exists() or Path(sys.prefix) == python.parent.parent:
            raise NodeError(
                "cassandra-driver is not installed; next: run scripts/test or scripts/check once, they make .venv"
            )
        os.execv(python, [str(python), *sys.argv])  # noqa: S606
    sources = asked.sources or [("-f", "-")]
    if not asked.sources and sys.stdin.isatty():
        raise NodeError('nothing to run; next: scripts/cassandra cql -e "SELECT ...", or -f FILE')
    texts = [value if kind == "-e" else cql.read_source(value) for kind, value in sources]
    host, port = asked.host, asked.port
    if host is None:
        cluster = Cluster(asked.name)
        members = cluster.members(asked.node)
        running = [each for each in members if each.process.state == "running"]
        if not running:
            states = ", ".join(f"{each.host} is {each.process.state}" for each in members)
            raise NodeError(f"{asked.name}: {states}; next: scripts/cassandra start --name {asked.name}")
        host, port = running[0].host, cluster.made().port
        if cluster.made().secure:
            asked.ca_file = asked.ca_file or str(certificates.Files(cluster.folder).ca)
            if asked.user is None:
                asked.user, asked.password = "cassandra", "cassandra"
    target = cql.Target(
        host, port, asked.user, asked.password, asked.ca_file, asked.keyspace, asked.consistency, asked.timeout
    )
    cql.run(texts, target, as_json=asked.json)
    return 0


def _nodetool(asked: argparse.Namespace) -> int:
    runtime.check_tools()
    cluster = Cluster(asked.name)
    member = cluster.members(asked.node or 1)[0]
    options = [*OPEN_MODULES.split(), "-Xmx128M", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]
    options += [
        f"-Dcassandra.config=file://{member.home}/cassandra.yaml",
        f"-Dcassandra.storagedir={member.home}/nodetool",
    ]
    options += [f"-Dlogback.configurationFile=file://{member.home}/logback-quiet.xml"]
    command = [str(runtime.find_java()), *options, "-cp", runtime.class_path(), "org.apache.cassandra.tools.NodeTool"]
    return subprocess.run(
        [*command, "-h", "127.0.0.1", "-p", str(member.jmx_port), *asked.arguments], check=False
    ).returncode


def _prepare(asked: argparse.Namespace) -> int:
    if not asked.check:
        prepare(READY_S)
    else:
        runtime.check_tools()
    print(json.dumps({"jars": str(runtime.JARS), "nodes": str(NODES)}) if asked.json else "ready to start")
    return 0


def _print_nodes(cluster: Cluster, members: list[Member], asked: argparse.Namespace, remark: str) -> None:
    port = cluster.made().port
    if asked.json:
        nodes = [
            {"node": each.number, "host": each.host, "port": port, "pid": each.process.pid, "data": str(each.home)}
            for each in members
        ]
        ca_file = str(certificates.Files(cluster.folder).ca) if cluster.made().secure else None
        print(json.dumps({"name": cluster.name, "started": not remark, "nodes": nodes, "ca_file": ca_file}))
        return
    if remark:
        runtime.say(remark)
    for each in members:
        print(f"{each.host}:{port}")


def _print_done(cluster: Cluster, members: list[Member], asked: argparse.Namespace, done: str) -> None:
    if asked.json:
        print(json.dumps({"name": cluster.name, done: [each.number for each in members]}))
    elif members:
        print(f"{cluster.name}: {', '.join(each.host for each in members)} {done}")
    else:
        print(f"{cluster.name} was not running")
