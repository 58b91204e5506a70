"""Certificates of a secure development node: an authority of its own, and one certificate for all its addresses.

Made with the openssl program, once for a name; its authority signs nothing else, and its key is thrown away.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from failures import NodeError, ToolMissingError

_DAYS = "3650"
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")  # PKCS8, as Java wants it
_HOW = "openssl is missing; it makes the certificates of a secure node. Debian, Ubuntu: apt install openssl."


@dataclass(frozen=True)
class Files:
    """Where they lie."""

    folder: Path

    @property
    def ca(self) -> Path:
        """The authority's certificate, for clients."""
        return self.folder / "ca.pem"

    @property
    def node(self) -> Path:
        """The nodes' key, certificate and authority, as PEMBasedSslContextFactory reads them."""
        return self.folder / "node.pem"


def make(files: Files, addresses: Sequence[str]) -> None:
    """Make them unless they are there. Raises NodeError, ToolMissingError."""
    if files.ca.exists() and files.node.exists():
        return
    if shutil.which("openssl") is None:
        raise ToolMissingError(_HOW)
    files.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as text:
        work = Path(text)
        names = ",".join(["DNS:localhost", *(f"IP:{address}" for address in addresses)])
        (work / "extensions").write_text(
            f"subjectAltName={names}\nbasicConstraints=critical,CA:false\nkeyUsage=critical,digitalSignature\n"
            "extendedKeyUsage=serverAuth\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
        )
        authority = ["-subj", "/CN=sidecar development authority", "-addext", "keyUsage=critical,keyCertSign,cRLSign"]
        signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "extensions"]
        for command in (
            ["req", "-x509", *_KEY, "-keyout", "ca.key", "-out", "ca.pem", "-days", _DAYS, *authority],
            ["req", *_KEY, "-keyout", "node.key", "-out", "node.csr", "-subj", "/CN=sidecar development node"],
            ["x509", "-req", "-in", "node.csr", *signed, "-out", "node.crt", "-days", _DAYS],
        ):
            done = subprocess.run(["openssl", *command], cwd=work, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NodeError(f"openssl {command[0]}: {done.stderr.strip()}")
        files.node.touch(mode=0o600)
        files.node.write_text("".join((work / name).read_text() for name in ("node.key", "node.crt", "ca.pem")))
        shutil.copyfile(work / "ca.pem", files.ca)
