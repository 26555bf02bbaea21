"""What a check says, and how it is printed."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

OK, WARN, FAIL, SKIPPED = "ok", "warn", "FAIL", "skipped"
_COLOURS = {OK: "green", WARN: "yellow", FAIL: "bold red", SKIPPED: "dim"}


@dataclass(frozen=True)
class Row:
    """One result: `OK`, `WARN`, `FAIL` or `SKIPPED`; what was seen (or why it was skipped); what to do about it."""

    name: str
    result: str
    seen: str
    remedy: str = ""


def exit_code(rows: Iterable[Row]) -> int:
    """0 when nothing failed; warnings are allowed."""
    return int(any(row.result == FAIL for row in rows))


def show(rows: Sequence[Row], seconds: float) -> None:
    """Print all rows and a line that counts them: a table on a terminal, else plain lines without colours."""
    rows = merged(rows)
    counts = {result: sum(row.result == result for row in rows) for result in (OK, WARN, FAIL, SKIPPED)}
    summary = ", ".join(f"{count} {result}" for result, count in counts.items() if count)
    if sys.stdout.isatty():
        _show_table(rows)
    else:
        print("\n".join(line for row in rows for line in plain(row)))
    print(f"doctor: {summary} ({seconds:.0f} s)", flush=True)


def merged(rows: Sequence[Row]) -> list[Row]:
    """Neighbours that were skipped for one reason become one row."""
    short: list[Row] = []
    names: list[str] = []
    for row in rows:
        if short and row.result == SKIPPED == short[-1].result and row.seen == names[0]:
            names.append(row.name)
            short[-1] = Row("the rest", SKIPPED, f"{', '.join(names[1:])}: {names[0]}")
        else:
            short.append(row)
            names = [row.seen, row.name]
    return short


def plain(row: Row, width: int = 140) -> list[str]:
    """The lines of a row in a log."""
    first, rest = f"{row.result:<8}{row.name:<15}", " " * 23
    lines = textwrap.wrap(row.seen, width, initial_indent=first, subsequent_indent=rest) or [first]
    if row.remedy:
        lines += textwrap.wrap(f"remedy: {row.remedy}", width, initial_indent=rest, subsequent_indent=rest)
    return lines


def _show_table(rows: Sequence[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, width=min(160, shutil.get_terminal_size().columns))
    for heading, ratio in (("check", None), ("result", None), ("what was seen", 3), ("remedy", 2)):
        table.add_column(heading, ratio=ratio, no_wrap=ratio is None, overflow="fold")
    for row in rows:
        # As `Text`: brackets of a config key are no markup.
        table.add_row(Text(row.name), Text(row.result, _COLOURS[row.result]), Text(row.seen), Text(row.remedy))
    Console().print(table)
