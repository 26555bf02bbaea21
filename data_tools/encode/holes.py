"""Where a picture is to be painted anew: holes for inpainting, drawn from (seed, key, number) alone.

Suvorov et al. 2022 (LaMa, arXiv 2109.07161), section 2.3: large holes make models that see the whole picture. A
hole is made of strokes, that is polygonal chains with round joints and a random width, or of rectangles of any
aspect. Rombach et al. 2022 (arXiv 2112.10752), section 4.5, take LaMa's holes, and Stable Diffusion's inpainting
models were trained on such. Lengths are shares of the picture's short side; LaMa's are given for 256 pixels.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from PIL import Image, ImageDraw

LEAST, MOST = 0.05, 0.5
"""Share of the picture that a hole covers. LaMa's test sets leave out holes of more than half."""
WIDTHS = {"thin": (0.03, 0.08), "medium": (0.08, 0.2), "thick": (0.2, 0.4)}
"""Of strokes. The widest are LaMa's (100 of 256 pixels); the thinnest still cover a latent cell of 8 of 256."""
KINDS = (*WIDTHS, "boxes")

_STROKES, _SEGMENTS = 5, 5  # at most, in a hole and in a stroke
_LENGTHS = (0.04, 0.8)  # of a segment: LaMa's 10 to 210 of 256 pixels
_TURN = 2.0  # radians to either side, at most, from segment to segment
_BOXES, _SIDES = 4, (0.12, 0.59)  # at most; LaMa's 30 to 150 of 256 pixels
_MARGIN = 0.04  # between boxes and the picture's edge
_ATTEMPTS = 50


def generator(seed: int, purpose: str, key: str) -> np.random.Generator:
    """Random numbers that depend on these three alone, on any machine."""
    digest = hashlib.blake2b(f"{seed}:{purpose}:{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def draw_hole(seed: int, key: str, number: int, size: tuple[int, int], step: int = 1) -> np.ndarray:
    """Hole `number` of a picture, bool [H, W]: strokes of one of three widths, or boxes, equally often.

    It covers `LEAST` to `MOST` of the picture, and a cell of the latent at least: others are drawn again, and if
    none of 50 does, it is the middle, of half the height and width.

    Args:
        size: (H, W).
        step: pixels of a latent cell. Strokes are twice that wide at least, so that none falls between the pixels
            that a latent's hole is made of.
    """
    random = generator(seed, f"hole {number}", key)
    for _ in range(_ATTEMPTS):
        kind = KINDS[random.integers(len(KINDS))]
        image = Image.new("1", size[::-1])
        draw = ImageDraw.Draw(image)
        if kind == "boxes":
            _boxes(draw, random, size, step)
        else:
            _strokes(draw, random, size, WIDTHS[kind], step)
        hole_HW = np.asarray(image)
        if LEAST <= hole_HW.mean() <= MOST and latent_hole(hole_HW, step).any():
            return hole_HW
    hole_HW = np.zeros(size, bool)
    height, width = size
    hole_HW[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    return hole_HW


def latent_hole(hole_HW: np.ndarray, step: int) -> np.ndarray:
    """A hole as the latent sees it, uint8 [H / step, W / step]: the first pixel of each cell.

    That is what `torch.nn.functional.interpolate` does by default, with which Stable Diffusion's inpainting shrinks
    its masks.
    """
    return hole_HW[::step, ::step].astype(np.uint8)


def _strokes(
    draw: ImageDraw.ImageDraw,
    random: np.random.Generator,
    size: tuple[int, int],
    widths: tuple[float, float],
    step: int,
) -> None:
    short = min(size)
    for _ in range(1 + random.integers(_STROKES)):
        width = max(random.uniform(*widths) * short, 2 * step)
        x, y = random.uniform(0, size[1]), random.uniform(0, size[0])
        angle = random.uniform(0, 2 * math.pi)
        points = [(x, y)]
        for _ in range(1 + random.integers(_SEGMENTS)):
            length = random.uniform(*_LENGTHS) * short
            # It stays in the picture: what lies outside would be no hole.
            x = min(max(x + length * math.cos(angle), 0.0), size[1])
            y = min(max(y + length * math.sin(angle), 0.0), size[0])
            points.append((x, y))
            angle += random.uniform(-_TURN, _TURN)
        draw.line(points, fill=1, width=round(width))
        for x, y in points:
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=1)


def _boxes(draw: ImageDraw.ImageDraw, random: np.random.Generator, size: tuple[int, int], step: int) -> None:
    short = min(size)
    margin = _MARGIN * short
    for _ in range(1 + random.integers(_BOXES)):
        height, width = (max(random.uniform(*_SIDES) * short, step) for _ in range(2))
        top = random.uniform(margin, max(size[0] - height - margin, margin))
        left = random.uniform(margin, max(size[1] - width - margin, margin))
        draw.rectangle((left, top, left + width, top + height), fill=1)
