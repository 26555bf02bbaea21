"""Layout to image learns: what is drawn lies where the boxes are that were asked for, and is of their class.

The class of a box is the colour of its shape, as in the test of classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.learning.conftest import SIZE, encode, run
from tests.learning.drawn import draw, table, train
from tests.learning.measures import asked_boxes, box_colours, box_iou, drawn_boxes
from tests.scenes import COLOURS, Box, draw_scene, write_scenes

NAMES = list(COLOURS)
SCENES = 3000
HELD_OUT = range(10_000, 10_048)

ASKED_AT_LEAST, MARGIN = 0.5, 0.3
"""Mean IoU of drawn and asked boxes, and how far that is above the boxes of other pictures."""
RIGHT_AT_LEAST, RIGHT_MARGIN = 0.5, 0.3
"""The same of the share of boxes with the colour that was asked for."""


def colours(caption: str) -> list[int]:
    """Of a scene's shapes, in the order of its boxes, in which its caption tells of them."""
    return [NAMES.index(word) for word in caption.split() if word in NAMES]


def annotations(folder: Path) -> Path:
    """COCO's file as `write_scenes` makes it, but for the categories, which are colours."""
    made = json.loads((folder / "instances.json").read_text())
    labels = [label for number in range(SCENES) for label in colours(draw_scene(number, SIZE)[3])]
    for thing, label in zip(made["annotations"], labels, strict=True):
        thing["category_id"] = 1 + label
    made["categories"] = [{"id": 1 + label, "name": name} for label, name in enumerate(NAMES)]
    path = folder / "colours.json"
    path.write_text(json.dumps(made))
    return path


def own_and_others(
    measure: Callable[[np.ndarray, list[Box]], float], pictures: np.ndarray, boxes: list[list[Box]]
) -> tuple[float, float]:
    """Means over pictures: of each with its own boxes, and with those of every other."""
    each = np.array([[measure(picture, asked) for asked in boxes] for picture in pictures])
    others = ~np.eye(len(each), dtype=bool)
    return float(each.diagonal().mean()), float(each[others].mean())


def iou(picture: np.ndarray, boxes: list[Box]) -> float:
    return box_iou(drawn_boxes(picture), asked_boxes(boxes))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_is_drawn_lies_in_the_boxes(scene_vae: Path, tmp_path: Path) -> None:
    pictures = write_scenes(tmp_path / "scenes", SCENES, SIZE)
    coco = annotations(tmp_path / "scenes")
    run("ingest", "coco", coco, "--images", pictures, "--out", tmp_path / "shards")
    encode(tmp_path / "shards", scene_vae, tmp_path / "latents")
    train("small_layout_to_image", tmp_path / "latents", tmp_path / "run")
    scenes = [draw_scene(number, SIZE) for number in HELD_OUT]
    wanted = [
        [[label, *edges] for label, (_, *edges) in zip(colours(caption), boxes, strict=True)]
        for _, boxes, _, caption in scenes
    ]
    options: list[object] = []
    for number, boxes in zip(HELD_OUT, wanted, strict=True):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps([[NAMES[label], *edges] for label, *edges in boxes]))
        options += ["--layout", path]
    drawn = draw(tmp_path / "run", tmp_path / "drawn", options)

    real = np.stack([scene[0] for scene in scenes]) / 255
    found = {
        f"{what} of the {kind}": own_and_others(measure, pictures, wanted)
        for what, measure in (("IoU", iou), ("right colours", box_colours))
        for kind, pictures in (("drawn", drawn), ("real", real))
    }
    table(
        f"{len(drawn)} pictures: with their own boxes, and with those of others",
        [(name, f"{own:.3f} {others:.3f}") for name, (own, others) in found.items()],
    )
    for what, least, margin in (("IoU", ASKED_AT_LEAST, MARGIN), ("right colours", RIGHT_AT_LEAST, RIGHT_MARGIN)):
        own, others = found[f"{what} of the drawn"]
        assert found[f"{what} of the real"][0] >= 0.95, "the measure knows real pictures"
        assert own >= least and own >= others + margin, what
