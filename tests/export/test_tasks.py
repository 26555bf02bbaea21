"""What is not text-to-image is exported as the pipeline of its task, and as a single file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn

from finetune import export
from finetune.components import Components, load_components
from tests import fakes

SCALES = {"inpainting": 0.18215, "xl": 0.13025, "upscaler": 0.08333}
CLASSES = {
    "inpainting": "StableDiffusionInpaintPipeline",
    "xl": "StableDiffusionXLInpaintPipeline",
    "upscaler": "StableDiffusionUpscalePipeline",
}


@pytest.fixture(params=CLASSES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(kind: str, tmp_path: Path) -> Path:
    """A model whose U-Net says by its input what it is for, whatever its folder calls it."""
    folder = tmp_path / "model"
    if kind == "xl":
        fakes.tiny_sdxl(folder, in_channels=9)
    else:
        fakes.base_model(folder)
        more = {"in_channels": 9} if kind == "inpainting" else {"in_channels": 7, "num_class_embeds": 1000}
        torch.manual_seed(1)
        UNet2DConditionModel(**fakes.UNET | more).save_pretrained(folder / "unet")
    vae = fakes.vae()
    vae.register_to_config(scaling_factor=SCALES[kind])
    vae.save_pretrained(folder / "vae")
    return folder


def modules(parts: Components) -> dict[str, nn.Module]:
    return {"unet": parts.unet, "vae": parts.vae, **parts.conditioner.parts()}


def assert_same(one: nn.Module, other: nn.Module, name: str) -> None:
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys(), name
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items()), name


def test_a_folder_is_the_tasks_pipeline(kind: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export.main([str(model), "--format", "diffusers", "--out", str(out)]) == 0
    pipe = DiffusionPipeline.from_pretrained(out)
    assert type(pipe).__name__ == CLASSES[kind]
    parts, again = load_components(model), load_components(out)
    for name, module in modules(parts).items():
        assert_same(getattr(pipe, name), module, name)
        assert_same(modules(again)[name], module, name)
    assert again.task == parts.task and parts.scheduler.items() <= again.scheduler.items()
    if kind == "upscaler":
        # What Stable Diffusion's upscaler has: how much, and by which schedule, the small picture is noised.
        assert pipe.config.max_noise_level == 350
        assert (pipe.low_res_scheduler.config.beta_start, pipe.low_res_scheduler.config.beta_end) == (0.0001, 0.02)
        assert pipe.low_res_scheduler.config.beta_schedule == "scaled_linear"


def test_a_single_file_is_the_same_model(
    kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.models import text

    out = tmp_path / "model.safetensors"
    assert export.main([str(model), "--format", "single-file", "--out", str(out)]) == 0
    monkeypatch.setattr(text, "download", lambda *_: model / "tokenizer")  # in CLIP's place
    parts, again = load_components(model), load_components(out)
    for name, module in modules(parts).items():
        assert_same(modules(again)[name], module, name)
    assert (again.task, again.latents) == (parts.task, parts.latents)
    assert again.scheduler == parts.scheduler
