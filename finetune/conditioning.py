"""What the U-Net is told: captions to cross-attention tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    """Captions to context: a CLIP tokenizer and text transformer (last hidden states, as Stable Diffusion 1.x).

    Args:
        tokenizer: a `CLIPTokenizer`.
        encoder: a `CLIPTextModel`.
        trained: False freezes the encoder and runs it without a graph.
    """

    def __init__(self, tokenizer: Any, encoder: nn.Module, *, trained: bool) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.trained = trained
        if not trained:
            encoder.requires_grad_(False)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Int64 [B, L], padded and cut to the tokenizer's length, on the CPU."""
        return self.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids

    def forward(self, token_ids_BL: Tensor) -> Tensor:
        """Context [B, L, D]."""
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            return self.encoder(token_ids_BL).last_hidden_state
