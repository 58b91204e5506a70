"""What a figure was measured on: processor, memory, versions, commit; a figure without them can't be compared."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TICKS_A_S = os.sysconf("SC_CLK_TCK")
LIBRARIES = ("msgpack", "pyzmq", "uvloop", "cassandra-driver", "hdrhistogram")


def describe() -> dict[str, Any]:
    """Give the machine, as far as it says what it is."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "load_1m": round(os.getloadavg()[0], 2),  # before the run: whoever else was on these cores
    }


def ticks() -> list[int]:
    """Give the machine's CPU ticks so far: user, nice, system, idle, iowait, irq, softirq, steal ..."""
    with Path("/proc/stat").open() as lines:
        return [int(field) for field in lines.readline().split()[1:9]]


def stolen_percent(since: list[int]) -> float:
    """Give the share of the processors that the host gave to others since then."""
    passed = [now - before for now, before in zip(ticks(), since, strict=True)]
    return round(100 * passed[7] / max(sum(passed), 1), 2)


def cpu_s() -> tuple[float, float]:
    """Give what all processes of this machine have used of its processors so far, and what was left idle, in s."""
    user, nice, system, idle, waiting, irq, soft, _ = ticks()
    return (user + nice + system + irq + soft) / TICKS_A_S, (idle + waiting) / TICKS_A_S


def versions() -> dict[str, str | None]:
    """Give the versions of what takes part in every run."""
    import sqlite3

    from sidecar import __version__

    found: dict[str, str | None] = {
        "sidecar": __version__,
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
    }
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def jdk() -> str | None:
    """Give the version of the Java that a node of ours runs on."""
    java = Path(os.environ["JAVA_HOME"], "bin", "java") if os.environ.get("JAVA_HOME") else shutil.which("java")
    if java is None:
        return None
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "([^"]+)"', said)
    return found.group(1) if found else None


def commit() -> str | None:
    """Give the commit that was measured; with a + when the tree differs from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    return head + ("+" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str | None:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # only look
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.machine()
