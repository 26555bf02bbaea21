"""What every source shares: arguments of the output, and the form of a record."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune import UserError

RESERVED = ("captions", "file", "original_size", "crop")


def add_output_arguments(parser: argparse.ArgumentParser, formats: tuple[str, ...], default: str) -> None:
    """--out, --format, --quality, and those of `add_shard_arguments`."""
    parser.add_argument("--out", type=Path, required=True, metavar="SHARDS", help="folder for the image shards")
    parser.add_argument("--format", choices=formats, help=f"format of the pictures in the shards ({default})")
    parser.add_argument("--quality", type=int, default=95, help="of webp and jpg, 1 to 100 (default: 95)")
    add_shard_arguments(parser, "SHARDS")


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


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    value = int(text) if text.strip().lstrip("+").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def check_quality(quality: int) -> None:
    """Refuse a quality outside 1 to 100."""
    if not 1 <= quality <= 100:
        raise UserError(f"--quality {quality} is outside 1 to 100")


def clean_captions(captions: Iterable[Any]) -> list[str]:
    """Captions with their white space collapsed, without empty ones and repeats."""
    texts = (" ".join(str(caption).split()) for caption in captions if caption is not None)
    return list(dict.fromkeys(text for text in texts if text))
