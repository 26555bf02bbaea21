"""Class to image learns: a classifier of real pictures sees in what is drawn the class that was asked for.

The class of a scene is the colour of its shape: a model of minutes draws colours well, and corners not yet.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.learning.conftest import SIZE, encode, run
from tests.learning.drawn import draw, table, train
from tests.learning.measures import classified, trained_classifier
from tests.scenes import COLOURS, draw_scene

NAMES = list(COLOURS)
TRAINED_ON, HELD_OUT = range(4500), range(20_000, 20_900)  # a third of these scenes has a single shape
EACH = 12  # pictures drawn of each class

ASKED_AT_LEAST, SHUFFLED_AT_MOST, CLASSIFIER_AT_LEAST = 0.8, 0.3, 0.95
"""Accuracies; of shuffled labels a fifth is right by chance."""


def single_shapes(numbers: range) -> tuple[np.ndarray, np.ndarray]:
    """Scenes of one shape, float64 [B, H, W, 3] in [0, 1], and the number of its colour, int64 [B]."""
    scenes = [scene for number in numbers if len((scene := draw_scene(number, SIZE))[1]) == 1]
    return np.stack([scene[0] for scene in scenes]) / 255, np.array(
        [NAMES.index(scene[3].split()[1]) for scene in scenes]
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_is_drawn_is_of_the_class_that_was_asked_for(scene_vae: Path, tmp_path: Path) -> None:
    pictures, labels = single_shapes(TRAINED_ON)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        folder = tmp_path / "pictures" / NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((picture * 255).round().astype(np.uint8)).save(folder / f"{index:05d}.png")
    run("ingest", "folder", tmp_path / "pictures", "--classes", "--out", tmp_path / "shards")
    encode(tmp_path / "shards", scene_vae, tmp_path / "latents")
    train("small_class_to_image", tmp_path / "latents", tmp_path / "run")
    asked = [word for name in NAMES for word in ("--label", name)]
    drawn = draw(tmp_path / "run", tmp_path / "drawn", [*asked, "--count", EACH])

    classifier = trained_classifier(pictures, labels)
    unseen, unseen_labels = single_shapes(HELD_OUT)
    known = float((classified(classifier, unseen) == unseen_labels).mean())
    seen, wanted = classified(classifier, drawn), np.repeat(np.arange(len(NAMES)), EACH)
    right = float((seen == wanted).mean())
    # Over all pairs of a picture and another one's label: what shuffled labels get on average.
    shuffled = float((seen[:, None] == wanted)[~np.eye(len(wanted), dtype=bool)].mean())
    table(
        f"class accuracy of {len(drawn)} pictures",
        [
            ("drawn, class asked for", f"{right:.3f}"),
            ("drawn, classes shuffled", f"{shuffled:.3f}"),
            (f"{len(unseen)} real pictures held out", f"{known:.3f}"),
        ],
    )
    assert known >= CLASSIFIER_AT_LEAST
    assert right >= ASKED_AT_LEAST
    assert shuffled <= SHUFFLED_AT_MOST
