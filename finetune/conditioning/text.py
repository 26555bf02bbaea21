"""Captions to cross-attention tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from finetune.batch import Batch
from finetune.conditioning import Condition, Conditioner


class Text(Conditioner):
    """Captions to context: a text transformer's last hidden states, as in Stable Diffusion 1.x and 2.x.

    Args:
        tokenizer: a `CLIPTokenizer`, kept for export; `tokenize`: captions to its ids, int64 [B, L].
        encoder: a `CLIPTextModel`; `encode`: ids to context [B, L, D] by it.
        width: features D of the context.
        trained: False freezes the encoder and runs it without a graph, in eval mode.
    """

    asks = ("prompt",)

    def __init__(
        self,
        tokenizer: Any,
        tokenize: Callable[[Sequence[str]], Tensor],
        encoder: nn.Module,
        encode: Callable[[Tensor], Tensor],
        *,
        width: int,
        trained: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer, self.tokenize = tokenizer, tokenize
        self.encoder, self.encode = encoder, encode
        self.width, self.trained = width, trained
        self.empty_states_LD: Tensor | None = None  # the empty caption's, where batches bring the states of theirs

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and self.trained)

    def parts(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.encoder}

    def inputs(self, batch: Batch, drop_B: Tensor, null_caption: str = "") -> dict[str, Tensor]:
        """Token ids (`ids` [B, L]), or the cached states that the batch brings and whose caption is left out."""
        captions = with_null(batch.captions, drop_B, null_caption)
        if batch.text_states is None:
            return {"ids": self.tokenize(captions)}
        # To the device first: there the choice is free, here it would copy all states out of page-locked memory.
        return {"states": batch.text_states, "is_empty": torch.tensor([not caption for caption in captions])}

    def forward(self, inputs: Mapping[str, Tensor]) -> Condition:
        if "states" in inputs:
            assert self.empty_states_LD is not None
            states_BLD = inputs["states"]
            self.empty_states_LD = self.empty_states_LD.to(states_BLD.device)
            return {"context": torch.where(inputs["is_empty"].view(-1, 1, 1), self.empty_states_LD, states_BLD)}
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            return {"context": self.encode(inputs["ids"])}


def with_null(captions: Sequence[str], drop_B: Tensor, null_caption: str = "") -> list[str]:
    """The captions, with the null one where `drop_B` says so."""
    return [null_caption if drop else caption for caption, drop in zip(captions, drop_B.tolist(), strict=True)]
