"""Micro-batches by CUDA graphs under each strategy that has them, beside plain ones, on a device played on the CPU.

    torchrun --nproc_per_node N tests/strategies/graphing.py

Prints a JSON line for each strategy, and for graphs on all ranks or on the first alone: whether losses and masters
are those of plain passes, bit for bit, how many graphs each rank replayed, and how many nodes that gather gradients
outlive a pass; also whether ranks that were given other weights begin with the first one's. A capture needs nodes
of its own: those from before are of the default stream. `ddp_once` casts its weights once a step, and trains what
`ddp` does. Under `zero3` graphs hold collectives: all ranks have them or none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pytest
import torch
from torch import nn
from torch.autograd.graph import _get_grad_fn_or_grad_acc as get_node

from finetune import distributed
from finetune.distributed import Strategy, World, ZeRO, gathering, reduction
from finetune.distributed.graphs import Graphs
from tests.strategies.skipping import make
from tests.strategies.test_graphs import Device, play

STEPS = 12


def by_graphs(strategy: Any, device: Device) -> None:
    if isinstance(strategy, ZeRO) and strategy.stage == 3:
        reduction = strategy.reduction
        reduction.keeps_sums = True
        device.changed = lambda: list(reduction.sums.values())
        strategy.graphs = Graphs(device.watch(strategy._reduced_passes, []), [], world=strategy.world)
        return
    parameters = parameters_of(strategy)
    beside = () if strategy.reduction is None else (strategy.reduction.captured, strategy.reduction.reduce_left)
    if isinstance(strategy, ZeRO):
        beside = strategy._captured, strategy.reduction.reduce_left
    passes = device.watch(strategy._passes, parameters)
    strategy.graphs = Graphs(passes, parameters, strategy._reduced_passes, *beside)


def parameters_of(strategy: Any) -> list[nn.Parameter]:
    return list(strategy.parameters.values()) if strategy.reduction is None else strategy.reduction.parameters


def surviving_nodes(strategy: Strategy) -> int:
    """Autograd makes a parameter's node when a pass needs it, and again when nobody has kept it."""
    forward, parameters = strategy.module.forward, parameters_of(strategy)

    def marked(*args: torch.Tensor) -> torch.Tensor:
        for parameter in parameters:
            get_node(parameter).metadata["was here"] = True
        return forward(*args)

    strategy.module.forward = marked
    step(strategy, 0)
    strategy.module.forward = forward
    return sum("was here" in get_node(parameter).metadata for parameter in parameters)


def step(strategy: Strategy, number: int) -> list[float]:
    """Two micro-batches, in some steps of other shapes, which each rank has of its own."""
    world = strategy.world
    rows = 3 + world.rank if number % 4 == 3 else 2
    losses = []
    for micro in range(2):
        generator = torch.Generator().manual_seed(100 * number + 10 * micro + world.rank)
        x_BCHW = torch.randn(rows, 2, 4, 4, generator=generator)
        last = micro == 1
        losses.append(float(strategy.backward((x_BCHW,), global_batch=2 * rows * world.size, last=last)))
    return [*losses, float(strategy.step(1e-2).grad_norm)]


def examine(world: World, kind: str, who: str) -> dict[str, object]:
    plain, _ = make(world, kind.removesuffix("_once"), "bf16")
    ours, _ = make(world, kind, "bf16")
    with pytest.MonkeyPatch.context() as patch:
        device = play(patch)
        device.device_s = 0.0 if who == "all" or world.is_main else 1e9  # what is waited for
        by_graphs(ours, device)
        losses = [step(plain, number) for number in range(STEPS)]
        same = [step(ours, number) for number in range(STEPS)] == losses
    same &= all(torch.equal(a.master, b.master) for a, b in zip(ours.shards, plain.shards, strict=True))
    begun_otherwise, _ = make(world, kind, "bf16", seed=world.rank)
    return {
        "strategy": kind,
        "who": who,
        "same": world.gather(same),
        "begin alike": world.gather([step(begun_otherwise, number) for number in range(2)] == losses[:2]),
        "replays": world.gather(device.replays),
        "nodes": world.gather(surviving_nodes(plain)),
    }


def main() -> None:
    world = distributed.start("cpu", uses_deepspeed=True)
    # Else this small model's weights would all stay whole, and travel as one.
    gathering._KEPT_ELEMENTS, reduction.IN_PLACE_ELEMENTS = 16, 32
    for kind in ("ddp", "ddp_once", "ddp_bf16", "zero1", "zero2", "zero3"):
        for who in ("all", "first"):
            row = examine(world, kind, who)
            if world.is_main:
                print(json.dumps(row), flush=True)
    distributed.stop()


if __name__ == "__main__":
    main()
