"""Waiting, on the loop, for what tells nobody when it happens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until(what: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Look again and again until something holds. Raises TimeoutError when it does not within `timeout_s`."""
    async with asyncio.timeout(timeout_s):
        while not what():  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.002)
