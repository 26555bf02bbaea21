"""What the U-Net is told: captions to cross-attention tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from finetune import rng
from finetune.batch import Batch


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
        empty_states_LD: the empty caption's states, where batches bring the states of theirs.
    """

    def __init__(
        self,
        tokenize: Callable[[Sequence[str]], Tensor],
        encode: Callable[[Tensor], Tensor],
        encoder: nn.Module,
        *,
        trained: bool,
        empty_states_LD: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.tokenize = tokenize
        self.encode = encode
        self.encoder = encoder
        self.trained = trained
        self.empty_states_LD = empty_states_LD

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and self.trained)

    def text_of(self, batch: Batch, dropout: float, seed: int, device: torch.device | None = None) -> Tensor:
        """What `forward` takes, on `device`: token ids [B, L], or [B, L, D] states that the batch brings.

        Captions are dropped here, at each visit anew (see `drop_captions`).
        """
        captions = drop_captions(batch.captions, batch.clock, dropout, seed)
        if batch.text_states is None:
            return self.tokenize(captions).to(device, non_blocking=True)
        assert self.empty_states_LD is not None
        # To the device first: there the choice is free, here it would copy all states out of page-locked memory.
        states_BLD = batch.text_states.to(device, non_blocking=True)
        self.empty_states_LD = self.empty_states_LD.to(states_BLD.device)
        empty_B11 = torch.tensor([not caption for caption in captions]).view(-1, 1, 1)
        return torch.where(empty_B11.to(states_BLD.device), self.empty_states_LD, states_BLD)

    def forward(self, text: Tensor) -> Tensor:
        """Context [B, L, D] of token ids (int64 [B, L]); states (floating [B, L, D]) are context already."""
        if text.is_floating_point():
            return text
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            return self.encode(text)
