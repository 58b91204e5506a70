"""Versions that a bug report needs: of everything that decides what this process does."""

from __future__ import annotations

import platform
import sqlite3
from importlib import metadata
from typing import Final

from sidecar import __version__
from sidecar.cli import carried

_PACKAGES: Final = ("pyzmq", "msgpack", "msgspec", "uvloop", "rich")
_DRIVERS: Final = ("cassandra-driver", "scylla-driver")  # both bring the package `cassandra`: one is there, or none


def gathered() -> dict[str, str | None]:
    """Give each version by name; None for what isn't installed. `files`: where schema, units and dashboards lie."""
    versions: dict[str, str | None] = {"sidecar": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in _PACKAGES}
    versions["libzmq"] = _libzmq()
    versions["sqlite"] = sqlite3.sqlite_version
    drivers = {name: _version(name) for name in _DRIVERS}
    versions |= {name: version for name, version in drivers.items() if version is not None}
    if not any(drivers.values()):
        versions["cassandra-driver"] = None
    return versions | {"platform": platform.platform(), "files": str(carried.root())}


def text(versions: dict[str, str | None]) -> str:
    """Write them for people: what `sidecar --version` is asked for first, the others in columns below."""
    rest = {name: version or "not installed" for name, version in versions.items() if name != "sidecar"}
    width = max(map(len, rest)) + 2
    return "\n".join([f"sidecar {versions['sidecar']}", *(f"  {name:<{width}}{said}" for name, said in rest.items())])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _libzmq() -> str | None:
    try:
        import zmq
    except ImportError:  # a bug report about a broken installation needs the other versions all the same
        return None
    return zmq.zmq_version() + ("" if zmq.has("curve") else " without CURVE")
