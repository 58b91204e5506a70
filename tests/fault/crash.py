"""The sidecar, killed from within at a named point: `python -m tests.fault.crash append:before:17 run --config …`.

The 17th time that the point is reached, counted in this process, it sends itself SIGKILL, right before what is done
there or right after. The product knows nothing of it: its functions are wrapped here, and one that is gone from where
it was ends the process with an error, not with a kill.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Final

import zmq

from sidecar import cli
from sidecar.ledger import Ledger
from sidecar.pipeline import Pipeline
from sidecar.store.cassandra import CassandraStore
from sidecar.store.sqlite import SQLiteStore
from sidecar.tape import Tape


def _is_kind(kind: str) -> Callable[..., bool]:
    return lambda _store, _stream, what, _state: what == kind


# Where each point is: classes, a method of theirs, and which of its calls count.
POINTS: Final[dict[str, tuple[tuple[tuple[type, str], ...], Callable[..., bool]]]] = {
    "receive": (((zmq.Socket, "recv"),), lambda *_: True),  # topic or payload leaves the socket
    "append": (((Tape, "append"),), lambda *_: True),  # it gets its place
    "sync": (((Tape, "_write"),), lambda *_: True),  # its turn is committed
    "fold": (((Ledger, "fold"),), lambda *_: True),
    # A batch is sent; after: the store has answered.
    "submit": (((SQLiteStore, "settle_batch_atomically"), (CassandraStore, "_send")), lambda *_: True),
    "ack": (((Pipeline, "_ack"),), lambda *_: True),  # memory learns of it
    "acked": (((SQLiteStore, "save_state"), (CassandraStore, "save_state")), _is_kind("acked")),
    "durable": (((SQLiteStore, "save_state"), (CassandraStore, "save_state")), _is_kind("durable")),
}
MOMENTS: Final = ("before", "after")


def kill_at(point: str, moment: str, times: int) -> None:
    """Wrap the functions of a point."""
    places, counts = POINTS[point]
    left = times

    def reached(*given: Any) -> None:
        nonlocal left
        if counts(*given):
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    for owner, name in places:
        wrapped = getattr(owner, name)
        setattr(owner, name, (_async if asyncio.iscoroutinefunction(wrapped) else _plain)(wrapped, moment, reached))


def _plain(wrapped: Callable[..., Any], moment: str, reached: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(wrapped)
    def struck(*args: Any, **kwargs: Any) -> Any:
        if moment == "before":
            reached(*args)
        result = wrapped(*args, **kwargs)
        if moment == "after":
            reached(*args)
        return result

    return struck


def _async(wrapped: Callable[..., Any], moment: str, reached: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(wrapped)
    async def struck(*args: Any, **kwargs: Any) -> Any:
        if moment == "before":
            reached(*args)
        result = await wrapped(*args, **kwargs)
        if moment == "after":
            reached(*args)
        return result

    return struck


if __name__ == "__main__":
    where, when, count = sys.argv[1].split(":")
    kill_at(where, when, int(count))
    sys.exit(cli.main(sys.argv[2:]))
