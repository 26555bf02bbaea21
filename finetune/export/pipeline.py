"""A folder that diffusers' `StableDiffusionPipeline.from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from finetune import UserError
from finetune.components import load_components
from finetune.export.folder import whole_folder
from finetune.models.text import save_text_encoder, save_tokenizer
from finetune.runs import Weights
from finetune.sampling import make_scheduler


def export_pipeline(
    source: str | Path,
    out: Path,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> tuple[str, ...]:
    """Write a run or model as a Stable Diffusion pipeline; a LoRA is merged into the weights it adapts.

    Returns:
        What the user should be told.

    Raises:
        UserError: the source cannot be loaded, its latents are shifted, which the pipeline does not undo, or it
            predicts the flow, which the pipeline cannot sample.
    """
    parts = load_components(source, weights=weights, step=step, dtype=dtype, revision=revision)
    if parts.latents.shift:
        raise UserError(
            f"the autoencoder of {source} shifts latents by {parts.latents.shift}, which "
            "StableDiffusionPipeline ignores: its pictures would be wrong"
        )
    if parts.is_flow:
        raise UserError(
            f"{source} predicts the flow, which StableDiffusionPipeline cannot sample: draw from it with "
            "`finetune sample`"
        )
    # The pipeline divides by what the VAE's configuration says; the run was trained with what its shards say.
    parts.vae.register_to_config(scaling_factor=parts.latents.scale)
    # Without height and width, the pipeline draws at this size.
    height, width = (pixels // parts.downsample for pixels in parts.default_size)
    parts.unet.register_to_config(sample_size=height if height == width else (height, width))
    pipeline = StableDiffusionPipeline(
        vae=parts.vae.to(dtype),
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=make_scheduler(None, parts.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with whole_folder(out) as folder:
        pipeline.save_pretrained(folder)
        # Written anew in the form that older readers know too.
        save_text_encoder(parts.text_encoder, folder / "text_encoder")
        save_tokenizer(parts.tokenizer, folder / "tokenizer")
    return parts.notices
