"""`sidecar doctor`: looks at everything around a sidecar, and says for each thing that is not well what to do next.

It changes nothing: its subscription is one more beside the recorder's, and a store that is not there yet is not made.
What it can't judge it says as a note; exit 1 only for what is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import resource
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final, NamedTuple

import zmq

from sidecar import config as configuration
from sidecar.config import Config, host_and_port, secret_path
from sidecar.errors import MalformedFrameError, OutcomeUnknownError, SidecarError, StoreRefusedError, TapeError
from sidecar.events import Trade
from sidecar.service import engine_keys, open_store, secret_files
from sidecar.tape import TapeReader, is_locked
from sidecar.wire import decode

FINE, NOTE, WRONG = "fine", "note", "wrong"

FRAMES_HEARD_MAX: Final = 200
FRAMES_READ_MAX: Final = 2_000
CONNECT_TIMEOUT_S: Final = 3.0
STORE_TIMEOUT_S: Final = 15.0
DISK_FREE_LEAST_BYTES: Final = 1 << 30
SYNC_SLOW_MS: Final = 20.0
OPEN_FILES_LEAST: Final = 1_024
FRAME_MEMORY_BYTES: Final = 1_000  # what a waiting frame takes in libzmq, payload included, roughly
PAGE_ROWS_MAX: Final = 100_000
IDS_LEAST: Final = 100  # fewer say nothing about how they lie
CLOCK_AHEAD_S: Final = 60.0
TIME_ERROR: Final = 5  # adjtimex(2): the clock is not synchronised
NETWORK_FILE_SYSTEMS: Final = ("nfs", "cifs", "smb", "9p", "fuse", "ceph", "gluster", "afs")


class Finding(NamedTuple):
    """One thing that was looked at; `next_step` is empty where all is well."""

    check: str
    verdict: str
    found: str
    next_step: str = ""


class Heard(NamedTuple):
    """What was heard in a few seconds: payloads of our topic, topics that were not ours."""

    payloads: list[bytes]
    other_topics: set[str]


def examine(config: Config, config_path: Path, listen_s: float) -> Iterator[Finding]:
    """Look at one thing after the other."""
    yield from _configuration(config, config_path)
    yield (endpoint := _endpoint(config))
    heard = _listen(config, listen_s) if endpoint.verdict != WRONG else Heard([], set())
    recorded = _recorded(config)
    if endpoint.verdict != WRONG:
        yield _frames(config, heard, recorded, listen_s)
    yield _store(config)
    events = [*recorded, *((0, payload) for payload in heard.payloads)]
    yield _clock([at_us for at_us, _ in recorded], [payload for _, payload in events])
    yield from _disk(config)
    yield _limits(config)
    yield from _high_water_marks(config)
    yield from _permissions(config)
    yield from _pages(config, [payload for _, payload in events])


# --- the configuration ------------------------------------------------------------------------------------------------


def _configuration(config: Config, path: Path) -> Iterator[Finding]:
    for warning in config.warnings:
        yield Finding("configuration", NOTE, warning, "`sidecar check-config` says it, too")
    if path.stat().st_mode & stat.S_IWOTH:
        yield Finding("configuration", WRONG, f"{path} may be written by everybody", f"chmod o-w {path}")
    elif not config.warnings:
        yield Finding("configuration", FINE, f"{path}: stream {config.stream.name}, store {config.store.backend}")


# --- the engine -------------------------------------------------------------------------------------------------------


def _endpoint(config: Config) -> Finding:
    endpoint, start = config.engine.endpoint, "start the engine, or mend engine.endpoint"
    scheme, _, rest = endpoint.partition("://")
    try:
        if scheme == "ipc":
            address: Any = "\0" + rest[1:] if rest.startswith("@") else rest
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as way:
                way.settimeout(CONNECT_TIMEOUT_S)
                way.connect(address)
        else:
            socket.create_connection(host_and_port(rest), CONNECT_TIMEOUT_S).close()
    except PermissionError:
        step = f"let this user's group write to it (chmod g+w {rest}), and its folders be entered"
        return Finding("endpoint", WRONG, f"{endpoint}: the socket may not be written to by this user", step)
    except OSError as error:
        return Finding("endpoint", WRONG, f"{endpoint} is not reachable: {error}", start)
    return Finding("endpoint", FINE, f"{endpoint} is reachable")


def _listen(config: Config, listen_s: float) -> Heard:
    """Subscribe to everything for a few seconds; one subscription more is no burden to a publisher."""
    payloads: list[bytes] = []
    others: set[str] = set()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    ear = context.socket(zmq.SUB)
    try:
        ear.setsockopt(zmq.LINGER, 0)
        ear.setsockopt(zmq.SUBSCRIBE, b"")
        engine_keys(config)(ear)
        ear.connect(config.engine.endpoint)
        deadline = time.monotonic() + listen_s
        while len(payloads) < FRAMES_HEARD_MAX and (left_s := deadline - time.monotonic()) > 0:
            if ear.poll(int(left_s * 1_000) + 1):
                frames = ear.recv_multipart()
                if frames[0] == config.engine.topic.encode() and len(frames) == 2:
                    payloads.append(frames[1])
                elif len(others) < 10:
                    others.add(frames[0].decode(errors="replace")[:40])
    finally:
        ear.close()
        context.term()
    return Heard(payloads, others)


def _recorded(config: Config) -> list[tuple[int, bytes]]:
    """Read the newest frames of the tape: when recorded, payload; none when there is no tape."""
    try:
        with closing(TapeReader(config.tape.path)) as reader:
            sessions = reader.sessions()
            if not sessions:
                return []
            session = sessions[-1].session
            head = reader.runs(session).head
            rows = reader.frames(session, max(head - FRAMES_READ_MAX + 1, 0), head, FRAMES_READ_MAX)
    except TapeError:
        return []
    return [(at_us, payload) for _, at_us, payload in rows]


def _frames(config: Config, heard: Heard, recorded: list[tuple[int, bytes]], listen_s: float) -> Finding:
    topic = config.engine.topic
    malformed = 0
    for payload in heard.payloads:
        try:
            decode(payload)
        except MalformedFrameError:
            malformed += 1
    if malformed:
        step = "`sidecar tape dump --malformed` shows such frames; another publisher on the topic, or a wrong engine?"
        return Finding("frames", WRONG, f"{malformed} of {len(heard.payloads)} frames are malformed", step)
    if heard.payloads:
        return Finding("frames", FINE, f"{len(heard.payloads)} frames heard on topic {topic!r}")
    if heard.other_topics:
        topics = ", ".join(repr(name) for name in sorted(heard.other_topics))
        step = "name the engine's topic as engine.topic; is every frame two parts, topic and payload?"
        return Finding("frames", WRONG, f"nothing on topic {topic!r}, but on {topics}", step)
    step = "is the engine trading? `sidecar doctor --listen-s 60` listens for longer"
    if recorded:
        ago_s = time.time() - recorded[-1][0] / 1e6
        return Finding(
            "frames", NOTE, f"nothing heard in {listen_s:g} s; the newest on the tape is {ago_s:,.0f} s old", step
        )
    return Finding("frames", NOTE, f"nothing heard in {listen_s:g} s, and nothing is on the tape", step)


# --- the store --------------------------------------------------------------------------------------------------------


def _store(config: Config) -> Finding:
    if config.store.backend == "sqlite" and not config.store.sqlite.path.exists():
        return Finding("schema", FINE, f"{config.store.sqlite.path} is made by the first start")

    async def ask() -> None:
        async with asyncio.timeout(STORE_TIMEOUT_S), open_store(config) as store:
            await store.ready_for(config.symbols)
            await store.read_decisions(config.stream.name)

    try:
        asyncio.run(ask())
    except StoreRefusedError as refused:
        return Finding("schema", WRONG, str(refused), "`sidecar schema apply`, by a role that may; see the message")
    except (OutcomeUnknownError, TimeoutError) as unknown:
        said = str(unknown) or f"no answer in {STORE_TIMEOUT_S:g} s"
        step = "is the database up, and are [store.cassandra]'s contact_points, port and local_dc right?"
        return Finding("schema", WRONG, f"the store is not reachable: {said}", step)
    except SidecarError as error:
        return Finding("schema", WRONG, str(error), "mend what it names")
    return Finding("schema", FINE, f"{config.store.backend}: the tables are there, and as they should be")


# --- the host ---------------------------------------------------------------------------------------------------------


def _clock(recorded_at_us: list[int], payloads: list[bytes]) -> Finding:
    now_us = time.time_ns() // 1000
    newest_us = max(recorded_at_us, default=0)
    if newest_us > now_us + 1_000_000:
        behind_s = (newest_us - now_us) / 1e6
        step = "set the clock right: `timedatectl`, chrony"
        return Finding("clock", WRONG, f"the clock is {behind_s:,.0f} s behind the newest frame on the tape", step)
    stamps = [event.ts_us for event in _trades(payloads) if event.ts_us is not None]
    ahead_s = (max(stamps, default=0) - now_us) / 1e6
    if ahead_s > CLOCK_AHEAD_S:
        step = "one of the two is wrong; more than a day halts settlement (ENGINE_TIME_AHEAD)"
        return Finding("clock", WRONG, f"the engine's stamps are {ahead_s:,.0f} s ahead of this clock", step)
    if ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)) == TIME_ERROR:  # modes 0: only asked
        step = "let chrony or systemd-timesyncd keep it (in a container: look on the host)"
        return Finding("clock", NOTE, "the kernel says that nobody keeps the clock right", step)
    return Finding("clock", FINE, "the clock is kept right, and agrees with the frames")


def _disk(config: Config) -> Iterator[Finding]:
    folder = _existing(config.tape.path.parent)
    kind = _file_system(folder)
    if kind in {"tmpfs", "ramfs"}:
        step = "put tape.path on a disk"
        yield Finding("disk", WRONG, f"{folder} is in memory ({kind}): the tape is gone with the power", step)
    elif kind.startswith(NETWORK_FILE_SYSTEMS):
        step = "put tape.path on a local disk: SQLite's log does not work over a network"
        yield Finding("disk", WRONG, f"{folder} is on a file system of {kind}", step)
    room = os.statvfs(folder)
    free_bytes = room.f_bavail * room.f_frsize
    used_bytes = config.tape.path.stat().st_size if config.tape.path.exists() else 0
    wanted_bytes = max(config.tape.size_bytes_max - used_bytes, 0)
    found = f"{_gib(free_bytes)} free in {folder}"
    if free_bytes < DISK_FREE_LEAST_BYTES:
        yield Finding("disk", WRONG, found, "make room, or move the tape: a full disk stops recording")
    elif free_bytes < wanted_bytes:
        step = f"the tape may grow by {_gib(wanted_bytes)}: make room, or lower tape.size_bytes_max"
        yield Finding("disk", NOTE, found, step)
    else:
        yield Finding("disk", FINE, f"{found} ({kind}), the tape may grow by {_gib(wanted_bytes)}")
    if (sync_ms := _sync_ms(folder)) is not None:
        slow = sync_ms > SYNC_SLOW_MS
        step = "every event waits for it: a disk with a cache that survives power loss is faster" if slow else ""
        yield Finding("disk", NOTE if slow else FINE, f"what is written is safe after {sync_ms:.1f} ms", step)


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _file_system(folder: Path) -> str:
    """Name the kind of file system that a folder is on, as /proc/self/mountinfo does."""
    real, best, kind = str(folder.resolve()), "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, tail = line.partition(" - ")
        mount = fields.split()[4].encode().decode("unicode_escape")
        if (real == mount or real.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best):
            best, kind = mount, tail.split()[0]
    return kind


def _sync_ms(folder: Path) -> float | None:
    """Measure how long it takes until 4 KiB are on disk: the median of a few; None where nothing may be written."""
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600)  # has no name, and is gone at once
    except OSError:
        return None
    times = []
    try:
        for _ in range(9):
            os.write(descriptor, bytes(4_096))
            began = time.perf_counter()
            os.fsync(descriptor)
            times.append((time.perf_counter() - began) * 1_000)
    finally:
        os.close(descriptor)
    return sorted(times)[len(times) // 2]


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):,.1f} GiB"


def _limits(config: Config) -> Finding:
    """Look at the limits of the process that records, when one runs: the shell's are others."""
    pid = _holder(config)
    whose = f"process {pid}" if pid else "this shell (no sidecar runs)"
    limits = {name: resource.prlimit(pid or 0, number)[0] for name, number in _LIMITS.items()}
    step = "with systemd: LimitNOFILE=, LimitFSIZE=, LimitAS= of the unit; in a shell: ulimit"
    wrong = []
    if 0 <= limits["open files"] < OPEN_FILES_LEAST:
        wrong.append(f"open files {limits['open files']}, {OPEN_FILES_LEAST} are needed")
    if 0 <= limits["file size"] < config.tape.size_bytes_max:
        wrong.append(f"file size {limits['file size']} bytes, less than tape.size_bytes_max")
    if 0 <= limits["address space"] < 1 << 31:
        wrong.append(f"address space {limits['address space']} bytes, 2 GiB are needed")
    if wrong:
        return Finding("limits", WRONG, f"{whose}: {'; '.join(wrong)}", step)
    return Finding("limits", FINE, f"{whose}: {limits['open files']} open files, no bound to sizes that matters")


_LIMITS: Final = {
    "open files": resource.RLIMIT_NOFILE,
    "file size": resource.RLIMIT_FSIZE,
    "address space": resource.RLIMIT_AS,
}


def _holder(config: Config) -> int:
    """Give the process that records on (else settles from) the tape, 0 when none does or it is another user's."""
    for role in ("recorder", "settler"):
        if is_locked(config.tape.path, role):
            try:
                pid = int(config.tape.path.with_name(f"{config.tape.path.name}.{role}").read_text())
                resource.prlimit(pid, resource.RLIMIT_NOFILE)
            except (OSError, ValueError):
                continue
            return pid
    return 0


def _high_water_marks(config: Config) -> Iterator[Finding]:
    engine, fine = config.engine, True
    try:
        granted = int(Path("/proc/sys/net/core/rmem_max").read_text())
    except OSError:  # a container may hide it
        granted = engine.receive_buffer_bytes
    if engine.endpoint.startswith("tcp:") and granted < engine.receive_buffer_bytes:
        fine = False
        step = f"sysctl -w net.core.rmem_max={engine.receive_buffer_bytes} (and in /etc/sysctl.d), then restart"
        found = f"engine.receive_buffer_bytes = {engine.receive_buffer_bytes}, but the kernel grants {granted}"
        yield Finding("high-water marks", NOTE, found, step)
    may_take = engine.receive_hwm_frames * FRAME_MEMORY_BYTES
    available = _available_bytes()
    if may_take > available:
        fine = False
        step = "lower engine.receive_hwm_frames, or give the host more memory"
        found = f"engine.receive_hwm_frames = {engine.receive_hwm_frames} may take {_gib(may_take)}"
        yield Finding("high-water marks", WRONG, f"{found}; {_gib(available)} are available", step)
    if fine:
        found = f"{engine.receive_hwm_frames:,} frames may wait here; the engine's own mark (SNDHWM) can't be seen"
        yield Finding("high-water marks", FINE, found)


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1_024
    return sys.maxsize


def _permissions(config: Config) -> Iterator[Finding]:
    fine = True
    paths = [("tape.path", config.tape.path)]
    if config.store.backend == "sqlite":
        paths.append(("store.sqlite.path", config.store.sqlite.path))
    for key, path in paths:
        folder = _existing(path.parent)
        if not os.access(folder, os.W_OK | os.X_OK):
            fine = False
            step = f"chown the folder to the user that sidecar runs as, or choose another for {key}"
            yield Finding("permissions", WRONG, f"{folder} may not be written to by this user", step)
        if not path.exists():
            continue
        owner = path.stat().st_uid
        strangers = [one.name for one in sorted(path.parent.glob(f"{path.name}[.-]*")) if one.stat().st_uid != owner]
        strangers = [
            name for name in strangers if not name.endswith(".paused")
        ]  # root may pause; it is only looked for
        if strangers:
            fine = False
            step = f"was sidecar started by another user? chown {owner} in {path.parent}, then restart it"
            found = f"{', '.join(strangers)}: not of the owner of {path.name} (uid {owner})"
            yield Finding("permissions", WRONG, found, step)
    for key, secret in secret_files(config).items():
        place = secret_path(secret)
        if not place.exists():
            fine = False
            yield Finding("permissions", WRONG, f"{key}: {secret} is not there", "put the secret into it, mode 600")
        elif place.stat().st_mode & (stat.S_IRWXO | stat.S_IWGRP):
            fine = False
            mode = f"{place.stat().st_mode & 0o777:o}"
            yield Finding("permissions", WRONG, f"{key}: {place} is open to others (mode {mode})", f"chmod 600 {place}")
    if fine:
        yield Finding("permissions", FINE, "folders, files and secrets belong to whom they should")


# --- trade ids and pages ----------------------------------------------------------------------------------------------


def _trades(payloads: list[bytes]) -> list[Trade]:
    trades = []
    for payload in payloads:
        try:
            event = decode(payload)
        except MalformedFrameError:
            continue
        if isinstance(event, Trade):
            trades.append(event)
    return trades


def _pages(config: Config, payloads: list[bytes]) -> Iterator[Finding]:
    """Compare each symbol's page_width with how its trade ids lie."""
    trades = _trades(payloads)
    judged = False
    for name, symbol in config.symbols.items():
        pair = (config.assets[symbol.base].id, config.assets[symbol.quote].id)
        ids = sorted({trade.trade_id for trade in trades if (trade.base_asset, trade.quote_asset) == pair})
        if len(ids) >= IDS_LEAST:
            judged = True
            yield _page_width(name, symbol.page_width, symbol.trade_id_time, ids, time.time())
    if not judged:
        found = f"fewer than {IDS_LEAST} trades of a symbol were seen: nothing can be said of page_width"
        yield Finding("page width", NOTE, found, "run `sidecar doctor` again while trades are recorded")


def _page_width(name: str, width: int, id_time: str, ids: list[int], now_s: float) -> Finding:
    """Judge one symbol's page width by ids that were seen, sorted and different."""
    final = "it can't be changed once trades of the symbol are settled"
    year_ms = 366 * 86_400_000
    if id_time == "none" and abs((ids[-1] >> 16) - now_s * 1_000) < 10 * year_ms and ids[-1] >> 16 > year_ms:
        step = f'trade_id_time = "ms16" and page_width = {configuration.MS16_PAGE_WIDTH} belong to such ids; {final}'
        return Finding("page width", WRONG, f"symbols.{name}: ids look like milliseconds << 16", step)
    pages = len({one // width for one in ids})
    rows_a_page = width * len(ids) / (ids[-1] - ids[0] + 1)
    rows_a_page = min(rows_a_page, width)
    seen = f"symbols.{name}: page_width = {width}, {len(ids)} trades seen in {pages} pages"
    if rows_a_page > PAGE_ROWS_MAX:
        step = f"a partition should hold no more than {PAGE_ROWS_MAX:,}; choose a smaller page_width: {final}"
        return Finding("page width", WRONG, f"{seen}: about {rows_a_page:,.0f} rows to a partition", step)
    if pages > len(ids) // 2:
        step = f"nearly every trade has a partition of its own; choose a larger page_width: {final}"
        return Finding("page width", NOTE, seen, step)
    return Finding("page width", FINE, f"{seen}, about {max(rows_a_page, 1):,.0f} rows to a partition")


# --- the verb ---------------------------------------------------------------------------------------------------------

_SIGNS: Final = {FINE: "ok   ", NOTE: "note ", WRONG: "WRONG"}


def doctor(given: argparse.Namespace, load: Callable[[argparse.Namespace], Config]) -> int:
    """Examine, and say so; exit 1 when something is wrong."""
    config = load(given)
    findings = []
    for finding in examine(config, configuration.find(given.config), given.listen_s):
        findings.append(finding)
        if not given.json:
            print(f"{_SIGNS[finding.verdict]}  {finding.check}: {finding.found}", flush=True)
            if finding.next_step:
                print(f"       next step: {finding.next_step}")
    wrong = sum(finding.verdict == WRONG for finding in findings)
    if given.json:
        print(json.dumps({"ok": not wrong, "findings": [finding._asdict() for finding in findings]}))
    else:
        print(f"\n{wrong} wrong" if wrong else "\nnothing is wrong")
    return 1 if wrong else 0
