"""What a low-resolution camera would have seen: the small pictures that super-resolution starts from.

`bicubic` is what most papers measure on. `blind` draws from many degradations, so that a model trained on it serves
real pictures: Zhang et al. 2021 (BSRGAN, arXiv 2103.14006), section 3, which Rombach et al. 2022 (arXiv 2112.10752,
section 4.4) use too. Of BSRGAN's degradations the camera's sensor noise is left out.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from data_tools.encode.holes import generator

DEGRADATIONS = ("bicubic", "blind")

_KERNELS = (7, 21)  # sides of blurs, odd
_NOISE = (1, 25)  # standard deviation, of 255
_QUALITY = (30, 95)  # of JPEG
_EARLY = 0.25  # how often a picture to be shrunk by 4 or more is halved before all else


def shrink(picture: Image.Image, factor: int, degradation: str, seed: int, key: str) -> Image.Image:
    """An RGB picture at 1/`factor` of its size, which divides both sides.

    The same picture, seed and key give the same pixels; `bicubic` (antialiased) draws nothing.
    """
    size = (picture.width // factor, picture.height // factor)
    if degradation == "bicubic":
        return picture.resize(size, Image.Resampling.BICUBIC)
    assert degradation == "blind", degradation
    return blind(picture, size, generator(seed, "lowres", key))


def blind(picture: Image.Image, size: tuple[int, int], random: np.random.Generator) -> Image.Image:
    """Two blurs, one of them round, a resizing to `size` (width, height), noise and JPEG, in random order.

    Each works on 8 bits. Widths are those of BSRGAN for factors 2 and 4, and grow with the factor as these do.
    """
    factor = picture.width / size[0]
    if factor >= 4 and random.random() < _EARLY:
        picture = _resize(picture, (picture.width // 2, picture.height // 2), random)
        factor /= 2
    steps: list[Callable[[Image.Image], Image.Image]] = [
        lambda image: _blur(image, _round_kernel(random, factor)),
        lambda image: _blur(image, _oblong_kernel(random, factor)),
        lambda image: _resize(image, size, random),
        lambda image: _noise(image, random),
        lambda image: _jpeg(image, random),
    ]
    for step in random.permutation(len(steps)).tolist():
        picture = steps[step](picture)
    return picture


def _side(random: np.random.Generator) -> int:
    return int(random.choice(np.arange(_KERNELS[0], _KERNELS[1] + 1, 2)))


def _round_kernel(random: np.random.Generator, factor: float) -> np.ndarray:
    """A Gaussian of the same width in all directions."""
    side, sigma = _side(random), random.uniform(0.1, 2.0 + 0.2 * factor)
    return gaussian(side, np.eye(2) * sigma**2)


def _oblong_kernel(random: np.random.Generator, factor: float) -> np.ndarray:
    """A Gaussian whose covariance has two eigenvalues, in any direction."""
    side, angle = _side(random), random.uniform(0, math.pi)
    values = random.uniform(0.5, 4.0 + factor, 2)
    axes = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return gaussian(side, axes @ np.diag(values) @ axes.T)


def gaussian(side: int, covariance: np.ndarray) -> np.ndarray:
    """A kernel [side, side] that sums to 1, of a covariance [2, 2] in pixels^2."""
    at = np.arange(side) - (side - 1) / 2
    points_N2 = np.stack(np.meshgrid(at, at, indexing="ij"), axis=-1).reshape(-1, 2)
    exponents = -0.5 * np.einsum("ni,ij,nj->n", points_N2, np.linalg.inv(covariance), points_N2)
    weights = np.exp(exponents).reshape(side, side)
    return np.asarray(weights / weights.sum())


def _blur(image: Image.Image, kernel: np.ndarray) -> Image.Image:
    """Convolved with a kernel [k, k], k odd, over a mirrored border."""
    pad = len(kernel) // 2
    planes_3HW = np.asarray(image, np.float32).transpose(2, 0, 1)
    padded = np.pad(planes_3HW, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
    shape = [_smooth(side) for side in padded.shape[1:]]
    spectrum = np.fft.rfft2(padded, shape) * np.fft.rfft2(kernel.astype(np.float32), shape)
    # The product is of circular shifts: what is whole begins one kernel's side, less one, from the edge.
    whole = np.fft.irfft2(spectrum, shape)[:, 2 * pad : 2 * pad + image.height, 2 * pad : 2 * pad + image.width]
    return _image(whole.transpose(1, 2, 0))


@functools.cache
def _smooth(least: int) -> int:
    """The smallest number from `least` up without prime factors above 5: Fourier transforms of it are fast."""
    number = least
    while True:
        rest = number
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return number
        number += 1


def _resize(image: Image.Image, size: tuple[int, int], random: np.random.Generator) -> Image.Image:
    """By one of: points (of the unsmoothed picture), bilinear, bicubic, or in two strides."""
    methods = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    match random.integers(4):
        case 0:  # points at the centres of the new pixels: to the nearest old one would shift the picture
            across, down = image.width / size[0], image.height / size[1]
            return image.transform(
                size, Image.Transform.AFFINE, (across, 0, 0, 0, down, 0), Image.Resampling.BILINEAR
            )
        case 1:
            return image.resize(size, methods[0])
        case 2:
            return image.resize(size, methods[1])
        case _:  # first to between half and all of the factor, maybe enlarged, then to the size
            share = random.uniform(0.5, max(image.width / size[0], 0.5))
            between = (max(round(image.width / share), 1), max(round(image.height / share), 1))
            first, second = (methods[number] for number in random.integers(2, size=2))
            return image.resize(between, first).resize(size, second)


def _noise(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Gaussian: grey, of independent colours, or of colours that vary together."""
    level = random.uniform(*_NOISE)
    shape = (image.height, image.width)
    kind = random.random()
    if kind < 0.4:
        noise = random.standard_normal((*shape, 1))
    elif kind < 0.8:
        noise = random.standard_normal((*shape, 3))
    else:  # any covariance: a random rotation of random variances, at most level^2
        axes, _ = np.linalg.qr(random.standard_normal((3, 3)))
        noise = random.standard_normal((*shape, 3)) * np.sqrt(random.random(3)) @ axes.T
    return _image(np.asarray(image, np.float32) + level * noise)


def _jpeg(image: Image.Image, random: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(random.integers(_QUALITY[0], _QUALITY[1] + 1)))
    return Image.open(buffer).convert("RGB")


def _image(values_HW3: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(values_HW3 + 0.5, 0, 255).astype(np.uint8))
