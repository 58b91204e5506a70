"""Files that travel with the package: schema, demo, units, dashboards. In a checkout they lie at its root."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_PACKAGE: Final = Path(__file__).resolve().parents[1]


def root() -> Path:
    """Give the folder in which they lie as in the repository: `share` of an installed package, else the checkout."""
    share = _PACKAGE / "share"
    return share if share.is_dir() else _PACKAGE.parent
