"""Holes and masked latents go beside the latents as in Stable Diffusion's inpainting pipeline."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finetune import UserError, tasks
from finetune.batch import Sample
from finetune.conditioning import Conditioner, Given, batch_of
from finetune.latents import LatentSpace

SPACE = LatentSpace(0.5, 0.25)


def given(**more: object) -> Given:
    values: dict[str, object] = {"width": None, "latent_channels": 4, "downsample": 4, "space": SPACE}
    return Given(**{**values, **more})  # type: ignore[arg-type]


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def sample(holes: np.ndarray, masked: np.ndarray, clock: int = 0, seed: int = 0) -> Sample:
    members = {"hole.npy": npy(holes), "masked.npy": npy(masked)}
    return Sample({}, (4 * holes.shape[-2], 4 * holes.shape[-1]), members, clock, seed)


def some(count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Holes [K, 4, 6] and moments [K, 8, 4, 6]."""
    random = np.random.default_rng(0)
    holes = random.integers(2, size=(count, 4, 6)).astype(np.uint8)
    return holes, random.standard_normal((count, 8, 4, 6)).astype(np.float16)


def conditioned(conditioner: Conditioner, *samples: Sample) -> torch.Tensor:
    batch = batch_of(conditioner, samples)
    return conditioner(conditioner.inputs(batch, torch.zeros(len(samples), dtype=torch.bool)))["channels"]


def test_the_hole_comes_first_then_the_mean_of_the_masked_picture_as_model_latents() -> None:
    holes, masked = some(1)
    conditioner = tasks.make("inpainting", {}, given())
    found = conditioned(conditioner, sample(holes, masked))
    assert found.shape == (1, 5, 4, 6) and conditioner.channels == 5 and not conditioner.guided
    np.testing.assert_array_equal(found[0, 0].numpy(), holes[0])
    expected = (masked[0, :4].astype(np.float32) - 0.25) * 0.5
    np.testing.assert_array_equal(found[0, 1:].numpy(), expected)


def test_the_unet_is_given_what_stable_diffusions_pipeline_gives_it(pipeline: Path) -> None:
    from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel

    from finetune.models.autoencoder import encode_moments

    config = {**UNet2DConditionModel.load_config(pipeline / "unet"), "in_channels": 9}
    unet = UNet2DConditionModel.from_config(config)
    reference: Any = StableDiffusionInpaintPipeline.from_pretrained(
        pipeline, unet=unet, safety_checker=None, requires_safety_checker=False
    )
    with torch.no_grad():  # a posterior without spread: the pipeline draws from it
        reference.vae.quant_conv.bias[4:] = -40.0
        reference.vae.quant_conv.weight[4:] = 0.0
    seen: list[torch.Tensor] = []
    unet.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 32, 32, generator=generator)
    mask = torch.zeros(1, 1, 32, 32)
    mask[:, :, 6:21, 9:30] = 1.0
    reference.set_progress_bar_config(disable=True)
    reference(
        "a red apple",
        image=image,
        mask_image=mask,
        height=32,
        width=32,
        num_inference_steps=1,
        guidance_scale=1.0,
        generator=generator,
        output_type="latent",
    )
    holes = F.interpolate(mask, size=(8, 8)).to(torch.uint8)[0].numpy()
    moments = encode_moments(reference.vae, (image * 2 - 1) * (mask < 0.5)).numpy()
    space = LatentSpace(reference.vae.config.scaling_factor)
    found = conditioned(tasks.make("inpainting", {}, given(space=space)), sample(holes, moments.astype(np.float16)))
    assert len(seen) == 1 and seen[0].shape == (1, 9, 8, 8)
    torch.testing.assert_close(found, seen[0][:, 4:], atol=2e-3, rtol=1e-3)  # moments are kept in float16


def test_each_visit_draws_one_of_the_holes_by_its_clock() -> None:
    holes, masked = some(4)
    conditioner = tasks.make("inpainting", {}, given())
    counts = np.zeros(4, int)
    for clock in range(200):
        read = conditioner.read(sample(holes, masked, clock, seed=5))
        which = next(k for k in range(4) if np.array_equal(read["masked"], masked[k, :4]))
        np.testing.assert_array_equal(read["hole"][0], holes[which])
        again = conditioner.read(sample(holes, masked, clock, seed=5))
        np.testing.assert_array_equal(again["hole"], read["hole"])
        counts[which] += 1
    assert counts.min() > 30, "each of four is drawn about 50 times of 200"


@pytest.mark.parametrize(
    ("members", "error"),
    [
        ({}, "a sample has no hole.npy: encode the pictures with --holes K"),
        ({"hole.npy": npy(some()[0])}, "a sample has no masked.npy: encode the pictures with --holes K"),
        (
            {"hole.npy": npy(some()[0]), "masked.npy": npy(some()[1][:, :6])},
            "masked.npy (3, 6, 4, 6): [K, h, w] and [K, 8, h, w] are needed",
        ),
        ({"hole.npy": npy(some()[0][:0]), "masked.npy": npy(some()[1][:0])}, "hole.npy has the shape (0, 4, 6)"),
        (
            {"hole.npy": npy(some()[0] * 255), "masked.npy": npy(some()[1])},
            "hole.npy holds 255: 1 is to be painted",
        ),
        ({"hole.npy": npy(np.uint8(1)), "masked.npy": npy(some()[1])}, "hole.npy has the shape ()"),
        ({"hole.npy": b"nothing", "masked.npy": b"nothing"}, "hole.npy cannot be read as an array"),
    ],
)
def test_holes_that_do_not_fit_are_refused(members: dict[str, bytes], error: str) -> None:
    with pytest.raises(UserError) as raised:
        tasks.make("inpainting", {}, given()).read(Sample({}, (16, 24), members))
    assert error in str(raised.value) and "\n" not in str(raised.value)


def test_dropout_leaves_out_the_caption_alone() -> None:
    class Captions(Conditioner):
        asks = ("prompt",)

        def inputs(self, batch: Any, drop_B: torch.Tensor, null_caption: str = "") -> dict[str, torch.Tensor]:
            return {"kept": ~drop_B}

        def forward(self, inputs: Any) -> dict[str, torch.Tensor]:
            return {"context": inputs["kept"].float().view(-1, 1, 1)}

    conditioner = tasks.make("inpainting", {}, given(width=1, text=Captions))
    assert conditioner.guided and conditioner.asks == ("prompt", "image", "mask")
    samples = [sample(*some(1)), sample(*some(1))]
    inputs = conditioner.inputs(batch_of(conditioner, samples), torch.tensor([False, True]))
    condition = conditioner(inputs)
    assert condition["context"].flatten().tolist() == [1.0, 0.0]
    assert torch.equal(condition["channels"][0], condition["channels"][1])
    with pytest.raises(UserError, match="attends to 8 features without a text encoder"):
        tasks.make("inpainting", {}, given(width=8))
