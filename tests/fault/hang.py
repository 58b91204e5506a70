"""The sidecar with a driver that now and then never answers: `python -m tests.fault.hang 0.1:42 run --config …`.

So many (0.1) of the futures of cassandra-driver are never heard of again: no result, no error, no timeout, as bugs of
its own have left some. The same goes for the answers to messages that are sent straight onto a connection: `rows` and
what is none. Each is told of on stderr.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

from cassandra.cluster import ResponseFuture
from cassandra.protocol import RESULT_KIND_ROWS

from sidecar import cli
from sidecar.store import connection


def never_complete(share: float, seed: int) -> None:
    """Let so many futures of the driver stay without an answer."""
    chance = random.Random(seed)

    def struck(where: str) -> bool:
        if chance.random() >= share:
            return False
        sys.stderr.write(json.dumps({"event": "never_completes", "where": where}) + "\n")
        return True

    result: Callable[..., Any] = ResponseFuture.result
    answered: Callable[..., Any] = connection._Shot.answered

    def wait_for_ever(self: Any, *args: Any, **kwargs: Any) -> Any:
        if struck("result"):
            threading.Event().wait()
        return result(self, *args, **kwargs)

    def forget(self: Any, response: Any) -> Any:
        is_rows = getattr(response, "kind", None) == RESULT_KIND_ROWS
        return None if struck("rows" if is_rows else "answered") else answered(self, response)

    ResponseFuture.result = wait_for_ever
    connection._Shot.answered = forget  # type: ignore[method-assign]


if __name__ == "__main__":
    of_all, drawn = sys.argv[1].split(":")
    never_complete(float(of_all), int(drawn))
    sys.exit(cli.main(sys.argv[2:]))
