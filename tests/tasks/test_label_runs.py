"""Labels, layouts and nothing at all, from pictures to pictures: shards, training, resume, samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune.cli import main
from finetune.components import load_components
from finetune.models import sources
from finetune.tasks import Task
from tests.scenes import write_scenes
from tests.tasks.runs import SMALL, Command, train_and_resume

Shards = dict[str, Path]


@pytest.fixture(scope="module")
def scene_latents(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """24 scenes of 32 px for each task, encoded by the tiny pipeline's autoencoder."""
    from data_tools.cli import main

    folder = tmp_path_factory.mktemp("scenes")
    pictures = write_scenes(folder, 24, 32)

    def encoded(name: str, *ingest: object) -> Path:
        images, latents = folder / f"{name}-images", folder / name
        assert main([*map(str, ["ingest", *ingest, "--out", images])]) in (0, None)
        assert main([*map(str, ["encode", images, "--vae", pipeline, "--size", 32, "--out", latents])]) in (0, None)
        return latents

    classes = encoded("classes", "folder", pictures, "--classes")
    boxes = encoded("boxes", "coco", folder / "instances.json", "--images", pictures)
    return {"class_to_image": classes, "layout_to_image": boxes, "unconditional": boxes}


def overrides(task: str, latents: Path, run: Path) -> list[str]:
    widths = [16, 32, 32] if task == "layout_to_image" else [16, 32]
    settings = [f"experiment=small_{task}", f"data.shards={latents}", f"run.dir={run}", *SMALL]
    return [*settings, f"model.unet.block_out_channels={widths}"]


def asked(task: str, folder: Path) -> list[list[str]]:
    """What `finetune sample` is given for one picture, and for another one."""
    layouts = [[["square", 0.1, 0.1, 0.6, 0.5]], [[1, 0.5, 0.1, 1, 0.5]]]
    for number, layout in enumerate(layouts):
        (folder / f"{number}.json").write_text(json.dumps(layout))
    return {
        "class_to_image": [["--label", "square"], ["--label", "0"]],
        "layout_to_image": [["--layout", f"{folder}/{number}.json"] for number in range(2)],
        "unconditional": [[], ["--seed", "1"]],
    }[task]


@pytest.mark.parametrize("task", ["class_to_image", "layout_to_image", "unconditional"])
def test_a_run_trains_resumes_and_draws(task: str, scene_latents: Shards, tmp_path: Path, command: Command) -> None:
    files = train_and_resume(command, lambda run: overrides(task, scene_latents[task], run), tmp_path)
    assert any("conditioner" in file.parts for file in files) == (task != "unconditional")
    pictures = []
    for number, options in enumerate(asked(task, tmp_path)):
        out = tmp_path / f"{number}.png"
        assert command("sample", str(tmp_path / "run"), *options, "--steps", "2", "--out", str(out)) == (0, "")
        pictures.append(np.asarray(Image.open(out)))
    assert pictures[0].shape == (32, 32, 3)
    assert not np.array_equal(pictures[0], pictures[1])


def test_several_pictures_of_nothing_are_a_grid(scene_latents: Shards, tmp_path: Path, command: Command) -> None:
    run, out = tmp_path / "run", tmp_path / "x.png"
    settings = [*overrides("unconditional", scene_latents["unconditional"], run), "train.steps=1", "sample.every=0"]
    assert command("train", *settings) == (0, "")
    assert command("sample", str(run), "--count", "4", "--steps", "1", "--out", str(out)) == (0, "")
    assert Image.open(out).size == (4 * 34 - 2, 32)


@pytest.mark.parametrize("task", ["class_to_image", "layout_to_image"])
def test_an_exported_model_is_gone_on_from_with_what_it_learnt_of_its_conditions(
    task: str, scene_latents: Shards, tmp_path: Path, command: Command
) -> None:
    first, model, second = (tmp_path / name for name in ("first", "model", "second"))
    quiet = ["train.steps=1", "sample.every=0", "validation.every=0"]
    assert command("train", *overrides(task, scene_latents[task], first), *quiet, "optim.lr=0.1") == (0, "")
    assert command("export", str(first), "--format", "diffusers", "--out", str(model)) == (0, "")
    settings = [*overrides(task, scene_latents[task], second)[:-1], *quiet, "model.unet={}", "seed=1"]
    settings += [f"model.pretrained={model}", "optim.lr=1e-12", "optim.warmup_images=0"]
    code, line = command("train", *settings, "model.unet.dropout=0.5")
    assert code == 2 and "model.unet.dropout=0.5 has no effect: the U-Net of model.pretrained has 0.0" in line
    assert command("train", *settings) == (0, "")
    learnt = load_file(model / "conditioner/model.safetensors")
    kept = load_file(second / "checkpoints/step-00000001/weights/conditioner/model.safetensors")
    assert learnt and all(torch.allclose(learnt[name], kept[name], atol=1e-6) for name in learnt)


def test_an_exported_model_on_the_hub_is_known_by_its_task(
    scene_latents: Shards, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was asked for a text encoder there, and training began its classes anew without a word."""
    task, (first, model, second) = "class_to_image", [tmp_path / name for name in ("first", "model", "second")]
    quiet = ["train.steps=1", "sample.every=0", "validation.every=0"]
    assert command("train", *overrides(task, scene_latents[task], first), *quiet, "optim.lr=0.1") == (0, "")
    assert command("export", str(first), "--format", "diffusers", "--out", str(model)) == (0, "")
    asked: list[str] = []

    def snapshot(name: str, *, allow_patterns: list[str], **_: object) -> str:
        assert name == "someone/model"
        asked.extend(allow_patterns)
        return str(model)

    monkeypatch.setattr(sources, "_on_the_hub", lambda name, revision: True)
    monkeypatch.setattr(sources.huggingface_hub, "snapshot_download", snapshot)
    learnt = load_file(model / "conditioner/model.safetensors")
    parts = load_components("someone/model")
    assert parts.task == Task.load(model) and {"task.json", "conditioner/*"} <= set(asked)
    assert torch.equal(parts.conditioner.parts()["conditioner"].weight, learnt["weight"])
    settings = [*overrides(task, scene_latents[task], second)[:-1], *quiet, "model.unet={}", "seed=1"]
    settings += ["model.pretrained=someone/model", "optim.lr=1e-12", "optim.warmup_images=0"]
    assert command("train", *settings) == (0, "")
    kept = load_file(second / "checkpoints/step-00000001/weights/conditioner/model.safetensors")
    assert torch.allclose(kept["weight"], learnt["weight"], atol=1e-6)


def test_a_start_that_was_refused_leaves_nothing_that_a_later_one_takes(
    latents: Path, scene_latents: Shards, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "run"
    settings = [*overrides("layout_to_image", scene_latents["layout_to_image"], run), "train.steps=1"]
    assert command("train", *settings, "task.options.boxes=30", "sample.height=33")[0] == 2
    assert command("train", *settings, "task.options.boxes=4") == (0, "")
    assert json.loads((run / "task.json").read_text())["options"]["boxes"] == 4
    code, line = command("train", *settings, "train.steps=2")
    assert code == 2 and "task.options.boxes was 4 and is 8 now; put it back" in line

    run = tmp_path / "captions"
    settings = ["experiment=smoke", f"data.shards={latents}", f"run.dir={run}", *SMALL, "train.steps=1"]
    settings += ["model.unet.block_out_channels=[16,32]", "model.text_encoder.max_length=5"]
    assert command("train", *settings, "model.text_encoder.hidden_size=48")[0] == 2
    assert command("train", *settings, "model.text_encoder.max_length=32") == (0, "")
    weights = run / "checkpoints/step-00000001/weights/text_encoder"
    assert json.loads((weights / "config.json").read_text())["max_position_embeddings"] == 32
    settings += ["model.text_encoder.max_length=32", "train.steps=2"]
    code, line = command("train", *settings, "model.unet.act_fn=gelu")
    assert code == 2 and "model.unet.act_fn was 'silu' and is 'gelu' now; put it back" in line


@pytest.mark.slow
def test_a_pretrained_model_learns_classes_by_lora(
    scene_latents: Shards, pipeline: Path, tmp_path: Path, command: Command
) -> None:
    """The conditioner is new, so it is trained whole beside the adapter, and kept."""
    run = tmp_path / "run"
    settings = ["experiment=smoke", "task=class_to_image", "adapter=lora", "adapter.rank=2", "model.unet={}"]
    settings += [f"model.pretrained={pipeline}", f"data.shards={scene_latents['class_to_image']}", *SMALL]
    assert command("train", *settings, "adapter.alpha=2", "optim.lr=0.1", f"run.dir={run}") == (0, "")
    halfway = tmp_path / "halfway"
    shutil.copytree(run, halfway, ignore=shutil.ignore_patterns("step-00000002*"))
    assert command("train", *settings, "adapter.alpha=2", "optim.lr=0.1", f"run.dir={halfway}") == (0, "")
    files = sorted(path.relative_to(run) for path in (run / "checkpoints/step-00000002").rglob("*.safetensors"))
    for file in files:
        assert (run / file).read_bytes() == (halfway / file).read_bytes()
    pictures = {}
    for step in ("1", "2"):
        for name in ("square", "circle"):
            out = tmp_path / f"{name}-{step}.png"
            options = ["--label", name, "--steps", "2", "--checkpoint", step, "--weights", "raw", "--out", str(out)]
            assert command("sample", str(run), *options) == (0, "")
            pictures[name, step] = np.asarray(Image.open(out)).astype(int)
    assert (pictures["square", "2"] != pictures["circle", "2"]).any()
    assert (pictures["square", "2"] != pictures["square", "1"]).any()
    code, line = command("export", str(run), "--format", "lora", "--out", str(tmp_path / "lora"))
    assert code == 2 and "trained its conditioner beside the LoRA" in line


@pytest.mark.parametrize(
    ("task", "more", "says"),
    [
        ("class_to_image", ["task.options.classes=3"], "a sample has no class: task=class_to_image needs"),
        ("class_to_image", [], "no classes.json is beside the shards: set task.options.classes=N"),
        ("layout_to_image", ["task.options.classes=3"], "a sample has no boxes: task=layout_to_image needs"),
        ("unconditional", ["model=small"], "this one attends to 128 features: choose a model"),
    ],
)
def test_what_shards_and_models_lack_is_said(
    task: str, more: list[str], says: str, latents: Path, tmp_path: Path, command: Command
) -> None:
    code, line = command("train", *overrides(task, latents, tmp_path / "run"), *more)
    assert code == 2 and says in line


def test_grids_that_nothing_is_drawn_for_are_told_of(
    scene_latents: Shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A class is asked for as a held-out sample has it."""
    latents = scene_latents["class_to_image"]
    small = ["train.steps=1", "sample.every=1", "validation.every=0"]
    for samples in ("0", "2"):
        run = tmp_path / samples
        more = [*small, f"validation.samples={samples}"]
        assert main(["train", *overrides("class_to_image", latents, run), *more]) == 0
        assert ("no sample grids: task=class_to_image" in capsys.readouterr().out) == (samples == "0")
        assert (run / "samples").is_dir() == (samples != "0")


def test_what_cannot_be_drawn_is_said(scene_latents: Shards, tmp_path: Path, command: Command) -> None:
    run, small = tmp_path / "run", ["train.steps=1", "sample.every=0", "validation.every=0"]
    assert command("train", *overrides("class_to_image", scene_latents["class_to_image"], run), *small) == (0, "")
    for options, says in (
        ([], "--label NAME is missing"),
        (["--label", "hexagon"], "--label hexagon: no such class; choose one of circle, square, triangle"),
        (["--label", "7"], "a sample's class is 7"),
        (["--prompt", "a square"], "--prompt is not for this model"),
        (["--label", "0", "--negative", "x"], "--negative has no effect: task=class_to_image takes no text"),
    ):
        code, line = command("sample", str(run), *options, "--out", str(tmp_path / "x.png"))
        assert code == 2 and says in line
