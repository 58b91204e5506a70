"""What a proof can find: each code with its meaning, and whether `reconcile --fix` can mend it.

An account's finding says what its row should be (`expected`) and what it is (`actual`). A finding about an event says
which sequence of which stream; where the accounts that it moved can be told, each has a finding of its own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple


class Code(NamedTuple):
    """A code's meaning and what an operator does about it."""

    fixable: bool
    means: str
    next_step: str


_FIX: Final = "`sidecar reconcile --fix NUMBER` writes the row as the tables' events make it"
_RESTORE: Final = (
    "not mended by --fix: the balance is probably right and an event's row is not; find out who changed it, restore"
    " the row from a backup or from another host's tape, then run `sidecar reconcile --full`"
)

CODES: Final[dict[str, Code]] = {
    "BALANCE_DIFFERS": Code(
        True,
        "The row's `available` is not the sum of the account's events up to the row's own `last_sequence`. (When one"
        " deposit, withdrawal or adjustment had its amount changed by hand, and the tape has deleted its frame, it"
        " looks the same: see `sidecar statement` before you fix.)",
        _FIX,
    ),
    "VERSION_DIFFERS": Code(
        True, "The balance is right, but `version` is not the number of events that touched the account.", _FIX
    ),
    "LAST_SEQUENCE_DIFFERS": Code(
        True, "Balance and version are right, but `last_sequence` is not the newest event that they contain.", _FIX
    ),
    "UPDATE_MISSING": Code(
        True,
        "The row is right up to its `last_sequence`, but an event after it was acknowledged before the row was read: an"
        " update was lost. `sequence` is an event that is not in the row (after a full proof: the first one).",
        _FIX,
    ),
    "BALANCE_MISSING": Code(True, "The account has acknowledged events and no row.", _FIX),
    "BALANCE_WITHOUT_EVENTS": Code(
        True,
        "There is a row, and no event of its stream ever touched the account: it was copied or made by hand.",
        "`sidecar reconcile --fix NUMBER` removes the row",
    ),
    "FUTURE_STAMPED": Code(
        True,
        "A cell of the row has a write time at or above that of the next batch: it was written by hand with the wall"
        " clock's time, and shadows every later update that has a smaller one.",
        _FIX,
    ),
    "EVENT_MISSING": Code(
        False,
        "A sequence up to `acked` has no row: neither trade, ledger event nor rejected event, and no accepted gap."
        " Where a balance contains an event that is not there, the finding names the account.",
        _RESTORE,
    ),
    "EVENT_DIFFERS": Code(
        False,
        "An event's row was changed, not the balance: two accounts deviate by the same amount in opposite directions,"
        " and there are trades between them; or the tape still has a deposit, withdrawal or adjustment of the account"
        " otherwise.",
        _RESTORE,
    ),
    "EVENT_TWICE": Code(False, "A sequence has two rows, or two kinds of row; it was counted once.", _RESTORE),
    "EVENT_INCOMPLETE": Code(False, "An event's row lacks columns that every event has; it was not counted.", _RESTORE),
    "EVENT_AGAINST_DECISION": Code(
        False,
        "A decision says that this sequence is never posted on this stream (an accepted gap, a rejection), and there is"
        " a row of it, or a balance that contains it: a process submitted it and died before it had read the decision."
        " It is not counted.",
        "mend the balances with `sidecar reconcile --fix NUMBER`; the event's own row stays, and stays reported",
    ),
    "WRONG_PAGE": Code(
        False,
        "A row stands in another page (`actual`) than its number says (`expected`): look-ups don't find it.",
        "restore the row in its own page from a backup, then run `sidecar reconcile --full`",
    ),
    "UNKNOWN_STREAM": Code(
        False,
        "There are trades of a stream that has no genesis in the decision log; they were not counted.",
        _RESTORE,
    ),
    "ASSET_SUM": Code(
        False,
        "All balances of an asset don't add up to deposits - withdrawals + adjustments, beyond what the other findings"
        " explain.",
        "run `sidecar reconcile --full`; if it stays, the rows changed while they were read, or this proof has a bug",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One deviation. Amounts in smallest units; `user_id` and `asset_id` are None when no account is to blame."""

    code: str
    stream: str
    user_id: int | None = None
    asset_id: int | None = None
    sequence: int | None = None
    expected: int | None = None
    actual: int | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        """Every code is explained above."""
        assert self.code in CODES, self.code

    @property
    def is_fixable(self) -> bool:
        """Say whether `--fix` can mend it: an account's row, whose events are there and in order."""
        if self.code == "EVENT_AGAINST_DECISION":
            return self.user_id is not None
        return CODES[self.code].fixable

    def as_dict(self) -> dict[str, Any]:
        """Give it as design.md's shape has it."""
        return asdict(self)


def explain(code: str) -> str:
    """Say what a code means and what to do. Raises KeyError for one that does not exist."""
    known = CODES[code]
    return f"{code}\n  {known.means}\n  next step: {known.next_step}"
