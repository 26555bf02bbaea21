"""Every strategy is DDP with its parts elsewhere: the same losses, weights, averages, moments and pictures."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from finetune import cli
from finetune.components import load_components
from tests.conftest import metrics
from tests.strategies.conftest import LONG, STEPS, Run

ZERO = ("zero1", "zero2", "zero3")
BF16 = ("train.precision=bf16",)
LAYOUT = ("model.channels_last=false",)  # what a GPU has by default; a CPU has channels-last
ONE = ("train.micro_batch=1",)  # four processes have samples for no more in a batch of eight
AVERAGES = ("ema", "ema-short", "ema-power-0.1")

slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(3600)  # the first test that needs them makes the runs of all
# Those that are not slow are made in one launch of two processes.
PAIRS = [("full", "zero2"), ("full", "zero3"), ("lora", "zero1"), ("lora", "zero3")]
GOING_ON = [
    ("full", "ddp", "zero3"),
    ("full", "zero3", "ddp"),
    ("lora", "zero1", "zero3"),
    ("lora", "zero3", "ddp"),
]
QUICK = [Run(adapter, "ddp") for adapter in ("full", "lora")] + [Run(*pair) for pair in PAIRS]
QUICK += [Run(adapter, then, start=Run(adapter, first)) for adapter, first, then in GOING_ON]


def tensors(run: Path, part: str, folder: str = "") -> dict[str, torch.Tensor]:
    """Tensors of a part of the last checkpoint, or of a folder like it, by file and name."""
    place = run / folder if folder else max((run / "checkpoints").glob("step-*"))
    files = sorted((place / part).rglob("*.safetensors"))
    return {f"{file.relative_to(run)} {key}": t for file in files for key, t in load_file(file).items()}


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over norm."""
    assert one.keys() == other.keys()
    assert all(one[key].shape == other[key].shape for key in one)
    first, second = (torch.cat([named[key].flatten().double() for key in sorted(one)]) for named in (one, other))
    return float(torch.linalg.norm(first - second) / torch.linalg.norm(first))


def logged(run: Path, key: str) -> np.ndarray:
    return np.array([line[key] for line in metrics(run) if key in line])


def picture(run: Path) -> np.ndarray:
    return np.asarray(Image.open(max((run / "samples").glob("step-*.png"))), dtype=float)


def require_same(run: Path, reference: Path, *, rtol: float, levels: float) -> None:
    """The run's logs, weights, averages, moments and sample grids are the reference's."""
    settings = yaml.safe_load((reference / "config.yaml").read_text())
    steps = settings["train"]["steps"]
    for key in ("loss", "grad_norm", "validation/loss"):
        assert len(logged(reference, key)) == {"validation/loss": 1}.get(key, steps)
        np.testing.assert_allclose(logged(run, key), logged(reference, key), rtol=rtol, err_msg=key)
    np.testing.assert_array_equal(logged(run, "lr"), logged(reference, "lr"))
    assert logged(reference, "grad_norm").min() > settings["optim"]["max_grad_norm"], "clipping must clip"
    for part in ("weights", *AVERAGES):
        assert apart(tensors(reference, part), tensors(run, part)) < rtol, part
    for step in (steps // 2, steps):
        snapshots = [tensors(path, "power-0.1", f"snapshots/step-{step:08d}") for path in (reference, run)]
        assert len(snapshots[0]) > 0 and apart(*snapshots) < rtol, step
    assert apart(tensors(reference, "optimizer"), tensors(run, "optimizer")) < 10 * rtol
    assert abs(picture(run) - picture(reference)).mean() < levels


@pytest.fixture(scope="module")
def quick(lab: Any) -> Any:
    lab.make(*QUICK)
    return lab


@pytest.mark.parametrize(("adapter", "strategy"), PAIRS)
def test_zero_is_ddp_in_float32(quick, adapter, strategy):
    require_same(quick(Run(adapter, strategy)), quick(Run(adapter, "ddp")), rtol=1e-5, levels=0.05)


@slow
@pytest.mark.parametrize("strategy", ZERO)
@pytest.mark.parametrize("adapter", ["dora", "lora_conv"])
def test_magnitudes_and_adapted_convolutions_are_the_same_under_zero(lab, adapter, strategy):
    runs = {name: Run(adapter, name, steps=LONG) for name in ("ddp", *ZERO)}
    lab.make(*(Run(other, name, steps=LONG) for other in ("dora", "lora_conv") for name in runs))
    require_same(lab(runs[strategy]), lab(runs["ddp"]), rtol=1e-5, levels=0.05)


@pytest.mark.parametrize(("adapter", "first", "then"), GOING_ON)
def test_a_run_goes_on_under_another_strategy(quick, adapter, first, then):
    """The whole matrix, over numbers of processes too, is in test_resume.py."""
    calm, run = quick(Run(adapter, first)), quick(Run(adapter, then, start=Run(adapter, first)))
    assert logged(run, "loss")[: STEPS // 2].tolist() == logged(calm, "loss")[: STEPS // 2].tolist()
    require_same(run, calm, rtol=1e-5, levels=0.05)


def require_same_in_bf16(run: Path, reference: Path) -> None:
    """bf16 keeps 8 bits: a number is rounded by up to 0.4%. ZeRO rounds weights, DDP's autocast what it multiplies.

    Both round different numbers, and Adam's first steps follow signs: the tolerance for weights is 1%.
    """
    np.testing.assert_allclose(logged(run, "loss"), logged(reference, "loss"), rtol=0.01)
    np.testing.assert_allclose(logged(run, "validation/loss"), logged(reference, "validation/loss"), rtol=0.01)
    for part in ("weights", "ema"):
        assert 0 < apart(tensors(reference, part), tensors(run, part)) < 0.01
    assert abs(picture(run) - picture(reference)).mean() < 4


@slow
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("strategy", [*ZERO, "zero3_offload"])
def test_zero_follows_ddp_in_bf16(lab, adapter, processes, strategy):
    runs = {
        name: Run(adapter, name, processes, (*BF16, *ONE), steps=LONG) for name in ("ddp", *ZERO, "zero3_offload")
    }
    lab.make(*runs.values())
    require_same_in_bf16(lab(runs[strategy]), lab(runs["ddp"]))


@slow
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("strategy", ["ddp", *ZERO])
def test_the_number_of_processes_does_not_matter(lab, adapter, processes, strategy):
    """Whatever the strategy and the micro-batch, in float32."""
    reference = Run(adapter, "ddp", steps=LONG)
    runs = {name: Run(adapter, name, processes, ONE, steps=LONG) for name in ("ddp", *ZERO)}
    lab.make(*runs.values(), reference)
    require_same(lab(runs[strategy]), lab(reference), rtol=1e-5, levels=0.05)


@slow
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("strategy", ["zero3_offload", *ZERO])
def test_offload_and_the_other_layout_change_nothing(lab, adapter, strategy):
    """float32; `optimizer` holds squares of gradients near zero, where another order of sums shows most."""
    reference, offloaded = (Run(adapter, name, steps=LONG) for name in ("ddp", "zero3_offload"))
    runs = {name: Run(adapter, name, more=LAYOUT, steps=LONG) for name in ("zero3_offload", *ZERO)}
    in_files = ("strategy.offload=nvme", f"strategy.offload_path={tempfile.gettempdir()}")
    filed = Run(adapter, "zero3_offload", more=in_files, steps=LONG)
    lab.make(*runs.values(), reference, offloaded, filed)
    require_same(lab(runs[strategy]), lab(reference), rtol=1e-5, levels=0.05)
    if strategy == "zero3_offload":
        require_same(lab(offloaded), lab(reference), rtol=1e-5, levels=0.05)
        require_same(lab(filed), lab(offloaded), rtol=1e-12, levels=1e-9)  # to the bit


@pytest.mark.parametrize("strategy", ["zero3"])
def test_what_zero_saves_is_exported_like_any_run(quick, strategy, tmp_path, capsys):
    """Averaged weights load into diffusers' modules in its shapes, and are an average, not the last ones."""
    run = quick(Run("full", strategy))
    averaged, raw = load_components(run, weights="ema"), load_components(run, weights="raw")
    moved = averaged.unet.conv_in.weight - raw.unet.conv_in.weight
    assert averaged.unet.conv_in.weight.shape == (16, 4, 3, 3)
    assert 0 < moved.abs().max() < 0.05
    for adapter, form in (("full", "diffusers"), ("lora", "lora")):
        files = []
        for name in (strategy, "ddp"):
            out = tmp_path / f"{form}-{name}"
            assert cli.main(["export", str(quick(Run(adapter, name))), "--format", form, "--out", str(out)]) == 0
            files.append({f"{p.relative_to(out)}": load_file(p) for p in sorted(out.rglob("*.safetensors"))})
        assert files[0].keys() == files[1].keys()
        for name in files[0]:
            assert apart(files[1][name], files[0][name]) < 1e-5
