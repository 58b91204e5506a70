"""The pipeline against a small store that answers when, how and in which order a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import pytest

from sidecar import pipeline as pipeline_module
from sidecar.batch import Batch
from sidecar.errors import BatchTooLargeError, OutcomeUnknownError, StoreRefusedError
from sidecar.events import EMPTY_ACCOUNT
from sidecar.ledger import Folded, Ledger, before
from sidecar.pipeline import Pipeline
from tests.streams import SYMBOLS, trade


class Answers:
    """A store of which every answer is given by hand: `given` holds each batch with the future that answers it."""

    def __init__(self) -> None:
        self.given: list[tuple[Batch, asyncio.Future[None]]] = []

    async def settle(self, batch: Batch) -> None:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.given.append((batch, answer))
        await answer

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return [(batch.first_sequence, batch.last_sequence) for batch, _ in self.given]

    async def ack(self, at: int) -> None:
        self.given[at][1].set_result(None)
        await turns()

    async def fail(self, at: int, error: Exception) -> None:
        self.given[at][1].set_exception(error)
        await turns()


async def turns() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


class Line:
    """Folded trades, one after the other."""

    def __init__(self) -> None:
        self.ledger = Ledger(symbols=SYMBOLS, first_sequence=1, base_us=1_000, state=before(1, 1_000))

    def next(self) -> Folded:
        one = trade(self.ledger.sequence + 1)
        for key in self.ledger.accounts_of(one):
            self.ledger.accounts.setdefault(key, EMPTY_ACCOUNT)
        return self.ledger.fold(one, 1 << 60)


Story = Callable[[Pipeline, Answers, Line], Coroutine[Any, Any, None]]


def tell(story: Story, *, trades_max: int = 4, inflight_max: int = 2, **other: Any) -> None:
    """Run a story in one life; what is still under way at its end is cancelled with the life."""

    async def life() -> None:
        answers, line = Answers(), Line()
        async with asyncio.TaskGroup() as tasks:
            spawned: list[asyncio.Task[None]] = []

            def spawn(work: Awaitable[None]) -> None:
                spawned.append(tasks.create_task(work))  # type: ignore[arg-type]

            bounds = {"batch_trades_max": trades_max, "batch_bytes_max": 1 << 30, "inflight_batches_max": inflight_max}
            pipe = Pipeline(
                stream="main",
                state=before(1, 1_000),
                decisions_read=1,
                attempt=lambda batch: partial(answers.settle, batch),
                spawn=spawn,
                **({"retry_backoff_max_s": 0.01} | bounds | other),
            )
            async with asyncio.timeout(10):
                await story(pipe, answers, line)
            for task in spawned:
                task.cancel()

    asyncio.run(life())


def test_an_idle_pipeline_sends_one_trade_at_once_and_a_busy_one_fills_its_batches() -> None:
    async def story(pipe: Pipeline, answers: Answers, line: Line) -> None:
        for _ in range(2):
            pipe.add(line.next())
            await pipe.room()
            await turns()
        assert answers.ranges == [(1, 1), (2, 2)]  # both slots are taken by one trade each
        for _ in range(6):
            pipe.add(line.next())
        await pipe.room()
        await turns()
        assert len(answers.given) == 2
        await answers.ack(0)
        assert answers.ranges[2:] == [(3, 6)]  # what waited leaves together, up to the bound
        await answers.ack(1)
        assert answers.ranges[3:] == [(7, 8)]
        assert pipe.unacked_batches == 2
        assert pipe.submitted == 8

    tell(story)


def test_acked_is_the_end_of_the_contiguous_run_whatever_the_order_of_answers() -> None:
    async def story(pipe: Pipeline, answers: Answers, line: Line) -> None:
        folded = [line.next() for _ in range(5)]
        for one in folded:
            pipe.add(one)
        await pipe.room()
        await turns()
        assert len(answers.given) == 5
        assert pipe.acked == before(1, 1_000)
        for at, acked in [(2, 0), (1, 0), (4, 0), (0, 3), (3, 5)]:
            await answers.ack(at)
            assert pipe.acked.sequence == acked
        assert pipe.acked.stamp_us == folded[-1].stamp_us
        assert pipe.acked.last_trade_ids == {"btc_usdt": 5}
        assert pipe.unacked_batches == 0
        await pipe.drained()

    tell(story, trades_max=1, inflight_max=5)


def test_the_acked_state_carries_the_trade_ids_of_its_own_position_only() -> None:
    async def story(pipe: Pipeline, answers: Answers, line: Line) -> None:
        for _ in range(3):
            pipe.add(line.next())
        await pipe.room()
        await turns()
        await answers.ack(2)
        await answers.ack(0)
        assert (pipe.acked.sequence, pipe.acked.last_trade_ids) == (1, {"btc_usdt": 1})
        earlier = pipe.acked
        await answers.ack(1)
        assert (pipe.acked.sequence, pipe.acked.last_trade_ids) == (3, {"btc_usdt": 3})
        assert earlier.last_trade_ids == {"btc_usdt": 1}  # a checkpoint that was taken does not change any more

    tell(story, trades_max=1, inflight_max=3)


def test_an_unknown_outcome_is_answered_with_the_identical_batch_again_and_again() -> None:
    slept: list[float] = []

    async def story(pipe: Pipeline, answers: Answers, line: Line) -> None:
        pipe.add(line.next())
        await pipe.room()
        await turns()
        for at in range(6):
            await answers.fail(at, OutcomeUnknownError("timeout"))
            pipe.add(line.next())  # what comes meanwhile does not get into the batch
            while len(answers.given) == at + 1:  # noqa: ASYNC110 - they tell nobody
                await asyncio.sleep(0.001)
        batches = [batch for batch, _ in answers.given]
        assert all(batch is batches[0] for batch in batches)
        assert (batches[0].first_sequence, batches[0].last_sequence) == (1, 1)
        assert pipe.acked.sequence == 0
        assert pipe.retries_total == 6
        assert len(slept) == 6
        assert slept[0] <= pipeline_module.BACKOFF_FIRST_S
        assert max(slept) <= 0.2
        assert max(slept[3:]) > slept[0]
        await answers.ack(6)
        assert pipe.acked.sequence == 1

    real_sleep = asyncio.sleep

    async def sleep(delay_s: float, *rest: Any) -> None:
        if delay_s > 0.01:
            slept.append(delay_s)
            delay_s = 0
        await real_sleep(delay_s, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "sleep", sleep)
        tell(story, inflight_max=1, retry_backoff_max_s=0.2)


def test_others_go_on_while_one_is_given_again() -> None:
    async def story(pipe: Pipeline, answers: Answers, line: Line) -> None:
        for _ in range(2):
            pipe.add(line.next())
        await pipe.room()
        await turns()
        await answers.fail(0, OutcomeUnknownError("timeout"))
        await answers.ack(1)
        pipe.add(line.next())
        await pipe.room()
        await turns()
        assert answers.ranges[2] == (3, 3)
        assert pipe.acked.sequence == 0

    tell(story, trades_max=1, inflight_max=2)


@pytest.mark.parametrize("error", [StoreRefusedError("no table"), BatchTooLargeError("50 KiB"), RuntimeError("a bug")])
def test_a_final_error_ends_the_life_and_whoever_waits_in_it(error: Exception) -> None:
    async def story(pipe: Pipeline, answers: Answers, line: Line) -> None:
        for _ in range(40):
            pipe.add(line.next())
        waiting = asyncio.ensure_future(pipe.room())
        await turns()
        answers.given[0][1].set_exception(error)
        await waiting

    with pytest.raises(BaseExceptionGroup) as raised:
        tell(story)
    assert raised.group_contains(type(error), match=str(error))


def test_room_waits_while_more_is_waiting_than_four_batches_take() -> None:
    async def story(pipe: Pipeline, answers: Answers, line: Line) -> None:
        for _ in range(8 + 16 + 1):
            pipe.add(line.next())
        room = asyncio.ensure_future(pipe.room())
        await turns()
        assert len(answers.given) == 2  # 8 under way, 17 waiting: one too many
        assert not room.done()
        await answers.ack(1)
        assert room.done()
        assert pipe.acked.sequence == 0

    tell(story)


def test_drained_waits_for_the_last_acknowledgement() -> None:
    async def story(pipe: Pipeline, answers: Answers, line: Line) -> None:
        await pipe.drained()  # nothing was added: nothing to wait for
        for _ in range(10):
            pipe.add(line.next())
        drained = asyncio.ensure_future(pipe.drained())
        await turns()
        for at in (1, 0, 2):
            assert not drained.done()
            await answers.ack(at)
        assert drained.done()
        assert pipe.acked.sequence == 10

    tell(story)


def test_accepted_gaps_are_acked_without_the_store_but_not_before_what_precedes_them() -> None:
    async def story(pipe: Pipeline, answers: Answers, line: Line) -> None:
        pipe.add(line.ledger.pass_over(3))
        await pipe.room()
        assert (pipe.acked.sequence, pipe.acked.stamp_us) == (3, line.ledger.stamp_us)
        pipe.add(line.next())
        await pipe.room()
        pipe.add(line.ledger.pass_over(9))
        await pipe.room()
        await turns()
        assert answers.ranges == [(4, 4)]
        assert pipe.acked.sequence == 3
        await answers.ack(0)
        assert pipe.acked.sequence == 9
        await pipe.drained()

    tell(story)


def test_a_life_that_ended_moves_nothing_any_more() -> None:
    kept: list[tuple[Pipeline, Answers]] = []

    async def story(pipe: Pipeline, answers: Answers, line: Line) -> None:
        pipe.add(line.next())
        await pipe.room()
        await turns()
        kept.append((pipe, answers))

    tell(story)
    pipe, answers = kept[0]
    assert answers.given[0][1].cancelled()
    assert pipe.acked.sequence == 0
    assert len(answers.given) == 1


def test_each_acknowledged_batch_is_told_once() -> None:
    told: list[tuple[int, int]] = []

    async def story(pipe: Pipeline, answers: Answers, line: Line) -> None:
        for _ in range(3):
            pipe.add(line.next())
        await pipe.room()
        await turns()
        await answers.fail(0, OutcomeUnknownError("timeout"))
        await answers.ack(1)
        while len(answers.given) < 4:  # noqa: ASYNC110 - they tell nobody
            await asyncio.sleep(0.001)
        await answers.ack(3)
        await answers.ack(2)
        assert sorted(told) == [(1, 1), (2, 2), (3, 3)]

    tell(
        story,
        trades_max=1,
        inflight_max=3,
        on_ack=lambda batch: told.append((batch.first_sequence, batch.last_sequence)),
    )


def test_what_is_acknowledged_behind_a_batch_that_never_is_has_a_bound() -> None:
    async def story(pipe: Pipeline, answers: Answers, line: Line) -> None:
        for _ in range(300):
            pipe.add(line.next())
        sending = asyncio.ensure_future(pipe.drained())
        await turns()
        for at in range(1, 300):
            if at < len(answers.given):
                await answers.ack(at)
        sending.cancel()
        assert len(pipe._unacked) < 100

    tell(story, trades_max=1, inflight_max=2)
