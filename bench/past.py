"""Serves an engine's past out of its journal on a ROUTER socket, by wire.md; truthfully, or lying on request.

It shares no code with the sidecar. A program of its own (an engine that is gone may still have its journal served), or
beside a running engine: `bench/engine.py --replay ENDPOINT`. Frames are those which were meant to be published: also
what was withheld or sent as garbage. Of an engine that began anew only the newest run is served.

While the --faults FILE exists, its first line says what is wrong, one of FAULTS and its argument; it is read with every
request, so that a test may lie first and then heal.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgpack
import zmq

Message = dict[str, Any]

FAULTS = {
    "dead": "never answers",
    "slow": "S: answers after S seconds",
    "busy": "MS: busy, come again in MS ms",
    "gone": "SEQ: what lies below SEQ is gone",
    "error": "answers with an error",
    "stale": "before each answer one to an older request, with forged frames",
    "wrong-session": "says and sends another session than it has",
    "wrong-range": "sends frames that lie below what was asked for, or out of order",
    "too-many": "sends more frames than were asked for",
    "oversized": "answers with 1.5 MB",
    "huge": "answers with 8 MB",
    "garbage": "answers with bytes that are no msgpack",
    "garbage-frame": "one frame of each answer is garbage",
    "wrong-types": "answers with values of wrong types",
    "other-past": "each frame has other content than was published",
    "far-ahead": "claims to have frames up to 2^62",
}
FRAMES_MAX = 2_000
ANSWER_BYTES_MAX = 1_000_000
POLL_MS = 50


class Past:
    """What a journal holds, and the answers to what is asked about it."""

    def __init__(self, journal: Path, faults: Path | None) -> None:
        self._journal = journal
        self._faults = faults
        self._read_to = 0
        self._run = 1
        self._frames: dict[int, bytes] = {}
        self.session = 0
        self.first = 1
        self.next = 1
        self.answered = 0

    def fault(self) -> tuple[str, str]:
        """Give what is wrong just now, and its argument."""
        try:
            text = self._faults.read_text() if self._faults else ""
        except FileNotFoundError:
            text = ""
        kind, _, argument = text.strip().partition(" ")
        assert not kind or kind in FAULTS, f"{kind}: {', '.join(FAULTS)} are known"
        return kind, argument

    def look(self) -> None:
        """Read what the engine has written meanwhile."""
        if not self._journal.exists():
            return
        if self._journal.stat().st_size < self._read_to:  # an engine that began its journal anew
            self._read_to, self._run, self._frames, self.next = 0, 1, {}, 1
        with self._journal.open("rb") as lines:
            lines.seek(self._read_to)
            for line in lines:
                if not line.endswith(b"\n"):
                    return
                self._read_to += len(line)
                entry = json.loads(line)
                if entry.get("run", 1) > self._run:
                    self._run, self._frames = entry["run"], {}
                if entry.get("fault") != "contradict":
                    self._frames[entry["seq"]] = msgpack.packb(entry["event"])
                    self.session = entry["event"].get("session", 0)
        if self._frames:
            self.first, self.next = min(self._frames), max(self._frames) + 1

    def answers(self, request: Message) -> list[bytes]:
        """Give the messages that go out for one request: the answer, and whatever a fault puts in its place."""
        self.look()
        kind, argument = self.fault()
        if kind == "dead":
            return []
        if kind == "slow":
            time.sleep(float(argument))
        if kind == "garbage":
            return [b"\xc1 no msgpack " * 3]
        said: Any = request.get("id")
        if kind == "busy":
            return [msgpack.packb({"op": "busy", "id": said, "retry_after_ms": int(argument)})]
        if kind == "error":
            return [msgpack.packb({"op": "error", "id": said, "code": "BROKEN", "reason": "it was asked to be"})]
        if kind == "wrong-types":
            return [msgpack.packb({"op": request["op"], "id": said, "from": "1", "frames": [1, None], "session": -1})]
        answer = self._hello(request, kind) if request.get("op") == "hello" else self._replay(request, kind, argument)
        if kind in ("oversized", "huge"):
            answer = answer | {"op": "data", "frames": [b"x" * 1_000] * (1_500 if kind == "oversized" else 8_000)}
        if kind == "stale":
            stale: Message = answer | {"id": said - 1}
            if "frames" in stale:
                stale["frames"] = [_forged(frame) for frame in stale["frames"]]
            return [msgpack.packb(stale), msgpack.packb(answer)]
        return [msgpack.packb(answer)]

    def _hello(self, request: Message, kind: str) -> Message:
        return {
            "op": "hello",
            "id": request["id"],
            "stream": request["stream"],
            "session": 999 if kind == "wrong-session" else self.session,
            "first_available": self.first,
            "next_sequence": 1 << 62 if kind == "far-ahead" else self.next,
        }

    def _replay(self, request: Message, kind: str, argument: str) -> Message:
        first, limit = request["from"], request["limit"]
        kept_from = max(self.first, int(argument)) if kind == "gone" else self.first
        if kind != "wrong-session" and (request["session"] != self.session or first < kept_from):
            return {"op": "gone", "id": request["id"], "first_available": kept_from}
        if kind == "wrong-range":
            places = list(range(first - 5, first - 5 + limit)) if first > 5 else [first + 1, first]
        else:
            places = list(range(first, first + limit + (1 if kind == "too-many" else 0)))
        frames, size = [], 0
        for place in places[: FRAMES_MAX + 1]:
            frame = self._frames.get(place)
            if frame is not None and size < ANSWER_BYTES_MAX - 5_000:
                frames.append(frame)
                size += len(frame) + 5
        if kind == "wrong-session":
            frames = [msgpack.packb(msgpack.unpackb(frame) | {"session": 999}) for frame in frames]
        if kind == "other-past":
            frames = [_forged(frame) for frame in frames]
        if kind == "garbage-frame" and frames:
            frames[len(frames) // 2] = b"\xc1\xc1\xc1"
        data = {"op": "data", "id": request["id"], "from": first, "frames": frames}
        return data | {"next_sequence": 1 << 62 if kind == "far-ahead" else self.next}


def _forged(frame: bytes) -> bytes:
    """Give a frame as sound as the true one, that would move other amounts."""
    event = msgpack.unpackb(frame)
    key = "quantity" if "quantity" in event else "amount"
    forged: bytes = msgpack.packb(event | {key: event[key] + 1})
    return forged


def serve(past: Past, endpoint: str, stopped: threading.Event) -> None:
    """Answer until stopped; zmq.ZMQError when the endpoint can't be bound."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    try:
        socket.bind(endpoint)
        while not stopped.is_set():
            if not socket.poll(POLL_MS):
                continue
            *peer, message = socket.recv_multipart()
            for answer in past.answers(msgpack.unpackb(message)):
                socket.send_multipart([*peer, answer])
            past.answered += 1
    finally:
        socket.close()
        context.term()


def start(journal: Path, endpoint: str, faults: Path | None) -> None:
    """Serve on a thread that ends with the process."""
    past = Past(journal, faults)
    threading.Thread(target=serve, args=(past, endpoint, threading.Event()), daemon=True, name="past").start()


def main() -> int:
    """Serve a journal until SIGTERM."""
    known = "\n".join(f"  {name:14} {what}" for name, what in FAULTS.items())
    parser = argparse.ArgumentParser(
        prog="bench/past.py",
        description="Serves the past of an engine out of its journal, on a ZeroMQ ROUTER socket.",
        epilog=f"faults, one of them in the --faults FILE while it exists:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--journal", type=Path, required=True, metavar="FILE", help="what the engine published")
    parser.add_argument("--endpoint", default="tcp://127.0.0.1:5559", help="address to bind (default %(default)s)")
    parser.add_argument("--faults", type=Path, metavar="FILE", help="lie as FILE says, while it exists")
    given = parser.parse_args()
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    past = Past(given.journal, given.faults)
    try:
        serve(past, given.endpoint, stopped)
    except zmq.ZMQError as error:
        print(f"past: can't bind {given.endpoint}: {error}; choose another --endpoint", file=sys.stderr)
        return 1
    print(json.dumps({"answered": past.answered}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
