"""A short run of a task, and the same gone on with from half way."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.conftest import metrics

Command = Callable[..., tuple[int, str]]

SMALL = [
    "tracker=none",
    "train.steps=2",
    "train.global_batch=4",
    "checkpoint.every=1",
    "checkpoint.keep=2",
    "validation.every=2",
    "validation.samples=2",
    "sample.every=2",
    "sample.steps=2",
]


def train_and_resume(command: Command, settings: Callable[[Path], list[str]], folder: Path) -> list[Path]:
    """Train two steps in folder/run, and the second once more from the first one's checkpoint: to the same bits.

    Args:
        settings: what is trained, by the run's folder.

    Returns:
        The files of the last checkpoint, relative to the run.
    """
    run, halfway = folder / "run", folder / "halfway"
    assert command("train", *settings(run)) == (0, "")
    lines = metrics(run)
    assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()
    assert any(np.isfinite(line.get("validation/loss", np.nan)) for line in lines)
    assert (run / "samples" / "step-00000002.png").is_file()

    shutil.copytree(run, halfway, ignore=shutil.ignore_patterns("step-00000002*"))
    assert command("train", *settings(halfway)) == (0, "")
    last = run / "checkpoints/step-00000002"
    files = sorted(path.relative_to(run) for path in last.rglob("*.safetensors"))
    assert files
    for file in files:
        assert (run / file).read_bytes() == (halfway / file).read_bytes(), f"{file} after going on from step 1"
    return files
