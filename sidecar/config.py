"""The configuration: one TOML file, the environment over it, `--set` over both; checked whole before anything starts.

The sections below are the contract (design.md, Configuration): each key stands with its default and with the rule that
says what is allowed. Every mistake of a file is found in one reading and named with its path, its value and what is
allowed (ConfigError, exit 78). What comes out is frozen and valid. Only the top floor (cli, admin) sees it; all other
rooms get plain keyword arguments.

Secrets are not in here: the file names files, and `read_secret` reads them when they are needed. Relative paths are
relative to the directory that `sidecar` is started in, wherever the configuration file lies.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from sidecar.errors import SidecarError

PLACES: Final = (Path("sidecar.toml"), Path("/etc/sidecar/sidecar.toml"))
CREDENTIALS: Final = Path("/etc/sidecar/credentials")
ENVIRONMENT_PREFIX: Final = "SIDECAR_"

I31_MAX: Final = 2**31 - 1
I63_MAX: Final = 2**63 - 1
DAY_S: Final = 86_400.0
YEAR_S: Final = 366 * DAY_S
PORT_MAX: Final = 65_535
TABLE_NAME_LENGTH_MAX: Final = 48  # Cassandra's, also for keyspaces
NAME_LENGTH_MAX: Final = 30  # `settled_trades_` before it stays within the bound above
STREAM_LENGTH_MAX: Final = 64  # it stands in every row
IPC_PATH_BYTES_MAX: Final = 107  # the kernel's, of a socket's path
TOPIC_BYTES_MAX: Final = 255
FRAME_BYTES_MAX_LEAST: Final = 4_096  # wire.md: a payload may be this large
DECIMALS_MAX: Final = 18  # one whole unit of more decimals (10^19 smallest ones) does not fit an amount, 2^63 - 1
ACCOUNTS_MAX_LEAST: Final = 1_000
ACCOUNTS_A_TRADE_MAX: Final = 6  # buyer, seller and revenue user, base and quote each
MS16_PAGE_WIDTH: Final = 65_536_000  # ids are ms << 16: one second of trades to a page
MS16_PAGE_FACTOR_MAX: Final = 10
COMMIT_LOG_LAG_S: Final = 15.0  # what Cassandra may lose with the power: 1.5 times the period of its commit log sync
SHOWN_LENGTH_MAX: Final = 80


class ConfigError(SidecarError):
    """The configuration can't be used: exit 78. `mistakes` holds every one, a line each."""

    exit_code = 78

    def __init__(self, source: str, mistakes: Sequence[str]) -> None:
        """Take where the configuration came from and all that is wrong with it."""
        assert mistakes, "nothing is wrong"
        if len(mistakes) == 1:
            super().__init__(f"{source}: {mistakes[0]}")
        else:
            super().__init__(f"{source}: {len(mistakes)} mistakes\n" + "\n".join(f"  {line}" for line in mistakes))
        self.mistakes = tuple(mistakes)


# --- rules: what is allowed -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a key may be: `allowed` completes "allowed is …"; `take` gives the value to use or raises ValueError.

    `read` gives what a text (of the environment, of `--set`) stands for, or raises ValueError.
    """

    allowed: str
    take: Callable[[object], object]
    read: Callable[[str], object] = str


def _number_text(number: int) -> str:
    exponent = number.bit_length()
    if number > I31_MAX - 1 and number in {2**exponent - 1, 2 ** (exponent - 1)}:
        return f"2^{exponent} - 1" if number & 1 else f"2^{exponent - 1}"
    return str(number)


def _integer(least: int, most: int, unit: str = "", why: str = "") -> _Rule:
    def take(value: object) -> int:
        if type(value) is not int or not least <= value <= most:  # a bool is an int to Python, not to money
            raise ValueError
        return value

    def read(text: str) -> int:
        return int(text)

    ends = f"an integer{unit and f' ({unit})'} from {_number_text(least)} to {_number_text(most)}"
    return _Rule(ends + (why and f" ({why})"), take, read)


def _seconds(*, most: float = YEAR_S, zero: str = "") -> _Rule:
    """Give the rule of a duration: above 0, or from 0 where `zero` says what that means."""

    def take(value: object) -> float:
        if type(value) is not int and type(value) is not float:
            raise ValueError
        if not (0 <= value <= most and (value > 0 or zero)):  # also false for nan
            raise ValueError
        return float(value)

    least = f"from 0 ({zero})" if zero else "above 0"
    return _Rule(f"a number of seconds {least}, at most {most:.0f}", take, float)


def _text(allowed: str, check: Callable[[str], bool]) -> _Rule:
    def take(value: object) -> str:
        if not isinstance(value, str) or not value.isprintable() or not check(value):
            raise ValueError
        return value

    return _Rule(allowed, take)


def _name(allowed: str, pattern: str, length_max: int) -> _Rule:
    compiled = re.compile(pattern)
    return _text(
        f"{allowed}, at most {length_max} characters",
        lambda text: len(text) <= length_max and compiled.fullmatch(text) is not None,
    )


def _choice(*options: str) -> _Rule:
    return _text(" or ".join(f'"{option}"' for option in options), lambda text: text in options)


def _path(*, optional: bool = False) -> _Rule:
    def take(value: object) -> Path | None:
        if optional and value == "":
            return None
        if not isinstance(value, str) or not value or not value.isprintable() or value.startswith("~"):
            raise ValueError
        return Path(value)

    return _Rule("the path of a file (~ is not expanded)" + (', or "" for none' if optional else ""), take)


def _paths() -> _Rule:
    one = _path()

    def take(value: object) -> tuple[object, ...]:
        if not isinstance(value, list):
            raise ValueError  # noqa: TRY004 - as every rule
        return tuple(one.take(path) for path in value)

    return _Rule("a list of paths of files (~ is not expanded), [] for none", take, _parts)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")] if text.strip() else []


def _optional_text(allowed: str) -> _Rule:
    def take(value: object) -> str | None:
        if not isinstance(value, str) or not value.isprintable():
            raise ValueError
        return value or None

    return _Rule(f'{allowed}, or "" for none', take)


def _is_host(text: str) -> bool:
    if re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?", text):
        return True
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_host_and_port(text: str, port_least: int = 1) -> bool:
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:  # an IPv6 address without brackets: which colon is the port's?
        return False
    whole = colon == ":" and _is_host(host) and re.fullmatch(r"[0-9]{1,5}", port) is not None
    return whole and port_least <= int(port) <= PORT_MAX


def _is_endpoint(text: str) -> bool:
    scheme, separator, rest = text.partition("://")
    if not separator:
        return False
    if scheme == "ipc":
        return 0 < len(rest.encode()) <= IPC_PATH_BYTES_MAX
    return scheme == "tcp" and _is_host_and_port(rest)


def _is_on_this_host(endpoint: str) -> bool:
    scheme, _, rest = endpoint.partition("://")
    return scheme == "ipc" or is_loopback(rest.rpartition(":")[0].strip("[]"))


def _hosts() -> _Rule:
    def take(value: object) -> tuple[str, ...]:
        if not isinstance(value, list) or not value:
            raise ValueError
        if not all(isinstance(host, str) and _is_host(host) for host in value) or len(set(value)) < len(value):
            raise ValueError
        return tuple(value)

    return _Rule("a list of different host names or addresses, at least one, without ports", take, _parts)


def host_and_port(listen: str) -> tuple[str, int]:
    """Take HOST:PORT apart; an IPv6 address loses its brackets."""
    host, _, port = listen.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Say whether an address, or a name whatever a name server says, means this host and nothing else."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


_ENDPOINT: Final = _text(
    f"tcp://HOST:PORT, or ipc://PATH with a path of at most {IPC_PATH_BYTES_MAX} bytes", _is_endpoint
)
_LISTEN: Final = _text(
    'HOST:PORT (port 0: any free one), or "" for off', lambda text: not text or _is_host_and_port(text, port_least=0)
)
_TOPIC: Final = _text(
    f"a text of 1 to {TOPIC_BYTES_MAX} bytes", lambda text: 1 <= len(text.encode(errors="replace")) <= TOPIC_BYTES_MAX
)
_LOWER_NAME: Final = _name("a name [a-z][a-z0-9_]*", r"[a-z][a-z0-9_]*", NAME_LENGTH_MAX)
_PORT: Final = _integer(1, PORT_MAX)


def _key(rule: _Rule, default: Any = MISSING) -> Any:
    """Make the field of one key; without a default it must be given."""
    return field(default=default, metadata={"rule": rule})


# --- sections: the contract's names and defaults ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSection:
    """What is settled: the engine's sequence under its name."""

    name: str = _key(_name("a name of letters, digits, `_`, `.`, `-`", r"[A-Za-z0-9_.-]+", STREAM_LENGTH_MAX), "main")
    first_sequence: int = _key(_integer(1, I63_MAX), 1)
    on_gap: str = _key(_choice("halt", "record"), "halt")
    gap_after_s: float = _key(_seconds(most=DAY_S), 5.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSection:
    """Where the engine publishes, and the bounds of what is held of it before it is on the tape."""

    endpoint: str = _key(_ENDPOINT, "tcp://127.0.0.1:5557")
    topic: str = _key(_TOPIC, "settlement")
    receive_hwm_frames: int = _key(_integer(1, I31_MAX, "frames"), 500_000)
    receive_buffer_bytes: int = _key(_integer(4_096, I31_MAX, "bytes"), 8_388_608)
    frame_bytes_max: int = _key(_integer(FRAME_BYTES_MAX_LEAST, 67_108_864, "bytes"), 1_048_576)
    silence_s: float = _key(_seconds(most=DAY_S, zero="off"), 10.0)
    curve_server_key_file: Path | None = _key(_path(optional=True), None)
    curve_key_file: Path | None = _key(_path(optional=True), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySection:
    """Who serves the past."""

    endpoint: str = _key(_ENDPOINT)
    timeout_s: float = _key(_seconds(most=3_600.0), 1.0)
    retry_backoff_max_s: float = _key(_seconds(most=3_600.0), 5.0)
    curve_server_key_file: Path | None = _key(_path(optional=True), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayServerSection:
    """Where this tape's past is served to others."""

    endpoint: str = _key(_ENDPOINT)
    answers_per_s_max: int = _key(_integer(1, 10_000, "answers"), 50)
    curve_key_file: Path | None = _key(_path(optional=True), None)
    curve_client_key_files: tuple[Path, ...] = _key(_paths(), ())


@dataclass(frozen=True, slots=True, kw_only=True)
class TapeSection:
    """The log on disk."""

    path: Path = _key(_path(), Path("tape.db"))
    size_bytes_max: int = _key(_integer(65_536, I63_MAX, "bytes"), 10_737_418_240)
    retention_s: float = _key(_seconds(zero="until durable"), 3_600.0)
    turn_frames_max: int = _key(_integer(1, 1_000_000, "frames"), 2_000)
    turn_min_s: float = _key(_seconds(most=1.0, zero="at once"), 0.002)
    memory_events_max: int = _key(_integer(1, 10_000_000, "events"), 20_000)
    malformed_kept_max: int = _key(_integer(1, 10_000_000, "frames"), 10_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class SqliteSection:
    """The embedded store."""

    path: Path = _key(_path(), Path("settlement.db"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CassandraSection:
    """The Cassandra or ScyllaDB store."""

    contact_points: tuple[str, ...] = _key(_hosts(), ("127.0.0.1",))
    port: int = _key(_PORT, 9_042)
    local_dc: str = _key(_text("the name of a datacenter", bool), "datacenter1")
    keyspace: str = _key(_name("a name [a-z][a-z0-9_]*", r"[a-z][a-z0-9_]*", TABLE_NAME_LENGTH_MAX), "trading")
    replication_factor: int = _key(_integer(1, 100), 1)
    batch: str = _key(_choice("logged", "unlogged"), "logged")
    request_timeout_s: float = _key(_seconds(most=3_600.0), 10.0)
    username: str | None = _key(_optional_text("a role's name"), None)
    password_file: Path | None = _key(_path(optional=True), None)
    tls_ca_file: Path | None = _key(_path(optional=True), None)
    tls_cert_file: Path | None = _key(_path(optional=True), None)
    tls_key_file: Path | None = _key(_path(optional=True), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSection:
    """Where settled rows go: `backend` says which of the two."""

    backend: str = _key(_choice("sqlite", "cassandra"), "sqlite")
    sqlite: SqliteSection = field(default_factory=SqliteSection, metadata={"section": SqliteSection})
    cassandra: CassandraSection = field(default_factory=CassandraSection, metadata={"section": CassandraSection})


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSection:
    """How batches are made and sent."""

    batch_trades_max: int = _key(_integer(1, 10_000, "trades"), 32)
    batch_bytes_max: int = _key(_integer(1, 16_777_216, "bytes"), 12_288)
    inflight_batches_max: int = _key(_integer(1, 1_024, "batches"), 32)
    durable_after_s: float = _key(_seconds(most=DAY_S), 20.0)
    accounts_max: int = _key(_integer(ACCOUNTS_MAX_LEAST, 1_000_000_000, "accounts"), 2_000_000)
    shutdown_timeout_s: float = _key(_seconds(most=DAY_S), 20.0)
    retry_backoff_max_s: float = _key(_seconds(most=3_600.0), 2.0)
    ack_log: Path | None = _key(_path(optional=True), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class AssetSection:
    """An asset: its id on the wire, and how many decimals stand behind the point of a whole unit."""

    id: int = _key(_integer(0, I31_MAX))
    decimals: int = _key(
        _integer(0, DECIMALS_MAX, why="with more, one whole unit in smallest ones would not fit 2^63 - 1")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SymbolSection:
    """A traded pair; the section's name is part of its table's name."""

    base: str = _key(_LOWER_NAME)
    quote: str = _key(_LOWER_NAME)
    price_decimals: int = _key(_integer(0, DECIMALS_MAX))
    quote_amount: str = _key(_choice("scaled", "raw"), "scaled")
    trade_id_time: str = _key(_choice("none", "ms16"), "none")
    page_width: int = _key(_integer(1, 2**62, "trade ids"), 10_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeesSection:
    """Who gets the fees."""

    revenue_user_id: int = _key(_integer(0, I63_MAX), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminSection:
    """The endpoint for health, metrics and the status page; `listen` is "" when off."""

    listen: str = _key(_LISTEN, "127.0.0.1:9464")
    token_file: Path | None = _key(_path(optional=True), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconcileSection:
    """The periodic proof of the ledger; `interval_s` is 0 when off."""

    interval_s: float = _key(_seconds(zero="off"), 3_600.0)
    rate_rows_s: int = _key(_integer(0, I31_MAX, "rows a second, 0: no bound"), 2_500)
    path: Path | None = _key(_path(optional=True), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole and valid configuration. `warnings` are for people: it works, but probably not as meant."""

    stream: StreamSection = field(default_factory=StreamSection, metadata={"section": StreamSection})
    engine: EngineSection = field(default_factory=EngineSection, metadata={"section": EngineSection})
    replay: ReplaySection | None = field(default=None, metadata={"section": ReplaySection})
    replay_server: ReplayServerSection | None = field(default=None, metadata={"section": ReplayServerSection})
    tape: TapeSection = field(default_factory=TapeSection, metadata={"section": TapeSection})
    store: StoreSection = field(default_factory=StoreSection, metadata={"section": StoreSection})
    pipeline: PipelineSection = field(default_factory=PipelineSection, metadata={"section": PipelineSection})
    assets: Mapping[str, AssetSection] = field(default_factory=dict, metadata={"table_of": AssetSection})
    symbols: Mapping[str, SymbolSection] = field(default_factory=dict, metadata={"table_of": SymbolSection})
    fees: FeesSection = field(default_factory=FeesSection, metadata={"section": FeesSection})
    admin: AdminSection = field(default_factory=AdminSection, metadata={"section": AdminSection})
    reconcile: ReconcileSection = field(default_factory=ReconcileSection, metadata={"section": ReconcileSection})
    warnings: tuple[str, ...] = ()

    def rules(self) -> dict[str, Any]:
        """Give what changes results, as it stands in the decision log (design.md, Decisions)."""
        return {
            "assets": {name: asdict(asset) for name, asset in self.assets.items()},
            "symbols": {name: asdict(symbol) for name, symbol in self.symbols.items()},
            "revenue_user_id": self.fees.revenue_user_id,
        }


# --- reading ----------------------------------------------------------------------------------------------------------


def find(path: Path | None = None) -> Path:
    """Give the configuration file to use: the one named, else the first of PLACES that is there.

    Raises ConfigError that tells how to begin when there is none.
    """
    if path is not None:
        if not path.is_file():
            raise ConfigError(str(path), [f"there is no such file; {_how_to_begin(path)}"])
        return path
    for place in PLACES:
        if place.is_file():
            return place
    places = " nor ".join(f"./{place}" if not place.is_absolute() else str(place) for place in PLACES)
    raise ConfigError(
        "no configuration",
        [f"neither {places} is there, and no other was named with --config FILE; {_how_to_begin(PLACES[0])}"],
    )


def load(path: Path | None = None, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> Config:
    """Read the configuration at `path` (see `find`), `environ` over it, `overrides` ("section.key=value") over both.

    Raises ConfigError that names every mistake.
    """
    place = find(path)
    try:
        text = place.read_bytes().decode()
    except OSError as error:
        raise ConfigError(str(place), [f"can't be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            str(place), [f"is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}"]
        ) from error
    return parse(text, overrides, environ, source=str(place))


def parse(
    text: str, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None, *, source: str = "configuration"
) -> Config:
    """Read a configuration's text; as `load`, with `source` for the messages, and no environment unless it is given.

    Raises ConfigError that names every mistake.
    """
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers and nesting that Python refuses to read
        raise ConfigError(source, [f"is not TOML: {error}"]) from error
    reading = _Reading()
    reading.take_file(data)
    reading.take_environment(environ or {})
    reading.take_overrides(overrides)
    config = reading.config()
    if reading.mistakes:
        raise ConfigError(source, reading.mistakes)
    return config


def example() -> str:
    """Give the commented sample file: every key with its meaning, unit and default."""
    return example_path().read_text(encoding="utf-8")


def example_path() -> Path:
    """Say where the sample file lies, for people who copy it."""
    return Path(__file__).with_name("sample.toml")


def secret_path(path: Path) -> Path:
    """Say where a secret's file is: a bare name is looked for among systemd's credentials, then in its usual folder."""
    if len(path.parts) > 1:
        return path
    handed_on = os.environ.get("CREDENTIALS_DIRECTORY")
    # LoadCredential=sidecar:FOLDER hands on each file of the folder as sidecar_NAME (systemd.exec(5)).
    places = [Path(handed_on) / path, Path(handed_on) / f"sidecar_{path}"] if handed_on else []
    places += [path, CREDENTIALS / path]
    return next((place for place in places if place.is_file()), path)


def read_secret(path: Path, key: str) -> str:
    """Read the secret that the configuration names at `key`; line ends around it are not part of it.

    Raises ConfigError when it can't be read or is empty; never shows what it read.
    """
    path = secret_path(path)
    try:
        secret = path.read_text(encoding="utf-8").strip("\r\n")
    except OSError as error:
        raise ConfigError(key, [f"{path}: can't be read: {error.strerror}"]) from error
    except UnicodeDecodeError:
        raise ConfigError(key, [f"{path}: is not UTF-8 text"]) from None
    if not secret:
        raise ConfigError(key, [f"{path}: is empty; the secret belongs in there"])
    return secret


def as_dict(config: Config) -> dict[str, Any]:
    """Give the configuration in its file's shape, for JSON: paths are texts, what is absent is None.

    It holds no secret: files are named, never read.
    """
    shape: dict[str, Any] = _plain(asdict(replace(config, warnings=())))
    del shape["warnings"]
    return shape


def as_toml(config: Config) -> str:
    """Give the configuration as the text of a file: all of it, defaults too, so that it may be loaded again.

    It holds no secret: files are named, never read.
    """
    lines: list[str] = []

    def write(path: str, table: dict[str, Any]) -> None:
        keys = {key: value for key, value in table.items() if not isinstance(value, dict)}
        if keys:
            lines.extend(["", f"[{path}]"] if lines else [f"[{path}]"])
            lines.extend(f"{key} = {_toml(value)}" for key, value in keys.items())
        for key, value in table.items():
            if isinstance(value, dict):
                write(f"{path}.{key}", value)

    for section, table in as_dict(config).items():
        if table is not None:
            write(section, table)
    return "\n".join(lines) + "\n"


# --- the reading of one configuration ---------------------------------------------------------------------------------

_Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Given:
    """A value that somebody gave: as it stands, and where it came from unless that is the file."""

    value: object
    origin: str = ""
    is_text: bool = False


class _Reading:
    """One reading: gathers what was given, later over earlier, and every mistake; then builds the sections."""

    def __init__(self) -> None:
        self.mistakes: list[str] = []
        self._given: dict[_Path, _Given] = {}
        self._tables: dict[str, dict[str, None]] = {"assets": {}, "symbols": {}}  # their names, in order
        self._present: set[str] = set()  # sections that somebody named: some are absent unless they are
        self._wrong: set[_Path] = set()  # keys that have a mistake or are missing

    # what was given

    def take_file(self, data: dict[str, object]) -> None:
        """Take the file's tables."""
        for section, value in data.items():
            self._take_table((section,), value)

    def _take_table(self, path: _Path, value: object) -> None:
        shape = _shape(path)
        if shape is None:
            self._unknown(path, "")
        elif isinstance(shape, _Rule):
            self._given[path] = _Given(value)
        elif not isinstance(value, dict):
            self.mistakes.append(f"{_dotted(path)} = {_shown(value)}: allowed is a table, [{_dotted(path)}]")
        else:
            self._enter(path)
            for key, inner in value.items():
                self._take_table((*path, key), inner)

    def take_environment(self, environ: Mapping[str, str]) -> None:
        """Take what the environment sets: SIDECAR_SECTION__KEY."""
        for name in sorted(environ):
            if name.startswith(ENVIRONMENT_PREFIX) and "__" in name:
                path = tuple(name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"))
                self._take_text(path, environ[name], f"environment {name}")

    def take_overrides(self, overrides: Sequence[str]) -> None:
        """Take what the command line sets: section.key=value."""
        for override in overrides:
            name, equals, text = override.partition("=")
            if not equals:
                self.mistakes.append(f"--set {_shown(override)}: allowed is section.key=value")
            else:
                self._take_text(tuple(name.strip().split(".")), text.strip(), "--set")

    def _take_text(self, path: _Path, text: str, origin: str) -> None:
        shape = _shape(path)
        if isinstance(shape, _Rule):
            for length in range(1, len(path)):
                self._enter(path[:length])
            self._given[path] = _Given(text, origin, is_text=True)
        elif shape is None:
            self._unknown(path, origin)
        else:
            self.mistakes.append(f"{_dotted(path)} (from {origin}): is a section; allowed is one of its keys: {shape}")

    def _enter(self, path: _Path) -> None:
        if path[0] in self._tables and len(path) == 2:
            self._tables[path[0]][path[1]] = None
        self._present.add(path[0])

    def _unknown(self, path: _Path, origin: str) -> None:
        """Name what is unknown of a path, without its value, which may be a secret in a wrong place."""
        length = next(length for length in range(1, len(path) + 1) if not isinstance(_shape(path[:length]), str))
        section, key = path[: length - 1], path[length - 1]
        where = _dotted((*section, key)) + (origin and f" (from {origin})")
        if isinstance(_shape((*section, key)), _Rule):
            self.mistakes.append(f"{where}: is a single value; nothing is allowed below it")
            return
        known = _keys_below(section)
        near = [_dotted((*section, other)) for other in difflib.get_close_matches(key, known, n=1, cutoff=0.6)]
        near += [other for other in _all_keys() if other.rpartition(".")[2] == key]
        hint = f"did you mean {near[0]}? " if near else ""
        what = "key" if section else "section"
        self.mistakes.append(f"{where}: unknown {what}; {hint}Allowed here: {', '.join(known)}")

    # what it comes to

    def config(self) -> Config:
        """Build all sections; what has a mistake keeps its default, so that the rest is checked too."""
        parts: dict[str, Any] = {}
        for part in fields(Config):
            if "table_of" in part.metadata:
                parts[part.name] = self._table(part.name, part.metadata["table_of"])
            elif part.default is None and part.name not in self._present:
                parts[part.name] = None
            elif "section" in part.metadata:
                parts[part.name] = self._section((part.name,), part.metadata["section"])
        config = Config(**parts)
        self._check_replay(config)
        self._check_store(config)
        self._check_admin(config.admin)
        self._check_keys(config)
        self._check_rules(config)
        return replace(config, warnings=tuple(_warnings(config)))

    def _table(self, name: str, kind: type[Any]) -> dict[str, Any]:
        names = self._tables[name]
        if not names:
            self.mistakes.append(f"{name}: none given; at least one section [{name}.NAME] is needed")
        for entry in names:
            if not _is_allowed(_LOWER_NAME, entry):
                self.mistakes.append(f"{_dotted((name, entry))}: allowed is {_LOWER_NAME.allowed}, after `{name}.`")
        return {entry: self._section((name, entry), kind) for entry in names}

    def _section(self, path: _Path, kind: type[Any]) -> Any:
        values: dict[str, Any] = {}
        for key in fields(kind):
            if "section" in key.metadata:
                values[key.name] = self._section((*path, key.name), key.metadata["section"])
            else:
                values[key.name] = self._value((*path, key.name), key)
        return kind(**values)

    def _value(self, path: _Path, key: Field[Any]) -> Any:
        rule: _Rule = key.metadata["rule"]
        given = self._given.get(path)
        if given is None:
            if key.default is not MISSING:
                return key.default
            self.mistakes.append(f"{_dotted(path)}: missing; needed is {rule.allowed}")
            self._wrong.add(path)
            return None
        try:
            value = rule.read(given.value) if given.is_text and isinstance(given.value, str) else given.value
            return rule.take(value)
        except ValueError:
            origin = given.origin and f" (from {given.origin})"
            self.mistakes.append(f"{_dotted(path)} = {_shown(given.value)}{origin}: allowed is {rule.allowed}")
            self._wrong.add(path)
            return None if key.default is MISSING else key.default

    # what must agree

    def _check_replay(self, config: Config) -> None:
        asked, served = config.replay, config.replay_server
        if asked and served and ("replay", "endpoint") not in self._wrong and asked.endpoint == served.endpoint:
            self.mistakes.append(
                f"replay.endpoint = {_shown(asked.endpoint)}: is replay_server.endpoint too, so this sidecar would ask "
                "itself; allowed is somebody else's"
            )

    def _check_store(self, config: Config) -> None:
        if config.store.backend == "sqlite" and _same_file(config.tape.path, config.store.sqlite.path):
            self.mistakes.append(
                f"store.sqlite.path = {_shown(str(config.store.sqlite.path))}: is the tape's file too (tape.path); "
                "allowed is a file of its own"
            )
        cassandra = config.store.cassandra
        for one, other in (
            ("username", "password_file"),
            ("password_file", "username"),
            ("tls_cert_file", "tls_key_file"),
            ("tls_key_file", "tls_cert_file"),
            ("tls_cert_file", "tls_ca_file"),
        ):
            if getattr(cassandra, one) is not None and getattr(cassandra, other) is None:
                self.mistakes.append(
                    f"store.cassandra.{one} = {_shown(str(getattr(cassandra, one)))}: "
                    f"allowed is only together with store.cassandra.{other}"
                )
        accounts_least = ACCOUNTS_A_TRADE_MAX * config.pipeline.batch_trades_max
        if config.pipeline.accounts_max < accounts_least:
            self.mistakes.append(
                f"pipeline.accounts_max = {config.pipeline.accounts_max}: allowed is at least {accounts_least}, "
                f"{ACCOUNTS_A_TRADE_MAX} for each trade of a batch (pipeline.batch_trades_max)"
            )

    def _check_admin(self, admin: AdminSection) -> None:
        if admin.listen and admin.token_file is None and not is_loopback(host_and_port(admin.listen)[0]):
            self.mistakes.append(
                f"admin.listen = {_shown(admin.listen)}: others can reach it; allowed without admin.token_file is a "
                "loopback address, such as 127.0.0.1:9464"
            )

    def _check_keys(self, config: Config) -> None:
        own = config.engine.curve_key_file
        servers = {"engine.curve_server_key_file": config.engine.curve_server_key_file}
        if config.replay is not None:
            servers["replay.curve_server_key_file"] = config.replay.curve_server_key_file
        named = {key: file for key, file in servers.items() if file is not None}
        for key, file in named.items():
            if own is None:
                self.mistakes.append(
                    f"{key} = {_shown(str(file))}: allowed is only together with engine.curve_key_file"
                )
        served = config.replay_server
        if served is not None and served.curve_client_key_files and served.curve_key_file is None:
            some = _shown([str(file) for file in served.curve_client_key_files])
            self.mistakes.append(
                f"replay_server.curve_client_key_files = {some}: allowed is only together with "
                "replay_server.curve_key_file"
            )
        if own is not None and not named:
            self.mistakes.append(
                f"engine.curve_key_file = {_shown(str(own))}: allowed is only together with {' or '.join(servers)}"
            )

    def _check_rules(self, config: Config) -> None:
        ids: dict[int, str] = {}
        for name, asset in config.assets.items():
            if ("assets", name, "id") not in self._wrong and ids.setdefault(asset.id, name) != name:
                self.mistakes.append(
                    f"assets.{name}.id = {asset.id}: is the id of assets.{ids[asset.id]} too; allowed is one of its own"
                )
        pairs: dict[tuple[str, str], str] = {}
        for name, symbol in config.symbols.items():
            good = [side for side in ("base", "quote") if ("symbols", name, side) not in self._wrong]
            for side in good:
                asset_name = getattr(symbol, side)
                if asset_name not in config.assets:
                    self.mistakes.append(
                        f"symbols.{name}.{side} = {_shown(asset_name)}: no such asset; "
                        f"allowed is one of: {', '.join(config.assets) or 'none is configured'}"
                    )
            if len(good) < 2:
                continue
            if symbol.base == symbol.quote:
                self.mistakes.append(
                    f"symbols.{name}.quote = {_shown(symbol.quote)}: is the base too; allowed is another asset"
                )
            elif pairs.setdefault((symbol.base, symbol.quote), name) != name:
                self.mistakes.append(
                    f"symbols.{name}: trades {symbol.base}/{symbol.quote}, as "
                    f"symbols.{pairs[symbol.base, symbol.quote]} does; allowed is one symbol for each pair"
                )


def _warnings(config: Config) -> Iterator[str]:
    for name, symbol in config.symbols.items():
        ratio = symbol.page_width / MS16_PAGE_WIDTH
        if symbol.trade_id_time == "ms16" and not 1 / MS16_PAGE_FACTOR_MAX <= ratio <= MS16_PAGE_FACTOR_MAX:
            yield (
                f'symbols.{name}.page_width = {symbol.page_width}: with trade_id_time = "ms16" a page holds '
                f"{symbol.page_width / MS16_PAGE_WIDTH:.3g} s of trades; {MS16_PAGE_WIDTH} is one second. "
                "It can't be changed once trades are settled"
            )
    engine, cassandra = config.engine, config.store.cassandra
    if engine.curve_server_key_file is None and not _is_on_this_host(engine.endpoint):
        yield (
            f"engine.endpoint = {_shown(engine.endpoint)}: without CURVE, whoever sits on the way there can read every "
            "trade and invent his own; `sidecar keygen` makes the keys for engine.curve_server_key_file"
        )
    away = [host for host in cassandra.contact_points if not _is_on_this_host(f"tcp://{host}:{cassandra.port}")]
    if config.store.backend == "cassandra" and cassandra.username and cassandra.tls_ca_file is None and away:
        yield (
            f"store.cassandra.username = {_shown(cassandra.username)}: without store.cassandra.tls_ca_file the "
            f"password goes to {_shown(away[0])} as it is"
        )
    if config.store.backend == "cassandra" and config.pipeline.durable_after_s < COMMIT_LOG_LAG_S:
        yield (
            f"pipeline.durable_after_s = {config.pipeline.durable_after_s:g}: with its usual commit log Cassandra may "
            f"lose the acknowledged writes of its last {COMMIT_LOG_LAG_S:g} s with the power; below that, a restart "
            "may begin after writes that are gone"
        )


# --- the shape of the file --------------------------------------------------------------------------------------------


def _shape(path: _Path) -> _Rule | str | None:
    """Give a key's rule, a section's keys in words, or None for what is unknown."""
    kind: type[Any] = Config
    position = 0
    while position < len(path):
        found = next((part for part in fields(kind) if part.name == path[position] and part.metadata), None)
        if found is None:
            return None
        position += 1
        if "rule" in found.metadata:
            rule: _Rule = found.metadata["rule"]
            return rule if position == len(path) else None
        if "table_of" in found.metadata:
            kind = found.metadata["table_of"]
            if position == len(path):
                return f"{found.name}.NAME.({'|'.join(_keys(kind))})"
            position += 1
        else:
            kind = found.metadata["section"]
    return ", ".join(_dotted((*path, key)) for key in _keys(kind))


def _keys(kind: type[Any]) -> list[str]:
    return [part.name for part in fields(kind) if part.metadata]


def _keys_below(path: _Path) -> list[str]:
    kind: type[Any] = Config
    for index, name in enumerate(path):
        if index == 1 and path[0] in {"assets", "symbols"}:
            continue
        part = next(part for part in fields(kind) if part.name == name)
        kind = part.metadata.get("section") or part.metadata["table_of"]
    return _keys(kind)


def _all_keys(kind: type[Any] = Config, path: _Path = ()) -> Iterator[str]:
    for part in fields(kind):
        if "rule" in part.metadata:
            yield _dotted((*path, part.name))
        elif "table_of" in part.metadata:
            yield from _all_keys(part.metadata["table_of"], (*path, part.name, "NAME"))
        elif "section" in part.metadata:
            yield from _all_keys(part.metadata["section"], (*path, part.name))


def _is_allowed(rule: _Rule, value: object) -> bool:
    try:
        rule.take(value)
    except ValueError:
        return False
    return True


def _same_file(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _how_to_begin(path: Path) -> str:
    return (
        f"to begin, copy the commented sample and edit it: cp {example_path()} {path} "
        "(`sidecar demo` needs no configuration)"
    )


# --- values for people ------------------------------------------------------------------------------------------------


def _dotted(path: _Path) -> str:
    return ".".join(name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name) for name in path)


def _shown(value: object) -> str:
    """Show a value as its file would, cut when it is long."""
    if isinstance(value, int) and value.bit_length() > 256:  # too long a text for Python to write
        text = f"an integer of {value.bit_length()} bits"
    elif isinstance(value, bool | str | int) or (isinstance(value, float) and math.isfinite(value)):
        text = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, list):
        text = "[" + ", ".join(_shown(item) for item in value) + "]"
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{key} = {_shown(item)}" for key, item in value.items()) + "}"
    else:
        text = str(value)
    text = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    return text if len(text) <= SHOWN_LENGTH_MAX else text[: SHOWN_LENGTH_MAX - 1] + "…"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _toml(value: object) -> str:
    """Write a value of `as_dict` as TOML; an absent one as "", which reads back as absent."""
    if value is None:
        return '""'
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, int):
        return f"{value:_}"
    return json.dumps(value, ensure_ascii=False)
