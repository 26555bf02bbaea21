"""What is not text-to-image is exported as the pipeline of its task, and as a single file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from finetune import UserError, export, sample, tasks
from finetune.components import Components, load_components
from finetune.conditioning import Conditioner, Given
from finetune.export import pipeline
from finetune.latents import LatentSpace
from finetune.models.unet import build_unet
from finetune.tasks import Task
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
    assert (again.task.name, again.task.options) == (parts.task.name, parts.task.options)
    assert parts.scheduler.items() <= again.scheduler.items()
    if kind == "upscaler":
        # What Stable Diffusion's upscaler has: how much, and by which schedule, the small picture is noised.
        assert pipe.config.max_noise_level == 350
        assert (pipe.low_res_scheduler.config.beta_start, pipe.low_res_scheduler.config.beta_end) == (0.0001, 0.02)
        assert pipe.low_res_scheduler.config.beta_schedule == "scaled_linear"


def test_a_folder_of_wide_pictures_is_loaded(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """These pipelines know one side: that of as many pixels, which the U-Net can halve."""

    def sized(*arguments: Any, **settings: Any) -> Components:
        return replace(load_components(*arguments, **settings), size=(40, 64))

    monkeypatch.setattr(pipeline, "load_components", sized)
    export.main([str(model), "--format", "diffusers", "--out", str(tmp_path / "out")])
    assert DiffusionPipeline.from_pretrained(tmp_path / "out").unet.config.sample_size == 12


def enlarger(folder: Path, scale: float, **options: Any) -> Path:
    """A model of captions and small pictures that is told of 100 levels of noise."""
    vae = fakes.base_model(folder) / "vae" / "config.json"
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"scaling_factor": scale}))
    build_unet(fakes.UNET | {"in_channels": 7, "num_class_embeds": 100}).save_pretrained(folder / "unet")
    Task("super_resolution", options).save(folder)
    return folder


@pytest.mark.parametrize(
    ("scale", "options", "levels"),
    [
        (0.08333, {}, 99),  # the highest that the U-Net has
        (0.08333, {"noise_levels": 30}, 30),
        (0.08333, {"factor": 2}, None),
        (0.5, {}, None),
    ],
)
def test_super_resolution_keeps_what_no_pipeline_says(
    scale: float, options: dict[str, Any], levels: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Diffusers' pipeline knows one factor, and sets the latents' scale to the published upscaler's."""
    model, out = enlarger(tmp_path / "model", scale, **options), tmp_path / "out"
    assert export.main([str(model), "--format", "diffusers", "--out", str(out)]) == 0
    said = "no pipeline of diffusers knows task=super_resolution but with noise levels, a factor of 4 and latents"
    assert (said in capsys.readouterr().out) == (levels is None)
    assert (out / "model_index.json").is_file() == (levels is not None)
    if levels is not None:
        assert DiffusionPipeline.from_pretrained(out).config.max_noise_level == levels
    parts, again = load_components(model), load_components(out)
    assert (again.task, again.latents) == (parts.task, parts.latents)
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    side = 8 * options.get("factor", 4)
    argv = [str(out), "--prompt", "x", "--image", str(tmp_path / "small.png"), "--steps", "1", "--device", "cpu"]
    sample.main([*argv, "--out", str(tmp_path / "x.png")])
    assert Image.open(tmp_path / "x.png").size == (side, side)


@pytest.mark.parametrize(
    ("task", "more", "says"),
    [
        (
            Task("semantic_synthesis", {"labels": 3}),
            {"in_channels": 7},
            "task=semantic_synthesis, which has no place",
        ),
        (
            Task("super_resolution"),
            {"in_channels": 7},
            "enlarges by task.options.factor=4 with noise_levels=0, which",
        ),
        (
            Task("super_resolution", {"factor": 2}),
            {"in_channels": 7, "num_class_embeds": 1000},
            "enlarges by task.options.factor=2 with noise_levels=350, which a single file cannot say",
        ),
        (
            Task("super_resolution", {"noise_levels": 50}),
            {"in_channels": 7, "num_class_embeds": 1000},
            "with noise_levels=50, which a single file cannot say: its readers take 4 and 350",
        ),
    ],
)
def test_a_single_file_takes_no_task_that_it_cannot_hold(
    task: Task, more: dict[str, Any], says: str, tmp_path: Path
) -> None:
    """All of these have no parts but text encoders; the scale is that of the kind that it would be taken for."""
    model, out = fakes.base_model(tmp_path / "model"), tmp_path / "model.safetensors"
    vae = model / "vae" / "config.json"
    scale = SCALES["upscaler" if "num_class_embeds" in more else "inpainting"]
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"scaling_factor": scale}))
    build_unet(fakes.UNET | more).save_pretrained(model / "unet")
    task.save(model)
    with pytest.raises(UserError, match=says):
        export.main([str(model), "--format", "single-file", "--out", str(out)])
    assert not out.exists()


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


ATTENDS_TO_NOTHING = {
    "down_block_types": ["AttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
    "cross_attention_dim": [None, None],
}  # fmt: skip
NAMES = ["dog", "cat", "ground"]
# Task, what its U-Net has beside the latents' channels, what is drawn of it, its part's tensors.
WITHOUT_PIPELINE: dict[str, tuple[Task, dict[str, Any], list[str], int]] = {
    "class": (Task("class_to_image", {}, NAMES), {}, ["--label", "cat"], 1),
    "layout": (
        Task("layout_to_image", {"boxes": 3, "bins": 5, "layers": 1, "heads": 2}, NAMES),
        {},
        ["--layout", "boxes.json"],
        2 + 12 + 2,
    ),
    "map": (
        Task("semantic_synthesis", {"channels": 2}, NAMES),
        {"in_channels": 6, **ATTENDS_TO_NOTHING},
        ["--map", "map.png"],
        1,
    ),
    "hole": (
        Task("inpainting"),
        {"in_channels": 9, **ATTENDS_TO_NOTHING},
        ["--image", "picture.png", "--mask", "hole.png"],
        0,
    ),
    "enlarged": (
        Task("super_resolution"),
        {"in_channels": 7, **ATTENDS_TO_NOTHING},
        ["--image", "small.png"],
        0,
    ),
}


def conditioner(task: Task, *, attends: bool) -> Conditioner:
    space = LatentSpace(fakes.SCALE, 0.0)
    given = Given(32 if attends else None, latent_channels=4, downsample=4, space=space, classes=task.classes)
    return tasks.make(task.name, task.options, given)


@pytest.mark.parametrize("case", WITHOUT_PIPELINE)
def test_what_no_pipeline_knows_draws_the_same_after_export(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run without captions, of the flow as the small experiments are, with what its condition is made of."""
    task, more, asked, tensors = WITHOUT_PIPELINE[case]
    run, out = fakes.full_run(tmp_path / "run"), tmp_path / "out"
    shutil.rmtree(run / "tokenizer")
    settings = fakes.config(model={"vae": str(run / "vae")}, objective={"prediction": "flow"})
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    task.save(run)
    for seed, weights in enumerate(sorted(run.glob("checkpoints/*/*/"))):
        shutil.rmtree(weights / "text_encoder")
        build_unet(fakes.UNET | more, seed=seed).save_pretrained(weights / "unet")
        for name, part in conditioner(task, attends="cross_attention_dim" not in more).parts().items():
            (weights / name).mkdir()
            generator = torch.Generator().manual_seed(seed)
            made = {key: torch.randn(of.shape, generator=generator) for key, of in part.state_dict().items()}
            save_file(made, weights / name / "model.safetensors")
    export.main([str(run), "--format", "diffusers", "--out", str(out)])
    assert f"no pipeline of diffusers knows task={task.name}" in capsys.readouterr().out
    parts, again = load_components(run), load_components(out)
    assert len(again.conditioner.state_dict()) == tensors
    for name, module in modules(parts).items():
        assert_same(modules(again)[name], module, name)
    assert (again.task, again.latents, again.is_flow) == (parts.task, parts.latents, True)

    monkeypatch.chdir(tmp_path)
    Path("boxes.json").write_text(json.dumps([["dog", 0, 0, 0.5, 1], ["cat", 0.5, 0.25, 1, 1]]))
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(3, size=(32, 32), dtype=np.uint8)).save("map.png")
    Image.fromarray(random.integers(256, size=(32, 32, 3), dtype=np.uint8)).save("picture.png")
    Image.fromarray(random.integers(256, size=(8, 8, 3), dtype=np.uint8)).save("small.png")
    Image.fromarray(np.where(np.arange(32) < 16, np.uint8(255), np.uint8(0))[None].repeat(32, 0)).save("hole.png")
    for source in (run, out):
        size = [] if case in ("map", "hole", "enlarged") else ["--height", "32", "--width", "32"]
        argv = [str(source), *asked, *size, "--steps", "2", "--guidance", "3", "--device", "cpu"]
        sample.main([*argv, "--out", f"{source.name}.png"])
    np.testing.assert_array_equal(np.asarray(Image.open("out.png")), np.asarray(Image.open("run.png")))
    with pytest.raises(UserError, match="which no reader of such files expects"):
        export.main([str(run), "--format", "single-file", "--out", "model.safetensors"])
