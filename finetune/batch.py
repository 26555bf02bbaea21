"""What travels from the shards to the objective: samples, and named tensors of one micro-batch."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune import UserError, first_line, npy


@dataclass(frozen=True)
class Sample:
    """One sample as shards hold it, or as a user asks for it: what a condition is read from.

    Attributes:
        record: its `KEY.json`.
        bucket: (height, width) in pixels.
        members: bytes of the other members asked for, by name (`map.png`).
        clock: the address of its random draws (see `Batch`), together with `seed`.
    """

    record: Mapping[str, Any]
    bucket: tuple[int, int]
    members: Mapping[str, bytes] = field(default_factory=dict)
    clock: int = 0
    seed: int = 0

    @property
    def captions(self) -> list[str]:
        """The record's captions; the empty one where it has none."""
        return self.record.get("captions") or [self.record.get("caption") or ""]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank; every sample has the same shape.

    Attributes:
        moments: float16 [B, 2C, h, w], mean then standard deviation of the encoder's posterior, unscaled; empty
            where pictures are to be drawn.
        captions: B strings, one drawn for this visit.
        clock: int64 [B], the run's images seen before each sample: the address of its random draws.
        sample_ids: int64 [B], numbers of the samples in their set of shards.
        bucket: (height, width) in pixels.
        text_states: float16 [B, L, D], the text encoder's states of `captions`, or None where they are not cached.
        condition: what the task's conditioner has read of each sample, by its own names; B rows each.
        loss_weight: float32 [B], how much each sample's loss counts, or None: all alike.
        loss_mask: float32 [B, 1, h, w] in [0, 1], where the loss counts, or None: everywhere.
    """

    moments: Tensor
    captions: list[str]
    clock: Tensor
    sample_ids: Tensor
    bucket: tuple[int, int]
    text_states: Tensor | None = None
    condition: Mapping[str, Tensor] = field(default_factory=dict)
    loss_weight: Tensor | None = None
    loss_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device) -> Batch:
        """All but the condition there; what of that is needed, the conditioner's `inputs` bring."""

        def moved(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            moments=moved(self.moments),
            clock=moved(self.clock),
            loss_weight=moved(self.loss_weight),
            loss_mask=moved(self.loss_mask),
        )

    def take(self, rows: Sequence[int]) -> Batch:
        """Some of the samples, in the order of `rows`."""
        index = torch.tensor(rows, dtype=torch.int64)

        def chosen(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor[index.to(tensor.device)]

        return replace(
            self,
            moments=chosen(self.moments) if len(self.moments) else self.moments,
            captions=[self.captions[row] for row in rows],
            clock=chosen(self.clock),
            sample_ids=chosen(self.sample_ids),
            text_states=chosen(self.text_states),
            condition={name: chosen(tensor) for name, tensor in self.condition.items()},
            loss_weight=chosen(self.loss_weight),
            loss_mask=chosen(self.loss_mask),
        )


def stack(each: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
    """What was read of several samples, [B, ...] by name."""
    return {name: torch.from_numpy(np.stack([one[name] for one in each])) for name in each[0]}


def member(sample: Sample, name: str, remedy: str) -> bytes:
    """A member's bytes.

    Raises:
        UserError: the sample has none; the line ends in `remedy`.
    """
    if name not in sample.members:
        raise UserError(f"a sample has no {name}: {remedy}")
    return sample.members[name]


def picture(data: bytes, mode: str, name: str) -> np.ndarray:
    """A member's pixels: uint8 [H, W] for mode `L`, [H, W, 3] for `RGB`.

    Raises:
        UserError: it is no picture of this mode.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if mode == "L" and image.mode not in ("L", "P"):
                raise UserError(f"{name} has the mode {image.mode}: one label a pixel, 8-bit gray, is needed")
            return np.array(image if mode == "L" else image.convert(mode))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} cannot be read as a picture: {first_line(error)}") from error


def array(data: bytes, name: str) -> np.ndarray:
    """A member's array.

    Raises:
        UserError: it is no array.
    """
    try:
        return npy.load(data)
    except Exception as error:  # numpy parses a header as Python, and damage there raises errors of many types
        raise UserError(f"{name} cannot be read as an array: {first_line(error)}") from error
