"""Opening balances: what users had before the first event of the engine, as events of a stream of their own, once.

A file's rows, in the order of user and asset, are the ledger events (ADJUSTMENT) of the stream `<stream>/import`, whose
genesis keeps the digest of the rows: the same file again is the same stream, another file is refused. They are settled
by a life of the settle loop like any others, so a crash leaves some of the batches, and saying it again the rest.
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from sidecar import decisions
from sidecar.decisions import Agreed, DecisionRefusedError
from sidecar.errors import BatchTooLargeError, SidecarError, StartOver
from sidecar.events import I63_MAX, LedgerEvent
from sidecar.ledger import before
from sidecar.life import TICK_S, Bounds, Life, until_known
from sidecar.store.base import Store

PIECE_EVENTS: Final = 512
COLUMNS: Final = ("user_id", "asset", "amount")
_DECIMAL: Final = re.compile(r"(-?)(\d+)(?:\.(\d+))?")


class OpeningRefusedError(SidecarError):
    """A file of opening balances that can't be taken as it is; the message names the line and what is allowed."""


class Asset(NamedTuple):
    """What a row's asset is: its id, and how many decimals its smallest unit is below one."""

    id: int
    decimals: int


class Opening(NamedTuple):
    """One balance: `amount` in the asset's smallest units."""

    user_id: int
    asset_id: int
    amount: int


def read(path: Path, assets: Mapping[str, Asset], *, decimals: bool) -> list[Opening]:
    """Read a CSV file of user_id, asset (name or id), amount; give its rows by user and asset.

    Amounts are integers in smallest units, or with `decimals` whole units with a point. Raises OpeningRefusedError.
    """
    by_id = {asset.id: asset for asset in assets.values()}
    rows: dict[tuple[int, int], tuple[int, int]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file)
            columns: tuple[int, ...] | None = None
            for row in lines:
                where = f"{path}, line {lines.line_num}"
                cells = [cell.strip() for cell in row]
                if not any(cells):
                    continue
                if columns is None:
                    columns = _header(cells, where)
                    if columns is not None:
                        continue
                    columns = (0, 1, 2)
                if len(cells) <= max(columns):
                    raise OpeningRefusedError(f"{where}: {len(cells)} columns; {', '.join(COLUMNS)} are wanted")
                user, name, amount = (cells[at] for at in columns)
                asset = assets.get(name) or (by_id.get(int(name)) if name.isdigit() else None)
                if asset is None:
                    raise OpeningRefusedError(
                        f"{where}: asset={name}; {', '.join(sorted(assets))}, or an id, is allowed"
                    )
                if not (user.isascii() and user.isdigit() and int(user) <= I63_MAX):
                    raise OpeningRefusedError(f"{where}: user_id={user}; an integer from 0 to {I63_MAX} is allowed")
                key = int(user), asset.id
                if key in rows:
                    raise OpeningRefusedError(f"{where}: user {user} has asset {name} in line {rows[key][1]} already")
                rows[key] = _amount(amount, asset, where, decimals=decimals), lines.line_num
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OpeningRefusedError(f"{path}: {error}") from error
    if not rows:
        raise OpeningRefusedError(f"{path}: no balances; lines of {', '.join(COLUMNS)} are wanted")
    return [Opening(*key, rows[key][0]) for key in sorted(rows)]


def _header(cells: list[str], where: str) -> tuple[int, ...] | None:
    """Give where the columns are; None when this is no header but the first row."""
    if cells[0].isdigit():
        return None
    missing = [name for name in COLUMNS if name not in cells]
    if missing:
        raise OpeningRefusedError(f"{where}: no column {', '.join(missing)}; {', '.join(COLUMNS)} are wanted")
    return tuple(cells.index(name) for name in COLUMNS)


def _amount(text: str, asset: Asset, where: str, *, decimals: bool) -> int:
    found = _DECIMAL.fullmatch(text) if text.isascii() else None
    if found is None or (found[3] and not decimals):
        allowed = f"at most {asset.decimals} digits after the point" if decimals else "an integer in smallest units"
        hint = "" if decimals else " (for amounts with a point: --decimals)"
        raise OpeningRefusedError(f"{where}: amount={text}; {allowed} is allowed{hint}")
    sign, whole, fraction = found[1], found[2], found[3] or ""
    if len(fraction) > asset.decimals:
        raise OpeningRefusedError(f"{where}: amount={text}; at most {asset.decimals} digits after the point is allowed")
    shift = asset.decimals if decimals else 0
    amount = int(whole + fraction.ljust(shift, "0"))
    if amount > I63_MAX:
        raise OpeningRefusedError(f"{where}: amount={text} is {amount} smallest units; at most {I63_MAX} is allowed")
    return -amount if sign else amount


def digest(rows: list[Opening]) -> str:
    """Give what tells two files' rows apart, whatever their order and form."""
    content = "".join(f"{row.user_id},{row.asset_id},{row.amount}\n" for row in rows)
    return hashlib.sha256(content.encode()).hexdigest()


async def import_stream(store: Store, stream: str) -> str:
    """Name the stream of opening balances: that of the first stream, however many have gone on after it."""
    while (log := await store.read_decisions(stream)) and (before_it := json.loads(log[0].body).get("after")):
        stream = before_it
    return f"{stream}/import"


async def imported(store: Store, name: str, rows: list[Opening]) -> int:
    """Give how many of the rows are settled and durable as the stream `name`.

    Raises DecisionRefusedError when another file was taken.
    """
    log = await store.read_decisions(name)
    if not log:
        return 0
    begun = json.loads(log[0].body)
    if begun.get("digest") != digest(rows):
        raise DecisionRefusedError(
            f"{name} was made of another file: {begun.get('rows')} rows, sha256"
            f" {str(begun.get('digest'))[:16]}…, by {log[0].decided_by}; opening balances are imported once, what was"
            " wrong in them is put right by the engine's ADJUSTMENT events"
        )
    durable = (await store.load_state(name)).get("durable")
    return durable.sequence if durable is not None else 0


async def settle(
    store: Store,
    name: str,
    rows: list[Opening],
    *,
    rules: dict[str, Any],
    bounds: Bounds,
    now_us: Callable[[], int],
    advance: Callable[[int], None],
) -> None:
    """Settle the rows as the stream `name`, and wait until all of them are durable.

    Raises DecisionRefusedError as `imported`.
    """
    agreed = await decisions.agree(
        store,
        stream=name,
        first_sequence=1,
        session=1,
        engine_session=None,
        rules=rules,
        now_us=now_us(),
        also={"digest": digest(rows), "rows": len(rows)},
    )
    await imported(store, name, rows)  # another host may have been faster, with another file
    trades_max, done = bounds.batch_trades_max, 0
    while True:
        state = await until_known(lambda: store.load_state(name), bounds)
        start = state.get("durable") or before(1, agreed.base_us)
        if start.sequence >= len(rows):
            return
        try:
            async with asyncio.TaskGroup() as tasks:
                life = Life(
                    store=store,
                    stream=name,
                    agreed=agreed,
                    start=start,
                    bounds=bounds,
                    batch_trades_max=trades_max,
                    spawn=tasks.create_task,  # type: ignore[arg-type]
                    now_us=now_us,
                )
                for at in range(start.sequence, len(rows), PIECE_EVENTS):
                    piece = rows[at : at + PIECE_EVENTS]
                    await life.settle([_event(agreed, at + 1 + place, row) for place, row in enumerate(piece)])
                    advance(max(at + len(piece) - done, 0))
                    done = max(done, at + len(piece))
                await life.pipeline.drained()
                if store.durable_at_once:
                    await store.save_state(name, "durable", life.pipeline.acked)
                while not store.durable_at_once and life.durable.sequence < len(rows):
                    await asyncio.sleep(min(TICK_S, bounds.durable_after_s / 2))
                    await life.tick()
                await life.save_acked()
        except* StartOver:
            agreed = await _again(store, name)
        except* BatchTooLargeError:
            if trades_max == 1:
                raise
            trades_max //= 2


async def _again(store: Store, name: str) -> Agreed:
    agreed = await decisions.read_agreed(store, name)
    assert agreed is not None  # its genesis was read before
    return agreed


def _event(agreed: Agreed, sequence: int, row: Opening) -> LedgerEvent:
    created_at_ms = agreed.base_us // 1000  # when the import was begun: the same for whoever goes on with it
    return LedgerEvent(
        sequence, "ADJUSTMENT", row.user_id, row.asset_id, row.amount, 0, created_at_ms, None, None, b""
    )  # fmt: skip
