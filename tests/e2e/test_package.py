"""What users install: an sdist that is whole, a wheel built from it that plays the demo in an empty environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.world import ENVIRONMENT, ROOT
from sidecar import __version__

CARRIED = (
    "schema/settlement_schema.cql",
    "schema/roles.cql",
    "bench/engine.py",
    "bench/judge.py",
    "bench/session.toml",
    "bench/binance.toml",
    "bench/data/engine-session.jsonl.gz",
    "bench/data/engine-session-balances.json",
    "bench/data/binance-spot-2024-08-08.csv.gz",
)
EMPTY = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and not key.startswith("SIDECAR_")}


def _built(what: str, source: Path, into: Path) -> Path:
    """Build an sdist or a wheel as any front end does, with the locked setuptools."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{what}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(into)],
        cwd=source,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return into / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The sdist of what git knows of here, and the wheel made of that sdist alone."""
    folder = tmp_path_factory.mktemp("built")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git repository")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "copy" / name)
    sdist = _built("sdist", folder / "copy", folder)
    (folder / "unpacked").mkdir()
    subprocess.run(["tar", "-xf", sdist, "-C", folder / "unpacked"], check=True)
    wheel = _built("wheel", folder / "unpacked" / sdist.name.removesuffix(".tar.gz"), folder)
    yield sdist, wheel
    shutil.rmtree(folder)


def test_the_wheel_carries_what_the_package_needs_and_no_more(built: tuple[Path, Path]) -> None:
    _, wheel = built
    assert wheel.name == f"sidecar-{__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"sidecar/share/{name}" for name in CARRIED} <= names
    assert {"sidecar/sample.toml", "sidecar/py.typed", "sidecar/cli/demo.py", "sidecar/store/sqlite.py"} <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "sidecar").rglob("*.py")}
    outside = {name for name in names if not name.startswith("sidecar/share/") and ".dist-info/" not in name}
    assert outside == modules | {"sidecar/sample.toml", "sidecar/py.typed"}
    for folder in ("systemd", "grafana", "prometheus"):
        there = {path.name for path in (ROOT / "scripts" / folder).glob("*")}
        assert {name.rpartition("/")[2] for name in names if f"/share/scripts/{folder}/" in name} == there


def test_the_sdist_holds_the_whole_repository(built: tuple[Path, Path]) -> None:
    sdist, _ = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    wanted = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
    assert wanted - names <= {".gitignore"}


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_demo_plays_from_the_wheel_in_an_empty_environment(built: tuple[Path, Path], tmp_path: Path) -> None:
    """Its dependencies come from wherever this machine's pip is told to look."""
    _, wheel = built
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "empty")], check=True)
    programs = tmp_path / "empty" / "bin"
    installed = subprocess.run(
        [programs / "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel)],
        capture_output=True, text=True, check=False, env=EMPTY,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr

    def sidecar(*arguments: str) -> str:
        done = subprocess.run(
            [programs / "sidecar", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False, env=EMPTY
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    versions = json.loads(sidecar("--version", "--json"))
    assert versions["sidecar"] == __version__
    assert versions["cassandra-driver"] is None
    assert all((Path(versions["files"]) / name).is_file() for name in CARRIED)
    assert sidecar("--version").splitlines()[0] == f"sidecar {__version__}"
    (tmp_path / "sidecar.toml").write_text(sidecar("print-config", "--sample"))
    assert json.loads(sidecar("check-config", "--json"))["ok"]
    verdict = json.loads(sidecar("demo", "--json"))
    assert (verdict["ok"], verdict["trades"], verdict["balances_equal"]) == (True, 30_002, 192)
    assert "ALL EQUAL: 34419 trades" in sidecar("demo", "--trades", "binance", "--rate", "0")
