"""What the U-Net is told: captions to cross-attention tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from finetune import rng


def drop_captions(captions: Sequence[str], clock_B: Tensor, probability: float, seed: int) -> list[str]:
    """Replace each caption by the empty one with `probability`, for classifier-free guidance.

    Ho & Salimans 2022 (arXiv 2207.12598), algorithm 1. The null condition is the encoded empty caption, as at
    sampling. The draw is the sample's own (its clock), the same on any rank.
    """
    drop_B = (rng.uniform(seed, "caption-dropout", clock_B) < probability).tolist()
    return ["" if drop else caption for caption, drop in zip(captions, drop_B, strict=True)]


class TextConditioner(nn.Module):
    """Captions to context: a text transformer's last hidden states, as in Stable Diffusion 1.x.

    Args:
        tokenize: captions to token ids, int64 [B, L].
        encode: token ids to context [B, L, D] by `encoder`, as at sampling.
        encoder: a `CLIPTextModel`, held here for its parameters.
        trained: False freezes the encoder and runs it without a graph, in eval mode.
    """

    def __init__(
        self,
        tokenize: Callable[[Sequence[str]], Tensor],
        encode: Callable[[Tensor], Tensor],
        encoder: nn.Module,
        *,
        trained: bool,
    ) -> None:
        super().__init__()
        self.tokenize = tokenize
        self.encode = encode
        self.encoder = encoder
        self.trained = trained

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and self.trained)

    def forward(self, token_ids_BL: Tensor) -> Tensor:
        """Context [B, L, D]."""
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            return self.encode(token_ids_BL)
