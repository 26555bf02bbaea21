"""One rank's gradient is not finite in one step: that step changes nothing anywhere, and the next goes on.

    torchrun --nproc_per_node N tests/strategies/skipping.py

Prints one JSON line for each strategy and precision: whether masters and moments stayed as they were, bit for bit;
whether every rank was told; whether the run is the one that never saw that step. Also the largest distance of the
masters from the weights that were given, before any step, and the first step's gradient norm. For fp16 under ZeRO,
also how far a run whose loss scale grows comes from one whose scale stays, without clipping, how far their norms
are apart, and whether DDP goes on with its scale, and it with DDP's. The last line says which strategies refuse a
rank that lays its weights out differently.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from finetune import UserError, distributed
from finetune.distributed import MOMENTS, DataParallel, OptimizerSettings, ParamGroup, Strategy, World, ZeRO
from finetune.models.layout import store_channels_last


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 6, 3), nn.Linear(24, 5)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.out(self.conv(x_BCHW.to(self.conv.weight.dtype)).flatten(1)).float().square().mean(1)


def make(
    world: World, kind: str, precision: str, seed: int = 0, max_grad_norm: float = 0.1
) -> tuple[Strategy, dict[str, Tensor]]:
    # The end of DeepSpeed's last engine imports something: within an import CPython 3.11 can't do that (gh-91351).
    gc.collect()
    torch.manual_seed(seed)
    net = Net()
    if kind.startswith("zero"):
        store_channels_last(net)
    given = {name: p.detach().clone() for name, p in net.named_parameters()}
    groups = [ParamGroup("net", dict(net.named_parameters()))]
    common: dict[str, Any] = {
        "optimizer": OptimizerSettings(),
        "max_grad_norm": max_grad_norm,
        "precision": precision,
    }
    if kind.startswith("ddp"):
        reduce_dtype = torch.bfloat16 if kind == "ddp_bf16" else torch.float32
        common |= {"casts_once": kind == "ddp_once", "reduce_dtype": reduce_dtype}
        return DataParallel(world, net, groups, **common), given
    offload = kind.endswith("_offload")
    zero = ZeRO(world, net, groups, **common, stage=int(kind[4]), offload=offload, micro_batch=2, accumulation=2)
    return zero, given


def state(strategy: Strategy) -> list[Tensor]:
    kinds = [[shard.master for shard in strategy.shards], *(strategy.moments(kind) for kind in MOMENTS)]
    return [tensor.detach().clone() for tensors in kinds for tensor in tensors]


def step(strategy: Strategy, number: int, *, broken: bool = False) -> float:
    world = strategy.world
    for micro in range(2):
        generator = torch.Generator().manual_seed(100 * number + 10 * micro + world.rank)
        x_BCHW = torch.randn(2, 2, 4, 4, generator=generator)
        if broken and micro == 0 and world.rank == world.size - 1:
            x_BCHW[0, 0, 0, 0] = float("inf")
        strategy.backward((x_BCHW,), global_batch=4 * world.size, last=micro == 1)
    return float(strategy.step(1e-2).grad_norm)


def examine(world: World, kind: str, precision: str) -> dict[str, Any]:
    strategy, given = make(world, kind, precision)
    first = max(
        float((shard.master - shard.piece_of(given[shard.name])).abs().max()) if shard.master.numel() else 0.0
        for shard in strategy.shards
    )
    warm_up = 6 if precision == "fp16" else 1  # the first loss scales are too large
    norms = [step(strategy, number) for number in range(warm_up)]
    before, steps = state(strategy), strategy.steps_taken
    norm = step(strategy, 50, broken=True)
    unchanged = all(torch.equal(one, other) for one, other in zip(before, state(strategy), strict=True))
    unchanged &= strategy.steps_taken == steps
    norms.append(step(strategy, 51))
    went_on = any(not torch.equal(one, other) for one, other in zip(before, state(strategy), strict=True))
    result = {
        "unchanged": unchanged,
        "told": norm != norm or norm == float("inf"),
        "went_on": went_on and strategy.steps_taken == steps + 1 and norms[-1] < float("inf"),
        "first": first,
        "norm": norms[0],
    }
    if precision != "fp16":  # whose loss scale remembers
        calm, _ = make(world, kind, precision)
        for number in (*range(warm_up), 51):
            step(calm, number)
        same = all(torch.equal(one, other) for one, other in zip(state(calm), state(strategy), strict=True))
        result["as_if_never"] = same
    elif kind != "ddp":
        runs, of_steps = [], []
        for window in (1000, 2):
            zero, _ = make(world, kind, precision, max_grad_norm=0.0)
            zero.zero.loss_scaler.cur_scale, zero.zero.loss_scaler.scale_window = 1024.0, window
            of_steps.append([step(zero, number) for number in range(4)])
            runs.append(torch.cat([tensor.reshape(-1) for tensor in state(zero)]))
        assert zero.zero.loss_scale > 1024
        result["grown"] = float((runs[0] - runs[1]).norm() / runs[0].norm())
        result["norms_apart"] = max(abs(one / other - 1) for one, other in zip(*of_steps, strict=True))
        ddp, (again, _) = make(world, "ddp", precision)[0], make(world, kind, precision)
        ddp.load_scaler_state(zero.scaler_state())
        again.load_scaler_state(ddp.scaler_state())
        result["carried"] = ddp.scaler_state() == {"scale": zero.zero.loss_scale, "good_steps": 4}
        result["carried"] &= again.scaler_state() == {**ddp.scaler_state(), "hysteresis": 2}
    ranks = world.gather(result)
    numbers = {"first", "grown", "norms_apart"}
    return {
        name: max(each[name] for each in ranks) if name in numbers else [each[name] for each in ranks]
        for name in result
    }


def refuses_other_layouts(world: World, kind: str) -> bool:
    gc.collect()
    net = Net()
    if world.rank == 1:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    groups = [ParamGroup("net", dict(net.named_parameters()))]
    common: dict[str, Any] = {"optimizer": OptimizerSettings(), "max_grad_norm": 0.1, "precision": "fp32"}
    try:
        if kind == "ddp":
            DataParallel(world, net, groups, **common)
        else:
            ZeRO(world, net, groups, **common, stage=2, micro_batch=2, accumulation=2)
    except UserError as error:
        return "lay out the trained weights differently" in str(error)
    return False


def main() -> None:
    from deepspeed.accelerator import get_accelerator

    world = distributed.start("cpu", uses_deepspeed=True)
    type(get_accelerator()).is_fp16_supported = lambda self: True  # it is, by torch's CPU kernels
    for kind in ("ddp", "zero1", "zero1_offload", "zero2", "zero2_offload", "zero3", "zero3_offload"):
        for precision in ("fp32", "bf16", "fp16"):
            row = {"strategy": kind, "precision": precision, **examine(world, kind, precision)}
            if world.is_main:
                print(json.dumps(row), flush=True)
    refused = {kind: world.gather(refuses_other_layouts(world, kind)) for kind in ("ddp", "zero2")}
    if world.is_main:
        print(json.dumps(refused))
    distributed.stop()


if __name__ == "__main__":
    main()
