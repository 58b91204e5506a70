"""The faults that this house survives, and which test causes each: read from the tests' own ids, written for people.

A test belongs to a fault when its name begins with the fault's number (`test_f19_torn_tape_tail`), or, where it stands
elsewhere or covers several, by its mark: `@pytest.mark.fault("F25", "F29")`. The table in ARCHITECTURE.md is made of
that by `scripts/check --fix`; tests/fault/test_table.py is red when it is stale.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from tests import stores

ROOT: Final = Path(__file__).resolve().parent.parent.parent
ARCHITECTURE: Final = ROOT / "ARCHITECTURE.md"
BEGIN: Final = "<!-- the faults: written by `scripts/check --fix` from the tests' names -->"
END: Final = "<!-- the faults end -->"

FAULTS: Final = {
    "F01": "late join",
    "F02": "SUB paused a minute at 5,000/s",
    "F03": "burst beyond the high-water mark",
    "F04": "last frame dropped",
    "F05": "engine killed and back",
    "F06": "engine back with an empty journal",
    "F07": "sequence regression mid-way",
    "F08": "same sequence, other payload",
    "F09": "duplicates",
    "F10": "reordered frames",
    "F11": "ROUTER dead",
    "F12": "ROUTER slow",
    "F13": "ROUTER lies",
    "F14": "stale answer",
    "F15": "history gone",
    "F16": "malformed, oversized, deeply nested frames",
    "F17": "ipc path taken over",
    "F18": "SIGKILL at each named point",
    "F19": "torn tape tail",
    "F20": "flipped bit",
    "F21": "full disk",
    "F22": "fsync error",
    "F23": "database away at start",
    "F24": "database away ten minutes, 2,000,000 frames",
    "F25": "database paused",
    "F26": "database killed after it received, before it answered",
    "F27": "answers dropped",
    "F28": "batch log replayed late",
    "F29": "node back with a cut commit log",
    "F30": "table altered or dropped beneath",
    "F31": "two sidecars, complete tapes",
    "F32": "two sidecars, different holes",
    "F33": "clock two hours back, two days ahead",
    "F34": "SIGTERM under load",
    "F35": "driver future that never completes",
    "F36": "symbol added between lives",
    "F37": "one database node of three away",
}

_NAME: Final = re.compile(r"test_f(\d\d)_")
_NO_TEST: Final = "NO TEST"


class FaultTest(NamedTuple):
    """One test and the faults that it causes."""

    id: str
    faults: tuple[str, ...]
    does: str
    length: str


def faults_of(name: str, marked: tuple[str, ...]) -> tuple[str, ...]:
    """Give the faults that a test's name and its marks say; ValueError for one that isn't in the list."""
    found = _NAME.match(name)
    faults = tuple(sorted({*marked, *([f"F{found[1]}"] if found else [])}))
    for fault in faults:
        if fault not in FAULTS:
            raise ValueError(f"{name}: there is no fault {fault}; tests/fault/table.py lists them")
    return faults


def find_tests(folder: Path = ROOT / "tests") -> list[FaultTest]:
    """Read all test files; give the tests that cause a fault, as they stand."""
    return [test for path in sorted(folder.rglob("test_*.py")) for test in _tests_in(path)]


def _tests_in(path: Path) -> Iterator[FaultTest]:
    tree = ast.parse(path.read_text("utf-8"))
    for_all = [
        mark
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(isinstance(to, ast.Name) and to.id == "pytestmark" for to in node.targets)
        for mark in _marks(node.value)
    ]
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not node.name.startswith("test_"):
            continue
        own = for_all + [mark for decorator in node.decorator_list for mark in _marks(decorator)]
        marks = own + [mark for decorator in node.decorator_list for mark in _marks_of_parameters(decorator)]
        faults = faults_of(node.name, tuple(value for name, values in marks if name == "fault" for value in values))
        if faults:
            does = (ast.get_docstring(node) or node.name.removeprefix("test_").replace("_", " ")).split("\n\n")[0]
            length = _length({name for name, _ in own}, {name for name, _ in marks})
            yield FaultTest(
                f"{path.relative_to(ROOT)}::{node.name}", faults, " ".join(does.split()).rstrip("."), length
            )


Marks = list[tuple[str, list[str]]]


def _marks(given: ast.AST) -> Marks:
    """Read `pytest.mark.NAME` or `pytest.mark.NAME("…")`, or a list of them: name and texts of each."""
    if isinstance(given, ast.List):
        return [mark for each in given.elts for mark in _marks(each)]
    arguments = given.args if isinstance(given, ast.Call) else []
    named = given.func if isinstance(given, ast.Call) else given
    if not (isinstance(named, ast.Attribute) and isinstance(named.value, ast.Attribute) and named.value.attr == "mark"):
        return []
    values = [each.value for each in arguments if isinstance(each, ast.Constant)]
    return [(named.attr, [value for value in values if isinstance(value, str)])]


def _marks_of_parameters(given: ast.AST) -> Marks:
    """Read the marks that only some parameters have, written here or under a name in tests/stores.py."""
    keywords = [node for node in ast.walk(given) if isinstance(node, ast.keyword) and node.arg == "marks"]
    lists = [getattr(stores, node.id, None) for node in ast.walk(given) if isinstance(node, ast.Name)]
    shared = [each for some in lists if isinstance(some, list) for each in some if not isinstance(each, str)]
    return [mark for keyword in keywords for mark in _marks(keyword.value)] + [
        (mark.name, []) for each in shared for mark in each.marks
    ]


def _length(of_all: set[str], of_some: set[str]) -> str:
    length = "quick"
    if "long" in of_some:
        length = "long" if "long" in of_all else "quick, more with --long"
    return f"{length}, on a node" if "cassandra" in of_all else length


def missing(tests: list[FaultTest]) -> set[str]:
    """Name the faults that no test causes."""
    return set(FAULTS) - {fault for test in tests for fault in test.faults}


def table(tests: list[FaultTest]) -> str:
    """Write the table for people, one line a fault and test."""
    lines = ["| fault | what is done | test | |", "| --- | --- | --- | --- |"]
    for fault, name in FAULTS.items():
        mine = [test for test in tests if fault in test.faults]
        for test in mine:
            place, _, function = test.id.partition("::")
            lines.append(f"| {fault} {name} | {test.does} | `{place}` `{function}` | {test.length} |")
        if not mine:
            lines.append(f"| {fault} {name} | {_NO_TEST} | | |")
    return "\n".join(lines)


def written(text: str, tests: list[FaultTest]) -> str:
    """Give a document with the table in its place. Raises ValueError when it has no place for it."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"there is no place for the table: a line {BEGIN} and, below, a line {END}")
    return f"{before}{BEGIN}\n{table(tests)}\n{END}{after}"


def main() -> int:
    """Write the table into ARCHITECTURE.md."""
    ARCHITECTURE.write_text(written(ARCHITECTURE.read_text("utf-8"), find_tests()), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
