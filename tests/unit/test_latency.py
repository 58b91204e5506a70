"""How long a trade takes: what is measured, what a sample stands for, and what is left out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from sidecar.batch import Batch
from sidecar.events import Event
from sidecar.latency import BOUNDS_US, SAMPLE_EVERY_US, Acknowledged, Histogram, quantile_us
from sidecar.tape import Tape, TapeReader, decode_recorded
from tests.streams import pack, trade_fields

RECORDED_AT_US = 1_000_000_000


class Clock:
    def __init__(self) -> None:
        self.now_us = RECORDED_AT_US

    def __call__(self) -> int:
        return self.now_us


def batch(first: int, last: int) -> Batch:
    return Batch("main", first, last, 0, {}, [], [], {}, {}, last - first + 1, 0)


def event(sequence: int, **other: object) -> Event:
    return decode_recorded(pack(trade_fields(sequence, **other)))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reader(tmp_path: Path, clock: Clock) -> Iterator[TapeReader]:
    """A tape with events 1 to 100, all recorded at RECORDED_AT_US; the even ones were sent 2 ms before that."""
    tape = Tape(tmp_path / "tape.db", size_bytes_max=1 << 30, now_us=clock)
    for n in range(1, 101):
        tape.append(event(n, **({} if n % 2 else {"ts_us": RECORDED_AT_US - 2_000})))
    asyncio.run(tape.commit(tape.take_turn()))
    tape.close()
    with closing(TapeReader(tmp_path / "tape.db")) as opened:
        yield opened


def counted(histogram: Histogram) -> dict[int, int]:
    return {bound: count for bound, count in zip(BOUNDS_US, histogram.counts, strict=False) if count}


def test_a_sample_stands_for_all_that_was_acknowledged_since_the_one_before(reader: TapeReader, clock: Clock) -> None:
    acknowledged = Acknowledged(clock)
    acknowledged.begin(reader, 1, 0)
    clock.now_us += 4_000
    acknowledged.note(batch(1, 1).span)
    clock.now_us += 1_000  # too early for the next
    acknowledged.note(batch(2, 30).span)
    clock.now_us = RECORDED_AT_US + 10_000_000  # ten seconds of silence: everybody behind it waited
    acknowledged.note(batch(31, 40).span)
    assert (acknowledged.batches_total, acknowledged.events_total) == (3, 40)
    assert counted(acknowledged.since_recorded) == {5_000: 1, 10_000_000: 39}
    assert acknowledged.since_recorded.sum_us == 4_000 + 39 * 10_000_000
    assert counted(acknowledged.since_sent) == {30_000_000: 39}, "sent 2 ms before; the odd one carries no stamp"


def test_what_was_acknowledged_before_is_counted_and_not_measured(reader: TapeReader, clock: Clock) -> None:
    acknowledged = Acknowledged(clock)
    acknowledged.begin(reader, 1, acked_to=50)
    clock.now_us += 3_600_000_000  # a start, an hour later: replayed from `durable`
    acknowledged.note(batch(1, 50).span)
    assert (acknowledged.events_total, sum(acknowledged.since_recorded.counts)) == (50, 0)
    acknowledged.note(batch(51, 52).span)
    assert counted(acknowledged.since_recorded) == {3_600_000_000: 2}
    clock.now_us += SAMPLE_EVERY_US
    acknowledged.begin(reader, 1, acked_to=20)  # a new life, from further back
    acknowledged.note(batch(21, 52).span)
    assert sum(acknowledged.since_recorded.counts) == 2


def test_another_stream_is_measured_from_its_own_beginning(reader: TapeReader, clock: Clock) -> None:
    acknowledged = Acknowledged(clock)
    acknowledged.begin(reader, 7, acked_to=5_000)
    acknowledged.begin(reader, 1, acked_to=0)
    acknowledged.note(batch(1, 3).span)
    assert sum(acknowledged.since_recorded.counts) == 3


def test_an_event_that_is_not_on_the_tape_is_made_up_for_by_the_next_sample(reader: TapeReader, clock: Clock) -> None:
    acknowledged = Acknowledged(clock)
    acknowledged.begin(reader, 1, 90)
    acknowledged.note(batch(91, 120).span)  # ends in an accepted gap
    assert sum(acknowledged.since_recorded.counts) == 0
    acknowledged.begin(reader, 2, 120)  # nor is there anything of this session
    clock.now_us += SAMPLE_EVERY_US
    acknowledged.note(batch(121, 122).span)
    assert (acknowledged.events_total, sum(acknowledged.since_recorded.counts)) == (32, 0)


def test_a_clock_that_was_set_back_counts_as_no_time() -> None:
    histogram = Histogram()
    histogram.add(-5, 1)
    histogram.add(BOUNDS_US[-1] + 1, 2)
    assert (histogram.counts[0], histogram.counts[-1]) == (1, 2)


@pytest.mark.parametrize(
    "counts, part, expected",
    [
        ({}, 0.5, None),
        ({0: 10}, 0.5, 250.0),  # halfway through 0 … 0.5 ms
        ({0: 10}, 1.0, 500.0),
        ({3: 99, 10: 1}, 0.5, 1_500 + 500 * 50 / 99),
        ({3: 99, 10: 1}, 0.99, 2_000.0),
        ({3: 99, 10: 1}, 0.995, 25_000.0),
        ({len(BOUNDS_US): 1}, 0.5, float(BOUNDS_US[-1])),  # above all bounds: no more is known
    ],
)
def test_quantiles(counts: dict[int, int], part: float, expected: float | None) -> None:
    found = quantile_us([counts.get(at, 0) for at in range(len(BOUNDS_US) + 1)], part)
    assert found == (None if expected is None else pytest.approx(expected))
