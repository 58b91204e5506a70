"""The audit: promises 2 and 3 shown from the tables alone, as a summary that can be put away.

Every sequence from the first to the acknowledged one is exactly one of trade, ledger event, rejected event, accepted
gap; every row stands in its own page; no trade's row is without the balances that it moved; what all balances of an
asset add up to is what deposits, withdrawals and adjustments brought in. Nothing that an earlier proof verified counts.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any, Final

from sidecar.proof.codes import Finding
from sidecar.proof.fold import Part
from sidecar.proof.reconcile import Pace, Progress, Proof, Report
from sidecar.proof.work import Work
from sidecar.store.base import Store

# What an audit is about; what else a proof finds is about a single balance, and `reconcile` says it.
_ABOUT: Final = frozenset(
    {"EVENT_MISSING", "EVENT_TWICE", "EVENT_INCOMPLETE", "EVENT_DIFFERS", "EVENT_AGAINST_DECISION", "WRONG_PAGE",
     "UNKNOWN_STREAM", "UPDATE_MISSING", "BALANCE_MISSING"}
)  # fmt: skip


async def audit(store: Store, *, pace: Pace, progress: Progress, wait_s: float) -> dict[str, Any]:
    """Read everything once; give the summary. `digest` is SHA-256 of the rest, as JSON with sorted keys, no spaces."""
    work = Work(None)
    proof = Proof(store=store, work=work, pace=pace, progress=progress, wait_s=wait_s)
    try:
        report = await proof.run(full=True, resume=False, record=False)
        return with_digest(_summary(report, work))
    finally:
        proof.close()
        work.close()


def _summary(report: Report, work: Work) -> dict[str, Any]:
    findings = [each for each in report.findings if each.code in _ABOUT]
    brought: dict[int, int] = {}
    for part in work.parts.values():
        for asset, amount in part.sums.items():
            brought[asset] = brought.get(asset, 0) + amount
    assets: dict[str, dict[str, int]] = {}
    for asset in sorted(brought.keys() | work.sums.keys()):
        stored, at_rows, at_before = work.sums.get(asset, (0, 0, 0))
        balances = stored - at_rows + at_before  # every row brought to the one position
        want = brought.get(asset, 0)
        assets[str(asset)] = {"brought_in": want, "balances": balances, "difference": balances - want}
        if balances != want:
            detail = "what the balances of all streams add up to, and what ledger events brought in"
            findings.append(
                Finding(code="ASSET_SUM", stream="*", asset_id=asset, expected=want, actual=balances, detail=detail)
            )
    return {
        "ok": not findings,
        "audited_at": datetime.fromtimestamp(report.finished_at_ms / 1000, UTC).isoformat(timespec="milliseconds"),
        "streams": {name: _stream(part, report.findings) for name, part in sorted(work.parts.items())},
        "accounts": report.accounts,
        "assets": assets,
        "findings": [each.as_dict() for each in findings],
        "not_checked": report.not_checked,
    }


def _stream(part: Part, findings: list[Finding]) -> dict[str, Any]:
    def count(code: str) -> int:
        return len({each.sequence for each in findings if each.code == code and each.stream == part.name})

    gaps = sum(max(min(last, part.up_to) - first + 1, 0) for first, last in part.agreed.gaps)
    missing = sum(last - first + 1 for first, last in part.missing.ranges)
    return {
        "first_sequence": part.first,
        "up_to": part.up_to,
        "sequences": part.up_to - part.first + 1,
        **part.counts,
        "accepted_gaps": gaps,
        "missing": missing,
        "twice": count("EVENT_TWICE"),
        "in_a_wrong_page": count("WRONG_PAGE"),
    }


def with_digest(summary: dict[str, Any]) -> dict[str, Any]:
    """Add the digest by which an archived summary can be checked."""
    text = json.dumps(summary, sort_keys=True, separators=(",", ":"))
    return summary | {"digest": hashlib.sha256(text.encode()).hexdigest()}
