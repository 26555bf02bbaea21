"""Make image shards from COCO's JSON: boxes, captions, label maps, panoptic maps.

ANNOTATIONS is an instances file (boxes) or a captions file; --captions adds the other. The record of a picture gets
`boxes`: [[class, x0, y0, x1, y1], ...], the class a number, then fractions of the picture's width and height.
Classes are numbered 0, 1, ... in the order of the categories' ids; SHARDS/classes.json has their names.

--maps is a folder of label maps, PNGs named as the pictures are (8-bit grey or a palette). --map-values says what
a pixel is: `class`, those numbers, 255 for unlabelled (the default); `id`, a category's id (COCO-Stuff's
pixelmaps); or `id-1`, a category's id less one (its stuffthingmaps). --panoptic takes a panoptic file and the
folder of its PNGs; its categories are numbered together with those of ANNOTATIONS. Whatever is of no category is
unlabelled.

Crowds are left out, and so are boxes outside their picture; a picture that is missing, can't be decoded, or hasn't
the size that ANNOTATIONS says is listed in SHARDS/rejects.jsonl. All are counted, and the rest goes on.

examples:
  data-tools ingest coco annotations/instances_val2017.json --images val2017 \\
      --captions annotations/captions_val2017.json --out shards/coco
  data-tools ingest coco annotations/stuff_val2017.json --images val2017 --maps stuff_val2017_pixelmaps \\
      --map-values id --out shards/stuff
  data-tools ingest coco annotations/instances_val2017.json --images val2017 \\
      --panoptic annotations/panoptic_val2017.json annotations/panoptic_val2017 --out shards/panoptic
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.ingest.items import Found, SetAside
from data_tools.ingest.options import Options, add_picture_arguments
from data_tools.ingest.records import clean_captions
from data_tools.ingest.shards import ingest
from data_tools.labels import LabelFile
from data_tools.texts import printable
from finetune import UserError
from finetune.data.shards import UNLABELLED

_VALUES = ("class", "id", "id-1")
_DIGITS = 6
_MOST = 1 << 31  # pixels; JSON may have numbers of any size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `data-tools ingest coco`."""
    parser.add_argument("source", type=Path, metavar="ANNOTATIONS", help="instances or captions, COCO's JSON")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the pictures")
    parser.add_argument("--captions", type=Path, metavar="JSON", help="captions of the same pictures")
    parser.add_argument("--maps", type=Path, metavar="DIR", help="folder of label maps, named as the pictures are")
    parser.add_argument(
        "--map-values", choices=_VALUES, default="class", help="what a map's pixels are (default: class)"
    )
    parser.add_argument(
        "--panoptic", type=Path, nargs=2, metavar=("JSON", "DIR"), help="panoptic file, and the folder of its PNGs"
    )
    parser.add_argument("--crowds", action="store_true", help="keep the boxes of crowds too")
    add_picture_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run `data-tools ingest coco`."""
    options = Options.from_args(args)
    if args.maps is not None and args.panoptic is not None:
        raise UserError("--maps and --panoptic are both label maps; give one of them")
    if args.map_values != "class" and args.maps is None:
        raise UserError(f"--map-values {args.map_values} is for --maps; give that folder")
    panoptic_folder = args.panoptic[1] if args.panoptic is not None else None
    for folder in (args.images, args.maps, panoptic_folder):
        if folder is not None and not folder.is_dir():
            raise UserError(f"no folder {folder}; give the folder that holds the pictures or maps")
    annotations = Annotations(load(args.source), args.source)
    if args.captions is not None:
        annotations.add(load(args.captions), args.captions)
    panoptic = None
    if args.panoptic is not None:
        panoptic = load(args.panoptic[0])
        annotations.add_categories(panoptic, args.panoptic[0])
    numbers = {category: number for number, category in enumerate(sorted(annotations.categories))}
    names = [annotations.categories[category] for category in numbers]
    if (args.maps is not None or panoptic is not None) and not names:
        raise UserError(f"{args.source} has no categories, so maps have no labels; give an instances file")
    if (args.maps is not None or panoptic is not None) and len(names) > UNLABELLED:
        raise UserError(f"{len(names)} categories don't fit into 8-bit maps, which hold {UNLABELLED}")
    maps = _Maps(args.maps, args.map_values, numbers)
    if panoptic is not None:
        maps.add_panoptic(panoptic, *args.panoptic)
    boxes = annotations.boxes(numbers, args.crowds)
    items = _found(args.images, annotations, boxes, maps)
    folders = [folder for folder in (args.images, args.source, args.captions, args.maps, panoptic_folder) if folder]
    total = len(annotations.images)
    code = ingest(args, options, items, source=str(args.source), paths=folders, total=total, classes=names)
    for what, counts in (("boxes", annotations.bad_boxes), ("captions", annotations.bad_captions)):
        if counts:
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
            print(f"{counts.total()} {what} left out: {reasons}")
    if annotations.clipped:
        print(f"{annotations.clipped} boxes reached out of their picture by more than a pixel, and were clipped")
    return code


def load(path: Path) -> dict[str, Any]:
    """The content of one of COCO's files, without outlines, which make up most of it.

    Raises:
        UserError: it can't be read, or is none of COCO's.
    """
    try:
        with path.open(encoding="utf-8") as file:
            data = json.load(file, object_hook=_without_outlines)
    except FileNotFoundError:
        raise UserError(f"no file {path}; give COCO's JSON") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    for name in ("images", "annotations"):
        rows = data.get(name) if isinstance(data, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path} has no list of {name}; it is none of COCO's files")
    return data  # type: ignore[no-any-return]


def _without_outlines(row: dict[str, Any]) -> dict[str, Any]:
    row.pop("segmentation", None)
    return row


@dataclass
class Annotations:
    """What one or two files say of the pictures that the first of them lists."""

    data: dict[str, Any]
    path: Path
    images: dict[int, dict[str, Any]] = field(default_factory=dict)
    categories: dict[int, str] = field(default_factory=dict)
    captions: dict[int, list[str]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of boxes
    has_boxes: bool = False
    bad_boxes: Counter[str] = field(default_factory=Counter)
    bad_captions: Counter[str] = field(default_factory=Counter)
    clipped: int = 0

    def __post_init__(self) -> None:
        """Raises UserError: an image or a category without an id or name, or with another's."""
        for row in self.data["images"]:
            number, name = row.get("id"), row.get("file_name")
            if type(number) is not int or not isinstance(name, str) or not name:
                raise UserError(f"{self.path}: the image {printable(str(row))} has no id or file_name")
            if number in self.images:
                raise UserError(f"{self.path}: two images have the id {number}")
            self.images[number] = row
        self.add(self.data, self.path)
        self.data = {}

    def add(self, data: dict[str, Any], path: Path) -> None:
        """Categories, captions and boxes of a file.

        Raises:
            UserError: it is a panoptic file, or one without captions and boxes.
        """
        self.add_categories(data, path)
        found = False
        for row in data["annotations"]:
            if "segments_info" in row:
                raise UserError(f"{path} is a panoptic file; give the instances file, and this one by --panoptic")
            if "caption" in row:
                found = True
                if not _is_key(row.get("image_id"), self.images):
                    self.bad_captions["of pictures that ANNOTATIONS doesn't list"] += 1
                elif not isinstance(row["caption"], str):
                    self.bad_captions["that are no text"] += 1
                else:
                    self.captions.setdefault(row["image_id"], []).append(row["caption"])
            if "bbox" in row:
                found = self.has_boxes = True
                self.rows.append(row)
        self.has_boxes = self.has_boxes or bool(data.get("categories"))
        if data["annotations"] and not found:
            raise UserError(f"{path} has neither boxes nor captions; give an instances or a captions file")

    def add_categories(self, data: dict[str, Any], path: Path) -> None:
        """Categories of a file.

        Raises:
            UserError: one without id or name, or with another name than in an earlier file.
        """
        rows = data.get("categories", [])
        own: set[int] = set()
        for row in rows if isinstance(rows, list) else []:
            number, name = (row.get("id"), row.get("name")) if isinstance(row, dict) else (None, None)
            if type(number) is not int or not isinstance(name, str) or not name:
                raise UserError(f"{path}: the category {printable(str(row))} has no id or name")
            if number in own or self.categories.get(number, name) != name:
                other = self.categories[number]
                raise UserError(f"{path}: the category id {number} stands for {other!r} and for {name!r}")
            own.add(number)
            self.categories[number] = name

    def boxes(self, numbers: Mapping[int, int], crowds: bool) -> dict[int, list[list[Any]]]:
        """Boxes by the picture's id, as fractions; what is bad is counted, and left out."""
        boxes: dict[int, list[list[Any]]] = {}
        for row in self.rows:
            image: Any = row.get("image_id")
            if not _is_key(image, self.images):
                self.bad_boxes["of pictures that ANNOTATIONS doesn't list"] += 1
            elif not _is_key(row.get("category_id"), numbers):
                self.bad_boxes["of an unknown category"] += 1
            elif row.get("iscrowd") and not crowds:
                self.bad_boxes["of crowds (--crowds keeps them)"] += 1
            elif (size := size_of(self.images[image])) is None:
                self.bad_boxes["of pictures without height and width"] += 1
            elif isinstance(box := self._fractions(row["bbox"], *size), str):
                self.bad_boxes[box] += 1
            else:
                boxes.setdefault(image, []).append([numbers[row["category_id"]], *box])
        self.rows = []
        return boxes

    def _fractions(self, bbox: Any, height: int, width: int) -> list[float] | str:
        """[x, y, width, height] in pixels to [x0, y0, x1, y1] in fractions, or why not."""
        if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
            return "that are not four numbers"
        x0, y0, x1, y1 = bbox[0], bbox[1], bbox[0] + bbox[2], bbox[1] + bbox[3]
        if x1 <= x0 or y1 <= y0:
            return "without width or height"
        sides = (width, height, width, height)
        edges = [min(max(edge, 0), side) for edge, side in zip((x0, y0, x1, y1), sides, strict=True)]
        fractions = [round(edge / side, _DIGITS) for edge, side in zip(edges, sides, strict=True)]
        if fractions[0] >= fractions[2] or fractions[1] >= fractions[3]:
            return "outside their picture"
        self.clipped += any(abs(a - b) > 1 for a, b in zip(edges, (x0, y0, x1, y1), strict=True))
        return fractions


def size_of(image: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) that a file says of a picture."""
    height, width = image.get("height"), image.get("width")
    if type(height) is int and type(width) is int and 0 < height < _MOST and 0 < width < _MOST:
        return height, width
    return None


def _is_key(value: Any, known: Mapping[int, Any]) -> bool:
    return type(value) is int and value in known


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _MOST


class _Maps:
    """Where the label maps are, and what their pixels mean."""

    def __init__(self, folder: Path | None, values: str, numbers: Mapping[int, int]) -> None:
        self.folder, self.numbers = folder, numbers
        self.table: dict[int, int] | None = None
        if values != "class":
            self.table = {category - (values == "id-1"): number for category, number in numbers.items()}
        self.panoptic: dict[int, LabelFile] | None = None

    def add_panoptic(self, data: dict[str, Any], path: Path, folder: Path) -> None:
        """Take a panoptic file's maps.

        Raises:
            UserError: an annotation of it has another form.
        """
        self.panoptic = {}
        for row in data["annotations"]:
            image, name, segments = row.get("image_id"), row.get("file_name"), row.get("segments_info")
            try:
                if not isinstance(segments, list) or not isinstance(name, str) or type(image) is not int:
                    raise TypeError
                labels = {int(each["id"]): self.numbers[each["category_id"]] for each in segments}
            except (KeyError, TypeError, ValueError):
                what = printable(str(name))
                raise UserError(
                    f"{path}: the annotation of {what} is none of a panoptic file's; give one"
                ) from None
            self.panoptic[image] = LabelFile(folder / name, labels, segments=True)

    def of(self, image: int, name: str) -> LabelFile | str | None:
        """A picture's map; why there is none; or None where no maps were asked for."""
        if self.panoptic is not None:
            return self.panoptic.get(image, "the panoptic file says nothing of it")
        if self.folder is None:
            return None
        return LabelFile(self.folder / PurePosixPath(name).with_suffix(".png"), self.table)


def _found(
    root: Path, annotations: Annotations, boxes: dict[int, list[list[Any]]], maps: _Maps
) -> Iterator[Found | SetAside]:
    for number, (image, row) in enumerate(annotations.images.items()):
        name = row["file_name"]
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            yield SetAside(printable(name), f"a path that leads out of {root}")
            continue
        labels = maps.of(image, name)
        if isinstance(labels, str):
            yield SetAside(name, labels)
            continue
        record: dict[str, Any] = {
            "captions": clean_captions(annotations.captions.get(image, [])),
            "file": name,
            "image_id": image,
        }
        if annotations.has_boxes:
            record["boxes"] = boxes.pop(image, [])
        size = size_of(row)
        yield Found(f"{number:09d}", name, root / name, record, labels=labels, size=size)
