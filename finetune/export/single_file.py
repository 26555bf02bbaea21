"""One file with the keys of the latent diffusion code base, as the first Stable Diffusion models were published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from finetune import UserError
from finetune.components import Components, load_components
from finetune.conditioning.text import TextXL
from finetune.models import ldm_keys
from finetune.models.single_file import CONFIG, SCALES
from finetune.models.weight_files import write_weights
from finetune.runs import Weights
from finetune.tasks.super_resolution import UPSCALER_LEVELS, lowres

_CLIP_WORDS = 49408
_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "xl": "stable-diffusion-xl-v1-base",
    "upscaler": "stable-diffusion-v2",
}
_PREDICTED = {"epsilon": "the noise", "v_prediction": "v", "sample": "x0"}


def export_single_file(
    source: str | Path,
    out: Path,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
) -> tuple[str, ...]:
    """Write U-Net, autoencoder and text encoders of a run or model into one file; a LoRA is merged.

    What the tensors can't say stands in the file's metadata: in the terms of ModelSpec
    (github.com/Stability-AI/ModelSpec), and as the parts' configurations, for `SingleFile` to read them by.

    Returns:
        What the user should be told.

    Raises:
        UserError: the source cannot be loaded, or a reader of such files would take it for something else.
    """
    parts = load_components(source, weights=weights, step=step, dtype=dtype, revision=revision, tokenizer=tokenizer)
    if parts.is_flow:
        raise UserError(
            f"{source} predicts the flow, which no reader of such files expects; use --format diffusers"
        )
    if not isinstance(parts.vae, AutoencoderKL):
        raise UserError(
            f"the autoencoder of {source} is a {type(parts.vae).__name__}, which no reader of such files expects; "
            "use --format diffusers"
        )
    text = parts.text
    own = lowres(parts.conditioner)
    if text is None or (own is None and parts.task.name not in ("text_to_image", "inpainting")):
        raise UserError(
            f"{source} is conditioned by task={parts.task.name}, which has no place in a single file: it holds "
            "U-Net, autoencoder and text encoders; use --format diffusers"
        )
    kind = _kind(parts)
    if own is not None and (kind, own.factor, own.noise_levels) != ("upscaler", 4, UPSCALER_LEVELS):
        raise UserError(
            f"{source} enlarges by task.options.factor={own.factor} with noise_levels={own.noise_levels}, which a "
            f"single file cannot say: its readers take 4 and {UPSCALER_LEVELS}, of one text encoder; use --format "
            "diffusers"
        )
    if parts.latents.shift or abs(parts.latents.scale - SCALES[kind]) > 1e-6:
        raise UserError(
            f"latents of {source} are scaled by {parts.latents.scale:g}, which a single file cannot say: its "
            f"readers take {SCALES[kind]}; use --format diffusers"
        )
    height, width = (pixels // parts.downsample for pixels in parts.default_size)
    parts.unet.register_to_config(sample_size=height if height == width else (height, width))
    config: Any = parts.unet.config
    tensors = {
        **ldm_keys.unet_to_ldm(_weights(parts.unet), config),
        **ldm_keys.vae_to_ldm(_weights(parts.vae), parts.vae.config),
    }
    encoders = text.parts()
    names = {"xl": ("xl_clip", "xl_openclip"), "sd1": ("clip",)}.get(kind, ("openclip",))
    for encoder, name in zip(encoders.values(), names, strict=True):
        tensors |= ldm_keys.text_to_ldm(_weights(encoder), name)
    if (kind, parts.scheduler["prediction_type"]) == ("xl", "v_prediction"):
        # Marks that ComfyUI and WebUI look for; in files of other kinds they look for none.
        marks = ["v_pred", *(["ztsnr"] if parts.scheduler.get("rescale_betas_zero_snr") else [])]
        tensors |= {mark: torch.zeros(0) for mark in marks}
    notices = (*parts.notices, *_unsaid(parts.scheduler, kind, out))
    words = len(text.tokenizer)
    if words != _CLIP_WORDS:
        notices += (
            f"the file holds no tokenizer and readers take CLIP's, but this model has {words} tokens of its own: "
            "keep its tokenizer/ for model.tokenizer",
        )
    write_weights(out, {key: tensor.to(dtype) for key, tensor in tensors.items()}, _metadata(parts, out, kind))
    return notices


def _kind(parts: Components) -> str:
    """As `SingleFile.kind`; Stable Diffusion 2.x has OpenCLIP's encoder, which is the one with the exact GELU."""
    if isinstance(parts.text, TextXL):
        return "xl"
    if parts.unet.config["num_class_embeds"]:
        return "upscaler"
    return "sd1" if parts.text_encoder.config.hidden_act == "quick_gelu" else "sd2"


def predicts(scheduler: Mapping[str, Any]) -> str:
    """In words, what a model predicts that is sampled so."""
    zero_snr = " at zero terminal SNR" if scheduler.get("rescale_betas_zero_snr") else ""
    said = str(scheduler.get("prediction_type", "epsilon"))
    return _PREDICTED.get(said, said) + zero_snr


def _unsaid(scheduler: Mapping[str, Any], kind: str, out: Path) -> tuple[str, ...]:
    """What readers take otherwise, since no tensor says it: XL's marks alone do. Of 2.x they guess."""
    is_v = scheduler["prediction_type"] == "v_prediction"
    taken = predicts({"prediction_type": "v_prediction" if kind == "upscaler" else "epsilon"})
    if predicts(scheduler) == taken or (is_v and kind == "xl"):
        return ()
    yaml = f"in WebUI by a {out.stem}.yaml beside the file that has `parameterization: v`, " if is_v else ""
    return (
        f"it predicts {predicts(scheduler)}, and other tools may take it to predict {taken}: set it, {yaml}in "
        "ComfyUI by ModelSamplingDiscrete",
    )


def _weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """What is learnt; position ids are no weights, and newer readers refuse them."""
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


def _metadata(parts: Components, out: Path, kind: str) -> dict[str, str]:
    height, width = parts.default_size
    prediction = {"v_prediction": "v", "sample": "x0"}.get(parts.scheduler["prediction_type"], "epsilon")
    v2 = "stable-diffusion-v2-768-v" if prediction == "v" else "stable-diffusion-v2-512"
    assert parts.text is not None
    configs = {
        "unet": _plain(dict(parts.unet.config)),
        "vae": _plain({**parts.vae.config, "scaling_factor": parts.latents.scale}),
        "scheduler": parts.scheduler,
        **{name: _plain(encoder.config.to_diff_dict()) for name, encoder in parts.text.parts().items()},  # type: ignore
    }
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _ARCHITECTURES.get(kind, v2),
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": out.stem,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": prediction,
        CONFIG: json.dumps(configs),
    }


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Without what says where a model came from and which library wrote it."""
    left_out = ("architectures", "dtype", "torch_dtype", "transformers_version")
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in left_out}
