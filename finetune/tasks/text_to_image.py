"""Pictures of captions: cross-attention to the states of a text encoder, or of SDXL's two."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from transformers import CLIPTextModel, CLIPTokenizer

from finetune import UserError
from finetune.conditioning import Conditioner, Given
from finetune.conditioning.text import Text
from finetune.models.text import encode_text, tokenize


@dataclass
class Options:
    pass


def make(options: Options, given: Given) -> Conditioner:
    if given.text is None:
        raise UserError("task=text_to_image needs a text encoder and this model has none: choose another model")
    return given.text()


def caption_conditioner(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, *, trained: bool = False) -> Text:
    """The conditioner of captions by one text encoder, as Stable Diffusion 1.x and 2.x have it."""
    return Text(
        tokenizer,
        partial(tokenize, tokenizer),
        encoder,
        partial(encode_text, encoder, pad_id=tokenizer.pad_token_id),
        width=encoder.config.hidden_size,
        trained=trained,
    )
