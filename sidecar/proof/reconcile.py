"""Reconciliation: read the balance rows, fold their events from the tables, and say where the two differ.

Exact while settlement goes on (design.md, Reconciliation). In this order: the positions that are acknowledged; the
balance rows; wait until `acked` has reached every `last_sequence` that was read; the events. So every event that a row
contains is in the tables when they are read, and each row is compared at its own `last_sequence`. An event after it
that was acknowledged before the rows were read is a lost update.

A full proof reads every partition. An incremental one reads all balance rows, but of the events only those after the
position of the last proof: trade ids rise within a symbol on a main stream, so they stand in the newest pages. On a
late stream they need not: when one has moved, the proof is a full one. What was changed in old pages only a full proof
finds; what earlier proofs found there stays reported until then.

Whenever the store can't answer, or a node was away, the scan goes on from its last checkpoint, or the proof begins
again: a proof never takes a row's absence in an outage for a finding.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from sidecar.errors import OutcomeUnknownError
from sidecar.events import I63_MAX
from sidecar.proof.codes import Finding
from sidecar.proof.fold import Part
from sidecar.proof.judge import Pairs, Where, judge, link, opposite, stray, unexplained
from sidecar.proof.positions import WAIT_S, Known, positions, reached, trade_ids_rise
from sidecar.proof.rows import ASSET, LEDGER_SEQUENCE, USER, AccountKey, Row
from sidecar.proof.witness import contradicted
from sidecar.proof.work import Work
from sidecar.store.base import SCAN_ROWS, ProofFinding, ProofRun, Store

log = logging.getLogger(__name__)
T = TypeVar("T")

CHECKPOINT_ROWS: Final = 200_000
TRIES_MAX: Final = 5  # without getting any further
RETRY_S: Final = 1.0
ROWS_A_PAGE_BESIDE: Final = 50  # with 250, a tenth of 1,000 trades/s waited twice as long as without a proof
BALANCES_A_ROW: Final = 4  # a balance row is a quarter of a trade's: so much less of the rate does it take


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How much a proof asks of the store: rows a second (0: no bound), rows in one question."""

    rate_rows_s: float = 0.0
    rows_a_page: int = SCAN_ROWS

    @classmethod
    def bounded(cls, rate_rows_s: float) -> Pace:
        """Give the pace of a rate; 0: as fast as it goes, in large pages.

        Whoever bounds the rate has settlement beside the proof, which waits for as long as the node reads a page. (What
        the rows cost the node beyond that is garbage: on a small heap its collector's pauses are settlement's p99.)
        """
        return cls(rate_rows_s=rate_rows_s, rows_a_page=ROWS_A_PAGE_BESIDE if rate_rows_s else SCAN_ROWS)


@dataclass(kw_only=True)
class Progress:
    """How far a proof is: read by whoever shows it."""

    doing: str = "reading"
    rows: int = 0
    rows_expected: int = 0


@dataclass(kw_only=True)
class Report:
    """What a proof came to."""

    run_id: str
    is_full: bool
    started_at_ms: int
    finished_at_ms: int = 0
    streams: list[str] = field(default_factory=list)
    accounts: int = 0
    events: int = 0  # up to `up_to`, over all streams, those of earlier proofs included
    events_read: int = 0  # in this proof
    up_to: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    not_checked: list[dict[str, Any]] = field(default_factory=list)  # rows ahead of what is acknowledged
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Give it as design.md's shape has it, and what goes beyond it."""
        return {
            "ok": not self.findings,
            "streams": self.streams,
            "accounts": self.accounts,
            "events": self.events,
            "up_to": self.up_to,
            "findings": [
                finding.as_dict() | {"number": number, "fixable": finding.is_fixable}
                for number, finding in enumerate(self.findings, 1)
            ],
            "not_checked": self.not_checked,
            "run_id": self.run_id,
            "full": self.is_full,
            "events_read": self.events_read,
            "seconds": round(self.seconds, 3),
        }


class _AgainError(Exception):
    """What was read can't be relied on: the proof begins again."""


class Throttle:
    """Spends rows at a rate."""

    def __init__(self, rate_rows_s: float) -> None:
        self._rate = rate_rows_s
        self._free_at = 0.0

    async def spend(self, rows: float) -> None:
        """Wait until so many rows more may be asked for."""
        if self._rate <= 0:
            return
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now - 0.1) + rows / self._rate
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)


class Proof:
    """One proof after the other over one store, with one work file."""

    def __init__(
        self, *, store: Store, work: Work, pace: Pace, progress: Progress | None = None, wait_s: float = WAIT_S,
        tape_path: Path | None = None,
    ) -> None:  # fmt: skip
        """Take an open store and the work file; `wait_s` bounds the waiting for a settler that does not run.

        The tape, if there is one beside us, is asked only where the tables can't tell a changed balance from a changed
        ledger event.
        """
        self.progress = progress or Progress()
        self._store = store
        self._work = work
        self._pace = pace
        self._wait_s = wait_s
        self._tape_path = tape_path
        self._throttle = Throttle(pace.rate_rows_s)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="proof")
        self._known: dict[str, Known] = {}
        self._cursors: dict[str, Any] = {}
        self._rows_since_checkpoint = 0

    def close(self) -> None:
        """Let go of the thread; the work file is whoever's it was."""
        self._thread.shutdown()

    async def _do(self, work: Callable[..., T], *args: Any) -> T:
        """Work on the file, off the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    # --- the whole ---

    async def run(self, *, full: bool = False, resume: bool = True, record: bool = True) -> Report:
        """Prove the ledger once. `record`: write the run and its findings to the store, remember what was verified.

        Raises OutcomeUnknownError when the store can't be asked for long.
        """
        tries, report = 0, None
        while report is None:
            outages, rows = self._store.outages, self.progress.rows
            try:
                made = await self._once(full=full, resume=resume)
                if self._store.outages != outages:
                    raise _AgainError("a database node was away and is back")
                report = made
            except (OutcomeUnknownError, _AgainError) as error:
                if isinstance(error, OutcomeUnknownError) and self._store.outages == outages:
                    resume = True
                else:
                    await self._do(self._work.rollback)
                    await self._do(self._begin_anew)
                tries = 1 if self.progress.rows > rows and not isinstance(error, _AgainError) else tries + 1
                log.warning("reconcile_goes_on", extra={"error": str(error), "tries": tries})
                if tries >= TRIES_MAX:
                    raise OutcomeUnknownError(f"reconcile: {error}; tried {tries} times") from error
                await asyncio.sleep(RETRY_S * tries)
        if record:
            await self._record(report)
        await self._do(self._begin_anew)
        return report

    def _begin_anew(self) -> None:
        self._work.clear()
        self._work.commit()

    async def _once(self, *, full: bool, resume: bool) -> Report:
        run = await self._do(self._work.get, "run")
        known = await positions(self._store)
        if not (run and resume and self._goes_on(run, full, known)):
            run, known = await self._begin(full, known)
        self._known = known
        parts = self._parts(run, known)
        await self._do(self._work.rollback)
        await self._do(self._work.begin_fold, parts)
        self._cursors = await self._do(self._work.get, "cursors") or {}
        await self._fold(parts, run["full"])
        self.progress.doing = "comparing"
        return await self._judge(parts, run)

    # --- positions ---

    def _goes_on(self, run: dict[str, Any], full: bool, known: dict[str, Any]) -> bool:
        """Say whether a proof that was interrupted can be taken up: the same streams, the same decisions."""
        if full and not run["full"]:
            return False
        prints = {name: _fingerprint(known[name], place["up_to"]) for name, place in run["at"].items() if name in known}
        same = prints == {name: place["fingerprint"] for name, place in run["at"].items()}
        if same:
            log.info("reconcile_taken_up", extra={"run_id": run["run_id"]})
        return same

    async def _begin(self, full: bool, known: dict[str, Known]) -> tuple[dict[str, Any], dict[str, Known]]:
        """Read the rows and the positions around them; what is kept of it survives a crash."""
        started_ms, work = _now_ms(), self._work
        before = {name: each.sequence for name, each in known.items()}
        await self._do(work.clear)
        self.progress.doing = "reading balances"
        async for rows in self._store.scan_stamped_balances(rows_a_page=self._pace.rows_a_page):
            await self._do(work.add_rows, rows)
            self.progress.rows += len(rows)
            await self._throttle.spend(len(rows) / BALANCES_A_ROW)
        known |= await positions(self._store)  # a stream that began meanwhile has rows, too
        verified = await self._do(work.verified)
        wanted = await self._do(work.highest)
        for name, said in verified.items():
            wanted[name] = max(wanted.get(name, 0), said["sequence"])
        self.progress.doing = "waiting for settlement"
        known = await reached(self._store, known, wanted, self._wait_s)

        full = full or not verified or _needs_all(known, verified)
        if full:
            await self._do(work.forget)
            verified = {}
        run: dict[str, Any] = {"run_id": str(uuid.uuid4()), "full": full, "started_at_ms": started_ms, "at": {}}
        for name, each in known.items():
            first, at = each.agreed.first_sequence, each.sequence
            stamp_us = each.acked.stamp_us if each.acked else 0
            run["at"][name] = {
                "verified": verified[name]["sequence"] if name in verified else first - 1,
                "before": min(before.get(name, first - 1), at),
                "up_to": at,
                # The next batch's stamp is at least this: a cell with a smaller one never shadows it.
                "next_stamp_us": max(stamp_us + 1, each.agreed.base_us + at + 1 - first),
                "ids": each.acked.last_trade_ids if each.acked else {},
                "fingerprint": _fingerprint(each, at),
            }
        await self._do(work.put, "run", run)
        await self._do(work.put, "cursors", {})
        await self._do(work.put, "fold", {})
        await self._do(work.commit)
        return run, known

    def _parts(self, run: dict[str, Any], known: dict[str, Known]) -> list[Part]:
        places = ("verified", "before", "up_to", "next_stamp_us")
        self._ids = {name: at["ids"] for name, at in run["at"].items()}
        return [Part(name, known[name].agreed, **{key: at[key] for key in places}) for name, at in run["at"].items()]

    # --- events ---

    async def _fold(self, parts: list[Part], full: bool) -> None:
        progress = self.progress
        progress.doing = "folding events"
        progress.rows_expected = progress.rows + sum(part.up_to - part.verified for part in parts)
        async for symbol, only, rows, cursor in self._trades(parts, full=full):
            await self._do(self._work.fold_trades, symbol, rows, only)
            await self._spent(len(rows))
            if cursor is not None:
                await self._keep(*cursor)
        for part in parts:
            first, last = _sequences(part, full)
            for unit, scan, fold in (
                ("ledger_events", self._store.scan_ledger_events, self._work.fold_ledger_events),
                ("rejected_events", self._store.scan_rejected, self._work.note_rejected),
            ):
                key = f"{unit} {part.name}"
                if key in self._cursors or last < first:
                    continue
                async for rows in scan(part.name, first, last, rows_a_page=self._pace.rows_a_page):
                    await self._do(fold, part, rows)
                    await self._spent(len(rows))
                await self._keep(key, True)

    async def _trades(
        self, parts: list[Part], *, full: bool
    ) -> AsyncIterator[tuple[str, str | None, list[Row], tuple[str, Any] | None]]:
        """Go through the trades that this proof is about: symbol, the one stream meant, rows, a cursor to keep."""
        cursors, page = self._cursors, self._pace.rows_a_page
        if full:
            symbols = sorted({name for part in parts for name in part.symbols.symbols} | self._store.page_widths.keys())
            await self._store.ready_for(symbols)
            for symbol in symbols:
                if cursors.get(symbol) == "end":
                    continue
                async for after, rows in self._store.scan_trades_after(symbol, cursors.get(symbol), rows_a_page=page):
                    yield symbol, None, rows, None if after is None else (symbol, after)
                yield symbol, None, [], (symbol, "end")
            return
        for part in parts:
            for symbol in sorted(part.symbols.symbols):
                key, first = f"{symbol} of {part.name}", part.ids.get(symbol, 0) + 1
                last = None if part.ahead else self._ids[part.name].get(symbol, 0)
                if key in cursors or (last is not None and last < first):
                    continue
                async for rows in self._store.scan_trades_between(symbol, first, last, rows_a_page=page):
                    yield symbol, part.name, rows, None
                yield symbol, part.name, [], (key, True)

    async def _spent(self, rows: int) -> None:
        self.progress.rows += rows
        self._rows_since_checkpoint += rows
        await self._throttle.spend(rows)

    async def _keep(self, unit: str, cursor: Any) -> None:
        """Keep a cursor, at a checkpoint now and then."""
        self._cursors[unit] = cursor
        if self._rows_since_checkpoint >= CHECKPOINT_ROWS or cursor in ("end", True):
            self._rows_since_checkpoint = 0
            await self._do(self._work.checkpoint, self._cursors)

    # --- the judgement ---

    async def _judge(self, parts: list[Part], run: dict[str, Any]) -> Report:
        work = self._work
        await self._do(work.find_missing)
        findings = await self._do(work.odd_findings)
        for name, (count, sequence) in sorted(work.unknown.items()):
            findings.append(Finding(code="UNKNOWN_STREAM", stream=name, sequence=sequence, detail=f"{count} trades"))
        report = Report(run_id=run["run_id"], is_full=run["full"], started_at_ms=run["started_at_ms"])
        accounts: list[Finding] = []
        even: list[Finding] = []  # differ by their amount alone
        pieces = work.judged()
        sums = work.sums = {}
        while piece := await self._do(next, pieces, None):
            for stream, key, row, fold, base in piece:
                part = work.parts.get(stream)
                if part is None:
                    assert row is not None
                    accounts.append(stray(row))
                    _add_up(sums, key, row.available, 0, 0)
                    continue
                found, is_checked = judge(part, key, row, fold, base)
                accounts += found
                even += [each for each in found if each.code == "BALANCE_DIFFERS" and each.detail == ""]
                if not is_checked:
                    assert row is not None
                    at = {"stream": stream, "user_id": key[0], "asset_id": key[1], "sequence": row.last_sequence}
                    report.not_checked.append(at)
                at_row = part.at_row(fold) if row is not None and is_checked else part.at_before(fold)
                stored = (row.available if is_checked else at_row[0]) if row is not None else 0
                _add_up(sums, key, stored, at_row[0] if row is not None else 0, part.at_before(fold)[0])
            await asyncio.sleep(0)
        accounts = await self._still_ahead(accounts)
        await self._blame_events(parts, run["full"], even, accounts)
        findings += accounts
        findings += unexplained(parts, findings)

        await self._do(work.save, {part.name: _fingerprint(self._known[part.name], part.before) for part in parts})
        for part in parts:
            totals = await self._do(work.totals, part.name)
            for asset in sorted(totals.keys() | part.sums.keys()):
                if totals.get(asset, 0) != part.sums.get(asset, 0):
                    detail = "the verified accounts don't add up to what ledger events brought in"
                    findings.append(
                        Finding(code="ASSET_SUM", stream=part.name, asset_id=asset, expected=part.sums.get(asset, 0),
                                actual=totals.get(asset, 0), detail=detail)
                    )  # fmt: skip
        report.findings = sorted(findings, key=_order)
        report.streams = [part.name for part in parts]
        report.up_to = {part.name: part.up_to for part in parts}
        report.accounts = await self._do(work.count_rows)
        report.events_read = sum(sum(part.counts.values()) for part in parts)
        report.events = sum(self._events_to(part) for part in parts)
        report.finished_at_ms = _now_ms()
        report.seconds = (report.finished_at_ms - report.started_at_ms) / 1000
        return report

    def _events_to(self, part: Part) -> int:
        """Count the rows up to `up_to`: what has its place in the sequence, without gaps and what is missing."""
        gone = sum(
            max(min(last, part.up_to) - max(first, part.first) + 1, 0)
            for first, last in (*part.agreed.gaps, *part.missing.ranges)
        )
        return max(part.up_to - part.first + 1 - gone, 0)

    async def _still_ahead(self, accounts: list[Finding]) -> list[Finding]:
        """Drop what is no longer stamped ahead: a batch of a life that ended may have been cut further on than ours."""
        if not any(each.code == "FUTURE_STAMPED" for each in accounts):
            return accounts
        stamps = {}
        for name, part in self._work.parts.items():
            state = (await self._store.load_state(name)).get("acked")
            stamps[name] = max(part.next_stamp_us, state.stamp_us + 1 if state else 0)
        return [
            each
            for each in accounts
            if each.code != "FUTURE_STAMPED" or each.actual is None or each.actual >= stamps[each.stream]
        ]

    async def _blame_events(self, parts: list[Part], full: bool, even: list[Finding], accounts: list[Finding]) -> None:
        """Where two accounts deviate by opposite amounts and trade with each other, it was the trade that was changed.

        Of the rest it was a ledger event where the tape still has that otherwise. Either needs the events of this proof
        a second time, and happens only when there are such accounts.
        """
        known = await self._do(self._work.suspects)
        blamed: dict[Where, list[int]] = {where: known[where] for each in even if (where := _where(each)) in known}
        pairs = opposite([each for each in even if _where(each) not in known])
        if pairs:
            await self._link(parts, full, pairs)
        for (stream, asset, *users), linked in pairs.items():
            for user in users if linked else ():
                blamed[stream, user, asset] = linked
                await self._do(self._work.suspect, stream, (user, asset), linked)
        for part in parts:
            doubtful = {(user, asset) for stream, user, asset in map(_where, even) if stream == part.name}
            doubtful -= {(user, asset) for stream, user, asset in blamed if stream == part.name}
            for key, changed in (await self._contradicted(part, full, doubtful)).items():
                blamed[part.name, *key] = changed
                await self._do(self._work.suspect, part.name, key, changed)
        for at, each in enumerate(accounts):
            if each.code == "BALANCE_DIFFERS" and (linked := blamed.get(_where(each), [])):
                one = len(linked) == 1
                some = ", ".join(map(str, linked))
                detail = "this event's row was changed" if one else f"a row of the events at {some} was changed"
                accounts[at] = replace(each, code="EVENT_DIFFERS", sequence=linked[0] if one else None, detail=detail)

    async def _link(self, parts: list[Part], full: bool, pairs: Pairs) -> None:
        """Go through the trades of this proof once more, for those between pairs of accounts."""
        self.progress.doing = "looking for changed trades"
        self._cursors = {}
        ids = {part.name: part.ids for part in parts}
        verified = await self._do(self._work.verified)
        for part in parts:  # from where this proof began
            part.ids = dict(verified[part.name]["ids"]) if part.name in verified else {}
        async for _, only, rows, _ in self._trades(parts, full=full):
            await self._do(link, rows, only, pairs)
            await self._spent(len(rows))
        for part in parts:
            part.ids = ids[part.name]

    async def _contradicted(self, part: Part, full: bool, keys: set[AccountKey]) -> dict[AccountKey, list[int]]:
        """Give, by account, the ledger events of this proof whose rows the tape contradicts."""
        found: dict[AccountKey, list[int]] = {}
        if not keys or self._tape_path is None:
            return found
        scan = self._store.scan_ledger_events(part.name, *_sequences(part, full), rows_a_page=self._pace.rows_a_page)
        async for rows in scan:
            theirs = {row[LEDGER_SEQUENCE]: (row[USER], row[ASSET]) for row in rows if (row[USER], row[ASSET]) in keys}
            some = [row for row in rows if row[LEDGER_SEQUENCE] in theirs]
            for sequence in await self._do(contradicted, self._tape_path, part.name, some):
                found.setdefault(theirs[sequence], []).append(sequence)
            await self._spent(len(rows))
        return found

    async def _record(self, report: Report) -> None:
        """Write the run and its findings to the store, then forget the rows: the proof is finished."""
        up_to = max(report.up_to.values(), default=0)
        run = ProofRun(
            report.run_id, ",".join(report.streams), report.started_at_ms, up_to, report.accounts, report.events,
            len(report.findings), None,
        )  # fmt: skip
        await self._store.save_run(run)
        kept = [as_kept(number, finding) for number, finding in enumerate(report.findings, 1)]
        await self._store.save_findings(report.run_id, kept)
        await self._store.save_run(run._replace(finished_at_ms=report.finished_at_ms))
        finished = {"run_id": report.run_id, "finished_at_ms": report.finished_at_ms, "full": report.is_full}
        await self._do(self._work.put, "finished", finished)


def _sequences(part: Part, full: bool) -> tuple[int, int]:
    """Give the first and the last sequence that a proof asks for."""
    return 0 if full else part.verified + 1, I63_MAX if full or part.ahead else part.up_to


def _needs_all(known: dict[str, Known], verified: dict[str, dict[str, Any]]) -> bool:
    """Say whether the newest pages are not enough: another store than before, or a late stream that has moved."""
    if verified.keys() - known.keys():
        return True
    for name, each in known.items():
        said = verified.get(name)
        if said is not None and each.sequence < said["sequence"]:
            return True
        if said is not None and said["fingerprint"] != _fingerprint(each, said["sequence"]):
            return True
        if each.sequence > (said["sequence"] if said else each.agreed.first_sequence - 1) and not trade_ids_rise(name):
            return True
    return False


def as_kept(number: int, finding: Finding) -> ProofFinding:
    """Give a finding as its row: a number that no bigint holds stands in the detail."""
    expected, actual, detail = finding.expected, finding.actual, finding.detail
    if expected is not None and not -I63_MAX - 1 <= expected <= I63_MAX:
        expected, detail = None, f"{detail} expected {finding.expected}".strip()
    if actual is not None and not -I63_MAX - 1 <= actual <= I63_MAX:
        actual, detail = None, f"{detail} actual {finding.actual}".strip()
    return ProofFinding(
        number, finding.code, finding.stream, finding.user_id, finding.asset_id, finding.sequence, expected, actual,
        detail, None,
    )  # fmt: skip


def _add_up(sums: dict[int, list[int]], key: AccountKey, stored: int | None, at_row: int, at_before: int) -> None:
    total = sums.setdefault(key[1], [0, 0, 0])
    total[0] += stored or 0
    total[1] += at_row
    total[2] += at_before


def _where(finding: Finding) -> Where:
    assert finding.user_id is not None
    assert finding.asset_id is not None
    return finding.stream, finding.user_id, finding.asset_id


def _order(finding: Finding) -> tuple[Any, ...]:
    return (
        finding.user_id is not None, finding.stream, finding.user_id or 0, finding.asset_id or 0, finding.code,
        finding.sequence or 0,
    )  # fmt: skip


def _fingerprint(known: Known, up_to: int) -> str:
    """Give a short text that changes when what was decided about sequences up to one does, or the stream is another."""
    agreed = known.agreed
    gaps = [gap for gap in agreed.gaps if gap[0] <= up_to]
    rejects = sorted(each for each in agreed.rejects if each <= up_to)
    said = json.dumps([agreed.session, agreed.first_sequence, known.born_ms, gaps, rejects])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
