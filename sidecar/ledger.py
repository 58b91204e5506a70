"""The ledger: a pure, deterministic state machine that folds one event after the other into postings, balances and T.

It owns the accounts in memory, the last trade id of each symbol, the position and its stamp; `fold` is the only way in.
Everything it says is a function of the stream's prefix and its decisions, with one exception that protects it: balances
come from the store, whose rows may be *ahead* of the position (a batch that landed before a crash). An account whose
`last_sequence` is at or above the event's is skipped, so what was counted once is never counted again.

A crash leaves nothing behind here: the next life starts at `durable` and folds the same events to the same values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from collections.abc import Set as AbstractSet
from typing import Final

import msgspec

from sidecar.errors import AccountMissingError, Halt
from sidecar.events import (
    I63_MAX,
    AccountKey,
    AccountValues,
    Event,
    LedgerEvent,
    Refused,
    State,
    Trade,
)
from sidecar.symbols import Symbol, Symbols

DAY_US: Final = 86_400_000_000
I64_MIN: Final = -(2**63)

_ADD: Final = "add the asset or symbol to the configuration and restart; nothing is lost meanwhile"
_REJECT: Final = "look at the event with `sidecar tape dump`; to go on without it: `sidecar reject SEQ --reason '…'`"


Postings = tuple[tuple[AccountKey, int], ...]  # each account once, with what is added to it


class Folded(msgspec.Struct, frozen=True, gc=False):
    """What one event, or one range of accepted gaps, comes to: what a batch is made of.

    `stamp_us` is T of its last sequence. `symbol` is None unless a trade was accepted, `quote_amount` is what was
    posted for it. `balances` holds the new state of each account that the event moved (skipped ones are not in it).
    """

    last_sequence: int
    stamp_us: int
    event: Event | None
    symbol: Symbol | None
    quote_amount: int
    balances: dict[AccountKey, AccountValues]


class Accounts(MutableMapping[AccountKey, AccountValues]):
    """The accounts in memory, a dict of users for each asset: 72 bytes less an account than one dict of pairs.

    The ledger's own loop goes to `by_asset` itself.
    """

    def __init__(self, accounts: Mapping[AccountKey, AccountValues] | None = None) -> None:
        self.by_asset: dict[int, dict[int, AccountValues]] = {}
        self.update(accounts or {})

    def __getitem__(self, key: AccountKey) -> AccountValues:
        return self.by_asset[key[1]][key[0]]

    def __setitem__(self, key: AccountKey, values: AccountValues) -> None:
        self.by_asset.setdefault(key[1], {})[key[0]] = values

    def __delitem__(self, key: AccountKey) -> None:
        del self.by_asset[key[1]][key[0]]

    def __iter__(self) -> Iterator[AccountKey]:
        return ((user, asset) for asset, users in self.by_asset.items() for user in users)

    def __len__(self) -> int:
        return sum(map(len, self.by_asset.values()))

    def clear(self) -> None:
        """Forget all accounts."""
        self.by_asset.clear()


class Ledger:
    """The state of one stream in one life of its settler."""

    def __init__(
        self,
        *,
        symbols: Symbols,
        first_sequence: int,
        base_us: int,
        state: State,
        rejects: frozenset[int] = frozenset(),
        trade_ids_rise: bool = True,
    ) -> None:
        """Begin after `state`: `rejects` are the sequences an operator rejected; on a late stream ids need not rise."""
        self.symbols = symbols
        self.sequence = state.sequence
        self.stamp_us = state.stamp_us
        self.last_trade_ids = dict(state.last_trade_ids)
        self.accounts = Accounts()
        self.negative_total = 0
        self.skipped_total = 0
        self._offset_us = base_us - first_sequence
        self._rejects = rejects
        self._trade_ids_rise = trade_ids_rise

    def accounts_of(self, event: Event) -> tuple[AccountKey, ...]:
        """Name the accounts that folding `event` may touch: they must be in memory then."""
        if type(event) is Trade:
            buyer, seller, base, quote = event[5], event[6], event[7], event[8]
            four = ((buyer, base), (buyer, quote), (seller, base), (seller, quote))
            if event.buyer_fee or event.seller_fee:
                revenue = self.symbols.revenue_user_id
                return (*four, (revenue, base), (revenue, quote))
            return four
        if type(event) is LedgerEvent:
            return ((event.user_id, event.asset),)
        return ()

    def fold(self, event: Event, now_us: int) -> Folded:
        """Fold the next event; `now_us` is the wall clock, the bound for ENGINE_TIME_AHEAD.

        Raises, with nothing changed: Halt when design.md says that settlement stops before this event,
        AccountMissingError when one of `accounts_of(event)` is not in memory.
        """
        sequence = event[0]
        assert sequence == self.sequence + 1, f"sequence {sequence} after {self.sequence}"
        if type(event) is Trade and (folded := self._fold_common(event, now_us)) is not None:
            return folded
        symbol, quote_amount = None, 0
        judged: Event = event
        if sequence in self._rejects and type(event) is not Refused:
            judged = _refused(event, "OPERATOR", "rejected by an operator's decision")
        elif type(event) is Trade:
            judged, symbol, quote_amount = self._judge_trade(event)
        elif type(event) is LedgerEvent and event.asset not in self.symbols.assets_by_id:
            reason = f"asset={event.asset} is not configured; {sorted(self.symbols.assets_by_id)} are"
            raise Halt("UNKNOWN_ASSET", sequence, reason, _ADD)

        time_us = None
        postings: Postings = ()
        balances: dict[AccountKey, AccountValues] = {}
        negative = 0
        if type(judged) is Trade:
            assert symbol is not None
            time_us = trade_time_us(symbol, judged.trade_id, judged.settled_at, judged.ts_us)
            postings = trade_postings(judged, quote_amount, self.symbols.revenue_user_id)
            balances, negative = self._post(sequence, time_us or 0, postings)
        elif type(judged) is LedgerEvent:
            time_us = judged.ts_us if judged.ts_us is not None else judged.created_at * 1000 or None
            amount = -judged.amount if judged.event_type == "WITHDRAWAL" else judged.amount
            postings = (((judged.user_id, judged.asset), amount),)
            balances, negative = self._post(sequence, time_us or 0, postings)
        if time_us is not None and time_us > now_us + DAY_US:
            reason = f"the event's time is {time_us} us, more than a day after this host's clock, {now_us} us"
            raise Halt("ENGINE_TIME_AHEAD", sequence, reason, f"set the wrong clock right and restart; or {_REJECT}")

        # Nothing below can fail: the event is taken.
        by_asset = self.accounts.by_asset
        self.negative_total += negative
        self.skipped_total += len(postings) - len(balances)
        for (user, asset), values in balances.items():
            by_asset[asset][user] = values
        if symbol is not None:
            self.last_trade_ids[symbol[0]] = judged[1]  # type: ignore[assignment]  # trade_id
        return Folded(sequence, self._stamp(sequence, time_us), judged, symbol, quote_amount, balances)

    def _fold_common(self, trade: Trade, now_us: int) -> Folded | None:
        """Fold the trade that most are, in one pass: two users, no fees, nothing to refuse, to skip or to count.

        None, with nothing changed, for any other: `fold` goes through that step by step.
        """
        (
            sequence, trade_id, _, _, _, buyer, seller, base, quote, price, quantity, quote_amount, buyer_fee,
            seller_fee, _, _, _, _, _, _, settled_at, ts_us,
        ) = trade[:22]  # fmt: skip
        symbol = self.symbols.by_pair.get((base, quote))
        if symbol is None or buyer == seller or buyer_fee or seller_fee or not price or not quantity:
            return None
        if sequence in self._rejects or (self._trade_ids_rise and trade_id <= self.last_trade_ids.get(symbol[0], 0)):
            return None
        if quote_amount is None:
            quote_amount = symbol.quote_amount(price, quantity)
        time_us = trade_time_us(symbol, trade_id, settled_at, ts_us)
        by_asset = self.accounts.by_asset
        try:
            bases, quotes = by_asset[base], by_asset[quote]
            bought, bought_version, bought_last, _ = bases[buyer]
            paid, paid_version, paid_last, _ = quotes[buyer]
            sold, sold_version, sold_last, _ = bases[seller]
            earned, earned_version, earned_last, _ = quotes[seller]
        except KeyError:
            return None
        bought, paid, sold, earned = bought + quantity, paid - quote_amount, sold - quantity, earned + quote_amount
        if not (
            bought_last < sequence and paid_last < sequence and sold_last < sequence and earned_last < sequence
            and bought <= I63_MAX and earned <= I63_MAX and paid >= 0 and sold >= 0
            and (time_us or 0) <= now_us + DAY_US
        ):  # fmt: skip
            return None
        updated_at = time_us or 0
        bases[buyer] = bought_now = (bought, bought_version + 1, sequence, updated_at)
        quotes[buyer] = paid_now = (paid, paid_version + 1, sequence, updated_at)
        bases[seller] = sold_now = (sold, sold_version + 1, sequence, updated_at)
        quotes[seller] = earned_now = (earned, earned_version + 1, sequence, updated_at)
        balances = {
            (buyer, base): bought_now, (buyer, quote): paid_now, (seller, base): sold_now, (seller, quote): earned_now,
        }  # fmt: skip
        self.last_trade_ids[symbol[0]] = trade_id
        return Folded(sequence, self._stamp(sequence, time_us), trade, symbol, quote_amount, balances)

    def _stamp(self, sequence: int, time_us: int | None) -> int:
        """Step on to the sequence, and give its T."""
        self.sequence = sequence
        stamp = self.stamp_us + 1
        least = self._offset_us + sequence
        stamp = least if least > stamp else stamp  # noqa: FURB136 - a call of max costs more than all of this
        self.stamp_us = stamp = time_us if time_us is not None and time_us > stamp else stamp
        return stamp

    def pass_over(self, last_sequence: int) -> Folded:
        """Step over an accepted gap up to `last_sequence`: T goes on through every sequence of it."""
        assert last_sequence > self.sequence
        self.stamp_us = max(self.stamp_us + last_sequence - self.sequence, self._offset_us + last_sequence)
        self.sequence = last_sequence
        return Folded(last_sequence, self.stamp_us, None, None, 0, {})

    def evict(self, durable: int, accounts_max: int, needed: AbstractSet[AccountKey] = frozenset()) -> None:
        """Forget accounts beyond `accounts_max`, but none that is `needed` or whose newest event is above `durable`.

        Forgetting one that is merely acknowledged would read back what the database may yet lose (design.md, pipeline).
        """
        excess = len(self.accounts) - accounts_max
        if excess <= 0:
            return
        old: list[AccountKey] = []
        for key, account in self.accounts.items():
            if account[2] <= durable and key not in needed:
                old.append(key)
                if len(old) == excess:
                    break
        for key in old:
            del self.accounts[key]

    def _judge_trade(self, trade: Trade) -> tuple[Event, Symbol | None, int]:
        """Give the verdict: the trade with its symbol and quote amount, or its refusal; in the order of design.md."""
        base, quote, price, quantity, quote_amount, buyer_fee, seller_fee = trade[7:14]
        if price == 0:
            return _refused(trade, "ZERO_PRICE", "price=0; at least 1 is allowed"), None, 0
        if quantity == 0:
            return _refused(trade, "ZERO_QUANTITY", "quantity=0; at least 1 is allowed"), None, 0
        symbol = self.symbols.by_pair.get((base, quote))
        if symbol is None:
            known = ", ".join(sorted(self.symbols.symbols)) or "none"
            pair = f"base_asset={base}, quote_asset={quote}"
            raise Halt("UNKNOWN_SYMBOL", trade[0], f"{pair} is no configured symbol; {known} are", _ADD)
        if quote_amount is None:
            quote_amount = symbol.quote_amount(price, quantity)
        if quote_amount > I63_MAX:
            reason = f"quote amount {quote_amount} (price={price}, quantity={quantity}); at most {I63_MAX}"
            return _refused(trade, "AMOUNT_OVERFLOW", reason), None, 0
        if buyer_fee is not None and buyer_fee > quantity:
            reason = f"buyer_fee={buyer_fee}; at most the quantity, {quantity}"
            return _refused(trade, "FEE_EXCEEDS_AMOUNT", reason), None, 0
        if seller_fee is not None and seller_fee > quote_amount:
            reason = f"seller_fee={seller_fee}; at most the quote amount, {quote_amount}"
            return _refused(trade, "FEE_EXCEEDS_AMOUNT", reason), None, 0
        if self._trade_ids_rise and trade[1] <= (last := self.last_trade_ids.get(symbol[0], 0)):
            reason = f"trade_id={trade[1]}; above {last}, the last one of {symbol.name}, is allowed"
            return _refused(trade, "TRADE_ID_NOT_RISING", reason), None, 0
        return trade, symbol, quote_amount

    def _post(self, sequence: int, updated_at: int, postings: Postings) -> tuple[dict[AccountKey, AccountValues], int]:
        """Give the accounts as the postings leave them, without those that are ahead; count those that fall below 0."""
        balances: dict[AccountKey, AccountValues] = {}
        negative = 0
        by_asset = self.accounts.by_asset
        for key, amount in postings:
            user, asset = key
            try:
                before, version, last_sequence, _ = by_asset[asset][user]
            except KeyError:
                raise AccountMissingError(key) from None
            if last_sequence >= sequence:
                continue
            available = before + amount
            if not 0 <= available <= I63_MAX:  # the one look that most postings take
                if not I64_MIN <= available <= I63_MAX:
                    reason = f"user {user}, asset {asset} would hold {available}; {I64_MIN} to {I63_MAX} is allowed"
                    raise Halt("BALANCE_OVERFLOW", sequence, reason, _REJECT)
                negative += before >= 0
            balances[key] = (available, version + 1, sequence, updated_at)
        return balances, negative


def trade_postings(trade: Trade, quote_amount: int, revenue_user_id: int) -> Postings:
    """Give each account with the amount that a trade adds to it, by design.md's table; they sum to zero in each asset.

    Each account stands there once: a self-trade's amounts, and fees of who earns them, are one posting.
    """
    buyer, seller, base, quote, _, quantity, _, buyer_fee, seller_fee = trade[5:14]
    if buyer != seller and not buyer_fee and not seller_fee:
        return (
            ((buyer, base), quantity),
            ((buyer, quote), -quote_amount),
            ((seller, base), -quantity),
            ((seller, quote), quote_amount),
        )
    buyer_fee, seller_fee = buyer_fee or 0, seller_fee or 0
    postings = {(buyer, base): quantity - buyer_fee, (buyer, quote): -quote_amount}
    others = [((seller, base), -quantity), ((seller, quote), quote_amount - seller_fee)]
    if buyer_fee > 0:
        others.append(((revenue_user_id, base), buyer_fee))
    if seller_fee > 0:
        others.append(((revenue_user_id, quote), seller_fee))
    for key, amount in others:
        postings[key] = postings.get(key, 0) + amount
    return tuple(postings.items())


def trade_time_us(symbol: Symbol, trade_id: int, settled_at: int, ts_us: int | None) -> int | None:
    """Give a trade's own time in us since 1970: ts_us, else settled_at, else its id's, else None (design.md, T)."""
    if ts_us is not None:
        return ts_us
    if settled_at:
        return settled_at * 1000
    return (trade_id >> 16) * 1000 if symbol.trade_id_is_time else None


def _refused(event: Event, code: str, reason: str) -> Refused:
    return Refused(event.output_sequence, code, reason, event.session, event.payload)


def before(first_sequence: int, base_us: int) -> State:
    """Give the state before a stream's first event: T(first) is then at least `base_us`."""
    return State(first_sequence - 1, base_us - 1, {})
