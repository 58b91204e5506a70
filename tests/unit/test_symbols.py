"""Assets, symbols, scales, and rules that are added to but never changed."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import RulesChangedError, UnknownPairError
from sidecar.symbols import Symbols, added_rules, merge_rules
from tests.streams import BTC, ETH, RULES, SYMBOLS, USDT


def rules_of(price_decimals: int, base: int, quote: int, how: str = "scaled") -> dict[str, Any]:
    rules = copy.deepcopy(RULES)
    rules["assets"]["btc"]["decimals"], rules["assets"]["usdt"]["decimals"] = base, quote
    rules["symbols"]["btc_usdt"] |= {"price_decimals": price_decimals, "quote_amount": how}
    return rules


def test_a_pair_of_assets_has_its_symbol() -> None:
    assert SYMBOLS.get_symbol_from_assets(BTC, USDT) == "btc_usdt"
    assert SYMBOLS.get_symbol_from_assets(ETH, USDT) == "eth_usdt"


@pytest.mark.parametrize("pair", [(USDT, BTC), (BTC, BTC), (BTC, ETH), (0, 0), (BTC, 7)])
def test_an_unknown_pair_is_an_error_of_its_own_that_names_it(pair: tuple[int, int]) -> None:
    with pytest.raises(
        UnknownPairError, match=rf"base asset {pair[0]} and quote asset {pair[1]}; .*btc_usdt, eth_usdt"
    ):
        SYMBOLS.get_symbol_from_assets(*pair)
    with pytest.raises(UnknownPairError, match="none"):
        Symbols({}).get_symbol_from_assets(*pair)


@pytest.mark.parametrize(
    "price_decimals, base, quote, price, quantity, amount",
    [
        (2, 8, 8, 300, 1_000, 3_000),  # exponent 2
        (2, 8, 8, 1, 99, 0),  # rounded down to nothing
        (2, 8, 8, 1, 199, 1),
        (2, 0, 2, 7, 3, 21),  # exponent 0
        (0, 0, 6, 7, 3, 21_000_000),  # a negative exponent multiplies
        (2, 8, 18, 7, 3, 21 * 10**8),
        (18, 18, 0, 2**63 - 1, 2**63 - 1, 85),
    ],
)
def test_scaled_is_price_times_quantity_in_the_quote_assets_unit_rounded_down(
    price_decimals: int, base: int, quote: int, price: int, quantity: int, amount: int
) -> None:
    symbol = Symbols(rules_of(price_decimals, base, quote)).symbols["btc_usdt"]
    assert symbol.quote_amount(price, quantity) == amount


def test_raw_is_price_times_quantity_whatever_the_decimals() -> None:
    symbol = Symbols(rules_of(2, 8, 3, "raw")).symbols["btc_usdt"]
    assert symbol.quote_amount(300, 1_000) == 300_000


i63 = st.integers(0, 2**63 - 1)
decimals = st.integers(0, 18)


@given(decimals, decimals, decimals, i63, i63)
def test_scaled_is_exact_for_any_decimals(
    price_decimals: int, base: int, quote: int, price: int, quantity: int
) -> None:
    amount = Symbols(rules_of(price_decimals, base, quote)).symbols["btc_usdt"].quote_amount(price, quantity)
    exact = Fraction(price, 10**price_decimals) * Fraction(quantity, 10**base) * 10**quote
    assert type(amount) is int
    assert amount <= exact < amount + 1


def test_rules_add_up_in_the_order_of_the_log() -> None:
    ada = {"id": 9, "decimals": 1}
    merged = merge_rules([RULES, {"assets": {"ada": ada}, "symbols": {}}, {}])
    assert merged["assets"] == RULES["assets"] | {"ada": ada}
    assert merged["symbols"] == RULES["symbols"]
    assert merged["revenue_user_id"] == RULES["revenue_user_id"]


def test_a_configuration_may_add_and_may_lack_with_a_warning() -> None:
    configured = copy.deepcopy(RULES)
    configured["assets"]["ada"] = {"id": 9, "decimals": 1}
    configured["symbols"]["ada_usdt"] = {**RULES["symbols"]["btc_usdt"], "base": "ada"}
    del configured["symbols"]["eth_usdt"]
    added, lacking = added_rules(RULES, configured)
    assert added["assets"] == {"ada": {"id": 9, "decimals": 1}}
    assert list(added["symbols"]) == ["ada_usdt"]
    assert lacking == ["symbols.eth_usdt is in the stream's rules, not in the configuration"]
    assert added_rules(RULES, RULES) == ({"assets": {}, "symbols": {}}, [])


def changed(section: str, name: str, key: str, value: Any) -> dict[str, Any]:
    rules = copy.deepcopy(RULES)
    rules[section][name][key] = value
    return rules


@pytest.mark.parametrize(
    "configured, named",
    [
        (changed("assets", "btc", "decimals", 7), "assets.btc.decimals = 7, settled by 8"),
        (changed("assets", "btc", "id", 8), "assets.btc.id = 8, settled by 1"),
        (changed("symbols", "btc_usdt", "price_decimals", 3), "symbols.btc_usdt.price_decimals = 3, settled by 2"),
        (changed("symbols", "btc_usdt", "quote_amount", "raw"), "quote_amount = 'raw', settled by 'scaled'"),
        (changed("symbols", "btc_usdt", "page_width", 5), "symbols.btc_usdt.page_width = 5, settled by 10000"),
        (changed("symbols", "btc_usdt", "trade_id_time", "ms16"), "trade_id_time = 'ms16', settled by 'none'"),
        (RULES | {"revenue_user_id": 5}, "revenue_user_id = 5, settled by 999"),
        (RULES | {"assets": RULES["assets"] | {"xbt": {"id": 1, "decimals": 8}}}, "assets.xbt.id = 1, which is btc"),
        (
            RULES | {"symbols": RULES["symbols"] | {"xbt_usdt": RULES["symbols"]["btc_usdt"]}},
            "symbols.xbt_usdt trades btc/usdt, which is btc_usdt",
        ),
    ],
    ids=lambda it: it if isinstance(it, str) else "",
)
def test_what_rows_were_settled_by_can_not_be_changed(configured: dict[str, Any], named: str) -> None:
    with pytest.raises(RulesChangedError) as raised:
        added_rules(RULES, configured)
    assert named in str(raised.value)
    assert raised.value.exit_code == 78
