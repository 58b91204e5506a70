"""Tells systemd how it stands: ready, stopping, a line of status, and that the loop still turns (sd_notify(3)).

The protocol is a datagram of lines to the socket that NOTIFY_SOCKET names; without it nothing is done. The watchdog is
fed by a task of the loop that settles and records: when the loop is frozen no line comes, and systemd starts the next
process. A halted, waiting or paused sidecar has a loop that turns, and is left alone. No line is worth a failure:
what can't be sent is dropped, and logged the first time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping
from typing import Any, Final

log = logging.getLogger(__name__)

FEEDS_A_DEADLINE: Final = 4  # so many feeds to each deadline: three may come late


class Notifier:
    """The way to the service manager that started this process, if one did."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        """Take where to tell, and the watchdog's deadline, from the environment that the manager made."""
        self.address = environ.get("NOTIFY_SOCKET", "")
        self.deadline_s = 0.0
        if environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            self.deadline_s = int(environ.get("WATCHDOG_USEC") or 0) / 1e6
        self._failed = False
        self._status = ""

    @property
    def is_wanted(self) -> bool:
        """Say whether anybody listens."""
        return bool(self.address)

    def tell(self, **fields: str | int) -> None:
        """Send fields (READY=1, STATUS=…), or drop them when nobody takes them."""
        if not self.address:
            return
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        lines = "".join(f"{name}={str(value).replace(chr(10), ' ')}\n" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as way:
                way.sendto(lines.encode(), address)
        except OSError as error:
            if not self._failed:
                log.warning("notify_failed", extra={"address": self.address, "error": str(error)})
            self._failed = True

    def look(self, standing: dict[str, Any]) -> None:
        """Tell how it stands, as one line, when that has changed; the first look says that the process is ready."""
        line = status_line(standing)
        if line != self._status:
            ready = {} if self._status else {"READY": 1}
            self.tell(**ready, STATUS=line)
            self._status = line

    async def feed_watchdog(self) -> None:
        """Tell again and again that the loop turns, until cancelled; nothing to do without a deadline."""
        while self.deadline_s:
            self.tell(WATCHDOG=1)
            await asyncio.sleep(self.deadline_s / FEEDS_A_DEADLINE)


def status_line(standing: dict[str, Any]) -> str:
    """Say in one line what an operator asks first."""
    positions = ", ".join(f"{name} {standing.get(name, 0)}" for name in ("taped", "acked", "durable"))
    line = f"{standing.get('state', 'starting')}: {positions}, {standing.get('lag_events', 0)} behind"
    if standing.get("holes"):
        line += f", {len(standing['holes'])} hole(s)"
    if away := standing.get("nodes_away"):
        line += f", database nodes away: {', '.join(away)}"
    if halted := standing.get("halted"):
        line += f"; HALTED {halted['code']} at {halted['sequence']}; next step: {halted['next_step']}"
    return line
