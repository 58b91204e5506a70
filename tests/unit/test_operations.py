"""What operators are given: alert rules, dashboard, runbook, units, the installer. Each says what the others say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sidecar.config import load
from sidecar.metrics import POSITIONS, PROVING, RECORDING, SETTLING, STANDING

ROOT = Path(__file__).resolve().parent.parent.parent
RUNBOOK = (ROOT / "OPERATIONS.md").read_text()
RULES = ROOT / "scripts/prometheus/alerts.yml"
RULE_TESTS = ROOT / "scripts/prometheus/alerts.test.yml"
DASHBOARD = ROOT / "scripts/grafana/sidecar.json"
UNITS = sorted((ROOT / "scripts/systemd").glob("*.service"))
ALERTS = re.findall(r"- alert: (\w+)", RULES.read_text())
EXPOSURE_MAX = 1.5  # of systemd-analyze security: 10 is an open door

METRICS = {
    f"sidecar_{line.name}" for lines in (POSITIONS, PROVING, RECORDING, SETTLING, STANDING) for line in lines
} | {
    *("sidecar_state", "sidecar_halted", "sidecar_build_info"),
    *("sidecar_acknowledge_seconds_bucket", "sidecar_engine_to_acknowledge_seconds_bucket"),
}


def metrics_in(text: str) -> set[str]:
    """Names of our metrics; `sidecar_state="…"` as a label would be none."""
    return set(re.findall(r"\bsidecar_[a-z0-9_]+", text))


def test_each_alert_has_its_section_and_each_section_its_alert() -> None:
    assert len(set(ALERTS)) == len(ALERTS) > 20
    sections = re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", RUNBOOK, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in sections] == ALERTS
    for name, text in sections:
        assert re.findall(r"^\*\*([^*]+):\*\*", text, re.MULTILINE) == ["Means", "Look at", "Do"], name
    assert re.findall(r"runbook: 'OPERATIONS.md#(\w+)'", RULES.read_text()) == [name.lower() for name in ALERTS]


@pytest.mark.parametrize("path", [RULES, RULE_TESTS, DASHBOARD, ROOT / "OPERATIONS.md"], ids=lambda path: path.name)
def test_metrics_that_are_named_exist(path: Path) -> None:
    named = metrics_in(path.read_text())
    assert named - METRICS == set()
    assert named


def test_each_alert_is_tested() -> None:
    text = RULE_TESTS.read_text()
    for name in ALERTS:
        assert f"alertname: {name}}}" in text, f"{name}: that it is silent when all is well"
        assert f'ALERTS{{alertname="{name}",alertstate="firing"' in text, f"{name}: that it fires"


@pytest.mark.tool("promtool")
def test_promtool_takes_the_rules_and_their_tests_pass() -> None:
    for arguments in (["check", "rules", "--lint=all", "--lint-fatal", str(RULES)], ["test", "rules", str(RULE_TESTS)]):
        done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.tool("promtool")
def test_a_rule_that_no_longer_fires_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "alerts.yml").write_text(RULES.read_text().replace("sidecar_halted == 1", "sidecar_halted == 2"))
    shutil.copy(RULE_TESTS, tmp_path)
    done = subprocess.run(
        ["promtool", "test", "rules", str(tmp_path / RULE_TESTS.name)], capture_output=True, check=False
    )
    assert done.returncode != 0


def test_the_dashboard_is_whole() -> None:
    board = json.loads(DASHBOARD.read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["title"]
        assert all(target["expr"] for target in panel["targets"])
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} lies over another panel"
        assert all(x < 24 for x, _ in cells)
        taken |= cells


@pytest.mark.tool("promtool")
def test_prometheus_takes_the_expressions_of_the_dashboard(tmp_path: Path) -> None:
    rules = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            expression = (
                target["expr"].replace("$__rate_interval", "1m").replace("$stream", "main").replace("$instance", ".*")
            )
            rules.append({"record": f"panel:{panel['id']}:{target['refId']}", "expr": expression})
    path = tmp_path / "panels.yml"
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))  # JSON is YAML
    done = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- units ------------------------------------------------------------------------------------------------------------


def settings(unit: Path) -> list[str]:
    return [line for line in unit.read_text().splitlines() if line and not line.startswith(("#", "["))]


def test_the_units_differ_only_in_what_they_are_for() -> None:
    assert [unit.name for unit in UNITS] == ["sidecar-record.service", "sidecar-settle.service", "sidecar.service"]
    own = ("Description=", "After=", "Conflicts=", "ExecStart=", "Environment=")
    common = [[line for line in settings(unit) if not line.startswith(own)] for unit in UNITS]
    assert common[0] == common[1] == common[2]
    assert {
        "Type=notify", "Restart=always", "StartLimitIntervalSec=0", "RestartPreventExitStatus=78", "WatchdogSec=30",
        "NoNewPrivileges=yes", "ProtectSystem=strict", "StateDirectory=sidecar",
    } <= set(common[0])  # fmt: skip


@pytest.mark.tool("systemd-analyze")
def test_systemd_takes_the_units_as_installed_and_finds_them_closed(tmp_path: Path) -> None:
    install(tmp_path)
    units = sorted((tmp_path / "etc/systemd/system").iterdir())
    assert [unit.name for unit in units] == [unit.name for unit in UNITS]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), "it ends with 0 for keys it does not know, too"
    for unit in units:
        limit = f"--threshold={EXPOSURE_MAX * 10:.0f}"
        command = ["systemd-analyze", "security", "--offline=true", "--no-pager", limit, str(unit)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-200:]


@pytest.mark.tool("systemd-analyze")
def test_a_unit_that_is_wrong_or_open_is_noticed(tmp_path: Path) -> None:
    install(tmp_path)
    unit = tmp_path / "etc/systemd/system/sidecar.service"
    text = unit.read_text()
    unit.write_text(text.replace("ProtectHome=yes", "ProtectHomes=yes"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert "ProtectHomes" in done.stderr
    unit.write_text(re.sub(r"^(Protect|SystemCall|Restrict|CapabilityB).*\n", "", text, flags=re.MULTILINE))
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE_MAX * 10:.0f}", str(unit)]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


# --- the installer ----------------------------------------------------------------------------------------------------


def run_installer(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "scripts/install", *arguments], capture_output=True, text=True, check=False)


def install(root: Path, *more: str) -> str:
    """Install below a root, with this environment's own program."""
    done = run_installer("--root", root, "--program", str(Path(sys.executable).with_name("sidecar")), *more)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def tree(root: Path) -> dict[str, tuple[int, int, str]]:
    """Everything below a folder: its mode, time and content."""
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mode, path.lstat().st_mtime_ns, path.read_text() if path.is_file() else ""
        )
        for path in sorted(root.rglob("*"))
    }  # fmt: skip


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    said = install(tmp_path, "--dry-run")
    assert "written   " in said
    assert tree(tmp_path) == {}


def test_installing_twice_is_installing_once(tmp_path: Path) -> None:
    said = install(tmp_path)
    assert "sidecar check-config" in said
    once = tree(tmp_path)
    assert oct(once["etc/sidecar/credentials"][0])[-3:] == "700"
    unit = (tmp_path / "etc/systemd/system/sidecar.service").read_text()
    assert f"ExecStart={Path(sys.executable).with_name('sidecar')} run --config /etc/sidecar/sidecar.toml" in unit
    said = install(tmp_path)
    assert "everything is as it should be" in said
    assert {line.split()[0] for line in said.splitlines()} == {"kept", "everything"}
    assert tree(tmp_path) == once


def test_the_configuration_it_writes_is_fine_and_then_yours(tmp_path: Path) -> None:
    install(tmp_path)
    path = tmp_path / "etc/sidecar/sidecar.toml"
    config = load(path, environ={})
    assert (config.tape.path, config.warnings) == (Path("/var/lib/sidecar/tape.db"), ())
    path.write_text("# mine\n")
    (tmp_path / "etc/systemd/system/sidecar.service").write_text("old\n")
    said = install(tmp_path)
    assert path.read_text() == "# mine\n"
    assert re.search(r"renewed +\S+/sidecar\.service", said)


def test_uninstalling_leaves_what_is_yours(tmp_path: Path) -> None:
    install(tmp_path)
    (tmp_path / "var/lib/sidecar").mkdir(parents=True)
    (tmp_path / "var/lib/sidecar/tape.db").write_text("the tape")
    (tmp_path / "etc/sidecar/credentials/cassandra").write_text("secret")
    other = tmp_path / "etc/systemd/system/other.service"
    other.write_text("not ours")
    before = tree(tmp_path)
    assert run_installer("--root", tmp_path, "--uninstall", "--dry-run").returncode == 0
    assert tree(tmp_path) == before
    for _ in range(2):
        done = run_installer("--root", tmp_path, "--uninstall")
        assert (done.returncode, done.stderr) == (0, "")
        assert {path for path in tree(tmp_path) if (tmp_path / path).is_file()} == {
            "etc/sidecar/credentials/cassandra", "etc/sidecar/sidecar.toml", "etc/systemd/system/other.service",
            "var/lib/sidecar/tape.db",
        }  # fmt: skip


@pytest.mark.parametrize("wrong", [["--rot", "x"], ["--root"], ["--root", "relative"], ["--program", "/none"]])
def test_wrong_usage_is_named(wrong: list[str]) -> None:
    done = run_installer(*wrong)
    assert done.returncode == 2
    assert wrong[0] in done.stderr


@pytest.mark.long
def test_the_program_it_makes_runs(tmp_path: Path) -> None:
    done = run_installer("--root", tmp_path)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [tmp_path / "opt/sidecar/bin/sidecar", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("sidecar ")
    done = subprocess.run([tmp_path / "opt/sidecar/bin/pip", "list"], capture_output=True, text=True, check=True)
    assert "cassandra-driver" in done.stdout
    assert "pytest" not in done.stdout, "no more than it needs"
    assert "everything is as it should be" in run_installer("--root", tmp_path).stdout
