"""The table of faults is what the tests say, and no fault loses its test."""

from pathlib import Path

import pytest

from tests.fault.table import ARCHITECTURE, BEGIN, END, FAULTS, find_tests, missing, written


def test_the_table_in_the_architecture_is_what_the_tests_say() -> None:
    text = ARCHITECTURE.read_text("utf-8")
    assert text == written(text, find_tests()), "stale: `scripts/check --fix` writes it anew"


def test_every_fault_has_its_test() -> None:
    without = missing(find_tests())
    assert not without, f"without a test: {', '.join(sorted(without))}"


_SOURCE = '''
import pytest
pytestmark = [pytest.mark.cassandra]
def test_f19_torn_tape_tail():
    """The tail of the
    file is cut off.

    More.
    """
@pytest.mark.long
@pytest.mark.parametrize("how", [1, pytest.param(2, marks=pytest.mark.fault("F25"))])
@pytest.mark.fault("F28", "F29")
def test_elsewhere(): pass
@pytest.mark.parametrize("times", [1, pytest.param(9, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
def test_f20_some(): pass
@pytest.mark.parametrize("under_test", MOSTLY_SQLITE, indirect=True)
def test_f21_shared(): pass
def test_other(): pass
def helper_f20_(): pass
'''


def test_tests_are_found_by_name_and_by_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fault.table.ROOT", tmp_path)
    (tmp_path / "test_some.py").write_text(_SOURCE)
    tests = find_tests(tmp_path)
    first, second, third, fourth = tests
    assert tuple(first) == (
        "test_some.py::test_f19_torn_tape_tail",
        ("F19",),
        "The tail of the file is cut off",
        "quick, on a node",
    )
    assert tuple(second) == ("test_some.py::test_elsewhere", ("F25", "F28", "F29"), "elsewhere", "long, on a node")
    assert (third.faults, third.length) == (("F20",), "quick, more with --long, on a node")
    assert (fourth.faults, fourth.length) == (("F21",), "quick, more with --long, on a node")
    assert missing(tests) == set(FAULTS) - {"F19", "F20", "F21", "F25", "F28", "F29"}
    lines = written(f"a\n{BEGIN}\nold\n{END}\nb", tests).splitlines()
    assert [lines[0], lines[1], lines[-2], lines[-1]] == ["a", BEGIN, END, "b"]
    assert (
        "| F19 torn tape tail | The tail of the file is cut off | `test_some.py` `test_f19_torn_tape_tail` |"
        in "".join(lines)
    )
    assert "| F22 fsync error | NO TEST | | |" in lines


def test_a_number_that_is_no_fault_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fault.table.ROOT", tmp_path)
    (tmp_path / "test_some.py").write_text("def test_f99_wrong(): pass\n")
    with pytest.raises(ValueError, match="there is no fault F99"):
        find_tests(tmp_path)


def test_a_document_without_a_place_for_it_is_told() -> None:
    with pytest.raises(ValueError, match="no place"):
        written("nothing", [])
