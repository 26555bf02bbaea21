"""From a picture of a source to the members of its sample. Runs in worker processes."""

from __future__ import annotations

import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.filters import Filtered
from data_tools.images import encode_image
from data_tools.ingest.items import Found, SetAside
from data_tools.ingest.options import Options
from data_tools.labels import RESAMPLING, LabelFile, cut_boxes, grey_bytes, read_map, read_mask
from data_tools.pictures import whole_numbers
from data_tools.texts import sound_text
from finetune import is_of_machine
from finetune.data.shards import MAP, MASK, Bucket, parse_boxes
from finetune.data.shards.files import naming
from finetune.data.shards.images import PictureError, cut_out, decode_rgb, picture_format
from finetune.data.shards.labels import png_header

MAX_FILE_BYTES = 512 << 20


@dataclass(frozen=True)
class Prepared:
    """A picture as it will stand in the shards."""

    member: str
    data: bytes | None  # None: the bytes that came in
    record: dict[str, Any]
    bucket: Bucket  # (height, width) of the picture in the shards
    extra: dict[str, bytes] = field(default_factory=dict)  # map and mask as they will be, or under another name
    boxes_lost: int = 0
    odd: str | None = None  # why a map or mask has got another name


def prepare(item: Found | SetAside, options: Options) -> SetAside | Filtered | Prepared:
    """Read, filter and check one picture, in a worker process. It is always decoded: damage is found here.

    Raises:
        PictureError: it can't be used.
    """
    if isinstance(item, SetAside):
        return item
    if sound_text(file := str(item.record.get("file", ""))) != file:  # bytes that the locale can't read
        raise PictureError(
            f"its name is not {sys.getfilesystemencoding()}; rename it, or set a locale that reads it"
        )
    data = read_file(item.data) if isinstance(item.data, Path) else item.data
    kept, (height, width) = picture_format(data)
    if (reason := options.filters.reason(item.record, height, width)) is not None:
        return Filtered(reason)
    if item.size is not None and item.size != (height, width):
        raise PictureError(f"{height}x{width} pixels, its annotations are for {item.size[0]}x{item.size[1]}")
    _check_classes(item.record, options.classes)
    size = options.size
    image = decode_rgb(
        data,
        options.background,
        max_pixels=options.max_pixels,
        at_least=(size, size) if size else None,
    )
    record = dict(item.record)
    # A source that resized its pictures may know their first size, and what it cropped.
    original = whole_numbers(record.pop("original_size", None), 2)
    before = whole_numbers(record.pop("crop", None), 4)
    own: dict[str, Any] = {"original_size": original or [height, width]}
    boxes_lost = 0
    changed = options.member != "keep" or kept is None
    member = kept or "png"
    if changed:
        member = options.member if options.member != "keep" else "png"
        if size:
            image, resized, crop = cut_out(image, (height, width), (size, size))
            if (boxes := parse_boxes(record.get("boxes"))) is not None:
                record["boxes"] = cut_boxes(boxes, resized, crop, least=options.min_box)
                boxes_lost = len(boxes) - len(record["boxes"])
            if before is not None:
                crop[0] += round(before[0] * resized[0] / height)
                crop[1] += round(before[1] * resized[1] / width)
            own["crop"] = crop
    if not size and before is not None:
        own["crop"] = before
    first: dict[str, Any] = {name: record.pop(name) for name in ("captions", "file") if name in record}
    bucket = (image.height, image.width) if changed else (height, width)
    if changed:
        data = encode_image(image, member, options.quality)
    extra, odd = _maps(item, (height, width), bucket, options)
    return Prepared(
        member,
        data if changed or isinstance(item.data, Path) else None,
        {**first, **own, **record},
        bucket,
        extra,
        boxes_lost,
        odd,
    )


def _check_classes(record: Mapping[str, Any], classes: int | None) -> None:
    """Refuse classes without a name, where classes have names."""
    if classes is None:
        return
    label = record.get("class", 0)
    if type(label) is not int or not 0 <= label < classes:
        raise PictureError(f"its class is {label!r}, the classes are 0 to {classes - 1}")
    for box in parse_boxes(record.get("boxes")) or ():
        if box[0] >= classes:
            raise PictureError(f"a box has class {box[0]}, the classes are 0 to {classes - 1}")


def _maps(
    item: Found, size: tuple[int, int], bucket: Bucket, options: Options
) -> tuple[dict[str, bytes], str | None]:
    """The map and mask of a picture, cut as it is, and why one that came with it (in a tar) isn't taken for one.

    Raises:
        PictureError: of one that has a file of its own.
    """
    made: dict[str, bytes] = {}
    odd = None
    for name, path in ((MAP, item.labels.path if item.labels else None), (MASK, item.mask)):
        if path is not None:
            try:
                file = item.labels if name == MAP else None
                made[name] = _cut(name, read_file(path), size, bucket, options.classes, file)
            except PictureError as error:
                raise PictureError(f"{path}: {error}") from None
        elif (data := item.extra.get(name)) is not None:
            try:
                made[name] = _cut(name, data, size, bucket, options.classes, None)
            except PictureError as error:  # others may mean something else by the name
                made[f"other.{name}"], odd = data, odd or str(error)
    return made, odd


def _cut(
    name: str, data: bytes, size: tuple[int, int], bucket: Bucket, classes: int | None, file: LabelFile | None
) -> bytes:
    image = read_map(data, size, file, classes) if name == MAP else read_mask(data, size)
    if bucket == size and png_header(data) == (*size, 8, 0) and (file is None or file.labels is None):
        return data
    return grey_bytes(cut_out(image, size, bucket, resampling=RESAMPLING[name])[0])


def read_file(path: Path) -> bytes:
    """The bytes of a picture's file.

    Raises:
        PictureError: it is absent, no regular file, too large, or can't be read.
        OSError: the disk does not answer, or refuses.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would never end
            raise PictureError("not a file")
        if found.st_size > MAX_FILE_BYTES:
            raise PictureError(f"a file of {found.st_size} bytes, the limit is {MAX_FILE_BYTES}")
        with naming(path):
            return path.read_bytes()
    except FileNotFoundError:
        raise PictureError("no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if is_of_machine(error):
            raise
        raise PictureError((isinstance(error, OSError) and error.strerror) or str(error)) from None
