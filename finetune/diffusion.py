"""The diffusion process in closed form: noise schedules, noising, what the network predicts, how losses weigh.

Pure functions. Notation of Ho et al. 2020 (arXiv 2006.11239): beta_t, alpha_t = 1 - beta_t, alpha_bar_t = prod
alpha_s; z_0 is a latent, z_t = signal_t z_0 + level_t eps its noised version at timestep t in 0..T-1. SNR_t =
(signal_t / level_t)^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BETA_SCHEDULES = ("scaled_linear", "linear")
PREDICTIONS = ("epsilon", "v", "x0", "flow")
WEIGHTINGS = ("uniform", "min_snr", "soft_min_snr", "p2", "debiased")
TIMESTEPS = ("uniform", "logit_normal")
LOSSES = ("mse", "l1", "huber")


# --- the schedule ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How much of a latent and how much noise z_t holds: `signal` and `level`, float64 [T].

    `told`: what the network is told of each timestep, int64 or float32 [T].
    """

    signal: Tensor
    level: Tensor
    told: Tensor

    def __len__(self) -> int:
        return len(self.signal)

    def at(self, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and level, float64 [B], of indices int64 [B] on the schedule's device."""
        return self.signal[timesteps_B], self.level[timesteps_B]

    def to(self, device: torch.device) -> Schedule:
        return Schedule(self.signal.to(device), self.level.to(device), self.told.to(device))


def betas(beta_start: float, beta_end: float, num_train_timesteps: int, beta_schedule: str) -> Tensor:
    """Float64 [T]. `scaled_linear`, linear in sqrt(beta), is latent diffusion's (Rombach et al. 2022, appendix)."""
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
    assert beta_schedule == "scaled_linear", beta_schedule
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2


def alphas_cumprod(betas_T: Tensor) -> Tensor:
    """alpha_bar, float64 [T] (Ho et al. 2020, after eq. 4)."""
    return torch.cumprod(1.0 - betas_T, dim=0)


def zero_terminal_snr(alpha_bar_T: Tensor) -> Tensor:
    """alpha_bar shifted and scaled in its root, so that the last is 0 and the first stays: float64 [T].

    Lin et al. 2024 (arXiv 2305.08891), algorithm 1.
    """
    root_T = alpha_bar_T.sqrt()
    first, last = root_T[0], root_T[-1]
    return ((root_T - last) * (first / (first - last))).square()


def variance_preserving(alpha_bar_T: Tensor) -> Schedule:
    """z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4)."""
    return Schedule(alpha_bar_T.sqrt(), (1.0 - alpha_bar_T).sqrt(), torch.arange(len(alpha_bar_T)))


def rectified_flow(num_train_timesteps: int, shift: float = 1.0) -> Schedule:
    """z_t = (1 - s) z_0 + s eps (Liu et al. 2023, arXiv 2209.03003), s in (0, 1] at T levels, told as T s.

    `shift` above 1 moves levels towards noise (Esser et al. 2024, arXiv 2403.03206, eq. 23).
    """
    level_T = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    level_T = shift * level_T / (1.0 + (shift - 1.0) * level_T)
    return Schedule(1.0 - level_T, level_T, (level_T * num_train_timesteps).float())


# --- noising --------------------------------------------------------------------------------------


def mix(z_BCHW: Tensor, noise_BCHW: Tensor, signal_B: Tensor, level_B: Tensor) -> Tensor:
    """z_t = signal z_0 + level eps, in the dtype of `z_BCHW`."""
    signal, level = (part.view(-1, 1, 1, 1).to(z_BCHW.dtype) for part in (signal_B, level_B))
    return signal * z_BCHW + level * noise_BCHW


def add_offset(noise_BCHW: Tensor, offset_BC: Tensor, strength: float) -> Tensor:
    """Offset noise: the same normal value over each channel of a sample, `strength` times, on top.

    Guttenberg 2023, "Diffusion with offset noise"; lets a model leave the mean brightness.
    """
    return noise_BCHW + strength * offset_BC[:, :, None, None]


def target(prediction: str, z_BCHW: Tensor, noise_BCHW: Tensor, signal_B: Tensor, level_B: Tensor) -> Tensor:
    """What the network is to output, [B, C, H, W].

    `epsilon`: the noise (Ho et al. 2020, eq. 14). `x0`: the latent. `v`: signal eps - level z_0 (Salimans & Ho
    2022, arXiv 2202.00512, appendix D). `flow`: eps - z_0 (Liu et al. 2023, eq. 1).
    """
    match prediction:
        case "epsilon":
            return noise_BCHW
        case "x0":
            return z_BCHW
        case "v":
            return mix(noise_BCHW, -z_BCHW, signal_B, level_B)
        case "flow":
            return noise_BCHW - z_BCHW
    raise AssertionError(prediction)


# --- losses and their weights ---------------------------------------------------------------------


def weight(
    prediction: str, weighting: str, signal_B: Tensor, level_B: Tensor, *, gamma: float = 5.0, k: float = 1.0
) -> Tensor:
    """Float64 [B]: the factor of each sample's squared error in the network's own terms; `uniform` is 1.

    The others are one function of the SNR for every prediction, said of the error of z_0:
    `min_snr`       min(SNR, gamma) (Hang et al. 2023, arXiv 2303.09556, eq. 8)
    `soft_min_snr`  SNR gamma / (SNR + gamma) (Crowson et al. 2024, arXiv 2401.11605, eq. 6)
    `p2`            SNR / (k + SNR)^gamma (Choi et al. 2022, arXiv 2204.00227, eq. 8)
    `debiased`      sqrt(SNR) (Yu et al. 2023, arXiv 2310.08442)
    """
    if weighting == "uniform":
        return torch.ones_like(signal_B)
    snr_B = (signal_B / level_B).square()
    match weighting:
        case "min_snr":
            of_x0_B = snr_B.clamp(max=gamma)
        case "soft_min_snr":
            of_x0_B = snr_B * gamma / (snr_B + gamma)
        case "p2":
            of_x0_B = snr_B / (k + snr_B).pow(gamma)
        case "debiased":
            of_x0_B = snr_B.sqrt()
        case _:
            raise AssertionError(weighting)
    return of_x0_B / error_ratio(prediction, signal_B, level_B)


def error_ratio(prediction: str, signal_B: Tensor, level_B: Tensor) -> Tensor:
    """Squared error of a prediction over that of the z_0 which it implies at the same z_t, float64 [B].

    `epsilon` SNR, `x0` 1, `v` SNR + 1 where signal^2 + level^2 = 1, `flow` 1 / level^2 where signal + level = 1.
    """
    match prediction:
        case "epsilon":
            return (signal_B / level_B).square()
        case "x0":
            return torch.ones_like(signal_B)
        case "v":
            return ((signal_B.square() + level_B.square()) / level_B).square()
        case "flow":
            return ((signal_B + level_B) / level_B).square()
    raise AssertionError(prediction)


def elementwise_loss(kind: str, prediction: Tensor, wanted: Tensor, huber_delta: float = 1.0) -> Tensor:
    """Float32 of the shape of `prediction`, or float64 where that is.

    `mse`: the square; `l1`: the distance; `huber`: half the square up to `huber_delta`, then linear (Huber 1964).
    """
    precise = torch.promote_types(prediction.dtype, torch.float32)
    apart = prediction.to(precise) - wanted.to(precise)
    match kind:
        case "mse":
            return apart.square()
        case "l1":
            return apart.abs()
        case "huber":
            distance = apart.abs()
            far = huber_delta * (distance - 0.5 * huber_delta)
            return torch.where(distance < huber_delta, 0.5 * apart.square(), far)
    raise AssertionError(kind)


def per_sample(loss_BCHW: Tensor, mask_B1HW: Tensor | None = None) -> Tensor:
    """[B]: the mean over channels and positions (Rombach et al. 2022, eq. 2), over `mask_B1HW`'s where it is given.

    A mask holds weights of at least 0; a sample whose mask is 0 everywhere has no loss.
    """
    if mask_B1HW is None:
        return loss_BCHW.flatten(1).mean(dim=1)
    mask = mask_B1HW.to(loss_BCHW.dtype).expand_as(loss_BCHW).flatten(1)
    return (loss_BCHW.flatten(1) * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(torch.finfo(mask.dtype).tiny)


# --- timesteps ------------------------------------------------------------------------------------


def stratified(u_B: Tensor, place_B: Tensor, places: int) -> Tensor:
    """Low-discrepancy points [B] in [0, 1): one shared offset `u_B` and `places` equal steps.

    Kingma et al. 2021 (arXiv 2107.00630), appendix I.1. `place_B` counts samples of one optimizer step through all
    ranks and micro-batches, whose `u_B` is the same.
    """
    return (u_B + place_B / places).remainder(1.0)


def timesteps(u_B: Tensor, distribution: str, count: int, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Int64 [B] in [0, count) from points `u_B` in [0, 1), float64.

    `uniform`, or `logit_normal`: t = sigmoid(mean + std x), x normal (Esser et al. 2024, section 3.1).
    """
    u_B = u_B.double()
    if distribution == "logit_normal":
        tiny = 2.0**-25  # half a step of 24-bit draws: the quantile function is infinite at 0
        u_B = torch.sigmoid(mean + std * math.sqrt(2.0) * torch.erfinv(2.0 * u_B.clamp(tiny, 1.0 - tiny) - 1.0))
    else:
        assert distribution == "uniform", distribution
    return (u_B * count).long().clamp_(0, count - 1)
