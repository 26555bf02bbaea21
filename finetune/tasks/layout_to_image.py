"""Pictures of a layout: cross-attention to one token for each box, by a transformer over the boxes.

Rombach et al. 2022 (arXiv 2112.10752), section 4.3.1 and appendix E.2: a box is its class and its discretised
corners (after Jahn et al. 2021, arXiv 2105.06458), and an unmasked transformer (their equations 18 to 21) makes the
tokens that the U-Net attends to. There a box is three tokens of one sequence; here it is one, the sum of what its
class and its four edges are embedded as, so that a layout is a set: the order of the boxes says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune import UserError
from finetune.batch import Batch, Sample
from finetune.conditioning import Condition, Conditioner, Given
from finetune.conditioning.labels import attended_width, known_label, number_of_classes

EDGES = 4  # left, top, right, bottom
LABELS = True


@dataclass
class Options:
    classes: int | None = None  # how many labels there are; null: as many as classes.json beside the shards names
    boxes: int = 30  # tokens of a layout: of more boxes the largest are taken
    bins: int = 65  # places along each side that an edge is rounded to, both ends among them
    layers: int = 4  # of the transformer; the paper has 16
    heads: int = 8


class Layout(Conditioner):
    """Boxes to context [B, N, D]: N tokens, those without a box all alike and learned. No box at all is the null
    layout, for guidance.

    Args:
        classes: labels are 0 to classes - 1.
        boxes: N.
        bins: see `Options`; an odd number keeps mirrored boxes exactly mirrored.
        encoder: tokens [B, N] of classes and [B, N, 4] of edges to context.
    """

    asks = ("layout",)

    def __init__(self, classes: int, boxes: int, bins: int, encoder: nn.Module) -> None:
        super().__init__()
        self.classes, self.boxes, self.bins = classes, boxes, bins
        self.encoder = encoder

    def parts(self) -> dict[str, nn.Module]:
        return {"conditioner": self.encoder}

    def read(self, sample: Sample) -> dict[str, np.ndarray]:
        """`boxes`: int64 [N, 5], class and the bins of left, top, right and bottom, the largest first; rows without
        a box have the class after the last and zeros.

        Raises:
            UserError: the record has no boxes, or one that is none.
        """
        boxes = sample.record.get("boxes")
        if boxes is None:
            raise UserError(
                "a sample has no boxes: task=layout_to_image needs shards whose records have them, as "
                "`data-tools ingest coco` makes them"
            )
        if not isinstance(boxes, list):
            raise UserError(f"a sample's boxes are {boxes!r}: they must be a list of [class, x0, y0, x1, y1]")
        known = [known_box(box, self.classes) for box in boxes]
        # Stable, so that of equal boxes the first stay.
        largest = sorted(known, key=lambda box: (box[1] - box[3]) * (box[4] - box[2]))[: self.boxes]
        rows_N5 = np.zeros((self.boxes, 1 + EDGES), np.int64)
        rows_N5[:, 0] = self.classes
        for row, (label, *edges) in zip(rows_N5, largest, strict=False):
            row[0], row[1:] = label, np.rint(np.array(edges) * (self.bins - 1))
        return {"boxes": rows_N5}

    def inputs(self, batch: Batch, drop_B: Tensor, null_caption: str = "") -> dict[str, Tensor]:
        """`boxes`: int64 [B, N, 5], no box where the condition is left out."""
        null_5 = torch.tensor([self.classes] + [0] * EDGES)
        return {"boxes": torch.where(drop_B.view(-1, 1, 1), null_5, batch.condition["boxes"])}

    def forward(self, inputs: Mapping[str, Tensor]) -> Condition:
        return {"context": self.encoder(inputs["boxes"])}


class LayoutEncoder(nn.Module):
    """Boxes int64 [B, N, 5] to tokens [B, N, D]; the class after the last is no box.

    Equations 18 to 21 of the paper's appendix, without the embedding of a token's place in the sequence.
    """

    def __init__(self, classes: int, bins: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.classes, self.bins = classes, bins
        self.label = nn.Embedding(classes + 1, width)
        self.edge = nn.Embedding(EDGES * bins, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        # Near places are alike before anything is learned: with independent rows each bin would have to be seen.
        with torch.no_grad():
            wave_KF = waves(bins, width // 2)
            for table in self.edge.weight.split(bins):
                table.copy_(wave_KF @ torch.randn(wave_KF.shape[1], width) / math.sqrt(wave_KF.shape[1] / 2))

    def forward(self, boxes_BN5: Tensor) -> Tensor:
        label_BN, edges_BN4 = boxes_BN5[..., 0], boxes_BN5[..., 1:]
        first_4 = torch.arange(EDGES, device=boxes_BN5.device) * self.bins
        edges_BND = self.edge(edges_BN4 + first_4).sum(dim=2) / math.sqrt(EDGES)
        is_box_BN1 = (label_BN < self.classes).unsqueeze(-1)
        tokens_BND = self.label(label_BN) + edges_BND * is_box_BN1
        for block in self.blocks:
            tokens_BND = block(tokens_BND)
        return self.norm(tokens_BND)


class Block(nn.Module):
    """Self-attention and an MLP, each behind a norm and beside a residual path; tokens [B, N, D] to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens_BND: Tensor) -> Tensor:
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, D / heads]
            for each in self.qkv(self.norm1(tokens_BND)).chunk(3, dim=-1)
        )
        mixed_BND = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens_BND = tokens_BND + self.out(mixed_BND)
        return tokens_BND + self.mlp(self.norm2(tokens_BND))


def waves(bins: int, frequencies: int) -> Tensor:
    """Sines and cosines of places, float32 [bins, 2 * frequencies]: half a turn to a turn in four bins."""
    place_K1 = torch.linspace(0, 1, bins).unsqueeze(1)
    turns_F = 0.5 * max(1.0, (bins - 1) / 2) ** torch.linspace(0, 1, frequencies)
    angle_KF = 2 * math.pi * place_K1 * turns_F
    return torch.cat([angle_KF.sin(), angle_KF.cos()], dim=1)


def known_box(box: Any, classes: int) -> list[Any]:
    """The box itself: [class, left, top, right, bottom], fractions of the picture's width and height.

    Raises:
        UserError: it is none.
    """
    if not isinstance(box, list | tuple) or len(box) != 1 + EDGES:
        raise UserError(f"a box is {box!r}: it must be [class, x0, y0, x1, y1]")
    known_label(box[0], classes, "a box's class")
    if not all(isinstance(edge, int | float) and not isinstance(edge, bool) for edge in box[1:]):
        raise UserError(f"a box is {box!r}: its edges must be numbers")
    _, x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise UserError(
            f"a box is {box!r}: edges must be fractions of the picture, 0 to 1, x0 below x1 and y0 below y1"
        )
    return list(box)


def make(options: Options, given: Given) -> Conditioner:
    classes = number_of_classes("layout_to_image", options.classes, given)
    width = attended_width("layout_to_image", given)
    for key, value, least in (
        ("boxes", options.boxes, 1),
        ("bins", options.bins, 2),
        ("layers", options.layers, 0),
        ("heads", options.heads, 1),
    ):
        if value < least:
            raise UserError(f"task.options.{key}={value} must be at least {least}")
    if width % options.heads:
        raise UserError(
            f"task.options.heads={options.heads} must divide the U-Net's cross_attention_dim, which is {width}"
        )
    with torch.random.fork_rng(devices=[]):  # modules draw from torch's global generator: borrow it
        torch.manual_seed(given.seed)
        encoder = LayoutEncoder(classes, options.bins, width, options.layers, options.heads)
    return Layout(classes, options.boxes, options.bins, encoder)
