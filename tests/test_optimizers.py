"""Optimizers: each takes its library's steps, under every strategy that it goes with, and goes on exactly."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import pytorch_optimizer
import torch
from torch import nn
from transformers.optimization import Adafactor

from finetune import UserError
from finetune.distributed import KINDS, World
from finetune.runs import find_checkpoint
from tests.conftest import metrics
from tests.strategies.conftest import spawn
from tests.strategies.optimizing import (
    SAVED,
    SETTINGS,
    SKIPPED,
    STEPS,
    ZEROS,
    Model,
    learning_rate,
    make,
    pictures,
    run,
    saved,
    step,
)
from tests.test_train import parts_of

Command = Callable[..., tuple[int, str]]
ALONE = World(0, 1, 0, torch.device("cpu"))


def library(kind: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    settings = SETTINGS[kind]
    betas, decay, eps = (settings.beta1, settings.beta2), settings.weight_decay, settings.eps
    match kind:
        case "adamw":
            return torch.optim.AdamW(groups, betas=betas, weight_decay=decay, eps=eps)
        case "adamw8bit":
            return bitsandbytes.optim.AdamW8bit(groups, betas=betas, weight_decay=decay, eps=eps)
        case "adafactor":
            return Adafactor(groups, lr=1.0, scale_parameter=False, relative_step=False, weight_decay=decay)
        case "lion":
            return pytorch_optimizer.Lion(groups, betas=betas, weight_decay=decay)
        case "prodigy":
            own = {"bias_correction": True, "safeguard_warmup": True, "d0": settings.d0}
            return pytorch_optimizer.Prodigy(groups, betas=betas, weight_decay=decay, eps=eps, **own)
    return pytorch_optimizer.ScheduleFreeAdamW(groups, betas=betas, weight_decay=decay, eps=eps)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_library(kind: str) -> None:
    """On plain parameters with clipped gradients; a step that is not finite leaves everything as it is."""
    model = Model()
    named = dict(model.named_parameters())
    # Adafactor is given a convolution as a matrix.
    plain = {
        n: nn.Parameter(p.detach().flatten(1).clone() if p.ndim > 2 else p.detach().clone())
        for n, p in named.items()
    }
    ratios = {n: 0.5 if ".conv." in n and kind != "prodigy" else 1.0 for n in plain}
    groups = [
        {"params": [p for n, p in plain.items() if ratios[n] == r], "ratio": r}
        for r in sorted(set(ratios.values()))
    ]
    optimizer = library(kind, groups)
    strategy = make(ALONE, kind)
    for number in range(STEPS):
        step(strategy, number)
        if number == SKIPPED:
            continue
        model.zero_grad()
        model(pictures(number)).mean().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.1
        for name, p in named.items():
            plain[name].grad = p.grad.view(plain[name].shape).clone()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(kind, number) * group["ratio"]
        optimizer.step()
        for name, p in named.items():  # the library's point is where gradients are taken next
            p.data.copy_(plain[name].view(p.shape))
    assert strategy.steps_taken == STEPS - 1
    if kind == "schedule_free":
        optimizer.eval()
    moved = dict(Model().named_parameters())
    for shard, weights in zip(strategy.shards, strategy.weights(), strict=True):
        torch.testing.assert_close(weights, plain[shard.name].view(shard.shape), rtol=1e-6, atol=1e-6)
        assert (weights - moved[shard.name]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    run(tmp_path / "whole", make(ALONE, kind))
    run(tmp_path / "half", make(ALONE, kind), tmp_path / "whole")
    whole, half = saved(tmp_path / "whole"), saved(tmp_path / "half")
    assert whole.keys() == half.keys()
    assert all(torch.equal(tensor, half[name]) for name, tensor in whole.items())
    before = saved(tmp_path / "whole", SAVED)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in whole.items() if "/p0." not in name)
    records = [
        json.loads((tmp_path / name / f"checkpoints/step-{STEPS:08d}/trainer.json").read_text())
        for name in ("whole", "half")
    ]
    assert records[0]["optimizer"] == records[1]["optimizer"]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes."""
    folder = tmp_path_factory.mktemp("together")
    spawn(2, Path(__file__).parent / "strategies" / "optimizing.py", str(folder))
    return folder


def close(one: Path, other: Path) -> None:
    ours, theirs = saved(one), saved(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one_and_one_goes_on_from_two(kind: str, together: Path, tmp_path: Path) -> None:
    run(tmp_path / "alone", make(ALONE, kind))
    run(tmp_path / "on", make(ALONE, kind), together / kind / "ddp")
    if kind == "adamw8bit":  # a last bit of a gradient may decide which of 256 values a moment becomes
        ours, theirs = saved(tmp_path / "on"), saved(together / kind / "ddp")
        assert all(torch.allclose(ours[n], t, atol=1e-3) for n, t in theirs.items() if n.startswith("weights"))
        return
    close(together / kind / "ddp", tmp_path / "alone")
    close(together / kind / "ddp", tmp_path / "on")


@pytest.mark.parametrize("kind", ["lion", "schedule_free"])
def test_elementwise_optimizers_take_the_same_steps_under_zero(kind: str, together: Path) -> None:
    """From the first step, and from the checkpoint of another strategy."""
    for name in (*ZEROS, "ddp-zero3", "zero2-zero2", "zero3-ddp", "zero1-zero3_offload"):
        close(together / kind / name, together / kind / "ddp")


def test_what_is_evaluated_and_saved_is_the_average(overrides: list[str], command: Command, tmp_path: Path) -> None:
    """Of schedule_free; and the command's run goes on from its checkpoint to the same bits."""
    settings = [*overrides, "optim=schedule_free", "optim.warmup_images=16", "validation.every=2"]
    _, parts = parts_of(settings, f"run.dir={tmp_path / 'apart'}")
    for number, shard in enumerate(parts.strategy.shards):
        torch.manual_seed(number)
        parts.strategy.moments("z")[number].copy_(torch.randn(shard.master.shape))
    trained, average = [shard.master.clone() for shard in parts.strategy.shards], parts.strategy.weights()
    assert not any(torch.equal(one, other) for one, other in zip(trained, average))
    with parts.evaluating():
        assert all(torch.equal(shard.master, x) for shard, x in zip(parts.strategy.shards, average))
    assert all(torch.equal(shard.master, y) for shard, y in zip(parts.strategy.shards, trained))

    assert command("train", *settings)[0] == 0
    half = [*settings, f"run.dir={tmp_path / 'half'}"]
    assert command("train", *half, "train.steps=2")[0] == 0
    assert command("train", *half)[0] == 0
    assert metrics(tmp_path / "run")[-1] == metrics(tmp_path / "half")[-1]
    one, other = saved(tmp_path / "run", 4), saved(tmp_path / "half", 4)
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    weights = "weights/unet/diffusion_pytorch_model.safetensors:conv_in.weight"
    y, z = (one[f"optimizer/{name}.safetensors:unet.conv_in.weight"] for name in "yz")
    torch.testing.assert_close(y, 0.9 * one[weights] + 0.1 * z)
    assert find_checkpoint(tmp_path / "run").notices == ()  # of an average that it lacks
    code, line = command("train", *half, "optim=lion", "train.steps=6")
    assert (code, "optim.kind was 'schedule_free' and is 'lion' now" in line) == (2, True), line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("optim.kind=sgd", "optim.kind=sgd is not known"),
        ("optim=adafactor strategy=zero2", "optim=adafactor needs whole weights, which no rank has under ZeRO"),
        ("optim=adamw8bit strategy=zero1", "optim=adamw8bit needs whole weights"),
        ("optim=prodigy optim.lr=1 strategy=zero3", "optim=prodigy needs a sum over all weights"),
        ("optim=adafactor model.channels_last=true", "model.channels_last=true does not go with optim=adafactor"),
        ("optim=prodigy", "optim.lr=0.001 with optim=prodigy: it finds the learning rate"),
        ("optim=prodigy optim.lr=1 optim.lr_ratios.up_blocks=0.5", "optim=prodigy has one learning rate"),
        ("optim=schedule_free optim.schedule=cosine", "optim.schedule=cosine with optim=schedule_free"),
        ("optim=schedule_free ema.enabled=true", "averages weights itself: set ema.enabled=false"),
        ("optim=schedule_free optim.beta1=0", "optim.beta1=0 with optim=schedule_free"),
        ("optim.d_coef=0", "optim.d_coef=0.0 must be greater than 0"),
    ],
)
def test_what_an_optimizer_cannot_do_is_refused(overrides: list[str], words: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parts_of(overrides, *words.split())


def test_a_missing_library_is_one_line(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ldm-finetune\[optim8bit\]'"):
        parts_of(overrides, "optim=adamw8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'ldm-finetune\[optim8bit\]'"):
        make(ALONE, "adamw8bit")
