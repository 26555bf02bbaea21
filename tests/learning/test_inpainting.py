"""A model trained for minutes paints holes as what is around them asks for."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from data_tools.encode.holes import draw_hole
from tests.learning.drawn import HELD_OUT, SIZE, draw, scenes, shards, table, train, write


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_holes_are_painted_as_their_surroundings_ask_for(scene_vae: Path, tmp_path: Path) -> None:
    latents = shards(tmp_path, scene_vae, 600, "--holes", 4)
    train("small_inpainting", latents, tmp_path / "run")
    pictures, _ = scenes(SIZE)
    holes = np.stack([draw_hole(1, f"{number}", 0, (SIZE, SIZE), 2) for number in HELD_OUT])
    masks = write(tmp_path / "masks", holes.astype(np.uint8) * 255)

    def drawn(name: str, given: np.ndarray) -> np.ndarray:
        files = write(tmp_path / f"{name}-given", given)
        options = chain(*(("--image", file, "--mask", mask) for file, mask in zip(files, masks, strict=True)))
        return draw(tmp_path / "run", tmp_path / name, list(options))

    def error(found: np.ndarray) -> float:
        """Root of the mean squared error inside the holes, in 0 to 255."""
        return float(255 * np.sqrt(((found - pictures)[holes] ** 2).mean()))

    # What is under the hole is not given: it is painted over before the picture is encoded.
    hidden = np.where(holes[..., None], np.random.default_rng(0).random(pictures.shape), pictures)
    right, shuffled = drawn("right", hidden), drawn("shuffled", np.roll(pictures, 1, axis=0))
    gray = np.full_like(pictures, 0.5)
    table(
        "inpainting: error inside the hole, of 255",
        [
            ("its own surroundings", f"{error(right):.1f}"),
            ("another's surroundings", f"{error(shuffled):.1f}"),
            ("nothing painted", f"{error(gray):.1f}"),
        ],
    )
    assert error(right) < 0.6 * error(shuffled)
    assert error(right) < 0.75 * error(gray)
