"""How long a trade takes: from the engine's stamp, and from the tape, to the store's acknowledgement; sampled.

Nothing is noted for each trade. Once in `SAMPLE_EVERY_US` the newest event of an acknowledged batch is looked up on the
tape, where its time of recording stands, and the engine's own stamp when it carries one. A sample stands for all events
acknowledged since the sample before it: so ten seconds of silence count for everybody who waited, not for one. What is
acknowledged again after a start or an outage is not measured again.
"""

from __future__ import annotations

import sqlite3
from bisect import bisect_left
from collections.abc import Callable
from typing import Final

from sidecar.batch import Span
from sidecar.errors import TapeError
from sidecar.events import Refused
from sidecar.tape import TapeReader, decode_recorded

SAMPLE_EVERY_US: Final = 10_000
# Upper ends of the histogram's buckets, in us: 0.5 ms to an hour.
BOUNDS_US: Final = (
    500, 1_000, 1_500, 2_000, 3_000, 5_000, 7_500, 10_000, 15_000, 20_000, 30_000, 50_000, 75_000, 100_000, 150_000,
    250_000, 500_000, 1_000_000, 2_500_000, 5_000_000, 10_000_000, 30_000_000, 60_000_000, 300_000_000, 3_600_000_000,
)  # fmt: skip


class Histogram:
    """Counts of durations in fixed buckets; the last bucket is what lies above all bounds."""

    def __init__(self) -> None:
        """Begin empty."""
        self.counts = [0] * (len(BOUNDS_US) + 1)
        self.sum_us = 0

    def add(self, duration_us: int, times: int) -> None:
        """Count a duration for so many events; a negative one (a clock that was set) counts as 0."""
        duration_us = max(duration_us, 0)
        self.counts[bisect_left(BOUNDS_US, duration_us)] += times
        self.sum_us += duration_us * times


def quantile_us(counts: list[int], part: float) -> float | None:
    """Give a quantile of counts as a Histogram's, in us, straight lines within a bucket; None when nothing counts."""
    wanted = part * sum(counts)
    if not wanted:
        return None
    below, lower = 0, 0
    for bound, count in zip((*BOUNDS_US, BOUNDS_US[-1]), counts, strict=True):
        if count and below + count >= wanted:
            return lower + (bound - lower) * (wanted - below) / count
        below, lower = below + count, bound
    return float(lower)


class Acknowledged:
    """What was acknowledged in this process, over all lives: batches and events, and samples of how long it took."""

    def __init__(self, now_us: Callable[[], int]) -> None:
        """Take the clock that the tape's times are of."""
        self.batches_total = 0
        self.events_total = 0
        self.since_recorded = Histogram()
        self.since_sent = Histogram()
        self._now_us = now_us
        self._reader: TapeReader | None = None
        self._session = 0
        self._acked_to = 0
        self._events_since = 0
        self._next_at_us = 0

    def begin(self, reader: TapeReader, session: int, acked_to: int) -> None:
        """Begin a life on a tape; events up to `acked_to` were acknowledged before."""
        if session != self._session:
            self._acked_to = 0  # another stream, with sequences of its own
        self._reader, self._session = reader, session
        self._acked_to = max(self._acked_to, acked_to)

    def note(self, span: Span) -> None:
        """Count an acknowledged batch; measure its newest event when it is time for a sample."""
        self.batches_total += 1
        self.events_total += span.events
        if span.last_sequence <= self._acked_to:
            return
        self._acked_to = span.last_sequence
        self._events_since += span.events
        now_us = self._now_us()
        if now_us >= self._next_at_us and self._events_since:
            self._next_at_us = now_us + SAMPLE_EVERY_US
            self._sample(span.last_sequence, now_us)

    def _sample(self, sequence: int, now_us: int) -> None:
        assert self._reader is not None
        try:
            frames = self._reader.frames(self._session, sequence, sequence, 1)
        except (TapeError, sqlite3.Error):  # the settler finds the damage by itself, when it reads
            return
        for _, recorded_at_us, payload in frames:  # none: the end of an accepted gap
            times, self._events_since = self._events_since, 0
            self.since_recorded.add(now_us - recorded_at_us, times)
            event = decode_recorded(payload)
            sent_at_us = None if isinstance(event, Refused) else event.ts_us
            if sent_at_us is not None:
                self.since_sent.add(now_us - sent_at_us, times)
