"""What a sample may say of its picture beside captions: class, boxes, maps and masks, and the form of each.

    record "class"      int, a number of a class
    record "boxes"      [[class, x0, y0, x1, y1], ...]: an int, then fractions (0 to 1) of the picture's width and
                        height, in image shards, or of the crop's, in latent shards
    map.png             a label for each pixel: 8-bit grey; 255 is unlabelled
    mask.png            how much each pixel's loss counts: 8-bit grey; 255 fully, 0 not at all; absent: all fully
    lowres.png          the crop at a whole fraction of its size: 8-bit RGB
    hole.npy            uint8 [K, h, w]: K masks over the latent, 1 where it is to be painted
    masked.npy          float16 [K, 2C, h, w]: moments, as of latent.npy, of the picture with each hole filled with
                        mid-grey (0 in [-1, 1])
    ROOT/classes.json   names of the classes, a list; the same numbers serve class, boxes and maps

In latent shards map and mask have the pixels of the crop exactly, the bucket's (height, width); in image shards
those of the picture.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.data.shards.files import ShardError, write_atomic

CLASSES = "classes.json"
MAP = "map.png"
MASK = "mask.png"
LOWRES = "lowres.png"
HOLE = "hole.npy"
MASKED = "masked.npy"
UNLABELLED = 255
"""The label of a pixel that has none."""

_MAX_CLASSES = 1 << 20


def parse_boxes(value: Any) -> list[list[Any]] | None:
    """A record's `boxes`, if they have the form that is said above; else None."""
    if not isinstance(value, list):
        return None
    for box in value:
        if not isinstance(box, list) or len(box) != 5 or type(box[0]) is not int or box[0] < 0:
            return None
        if not all(type(number) in (int, float) and 0 <= number <= 1 for number in box[1:]):
            return None
        if not (box[1] < box[3] and box[2] < box[4]):
            return None
    return value


def parse_classes(data: bytes, where: object = CLASSES) -> list[str]:
    """The names in the bytes of a classes.json.

    Raises:
        ShardError: it is no list of names, or a name is empty or there twice; says `where`.
    """
    try:
        names = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{where} is not JSON ({error}); write a list of names") from None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ShardError(f"{where} is no list of names; write one such as " + '["cat", "dog"]')
    if len(names) > _MAX_CLASSES:
        raise ShardError(f"{where} has {len(names)} names; at most {_MAX_CLASSES} can be read")
    if len(set(names)) != len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ShardError(f"{where} has the name {twice!r} twice; names must differ")
    return names


def write_classes(root: Path, names: Sequence[str]) -> str:
    """Write ROOT/classes.json, whole or not at all, and give its sha256, which belongs in the manifest.

    Raises:
        ShardError: the names would be refused by who reads them.
    """
    content = (json.dumps(list(names), ensure_ascii=False, indent=0) + "\n").encode()
    parse_classes(content, root / CLASSES)
    write_atomic(root / CLASSES, content)
    return hashlib.sha256(content).hexdigest()


def png_header(data: bytes) -> tuple[int, int, int, int] | None:
    """(height, width, bits, kind) of a PNG, by its header; None for other bytes.

    Kind 0 is grey, 2 RGB, 3 a palette, 4 grey with alpha, 6 RGB with alpha (PNG specification, section 11.2.1).
    """
    if len(data) < 33 or data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        return None
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    return height, width, data[24], data[25]
