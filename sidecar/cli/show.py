"""What a person reads: amounts with their decimals, tables, times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any


def amount(smallest_units: int, decimals: int) -> str:
    """Write an amount of smallest units with its decimal point: 150000000 with 8 decimals is 1.50000000."""
    sign = "-" if smallest_units < 0 else ""
    whole, rest = divmod(abs(smallest_units), 10**decimals)
    return f"{sign}{whole}.{rest:0{decimals}d}" if decimals else f"{sign}{whole}"


def moment(time_us: int) -> str:
    """Write a time of us since 1970 in UTC; a dash for 0, which means unknown."""
    return datetime.fromtimestamp(time_us / 1e6, UTC).isoformat(timespec="milliseconds") if time_us else "-"


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Lay rows out in columns: numbers to the right, text to the left."""
    lines = [list(heads), *([("-" if cell is None else str(cell)) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    right = [len(lines) > 1 and all(_is_number(line[column]) for line in lines[1:]) for column in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _is_number(text: str) -> bool:
    return text == "-" or text.lstrip("-").replace(".", "", 1).isdigit()
