"""From noise to pictures: classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) over diffusers'
samplers.

From the same noise, steps and guidance a picture equals that of diffusers' `StableDiffusionPipeline`. Noise
is drawn for each picture from its own generator, so a picture does not depend on the batch that it is drawn
in. The U-Net is convolutional: it samples at sizes other than it was trained at (Rombach et al. 2022, section
4.3.2). Nothing here reads or moves torch's global generators, and modules leave as they came: in train or in
eval mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from torch import Tensor, nn

from finetune import UserError
from finetune.batch import Batch, Sample
from finetune.conditioning import Condition, Conditioner, batch_of, call_unet, to_device
from finetune.latents import LatentSpace, to_raw
from finetune.models import SCHEDULERS
from finetune.models.autoencoder import Autoencoder, decode, downsample_factor
from finetune.models.schedulers import FLOW_SCHEDULER, most_steps
from finetune.models.unet import pixel_multiple

_PIXELS_A_BATCH = 4 * 512 * 512


def make_scheduler(name: str | None, config: Mapping[str, Any]) -> Any:
    """A diffusers sampler: `ddim` (Song et al. 2021, arXiv 2010.02502), `ddpm` (Ho et al. 2020, arXiv
    2006.11239), `euler` (Karras et al. 2022, arXiv 2206.00364) or `dpm++` (second order; Lu et al. 2022,
    arXiv 2211.01095).

    Args:
        name: None is ddim, or euler for models that predict the flow, which know no other.
        config: as of `Components.scheduler`.

    Raises:
        UserError: no such sampler, or none for this model.
    """
    if config.get("_class_name") == FLOW_SCHEDULER:
        if name not in (None, "euler"):
            raise UserError(f"scheduler {name} does not sample a model that predicts the flow; take euler")
        return FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    ddim = DDIMScheduler(**config)
    match name:
        case None | "ddim":
            return ddim
        case "euler":
            return EulerDiscreteScheduler.from_config(ddim.config)
        case "dpm++":
            return DPMSolverMultistepScheduler.from_config(ddim.config)
        case "ddpm":
            return DDPMScheduler.from_config(ddim.config)
        case _:
            raise UserError(f"unknown scheduler {name!r}; choose one of {', '.join(SCHEDULERS)}")


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator for each picture."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(sources: Sequence[torch.Generator], shape_CHW: tuple[int, int, int]) -> Tensor:
    """Standard normal float32 [B, C, H, W] on the CPU, one picture from each generator."""
    return torch.stack([torch.randn(shape_CHW, generator=source) for source in sources])


@torch.no_grad()
def sample(
    unet: Any,
    condition: Condition,
    null: Condition | None,
    noise_BCHW: Tensor,
    scheduler: Any,
    steps: int,
    guidance: float,
    *,
    guidance_rescale: float = 0.0,
    sources: Sequence[torch.Generator] | None = None,
    progress: Callable[[], object] | None = None,
) -> Tensor:
    """Denoise: model latents float32 [B, C, h, w] on the device of `noise_BCHW`, where condition and U-Net are.

    The prediction is e(z, null) + guidance * (e(z, c) - e(z, null)), which is equation 6 of Ho & Salimans
    2022 with guidance = 1 + w. The sampler's arithmetic is in float32; the U-Net is fed its own dtype.

    Args:
        unet: a `UNet2DConditionModel`, or a function of (latents, time, condition).
        null: the condition left out; None, or a guidance of at most 1, samples without guidance.
        noise_BCHW: standard normal.
        scheduler: from `make_scheduler`.
        guidance_rescale: see `rescale_guided`.
        sources: generators from which a stochastic sampler (`ddpm`) draws, one for each picture.
        progress: called after each step.

    Raises:
        UserError: a number of steps that the schedule does not have.
    """
    limit = most_steps(scheduler.config)
    if not 1 <= steps <= limit:
        raise UserError(f"{steps} sampling steps: the schedule has between 1 and {limit}")
    is_module = isinstance(unet, nn.Module)
    predict = partial(call_unet, unet) if is_module else unet
    both = condition
    guided = null is not None and guidance > 1
    if null is not None and guided:
        both = {name: torch.cat([null[name], tensor]) for name, tensor in condition.items()}
    scheduler.set_timesteps(steps, device=noise_BCHW.device)
    is_flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)  # its inputs are not scaled
    z_BCHW = noise_BCHW.float() * (1.0 if is_flow else scheduler.init_noise_sigma)
    random = {"generator": list(sources)} if sources is not None else {}
    with evaluating(*([unet] if is_module else [])):
        for t in scheduler.timesteps:
            inputs = torch.cat([z_BCHW, z_BCHW]) if guided else z_BCHW
            inputs = inputs if is_flow else scheduler.scale_model_input(inputs, t)
            prediction = predict(inputs, t, both).float()
            if guided:
                without, conditional = prediction.chunk(2)
                prediction = without + guidance * (conditional - without)
                if guidance_rescale:
                    prediction = rescale_guided(prediction, conditional, guidance_rescale)
            z_BCHW = scheduler.step(prediction, t, z_BCHW, **random, return_dict=False)[0]
            if progress is not None:
                progress()
    return z_BCHW


def rescale_guided(guided_BCHW: Tensor, conditional_BCHW: Tensor, share: float) -> Tensor:
    """Bring a guided prediction towards the spread of the conditional one, by `share` of the way.

    Guidance makes predictions too strong where sampling begins at pure noise (Lin et al. 2024, arXiv 2305.08891,
    eq. 15 and 16; there a share of 0.7).
    """
    own, wanted = (each.std(dim=(1, 2, 3), keepdim=True) for each in (guided_BCHW, conditional_BCHW))
    return guided_BCHW * (share * wanted / own + (1.0 - share))


@torch.no_grad()
def generate(
    unet: Any,
    vae: Autoencoder,
    conditioner: Conditioner,
    scheduler: Any,
    space: LatentSpace,
    samples: Sequence[Sample],
    seeds: Sequence[int],
    *,
    steps: int = 50,
    guidance: float = 7.5,
    guidance_rescale: float = 0.0,
    negative: str = "",
    batch_size: int | None = None,
    progress: Callable[[], object] | None = None,
) -> list[Tensor]:
    """One picture for each sample, of its bucket's size: float32 [3, height, width] in [-1, 1], on the CPU.

    Args:
        conditioner: on the U-Net's device.
        space: maps model latents to the decoder's.
        samples: what is asked for, as shards would hold it.
        seeds: of each picture's noise.
        negative: the caption that guidance leads away from.
        batch_size: pictures denoised at once; by default as many as hold four of 512 by 512 pixels, at most 16.
            They are decoded one by one: the decoder is what takes memory.
        progress: called after each step of each batch; there are `len(batches(...)) * steps`.

    Raises:
        UserError: nothing to sample, a wrong size, a wrong number of steps, or a sample that lacks what the
            condition needs.
    """
    if not samples:
        raise UserError("there is nothing to sample")
    assert len(seeds) == len(samples)
    device = next(unet.parameters()).device
    downsample = downsample_factor(vae)
    everyone = generators(seeds)
    images: list[Tensor] = []
    for rows in batches([sample.bucket for sample in samples], batch_size):
        height, width = samples[rows[0]].bucket
        check_size(height, width, pixel_multiple(unet, downsample))
        sources = [everyone[row] for row in rows]
        batch = batch_of(conditioner, [replace(samples[row], clock=seeds[row]) for row in rows])
        condition, null = conditions(conditioner, batch, device, guidance, negative)
        z_BCHW = sample(
            unet,
            condition,
            null,
            draw_noise(sources, (unet.config.out_channels, height // downsample, width // downsample)).to(device),
            scheduler,
            steps,
            guidance,
            guidance_rescale=guidance_rescale,
            sources=sources,
            progress=progress,
        )
        with evaluating(vae):
            images += [decode(vae, raw_CHW[None])[0].cpu() for raw_CHW in to_raw(z_BCHW, space)]
    return images


@torch.no_grad()
def conditions(
    conditioner: Conditioner, batch: Batch, device: torch.device, guidance: float, negative: str = ""
) -> tuple[Condition, Condition | None]:
    """The condition of a batch, and the null one where guidance asks for it; in eval mode."""
    nobody = torch.zeros(len(batch), dtype=torch.bool)
    with evaluating(conditioner):
        condition = conditioner(to_device(conditioner.inputs(batch, nobody), device))
        if guidance <= 1 or not conditioner.guided:
            return condition, None
        return condition, conditioner(to_device(conditioner.inputs(batch, ~nobody, negative), device))


def default_batch(height: int, width: int) -> int:
    """Pictures of this size that are denoised at once."""
    return max(1, min(16, _PIXELS_A_BATCH // (height * width)))


def batches(sizes: Sequence[tuple[int, int]], batch_size: int | None = None) -> list[list[int]]:
    """Which pictures, (height, width) each, `generate` draws at once: neighbours of one size."""
    made: list[list[int]] = []
    for row, size in enumerate(sizes):
        most = batch_size or default_batch(*size)
        if made and sizes[made[-1][0]] == size and len(made[-1]) < most:
            made[-1].append(row)
        else:
            made.append([row])
    return made


def check_size(height: int, width: int, multiple: int) -> None:
    """Refuse a size in pixels that autoencoder and U-Net cannot halve as often as they do.

    Raises:
        UserError: names the nearest sizes that they can.
    """
    for name, value in (("height", height), ("width", width)):
        if value < multiple or value % multiple:
            lower = value // multiple * multiple
            near = f"{lower} or {lower + multiple}" if lower > 0 else str(multiple)
            raise UserError(f"{name} {value} is no multiple of {multiple} for this model; take {near}")


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode inside; outside each submodule is back in the mode that it had."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def to_pil(images_B3HW: Tensor) -> list[Image.Image]:
    """Pictures in [-1, 1] to 8-bit RGB, rounded as diffusers does."""
    bytes_BHW3 = (images_B3HW.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(pixels.contiguous().cpu().numpy()) for pixels in bytes_BHW3]
