"""Between the engine and the sidecar: passes every message on, or what a test makes of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Self

import zmq

Frames = list[bytes]


class Relay:
    """Subscribes at `upstream` for whoever subscribes at `endpoint`; `change` gives what is sent for a message.

    `change` runs in the relay's thread; what it raises is raised again at the end.
    """

    def __init__(self, *, upstream: str, endpoint: str, change: Callable[[Frames], list[Frames]]) -> None:
        self._change = change
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
        self._engine = self._context.socket(zmq.XSUB)
        self._engine.setsockopt(zmq.RCVHWM, 0)
        self._engine.connect(upstream)
        self._sidecar = self._context.socket(zmq.XPUB)
        self._sidecar.setsockopt(zmq.SNDHWM, 0)
        self._sidecar.setsockopt(zmq.LINGER, 1_000)
        self._sidecar.bind(endpoint)
        self._ending = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        self._engine.close(linger=0)
        self._sidecar.close()
        self._context.term()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._engine, zmq.POLLIN)
        poller.register(self._sidecar, zmq.POLLIN)
        try:
            while not self._ending.is_set():
                ready = dict(poller.poll(50))
                if self._sidecar in ready:  # a subscription
                    self._engine.send(self._sidecar.recv())
                if self._engine in ready:
                    for frames in self._change(self._engine.recv_multipart()):
                        self._sidecar.send_multipart(frames)
        except BaseException as error:  # noqa: BLE001 - a test must not wait for a relay that is dead
            self._error = error
