"""README's walk by hand: exactly its lines, pasted into a shell one after the other."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from bench.world import ROOT

SECTION = "## By hand, step by step"


def lines() -> list[str]:
    """The shell lines of the section, in order."""
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.count(SECTION) == 1
    section = text.partition(SECTION)[2].partition("\n## ")[0]
    return [
        line
        for block in re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]


@pytest.mark.cassandra
@pytest.mark.timeout(300)
def test_the_walk_by_hand(tmp_path: Path) -> None:
    """In a folder that looks like the repository, so that nothing is left in the real one."""
    for name in ("scripts", "bench", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = "set -ex\n" + "\n".join(lines()) + "\necho walked\n"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SIDECAR_", "PYTHONPATH"))}
    shell = subprocess.Popen(
        ["bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = shell.communicate(script, timeout=240)
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
        wiped = [str(ROOT / "scripts" / "cassandra"), "wipe", "--name", "walk"]
        subprocess.run(wiped, capture_output=True, check=False)
    assert shell.returncode == 0, said
    assert said.splitlines()[-1] == "walked", said
    assert "created settled_trades_btc_usdt" in said
    assert "(6 rows)" in said  # three users, two assets
    assert "(1 row)" in said
    assert re.search(r"^btc +[0-9.]+ +main ", said, re.MULTILINE), said
    assert re.search(r"^output_sequence +[0-9]+$", said, re.MULTILINE), said
    assert not (tmp_path / "walk").exists()
