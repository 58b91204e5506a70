"""Looks at the running parts once a second: how they stand, and how the last minutes went.

The parts count for themselves, in plain attributes; nothing here is on the way of a trade. Whoever asks (the status
page, Prometheus, systemd) gets the last look, so any number of askers costs one look a second. What has to be read
from a file is read in a thread; a disk that hangs holds up the look, not the loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final, NamedTuple

from sidecar import late, standing
from sidecar.errors import StoreError, TapeError
from sidecar.latency import BOUNDS_US, quantile_us
from sidecar.proof.hourly import Numbers
from sidecar.record import Recorder
from sidecar.settle import Settler
from sidecar.tape import TapeReader, read_settled

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 1.0
SAMPLES_MAX: Final = 601  # ten minutes
REJECTED_EVERY_S: Final = 10.0
REJECTED_TIMEOUT_S: Final = 60.0


class Sample(NamedTuple):
    """The counters at one moment; `at_s` by the loop's clock, `latency_counts` as a Histogram's."""

    at_s: float
    frames: int
    recorded: int
    acked: int
    batches: int
    latency_counts: tuple[int, ...]


class Span(NamedTuple):
    """What happened between two samples: rates a second, the latency in ms; None where nothing can be said."""

    seconds: float
    recorded_per_s: float
    acked_per_s: float
    batch_events: float | None
    p50_ms: float | None
    p99_ms: float | None


class Disk(NamedTuple):
    """What the tape takes, and what its file system has left, in bytes."""

    used_bytes: int
    file_bytes: int
    free_bytes: int


def span(first: Sample, last: Sample) -> Span:
    """Say what happened from one sample to a later one."""
    seconds = max(last.at_s - first.at_s, 1e-9)
    acked, batches = last.acked - first.acked, last.batches - first.batches
    counts = [later - earlier for earlier, later in zip(first.latency_counts, last.latency_counts, strict=True)]
    p50_us, p99_us = quantile_us(counts, 0.5), quantile_us(counts, 0.99)
    return Span(
        seconds=seconds,
        recorded_per_s=(last.recorded - first.recorded) / seconds,
        acked_per_s=acked / seconds,
        batch_events=acked / batches if batches else None,
        p50_ms=None if p50_us is None else p50_us / 1_000,
        p99_ms=None if p99_us is None else p99_us / 1_000,
    )


class Watch:
    """The one who looks; `recorder` and `settler` are the halves that this process has."""

    def __init__(
        self,
        *,
        stream: str,
        first_sequence: int,
        tape_path: Path,
        tape_size_bytes_max: int,
        store_name: str,
        recorder: Recorder | None,
        settler: Settler | None,
        proofs: Numbers | None = None,
        replay_configured: bool = False,
    ) -> None:
        """Take the parts to look at, the bounds that their numbers are shown beside, and how proofs went."""
        assert recorder or settler
        self.stream = stream  # the one that settlement is at: it may go on with another
        self.proofs = proofs
        self.tape_path = tape_path
        self.tape_size_bytes_max = tape_size_bytes_max
        self.store_name = store_name
        self.recorder = recorder
        self.settler = settler
        self.started_at_us = self.looked_at_us = time.time_ns() // 1000
        self.samples: deque[Sample] = deque(maxlen=SAMPLES_MAX)
        self.loop_lag_s = 0.0
        self.disk: Disk | None = None
        self.rejected: int | None = None  # until the store has been asked
        self.on_look: list[Callable[[], None]] = []
        self._configured = stream
        self._replay_configured = replay_configured
        self._first_sequence = first_sequence
        self._rejected_to = 0
        self._rejected_at = -REJECTED_EVERY_S
        self._counting: asyncio.Task[None] | None = None
        self.standing: dict[str, Any] = {}

    async def run(self) -> None:
        """Look once a second until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self.look()
                due = loop.time() + LOOK_EVERY_S
                await asyncio.sleep(LOOK_EVERY_S)
                self.loop_lag_s = max(loop.time() - due, 0.0)
        finally:
            if self._counting is not None:
                self._counting.cancel()

    async def look(self) -> None:
        """Look once, and tell those who want to know."""
        self.samples.append(self._sample())
        told = self.settler.said() if self.settler is not None else None
        if told is not None and told.get("stream", self.stream) != self.stream:
            self.rejected, self._rejected_to = None, 0
        try:
            self.standing, self.disk = await asyncio.to_thread(self._read_files, told)
            self.stream = self.standing["stream"]
            self.looked_at_us = time.time_ns() // 1000
        except (TapeError, OSError, sqlite3.Error) as error:
            log.warning("look_failed", extra={"error": str(error)})
            self.standing |= told or {}
        self._count_rejected()
        for tell in self.on_look:
            tell()

    def _sample(self) -> Sample:
        recorder, settler = self.recorder, self.settler
        acknowledged = settler.acknowledged if settler else None
        return Sample(
            at_s=asyncio.get_running_loop().time(),
            frames=recorder.frames_total if recorder else 0,
            recorded=recorder.tape.recorded_total if recorder else 0,
            acked=acknowledged.events_total if acknowledged else 0,
            batches=acknowledged.batches_total if acknowledged else 0,
            latency_counts=tuple(acknowledged.since_recorded.counts if acknowledged else [0] * (len(BOUNDS_US) + 1)),
        )

    def _read_files(self, told: dict[str, Any] | None) -> tuple[dict[str, Any], Disk | None]:
        if told is None:  # the settler is another process
            told = read_settled(self.tape_path) or {}
        stream, first_sequence = self._configured, self._first_sequence
        if told.get("configured") == stream:
            stream, first_sequence = told["stream"], told["first_sequence"]
        elif told.get("stream") != stream:
            told = {}
        agreed = self.settler.agreed if self.settler is not None else None
        in_store = {"gaps": agreed.gaps if agreed else (), "rejected": self.rejected or 0}
        said = standing.put_together(
            self.tape_path, stream, first_sequence, told, in_store, replay_configured=self._replay_configured
        )
        said["late"] = late.standing(self.tape_path)
        disk = None
        if self.tape_path.exists():
            with closing(TapeReader(self.tape_path)) as reader:
                used_bytes = reader.used_bytes()
            beside = [self.tape_path, self.tape_path.with_name(self.tape_path.name + "-wal")]
            file_bytes = sum(path.stat().st_size for path in beside if path.exists())
            room = os.statvfs(self.tape_path)
            disk = Disk(used_bytes, file_bytes, room.f_bavail * room.f_frsize)
        return said, disk

    def _count_rejected(self) -> None:
        """Count the store's rejected events now and then, each time only the new ones; at most one count under way."""
        settler, now = self.settler, asyncio.get_running_loop().time()
        if settler is None or settler.agreed is None or settler.life is None:
            return
        acked = settler.life.pipeline.acked.sequence
        busy = self._counting is not None and not self._counting.done()
        if (
            busy
            or now < self._rejected_at + REJECTED_EVERY_S
            or (acked <= self._rejected_to and self.rejected is not None)
        ):
            return
        self._rejected_at = now
        first = max(self._rejected_to + 1, settler.agreed.first_sequence)
        self._counting = asyncio.create_task(self._count(settler, first, acked))

    async def _count(self, settler: Settler, first: int, last: int) -> None:
        stream = self.stream
        try:
            async with asyncio.timeout(REJECTED_TIMEOUT_S):
                found = await standing.count_rejected(settler.store, stream, first, last) if last >= first else 0
        except (StoreError, TimeoutError) as error:
            log.warning("rejected_not_counted", extra={"error": str(error)})
            return
        if settler.said().get("stream") != stream:
            return  # it has gone on with another meanwhile
        self.rejected = (self.rejected or 0) + found
        self._rejected_to = last

    # --- for those who ask ---

    @property
    def not_ready_because(self) -> str:
        """Say in a word or two what is not as it should be; empty when all is well."""
        if self.recorder is not None and self.recorder.tape.full is not None:
            return "tape full"
        state = self.standing.get("state", "starting")
        if self.settler is not None and state != "running":
            return str(state)
        return ""

    def spans(self, seconds: float) -> list[Span]:
        """Cut the last minutes into pieces of about so many seconds, oldest first."""
        spans: list[Span] = []
        newest_first = reversed(self.samples)
        last = next(newest_first, None)
        for sample in newest_first:
            if last is not None and last.at_s - sample.at_s >= seconds - LOOK_EVERY_S / 2:
                spans.append(span(sample, last))
                last = sample
        return spans[::-1]

    def over(self, seconds: float) -> Span | None:
        """Say what happened in the last so many seconds, or since the start; None before there is a second look."""
        if len(self.samples) < 2:
            return None
        last = self.samples[-1]
        first = next(sample for sample in self.samples if last.at_s - sample.at_s <= seconds + LOOK_EVERY_S / 2)
        return span(first if first is not last else self.samples[-2], last)
