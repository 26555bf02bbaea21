"""One file with the keys of the latent diffusion code base, as the first Stable Diffusion models were published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune import UserError
from finetune.components import Components, load_components
from finetune.export.folder import whole_file
from finetune.models import ldm_keys
from finetune.runs import Weights

SCALE = 0.18215  # what readers take latents of Stable Diffusion 1.x and 2.x to be multiplied by


def export_single_file(
    source: str | Path,
    out: Path,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> tuple[str, ...]:
    """Write U-Net, autoencoder and text encoder of a run or model into one file; a LoRA is merged.

    What the file can't say stands in its metadata, in the terms of ModelSpec (github.com/Stability-AI/ModelSpec).

    Returns:
        What the user should be told.

    Raises:
        UserError: the source cannot be loaded, or a reader of such files would take it for something else.
    """
    parts = load_components(source, weights=weights, step=step, dtype=dtype, revision=revision)
    if parts.is_flow:
        raise UserError(
            f"{source} predicts the flow, which no reader of such files expects; use --format diffusers"
        )
    if parts.latents.shift or abs(parts.latents.scale - SCALE) > 1e-6:
        raise UserError(
            f"latents of {source} are scaled by {parts.latents.scale:g}, which a single file cannot say: its "
            f"readers take {SCALE}; use --format diffusers"
        )
    # Stable Diffusion 2.x has OpenCLIP's encoder, which is the one with the exact GELU.
    kind = "clip" if parts.text_encoder.config.hidden_act == "quick_gelu" else "openclip"
    config: Any = parts.unet.config
    tensors = {
        **ldm_keys.unet_to_ldm(_weights(parts.unet), config),
        **ldm_keys.vae_to_ldm(_weights(parts.vae), parts.vae.config),
        **ldm_keys.text_to_ldm(_weights(parts.text_encoder), kind),
    }
    with whole_file(out) as file:
        made = {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}
        save_file(made, file, metadata=_metadata(parts, out, kind))
    return parts.notices


def _weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """What is learnt; position ids are no weights, and newer readers refuse them."""
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


def _metadata(parts: Components, out: Path, kind: str) -> dict[str, str]:
    height, width = parts.default_size
    prediction = {"v_prediction": "v", "sample": "x0"}.get(parts.scheduler["prediction_type"], "epsilon")
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-v{1 if kind == 'clip' else 2}",
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": out.stem,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": prediction,
    }
