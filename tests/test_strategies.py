"""Every strategy in two real gloo processes, started by accelerate with the committed file, against DDP."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune import UserError
from finetune.distributed import require_agreement
from finetune.models.components import load_components
from tests.conftest import ROOT, environment, launch, metrics

STEPS = 20
ZERO = ("zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def settings(pipeline: Path, latents: Path) -> dict[str, list[str]]:
    """EMA, sampling, validation and accumulation on, in bf16."""
    common = [
        "experiment=smoke",
        f"data.shards={latents}",
        "tracker=none",
        "train.precision=bf16",
        f"train.steps={STEPS}",
        "train.micro_batch=2",
        "checkpoint.every=20",
        "sample.steps=2",
        "ema.halflife_images=40",
        "ema.rampup_ratio=1",
    ]
    tuned = [f"model.pretrained={pipeline}", "model.unet={}"]
    return {
        "full": [*common, "model.unet.block_out_channels=[16,32]", "model.unet.attention_head_dim=2"],
        "lora": [*common, *tuned, "adapter=lora", "adapter.rank=4", "optim.lr=3e-3"],
    }


@pytest.fixture(scope="module")
def runs(settings, tmp_path_factory):
    """`runs("full", "zero2")`: the folder of a finished run, made once."""
    made: dict[tuple[str, str], Path] = {}

    def run(adapter: str, strategy: str, *more: str, processes: int = 2) -> Path:
        key = (adapter, strategy, *more)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{adapter}-{strategy}")
            done = launch(processes, [*settings[adapter], f"strategy={strategy}", f"run.dir={folder}", *more])
            assert done.returncode == 0, done.stderr[-4000:]
            made[key] = folder
        return made[key]

    return run


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("strategy", [*ZERO, pytest.param("zero3_offload", marks=pytest.mark.slow)])
def test_zero_follows_ddp(runs, adapter, strategy):
    ddp, zero = runs(adapter, "ddp"), runs(adapter, strategy)
    losses = [np.array([line["loss"] for line in metrics(run) if "loss" in line]) for run in (ddp, zero)]
    assert len(losses[0]) == STEPS
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.03)
    held_out = [
        [line["validation/loss"] for line in metrics(run) if "validation/loss" in line] for run in (ddp, zero)
    ]
    assert held_out[1] == pytest.approx(held_out[0], rel=0.02)

    last = f"checkpoints/step-{STEPS:08d}"
    for part in ("weights", "ema"):
        files = sorted(str(p.relative_to(ddp)) for p in (ddp / last / part).rglob("*.safetensors"))
        assert files == sorted(str(p.relative_to(zero)) for p in (zero / last / part).rglob("*.safetensors"))
        for name in files:
            reference, other = load_file(ddp / name), load_file(zero / name)
            assert reference.keys() == other.keys()
            moved = torch.cat([t.flatten() for t in reference.values()])
            apart = torch.cat([t.flatten() for t in other.values()]) - moved
            assert torch.linalg.norm(apart) < 0.03 * torch.linalg.norm(moved)
    pictures = [
        np.asarray(Image.open(run / "samples" / f"step-{STEPS:08d}.png"), dtype=float) for run in (ddp, zero)
    ]
    assert abs(pictures[0] - pictures[1]).mean() < 4


@pytest.mark.parametrize("strategy", ZERO)
def test_what_zero_saves_is_used_like_any_run(runs, strategy):
    """The averaged weights of a ZeRO run load into diffusers' modules and are an average, not the last weights."""
    run = runs("full", strategy)
    averaged, raw = load_components(run, weights="ema"), load_components(run, weights="raw")
    apart = averaged.unet.conv_in.weight - raw.unet.conv_in.weight
    assert 0 < apart.abs().max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("zero2", "ddp"), ("ddp", "zero3"), ("zero3", "zero1")])
def test_another_strategy_goes_on_from_the_checkpoint(runs, settings, tmp_path, first, then):
    """fp32: ten steps under one strategy, ten under another, against twenty of DDP."""
    calm = runs("full", "ddp", "train.precision=fp32")
    shared = [*settings["full"], "train.precision=fp32", f"run.dir={tmp_path / 'run'}"]
    for strategy, steps in ((first, 10), (then, STEPS)):
        done = launch(2, [*shared, f"strategy={strategy}", f"train.steps={steps}"])
        assert done.returncode == 0, done.stderr[-4000:]
    losses = [[line["loss"] for line in metrics(run) if "loss" in line] for run in (calm, tmp_path / "run")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ZERO)
def test_zero_resumes_exactly(runs, settings, tmp_path, strategy):
    calm = runs("full", strategy, "checkpoint.every=10", "checkpoint.keep=9")
    shared = [*settings["full"], "checkpoint.every=10", f"strategy={strategy}", f"run.dir={tmp_path / 'run'}"]
    for steps in (10, STEPS):
        done = launch(2, [*shared, f"train.steps={steps}"])
        assert done.returncode == 0, done.stderr[-4000:]
    assert [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line] == [
        line["loss"] for line in metrics(calm) if "loss" in line
    ]


def test_layers_that_disagree_are_refused():
    require_agreement({"torch.distributed": (1, 2), "accelerate": (1, 2)})
    with pytest.raises(UserError, match=r"torch.distributed says rank 1 of 2, accelerate says rank 0 of 1"):
        require_agreement({"torch.distributed": (1, 2), "accelerate": (0, 1)})


def test_accelerate_counting_one_process_is_refused(tmp_path):
    """On a machine without a GPU Accelerate, told of DeepSpeed, sees one process: such a run must not start."""
    script = tmp_path / "fault.py"
    script.write_text(
        "from accelerate import PartialState\n"
        "from finetune import distributed, run_cli\n"
        "assert PartialState().num_processes == 1\n"
        "run_cli(lambda: distributed.start('cpu', uses_deepspeed=True) and 0)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    env = environment() | {"ACCELERATE_USE_DEEPSPEED": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(torchrun, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "the layers disagree on who is who" in done.stderr
    assert "accelerate says rank 0 of 1" in done.stderr


def test_a_deepspeed_launch_that_the_strategy_would_ignore_is_refused(overrides, command, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    code, line = command("train", *overrides)
    assert code == 2
    assert "strategy=ddp would ignore" in line


def test_a_global_batch_that_the_processes_cannot_share_is_refused(settings, tmp_path):
    done = launch(2, [*settings["full"], f"run.dir={tmp_path / 'run'}", "train.global_batch=7"])
    assert done.returncode != 0
    assert done.stderr.count("error: ") >= 1
    assert "train.global_batch=7 cannot be shared by 2 processes" in done.stderr
    assert not os.path.exists(tmp_path / "run" / "checkpoints")
