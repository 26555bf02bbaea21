"""Sampling equals diffusers' pipeline from the same noise, at any size, in any batch, and leaves no trace."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from finetune import UserError, build, pictures, sampling
from finetune.batch import Sample
from finetune.components import load_components
from finetune.conditioning import batch_of
from finetune.config import Config, compose
from finetune.distributed import World
from finetune.latents import LatentSpace
from finetune.models import SCHEDULERS
from tests import fakes

PROMPTS = ["a red apple", "a smiling face", "a blue heart"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return fakes.base_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def parts(base):
    return load_components(base)


def draw(parts, prompts=PROMPTS, seeds=None, scheduler="ddim", height=32, width=32, **settings):
    drawn = sampling.generate(
        parts.unet,
        parts.vae,
        parts.conditioner,
        sampling.make_scheduler(scheduler, parts.scheduler),
        parts.latents,
        [Sample({"captions": [prompt]}, (height, width)) for prompt in prompts],
        seeds or range(5, 5 + len(prompts)),
        **({"steps": 4, "guidance": 3.0} | settings),
    )
    return torch.stack(drawn)


def pipeline(base):
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def as_pipeline(images):
    """[B, H, W, 3] in [0, 1], as `output_type="np"` gives."""
    return (images / 2 + 0.5).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("scheduler", "size", "guidance", "negative"),
    [
        ("ddim", (32, 32), 5.0, ""),
        ("ddim", (40, 64), 3.0, "a green apple"),  # other than trained, and not square
        ("ddim", (32, 32), 1.0, ""),
        ("euler", (32, 32), 3.0, ""),
        ("dpm++", (32, 32), 3.0, ""),
        ("ddpm", (32, 32), 3.0, ""),
    ],
)
def test_pictures_equal_the_pipelines(base, parts, scheduler, size, guidance, negative):
    pipe = pipeline(base)
    pipe.scheduler = sampling.make_scheduler(scheduler, parts.scheduler)
    height, width = size
    sources = sampling.generators([5, 6])
    noise = sampling.draw_noise(sources, (4, height // 4, width // 4))
    wanted = pipe(
        PROMPTS[:2],
        negative_prompt=[negative] * 2,
        height=height,
        width=width,
        latents=noise,
        generator=sources,
        num_inference_steps=6,
        guidance_scale=guidance,
        output_type="np",
    ).images
    images = draw(
        parts, PROMPTS[:2], [5, 6], scheduler, height, width, steps=6, guidance=guidance, negative=negative
    )
    assert images.shape == (2, 3, height, width)
    assert np.abs(as_pipeline(images) - wanted).max() < 1e-5
    assert wanted.std() > 0.01  # not one flat colour, which would equal anything


def test_seeds_draw_what_the_pipeline_draws_from_its_generators(base, parts):
    """The whole call, noise included: `generator=[Generator().manual_seed(seed), ...]` in diffusers."""
    wanted = pipeline(base)(
        PROMPTS[:2],
        height=32,
        width=32,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="np",
    ).images
    assert np.abs(as_pipeline(draw(parts, PROMPTS[:2])) - wanted).max() < 1e-5


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_picture_does_not_depend_on_its_batch(parts, scheduler):
    together = draw(parts, scheduler=scheduler)
    for size in (1, 2):
        torch.testing.assert_close(draw(parts, scheduler=scheduler, batch_size=size), together, rtol=0, atol=1e-4)
    alone = draw(parts, PROMPTS[1:2], [6], scheduler)
    torch.testing.assert_close(alone, together[1:2], rtol=0, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_each_name_is_a_sampler_of_its_own():
    assert len({type(sampling.make_scheduler(name, fakes.SCHEDULE)) for name in SCHEDULERS}) == len(SCHEDULERS)


def test_prompt_and_guidance_matter(parts):
    one, other = draw(parts, ["a red apple", "a blue heart"], [1, 1])
    assert (one - other).abs().max() > 1e-3
    strong = draw(parts, ["a red apple"], [1], guidance=9.0)
    assert (one - strong).abs().max() > 1e-3


def test_modes_and_global_random_state_are_left_as_they_were(base):
    parts = load_components(base)
    parts.unet.train()
    parts.unet.mid_block.eval()
    before = [module.training for module in parts.unet.modules()]
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    images = draw(parts, scheduler="ddpm")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in parts.unet.modules()] == before
    assert not images.requires_grad
    torch.testing.assert_close(draw(load_components(base), scheduler="ddpm"), images, rtol=0, atol=0)


def test_scale_and_shift_are_undone_before_decoding(parts):
    """The decoder is fed z / scale + shift; its own configuration is not asked."""
    fed = []
    decoder = parts.vae.decoder.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0]))
    try:
        draw(parts, PROMPTS[:1])
        draw(replace(parts, latents=LatentSpace(parts.latents.scale / 2, 0.25)), PROMPTS[:1])
    finally:
        decoder.remove()
    quantised = parts.vae.post_quant_conv
    bias = quantised.bias.view(1, -1, 1, 1)
    shift = torch.full_like(fed[0], 0.25)
    wanted = 2 * (fed[0] - bias) + quantised(shift)
    torch.testing.assert_close(fed[1], wanted, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_near_float32(base, parts):
    low = draw(load_components(base, dtype=torch.bfloat16))
    assert low.dtype == torch.float32
    assert (low - draw(parts)).abs().mean() < 0.05


def test_progress_counts_every_step(parts):
    ticks = []
    draw(parts, batch_size=2, progress=lambda: ticks.append(1))
    assert len(ticks) == 4 * len(sampling.batches([(32, 32)] * 3, 2)) == 8


def test_default_batches_hold_four_large_pictures():
    assert sampling.default_batch(512, 512) == 4
    assert sampling.default_batch(2048, 2048) == 1
    assert sampling.default_batch(64, 64) == 16
    assert sampling.batches([(512, 512)] * 9) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert sampling.batches([(64, 64), (64, 32), (64, 32), (64, 64)]) == [[0], [1, 2], [3]]


def test_mistakes_are_named(parts):
    with pytest.raises(UserError, match="height 36 is no multiple of 8 for this model; take 32 or 40"):
        draw(parts, height=36)
    with pytest.raises(UserError, match="width 4 is no multiple of 8 for this model; take 8"):
        draw(parts, width=4)
    with pytest.raises(UserError, match="nothing to sample"):
        draw(parts, [])
    with pytest.raises(UserError, match="1001 sampling steps"):
        draw(parts, steps=1001)
    with pytest.raises(UserError, match="unknown scheduler 'plms'; choose one of ddim"):
        draw(parts, scheduler="plms")


def test_pixels_are_rounded_as_diffusers_does(parts):
    images = torch.rand(2, 3, 4, 5) * 2.4 - 1.2
    ours = sampling.to_pil(images)
    pipe_bytes = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    wanted = StableDiffusionPipeline.numpy_to_pil(pipe_bytes)
    for one, other in zip(ours, wanted, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_grid_places_pictures_row_by_row():
    colours = ["red", "green", "blue", "black", "yellow"]
    sheet = pictures.grid([Image.new("RGB", (6, 4), colour) for colour in colours], columns=2, gap=2)
    assert sheet.size == (14, 16)
    for index, colour in enumerate(colours):
        row, column = divmod(index, 2)
        wanted = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
        left, top = column * 8, row * 6
        assert {sheet.getpixel((x, y)) for x in (left, left + 5) for y in (top, top + 3)} == {wanted}
    assert sheet.getpixel((7, 0)) == sheet.getpixel((13, 15)) == (255, 255, 255)
    assert pictures.grid([Image.new("RGB", (6, 4))], columns=9).size == (6, 4)
    with pytest.raises(UserError, match="needs pictures"):
        pictures.grid([], columns=2)


@pytest.mark.parametrize("masked", [False, True])
def test_a_run_trains_on_the_context_that_it_samples_with(pipeline, overrides, tmp_path, masked):
    """Also for encoders that are told which tokens are padding (`use_attention_mask`)."""
    folder = tmp_path / "model"
    shutil.copytree(pipeline, folder)
    for name, changes in (
        ("text_encoder/config.json", {"use_attention_mask": masked}),
        ("tokenizer/tokenizer_config.json", {"pad_token": "!"}),
    ):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | changes))
    config, _ = compose("train", [*overrides, f"model.pretrained={folder}", "model.unet={}"], Config)
    conditioner = build.build(config, World(0, 1, 0, torch.device("cpu")), tmp_path).model.conditioner
    captions = ["a red cat", "", "a gold bus on a table"]
    ids = conditioner.tokenize(captions)
    trained = conditioner({"ids": ids})["context"]
    parts = load_components(folder)
    asked = batch_of(parts.conditioner, [Sample({"captions": [caption]}, (32, 32)) for caption in captions])
    drawn, null = sampling.conditions(parts.conditioner, asked, torch.device("cpu"), 3.0)
    assert torch.equal(trained, drawn["context"])
    assert torch.equal(null["context"], conditioner({"ids": conditioner.tokenize([""] * 3)})["context"])
    assert torch.equal(trained, parts.text_encoder(ids)[0]) is not masked
