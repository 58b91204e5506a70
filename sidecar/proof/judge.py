"""The judgement of one account: its row beside the fold of its events, and the one code that says most about them.

Pure. One deviation gets one code, named after its likeliest cause; a write time that is ahead is one of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from sidecar.proof.codes import Finding
from sidecar.proof.fold import C_FIRST, C_VERSION, HIGH, At, Fold, Part
from sidecar.proof.rows import BASE, BUYER, QUOTE, SELLER, SEQUENCE, STREAM, AccountKey, Row
from sidecar.store.base import StampedBalance

LINKS_KEPT_MAX: Final = 10

Where = tuple[str, int, int]  # stream, user_id, asset_id
Pairs = dict[tuple[str, int, int, int], list[int]]  # stream, asset_id, two users: the trades between them
_Verdict = tuple[str, int | None, int | None, int | None, str]  # code, expected, actual, sequence, detail


def judge(part: Part, key: AccountKey, row: StampedBalance | None, fold: Fold, base: At) -> tuple[list[Finding], bool]:
    """Compare one account's row with the fold of its events; say also whether it could be compared.

    `base` is what earlier proofs verified of it: the fold knows no place before that.
    """
    verdicts: list[_Verdict] = []
    now = part.at_before(fold)
    is_ahead = row is not None and (row.last_sequence or 0) > part.up_to
    is_checked = not (is_ahead and key in part.ahead_seen)
    if row is None:
        if now[1]:
            verdicts.append(("BALANCE_MISSING", now[0], None, now[2], ""))
    else:
        if is_ahead:
            verdict = _of_a_row_ahead(part, row, now) if is_checked else None
        elif not now[1] and not part.at_row(fold)[1]:
            verdict = _without_events(part, key, row)
        else:
            verdict = _of_values(part, key, row, fold, base)
        if verdict is not None:
            verdicts.append(verdict)
        is_known = is_checked and (verdict is None or verdict[0] != "BALANCE_WITHOUT_EVENTS")
        if is_known and row.write_us >= part.next_stamp_us:
            detail = "its write time in us, and that of the next batch"
            verdicts.append(("FUTURE_STAMPED", part.next_stamp_us, row.write_us, row.last_sequence, detail))
    findings = [
        Finding(
            code=code, stream=part.name, user_id=key[0], asset_id=key[1], sequence=sequence, expected=expected,
            actual=actual, detail=detail,
        )
        for code, expected, actual, sequence, detail in verdicts
    ]  # fmt: skip
    return findings, is_checked


def _of_a_row_ahead(part: Part, row: StampedBalance, now: At) -> _Verdict:
    """Judge a row whose last_sequence is above all that is acknowledged, and is no event of its account's."""
    last = row.last_sequence
    if not now[1]:
        return "BALANCE_WITHOUT_EVENTS", None, row.available, last, ""
    if (row.available, row.version) == now[:2]:
        return "LAST_SEQUENCE_DIFFERS", now[2], last, last, ""
    detail = f"its last_sequence is above {part.up_to}, the last one acknowledged, and no such event is there"
    return "BALANCE_DIFFERS", now[0], row.available, last, detail


def _without_events(part: Part, key: AccountKey, row: StampedBalance) -> _Verdict:
    last = row.last_sequence or 0
    if any(sequence <= last for sequence, _ in part.against.get(key, ())):
        return "EVENT_AGAINST_DECISION", None, row.available, last, "the balance contains it"
    if 1 <= (row.version or 0) <= part.missing.count_to(last):
        return "EVENT_MISSING", None, row.available, *_missed(part, last)
    return "BALANCE_WITHOUT_EVENTS", None, row.available, last, ""


def _of_values(part: Part, key: AccountKey, row: StampedBalance, fold: Fold, base: At) -> _Verdict | None:
    """Judge a row by the account at the row's own last_sequence (`at`), and as it stood before rows were read (`now`).

    `at` can't be told (`is_hidden`) when the row is older than what earlier proofs verified: an update was lost then.
    """
    last, here = row.last_sequence or 0, (row.available, row.version)
    at, now = part.at_row(fold), part.at_before(fold)
    is_hidden = base[1] > 0 and base[2] > last
    later = fold[C_FIRST] if fold[HIGH] == part.before and fold[C_VERSION] else None
    update_missing = ("UPDATE_MISSING", now[0], row.available, later, "")
    if here == at[:2] and last == at[2] and not is_hidden:
        return update_missing if later is not None else None
    for there in (now, at):
        if here == there[:2] and last != there[2]:
            return "LAST_SEQUENCE_DIFFERS", there[2], last, last, ""
    if is_hidden:
        return update_missing
    return _of_amounts(part, key, row, at)


def _of_amounts(part: Part, key: AccountKey, row: StampedBalance, at: At) -> _Verdict:
    last = row.last_sequence or 0
    against = [each for each in part.against.get(key, ()) if each[0] <= last]
    if against and (row.available, row.version) == (at[0] + sum(each[1] for each in against), at[1] + len(against)):
        return "EVENT_AGAINST_DECISION", at[0], row.available, against[0][0], "the balance contains it"
    if row.available != at[0] and 1 <= (row.version or 0) - at[1] <= part.missing.count_to(last):
        return "EVENT_MISSING", at[0], row.available, *_missed(part, last)
    if row.available == at[0] and last == at[2]:
        return "VERSION_DIFFERS", at[1], row.version, last, ""
    detail = ""
    if row.version != at[1] or last != at[2]:
        detail = f"version is {row.version}, should be {at[1]}; last_sequence is {last}, should be {at[2]}"
    return "BALANCE_DIFFERS", at[0], row.available, last, detail


def _missed(part: Part, last: int) -> tuple[int | None, str]:
    """Name the missing sequence that an account lacks, where that can be told."""
    if last in part.missing:
        return last, ""
    count = part.missing.count_to(last)
    if count == 1:
        return part.missing.ranges[0][0], ""
    return None, f"one or more of {count} missing sequences up to {last}"


def stray(row: StampedBalance) -> Finding:
    """Give the finding about a row of a stream that the decision log does not know."""
    return Finding(
        code="BALANCE_WITHOUT_EVENTS", stream=row.stream, user_id=row.user_id, asset_id=row.asset_id,
        sequence=row.last_sequence, actual=row.available, detail="a stream without genesis",
    )  # fmt: skip


def unexplained(parts: Iterable[Part], findings: list[Finding]) -> list[Finding]:
    """Report the missing sequences that no account's finding names."""
    named = {(each.stream, each.sequence) for each in findings if each.code == "EVENT_MISSING"}
    found = []
    for part in parts:
        for first, last in part.missing.ranges:
            if first == last and (part.name, first) in named:
                continue
            detail = "" if first == last else f"sequences {first} to {last}: {last - first + 1} events"
            found.append(Finding(code="EVENT_MISSING", stream=part.name, sequence=first, detail=detail))
    return found


def opposite(findings: Iterable[Finding]) -> Pairs:
    """Pair accounts that deviate by the same amount in opposite directions."""
    by_amount: dict[tuple[str, int | None, int], list[int]] = {}
    for each in findings:
        if each.user_id is not None and each.expected is not None and each.actual is not None:
            by_amount.setdefault((each.stream, each.asset_id, each.actual - each.expected), []).append(each.user_id)
    pairs: Pairs = {}
    for (stream, asset, amount), users in by_amount.items():
        for user in users if amount > 0 else ():
            for other in by_amount.get((stream, asset, -amount), ()):
                assert asset is not None
                low, high = sorted((user, other))
                pairs[stream, asset, low, high] = []
    return pairs


def link(rows: list[Row], only: str | None, pairs: Pairs) -> None:
    """Note the trades between pairs of accounts; with `only` those of one stream."""
    for row in rows:
        stream, buyer, seller = row[STREAM], row[BUYER], row[SELLER]
        if buyer is None or seller is None or (only is not None and stream != only):
            continue
        low, high = (buyer, seller) if buyer < seller else (seller, buyer)
        for asset in (row[BASE], row[QUOTE]):
            linked = pairs.get((stream, asset, low, high))
            if linked is not None and len(linked) < LINKS_KEPT_MAX:
                linked.append(row[SEQUENCE])
