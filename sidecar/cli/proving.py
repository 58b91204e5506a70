"""The verbs that prove the ledger: reconcile, audit, statement. Progress on stderr, results on stdout."""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from sidecar.cli.looking import _asset_id, _number, with_store
from sidecar.cli.running import load
from sidecar.cli.show import amount, moment, table
from sidecar.config import Config
from sidecar.errors import SidecarError, TapeLockedError, UsageError
from sidecar.proof import audit as auditing
from sidecar.proof import statement as stating
from sidecar.proof.codes import CODES, explain
from sidecar.proof.fix import Fixed, Fixer, chosen
from sidecar.proof.positions import WAIT_S
from sidecar.proof.reconcile import Pace, Progress, Proof, Report
from sidecar.proof.work import Work
from sidecar.service import open_store, proof_path
from sidecar.store.base import Store
from sidecar.tape import Lock, lock

T = TypeVar("T")
SHOWN_MAX = 200  # findings as text; --json has all
REDRAW_S = 0.5
ALONE_WITHIN_S = 60.0
NICE = 10


def add_verbs(verb: Any) -> None:
    """Add this room's verbs to the command line."""
    added = verb(
        "reconcile", reconcile, "prove every balance from the tables; exit 1 when something differs", _RECONCILE
    )
    added.add_argument("--full", action="store_true", help="read everything, not only what is new since the last proof")
    added.add_argument("--user", type=_number, metavar="U", help="report on one user's accounts only")
    added.add_argument("--rate", type=_number, metavar="R", help=_RATE)
    added.add_argument("--restart", action="store_true", help="begin anew where an interrupted proof would be taken up")
    added.add_argument(
        "--explain", nargs="?", const="", metavar="CODE", help="say what a code means and what to do; without one: all"
    )
    added.add_argument(
        "--fix", nargs="*", type=_number, metavar="NUMBER", help="mend these findings of the last finished proof"
    )
    added.add_argument("--all-findings", action="store_true", help="with --fix: all that can be mended")
    added.add_argument(
        "--run", dest="of_run", metavar="RUN_ID", help="with --fix: of this proof instead of the last one"
    )
    added.add_argument("--yes", action="store_true", help="with --fix: don't ask")

    added = verb("audit", audit, "show from the tables alone that nothing was lost, counted twice or half", _AUDIT)
    added.add_argument("--rate", type=_number, metavar="R", help=_RATE)
    added.add_argument("--out", type=Path, metavar="FILE", help="write the summary as JSON to a new file, too")
    added = verb(
        "statement", statement, "list every event that touched a user's accounts, with the balance", _STATEMENT
    )
    added.add_argument("user", type=_number, metavar="USER", help="user id")
    added.add_argument("asset", nargs="?", metavar="ASSET", help="an asset's name or id")
    added.add_argument("--from", dest="first", metavar="WHEN", help="the first sequence, or a time in UTC: 2026-01-31")
    added.add_argument(
        "--to", dest="last", metavar="WHEN", help="the last sequence, or a time in UTC: 2026-01-31T12:00"
    )
    added.add_argument("--csv", action="store_true", help="lines of CSV; amounts in smallest units")
    added.add_argument("--rate", type=_number, metavar="R", help=_RATE)


_RATE = "rows a second at most (0: no bound; default: reconcile.rate_rows_s)"
_AUDIT = """\
every sequence up to the acknowledged one is exactly one of trade, ledger event, rejected event, accepted gap; every row
stands in its page; balances add up to what was brought in. exit 1 when not. `digest` is SHA-256 of the rest of the
summary (JSON, keys sorted, no spaces).
"""
_STATEMENT = """\
folded from the tables, exact while settlement goes on; all pages of the symbols are read. exit 1 when a balance does
not end at the stored one, or the user has no account.
"""
_RECONCILE = """\
exact while settlement goes on. The first proof reads everything; later ones read all balances, and of the events those
that are new. What was changed in old pages only --full finds. Interrupted, it goes on where it was.
Findings are kept in reconciliation_findings.

--fix writes rows as the tables' events make them, by a decision that every settler obeys; no update is lost meanwhile.
It takes a little longer than pipeline.durable_after_s, because it looks whether it holds. Before and after are kept
with the finding.
"""


def _give_way() -> None:
    """Let settlement on the same host go first: a settler that wants this process' core gets nine tenths of it."""
    os.nice(max(NICE - os.nice(0), 0))


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


def _alone(path: Path) -> Lock:
    """Become the one proof over a work file; wait a while for another that is under way."""
    deadline = time.monotonic() + ALONE_WITHIN_S
    while True:
        try:
            return lock(path, "proof")
        except TapeLockedError as held:
            if time.monotonic() >= deadline:
                raise SidecarError(f"another proof is under way, wait for it or stop it: {held}") from held
        if deadline - time.monotonic() > ALONE_WITHIN_S - 0.5:
            print("another proof is under way: waiting for it", file=sys.stderr)
        time.sleep(0.5)


def _rate(given: argparse.Namespace, config: Config) -> int:
    return config.reconcile.rate_rows_s if given.rate is None else int(given.rate)


def _proved(
    given: argparse.Namespace,
    config: Config,
    path: Path | None,
    what: str,
    ask: Callable[[Proof, Store, Work], Awaitable[T]],
) -> T:
    """Open store and work file, let something be proved, close them."""
    rate = _rate(given, config)
    progress = Progress()

    async def prove() -> T:
        work = Work(path)
        try:
            async with open_store(config) as store:
                proof = Proof(
                    store=store, work=work, pace=Pace.bounded(rate), progress=progress, tape_path=config.tape.path
                )
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
    _give_way()
    path = proof_path(config)
    held = _alone(path)
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
    held = _alone(path)
    try:
        return _fix_locked(given, config, path, numbers)
    finally:
        held.close()


def _fix_locked(given: argparse.Namespace, config: Config, path: Path, numbers: set[int] | None) -> int:
    with closing(Work(path)) as work:
        run_id = given.of_run or (work.get("finished") or {}).get("run_id")
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


# --- audit ------------------------------------------------------------------------------------------------------------


def audit(given: argparse.Namespace) -> int:
    """Audit the tables."""
    config, progress = load(given), Progress()
    _give_way()
    pace = Pace.bounded(_rate(given, config))
    with shown(progress, "audit"):
        said = with_store(config, lambda store: auditing.audit(store, pace=pace, progress=progress, wait_s=WAIT_S))
    if given.out is not None:
        try:
            with given.out.open("x") as file:
                json.dump(said, file, indent=2, sort_keys=True)
                file.write("\n")
        except OSError as error:
            raise UsageError(f"--out {given.out}: {error.strerror}; a new file's path is allowed") from error
    print(json.dumps(said) if given.json else _audit_text(config, said))
    return 0 if said["ok"] else 1


def _audit_text(config: Config, said: dict[str, Any]) -> str:
    decimals = {asset.id: (name, asset.decimals) for name, asset in config.assets.items()}
    lines = []
    for name, stream in said["streams"].items():
        lines.append(f"stream {name}: sequences {stream['first_sequence']} to {stream['up_to']}")
        parts = ("trades", "ledger_events", "rejected", "accepted_gaps", "missing", "twice", "in_a_wrong_page")
        lines += [f"  {stream[part]:>12,} {part.replace('_', ' ')}" for part in parts]
    rows = []
    for asset_id, sums in said["assets"].items():
        name, places = decimals.get(int(asset_id), (asset_id, 0))
        rows.append([name, *(amount(sums[key], places) for key in ("brought_in", "balances", "difference"))])
    if rows:
        lines += ["", table(("asset", "brought in", "balances", "difference"), rows)]
    if said["not_checked"]:
        lines.append(f"{len(said['not_checked'])} rows are ahead of what is acknowledged and were not checked")
    if said["findings"]:
        heads = ("number", "code", "stream", "user", "asset", "sequence", "expected", "actual", "detail")
        shown_rows = [_line(each | {"number": n}, decimals) for n, each in enumerate(said["findings"][:SHOWN_MAX], 1)]
        lines += ["", table(heads, shown_rows), f"{len(said['findings'])} findings"]
    verdict = "passed" if said["ok"] else "FAILED"
    return "\n".join([*lines, "", f"audit {verdict}: {said['accounts']} accounts; digest {said['digest']}"])


# --- statement --------------------------------------------------------------------------------------------------------


def statement(given: argparse.Namespace) -> int:
    """State a user's accounts."""
    config, progress = load(given), Progress()
    _give_way()
    asset = _asset_id(config, given.asset) if given.asset is not None else None
    pace, span = Pace.bounded(_rate(given, config)), _span(given)

    async def ask(store: Store) -> stating.Statement:
        return await stating.state(store, given.user, asset, span, pace=pace, progress=progress, wait_s=WAIT_S)

    with shown(progress, "statement"):
        made = with_store(config, ask)
    with closing(made):
        if given.csv:
            _print_csv(config, made, span)
        elif given.json:
            print(json.dumps(_statement_dict(config, made, span)))
        else:
            _print_statement(config, made, span)
        return 0 if made.accounts and all(account.agrees for account in made.accounts) else 1


def _span(given: argparse.Namespace) -> stating.Span:
    keys: dict[str, int] = {}
    for text, sequence, moment_us in (
        (given.first, "first_sequence", "first_us"),
        (given.last, "last_sequence", "last_us"),
    ):
        if text is None:
            continue
        if text.isdigit():
            keys[sequence] = int(text)
            continue
        try:
            at = datetime.fromisoformat(text)
        except ValueError:
            raise UsageError(
                f"{text!r}; a sequence, or a time like 2026-01-31 or 2026-01-31T12:00, is allowed"
            ) from None
        at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
        keys[moment_us] = (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    return stating.Span(**keys)


def _statement_dict(config: Config, made: stating.Statement, span: stating.Span) -> dict[str, Any]:
    names = {asset.id: name for name, asset in config.assets.items()}
    accounts = [
        {
            "asset": names.get(account.asset_id),
            "asset_id": account.asset_id,
            "stream": account.stream,
            "opening": account.opening,
            "entries": [entry._asdict() for entry in made.entries(account, span)],
            "closing": account.closing,
            "stored": account.stored.available if account.stored is not None else None,
            "up_to": account.up_to,
            "events": account.entries_total,
            "agrees": account.agrees,
        }
        for account in made.accounts
    ]
    ok = bool(accounts) and all(account["agrees"] for account in accounts)
    return {"ok": ok, "user_id": made.user_id, "accounts": accounts}


def _print_csv(config: Config, made: stating.Statement, span: stating.Span) -> None:
    names = {asset.id: name for name, asset in config.assets.items()}
    lines = csv.writer(sys.stdout)
    lines.writerow(("user_id", "asset", "asset_id", "stream", *stating.Entry._fields))
    for account in made.accounts:
        head = (made.user_id, names.get(account.asset_id, ""), account.asset_id, account.stream)
        lines.writerows((*head, *entry) for entry in made.entries(account, span))


def _print_statement(config: Config, made: stating.Statement, span: stating.Span) -> None:
    decimals = {asset.id: (name, asset.decimals) for name, asset in config.assets.items()}
    if not made.accounts:
        print(f"user {made.user_id} has no account")
    for account in made.accounts:
        name, places = decimals.get(account.asset_id, (account.asset_id, 0))
        rows = [
            (entry.sequence, moment(entry.time_us), entry.role, entry.symbol, entry.reference,
             amount(entry.delta, places), amount(entry.balance, places))
            for entry in made.entries(account, span)
        ]  # fmt: skip
        print(f"user {made.user_id}, {name}, stream {account.stream}: opening {amount(account.opening, places)}")
        if rows:
            print(table(("sequence", "time", "role", "symbol", "reference", "delta", "balance"), rows))
        print(f"closing {amount(account.closing, places)}")
        if account.agrees:
            print(f"all {account.entries_total} events end at the stored balance, {amount(account.final, places)}\n")
            continue
        stored = "no row" if account.stored is None else amount(account.stored.available or 0, places)
        print(
            f"DIFFERS: {account.entries_total} events up to {account.up_to} come to {amount(account.final, places)},"
            f" stored is {stored}; run `sidecar reconcile`\n"
        )
