"""The sidecar with a driver that now and then never answers: `python -m tests.fault.hang 7 run --config …`.

Every 7th future of cassandra-driver is one that nobody hears of again: no result, no error, no timeout, as its own bugs
have left some. The same goes for every 7th message that is sent straight onto a connection.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable
from typing import Any

from cassandra.cluster import ResponseFuture

from sidecar import cli
from sidecar.store import connection


def never_complete(every: int) -> None:
    """Let every so manieth future of the driver stay without an answer."""
    count = itertools.count(1)

    def struck() -> bool:
        return next(count) % every == 0

    add_callbacks: Callable[..., Any] = ResponseFuture.add_callbacks
    result: Callable[..., Any] = ResponseFuture.result
    answered: Callable[..., Any] = connection._Shot.answered

    def add_none(self: Any, *args: Any, **kwargs: Any) -> Any:
        return None if struck() else add_callbacks(self, *args, **kwargs)

    def wait_for_ever(self: Any, *args: Any, **kwargs: Any) -> Any:
        if struck():
            threading.Event().wait()
        return result(self, *args, **kwargs)

    def forget(self: Any, response: Any) -> Any:
        return None if struck() else answered(self, response)

    ResponseFuture.add_callbacks = add_none
    ResponseFuture.result = wait_for_ever
    connection._Shot.answered = forget  # type: ignore[method-assign]


if __name__ == "__main__":
    never_complete(int(sys.argv[1]))
    sys.exit(cli.main(sys.argv[2:]))
