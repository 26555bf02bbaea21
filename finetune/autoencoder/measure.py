"""What the first stage is judged by: PSNR and SSIM, the scale of its latents, reconstructions beside pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from diffusers import VQModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from finetune.autoencoder.bottleneck import nearest
from finetune.latents import LatentSpace, RunningMoments
from finetune.models.autoencoder import FirstStage, decode, encode_moments, to_signed, to_uint8


def reconstruct(vae: FirstStage, pixels_BHW3: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    """uint8 pictures -> uint8 reconstructions from the moments' mean, [B, H, W, 3] both."""
    mean_BCHW, _ = encode_moments(vae, to_signed(pixels_BHW3, device)).chunk(2, dim=1)
    return to_uint8(decode(vae, mean_BCHW))


def psnr(a_BHW3: np.ndarray, b_BHW3: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each pair of uint8 pictures, [B]; the peak is 255."""
    axes = tuple(range(1, a_BHW3.ndim))
    mse = np.mean((a_BHW3.astype(np.float64) - b_BHW3.astype(np.float64)) ** 2, axis=axes)
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(255.0**2 / mse)


SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels


def ssim(a_BHW3: np.ndarray, b_BHW3: np.ndarray) -> np.ndarray:
    """Mean structural similarity of each pair of uint8 pictures, [B], at most 1.

    Wang et al. 2004 ("Image quality assessment", IEEE TIP 13), section III.B and C: an 11 x 11 Gaussian window of
    sigma 1.5 that lies wholly within the picture, K1 = 0.01, K2 = 0.03, peak 255. The mean is over its places and
    the three channels. Float64.

    Raises:
        ValueError: a side is shorter than the window.
    """
    if min(a_BHW3.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs sides of {SSIM_WINDOW} pixels, not {a_BHW3.shape[1]}x{a_BHW3.shape[2]}")
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    line = line / line.sum()

    def blur(x_B1HW: Tensor) -> Tensor:  # the window is a product of two lines
        return F.conv2d(F.conv2d(x_B1HW, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    def channels(x_BHW3: np.ndarray) -> Tensor:
        return torch.from_numpy(x_BHW3).double().permute(0, 3, 1, 2).reshape(-1, 1, *x_BHW3.shape[1:3])

    a, b = channels(a_BHW3), channels(b_BHW3)
    mean_a, mean_b = blur(a), blur(b)
    variance_a, variance_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).mean(dim=(1, 2, 3)).view(len(a_BHW3), -1).mean(dim=1).numpy()


def measure_latents(
    vae: FirstStage, batches_BHW3: Iterable[np.ndarray], device: torch.device | str = "cpu"
) -> tuple[float, Tensor | None]:
    """Standard deviation of the raw latents over all their elements, and how often a codebook's entries are used.

    The first stage's scale is 1 / std, so that the diffusion model sees unit variance (Rombach et al. 2022,
    arXiv 2112.10752, appendix G, where one batch is measured). The posterior's own variance is counted in
    closed form: Var[z] = Var[mean] + E[std^2].

    Returns:
        The latter is int64 [K], and None for an `AutoencoderKL`.
    """
    moments = RunningMoments()
    codebook_KC = vae.quantize.embedding.weight if isinstance(vae, VQModel) else None
    uses_K = None if codebook_KC is None else torch.zeros(len(codebook_KC), dtype=torch.int64, device=device)
    for pixels_BHW3 in batches_BHW3:
        of_batch = encode_moments(vae, to_signed(pixels_BHW3, device))
        moments.add(of_batch.cpu().numpy())
        if codebook_KC is not None and uses_K is not None:
            indices_BHW = nearest(of_batch.chunk(2, dim=1)[0], codebook_KC)
            uses_K += torch.bincount(indices_BHW.flatten(), minlength=len(uses_K))
    _, std, _, _ = moments.summary(LatentSpace(scale=1.0))
    if not (math.isfinite(std) and std > 0):
        raise ValueError(f"the latents' standard deviation is {std}")
    return std, uses_K


def comparison(pictures: list[np.ndarray], reconstructions: list[np.ndarray], gap: int = 2) -> Image.Image:
    """Pictures [H, W, 3] in the top row, their reconstructions below, with white gaps of `gap` pixels."""
    height = max(picture.shape[0] for picture in pictures)
    width = sum(picture.shape[1] + gap for picture in pictures) + gap
    sheet = Image.new("RGB", (width, 2 * height + 3 * gap), "white")
    left = gap
    for picture, reconstruction in zip(pictures, reconstructions, strict=True):
        sheet.paste(Image.fromarray(picture), (left, gap))
        sheet.paste(Image.fromarray(reconstruction), (left, height + 2 * gap))
        left += picture.shape[1] + gap
    return sheet
