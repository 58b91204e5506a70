"""The audit of the locked packages: only an answer about every one of them is an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import weaknesses
from tests.weaknesses import AUDITED, NOT_AUDITED, WEAK

FINE = {"name": "h11", "version": "0.16.0", "vulns": []}
SKIPPED = {"name": "h11", "skip_reason": "Dependency not found on PyPI and could not be audited: h11 (0.16.0)"}
BAD = {"name": "rich", "version": "1", "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2"]}]}


def answering(folder: Path, monkeypatch: pytest.MonkeyPatch, status: int, out: str = "", err: str = "") -> None:
    """Put a pip-audit on the path that says what the real one does."""
    (folder / "out").write_text(out)
    (folder / "err").write_text(err)
    program = folder / "pip-audit"
    program.write_text(f"#!/bin/sh\ncat {folder}/out; cat {folder}/err >&2; exit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.parametrize(
    "packages, status, code, words",
    [
        ([FINE, FINE], 0, AUDITED, "no known weaknesses in 2 packages"),
        ([FINE, BAD, SKIPPED], 1, WEAK, "rich 1: PYSEC-1, CVE-1; mended in: 2"),
        ([FINE, SKIPPED], 0, NOT_AUDITED, "1 of 2 packages were not looked at: Dependency not found"),
        ([SKIPPED], 0, NOT_AUDITED, "1 of 1"),
        ([], 0, NOT_AUDITED, "the answer is empty"),
    ],
)
def test_only_what_was_looked_at_is_audited(
    packages: list[dict[str, Any]], status: int, code: int, words: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    said = json.dumps({"dependencies": packages, "fixes": []})
    answering(tmp_path, monkeypatch, status, said, "No known vulnerabilities found\n")
    assert weaknesses.main() == code
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.startswith("NOT AUDITED: ") == (code == NOT_AUDITED)


@pytest.mark.parametrize("out", ["", "{}", "[]", "<html>"])
def test_a_service_that_is_away_is_said_loudly_and_is_no_failure(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(tmp_path, monkeypatch, 1, out, "Traceback\nrequests.exceptions.ReadTimeout: Read timed out.\n")
    code, said = weaknesses.audit()
    assert code == NOT_AUDITED
    assert said.startswith("service not reachable")
    assert "Read timed out" in said


def test_without_pip_audit_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert weaknesses.audit()[0] == NOT_AUDITED
    assert "pipx install pip-audit" in weaknesses.audit()[1]


def test_asking_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(tmp_path, monkeypatch, 0)
    (tmp_path / "pip-audit").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(weaknesses, "ALL_S", 0.2)
    code, said = weaknesses.audit()
    assert (code, said) == (NOT_AUDITED, "service not reachable: pip-audit was not through after 0.2 s")
