"""Unconditional models learn: what is drawn is nearer to the set than what it drew after 40 steps, and than
pictures of another set."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune import BUNDLED
from finetune.autoencoder.features import frechet
from tests.learning.conftest import SIZE, encode, run
from tests.learning.drawn import draw, scenes, table, train
from tests.learning.measures import thumbnails
from tests.scenes import write_scenes

SCENES = 3000
DRAWN = 96

OF_EARLY, OF_OTHERS = 0.5, 0.25
"""What is drawn is at most this share as far from the set as what was drawn early, and as another set."""


def emoji(count: int) -> np.ndarray:
    """The first of the bundled emoji, float64 [B, H, W, 3] in [0, 1]."""
    with tarfile.open(BUNDLED / "fluent-emoji" / "00000.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(".webp")][:count]
        opened = [Image.open(tar.extractfile(name)).convert("RGB").resize((SIZE, SIZE)) for name in names]  # type: ignore[arg-type]
    return np.stack([np.asarray(image, np.float64) for image in opened]) / 255


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_is_drawn_is_like_the_set(scene_vae: Path, tmp_path: Path) -> None:
    pictures = write_scenes(tmp_path / "scenes", SCENES, SIZE)
    run("ingest", "folder", pictures, "--out", tmp_path / "shards")
    encode(tmp_path / "shards", scene_vae, tmp_path / "latents")
    train("small_unconditional", tmp_path / "latents", tmp_path / "run")
    train("small_unconditional", tmp_path / "latents", tmp_path / "begun", "train.steps=40")
    drawn = draw(tmp_path / "run", tmp_path / "drawn", ["--count", DRAWN])
    early = draw(tmp_path / "begun", tmp_path / "early", ["--count", DRAWN])

    held_out, _ = scenes(SIZE, range(10_000, 10_000 + 4 * DRAWN))
    others = emoji(len(held_out))

    def distance(pictures: np.ndarray) -> float:
        return frechet(thumbnails(pictures), thumbnails(held_out))

    distances = {"drawn": distance(drawn), "after 40 steps": distance(early), "emoji": distance(others)}
    floor = distance(scenes(SIZE, range(DRAWN))[0])
    table(
        f"Frechet distance of {DRAWN} pictures to {len(held_out)} real ones",
        [*((name, f"{value:.2f}") for name, value in distances.items()), ("real ones of the set", f"{floor:.2f}")],
    )
    assert distances["drawn"] <= OF_EARLY * distances["after 40 steps"]
    assert distances["drawn"] <= OF_OTHERS * distances["emoji"]
