"""An event loop whose clock jumps to the next timer instead of sleeping: minutes of waiting in milliseconds.

Nothing happens but timers and callbacks in their order, so one seed gives one history, step by step. A loop that has
nothing left to wait for would wait for ever: that is `Deadlock`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(Exception):  # noqa: N818 - it is what happened
    """No task can ever go on: nothing is ready and no timer runs."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Timers and callbacks, no sockets, no threads, no real clock."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._selector = self  # what the loop asks for input: there is none, waiting is over at once, the time is later
        self.set_exception_handler(lambda _loop, _context: None)  # tasks of a dead process tell nobody

    def time(self) -> float:
        return self._now_s

    def select(self, timeout_s: float | None) -> tuple[()]:
        if timeout_s is None:
            raise Deadlock
        self._now_s += timeout_s
        return ()

    def _process_events(self, _events: object) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end in virtual time; whatever is left then is cancelled."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
