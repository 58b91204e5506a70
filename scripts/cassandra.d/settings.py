"""What a node is told: cassandra.yaml, logback.xml and the arguments of its JVM, from what was asked for.

A test node is small and quick to start (serial collector, first compiler tier only); a benchmark node is what a server
would be.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import certificates

TEST_HEAP, BENCH_HEAP = "512M", "2G"
# Measured (ARCHITECTURE.md, Chosen from sweeps): what outlives one collection waits in a memtable for minutes; G1 would
# copy it at each of the next fifteen.
BENCH_PAUSES = ["-XX:MaxGCPauseMillis=50", "-XX:MaxTenuringThreshold=1"]

# The distribution's jvm17-server.options; nodetool needs it too.
OPEN_MODULES = """\
-Djdk.attach.allowAttachSelf=true
--add-exports java.base/jdk.internal.misc=ALL-UNNAMED
--add-exports java.base/jdk.internal.ref=ALL-UNNAMED
--add-exports java.base/sun.nio.ch=ALL-UNNAMED
--add-exports java.base/java.lang.ref=ALL-UNNAMED
--add-exports java.management.rmi/com.sun.jmx.remote.internal.rmi=ALL-UNNAMED
--add-exports java.rmi/sun.rmi.registry=ALL-UNNAMED
--add-exports java.rmi/sun.rmi.server=ALL-UNNAMED
--add-exports java.rmi/sun.rmi.transport.tcp=ALL-UNNAMED
--add-exports java.sql/java.sql=ALL-UNNAMED
--add-exports jdk.unsupported/sun.misc=ALL-UNNAMED
--add-exports jdk.attach/sun.tools.attach=ALL-UNNAMED
--add-exports jdk.compiler/com.sun.tools.javac.file=ALL-UNNAMED
--add-opens java.base/java.lang.module=ALL-UNNAMED
--add-opens java.base/jdk.internal.loader=ALL-UNNAMED
--add-opens java.base/jdk.internal.ref=ALL-UNNAMED
--add-opens java.base/jdk.internal.reflect=ALL-UNNAMED
--add-opens java.base/jdk.internal.math=ALL-UNNAMED
--add-opens java.base/jdk.internal.module=ALL-UNNAMED
--add-opens java.base/jdk.internal.util.jar=ALL-UNNAMED
--add-opens jdk.management/com.sun.management.internal=ALL-UNNAMED
--add-opens java.base/sun.nio.ch=ALL-UNNAMED
--add-opens java.base/java.io=ALL-UNNAMED
--add-opens java.base/java.lang=ALL-UNNAMED
--add-opens java.base/java.lang.reflect=ALL-UNNAMED
--add-opens java.base/java.nio=ALL-UNNAMED
--add-opens java.base/java.util=ALL-UNNAMED
--add-opens java.base/java.util.concurrent=ALL-UNNAMED
--add-opens java.base/java.util.concurrent.atomic=ALL-UNNAMED
--add-opens java.rmi/sun.rmi.transport.tcp=ALL-UNNAMED
--add-opens jdk.compiler/com.sun.tools.javac=ALL-UNNAMED
-Dio.netty.tryReflectionSetAccessible=true
-Dio.netty.allocator.useCacheForAllThreads=true
-Dio.netty.allocator.maxOrder=11
"""

LOGBACK = """\
<configuration scan="false">
  <appender name="FILE" class="ch.qos.logback.core.rolling.RollingFileAppender">
    <file>${sidecar.log}</file>
    <rollingPolicy class="ch.qos.logback.core.rolling.FixedWindowRollingPolicy">
      <fileNamePattern>${sidecar.log}.%i</fileNamePattern>
      <maxIndex>2</maxIndex>
    </rollingPolicy>
    <triggeringPolicy class="ch.qos.logback.core.rolling.SizeBasedTriggeringPolicy">
      <maxFileSize>20MB</maxFileSize>
    </triggeringPolicy>
    <encoder>
      <pattern>%-5level %date{ISO8601} %-20.40thread %logger{0}:%line %msg%n</pattern>
    </encoder>
  </appender>
  <root level="INFO">
    <appender-ref ref="FILE"/>
  </root>
</configuration>
"""

# For nodetool, which would else print what Netty says at DEBUG.
LOGBACK_QUIET = '<configuration><root level="OFF"/></configuration>\n'


@dataclass
class Settings:
    """What makes one name: kept in its folder, so that a restart needs the name alone."""

    name: str
    nodes: int = 1
    port: int = 0
    storage_port: int = 0
    jmx_ports: list[int] = field(default_factory=list)
    bench: bool = False
    heap: str = TEST_HEAP
    secure: bool = False
    yaml: dict[str, str] = field(default_factory=dict)
    jvm: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read what `save` wrote."""
        return cls(**json.loads(file.read_text()))

    def save(self, file: Path) -> None:
        """Write, by rename."""
        part = file.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n")
        part.rename(file)

    def host(self, number: int) -> str:
        """Address of node 1, 2, 3 ..."""
        return f"127.0.0.{number}"

    @property
    def tls(self) -> bool:
        """Whether clients have to speak TLS."""
        asked = self.yaml.get("client_encryption_options", "").replace('"', "").replace(" ", "")
        return self.secure or ("enabled:true" in asked and "optional:true" not in asked)


def yaml_text(settings: Settings, number: int, home: Path) -> str:
    """cassandra.yaml of node `number`: ours, with --yaml on top (an empty text removes a key)."""
    host = settings.host(number)
    seed = {"seeds": f"{settings.host(1)}:{settings.storage_port}"}
    ours: dict[str, object] = {
        "cluster_name": f"sidecar {settings.name}",
        "partitioner": "org.apache.cassandra.dht.Murmur3Partitioner",
        "num_tokens": 1,
        # Fixed tokens and no bootstrap: the nodes of a cluster can start at the same time.
        "initial_token": str(-(2**63) + (number - 1) * 2**64 // settings.nodes),
        "auto_bootstrap": False,
        "endpoint_snitch": "SimpleSnitch",
        "seed_provider": [{"class_name": "org.apache.cassandra.locator.SimpleSeedProvider", "parameters": [seed]}],
        "listen_address": host,
        "rpc_address": host,
        "native_transport_port": settings.port,
        "storage_port": settings.storage_port,
        "data_file_directories": [str(home / "data")],
        "commitlog_directory": str(home / "commitlog"),
        "saved_caches_directory": str(home / "saved_caches"),
        "hints_directory": str(home / "hints"),
        "cdc_raw_directory": str(home / "cdc_raw"),
        "commitlog_sync": "periodic",
        "commitlog_sync_period": "10000ms",
        "memtable": {"configurations": {"trie": {"class_name": "TrieMemtable"}, "default": {"inherits": "trie"}}},
        # A kept copy of what was dropped or truncated helps nobody here and takes half of the time of a TRUNCATE.
        "auto_snapshot": False,
        # A batch is refused from 50 KiB on as everywhere; the default warns from 5 KiB on, for each of ours.
        "batch_size_warn_threshold": "49KiB",
    }
    if settings.bench:
        # Measured (ARCHITECTURE.md, Chosen from sweeps): threads beyond two a core only take turns, and rows outside of
        # the collected heap need not be copied at each collection.
        threads = 2 * (os.cpu_count() or 2)
        ours |= dict.fromkeys(("concurrent_reads", "concurrent_writes", "native_transport_max_threads"), threads)
        ours["memtable_allocation_type"] = "offheap_objects"
    if settings.secure:
        ours |= _secure(certificates.Files(home if settings.nodes == 1 else home.parent))
    if settings.yaml.get("commitlog_sync", "periodic") != "periodic":
        del ours["commitlog_sync_period"]  # refused beside `batch` and `group`
    lines = [f"{key}: {json.dumps(value)}" for key, value in ours.items() if key not in settings.yaml]
    lines += [f"{key}: {text}" for key, text in settings.yaml.items() if text]
    return "\n".join(lines) + "\n"


def _secure(files: certificates.Files) -> dict[str, object]:
    """TLS for everybody, passwords and rights. The passwords are of a development node: nobody's secret."""
    return {
        "authenticator": "PasswordAuthenticator",
        "authorizer": "CassandraAuthorizer",
        "role_manager": "CassandraRoleManager",
        "permissions_validity": "200ms",
        "roles_validity": "200ms",
        "client_encryption_options": {
            "enabled": True,
            "optional": False,
            "ssl_context_factory": {"class_name": "org.apache.cassandra.security.PEMBasedSslContextFactory"},
            "keystore": str(files.node),
        },
    }


def identity(home: Path) -> str:
    """The argument that tells this node's process from every other one."""
    return f"-Dcassandra.storagedir={home}"


def jvm_arguments(settings: Settings, number: int, home: Path, archive: Mapping[str, Path]) -> list[str]:
    """Arguments for `java`, class path and main class left out.

    `archive`: {"SharedArchiveFile": path}, or {"ArchiveClassesAtExit": path} to make one, or empty.
    """
    single = settings.nodes == 1
    if settings.bench:
        sizes = [f"-Xms{settings.heap}", "-XX:+UseG1GC", *BENCH_PAUSES, "-XX:+ParallelRefProcEnabled"]
    else:
        sizes = ["-Xms64M", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xss512k"]
    return [
        *(f"-XX:{option}={path}" for option, path in archive.items()),
        *OPEN_MODULES.split(),
        f"-Xmx{settings.heap}",
        *sizes,
        "-XX:+ExitOnOutOfMemoryError",
        "-XX:-UsePerfData",
        "-Xshare:auto",
        "-Xlog:disable",
        "-Xlog:all=error:stderr",
        "-Djava.net.preferIPv4Stack=true",
        f"-Dcassandra.config=file://{home}/cassandra.yaml",
        f"-Dcassandra.jmx.local.port={settings.jmx_ports[number - 1]}",
        "-Dcassandra.skip_wait_for_gossip_to_settle=0",
        f"-Dcassandra.ring_delay_ms={100 if single else 2000}",
        "-Dcassandra.shutdown_announce_in_ms=0",
        "-Dcassandra.superuser_setup_delay_ms=0",
        f"-Dlogback.configurationFile=file://{home}/logback.xml",
        f"-Dsidecar.log={home}/system.log",
        *settings.jvm,
    ]
