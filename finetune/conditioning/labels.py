"""What tasks that condition on labels ask of samples, of the data and of the model."""

from __future__ import annotations

from finetune import UserError
from finetune.conditioning import Given


def known_label(label: object, classes: int, what: str) -> int:
    """The label itself.

    Args:
        what: begins the line of a refusal, as in "a box's class".

    Raises:
        UserError: it is no integer from 0 to classes - 1.
    """
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < classes:
        raise UserError(
            f"{what} is {label!r}, and labels are integers from 0 to {classes - 1}: correct it, or set "
            "task.options.classes"
        )
    return label


def number_of_classes(task: str, wanted: int | None, given: Given) -> int:
    """What `task.options.classes` says, else how many the data names.

    Raises:
        UserError: neither says, or there would be none.
    """
    if wanted is None and not given.classes:
        raise UserError(
            f"task={task} must know how many classes there are, and no classes.json is beside the shards: set "
            "task.options.classes=N"
        )
    classes = len(given.classes) if wanted is None else wanted
    if classes < 1:
        raise UserError(f"task.options.classes={classes} must be at least 1")
    return classes


def attended_width(task: str, given: Given) -> int:
    """Features of the U-Net's cross-attention.

    Raises:
        UserError: it attends to nothing.
    """
    if given.width is None:
        raise UserError(
            f"task={task} conditions by cross-attention and this U-Net attends to nothing: choose a model with a "
            "cross_attention_dim, such as model=small"
        )
    return given.width
