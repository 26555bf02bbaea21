"""Refusing values that no run can use: one line that names the key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from finetune import UserError
from finetune.config.schema import WatchConfig

N = TypeVar("N")

LARGEST = 1e15
"""No setting is larger: what is, is a slip, and overflows float32, clocks or indices."""
LARGEST_SIZE = 10**6
LARGEST_SIDE = 16384
"""Of a picture, in pixels."""


def require(
    values: Mapping[str, N | None], holds: Callable[[N], bool], rule: str, *, most: float = LARGEST
) -> None:
    """Refuse values out of range; of None nothing is asked.

    Args:
        values: by config key.
        rule: ends the line, as in "train.steps=0 must be at least 1".
        most: no value may be larger; so none is infinite.

    Raises:
        UserError: names the first key that `holds` is false for, or whose value is too large.
    """
    for key, value in values.items():
        if value is None:
            continue
        if not holds(value):
            raise UserError(f"{key}={value} {rule}")
        if not value <= most:  # type: ignore[operator]
            raise UserError(f"{key}={value} must be at most {most:.15g}")


def require_sizes(sizes: Mapping[str, Any], most: float = LARGEST_SIZE) -> None:
    """Refuse what is no count of something in memory; of lists, one for each level of a model, each entry.

    Raises:
        UserError: names the first such key; of None nothing is asked.
    """
    for key, size in sizes.items():
        for each in size if isinstance(size, list | tuple) else [size]:
            if isinstance(each, list | tuple):
                require_sizes({key: each}, most)
            elif each is not None and (isinstance(each, bool) or not isinstance(each, int) or each < 1):
                raise UserError(f"{key}={each} must be a whole number of at least 1")
            elif each is not None:
                require({key: each}, lambda _: True, "", most=most)


def require_finite(values: Mapping[str, float]) -> None:
    """Refuse what is no number, or too large a one on either side of 0.

    Raises:
        UserError: names the first such key.
    """
    require(values, lambda value: value >= -LARGEST, "must be a finite number")


def require_bounds(watch: WatchConfig) -> None:
    """Refuse bounds that no watch can keep.

    Raises:
        UserError: names the key.
    """
    month = 30 * 86400
    start = {"watch.start_s": watch.start_s}
    require(start, lambda value: 0 < value <= month, f"must be greater than 0, and {month} at most (30 days)")
    bounds = {"watch.lost_s": watch.lost_s, "watch.stalled_s": watch.stalled_s}
    rule = f"is in seconds: 1 to {month} (30 days), or 0 for never"
    require(bounds, lambda value: value == 0 or 1 <= value <= month, rule)


def require_choice(values: Mapping[str, tuple[str, Sequence[str]]]) -> None:
    """Refuse names that are not known: `values` holds the name and the known ones by config key.

    Raises:
        UserError: names the first such key and what it may be.
    """
    for key, (value, known) in values.items():
        if value not in known:
            raise UserError(f"{key}={value} is not known: choose one of {', '.join(known)}")
