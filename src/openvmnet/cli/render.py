"""Tables and fields for a person: drawn by rich on a terminal, plain aligned text everywhere else.

What a guest or a user named (host names, VM names) is text from outside: `clean` takes its control characters away,
so that no name moves the cursor or renames the window.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_TIMES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
_NONE = "-"


class Column(msgspec.Struct, frozen=True):
    """A column's title; numbers stand to the right."""

    title: str
    right: bool = False


def clean(value: object) -> str:
    """`value` as text without control or other unprintable characters; '-' for None and for nothing."""
    text = _NONE if value is None else str(value)
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text) or _NONE


def table(columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on standard output."""
    cells = [[clean(value) for value in row] for row in rows]
    if sys.stdout.isatty():
        _draw(columns, cells)
        return
    lines = [[column.title for column in columns], *cells]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
    for line in lines:
        print(
            "  ".join(
                _pad(cell, width, column) for cell, width, column in zip(line, widths, columns, strict=True)
            ).rstrip()
        )


def fields(pairs: Iterable[tuple[str, object]]) -> None:
    """Print names and values, a pair a line, values aligned."""
    shown = [(name, clean(value)) for name, value in pairs]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name:<{width}}  {value}")


def json(value: object) -> None:
    """Print `value` as indented JSON."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def size(octets: int) -> str:
    """Octets in the decimal unit that leaves at most four digits: `1.5 MB`."""
    value = float(octets)
    for unit in _UNITS:
        if value < 999.5 or unit == _UNITS[-1]:
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: `2 d 3 h`, `5 min 12 s`, `7 s`."""
    left = max(0, int(seconds))
    counts = []
    for length, _ in _TIMES:
        count, left = divmod(left, length)
        counts.append(count)
    first = next((at for at, count in enumerate(counts) if count), len(counts) - 1)
    shown = [f"{counts[at]} {_TIMES[at][1]}" for at in range(first, min(first + 2, len(counts))) if counts[at]]
    return " ".join(shown) or "0 s"


def _pad(cell: str, width: int, column: Column) -> str:
    return cell.rjust(width) if column.right else cell.ljust(width)


def _draw(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        drawn.add_column(column.title, justify="right" if column.right else "left")
    for row in cells:
        drawn.add_row(*(Text(cell) for cell in row))
    Console().print(drawn)
