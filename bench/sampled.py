"""`python -m bench.sampled OUT VERB ...`: the sidecar's own command line, with a sampler inside.

Each thread has a timer on its own CPU clock and a signal of its own: when it has computed for some milliseconds, the
signal's handler (on the main thread, as Python has it) looks at that thread's stack, and what it has used since its
last look (/proc/self/task/ID/schedstat, ns) goes to what the stack says. So a thread is not met asleep, and all its CPU
is accounted for, however coarse the kernel's tick; what the handler costs is taken off. A worker that has just finished
its job, and a thread without a Python stack (libzmq's), is known by its name. Unlike cProfile it slows nothing down
between two looks. Cycles are collected wherever something happens to be made: that is timed, and a stage of its own.

Attribution: the innermost frame that belongs to a stage decides, so C calls count for whoever calls them. A signal is
handled between two bytecodes: a long C call is seen at its end, in the function that called it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

EVERY_NS = 2_000_000  # the kernel may round it up to its tick
SIGEV_THREAD_ID = 4

# In this order; a part of the file's path, the functions (none: all of them), the stage.
STAGES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("/sidecar/feed.py", (), "receive"),
    ("/sidecar/record.py", (), "receive"),
    ("/zmq/", (), "receive"),
    ("/sidecar/wire.py", (), "decode"),
    ("/msgpack/", (), "decode"),
    ("/sidecar/tape.py", (), "tape"),
    ("/sidecar/ledger.py", (), "fold"),
    ("/sidecar/symbols.py", (), "fold"),
    ("/sidecar/batch.py", (), "encode"),
    ("/sidecar/store/encode.py", (), "encode"),
    ("/sidecar/pipeline.py", ("_ack",), "ack"),
    ("/sidecar/settle.py", ("_note_ack", "_note_submit"), "ack"),
    ("/sidecar/pipeline.py", (), "pipeline"),
    ("/sidecar/store/", (), "driver"),
    ("/cassandra/", (), "driver"),
    ("/sidecar/settle.py", (), "settle loop"),
    ("/sidecar/life.py", (), "settle loop"),
    ("/sidecar/service.py", (), "settle loop"),
    ("/logging/", (), "log"),
    ("/sidecar/cli/logs.py", (), "log"),
    ("/asyncio/", (), "event loop"),
    ("/uvloop/", (), "event loop"),
)
NAMES = (("ZMQ", "receive"), ("tape", "tape"), ("sqlite", "driver"), ("Task Scheduler", "driver"))


class Sampler:
    """Collects (time, thread, stage, function, CPU in ns)."""

    def __init__(self) -> None:
        self.samples: list[tuple[int, str, str, str, int]] = []
        self._cpu_ns: dict[int, int] = {}
        self._stage_of: dict[CodeType, str | None] = {}
        self._own_ns = 0
        self._main = threading.get_native_id()
        self._collecting = self._collecting_ns = 0  # the thread that does, and since when
        self._collected_ns: dict[int, int] = {}  # by thread
        self._watched: dict[int, int] = {}  # thread: its signal
        self._thread_of: dict[int, threading.Thread] = {}  # signal: thread

    def start(self) -> None:
        """Begin, with the main thread; the others are found by and by."""
        self._watch(threading.main_thread())
        gc.callbacks.append(self._note_collection)

    def stop(self) -> None:
        """End."""
        gc.callbacks.remove(self._note_collection)
        for number in self._thread_of:
            signal.signal(number, signal.SIG_IGN)

    def _watch(self, thread: threading.Thread) -> None:
        number = signal.SIGRTMIN + 1 + len(self._watched)
        if thread.native_id is None or number > signal.SIGRTMAX:
            return
        self._watched[thread.native_id] = number
        self._thread_of[number] = thread
        self._used_ns(thread.native_id)
        signal.signal(number, self._look)
        signal.siginterrupt(number, False)
        start_thread_timer(thread.native_id, number, EVERY_NS)

    def _note_collection(self, phase: str, _: object) -> None:
        """Time a collection; there is never a second one under way."""
        if phase == "start":
            self._collecting = threading.get_native_id()
            self._collecting_ns = time.thread_time_ns()
        else:
            self._add_collected(self._collecting)
            self._collecting = 0

    def _add_collected(self, thread_id: int) -> None:
        now_ns = time.thread_time_ns()
        self._collected_ns[thread_id] = self._collected_ns.get(thread_id, 0) + now_ns - self._collecting_ns
        self._collecting_ns = now_ns

    def _look(self, number: int, interrupted: FrameType | None) -> None:
        begun_ns = time.thread_time_ns()
        thread = self._thread_of[number]
        at_us, used_ns = time.time_ns() // 1_000, self._used_ns(thread.native_id or 0)
        if thread.native_id == self._main:
            frame, label = interrupted, "main"
            if (
                self._collecting == self._main
            ):  # a signal that came meanwhile is handled at the end, in our own callback
                self._add_collected(self._main)
            self._look_around(at_us)
        else:
            frame, label = sys._current_frames().get(thread.ident or 0), thread.name  # noqa: SLF001 - the only way
        stage, function = self._place(frame) if frame is not None else ("other", "(ended)")
        if stage == "other":
            stage = _stage_of_thread(label) or stage
        if collected_ns := min(self._collected_ns.pop(thread.native_id or 0, 0), used_ns):
            self.samples.append((at_us, label, "collector", "gc", collected_ns))
        self.samples.append((at_us, label, stage, function, used_ns - collected_ns))
        self._own_ns += time.thread_time_ns() - begun_ns

    def _look_around(self, at_us: int) -> None:
        """Find new threads, and note what those without a Python stack have used."""
        threads = {thread.native_id: thread for thread in threading.enumerate()}
        for name in os.listdir("/proc/self/task"):  # noqa: PTH208 - a name is all that is wanted, quickly
            thread_id = int(name)
            if thread_id in self._watched:
                continue
            thread = threads.get(thread_id)
            if thread is not None:
                self._watch(thread)
            elif (used_ns := self._used_ns(thread_id)) > 0:
                label = _native_name(thread_id)
                self.samples.append((at_us, label, _stage_of_thread(label) or "native", "(native)", used_ns))

    def _used_ns(self, thread_id: int) -> int:
        """Give the CPU of a thread since the last look, without our own."""
        try:
            with open(f"/proc/self/task/{thread_id}/schedstat", "rb") as file:  # noqa: PTH123 - as quick as can be
                now_ns = int(file.read().split()[0])
        except OSError:  # it has just ended
            return 0
        used_ns = now_ns - self._cpu_ns.get(thread_id, now_ns)
        self._cpu_ns[thread_id] = now_ns
        if thread_id == self._main:
            used_ns -= self._own_ns
            self._own_ns = 0
        return used_ns

    def _place(self, frame: FrameType) -> tuple[str, str]:
        """Give the stage of a stack, and the function it stands in."""
        if frame.f_code.co_filename == __file__ and frame.f_back is not None:
            frame = frame.f_back
        outer: FrameType | None = frame
        while outer is not None:
            code = outer.f_code
            stage = self._stage_of.get(code, "")
            if stage == "":
                stage = self._stage_of[code] = _stage(code)
            if stage is not None:
                return stage, _function(outer, frame)
            outer = outer.f_back
        return "other", _function(frame, frame)


class _Sigevent(ctypes.Structure):
    """`struct sigevent` of Linux: the signal goes to one thread."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread_id", ctypes.c_int),
        ("padding", ctypes.c_char * 44),
    )


def start_thread_timer(thread_id: int, number: int, every_ns: int) -> None:
    """Send a signal to a thread each time it has computed for so long; `signal.setitimer` knows no threads."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "timer_create"):  # before glibc 2.34
        library = ctypes.CDLL("librt.so.1", use_errno=True)
    clock = ~thread_id << 3 | 6  # the CPU clock of that thread (MAKE_THREAD_CPUCLOCK, CPUCLOCK_SCHED)
    event = _Sigevent(signo=number, notify=SIGEV_THREAD_ID, thread_id=thread_id)
    timer = ctypes.c_void_p()
    if library.timer_create(clock, ctypes.byref(event), ctypes.byref(timer)):
        raise OSError(ctypes.get_errno(), "timer_create")
    interval = (ctypes.c_long * 4)(0, every_ns, 0, every_ns)  # struct itimerspec
    if library.timer_settime(timer, 0, ctypes.byref(interval), None):
        raise OSError(ctypes.get_errno(), "timer_settime")


def _stage_of_thread(name: str) -> str | None:
    return next((stage for part, stage in NAMES if name.startswith(part)), None)


def _stage(code: CodeType) -> str | None:
    path = code.co_filename
    for part, functions, stage in STAGES:
        if part in path and (not functions or code.co_name in functions):
            return stage
    return None


def _function(frame: FrameType, inner: FrameType) -> str:
    code = frame.f_code
    name = f"{Path(code.co_filename).name}:{code.co_qualname}:{frame.f_lineno}"
    return name if inner is frame else f"{name} > {inner.f_code.co_qualname}"


def _native_name(thread_id: int) -> str:
    try:
        return Path(f"/proc/self/task/{thread_id}/comm").read_text().strip()
    except OSError:
        return "gone"


def main() -> int:
    """Run the sidecar under the sampler; write what was seen to OUT at the end."""
    from sidecar.cli import main as sidecar_main

    out = Path(sys.argv[1])
    sampler = Sampler()
    sampler.start()
    status: Any = 1
    try:
        status = sidecar_main(sys.argv[2:])
    finally:
        sampler.stop()
        out.write_text(json.dumps(sampler.samples))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
