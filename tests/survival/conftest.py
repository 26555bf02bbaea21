"""A run long enough to be disturbed, and how it ends when it is left alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.survival.runs import Run

STEPS = 60


@pytest.fixture(scope="session")
def settings(latents: Path) -> list[str]:
    """Bounds of seconds in place of minutes."""
    return [
        "experiment=smoke",
        f"data.shards={latents}",
        "tracker=none",
        "tracker.every=1",
        "model.unet.block_out_channels=[16,32]",
        "model.unet.attention_head_dim=2",
        "data.readers=1",
        "data.prefetch=1",
        f"train.steps={STEPS}",
        "checkpoint.every=10",
        "validation.every=0",
        "sample.every=0",
        "watch.lost_s=4",
        "watch.start_s=60",
    ]


@pytest.fixture(scope="session")
def calm(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run of two ranks."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    with Run(folder, settings) as run:
        assert run.end() == 0, run.output[-4000:]
    return folder


@pytest.fixture(autouse=True)
def _no_inherited_ranks() -> None:
    assert "RANK" not in os.environ
