"""From an encoded picture to the pixels of its bucket. Runs in worker processes, which don't import torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_tools.encode.buckets import aspect_step, crop_loss, nearest
from data_tools.encode.degrade import shrink
from data_tools.encode.holes import draw_hole, latent_hole
from data_tools.filters import Filtered, Filters
from data_tools.images import encode_image
from data_tools.labels import LEAST_OF_A_BOX, RESAMPLING, cut_boxes, grey_bytes, read_map, read_mask
from data_tools.pictures import Picture, Unreadable, whole_numbers
from finetune.data.shards import HOLE, LOWRES, MAP, Bucket, parse_boxes
from finetune.data.shards.files import npy_bytes
from finetune.data.shards.images import PictureError, cut_out, decode_rgb, picture_format


@dataclass(frozen=True)
class Recipe:
    """How pictures are cut. `table` is empty while only their sizes are asked for.

    `crop` is `center` or `random`; `flip` is the probability of a horizontal flip. All that is drawn is drawn from
    (seed, key) alone, so any process at any time draws the same. `min_box` is the share of a box that must be in
    the crop. `holes` are drawn for each picture, of which a share of `full_holes` is the whole picture; `step` is
    the VAE's, pixels of a latent cell. `lowres` is the factor of the small picture, 0 for none. `caption` is what
    captions become, with {} for what they were.
    """

    table: tuple[Bucket, ...]
    background: tuple[int, int, int]
    filters: Filters
    crop: str = "center"
    flip: float = 0.0
    seed: int = 0
    min_box: float = LEAST_OF_A_BOX
    holes: int = 0
    full_holes: float = 0.0
    step: int = 1
    lowres: int = 0
    degradation: str = "bicubic"
    caption: str = "{}"


@dataclass(frozen=True)
class Prepared:
    """A picture cut to its bucket.

    `extra` are members that are ready; `holes` are bool [K, H, W], eight pixels a byte (`np.packbits`), or None;
    `boxes` counts those that were kept and those that were left out.
    """

    key: str
    pixels: np.ndarray  # uint8 [H, W, 3]
    bucket: Bucket
    record: dict[str, Any]
    enlarged: bool
    crop_loss: float
    extra: dict[str, bytes] = field(default_factory=dict)
    holes: np.ndarray | None = None
    boxes: tuple[int, int] = (0, 0)


def prepare(item: Picture | Unreadable, recipe: Recipe) -> Prepared | Filtered | Unreadable:
    """Decode a picture and cut it to the bucket of nearest aspect.

    The record gets `original_size` [height, width], `crop` [top, left, height, width] in pixels of the resized
    picture, and `flipped` where the picture was mirrored; the crop is then one of the mirrored picture. Sizes and
    crops that `ingest` noted when it resized the picture are carried over to the new scale. Boxes become fractions
    of the crop, maps and masks get its pixels.

    Raises:
        PictureError: it can't be decoded, or its map or mask can't be.
    """
    if isinstance(item, Unreadable):
        return item
    _, (height, width) = picture_format(item.data)
    if reason := recipe.filters.reason(item.record, height, width):
        return Filtered(reason)
    bucket = nearest(height, width, list(recipe.table))
    image = decode_rgb(item.data, recipe.background, at_least=bucket)  # maybe at a reduced scale
    flipped = recipe.flip > 0 and draw(recipe.seed, "flip", item.key) < recipe.flip
    place = (0.5, 0.5)
    if recipe.crop == "random":
        place = (draw(recipe.seed, "top", item.key), draw(recipe.seed, "left", item.key))
    cut, resized, crop = cut_out(image, (height, width), bucket, place, flipped)
    cropped = list(crop)
    record = dict(item.record)
    mirrored = flipped != (record.pop("flipped", False) is True)  # mirrored twice is not mirrored
    original, before = whole_numbers(record.get("original_size"), 2), whole_numbers(record.get("crop"), 4)
    if original is None:
        original = [height, width]
    elif before is not None:
        top, left = _before(before, original, flipped)
        crop[0] += round(top * resized[0] / height)
        crop[1] += round(left * resized[1] / width)
    record.update(original_size=original, crop=crop)
    # Not str.format: a caption may have braces. A picture without a caption keeps none.
    record["captions"] = [recipe.caption.replace("{}", caption) for caption in record["captions"]]
    if mirrored:
        record["flipped"] = True
    counts = (0, 0)
    if (boxes := parse_boxes(record.get("boxes"))) is not None:
        record["boxes"] = cut_boxes(boxes, resized, cropped, flipped, recipe.min_box)
        counts = (len(record["boxes"]), len(boxes) - len(record["boxes"]))
    extra: dict[str, bytes] = {}
    for name, data in item.maps.items():
        read = read_map if name == MAP else read_mask
        labels, _, _ = cut_out(
            read(data, (height, width)), (height, width), bucket, place, flipped, RESAMPLING[name]
        )
        extra[name] = grey_bytes(labels)
    if recipe.lowres:
        small = shrink(cut, recipe.lowres, recipe.degradation, recipe.seed, item.key)
        extra[LOWRES] = encode_image(small, "png")
    holes = None
    if recipe.holes:
        holes_KHW = np.stack([_hole(recipe, item.key, number, bucket) for number in range(recipe.holes)])
        extra[HOLE] = npy_bytes(np.stack([latent_hole(hole_HW, recipe.step) for hole_HW in holes_KHW]))
        holes = np.packbits(holes_KHW, axis=-1)
    enlarged = max(bucket[0] / height, bucket[1] / width) > 1
    lost = crop_loss(height, width, bucket)
    return Prepared(item.key, np.asarray(cut), bucket, record, enlarged, lost, extra, holes, counts)


def _hole(recipe: Recipe, key: str, number: int, bucket: Bucket) -> np.ndarray:
    if recipe.full_holes > 0 and draw(recipe.seed, f"full hole {number}", key) < recipe.full_holes:
        return np.ones(bucket, bool)
    return draw_hole(recipe.seed, key, number, bucket, recipe.step)


def measure(item: Picture | Unreadable, recipe: Recipe) -> int | None:
    """The `aspect_step` of a picture, from its headers; None if it will be left out."""
    if isinstance(item, Unreadable):
        return None
    try:
        _, (height, width) = picture_format(item.data)
    except PictureError:
        return None
    if recipe.filters.reason(item.record, height, width):
        return None
    return aspect_step(height, width)


def draw(seed: int, purpose: str, key: str) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    digest = hashlib.blake2b(f"{seed}:{purpose}:{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _before(crop: list[int], original: list[int], flipped: bool) -> tuple[int, int]:
    """Top and left of the crop that `ingest` made; as seen from the right if the picture is mirrored now."""
    top, left, height, width = crop
    if flipped:
        resized_width = max(width, round(original[1] * max(height / original[0], width / original[1])))
        left = resized_width - left - width
    return top, left
