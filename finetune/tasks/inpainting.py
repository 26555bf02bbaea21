"""Holes painted anew: the hole and the latents of what is around it (Rombach et al. 2022, section 4.5).

The channels are Stable Diffusion's, in its order: noised latents, hole, latents of the picture whose hole is
mid-gray. With a model that has a text encoder the caption tells what to paint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finetune import UserError
from finetune.batch import Sample
from finetune.conditioning import Condition, Conditioner, Given, array, draw, member
from finetune.conditioning.spatial import beside
from finetune.data.shards import HOLE, MASKED
from finetune.latents import LatentSpace, from_raw

_REMEDY = "encode the pictures with --holes K"


@dataclass
class Options:
    pass


class Holes(Conditioner):
    """One of a sample's holes, drawn anew at each visit, and the latents of the rest.

    Of the masked picture's posterior the mean is taken, so that the condition holds no noise.

    Args:
        latent_channels: of the autoencoder; space: scale and shift of the latents.
    """

    members = (HOLE, MASKED)
    asks = ("image", "mask")
    guided = False

    def __init__(self, latent_channels: int, space: LatentSpace) -> None:
        super().__init__()
        self.latent_channels, self.space = latent_channels, space
        self.channels = 1 + latent_channels

    def read(self, sample: Sample) -> dict[str, np.ndarray]:
        """`hole` uint8 [1, h, w], 1 where to paint; `masked` float16 [C, h, w], raw latents of the rest."""
        holes_Khw = array(member(sample, HOLE, _REMEDY), HOLE)
        masked_K2Chw = array(member(sample, MASKED, _REMEDY), MASKED)
        count, *grid = holes_Khw.shape or (0,)
        if not count or len(grid) != 2 or masked_K2Chw.shape != (count, 2 * self.latent_channels, *grid):
            raise UserError(
                f"{HOLE} has the shape {holes_Khw.shape} and {MASKED} {masked_K2Chw.shape}: [K, h, w] and "
                f"[K, {2 * self.latent_channels}, h, w] are needed; {_REMEDY}"
            )
        which = int(draw(sample, "hole") * count)
        hole_1hw = holes_Khw[which : which + 1].astype(np.uint8)
        if hole_1hw.max() > 1:
            raise UserError(f"{HOLE} holds {hole_1hw.max()}: 1 is to be painted, 0 is kept; {_REMEDY}")
        masked_Chw = masked_K2Chw[which, : self.latent_channels].astype(np.float16)
        return {"hole": hole_1hw, "masked": masked_Chw}

    def forward(self, inputs: Mapping[str, Tensor]) -> Condition:
        masked_BChw = from_raw(inputs["masked"].float(), self.space)
        return {"channels": torch.cat([inputs["hole"].float(), masked_BChw], dim=1)}


def make(options: Options, given: Given) -> Conditioner:
    return beside(Holes(given.latent_channels, given.space), given, "inpainting")
