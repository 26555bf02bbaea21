"""Low-resolution pictures go beside the latents, noised as Stable Diffusion's x4 upscaler noises them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import UserError, tasks
from finetune.batch import Sample
from finetune.conditioning import Condition, Conditioner, Given, batch_of
from finetune.latents import LatentSpace


def given(**more: object) -> Given:
    values: dict[str, object] = {"width": None, "latent_channels": 4, "downsample": 4, "space": LatentSpace(0.5)}
    return Given(**{**values, **more})  # type: ignore[arg-type]


def png(pixels_HW3: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, format="PNG")
    return buffer.getvalue()


def pixels(seed: int = 0, height: int = 4, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(height, width, 3)).astype(np.uint8)


def sample(pixels_HW3: np.ndarray, factor: int = 4, clock: int = 0, **record: object) -> Sample:
    height, width, _ = pixels_HW3.shape
    return Sample(record, (factor * height, factor * width), {"lowres.png": png(pixels_HW3)}, clock)


def conditioned(conditioner: Conditioner, *samples: Sample) -> Condition:
    batch = batch_of(conditioner, samples)
    return conditioner(conditioner.inputs(batch, torch.zeros(len(samples), dtype=torch.bool)))


def test_the_picture_itself_is_laid_beside_the_latents() -> None:
    conditioner = tasks.make("super_resolution", {}, given())
    condition = conditioned(conditioner, sample(pixels()))
    assert conditioner.channels == 3 and not conditioner.guided and condition.keys() == {"channels"}
    expected = torch.from_numpy(pixels()).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    torch.testing.assert_close(condition["channels"], expected)


@pytest.mark.parametrize(("factor", "downsample"), [(4, 8), (8, 4), (2, 4)])
def test_other_sizes_are_resized_to_the_latent_grid(factor: int, downsample: int) -> None:
    conditioner = tasks.make("super_resolution", {"factor": factor}, given(downsample=downsample))
    plain = np.full((8, 12, 3), 51, np.uint8)
    found = conditioned(conditioner, sample(plain, factor))["channels"]
    assert found.shape == (1, 3, 8 * factor // downsample, 12 * factor // downsample)
    torch.testing.assert_close(found, torch.full_like(found, -0.6))
    left = plain.copy()
    left[:, :6] = 255
    columns = conditioned(conditioner, sample(left, factor))["channels"].mean((0, 1, 2))
    assert columns[0] > 0.9 and columns[-1] < -0.5, "left stays left"


def test_the_unet_is_given_what_stable_diffusions_upscaler_gives_it(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DDPMScheduler, StableDiffusionUpscalePipeline, UNet2DConditionModel

    config = {**UNet2DConditionModel.load_config(pipeline / "unet"), "in_channels": 7, "num_class_embeds": 1000}
    unet = UNet2DConditionModel.from_config(config)
    # Of the published model: its low_res_scheduler/scheduler_config.json.
    low_res = DDPMScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    reference: Any = StableDiffusionUpscalePipeline.from_pretrained(
        pipeline, unet=unet, low_res_scheduler=low_res, max_noise_level=350
    )
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    unet.register_forward_pre_hook(
        lambda module, arguments, named: seen.append((arguments[0], named["class_labels"])), with_kwargs=True
    )
    reference.set_progress_bar_config(disable=True)
    reference(
        "a red apple",
        image=Image.fromarray(pixels(height=8, width=8)),
        num_inference_steps=1,
        guidance_scale=1.0,
        noise_level=120,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    )
    noise = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(3))  # the pipeline's first draw
    monkeypatch.setattr("finetune.rng.normal", lambda *arguments: noise)
    conditioner = tasks.make("super_resolution", {}, given(embedded_labels=1000))
    condition = conditioned(conditioner, sample(pixels(height=8, width=8), noise_level=120))
    ((given_BCHW, labels_B),) = seen
    torch.testing.assert_close(condition["channels"], given_BCHW[:, 4:])
    assert torch.equal(condition["labels"], labels_B) and labels_B.tolist() == [120]


def test_noise_has_the_level_of_the_schedule_and_the_address_of_the_sample() -> None:
    conditioner = tasks.make("super_resolution", {}, given(embedded_labels=1000, seed=2))
    gray = np.full((64, 64, 3), 127, np.uint8)
    level = 200
    samples = [sample(gray, clock=clock, noise_level=level) for clock in (7, 8, 7)]
    channels = conditioned(conditioner, *samples)["channels"]
    betas = np.linspace(0.0001**0.5, 0.02**0.5, 1000) ** 2
    expected = np.sqrt(1 - np.cumprod(1 - betas)[level])
    assert channels.std().item() == pytest.approx(expected, rel=0.02)
    assert torch.equal(channels[0], channels[2]) and not torch.equal(channels[0], channels[1])
    alone = conditioned(conditioner, samples[1])["channels"]
    assert torch.equal(alone[0], channels[1]), "whatever batch it is in"


def test_levels_are_drawn_in_training_and_asked_for_in_sampling() -> None:
    conditioner = tasks.make("super_resolution", {"noise_levels": 50}, given(embedded_labels=1000))
    levels = [int(conditioner.read(sample(pixels(), clock=clock))["level"]) for clock in range(300)]
    assert min(levels) >= 0 and max(levels) < 50 and len(set(levels)) == 50
    assert levels == [int(conditioner.read(sample(pixels(), clock=clock))["level"]) for clock in range(300)]
    assert int(conditioner.read(sample(pixels(), noise_level=20))["level"]) == 20
    assert "level" not in tasks.make("super_resolution", {}, given()).read(sample(pixels()))


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (Sample({}, (16, 24)), "a sample has no lowres.png: encode the pictures with --lowres 4"),
        (
            sample(pixels(), factor=2),
            "lowres.png has 6x4 pixels, for pictures of 24x16 at task.options.factor=4, and",
        ),
        (Sample({}, (16, 24), {"lowres.png": b"?"}), "lowres.png cannot be read as a picture"),
        (sample(pixels(), noise_level=1000), "noise level 1000: the model was trained with 0 to 349"),
        (sample(pixels(), noise_level=350), "noise level 350: the model was trained with 0 to 349"),
        (sample(pixels(), noise_level="much"), "noise level much: the model was trained with 0 to 349"),
    ],
)
def test_what_does_not_fit_is_refused(asked: Sample, error: str) -> None:
    with pytest.raises(UserError) as raised:
        tasks.make("super_resolution", {}, given(embedded_labels=1000)).read(asked)
    assert error in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "what", "error"),
    [
        ({"factor": 1}, {}, "task.options.factor=1 must be at least 2"),
        ({"noise_levels": 350}, {}, "task.options.noise_levels=350 and the U-Net is not told of the level"),
        (
            {"noise_levels": 0},
            {"embedded_labels": 1000},
            "must be between 1 and 1000: this U-Net is told of the level",
        ),
        ({"noise_levels": 2000}, {"embedded_labels": 3000}, "must be between 1 and 1000"),
        ({}, {"width": 32}, "attends to 32 features without a text encoder"),
    ],
)
def test_settings_that_contradict_the_model_are_refused(
    settings: dict[str, object], what: dict[str, object], error: str
) -> None:
    with pytest.raises(UserError) as raised:
        tasks.make("super_resolution", settings, given(**what))
    assert error in str(raised.value) and "\n" not in str(raised.value)


def test_the_size_is_the_factors_multiple() -> None:
    assert tasks.make("super_resolution", {"factor": 2}, given()).size(sample(pixels(), 2)) == (8, 12)
