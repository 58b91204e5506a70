"""What a reader of the house would check: who imports whom, that floor 1 is pure, that what is written is there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar import config
from sidecar.cli import main

ROOT = Path(__file__).resolve().parent.parent

# Imports point downwards. A new room gets its floor here; `store` stands for all rooms in it.
FLOORS = {
    0: {"errors", "events"},
    1: {"wire", "symbols", "ledger", "batch", "replay"},
    2: {"disk", "feed", "talk", "trust", "tape", "store", "notify"},
    3: {
        *("decisions", "refill", "replay_server", "record"),
        *("pipeline", "life", "foreign", "streams", "late", "opening", "settle", "proof"),
        *("latency", "standing", "watch"),
    },
    4: {"config", "service", "admin", "metrics", "page", "cli", "demo"},
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
PURE, IO, TOP = 1, 2, 4
# The two stores share their base and nothing else; what Cassandra's is made of stands in files beside it.
PARTS = {
    "store.cassandra": {
        "store.base",
        "store.connection",
        "store.encode",
        "store.nodes",
        "store.scans",
        "store.tables",
    },
    "store.scans": {"store.base", "store.tables"},
    "store.encode": {"store.tables"},
    "store.sqlite": {"disk", "store.base"},
    "tape": {"disk"},
}
IMPURE_MODULES = {
    *("asyncio", "concurrent", "multiprocessing", "select", "selectors", "signal", "socket", "subprocess", "threading"),
    *("datetime", "time", "random", "secrets", "uuid"),
    *("io", "logging", "os", "pathlib", "shutil", "sqlite3", "sys", "tempfile"),
    *("cassandra", "uvloop", "zmq"),
}


def rooms() -> Iterator[tuple[str, Path]]:
    """Each module of the house with its name below `sidecar.`; the doors (__init__, __main__) are no rooms."""
    for path in sorted((ROOT / "sidecar").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "sidecar").with_suffix("").parts)
        if name not in {"__init__", "__main__"}:
            yield name.removesuffix(".__init__"), path


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, wherever it stands; names out of `sidecar` with their room."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module in {"sidecar", "sidecar.store"}:
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def import_faults(room: str, tree: ast.AST) -> list[str]:
    """What a room imports that it must not."""
    top = room.partition(".")[0]
    if top not in FLOOR_OF:
        return [f"sidecar/{room}: has no floor; give it one in FLOORS, tests/test_house.py"]
    floor, faults = FLOOR_OF[top], []
    for line, name in imports(tree):
        where = f"sidecar/{room}, line {line}: imports {name}"
        if name.startswith("."):
            faults.append(f"{where}: rooms are called by their full name")
        elif name == "sidecar.__version__":
            continue
        elif name.split(".")[0] != "sidecar":
            if floor <= PURE and name.split(".")[0] in IMPURE_MODULES:
                faults.append(f"{where}: floor {floor} is pure")
        else:
            other = name.removeprefix("sidecar").removeprefix(".")
            other_top = other.split(".")[0]
            if other_top not in FLOOR_OF:
                faults.append(f"{where}: which is no room; what stands in a room is imported from there")
            elif FLOOR_OF[other_top] > floor:
                faults.append(f"{where}: floor {FLOOR_OF[other_top]} is above floor {floor}")
            elif floor == FLOOR_OF[other_top] == IO and other not in PARTS.get(room, ()):
                faults.append(f"{where}: rooms of floor {IO} don't know each other")
    return faults


def float_faults(room: str, tree: ast.AST) -> list[str]:
    """Where a room of the pure floor touches a float."""
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, float):
            faults.append(f"sidecar/{room}, line {node.lineno}: the float {node.value}")
        elif isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Div):
            faults.append(f"sidecar/{room}, line {node.lineno}: / makes a float; // does not")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"float", "round"}:
            faults.append(f"sidecar/{room}, line {node.lineno}: {node.func.id}()")
    return faults


def test_imports_point_downwards() -> None:
    faults = [fault for room, path in rooms() for fault in import_faults(room, ast.parse(path.read_text("utf-8")))]
    assert not faults, "\n".join(faults)


def test_no_room_needs_itself_through_others() -> None:
    known = {room for room, _ in rooms()}
    needs: dict[str, set[str]] = {}
    for room, path in rooms():
        names = {name.removeprefix("sidecar.") for _, name in imports(ast.parse(path.read_text("utf-8")))}
        needs[room] = (names & known) - {room}
    finished: set[str] = set()

    def visit(room: str, way: tuple[str, ...]) -> None:
        assert room not in way, " needs ".join((*way, room))
        if room not in finished:
            for other in needs[room]:
                visit(other, (*way, room))
            finished.add(room)

    for room in needs:
        visit(room, ())


def test_the_pure_floors_know_no_float() -> None:
    faults = [
        fault
        for room, path in rooms()
        if FLOOR_OF.get(room.split(".")[0], TOP) <= PURE
        for fault in float_faults(room, ast.parse(path.read_text("utf-8")))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "room, source, fault",
    [
        ("ledger", "import time", "pure"),
        ("ledger", "def fold():\n    from os.path import join", "pure"),
        ("wire", "from sidecar.tape import Tape", "above"),
        ("tape", "from sidecar import feed", "don't know each other"),
        ("feed", "from sidecar.store.base import Store", "don't know each other"),
        ("store.sqlite", "from sidecar.store import cassandra", "don't know each other"),
        ("settle", "import sidecar.config", "above"),
        ("settle", "from .pipeline import Pipeline", "full name"),
        ("settle", "from sidecar import Settlement", "no room"),
        ("drawer", "", "no floor"),
    ],
)
def test_the_judge_of_imports_sees_a_fault(room: str, source: str, fault: str) -> None:
    assert fault in "".join(import_faults(room, ast.parse(source)))


@pytest.mark.parametrize("source", ["x = 1.5", "x = a / b", "x /= 2", "x = float(a)"])
def test_the_judge_of_floats_sees_a_fault(source: str) -> None:
    assert float_faults("ledger", ast.parse(source))


@pytest.mark.parametrize(
    "room, source",
    [
        ("ledger", "from sidecar.symbols import Symbols\nx = a // b"),
        ("store.cassandra", "import cassandra\nfrom sidecar.store.base import Store"),
        ("settle", "from sidecar import wire\nfrom sidecar.pipeline import Pipeline\nimport time"),
        ("cli.look", "from sidecar.config import load"),
    ],
)
def test_the_judges_let_pass_what_is_right(room: str, source: str) -> None:
    assert import_faults(room, ast.parse(source)) == []
    assert float_faults(room, ast.parse(source)) == []


def test_the_sample_configuration_parses() -> None:
    assert config.parse(config.example()).warnings == ()


# --- what is written is there -----------------------------------------------------------------------------------------


def code_in(text: str) -> str:
    """The code of a Markdown text: blocks and spans."""
    return "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", text, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "OPERATIONS.md"])
def test_scripts_that_are_named_exist(name: str) -> None:
    for script in set(
        re.findall(r"(?<![\w/.])(?:scripts|\.ci)/[a-z][\w-]*(?![\w/])", code_in((ROOT / name).read_text("utf-8")))
    ):
        assert (ROOT / script).exists(), f"{name} names {script}"


def test_verbs_that_readme_and_runbook_name_exist(capsys: pytest.CaptureFixture[str]) -> None:
    code = code_in((ROOT / "README.md").read_text("utf-8")) + code_in((ROOT / "OPERATIONS.md").read_text("utf-8"))
    for verb in sorted(set(re.findall(r"(?:^|[`\s/])sidecar ([a-z][a-z-]*)", code))):
        with pytest.raises(SystemExit) as ended:
            main([verb, "--help"])
        assert ended.value.code == 0, f"README.md or OPERATIONS.md names `sidecar {verb}`: {capsys.readouterr().err}"


def test_scripts_can_be_run() -> None:
    for script in [*(ROOT / "scripts").iterdir(), ROOT / ".ci/run"]:
        if script.is_file() and not script.name.startswith("_"):
            assert os.access(script, os.X_OK), f"{script.relative_to(ROOT)} is not executable"


def dependencies() -> set[str]:
    """Names of all that pyproject.toml asks for, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    return {re.split(r"[\s<>=!~\[;]", each)[0] for each in wanted}


INSTEAD = {"scylla-driver"}  # of cassandra-driver: both install the package `cassandra`, one of them is locked


def test_the_lock_has_every_dependency() -> None:
    locked = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text("utf-8"), re.MULTILINE))
    assert dependencies() - INSTEAD <= locked, "refresh requirements.lock with the command at its head"
    assert not INSTEAD & locked


def test_the_lock_names_every_file_by_its_hash_and_nothing_by_its_address() -> None:
    text = (ROOT / "requirements.lock").read_text("utf-8")
    entries = re.split(r"^(?=[^\s#])", text, flags=re.MULTILINE)[1:]
    faults = [entry.splitlines()[0] for entry in entries if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry)]
    faults += [
        entry.splitlines()[0] for entry in entries if not re.match(r"[\w.-]+==[\w.]+ \\$", entry.splitlines()[0])
    ]
    assert not faults, f"without a hash, or not pinned: {faults}"
    assert len(entries) > len(dependencies())
    assert "://" not in text


def test_the_architecture_says_why_each_dependency_is_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    assert [name for name in sorted(dependencies()) if f"`{name}`" not in text] == []


# Written in two parts, so that this file passes its own test.
MACHINE = re.compile(
    rb"(?<![\w.<])/(?:wo"
    rb"rk|ro"
    rb"ot|opt/wh"
    rb"eels)\b|--(?:extra-)?index"
    rb"-url|--trusted"
    rb"-host"
    rb"|py"
    rb"pi\.org|pythonh"
    rb"osted|repo1?\.ma"
    rb"ven"
)


def test_nothing_names_a_machine_or_a_registry() -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git repository")
    faults = []
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if not name or not path.is_file():
            continue
        content = path.read_bytes()
        if b"\0" not in content[:8_192]:
            faults += [f"{name}: {found.group().decode()}" for found in MACHINE.finditer(content)]
    assert not faults, "\n".join(faults)
