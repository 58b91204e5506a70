"""Opening balances as a file says them: amounts that don't fit are refused, never rounded."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.events import I63_MAX
from sidecar.opening import Asset, Opening, OpeningRefusedError, digest, read

ASSETS = {"btc": Asset(1, 8), "usdt": Asset(2, 2), "share": Asset(3, 0)}


def _read(folder: Path, text: str, *, decimals: bool = False) -> list[Opening]:
    path = folder / "balances.csv"
    path.write_text(text)
    return read(path, ASSETS, decimals=decimals)


def test_rows_with_and_without_a_header_are_put_in_order(tmp_path: Path) -> None:
    rows = [Opening(7, 1, 150_000_000), Opening(7, 2, -3), Opening(10, 3, 0)]
    assert _read(tmp_path, "10,share,0\n7,btc,150000000\n\n7,2,-3\n") == rows
    assert _read(tmp_path, "\ufeffamount,note,asset,user_id\n0,x,3,10\n-3,y,usdt,7\n150000000,z,btc,7\n") == rows
    assert digest(rows) == digest(_read(tmp_path, '"7","btc","150000000"\n7,2,-3\n10,3,0\n'))
    assert digest(rows) != digest(rows[:-1])


def test_amounts_with_a_point(tmp_path: Path) -> None:
    text = "1,btc,1.5\n2,btc,-0.00000001\n3,btc,2\n4,share,12\n5,usdt,0.1\n"
    amounts = [row.amount for row in _read(tmp_path, text, decimals=True)]
    assert amounts == [150_000_000, -1, 200_000_000, 12, 10]


@given(st.integers(-I63_MAX, I63_MAX))
def test_every_amount_of_smallest_units_is_itself_in_decimals(tmp_path_factory: pytest.TempPathFactory, n: int) -> None:
    folder = tmp_path_factory.getbasetemp()
    whole, rest = divmod(abs(n), 10**8)
    text = f"1,btc,{'-' if n < 0 else ''}{whole}.{rest:08d}\n"
    assert _read(folder, text, decimals=True) == _read(folder, f"1,btc,{n}\n") == [Opening(1, 1, n)]


@pytest.mark.parametrize(
    "text, decimals, fault",
    [
        ("1,btc,1.5\n", False, "line 1: amount=1.5; an integer in smallest units is allowed (for amounts with a point"),
        ("1,usdt,1.234\n", True, "line 1: amount=1.234; at most 2 digits after the point"),
        ("1,share,1.0\n", True, "at most 0 digits"),
        ("1,btc,1e5\n", True, "amount=1e5"),
        ("1,btc,1e5\n", False, "amount=1e5"),
        ("1,btc,nan\n", False, "amount=nan"),
        ("1,btc,٣\n", False, "amount=٣"),
        ("1,btc,\n", False, "amount=;"),
        ("1,btc,.5\n", True, "amount=.5"),
        (f"1,btc,{I63_MAX + 1}\n", False, f"at most {I63_MAX} is allowed"),
        ("1,btc,92233720368.54775808\n", True, f"at most {I63_MAX} is allowed"),
        ("1,doge,1\n", False, "line 1: asset=doge; btc, share, usdt, or an id, is allowed"),
        ("1,9,1\n", False, "asset=9"),
        ("1,btc,1\n-2,btc,1\n", False, "line 2: user_id=-2"),
        (f"{I63_MAX + 1},btc,1\n", False, "user_id="),
        ("1,btc,1\n2,btc,1\n1,1,5\n", False, "line 3: user 1 has asset 1 in line 1 already"),
        ("1,btc\n", False, "line 1: 2 columns; user_id, asset, amount are wanted"),
        ("user,asset,amount\n1,btc,1\n", False, "line 1: no column user_id"),
        ("", False, "no balances"),
        ("user_id,asset,amount\n", False, "no balances"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_line(tmp_path: Path, text: str, decimals: bool, fault: str) -> None:
    with pytest.raises(OpeningRefusedError) as refused:
        _read(tmp_path, text, decimals=decimals)
    assert fault in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OpeningRefusedError, match=r"none\.csv"):
        read(tmp_path / "none.csv", ASSETS, decimals=False)
