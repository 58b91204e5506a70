"""`sidecar --version`: what a bug report needs, from a command line as users type it."""

import json
import sqlite3

import pytest
import zmq

from sidecar import __version__
from sidecar.cli import main, versions


def test_the_first_line_is_our_own_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"sidecar {__version__}"
    assert {line.split()[0] for line in lines[1:]} == versions.gathered().keys() - {"sidecar"}


@pytest.mark.parametrize("arguments", [["--version", "--json"], ["--json", "--version"]])
def test_machines_get_one_object(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["sidecar"] == __version__
    assert said["libzmq"].startswith(zmq.zmq_version())
    assert said["sqlite"] == sqlite3.sqlite_version
    assert {"python", "pyzmq", "msgpack", "msgspec", "uvloop", "platform", "files"} <= said.keys()


def test_the_installed_package_says_the_same_version() -> None:
    assert versions._version("sidecar") == __version__


def test_a_missing_driver_is_named_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_DRIVERS", ("no-such-driver",))
    said = versions.gathered()
    assert said["cassandra-driver"] is None
    assert "cassandra-driver  not installed" in versions.text(said)


def test_json_before_the_verb_counts_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "status", "--config", "/nowhere/sidecar.toml"]) == 78
    assert json.loads(capsys.readouterr().err)["error"] == "ConfigError"
