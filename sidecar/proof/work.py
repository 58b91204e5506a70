"""The proof's own file: balance rows as they were read, the fold of their events, and what earlier proofs verified.

SQLite beside the tape, so that memory stays bounded however many accounts there are: a part of the fold is in memory
(`ACCOUNTS_CACHED_MAX` accounts, one bit for each event), the rest on disk. Everything in here can be made again from
the tables; a damaged file is put aside and the next proof reads everything.

One proof folds each account at two places: at the row's own `last_sequence`, and at the position that was acknowledged
before the rows were read. `checkpoint` is one transaction: a crash, or a question to the store that failed, leaves the
state of the last one, and the scan goes on from its cursors.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from sidecar.batch import ROW_PAGE_WIDTH
from sidecar.errors import SidecarError
from sidecar.proof.codes import Finding
from sidecar.proof.fold import (
    B_AVAILABLE,
    B_VERSION,
    C_AVAILABLE,
    C_VERSION,
    NOWHERE,
    At,
    Fold,
    Part,
    Ranges,
    fold_of,
    post,
    without,
    zeros,
)
from sidecar.proof.rows import (
    ASSET,
    BASE,
    BUYER,
    BUYER_FEE,
    LEDGER_PAGE,
    LEDGER_SEQUENCE,
    PAGE,
    QUANTITY,
    QUOTE,
    QUOTE_AMOUNT,
    SELLER,
    SELLER_FEE,
    SEQUENCE,
    STREAM,
    TRADE_ID,
    USER,
    AccountKey,
    Row,
    ledger_amount,
    ledger_time_us,
    trade_is_whole,
    trade_postings,
    trade_time_us,
)
from sidecar.store.base import StampedBalance

log = logging.getLogger(__name__)

ACCOUNTS_CACHED_MAX: Final = 150_000  # folds in memory, about 600 bytes each
EVENT_FINDINGS_MAX: Final = 10_000  # findings about events that are kept; what is beyond is counted
COMPARED_ROWS: Final = 500  # accounts judged at once: a millisecond, so that settlement beside it hardly notices
_KEYS_A_QUERY: Final = 300
_CHUNK_BITS: Final = 16
_CHUNK: Final = 1 << _CHUNK_BITS  # sequences a chunk of bits
_CHUNKS_CACHED_MAX: Final = 4_096  # 32 MiB
_VERSION: Final = 1
_I64_MIN, _I64_MAX = -(2**63), 2**63 - 1

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS verified (stream TEXT PRIMARY KEY, said TEXT);
CREATE TABLE IF NOT EXISTS accounts (stream TEXT, user_id INTEGER, asset_id INTEGER, available, version INTEGER,
    last_sequence INTEGER, updated_at INTEGER, PRIMARY KEY (stream, user_id, asset_id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS missing (stream TEXT, first INTEGER, last INTEGER, PRIMARY KEY (stream, first));
CREATE TABLE IF NOT EXISTS odd (said TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS suspects (stream TEXT, user_id INTEGER, asset_id INTEGER, said TEXT,
    PRIMARY KEY (stream, user_id, asset_id));
CREATE TABLE IF NOT EXISTS rows (stream TEXT, user_id INTEGER, asset_id INTEGER, available INTEGER, version INTEGER,
    last_sequence INTEGER, updated_at INTEGER, write_us INTEGER, PRIMARY KEY (stream, user_id, asset_id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS folds (stream TEXT, user_id INTEGER, asset_id INTEGER, low INTEGER, high INTEGER,
    b_available, b_version INTEGER, b_sequence INTEGER, b_updated INTEGER,
    c_available, c_version INTEGER, c_sequence INTEGER, c_first INTEGER, c_updated INTEGER,
    available, version INTEGER, last_sequence INTEGER, updated_at INTEGER,
    PRIMARY KEY (stream, user_id, asset_id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS bits (stream TEXT, chunk INTEGER, bits BLOB, PRIMARY KEY (stream, chunk)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS parts (stream TEXT PRIMARY KEY, next_stamp_us INTEGER);
"""
_OF_A_RUN: Final = ("rows", "folds", "bits", "parts")
_OF_THE_VERIFIED: Final = ("verified", "accounts", "missing", "odd", "suspects")


class WorkFileError(SidecarError):
    """The proof's file can't be used."""


def _kept(value: int) -> int | str:
    """Give a number as SQLite can keep it: what damaged rows add up to may be larger than 64 bits."""
    return value if _I64_MIN <= value <= _I64_MAX else str(value)


class Work:
    """The file of one proof after the other; one process at a time, one thread at a time."""

    def __init__(self, path: Path | None) -> None:
        """Open or create it; None: a file without a name that goes away with this object."""
        self.path = path
        self._db = self._opened()
        self.parts: dict[str, Part] = {}
        self.unknown: dict[str, list[int]] = {}  # trades of streams without genesis: how many, the first sequence
        self.beyond_total = 0  # findings about events that were not kept
        self.sums: dict[int, list[int]] = {}  # by asset: stored, folded at the rows, folded at `before`
        self._db.execute("BEGIN")

    def _opened(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            if self.path is None or isinstance(error, sqlite3.OperationalError):
                raise WorkFileError(
                    f"{self.path}: {error}; is reconcile.path in a folder that this user may write to?"
                ) from error
            aside = self.path.with_name(f"{self.path.name}.damaged")
            log.warning("reconcile_file_damaged", extra={"path": str(self.path), "put_aside": str(aside)})
            for suffix in ("-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            self.path.replace(aside)
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self.path or "", isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA cache_size = -32768")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION):
            for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                db.execute(f"DROP TABLE {name}")
        db.executescript(_SCHEMA)
        if version != _VERSION:  # a look at the file must not wait for another process that writes to it
            db.execute(f"PRAGMA user_version = {_VERSION}")
        return db

    def close(self) -> None:
        """Let go of the file; what is not at a checkpoint is forgotten."""
        with suppress(sqlite3.Error):
            self._db.execute("ROLLBACK")
        self._db.close()

    # --- what is remembered from one proof to the next ---

    def get(self, name: str) -> Any:
        """Read a note; None when there is none."""
        found = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return json.loads(found[0]) if found else None

    def put(self, name: str, value: Any) -> None:
        """Write a note; it is there after the next checkpoint."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value)))

    def verified(self) -> dict[str, dict[str, Any]]:
        """Give what earlier proofs verified, by stream."""
        return {name: json.loads(said) for name, said in self._db.execute("SELECT * FROM verified")}

    def forget(self) -> None:
        """Forget all that was verified: the next proof reads everything."""
        for table in _OF_THE_VERIFIED:
            self._db.execute(f"DELETE FROM {table}")
        self.put("unknown", {})

    def commit(self) -> None:
        """Keep what was written."""
        self._db.execute("COMMIT")
        self._db.execute("BEGIN")

    # --- rows ---

    def clear(self) -> None:
        """Forget an earlier proof's rows."""
        for table in _OF_A_RUN:
            self._db.execute(f"DELETE FROM {table}")
        self.put("run", None)

    def add_rows(self, rows: Iterable[StampedBalance]) -> None:
        """Keep balance rows as they were read."""
        self._db.executemany(
            "INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [(row.stream, row.user_id, row.asset_id, *row[3:]) for row in rows],
        )

    def highest(self) -> dict[str, int]:
        """Give the highest last_sequence of each stream's rows."""
        return dict(self._db.execute("SELECT stream, MAX(COALESCE(last_sequence, 0)) FROM rows GROUP BY stream"))

    def count_rows(self, user_id: int | None = None) -> int:
        """Count the rows, of all or of one user."""
        clause, values = ("", ()) if user_id is None else (" WHERE user_id = ?", (user_id,))
        count: int = self._db.execute(f"SELECT COUNT(*) FROM rows{clause}", values).fetchone()[0]
        return count

    # --- the fold ---

    def begin_fold(self, parts: Iterable[Part]) -> None:
        """Begin to fold, or go on after the last checkpoint, with these streams."""
        self.parts = {part.name: part for part in parts}
        self._db.execute("DELETE FROM parts")
        self._db.executemany(
            "INSERT INTO parts VALUES (?, ?)", [(p.name, p.next_stamp_us) for p in self.parts.values()]
        )
        kept = self.get("fold") or {}
        known = self.verified()
        for part in self.parts.values():
            query = "SELECT user_id, asset_id, last_sequence FROM rows WHERE stream = ? AND last_sequence > ?"
            part.ahead = {(u, a): at for u, a, at in self._db.execute(query, (part.name, part.up_to))}
            if part.name in kept:
                part.take_up(kept[part.name])
            elif part.name in known:
                said = known[part.name]
                nothing = {"counts": part.counts, "ahead_seen": []}
                part.take_up(said | nothing)
        self.unknown = dict(kept.get("*unknown") or self.get("unknown") or {})

    def checkpoint(self, cursors: dict[str, Any]) -> None:
        """Keep the fold and how far the scans are, in one transaction."""
        self._flush()
        self.put("cursors", cursors)
        self.put("fold", {part.name: part.said() for part in self.parts.values()} | {"*unknown": self.unknown})
        self.commit()

    def rollback(self) -> dict[str, Any]:
        """Go back to the last checkpoint; give its cursors."""
        self._db.execute("ROLLBACK")
        self._db.execute("BEGIN")
        for part in self.parts.values():
            part.cache.clear()
            part.dirty.clear()
            part.bits.clear()
        cursors: dict[str, Any] = self.get("cursors") or {}
        return cursors

    def _flush(self) -> None:
        for part in self.parts.values():
            rows = []
            for key in part.dirty:
                fold = part.cache[key]
                at = part.at_before(fold)
                rows.append(
                    (
                        part.name, *key, *fold[:B_AVAILABLE], _kept(fold[B_AVAILABLE]), *fold[B_VERSION:C_AVAILABLE],
                        _kept(fold[C_AVAILABLE]), *fold[C_VERSION:], _kept(at[0]), *at[1:],
                    )
                )  # fmt: skip
            self._db.executemany(f"INSERT OR REPLACE INTO folds VALUES ({', '.join('?' * 18)})", rows)
            part.dirty.clear()
            bits = [(part.name, chunk, bytes(those)) for chunk, those in part.bits.items()]
            self._db.executemany("INSERT OR REPLACE INTO bits VALUES (?, ?, ?)", bits)
            if len(part.bits) > _CHUNKS_CACHED_MAX:
                part.bits.clear()

    def _spill(self) -> None:
        if sum(len(part.cache) for part in self.parts.values()) > ACCOUNTS_CACHED_MAX:
            self._flush()
            for part in self.parts.values():
                part.cache.clear()

    def _fetch(self, part: Part, wanted: set[AccountKey]) -> None:
        """Bring accounts into memory: as folded so far, else as earlier proofs and the row's place say."""
        part.dirty |= wanted
        missing = list(wanted - part.cache.keys())
        for at in range(0, len(missing), _KEYS_A_QUERY):
            some = missing[at : at + _KEYS_A_QUERY]
            query = (
                f"WITH wanted (u, a) AS (VALUES {', '.join(['(?, ?)'] * len(some))})"
                " SELECT u, a, r.last_sequence, r.user_id, b.available, b.version, b.last_sequence, b.updated_at,"
                " f.low, f.high, f.b_available, f.b_version, f.b_sequence, f.b_updated, f.c_available, f.c_version,"
                " f.c_sequence, f.c_first, f.c_updated FROM wanted"
                " LEFT JOIN rows r ON r.stream = ? AND r.user_id = u AND r.asset_id = a"
                " LEFT JOIN accounts b ON b.stream = ? AND b.user_id = u AND b.asset_id = a"
                " LEFT JOIN folds f ON f.stream = ? AND f.user_id = u AND f.asset_id = a"
            )
            values = [value for key in some for value in key] + [part.name] * 3
            for user, asset, row_at, has_row, *rest in self._db.execute(query, values):
                part.cache[user, asset] = fold_of(part, has_row is not None, row_at, rest[:4], rest[4:])

    def _mark(self, part: Part, sequence: int) -> bool:
        """Note that a sequence has a row; False when it had one already."""
        chunk, place = divmod(sequence - part.first, _CHUNK)
        bits = part.bits.get(chunk)
        if bits is None:
            query = "SELECT bits FROM bits WHERE stream = ? AND chunk = ?"
            found = self._db.execute(query, (part.name, chunk)).fetchone()
            bits = part.bits[chunk] = bytearray(found[0]) if found else bytearray(_CHUNK // 8)
        byte, bit = place >> 3, 1 << (place & 7)
        if bits[byte] & bit:
            return False
        bits[byte] |= bit
        return True

    def fold_trades(self, symbol: str, rows: list[Row], only: str | None = None) -> None:
        """Fold a piece of a symbol's table; with `only` one stream's rows."""
        self._spill()
        wanted: dict[str, set[AccountKey]] = {}
        taken: list[tuple[Part, Row]] = []
        for row in rows:
            name = row[STREAM]
            if only is not None and name != only:
                continue
            part = self.parts.get(name)
            if part is None:
                there = self.unknown.setdefault(name, [0, row[SEQUENCE] or 0])
                there[0] += 1
                continue
            if not trade_is_whole(row):
                self._odd("EVENT_INCOMPLETE", part, row[SEQUENCE], detail=f"{symbol} trade {row[TRADE_ID]}")
                continue
            if row[SEQUENCE] <= part.verified:
                continue
            keys = wanted.setdefault(name, set())
            buyer, seller, base, quote = row[BUYER], row[SELLER], row[BASE], row[QUOTE]
            keys.update(((buyer, base), (buyer, quote), (seller, base), (seller, quote)))
            if row[BUYER_FEE] or row[SELLER_FEE]:
                keys.update(((part.revenue, base), (part.revenue, quote)))
            taken.append((part, row))
        for name, keys in wanted.items():
            self._fetch(self.parts[name], keys)
        for part, row in taken:
            self._fold_trade(symbol, part, row)

    def _fold_trade(self, symbol: str, part: Part, row: Row) -> None:
        sequence = row[SEQUENCE]
        rule = part.symbols.symbols.get(symbol)
        if rule is not None and row[PAGE] != (page := row[TRADE_ID] // rule.page_width):
            detail = f"{symbol} trade {row[TRADE_ID]}"
            self._odd("WRONG_PAGE", part, sequence, expected=page, actual=row[PAGE], detail=detail)
        buyer, seller = row[BUYER], row[SELLER]
        if buyer != seller and not row[BUYER_FEE] and not row[SELLER_FEE]:
            base, quote, quantity, amount = row[BASE], row[QUOTE], row[QUANTITY], row[QUOTE_AMOUNT]
            postings = {
                (buyer, base): quantity, (buyer, quote): -amount, (seller, base): -quantity, (seller, quote): amount,
            }  # fmt: skip
        else:
            postings = trade_postings(row, part.revenue)
        if not self._take(part, sequence, postings, "trades"):
            return
        time_us = trade_time_us(row, rule)
        cache = part.cache
        for key, amount in postings.items():
            post(cache[key], sequence, amount, time_us)
        if sequence <= part.before and row[TRADE_ID] > part.ids.get(symbol, 0):
            part.ids[symbol] = row[TRADE_ID]

    def fold_ledger_events(self, part: Part, rows: list[Row]) -> None:
        """Fold some of a stream's ledger events."""
        self._spill()
        taken = []
        for row in rows:
            sequence, amount = row[LEDGER_SEQUENCE], ledger_amount(row)
            if sequence <= part.verified:
                continue
            if amount is None:
                self._odd("EVENT_INCOMPLETE", part, sequence, detail="ledger event")
            else:
                taken.append((row, sequence, amount))
        self._fetch(part, {(row[USER], row[ASSET]) for row, _, _ in taken})
        for row, sequence, amount in taken:
            self._check_page(part, row[LEDGER_PAGE], sequence, "ledger event")
            key = (row[USER], row[ASSET])
            if not self._take(part, sequence, {key: amount}, "ledger_events"):
                continue
            post(part.cache[key], sequence, amount, ledger_time_us(row))
            if sequence <= part.before:
                part.sums[row[ASSET]] = part.sums.get(row[ASSET], 0) + amount

    def note_rejected(self, part: Part, rows: list[Row]) -> None:
        """Note the sequences of some of a stream's rejected events."""
        for _, page, sequence, *_ in rows:
            if part.verified < sequence <= part.up_to:
                self._check_page(part, page, sequence, "rejected event")
                gap = part.agreed.gap_at_or_after(sequence)
                if gap is not None and gap[0] <= sequence:
                    self._odd("EVENT_AGAINST_DECISION", part, sequence, detail="a rejected event in an accepted gap")
                elif not self._mark(part, sequence):
                    self._odd("EVENT_TWICE", part, sequence, detail="a rejected event, and another row")
                else:
                    part.counts["rejected"] += 1

    def _check_page(self, part: Part, page: int, sequence: int, what: str) -> None:
        if page != sequence // ROW_PAGE_WIDTH:
            right = sequence // ROW_PAGE_WIDTH
            self._odd("WRONG_PAGE", part, sequence, expected=right, actual=page, detail=what)

    def _take(self, part: Part, sequence: int, postings: dict[AccountKey, int], kind: str) -> bool:
        """Say whether an event is to be posted, and note it; a forbidden, repeated or further one is not."""
        if sequence > part.top:
            for key in postings:
                if part.ahead.get(key) == sequence:
                    part.ahead_seen.add(key)
            return False
        if sequence < part.first or (part.forbids and part.is_forbidden(sequence)):
            why = "before the stream's first sequence" if sequence < part.first else kind.rstrip("s").replace("_", " ")
            self._odd("EVENT_AGAINST_DECISION", part, sequence, detail=why)
            for key, amount in postings.items():
                part.against.setdefault(key, []).append((sequence, amount))
            return False
        if not self._mark(part, sequence):
            self._odd("EVENT_TWICE", part, sequence, detail=kind.rstrip("s").replace("_", " "))
            return False
        part.counts[kind] += 1
        return True

    def _odd(self, code: str, part: Part, sequence: int | None, **more: Any) -> None:
        count = self._db.execute("SELECT COUNT(*) FROM odd").fetchone()[0]
        if count >= EVENT_FINDINGS_MAX:
            self.beyond_total += 1
            return
        finding = Finding(code=code, stream=part.name, sequence=sequence, **more)
        self._db.execute("INSERT OR IGNORE INTO odd VALUES (?)", (json.dumps(finding.as_dict()),))

    # --- what came out ---

    def find_missing(self) -> None:
        """Find the sequences that have no row, those that earlier proofs missed included."""
        for part in self.parts.values():
            found = without(list(self._holes(part)), part.agreed.gaps)
            self._db.executemany(
                "INSERT OR REPLACE INTO missing VALUES (?, ?, ?)", [(part.name, *each) for each in found]
            )
            query = "SELECT first, last FROM missing WHERE stream = ?"
            part.missing = Ranges(self._db.execute(query, (part.name,)).fetchall())

    def _holes(self, part: Part) -> Iterator[tuple[int, int]]:
        first, last = part.verified + 1, part.up_to
        if last < first:
            return
        hole: tuple[int, int] | None = None
        full = b"\xff" * (_CHUNK // 8)
        for chunk in range((first - part.first) // _CHUNK, (last - part.first) // _CHUNK + 1):
            bits: bytes | bytearray | None = part.bits.get(chunk)
            if bits is None:
                query = "SELECT bits FROM bits WHERE stream = ? AND chunk = ?"
                found = self._db.execute(query, (part.name, chunk)).fetchone()
                bits = found[0] if found else bytes(_CHUNK // 8)
            offset = part.first + chunk * _CHUNK
            for low, high in zeros(bits) if bits != full else ():
                low, high = max(low + offset, first), min(high + offset, last)  # noqa: PLW2901 - the same range
                if low > high:
                    continue
                if hole is not None and hole[1] + 1 == low:
                    hole = (hole[0], high)
                    continue
                if hole is not None:
                    yield hole
                hole = (low, high)
        if hole is not None:
            yield hole

    def odd_findings(self) -> list[Finding]:
        """Give the findings about events, those of earlier proofs included."""
        return [Finding(**json.loads(said)) for (said,) in self._db.execute("SELECT said FROM odd ORDER BY rowid")]

    def suspects(self) -> dict[tuple[str, int, int], list[int]]:
        """Give the accounts that deviate because an event's row was changed, with the sequences it may have been."""
        rows = self._db.execute("SELECT * FROM suspects")
        return {(stream, user, asset): json.loads(said) for stream, user, asset, said in rows}

    def suspect(self, stream: str, key: AccountKey, sequences: list[int]) -> None:
        """Remember that an account deviates because an event's row was changed: one of these."""
        self._db.execute("INSERT OR REPLACE INTO suspects VALUES (?, ?, ?, ?)", (stream, *key, json.dumps(sequences)))

    def judged(self) -> Iterator[list[tuple[str, AccountKey, StampedBalance | None, Fold, At]]]:
        """Go through the accounts whose row may deviate, some at a time: stream, key, row, fold, what was verified.

        Rows that no new event touched and that are what earlier proofs found are left out: SQLite compares them.
        """
        self._flush()
        fold = (
            "f.low, f.high, f.b_available, f.b_version, f.b_sequence, f.b_updated, f.c_available, f.c_version,"
            " f.c_sequence, f.c_first, f.c_updated"
        )
        base = "a.available, a.version, a.last_sequence, a.updated_at"
        same = "f.stream = r.stream AND f.user_id = r.user_id AND f.asset_id = r.asset_id"
        cursor = self._db.execute(
            f"SELECT r.stream, r.user_id, r.asset_id, 1, r.available, r.version, r.last_sequence, r.updated_at,"
            f" r.write_us, {base}, {fold} FROM rows r LEFT JOIN folds f ON {same}"
            f" LEFT JOIN accounts a ON {same.replace('f.', 'a.')} LEFT JOIN parts p ON p.stream = r.stream"
            " WHERE NOT COALESCE(f.user_id IS NULL AND r.available IS a.available AND r.version IS a.version"
            " AND r.last_sequence IS a.last_sequence AND r.write_us < p.next_stamp_us, 0)"
        )
        yield from self._pieces(cursor)
        nothing = "NULL, NULL, NULL, NULL, NULL"
        for table, more in (("folds", ""), ("accounts", " AND f.user_id IS NULL")):
            cursor = self._db.execute(
                f"SELECT t.stream, t.user_id, t.asset_id, NULL, {nothing}, {base}, {fold} FROM {table} t"
                f" LEFT JOIN rows r ON {same.replace('f.', 't.')}"
                f" LEFT JOIN folds f ON {same.replace('r.', 't.')}"
                f" LEFT JOIN accounts a ON {same.replace('f.', 'a.').replace('r.', 't.')}"
                f" WHERE r.user_id IS NULL{more}"
            )
            yield from self._pieces(cursor)

    def _pieces(
        self, cursor: sqlite3.Cursor
    ) -> Iterator[list[tuple[str, AccountKey, StampedBalance | None, Fold, At]]]:
        while rows := cursor.fetchmany(COMPARED_ROWS):
            piece = []
            for stream, user, asset, has_row, *rest in rows:
                row = None
                if has_row is not None:
                    row = StampedBalance(user, asset, stream, *rest[:5])
                base: At = NOWHERE if rest[6] is None else (int(rest[5]), rest[6], rest[7], rest[8])
                part = self.parts.get(stream)
                fold: Fold = []
                if part is not None:
                    fold = fold_of(part, row is not None, row.last_sequence if row else None, rest[5:9], rest[9:])
                piece.append((stream, (user, asset), row, fold, base))
            yield piece

    def save(self, fingerprints: dict[str, str]) -> None:
        """Make what was folded up to `before` what is verified."""
        self.put("unknown", self.unknown)
        self._db.execute(
            "INSERT OR REPLACE INTO accounts SELECT stream, user_id, asset_id, available, version, last_sequence,"
            " updated_at FROM folds WHERE version > 0"
        )
        for part in self.parts.values():
            kept = part.said()
            against = [each for each in kept["against"] if each[2] <= part.before]
            said = kept | {"against": against, "sequence": part.before, "fingerprint": fingerprints[part.name]}
            self._db.execute("INSERT OR REPLACE INTO verified VALUES (?, ?)", (part.name, json.dumps(said)))
            # What lies above is read again next time; a hole there may have been one of this moment.
            self._db.execute("DELETE FROM missing WHERE stream = ? AND first > ?", (part.name, part.before))
            self._db.execute(
                "UPDATE missing SET last = ? WHERE stream = ? AND last > ?", (part.before, part.name, part.before)
            )

    def totals(self, stream: str) -> dict[int, int]:
        """Add up the verified balances of a stream, by asset, exactly."""
        totals: dict[int, int] = {}
        query = (
            "SELECT asset_id, SUM(available >> 32), SUM(available & 4294967295) FROM accounts"
            " WHERE stream = ? AND typeof(available) = 'integer' GROUP BY asset_id"
        )
        for asset, high, low in self._db.execute(query, (stream,)):
            totals[asset] = (high << 32) + low
        query = "SELECT asset_id, available FROM accounts WHERE stream = ? AND typeof(available) <> 'integer'"
        for asset, amount in self._db.execute(query, (stream,)):
            totals[asset] = totals.get(asset, 0) + int(amount)
        return totals

    def missing_between(self, stream: str, first: int, last: int) -> int:
        """Count the sequences of a range that earlier proofs found no row of."""
        ranges = Ranges(self._db.execute("SELECT first, last FROM missing WHERE stream = ?", (stream,)).fetchall())
        return ranges.count_to(last) - ranges.count_to(first - 1)

    def base_of(self, stream: str, keys: Iterable[AccountKey]) -> dict[AccountKey, At]:
        """Give accounts as they were verified."""
        query = "SELECT available, version, last_sequence, updated_at FROM accounts"
        found: dict[AccountKey, At] = {}
        for user, asset in keys:
            row = self._db.execute(
                f"{query} WHERE stream = ? AND user_id = ? AND asset_id = ?", (stream, user, asset)
            ).fetchone()
            found[user, asset] = NOWHERE if row is None else (int(row[0]), *row[1:])
        return found
