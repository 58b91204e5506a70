"""The command line: `sidecar VERB [--config FILE] [--json]`; results on stdout, logs and errors on stderr.

Exit: 0 fine (SIGTERM too); 1 found or failed; 2 usage; 78 configuration or rules, which no restart mends (design.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sidecar.cli import versions
from sidecar.errors import SidecarError

_BEGIN = """\
to begin:
  sidecar print-config --sample > sidecar.toml      a commented configuration to edit
  sidecar check-config                              says what is wrong with it
  sidecar doctor                                    looks at everything around it: engine, tables, disk, clock, limits
  sidecar run                                       records and settles, until SIGTERM
  sidecar status                                    how it stands, and what to do when it is halted
  sidecar demo                                      a real engine's session, settled in front of you
  sidecar --version                                 what a bug report needs

every verb takes --config FILE (else ./sidecar.toml, else /etc/sidecar/sidecar.toml), --set section.key=value, --json;
SIDECAR_SECTION__KEY in the environment sets a key, too. exit: 0 fine, 1 found or failed, 2 usage, 78 configuration
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; give the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.version:
        said = versions.gathered()
        print(json.dumps(said) if given.json_first else versions.text(said))
        return 0
    if given.verb is None:
        parser.print_help(sys.stderr)
        return 2
    given.json = given.json or given.json_first
    try:
        status: int = given.run(given)
    except SidecarError as error:
        _tell(given, error)
        return error.exit_code
    except BaseExceptionGroup as group:
        error_in = _expected(group)
        if error_in is None:
            raise
        _tell(given, error_in)
        return error_in.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _expected(group: BaseExceptionGroup[Any]) -> SidecarError | None:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, SidecarError) else None


def _tell(given: argparse.Namespace, error: SidecarError) -> None:
    if getattr(given, "json", False):
        print(json.dumps({"error": type(error).__name__, "message": str(error)}), file=sys.stderr)
    else:
        print(f"sidecar {given.verb}: {error}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    from sidecar.cli import bringing, deciding, looking, proving, running

    parser = argparse.ArgumentParser(
        prog="sidecar",
        description="Settles the trades of a matching engine: records what it publishes, writes it exactly once.",
        epilog=_BEGIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="all versions that a bug report needs; --json, too")
    parser.add_argument("--json", action="store_true", dest="json_first", help=argparse.SUPPRESS)  # before the verb
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, metavar="FILE", help="the configuration (default: see below)")
    common.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="section.key=value; repeatable")
    common.add_argument("--json", action="store_true", help="one JSON object for machines; amounts in smallest units")

    def verb(name: str, run: Any, says: str, more: str = "", parents: Any = verbs) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = parents.add_parser(
            name,
            help=says,
            description=f"{says[0].upper()}{says[1:]}.",
            epilog=more,
            parents=[common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    groups: dict[str, Any] = {}

    def group(name: str, says: str = "") -> Any:
        """Give a group's verbs, begun by the room that says what it is."""
        if name not in groups:
            added = verbs.add_parser(name, help=says, description=f"{says[0].upper()}{says[1:]}.")
            groups[name] = added.add_subparsers(dest="part", metavar="WHAT", required=True)
        return groups[name]

    running.add_verbs(verb)
    looking.add_verbs(verb, group)
    deciding.add_verbs(verb, group)
    bringing.add_verbs(verb, group)
    proving.add_verbs(verb)
    return parser
