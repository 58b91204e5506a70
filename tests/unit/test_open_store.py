"""From the configuration to a store: which one, and what is said when it can't be made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sidecar.config import Config, ConfigError, load
from sidecar.errors import SidecarError
from sidecar.service import open_store
from tests.streams import RULES_TOML

CONFIG = (
    """
[store]
backend = "{backend}"
[store.cassandra]
keyspace = "elsewhere"
{more}
"""
    + RULES_TOML
    + "page_width = 77\n"
)


def config(folder: Path, backend: str, more: str = "") -> Config:
    file = folder / "sidecar.toml"
    file.write_text(CONFIG.format(backend=backend, more=more))
    return load(file, environ={})


def test_the_backend_decides(tmp_path: Path) -> None:
    assert open_store(config(tmp_path, "sqlite")).name == "sqlite"
    store = open_store(config(tmp_path, "cassandra", 'batch = "unlogged"'))
    assert store.name == "cassandra"
    assert store.page_of("btc_usdt", 154) == 2
    assert "elsewhere.settled_trades_btc_usdt" in store.schema(["btc_usdt"])


def test_a_missing_driver_is_told_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cassandra", None)
    monkeypatch.delitem(sys.modules, "sidecar.store.cassandra", raising=False)
    with pytest.raises(SidecarError, match=r"pip install 'sidecar\[cassandra\]'"):
        open_store(config(tmp_path, "cassandra"))


def test_secrets_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    more = f'username = "app"\npassword_file = "{tmp_path}/none"'
    with pytest.raises(ConfigError, match=r"store\.cassandra\.password_file"):
        open_store(config(tmp_path, "cassandra", more))
    ca = tmp_path / "ca.pem"
    ca.write_text("no certificate")
    with pytest.raises(ConfigError, match=r"tls_ca_file: .*ca\.pem: can't be used"):
        open_store(config(tmp_path, "cassandra", f'tls_ca_file = "{ca}"'))
