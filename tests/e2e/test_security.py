"""Who may speak as the engine, and what a run never says: real processes, as an operator starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.world import ENVIRONMENT, World, free_port, until

PASSWORD = "correct-horse-battery-staple"


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Two key files, made by the verb."""
    command = [sys.executable, "-m", "sidecar", "keygen", name, "--json"]
    said = json.loads(subprocess.run(command, capture_output=True, check=True, env=ENVIRONMENT, cwd=folder).stdout)
    return folder / said["public_key_file"], folder / said["secret_key_file"]


def secret_in(key_file: Path) -> str:
    """The secret of a key file, to look for it where it must not be."""
    (line,) = (line for line in key_file.read_text().splitlines() if "secret-key" in line)
    return line.partition("=")[2].strip(' "')


def test_an_engine_is_heard_only_with_its_key(tmp_path: Path) -> None:
    engine_public, engine_secret = keys(tmp_path, "engine")
    other_public, _ = keys(tmp_path, "other")
    _, own = keys(tmp_path, "sidecar")
    ours = [f"engine.curve_key_file={own}", "engine.silence_s=0.5"]
    with World(tmp_path, settings=ours) as world:
        engine = world.engine("--count", "500", "--curve-key-file", str(engine_secret), "--heartbeat-s", "0.2")
        world.settings.append(f"engine.curve_server_key_file={other_public}")
        wrong = world.start("run", log="wrong.log")
        (refused,) = until(lambda: wrong.logged("engine_not_trusted"), "the engine is not the one of the key")
        assert "curve_server_key_file" in refused["next_step"]
        until(lambda: wrong.logged("engine_silent"), "silence is noticed")
        said = world.verb("status")
        assert (said["taped"], said["acked"], said["state"]) == (0, 0, "waiting")
        assert wrong.term() == 0
        assert engine.running()  # still without a subscriber
        world.settings.append(f"engine.curve_server_key_file={engine_public}")
        right = world.start("run", log="right.log")
        assert engine.result()["events"] == 500
        world.until_acked(500)
        assert right.term() == 0
        assert right.logged("engine_not_trusted") == []
        assert world.judge()["ok"]
        for log in ("wrong.log", "right.log"):
            assert secret_in(own) not in (world.folder / log).read_text()


def test_an_ipc_path_that_anybody_could_take_over_is_refused_with_the_next_step(tmp_path: Path) -> None:
    """The sticky /tmp above it is only warned of; with CURVE it does not matter who binds."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with World(tmp_path, settings=[f"engine.endpoint=ipc://{shared}/pub"]) as world:
        refused = world.start("run")
        assert refused.wait(30) == 78
        said = refused.log.read_text()
        assert f"anybody may write into {shared} (0777)" in said
        assert "sidecar keygen" in said
        public, own = keys(tmp_path, "sidecar")
        run = world.start(
            "run", f"engine.curve_key_file={own}", f"engine.curve_server_key_file={public}", log="curve.log"
        )
        until(lambda: run.logged("starting"), "it runs")
        assert run.term() == 0
        shared.chmod(0o1777)
        run = world.start("run", log="sticky.log")
        warned = until(lambda: run.logged("ipc_path_shared"), "it warns")
        assert any(str(shared) in line["reason"] for line in warned)
        assert run.term() == 0


def test_no_output_of_any_verb_holds_a_secret(tmp_path: Path) -> None:
    password_file = tmp_path / "password"
    password_file.write_text(PASSWORD + "\n")
    engine_public, _ = keys(tmp_path, "engine")
    _, own = keys(tmp_path, "sidecar")
    settings = [
        f"engine.curve_server_key_file={engine_public}", f"engine.curve_key_file={own}",
        "store.backend=cassandra", f"store.cassandra.port={free_port()}", "store.cassandra.username=app",
        f"store.cassandra.password_file={password_file}", "store.cassandra.request_timeout_s=1",
    ]  # fmt: skip
    outputs: list[str] = []

    def said(world: World, *arguments: str) -> Any:
        command = [sys.executable, "-X", "dev", "-m", "sidecar", *arguments, *world.config()]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=tmp_path)
        outputs.append(done.stdout + done.stderr)
        return done.returncode

    with World(tmp_path, store=settings) as world:
        assert said(world, "print-config") == 0
        assert said(world, "print-config", "--json") == 0
        assert said(world, "check-config") == 0
        assert said(world, "status") == 0
        assert said(world, "balance", "1") == 1
        assert said(world, "schema", "apply") == 1
        password_file.chmod(0o644)
        run = world.start("run")
        until(lambda: run.logged("secret_exposed"), "it warns of the file's mode")
        until(lambda: run.logged("store_unreachable"), "it looks for the store")
        assert run.term() == 0
        outputs += [path.read_text(errors="replace") for path in (run.log, *tmp_path.glob("tape.db*"))]
        # A secret in the wrong place of the configuration: named, not shown.
        world.settings.append(f"store.cassandra.password={PASSWORD}")
        assert said(world, "check-config") == 78
    assert any("password_file" in output for output in outputs)
    for secret in (PASSWORD, secret_in(own)):
        assert [output for output in outputs if secret in output] == []
