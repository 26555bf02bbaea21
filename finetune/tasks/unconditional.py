"""Pictures of nothing but the set they are trained on: attention blocks without context."""

from __future__ import annotations

from dataclasses import dataclass

from finetune import UserError
from finetune.conditioning import Conditioner, Given


@dataclass
class Options:
    pass


class Nothing(Conditioner):
    guided = False


def make(options: Options, given: Given) -> Conditioner:
    if given.width is not None:
        raise UserError(
            f"task=unconditional gives the U-Net nothing to attend to, and this one attends to {given.width} "
            "features: choose a model whose cross_attention_dim is null at every level, such as "
            "model=small_unconditional"
        )
    return Nothing()
