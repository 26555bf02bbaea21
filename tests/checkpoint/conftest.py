"""A tiny run's parts, and checkpoints of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import build
from finetune.checkpoint import Progress
from finetune.config import Config, compose
from finetune.distributed import World
from finetune.loop import Parts

Command = Callable[..., tuple[int, str]]
ALONE = World(0, 1, 0, torch.device("cpu"))


def parts_of(overrides: list[str], *more: str) -> Parts:
    config = compose("train", [*overrides, *more], Config)[0]
    build.check(config)
    run = Path(config.run.dir)
    run.mkdir(parents=True, exist_ok=True)
    return build.build(config, ALONE, run)


def progress_at(step: int, **more: Any) -> Progress:
    return Progress(step=step, images_seen=8 * step, steps_taken=step, **more)


def disturb(parts: Parts) -> None:
    """Make weights, average and moments what no fresh run has."""
    generator = torch.Generator().manual_seed(1)
    assert parts.average is not None
    tensors = [shard.master for shard in parts.strategy.shards] + parts.average.tensors
    tensors += parts.strategy.moments("exp_avg") + parts.strategy.moments("exp_avg_sq")
    for tensor in tensors:
        tensor.copy_(torch.rand(tensor.shape, generator=generator))
    parts.strategy.set_steps_taken(7)


@pytest.fixture(scope="module")
def intact(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to copy and damage."""
    run = tmp_path_factory.mktemp("intact")
    parts = parts_of(["experiment=smoke", f"data.shards={latents}", f"run.dir={run}", "sample.every=0"])
    parts.checkpoints.save(progress_at(4), parts.strategy, parts.averages)
    return parts.checkpoints.folder / "step-00000004"


@pytest.fixture
def saved(overrides: list[str]) -> tuple[Parts, Path]:
    """A run's parts and the checkpoint that they were saved in."""
    parts = parts_of(overrides)
    disturb(parts)
    parts.checkpoints.save(progress_at(4), parts.strategy, parts.averages)
    return parts, parts.checkpoints.folder / "step-00000004"
