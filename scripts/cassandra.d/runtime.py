"""What a node is made of: a Java 17, the jars of Cassandra from Maven Central, an archive of their classes.

All of it is made once and kept in `.cassandra/` (which ignores itself in git). Jars and archives appear there by
rename, under a lock, so a start that was interrupted leaves nothing half and two starts at once do not collide.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from failures import NodeError, ToolMissingError

VERSION = "5.0.6"
JAVA_MAJOR = 17
HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
STATE = REPOSITORY / ".cassandra"
JVMS = Path("/usr/lib/jvm")  # where Debian puts them
JARS = STATE / f"jars-{VERSION}"

_HOW_JAVA = (
    f"a Java {JAVA_MAJOR} is missing (Cassandra {VERSION} runs on no newer one)."
    f" Debian 12, Ubuntu: apt install openjdk-{JAVA_MAJOR}-jdk-headless."
    f" Elsewhere: install a JDK {JAVA_MAJOR} and set JAVA_HOME to it."
)
_HOW_MAVEN = "Maven (mvn) is missing; it fetches the jars of Cassandra, once. Debian, Ubuntu: apt install maven."


def say(text: str) -> None:
    """Tell about something slow or unexpected; results go to standard output, this does not."""
    print(text, file=sys.stderr, flush=True)


def state_folder() -> Path:
    """`.cassandra/`, made when missing."""
    STATE.mkdir(exist_ok=True)
    ignore = STATE / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n")
    return STATE


@contextmanager
def locked(name: str, waiting_for: str) -> Iterator[None]:
    """Hold the lock `name`; says what it waits for when another process has it."""
    folder = state_folder() / "locks"
    folder.mkdir(exist_ok=True)
    with (folder / name).open("w") as file:
        for _ in range(20):  # a second, before we speak
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        else:
            say(f"waiting for {waiting_for}, under way in another process")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def java_version(java: Path) -> str | None:
    """Its version as in `17.0.15`, from the `release` file beside it, else by asking it."""
    release = java.resolve().parent.parent / "release"
    if release.is_file():
        found = re.search(r'JAVA_VERSION="([^"]+)"', release.read_text())
    else:
        try:
            asked = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
        except OSError:
            return None
        found = re.search(r'version "([^"]+)"', asked.stderr)
    return found[1] if found else None


def find_java() -> Path:
    """The first Java 17 of JAVA_HOME, PATH, Debian's folder. Raises ToolMissingError."""
    candidates: list[Path] = []
    if home := os.environ.get("JAVA_HOME"):
        candidates.append(Path(home) / "bin" / "java")
    if on_path := shutil.which("java"):
        candidates.append(Path(on_path))
    candidates += sorted(JVMS.glob(f"*{JAVA_MAJOR}*/bin/java"))
    seen = []
    for java in candidates:
        if not java.is_file():
            continue
        version = java_version(java)
        if version and version.split(".")[0] == str(JAVA_MAJOR):
            return java
        seen.append(f"{java} is {version or 'of no known version'}")
    raise ToolMissingError(_HOW_JAVA + (f" Found: {', '.join(seen)}." if seen else ""))


def find_missing() -> str | None:
    """What this machine lacks for a start, in one text, or None."""
    texts = []
    try:
        find_java()
    except ToolMissingError as missing:
        texts.append(str(missing))
    if not JARS.is_dir() and shutil.which("mvn") is None:
        texts.append(_HOW_MAVEN)
    return "\n".join(texts) or None


def check_tools() -> None:
    """Raise ToolMissingError, naming all that is missing at once."""
    if missing := find_missing():
        raise ToolMissingError(missing)


def class_path() -> str:
    """The jars, in an order of their own: the class-data archive is valid for exactly this text."""
    return ":".join(str(jar) for jar in sorted(JARS.glob("*.jar")))


def fetch_jars() -> None:
    """Resolve the jars of `pom.xml` with Maven unless they are here. Raises NodeError."""
    if JARS.is_dir():
        return
    with locked("jars", "the jars"):
        if JARS.is_dir():
            return
        say(f"fetching the jars of Cassandra {VERSION} with Maven (66 MB, once)")
        part = STATE / f"{JARS.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        work = STATE / "maven"
        work.mkdir(exist_ok=True)
        # Maven writes beside its pom, so it gets a copy.
        shutil.copy(HERE / "pom.xml", work / "pom.xml")
        command = ["mvn", "-B", "-q", "-f", str(work / "pom.xml"), "dependency:copy-dependencies"]
        command += ["-DincludeScope=runtime", f"-DoutputDirectory={part}"]
        log = STATE / "maven.log"
        with log.open("w") as output:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False)
        shutil.rmtree(work, ignore_errors=True)
        if done.returncode or not list(part.glob("cassandra-all-*.jar")):
            lines = log.read_text().splitlines()[-12:]
            end = f"Maven could not fetch the jars; its output is in {log}. Is the network there? Start again then."
            raise NodeError("\n".join([*lines, end]))
        part.rename(JARS)


def archive_path(java: Path) -> Path:
    """Where the class-data archive for this Java and these jars is, or would be."""
    key = f"{java_version(java)} {java.resolve()} {class_path()}"
    return STATE / f"classes-{VERSION}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.jsa"
