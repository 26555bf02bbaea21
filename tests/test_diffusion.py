"""The noise schedule and the loss against diffusers' DDPMScheduler and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from finetune import diffusion

SD = (0.00085, 0.012, 1000)


@pytest.mark.parametrize("schedule", diffusion.BETA_SCHEDULES)
def test_betas_and_alpha_bars_are_those_of_diffusers(schedule: str) -> None:
    reference = DDPMScheduler(1000, 0.00085, 0.012, beta_schedule=schedule)
    betas_T = diffusion.betas(*SD, schedule)
    assert betas_T.dtype == torch.float64
    # diffusers keeps float32: it agrees to that, and with its own formula in float64 to the last bits.
    torch.testing.assert_close(betas_T.float(), reference.betas, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        diffusion.alphas_cumprod(betas_T).float(), reference.alphas_cumprod, rtol=2e-5, atol=0
    )
    exact = np.linspace(0.00085, 0.012, 1000)
    if schedule == "scaled_linear":
        exact = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(betas_T.numpy(), exact, rtol=1e-14)
    np.testing.assert_allclose(diffusion.alphas_cumprod(betas_T).numpy(), np.cumprod(1 - exact), rtol=1e-12)


def test_the_default_schedule_is_stable_diffusions() -> None:
    alpha_bar_T = diffusion.alphas_cumprod(diffusion.betas(*SD, "scaled_linear"))
    assert alpha_bar_T[0].item() == pytest.approx(0.99915, abs=1e-9)
    assert alpha_bar_T[999].item() == pytest.approx(0.00466, abs=1e-5)
    assert (alpha_bar_T.diff() < 0).all()


def test_noising_equals_diffusers_and_keeps_the_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    z, noise = (torch.randn(8, 4, 16, 16, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 1, 17, 250, 500, 750, 998, 999])
    alpha_bar_T = diffusion.alphas_cumprod(diffusion.betas(*SD, "scaled_linear"))
    noised = diffusion.add_noise(z, noise, alpha_bar_T[timesteps])
    reference = DDPMScheduler(1000, 0.00085, 0.012, beta_schedule="scaled_linear")
    assert noised.dtype == torch.float32
    torch.testing.assert_close(noised, reference.add_noise(z, noise, timesteps), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(noised.var(dim=(1, 2, 3)), torch.ones(8), rtol=0.15, atol=0)


def test_noising_inverts_when_the_noise_is_known() -> None:
    z, noise = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(1)).double()
    alpha_bar_B = torch.tensor([0.99, 0.5, 0.01], dtype=torch.float64)
    noised = diffusion.add_noise(z, noise, alpha_bar_B)
    signal, level = alpha_bar_B.sqrt().view(3, 1, 1, 1), (1 - alpha_bar_B).sqrt().view(3, 1, 1, 1)
    back = (noised - level * noise) / signal
    torch.testing.assert_close(back, z, rtol=1e-12, atol=1e-12)


def test_noising_keeps_a_low_precision_dtype() -> None:
    z = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)
    assert diffusion.add_noise(z, z, torch.tensor([0.5], dtype=torch.float64)).dtype == torch.bfloat16


def test_epsilon_is_predicted_as_it_was_added() -> None:
    z, noise = torch.zeros(1, 4, 2, 2), torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(diffusion.target("epsilon", z, noise), noise)


def test_loss_per_sample_averages_to_torchs() -> None:
    predicted, wanted = torch.randn(2, 5, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    loss_B = diffusion.per_sample_mse(predicted, wanted)
    torch.testing.assert_close(loss_B.mean(), torch.nn.functional.mse_loss(predicted, wanted))
    for i in range(5):
        torch.testing.assert_close(loss_B[i], torch.nn.functional.mse_loss(predicted[i], wanted[i]))


def test_loss_is_float32_whatever_the_model_says() -> None:
    predicted = torch.full((1, 4, 64, 64), 300.0, dtype=torch.float16)  # its square is no float16
    loss_B = diffusion.per_sample_mse(predicted, torch.zeros(1, 4, 64, 64))
    assert loss_B.dtype == torch.float32
    assert loss_B.item() == pytest.approx(90_000.0)
