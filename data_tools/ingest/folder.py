"""Make image shards from a folder of pictures and captions.

Pictures are found in DIR and below. The caption of `cat.jpg` is the text of `cat.txt` beside it, or
stands in a `metadata.jsonl` or `metadata.csv` in that folder or above (columns file_name and text,
caption or captions, as in Hugging Face's imagefolder; other columns are kept as labels). Pictures keep
their bytes unless --size or --format is given; gif, bmp, tiff, avif and animations become png. Those that
can't be decoded are listed in SHARDS/rejects.jsonl and the rest goes on.

examples:
  data-tools ingest folder photos --out shards/photos
  data-tools ingest folder photos --out shards/photos-512 --size 512 --format webp
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.images import (
    SUFFIXES,
    PictureError,
    decode_rgb,
    encode_image,
    fit,
    parse_colour,
    picture_format,
)
from data_tools.ingest.common import RESERVED, add_output_arguments, check_quality, clean_captions, positive
from data_tools.output import Rejects, claimed_folder
from finetune import UserError
from finetune.data.shards import Bucket, ShardWriter, json_bytes

_METADATA = ("metadata.jsonl", "metadata.csv")
_CAPTION_COLUMNS = ("captions", "caption", "text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools ingest folder`."""
    parser.add_argument("source", type=Path, metavar="DIR", help="folder of pictures")
    parser.add_argument(
        "--size", type=positive, metavar="N", help="resize the short side to N pixels and crop the centre"
    )
    formats = ("keep", "png", "webp", "jpg")
    add_output_arguments(parser, formats, "default: keep the original bytes; png with --size")


def run(args: argparse.Namespace) -> int:
    """Run `data-tools ingest folder`."""
    check_quality(args.quality)
    background = parse_colour(args.background)
    if args.size and args.format == "keep":
        raise UserError("--format keep and --size contradict each other; give --format png, webp or jpg")
    if not args.source.is_dir():
        raise UserError(f"no folder {args.source}; give the folder that holds the pictures")
    member = args.format or ("png" if args.size else "keep")
    listing = scan(args.source)
    rejects = Rejects()
    without_caption: list[str] = []
    with claimed_folder(args.out, args.overwrite) as out:
        uniform = None if args.size else _uniform_size(args.source, listing.pictures)
        with ShardWriter(out, "images", max_samples=args.shard_samples) as writer:
            samples = 0
            for number, name in enumerate(tqdm(listing.pictures, unit="picture", disable=None)):
                try:
                    data = (args.source / name).read_bytes()
                    kept, record, data = _prepare(data, member, args.size, args.quality, background)
                except (PictureError, OSError) as error:
                    rejects.add(name, (isinstance(error, OSError) and error.strerror) or str(error))
                    continue
                captions, labels = listing.describe(args.source, name)
                if not captions:
                    without_caption.append(name)
                record = {"captions": captions, "file": name, **record, **labels}
                bucket: Bucket | None = (args.size, args.size) if args.size else uniform
                writer.write(f"{number:09d}", {kept: data, "json": json_bytes(record)}, bucket)
                samples += 1
            for name in sorted(listing.metadata.keys() - set(listing.pictures)):
                rejects.add(name, f"named in {listing.metadata[name].origin}, but no such picture")
            rejects.require_some_left(samples, str(args.source))
            rejects.save(out)
            writer.finish()
    if without_caption:
        print(f"{len(without_caption)} pictures have no caption, the first is {without_caption[0]}")
    print(f"{samples} pictures in {args.out}{rejects.summary(args.out)}")
    return 0


def _prepare(
    data: bytes, member: str, size: int | None, quality: int, background: tuple[int, int, int]
) -> tuple[str, dict[str, Any], bytes]:
    """(member name, part of the record, bytes) of a picture. It is always decoded: damage is found here."""
    image = decode_rgb(data, background)
    record: dict[str, Any] = {"original_size": [image.height, image.width]}
    if member == "keep":
        kept, _ = picture_format(data)
        if kept is not None:
            return kept, record, data
        member = "png"
    if size:
        image, _, record["crop"] = fit(image, size, size)
    return member, record, encode_image(image, member, quality)


def _uniform_size(root: Path, pictures: list[str]) -> Bucket | None:
    """The (height, width) that all pictures share, from their headers; None at the first that differs."""
    size = None
    for name in pictures:
        try:
            _, found = picture_format((root / name).read_bytes())
        except (PictureError, OSError):
            continue
        if size is not None and found != size:
            return None
        size = found
    return size


# --- captions ---------------------------------------------------------------------------------------


@dataclass
class _Row:
    origin: str  # the metadata file, relative to the source
    captions: list[str]
    labels: dict[str, Any]


@dataclass
class Listing:
    """The pictures of a folder (posix paths relative to it, sorted), and what metadata files say of them."""

    pictures: list[str] = field(default_factory=list)
    metadata: dict[str, _Row] = field(default_factory=dict)

    def describe(self, root: Path, name: str) -> tuple[list[str], dict[str, Any]]:
        """(captions, labels) of a picture: its metadata row first, then the `.txt` beside it."""
        row = self.metadata.get(name)
        if row is not None and row.captions:
            return row.captions, row.labels
        sidecar = (root / name).with_suffix(".txt")
        captions = []
        if sidecar.is_file():
            captions = clean_captions([sidecar.read_text(encoding="utf-8-sig", errors="replace")])
        return captions, row.labels if row is not None else {}


def scan(root: Path) -> Listing:
    """List pictures and read metadata files, in `root` and below; names that begin with a dot are skipped.

    Raises:
        UserError: a metadata file has a broken line, or no file_name column.
    """
    listing = Listing()
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        base = Path(folder).relative_to(root)
        for name in sorted(files):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                listing.pictures.append((base / name).as_posix())
            elif name in _METADATA:
                _read_metadata(root, base / name, listing.metadata)
    listing.pictures.sort()
    return listing


def _read_metadata(root: Path, path: Path, metadata: dict[str, _Row]) -> None:
    rows = _jsonl_rows(root / path) if path.suffix == ".jsonl" else _csv_rows(root / path)
    for where, row in rows:
        name = row.pop("file_name", None)
        if not isinstance(name, str) or not name:
            raise UserError(f"{where} has no file_name; each row names its picture, relative to the file's folder")
        captions: list[Any] = []
        for column in _CAPTION_COLUMNS:
            value = row.pop(column, None)
            captions += value if isinstance(value, list) else [value]
        key = Path(os.path.normpath(path.parent / name)).as_posix()
        labels = {column: value for column, value in row.items() if column not in RESERVED}
        known = metadata.setdefault(key, _Row(path.as_posix(), [], {}))  # a picture may have a row per caption
        known.captions = clean_captions([*known.captions, *captions])
        known.labels.update(labels)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not JSON ({error}); mend it or delete it") from None
            if not isinstance(row, dict):
                raise UserError(f'{path}, line {number} is not an object; write {{"file_name": ..., "text": ...}}')
            yield f"{path}, line {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        for row in (reader := csv.DictReader(lines)):
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where} does not have the {len(reader.fieldnames or ())} columns of the header")
            captions = row.get("captions", "")
            if captions.lstrip().startswith("["):  # a list, as JSON in the cell
                try:
                    yield where, {**row, "captions": json.loads(captions)}
                except ValueError:
                    raise UserError(f"{where}: captions is not a JSON list; quote it as CSV asks") from None
            else:
                yield where, dict(row)
