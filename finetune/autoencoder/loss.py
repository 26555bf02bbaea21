"""The first stage's loss: reconstruction and a light KL term.

Rombach et al. 2022 (arXiv 2112.10752), appendix G, without its adversarial and perceptual parts.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FirstStageLoss(NamedTuple):
    """[B] each: `total` is what is minimised; `l1` and `kl` are its parts before they are weighted."""

    total: Tensor
    l1: Tensor  # mean |x - x_hat| over image elements, pixels in [-1, 1]
    kl: Tensor  # nats, summed over latent elements


def kl_to_standard_normal(mean_BCHW: Tensor, logvar_BCHW: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over a picture's latent elements: [B].

    Kingma & Welling 2014 (arXiv 1312.6114), appendix B.
    """
    return 0.5 * (mean_BCHW.square() + logvar_BCHW.exp() - 1.0 - logvar_BCHW).sum(dim=(1, 2, 3))


def first_stage_loss(
    image_B3HW: Tensor, recon_B3HW: Tensor, mean_BCHW: Tensor, logvar_BCHW: Tensor, kl_weight: float
) -> FirstStageLoss:
    """L1 plus `kl_weight` times KL, both summed over a picture, as the paper weighs them (1e-6).

    The sum is then divided by the number of image elements, which leaves the balance of the two terms and
    makes losses and gradient norms comparable between picture sizes.

    Args:
        image_B3HW: pixels in [-1, 1], float32; the reconstruction likewise.
        mean_BCHW, logvar_BCHW: the posterior q(z|x) that the reconstruction was drawn from, float32.
    """
    elements = image_B3HW[0].numel()
    l1_B = (image_B3HW - recon_B3HW).abs().sum(dim=(1, 2, 3)) / elements
    kl_B = kl_to_standard_normal(mean_BCHW, logvar_BCHW)
    return FirstStageLoss(l1_B + kl_weight * kl_B / elements, l1_B, kl_B)
