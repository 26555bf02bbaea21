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
        unet = UNet2DConditionModel.from_pretrained(name, torch_dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"no U-Net can be loaded from {name}: {first_line(error)}") from error
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
    raise UserError(f"{folder} holds no U-Net: there is no {subfolder}/config.json and it is no U-Net itself")
