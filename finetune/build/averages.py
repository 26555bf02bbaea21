"""Which averages of the weights a run keeps."""

from __future__ import annotations

import re

from finetune import UserError
from finetune.config import AveragesConfig, require, require_choice
from finetune.ema import KINDS, LARGEST_SIGMA_REL, HalfLife, Power
from finetune.models.parts import flat


def profiles(ema: AveragesConfig) -> dict[str, HalfLife | Power]:
    """What each average is, by its folder's name in a checkpoint; the first is `ema`."""
    if not ema.enabled:
        return {}
    powers = {f"ema-{power.name}": power for power in map(Power, ema.sigma_rels)}
    first: dict[str, HalfLife | Power]
    if ema.kind == "power":
        first = {"ema": powers.pop(f"ema-{Power(ema.sigma_rels[0]).name}")}
    else:
        first = {"ema": HalfLife(ema.halflife_images, ema.rampup_ratio)}
    named = {f"ema-{name}": HalfLife(it, ema.rampup_ratio) for name, it in flat(ema.halflives_images).items()}
    return first | named | powers


def check_averages(ema: AveragesConfig) -> None:
    """Refuse averages that cannot be.

    Raises:
        UserError: names the key, its value and what it may be.
    """
    require_choice({"ema.kind": (ema.kind, KINDS)})
    lengths = flat(ema.halflives_images, "ema.halflives_images.")
    require(lengths, lambda value: value > 0, "must be greater than 0")
    for key in lengths:
        name = key.removeprefix("ema.halflives_images.")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name.startswith("power-"):
            raise UserError(
                f"{key}: an average's name is letters, digits, - and _, and doesn't begin with power-: rename it"
            )
    for sigma_rel in ema.sigma_rels:
        if not 0.001 <= sigma_rel <= LARGEST_SIGMA_REL:
            raise UserError(
                f"ema.sigma_rels has {sigma_rel:g}, which is a share of the run: 0.001 to {LARGEST_SIGMA_REL:.4f}"
            )
    if len({Power(sigma_rel).name for sigma_rel in ema.sigma_rels}) < len(ema.sigma_rels):
        raise UserError(f"ema.sigma_rels={ema.sigma_rels} has one twice: each makes an average of its own")
    require({"ema.snapshot_every": ema.snapshot_every}, lambda value: value >= 0, "must not be negative")
    require({"ema.snapshot_keep": ema.snapshot_keep}, lambda value: value > 0, "must be greater than 0")
    if ema.snapshot_every and not (ema.enabled and ema.sigma_rels):
        raise UserError(
            f"ema.snapshot_every={ema.snapshot_every} keeps averages by power functions, but there is none: "
            "add ema=power"
        )
    if ema.enabled and ema.kind == "power" and not ema.sigma_rels:
        raise UserError("ema.kind=power needs lengths: set ema.sigma_rels=[0.05,0.1], or choose ema=power")
