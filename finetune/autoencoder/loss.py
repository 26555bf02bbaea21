"""The first stage's loss: reconstruction, a light penalty on latents, and what a discriminator adds to them.

Rombach et al. 2022 (arXiv 2112.10752), appendix G. The penalty is KL, or that of a codebook. The
perceptual part of the reconstruction is in `lpips`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class FirstStageLoss(NamedTuple):
    """[B] each: `total` is what is minimised."""

    total: Tensor
    reconstruction: Tensor  # total without its penalty
    l1: Tensor  # mean |x - x_hat| over image elements, pixels in [-1, 1]


def kl_to_standard_normal(mean_BCHW: Tensor, logvar_BCHW: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over a picture's latent elements: [B].

    Kingma & Welling 2014 (arXiv 1312.6114), appendix B.
    """
    return 0.5 * (mean_BCHW.square() + logvar_BCHW.exp() - 1.0 - logvar_BCHW).sum(dim=(1, 2, 3))


def codebook_terms(z_BCHW: Tensor, entries_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """How far entries are from what they stand for, as what pulls the entries, and as what pulls the encoder: [B].

    Squared distances, averaged over a picture's latent elements. van den Oord et al. 2017 (arXiv 1711.00937),
    equation 3, the second and (before its weight beta) the third term.
    """
    codebook_B = (entries_BCHW - z_BCHW.detach()).square().mean(dim=(1, 2, 3))
    commitment_B = (z_BCHW - entries_BCHW.detach()).square().mean(dim=(1, 2, 3))
    return codebook_B, commitment_B


def first_stage_loss(
    image_B3HW: Tensor,
    recon_B3HW: Tensor,
    penalty_B: Tensor,
    perceptual_B: Tensor | None = None,
    perceptual_weight: float = 1.0,
) -> FirstStageLoss:
    """L1, `perceptual_weight` times a perceptual distance, and a penalty.

    The paper sums L1 and KL over a picture, weighs KL by 1e-6, and lets the distance count once for each image
    element. Here all of it is divided by the number of these, which leaves the balance of the terms and makes
    losses and gradient norms comparable between picture sizes.

    Args:
        image_B3HW: pixels in [-1, 1], float32; the reconstruction likewise.
        penalty_B: what the latents cost, weighted, for each image element.
        perceptual_B: the distance of each reconstruction from its picture, if it is to count.
    """
    l1_B = (image_B3HW - recon_B3HW).abs().mean(dim=(1, 2, 3))
    reconstruction_B = l1_B if perceptual_B is None else l1_B + perceptual_weight * perceptual_B
    return FirstStageLoss(reconstruction_B + penalty_B, reconstruction_B, l1_B)


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What a discriminator minimises: mean max(0, 1 - real) and mean max(0, 1 + fake), averaged; a scalar.

    Lim & Ye 2017 (arXiv 1705.02894), equation 21. Logits of any shape; above 0 means real.
    """
    return 0.5 * (torch.relu(1.0 - real).mean() + torch.relu(1.0 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """What the decoder minimises against a discriminator: -mean(fake), a scalar (arXiv 1705.02894, equation 22)."""
    return -fake.mean()


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    delta: float = 1e-6,
    whole: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Tensor:
    """|d reconstruction / d last_layer| / (|d adversarial / d last_layer| + delta), a scalar without a gradient.

    With it both losses pull on the decoder's last layer equally hard, whatever their units.

    Esser et al. 2021 (arXiv 2012.09841), equation 7. Both losses are scalars; their graphs are kept. Where they
    are a share of the batch's, `whole` makes the gradient of the batch of that of the share.
    """
    norms = [
        whole(torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float()).norm()
        for loss in (reconstruction, adversarial)
    ]
    return norms[0] / (norms[1] + delta)
