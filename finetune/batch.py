"""What travels from the loader to the objective: named tensors of one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank; every sample has the same shape.

    Attributes:
        moments: float16 [B, 2C, h, w], mean then standard deviation of the encoder's posterior, unscaled.
        captions: B strings, one drawn for this visit.
        clock: int64 [B], the run's images seen before each sample: the address of its random draws.
        sample_ids: int64 [B], numbers of the samples in their set of shards.
        bucket: (height, width) in pixels.
        text_states: float16 [B, L, D], the text encoder's states of `captions`, or None where they are not cached.
    """

    moments: Tensor
    captions: list[str]
    clock: Tensor
    sample_ids: Tensor
    bucket: tuple[int, int]
    text_states: Tensor | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device) -> Batch:
        """Moments and clock there; what text is needed, `TextConditioner.text_of` brings."""
        return replace(
            self,
            moments=self.moments.to(device, non_blocking=True),
            clock=self.clock.to(device, non_blocking=True),
        )
