"""Tasks whose condition is laid out as the picture is: from pictures to shards, runs, resumed runs and samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import metrics
from tests.scenes import draw_scene, write_scenes
from tests.tasks.runs import SMALL, Command, train_and_resume

TASKS = {
    "semantic_synthesis": ["task.options.channels=2"],
    "inpainting": [],
    "super_resolution": ["model.unet.num_class_embeds=1000", "task.options.noise_levels=50"],
}


@pytest.fixture(scope="module")
def scene_latents(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 scenes of 32 px with all that the tasks read, encoded by the tiny pipeline's autoencoder."""
    from data_tools.cli import main

    folder = tmp_path_factory.mktemp("scenes")
    pictures = write_scenes(folder, 24, 32)
    ingest = ["ingest", "folder", pictures, "--maps", folder / "maps", "--classes", "--out", folder / "images"]
    encode = ["encode", folder / "images", "--vae", pipeline, "--size", 32, "--out", folder / "latents"]
    assert main([str(word) for word in ingest]) in (0, None)
    assert main([str(word) for word in [*encode, "--holes", 2, "--lowres", 4]]) in (0, None)
    return folder / "latents"


def overrides(task: str, latents: Path, run: Path) -> list[str]:
    narrow = "model.unet.block_out_channels=[16,32]"
    return [f"experiment=small_{task}", f"data.shards={latents}", f"run.dir={run}", *SMALL, narrow, *TASKS[task]]


def asked(task: str, folder: Path, size: int) -> list[str]:
    """What `finetune sample` is given, for a picture of this size."""
    picture, _, labels, _ = draw_scene(500, size)
    Image.fromarray(labels).save(folder / "map.png")
    Image.fromarray(picture).save(folder / "image.png")
    Image.fromarray(picture).resize((size // 4, size // 4)).save(folder / "small.png")
    hole = np.zeros((size, size), np.uint8)
    hole[4:20, 4:20] = 255
    Image.fromarray(hole).save(folder / "hole.png")
    return {
        "semantic_synthesis": ["--map", f"{folder / 'map.png'}"],
        "inpainting": ["--image", f"{folder / 'image.png'}", "--mask", f"{folder / 'hole.png'}"],
        "super_resolution": ["--image", f"{folder / 'small.png'}", "--noise-level", "5"],
    }[task]


@pytest.mark.parametrize("task", TASKS)
def test_a_run_trains_resumes_and_draws(task: str, scene_latents: Path, tmp_path: Path, command: Command) -> None:
    files = train_and_resume(command, lambda run: overrides(task, scene_latents, run), tmp_path)
    learned = any("conditioner" in file.parts for file in files)
    assert learned == (task == "semantic_synthesis"), "what the condition learns is kept with the rest"
    for size in (32, 64):
        out = tmp_path / f"{size}.png"
        options = ["--steps", "2", "--out", str(out)]
        assert command("sample", str(tmp_path / "run"), *asked(task, tmp_path, size), *options) == (0, "")
        assert Image.open(out).size == (size, size)


@pytest.mark.parametrize(
    ("experiment", "task", "unet"),
    [
        ("sd15_inpainting", "inpainting", {"in_channels": 9}),
        ("sd_x4_upscaler", "super_resolution", {"in_channels": 7, "num_class_embeds": 1000}),
    ],
)
def test_models_of_captions_and_channels_are_fine_tuned_and_draw(
    experiment: str,
    task: str,
    unet: dict[str, int],
    pipeline: Path,
    scene_latents: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    """Stable Diffusion's own, at tiny size: a diffusers folder with such a U-Net."""
    from finetune.models.unet import build_unet

    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(pipeline, model, ignore=shutil.ignore_patterns("unet"))
    config = json.loads((pipeline / "unet" / "config.json").read_text())
    build_unet({**config, **unet}).save_pretrained(model / "unet")
    settings = [f"experiment={experiment}", f"model.pretrained={model}", f"data.shards={scene_latents}", *SMALL]
    assert command("train", *settings, f"run.dir={run}", "train.micro_batch=2") == (0, "")
    assert np.isfinite([line["loss"] for line in metrics(run) if "loss" in line]).all()
    drawn = []
    for prompt in ("a red circle", "a blue square"):
        out = tmp_path / f"{len(drawn)}.png"
        options = ["--prompt", prompt, "--guidance", "5", "--steps", "2", "--out", str(out)]
        assert command("sample", str(run), *asked(task, tmp_path, 32), *options) == (0, "")
        drawn.append(np.asarray(Image.open(out)))
    assert (drawn[0] != drawn[1]).any(), "the caption is heard as well"


@pytest.mark.parametrize(
    ("task", "error"),
    [
        ("semantic_synthesis", "map.png"),
        ("inpainting", "hole.npy"),
        ("super_resolution", "lowres.png"),
    ],
)
def test_shards_without_the_condition_are_refused(
    task: str, error: str, latents: Path, tmp_path: Path, command: Command
) -> None:
    more = ["task.options.labels=3"] if task == "semantic_synthesis" else []
    code, line = command("train", *overrides(task, latents, tmp_path / "run"), *more)
    assert code == 2 and error in line and task in line
