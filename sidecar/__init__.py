"""Settles the trades of a matching engine: records what it publishes and writes it exactly once.

For programs and tests: `config = sidecar.load(path)`, `async with sidecar.open_store(config) as store`, and
`async with sidecar.Settlement(config) as settlement: await settlement.settle_trade_atomically(trade)`.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sidecar.config import load
    from sidecar.service import Settlement, open_store

__all__ = ["Settlement", "__version__", "load", "open_store"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: a pure room stays importable without sockets and drivers."""
    if name == "load":
        from sidecar.config import load

        return load
    if name in ("Settlement", "open_store"):
        from sidecar import service

        return getattr(service, name)
    raise AttributeError(f"module 'sidecar' has no attribute {name!r}")
