"""Pictures of captions: cross-attention to the states of a text encoder, or of SDXL's two."""

from __future__ import annotations

from dataclasses import dataclass

from finetune import UserError
from finetune.conditioning import Conditioner, Given


@dataclass
class Options:
    pass


def make(options: Options, given: Given) -> Conditioner:
    if given.text is None:
        raise UserError("task=text_to_image needs a text encoder and this model has none: choose another model")
    return given.text()
