"""Real processes, for benchmarks and end-to-end tests: an engine, sidecars on a folder, the judge; all ended by pid."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from bench.engine import rules

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("SIDECAR_")} | {
    "PYTHONPATH": str(ROOT)
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def until(true: Callable[[], Any], what: str | Callable[[], str], timeout_s: float = 60.0) -> Any:
    """Wait until something holds; give what it gave. `what` may be told at the end, when it did not."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := true():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s} s: {what if isinstance(what, str) else what()}")


def rules_toml(given: dict[str, Any]) -> str:
    """Write rules, as the engine prints them, as a sidecar's configuration."""
    lines = []
    for section in ("assets", "symbols"):
        for name, keys in given[section].items():
            lines += [f"[{section}.{name}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items()), ""]
    return "\n".join(lines)


class World:
    """A folder with an engine's endpoint, a journal, and any number of sidecar processes over one store."""

    def __init__(
        self, folder: Path, *, source: str = "session", settings: Sequence[str] = (), store: Sequence[str] = (),
        judged: str | None = None, symbols: int = 2,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.source = source
        self.symbols = symbols  # of generated trades
        self.toml = ROOT / "bench" / ("session.toml" if source == "session" else "binance.toml")
        if symbols != 2:
            self.toml = folder / "symbols.toml"
            self.toml.write_text(rules_toml(rules(source, symbols)))
        self.endpoint = f"tcp://127.0.0.1:{free_port()}"
        self.journal = folder / "journal.jsonl"
        self.pause_file = folder / "pause"
        self.settings = [
            f"engine.endpoint={self.endpoint}",
            "admin.listen=",
            *(store or ["store.backend=sqlite", f"store.sqlite.path={folder / 'settlement.db'}"]),
            *settings,
        ]
        self.judged = judged or f"sqlite:{folder / 'settlement.db'}"
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def config(self, tape: str = "tape.db") -> list[str]:
        given = ["--config", str(self.toml)]
        for setting in [f"tape.path={self.folder / tape}", *self.settings]:
            given += ["--set", setting]
        return given

    def start(
        self, verb: str, *more: str, tape: str = "tape.db", log: str | None = None,
        module: Sequence[str] = ("sidecar",), under: Sequence[str] = (),
    ) -> Process:  # fmt: skip
        """Start `sidecar VERB` (or another module that runs it); it is killed when the world ends.

        `under` is a command that becomes the process (`env …`, `strace -D …`).
        """
        command = [*under, sys.executable, "-m", *module, verb, *self.config(tape)]
        for setting in more:
            command += ["--set", setting]
        return self._start(command, self.folder / (log or f"{verb}.log"), b'"starting"')

    def engine(self, *arguments: str, rate: float | None = None, journal: Path | None = None) -> Process:
        command = [
            sys.executable, str(ROOT / "bench" / "engine.py"), "--endpoint", self.endpoint, "--source", self.source,
            "--journal", str(journal or self.journal), "--symbols", str(self.symbols), "--json", "--quiet",
            "--linger-s", "0.3", *arguments,
        ]  # fmt: skip
        if rate is not None:
            command += ["--rate", str(rate)]
        return self._start(command, self.folder / "engine.log")

    def _start(self, command: list[str], log: Path, hears_after: bytes = b"") -> Process:
        process = Process(command, log, hears_after)
        self._stack.callback(process.end)
        return process

    def verb(self, *arguments: str, status: int | tuple[int, ...] = (0, 1), tape: str = "tape.db") -> Any:
        """Run one verb with --json; give what it says."""
        command = [sys.executable, "-m", "sidecar", *arguments, *self.config(tape), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=self.folder)
        allowed = (status,) if isinstance(status, int) else status
        assert done.returncode in allowed, f"{arguments} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return json.loads(done.stdout) if done.stdout.strip() else json.loads(done.stderr.splitlines()[-1])

    def status(self, tape: str = "tape.db") -> Any:
        return self.verb("status", tape=tape)

    def said(self, tape: str = "tape.db") -> dict[str, Any]:
        """Read `<tape>.settled`, which is quicker than the verb."""
        try:
            said: dict[str, Any] = json.loads((self.folder / f"{tape}.settled").read_text())
        except (OSError, ValueError):
            return {}
        return said

    def until_halted(self, what: str, code: str | None = None, timeout_s: float = 60.0) -> dict[str, Any]:
        """Wait until settlement has halted (by this code); give what `status` says of it."""

        def halted() -> dict[str, Any] | None:
            if not self.said().get("halted"):  # `status` is a process of its own: only where there is something to say
                return None
            said: dict[str, Any] = self.status()
            return said if said["halted"] and code in {None, said["halted"]["code"]} else None

        given: dict[str, Any] = until(halted, what, timeout_s)
        return given

    def until_acked(self, sequence: int, timeout_s: float = 60.0, tape: str = "tape.db") -> None:
        until(
            lambda: self.said(tape).get("acked", 0) >= sequence,
            lambda: f"acked {sequence}: {self.said(tape)}",
            timeout_s,
        )

    def judge(self, *arguments: str) -> dict[str, Any]:
        """Compare the store with the journal, by a program that shares no code with the sidecar."""
        rules_file = self.folder / "rules.json"
        rules_file.write_text(json.dumps(rules(self.source, self.symbols)))
        command = [
            sys.executable, str(ROOT / "bench" / "judge.py"), "--journal", str(self.journal),
            "--rules", str(rules_file), "--store", self.judged, "--json", *arguments,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout, done.stderr
        verdict: dict[str, Any] = json.loads(done.stdout)
        return verdict


class Process:
    """One process that this test started, and may signal."""

    def __init__(self, command: list[str], log: Path, hears_after: bytes = b"") -> None:
        """`hears_after` is what it logs once it heeds SIGTERM: earlier that would kill it as it kills anything."""
        self.log = log
        self._hears_after = hears_after
        with log.open("ab") as errors:
            self._log_begin = errors.tell()
            self._popen = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, env=ENVIRONMENT, cwd=log.parent
            )
        self.pid = self._popen.pid

    def running(self) -> bool:
        return self._popen.poll() is None

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, at whatever instruction it is."""
        self._popen.kill()
        self._popen.wait()

    def term(self, timeout_s: float = 40.0) -> int:
        """SIGTERM, once it heeds it; give the exit status."""
        if self._hears_after:
            until(lambda: self._hears() or not self.running(), f"{self.log}: it is up")
        self._popen.send_signal(signal.SIGTERM)
        return self._popen.wait(timeout_s)

    def _hears(self) -> bool:
        with self.log.open("rb") as log:
            log.seek(self._log_begin)
            return self._hears_after in log.read()

    def wait(self, timeout_s: float = 120.0) -> int:
        return self._popen.wait(timeout_s)

    def result(self, timeout_s: float = 120.0) -> dict[str, Any]:
        """Wait for its end; give the last JSON line of its stdout."""
        out, _ = self._popen.communicate(timeout=timeout_s)
        assert self._popen.returncode == 0, f"ended with {self._popen.returncode}: {self.log.read_text()[-2000:]}"
        last: dict[str, Any] = json.loads(out.splitlines()[-1])
        return last

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Give the log lines of one event."""
        lines = (json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{"))
        return [line for line in lines if line["event"] == event]

    def end(self) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait()
        if self._popen.stdout is not None:
            self._popen.stdout.close()
