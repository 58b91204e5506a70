"""Numbers for Prometheus: one table, read when somebody asks.

A metric is a line of a table below: its name, what it says, and where the number stands in the running parts. Nothing
is counted here; a part that has something to tell counts it in a plain attribute, and gets a line. Base units
throughout: seconds, bytes; `_total` for what only grows while the process lives. The alert rules and the dashboard in
scripts/ name these, OPERATIONS.md explains them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.registry import Collector

from sidecar import __version__
from sidecar.latency import BOUNDS_US, Histogram
from sidecar.watch import Watch

STATES: Final = ("idle", "running", "waiting", "halted", "paused")


class _Line(NamedTuple):
    """One metric: a counter when its name ends with `_total`, else a gauge; `read` gives None when there is nothing."""

    name: str
    says: str
    read: Callable[[Any], float | None]


# The recording half.
RECORDING: Final[tuple[_Line, ...]] = (
    _Line("frames_received_total", "Frames taken from the socket.", lambda r: r.frames_total),
    _Line("frames_malformed_total", "Frames without a place in the sequence, over the tape's life.",
          lambda r: r.tape.malformed_total),
    _Line("frames_duplicate_total", "Frames that were on the tape already.", lambda r: r.tape.duplicates_total),
    _Line("frames_other_topic_total", "Frames of longer topics that begin with ours.", lambda r: r.other_topics_total),
    _Line("events_recorded_total", "Events put on the tape.", lambda r: r.tape.recorded_total),
    _Line("last_frame_timestamp_seconds", "When the newest frame was heard.", lambda r: r.heard_at_us / 1e6 or None),
    _Line("engine_silent", "1 while the engine is silent: not heard for so long that it is called that.",
          lambda r: r.silent_since_us > 0),
    _Line("engine_not_trusted", "1 while whoever answers as the engine did not prove to be it (CURVE).",
          lambda r: r.refused is not None),
    _Line("recorder_pending_frames", "Frames that wait for the next commit.", lambda r: r.tape.pending_frames),
    _Line("tape_full", "1 while recording stands still because the tape or its disk is full.",
          lambda r: r.tape.full is not None),
)  # fmt: skip

# The settling half. What counts per life is summed over lives by Settler.counts.
SETTLING: Final[tuple[_Line, ...]] = (
    _Line("events_acknowledged_total", "Events whose batch the store acknowledged, replayed ones again.",
          lambda s: s.acknowledged.events_total),
    _Line("batches_acknowledged_total", "Batches that the store acknowledged.", lambda s: s.acknowledged.batches_total),
    _Line("batch_retries_total", "Batches sent again because their outcome was unknown.",
          lambda s: s.counts()["retries"]),
    _Line("batches_in_flight", "Batches under way to the store.",
          lambda s: s.life.pipeline.unacked_batches if s.life else 0),
    _Line("postings_skipped_total", "Postings that the account's row had counted already.",
          lambda s: s.counts()["skipped"]),
    _Line("postings_below_zero_total", "Postings that left an account below zero.", lambda s: s.counts()["negative"]),
    _Line("lives_total", "Lives of the settle loop: the first, and one for each time it started over.",
          lambda s: s.lives),
    _Line("accounts_in_memory", "Accounts held in memory.", lambda s: len(s.life.ledger.accounts) if s.life else 0),
    _Line("store_outages_total", "Times a database node was away and is back.", lambda s: s.store.outages),
    _Line("store_steady", "1 while all known database nodes are connected: durable moves only then.",
          lambda s: s.store.steady_since is not None),
    _Line("store_nodes_away", "Known database nodes that don't answer; `sidecar status` and the log name them.",
          lambda s: len(s.store.nodes_away)),
)  # fmt: skip

# The proofs beside settlement.
PROVING: Final[tuple[_Line, ...]] = (
    _Line("reconcile_runs_total", "Proofs of the ledger that were finished.", lambda p: p.runs_total),
    _Line("reconcile_failed_total", "Proofs that could not be finished.", lambda p: p.failed_total),
    _Line("reconcile_running", "1 while a proof is under way.", lambda p: p.is_running),
    _Line("reconcile_findings", "Findings of the last proof that finished.",
          lambda p: p.findings if p.finished_at_s else None),
    _Line("reconcile_not_checked", "Rows that the last proof could not check.",
          lambda p: p.not_checked if p.finished_at_s else None),
    _Line("reconcile_finished_timestamp_seconds", "When the last proof finished.", lambda p: p.finished_at_s or None),
    _Line("reconcile_duration_seconds", "How long the last proof took.",
          lambda p: p.duration_s if p.finished_at_s else None),
)  # fmt: skip

# How each stream stands, as `sidecar status` says it (the look of the last second): the engine's, and its late streams.
POSITIONS: Final[tuple[_Line, ...]] = (
    _Line("taped_sequence", "Highest sequence on the tape.", lambda said: said.get("taped")),
    _Line("acked_sequence", "End of the contiguous acknowledged run.", lambda said: said.get("acked")),
    _Line("durable_sequence", "Where a restart begins.", lambda said: said.get("durable")),
    _Line("lag_events", "Recorded and not yet acknowledged.", lambda said: said.get("lag_events")),
)  # fmt: skip

# What else the look of the last second has found.
STANDING: Final[tuple[_Line, ...]] = (
    _Line("holes", "Ranges of sequences that are missing.", lambda w: _holes(w)[0]),
    _Line("missing_events", "Sequences that are missing.", lambda w: _holes(w)[1]),
    _Line("replay_filled_total", "Frames that replay brought.",
          lambda w: (w.standing.get("replay") or {}).get("filled_total")),
    _Line("sessions", "Sessions on the tape: the first, and one for each time the engine contradicted itself.",
          lambda w: w.standing.get("sessions")),
    _Line("rejected_events_total", "Rejected events of this stream in the store, over all its time.",
          lambda w: w.rejected),
    _Line("tape_used_bytes", "What the tape's content takes.", lambda w: w.disk and w.disk.used_bytes),
    _Line("tape_file_bytes", "What the tape's files take on disk.", lambda w: w.disk and w.disk.file_bytes),
    _Line("tape_size_max_bytes", "Where recording stops: tape.size_bytes_max.", lambda w: w.tape_size_bytes_max),
    _Line("tape_disk_free_bytes", "Room left on the tape's file system.", lambda w: w.disk and w.disk.free_bytes),
    _Line("start_timestamp_seconds", "When this process began.", lambda w: w.started_at_us / 1e6),
    _Line("loop_lag_seconds", "How late the loop woke up at the last look.", lambda w: w.loop_lag_s),
    _Line("last_look_timestamp_seconds", "When the tape was last looked at.", lambda w: w.looked_at_us / 1e6),
)  # fmt: skip


def registry(watch: Watch) -> CollectorRegistry:
    """Give what an exposition is made from: this process's parts, and the process itself."""
    made = CollectorRegistry()
    made.register(_Parts(watch))
    ProcessCollector(registry=made)
    return made


class _Parts(Collector):
    """Reads the tables."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def describe(self) -> list[Any]:
        return []  # asked when it is registered; nothing need be read for it

    def collect(self) -> Iterator[Any]:
        watch, stream = self._watch, self._watch.stream
        standings = [watch.standing | {"stream": stream}, *watch.standing.get("late", ())]
        build = InfoMetricFamily("sidecar_build", "The version that runs, and its store.", labels=["stream"])
        build.add_metric([stream], {"version": __version__, "store": watch.store_name})
        yield build
        yield from _families(RECORDING, {stream: watch.recorder})
        yield from _families(SETTLING, {stream: watch.settler})
        yield from _families(PROVING, {stream: watch.proofs})
        yield from _families(POSITIONS, {said["stream"]: said for said in standings})
        yield from _families(STANDING, {stream: watch})
        states = GaugeMetricFamily("sidecar_state", "1 for the state of settlement.", labels=["stream", "state"])
        says = "1 by the code of the halt; absent while there is none."
        halted = GaugeMetricFamily("sidecar_halted", says, labels=["stream", "code"])
        for said in standings:
            for name in STATES:
                states.add_metric([said["stream"], name], float(name == said.get("state", "waiting")))
            if said.get("halted"):
                halted.add_metric([said["stream"], said["halted"]["code"]], 1)
        yield states
        yield halted
        if watch.settler is not None:
            acknowledged = watch.settler.acknowledged
            says = "From the event on the tape to its acknowledgement, sampled."
            yield _histogram("sidecar_acknowledge_seconds", says, acknowledged.since_recorded, stream)
            says = "From the engine's own stamp (ts_us) to the acknowledgement, sampled."
            yield _histogram("sidecar_engine_to_acknowledge_seconds", says, acknowledged.since_sent, stream)


def _families(lines: tuple[_Line, ...], parts: Mapping[str, object]) -> Iterator[Any]:
    """Read each line in the parts, by stream; a part that this process lacks is None."""
    for line in lines:
        kind = CounterMetricFamily if line.name.endswith("_total") else GaugeMetricFamily
        family = kind(f"sidecar_{line.name}", line.says, labels=["stream"])
        for stream, part in parts.items():
            value = None if part is None else line.read(part)
            if value is not None:
                family.add_metric([stream], float(value))
        if family.samples:
            yield family


def _histogram(name: str, says: str, histogram: Histogram, stream: str) -> HistogramMetricFamily:
    buckets, below = [], 0
    for bound_us, count in zip(BOUNDS_US, histogram.counts, strict=False):
        below += count
        buckets.append((str(bound_us / 1e6), float(below)))
    buckets.append(("+Inf", float(below + histogram.counts[-1])))
    family = HistogramMetricFamily(name, says, labels=["stream"])
    family.add_metric([stream], buckets, histogram.sum_us / 1e6)
    return family


def _holes(watch: Watch) -> tuple[int, int]:
    holes = watch.standing.get("holes", [])
    return len(holes), sum(last - first + 1 for first, last in holes)
