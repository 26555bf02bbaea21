"""Parts of a model by name, as settings give them: `down_blocks.1`, `attn2.to_k`, `unet.up_blocks`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from finetune import UserError


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers by dotted part, from the nested dictionaries that `KEY.down_blocks.1=8` makes.

    Args:
        prefix: what the parts begin with, `KEY.` for whole keys.

    Raises:
        UserError: a value is no number.
    """
    found: dict[str, float] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{prefix}{name}={value} is no number")
        else:
            found[f"{prefix}{name}"] = value
    return found


def part_of(name: str, parts: Iterable[str]) -> str | None:
    """The part that a module or parameter belongs to; the longest where there are several, None where none is.

    A part is a run of whole words of a dotted name: `attn2.to_k` is in `mid_block.attentions.0.attn2.to_k.weight`.
    """
    inside = [part for part in parts if f".{part}." in f".{name}."]
    return max(inside, key=lambda part: (part.count("."), len(part)), default=None)


def require_parts(key: str, parts: Iterable[str], names: Iterable[str]) -> None:
    """Refuse a part that no name has.

    Raises:
        UserError: names the setting `key` and the part.
    """
    names = [name for name in names if name]  # a model's own is empty
    for part in parts:
        if not any(part_of(name, [part]) for name in names):
            raise UserError(
                f"{key}.{part}: no part of what is trained is named so; such a name is "
                f"{next((name for name in names if '.' in name), names[0])}"
            )
