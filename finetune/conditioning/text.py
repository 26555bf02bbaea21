"""Captions to cross-attention tokens, and for Stable Diffusion XL to pooled text and sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from finetune import UserError
from finetune.batch import Batch, Sample
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
    cacheable = True  # whether shards can hold the states

    def __init__(
        self,
        tokenizer: Any,
        tokenize: Callable[[Sequence[str]], Tensor],
        encoder: nn.Module,
        encode: Callable[..., Any],
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

    def unused(self) -> list[nn.Module]:
        """What of its parts the context does not depend on, so that it cannot be trained."""
        return []

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


class TextXL(Text):
    """Captions to context and pooled text by two encoders, with sizes, as in Stable Diffusion XL.

    Podell et al. 2023 (arXiv 2307.01952), sections 2.1 and 2.2: the U-Net is told the picture's size before it was
    resized, where the crop began, and the size that it has, so that it need not draw small or cut pictures.

    Args:
        tokenizer, tokenize, encoder: of the first text encoder, as of `Text`.
        tokenizer_2, tokenize_2, encoder_2: of the second, a `CLIPTextModelWithProjection`.
        encode: ids of both to (context [B, L, D], pooled text [B, P]).
        zero_null: what is left out for guidance is zeros, not the empty caption, as the base model was trained.
    """

    cacheable = False

    def __init__(
        self,
        tokenizer: Any,
        tokenize: Callable[[Sequence[str]], Tensor],
        encoder: nn.Module,
        tokenizer_2: Any,
        tokenize_2: Callable[[Sequence[str]], Tensor],
        encoder_2: nn.Module,
        encode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        *,
        width: int,
        zero_null: bool = True,
        trained: bool = False,
    ) -> None:
        super().__init__(tokenizer, tokenize, encoder, encode, width=width, trained=trained)
        self.tokenizer_2, self.tokenize_2, self.encoder_2 = tokenizer_2, tokenize_2, encoder_2
        self.zero_null = zero_null

    def parts(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.encoder, "text_encoder_2": self.encoder_2}

    def unused(self) -> list[nn.Module]:
        """The first encoder's last layer and norm: the context is the states before them."""
        named = dict(self.encoder.named_modules())
        layers = next(module for name, module in named.items() if name.endswith("encoder.layers"))
        return [list(layers.children())[-1], *(m for n, m in named.items() if n.endswith("final_layer_norm"))]

    def read(self, sample: Sample) -> dict[str, np.ndarray]:
        """`time_ids`: float32 [6], original height and width, top and left of the crop, height and width in pixels.

        A picture that is to be drawn is one that was neither resized nor cut.
        """
        original = sample.record.get("original_size", sample.bucket)
        crop = sample.record.get("crop", (0, 0))
        try:
            sizes = [*map(int, original), *map(int, crop[:2]), *sample.bucket]
        except (TypeError, ValueError):
            sizes = []
        if len(sizes) != 6:
            raise UserError(
                f"a sample's original_size is {original} and its crop {crop}: [height, width] and [top, left, "
                "height, width] in pixels are needed; encode its pictures again"
            )
        return {"time_ids": np.array(sizes, dtype=np.float32)}

    def inputs(self, batch: Batch, drop_B: Tensor, null_caption: str = "") -> dict[str, Tensor]:
        """Token ids of both encoders, sizes, and whose condition is zeros."""
        captions = with_null(batch.captions, drop_B, null_caption)
        made = {"ids": self.tokenize(captions), "ids_2": self.tokenize_2(captions)}
        made["time_ids"] = batch.condition["time_ids"]
        return made | {"is_null": drop_B} if self.zero_null and not null_caption else made

    def forward(self, inputs: Mapping[str, Tensor]) -> Condition:
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            context_BLD, pooled_BP = self.encode(inputs["ids"], inputs["ids_2"])
            if "is_null" in inputs:
                context_BLD = context_BLD.masked_fill(inputs["is_null"].view(-1, 1, 1), 0.0)
                pooled_BP = pooled_BP.masked_fill(inputs["is_null"].view(-1, 1), 0.0)
        return {"context": context_BLD, "pooled": pooled_BP, "time_ids": inputs["time_ids"]}


def with_null(captions: Sequence[str], drop_B: Tensor, null_caption: str = "") -> list[str]:
    """The captions, with the null one where `drop_B` says so."""
    return [null_caption if drop else caption for caption, drop in zip(captions, drop_B.tolist(), strict=True)]
