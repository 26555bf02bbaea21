"""Pictures of label maps, which are laid beside the latents (Rombach et al. 2022, section 4.3.2 and appendix D.1).

A latent cell is told which share of its pixels has each label. The U-Net is convolutional and so is this: a model
samples maps larger than those it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from finetune import UserError, rng
from finetune.batch import Sample
from finetune.conditioning import Condition, Conditioner, Given, member, picture
from finetune.conditioning.spatial import beside
from finetune.data.shards import MAP, UNLABELLED

LABELS = True


@dataclass
class Options:
    labels: int | None = None  # in the maps, 0 to labels - 1; null: those that the shards name
    channels: int = 0  # that a learned 1x1 convolution makes of the shares; 0: the shares themselves


class LabelMap(Conditioner):
    """Label maps to the share of each label in a latent cell, or to what a learned convolution makes of it.

    The paper's rescaler halves the one-hot map bilinearly, which is the mean of 2 x 2 cells, and then maps its
    channels by a 1x1 convolution without bias: the same as that convolution of the shares.

    Args:
        labels: how many there are; unlabelled pixels count for none.
        cell: pixels of a latent cell along each side.
        channels: of the learned convolution; 0: none.
        seed: of its weights.
    """

    members = (MAP,)
    asks = ("map",)
    guided = False

    def __init__(self, labels: int, cell: int, *, channels: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.labels, self.cell, self.channels = labels, cell, channels or labels
        self.mapper: nn.Conv2d | None = None
        if channels:
            self.mapper = nn.utils.skip_init(nn.Conv2d, labels, channels, 1, bias=False)
            generator = torch.Generator().manual_seed(rng.fold(seed, "label-map"))
            nn.init.kaiming_uniform_(self.mapper.weight, a=5**0.5, generator=generator)  # as nn.Conv2d does

    def read(self, sample: Sample) -> dict[str, np.ndarray]:
        """`map` uint8 [H, W]."""
        data = member(sample, MAP, "ingest the pictures with --maps DIR and encode them again")
        map_HW = picture(data, "L", MAP)
        if map_HW.shape != sample.bucket:
            there, wanted = (f"{width}x{height}" for height, width in (map_HW.shape, sample.bucket))
            raise UserError(f"{MAP} has {there} pixels and its picture {wanted}: a map has one label a pixel")
        highest = int(np.where(map_HW == UNLABELLED, 0, map_HW).max())
        if highest >= self.labels:
            raise UserError(
                f"{MAP} holds the label {highest}, and the model knows 0 to {self.labels - 1} ({UNLABELLED} is "
                "unlabelled): give maps of these labels, or train with a larger task.options.labels"
            )
        return {"map": map_HW}

    def forward(self, inputs: Mapping[str, Tensor]) -> Condition:
        shares_BNhw = shares(inputs["map"], self.labels, self.cell)
        if self.mapper is None:
            return {"channels": shares_BNhw}
        return {"channels": self.mapper(shares_BNhw.to(self.mapper.weight.dtype))}

    def parts(self) -> dict[str, nn.Module]:
        return {} if self.mapper is None else {"conditioner": self.mapper}

    def size(self, sample: Sample) -> tuple[int, int] | None:
        height, width = picture(member(sample, MAP, "give --map FILE.png"), "L", MAP).shape
        return height, width


def shares(map_BHW: Tensor, labels: int, cell: int) -> Tensor:
    """Float32 [B, labels, H / cell, W / cell]: which share of a cell's pixels has each label.

    Args:
        map_BHW: uint8; labels from `labels` on count for none.
    """
    batch, height, width = map_BHW.shape
    rows, columns = height // cell, width // cell
    cells = map_BHW.clamp(max=labels).reshape(batch, rows, cell, columns, cell).transpose(2, 3).flatten(3).long()
    # Counted, not summed over a one-hot map: that would have labels x H x W entries, gigabytes at 182 labels.
    counts = torch.zeros(batch, rows, columns, labels + 1, device=map_BHW.device)
    counts.scatter_add_(3, cells, torch.ones_like(cells, dtype=torch.float32))
    return (counts[..., :labels] / cell**2).permute(0, 3, 1, 2)


def make(options: Options, given: Given) -> Conditioner:
    labels = len(given.classes) if options.labels is None else options.labels
    if options.labels is None and not labels:
        raise UserError(
            "task=semantic_synthesis needs the number of labels, and there is no classes.json beside the shards: "
            "set task.options.labels, or ingest the pictures with --maps DIR"
        )
    if not 1 <= labels <= UNLABELLED:
        raise UserError(f"task.options.labels={labels} must be between 1 and {UNLABELLED}")
    if options.channels < 0:
        raise UserError(f"task.options.channels={options.channels} must not be negative")
    own = LabelMap(labels, given.downsample, channels=options.channels, seed=given.seed)
    return beside(own, given, "semantic_synthesis")
