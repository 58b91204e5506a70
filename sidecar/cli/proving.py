"""The verbs that prove the ledger: reconcile, audit, statement. Progress on stderr, results on stdout."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from sidecar.cli.looking import _number, with_store
from sidecar.cli.running import load
from sidecar.cli.show import amount, table
from sidecar.config import Config
from sidecar.errors import UsageError
from sidecar.proof.codes import CODES, explain
from sidecar.proof.fix import Fixed, Fixer, chosen
from sidecar.proof.reconcile import Pace, Progress, Proof, Report
from sidecar.proof.work import Work
from sidecar.service import open_store, proof_path
from sidecar.store.base import Store
from sidecar.tape import lock

T = TypeVar("T")
SHOWN_MAX = 200  # findings as text; --json has all
REDRAW_S = 0.5


def add_verbs(verb: Any) -> None:
    """Add this room's verbs to the command line."""
    added = verb(
        "reconcile", reconcile, "prove every balance from the tables; exit 1 when something differs", _RECONCILE
    )
    added.add_argument("--full", action="store_true", help="read everything, not only what is new since the last proof")
    added.add_argument("--user", type=_number, metavar="U", help="report on one user's accounts only")
    added.add_argument(
        "--rate", type=_number, metavar="R", help="rows a second at most (0: no bound; default: configured)"
    )
    added.add_argument("--restart", action="store_true", help="begin anew where an interrupted proof would be taken up")
    added.add_argument(
        "--explain", nargs="?", const="", metavar="CODE", help="say what a code means and what to do; without one: all"
    )
    added.add_argument(
        "--fix", nargs="*", type=_number, metavar="NUMBER", help="mend these findings of the last finished proof"
    )
    added.add_argument("--all-findings", action="store_true", help="with --fix: all that can be mended")
    added.add_argument("--run", metavar="RUN_ID", help="with --fix: of this proof instead of the last one")
    added.add_argument("--yes", action="store_true", help="with --fix: don't ask")


_RECONCILE = """\
exact while settlement goes on. The first proof reads everything; later ones read all balances, and of the events those
that are new. What was changed in old pages only --full finds. Interrupted, it goes on where it was.
Findings are kept in reconciliation_findings.

--fix writes rows as the tables' events make them, by a decision that every settler obeys; no update is lost meanwhile.
It takes a little longer than pipeline.durable_after_s, because it looks whether it holds. Before and after are kept
with the finding.
"""


@contextmanager
def shown(progress: Progress, what: str) -> Iterator[None]:
    """Show a proof's progress on a terminal while it lasts."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    over = threading.Event()
    columns = (
        TextColumn(what), BarColumn(), TextColumn("{task.completed:,} rows"), TimeElapsedColumn(), TextColumn("left:"),
        TimeRemainingColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(progress.doing, total=None)

        def draw() -> None:
            while not over.wait(REDRAW_S):
                total = max(progress.rows_expected, progress.rows) or None
                bar.update(task, completed=progress.rows, total=total, description=progress.doing)

        drawing = threading.Thread(target=draw, daemon=True)
        drawing.start()
        try:
            yield
        finally:
            over.set()
            drawing.join()


def _proved(
    given: argparse.Namespace,
    config: Config,
    path: Path | None,
    what: str,
    ask: Callable[[Proof, Store, Work], Awaitable[T]],
) -> T:
    """Open store and work file, let something be proved, close them."""
    rate = config.reconcile.rate_rows_s if given.rate is None else given.rate
    progress = Progress()

    async def prove() -> T:
        work = Work(path)
        try:
            async with open_store(config) as store:
                proof = Proof(store=store, work=work, pace=Pace(rate_rows_s=rate), progress=progress)
                try:
                    return await ask(proof, store, work)
                finally:
                    proof.close()
        finally:
            work.close()

    with shown(progress, what):
        return asyncio.run(prove())


def reconcile(given: argparse.Namespace) -> int:
    """Prove the ledger."""
    if given.explain is not None:
        return _explain(given)
    if given.fix is not None or given.all_findings:
        return _fix(given)
    config = load(given)
    path = proof_path(config)
    held = lock(path, "lock")
    try:
        report = _proved(
            given, config, path, "reconcile",
            lambda proof, *_: proof.run(full=given.full, resume=not given.restart),
        )  # fmt: skip
    finally:
        held.close()
    said = report.as_dict()
    if given.user is not None:
        said["findings"] = [each for each in said["findings"] if each["user_id"] == given.user]
        said["not_checked"] = [each for each in said["not_checked"] if each["user_id"] == given.user]
        said |= {"ok": not said["findings"], "user_id": given.user}
    print(json.dumps(said) if given.json else _reconcile_text(config, report, said))
    return 0 if said["ok"] else 1


def _fix(given: argparse.Namespace) -> int:
    """Mend findings of a finished proof."""
    if bool(given.fix) == given.all_findings:
        raise UsageError("--fix NUMBER …, or --fix --all-findings: name what is to be mended")
    config = load(given)
    path = proof_path(config)
    numbers = None if given.all_findings else set(given.fix)
    held = lock(path, "lock")
    try:
        return _fix_locked(given, config, path, numbers)
    finally:
        held.close()


def _fix_locked(given: argparse.Namespace, config: Config, path: Path, numbers: set[int] | None) -> int:
    with closing(Work(path)) as work:
        run_id = given.run or (work.get("finished") or {}).get("run_id")
    if run_id is None:
        raise UsageError("no proof has finished yet, so there are no findings to mend: run `sidecar reconcile` first")
    try:
        UUID(run_id)
    except ValueError:
        raise UsageError(f"--run {run_id}; the run_id of a finished proof is allowed") from None
    findings = with_store(config, lambda store: store.load_findings(run_id))
    if numbers is not None and (unknown := numbers - {each.number for each in findings}):
        known = f"1 to {len(findings)}" if findings else "none"
        raise UsageError(f"finding {min(unknown)} of run {run_id}; {known} are allowed")
    wanted, _ = chosen(findings, numbers)
    if wanted and not given.yes:
        decimals = {asset.id: (name, asset.decimals) for name, asset in config.assets.items()}
        heads = ("number", "code", "stream", "user", "asset", "sequence", "expected", "actual", "detail")
        print(table(heads, [_line(each._asdict(), decimals) for each in wanted]), file=sys.stderr)
        if not sys.stdin.isatty():
            raise UsageError(f"{len(wanted)} balance rows would be written; with --yes they are")
        print(
            f"write these {len(wanted)} balance rows as the tables' events make them? [y/N] ", end="", file=sys.stderr
        )
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing was changed", file=sys.stderr)
            return 1

    async def mend(proof: Proof, store: Store, work: Work) -> Fixed:
        fixer = Fixer(store=store, work=work, proof=proof, durable_after_s=config.pipeline.durable_after_s)
        return await fixer.fix(run_id, numbers)

    fixed = _proved(given, config, path, "reconcile --fix", mend)
    lines = [f"{each['number']} {each['code']}: mended" for each in fixed.fixed]
    lines += [f"{each['number']} {each['code']}: {each['why']}" for each in fixed.not_fixed]
    print(json.dumps(fixed.as_dict()) if given.json else "\n".join(lines) or "there is nothing to mend")
    return 0 if fixed.as_dict()["ok"] else 1


def _explain(given: argparse.Namespace) -> int:
    code = given.explain.upper()
    if code and code not in CODES:
        raise UsageError(f"code {given.explain!r}; {', '.join(sorted(CODES))} are allowed")
    codes = [code] if code else sorted(CODES)
    if given.json:
        print(json.dumps({each: CODES[each]._asdict() for each in codes}))
    else:
        print("\n\n".join(explain(each) for each in codes))
    return 0


def _reconcile_text(config: Config, report: Report, said: dict[str, Any]) -> str:
    where = ", ".join(f"{stream} up to {sequence}" for stream, sequence in said["up_to"].items()) or "no stream yet"
    how = "everything was read" if report.is_full else f"{report.events_read} events were new"
    lines = [
        f"{said['accounts']} accounts against {said['events']} events ({where}); {how}, {report.seconds:.1f} s",
    ]
    if said["not_checked"]:
        ahead = len(said["not_checked"])
        lines.append(
            f"{ahead} rows are ahead of what is acknowledged and were not checked: run it while settlement runs"
        )
    findings = said["findings"]
    if not findings:
        return "\n".join([*lines, "nothing differs"])
    decimals = {asset.id: (name, asset.decimals) for name, asset in config.assets.items()}
    rows = [_line(each, decimals) for each in findings[:SHOWN_MAX]]
    heads = ("number", "code", "stream", "user", "asset", "sequence", "expected", "actual", "detail")
    lines += ["", table(heads, rows)]
    if len(findings) > SHOWN_MAX:
        lines.append(f"and {len(findings) - SHOWN_MAX} more: --json has all")
    lines += ["", f"{len(findings)} findings, run {report.run_id}"]
    lines += [f"{code}: sidecar reconcile --explain {code}" for code in sorted({each["code"] for each in findings})]
    return "\n".join(lines)


_IN_MONEY = frozenset(
    {"BALANCE_DIFFERS", "UPDATE_MISSING", "BALANCE_MISSING", "BALANCE_WITHOUT_EVENTS", "EVENT_MISSING", "EVENT_DIFFERS",
     "EVENT_AGAINST_DECISION", "ASSET_SUM"}
)  # fmt: skip


def _line(finding: dict[str, Any], decimals: dict[int, tuple[str, int]]) -> list[Any]:
    name, places = decimals.get(finding["asset_id"], (finding["asset_id"], 0))
    values = [finding["expected"], finding["actual"]]
    if finding["code"] in _IN_MONEY:
        values = [None if value is None else amount(value, places) for value in values]
    return [
        finding["number"], finding["code"], finding["stream"], finding["user_id"], name, finding["sequence"], *values,
        finding["detail"],
    ]  # fmt: skip
