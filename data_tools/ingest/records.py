"""From a row of a source to a record: its captions and labels, and which columns hold them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from typing import Any

from data_tools.pictures import CAPTION_COLUMNS
from data_tools.texts import sound_json, sound_text
from finetune import UserError

RESERVED = ("captions", "file", "original_size", "crop")
"""What a record says of the picture: a column of such a name can't be a label."""


def clean_captions(captions: Iterable[Any]) -> list[str]:
    """Captions with their white space collapsed, without empty ones and repeats."""
    texts = (" ".join(sound_text(str(caption)).split()) for caption in captions if caption is not None)
    return list(dict.fromkeys(text for text in texts if text))


def captions_of(values: Iterable[Any]) -> list[str]:
    """The captions in some cells of a row: a text each, or a list of texts, or nothing.

    Numbers count as texts, but for those that aren't finite: pandas writes a missing text as NaN.
    """
    texts: list[Any] = []
    for value in values:
        texts += value if isinstance(value, list | tuple) else [value]
    return clean_captions(filter(_is_caption, texts))


def _is_caption(value: Any) -> bool:
    match value:
        case bool():
            return False
        case float():
            return math.isfinite(value)
    return isinstance(value, str | int)


def labels_of(row: Mapping[str, Any], leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """The fields of a row that a record keeps: those with a name, and a value that JSON can hold."""
    left_out = {*RESERVED, *leave_out}
    labels = {sound_text(name): sound_json(value) for name, value in row.items() if name and name not in left_out}
    return {name: value for name, value in labels.items() if value is not None}


def add_caption_argument(parser: argparse.ArgumentParser) -> None:
    """--caption-column."""
    parser.add_argument(
        "--caption-column",
        action="append",
        default=[],
        metavar="NAME",
        help="column of captions, a text or a list of texts; may be repeated",
    )


def choose_column(flag: str, what: str, columns: Iterable[str], candidates: Iterable[str]) -> str | None:
    """The one column that can be meant, or None if there is none.

    Raises:
        UserError: there are several; names them, and the flag that decides.
    """
    found = list(dict.fromkeys(candidates))
    if len(found) > 1:
        listed = ", ".join(columns)
        raise UserError(f"{' and '.join(found)} may hold the {what}; give {flag} (columns: {listed})")
    return found[0] if found else None


def check_columns(flag: str, names: Iterable[str], columns: Iterable[str]) -> None:
    """Refuse names that are no columns."""
    known = list(columns)
    for name in names:
        if name not in known:
            raise UserError(f"{flag} {name}: no such column (columns: {', '.join(known)})")


def named(columns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The columns that have one of the names, in any case."""
    known = set(names)
    return [column for column in columns if column.strip().lower() in known]


def caption_columns(asked: list[str], columns: list[str], texts: list[str]) -> list[str]:
    """The columns of --caption-column, or the one column of texts whose name says that it has captions.

    Raises:
        UserError: no such column, or several that may be meant.
    """
    if asked:
        check_columns("--caption-column", asked, columns)
        return asked
    found = choose_column("--caption-column", "captions", columns, named(texts, CAPTION_COLUMNS))
    if found is None:
        print(
            f"note: no captions are taken; name their column with --caption-column (columns: {', '.join(columns)})"
        )
        return []
    return [found]
