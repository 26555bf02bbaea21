"""Averages of weights over training, with their lengths in images seen.

Two profiles say how much the weights of each moment count. An exponential one has a half-life. A power function's
length grows with the run: it is a share of it, `sigma_rel`. Of averages of this kind, kept now and then, one of any
other length can be made afterwards (`finetune.posthoc`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # slow to import, and the command line wants a number of this module alone
    from torch import Tensor

KINDS = ("halflife", "power")
LARGEST_SIGMA_REL = 12**-0.5  # of an average that counts all moments alike


def decay(images_seen: int, images_per_step: int, halflife_images: float, rampup_ratio: float) -> float:
    """Share of the old average kept by one step (Karras et al. 2022, arXiv 2206.00364, appendix F).

    The half-life is `halflife_images`, but at most `rampup_ratio` of the images seen, so that a young run's
    average forgets its start.
    """
    halflife = min(halflife_images, images_seen * rampup_ratio) if rampup_ratio > 0 else halflife_images
    return 0.5 ** (images_per_step / max(halflife, 1e-8))


def power_decay(images_seen: int, images_per_step: int, gamma: float) -> float:
    """Share of the old average kept by one step (Karras et al. 2024, arXiv 2312.02696, section 3.1).

    After images T the weights that a step from s to t left behind count by what lies between these in the profile
    (gamma + 1) t^gamma / T^(gamma + 1). What was before the first step counts nothing.
    """
    return max(0.0, 1.0 - images_per_step / images_seen) ** (gamma + 1.0)


@functools.cache
def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power function whose standard deviation is `sigma_rel` of the run's length.

    Solves sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) for gamma >= 0 (arXiv 2312.02696, section 3.1 and
    appendix C.1), where the right-hand side falls.
    """
    assert 0 < sigma_rel <= LARGEST_SIGMA_REL, sigma_rel
    low, high = 0.0, 1.0 / sigma_rel  # the right-hand side is below 1 / gamma^2
    while (middle := (low + high) / 2) not in (low, high):
        if sigma_rel_of(middle) > sigma_rel:
            low = middle
        else:
            high = middle
    return low


def sigma_rel_of(gamma: float) -> float:
    """The reverse of `gamma_of`: mean and variance of t with density (gamma + 1) t^gamma on [0, 1]."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def update_(average: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights, in place; tensors pair up and are float32."""
    import torch

    if average:
        with torch.no_grad():
            torch._foreach_lerp_(list(average), list(weights), 1.0 - decay)


@dataclass(frozen=True)
class HalfLife:
    """An exponential profile: `halflife_images`, shorter at the start by `rampup_ratio` (see `decay`)."""

    halflife_images: float
    rampup_ratio: float

    def decay(self, images_seen: int, images_per_step: int) -> float:
        return decay(images_seen, images_per_step, self.halflife_images, self.rampup_ratio)


@dataclass(frozen=True)
class Power:
    """A power function of time whose standard deviation is `sigma_rel` of the images seen (see `gamma_of`)."""

    sigma_rel: float

    def decay(self, images_seen: int, images_per_step: int) -> float:
        return power_decay(images_seen, images_per_step, gamma_of(self.sigma_rel))

    @property
    def name(self) -> str:
        return f"power-{self.sigma_rel:g}"


@dataclass
class Average:
    """One average of a run's weights: float32 tensors, one for each that it follows.

    Attributes:
        name: of its folder in a checkpoint: `ema`, or `ema-NAME` for further ones.
        since_images: seen when it began; 0 for one that is as old as the run. For an average that is not, the
            weights had been the same all the time before.
    """

    tensors: list[Tensor]
    profile: HalfLife | Power
    name: str = "ema"
    since_images: int = 0

    @classmethod
    def starting_at(cls, weights: Sequence[Tensor], profile: HalfLife | Power, name: str = "ema") -> Average:
        return cls([tensor.detach().clone() for tensor in weights], profile, name)

    def update(self, weights: Sequence[Tensor], images_seen: int, images_per_step: int) -> None:
        """Take in the weights after the step that brought the run to `images_seen`."""
        update_(self.tensors, weights, self.profile.decay(images_seen, images_per_step))

    def describe(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        if isinstance(self.profile, Power):
            return {"sigma_rel": self.profile.sigma_rel, "since_images": self.since_images}
        return {"halflife_images": self.profile.halflife_images, "rampup_ratio": self.profile.rampup_ratio}
