"""A model trained for minutes draws what label maps say, at its own size and at twice that."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from tests.learning.drawn import SIZE, draw, overlap, scenes, seam, shards, table, tiles, together, train, write


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_shapes_are_drawn_where_the_maps_have_them(scene_vae: Path, tmp_path: Path) -> None:
    latents = shards(tmp_path, scene_vae, 600)
    train("small_semantic_synthesis", latents, tmp_path / "run")

    def drawn(name: str, maps: np.ndarray) -> np.ndarray:
        files = write(tmp_path / f"{name}-maps", maps)
        return draw(tmp_path / "run", tmp_path / name, list(chain(*(("--map", file) for file in files))))

    _, maps = scenes(SIZE)
    _, large = scenes(2 * SIZE)
    right, shuffled = drawn("right", maps), drawn("shuffled", np.roll(maps, 1, axis=0))
    twice, quarters = drawn("twice", large), drawn("quarters", tiles(large, SIZE))
    here, elsewhere = seam(twice, large, SIZE)
    tiled_here, tiled_elsewhere = seam(together(quarters), large, SIZE)
    table(
        "semantic synthesis: overlap of the shapes drawn with those of the map",
        [
            ("its own map", f"{overlap(right, maps):.3f}"),
            ("another's map", f"{overlap(shuffled, maps):.3f}"),
            ("twice the size", f"{overlap(twice, large):.3f}"),
            ("step where tiles would meet, and elsewhere", f"{here:.2f} {elsewhere:.2f}"),
            ("the same of four tiles", f"{tiled_here:.2f} {tiled_elsewhere:.2f}"),
        ],
    )
    assert overlap(right, maps) > overlap(shuffled, maps) + 0.4
    assert overlap(twice, large) > 0.6
    assert here < 1.25 * elsewhere
    assert tiled_here > 2 * tiled_elsewhere, "the measure sees seams where there are some"
