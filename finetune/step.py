"""One optimizer step: micro-batches, backward, clip, update, average."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune import rng
from finetune.batch import Batch
from finetune.conditioning import Conditioner, dropped, to_device
from finetune.distributed import Strategy
from finetune.ema import Average


@dataclass(frozen=True)
class StepResult:
    """`loss_sum`: over this rank's samples, float32 on the device; `grad_norm`: of the global gradient."""

    loss_sum: Tensor
    grad_norm: Tensor
    data_seconds: float


def optimizer_step(
    strategy: Strategy,
    conditioner: Conditioner,
    batches: Iterator[Batch],
    *,
    micro_batches: int,
    global_batch: int,
    lr: float,
    dropout: float,
    seed: int,
    averages: Sequence[Average],
    images_seen: int,
) -> StepResult:
    """Take `micro_batches` batches of this rank and make one step; `images_seen` counts this step's samples.

    Gradients are of the mean loss over `global_batch` samples, however these are spread. `dropout`: share of
    samples whose condition is left out.
    """
    device = strategy.world.device
    loss_sum = torch.zeros((), device=device)
    data_seconds = 0.0
    watch = strategy.world.watch
    for index in range(micro_batches):
        watch.at("waiting for data", patience=1)
        started = time.perf_counter()
        batch = next(batches)
        data_seconds += time.perf_counter() - started
        watch.at("in forward and backward")
        # Layers that draw from torch's own generator (LoRA's dropout) are made a function of the clock as well.
        torch.manual_seed(rng.fold(seed, f"layers:{int(batch.clock[0])}"))
        inputs = to_device(conditioner.inputs(batch, dropped(batch.clock, dropout, seed)), device)
        batch = batch.to(device)
        loss_sum += strategy.backward(
            ("loss", batch.moments, inputs, batch.clock, batch.loss_weight, batch.loss_mask),
            global_batch=global_batch,
            last=index == micro_batches - 1,
        )
    watch.at("in the optimizer")
    strategy.before_change()
    stats = strategy.step(lr)
    for average in averages:
        average.update([shard.master for shard in strategy.shards], images_seen, global_batch)
    return StepResult(loss_sum, stats.grad_norm, data_seconds)
