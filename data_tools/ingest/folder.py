"""Make image shards from a folder of pictures and captions.

Pictures are found in DIR and below. The caption of `cat.jpg` is the text of `cat.txt` beside it, or
stands in a `metadata.jsonl` or `metadata.csv` in that folder or above (columns file_name and text,
caption or captions, as in Hugging Face's imagefolder; other columns are kept as labels). Pictures keep
their bytes unless --size or --format is given; gif, bmp, tiff, avif and animations become png. Those that
can't be decoded are listed in SHARDS/rejects.jsonl and the rest goes on; links to folders, and pictures of kinds
that can't be read (HEIC, JPEG XL, raw, SVG, ...), are listed there too.

--classes takes the name of a picture's first folder below DIR for its class: the record's `class` is a number,
and SHARDS/classes.json has the names, sorted. Where DIR has a classes.json, a JSON list of names, its order is
taken; it also names the classes of maps, and of `boxes` in metadata: [[class, x0, y0, x1, y1], ...], the class a
number, then fractions of the picture's width and height.

The label map of DIR/a/cat.jpg is MAPS/a/cat.png (8-bit grey or a palette; 255: unlabelled), its loss mask
MASKS/a/cat.png (grey; 255: counts fully, 0: not at all), both as large as the upright picture. A picture without
its map is set aside; one without a mask counts as a whole. --size cuts them as it cuts the picture.

examples:
  data-tools ingest folder photos --out shards/photos
  data-tools ingest folder photos --out shards/photos-512 --size 512 --format webp
  data-tools ingest folder flowers --classes --out shards/flowers
  data-tools ingest folder streets/images --maps streets/labels --out shards/streets
"""

from __future__ import annotations

import argparse
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.images import SUFFIXES, UNREAD_SUFFIXES
from data_tools.ingest.items import Found, SetAside
from data_tools.ingest.options import Options, add_picture_arguments
from data_tools.ingest.prepare import read_file
from data_tools.ingest.records import captions_of, clean_captions, labels_of
from data_tools.ingest.shards import ingest
from data_tools.labels import LabelFile
from data_tools.pictures import CAPTION_COLUMNS
from data_tools.texts import csv_rows, lines_of, number_or_text, sound_text, text_of
from finetune import UserError
from finetune.data.shards import CLASSES, parse_classes
from finetune.data.shards.images import PictureError

_METADATA = ("metadata.jsonl", "metadata.csv")
_KINDS = 5  # of other files, that are named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools ingest folder`."""
    parser.add_argument("source", type=Path, metavar="DIR", help="folder of pictures")
    parser.add_argument("--classes", action="store_true", help="the folder that a picture lies in is its class")
    parser.add_argument("--maps", type=Path, metavar="MAPS", help="folder of label maps, named as the pictures are")
    parser.add_argument(
        "--masks", type=Path, metavar="MASKS", help="folder of loss masks, named as the pictures are"
    )
    add_picture_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run `data-tools ingest folder`."""
    options = Options.from_args(args)
    if not args.source.is_dir():
        raise UserError(f"no folder {args.source}; give the folder that holds the pictures")
    beside = [folder for folder in (args.maps, args.masks) if folder is not None]
    for folder in beside:
        if not folder.is_dir():
            raise UserError(f"no folder {folder}; give the folder that holds the maps or masks")
        if folder.resolve() == args.source.resolve():
            raise UserError(f"{folder} is the folder of the pictures; put maps and masks into one of their own")
    listing = scan(args.source, [args.out, *beside])
    names = _class_names(args.source, listing, args.classes)
    masks: Counter[bool] = Counter()
    items = _found(args.source, listing, args, names, masks)
    total = len(listing.pictures)
    paths = [args.source, *beside]
    code = ingest(args, options, items, source=str(args.source), paths=paths, total=total, classes=names)
    if args.masks is not None and masks[False]:
        print(f"{masks[False]} of {masks.total()} pictures have no mask in {args.masks}, and count as a whole")
    if others := listing.others:
        kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in others.most_common(_KINDS))
        rest = sum(count for _, count in others.most_common()[_KINDS:])
        print(
            f"{others.total()} other files were not looked at ({kinds}{f', {rest} of other kinds' if rest else ''})"
        )
    return code


def _class_names(root: Path, listing: Listing, folders: bool) -> list[str]:
    """Those of DIR/classes.json, or the names of the folders; none where neither is asked for.

    Raises:
        UserError: there are no folders, or classes.json doesn't name them all.
    """
    names: list[str] = []
    if (root / CLASSES).is_file():
        names = parse_classes((root / CLASSES).read_bytes(), root / CLASSES)
    if not folders:
        return names
    found = sorted({name.partition("/")[0] for name in listing.pictures if "/" in name})
    found = [name for name in found if sound_text(name) == name]  # pictures in others are set aside
    if not found:
        raise UserError(f"no folders with pictures in {root}; --classes takes their names for the classes")
    if names and (more := [name for name in found if name not in names]):
        raise UserError(f"{root / CLASSES} has no {more[0]!r}, which is a folder of pictures; add it")
    return names or found


def _found(
    root: Path, listing: Listing, args: argparse.Namespace, classes: list[str], masks: Counter[bool]
) -> Iterator[Found | SetAside]:
    numbers = {name: number for number, name in enumerate(classes)}
    for number, name in enumerate(listing.pictures):
        try:
            captions, labels = listing.describe(root, name)
        except PictureError as error:
            yield SetAside(name, str(error))
            continue
        if args.classes:
            folder = name.partition("/")[0]
            if folder == name:
                yield SetAside(name, f"in no folder below {root}, so it has no class")
                continue
            labels = {**labels, "class": numbers.get(folder)}
        beside = Path(name).with_suffix(".png")
        mask = args.masks / beside if args.masks is not None else None
        if mask is not None:
            there = mask.is_file()
            masks[there] += 1
            mask = mask if there else None
        record = {"captions": captions, "file": name, **labels}
        label_map = LabelFile(args.maps / beside) if args.maps is not None else None
        yield Found(f"{number:09d}", name, root / name, record, labels=label_map, mask=mask)
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
    the files that are neither pictures nor captions, by suffix. `sidecars` says how a text's suffix is written
    where it isn't .txt, by the path of its picture without suffix.
    """

    pictures: list[str] = field(default_factory=list)
    unread: list[tuple[str, str]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    metadata: dict[str, _Row] = field(default_factory=dict)
    sidecars: dict[str, str] = field(default_factory=dict)

    def describe(self, root: Path, name: str) -> tuple[list[str], dict[str, Any]]:
        """(captions, labels) of a picture: its metadata row first, then the `.txt` beside it.

        Raises:
            PictureError: the `.txt` can't be read.
        """
        row = self.metadata.get(name)
        if row is not None and row.captions:
            return row.captions, row.labels
        suffix = self.sidecars.get(Path(name).with_suffix("").as_posix(), ".txt")
        sidecar = (root / name).with_suffix(suffix)
        captions = []
        if sidecar.is_file():
            try:
                captions = clean_captions([text_of(read_file(sidecar))])
            except (PictureError, ValueError) as error:
                raise PictureError(f"{sidecar.name}: {error}") from None
        return captions, row.labels if row is not None else {}


def scan(root: Path, others: Sequence[Path]) -> Listing:
    """List pictures and read metadata files, in `root` and below, but for names with a leading dot and `others`.

    Raises:
        UserError: a metadata file has a broken line, no file_name column, or is no UTF-8.
    """
    listing = Listing()

    def closed(error: OSError) -> None:
        name = os.path.relpath(error.filename, root)
        listing.unread.append((name, f"a folder that can't be read ({error.strerror})"))

    for folder, folders, files in os.walk(root, onerror=closed):
        base = Path(folder).relative_to(root)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not _same(folder, name, others)
        )
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):  # it may lead back here, or to the same pictures
                listing.unread.append(((base / name).as_posix(), "a link to a folder; give that folder itself"))
        pictures: set[str] = set()  # of this folder, without suffix, as are its texts
        texts: dict[str, str] = {}
        for name in sorted(files):
            stem, suffix = Path(name).stem, Path(name).suffix.lower()
            if name.startswith("."):
                continue
            if suffix in SUFFIXES:
                pictures.add(stem)
                listing.pictures.append((base / name).as_posix())
            elif suffix in UNREAD_SUFFIXES:
                pictures.add(stem)
                reason = f"{suffix} files can't be read; convert them to JPEG or PNG"
                listing.unread.append(((base / name).as_posix(), reason))
            elif name in _METADATA:
                _read_metadata(root, base / name, listing.metadata)
            elif suffix == ".txt":
                if stem in texts:  # as a.TXT, which sorts before a.txt
                    listing.others[suffix] += 1
                texts[stem] = Path(name).suffix
            elif (base / name).as_posix() != CLASSES:
                listing.others[suffix] += 1
        for stem, suffix in texts.items():
            if stem not in pictures:
                listing.others[".txt"] += 1
            elif suffix != ".txt":
                listing.sidecars[(base / stem).as_posix()] = suffix
    listing.pictures.sort()
    listing.unread.sort()
    _respell(listing)
    return listing


def _respell(listing: Listing) -> None:
    """Give rows the names of pictures that are spelled in another of Unicode's forms, as macOS spells accents."""
    names = [*listing.pictures, *(name for name, _ in listing.unread)]
    if unmatched := listing.metadata.keys() - set(names):
        spelled = {unicodedata.normalize("NFC", name): name for name in names}
        for name in unmatched:
            found = spelled.get(unicodedata.normalize("NFC", name))
            if found is not None and found not in listing.metadata:
                listing.metadata[found] = listing.metadata.pop(name)


def _same(folder: str, name: str, others: Sequence[Path]) -> bool:
    path = os.path.join(folder, name)
    return any(name == other.name and os.path.realpath(path) == os.path.realpath(other) for other in others)


def _read_metadata(root: Path, path: Path, metadata: dict[str, _Row]) -> None:
    lines = _lines(root / path)
    rows = _csv_rows(root / path, lines) if path.suffix == ".csv" else _jsonl_rows(root / path, lines)
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


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from lines_of(path)
    except ValueError as error:
        raise UserError(f"{path}, {error}") from None


def _jsonl_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}); mend it or delete it") from None
        if not isinstance(row, dict):
            raise UserError(f'{path}, line {number} is not an object; write {{"file_name": ..., "text": ...}}')
        yield f"{path}, line {number}", row


def _csv_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    header: list[str] = []
    for number, cells in csv_rows(lines):
        where = f"{path}, line {number}"
        if isinstance(cells, str):
            raise UserError(f"{where} is {cells}; quote it as CSV asks")
        if not header:
            header = cells
            continue
        if len(cells) != len(header):
            raise UserError(f"{where} does not have the {len(header)} columns of the header")
        row: dict[str, Any] = dict(zip(header, cells, strict=True))
        captions = row.get("captions", "")
        if captions.lstrip().startswith("["):  # a list, as JSON in the cell
            try:
                row["captions"] = json.loads(captions)
            except (ValueError, RecursionError):
                raise UserError(f"{where}: captions is not a JSON list; quote it as CSV asks") from None
        yield where, row
