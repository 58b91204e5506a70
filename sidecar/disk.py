"""What everything that lives in an SQLite file needs: a thread for its slow calls, transactions, inserts in few steps.

A hop to another thread and back is most of what a trade costs when it comes alone (the work itself is a tenth of it),
so the hop is made of little: a queue written in C, and one wake-up of the loop with the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

T = TypeVar("T")

_ROWS_A_STATEMENT: Final = 128  # rows a statement: each step gives the GIL away once, so few steps, not one a row


class DiskThread:
    """One thread that does what it is given, in order."""

    def __init__(self, name: str) -> None:
        """Start it; it ends with `close`, or with the process."""
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(self, work: Callable[..., T], *args: object) -> T:
        """Have `work(*args)` done there; give its result or raise its error. A cancelled caller stops nothing."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            result, failed = None, None
            try:
                result = work(*args)
            except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
                failed = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_tell, answer, result, failed)

        self._jobs.put(job)
        return await answer

    def close(self) -> None:
        """Finish what was given, and end."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # what it holds must not live until the next one comes


def _tell(answer: asyncio.Future[Any], result: Any, failed: BaseException | None) -> None:
    if answer.done():
        return
    if failed is None:
        answer.set_result(result)
    else:
        answer.set_exception(failed)


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All that is done in here is committed together, or nothing of it: any error rolls it back, and goes on."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


def insert_rows(
    db: sqlite3.Connection, head: str, columns: int, rows: list[Any], foot: str = "", *, repeatable: bool = False
) -> None:
    """Insert many rows with few steps: one statement, `head (?, …), … foot`, for many of them.

    `repeatable` says that a row may stand there twice. The last one is then repeated up to the next power of two: a few
    statements are prepared for a table, not one for each number of rows that comes along, which with many tables takes
    longer than the inserting.
    """
    one = f"({', '.join('?' * columns)})"
    for at in range(0, len(rows), _ROWS_A_STATEMENT):
        some = rows[at : at + _ROWS_A_STATEMENT]
        if repeatable:
            some += some[-1:] * ((1 << (len(some) - 1).bit_length()) - len(some))
        db.execute(head + ", ".join([one] * len(some)) + foot, [value for row in some for value in row])
