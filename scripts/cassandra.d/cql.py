"""CQL for machines without cqlsh: splits statements, runs them with cassandra-driver, prints tables or JSON."""

import base64
import datetime as dt
import decimal
import json
import re
import ssl
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from failures import NodeError

if TYPE_CHECKING:
    from cassandra.cluster import Session

# What a semicolon may hide in, and the semicolon itself. What is not closed runs to the end: the server says what is
# wrong then.
_TOKEN = re.compile(
    r"""
    (?P<comment> (?:--|//)[^\n]* | /\*.*?(?:\*/|\Z) )
    | (?P<quoted> '(?:[^']|'')*(?:'|\Z) | "(?:[^"]|"")*(?:"|\Z) | \$\$.*?(?:\$\$|\Z) )
    | (?P<end> ; )
    """,
    re.VERBOSE | re.DOTALL,
)
_BATCH_OPENS = re.compile(r"\s*BEGIN\s+(?:(?:UNLOGGED|LOGGED|COUNTER)\s+)?BATCH\b", re.IGNORECASE)
_BATCH_CLOSES = re.compile(r"\bAPPLY\s+BATCH\s*\Z", re.IGNORECASE)


def split_statements(text: str) -> list[str]:
    """The statements of a text, without comments, each without its semicolon; a batch is one statement."""
    statements: list[str] = []
    statement, bare = "", ""  # `bare` is the statement without its quoted parts, to see where a batch ends
    at = 0
    for token in _TOKEN.finditer(text):
        statement += text[at : token.start()]
        bare += text[at : token.start()]
        at = token.end()
        if token["comment"] is not None:
            statement += " "
            bare += " "
        elif token["quoted"] is not None:
            statement += token[0]
            bare += "''"
        elif _BATCH_OPENS.match(bare) and not _BATCH_CLOSES.search(bare):
            statement += ";"
            bare += ";"
        else:
            statements.append(statement)
            statement, bare = "", ""
    statements.append(statement + text[at:])
    return [each.strip() for each in statements if each.strip()]


@dataclass(frozen=True)
class Target:
    """Where to connect and as whom."""

    host: str
    port: int
    user: str | None = None
    password: str | None = None
    ca_file: str | None = None
    keyspace: str | None = None
    consistency: str = "LOCAL_ONE"
    timeout_s: float = 60.0


def run(texts: list[str], target: Target, *, as_json: bool) -> None:
    """Run all statements in order and print each result. Raises NodeError with the statement that failed."""
    import logging

    from cassandra.cluster import NoHostAvailable

    logging.getLogger("cassandra").setLevel(logging.CRITICAL)  # its warnings tell again what we say once
    cluster = _cluster(target)
    results: list[dict[str, object]] = []
    try:
        try:
            session: Session = cluster.connect(target.keyspace)
        except NoHostAvailable as error:
            reasons = "; ".join(str(reason) for reason in error.errors.values()) or str(error)
            raise NodeError(
                f"no connection to {target.host}:{target.port}: {reasons}; next: scripts/cassandra status"
            ) from error
        for statement in (each for text in texts for each in split_statements(text)):
            columns, rows = _execute(session, statement)
            if as_json:
                named = [{name: plain(value) for name, value in zip(columns, row, strict=True)} for row in rows]
                results.append({"statement": statement, "columns": columns, "rows": named})
            elif columns:
                print("\n".join(table(columns, rows)), flush=True)
        if as_json:
            print(json.dumps(results))
    finally:
        cluster.shutdown()


def _cluster(target: Target) -> Any:
    from cassandra import ConsistencyLevel
    from cassandra.auth import PlainTextAuthProvider
    from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile
    from cassandra.policies import FallthroughRetryPolicy, WhiteListRoundRobinPolicy
    from cassandra.query import tuple_factory

    if target.consistency not in ConsistencyLevel.name_to_value:
        raise NodeError(f"consistency {target.consistency}; allowed: {', '.join(ConsistencyLevel.name_to_value)}")
    profile = ExecutionProfile(
        load_balancing_policy=WhiteListRoundRobinPolicy([target.host]),
        retry_policy=FallthroughRetryPolicy(),
        consistency_level=ConsistencyLevel.name_to_value[target.consistency],
        request_timeout=target.timeout_s,
        row_factory=tuple_factory,
    )
    return Cluster(
        [target.host],
        port=target.port,
        protocol_version=5,
        execution_profiles={EXEC_PROFILE_DEFAULT: profile},
        auth_provider=PlainTextAuthProvider(target.user, target.password or "") if target.user else None,
        ssl_context=ssl.create_default_context(cafile=target.ca_file) if target.ca_file else None,
        connect_timeout=10,
        schema_metadata_enabled=False,
        token_metadata_enabled=False,
    )


def _execute(session: Any, statement: str) -> tuple[list[str], list[tuple[object, ...]]]:
    try:
        result = session.execute(statement)
        return list(result.column_names or []), list(result)
    except Exception as error:
        # Whatever the driver raises, the person needs the statement beside it.
        shown = " ".join(statement.split())
        shown = shown if len(shown) <= 300 else shown[:300] + " ..."
        raise NodeError(f"{type(error).__name__}: {error}\nin: {shown}") from error


def table(columns: list[str], rows: list[tuple[object, ...]]) -> Iterator[str]:
    """Lines as of cqlsh: heads, a rule, the rows, their number."""
    cells = [[text(value) for value in row] for row in rows]
    widths = [max(len(line[index]) for line in [columns, *cells]) for index in range(len(columns))]
    is_number = [
        all(isinstance(row[index], int | float | decimal.Decimal | None) for row in rows)
        for index in range(len(columns))
    ]
    yield " | ".join(name.ljust(width) for name, width in zip(columns, widths, strict=True)).rstrip()
    yield "-+-".join("-" * width for width in widths)
    for line in cells:
        aligned = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, is_number, strict=True)
        )
        yield " | ".join(aligned).rstrip()
    yield f"({len(rows)} row{'' if len(rows) == 1 else 's'})"


def text(value: object) -> str:
    """A value in one line of a table."""
    if value is None:
        return "null"
    flat = plain(value)
    return (
        flat.replace("\\", "\\\\").replace("\n", "\\n")
        if isinstance(flat, str)
        else json.dumps(flat, ensure_ascii=False)
    )


def plain(value: Any) -> object:
    """A value as JSON can say it: blobs as 0x..., times in ISO 8601 (UTC), ids, decimals and map keys as text."""
    if value is None or isinstance(value, bool | int | str | float):
        return value
    if isinstance(value, bytes | bytearray):
        return "0x" + base64.b16encode(value).decode().lower()
    if isinstance(value, dt.datetime):
        return value.isoformat(timespec="milliseconds") + "Z"
    if isinstance(value, uuid.UUID | decimal.Decimal):
        return str(value)
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(plain(key)): plain(each) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: plain(each) for key, each in value._asdict().items()}
    if isinstance(value, list | tuple | set | frozenset) or type(value).__name__ == "SortedSet":
        return [plain(each) for each in value]
    return str(value)


def read_source(name: str) -> str:
    """A file of statements; `-` is standard input. Raises NodeError."""
    if name == "-":
        return sys.stdin.read()
    try:
        with open(name, encoding="utf-8") as file:  # noqa: PTH123
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise NodeError(f"{name}: {error}") from error
