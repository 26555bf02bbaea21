"""The exponential moving average of weights, with its length in images seen."""

from __future__ import annotations

from collections.abc import Sequence

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
