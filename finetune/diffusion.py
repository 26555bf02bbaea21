"""The diffusion process in closed form: noise schedule, noising, what the network predicts. Pure functions.

Notation of Ho et al. 2020 (arXiv 2006.11239): beta_t, alpha_t = 1 - beta_t, alpha_bar_t = prod alpha_s; z_0 is a
latent, z_t its noised version at timestep t in 0..T-1.
"""

from __future__ import annotations

import torch
from torch import Tensor

BETA_SCHEDULES = ("scaled_linear", "linear")
PREDICTIONS = ("epsilon",)


def betas(beta_start: float, beta_end: float, num_train_timesteps: int, beta_schedule: str) -> Tensor:
    """Float64 [T]. `scaled_linear`, linear in sqrt(beta), is latent diffusion's (Rombach et al. 2022, appendix)."""
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
    assert beta_schedule == "scaled_linear", beta_schedule
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2


def alphas_cumprod(betas_T: Tensor) -> Tensor:
    """alpha_bar, float64 [T] (Ho et al. 2020, after eq. 4)."""
    return torch.cumprod(1.0 - betas_T, dim=0)


def add_noise(z_BCHW: Tensor, noise_BCHW: Tensor, alpha_bar_B: Tensor) -> Tensor:
    """z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4)."""
    alpha_bar_B111 = alpha_bar_B.view(-1, 1, 1, 1)
    signal, noise_level = (
        alpha_bar_B111.sqrt().to(z_BCHW.dtype),
        (1.0 - alpha_bar_B111).sqrt().to(z_BCHW.dtype),
    )
    return signal * z_BCHW + noise_level * noise_BCHW


def target(prediction: str, z_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """What the network is to output: the noise itself for `epsilon` (Ho et al. 2020, eq. 14)."""
    assert prediction == "epsilon", prediction
    return noise_BCHW


def per_sample_mse(prediction_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Float32 [B]: squared error averaged over channels and positions (Rombach et al. 2022, eq. 2)."""
    return (prediction_BCHW.float() - target_BCHW.float()).square().flatten(1).mean(dim=1)
