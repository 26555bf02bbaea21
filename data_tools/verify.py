"""Check a set of shards: files, checksums, tars, indexes, records, latents, pictures, keys.

Prints every problem with its file and sample, and exits with 1 if there is any.

examples:
  data-tools verify latents/photos
  data-tools verify shards/photos --no-decode
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from data_tools.images import PictureError, decode_rgb
from finetune.data.shards import IMAGE_MEMBERS, Manifest, verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools verify`."""
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder with manifest.json")
    parser.add_argument("--no-decode", action="store_true", help="trust checksums, don't decode the pictures")


def run(args: argparse.Namespace) -> int:
    """Run `data-tools verify`: 0 when all is well, 1 when there are problems."""
    manifest = Manifest.load(args.shards)
    with tqdm(total=manifest.bytes, unit="B", unit_scale=True, disable=None) as bar:
        problems = verify(args.shards, progress=bar.update, check=None if args.no_decode else _decodes)
    for problem in problems:
        print(problem)
    what = f"{manifest.samples} {manifest.kind}, {len(manifest.shards)} shards, {manifest.bytes:,} bytes"
    verdict = f"{len(problems)} problems" if problems else "all well"
    print(f"{args.shards}: {what}: {verdict}")
    return 1 if problems else 0


def _decodes(member: str, data: bytes) -> str | None:
    if member not in IMAGE_MEMBERS:
        return None
    try:
        decode_rgb(data)
    except PictureError as error:
        return f"can't be decoded: {error}"
    return None
