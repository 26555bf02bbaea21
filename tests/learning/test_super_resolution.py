"""A model trained for minutes enlarges pictures better than bicubic interpolation does, and larger ones as well."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.learning.drawn import SIZE, draw, psnr, read, scenes, seam, shards, table, tiles, together, train, write

FACTOR = 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_small_pictures_are_enlarged_better_than_by_interpolation(scene_vae: Path, tmp_path: Path) -> None:
    latents = shards(tmp_path, scene_vae, 600, "--lowres", FACTOR)
    train("small_super_resolution", latents, tmp_path / "run")

    def resized(name: str, pictures: np.ndarray, factor: float) -> np.ndarray:
        """By Pillow's bicubic filter, as the training pictures were made small."""
        side = round(pictures.shape[1] * factor)
        files = write(tmp_path / name, pictures)
        for file in files:
            Image.open(file).resize((side, side), Image.Resampling.BICUBIC).save(file)
        return read(files)

    def drawn(name: str, small: np.ndarray) -> np.ndarray:
        files = write(tmp_path / f"{name}-given", small)
        return draw(tmp_path / "run", tmp_path / name, list(chain(*(("--image", file) for file in files))))

    pictures, _ = scenes(SIZE)
    large, maps = scenes(2 * SIZE)
    small, small_large = resized("small", pictures, 1 / FACTOR), resized("small-large", large, 1 / FACTOR)
    bicubic, bicubic_large = resized("bicubic", small, FACTOR), resized("bicubic-large", small_large, FACTOR)
    right, shuffled = drawn("right", small), drawn("shuffled", np.roll(small, 1, axis=0))
    twice, quarters = drawn("twice", small_large), drawn("quarters", tiles(small_large, SIZE // FACTOR))
    here, elsewhere = seam(twice, maps, SIZE)
    tiled_here, tiled_elsewhere = seam(together(quarters), maps, SIZE)
    table(
        "super-resolution: PSNR in dB",
        [
            ("drawn", f"{psnr(right, pictures):.2f}"),
            ("bicubic", f"{psnr(bicubic, pictures):.2f}"),
            ("drawn of another's small picture", f"{psnr(shuffled, pictures):.2f}"),
            ("drawn at twice the size", f"{psnr(twice, large):.2f}"),
            ("bicubic at twice the size", f"{psnr(bicubic_large, large):.2f}"),
            ("step where tiles would meet, and elsewhere", f"{here:.2f} {elsewhere:.2f}"),
            ("the same of four tiles", f"{tiled_here:.2f} {tiled_elsewhere:.2f}"),
        ],
    )
    assert psnr(right, pictures) > psnr(bicubic, pictures) + 1
    assert psnr(right, pictures) > psnr(shuffled, pictures) + 5
    assert psnr(twice, large) > psnr(bicubic_large, large) + 0.5
    assert here < 1.25 * elsewhere
    assert tiled_here > 2 * tiled_elsewhere, "the measure sees seams where there are some"
