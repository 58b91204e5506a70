"""Dockerfile and docker-compose.yml, read as far as that goes without Docker: nothing here runs them."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
from typing import Any

import pytest

from bench.world import ROOT

INSTRUCTIONS = {
    *("FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "VOLUME", "HEALTHCHECK", "STOPSIGNAL", "ENTRYPOINT", "CMD"),
    *("ARG", "LABEL", "EXPOSE"),
}
Instruction = tuple[str, str]


def instructions(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile with their arguments, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def faults(text: str, ignore: str) -> list[str]:
    """What a reader would object to."""
    found: list[str] = []
    read = instructions(text)
    found += [f"{word}: not allowed here" for word, _ in read if word not in INSTRUCTIONS]
    stages = [rest for word, rest in read if word == "FROM"]
    names = {stage.split(" AS ")[1] for stage in stages if " AS " in stage}
    if len(stages) < 2:
        found.append("one stage: what builds would be in what runs")
    found += [f"FROM {stage}: without a version" for stage in stages if ":" not in stage or ":latest" in stage]
    last = max(index for index, (word, _) in enumerate(read) if word == "FROM")
    running = read[last:]
    users = [rest for word, rest in running if word == "USER"]
    if not users or users[-1].split(":")[0] in {"root", "0"}:
        found.append("runs as root")
    if not any(word == "HEALTHCHECK" and " CMD " in f" {rest}" for word, rest in running):
        found.append("no healthcheck")
    for word, rest in running:
        if word in {"ENTRYPOINT", "CMD"}:
            try:
                assert all(isinstance(part, str) for part in json.loads(rest))
            except (ValueError, AssertionError):
                found.append(f"{word} {rest}: a shell would keep SIGTERM from the process")
    for word, rest in read:
        if word == "COPY":
            parts = shlex.split(rest)
            origin = [part.removeprefix("--from=") for part in parts if part.startswith("--from=")]
            sources = [part for part in parts[:-1] if not part.startswith("--")]
            if origin and origin[0] not in names:
                found.append(f"COPY {rest}: no stage of that name")
            if not origin:
                found += [f"COPY {rest}: {name} is not in the context" for name in sources if not sent(name, ignore)]
    return found


def sent(name: str, ignore: str) -> bool:
    """Say whether .dockerignore lets a path of the repository through."""
    if name == ".":
        return True
    allowed = (ROOT / name).exists()
    for line in filter(None, (line.strip() for line in ignore.splitlines() if not line.startswith("#"))):
        if fnmatch.fnmatch(name, line.lstrip("!")):
            allowed = line.startswith("!") and (ROOT / name).exists()
    return allowed


DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
IGNORE = (ROOT / ".dockerignore").read_text("utf-8")


def test_the_dockerfile_is_sound() -> None:
    assert faults(DOCKERFILE, IGNORE) == []


@pytest.mark.parametrize(
    "there, instead, fault",
    [
        ("USER sidecar\n", "", "runs as root"),
        ("USER sidecar\n", "USER root\n", "runs as root"),
        ("HEALTHCHECK --interval", "# HEALTHCHECK --interval", "no healthcheck"),
        ('ENTRYPOINT ["sidecar"]', "ENTRYPOINT sidecar", "keep SIGTERM"),
        ("--from=build", "--from=builder", "no stage of that name"),
        ("COPY requirements.lock ./", "COPY requirements.txt ./", "not in the context"),
        ("FROM python:3.11-slim-bookworm\n", "FROM python:latest\n", "without a version"),
        ("WORKDIR /build", "ADD https://example.org/x /build", "ADD: not allowed"),
    ],
)
def test_the_judge_of_dockerfiles_sees_a_fault(there: str, instead: str, fault: str) -> None:
    assert there in DOCKERFILE
    assert fault in "\n".join(faults(DOCKERFILE.replace(there, instead), IGNORE))


def test_what_the_package_is_built_from_is_sent_and_no_more() -> None:
    built_from = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "requirements.lock", "sidecar")
    assert all(sent(name, IGNORE) for name in (*built_from, "bench", "schema", "scripts"))
    assert not any(sent(name, IGNORE) for name in (".git", ".venv", ".cassandra", "tests", "sidecar.toml"))


# --- compose ----------------------------------------------------------------------------------------------------------


def parse(text: str) -> Any:
    """Read the YAML that docker-compose.yml is written in: maps, lists, plain and quoted texts, lists as JSON."""
    lines = [
        (len(line) - len(line.lstrip()), line.strip())
        for line in text.splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    value, rest = _block(lines, lines[0][0])
    assert not rest, f"not understood: {rest[0][1]}"
    return value


def _block(lines: list[tuple[int, str]], indent: int) -> tuple[Any, list[tuple[int, str]]]:
    assert lines[0][0] == indent, f"{lines[0][1]}: indented by {lines[0][0]}, {indent} expected"
    if lines[0][1].startswith("- "):
        items = []
        while lines and lines[0][0] == indent and lines[0][1].startswith("- "):
            items.append(_scalar(lines[0][1][2:]))
            lines = lines[1:]
        return items, lines
    table: dict[str, Any] = {}
    while lines and lines[0][0] == indent:
        key, colon, rest = lines[0][1].partition(":")
        assert colon, f"{lines[0][1]}: no key"
        assert re.fullmatch(r"[a-z_]+", key), f"{key}: no key"
        assert key not in table, f"{key}: twice"
        lines = lines[1:]
        if rest:
            table[key] = _scalar(rest.strip())
        else:
            table[key], lines = _block(lines, lines[0][0])
    return table, lines


def _scalar(text: str) -> Any:
    if text[0] in '[{"':
        return json.loads(text)
    return {"true": True, "false": False}.get(text, text)


def test_the_compose_file_is_sound() -> None:
    compose = parse((ROOT / "docker-compose.yml").read_text("utf-8"))
    assert set(compose) == {"services", "volumes"}
    database, sidecar = compose["services"]["database"], compose["services"]["sidecar"]
    assert re.fullmatch(r"scylladb/scylla:\d+\.\d+", database["image"])
    assert database["healthcheck"]["test"][0] == "CMD"
    assert "127.0.0.1" in database["command"]  # no passwords: nobody else may reach it
    assert sidecar["depends_on"] == {"database": {"condition": "service_healthy"}}
    assert sidecar["build"] == "."
    assert sidecar["read_only"] is True
    assert sidecar["cap_drop"] == ["ALL"]
    assert sidecar["security_opt"] == ["no-new-privileges:true"]
    named = {volume.split(":")[0] for each in (database, sidecar) for volume in each["volumes"]}
    assert {name for name in named if not name.startswith(".")} == set(compose["volumes"])
    assert int(sidecar["stop_grace_period"].removesuffix("s")) > 20 + 10  # pipeline.shutdown_timeout_s, and to close


@pytest.mark.parametrize("text", ["a:\n  - 1\n b: 2", "a: 1\na: 2", "just a text", "a: [1,"])
def test_the_reader_of_compose_files_sees_a_fault(text: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        parse(text)
