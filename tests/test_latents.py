"""Scale, shift and the statistics of model latents, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from finetune.latents import LatentSpace, RunningMoments, sample_latents, to_raw


def test_sample_latents_by_hand() -> None:
    moments = torch.tensor([1.0, 2.0, 0.5, 4.0]).reshape(1, 4, 1, 1)  # two channels: means 1, 2 and stds 0.5, 4
    eps = torch.tensor([2.0, -1.0]).reshape(1, 2, 1, 1)
    z = sample_latents(moments.half(), eps, LatentSpace(scale=0.5, shift=0.25))
    assert z.dtype == torch.float32
    assert z.flatten().tolist() == [(1 + 0.5 * 2 - 0.25) * 0.5, (2 - 4 - 0.25) * 0.5]


@pytest.mark.parametrize("space", [LatentSpace(0.18215), LatentSpace(0.13025), LatentSpace(0.3611, 0.1159)])
def test_to_raw_is_the_inverse(space: LatentSpace) -> None:
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(2, 8, 5, 3, generator=generator) * 10
    z = sample_latents(moments, torch.zeros(2, 4, 5, 3), space)
    torch.testing.assert_close(to_raw(z, space), moments[:, :4], rtol=1e-5, atol=1e-5)


def test_scaled_latents_of_an_autoencoder_output_equal_diffusers() -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    generator = torch.Generator().manual_seed(0)
    posterior = DiagonalGaussianDistribution(torch.randn(2, 8, 4, 4, generator=generator))
    moments = torch.cat([posterior.mean, posterior.std], dim=1)
    eps = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    reference = posterior.sample(torch.Generator().manual_seed(1)) * 0.18215
    torch.testing.assert_close(sample_latents(moments, eps, LatentSpace(0.18215)), reference)


def batch(seed: int, count: int, offset: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(count, 3, 4, 5)) * np.asarray([1, 2, 3])[:, None, None] + offset
    std = rng.uniform(0.1, 2, size=(count, 3, 4, 5))
    return np.concatenate([mean, std], axis=1)


def test_running_moments_do_not_depend_on_the_batches() -> None:
    data = batch(0, 30)
    space = LatentSpace(0.5, 0.1)
    whole, parts = RunningMoments(), RunningMoments()
    whole.add(data)
    for cut in np.split(data, [1, 2, 10]):
        parts.add(cut)
    for a, b in zip(whole.summary(space), parts.summary(space)):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_running_moments_are_those_of_fresh_draws() -> None:
    data = batch(1, 40)
    space = LatentSpace(0.5, 0.1)
    running = RunningMoments()
    running.add(data)
    mean, std, channel_mean, channel_std = running.summary(space)
    generator = torch.Generator().manual_seed(0)
    moments = torch.from_numpy(data).repeat(100, 1, 1, 1)
    eps = torch.randn(moments.shape[0], 3, 4, 5, generator=generator)
    z = sample_latents(moments, eps, space)
    draws = z[:, 0].numel()
    # Four standard errors of a mean, and of a standard deviation, over the draws of the noise.
    np.testing.assert_allclose(z.mean(dim=(0, 2, 3)), channel_mean, atol=4 * max(channel_std) / draws**0.5)
    np.testing.assert_allclose(z.std(dim=(0, 2, 3)), channel_std, atol=4 * max(channel_std) / draws**0.5)
    assert abs(float(z.mean()) - mean) < 4 * std / (3 * draws) ** 0.5
    assert abs(float(z.std()) - std) < 4 * std / (3 * draws) ** 0.5


def test_running_moments_keep_digits_at_a_large_offset() -> None:
    running = RunningMoments()
    for seed in range(50):
        running.add(batch(seed, 4, offset=1e7))
    reference = np.concatenate([batch(seed, 4) for seed in range(50)])
    want = np.sqrt(reference[:, :3].var(axis=(0, 2, 3)) + (reference[:, 3:] ** 2).mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(running.summary(LatentSpace(1.0))[3], want, rtol=1e-6)


def test_no_latents_no_summary() -> None:
    with pytest.raises(ValueError, match="no latents"):
        RunningMoments().summary(LatentSpace(1.0))
