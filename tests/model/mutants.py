"""The shipped code with one thing wrong each: what the model must notice, or it tests nothing.

A mutant changes the real modules while it runs: a line of a function's source is replaced (which must be there, exactly
once, or the mutant is out of date), or a step of the repair is left out. Only `themes` where it can strike are tried.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

import pytest

import sidecar.pipeline
from sidecar.decisions import Agreed
from sidecar.errors import Halt, StartOver
from sidecar.events import Event, LedgerEvent, Refused, Trade
from sidecar.ledger import Folded, Ledger
from sidecar.life import Life
from sidecar.pipeline import Pipeline
from sidecar.settle import Settler
from sidecar.tape import TapeReader
from tests.model.history import Ways
from tests.model.oracle import WALL_US


@dataclass(frozen=True)
class Mutant:
    """One thing wrong, by name."""

    name: str
    themes: tuple[str, ...]
    spoil: Callable[[pytest.MonkeyPatch], None] = lambda _: None
    ways: Ways = Ways()  # noqa: RUF009 - it is frozen


def _line(owner: type, name: str, right: str, wrong: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Replace a piece of a method's source."""

    def spoil(patch: pytest.MonkeyPatch) -> None:
        function = getattr(owner, name)
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(right) == 1, f"{right!r} is not in {owner.__name__}.{name}: this mutant is out of date"
        made: dict[str, Any] = {}
        code = compile(source.replace(right, wrong), f"<mutant of {owner.__name__}.{name}>", "exec")
        exec(code, function.__globals__, made)  # noqa: S102 - the house's own source
        patch.setattr(owner, name, made[name])

    return spoil


def _wall_clock(patch: pytest.MonkeyPatch) -> None:
    def wall_us() -> int:
        return WALL_US + int(asyncio.get_running_loop().time() * 1e6)

    patch.setattr(sidecar.pipeline, "_wall_us", wall_us, raising=False)
    stamped = "self._attempt(batch._replace(stamp_us=_wall_us()))"
    _line(Pipeline, "_fill", "self._attempt(batch)", stamped)(patch)


def _older_lives_go_on(patch: pytest.MonkeyPatch) -> None:
    begin = Pipeline.__init__
    tasks: set[object] = set()

    def begin_for_ever(self: Pipeline, **named: Any) -> None:
        def spawn(work: Coroutine[Any, Any, None]) -> None:
            tasks.add(asyncio.create_task(work))  # outlives its life's task group

        begin(self, **{**named, "spawn": spawn})

    patch.setattr(Pipeline, "__init__", begin_for_ever)


def _overflow_rejected(patch: pytest.MonkeyPatch) -> None:
    fold = Ledger.fold

    def rejecting(self: Ledger, event: Event, now_us: int) -> Folded:
        try:
            return fold(self, event, now_us)
        except Halt as halt:
            if halt.code != "BALANCE_OVERFLOW":
                raise
            assert isinstance(event, (Trade, LedgerEvent))
            refused = Refused(event.output_sequence, halt.code, halt.reason, event.session, event.payload)
            return fold(self, refused, now_us)

    patch.setattr(Ledger, "fold", rejecting)


def _private_gaps(patch: pytest.MonkeyPatch) -> None:
    agree = Settler._agree

    async def keep(self: Settler, first: int, last: int) -> None:
        vars(self).setdefault("private_gaps", []).append((first, last))
        raise StartOver("a gap, kept to itself")

    async def agree_with_itself(self: Settler, reader: TapeReader) -> Agreed | None:
        agreed = await agree(self, reader)
        own = vars(self).get("private_gaps", [])
        return agreed and dataclasses.replace(agreed, gaps=tuple(sorted({*agreed.gaps, *own})))

    patch.setattr(Settler, "_record_gap", keep)
    patch.setattr(Settler, "_agree", agree_with_itself)


MUTANTS: Final = (
    Mutant("no skip", ("plain", "outage"), _line(Ledger, "_post", "last_sequence >= sequence", "False")),
    Mutant(
        "no skip in a common trade",
        ("plain", "outage"),
        _line(Ledger, "_fold_common", "bought_last < sequence", "True"),
    ),
    Mutant("wall-clock stamps", ("plain", "outage"), _wall_clock),
    Mutant(
        "no durable lag",
        ("outage",),
        _line(Life, "_steadily_acked", "now - self._bounds.durable_after_s", "now"),
    ),
    Mutant(
        "no start over after an outage",
        ("outage",),
        _line(Life, "_obey", "self._store.outages != self._outages", "False"),
    ),
    Mutant("a repair without raising base_us", ("repair",), ways=Ways(repair_raises_base=False)),
    Mutant("a repair stamped only just above now", ("repair",), ways=Ways(repair_stamps_ahead=False)),
    Mutant(
        "eviction of accounts that are acknowledged but not durable",
        ("evict",),
        _line(Life, "_make_room", "ledger.evict(self.durable.sequence", "ledger.evict(self.pipeline.acked.sequence"),
    ),
    Mutant(
        "retries of an older life sent again",
        ("race",),
        _older_lives_go_on,
    ),
    Mutant(
        "a verdict that depends on memory",
        ("overflow",),
        _overflow_rejected,
        Ways(overflow_rejects=True),
    ),
    Mutant("a gap accepted on one side only", ("gap",), _private_gaps, Ways(gaps_are_private=True)),
    # Beyond the list: what else was once wrong, or easily would be.
    Mutant(
        "durable moves while a node is away",
        ("outage",),
        _line(Life, "_steadily_acked", "self._store.steady_since", "0.0"),
    ),
    Mutant(
        "a decision about what an earlier life has submitted goes unnoticed",
        ("race",),
        _line(Settler, "_check_decisions", "if read is None", "if True"),
    ),
    Mutant(
        "a new decision ends no life",
        ("gap", "race", "repair"),
        _line(Life, "_obey", "if fresh:", "if False:"),
    ),
)
