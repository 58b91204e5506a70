"""What pyproject.toml can't say: which of the repository's files travel inside the package, at `sidecar/share/`.

There they lie as in the repository, so that `sidecar.cli.carried` finds them under one name.
"""

from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CARRIED = (
    "schema/*.cql",
    "bench/engine.py",  # these five are the demo's
    "bench/judge.py",
    "bench/session.toml",
    "bench/binance.toml",
    "bench/data/*",
    "scripts/install",
    "scripts/systemd/*",
    "scripts/grafana/*",
    "scripts/prometheus/*",
    "OPERATIONS.md",
)


class Build(build_py):
    """Puts the carried files beside the modules."""

    editable_mode = False  # set by setuptools: the files are then used where they are

    def _carried(self) -> dict[str, str]:
        """Give where each file is to lie, and where it lies."""
        if self.editable_mode:
            return {}
        files = sorted(file for pattern in CARRIED for file in ROOT.glob(pattern) if file.is_file())
        share = Path(self.build_lib) / "sidecar" / "share"
        return {str(share / file.relative_to(ROOT)): str(file.relative_to(ROOT)) for file in files}

    def run(self) -> None:
        """Build as ever, then copy."""
        super().run()
        for target, source in self._carried().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Name what was built."""
        return [*super().get_outputs(include_bytecode), *self._carried()]

    def get_output_mapping(self) -> Any:
        """Say which file comes from which."""
        return super().get_output_mapping() | self._carried()

    def get_source_files(self) -> list[str]:
        """Name what an sdist needs."""
        return [*super().get_source_files(), *self._carried().values()]


setup(cmdclass={"build_py": Build})
