"""Who is at the other end: CURVE keys for a socket, and who could take the place of an ipc path.

Whoever can speak as the engine moves money. CURVE (ZeroMQ's own, over Curve25519) proves that the other end holds the
secret key of the public key named in the configuration, and encrypts what is said; frames of anybody else are never
heard. Without it, over `ipc`, the engine is whoever may write into the directory of the path.

A key file is a ZeroMQ certificate, as pyzmq and CZMQ read and write them. What makes a socket secure is a function that
takes it before it connects or binds: `as_client`, `as_server`.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import zmq
from zmq.utils import z85

from sidecar.errors import KeyFileError

Secure = Callable[[Any], None]

KEY_LENGTH: Final = 40  # of its text, in Z85
_OTHERS: Final = stat.S_IRWXO
_SHAPE: Final = """\
#   ****  made by `sidecar keygen`: {what}  ****
metadata
curve
    public-key = "{public}"
"""


class Keys(NamedTuple):
    """A pair of keys as Z85 texts; `secret` is None in the file that others get."""

    public: bytes
    secret: bytes | None


def plain(_socket: Any) -> None:
    """Leave a socket as it is: whoever is there is believed."""


def as_client(server_key_file: Path, key_file: Path) -> Secure:
    """Give what makes a socket speak only with the holder of the server's key. Raises KeyFileError."""
    server, own = read_keys(server_key_file), _own(key_file)

    def secure(socket: Any) -> None:
        socket.setsockopt(zmq.CURVE_SERVERKEY, server.public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, own.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, own.secret)

    return secure


def as_server(key_file: Path) -> Secure:
    """Give what makes a socket speak only with those who know our public key. Raises KeyFileError."""
    own = _own(key_file)

    def secure(socket: Any) -> None:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, own.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, own.secret)

    return secure


def _own(key_file: Path) -> Keys:
    keys = read_keys(key_file)
    if keys.secret is None:
        raise KeyFileError(f"{key_file}: holds no secret key; allowed is the other file of `sidecar keygen`")
    return keys


def read_keys(path: Path) -> Keys:
    """Read a key file; KeyFileError when it can't be used. What it holds is never shown."""
    if not zmq.has("curve"):
        raise KeyFileError(f"{path}: this libzmq ({zmq.zmq_version()}) was built without CURVE; install another pyzmq")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise KeyFileError(f"{path}: can't be read: {error.strerror}; `sidecar keygen` makes key files") from error
    except UnicodeDecodeError:
        raise KeyFileError(f"{path}: is not text; `sidecar keygen` makes key files") from None
    found: dict[str, bytes] = {}
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and name.strip() in ("public-key", "secret-key"):
            found[name.strip()] = value.strip(" \t'\"").encode()
    for name, key in found.items():
        if not _is_key(key):
            raise KeyFileError(f"{path}: its {name} is none; allowed is a text of {KEY_LENGTH} characters in Z85")
    if "public-key" not in found:
        raise KeyFileError(f"{path}: holds no public-key; allowed is a ZeroMQ certificate, as `sidecar keygen` makes")
    return Keys(found["public-key"], found.get("secret-key"))


def _is_key(key: bytes) -> bool:
    try:
        return len(key) == KEY_LENGTH and len(z85.decode(key)) * 5 == KEY_LENGTH * 4
    except (KeyError, ValueError, struct.error):
        return False


def write_keys(public_file: Path, secret_file: Path) -> str:
    """Make a pair and write it into two new files that only we may read; give the public key.

    Raises KeyFileError when one of them is there already or can't be written: nothing is left behind then.
    """
    public, secret = (key.decode() for key in zmq.curve_keypair())
    secret_text = _SHAPE.format(what="secret, for its owner alone", public=public) + f'    secret-key = "{secret}"\n'
    public_text = _SHAPE.format(what="public, for the other end", public=public)
    _write_new(secret_file, secret_text)
    try:
        _write_new(public_file, public_text)
    except BaseException:
        secret_file.unlink()
        raise
    return public


def _write_new(path: Path, text: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise KeyFileError(
            f"{path}: is there already, and is not overwritten: whoever uses it would be locked out; name another file"
        ) from None
    except OSError as error:
        raise KeyFileError(f"{path}: can't be written: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)


def is_exposed(path: Path) -> bool:
    """Say whether a secret's file may be read by everybody on this host."""
    try:
        return bool(path.stat().st_mode & _OTHERS)
    except OSError:
        return False


class Place(NamedTuple):
    """A directory on the way to an ipc path into which others may write; `anybody`: and replace what is there."""

    directory: Path
    mode: int
    anybody: bool


def replaceable(endpoint: str) -> Iterator[Place]:
    """Give the directories through which somebody else could bind, or replace, an ipc endpoint's path.

    In a directory with the sticky bit, as /tmp, nobody can replace what is there, but whoever is first is the engine.
    """
    scheme, _, text = endpoint.partition("://")
    if scheme != "ipc" or text.startswith("@"):
        return
    for directory in Path(os.path.abspath(text)).parents:  # noqa: PTH100 - without following what may be replaced
        try:
            mode = directory.stat().st_mode
        except OSError:
            continue  # not there yet: whoever may write above it decides
        if mode & stat.S_IWOTH:
            yield Place(directory, stat.S_IMODE(mode), anybody=not mode & stat.S_ISVTX)
