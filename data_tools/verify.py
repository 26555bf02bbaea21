"""Check a set of shards: files, checksums, tars, indexes, records, latents, pictures, keys.

Prints every problem with its file and sample (up to 1,000 of a shard), and exits with 1 if there is any. Each
worker checks shards of its own; pictures, label maps and masks are decoded too. Where classes have names, every
class, box and label must be one of theirs.

examples:
  data-tools verify latents/photos
  data-tools verify shards/photos --no-decode
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_tools.arguments import add_workers_argument, default_workers
from data_tools.labels import read_map
from data_tools.workers import CrashError, Workers
from finetune.data.shards import (
    CLASSES,
    IMAGE_MEMBERS,
    LOWRES,
    MAP,
    MASK,
    Manifest,
    Problem,
    ShardError,
    ShardInfo,
    parse_classes,
    set_folder,
    verify,
)
from finetune.data.shards.images import MAX_PIXELS, PictureError, decode_rgb
from finetune.data.shards.labels import png_header
from finetune.data.shards.verify import Checked

_FEW_BYTES = 64 << 20  # a set of no more isn't worth the start of workers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools verify`."""
    parser.add_argument("shards", type=set_folder, metavar="SHARDS", help="folder with manifest.json")
    add_workers_argument(parser)
    parser.add_argument("--no-decode", action="store_true", help="trust checksums, don't decode the pictures")


def run(args: argparse.Namespace) -> int:
    """Run `data-tools verify`: 0 when all is well, 1 when there are problems."""
    manifest = Manifest.load(args.shards)
    workers = default_workers() if args.workers is None else args.workers
    few = len(manifest.shards) < 2 or manifest.bytes < _FEW_BYTES
    check = None if args.no_decode else functools.partial(_decodes, classes=_class_count(args.shards, manifest))
    with (
        Workers(0 if few else workers) as pool,
        tqdm(total=manifest.bytes, unit="B", unit_scale=True, disable=None) as bar,
    ):
        problems = verify(args.shards, bar.update, check, functools.partial(_each, pool))
    for problem in problems:
        print(problem)
    what = f"{manifest.samples} {manifest.kind}, {len(manifest.shards)} shards, {manifest.bytes:,} bytes"
    verdict = f"{len(problems)} problems" if problems else "all well"
    print(f"{args.shards}: {what}: {verdict}")
    return 1 if problems else 0


def _each(
    pool: Workers, function: Callable[[ShardInfo], Checked], shards: Sequence[ShardInfo]
) -> Iterator[Checked]:
    """`map` over worker processes; a shard that crashes them is a problem like any other."""
    for shard, result in pool.map(function, shards, catch=(CrashError,), name=lambda shard: shard.name):
        if isinstance(result, BaseException):
            yield np.zeros(0, np.uint64), [Problem(shard.name, None, str(result))]
        else:
            yield result


def _class_count(root: Path, manifest: Manifest) -> int | None:
    """How many classes have names; None where none have, or where `verify` will say that they can't be read."""
    if manifest.classes is None:
        return None
    try:
        return len(parse_classes((root / CLASSES).read_bytes()))
    except (OSError, ShardError):
        return None


def _decodes(member: str, data: bytes, classes: int | None = None) -> str | None:
    try:
        if member in IMAGE_MEMBERS or member == LOWRES:
            decode_rgb(data)
        elif member in (MAP, MASK) and (header := png_header(data)) and header[2:] == (8, 0):
            # Others are no maps: in latents `verify` says so, in pictures from elsewhere they may mean anything.
            if header[0] * header[1] > MAX_PIXELS:
                return f"{header[0]}x{header[1]} pixels, the limit is {MAX_PIXELS}"
            read_map(data, header[:2], classes=classes if member == MAP else None)
    except PictureError as error:
        return f"can't be decoded: {error}"
    return None
