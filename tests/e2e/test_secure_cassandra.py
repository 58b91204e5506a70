"""A real Cassandra with TLS, passwords and rights: the least role settles; whoever lacks something is told what."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.world import ROOT, World, until
from tests.cassandra_node import Node

pytestmark = [pytest.mark.cassandra, pytest.mark.long, pytest.mark.timeout(300)]

PASSWORDS = {name: secrets.token_hex(12) for name in ("sidecar", "sidecar_schema", "sidecar_reader")}
EVENTS = 1_000


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A secure node whose roles stand as an administrator would have made them, with the script of the repository."""
    with Node(secure=True) as secure:
        secure.cql((ROOT / "schema/roles.cql").read_text())
        for name, password in PASSWORDS.items():
            secure.cql(f"ALTER ROLE {name} WITH PASSWORD = '{password}' AND LOGIN = true")
        yield secure


class Login:
    """How a sidecar comes to the node; each part may be wrong."""

    def __init__(self, node: Node, folder: Path, role: str = "sidecar", password: str | None = None) -> None:
        file = folder / f"{role}.password"
        file.write_text((password or PASSWORDS[role]) + "\n")
        file.chmod(0o600)
        self.settings = {
            "store.backend": "cassandra",
            "store.cassandra.port": str(node.port),
            "store.cassandra.username": role,
            "store.cassandra.password_file": str(file),
            "store.cassandra.tls_ca_file": str(node.ca_file),
        }

    def but(self, **other: str) -> list[str]:
        settings = self.settings | {f"store.cassandra.{key}": value for key, value in other.items()}
        return [f"{key}={value}" for key, value in settings.items()]


def refused(folder: Path, settings: list[str]) -> str:
    """What a look-up says to a person."""
    with World(folder, store=settings) as world:
        said = world.verb("balance", "1", status=1)
    return str(said["message"])


def test_the_least_roles_make_tables_settle_and_look_up(node: Node, tmp_path: Path) -> None:
    with World(tmp_path, store=Login(node, tmp_path, "sidecar_schema").but()) as world:
        assert "user_balances" in world.verb("schema", "apply", status=0)["created"]
        assert world.verb("schema", "apply", status=0)["created"] == []
    with World(tmp_path, store=Login(node, tmp_path).but()) as world:
        run = world.start("run")
        assert world.engine("--count", str(EVENTS)).result()["events"] == EVENTS
        world.until_acked(EVENTS)
        assert run.term() == 0
    (event,) = (line for line in world.journal.read_text().splitlines() if json.loads(line)["seq"] == EVENTS)
    buyer = json.loads(event)["event"]["buyer_user_id"]
    with World(tmp_path, store=Login(node, tmp_path, "sidecar_reader").but()) as world:
        assert world.verb("balance", str(buyer), status=0)["balances"]
        assert world.verb("status", status=0)["acked"] == EVENTS
    _nothing_said(tmp_path)


def test_a_role_that_may_only_read_halts_with_the_next_step_and_settles_after_a_restart_with_rights(
    node: Node, tmp_path: Path
) -> None:
    with World(tmp_path, store=Login(node, tmp_path, "sidecar_schema").but()) as world:
        world.verb("schema", "apply", status=0)
    reader = Login(node, tmp_path, "sidecar_reader").but()
    with World(tmp_path, store=reader, settings=["stream.name=unwritten"]) as world:
        run = world.start("run")
        world.engine("--count", "50").result()
        halted = until(lambda: world.said().get("halted"), "it halts")
        assert halted["code"] == "STORE_REFUSED"
        assert "MODIFY" in halted["reason"]
        assert "schema/roles.cql" in halted["reason"]
        assert "rights" in halted["next_step"]
        assert world.verb("status", status=1)["taped"] == 50  # recording goes on
        assert run.term() == 0
    with World(tmp_path, store=Login(node, tmp_path).but(), settings=["stream.name=unwritten"]) as world:
        run = world.start("run", log="again.log")
        world.until_acked(50)
        assert run.term() == 0
    _nothing_said(tmp_path)


def test_a_wrong_password_is_named(node: Node, tmp_path: Path) -> None:
    said = refused(tmp_path, Login(node, tmp_path, password="wrong-" + secrets.token_hex(4)).but())
    assert "AuthenticationFailed" in said
    assert "check store.cassandra.username and password_file" in said
    _nothing_said(tmp_path, said)


def test_no_authority_at_all_is_named(node: Node, tmp_path: Path) -> None:
    assert "tls_ca_file" in refused(tmp_path, Login(node, tmp_path).but(tls_ca_file=""))


def test_an_authority_that_did_not_sign_the_node_is_named(node: Node, tmp_path: Path) -> None:
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "1",
    ]
    files = ["-subj", "/CN=other", "-keyout", str(tmp_path / "o.key"), "-out", str(tmp_path / "other.pem")]
    subprocess.run([*command, *files], check=True, capture_output=True)
    said = refused(tmp_path, Login(node, tmp_path).but(tls_ca_file=str(tmp_path / "other.pem")))
    assert "certificate verify failed" in said
    assert "check store.cassandra.tls_ca_file" in said


def test_an_authority_that_is_no_file_is_named(node: Node, tmp_path: Path) -> None:
    with World(tmp_path, store=Login(node, tmp_path).but(tls_ca_file=str(tmp_path / "none.pem"))) as world:
        said: Any = world.verb("balance", "1", status=78)
    assert "none.pem: can't be used: " in said["message"]


def _nothing_said(folder: Path, *more: str) -> None:
    """No log and no file of a run holds a password; the password files do, so the search is seen to work."""
    found = {
        path.name
        for path in folder.rglob("*")
        if path.is_file() and any(password.encode() in path.read_bytes() for password in PASSWORDS.values())
    }
    assert found <= {f"{role}.password" for role in PASSWORDS}
    assert not [text for text in more if any(password in text for password in PASSWORDS.values())]
