"""What the learning tests of conditions laid out as pictures share: data, runs, pictures drawn, measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.scenes import COLOURS, GROUND, GROUNDS, draw_scene, write_scenes

SIZE = 32  # pixels of the pictures that the models are trained on
CELL = 2  # pixels of a latent cell along each side
FRAME = 8  # pixels
HELD_OUT = range(10_000, 10_016)  # scenes that no model has seen


def run_command(program: str, *arguments: object) -> None:
    """A command as a user types it, in this process."""
    import importlib

    main: Callable[[list[str]], int] = importlib.import_module(f"{program}.cli").main
    assert main([str(argument) for argument in arguments]) in (0, None)


def shards(folder: Path, vae: Path, count: int, *options: object) -> Path:
    """The scenes 0 to count-1 as latent shards, with what `options` of `data-tools encode` add."""
    pictures = write_scenes(folder / "scenes", count, SIZE)
    run_command(
        "data_tools", "ingest", "folder", pictures, "--maps", folder / "scenes/maps", "--out", folder / "images"
    )
    encode = ["encode", folder / "images", "--vae", vae, "--size", SIZE, "--out", folder / "latents"]
    run_command("data_tools", *encode, *options)
    return folder / "latents"


def train(experiment: str, shards: Path, run: Path, *overrides: str) -> None:
    """A run of the real trainer."""
    settings = [f"experiment={experiment}", f"data.shards={shards}", f"run.dir={run}", "tracker=none"]
    run_command("finetune", "train", *settings, "sample.every=0", "validation.every=0", *overrides)


def draw(run: Path, out: Path, options: Sequence[object], *more: object) -> np.ndarray:
    """Pictures that `finetune sample` draws, float64 [B, H, W, 3] in [0, 1]."""
    run_command("finetune", "sample", run, *options, "--steps", 20, "--out", f"{out}/", *more)
    return read(sorted(out.glob("[0-9]*.png")))


def read(paths: Sequence[Path]) -> np.ndarray:
    """Pictures of one size, float64 [B, H, W, 3] in [0, 1]."""
    return np.stack([np.asarray(Image.open(path).convert("RGB"), np.float64) / 255 for path in paths])


def scenes(size: int, numbers: Sequence[int] = HELD_OUT) -> tuple[np.ndarray, np.ndarray]:
    """Scenes that no model has seen: float64 [B, size, size, 3] in [0, 1], and their maps uint8 [B, size, size]."""
    drawn = [draw_scene(number, size) for number in numbers]
    return np.stack([each[0] for each in drawn]) / 255, np.stack([each[2] for each in drawn])


def write(folder: Path, pictures: np.ndarray) -> list[Path]:
    """PNG files of pictures in [0, 1], or of label maps as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:03d}.png" for index in range(len(pictures))]
    for path, pixels in zip(paths, pictures, strict=True):
        Image.fromarray(pixels if pixels.dtype == np.uint8 else (pixels * 255).round().astype(np.uint8)).save(path)
    return paths


def nearest(pictures: np.ndarray) -> np.ndarray:
    """Int [B, H, W]: the scenes' colour that each pixel is nearest to; those of shapes come before grounds'."""
    palette = np.array([*COLOURS.values(), *GROUNDS.values()]) / 255
    return np.stack([((pictures - colour) ** 2).sum(-1) for colour in palette]).argmin(0)


def things(pictures: np.ndarray) -> np.ndarray:
    """Bool [B, H, W]: pixels nearer to the colour of a shape than to that of any ground."""
    return nearest(pictures) < len(COLOURS)


def overlap(drawn: np.ndarray, maps: np.ndarray) -> float:
    """Intersection over union of the shapes that are drawn and those of the maps, the mean over pictures."""
    found, wanted = things(drawn), maps != GROUND
    both, either = (found & wanted).sum((1, 2)), (found | wanted).sum((1, 2))
    return float((both / np.maximum(either, 1)).mean())


def psnr(pictures: np.ndarray, truth: np.ndarray) -> float:
    """In dB, the mean over pictures."""
    return float((-10 * np.log10(((pictures - truth) ** 2).mean((1, 2, 3)))).mean())


def seam(pictures: np.ndarray, maps: np.ndarray, at: int) -> tuple[float, float]:
    """Mean absolute step between neighbouring pixels where tiles would meet, and the same elsewhere; in 0 to 255.

    Only steps within plain ground count, three pixels from any shape (whose edges are steps by right), and between
    latent cells: the decoder makes those a little larger than steps within a cell, all over the picture. The frame
    of the picture, where convolutions see its end, does not count as elsewhere.

    Args:
        at: the column, and the row, that a tile ends before; a multiple of `CELL`.
    """
    plain = maps == GROUND
    for axis in (1, 2):
        plain = np.stack([np.roll(plain, shift, axis) for shift in range(-3, 4)]).all(0)
    here, elsewhere = [], []
    for axis in (1, 2):
        steps = np.abs(np.diff(pictures, axis=axis)).mean(-1) * 255
        both = plain.take(range(1, plain.shape[axis]), axis) & plain.take(range(plain.shape[axis] - 1), axis)
        place = np.expand_dims(np.arange(1, plain.shape[axis]), 2 - axis)
        here.append(steps[both & (place == at)])
        inner = (place >= FRAME) & (place <= plain.shape[axis] - FRAME)
        elsewhere.append(steps[both & inner & (place != at) & (place % CELL == 0)])
    return float(np.concatenate(here).mean()), float(np.concatenate(elsewhere).mean())


def tiles(pictures: np.ndarray, size: int) -> np.ndarray:
    """[4 B, size, size, ...]: the quarters of pictures of twice the size, row by row."""
    quarters = [each[y : y + size, x : x + size] for each in pictures for y in (0, size) for x in (0, size)]
    return np.stack(quarters)


def together(quarters: np.ndarray) -> np.ndarray:
    """The inverse of `tiles`."""
    rows = np.concatenate([quarters[0::2], quarters[1::2]], axis=2)
    return np.concatenate([rows[0::2], rows[1::2]], axis=1)


def table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print what was measured."""
    width = max(len(name) for name, _ in rows)
    print(f"\n{title}")
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
