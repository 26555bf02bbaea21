"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import math
import os

from finetune.data.shards.images import MAX_PIXELS
from finetune.terminal import positive

MOST_WORKERS = 16  # one process reads for all of them, and feeds no more than about that


def natural(text: str) -> int:
    """An argument that is a whole number of at least 0."""
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def probability(text: str) -> float:
    """An argument from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def side(text: str) -> int:
    """An argument that is the side of a square of pixels, of which no more are decoded either."""
    value = positive(text)
    if value * value > MAX_PIXELS:
        raise argparse.ArgumentTypeError(f"{text} is too large a side; {math.isqrt(MAX_PIXELS)} is the most")
    return value


def default_workers(processes: int = 1) -> int:
    """One for each CPU that this process may use, shared with other `processes` of ours on this machine."""
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // processes))


def add_workers_argument(parser: argparse.ArgumentParser) -> None:
    """--workers; None where it isn't given."""
    parser.add_argument(
        "--workers",
        type=natural,
        metavar="N",
        help=f"processes that decode; 0: only this one (default: one a CPU, at most {MOST_WORKERS})",
    )


def add_shard_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """--background, --shard-samples, --overwrite of a command that writes shards to the folder `out`."""
    parser.add_argument(
        "--background", default="white", metavar="COLOUR", help="behind transparent pixels (default: white)"
    )
    parser.add_argument(
        "--shard-samples",
        type=positive,
        default=10_000,
        metavar="N",
        help="samples in a shard (default: 10000)",
    )
    parser.add_argument("--overwrite", action="store_true", help=f"replace shards that {out} already holds")
