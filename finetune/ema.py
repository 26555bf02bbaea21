"""The exponential moving average of weights, with its length in images seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def decay(images_seen: int, images_per_step: int, halflife_images: float, rampup_ratio: float) -> float:
    """Share of the old average kept by one step (Karras et al. 2022, arXiv 2206.00364, appendix F).

    The half-life is `halflife_images`, but at most `rampup_ratio` of the images seen, so that a young run's
    average forgets its start.
    """
    halflife = min(halflife_images, images_seen * rampup_ratio) if rampup_ratio > 0 else halflife_images
    return 0.5 ** (images_per_step / max(halflife, 1e-8))


@torch.no_grad()
def update_(average: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights, in place; tensors pair up and are float32."""
    if average:
        torch._foreach_lerp_(list(average), list(weights), 1.0 - decay)


@dataclass
class Average:
    """The average of a run's weights: float32 tensors, one for each that it follows."""

    tensors: list[Tensor]
    halflife_images: float
    rampup_ratio: float

    @classmethod
    def starting_at(cls, weights: Sequence[Tensor], halflife_images: float, rampup_ratio: float) -> Average:
        return cls([tensor.detach().clone() for tensor in weights], halflife_images, rampup_ratio)

    def update(self, weights: Sequence[Tensor], images_seen: int, images_per_step: int) -> None:
        """Take in the weights after the step that brought the run to `images_seen`."""
        keep = decay(images_seen, images_per_step, self.halflife_images, self.rampup_ratio)
        update_(self.tensors, weights, keep)
