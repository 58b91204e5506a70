"""The rows in Cassandra or ScyllaDB, over cassandra-driver: what store/base.py promises, on a cluster.

- A batch is one LOGGED BATCH message with the batch's stamp as its protocol write time, so batches may land in any
  order and any number of times. Its bytes are made once (encode.py), and are all that `attempt` keeps for the retry.
- The driver never retries: the pipeline does (FallthroughRetryPolicy). Every error becomes one of ours in `classified`,
  by type and code, and nowhere else.
- The loop is never blocked: connecting, preparing, changing tables and closing run in threads of their own; all else
  is sent and answered on the loop itself (connection.py).
- Writes carry their time explicitly or, LWT, none: nothing is ever stamped with this host's clock by the driver.
- Protocol v4, because Cassandra and ScyllaDB both speak it and v5 adds a checksum computed in Python to every message.

After a crash a batch is in the cluster whole or, replayed from the batch log within seconds, becomes whole; or it never
arrived. Acknowledged is not durable: nodes.py says when a node was away, and what follows is the settler's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import ssl
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import cassandra
from cassandra import ConsistencyLevel, ProtocolVersion, protocol
from cassandra.auth import PlainTextAuthProvider
from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile, NoHostAvailable
from cassandra.connection import ConnectionBusy, ConnectionException
from cassandra.policies import (
    ConstantReconnectionPolicy,
    DCAwareRoundRobinPolicy,
    FallthroughRetryPolicy,
)
from cassandra.pool import NoConnectionsAvailable
from cassandra.query import BoundStatement, SimpleStatement, tuple_factory

from sidecar.batch import BALANCE_COLUMNS, LEDGER_COLUMNS, REJECTED_COLUMNS, ROW_PAGE_WIDTH, TRADE_COLUMNS, Batch
from sidecar.errors import BatchTooLargeError, OutcomeUnknownError, StoreError, StoreRefusedError
from sidecar.events import AccountKey, AccountValues, Balance, Decision, State
from sidecar.store import tables
from sidecar.store.base import SCAN_ROWS, summed
from sidecar.store.connection import NodeNotTrustedError, ask, connection_class, give_up
from sidecar.store.encode import LOGGED, UNLOGGED, BatchEncoder, insert_statement
from sidecar.store.nodes import GENERATION, Answering, Nodes
from sidecar.store.scans import ProofRows, ms_of

log = logging.getLogger(__name__)
T = TypeVar("T")

READS_INFLIGHT_MAX: Final = 32
READ_USERS_MAX: Final = 16  # partitions a question: one alone costs this process 200 us
WALK_PAGES_MAX: Final = 16  # up to so many partitions are visited unasked; for more it is looked up which there are
CONNECT_S: Final = 5.0
HEARTBEAT_S: Final = 5
CLOSE_S: Final = 1.0
SILENCE_S: Final = 1.0  # after its time the driver may take so long to say that it is over
FIRST_LOOKS_MAX: Final = 20
FIRST_LOOK_EVERY_S: Final = 0.1

_APPLY: Final = "run `sidecar schema apply`"
# Reports about this process to a DataStax server: scylla-driver, which installs the same package, has none to turn off.
_WITHOUT_REPORTS: Final[dict[str, Any]] = {
    key: False for key in ("monitor_reporting_enabled",) if key in inspect.signature(Cluster.__init__).parameters
}
_CHECK_CA: Final = "check store.cassandra.tls_ca_file, and that the certificate names the contact point"
_GRANT: Final = "schema/roles.cql grants what each role needs"


# --- errors: the one place where the driver's become ours -------------------------------------------------------------

# By protocol code (native_protocol_v5.spec, section 9). What is not in here has an unknown outcome.
_REFUSED_CODES: Final = frozenset({0x0100, 0x1400, 0x2000, 0x2100, 0x2200, 0x2300, 0x2400})
_UNKNOWN_CODES: Final = frozenset(
    {0x0000, 0x1000, 0x1001, 0x1002, 0x1003, 0x1100, 0x1200, 0x1300, 0x1500, 0x1600, 0x1700, 0x2500, 0x8000}
)
_REFUSED_TYPES: Final = (
    cassandra.RequestValidationException,  # InvalidRequest, Unauthorized, AlreadyExists, ConfigurationException
    cassandra.AuthenticationFailed,
    cassandra.FunctionFailure,
    cassandra.UnsupportedOperation,
)
# Of all that a node may answer a connection with, what no other try mends.
_HOPELESS_TYPES: Final = (cassandra.AuthenticationFailed, NodeNotTrustedError)
_UNKNOWN_TYPES: Final = (
    cassandra.OperationTimedOut,
    cassandra.Timeout,  # of a read or a write, of every kind of write
    cassandra.CoordinationFailure,  # a read or a write failed on replicas
    cassandra.Unavailable,  # nothing was applied; the same may be sent again
    ConnectionException,  # ConnectionShutdown among them
    ConnectionBusy,
    NoConnectionsAvailable,
    NoHostAvailable,
    cassandra.UnresolvableContactPoints,
)


def classified(error: BaseException, unknown_errors: Counter[str]) -> StoreError:
    """Say what is done about an error of the driver: by type and code, the exceptions being two texts.

    "Batch too large" and an unknown table are InvalidRequest (0x2200) like any other: only their text tells. What isn't
    known here has an unknown outcome, and is counted by its name in `unknown_errors`.
    """
    if isinstance(error, StoreError):
        return error
    name = type(error).__name__
    message = f"{name}: {error}"
    code = getattr(error, "code", None)
    if isinstance(error, NoHostAvailable) and isinstance(error.errors, dict):
        for each in error.errors.values():
            if isinstance(each, _HOPELESS_TYPES) or getattr(each, "code", None) == 0x0100:
                return classified(each, unknown_errors)
    if isinstance(error, NodeNotTrustedError):
        return StoreRefusedError(f"{message}; {_CHECK_CA}")
    if isinstance(error, _REFUSED_TYPES) or code in _REFUSED_CODES:
        said = str(error).lower()
        if "batch too large" in said:
            return BatchTooLargeError(message)
        if "unconfigured table" in said or "does not exist" in said:
            return StoreRefusedError(f"{message}; {_APPLY}")
        if isinstance(error, cassandra.AuthenticationFailed) or code == 0x0100:
            return StoreRefusedError(f"{message}; check store.cassandra.username and password_file")
        if isinstance(error, cassandra.Unauthorized) or code == 0x2100:
            return StoreRefusedError(f"{message}; {_GRANT}")
        return StoreRefusedError(message)
    if not isinstance(error, _UNKNOWN_TYPES) and code not in _UNKNOWN_CODES:
        unknown_errors[name] += 1
        log.error("unknown_database_error", extra={"error_type": name, "error": str(error)})
    return OutcomeUnknownError(message)


# --- the wire ---------------------------------------------------------------------------------------------------------


class _EncodedBatch:
    """A BATCH message whose body is made already."""

    opcode = protocol.BatchMessage.opcode
    custom_payload = None
    tracing = False

    def __init__(self, body: bytes) -> None:
        self.body = body


class _Question(BoundStatement):  # type: ignore[misc]  # the driver is untyped
    """A prepared statement with its values, encoded: what a plan of nodes asks of it (its routing key) is the driver's.

    The driver's own constructor and binding do as much again for what no question of ours has.
    """

    def __init__(
        self,
        prepared: Any,
        values: Sequence[bytes | None],
        *,
        consistency: int = ConsistencyLevel.LOCAL_QUORUM,
        serial_consistency: int | None = None,
        rows_a_page: int = SCAN_ROWS,
    ) -> None:
        self.prepared_statement = prepared
        self.keyspace = prepared.column_metadata[0].keyspace_name if prepared.column_metadata else None
        self.values = values
        self.consistency_level = consistency
        self.serial_consistency_level = serial_consistency
        self.fetch_size = rows_a_page

    def message(self, paging_state: bytes | None) -> Any:
        """Give the message for one page; it is the driver's, since scylla-driver adds what it agreed on with a node."""
        return protocol.ExecuteMessage(
            self.prepared_statement.query_id,
            self.values,
            self.consistency_level,
            serial_consistency_level=self.serial_consistency_level,
            fetch_size=self.fetch_size,
            paging_state=paging_state,
            result_metadata_id=self.prepared_statement.result_metadata_id,
        )


class _Wire:
    """Encodes and decodes for the driver: batches as they are; warnings are counted, not logged one by one."""

    _HEADER = struct.Struct(">BBhBi")
    _RESULT = 0x08
    _WARNING = 0x08  # a flag of the frame
    _VOID_BODY = b"\x00\x00\x00\x01"

    def __init__(self) -> None:
        self.warnings_total = 0
        self._handler = protocol.ProtocolHandler
        void = protocol.ResultMessage(protocol.RESULT_KIND_VOID)
        void.trace_id = None
        self._void = void

    def encode_message(self, message: Any, stream_id: int, protocol_version: int, *more: Any, **named: Any) -> bytes:
        if type(message) is _EncodedBatch:
            body = message.body
            return self._HEADER.pack(protocol_version, 0, stream_id, message.opcode, len(body)) + body
        encoded: bytes = self._handler.encode_message(message, stream_id, protocol_version, *more, **named)
        return encoded

    def decode_message(self, *given: Any) -> Any:
        """Decode; what stands before the flags (scylla-driver has one thing more there) is the driver's own."""
        *before, flags, opcode, body, decompressor, result_metadata = given
        if flags & self._WARNING:
            body = self._after_warnings(body)
            flags &= ~self._WARNING
        if not flags and opcode == self._RESULT and body == self._VOID_BODY:
            return self._void  # the answer to every write: one value will do for all
        return self._handler.decode_message(*before, flags, opcode, body, decompressor, result_metadata)

    def _after_warnings(self, body: bytes) -> bytes:
        """Count the warnings at the head of a body, and give what comes after them."""
        (warnings,) = struct.unpack_from(">H", body)
        at = 2
        for _ in range(warnings):
            (length,) = struct.unpack_from(">H", body, at)
            at += 2 + length
        if not self.warnings_total:
            first = body[4 : 4 + int.from_bytes(body[2:4], "big")].decode(errors="replace")
            log.info("database_warns", extra={"warning": first, "further": "counted only"})
        self.warnings_total += warnings
        return body[at:]


async def _in_thread(work: Callable[[], T], unwanted: Callable[[T], object] = lambda _: None) -> T:
    """Run what blocks in a thread of its own, which holds up neither the loop nor the end of the process.

    `unwanted` gets the result, in a thread, when nobody waits for it any more.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def start(run: Callable[[], object]) -> None:
        threading.Thread(target=run, name="cassandra-work", daemon=True).start()

    def tell(result: T) -> None:
        if done.done():
            start(lambda: unwanted(result))
        else:
            done.set_result(result)

    def tell_error(error: Exception) -> None:
        if not done.done():
            done.set_exception(error)

    def run() -> None:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - it is the answer
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(tell_error, error)
            return
        try:
            loop.call_soon_threadsafe(tell, result)
        except RuntimeError:
            unwanted(result)

    start(run)
    return await done


class _Connected:
    """One connection to the cluster: made as a whole, given up as a whole."""

    def __init__(self, cluster: Any, session: Any) -> None:
        self.cluster = cluster
        self.session = session
        self.statements: dict[str, Any] = {}  # strong references: the driver keeps weak ones
        self.nodes: Nodes | None = None
        self.watching: asyncio.Task[None] | None = None
        self.encoder: BatchEncoder | None = None


class CassandraStore(ProofRows):
    """Rows in one keyspace of a cluster; what a method needs is prepared when it is first used."""

    name = "cassandra"

    def __init__(
        self,
        *,
        page_widths: dict[str, int],
        contact_points: Sequence[str] = ("127.0.0.1",),
        port: int = 9042,
        local_dc: str = "datacenter1",
        keyspace: str = "trading",
        replication_factor: int = 1,
        batch: str = "logged",
        request_timeout_s: float = 10.0,
        username: str | None = None,
        password: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Remember where the cluster is; `open` connects. `request_timeout_s` bounds every single question to it."""
        super().__init__(page_widths)
        self.unknown_errors: Counter[str] = Counter()
        self._contact_points = list(contact_points)
        self._port = port
        self._local_dc = local_dc
        self._keyspace = keyspace
        self._replication_factor = replication_factor
        self._batch_kind = {"logged": LOGGED, "unlogged": UNLOGGED}[batch]
        self._timeout_s = request_timeout_s
        self._login = PlainTextAuthProvider(username, password) if username is not None else None
        self._tls = tls
        self._outages = 0
        self._wire = _Wire()
        self._retry_policy = FallthroughRetryPolicy()
        self._connected: _Connected | None = None
        self._preparing = asyncio.Lock()

    # --- open and close ---

    async def open(self) -> None:
        """Connect, check the tables that every symbol shares, prepare.

        Raises OutcomeUnknownError while no node answers, StoreRefusedError when the keyspace or a table is missing.
        """
        try:
            connected = await self._connect()
            if connected.nodes is None:
                await self._check(tables.COMMON_TABLES)
                await self._prepare_encoder(connected)
                await self._watch(connected)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Let go of every connection."""
        connected, self._connected = self._connected, None
        if connected is None:
            return
        if connected.watching is not None:
            connected.watching.cancel()
        if connected.nodes is not None:
            connected.nodes.close()
        closing = asyncio.ensure_future(_in_thread(connected.cluster.shutdown))
        done, _ = await asyncio.wait((closing,), timeout=CLOSE_S)  # it joins a thread that may wait for a silent node
        for each in done:
            if not each.cancelled() and (error := each.exception()) is not None:
                log.info("close_failed", extra={"error": str(error)})

    async def _connect(self) -> _Connected:
        if self._connected is not None:
            return self._connected
        clusters: list[Any] = []
        connections = connection_class(self._connection_closed)

        def connect() -> Any:
            clusters.append(self._cluster(connections))  # in here, since it resolves names
            try:
                return clusters[0].connect()
            except BaseException:
                clusters[0].shutdown()
                raise

        try:
            async with asyncio.timeout(self._timeout_s):
                session = await _in_thread(connect, unwanted=lambda session: session.cluster.shutdown())
        except TimeoutError as error:
            raise OutcomeUnknownError(f"{self._where()}: no answer within {self._timeout_s} s") from error
        except Exception as error:
            known = {host.datacenter for cluster in clusters for host in cluster.metadata.all_hosts()} - {None}
            if isinstance(error, NoHostAvailable) and known and self._local_dc not in known:
                raise StoreRefusedError(
                    f"store.cassandra.local_dc = {self._local_dc!r}; the cluster at {self._where()} has"
                    f" {', '.join(sorted(known))}"
                ) from error
            found = classified(error, self.unknown_errors)
            raise type(found)(f"{self._where()}: {found}{self._tls_hint(error)}") from error
        session.client_protocol_handler = self._wire
        session.use_client_timestamp = False
        self._connected = _Connected(session.cluster, session)
        return self._connected

    def _tls_hint(self, error: Exception) -> str:
        """Give what may be wrong when a node takes the connection and then hangs up: it says no more than that."""
        if self._tls is None and isinstance(error, NoHostAvailable) and isinstance(error.errors, dict):
            for each in error.errors.values():
                if isinstance(each, ConnectionResetError | ConnectionException | protocol.ErrorMessage):
                    return "; if it wants TLS, name its authority in store.cassandra.tls_ca_file"
        return ""

    def _where(self) -> str:
        return f"{','.join(self._contact_points)} port {self._port}"

    def _cluster(self, connections: Any) -> Any:
        """Make the driver's cluster object; it connects later, by this class of connections."""
        profile = ExecutionProfile(
            load_balancing_policy=Answering(DCAwareRoundRobinPolicy(self._local_dc)),
            retry_policy=self._retry_policy,
            consistency_level=ConsistencyLevel.LOCAL_QUORUM,
            request_timeout=self._timeout_s,
            row_factory=tuple_factory,
        )
        connect_s = min(CONNECT_S, self._timeout_s)
        return Cluster(
            contact_points=self._contact_points,
            port=self._port,
            protocol_version=ProtocolVersion.V4,
            compression=False,
            auth_provider=self._login,
            ssl_context=self._tls,
            execution_profiles={EXEC_PROFILE_DEFAULT: profile},
            reconnection_policy=ConstantReconnectionPolicy(1.0, max_attempts=None),
            connect_timeout=connect_s,
            control_connection_timeout=connect_s,
            max_schema_agreement_wait=connect_s,
            idle_heartbeat_interval=HEARTBEAT_S,
            idle_heartbeat_timeout=HEARTBEAT_S,
            connection_class=connections,
            **_WITHOUT_REPORTS,
        )

    def _connection_closed(self) -> None:
        """Hear of the end of a connection, by whomever, on any thread."""
        connected = self._connected
        if connected is not None and connected.nodes is not None:
            connected.nodes.suspect_from_thread()

    async def _watch(self, connected: _Connected) -> None:
        """Take the first look at the nodes; those that are up may take a moment to be connected all."""

        async def ask(host: Any, timeout_s: float) -> list[tuple[Any, ...]]:
            message = protocol.QueryMessage(GENERATION, ConsistencyLevel.ONE)
            return (await self._ask(message, timeout_s, host=host)).parsed_rows or []

        def count() -> None:
            self._outages += 1

        def avoid(hosts: Collection[Any]) -> None:
            connected.cluster.profile_manager.default.load_balancing_policy.silent = hosts

        nodes = Nodes(
            cluster=connected.cluster, session=connected.session, ask=ask, in_thread=_in_thread, count=count,
            avoid=avoid, give_up=give_up,
        )  # fmt: skip
        for _ in range(FIRST_LOOKS_MAX):
            pools = [pool for pool in tuple(connected.session.get_pools()) if pool.open_count]
            up = [host for host in connected.cluster.metadata.all_hosts() if host.is_up is not False]
            if len(pools) >= len(up):
                break
            await asyncio.sleep(FIRST_LOOK_EVERY_S)
        await nodes.look()
        connected.nodes = nodes
        connected.watching = asyncio.create_task(nodes.watch())

    @property
    def steady_since(self) -> float | None:
        """The loop's time since when all nodes of the local datacenter have stood, None while one is away."""
        connected = self._connected
        if connected is None or connected.nodes is None or connected.watching is None:
            return None
        if connected.watching.cancelled():
            return None
        if connected.watching.done():
            connected.watching.result()  # a bug in there must not look like steady nodes
        return connected.nodes.steady_since

    @property
    def outages(self) -> int:
        """Count the nodes that came back, or were started anew."""
        return self._outages

    @property
    def nodes_away(self) -> list[str]:
        """Name the nodes of the local datacenter that did not answer the last look."""
        connected = self._connected
        return connected.nodes.away if connected is not None and connected.nodes is not None else []

    @property
    def warnings_total(self) -> int:
        """Count the server's warnings, mostly about the size of batches."""
        return self._wire.warnings_total

    # --- questions and answers ---

    def _here(self) -> _Connected:
        connected = self._connected
        if connected is None:
            raise OutcomeUnknownError(f"{self._where()}: not connected")
        return connected

    async def _ask(self, message: Any, timeout_s: float, *, query: Any = None, host: Any = None) -> Any:
        """Send a message to `host`, or to the node that is best for `query`; give the answer."""
        session = self._here().session
        try:
            return await ask(session, message, self._wire, timeout_s, query=query, host=host)
        except protocol.ErrorMessage as error:
            raise classified(error.to_exception(), self.unknown_errors) from error
        except Exception as error:
            raise classified(error, self.unknown_errors) from error

    async def _prepared(self, text: str) -> Any:
        """Give a statement's prepared form; it is prepared when it is first used."""
        connected = self._here()
        prepared = connected.statements.get(text)
        if prepared is not None:
            return prepared
        try:
            async with asyncio.timeout(self._timeout_s), self._preparing:
                if (prepared := connected.statements.get(text)) is None:
                    prepared = await _in_thread(lambda: connected.session.prepare(text))
                    connected.statements[text] = prepared
                return prepared
        except TimeoutError as error:
            raise OutcomeUnknownError(f"{text}: not prepared within {self._timeout_s} s") from error
        except Exception as error:
            raise classified(error, self.unknown_errors) from error

    async def _question(self, text: str, values: Sequence[Any], **how: int) -> _Question:
        """Give the question of a statement with these values; `how` as _Question has it."""
        prepared = await self._prepared(text)
        encoded = [
            None if value is None else column.type.serialize(value, ProtocolVersion.V4)
            for value, column in zip(values, prepared.column_metadata, strict=True)
        ]
        return _Question(prepared, encoded, **how)

    async def _select(self, text: str, values: Sequence[Any], **how: int) -> list[tuple[Any, ...]]:
        """Ask for all rows, however many pages they are."""
        return await self._rows(await self._question(text, values, **how))

    async def _rows(self, question: _Question) -> list[tuple[Any, ...]]:
        rows, state = await self._page(question)
        while state:
            more, state = await self._page(question, state)
            rows += more
        return rows

    async def _pages(
        self, text: str, values: Sequence[Any] = (), *, rows_a_page: int = SCAN_ROWS
    ) -> AsyncIterator[list[tuple[Any, ...]]]:
        """Ask page by page; pages without rows are left out."""
        question = await self._question(text, values, rows_a_page=rows_a_page)
        state = None
        while True:
            rows, state = await self._page(question, state)
            if rows:
                yield rows
            if not state:
                return

    async def _page(
        self, question: _Question, state: bytes | None = None
    ) -> tuple[list[tuple[Any, ...]], bytes | None]:
        """Ask, and give a page of rows with the state that the next page is asked by (None: it was the last)."""
        answer = await self._ask(question.message(state), self._timeout_s, query=question)
        return answer.parsed_rows or [], answer.paging_state

    # --- schema ---

    def schema(self, symbols: Iterable[str]) -> str:
        """Give the statements as text."""
        return tables.schema_text(symbols, keyspace=self._keyspace, replication_factor=self._replication_factor)

    async def apply_schema(self, symbols: Iterable[str]) -> list[str]:
        """Create the keyspace and the tables that are missing; what is there is checked first."""
        await self._connect()
        wanted = tables.tables(symbols)
        if not await self._has_keyspace():  # asked first: a role may lack the right to create one that is there
            await self._define(tables.keyspace_statement(self._keyspace, self._replication_factor))
        missing = await self._missing(wanted)
        for table in missing:
            await self._define(table.statement(self._keyspace))
        return sorted(table.name for table in missing)

    async def _define(self, statement: str) -> None:
        await self._run(SimpleStatement(statement))

    async def ready_for(self, symbols: Iterable[str]) -> None:
        """Check the symbols' tables and prepare for them."""
        names = sorted(symbols)
        await self._check([tables.trades_table(name) for name in names])
        for name in names:
            await self._learn(name)

    async def _check(self, wanted: Iterable[tables.Table]) -> None:
        missing = await self._missing(wanted)
        if missing:
            names = ", ".join(f"{self._keyspace}.{table.name}" for table in missing)
            raise StoreRefusedError(f"missing in {self._where()}: {names}; {_APPLY}")

    async def _missing(self, wanted: Iterable[tables.Table]) -> list[tables.Table]:
        """Name the tables that are not there. Raises StoreRefusedError about those that are there and wrong."""
        if not await self._has_keyspace():
            raise StoreRefusedError(f"there is no keyspace {self._keyspace} in {self._where()}; {_APPLY}")
        options = {row["table_name"]: row for row in await self._system("tables")}
        columns: dict[str, dict[str, tuple[str, str, int, str]]] = {}
        for row in await self._system("columns"):
            columns.setdefault(row["table_name"], {})[row["column_name"]] = (
                row["type"], row["kind"], row["position"], row["clustering_order"],
            )  # fmt: skip
        missing, wrong = [], []
        for table in wanted:
            if table.name not in options:
                missing.append(table)
                continue
            wrong += tables.faults(
                table, keyspace=self._keyspace, columns=columns[table.name], options=options[table.name]
            )
        if wrong:
            raise StoreRefusedError(" ".join(wrong))
        return missing

    async def _has_keyspace(self) -> bool:
        return bool(await self._system("keyspaces"))

    async def _system(self, table: str) -> list[dict[str, Any]]:
        """Read what system_schema says of the keyspace, by name: the columns differ from one database to the other."""
        text = f"SELECT * FROM system_schema.{table} WHERE keyspace_name = %s"
        return await self._run(SimpleStatement(text, consistency_level=ConsistencyLevel.ONE), (self._keyspace,))

    async def _run(self, statement: Any, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Run a statement the driver's own way, which waits for the nodes to agree on a change of tables."""
        session = self._here().session

        def run() -> list[dict[str, Any]]:
            result = session.execute(statement, values, timeout=self._timeout_s)
            return [dict(zip(result.column_names, row, strict=True)) for row in result]

        try:
            async with asyncio.timeout(self._timeout_s + SILENCE_S):
                return await _in_thread(run)
        except TimeoutError as error:
            raise OutcomeUnknownError(f"{statement.query_string}: the driver told nothing in time") from error
        except Exception as error:
            raise classified(error, self.unknown_errors) from error

    # --- the way of a trade ---

    async def settle_batch_atomically(self, batch: Batch) -> None:
        """Send the batch as one message, and wait for its answer."""
        await self.attempt(batch)()

    def attempt(self, batch: Batch) -> Callable[[], Awaitable[None]]:
        """Make the message at once: its bytes take a tenth of the memory that the rows would wait in."""
        encoder = self._connected.encoder if self._connected is not None else None
        if encoder is None or not batch.trades.keys() <= encoder.trade_ids.keys():
            return partial(self._prepare_and_settle, batch)
        return partial(self._send, encoder.encode(batch))

    async def _prepare_and_settle(self, batch: Batch) -> None:
        encoder = self._here().encoder
        if encoder is None:
            raise OutcomeUnknownError(f"{self._where()}: not open")
        for symbol in batch.trades:
            if symbol not in encoder.trade_ids:
                await self._learn(symbol)
        await self._send(encoder.encode(batch))

    async def _send(self, body: bytes) -> None:
        # No query for the plan, so no replica is preferred: a batch has rows for many nodes, and coordinators of the
        # batch log take turns.
        await self._ask(_EncodedBatch(body), self._timeout_s)

    async def _prepare_encoder(self, connected: _Connected) -> None:
        ids = [
            (await self._prepared(insert_statement(self._keyspace, table, columns))).query_id
            for table, columns in (
                ("user_balances", BALANCE_COLUMNS),
                ("ledger_events", LEDGER_COLUMNS),
                ("rejected_events", REJECTED_COLUMNS),
            )
        ]
        connected.encoder = BatchEncoder(
            kind=self._batch_kind, balances_id=ids[0], ledger_id=ids[1], rejected_id=ids[2]
        )

    async def _learn(self, symbol: str) -> None:
        """Prepare a symbol's statement and let the encoder know its id."""
        text = insert_statement(self._keyspace, tables.TRADES_PREFIX + symbol, TRADE_COLUMNS)
        prepared = await self._prepared(text)
        encoder = self._here().encoder
        if encoder is not None:
            encoder.trade_ids[symbol] = prepared.query_id

    async def load_accounts(self, stream: str, keys: Iterable[AccountKey]) -> dict[AccountKey, AccountValues]:
        """Read balance rows: users that want the same assets are asked for together, many questions are under way."""
        text = (
            "SELECT user_id, asset_id, available, version, last_sequence, updated_at FROM"
            f" {self._keyspace}.user_balances WHERE user_id IN ? AND asset_id IN ? AND stream = ?"
        )
        prepared = await self._prepared(text)
        assets_of: dict[int, set[int]] = {}
        for user, asset in keys:
            assets_of.setdefault(user, set()).add(asset)
        users_of: dict[frozenset[int], list[int]] = {}
        for user, assets in assets_of.items():
            users_of.setdefault(frozenset(assets), []).append(user)
        questions = iter(
            [
                (assets, users[at : at + READ_USERS_MAX])
                for assets, users in users_of.items()
                for at in range(0, len(users), READ_USERS_MAX)
            ]
        )
        found: dict[AccountKey, AccountValues] = {}
        name = stream.encode()

        async def read_on() -> None:
            for assets, users in questions:
                values = [_list_of("q", 8, users), _list_of("i", 4, assets), name]
                found.update({(row[0], row[1]): row[2:] for row in await self._rows(_Question(prepared, values))})

        readers = [asyncio.ensure_future(read_on()) for _ in range(min(READS_INFLIGHT_MAX, len(assets_of)))]
        try:
            for reader in readers:
                await reader
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
        return found

    async def load_state(self, stream: str) -> dict[str, State]:
        """Read the positions."""
        query = (
            f"SELECT kind, sequence, stamp_us, last_trade_ids FROM {self._keyspace}.settlement_state WHERE stream = ?"
        )
        rows = await self._select(query, (stream,))
        return {kind: State(sequence, stamp_us, dict(ids or {})) for kind, sequence, stamp_us, ids in rows}

    async def save_state(self, stream: str, kind: str, state: State) -> None:
        """Write one position; one that is further has a later stamp and stays."""
        query = (
            f"INSERT INTO {self._keyspace}.settlement_state (stream, kind, sequence, stamp_us, last_trade_ids)"
            " VALUES (?, ?, ?, ?, ?) USING TIMESTAMP ?"
        )
        await self._select(query, (stream, kind, *state, state.stamp_us))

    # --- decisions ---

    async def read_decisions(self, stream: str) -> list[Decision]:
        """Read the whole log, after everything that was decided anywhere."""
        query = (
            "SELECT stream, number, kind, first_sequence, last_sequence, body, reason, decided_by, decided_at"
            f" FROM {self._keyspace}.stream_decisions WHERE stream = ?"
        )
        rows = await self._select(query, (stream,), consistency=ConsistencyLevel.SERIAL)
        return [Decision._make((*row[:-1], ms_of(row[-1]))) for row in rows]

    async def append_decision(self, decision: Decision) -> bool:
        """Append by compare-and-set. When the outcome is unknown the log is read: an identical entry is ours."""
        query = (
            f"INSERT INTO {self._keyspace}.stream_decisions"
            " (stream, number, kind, first_sequence, last_sequence, body, reason, decided_by, decided_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) IF NOT EXISTS"
        )
        try:
            rows = await self._select(query, decision, serial_consistency=ConsistencyLevel.SERIAL)
        except OutcomeUnknownError as unknown:
            log.warning("decision_outcome_unknown", extra={"number": decision.number, "error": str(unknown)})
            there = {entry.number: entry for entry in await self.read_decisions(decision.stream)}
            if decision.number not in there:
                raise
            return there[decision.number] == decision
        if rows[0][0]:
            return True
        # Not applied: another was faster, or this very entry got there by an attempt whose answer was lost.
        there = {entry.number: entry for entry in await self.read_decisions(decision.stream)}
        return there.get(decision.number) == decision

    # --- look-ups ---

    async def trade_exists(self, symbol: str, trade_id: int, stream: str | None = None) -> bool:
        """Read one partition."""
        page = self.page_of(symbol, trade_id)
        query = f"SELECT stream FROM {self._trades(symbol)} WHERE page = ? AND trade_id = ?"
        if stream is None:
            return bool(await self._select(query, (page, trade_id)))
        return bool(await self._select(f"{query} AND stream = ?", (page, trade_id, stream)))

    async def get_trade(self, symbol: str, trade_id: int) -> list[dict[str, Any]]:
        """Read one partition."""
        page = self.page_of(symbol, trade_id)
        query = f"SELECT {', '.join(TRADE_COLUMNS)} FROM {self._trades(symbol)} WHERE page = ? AND trade_id = ?"
        rows = await self._select(query, (page, trade_id))
        return [dict(zip(TRADE_COLUMNS, row, strict=True)) for row in rows]

    async def get_user_balance(self, user_id: int, asset_id: int) -> Balance | None:
        """Sum one account over streams."""
        query = f"{self._balances} WHERE user_id = ? AND asset_id = ?"
        return summed([Balance(*row) for row in await self._select(query, (user_id, asset_id))])

    async def get_user_balances(self, user_id: int) -> list[Balance]:
        """Read one partition."""
        return [Balance(*row) for row in await self._select(f"{self._balances} WHERE user_id = ?", (user_id,))]

    @property
    def _balances(self) -> str:
        return f"SELECT {', '.join(BALANCE_COLUMNS)} FROM {self._keyspace}.user_balances"

    async def _one(self, table: str, columns: tuple[str, ...], stream: str, sequence: int) -> dict[str, Any] | None:
        query = (
            f"SELECT {', '.join(columns)} FROM {self._keyspace}.{table}"
            " WHERE stream = ? AND page = ? AND output_sequence = ?"
        )
        rows = await self._select(query, (stream, sequence // ROW_PAGE_WIDTH, sequence))
        return dict(zip(columns, rows[0], strict=True)) if rows else None

    async def get_rejected(self, stream: str, output_sequence: int) -> dict[str, Any] | None:
        """Read one row."""
        return await self._one("rejected_events", (*REJECTED_COLUMNS, "resolution"), stream, output_sequence)

    async def resolve_rejected(self, stream: str, output_sequence: int, resolution: str, now_us: int) -> None:
        """Write one column of one row."""
        query = (
            f"UPDATE {self._keyspace}.rejected_events USING TIMESTAMP ? SET resolution = ?"
            " WHERE stream = ? AND page = ? AND output_sequence = ?"
        )
        values = (now_us, resolution, stream, output_sequence // ROW_PAGE_WIDTH, output_sequence)
        await self._select(query, values)

    async def get_ledger_event(self, stream: str, output_sequence: int) -> dict[str, Any] | None:
        """Read one row."""
        return await self._one("ledger_events", LEDGER_COLUMNS, stream, output_sequence)

    # --- scans ---

    def scan_trades(self, symbol: str) -> AsyncIterator[list[tuple[Any, ...]]]:
        """Go through a symbol's table, in the cluster's order of partitions."""
        return self._pages(f"SELECT {', '.join(TRADE_COLUMNS)} FROM {self._trades(symbol)}")

    def scan_ledger_events(
        self, stream: str, first: int, last: int, *, rows_a_page: int = SCAN_ROWS
    ) -> AsyncIterator[list[tuple[Any, ...]]]:
        """Go through a stream's ledger events, in order."""
        return self._walk("ledger_events", LEDGER_COLUMNS, stream, first, last, rows_a_page)

    def scan_rejected(
        self, stream: str, first: int, last: int, *, rows_a_page: int = SCAN_ROWS
    ) -> AsyncIterator[list[tuple[Any, ...]]]:
        """Go through a stream's rejected events, in order."""
        return self._walk("rejected_events", REJECTED_COLUMNS, stream, first, last, rows_a_page)

    async def _walk(
        self, table: str, columns: tuple[str, ...], stream: str, first: int, last: int, rows_a_page: int
    ) -> AsyncIterator[list[tuple[Any, ...]]]:
        """Go from partition to partition; over a long range only those that are there."""
        first_page, last_page = first // ROW_PAGE_WIDTH, last // ROW_PAGE_WIDTH
        there: Iterable[int] = range(first_page, last_page + 1)
        if last_page - first_page >= WALK_PAGES_MAX:
            keys = self._pages(f"SELECT DISTINCT stream, page FROM {self._keyspace}.{table}")
            mine = [page async for some in keys for name, page in some if name == stream]
            there = sorted(page for page in mine if first_page <= page <= last_page)
        query = (
            f"SELECT {', '.join(columns)} FROM {self._keyspace}.{table}"
            " WHERE stream = ? AND page = ? AND output_sequence >= ? AND output_sequence <= ?"
        )
        for page in there:
            async for rows in self._pages(query, (stream, page, first, last), rows_a_page=rows_a_page):
                yield rows

    async def scan_balances(self) -> AsyncIterator[list[Balance]]:
        """Go through all balance rows, in the cluster's order of users."""
        async for rows in self._pages(self._balances):
            yield [Balance(*row) for row in rows]


def _list_of(number: str, length: int, values: Collection[int]) -> bytes:
    """Pack a list of numbers as CQL has it: its length, then each with its own."""
    parts = [part for value in values for part in (length, value)]
    return struct.pack(f">i{f'i{number}' * len(values)}", len(values), *parts)


__all__ = ["CassandraStore", "classified"]
