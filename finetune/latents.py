"""Autoencoder moments to model latents and back: the only home of scale and shift.

Shards keep what the encoder says of a picture, the mean and standard deviation of q(z|x), unscaled. The
model sees z = (mean + std * eps - shift) * scale, so that its latents have about unit variance (Rombach et
al. 2022, arXiv 2112.10752, section D.1). SD 1.x and 2.x have scale 0.18215, SDXL 0.13025, all with shift 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class LatentSpace:
    """The affine map between raw autoencoder latents and model latents."""

    scale: float
    shift: float = 0.0


def sample_latents(moments_B2CHW: Tensor, eps_BCHW: Tensor, space: LatentSpace) -> Tensor:
    """Draw model latents z = (mean + std * eps - shift) * scale, float32.

    Args:
        moments_B2CHW: mean, then standard deviation, along the channels; any float dtype.
        eps_BCHW: standard normal noise; zeros give the posterior's mode.
    """
    mean_BCHW, std_BCHW = moments_B2CHW.float().chunk(2, dim=1)
    return from_raw(mean_BCHW + std_BCHW * eps_BCHW.float(), space)


def from_raw(raw_BCHW: Tensor, space: LatentSpace) -> Tensor:
    """What the encoder gives to model latents: (raw - shift) * scale."""
    return (raw_BCHW - space.shift) * space.scale


def to_raw(z_BCHW: Tensor, space: LatentSpace) -> Tensor:
    """Model latents back to what the decoder takes: z / scale + shift."""
    return z_BCHW / space.scale + space.shift


class RunningMoments:
    """Mean and standard deviation of the raw latents mean + std * eps, gathered batch by batch in float64.

    Over all draws and positions, E[x] = E[mean] and Var[x] = E[mean^2] + E[std^2] - E[mean]^2. Batches are
    merged by the update of Chan, Golub and LeVeque (1979), which does not lose digits over many batches.
    """

    def __init__(self) -> None:
        self.count = 0  # positions per channel
        self._mean_C = np.zeros(0)
        self._m2_C = np.zeros(0)

    def add(self, moments_B2CHW: np.ndarray) -> None:
        """Take in a batch [B, 2C, h, w] of any float dtype."""
        mean_BCHW, std_BCHW = np.split(moments_B2CHW.astype(np.float64), 2, axis=1)
        count = mean_BCHW.size // mean_BCHW.shape[1]
        if count == 0:
            return
        mean_C = mean_BCHW.mean(axis=(0, 2, 3))
        m2_C = ((mean_BCHW - mean_C[:, None, None]) ** 2 + std_BCHW**2).sum(axis=(0, 2, 3))
        self._merge(count, mean_C, m2_C)

    def state(self) -> dict[str, Any]:
        """All of it as JSON values, for `merge`; floats keep every bit."""
        return {"count": self.count, "mean": self._mean_C.tolist(), "m2": self._m2_C.tolist()}

    def merge(self, state: dict[str, Any]) -> None:
        """Take in what another one gathered."""
        if state["count"]:
            self._merge(state["count"], np.array(state["mean"]), np.array(state["m2"]))

    def _merge(self, count: int, mean_C: np.ndarray, m2_C: np.ndarray) -> None:
        if self.count == 0:
            self.count, self._mean_C, self._m2_C = count, mean_C, m2_C
            return
        total = self.count + count
        delta_C = mean_C - self._mean_C
        self._m2_C = self._m2_C + m2_C + delta_C**2 * (self.count * count / total)
        self._mean_C = self._mean_C + delta_C * (count / total)
        self.count = total

    def summary(self, space: LatentSpace) -> tuple[float, float, list[float], list[float]]:
        """(mean, std, channel means, channel stds) of the model latents.

        Raises:
            ValueError: nothing was added.
        """
        if self.count == 0:
            raise ValueError("no latents were added")
        mean_C = (self._mean_C - space.shift) * space.scale
        var_C = self._m2_C / self.count * space.scale**2
        mean = float(mean_C.mean())
        var = float(var_C.mean() + ((mean_C - mean) ** 2).mean())
        return mean, float(np.sqrt(var)), mean_C.tolist(), np.sqrt(var_C).tolist()
