"""Assets, symbols and the rules a stream is settled by: which table a pair goes to, how its quote amount is scaled.

Rules are configuration that changes results, so they live in the decision log (design.md, Decisions): the first settler
writes them into the genesis, later additions are `rules` entries, and what exists never changes.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

from sidecar.errors import RulesChangedError, UnknownPairError

SYMBOL_NAME: Final = re.compile(r"[a-z][a-z0-9_]*")


class Asset(NamedTuple):
    """An asset: its name, its id on the wire, and how many decimals its smallest unit stands behind the point."""

    name: str
    id: int
    decimals: int


class Symbol(NamedTuple):
    """A traded pair: `numerator / denominator` scales price x quantity to the quote asset's smallest unit."""

    name: str
    base: int
    quote: int
    price_decimals: int
    numerator: int
    denominator: int
    trade_id_is_time: bool
    page_width: int

    def quote_amount(self, price: int, quantity: int) -> int:
        """Give price x quantity in the quote asset's smallest unit, rounded down (design.md, Postings)."""
        return price * quantity * self.numerator // self.denominator


class Symbols:
    """All assets and symbols of one stream; built from rules, never changed afterwards."""

    def __init__(self, rules: dict[str, Any]) -> None:
        """Build from `rules`: `assets`, `symbols` and `revenue_user_id` as they stand in the decision log."""
        self.revenue_user_id: int = rules.get("revenue_user_id", 0)
        self.assets = {
            name: Asset(name, asset["id"], asset["decimals"]) for name, asset in rules.get("assets", {}).items()
        }
        self.assets_by_id = {asset.id: asset for asset in self.assets.values()}
        self.symbols = {name: self._symbol(name, rule) for name, rule in rules.get("symbols", {}).items()}
        self.by_pair = {(symbol.base, symbol.quote): symbol for symbol in self.symbols.values()}

    def _symbol(self, name: str, rule: dict[str, Any]) -> Symbol:
        assert SYMBOL_NAME.fullmatch(name), f"symbol {name!r} becomes a table name"
        base, quote = self.assets[rule["base"]], self.assets[rule["quote"]]
        numerator = denominator = 1
        if rule["quote_amount"] == "scaled":
            exponent = rule["price_decimals"] + base.decimals - quote.decimals
            numerator, denominator = (1, 10**exponent) if exponent >= 0 else (10**-exponent, 1)
        is_time = rule["trade_id_time"] == "ms16"
        return Symbol(
            name, base.id, quote.id, rule["price_decimals"], numerator, denominator, is_time, rule["page_width"]
        )

    def get_symbol_from_assets(self, base_asset: int, quote_asset: int) -> str:
        """Give the name of the symbol that trades `base_asset` against `quote_asset` (both asset ids): `btc_usdt`.

        Raises UnknownPairError when no symbol is configured for the pair.
        """
        symbol = self.by_pair.get((base_asset, quote_asset))
        if symbol is None:
            raise UnknownPairError(base_asset, quote_asset, ", ".join(sorted(self.symbols)) or "none")
        return symbol.name


def merge_rules(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Add the rules of a log up, in its order: a genesis and the additions after it."""
    merged: dict[str, Any] = {"assets": {}, "symbols": {}}
    for entry in entries:
        merged["assets"].update(entry.get("assets", {}))
        merged["symbols"].update(entry.get("symbols", {}))
        if "revenue_user_id" in entry:
            merged["revenue_user_id"] = entry["revenue_user_id"]
    return merged


def added_rules(logged: dict[str, Any], configured: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Compare a configuration with the log: what it adds, and a warning for each thing that it lacks.

    Raises RulesChangedError when it changes what exists: settled rows were computed by it.
    """
    changed: list[str] = []
    lacking: list[str] = []
    added: dict[str, Any] = {"assets": {}, "symbols": {}}
    for section in ("assets", "symbols"):
        have, want = logged[section], configured[section]
        for name, rule in want.items():
            if name not in have:
                added[section][name] = rule
                continue
            changed += [
                f"{section}.{name}.{key} = {rule.get(key)!r}, settled by {value!r}"
                for key, value in have[name].items()
                if rule.get(key) != value
            ]
        lacking += [
            f"{section}.{name} is in the stream's rules, not in the configuration" for name in have.keys() - want
        ]
    ids = {asset["id"]: name for name, asset in logged["assets"].items()}
    changed += [
        f"assets.{name}.id = {asset['id']}, which is {ids[asset['id']]}"
        for name, asset in added["assets"].items()
        if asset["id"] in ids
    ]
    pairs = {(rule["base"], rule["quote"]): name for name, rule in logged["symbols"].items()}
    changed += [
        f"symbols.{name} trades {rule['base']}/{rule['quote']}, which is {pairs[rule['base'], rule['quote']]}"
        for name, rule in added["symbols"].items()
        if (rule["base"], rule["quote"]) in pairs
    ]
    revenue = logged.get("revenue_user_id")
    if revenue is not None and "revenue_user_id" in configured and configured["revenue_user_id"] != revenue:
        changed.append(f"fees.revenue_user_id = {configured['revenue_user_id']}, settled by {revenue}")
    if changed:
        raise RulesChangedError(
            "the configuration changes rules that rows were already settled by: "
            + "; ".join(changed)
            + ". Put them back, or settle under another stream name"
        )
    return added, sorted(lacking)
