"""One process of ours, known by its pid file and trusted only when its command line agrees.

A pid file outlives its process, and the number is given to another one some day; so before anything is signalled the
process is pinned by a pidfd and its command line is read, and a process that is not ours counts as none.
"""

import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """The process whose pid stands in `pid_file` and among whose arguments is `identity`."""

    pid_file: Path
    identity: str

    @property
    def pid(self) -> int | None:
        """Its pid when it lives (paused counts), else None."""
        try:
            pid = int(self.pid_file.read_text())
        except (OSError, ValueError):
            return None
        return pid if self._is_ours(pid) else None

    @property
    def state(self) -> str:
        """`running`, `paused` or `stopped`."""
        pid = self.pid
        fields = _stat(pid) if pid else None
        if not fields:
            return "stopped"
        return "paused" if fields[0] in "Tt" else "running"

    def pin(self) -> "Pinned | None":
        """A hold on it that no other process can slip into, to be closed; None when it does not live."""
        pid = self.pid
        if pid is None:
            return None
        try:
            pinned = Pinned(os.pidfd_open(pid))
        except ProcessLookupError:
            return None
        if self._is_ours(pid):
            return pinned
        pinned.close()  # it died, and its number was given away, between the look and the pin
        return None

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal; false when there is no such process of ours."""
        pinned = self.pin()
        if pinned is None:
            return False
        with pinned:
            return pinned.signal(number)

    def rss_bytes(self) -> int | None:
        """Memory it holds."""
        pid = self.pid
        fields = _stat(pid) if pid else None
        return int(fields[21]) * os.sysconf("SC_PAGE_SIZE") if fields else None

    def uptime_s(self) -> float | None:
        """How long it has lived."""
        pid = self.pid
        fields = _stat(pid) if pid else None
        if not fields:
            return None
        since_boot = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, since_boot - int(fields[19]) / _TICKS_PER_S)

    def _is_ours(self, pid: int) -> bool:
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return self.identity.encode() in arguments  # a zombie has no arguments, so it counts as gone


@dataclass(frozen=True)
class Pinned:
    """An open pidfd."""

    descriptor: int

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal; false when it has ended."""
        try:
            signal.pidfd_send_signal(self.descriptor, number)
        except ProcessLookupError:
            return False
        return True

    def wait_for_end(self, timeout_s: float) -> bool:
        """Whether it has ended, its ports and files closed, within `timeout_s`."""
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def close(self) -> None:
        """Let go."""
        os.close(self.descriptor)


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state (field 3) on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
