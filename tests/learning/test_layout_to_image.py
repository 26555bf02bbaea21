"""Layout to image learns: shapes are drawn where the boxes are that were asked for, and of their class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.learning.conftest import SIZE, encode, run
from tests.learning.drawn import draw, overlap, table, train
from tests.learning.measures import asked_boxes, box_iou, drawn_boxes
from tests.scenes import CLASSES, draw_scene, write_scenes

SCENES = 3000
HELD_OUT = range(10_000, 10_048)

ASKED_AT_LEAST, MARGIN = 0.5, 0.3
"""Mean IoU of drawn and asked boxes, and how far that is above the boxes of other pictures."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.xfail(
    strict=True,
    reason="19,200 samples do not teach the small model where boxes are: IoU 0.19 with its own, 0.18 with others'",
)
def test_what_is_drawn_lies_in_the_boxes(scene_vae: Path, tmp_path: Path) -> None:
    pictures = write_scenes(tmp_path / "scenes", SCENES, SIZE)
    annotations = tmp_path / "scenes" / "instances.json"
    run("ingest", "coco", annotations, "--images", pictures, "--out", tmp_path / "shards")
    encode(tmp_path / "shards", scene_vae, tmp_path / "latents")
    train("small_layout_to_image", tmp_path / "latents", tmp_path / "run")
    scenes = [draw_scene(number, SIZE) for number in HELD_OUT]
    options: list[object] = []
    for number, (_, boxes, _, _) in zip(HELD_OUT, scenes, strict=True):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps([[CLASSES[label], *edges] for label, *edges in boxes]))
        options += ["--layout", path]
    drawn = draw(tmp_path / "run", tmp_path / "drawn", options)

    real, maps = np.stack([scene[0] for scene in scenes]) / 255, np.stack([scene[2] for scene in scenes])
    wanted = [asked_boxes(boxes) for _, boxes, _, _ in scenes]
    found = [drawn_boxes(picture) for picture in drawn]
    others = [box_iou(a, b) for i, a in enumerate(found) for j, b in enumerate(wanted) if i != j]
    asked = float(np.mean([box_iou(*pair) for pair in zip(found, wanted, strict=True)]))
    shuffled = float(np.mean(others))
    truth = float(
        np.mean([box_iou(drawn_boxes(picture), boxes) for picture, boxes in zip(real, wanted, strict=True)])
    )
    shapes, wrong_shapes = (overlap(drawn, np.roll(maps, shift, axis=0)) for shift in (0, 1))
    table(
        f"mean IoU of {len(drawn)} pictures",
        [
            ("boxes drawn and asked for", f"{asked:.3f}"),
            ("boxes drawn and those of other pictures", f"{shuffled:.3f}"),
            ("boxes found in the real pictures and asked for", f"{truth:.3f}"),
            ("shapes drawn and those of the boxes' classes", f"{shapes:.3f}"),
            ("shapes drawn and those of another picture", f"{wrong_shapes:.3f}"),
        ],
    )
    assert truth >= 0.95
    assert asked >= ASKED_AT_LEAST
    assert asked >= shuffled + MARGIN
