"""PSNR, SSIM, the latents' scale, and the sheet of reconstructions."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.autoencoder import config as schema
from finetune.autoencoder import results
from finetune.autoencoder.build import build
from finetune.autoencoder.config import AutoencoderConfig
from finetune.autoencoder.measure import comparison, measure_latents, psnr, reconstruct, ssim
from finetune.autoencoder.pictures import Pictures
from finetune.data.shards import ShardWriter
from finetune.latents import LatentSpace, sample_latents
from finetune.models.autoencoder import to_signed, to_uint8

TINY = AutoencoderConfig(
    block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False
)


def pixels(count: int, size: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_uint8_survives_the_way_to_floats_and_back() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    signed = to_signed(every)
    assert signed.min() == -1.0
    assert signed.max() == 1.0
    assert np.array_equal(to_uint8(signed), every)


def test_psnr_of_a_known_error() -> None:
    a = np.full((2, 4, 4, 3), 100, np.uint8)
    b = a.copy()
    b[1] += 5  # mse 25
    values = psnr(a, b)
    assert values[0] == np.inf
    assert values[1] == pytest.approx(20 * np.log10(255 / 5))


def test_psnr_has_no_uint8_wrap_around() -> None:
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    assert psnr(black, white)[0] == pytest.approx(0.0)
    assert psnr(white, black)[0] == pytest.approx(0.0)


def alike(count: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth pictures and noisy, darker copies: what a reconstruction is like."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    phases = generator.uniform(0, 6, (count, 1, 1, 3))
    a = 127 + 90 * np.sin(0.3 * x[None, :, :, None] + phases) * np.cos(0.2 * y[None, :, :, None] + phases)
    b = 0.9 * a + generator.normal(0, 12, a.shape)
    return a.round().astype(np.uint8), b.clip(0, 255).round().astype(np.uint8)


def test_ssim_is_that_of_the_paper_written_out() -> None:
    """Window by window, by Wang et al. 2004, equations 13 to 17, with the weights of a two-dimensional Gaussian."""
    a, b = alike(2, 14, 19)
    y, x = np.mgrid[-5:6, -5:6]
    window = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    window = (window / window.sum())[:, :, None]
    expected = []
    for one, other in zip(a.astype(np.float64), b.astype(np.float64)):
        values = []
        for top in range(14 - 10):
            for left in range(19 - 10):
                p, q = (picture[top : top + 11, left : left + 11] for picture in (one, other))
                mean_p, mean_q = (window * p).sum((0, 1)), (window * q).sum((0, 1))
                var_p, var_q = (window * (p - mean_p) ** 2).sum((0, 1)), (window * (q - mean_q) ** 2).sum((0, 1))
                cov = (window * (p - mean_p) * (q - mean_q)).sum((0, 1))
                c1, c2 = 2.55**2, 7.65**2
                numerator = (2 * mean_p * mean_q + c1) * (2 * cov + c2)
                values.append(numerator / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2)))
        expected.append(np.mean(values))
    assert ssim(a, b) == pytest.approx(expected, rel=1e-10)


def test_ssim_is_that_of_scikit_image() -> None:
    """structural_similarity(a, b, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False) of scikit-image 0.26.0."""
    a, b = alike(2, 40, 56)
    assert ssim(a, b) == pytest.approx([0.8487514155352184, 0.8487472569227617], rel=1e-10)


def test_ssim_has_its_bounds() -> None:
    a, b = alike(3, 16, 16)
    assert ssim(a, a) == pytest.approx([1.0] * 3)
    assert ssim(a, b) == pytest.approx(ssim(b, a))
    assert (ssim(a, 255 - a) < 0).all()  # as different in structure as can be
    with pytest.raises(ValueError, match="sides of 11 pixels, not 16x10"):
        ssim(a[:, :, :10], b[:, :, :10])


def test_scaled_latents_have_unit_std() -> None:
    vae = build(TINY, seed=0)
    data = pixels(12)
    std, uses = measure_latents(vae, [data[:5], data[5:]])
    assert uses is None
    with torch.no_grad():
        posterior = vae.encode(to_signed(data)).latent_dist
        moments = torch.cat([posterior.mean, posterior.std], dim=1)
    generator = torch.Generator().manual_seed(0)
    draws = [
        sample_latents(moments, torch.randn(posterior.mean.shape, generator=generator), LatentSpace(1 / std))
        for _ in range(200)
    ]
    assert torch.stack(draws).std().item() == pytest.approx(1.0, abs=3e-3)


def test_reconstruction_is_the_decoded_mean() -> None:
    vae = build(TINY, seed=0)
    data = pixels(2)
    with torch.no_grad():
        expected = vae(to_signed(data), sample_posterior=False).sample
    assert np.array_equal(reconstruct(vae, data), to_uint8(expected))


def test_the_sheet_has_pictures_above_their_reconstructions() -> None:
    tops, bottoms = pixels(3), pixels(3, seed=1)
    sheet = np.asarray(comparison(list(tops), list(bottoms), gap=2))
    assert sheet.shape == (2 * 16 + 6, 3 * 18 + 2, 3)
    for i in range(3):
        left = 2 + 18 * i
        assert np.array_equal(sheet[2:18, left : left + 16], tops[i])
        assert np.array_equal(sheet[20:36, left : left + 16], bottoms[i])


def test_a_global_batch_of_many_gpus_is_not_measured_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process measures, in the memory of one GPU: 2^20 pixels, or one picture."""
    root, sides = tmp_path / "s", ((256, 256), (1024, 2048))
    with ShardWriter(root, "images") as writer:
        for number in range(42):
            size = sides[number // 40]
            buffer = io.BytesIO()
            Image.new("L", size[::-1], number).save(buffer, "PNG")
            writer.write(f"{number:02d}", {"png": buffer.getvalue()}, size)
        writer.finish()
    config, _ = schema.load([f"data.shards={root}", f"run.dir={tmp_path}", "train.global_batch=256"])
    pictures = Pictures(str(root), size=None, held_out=0, seed=0, multiple=8, cache_bytes=0, readers=1)
    sizes: list[int] = []

    def measure(vae: object, batches: Iterator[np.ndarray], device: object) -> None:
        sizes.extend(map(len, batches))

    monkeypatch.setattr(results, "measure_latents", measure)
    results._measure_latents(config, pictures, build(TINY, 0), torch.device("cpu"))
    assert sizes == [16, 16, 8, 1, 1]
