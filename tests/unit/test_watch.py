"""The one who looks: spans of the last minutes, the count of rejected events, what makes a process not ready."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from sidecar import watch as watch_module
from sidecar.config import Config, parse
from sidecar.latency import BOUNDS_US
from sidecar.service import make_settler, open_store
from sidecar.settle import Settler
from sidecar.store.sqlite import SQLiteStore
from sidecar.tape import Tape, lock, paused_path
from sidecar.watch import Sample, Watch, span
from sidecar.wire import decode
from tests.streams import RULES_TOML, pack, trade_fields


def counts(**at: int) -> tuple[int, ...]:
    return tuple(at.get(f"n{number}", 0) for number in range(len(BOUNDS_US) + 1))


def sample(at_s: float, acked: int = 0, batches: int = 0, *, recorded: int = 0, **latency: int) -> Sample:
    return Sample(at_s, recorded, recorded, acked, batches, counts(**latency))


def test_a_span_says_rates_batches_and_latency() -> None:
    said = span(sample(10.0, 100, 50, recorded=100, n3=7), sample(20.0, 300, 60, recorded=400, n3=7, n7=100))
    assert (said.seconds, said.recorded_per_s, said.acked_per_s, said.batch_events) == (10.0, 30.0, 20.0, 20.0)
    assert said.p50_ms == pytest.approx(8.75)
    assert said.p99_ms == pytest.approx(7.5 + 2.5 * 0.99)


def test_a_span_without_anything_says_so() -> None:
    said = span(sample(1.0, 5, 5), sample(2.0, 5, 5))
    assert (said.acked_per_s, said.batch_events, said.p50_ms, said.p99_ms) == (0.0, None, None, None)


def test_the_last_minutes_are_cut_from_the_newest_look_back() -> None:
    watch = Watch(
        stream="main", first_sequence=1, tape_path=Path("none"), tape_size_bytes_max=1, store_name="sqlite",
        recorder=None, settler=object(),  # type: ignore[arg-type]
    )  # fmt: skip
    assert (watch.over(60), watch.spans(10)) == (None, [])
    for second in range(26):
        watch.samples.append(sample(second * 1.01, acked=second * second))
    spans = watch.spans(10)
    assert [round(one.seconds) for one in spans] == [10, 10]
    assert [round(one.acked_per_s * one.seconds) for one in spans] == [15**2 - 5**2, 25**2 - 15**2]
    minute = watch.over(60)
    assert minute is not None
    assert round(minute.acked_per_s * minute.seconds) == 25**2, "since the start, when that is shorter"
    newest = watch.over(1)
    assert newest is not None
    assert round(newest.acked_per_s * newest.seconds) == 25**2 - 24**2


def settled(folder: Path, story: Callable[[Watch, Settler, Tape], Coroutine[Any, Any, None]], *settings: str) -> None:
    """Run a story beside a settler that settles ten thousand and ten events, three of them rejected."""
    given = [f"tape.path={folder / 'tape.db'}", f"store.sqlite.path={folder / 'settlement.db'}", *settings]
    config: Config = parse(RULES_TOML, given)

    async def run() -> None:
        tape = Tape(config.tape.path, size_bytes_max=1 << 30)
        held = lock(tape.path, "settler")
        settler = make_settler(config, open_store(config), tape.tail)
        watch = Watch(
            stream="main", first_sequence=1, tape_path=tape.path, tape_size_bytes_max=1 << 30, store_name="sqlite",
            recorder=None, settler=settler,
        )  # fmt: skip
        await watch.look()
        assert watch.not_ready_because
        running = asyncio.ensure_future(settler.run())
        try:
            await story(watch, settler, tape)
        finally:
            settler.stop()
            await running
            await settler.store.close()
            tape.close()
            held.close()

    asyncio.run(run())


async def put(tape: Tape, first: int, last: int, rejected: frozenset[int] = frozenset()) -> None:
    for n in range(first, last + 1):
        tape.append(decode(pack(trade_fields(n, **({"price": 0} if n in rejected else {})))))  # type: ignore[arg-type]
    await tape.commit(tape.take_turn())


async def until(watch: Watch, what: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not what():
            await watch.look()
            await asyncio.sleep(0.01)


def test_rejected_events_are_counted_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "REJECTED_EVERY_S", 0.0)
    asked: list[tuple[int, int]] = []
    scan = SQLiteStore.scan_rejected

    def noted(store: SQLiteStore, stream: str, first: int, last: int) -> Any:
        asked.append((first, last))
        return scan(store, stream, first, last)

    monkeypatch.setattr(SQLiteStore, "scan_rejected", noted)

    async def story(watch: Watch, settler: Settler, tape: Tape) -> None:
        await put(tape, 1, 500, frozenset({3, 400}))
        await until(watch, lambda: watch.standing["acked"] == 500 and watch.rejected == 2)
        await put(tape, 501, 600, frozenset({501}))
        await until(watch, lambda: watch.standing["acked"] == 600 and watch.rejected == 3)
        await until(watch, lambda: asked[-1][1] == 600)
        await watch.look()
        assert watch.standing["rejected"] == 3
        assert asked[0][0] == 1
        assert all(one[1] + 1 == other[0] for one, other in itertools.pairwise(asked)), asked

    settled(tmp_path, story)


def test_a_look_says_what_status_says(tmp_path: Path) -> None:
    async def story(watch: Watch, settler: Settler, tape: Tape) -> None:
        await put(tape, 1, 20)
        await put(tape, 23, 25)
        await until(watch, lambda: watch.standing["state"] == "halted")
        await until(watch, lambda: watch.standing["acked"] == 20)
        said = watch.standing
        assert (said["taped"], said["lag_events"], said["holes"]) == (25, 3, [[21, 22]])
        assert said["halted"]["code"] == "GAP"
        assert watch.not_ready_because == "halted"
        assert watch.disk is not None
        assert watch.disk.free_bytes > 0
        assert watch.disk.file_bytes >= watch.disk.used_bytes > 0

    settled(tmp_path, story)


def test_paused_is_not_ready_and_says_why(tmp_path: Path) -> None:
    async def story(watch: Watch, settler: Settler, tape: Tape) -> None:
        await put(tape, 1, 20)
        await until(watch, lambda: watch.not_ready_because == "")
        paused_path(tape.path).write_text('{"reason": "an upgrade", "by": "me"}')
        await until(watch, lambda: settler.state == "paused")
        await watch.look()
        assert (watch.standing["state"], watch.not_ready_because) == ("paused", "paused")
        assert watch.standing["paused"]["reason"] == "an upgrade"
        paused_path(tape.path).unlink()
        await until(watch, lambda: watch.not_ready_because == "")

    settled(tmp_path, story)


def test_a_settler_that_goes_on_with_another_stream_is_followed(tmp_path: Path) -> None:
    said = {"configured": "main", "stream": "main", "first_sequence": 1, "session": 1, "state": "running", "acked": 9}
    settler: Any = type("Settler", (), {"said": lambda _: dict(said), "agreed": None, "acknowledged": None})()
    watch = Watch(
        stream="main", first_sequence=1, tape_path=tmp_path / "tape.db", tape_size_bytes_max=1, store_name="sqlite",
        recorder=None, settler=settler,
    )  # fmt: skip
    held = lock(watch.tape_path, "settler")
    asyncio.run(watch.look())
    watch.rejected = 3
    said |= {"stream": "main-2", "session": 2, "acked": 4}
    asyncio.run(watch.look())
    assert (watch.stream, watch.standing["stream"], watch.standing["acked"]) == ("main-2", "main-2", 4)
    held.close()
    assert watch.rejected is None, "what was counted was another stream's"


def test_a_tape_that_can_not_be_read_is_told_and_does_not_end_the_watch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch(
        stream="main", first_sequence=1, tape_path=tmp_path / "tape.db", tape_size_bytes_max=1, store_name="sqlite",
        recorder=None, settler=type("Silent", (), {"said": dict, "agreed": None, "acknowledged": None})(),
    )  # fmt: skip
    asyncio.run(watch.look())
    assert "there is no tape" in watch.standing["tape"]
    (tmp_path / "tape.db").write_bytes(b"SQLite format 3\0" + b"\xff" * 5_000)
    asyncio.run(watch.look())
    assert watch.samples
