"""The proof that goes on beside settlement: every `interval_s`, with a store and a pace of its own, never in its way.

It reads small pages at a bounded rate, gives the loop away after each, and holds no more memory than its work file's
cache. Whatever goes wrong in it is logged and counted; settlement never hears of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.errors import SidecarError, TapeLockedError
from sidecar.proof.reconcile import ROWS_A_PAGE_BESIDE, Pace, Proof, Report
from sidecar.proof.work import Work
from sidecar.store.base import Store
from sidecar.tape import lock

log = logging.getLogger(__name__)

SOON_S: Final = 300.0  # after a start, when the last proof is long ago
LOGGED_FINDINGS_MAX: Final = 50


@dataclass(kw_only=True)
class Numbers:
    """What became of the proofs of this process, for whoever shows it; times in seconds since 1970."""

    runs_total: int = 0
    failed_total: int = 0
    is_running: bool = False
    findings: int = 0  # of the last proof that finished
    not_checked: int = 0
    accounts: int = 0
    events: int = 0
    finished_at_s: float = 0.0  # 0: none yet
    duration_s: float = 0.0


class Hourly:
    """Proves the ledger every `interval_s` until it is stopped."""

    def __init__(
        self,
        *,
        open_store: Callable[[], Store],
        path: Path,
        interval_s: float,
        rate_rows_s: float,
        tape_path: Path | None = None,
    ) -> None:
        """Take how to get a store (still to be opened), the work file, the interval, the rate, and the tape."""
        self.numbers = Numbers()
        self._open_store = open_store
        self._path = path
        self._tape_path = tape_path
        self._interval_s = interval_s
        self._pace = Pace(rate_rows_s=rate_rows_s, rows_a_page=ROWS_A_PAGE_BESIDE)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """End; a proof under way goes on at the next start, from its last checkpoint."""
        self._stopping.set()

    async def run(self) -> None:
        """Prove now and then; returns after `stop`."""
        stopped = asyncio.ensure_future(self._stopping.wait())
        proving = asyncio.ensure_future(self._prove_on())
        try:
            await asyncio.wait((stopped, proving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (stopped, proving):
                task.cancel()
            await asyncio.gather(stopped, proving, return_exceptions=True)

    async def _prove_on(self) -> None:
        wait_s = await asyncio.to_thread(self._first_wait_s)
        while True:
            await asyncio.sleep(wait_s)
            wait_s = self._interval_s
            numbers = self.numbers
            numbers.is_running = True
            try:
                report = await self._prove()
            except TapeLockedError as held:
                log.info("reconcile_skipped", extra={"reason": str(held)})
            except SidecarError as error:
                numbers.failed_total += 1
                log.warning("reconcile_failed", extra={"error": str(error)})
            except Exception:  # settlement must not end because its proof has a bug
                numbers.failed_total += 1
                log.exception("reconcile_failed")
            else:
                self._tell(report)
            finally:
                numbers.is_running = False

    def _first_wait_s(self) -> float:
        try:
            work = Work(self._path)
        except SidecarError:
            return self._interval_s
        try:
            finished_ms: int = (work.get("finished") or {}).get("finished_at_ms", 0)
        finally:
            work.close()
        return max(self._interval_s - (time.time() - finished_ms / 1000), min(self._interval_s, SOON_S))

    async def _prove(self) -> Report:
        held = lock(self._path, "proof")
        try:
            work = await asyncio.to_thread(Work, self._path)
            try:
                async with self._open_store() as store:
                    proof = Proof(store=store, work=work, pace=self._pace, tape_path=self._tape_path)
                    try:
                        return await proof.run()
                    finally:
                        proof.close()
            finally:
                work.close()
        finally:
            held.close()

    def _tell(self, report: Report) -> None:
        numbers = self.numbers
        numbers.runs_total += 1
        numbers.findings = len(report.findings)
        numbers.not_checked = len(report.not_checked)
        numbers.accounts, numbers.events = report.accounts, report.events
        numbers.finished_at_s, numbers.duration_s = report.finished_at_ms / 1000, report.seconds
        said = {
            "run_id": report.run_id, "full": report.is_full, "accounts": report.accounts, "events": report.events,
            "events_read": report.events_read, "up_to": report.up_to, "findings": len(report.findings),
            "not_checked": len(report.not_checked), "duration_s": report.seconds,
        }  # fmt: skip
        if not report.findings:
            log.info("reconciled", extra=said)
            return
        log.error("reconciled_with_findings", extra=said | {"next_step": "`sidecar reconcile`, then `--explain CODE`"})
        for finding in report.findings[:LOGGED_FINDINGS_MAX]:
            log.error("finding", extra=finding.as_dict())
