"""The arguments that sources share, and what they say is done with each picture."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from data_tools.arguments import add_shard_arguments, add_workers_argument, probability, side
from data_tools.filters import Filters, add_filter_arguments
from data_tools.images import parse_colour
from data_tools.labels import LEAST_OF_A_BOX
from finetune import UserError
from finetune.data.shards.images import MAX_PIXELS
from finetune.terminal import positive

FORMATS = ("keep", "png", "webp", "jpg")


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """--size, the filters, --workers, and those of `add_output_arguments`."""
    parser.add_argument(
        "--size", type=side, metavar="N", help="resize the short side to N pixels and crop the centre"
    )
    add_output_arguments(parser, FORMATS, "default: keep the original bytes; png with --size")
    parser.add_argument(
        "--max-pixels",
        type=positive,
        default=MAX_PIXELS,
        metavar="N",
        help=f"set larger pictures aside, but for JPEGs, read at a reduced scale then (default: {MAX_PIXELS})",
    )
    parser.add_argument(
        "--min-box",
        type=probability,
        default=LEAST_OF_A_BOX,
        metavar="SHARE",
        help=f"leave out boxes of which less is left by --size (default: {LEAST_OF_A_BOX})",
    )
    add_workers_argument(parser)
    add_filter_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser, formats: tuple[str, ...], default: str) -> None:
    """--out, --format, --quality, and those of `add_shard_arguments`."""
    parser.add_argument("--out", type=Path, required=True, metavar="SHARDS", help="folder for the image shards")
    parser.add_argument("--format", choices=formats, help=f"format of the pictures in the shards ({default})")
    parser.add_argument("--quality", type=int, default=95, help="of webp and jpg, 1 to 100 (default: 95)")
    add_shard_arguments(parser, "SHARDS")


def check_quality(quality: int) -> None:
    """Refuse a quality outside 1 to 100."""
    if not 1 <= quality <= 100:
        raise UserError(f"--quality {quality} is outside 1 to 100")


@dataclass(frozen=True)
class Options:
    """What is done with each picture."""

    member: str  # format in the shards, or "keep"
    size: int | None
    quality: int
    background: tuple[int, int, int]
    max_pixels: int
    filters: Filters
    min_box: float = LEAST_OF_A_BOX
    classes: int | None = None  # how many have names; None: nothing is known of them

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Options:
        """From the arguments of `add_picture_arguments`.

        Raises:
            UserError: a value that is out of range, or contradicts another.
        """
        check_quality(args.quality)
        background = parse_colour(args.background)
        if args.size and args.format == "keep":
            raise UserError("--format keep and --size contradict each other; give --format png, webp or jpg")
        member = args.format or ("png" if args.size else "keep")
        filters = Filters.from_args(args)
        return cls(member, args.size, args.quality, background, args.max_pixels, filters, args.min_box)
