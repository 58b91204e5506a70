"""From the configuration to running parts: the one place that knows which part gets which key.

`serve` is a process's life: both halves, or one of them, under one task group, so that the death of any part ends
the process (systemd starts the next). SIGTERM and SIGINT stop the halves in the order of the data: nothing more is
taken from the socket, what was taken is put on the tape, what is under way to the store is waited for under a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import logging
import signal
import ssl
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, Final, Self

from sidecar import decisions, trust, wire
from sidecar.config import CassandraSection, Config, ConfigError, ReplayServerSection, read_secret, secret_path
from sidecar.errors import OutcomeUnknownError, SequenceGapError, SidecarError, UntrustedError
from sidecar.events import Refused, Trade
from sidecar.late import LOOK_EVERY_S, LateReading, readings
from sidecar.ledger import before
from sidecar.life import Bounds, Life, until_known
from sidecar.notify import Notifier
from sidecar.proof.hourly import Hourly, Numbers
from sidecar.record import Recorder
from sidecar.refill import Refill
from sidecar.replay_server import ReplayServer
from sidecar.settle import Settler
from sidecar.store.base import Store
from sidecar.store.sqlite import SQLiteStore
from sidecar.tape import Tail, Tape, lock
from sidecar.watch import Watch

log = logging.getLogger(__name__)

TOKEN_LENGTH_LEAST: Final = 16
STOP_MARGIN_S: Final = 10.0  # beyond shutdown_timeout_s: for the last commit, and to close what is open


def open_store(config: Config) -> Store:
    """Give the configured store, still to be opened: `async with` it, or `await` it and close it."""
    page_widths = {name: symbol.page_width for name, symbol in config.symbols.items()}
    if config.store.backend == "sqlite":
        return SQLiteStore(config.store.sqlite.path, page_widths)
    if config.store.backend == "cassandra":
        return _cassandra_store(config.store.cassandra, page_widths)
    raise SidecarError(f"store.backend = {config.store.backend!r}; sqlite and cassandra are allowed")


def _cassandra_store(section: CassandraSection, page_widths: dict[str, int]) -> Store:
    try:
        from sidecar.store.cassandra import CassandraStore
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] != "cassandra":
            raise
        step = "pip install 'sidecar[cassandra]'"
        raise SidecarError(
            f'store.backend = "cassandra" needs cassandra-driver, which is not installed: {step}'
        ) from None
    password = None
    if section.password_file is not None:
        password = read_secret(section.password_file, "store.cassandra.password_file")
    return CassandraStore(
        page_widths=page_widths,
        contact_points=section.contact_points,
        port=section.port,
        local_dc=section.local_dc,
        keyspace=section.keyspace,
        replication_factor=section.replication_factor,
        batch=section.batch,
        request_timeout_s=section.request_timeout_s,
        username=section.username,
        password=password,
        tls=_tls(section),
    )


def _tls(section: CassandraSection) -> ssl.SSLContext | None:
    """Make what checks the nodes' certificates (authority, and address or name), and shows ours; None without a CA."""
    if section.tls_ca_file is None:
        return None
    try:
        context = ssl.create_default_context(cafile=str(section.tls_ca_file))
        if section.tls_cert_file is not None:
            context.load_cert_chain(section.tls_cert_file, section.tls_key_file and secret_path(section.tls_key_file))
    except (OSError, ssl.SSLError) as error:
        files = (section.tls_ca_file, section.tls_cert_file, section.tls_key_file)
        named = ", ".join(str(file) for file in files if file is not None)
        raise ConfigError("store.cassandra.tls_ca_file", [f"{named}: can't be used: {error}"]) from error
    return context


def proof_path(config: Config) -> Path:
    """Give the file where a proof of the ledger keeps what it has verified."""
    return config.reconcile.path or config.tape.path.with_name(f"{config.tape.path.name}.reconcile")


def bounds_of(config: Config) -> Bounds:
    """Give the bounds of the settling half."""
    keys = Bounds.__dataclass_fields__
    return Bounds(**{key: getattr(config.pipeline, key) for key in keys})


def open_tape(config: Config) -> Tape:
    """Open the recorder's side of the configured tape."""
    return Tape(
        config.tape.path,
        size_bytes_max=config.tape.size_bytes_max,
        malformed_kept_max=config.tape.malformed_kept_max,
        tail_events_max=config.tape.memory_events_max,
    )


def make_recorder(config: Config, tape: Tape) -> Recorder:
    """Make the recording half over an open tape."""
    refill = None
    if config.replay is not None:
        refill = Refill(
            tape=tape,
            stream=config.stream.name,
            first_sequence=config.stream.first_sequence,
            endpoint=config.replay.endpoint,
            timeout_s=config.replay.timeout_s,
            retry_backoff_max_s=config.replay.retry_backoff_max_s,
            frame_bytes_max=config.engine.frame_bytes_max,
            secure=_as_client(config, config.replay.curve_server_key_file),
        )
    return Recorder(
        tape=tape,
        endpoint=config.engine.endpoint,
        topic=config.engine.topic,
        turn_frames_max=config.tape.turn_frames_max,
        turn_min_s=config.tape.turn_min_s,
        receive_hwm_frames=config.engine.receive_hwm_frames,
        receive_buffer_bytes=config.engine.receive_buffer_bytes,
        frame_bytes_max=config.engine.frame_bytes_max,
        retention_s=config.tape.retention_s,
        silence_s=config.engine.silence_s,
        refill=refill,
        secure=engine_keys(config),
    )


def engine_keys(config: Config) -> trust.Secure:
    """Give what secures a socket towards the engine."""
    return _as_client(config, config.engine.curve_server_key_file)


def _as_client(config: Config, server_key_file: Path | None) -> trust.Secure:
    """Give what secures a socket towards the holder of that key: nothing where none is named."""
    if server_key_file is None or config.engine.curve_key_file is None:
        return trust.plain
    return trust.as_client(server_key_file, secret_path(config.engine.curve_key_file))


def make_replay_server(config: Config, served: ReplayServerSection) -> ReplayServer:
    """Make who serves the tape's past."""
    return ReplayServer(
        tape_path=config.tape.path,
        stream=config.stream.name,
        endpoint=served.endpoint,
        answers_per_s_max=served.answers_per_s_max,
        secure=trust.plain if served.curve_key_file is None else trust.as_server(secret_path(served.curve_key_file)),
        clients=frozenset(trust.read_keys(path).public for path in served.curve_client_key_files),
    )


def secret_files(config: Config) -> dict[str, Path]:
    """Give the files of secrets that the configuration names, by key."""
    served = config.replay_server
    named = {
        "admin.token_file": config.admin.token_file,
        "engine.curve_key_file": config.engine.curve_key_file,
        "replay_server.curve_key_file": served.curve_key_file if served is not None else None,
        "store.cassandra.password_file": config.store.cassandra.password_file,
        "store.cassandra.tls_key_file": config.store.cassandra.tls_key_file,
    }
    return {key: path for key, path in named.items() if path is not None}


def check_trust(config: Config, *, record: bool) -> None:
    """Refuse an ipc path that anybody could take over, unless CURVE proves who is there; warn of the rest.

    Only who records is told something by others. Raises UntrustedError.
    """
    engine, replay = config.engine, config.replay
    peers = [("engine.endpoint", engine.endpoint, engine.curve_server_key_file)] if record else []
    if record and replay is not None:
        peers.append(("replay.endpoint", replay.endpoint, replay.curve_server_key_file))
    step = "keep the socket where only its owner may write (chmod 0755), or use CURVE (`sidecar keygen`)"
    for key, endpoint, server_key_file in peers:
        for place in trust.replaceable(endpoint) if server_key_file is None else ():
            said = f"{key} = {endpoint}: anybody may write into {place.directory} ({place.mode:04o})"
            if place.anybody:
                raise UntrustedError(f"{said} and put another one in its place; {step}")
            log.warning("ipc_path_shared", extra={"reason": f"{said}: whoever binds first is believed; {step}"})
    for key, named in secret_files(config).items():
        if trust.is_exposed(path := secret_path(named)):
            log.warning("secret_exposed", extra={"key": key, "path": str(path), "next_step": f"chmod 0600 {path}"})


def make_settler(config: Config, store: Store, tail: Tail | None) -> Settler:
    """Make the settling half; `tail` joins it to a recorder in the same process."""
    return Settler(
        store=store,
        tape_path=config.tape.path,
        tail=tail,
        stream=config.stream.name,
        first_sequence=config.stream.first_sequence,
        rules=config.rules(),
        bounds=bounds_of(config),
        on_gap=config.stream.on_gap,
        gap_after_s=config.stream.gap_after_s,
        replay_endpoint=config.replay.endpoint if config.replay is not None else None,
        ack_log=config.pipeline.ack_log,
    )


def make_late_settler(config: Config, store: Store, reading: LateReading) -> Settler:
    """Make the settler of a late stream; it heeds the same pause."""
    return Settler(
        store=store,
        tape_path=config.tape.path,
        tail=None,
        stream=reading.stream,
        first_sequence=1,
        rules=config.rules(),
        bounds=bounds_of(config),
        late=reading,
    )


async def settle_late(config: Config, stopping: asyncio.Event) -> None:
    """Settle late truths, also those that are posted later, each late stream by a settler and a store of its own."""
    settlers: dict[str, Settler] = {}
    async with asyncio.TaskGroup() as parts:
        while not stopping.is_set():
            for reading in readings(config.tape.path):
                if reading.stream not in settlers:
                    settlers[reading.stream] = settler = make_late_settler(config, open_store(config), reading)
                    parts.create_task(_settle(settler))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await stopping.wait()
        for settler in settlers.values():
            settler.stop()


def make_hourly(config: Config) -> Hourly:
    """Make the proof that goes on beside settlement; its `numbers` say how the last one went."""
    return Hourly(
        open_store=lambda: open_store(config),
        path=proof_path(config),
        interval_s=config.reconcile.interval_s,
        rate_rows_s=config.reconcile.rate_rows_s,
        tape_path=config.tape.path,
    )


def make_watch(
    config: Config, recorder: Recorder | None, settler: Settler | None, proofs: Numbers | None = None
) -> Watch:
    """Make the one who looks at this process's halves."""
    return Watch(
        stream=config.stream.name,
        first_sequence=config.stream.first_sequence,
        tape_path=config.tape.path,
        tape_size_bytes_max=config.tape.size_bytes_max,
        store_name=config.store.backend,
        recorder=recorder,
        settler=settler,
        proofs=proofs,
        replay_configured=config.replay is not None,
    )


def admin_token(config: Config) -> str | None:
    """Read the token of the admin endpoint. Raises ConfigError when it can't be used."""
    if config.admin.token_file is None:
        return None
    token = read_secret(config.admin.token_file, "admin.token_file")
    if len(token) < TOKEN_LENGTH_LEAST or not token.isascii() or not token.isprintable() or " " in token:
        allowed = f"at least {TOKEN_LENGTH_LEAST} printable ASCII characters without spaces"
        make = f"head -c 24 /dev/urandom | base64 > {config.admin.token_file}"
        raise ConfigError("admin.token_file", [f"{config.admin.token_file}: allowed is {allowed}; `{make}` makes one"])
    return token


async def serve(config: Config, *, record: bool, settle: bool) -> None:
    """Run until SIGTERM or SIGINT. Raises what ended a half: the process must then end too."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    faulthandler.enable()  # SIGABRT, as the watchdog sends it, and a crash say where every thread was
    # What is made for a trade is freed with it, by counting; the collector would only look through all of it again and
    # again (11 % of the settler's CPU). What lives for ever is taken out of its sight, cycles are still found, later.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    log.info("starting", extra={"record": record, "settle": settle, "stream": config.stream.name})
    check_trust(config, record=record)
    token, notifier = admin_token(config), Notifier()
    tape = open_tape(config) if record else None
    held = None
    try:
        async with asyncio.TaskGroup() as parts:
            recorder = make_recorder(config, tape) if tape is not None else None
            server = settler = hourly = None
            working = [parts.create_task(recorder.run())] if recorder is not None else []
            if recorder is not None and (served := config.replay_server) is not None:
                server = make_replay_server(config, served)
                working.append(parts.create_task(server.run()))
            if settle:
                held = lock(config.tape.path, "settler")
                settler = make_settler(config, open_store(config), tape.tail if tape is not None else None)
                working += [parts.create_task(_settle(settler)), parts.create_task(settle_late(config, stopping))]
                if config.reconcile.interval_s:
                    hourly = make_hourly(config)
                    working.append(parts.create_task(hourly.run()))
            halves = [half for half in (recorder, server, settler, hourly) if half is not None]
            watch = make_watch(config, recorder, settler, hourly.numbers if hourly is not None else None)
            onlookers = _onlookers(config, token, notifier, watch)
            watching = [parts.create_task(onlooker) for onlooker in onlookers]
            await stopping.wait()
            log.info("stopping", extra={"stream": config.stream.name})
            longest_s = config.pipeline.shutdown_timeout_s + STOP_MARGIN_S
            notifier.tell(STOPPING=1, EXTEND_TIMEOUT_USEC=int(longest_s * 1_000_000))
            for half in halves:
                half.stop()
            await asyncio.wait(working)
            for task in watching:
                task.cancel()
    finally:
        if tape is not None:
            tape.close()
        if held is not None:
            held.close()
    log.info("stopped", extra={"stream": config.stream.name})


def _onlookers(config: Config, token: str | None, notifier: Notifier, watch: Watch) -> list[Coroutine[Any, Any, None]]:
    """Give what looks at the halves and tells others: nothing when nobody wants to know."""
    from sidecar.admin import Admin  # not for every look-up

    if not config.admin.listen and not notifier.is_wanted:
        return []
    onlookers = [watch.run()]
    if config.admin.listen:
        onlookers.append(Admin(watch, listen=config.admin.listen, token=token).run())
    if notifier.is_wanted:
        watch.on_look.append(lambda: notifier.look(watch.standing))
        onlookers.append(notifier.feed_watchdog())
    return onlookers


async def _settle(settler: Settler) -> None:
    try:
        await settler.run()
    finally:
        await settler.store.close()


class Settlement:
    """Ledger, pipeline and store without sockets and tape: for programs that hold the stream's events themselves.

    `async with Settlement(config) as settlement: await settlement.settle_trade_atomically(trade)`. It begins after
    the last acknowledged event; whoever needs to replay what a database lost with the power runs a sidecar: it
    has a tape.
    """

    def __init__(self, config: Config, store: Store | None = None) -> None:
        """Take the configuration, and a store when it is not to be opened from it."""
        self.store = store or open_store(config)
        self._config = config
        self._life: Life | None = None
        self._tasks: asyncio.TaskGroup | None = None

    async def __aenter__(self) -> Self:
        """Open the store, agree with the stream's decisions, begin after its last acknowledged event."""
        config, bounds = self._config, bounds_of(self._config)
        await self.store.open()
        stream = config.stream.name
        agreed = await decisions.agree(
            self.store,
            stream=stream,
            first_sequence=config.stream.first_sequence,
            session=1,
            engine_session=None,
            rules=config.rules(),
            now_us=_now_us(),
        )
        await self.store.ready_for(agreed.symbols.symbols)
        state = await until_known(lambda: self.store.load_state(stream), bounds)
        start = state.get("acked") or state.get("durable") or before(agreed.first_sequence, agreed.base_us)
        self._tasks = await asyncio.TaskGroup().__aenter__()
        self._life = Life(
            store=self.store,
            stream=stream,
            agreed=agreed,
            start=start,
            bounds=bounds,
            batch_trades_max=bounds.batch_trades_max,
            spawn=self._tasks.create_task,  # type: ignore[arg-type]
            now_us=_now_us,
        )
        return self

    async def __aexit__(self, *raised: object) -> None:
        """Save the position and close the store."""
        assert self._life is not None
        assert self._tasks is not None
        try:
            await self._tasks.__aexit__(*raised)  # type: ignore[arg-type]
            await self._life.save_acked()
        finally:
            await self.store.close()

    async def settle_trade_atomically(self, trade: Trade | Mapping[str, Any] | bytes) -> bool:
        """Settle the stream's next trade and wait for its acknowledgement; False when it was settled before.

        `trade` is a Trade, a frame's payload, or the same as a mapping of wire.md's keys. Raises SequenceGapError when
        it isn't the next event, Halt when settlement would stop before it, MalformedFrameError for unusable bytes.
        """
        event = trade if isinstance(trade, Trade | Refused) else wire.decode(_payload(trade))
        assert self._life is not None, "use `async with Settlement(config)`"
        life, sequence = self._life, event[0]
        if sequence <= life.ledger.sequence:
            return False
        if sequence != life.ledger.sequence + 1:
            raise SequenceGapError(self._config.stream.name, life.ledger.sequence + 1, sequence)
        await life.settle([event])  # type: ignore[list-item]
        await life.pipeline.drained()
        try:
            await life.save_acked()
        except OutcomeUnknownError as unknown:
            log.warning("acked_not_saved", extra={"error": str(unknown)})
        return True


def _payload(trade: Mapping[str, Any] | bytes) -> bytes:
    return trade if isinstance(trade, bytes) else wire.encode(trade)


def _now_us() -> int:
    return time.time_ns() // 1000
