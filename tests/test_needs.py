"""What memory has to hold whatever the batches are: by hand, and refused where there is less."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finetune import UserError, build, memory
from finetune.build import needs
from finetune.build.needs import Weight, needs_of, require_memory
from finetune.config import Config, compose
from finetune.distributed import OptimizerSettings, World

TRAINED, FROZEN = 1000, 500


def of(**settings):
    weights = [Weight(TRAINED, 2, True), Weight(FROZEN, 2, False)]
    common = {"world_size": 4, "stage": 0, "offload": "none", "accumulation": 1, "averages": 1}
    return needs_of(weights, OptimizerSettings(), **(common | settings))


@pytest.mark.parametrize(
    ("settings", "device", "host"),
    [
        ({}, {"gradients": 2000, "weights": 3000, "moments": 8000, "average": 4000}, {}),
        ({"stage": 1}, {"gradients": 1000, "weights": 3000, "masters": 1000, "moments": 2000, "average": 1000}, {}),
        (
            {"stage": 1, "accumulation": 2},  # gradients wait, whole, for the last micro-batch
            {"gradients": 3000, "weights": 3000, "masters": 1000, "moments": 2000, "average": 1000},
            {},
        ),
        (
            {"stage": 3, "averages": 0, "accumulation": 2},
            {"gradients": 1000, "weights": 750, "masters": 1000, "moments": 2000},
            {},
        ),
        (
            {"stage": 2, "offload": "cpu"},
            {"gradients": 500, "weights": 3000},
            {"masters": 1000, "moments": 2000, "average": 1000},
        ),
        (
            {"stage": 3, "offload": "cpu"},
            {"gradients": 500},
            {"weights": 750, "masters": 1000, "moments": 2000, "average": 1000},
        ),
        ({"stage": 3, "offload": "nvme"}, {"gradients": 500}, {"weights": 750, "average": 1000}),
    ],
    ids=["ddp", "zero1", "zero1 adding up", "zero3", "zero2 offload", "zero3 offload", "zero3 nvme"],
)
def test_bytes_of_a_rank_by_hand(settings, device, host):
    found = of(**settings)
    assert {name: count for name, count in found.device.items() if count} == device
    copied = found.host.pop("checkpoint copy")
    assert copied == 4 * (1 + 2 + settings.get("averages", 1)) * TRAINED // 4
    assert {name: count for name, count in found.host.items() if count} == host


CASES = [
    (["strategy=ddp"], 20 * 2**20),  # weights, gradients, two moments and an average, 4 bytes each
    (["strategy=ddp", "ema=none"], 16 * 2**20),
    (["strategy=zero2"], (2 + 20 // 4) * 2**20),
    (["strategy=zero3"], 22 * 2**20 // 4),
    (["strategy=zero2", "strategy.offload=cpu"], 2 * 2**20),
]


@pytest.mark.parametrize(("overrides", "least"), CASES, ids=[" ".join(each) for each, _ in CASES])
def test_a_gpu_that_cannot_hold_the_run_is_refused_by_all(overrides, least, monkeypatch):
    config, _ = compose("train", ["data.shards=none", "train.precision=bf16", *overrides], Config)
    world = World(1, 4, 1, torch.device("cuda", 1))
    monkeypatch.setattr(World, "gather", lambda self, value: [None, value, None, None])
    module = nn.Linear(2**10, 2**10, bias=False)
    for there in (least - 1, least):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, there=there: (0, there))
        if there == least:
            require_memory(config, world, module, 1)
            continue
        with pytest.raises(UserError, match=r"rank 1's GPU would hold .* beside activations.*: use strategy=zero2"):
            require_memory(config, world, module, 1)


def test_a_machine_that_cannot_hold_its_ranks_is_refused(monkeypatch):
    """In host memory a run that takes too much is killed without a word."""
    config, _ = compose("train", ["data.shards=none", "strategy=zero3_offload"], Config)
    world = World(0, 8, 0, torch.device("cpu"))
    monkeypatch.setattr(World, "gather", lambda self, value: [value] * 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    module = nn.Linear(2**10, 2**10, bias=False)
    least = 4 * (4 + 4 + 8 + 4) * 2**20 // 8  # weights (float32 on a CPU), masters, moments, average
    monkeypatch.setattr(memory, "limit_bytes", lambda: least)
    require_memory(config, world, module, 1)
    monkeypatch.setattr(memory, "limit_bytes", lambda: least - 1)
    with pytest.raises(UserError, match=r"^the 4 rank\(s\) of a machine would hold 10\.0 MiB .*, and 10\.0 MiB"):
        require_memory(config, world, module, 1)


def test_a_run_that_cannot_fit_ends_in_one_line_before_it_begins(overrides, tmp_path, command, monkeypatch):
    monkeypatch.setattr(memory, "limit_bytes", lambda: 1000)
    code, line = command("train", *overrides)
    assert code == 2
    assert "beside activations, and 1 KiB are there (a rank: gradients " in line
    monkeypatch.undo()
    assert command("train", *overrides)[0] == 0


def test_what_is_refused_by_is_what_is_built(overrides, tmp_path, monkeypatch):
    """The plan, made of weights alone, is the doctor's estimate of what was built from it."""
    from finetune.doctor.memory import estimate

    plans = []
    real = needs.needs_of
    monkeypatch.setattr(needs, "needs_of", lambda *args, **named: plans.append(real(*args, **named)) or plans[-1])
    (tmp_path / "run").mkdir()
    config, _ = compose("train", overrides, Config)
    parts = build.build(config, World(0, 1, 0, torch.device("cpu")), tmp_path / "run")
    assert plans == [estimate(parts, 1)]
