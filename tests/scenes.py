"""Drawn scenes of which all is known: coloured shapes on plain ground, their boxes, labels, captions and class.

    draw_scene(index)           one scene, as arrays
    write_scenes(folder, 12)    a data set on disk, in each form that `data-tools ingest` reads

Nothing is smoothed, so boxes and maps are exact: a pixel is of one shape, or of the ground.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ["circle", "square", "triangle", "ground"]
"""Names by label. Boxes have the first three; a label map has all four."""
GROUND = CLASSES.index("ground")
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 210),
    "yellow": (240, 210, 40),
    "purple": (140, 50, 170),
}
GROUNDS = {"white": (245, 245, 245), "grey": (128, 128, 128), "black": (20, 20, 20)}

Box = list[Any]
"""[class, x0, y0, x1, y1]: an int, then fractions (0 to 1) of the picture's width and height."""


def draw_scene(index: int, size: int = 64) -> tuple[np.ndarray, list[Box], np.ndarray, str]:
    """One scene: one to three shapes that don't overlap, each in a quarter of its own.

    The same index gives the same scene at any size, but for rounding. The first shape is of class `index % 3`:
    it is the scene's class, the first of the boxes, and the first thing that the caption tells of.

    Args:
        size: side of the picture in pixels, at least 16.

    Returns:
        RGB uint8 [size, size, 3]; boxes, which hold their shapes' pixels exactly; label map uint8 [size, size];
        caption.
    """
    assert size >= 16
    random = np.random.default_rng([index, 20221])
    ground = list(GROUNDS)[random.integers(len(GROUNDS))]
    count = 1 + int(random.integers(3))
    quarters = random.permutation(4)[:count]
    colours = [list(COLOURS)[number] for number in random.permutation(len(COLOURS))[:count]]
    kinds = [index % 3, *random.integers(3, size=count - 1).tolist()]
    picture = np.full((size, size, 3), GROUNDS[ground], np.uint8)
    labels = np.full((size, size), GROUND, np.uint8)
    boxes: list[Box] = []
    for kind, quarter, colour in zip(kinds, quarters.tolist(), colours, strict=True):
        side = (0.24 + 0.2 * random.random()) * size
        left, top = random.random(2) * (size / 2 - 1 - side) + np.array([quarter % 2, quarter // 2]) * size / 2
        inside = _shape(kind, size, top, left, side)
        picture[inside] = COLOURS[colour]
        labels[inside] = kind
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        boxes.append([kind, *(float(edge) / size for edge in edges)])
    things = [f"a {colour} {CLASSES[kind]}" for colour, kind in zip(colours, kinds, strict=True)]
    return picture, boxes, labels, f"{' and '.join(things)} on {ground} ground"


def _shape(kind: int, size: int, top: float, left: float, side: float) -> np.ndarray:
    """The pixels whose centres lie in a shape that fills a square, bool [size, size]."""
    centre = np.arange(size) + 0.5
    y, x = (centre[:, None] - top) / side, (centre[None] - left) / side  # 0 to 1 in the square
    if CLASSES[kind] == "circle":
        return np.asarray((x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25)
    if CLASSES[kind] == "square":
        return np.asarray((x >= 0) & (x <= 1) & (y >= 0) & (y <= 1))
    return np.asarray((abs(x - 0.5) <= y / 2) & (y <= 1))  # a triangle that points up


def write_scenes(folder: Path, count: int, size: int = 64) -> Path:
    """Write the scenes 0 to count-1 in all forms of annotation, and give the folder of the pictures.

    FOLDER/pictures/circle/00000.png    a folder for each class, a caption beside each picture (.txt)
    FOLDER/pictures/classes.json        `CLASSES`
    FOLDER/maps/circle/00000.png        label maps, 8-bit grey
    FOLDER/masks/circle/00000.png       loss masks: 255 in the boxes, 128 elsewhere
    FOLDER/instances.json               COCO: boxes in pixels; category ids 10, 20, 30, 40 for `CLASSES`
    FOLDER/captions.json                COCO: captions
    """
    images, things, captions = [], [], []
    for index in range(count):
        picture, boxes, labels, caption = draw_scene(index, size)
        name = f"{CLASSES[boxes[0][0]]}/{index:05d}.png"
        mask = np.full((size, size), 128, np.uint8)
        images.append({"id": 1000 + index, "file_name": name, "height": size, "width": size})
        captions.append({"id": index, "image_id": 1000 + index, "caption": caption})
        for kind, *fractions in boxes:
            x0, y0, x1, y1 = (round(fraction * size) for fraction in fractions)
            mask[y0:y1, x0:x1] = 255
            thing = {"id": len(things), "image_id": 1000 + index, "category_id": 10 * (kind + 1), "iscrowd": 0}
            things.append({**thing, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)})
        for kind_of_file, pixels in (("pictures", picture), ("maps", labels), ("masks", mask)):
            path = folder / kind_of_file / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        (folder / "pictures" / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    categories = [{"id": 10 * (number + 1), "name": name} for number, name in enumerate(CLASSES)]
    instances = {"images": images, "annotations": things, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(instances), encoding="utf-8")
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}), encoding="utf-8")
    (folder / "pictures" / "classes.json").write_text(json.dumps(CLASSES), encoding="utf-8")
    return folder / "pictures"
