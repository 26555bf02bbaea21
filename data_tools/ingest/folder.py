"""Make image shards from a folder of pictures and captions.

Pictures are found in DIR and below. The caption of `cat.jpg` is the text of `cat.txt` beside it, or
stands in a `metadata.jsonl` or `metadata.csv` in that folder or above (columns file_name and text,
caption or captions, as in Hugging Face's imagefolder; other columns are kept as labels). Pictures keep
their bytes unless --size or --format is given; gif, bmp, tiff, avif and animations become png. Those that
can't be decoded are listed in SHARDS/rejects.jsonl and the rest goes on; links to folders, and pictures of kinds
that can't be read (HEIC, JPEG XL, raw, SVG, ...), are listed there too.

examples:
  data-tools ingest folder photos --out shards/photos
  data-tools ingest folder photos --out shards/photos-512 --size 512 --format webp
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.images import SUFFIXES, UNREAD_SUFFIXES
from data_tools.ingest.common import (
    CAPTION_COLUMNS,
    Found,
    Options,
    SetAside,
    add_picture_arguments,
    captions_of,
    clean_captions,
    ingest,
    labels_of,
    number_or_text,
)
from finetune import UserError

_METADATA = ("metadata.jsonl", "metadata.csv")
_KINDS = 5  # of other files, that are named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools ingest folder`."""
    parser.add_argument("source", type=Path, metavar="DIR", help="folder of pictures")
    add_picture_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run `data-tools ingest folder`."""
    options = Options.from_args(args)
    if not args.source.is_dir():
        raise UserError(f"no folder {args.source}; give the folder that holds the pictures")
    listing = scan(args.source, args.out)
    items = _found(args.source, listing)
    total = len(listing.pictures)
    code = ingest(args, options, items, source=str(args.source), paths=[args.source], total=total)
    if others := listing.others:
        kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in others.most_common(_KINDS))
        rest = sum(count for _, count in others.most_common()[_KINDS:])
        print(
            f"{others.total()} other files were not looked at ({kinds}{f', {rest} of other kinds' if rest else ''})"
        )
    return code


def _found(root: Path, listing: Listing) -> Iterator[Found | SetAside]:
    for number, name in enumerate(listing.pictures):
        captions, labels = listing.describe(root, name)
        yield Found(f"{number:09d}", name, root / name, {"captions": captions, "file": name, **labels})
    for name, reason in listing.unread:
        yield SetAside(name, reason)
    for name in sorted(listing.metadata.keys() - set(listing.pictures) - {name for name, _ in listing.unread}):
        yield SetAside(name, f"named in {listing.metadata[name].origin}, but no such picture")


# --- captions ---------------------------------------------------------------------------------------


@dataclass
class _Row:
    origin: str  # the metadata file, relative to the source
    captions: list[str]
    labels: dict[str, Any]


@dataclass
class Listing:
    """The pictures of a folder (posix paths relative to it, sorted), and what metadata files say of them.

    `unread` are (path, reason) of pictures that can't be read and of folders that weren't entered; `others` counts
    the files that are neither pictures nor captions, by suffix.
    """

    pictures: list[str] = field(default_factory=list)
    unread: list[tuple[str, str]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
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


def scan(root: Path, out: Path) -> Listing:
    """List pictures and read metadata files, in `root` and below, but for names that begin with a dot, and `out`.

    Raises:
        UserError: a metadata file has a broken line, or no file_name column.
    """
    listing = Listing()

    def closed(error: OSError) -> None:
        name = os.path.relpath(error.filename, root)
        listing.unread.append((name, f"a folder that can't be read ({error.strerror})"))

    for folder, folders, files in os.walk(root, onerror=closed):
        base = Path(folder).relative_to(root)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _same(folder, name, out))
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):  # it may lead back here, or to the same pictures
                listing.unread.append(((base / name).as_posix(), "a link to a folder; give that folder itself"))
        for name in sorted(files):
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                continue
            if suffix in SUFFIXES:
                listing.pictures.append((base / name).as_posix())
            elif suffix in UNREAD_SUFFIXES:
                reason = f"{suffix} files can't be read; convert them to JPEG or PNG"
                listing.unread.append(((base / name).as_posix(), reason))
            elif name in _METADATA:
                _read_metadata(root, base / name, listing.metadata)
            elif suffix != ".txt":
                listing.others[suffix] += 1
    listing.pictures.sort()
    listing.unread.sort()
    return listing


def _same(folder: str, name: str, out: Path) -> bool:
    return name == out.name and os.path.realpath(os.path.join(folder, name)) == os.path.realpath(out)


def _read_metadata(root: Path, path: Path, metadata: dict[str, _Row]) -> None:
    rows = _jsonl_rows(root / path) if path.suffix == ".jsonl" else _csv_rows(root / path)
    for where, row in rows:
        name = row.pop("file_name", None)
        if not isinstance(name, str) or not name:
            raise UserError(f"{where} has no file_name; each row names its picture, relative to the file's folder")
        captions = captions_of(row.pop(column, None) for column in CAPTION_COLUMNS)
        key = Path(os.path.normpath(path.parent / name)).as_posix()
        if path.suffix == ".csv":
            row = {column: number_or_text(cell) for column, cell in row.items() if cell != ""}
        labels = labels_of(row)
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
