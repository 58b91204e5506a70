"""Reconciliation: what it says while settlement goes on, after decisions, interrupted, and over several streams."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from bench.world import ROOT
from sidecar import decisions
from sidecar.cli import main
from sidecar.errors import OutcomeUnknownError
from sidecar.events import State, Trade
from sidecar.proof.audit import audit
from sidecar.proof.codes import CODES, explain
from sidecar.proof.fix import Fixer, NotFixedError
from sidecar.proof.fold import Ranges, without, zeros
from sidecar.proof.hourly import Hourly
from sidecar.proof.reconcile import Pace, Progress, Proof, Report
from sidecar.proof.work import Work
from sidecar.store.sqlite import SQLiteStore
from tests.books import NOW_US, Books, Hand
from tests.streams import BTC, USDT

Found = set[tuple[str, str, int | None, int | None]]


class Place:
    """A file store, books in it, and proofs of it, each with the work file opened anew."""

    def __init__(self, folder: Path, store: SQLiteStore) -> None:
        self.folder = folder
        self.store = store
        self.books = Books(store)
        self.hand = Hand(store)

    async def proof(self, **given: Any) -> Report:
        pace = given.pop("pace", Pace(rows_a_page=64))
        wait_s = given.pop("wait_s", 0.05)
        work = Work(self.folder / "work")
        made = Proof(store=self.store, work=work, pace=pace, wait_s=wait_s)
        try:
            return await made.run(**given)
        finally:
            made.close()
            work.close()


def play(folder: Path, story: Callable[[Place], Awaitable[None]]) -> None:
    async def told() -> None:
        async with SQLiteStore(folder / "settlement.db", {}) as store:
            place = Place(folder, store)
            await place.books.begin()
            await story(place)

    asyncio.run(told())


def found(report: Report) -> Found:
    return {(each.code, each.stream, each.user_id, each.asset_id) for each in report.findings}


def test_nothing_was_ever_settled(tmp_path: Path) -> None:
    async def story(place: Place) -> None:
        report = await place.proof()
        assert report.as_dict() | {"run_id": "", "seconds": 0.0} == {
            "ok": True, "streams": ["main"], "accounts": 0, "events": 0, "up_to": {"main": 0}, "findings": [],
            "not_checked": [], "run_id": "", "full": True, "events_read": 0, "seconds": 0.0,
        }  # fmt: skip

    play(tmp_path, story)


def test_rows_and_events_settled_while_it_reads_are_no_finding(tmp_path: Path) -> None:
    """Between any two of its questions to the store some more is settled."""

    async def story(place: Place) -> None:
        await place.books.play(400)
        store, books = place.store, place.books
        questions = 0

        def busy(scan: Any) -> Any:
            async def scanned(*args: Any, **named: Any) -> AsyncIterator[Any]:
                nonlocal questions
                async for page in scan(*args, **named):
                    questions += 1
                    if questions % 3 == 0:
                        await books.settle(books.draw(5))
                    yield page

            return scanned

        for name in ("scan_stamped_balances", "scan_trades_after", "scan_trades_between", "scan_ledger_events"):
            setattr(store, name, busy(getattr(store, name)))
        for full in (True, False, False, True):
            report = await place.proof(full=full, pace=Pace(rows_a_page=16))
            assert report.findings == []
            assert report.not_checked == []
            assert 400 < report.up_to["main"] <= books.sequence
        assert questions > 60

    play(tmp_path, story)


def _stamp_rows(place: Place) -> None:
    """Give the rows the write times that Cassandra would have: those of the newest batch its stamp."""
    scan, ledger = place.store.scan_stamped_balances, place.books._ledger
    assert ledger is not None

    async def stamped(**named: Any) -> AsyncIterator[Any]:
        async for page in scan(**named):
            newest = ledger.sequence - 10
            yield [row._replace(write_us=ledger.stamp_us if (row.last_sequence or 0) > newest else 1) for row in page]

    setattr(place.store, "scan_stamped_balances", stamped)  # noqa: B010 - mypy would not let it be assigned


def test_rows_ahead_of_what_is_acknowledged_are_named_and_not_judged(tmp_path: Path) -> None:
    async def story(place: Place) -> None:
        await place.books.play(300)
        await place.books.settle(place.books.draw(10), state=False)
        _stamp_rows(place)
        for full in (True, False):
            report = await place.proof(full=full)
            assert report.findings == []
            assert report.not_checked
            assert all(row["sequence"] > report.up_to["main"] for row in report.not_checked)
        ledger = place.books._ledger
        assert ledger is not None
        at = State(ledger.sequence, ledger.stamp_us, dict(ledger.last_trade_ids))
        settling = asyncio.create_task(place.proof(wait_s=5.0))
        await asyncio.sleep(0.2)
        await place.store.save_state("main", "acked", at)  # the settler that it waited for
        report = await settling
        assert (report.findings, report.not_checked, report.up_to) == ([], [], {"main": ledger.sequence})

    play(tmp_path, story)


def test_a_proof_that_was_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(place: Place) -> None:
        await place.books.play(2_000)
        monkeypatch.setattr("sidecar.proof.reconcile.CHECKPOINT_ROWS", 200)
        real, pages = place.store.scan_trades_after, 0

        def dying(*args: Any, **named: Any) -> Any:
            async def scanned() -> AsyncIterator[Any]:
                nonlocal pages
                async for page in real(*args, **named):
                    pages += 1
                    if pages == 20:
                        raise KeyboardInterrupt
                    yield page

            return scanned()

        monkeypatch.setattr(place.store, "scan_trades_after", dying)
        with pytest.raises(KeyboardInterrupt):
            await place.proof(pace=Pace(rows_a_page=50))
        first, pages = pages, 21
        report = await place.proof(pace=Pace(rows_a_page=50))
        assert report.findings == []
        assert report.events == place.books.sequence
        assert pages - 21 < first + 15, "it began anew"

    play(tmp_path, story)


def test_an_outage_in_the_middle_is_gone_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(place: Place) -> None:
        await place.books.play(500)
        monkeypatch.setattr("sidecar.proof.reconcile.RETRY_S", 0.01)
        monkeypatch.setattr("sidecar.proof.work.ACCOUNTS_CACHED_MAX", 3)  # so that some is on disk, and is taken back
        monkeypatch.setattr("sidecar.proof.reconcile.CHECKPOINT_ROWS", 10**9)
        real, calls = place.store.scan_trades_after, 0

        async def failing(*args: Any, **named: Any) -> AsyncIterator[Any]:
            nonlocal calls
            calls += 1
            pages = 0
            async for piece in real(*args, **named):
                pages += 1
                if calls <= 3 and pages > 2:
                    raise OutcomeUnknownError("away")
                yield piece

        monkeypatch.setattr(place.store, "scan_trades_after", failing)
        assert (await place.proof()).findings == []
        assert calls > 3

        def _calls(_: object) -> int:
            return calls

        monkeypatch.setattr(type(place.store), "outages", property(_calls))  # and one at every question
        calls = 4
        with pytest.raises(OutcomeUnknownError, match="tried"):
            await place.proof(full=True)

    play(tmp_path, story)


def test_an_accepted_gap_is_no_hole_and_what_stands_in_it_is_reported(tmp_path: Path) -> None:
    """A settler that submitted a sequence, died, and read the gap only after it: nobody else can find that."""

    async def story(place: Place) -> None:
        books = place.books
        await books.settle(books.draw(300))
        lost = books.draw(1)
        while not isinstance(lost[0], Trade) or not lost[0].price or lost[0].buyer_fee is not None:
            await books.settle(lost)
            lost = books.draw(1)
        trade = lost[0]
        users = {trade.buyer_user_id, trade.seller_user_id}
        await books.settle(lost, state=False)  # it landed, and nobody noted it
        gap = (trade.output_sequence, trade.output_sequence)
        await decisions.accept_gap(place.store, "main", *gap, present=[], reason="lost", now_us=NOW_US)
        books.events.remove(trade)
        await books.settle(books.draw(200))
        report = await place.proof(full=True)
        assert {each.code for each in report.findings} == {"EVENT_AGAINST_DECISION"}
        rows = [each for each in report.findings if each.user_id is None]
        assert [each.sequence for each in rows] == [trade.output_sequence]
        accounts = {(each.user_id, each.asset_id) for each in report.findings if each.user_id is not None}
        assert accounts == {(user, asset) for user in users for asset in (trade.base_asset, trade.quote_asset)}
        assert found(await place.proof()) == found(report), "it stays reported"

        work = Work(place.folder / "work")
        proof = Proof(store=place.store, work=work, pace=Pace(), wait_s=0.05)
        fixed = (await Fixer(store=place.store, work=work, proof=proof, durable_after_s=5.0).fix(
            (await proof.run()).run_id, None
        )).as_dict()  # fmt: skip
        assert {(each["user_id"], each["asset_id"]) for each in fixed["fixed"]} == accounts
        assert [each["code"] for each in fixed["not_fixed"]] == ["EVENT_AGAINST_DECISION"]
        await books.settle(books.draw(100))
        left = await proof.run(full=True)
        assert [(each.user_id, each.sequence) for each in left.findings] == [(None, trade.output_sequence)]
        proof.close()
        work.close()

    play(tmp_path, story)


def test_a_plain_gap(tmp_path: Path) -> None:
    async def story(place: Place) -> None:
        books = place.books
        await books.settle(books.draw(100))
        last = books.sequence
        await decisions.accept_gap(
            place.store, "main", last + 1, last + 70_000, present=[], reason="lost", now_us=NOW_US
        )
        books.sequence += 70_000
        await books.settle(books.draw(100))
        for full in (True, False, True):
            report = await place.proof(full=full)
            assert (report.findings, report.events, report.up_to["main"]) == ([], 200, 70_200)

    play(tmp_path, story)


def test_a_gap_that_is_accepted_while_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(place: Place) -> None:
        books = place.books
        await books.settle(books.draw(300))
        real, calls = place.store.load_state, 0

        async def deciding(stream: str) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:  # before and after the rows were read; now it looks how far settlement is
                gap = (books.sequence + 1, books.sequence + 5)
                monkeypatch.setattr(place.store, "load_state", real)
                await decisions.accept_gap(place.store, "main", *gap, present=[], reason="lost", now_us=NOW_US)
                books.sequence += 5
                await books.settle(books.draw(50))
            return await real(stream)

        monkeypatch.setattr(place.store, "load_state", deciding)
        for full in (True, False):
            report = await place.proof(full=full)
            assert (report.findings, report.up_to["main"]) == ([], books.sequence)

    play(tmp_path, story)


def test_late_streams_are_proved_too(tmp_path: Path) -> None:
    """Their trade ids need not rise: when one has moved, everything is read."""

    async def story(place: Place) -> None:
        await place.books.play(300)
        late = Books(place.store, "main/late", seed=9, users=7)
        late._ids[BTC] = 1  # ids in pages that were verified before
        await place.proof()
        await place.books.play(50)
        assert not (await place.proof()).is_full
        await late.begin()
        await late.play(60)
        report = await place.proof()
        assert report.is_full
        assert (report.findings, report.streams) == ([], ["main", "main/late"])
        assert report.events == place.books.sequence + late.sequence
        assert not (await place.proof()).is_full
        row = await place.hand.balance(3, USDT, "main/late")
        await place.hand.set_balance(row, available=1)
        assert found(await place.proof()) == {("BALANCE_DIFFERS", "main/late", 3, USDT)}

    play(tmp_path, story)


def test_another_store_under_the_same_work_file_is_read_whole(tmp_path: Path) -> None:
    async def story(place: Place) -> None:
        await place.books.play(200)
        await place.proof()
        async with SQLiteStore(place.folder / "other.db", {}) as other:
            books = Books(other, seed=5, born_us=NOW_US + 1_000_000)
            await books.begin()
            await books.play(100)
            assert (await Place(place.folder, other).proof()).findings == []
        assert (await place.proof()).findings == []

    play(tmp_path, story)


def test_a_damaged_work_file_is_put_aside(tmp_path: Path) -> None:
    async def story(place: Place) -> None:
        await place.books.play(200)
        await place.proof()
        (tmp_path / "work").write_bytes(b"no database at all" * 500)
        report = await place.proof()
        assert (report.findings, report.is_full) == ([], True)
        assert (tmp_path / "work.damaged").exists()

    play(tmp_path, story)


def test_what_was_verified_does_not_add_up(tmp_path: Path) -> None:
    """Another number in the work file: the sum says so, and the account."""

    async def story(place: Place) -> None:
        await place.books.play(200)
        await place.proof()
        with sqlite3.connect(tmp_path / "work") as db:
            db.execute("UPDATE accounts SET available = available + 1 WHERE user_id = 3 AND asset_id = ?", (USDT,))
        db.close()
        assert {each.code for each in (await place.proof()).findings} == {"ASSET_SUM", "BALANCE_DIFFERS"}
        assert (await place.proof(full=True)).findings == []

    play(tmp_path, story)


def test_amounts_beyond_64_bits_in_a_damaged_row(tmp_path: Path) -> None:
    async def story(place: Place) -> None:
        await place.books.play(300)
        for event in place.books.events[200:]:
            rows = await place.store.get_ledger_event("main", event.output_sequence)
            if rows is not None:
                columns = list(rows.values())
                columns[6] = 2**63 - 1
                await place.hand.write_ledger_event(tuple(columns))
        for full in (True, False):
            report = await place.proof(full=full)
            assert {each.code for each in report.findings} <= {"BALANCE_DIFFERS", "EVENT_DIFFERS"}
            assert report.findings
            assert len(await place.store.load_findings(report.run_id)) == len(report.findings)

    play(tmp_path, story)


def test_few_accounts_in_memory_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(place: Place) -> None:
        await place.books.play(800)
        monkeypatch.setattr("sidecar.proof.work.ACCOUNTS_CACHED_MAX", 3)
        monkeypatch.setattr("sidecar.proof.work._CHUNKS_CACHED_MAX", 0)
        for full in (True, False):
            assert (await place.proof(full=full)).findings == []
            await place.books.play(100)

    play(tmp_path, story)


def test_missing_sequences_are_one_range_wherever_the_bits_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(place: Place) -> None:
        await place.books.play(300)
        for sequence in range(60, 71):
            row = await place.store.get_ledger_event("main", sequence)
            assert row is not None
            await place.hand.delete_event("ledger_events", tuple(row.values()))
        for chunk in (64, 8, 16, 1 << 16):
            monkeypatch.setattr("sidecar.proof.work._CHUNK", chunk)
            report = await place.proof(full=True)
            ranges = [each.detail for each in report.findings if each.code == "EVENT_MISSING" and each.user_id is None]
            assert ranges == ["sequences 60 to 70: 11 events"]
            assert report.events == 309

    play(tmp_path, story)


def test_the_rate_is_kept(tmp_path: Path) -> None:
    async def story(place: Place) -> None:
        await place.books.play(1_000)
        loop = asyncio.get_running_loop()
        began = loop.time()
        report = await place.proof(pace=Pace(rate_rows_s=2_000, rows_a_page=50))
        assert report.events == 1_020
        assert loop.time() - began > 0.3

    play(tmp_path, story)


@pytest.mark.parametrize("rate, rows", [([], 50), (["--rate", "500"], 50), (["--rate", "0"], 2_000)])
def test_whoever_bounds_the_rate_is_given_small_pages(
    rate: list[str], rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settlement beside it waits for as long as a node reads a page."""
    play(tmp_path, lambda place: place.books.play(100))
    asked = []

    def noting(scan: Any) -> Any:
        def noted(*args: Any, rows_a_page: int = 0, **named: Any) -> Any:
            asked.append(rows_a_page)
            return scan(*args, rows_a_page=rows_a_page, **named)

        return noted

    scans = ("scan_stamped_balances", "scan_trades_after", "scan_trades_between", "scan_ledger_events", "scan_rejected")
    for name in scans:
        monkeypatch.setattr(SQLiteStore, name, noting(getattr(SQLiteStore, name)))
    given = ["--config", str(ROOT / "bench" / "binance.toml")]
    for setting in (f"store.sqlite.path={tmp_path / 'settlement.db'}", f"tape.path={tmp_path / 'tape.db'}"):
        given += ["--set", setting]
    for verb in (["reconcile"], ["audit"], ["statement", "1"]):
        asked.clear()
        main([*verb, *rate, *given])
        assert set(asked) == {rows}, verb


# --- mending ---


class _Jumpy(SQLiteStore):
    """A file that loses a repair once: as a node does, or a settler whose engine's clock has jumped."""

    durable_at_once = False
    lost = 0

    async def repair(self, stream: str, rows: Any, *given: Any) -> bool:
        kept = list(rows)
        done = await super().repair(stream, kept, *given)
        if self.lost < 1:
            self.lost += 1
            await super().repair(stream, [row._replace(available=row.available + 1) for row in kept], [], 0, None)
        return done


def test_a_repair_that_was_lost_is_made_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with _Jumpy(tmp_path / "settlement.db", {}) as store:
            books, hand = Books(store), Hand(store)
            await books.begin()
            await books.play(200)
            row = await hand.balance(4, USDT)
            await hand.set_balance(row, available=0)
            work = Work(tmp_path / "work")
            proof = Proof(store=store, work=work, pace=Pace(), wait_s=0.05)
            run_id = (await proof.run()).run_id
            fixer = Fixer(store=store, work=work, proof=proof, durable_after_s=0.1, look_after_s=0.0)
            fixed = await fixer.fix(run_id, {1})
            assert fixer.passes == 2
            (one,) = fixed.fixed
            assert one["before"]["available"] == 0
            assert one["after"]["available"] == row.available
            assert await hand.balance(4, USDT) == row
            (kept,) = await store.load_findings(run_id)
            assert kept.fixed_at_ms is not None
            assert '"before"' in kept.detail
            assert (await proof.run()).findings == []
            proof.close()
            work.close()

    asyncio.run(story())


def test_a_repair_that_took_too_long_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However right it looks: a settler may have begun above S. Before and after stay those of the first pass."""

    async def story(place: Place) -> None:
        await place.books.play(200)
        row = await place.hand.balance(4, USDT)
        await place.hand.set_balance(row, available=0)
        work = Work(tmp_path / "work")
        proof = Proof(store=place.store, work=work, pace=Pace(), wait_s=0.05)
        run_id = (await proof.run()).run_id
        real = place.store.repair

        async def slow(*given: Any) -> bool:
            monkeypatch.setattr("sidecar.proof.fix.IN_TIME", 0.0 if fixer.passes == 1 else 10_000.0)
            return await real(*given)

        monkeypatch.setattr(place.store, "repair", slow)
        fixer = Fixer(store=place.store, work=work, proof=proof, durable_after_s=5.0)
        (one,) = (await fixer.fix(run_id, None)).fixed
        assert fixer.passes == 2
        assert (one["before"]["available"], one["after"]["available"]) == (0, row.available)
        log = await place.store.read_decisions("main")
        assert [entry.kind for entry in log] == ["genesis", "stamp", "stamp"]
        proof.close()
        work.close()

    play(tmp_path, story)


def test_a_repair_is_given_up_when_it_never_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with _Jumpy(tmp_path / "settlement.db", {}) as store:
            store.lost = -1_000
            books, hand = Books(store), Hand(store)
            await books.begin()
            await books.play(100)
            await hand.set_balance(await hand.balance(4, USDT), available=0)
            work = Work(tmp_path / "work")
            proof = Proof(store=store, work=work, pace=Pace(), wait_s=0.05)
            run_id = (await proof.run()).run_id
            fixer = Fixer(store=store, work=work, proof=proof, durable_after_s=0.05, look_after_s=0.0)
            with pytest.raises(NotFixedError, match="user 4 asset 2 on main"):
                await fixer.fix(run_id, None)
            proof.close()
            work.close()

    asyncio.run(story())


def test_a_repair_takes_the_next_number_when_somebody_else_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(place: Place) -> None:
        await place.books.play(200)
        row = await place.hand.balance(4, USDT)
        await place.hand.set_balance(row, available=0)
        work = Work(tmp_path / "work")
        proof = Proof(store=place.store, work=work, pace=Pace(), wait_s=0.05)
        run_id = (await proof.run()).run_id
        real, calls = place.store.repair, 0

        async def raced(stream: str, *given: Any) -> bool:
            nonlocal calls
            calls += 1
            if calls == 1:
                await decisions.accept_gap(place.store, stream, 9_000, 9_001, present=[], reason="", now_us=NOW_US)
            return await real(stream, *given)

        monkeypatch.setattr(place.store, "repair", raced)
        fixer = Fixer(store=place.store, work=work, proof=proof, durable_after_s=5.0)
        assert (await fixer.fix(run_id, None)).as_dict()["ok"]
        log = await place.store.read_decisions("main")
        assert [entry.kind for entry in log] == ["genesis", "gap", "stamp"]
        assert json.loads(log[-1].body)["run_id"] == run_id
        assert await place.hand.balance(4, USDT) == row
        proof.close()
        work.close()

    play(tmp_path, story)


def test_settlement_goes_on_after_a_repair_from_the_mended_row(tmp_path: Path) -> None:
    """A settler that had taken the wrong row for true obeys the decision, and no update after S is lost."""

    async def story(place: Place) -> None:
        books = place.books
        await books.play(300)
        row = await place.hand.balance(4, USDT)
        await place.hand.set_balance(row, available=12_345)
        await books.begin()  # a restart: memory is what the rows say
        await books.settle(books.draw(100))
        work = Work(tmp_path / "work")
        proof = Proof(store=place.store, work=work, pace=Pace(), wait_s=0.05)
        report = await proof.run()
        assert found(report) == {("BALANCE_DIFFERS", "main", 4, USDT)}
        fixer = Fixer(store=place.store, work=work, proof=proof, durable_after_s=5.0)
        assert (await fixer.fix(report.run_id, None)).as_dict()["ok"]
        await books.settle(books.draw(100))
        for full in (False, True):
            assert (await proof.run(full=full)).findings == []
        proof.close()
        work.close()

    play(tmp_path, story)


# --- audit, beside settlement, small things ---


def test_an_audit_counts_everything_and_can_be_checked(tmp_path: Path) -> None:
    async def story(place: Place) -> None:
        await place.books.play(600)
        said = await audit(place.store, pace=Pace(rows_a_page=50), progress=Progress(), wait_s=0.05)
        assert said["ok"]
        stream = said["streams"]["main"]
        assert stream["trades"] + stream["ledger_events"] + stream["rejected"] == stream["sequences"] == 620
        assert all(asset["difference"] == 0 for asset in said["assets"].values())
        digest = said.pop("digest")
        text = json.dumps(said, sort_keys=True, separators=(",", ":"))
        assert digest == hashlib.sha256(text.encode()).hexdigest()

        row = await place.hand.balance(4, USDT)
        await place.hand.set_balance(row, available=(row.available or 0) + 3)
        said = await audit(place.store, pace=Pace(), progress=Progress(), wait_s=0.05)
        assert not said["ok"]
        assert said["assets"][str(USDT)]["difference"] == 3
        assert [each["code"] for each in said["findings"]] == ["ASSET_SUM"]

    play(tmp_path, story)


async def _until(true: Callable[[], bool]) -> None:
    for _ in range(3_000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within 30 s")


def test_it_proves_beside_settlement_and_counts_what_became_of_it(tmp_path: Path) -> None:
    async def story(place: Place) -> None:
        await place.books.play(200)
        hourly = Hourly(
            open_store=lambda: SQLiteStore(tmp_path / "settlement.db", {}), path=tmp_path / "work", interval_s=0.05,
            rate_rows_s=0.0,
        )  # fmt: skip
        running = asyncio.create_task(hourly.run())
        await _until(lambda: hourly.numbers.runs_total >= 2)
        assert (hourly.numbers.findings, hourly.numbers.events) == (0, 220)
        await place.hand.delete_balance(await place.hand.balance(4, USDT))
        await _until(lambda: hourly.numbers.findings > 0)
        assert hourly.numbers.failed_total == 0
        hourly.stop()
        await running

    play(tmp_path, story)


def test_a_proof_that_fails_beside_settlement_ends_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        def no_store() -> SQLiteStore:
            raise ZeroDivisionError

        hourly = Hourly(open_store=no_store, path=tmp_path / "work", interval_s=0.02, rate_rows_s=0.0)
        running = asyncio.create_task(hourly.run())
        await _until(lambda: hourly.numbers.failed_total >= 3)
        assert not running.done()
        hourly.stop()
        await running

    asyncio.run(story())


def test_every_code_is_explained() -> None:
    for code in CODES:
        assert code in explain(code)
        assert "next step" in explain(code)


@pytest.mark.parametrize("places", [set(), {0}, {7, 8, 9}, {15}, set(range(16)), {3, 5, 6, 15}])
def test_zeros_are_found_as_ranges(places: set[int]) -> None:
    bits = bytearray(b"\xff\xff")
    for place in places:
        bits[place // 8] &= ~(1 << place % 8)
    ranges = list(zeros(bits))
    assert {place for low, high in ranges for place in range(low, high + 1)} == places
    assert all(high + 1 < low for (_, high), (low, _) in itertools.pairwise(ranges))


def test_gaps_are_taken_out_of_ranges() -> None:
    assert without([(1, 10), (20, 30)], [(3, 4), (10, 20), (30, 99)]) == [(1, 2), (5, 9), (21, 29)]
    there = Ranges([(3, 5), (9, 9)])
    assert [there.count_to(n) for n in (2, 3, 5, 8, 9, 99)] == [0, 1, 3, 3, 4, 4]
    assert [n for n in range(12) if n in there] == [3, 4, 5, 9]
