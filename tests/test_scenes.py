"""Drawn scenes are exact: what boxes, maps and captions say is what the pixels show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.scenes import CLASSES, COLOURS, GROUND, GROUNDS, draw_scene, write_scenes


@pytest.mark.parametrize("size", [16, 64, 100])
def test_boxes_and_maps_are_what_the_pixels_show(size: int) -> None:
    kinds = set()
    for index in range(40):
        picture, boxes, labels, caption = draw_scene(index, size)
        assert np.array_equal(picture, draw_scene(index, size)[0])
        covered = np.zeros((size, size), bool)
        words = caption.split()
        for place, (kind, *fractions) in enumerate(boxes):
            x0, y0, x1, y1 = (round(fraction * size) for fraction in fractions)
            assert 0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size
            assert not covered[y0:y1, x0:x1].any()  # no two boxes share a pixel
            covered[y0:y1, x0:x1] = True
            inside = labels[y0:y1, x0:x1]
            assert set(np.unique(inside)) <= {kind, GROUND}
            shape = inside == kind
            assert shape[0].any() and shape[-1].any() and shape[:, 0].any() and shape[:, -1].any()
            assert words[4 * place + 2] == CLASSES[kind]
            assert (picture[y0:y1, x0:x1][shape] == COLOURS[words[4 * place + 1]]).all()
        assert (labels[~covered] == GROUND).all()
        assert (picture[labels == GROUND] == GROUNDS[words[-2]]).all()
        assert boxes[0][0] == index % 3
        kinds |= {kind for kind, *_ in boxes}
    assert kinds == {0, 1, 2}


def test_written_scenes_are_the_drawn_ones(tmp_path: Path) -> None:
    pictures = write_scenes(tmp_path, 6)
    instances = json.loads((tmp_path / "instances.json").read_text())
    for index, image in enumerate(instances["images"]):
        picture, boxes, labels, caption = draw_scene(index)
        assert np.array_equal(np.asarray(Image.open(pictures / image["file_name"])), picture)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "maps" / image["file_name"])), labels)
        assert (pictures / image["file_name"]).with_suffix(".txt").read_text().strip() == caption
        told = [a for a in instances["annotations"] if a["image_id"] == image["id"]]
        assert [a["category_id"] // 10 - 1 for a in told] == [box[0] for box in boxes]
        for annotation, (_, x0, y0, x1, y1) in zip(told, boxes, strict=True):
            assert np.allclose(np.array(annotation["bbox"]) / 64, [x0, y0, x1 - x0, y1 - y0])
