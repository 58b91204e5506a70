"""The verbs that run: run, record, settle, demo; and those about the configuration they run with."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvloop

from sidecar import config as configuration
from sidecar.cli import logs
from sidecar.config import Config
from sidecar.decisions import Agreed
from sidecar.tape import read_settled

log = logging.getLogger(__name__)


def add_verbs(verb: Any) -> None:
    """Add this room's verbs to the command line."""
    verb("run", run, "record and settle in one process, until SIGTERM", _RUN)
    verb("record", record, "only record: the socket to the tape", _RUN)
    verb("settle", settle, "only settle: the tape to the store", _RUN)
    added = verb("keygen", keygen, "make a pair of CURVE keys, in two new files that only you may read", _KEYGEN)
    added.add_argument("name", nargs="?", default="sidecar", metavar="NAME", help="NAME.key, NAME.key_secret (sidecar)")
    verb("check-config", check_config, "say what is wrong with the configuration; exit 78 when something is")
    added = verb("print-config", print_config, "show the configuration in force, without secrets")
    added.add_argument("--sample", action="store_true", help="show a commented sample to begin with")
    added = verb("demo", demo, "settle a real engine's recorded session in front of you, and judge the result", _DEMO)
    added.add_argument("--trades", choices=("session", "binance"), default="session", help="what the engine publishes")
    added.add_argument("--store", choices=("sqlite", "cassandra"), default="sqlite", help="where it is settled")
    added.add_argument("--rate", type=float, default=3_000.0, metavar="R", help="events a second (0: flat out)")
    added.add_argument("--keep", metavar="DIR", help="keep the demo's files in DIR, which must be empty or new")


_RUN = """\
recording never waits for the database, and goes on while settlement is halted: see `sidecar status`.
SIGTERM: nothing more is taken, what is under way is finished under pipeline.shutdown_timeout_s, exit 0.
"""
_KEYGEN = """\
NAME.key         the public key, for the other end: its file is what curve_server_key_file names there, or a replay
                 server's curve_client_key_files
NAME.key_secret  both keys, for their owner: curve_key_file; an engine in Python or C reads the same files
nothing is overwritten. one pair for the engine, one for the sidecar: `sidecar keygen engine`, `sidecar keygen sidecar`
"""
_DEMO = """\
an engine process publishes, `sidecar run` settles into a fresh store, and a judge that shares no code with sidecar
compares every row and balance. exit 0 only when all agree.
"""


def load(given: argparse.Namespace) -> Config:
    """Read the configuration that a verb was given."""
    return configuration.load(given.config, given.set)


def load_here(given: argparse.Namespace) -> Config:
    """Read the configuration for a verb that asks about the stream: the one that settlement has gone on to here."""
    config = load(given)
    said = read_settled(config.tape.path) or {}
    if said.get("configured") != config.stream.name or said["stream"] == config.stream.name:
        return config
    stream = replace(config.stream, name=said["stream"], first_sequence=said["first_sequence"])
    return replace(config, stream=stream)


def session_here(config: Config, agreed: Agreed | None) -> int:
    """Give the stream's session on this host's tape: as its settler found it, else as the stream's genesis says."""
    said = read_settled(config.tape.path) or {}
    found = said.get("session") if said.get("stream") == config.stream.name else 0
    return found or (agreed.session if agreed else 1)


def _serve(given: argparse.Namespace, **halves: bool) -> int:
    from sidecar import service

    config = load(given)
    logs.to_stderr()
    for warning in config.warnings:
        log.warning("configuration", extra={"warning": warning})
    uvloop.run(service.serve(config, **halves))
    return 0


def run(given: argparse.Namespace) -> int:
    """Both halves."""
    return _serve(given, record=True, settle=True)


def record(given: argparse.Namespace) -> int:
    """The recording half."""
    return _serve(given, record=True, settle=False)


def settle(given: argparse.Namespace) -> int:
    """The settling half."""
    return _serve(given, record=False, settle=True)


def keygen(given: argparse.Namespace) -> int:
    """Make a pair of keys; only the public one is shown."""
    from sidecar import trust

    public_file, secret_file = Path(f"{given.name}.key"), Path(f"{given.name}.key_secret")
    public = trust.write_keys(public_file, secret_file)
    said = {"public_key": public, "public_key_file": str(public_file), "secret_key_file": str(secret_file)}
    text = f"public key: {public}\n{public_file}: for the other end\n{secret_file}: secret, for its owner alone"
    print(json.dumps(said) if given.json else text)
    return 0


def check_config(given: argparse.Namespace) -> int:
    """Read the configuration; its mistakes are raised."""
    config = load(given)
    if given.json:
        print(json.dumps({"ok": True, "warnings": list(config.warnings)}))
        return 0
    for warning in config.warnings:
        print(f"warning: {warning}")
    print(f"configuration is fine: stream {config.stream.name}, store {config.store.backend}")
    return 0


def print_config(given: argparse.Namespace) -> int:
    """Show the configuration."""
    if given.sample:
        sys.stdout.write(configuration.example())
        return 0
    config = load(given)
    if given.json:
        print(json.dumps(configuration.as_dict(config)))
    else:
        sys.stdout.write(configuration.as_toml(config))
    return 0


def demo(given: argparse.Namespace) -> int:
    """Play the demo."""
    from sidecar.cli import demo as playing

    return playing.play(trades=given.trades, store=given.store, rate=given.rate, keep=given.keep, as_json=given.json)
