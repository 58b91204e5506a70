"""Cuts the tail off the commit log of a dead node, as a power failure would: its last acknowledged writes vanish.

A segment is a descriptor, then sync sections, each behind a marker (its end, a checksum of segment id and own
position), then zeros up to its preallocated size; a section is mutations: size, checksum, bytes, checksum. Replay ends
quietly at a mutation of size zero, so a segment cut at the border of a mutation and filled with zeros again needs no
-Dcassandra.commitlog.ignorereplayerrors at the next start. What was flushed to an SSTable stays, as it would.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MARKER_BYTES = 8
_OVERHEAD_BYTES = 12  # size and its checksum before a mutation, the checksum of both behind
_TABLE_ID_AT = 9  # behind size, checksum and the number of tables, which is one byte up to 127
_NAME_BASED = 3  # UUID version of the ids of Cassandra's own tables; those of ours are time-based


@dataclass(frozen=True)
class Cut:
    """What was lost: mutations of our tables, of Cassandra's own, and the bytes of both."""

    mutations: int
    system_mutations: int
    bytes: int


def cut_tail(folder: Path, mutations: int) -> Cut:
    """Drop the newest `mutations` writes to our tables, all there are when fewer, and Cassandra's own after the first.

    What Cassandra wrote before the first of ours (its schema, who it is) stays, so that the node can start.
    """
    cuts: dict[Path, int] = {}
    lost, lost_bytes = Cut(0, 0, 0), 0
    seen: dict[Path, int] = {}
    ours = system = 0
    for segment in sorted(folder.glob("CommitLog-*.log"), key=_segment_id, reverse=True):
        for start, end, is_ours in reversed(list(_mutations(segment.read_bytes()))):
            if ours >= mutations:
                break
            seen[segment] = start
            ours += is_ours
            system += not is_ours
            lost_bytes += end - start
            if is_ours:  # the cut may be here; what is only Cassandra's own does not decide
                lost, cuts = Cut(ours, system, lost_bytes), dict(seen)
    for segment, cut_at in cuts.items():  # the newest first: after a crash in here there is still no hole
        with segment.open("r+b") as file:
            size = segment.stat().st_size
            file.truncate(cut_at)
            file.truncate(size)
    return lost


def _segment_id(segment: Path) -> int:
    return int(segment.stem.rsplit("-", 1)[1])


def _mutations(content: bytes) -> Iterator[tuple[int, int, bool]]:
    """Start, end and whether it is ours, of each mutation that replay would see."""
    for begin, section_end in _sections(content):
        at = begin
        while at + _OVERHEAD_BYTES < section_end:
            (size,) = struct.unpack_from(">I", content, at)
            if size == 0:
                return
            end = at + size + _OVERHEAD_BYTES
            uuid_version = content[at + _TABLE_ID_AT + 6] >> 4
            yield at, end, uuid_version != _NAME_BASED
            at = end


def _sections(content: bytes) -> Iterator[tuple[int, int]]:
    if len(content) < 14:  # a segment that was being made
        return
    _version, segment_id, parameters_bytes = struct.unpack_from(">IQH", content)
    at = 14 + parameters_bytes + 4
    while at + _MARKER_BYTES <= len(content):
        end, checksum = struct.unpack_from(">II", content, at)
        expected = zlib.crc32(struct.pack(">III", segment_id & 0xFFFFFFFF, segment_id >> 32, at))
        if checksum != expected or not at < end <= len(content):
            return
        yield at + _MARKER_BYTES, end
        at = end
