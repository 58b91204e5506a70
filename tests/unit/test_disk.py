"""The thread of an SQLite file: in order, answers and errors where they are waited for, nothing given up half-way."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading

import pytest

from sidecar.disk import DiskThread, insert_rows, transaction


def test_work_is_done_in_order_on_one_other_thread() -> None:
    done: list[int] = []

    def work(n: int) -> int:
        done.append(n)
        return threading.get_ident()

    async def main() -> None:
        thread = DiskThread("disk")
        idents = await asyncio.gather(*(thread.run(work, n) for n in range(99)))
        thread.close()
        assert done == list(range(99))
        assert len(set(idents)) == 1
        assert threading.get_ident() not in idents

    asyncio.run(main())


def test_an_error_is_raised_where_it_is_waited_for_and_the_thread_goes_on() -> None:
    async def main() -> None:
        thread = DiskThread("disk")
        with pytest.raises(ZeroDivisionError):
            await thread.run(lambda: 1 // 0)
        assert await thread.run(lambda: "on") == "on"
        thread.close()

    asyncio.run(main())


def test_what_was_given_is_done_though_its_caller_is_cancelled_and_before_close_returns() -> None:
    may_go = threading.Event()
    done: list[int] = []

    async def main() -> None:
        thread = DiskThread("disk")
        first = asyncio.create_task(thread.run(may_go.wait))
        second = asyncio.create_task(thread.run(done.append, 2))
        await asyncio.sleep(0)
        second.cancel()
        may_go.set()
        thread.close()
        assert done == [2]
        assert await first
        with pytest.raises(asyncio.CancelledError):
            await second

    asyncio.run(main())


def test_an_answer_to_a_loop_that_is_closed_harms_nobody() -> None:
    may_go = threading.Event()
    thread = DiskThread("disk")

    async def main() -> None:
        asyncio.create_task(thread.run(may_go.wait))  # noqa: RUF006 - it is cancelled with the loop
        await asyncio.sleep(0)

    asyncio.run(main())
    may_go.set()
    thread.close()


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 1_000])
def test_all_rows_are_inserted_however_many(rows: int) -> None:
    db = sqlite3.connect(":memory:")
    db.execute("CREATE TABLE t (a, b)")
    insert_rows(db, "INSERT INTO t VALUES ", 2, [(n, -n) for n in range(rows)])
    assert db.execute("SELECT * FROM t").fetchall() == [(n, -n) for n in range(rows)]


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 127, 128, 129, 200, 1_000])
def test_rows_that_may_stand_twice_take_few_statements(rows: int) -> None:
    db = sqlite3.connect(":memory:")
    db.execute("CREATE TABLE t (a PRIMARY KEY, b)")
    statements: list[str] = []
    db.set_trace_callback(statements.append)
    given = [(n, -n) for n in range(rows)]
    insert_rows(db, "INSERT OR REPLACE INTO t VALUES ", 2, given, repeatable=True)
    sizes = [statement.count("(") for statement in statements if statement.startswith("INSERT")]
    assert {size & (size - 1) for size in sizes} <= {0}  # powers of two only
    assert sum(sizes) < 2 * max(rows, 1)
    assert given == [(n, -n) for n in range(rows)]  # the caller's list stays as it is
    assert db.execute("SELECT * FROM t ORDER BY a").fetchall() == given


@pytest.mark.parametrize("errors", [[sqlite3.IntegrityError], [KeyboardInterrupt], []])
def test_a_transaction_is_whole_or_not_at_all(errors: list[type[BaseException]]) -> None:
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.execute("CREATE TABLE t (a)")
    with contextlib.suppress(*errors), transaction(db):
        db.execute("INSERT INTO t VALUES (1)")
        for error in errors:
            raise error
    assert not db.in_transaction
    assert db.execute("SELECT count(*) FROM t").fetchone() == (int(not errors),)


def test_an_error_of_a_transaction_goes_on() -> None:
    db = sqlite3.connect(":memory:", isolation_level=None)
    with pytest.raises(sqlite3.OperationalError, match="no such table"), transaction(db):
        db.execute("INSERT INTO t VALUES (1)")
    assert not db.in_transaction
