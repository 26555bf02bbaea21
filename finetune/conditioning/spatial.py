"""Conditions laid out as the picture is, beside its noised latents (Rombach et al. 2022, section 4.3.2)."""

from __future__ import annotations

from finetune import UserError
from finetune.conditioning import Conditioner, Given, Joint


def beside(own: Conditioner, given: Given, task: str) -> Conditioner:
    """A task's own channels, with captions as well where the U-Net attends to something.

    Raises:
        UserError: the U-Net attends to something, and the model has no text encoder that would give it.
    """
    if given.width is None:
        return own
    if given.text is None:
        raise UserError(
            f"task={task} gives the U-Net channels and captions, and this model attends to {given.width} features "
            "without a text encoder: choose one that has it, or one that attends to nothing, such as "
            "model=small_unconditional"
        )
    return Joint(given.text(), own)
