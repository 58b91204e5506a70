"""What can go wrong, and what is done then.

Each class is one answer to a failure, not one cause of it: resend the same bytes, start over from `durable`, halt and
go on recording, exit and be restarted, exit 78 and stay down. Messages name the thing, its value and what is allowed.
"""

from __future__ import annotations


class SidecarError(Exception):
    """Base of every expected failure; `exit_code` is what the command line exits with when it ends a verb."""

    exit_code = 1


class UsageError(SidecarError):
    """The command line was used wrongly: exit 2."""

    exit_code = 2


class KeyFileError(SidecarError):
    """A file of keys can't be used, or would be overwritten: exit 78."""

    exit_code = 78


class UntrustedError(SidecarError):
    """Whoever likes could speak as the engine: exit 78."""

    exit_code = 78


class RulesChangedError(SidecarError):
    """The configuration contradicts the rules that a stream or the keyspace has already settled by: exit 78."""

    exit_code = 78


class MalformedFrameError(SidecarError):
    """A frame without a place in the sequence (wire.md, Malformed): kept aside with its bytes, counted, not settled."""


class AnswerRefusedError(SidecarError):
    """An answer of a replay server that can't be true: nothing of it is used, it is asked again later."""


class RequestRefusedError(SidecarError):
    """A request to the replay server that it can't answer; `code` and the message are what it answers."""

    def __init__(self, request_id: object, code: str, reason: str) -> None:
        """Take the request's id (None when it has none that can be read), the answer's code, and why."""
        super().__init__(reason)
        self.request_id = request_id
        self.code = code


class UnknownPairError(SidecarError):
    """No symbol is configured for a pair of assets."""

    def __init__(self, base_asset: int, quote_asset: int, known: str) -> None:
        """Name the pair of asset ids and the symbols that are known."""
        super().__init__(f"no symbol has base asset {base_asset} and quote asset {quote_asset}; configured: {known}")
        self.base_asset = base_asset
        self.quote_asset = quote_asset


class SequenceGapError(SidecarError):
    """An event was offered to `Settlement` that is not the stream's next one; nothing was changed."""

    def __init__(self, stream: str, expected: int, offered: int) -> None:
        """Name the sequence that is next and the one that came."""
        super().__init__(f"stream {stream}: sequence {offered} was offered, {expected} is next; settle that one first")
        self.expected = expected
        self.offered = offered


class Halt(SidecarError):  # noqa: N818 - the contract's own word: design.md calls it a halt
    """Settlement stops before `sequence`; everything below it is settled, recording goes on (design.md, Verdicts)."""

    def __init__(self, code: str, sequence: int, reason: str, next_step: str) -> None:
        """Take the contract's code, the sequence halted at, why, and what an operator does about it."""
        super().__init__(f"{code} at sequence {sequence}: {reason}")
        self.code = code
        self.sequence = sequence
        self.reason = reason
        self.next_step = next_step


class StartOver(SidecarError):  # noqa: N818 - an order, not an error
    """Memory may no longer agree with the store or its decisions: empty it and begin again from `durable`."""


# --- the store ------------------------------------------------------------------------------------------------------


class StoreError(SidecarError):
    """A store could not do what was asked."""


class OutcomeUnknownError(StoreError):
    """It may or may not have happened (timeout, lost connection, overload, lock): resend the identical bytes."""


class StoreRefusedError(StoreError):
    """It will never be accepted as it is (syntax, rights, unknown table): halt with STORE_REFUSED."""


class BatchTooLargeError(StoreError):
    """The server refuses a batch of this size: start over with half the cap."""


class AccountMissingError(SidecarError):
    """An account that an event touches is not in memory: it must be read, then the event is folded."""

    def __init__(self, key: tuple[int, int]) -> None:
        """Name the account: (user_id, asset_id)."""
        super().__init__(f"user {key[0]}, asset {key[1]} is not in memory")


# --- the tape -------------------------------------------------------------------------------------------------------


class TapeError(SidecarError):
    """The tape can't be used as asked."""


class TapeLockedError(TapeError):
    """Another process records on, or settles from, this tape."""


class TapeMissingError(TapeError):
    """There is no tape yet: the settler waits, a look-up says so."""


class TapeFullError(TapeError):
    """`size_bytes_max` is reached or the disk is full: recording stands still, loudly, until there is room."""


class TapeDamagedError(TapeError):
    """What is on the tape is not what was recorded, or can't be read: settlement halts with TAPE_DAMAGED."""

    def __init__(
        self, session: int, sequence: int, why: str = "the frame on the tape does not match its checksum"
    ) -> None:
        """Name the frame (session 0: it is the file as a whole), and how the damage shows."""
        super().__init__(f"session {session}, sequence {sequence}: {why}" if session else why)
        self.sequence = sequence
