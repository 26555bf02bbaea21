"""Texts that others wrote: made sound, shown, and read from files as lines, CSV and JSON's values."""

from __future__ import annotations

import codecs
import csv
import io
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MAX_LINE = 16 << 20  # characters of a table's line, and of its cell
_MAX_DEPTH = 32  # of lists and objects in a record
_UTF16_MARKS = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
_ODD = re.compile("[\0\ud800-\udfff]")  # NUL, and bytes that Python has escaped since they are no UTF-8
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})(\.\d{1,17})?([eE][+-]?\d{1,3})?")


def printable(text: str, length: int = 200) -> str:
    """Text of unknown origin for a line on the terminal: no control characters, and not too long."""
    clean = "".join(c if c.isprintable() else "?" for c in text[: length + 1])
    return clean if len(clean) <= length else clean[:length] + "..."


def sound_json(value: Any, depth: int = 0) -> Any:
    """A value that can be written as JSON in UTF-8, and read again by anybody.

    JSON may spell half a character ("\\ud83d"), as text that was cut does: it becomes U+FFFD. Dates become texts;
    numbers that aren't finite, what is nested too deep, and all else become None.
    """
    match value:
        case str():
            return sound_text(value)
        case float():
            return value if math.isfinite(value) else None
        case bool() | int():
            return value
        case list() | tuple() if depth < _MAX_DEPTH:
            return [sound_json(item, depth + 1) for item in value]
        case dict() if depth < _MAX_DEPTH:
            return {sound_text(str(name)): sound_json(item, depth + 1) for name, item in value.items()}
    return value.isoformat() if hasattr(value, "isoformat") else None


def sound_text(text: str) -> str:
    """Text that UTF-8 can hold: lone surrogates become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def text_of(data: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 where it begins with that mark.

    Raises:
        ValueError: it is neither; the message says in which line, and what to do.
    """
    try:
        text = data.decode("utf-16" if data.startswith(_UTF16_MARKS) else "utf-8-sig")
        line = text.count("\n", 0, text.find("\0")) if "\0" in text else None  # UTF-16 without its mark, or no text
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
    if line is not None:
        raise _no_text(line + 1)
    return text


def lines_of(path: Path) -> Iterator[str]:
    """The lines of such a file as they come, with their ends.

    Raises:
        ValueError: as `text_of`.
    """
    with path.open("rb") as file:
        if file.read(2).startswith(_UTF16_MARKS):  # seldom, and small: not read line by line
            file.seek(0)
            yield from io.StringIO(text_of(file.read()), newline="")
            return
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        for number, line in enumerate(lines, start=1):
            if _ODD.search(line):
                raise _no_text(number)
            yield line


def _no_text(line: int) -> ValueError:
    return ValueError(f"line {line} is not UTF-8; convert it, as by `iconv -f latin1 -t utf-8`")


def number_or_text(cell: str) -> int | float | str:
    """A cell of a text table: the number that it writes, or itself. "007" and "1,5" are no numbers."""
    if _NUMBER.fullmatch(cell):
        value = float(cell)
        if math.isfinite(value):
            return int(cell) if cell.lstrip("-").isdigit() else value
    return cell


def csv_rows(lines: Iterable[str], delimiter: str = ",") -> Iterator[tuple[int, list[str] | str]]:
    """The rows of a CSV text, the header too: the line that each begins in, and its cells or why it has none."""
    limit = csv.field_size_limit(MAX_LINE)
    try:
        # Strict: else a quote that is never closed makes one cell of all that follows.
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, f"not CSV ({error})"
                continue
            if cells:  # or else a blank line
                yield number, cells
    finally:
        csv.field_size_limit(limit)
