"""Mend balance rows that a finished proof found wrong, while settlement goes on and without losing an update of it.

One pass (design.md, Reconciliation): read S, the position that is acknowledged; fold the accounts up to S from the
tables; write their rows with a stamp F above all that may have been written; raise `base_us` above F by a decision. All
of it within `durable_after_s`, so that every settler that obeys the decision starts over from `durable` at or below S,
takes the rows as any that are ahead, and counts every event after S. A pass that took longer is made again.

Then it is looked at, because three things can still take a pass back: the engine's clock jumped ahead by more than
`durable_after_s` between S and the decision, so that an update of a settler that had not read it won over F; a database
node lost the acknowledged row with the power; another person wrote. So after `durable_after_s` the ledger is proved
again, and an account that still deviates is mended again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from sidecar import decisions
from sidecar.decisions import Agreed
from sidecar.errors import OutcomeUnknownError, SidecarError
from sidecar.events import Balance, Decision, State
from sidecar.proof.codes import CODES, Finding
from sidecar.proof.fold import At
from sidecar.proof.positions import trade_ids_rise
from sidecar.proof.reconcile import Proof
from sidecar.proof.rows import (
    ASSET,
    LEDGER_SEQUENCE,
    SEQUENCE,
    STREAM,
    USER,
    AccountKey,
    ledger_amount,
    ledger_time_us,
    trade_is_whole,
    trade_postings,
    trade_time_us,
)
from sidecar.proof.work import Work
from sidecar.store.base import ProofFinding, StampedBalance, Store

log = logging.getLogger(__name__)

PASSES_MAX: Final = 10
IN_TIME: Final = 0.75  # of durable_after_s: what a pass may take
LOOK_AFTER_S: Final = 1.5  # settlers read decisions every second

Where = tuple[str, int, int]  # stream, user_id, asset_id


class NotFixedError(SidecarError):
    """The accounts still deviate after so many passes; the message says what to look at."""


@dataclass(kw_only=True)
class Fixed:
    """What came of it, finding by finding."""

    run_id: str
    fixed: list[dict[str, Any]] = field(default_factory=list)
    not_fixed: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Give it for machines."""
        return {"ok": not self.not_fixed, "run_id": self.run_id, "fixed": self.fixed, "not_fixed": self.not_fixed}


def chosen(findings: Iterable[ProofFinding], numbers: set[int] | None) -> tuple[list[ProofFinding], Fixed]:
    """Take out what can be mended of the findings that were named (None: all), with a reason for each that can't."""
    wanted, result = [], Fixed(run_id="")
    for each in findings:
        if numbers is not None and each.number not in numbers:
            continue
        if each.fixed_at_ms is not None:
            continue
        if is_fixable(each):
            wanted.append(each)
        else:
            why = CODES[each.code].next_step if each.code in CODES else "unknown code"
            result.not_fixed.append({"number": each.number, "code": each.code, "why": why})
    return wanted, result


def is_fixable(kept: ProofFinding) -> bool:
    """Say whether a kept finding can be mended."""
    if kept.code not in CODES or kept.user_id is None or kept.asset_id is None:
        return False
    return Finding(code=kept.code, stream=kept.stream, user_id=kept.user_id, asset_id=kept.asset_id).is_fixable


class Fixer:
    """Mends some findings of one finished run."""

    def __init__(
        self,
        *,
        store: Store,
        work: Work,
        proof: Proof,
        durable_after_s: float,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        look_after_s: float = LOOK_AFTER_S,
    ) -> None:
        """Take what a proof is made with, and the `durable_after_s` that all settlers of the stream run with."""
        self.progress = proof.progress
        self.passes = 0
        self._store = store
        self._work = work
        self._proof = proof
        self._durable_after_s = durable_after_s
        self._now_us = now_us
        self._look_after_s = look_after_s

    async def fix(self, run_id: str, numbers: set[int] | None) -> Fixed:
        """Mend the findings of a run: those with these numbers, or all. Raises NotFixedError when it does not hold."""
        findings = await self._store.load_findings(run_id)
        wanted, result = chosen(findings, numbers)
        result.run_id = run_id
        accounts = {_where(each) for each in wanted}
        first: dict[Where, StampedBalance | None] = {}
        last: dict[Where, At] = {}
        deviating = await self._deviating(accounts)
        for each in wanted:
            if (why := deviating.get(_where(each))) is not None and not why.is_fixable:
                step = CODES[why.code].next_step
                result.not_fixed.append({"number": each.number, "code": each.code, "why": f"now {why.code}: {step}"})
        late: set[Where] = (
            set()
        )  # a settler may have moved `durable` past S meanwhile: whatever it looks like, once more
        while left := {where for where, why in deviating.items() if why.is_fixable} | late:
            if self.passes >= PASSES_MAX:
                where = ", ".join(f"user {user} asset {asset} on {stream}" for stream, user, asset in sorted(left))
                raise NotFixedError(
                    f"{where}: still deviating after {self.passes} passes; is somebody writing to these rows, or are"
                    " the engine's times far ahead? Run `sidecar reconcile` and look at the write times"
                )
            self.passes += 1
            late = set()
            for stream in sorted({stream for stream, _, _ in left}):
                keys = sorted((user, asset) for name, user, asset in left if name == stream)
                made, is_in_time = await self._passed(stream, keys, run_id)
                late |= set() if is_in_time else {(stream, *key) for key in made}
                for key, (before, after) in made.items():
                    first.setdefault((stream, *key), before)
                    last[stream, *key] = after
            await self._until_obeyed()
            deviating = await self._deviating(accounts)
        refused = {each["number"] for each in result.not_fixed}
        for each in wanted:
            if each.number not in refused:
                result.fixed.append(await self._kept(each, run_id, first, last))
        return result

    async def _deviating(self, accounts: set[Where]) -> dict[Where, Finding]:
        """Prove the ledger; give what of these accounts deviates now: what can't be mended counts first."""
        report = await self._proof.run(record=False)
        found: dict[Where, Finding] = {}
        for each in report.findings:
            if each.user_id is None or each.asset_id is None:
                continue
            where = (each.stream, each.user_id, each.asset_id)
            if where in accounts and (where not in found or not each.is_fixable):
                found[where] = each
        return found

    async def _until_obeyed(self) -> None:
        """Wait until what was written is durable, and every settler has read the decision."""
        self.progress.doing = "waiting until it is durable"
        if not self._store.durable_at_once:
            await asyncio.sleep(self._durable_after_s + self._look_after_s)

    async def _passed(
        self, stream: str, keys: list[AccountKey], run_id: str
    ) -> tuple[dict[AccountKey, tuple[StampedBalance | None, At]], bool]:
        """Make one pass over some accounts of a stream; give them as they were and as they are, and whether in time.

        Nothing was written to those that are not in the answer.
        """
        self.progress.doing = f"mending {len(keys)} rows"
        loop = asyncio.get_running_loop()
        began = loop.time()
        made: dict[AccountKey, tuple[StampedBalance | None, At]] = {}
        try:
            agreed = await decisions.read_agreed(self._store, stream)
            acked = (await self._store.load_state(stream)).get("acked") if agreed else None
            folded = await self._folded(stream, keys, acked) if agreed and acked else dict.fromkeys(keys, (0, 0, 0, 0))
            if folded is None:
                return {}, True
            rows = {key: await self._row(stream, key) for key in keys}
            newest = max([row.write_us for row in rows.values() if row is not None], default=0)
            stamp_us = max(newest, acked.stamp_us if acked else 0, self._now_us()) + int(self._durable_after_s * 1e6)
            present, absent = [], []
            for key, at in folded.items():
                if not at[1]:
                    absent.append(key)
                    continue
                row = rows[key]
                keeps = row is not None and row.last_sequence == at[2] and row.updated_at is not None
                updated_at = row.updated_at if keeps and row is not None and row.updated_at is not None else at[3]
                present.append(Balance(*key, stream, *at[:3], updated_at))
            made = {key: (rows[key], folded[key]) for key in keys}
            if agreed is None:  # nobody settles this stream, and nobody is to obey
                await self._store.repair(stream, present, absent, stamp_us, None)
                return made, True
            while not await self._store.repair(
                stream, present, absent, stamp_us, await self._stamp(stream, stamp_us, run_id, len(keys))
            ):
                if loop.time() - began > self._durable_after_s * IN_TIME:
                    return made, False
        except OutcomeUnknownError as unknown:
            log.warning("fix_goes_on", extra={"error": str(unknown)})
            return made, False
        took_s = loop.time() - began
        is_in_time = took_s <= self._durable_after_s * IN_TIME
        log.info("fixed", extra={"stream": stream, "accounts": len(keys), "seconds": took_s, "in_time": is_in_time})
        return made, is_in_time

    async def _stamp(self, stream: str, stamp_us: int, run_id: str, accounts: int) -> Decision:
        body = {"base_us": stamp_us + 1, "run_id": run_id, "accounts": accounts}
        made = decisions.decision("stamp", self._now_us(), reason="reconcile --fix", body=body)
        number = len(await self._store.read_decisions(stream)) + 1
        return made._replace(stream=stream, number=number, decided_by=decisions.decided_by())

    async def _row(self, stream: str, key: AccountKey) -> StampedBalance | None:
        rows = await self._store.get_stamped_balances(key[0])
        return next((row for row in rows if (row.asset_id, row.stream) == (key[1], stream)), None)

    async def _folded(self, stream: str, keys: list[AccountKey], acked: State) -> dict[AccountKey, At] | None:
        """Fold accounts up to `acked`: what the last proof verified, and the events since; None when some are away."""
        said = self._work.verified().get(stream)
        agreed = await decisions.read_agreed(self._store, stream)
        if said is None or agreed is None or acked.sequence < said["sequence"]:
            return None
        folded = self._work.base_of(stream, keys)
        verified = said["sequence"]
        if acked.sequence == verified:
            return folded
        if not trade_ids_rise(stream):
            return None  # prove again first: a full proof
        seen: set[int] = set()
        async for sequence, postings, time_us in self._events(stream, agreed, said, acked):
            if not verified < sequence <= acked.sequence or sequence in seen or _is_forbidden(agreed, sequence):
                continue
            seen.add(sequence)
            for key in postings.keys() & folded.keys():
                at = folded[key]
                is_newest = sequence > at[2]
                folded[key] = (
                    at[0] + postings[key], at[1] + 1, max(at[2], sequence), time_us if is_newest else at[3],
                )  # fmt: skip
        gone = self._work.missing_between(stream, verified + 1, acked.sequence) + sum(
            max(min(last, acked.sequence) - max(first, verified + 1) + 1, 0) for first, last in agreed.gaps
        )
        if len(seen) + gone < acked.sequence - verified:
            log.warning("fix_goes_on", extra={"error": "not every acknowledged event is there"})
            return None
        return folded

    async def _events(
        self, stream: str, agreed: Agreed, said: dict[str, Any], acked: State
    ) -> AsyncIterator[tuple[int, dict[AccountKey, int], int]]:
        """Give the events after what is verified: sequence, postings (a rejected one has none), time."""
        first = said["sequence"] + 1
        for symbol, rule in agreed.symbols.symbols.items():
            low, high = said["ids"].get(symbol, 0) + 1, acked.last_trade_ids.get(symbol, 0)
            if high < low:
                continue
            async for rows in self._store.scan_trades_between(symbol, low, high):
                for row in rows:
                    if row[STREAM] == stream and trade_is_whole(row):
                        postings = trade_postings(row, agreed.symbols.revenue_user_id)
                        yield row[SEQUENCE], postings, trade_time_us(row, rule)
        async for rows in self._store.scan_ledger_events(stream, first, acked.sequence):
            for row in rows:
                amount = ledger_amount(row)
                if amount is not None:
                    yield row[LEDGER_SEQUENCE], {(row[USER], row[ASSET]): amount}, ledger_time_us(row)
        async for rows in self._store.scan_rejected(stream, first, acked.sequence):
            for row in rows:
                yield row[2], {}, 0

    async def _kept(
        self,
        finding: ProofFinding,
        run_id: str,
        first: dict[Where, StampedBalance | None],
        last: dict[Where, At],
    ) -> dict[str, Any]:
        """Write before and after beside the finding."""
        where = _where(finding)
        before, after = first.get(where), last.get(where)
        names = ("available", "version", "last_sequence", "updated_at")
        said = {
            "before": None if before is None else before._asdict(),
            "after": None if after is None or not after[1] else dict(zip(names, after, strict=True)),
        }
        if after is None:
            detail = f"{finding.detail} right again before it was mended".strip()
        else:
            detail = f"{finding.detail} {json.dumps(said)}".strip()
        now_ms = self._now_us() // 1000
        await self._store.save_findings(run_id, [finding._replace(detail=detail, fixed_at_ms=now_ms)])
        kept = ("number", "code", "stream", "user_id", "asset_id")
        return {name: getattr(finding, name) for name in kept} | said


def _is_forbidden(agreed: Agreed, sequence: int) -> bool:
    gap = agreed.gap_at_or_after(sequence)
    return gap is not None and gap[0] <= sequence


def _where(finding: ProofFinding) -> Where:
    assert finding.user_id is not None
    assert finding.asset_id is not None
    return finding.stream, finding.user_id, finding.asset_id
