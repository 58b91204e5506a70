"""What faults are caused with: full disks, failing system calls, wrong clocks. What this machine lacks is said loudly.

A test says what it needs: `@pytest.mark.needs("strace")`. Where that is missing the test is left out, with a banner at
the head and at the end of the run (`.ci/run` installs strace and faketime where it can).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Final, Self

from bench.world import ROOT

# --- a disk that gets full --------------------------------------------------------------------------------------------


class SmallDisk:
    """A tmpfs of a few MiB: it gets full as any disk does, and may be made larger while it is used."""

    def __init__(self, folder: Path, size_kib: int) -> None:
        self.folder = folder
        self._size_kib = size_kib

    def __enter__(self) -> Self:
        self.folder.mkdir(exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", f"size={self._size_kib}k", "small-disk", str(self.folder))
        return self

    def __exit__(self, *_: object) -> None:
        _run("umount", "--lazy", str(self.folder))

    def resize(self, size_kib: int) -> None:
        """Make it larger."""
        _run("mount", "-o", f"remount,size={size_kib}k", str(self.folder))

    @property
    def free_bytes(self) -> int:
        """What is left."""
        return shutil.disk_usage(self.folder).free

    def fill(self) -> Path:
        """Take all that is left with a file of somebody else's; give it."""
        filler = self.folder / "of-somebody-else"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4_096)):
                pass
        return filler


@cache
def lacks_mount() -> str | None:
    """Try it: being root is not enough in many containers."""
    with tempfile.TemporaryDirectory() as folder:
        disk = SmallDisk(Path(folder), 64)
        try:
            with disk:
                return None
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            return f"a tmpfs can't be mounted ({said.strip()}): run as root, in a container with --cap-add SYS_ADMIN"


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


# --- system calls that fail -------------------------------------------------------------------------------------------

SYNC_CALLS: Final = ("fsync", "fdatasync")


def failing(log: Path, call: str, error: str, when: int, only: Path | None = None) -> list[str]:
    """Give the command that a process is started under for its `when`-th `call` (on a file) to fail, once.

    The process stays what was started, with its own pid: strace looks on from aside, and ends with it. Every call of
    the kind stands in `log`.
    """
    path = ["--trace-path", str(only)] if only is not None else []
    calls = ",".join(SYNC_CALLS) if call in SYNC_CALLS else call
    inject = f"inject={calls}:error={error}:when={when}"
    return ["strace", "-D", "-f", "-q", "-y", "-o", str(log), *path, "-e", f"trace={calls}", "-e", inject]


@cache
def lacks_strace() -> str | None:
    """Try it: tracing may be forbidden."""
    if shutil.which("strace") is None:
        return "strace is not installed: apt-get install strace"
    done = subprocess.run(["strace", "-qq", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"strace may not trace here: {done.stderr.strip()}"


# --- a clock that is wrong --------------------------------------------------------------------------------------------

_FAKETIME_PLACES: Final = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/local/lib/faketime/libfaketimeMT.so.1")


_CLOCK_LOOK_S: Final = 1  # libfaketime looks at its file so often; each time, and it takes a whole core


class Clock:
    """A wall clock that a test sets, for the processes that are started `under` it, also while they run.

    Only the time of day is moved, as an operator or a time server would: the monotonic clock goes on.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set("+0")

    def set(self, offset: str) -> None:
        """Move it: `-2h`, `+2d`, `+0`; returns when processes that run have noticed."""
        draft = self._file.with_name(f"{self._file.name}.new")
        draft.write_text(f"{offset}\n")
        draft.replace(self._file)
        time.sleep(_CLOCK_LOOK_S + 0.1)

    @property
    def under(self) -> Sequence[str]:
        """The command that a process is started under."""
        library = _faketime()
        assert library is not None, lacks_faketime()
        return [
            "env",
            f"LD_PRELOAD={library}",
            f"FAKETIME_TIMESTAMP_FILE={self._file}",
            f"FAKETIME_CACHE_DURATION={_CLOCK_LOOK_S}",
            "FAKETIME_DONT_FAKE_MONOTONIC=1",
            "FAKETIME_DONT_RESET=1",
        ]


def _faketime() -> Path | None:
    found: Iterator[Path] = (each for place in _FAKETIME_PLACES for each in Path("/").glob(place.lstrip("/")))
    return next(found, None)


def lacks_faketime() -> str | None:
    """Look for the library."""
    return None if _faketime() is not None else "libfaketime is not installed: apt-get install faketime"


# --- a release that was -----------------------------------------------------------------------------------------------

EARLY_COMMIT: Final = "091ac41"  # settled into Cassandra; the first with the checksums of the tape's format 1


def lacks_history() -> str | None:
    """Look for the commit: a copy of the files, or a shallow clone, has no history."""
    command = ["git", "-C", str(ROOT), "cat-file", "-e", f"{EARLY_COMMIT}^{{commit}}"]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return "git is not installed"
    return None if done.returncode == 0 else f"no history with commit {EARLY_COMMIT} here: git fetch --unshallow"


# What is missing and how to get it, or None.
TOOLS: Final[dict[str, Callable[[], str | None]]] = {
    "mount": lacks_mount,
    "strace": lacks_strace,
    "faketime": lacks_faketime,
    "history": lacks_history,
}
