"""Cross-attention U-Nets (Rombach et al. 2022, arXiv 2112.10752, section 3.3) as diffusers holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from finetune import UserError, first_line
from finetune.models.single_file import open_file
from finetune.models.sources import fetch, fetch_file
from finetune.models.weight_files import load_folder
from finetune.runs import is_run


def load_unet(
    source: str | Path,
    subfolder: str = "unet",
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> UNet2DConditionModel:
    """Load a U-Net on the CPU, in eval mode.

    Args:
        source: a U-Net's folder, a diffusers pipeline's folder that holds `subfolder`, a hub id, or a single-file
            checkpoint.
        subfolder: where the U-Net lies inside a pipeline.
        revision: branch, tag or commit, for a hub id.
        dtype: of the weights in memory, whatever the files hold.

    Raises:
        UserError: the source is absent, holds no U-Net, or its files are broken.
    """
    if (file := fetch_file(source, revision)) is not None:
        return open_file(file).unet(dtype)
    name = _unet_folder(fetch(source, subfolder, revision), subfolder)
    try:
        unet = load_folder(UNet2DConditionModel, name, torch_dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"no U-Net can be loaded from {name}: {first_line(error)}") from error
    unet.register_to_config(_name_or_path="")  # diffusers would write where it lay into every copy
    return unet.eval()


def build_unet(config: Mapping[str, Any], *, seed: int = 0) -> UNet2DConditionModel:
    """Build a U-Net with random weights that depend on `seed` alone.

    Args:
        config: arguments of diffusers' `UNet2DConditionModel`, as in its `config.json`.

    Raises:
        UserError: an unknown argument, or values that fit no U-Net.
    """
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    known = set(UNet2DConditionModel._get_init_keys(UNet2DConditionModel))
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise UserError(f"unknown U-Net argument {unknown[0]!r}; see diffusers' UNet2DConditionModel for the names")
    # Modules draw their weights from torch's global generator: borrow it and put it back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return UNet2DConditionModel(**arguments)
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"these arguments give no U-Net: {first_line(error)}") from error


def enable_gradient_checkpointing(module: Any) -> None:
    """Recompute activations in the backward pass, of a diffusers or transformers model."""
    if hasattr(module, "gradient_checkpointing_enable"):  # transformers
        # Re-entrant checkpointing loses gradients when no input requires one, as under LoRA.
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        module.enable_gradient_checkpointing()


def context_width(config: Mapping[str, Any]) -> int | None:
    """Features that a U-Net of this configuration attends to; None where no level attends to a context.

    Raises:
        UserError: its levels attend to contexts of several widths, which nothing here makes.
    """
    given = config.get("cross_attention_dim", 1280)  # diffusers' default
    widths = set(given) if isinstance(given, list | tuple) else {given}
    widths -= {None}
    if len(widths) > 1:
        raise UserError(f"the U-Net's levels attend to several widths {sorted(widths)}: they must be one")
    return widths.pop() if widths else None


def pad_input(unet: UNet2DConditionModel, in_channels: int) -> None:
    """Widen the first convolution to more input channels, whose weights are zero: the U-Net computes what it did.

    As Stable Diffusion's inpainting model was begun (Rombach et al. 2022, section 4.5).
    """
    old = unet.conv_in
    new = torch.nn.Conv2d(in_channels, old.out_channels, old.kernel_size, padding=old.padding).to(old.weight)  # type: ignore[arg-type]
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        assert new.bias is not None and old.bias is not None
        new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=in_channels)


def pixel_multiple(unet: UNet2DConditionModel, downsample: int) -> int:
    """Heights and widths in pixels must be multiples of this: both downsamplings together."""
    return downsample * 2 ** (len(unet.config.block_out_channels) - 1)


def _unet_folder(folder: Path, subfolder: str) -> Path:
    for candidate in (folder / subfolder, folder):
        config = candidate / "config.json"
        if not config.is_file():
            continue
        try:
            kind = json.loads(config.read_text()).get("_class_name")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{config} is not a model's configuration: {first_line(error)}") from error
        if kind == "UNet2DConditionModel":
            return candidate
        if candidate != folder:
            raise UserError(f"{candidate} holds a {kind}, not a UNet2DConditionModel")
    what = f"there is no {subfolder}/config.json and it is no U-Net itself"
    if (folder / "manifest.json").is_file():
        what = "it holds shards; name a model or a run"
    elif runs := sorted(path.name for path in folder.iterdir() if is_run(path)):
        what = f"it holds the run{'s' if len(runs) > 1 else ''} {', '.join(runs[:5])}: name one"
    raise UserError(f"{folder} holds no U-Net: {what}")
