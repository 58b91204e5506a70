"""What happened when: the engine's journal (sent) and the sidecar's ack log (acknowledged), joined by sequence.

An event's latency is counted from the moment it was *meant* to be sent, as the journal has it, to the first
acknowledgement of a batch that holds it. A rate counts the trades that were acknowledged, and ends with the last
acknowledgement.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any, NamedTuple

from bench import report


class Batch(NamedTuple):
    """One acknowledged batch: its first and last sequence, and when."""

    first: int
    last: int
    acked_us: int


class Sent:
    """What an engine sent, in order of its sequence."""

    def __init__(self, journal: Path) -> None:
        """Read a journal without faults; its lines are taken apart as text, since there are many."""
        self.first_sequence = 0
        self.meant_us = array("q")  # to be sent
        self.actual_us = array("q")
        self.is_trade = bytearray()
        expected = 0
        with journal.open() as lines:
            for line in lines:
                head, _, event = line.partition(',"event":')
                _, sequence, meant, actual = (part.rpartition(":")[2] for part in ("x:0," + head).split(","))
                if not expected:
                    self.first_sequence = expected = int(sequence)
                assert int(sequence) == expected, f"journal: {sequence} follows {expected - 1}"
                expected += 1
                self.meant_us.append(int(meant))
                self.actual_us.append(int(actual))
                self.is_trade.append('"trade_id":' in event)
        assert expected, f"{journal} is empty"
        self.last_sequence = expected - 1
        self.trades = sum(self.is_trade)


def read(ack_log: Path) -> list[Batch]:
    """Read the acknowledged batches in the order of their acknowledgement."""
    found = []
    with ack_log.open() as lines:
        for line in lines:
            if not line.startswith("#"):
                first, last, acked_us = line.split()
                found.append(Batch(int(first), int(last), int(acked_us)))
    return found


class Joined:
    """Each event with the moment of its acknowledgement."""

    def __init__(self, sent: Sent, batches: list[Batch]) -> None:
        """Join; AssertionError when an event was never acknowledged."""
        self.sent = sent
        self.batches = batches
        self.acked_us = array("q", bytes(8 * len(sent.meant_us)))
        for first, last, at_us in batches:
            for place in range(max(first - sent.first_sequence, 0), last - sent.first_sequence + 1):
                if not self.acked_us[place]:
                    self.acked_us[place] = at_us
        assert all(self.acked_us), "an event was sent and never acknowledged"
        self.first_ack_us, self.last_ack_us = min(self.acked_us), max(self.acked_us)

    def trades_per_s(self, begin_us: int) -> float:
        """Give the trades a second from a moment to the last acknowledgement."""
        return self.sent.trades * 1e6 / (self.last_ack_us - begin_us)

    def latencies(self, from_us: int, to_us: int) -> Any:
        """Give the histogram, in us, of the events that were meant to be sent between two moments."""
        found = report.histogram()
        for meant, acked in zip(self.sent.meant_us, self.acked_us, strict=True):
            if from_us <= meant < to_us:
                found.record_value(max(acked - meant, 1))
        return found
