"""Known weaknesses of what requirements.lock names, asked of pip-audit; `python -m tests.weaknesses` for scripts/check.

pip-audit is used where it is installed and is not locked with the rest: with it would come eighteen more packages, an
HTTP client among them, to look after the forty-eight that we have. What matters is that silence is never taken for an
answer: pip-audit says "No known vulnerabilities found" and exits with 0 when its service knew none of the packages.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
AUDITED, WEAK, NOT_AUDITED = 0, 1, 3  # exit codes
ANSWER_S: Final = 3  # to wait for the service: where it is away, asking costs hardly more than this
ALL_S: Final = 60


def main() -> int:
    """Ask, say what was found on stderr, give the exit code."""
    code, said = audit()
    print(f"NOT AUDITED: {said}" if code == NOT_AUDITED else said, file=sys.stderr)
    return code


def audit() -> tuple[int, str]:
    """Ask pip-audit for every locked package."""
    program = shutil.which("pip-audit")
    if program is None:
        return NOT_AUDITED, "pip-audit is not installed (it is a program of its own: pipx install pip-audit)"
    command = [program, "--disable-pip", "--require-hashes", "--progress-spinner=off", f"--timeout={ANSWER_S}"]
    command += ["--format=json", f"--requirement={ROOT / 'requirements.lock'}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ALL_S)
    except subprocess.TimeoutExpired:
        return NOT_AUDITED, f"service not reachable: pip-audit was not through after {ALL_S} s"
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return NOT_AUDITED, f"service not reachable: pip-audit ended with {done.returncode}: {last}"
    return judge(packages)


def judge(packages: list[dict[str, Any]]) -> tuple[int, str]:
    """Say what the answer means: a package without `vulns` was not looked at, whatever pip-audit's exit code."""
    weak = [
        f"{package['name']} {package['version']}: {', '.join([one['id'], *one.get('aliases', ())])}; mended in:"
        f" {', '.join(one.get('fix_versions', ())) or 'nothing yet'}"
        for package in packages
        for one in package.get("vulns", ())
    ]
    if weak:
        return WEAK, "\n".join(weak)
    skipped = [package for package in packages if "vulns" not in package]
    if skipped or not packages:
        why = skipped[0].get("skip_reason", "no reason given") if skipped else "the answer is empty"
        return NOT_AUDITED, f"{len(skipped)} of {len(packages)} packages were not looked at: {why}"
    return AUDITED, f"no known weaknesses in {len(packages)} packages"


if __name__ == "__main__":
    sys.exit(main())
