"""Pictures of captions: cross-attention to the states of a text encoder, or of SDXL's two."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from finetune import UserError
from finetune.conditioning import Conditioner, Given
from finetune.conditioning.text import Text, TextXL
from finetune.models.sources import has_part
from finetune.models.text import encode_text, encode_text_xl, load_text, load_text_2, tokenize, zeroes_null_caption


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


def caption_conditioner_xl(
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    tokenizer_2: CLIPTokenizer,
    encoder_2: CLIPTextModelWithProjection,
    *,
    zero_null: bool = True,
    trained: bool = False,
) -> TextXL:
    """The conditioner of captions by both text encoders of Stable Diffusion XL."""
    return TextXL(
        tokenizer,
        partial(tokenize, tokenizer),
        encoder,
        tokenizer_2,
        partial(tokenize, tokenizer_2),
        encoder_2,
        partial(encode_text_xl, encoder, encoder_2),
        width=encoder.config.hidden_size + encoder_2.config.hidden_size,
        zero_null=zero_null,
        trained=trained,
    )


def load_captions(
    source: str | Path,
    revision: str | None = None,
    *,
    words: str | Path | None = None,
    trained: bool = False,
) -> Text:
    """The conditioner of a model's captions, by the one or two text encoders that it has.

    Args:
        words: where its tokenizers are, instead (see `load_tokenizer`).

    Raises:
        UserError: the model has none, or a broken one.
    """
    first = load_text(source, revision, words=words)
    if not has_part(source, "text_encoder_2", revision):
        return caption_conditioner(*first, trained=trained)
    second = load_text_2(source, revision, words=words)
    zero_null = zeroes_null_caption(source, revision)
    return caption_conditioner_xl(*first, *second, zero_null=zero_null, trained=trained)
