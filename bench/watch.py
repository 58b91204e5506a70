"""What a process costs, read from /proc by a thread of its own: CPU, resident memory, threads, open files.

CPU comes in ticks of 10 ms: a figure a trade needs a run of a second or more to be good to one percent.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple, Self

from bench import machine

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Sample(NamedTuple):
    """One look at a process."""

    at_us: int
    cpu_s: float
    rss_bytes: int
    threads: int
    files: int
    machine_s: float  # CPU of all processes together
    idle_s: float  # of all processors


class Watch:
    """Looks at a process every `every_s` until it ends or the block does."""

    def __init__(self, pid: int, *, every_s: float = 0.05) -> None:
        self.samples: list[Sample] = []
        self._pid = pid
        self._every_s = every_s
        self._over = threading.Event()
        self._lock = threading.Lock()  # samples are in the order of their time
        self._thread = threading.Thread(target=self._look_on, name=f"watch-{pid}", daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _look_on(self) -> None:
        while not self._over.wait(self._every_s) and self._look():
            pass

    def _look(self) -> bool:
        with self._lock:
            sample = look(self._pid)
            if sample is not None:
                self.samples.append(sample)
            return sample is not None

    def cpu_s(self, begin_us: int, end_us: int) -> float:
        """Give the CPU time between two moments of the wall clock, interpolated."""
        return self._passed("cpu_s", begin_us, end_us)

    def others_cpu_s(self, begin_us: int, end_us: int) -> float:
        """Give the CPU time of all other processes of this machine between two moments: mostly the database's."""
        return self._passed("machine_s", begin_us, end_us) - self.cpu_s(begin_us, end_us)

    def idle_s(self, begin_us: int, end_us: int) -> float:
        """Give the time that the machine's processors idled between two moments."""
        return self._passed("idle_s", begin_us, end_us)

    def _passed(self, what: str, begin_us: int, end_us: int) -> float:
        if self._thread.is_alive() and self.samples[-1].at_us < end_us:
            self._look()  # else what passed since the last look would be missing
        return self._at(what, end_us) - self._at(what, begin_us)

    def _at(self, what: str, at_us: int) -> float:
        samples = self.samples
        place = bisect_right(samples, at_us, key=lambda sample: sample.at_us)
        if place == 0 or place == len(samples):
            last: float = getattr(samples[min(place, len(samples) - 1)], what)
            return last
        before, after = samples[place - 1], samples[place]
        share = (at_us - before.at_us) / (after.at_us - before.at_us)
        was: float = getattr(before, what)
        now: float = getattr(after, what)
        return was + share * (now - was)

    def rss_bytes(self, at_us: int) -> int:
        """Give the resident memory at a moment."""
        place = bisect_right(self.samples, at_us, key=lambda sample: sample.at_us)
        return self.samples[max(place - 1, 0)].rss_bytes

    @property
    def rss_bytes_max(self) -> int:
        """Give the largest resident memory seen."""
        return max(sample.rss_bytes for sample in self.samples)


def look(pid: int) -> Sample | None:
    """Look at a process once; None when it is gone."""
    folder = Path("/proc", str(pid))
    try:
        stat = (folder / "stat").read_text()
        files = len(os.listdir(folder / "fd"))  # noqa: PTH208 - their number is all that is wanted
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # from the third on; the name before may hold anything
    if fields[0] in "ZX":
        return None
    user, system, threads, pages = int(fields[11]), int(fields[12]), int(fields[17]), int(fields[21])
    cpu_s = (user + system) / machine.TICKS_A_S
    return Sample(time.time_ns() // 1_000, cpu_s, pages * PAGE_BYTES, threads, files, *machine.cpu_s())
