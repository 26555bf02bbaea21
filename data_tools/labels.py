"""Boxes, label maps and loss masks of a picture, brought to the pixels that are kept of it.

A map or mask has the (height, width) of the upright picture. It is resized, mirrored and cropped exactly as the
picture is (`images.cut_out`): labels by nearest neighbour, so that no label comes up that wasn't there.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.data.shards import MAP, MASK, UNLABELLED
from finetune.data.shards.images import PictureError, decode_grey, decode_indices
from finetune.data.shards.labels import png_header

LEAST_OF_A_BOX = 0.25
"""The default of --min-box."""
_DIGITS = 6  # of a fraction: a tenth of a pixel in a picture of 100,000


@dataclass(frozen=True)
class LabelFile:
    """A file that says a label for each pixel.

    `labels` are the classes by the values in the file, where these differ; any other value is then unlabelled.
    `segments`: values are those of COCO's panoptic format, R + 256 G + 65536 B of an RGB picture; else they are
    those of an 8-bit grey picture, or a palette's indices.
    """

    path: Path
    labels: Mapping[int, int] | None = None
    segments: bool = False


def read_map(
    data: bytes, size: tuple[int, int], file: LabelFile | None = None, classes: int | None = None
) -> Image.Image:
    """A label map as an 8-bit grey image.

    Args:
        size: (height, width) of the upright picture.
        file: how values are read; None: they are the labels.
        classes: how many there are; a larger label than theirs is refused, but for 255.

    Raises:
        PictureError: it is of another form or size, or has labels that no class has.
    """
    _require_size(data, MAP, size)
    values_HW = decode_indices(data, MAP, segments=file is not None and file.segments)
    if file is not None and file.labels is not None:
        found, inverse = np.unique(values_HW, return_inverse=True)
        table = np.array([file.labels.get(int(value), UNLABELLED) for value in found], np.uint8)
        values_HW = table[inverse].reshape(values_HW.shape)
    if classes is not None:
        labels = np.unique(values_HW)
        if len(wrong := labels[(labels >= classes) & (labels != UNLABELLED)]):
            raise PictureError(f"{MAP} has label {wrong[0]}, the classes are 0 to {classes - 1}")
    return Image.fromarray(values_HW.astype(np.uint8, copy=False))


def read_mask(data: bytes, size: tuple[int, int]) -> Image.Image:
    """A loss mask as an 8-bit grey image; one of 1 or 16 bits is scaled to 8.

    Raises:
        PictureError: it is of another form or size.
    """
    _require_size(data, MASK, size)
    return decode_grey(data, MASK)


def _require_size(data: bytes, name: str, size: tuple[int, int]) -> None:
    """By the header: so what is decoded is no larger than the picture was."""
    header = png_header(data)
    if header is None:
        raise PictureError(f"{name} is no PNG")
    if header[:2] != size:
        raise PictureError(f"{name} is {header[0]}x{header[1]}, the upright picture {size[0]}x{size[1]}")


RESAMPLING = {MAP: Image.Resampling.NEAREST, MASK: Image.Resampling.BILINEAR}
"""How each is resized."""


def grey_bytes(image: Image.Image) -> bytes:
    """An 8-bit grey image as the bytes of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def cut_boxes(
    boxes: Sequence[Sequence[Any]],
    resized: tuple[int, int],
    crop: Sequence[int],
    flipped: bool = False,
    least: float = LEAST_OF_A_BOX,
) -> list[list[Any]]:
    """Boxes of a picture as fractions of what is cropped from it.

    Args:
        boxes: [class, x0, y0, x1, y1], fractions of the picture.
        resized: (height, width) of the resized picture; crop: [top, left, height, width] in it.
        flipped: the picture is mirrored before it is cropped.
        least: share of a box's area that must be inside the crop, for the box to be kept; what is kept is clipped.
    """
    kept: list[list[Any]] = []
    (top, left, height, width), (whole_height, whole_width) = crop, resized
    for label, x0, y0, x1, y1 in boxes:
        if flipped:
            x0, x1 = 1 - x1, 1 - x0
        before = [
            x0 * whole_width - left,
            y0 * whole_height - top,
            x1 * whole_width - left,
            y1 * whole_height - top,
        ]
        edges = [min(max(edge, 0.0), side) for edge, side in zip(before, (width, height) * 2, strict=True)]
        area = (before[2] - before[0]) * (before[3] - before[1])
        if (edges[2] - edges[0]) * (edges[3] - edges[1]) < least * area * (1 - 1e-9):
            continue
        box = [round(edge / side, _DIGITS) for edge, side in zip(edges, (width, height) * 2, strict=True)]
        if box[0] < box[2] and box[1] < box[3]:
            kept.append([label, *box])
    return kept
