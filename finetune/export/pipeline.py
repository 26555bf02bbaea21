"""A folder in the diffusers layout, which diffusers' pipelines load where they know the task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from finetune import UserError
from finetune.components import Components, load_components, write_guidance
from finetune.conditioning.text import TextXL
from finetune.export.folder import whole_folder
from finetune.models.single_file import SCALES
from finetune.models.text import save_text_encoder, save_tokenizer
from finetune.models.unet import pixel_multiple
from finetune.models.weight_files import write_weights
from finetune.runs import Weights
from finetune.sampling import make_scheduler
from finetune.tasks.super_resolution import lowres

# By task, and whether the model has XL's two text encoders.
PIPELINES: dict[tuple[str, bool], type[DiffusionPipeline]] = {
    ("text_to_image", False): StableDiffusionPipeline,
    ("text_to_image", True): StableDiffusionXLPipeline,
    ("inpainting", False): StableDiffusionInpaintPipeline,
    ("inpainting", True): StableDiffusionXLInpaintPipeline,
    ("super_resolution", False): StableDiffusionUpscalePipeline,
}


def export_pipeline(
    source: str | Path,
    out: Path,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
) -> tuple[str, ...]:
    """Write a run or model in the diffusers layout; a LoRA is merged into the weights it adapts.

    What no pipeline of diffusers knows (labels, layouts, label maps, nothing at all) is laid out likewise, with
    `task.json` beside, for `finetune sample` and `model.pretrained`; so is a model with a codebook, which Stable
    Diffusion's pipelines cannot decode with. Super-resolution has that file always: no pipeline says its factor.
    The guidance of a run's sample grids goes along as `sampling.json`.

    Returns:
        What the user should be told.

    Raises:
        UserError: the source cannot be loaded, its latents are shifted, which pipelines do not undo, or it
            predicts the flow, which they cannot sample.
    """
    parts = load_components(source, weights=weights, step=step, dtype=dtype, revision=revision, tokenizer=tokenizer)
    text = parts.text
    kind = PIPELINES.get((parts.task.name, isinstance(text, TextXL)))
    is_kl = isinstance(parts.vae, AutoencoderKL)
    what = f"knows task={parts.task.name}" if is_kl else f"draws through a {type(parts.vae).__name__}"
    if kind is StableDiffusionUpscalePipeline and is_kl and text is not None and not _is_upscaler(parts):
        scale = SCALES["upscaler"]
        what += f" but with noise levels, a factor of {parts.downsample} and latents scaled by {scale}"
        kind = None
    if text is None or not is_kl:
        kind = None
    name = kind.__name__ if kind is not None else "the diffusers layout"
    if parts.latents.shift:
        raise UserError(
            f"the autoencoder of {source} shifts latents by {parts.latents.shift}, which {name} ignores: its "
            "pictures would be wrong"
        )
    if parts.is_flow and kind is not None:
        raise UserError(
            f"{source} predicts the flow, which {name} cannot sample: draw from it with `finetune sample`"
        )
    # The pipeline divides by what the VAE's configuration says; the run was trained with what its shards say.
    parts.vae.register_to_config(scaling_factor=parts.latents.scale)
    # Without height and width, the pipeline draws at this size.
    parts.unet.register_to_config(sample_size=_sample_size(parts, kind))
    parts.vae.to(dtype)
    scheduler = make_scheduler(None, parts.scheduler)
    with whole_folder(out) as folder:
        if kind is not None:
            kind(**_arguments(parts, kind), scheduler=scheduler).save_pretrained(folder)
        else:
            for part, module in (("unet", parts.unet), ("vae", parts.vae), ("scheduler", scheduler)):
                module.save_pretrained(folder / part)
        for part, module in parts.conditioner.parts().items():
            if part.startswith("text_encoder"):  # written anew in the form that older readers know too
                save_text_encoder(module, folder / part)  # type: ignore[arg-type]
            else:
                (folder / part).mkdir()
                write_weights(folder / part / "model.safetensors", module.state_dict())
        if text is not None:
            save_tokenizer(text.tokenizer, folder / "tokenizer")
        if isinstance(text, TextXL):
            save_tokenizer(text.tokenizer_2, folder / "tokenizer_2")
        write_guidance(folder, parts)
        if kind is None or parts.task.name == "super_resolution":
            parts.task.save(folder)
    if kind is not None:
        return parts.notices
    return (*parts.notices, f"no pipeline of diffusers {what}: draw with `finetune sample {out}`")


def _is_upscaler(parts: Components) -> bool:
    """Whether diffusers' pipeline takes the small picture as the model does, and leaves the latents' scale."""
    own = lowres(parts.conditioner)
    fits = own is not None and own.noise_levels > 0 and own.factor == parts.downsample
    return fits and abs(parts.latents.scale - SCALES["upscaler"]) < 1e-6


def _sample_size(parts: Components, kind: type[DiffusionPipeline] | None) -> int | tuple[int, int]:
    """Latent cells along a side, or (height, width) where they differ and the reader takes two."""
    height, width = (pixels // parts.downsample for pixels in parts.default_size)
    if height == width:
        return height
    if kind in (None, StableDiffusionPipeline):
        return height, width
    multiple = pixel_multiple(parts.unet, parts.downsample) // parts.downsample
    return max(1, round((height * width) ** 0.5 / multiple)) * multiple


def _arguments(parts: Components, kind: type[DiffusionPipeline]) -> dict[str, Any]:
    """What a pipeline is made of, but for its scheduler."""
    text = parts.text
    assert text is not None
    made: dict[str, Any] = {"vae": parts.vae, "unet": parts.unet, "tokenizer": text.tokenizer, **text.parts()}
    if isinstance(text, TextXL):
        return made | {
            "tokenizer_2": text.tokenizer_2,
            "force_zeros_for_empty_prompt": text.zero_null,
            "add_watermarker": False,
        }
    made |= {"safety_checker": None, "feature_extractor": None}
    if kind is not StableDiffusionUpscalePipeline:
        return made | {"requires_safety_checker": False}
    own = lowres(parts.conditioner)
    assert own is not None
    betas = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
    return made | {
        "low_res_scheduler": DDPMScheduler(**betas),
        "max_noise_level": min(own.noise_levels, parts.unet.config["num_class_embeds"] - 1),
    }
