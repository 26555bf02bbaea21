"""Every experiment runs: two steps at tiny size, with validation, a sample grid and a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.config import Config, compose
from tests import fakes
from tests.conftest import ROOT, UNET, metrics

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


@pytest.fixture(scope="module")
def models(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model of the form of a published one, by its hub id."""
    from finetune.models.unet import build_unet

    folder = tmp_path_factory.mktemp("models")

    def with_unet(name: str, **changes: Any) -> Path:
        if not (folder / name).exists():
            shutil.copytree(pipeline, folder / name)
            build_unet({**UNET, **changes}).save_pretrained(folder / name / "unet")
        return folder / name

    def of(hub_id: str) -> Path:
        if "xl" in hub_id:
            channels = 9 if "inpainting" in hub_id else 4
            made = folder / f"xl-{channels}"
            return made if made.exists() else fakes.tiny_sdxl(made, in_channels=channels)
        if "inpainting" in hub_id:
            return with_unet("inpainting", in_channels=9)
        if hub_id == "emoji-base":  # three levels, of which the last is trained
            downs, ups = ["DownBlock2D", *UNET["down_block_types"]], [*UNET["up_block_types"], "UpBlock2D"]
            return with_unet("emoji", block_out_channels=[16, 32, 32], down_block_types=downs, up_block_types=ups)
        if "x4" in hub_id:
            return with_unet("upscaler", in_channels=7, num_class_embeds=1000)
        return pipeline

    return of


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_runs_two_steps(
    experiment: str,
    labelled: Path,
    pipeline: Path,
    models: Callable[[str], Path],
    tmp_path: Path,
    command: Callable[..., tuple[int, str]],
) -> None:
    overrides = [f"experiment={experiment}", f"data.shards={labelled}"]
    config, _ = compose("train", overrides, Config)
    if config.model.pretrained is not None:
        overrides += [f"model.pretrained={models(config.model.pretrained)}", f"model.vae={pipeline}"]
    else:
        levels = len(config.model.unet["block_out_channels"])
        overrides += [f"model.unet.block_out_channels={[16, 32, 32][:levels]}"]
    overrides += [
        f"run.dir={tmp_path / 'run'}",
        "train.steps=2",
        "train.global_batch=4",
        "train.micro_batch=2",
        "train.precision=fp32",
        "checkpoint.every=2",
        "validation.every=2",
        "validation.samples=2",
        "sample.every=2",
        "sample.steps=2",
        "tracker=none",
        "tracker.every=1",
    ]
    assert command("train", *overrides) == (0, "")
    lines = metrics(tmp_path / "run")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert any(np.isfinite(line.get("validation/loss", np.nan)) for line in lines)
    assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file()
    folder = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert json.loads((folder / "trainer.json").read_text())["step"] == 2
