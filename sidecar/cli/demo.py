"""The demo: an engine process, `sidecar run`, a fresh store, a progress bar, and a verdict by an independent judge.

Everything is real and separate: the engine publishes over a ZeroMQ socket in its own process, the sidecar is the one
that operators run, and the judge is a program that shares no code with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

from sidecar.cli import carried
from sidecar.errors import SidecarError
from sidecar.tape import read_settled

_ROOT: Final = carried.root()
_PACKAGES: Final = Path(__file__).resolve().parents[2]  # where this package is imported from, for its processes
_START_S: Final = 30.0
_STALL_S: Final = 30.0


class DemoFailedError(SidecarError):
    """A part of the demo did not do its work; the message says which, and what it said."""


def play(*, trades: str, store: str, rate: float, keep: str | None, as_json: bool) -> int:
    """Play the demo; give 0 only when every row and balance agrees."""
    with contextlib.ExitStack() as stack:
        if keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sidecar-demo-")))
        else:
            folder = Path(keep)
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise DemoFailedError(f"--keep {folder} is not empty; name an empty or new folder")
        target = _Target(store, folder, stack)
        verdict = _settle(folder, trades, target, rate, quiet=as_json)
    if as_json:
        print(json.dumps(verdict))
    else:
        print(_text(verdict))
    return 0 if verdict["ok"] else 1


class _Target:
    """The fresh store to settle into: how the sidecar and the judge reach it."""

    def __init__(self, store: str, folder: Path, stack: contextlib.ExitStack) -> None:
        self.name = store
        if store == "sqlite":
            self.settings = ["store.backend=sqlite", f"store.sqlite.path={folder / 'settlement.db'}"]
            self.judged = f"sqlite:{folder / 'settlement.db'}"
            return
        port = self._start_cassandra(stack)
        keyspace = f"demo_{secrets.token_hex(4)}"
        self.settings = [
            "store.backend=cassandra", "store.cassandra.contact_points=127.0.0.1", f"store.cassandra.port={port}",
            f"store.cassandra.keyspace={keyspace}",
        ]  # fmt: skip
        self.judged = f"cassandra:127.0.0.1:{port}/{keyspace}"

    def _start_cassandra(self, stack: contextlib.ExitStack) -> int:
        """Start a node of the demo's own, wiped at the end."""
        script, name = _ROOT / "scripts" / "cassandra", f"demo-{secrets.token_hex(4)}"
        if not script.is_file():
            raise DemoFailedError(f"{script} is not there: run the demo from a checkout, with scripts/demo")
        stack.callback(lambda: subprocess.run([script, "wipe", "--name", name], capture_output=True, check=False))
        started = json.loads(_output([str(script), "start", "--name", name, "--json"]))
        return int(started["nodes"][0]["port"])

    def prepare(self, configured: list[str], environment: dict[str, str]) -> None:
        """Make the tables, where an operator would."""
        if self.name == "cassandra":
            _output([sys.executable, "-m", "sidecar", "schema", "apply", *configured], environment=environment)


def _settle(folder: Path, trades: str, target: _Target, rate: float, *, quiet: bool) -> dict[str, Any]:
    bench = _ROOT / "bench"
    engine = [sys.executable, str(bench / "engine.py"), "--source", trades]
    if not bench.is_dir():
        raise DemoFailedError(f"{bench} is not there: this installation is not whole; install sidecar anew")
    rules = folder / "rules.json"
    rules.write_text(_output([*engine, "--print-rules"]))
    endpoint = f"tcp://127.0.0.1:{_free_port()}"
    tape, journal, acks = folder / "tape.db", folder / "journal.jsonl", folder / "acks.txt"
    settings = [
        *target.settings, f"engine.endpoint={endpoint}", f"tape.path={tape}", f"pipeline.ack_log={acks}",
        "admin.listen=",
    ]  # fmt: skip
    configured = ["--config", str(bench / f"{trades}.toml")]
    for setting in settings:
        configured += ["--set", setting]
    run = [sys.executable, "-m", "sidecar", "run", *configured]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SIDECAR_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_PACKAGES), environment.get("PYTHONPATH")]))
    target.prepare(configured, environment)
    with _process(run, folder / "sidecar.log", environment) as sidecar:
        paced = ["--rate", str(rate)] if rate > 0 else ["--pace", "flat"]
        published = [*engine, "--endpoint", endpoint, "--journal", str(journal), "--stamp", "--json", "--quiet", *paced]
        with _process(published, folder / "engine.log", environment, folder / "engine.out") as engine_process:
            last = _watch(tape, engine_process, sidecar, folder, trades, quiet=quiet)
        _stop(sidecar)
    judge = [
        sys.executable, str(bench / "judge.py"), "--journal", str(journal), "--rules", str(rules),
        "--store", target.judged,
        "--acks", str(acks), "--json",
    ]  # fmt: skip
    if trades == "session":
        judge += ["--balances", str(bench / "data" / "engine-session-balances.json")]
    judged = json.loads(_output(judge, allowed=(0, 1)))
    ok = bool(judged["ok"]) and judged["events"] == last
    return {
        "ok": ok,
        "trades": judged["trades"],
        "events": judged["events"],
        "balances_equal": judged["balances_equal"],
        "balances": judged["balances"],
        "trades_per_s": judged["trades_per_s"],
        "p50_ms": judged["p50_ms"],
        "p99_ms": judged["p99_ms"],
        "store": target.name,
        "rows_compared": judged["rows_compared"],
        "differences": judged["differences"],
    }


def _watch(
    tape: Path,
    engine: subprocess.Popen[bytes],
    sidecar: subprocess.Popen[bytes],
    folder: Path,
    trades: str,
    *,
    quiet: bool,
) -> int:
    """Follow the settlement until the engine's last event is acknowledged; give its sequence."""
    total = _expected(trades)
    last = None
    moved_at, seen = time.monotonic(), 0
    with _progress(total, quiet=quiet) as show:
        while True:
            if sidecar.poll() is not None:
                raise DemoFailedError(
                    f"`sidecar run` ended with {sidecar.returncode}:\n{_end_of(folder / 'sidecar.log')}"
                )
            if last is None and engine.poll() is not None:
                if engine.returncode != 0:
                    raise DemoFailedError(
                        f"the engine ended with {engine.returncode}:\n{_end_of(folder / 'engine.log')}"
                    )
                last = int(json.loads((folder / "engine.out").read_text().splitlines()[-1])["last_sequence"])
            said = read_settled(tape) or {}
            acked = int(said.get("acked", 0))
            if said.get("halted"):
                raise DemoFailedError(f"settlement halted: {said['halted']}")
            show(acked)
            if acked != seen:
                moved_at, seen = time.monotonic(), acked
            if last is not None and acked >= last:
                return last
            if time.monotonic() - moved_at > (_STALL_S if seen else _START_S + _STALL_S):
                raise DemoFailedError(
                    f"nothing was settled for {_STALL_S:.0f} s, at sequence {acked}:\n{_end_of(folder / 'sidecar.log')}"
                )
            time.sleep(0.1)


def _expected(trades: str) -> int | None:
    return {"session": 30_340}.get(trades)


@contextlib.contextmanager
def _progress(total: int | None, *, quiet: bool) -> Iterator[Any]:
    """Show how far settlement is: a bar with rate and time on a terminal, a plain line now and then otherwise."""
    if quiet:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    began = time.monotonic()
    if not console.is_terminal:
        told = [began]

        def tell(acked: int) -> None:
            now = time.monotonic()
            if now - told[0] >= 2.0:
                told[0] = now
                rate = acked / (now - began)
                print(f"settled {acked}{f' of {total}' if total else ''}, {rate:,.0f}/s", file=sys.stderr)

        yield tell
        return
    columns = (
        TextColumn("settling"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("settling", total=total, rate="")
        last = [began, 0]

        def show(acked: int) -> None:
            now = time.monotonic()
            if now - last[0] >= 1.0:
                progress.update(task, rate=f"{(acked - last[1]) / (now - last[0]):,.0f}/s")
                last[:] = [now, acked]
            progress.update(task, completed=acked)

        yield show


def _text(verdict: dict[str, Any]) -> str:
    lines = [
        f"{'ALL EQUAL' if verdict['ok'] else 'NOT EQUAL'}: {verdict['trades']} trades of {verdict['events']} events,"
        f" settled in {verdict['store']}",
        f"  {verdict['rows_compared']} rows agree with the engine's journal, field by field"
        if verdict["ok"]
        else f"  differences: {json.dumps(verdict['differences'][:5])}",
    ]
    if verdict["balances"]:
        lines.append(
            f"  {verdict['balances_equal']} of {verdict['balances']} balances are the engine's own, to the unit"
        )
    rate, p50, p99 = verdict["trades_per_s"], verdict["p50_ms"], verdict["p99_ms"]
    lines.append(f"  {rate:,.0f} trades/s; from the engine's send to acknowledged: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    return "\n".join(lines)


@contextlib.contextmanager
def _process(
    command: list[str], errors: Path, environment: dict[str, str], output: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with contextlib.ExitStack() as stack:
        said: IO[bytes] | int = stack.enter_context(output.open("wb")) if output else subprocess.DEVNULL
        process = subprocess.Popen(command, stdout=said, stderr=stack.enter_context(errors.open("wb")), env=environment)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        status = process.wait(30)
    except subprocess.TimeoutExpired as slow:
        raise DemoFailedError("`sidecar run` did not end within 30 s of SIGTERM") from slow
    if status != 0:
        raise DemoFailedError(f"`sidecar run` ended with {status} after SIGTERM; 0 is right")


def _output(command: list[str], allowed: tuple[int, ...] = (0,), environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode not in allowed or not done.stdout:
        raise DemoFailedError(f"{' '.join(command[1:3])} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def _end_of(file: Path) -> str:
    return "\n".join(file.read_text(errors="replace").splitlines()[-8:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
