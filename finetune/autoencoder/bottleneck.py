"""What lies between encoder and decoder in training: a draw from the posterior, or the entries of a codebook."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, assert_never

import numpy as np
import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from finetune import rng
from finetune.autoencoder.loss import codebook_terms, kl_to_standard_normal
from finetune.models.autoencoder import FirstStage

_DISTANCES_AT_A_TIME = 2**26


@dataclass(frozen=True)
class PenaltyWeights:
    """What the latents cost: KL summed over a picture, or the terms of a codebook."""

    kl: float = 1e-6
    codebook: float = 1.0
    commitment: float = 0.25  # of what pulls the encoder, as a share of `codebook`


class Passed(NamedTuple):
    """What a batch became on its way through the autoencoder."""

    recon: Tensor  # pictures [B, 3, H, W]
    penalty: Tensor  # [B], weighted, for each image element
    terms: dict[str, Tensor]  # what the penalty is made of, before weights: [B] each, detached
    uses: Tensor | None  # how often the batch took each entry of the codebook, int64 [K]


def run(vae: FirstStage, image_B3HW: Tensor, eps_BCHW: Tensor | None, weights: PenaltyWeights) -> Passed:
    """Reconstruct pictures in [-1, 1] as in training.

    Args:
        eps_BCHW: standard normal noise of an `AutoencoderKL`'s latents; a `VQModel` takes none.
    """
    match vae:
        case AutoencoderKL():
            assert eps_BCHW is not None
            posterior = vae.encode(image_B3HW).latent_dist
            mean_BCHW, logvar_BCHW = posterior.mean.float(), posterior.logvar.float()
            recon_B3HW = vae.decode(mean_BCHW + torch.exp(0.5 * logvar_BCHW) * eps_BCHW).sample
            kl_B = kl_to_standard_normal(mean_BCHW, logvar_BCHW)
            penalty_B = weights.kl * kl_B / image_B3HW[0].numel()
            return Passed(recon_B3HW, penalty_B, {"kl": kl_B.detach()}, None)
        case VQModel():
            z_BCHW = vae.encode(image_B3HW).latents.float()
            codebook_KC = vae.quantize.embedding.weight
            indices_BHW = nearest(z_BCHW, codebook_KC)
            entries_BCHW = torch.nn.functional.embedding(indices_BHW, codebook_KC).permute(0, 3, 1, 2).float()
            # The straight-through estimator: the value of the entries, the gradient of z.
            recon_B3HW = decode_entries(vae, z_BCHW + (entries_BCHW - z_BCHW).detach())
            codebook_B, commitment_B = codebook_terms(z_BCHW, entries_BCHW)
            penalty_B = weights.codebook * (codebook_B + weights.commitment * commitment_B)
            uses_K = torch.bincount(indices_BHW.flatten(), minlength=len(codebook_KC))
            return Passed(recon_B3HW, penalty_B, {"codebook": codebook_B.detach()}, uses_K)
        case _:
            assert_never(vae)


def decode_entries(vae: VQModel, entries_BCHW: Tensor) -> Tensor:
    """Decode what has been quantized: pictures [B, 3, H, W], not clipped."""
    beside = entries_BCHW if vae.config["norm_type"] == "spatial" else None
    recon_B3HW: Tensor = vae.decoder(vae.post_quant_conv(entries_BCHW), beside)
    return recon_B3HW


@torch.no_grad()
def nearest(z_BCHW: Tensor, codebook_KC: Tensor) -> Tensor:
    """Index of the entry at the least Euclidean distance from each latent cell, int64 [B, H, W].

    Cells are taken in parts, so that distances never need more than a quarter of a GiB.
    """
    with torch.autocast(z_BCHW.device.type, enabled=False):
        entries_KC = codebook_KC.float()
        cells_NC = z_BCHW.detach().float().permute(0, 2, 3, 1).reshape(-1, entries_KC.shape[1])
        parts = cells_NC.split(max(1, _DISTANCES_AT_A_TIME // len(entries_KC)))
        indices_N = torch.cat([torch.cdist(part_NC, entries_KC).argmin(dim=1) for part_NC in parts])
    return indices_N.view(z_BCHW.shape[0], *z_BCHW.shape[2:])


def perplexity(uses_K: Tensor) -> float:
    """exp of the entropy of how often each entry is used: K when all are used alike, 1 when one serves for all."""
    uses_K = uses_K.double().cpu()
    share_K = uses_K[uses_K > 0] / uses_K.sum()
    return math.exp(-float((share_K * share_K.log()).sum()))


@torch.no_grad()
def spread_codebook(vae: VQModel, batches_B3HW: Iterable[Tensor], seed: int) -> None:
    """Make the codebook of cells that the encoder gives to pictures, drawn by `seed`.

    From entries anywhere else most are never the nearest to a cell, and what is not used is not trained
    (Lancucki et al. 2020, arXiv 2005.08520, section III, begin with data too). With fewer cells than entries some
    are taken again with a little noise.

    Args:
        batches_B3HW: pictures in [-1, 1] on the model's device; read until there are eight cells for each entry.
    """
    weight_KC = vae.quantize.embedding.weight
    entries, width = weight_KC.shape
    cells: list[Tensor] = []
    for images_B3HW in batches_B3HW:
        cells.append(vae.encode(images_B3HW).latents.float().permute(0, 2, 3, 1).reshape(-1, width).cpu())
        if sum(map(len, cells)) >= 8 * entries:
            break
    cells_NC = torch.cat(cells)
    generator = np.random.Generator(np.random.Philox(rng.fold(seed, "codebook")))
    order = generator.permutation(len(cells_NC))
    rows = torch.from_numpy(order[np.arange(entries) % len(order)])
    noise_KC = torch.from_numpy(generator.standard_normal((entries, width), dtype=np.float32))
    noise_KC[: len(order)] = 0
    weight_KC.copy_(cells_NC[rows] + 0.1 * cells_NC.std(dim=0) * noise_KC)
