"""Text to image learns: what is drawn is what its caption tells of, in captions that the model has not read too.

A caption names a colour, a shape and a ground. A fifth of what three such words can say is kept from the model,
which has read each of the words in others. A model of minutes learns ground and colour, and begins
to learn the form of a shape, which the table says and nothing here asserts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.learning.conftest import SIZE, encode, run
from tests.learning.drawn import draw, table, train
from tests.learning.measures import classified, trained_classifier
from tests.scenes import CLASSES, COLOURS, GROUNDS, draw_scene

SHAPES = CLASSES[:3]
WORDS = {"colour": list(COLOURS), "ground": list(GROUNDS), "shape": SHAPES}
TRAINED_ON, UNSEEN = range(4500), range(20_000, 20_900)  # a third of these scenes has a single shape
EACH = 2  # pictures drawn of each caption

ASKED_AT_LEAST, MARGIN = {"colour": 0.8, "ground": 0.9}, 0.3
"""Share of pictures in which a classifier of real ones sees the word of their caption, and how far that is above
the captions of other pictures, of which a fifth or a third is right by chance."""
NEW_MARGIN = 0.15
"""The same of captions that the model has not read: few, so chance moves it more."""
CLASSIFIER_AT_LEAST = 0.95


def caption(colour: int, ground: int, shape: int) -> str:
    """As `draw_scene` tells of a single shape."""
    return f"a {WORDS['colour'][colour]} {SHAPES[shape]} on {WORDS['ground'][ground]} ground"


def kept_back(colour: int, ground: int, shape: int) -> bool:
    """Whether the model is not to read of these three together: nine of 45, of each word at least one."""
    return (colour + ground + shape) % 5 == 0


CAPTIONS = [(c, g, s) for c in range(len(COLOURS)) for g in range(len(GROUNDS)) for s in range(len(SHAPES))]


def single_shapes(numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Scenes of one shape, float64 [B, H, W, 3] in [0, 1]; numbers of colour, ground, shape, int64 [B, 3]."""
    told = {caption(*words): words for words in CAPTIONS}
    scenes = [scene for number in numbers if len((scene := draw_scene(number, SIZE))[1]) == 1]
    return np.stack([scene[0] for scene in scenes]) / 255, np.array([told[scene[3]] for scene in scenes])


def own_and_others(seen: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Share of pictures with what their caption asks for, and with what those of all other pictures ask for."""
    others = ~np.eye(len(wanted), dtype=bool)
    return float((seen == wanted).mean()), float((seen[:, None] == wanted)[others].mean())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_is_drawn_is_what_its_caption_tells_of(scene_vae: Path, tmp_path: Path) -> None:
    pictures, words = single_shapes(TRAINED_ON)
    (tmp_path / "pictures").mkdir()
    for index, (picture, told) in enumerate(zip(pictures, words.tolist(), strict=True)):
        if not kept_back(*told):
            path = tmp_path / "pictures" / f"{index:05d}.png"
            Image.fromarray((picture * 255).round().astype(np.uint8)).save(path)
            path.with_suffix(".txt").write_text(caption(*told))
    run("ingest", "folder", tmp_path / "pictures", "--out", tmp_path / "shards")
    encode(tmp_path / "shards", scene_vae, tmp_path / "latents")
    train("small_text_to_image", tmp_path / "latents", tmp_path / "run")
    asked = [word for told in CAPTIONS for word in ("--prompt", caption(*told))]
    drawn = draw(tmp_path / "run", tmp_path / "drawn", [*asked, "--count", EACH])
    wanted = np.repeat(np.array(CAPTIONS), EACH, axis=0)
    new = np.array([kept_back(*told) for told in wanted])

    real, real_words = single_shapes(UNSEEN)
    rows, known, found = [], {}, {}
    for column, what in enumerate(WORDS):
        classifier = trained_classifier(pictures, words[:, column])
        known[what] = float((classified(classifier, real) == real_words[:, column]).mean())
        seen, asked_for = classified(classifier, drawn), wanted[:, column]
        found[what] = own_and_others(seen, asked_for), own_and_others(seen[new], asked_for[new])
        for kind, (own, others) in zip(("all", "new"), found[what], strict=True):
            rows.append((f"{what}, {kind} captions", f"{own:.3f} {others:.3f}"))
        rows.append((f"{what}, {len(real)} real pictures", f"{known[what]:.3f}"))
    table(f"{len(drawn)} pictures: share with the word of their own caption, and with those of others", rows)
    for what, least in ASKED_AT_LEAST.items():
        assert known[what] >= CLASSIFIER_AT_LEAST, f"the measure knows the {what} of real pictures"
        (own, others), (own_new, others_new) = found[what]
        assert own >= least and own >= others + MARGIN, f"{what} of all captions"
        assert own_new >= others_new + NEW_MARGIN, f"{what} of new captions"
