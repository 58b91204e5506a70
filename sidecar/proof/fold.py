"""The fold of one stream's accounts, at two places at once: at each row's last_sequence, and before rows were read.

Pure. Events come in any order, each once; what lies below what earlier proofs verified is not seen again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any, Final

from sidecar.decisions import Agreed
from sidecar.proof.rows import AccountKey

# A fold, as a list: the events of an account at or below `low`, and those above it up to `high`. One of the two bounds
# is the row's last_sequence, the other the position acknowledged before the rows were read.
LOW, HIGH, B_AVAILABLE, B_VERSION, B_SEQUENCE, B_UPDATED, C_AVAILABLE, C_VERSION, C_SEQUENCE, C_FIRST, C_UPDATED = (
    range(11)
)
Fold = list[int]
At = tuple[int, int, int, int]  # available, version, last_sequence, updated_at
NOWHERE: Final[At] = (0, 0, 0, 0)


class Ranges:
    """Sequences without a row, as ranges in order."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self.ranges = sorted(ranges)
        self._firsts = [first for first, _ in self.ranges]
        self._before = [0]
        for first, last in self.ranges:
            self._before.append(self._before[-1] + last - first + 1)

    def __contains__(self, sequence: int) -> bool:
        place = bisect_right(self._firsts, sequence)
        return place > 0 and sequence <= self.ranges[place - 1][1]

    def count_to(self, sequence: int) -> int:
        """Count the sequences at or below one."""
        place = bisect_right(self._firsts, sequence)
        if not place:
            return 0
        first, last = self.ranges[place - 1]
        return self._before[place - 1] + min(last, sequence) - first + 1


class Part:
    """One stream in one proof: what its log says, its positions, and what was counted so far."""

    def __init__(
        self, name: str, agreed: Agreed, *, verified: int, before: int, up_to: int, next_stamp_us: int
    ) -> None:
        """Take the positions: folded by earlier proofs, acknowledged before the rows were read, and after that."""
        self.name = name
        self.agreed = agreed
        self.first = agreed.first_sequence
        self.symbols = agreed.symbols
        self.revenue = agreed.symbols.revenue_user_id
        self.verified = verified
        self.before = before
        self.up_to = up_to
        self.next_stamp_us = next_stamp_us
        self.top = max(before, up_to)
        self.forbids = bool(agreed.gaps or agreed.rejects)
        self.ids: dict[str, int] = {}  # by symbol, the last trade id at `before`
        self.sums: dict[int, int] = {}  # by asset, what ledger events brought in up to `before`
        self.counts = {"trades": 0, "ledger_events": 0, "rejected": 0}  # up to `up_to`, read in this proof
        self.against: dict[AccountKey, list[tuple[int, int]]] = {}  # what a decision forbids: sequence, amount
        self.missing = Ranges()
        self.ahead: dict[AccountKey, int] = {}  # rows above `up_to`
        self.ahead_seen: set[AccountKey] = set()  # those whose newest event has a row
        self.cache: dict[AccountKey, Fold] = {}
        self.dirty: set[AccountKey] = set()  # those of the cache that the file does not have yet
        self.bits: dict[int, bytearray] = {}

    def is_forbidden(self, sequence: int) -> bool:
        """Say whether a decision says that this sequence is never posted."""
        gap = self.agreed.gap_at_or_after(sequence)
        return (gap is not None and gap[0] <= sequence) or sequence in self.agreed.rejects

    def said(self) -> dict[str, Any]:
        """Give what is kept at a checkpoint."""
        return {
            "ids": self.ids,
            "sums": list(self.sums.items()),
            "counts": self.counts,
            "against": [[*key, *each] for key, those in self.against.items() for each in those],
            "ahead_seen": sorted(self.ahead_seen),
        }

    def take_up(self, said: dict[str, Any]) -> None:
        """Go on from what was kept."""
        self.ids = dict(said["ids"])
        self.sums = dict(said["sums"])
        self.counts = dict(said["counts"])
        self.against = {}
        for user, asset, sequence, amount in said["against"]:
            self.against.setdefault((user, asset), []).append((sequence, amount))
        self.ahead_seen = {(user, asset) for user, asset in said["ahead_seen"]}

    def new_fold(self, last_sequence: int | None, base: At) -> Fold:
        """Begin an account's fold from what earlier proofs made of it; `last_sequence` is its row's, None: no row."""
        row_at = -1 if last_sequence is None else self.before if last_sequence > self.up_to else last_sequence
        low, high = min(row_at, self.before), max(row_at, self.before)
        if base[1] and base[2] > low:
            return [low, high, 0, 0, 0, 0, base[0], base[1], base[2], base[2], base[3]]
        return [low, high, *base, 0, 0, 0, 0, 0]

    def at_before(self, fold: Fold) -> At:
        """Give the account at `before`."""
        return _whole(fold) if fold[HIGH] == self.before else _below(fold)

    def at_row(self, fold: Fold) -> At:
        """Give the account at its row's last_sequence."""
        return _whole(fold) if fold[HIGH] != self.before else _below(fold)


def _below(fold: Fold) -> At:
    return fold[B_AVAILABLE], fold[B_VERSION], fold[B_SEQUENCE], fold[B_UPDATED]


def _whole(fold: Fold) -> At:
    if not fold[C_VERSION]:
        return _below(fold)
    return (
        fold[B_AVAILABLE] + fold[C_AVAILABLE], fold[B_VERSION] + fold[C_VERSION], fold[C_SEQUENCE], fold[C_UPDATED],
    )  # fmt: skip


def post(fold: Fold, sequence: int, amount: int, time_us: int) -> None:
    """Add an event to an account's fold; events come in any order."""
    if sequence <= fold[0]:
        fold[2] += amount
        fold[3] += 1
        if sequence > fold[4]:
            fold[4] = sequence
            fold[5] = time_us
    elif sequence <= fold[1]:
        fold[6] += amount
        fold[7] += 1
        if sequence > fold[8]:
            fold[8] = sequence
            fold[10] = time_us
        if sequence < fold[9] or not fold[9]:
            fold[9] = sequence


def fold_of(part: Part, has_row: bool, row_at: int | None, base: list[Any], fold: list[Any]) -> Fold:
    """Give an account's fold as the file has it, or begin it from what was verified and from its row's place."""
    if fold[0] is not None:
        fold[B_AVAILABLE], fold[C_AVAILABLE] = int(fold[B_AVAILABLE]), int(fold[C_AVAILABLE])
        return fold
    verified: At = NOWHERE if base[1] is None else (int(base[0]), base[1], base[2], base[3])
    return part.new_fold((row_at or 0) if has_row else None, verified)


def zeros(bits: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """Give the ranges of places that are 0."""
    begun: int | None = None
    for at, byte in enumerate(bits):
        if (byte == 0xFF and begun is None) or (byte == 0 and begun is not None):
            continue
        for bit in range(8):
            is_set = byte >> bit & 1
            if not is_set and begun is None:
                begun = at * 8 + bit
            elif is_set and begun is not None:
                yield begun, at * 8 + bit - 1
                begun = None
    if begun is not None:
        yield begun, len(bits) * 8 - 1


def without(ranges: list[tuple[int, int]], gaps: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Take accepted gaps out of ranges."""
    for gap_first, gap_last in gaps:
        left = []
        for first, last in ranges:
            if gap_last < first or gap_first > last:
                left.append((first, last))
                continue
            if first < gap_first:
                left.append((first, gap_first - 1))
            if last > gap_last:
                left.append((gap_last + 1, last))
        ranges = left
    return ranges
