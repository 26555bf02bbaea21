"""Data parallelism: whole weights on each rank, gradients summed over all."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune.distributed import optimizers
from finetune.distributed.graphs import Graphs
from finetune.distributed.optimizers import OptimizerSettings, ParamGroup, make_optimizer, matrix_of
from finetune.distributed.reduction import BUCKET_ELEMENTS, WholeReduction
from finetune.distributed.strategy import Shard, StepStats, Strategy
from finetune.distributed.world import World, require_same_layout

if TYPE_CHECKING:
    from finetune.distributed.copies import Copies


class DataParallel(Strategy):
    """Whole weights on every rank, in float32, all as rank 0's at first; passes run in autocast.

    Args:
        graphs: on a GPU, let micro-batches that wait for the host run as CUDA graphs (see `Graphs`).
        casts_once: weights are cast once a step (see `Copies`): on a GPU by kernels of ours.
        reduce_dtype: gradients are summed over ranks in it, and are float32 again.
    """

    def __init__(
        self,
        world: World,
        module: nn.Module,
        groups: Sequence[ParamGroup],
        *,
        optimizer: OptimizerSettings,
        max_grad_norm: float,
        precision: str,
        graphs: bool = False,
        casts_once: bool = False,
        reduce_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.world, self.module, self.settings, self.max_grad_norm = world, module, optimizer, max_grad_norm
        module.to(world.device)
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        if world.size > 1:
            _make_equal(module, world)
        self.parameters = {name: p for group in groups for name, p in group.parameters.items()}
        require_same_layout(world, self.parameters)
        self.copies: Copies | None = None
        if casts_once and self.dtype is not None:
            from finetune.distributed.copies import Copies  # takes seconds

            self.copies = Copies(module, self.parameters.values(), self.dtype)
        self.reduction: WholeReduction | None = None
        if world.size > 1:
            trained = list(self.parameters.values())
            # Copies add to gradients by themselves.
            self.reduction = WholeReduction(
                world, trained, BUCKET_ELEMENTS, dtype=reduce_dtype, they_come=self.copies is None
            )
        if graphs and world.device.type == "cuda":
            beside = () if self.reduction is None else (self.reduction.captured, self.reduction.reduce_left)
            self.graphs = Graphs(self._passes, self.parameters.values(), self._reduced_passes, *beside)
        self.keys = dict(self.parameters)  # what the optimizer is given: the same memory
        if optimizer.kind == "adafactor":
            self.keys = {name: matrix_of(p) for name, p in self.parameters.items()}
        given = [replace(group, parameters={n: self.keys[n] for n in group.parameters}) for group in groups]
        self.optimizer = make_optimizer(given, optimizer)
        optimizers.start(self.optimizer, self.keys.values(), optimizer)
        self.shards = [
            Shard(name, p.shape, 0, p.data, self.keys[name], 0, is_whole=True)
            for name, p in self.parameters.items()
        ]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype is not None)

    def backward(self, args: tuple[Any, ...], *, global_batch: int, last: bool) -> Tensor:
        if self.copies is not None:
            self.copies.renew()
        if self.reduction is not None:
            self.reduction.begin(reduces=last)
        return (self.graphs or self._reduced_passes)(args, global_batch)

    def _reduced_passes(self, args: tuple[Any, ...], global_batch: int) -> Tensor:
        with contextlib.nullcontext() if self.reduction is None else self.reduction.of_a_pass():
            return self._passes(args, global_batch)

    def _passes(self, args: tuple[Any, ...], global_batch: int) -> Tensor:
        with contextlib.nullcontext() if self.copies is None else self.copies.in_use():
            with self._autocast():
                loss_B = self.module(*args)
            total = loss_B.float().sum()
            self.scaler.scale(total * (1 / global_batch)).backward()
        return total.detach()

    def step(self, lr: float) -> StepStats:
        self._set_lr(lr)
        for name, key in self.keys.items():
            p = self.parameters[name]
            if key is not p:
                key.grad = None if p.grad is None else p.grad.view(key.shape)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients).float()
        if self.scaler.is_enabled():
            if self.max_grad_norm > 0:
                nn.utils.clip_grads_with_norm_(self.parameters.values(), self.max_grad_norm, norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scaler._scale is not None:  # at 0, any gradient counts as finite
                self.scaler._scale.clamp_(min=1.0)
        else:
            self._clip_and_skip(norm, self.max_grad_norm)
            self.optimizer.step()
        for p in itertools.chain(self.parameters.values(), self.keys.values()):
            p.grad = None
        self.refresh()
        return StepStats(norm)

    def refresh(self) -> None:
        """Masters are the weights: only copies of them are made anew."""
        if self.copies is not None:
            self.copies.masters_changed()

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        with self._autocast():
            return self.module(*args)

    def scaler_state(self) -> dict[str, float]:
        if not self.scaler.is_enabled():
            return {}
        state = self.scaler.state_dict()
        return {"scale": state["scale"], "good_steps": state["_growth_tracker"]}

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        if state and self.scaler.is_enabled():
            good_steps = int(state["good_steps"]) % self.scaler.get_growth_interval()
            same = {"scale": max(state["scale"], 1.0), "_growth_tracker": good_steps}
            self.scaler.load_state_dict(self.scaler.state_dict() | same)


@torch.no_grad()
def _make_equal(module: nn.Module, world: World) -> None:
    """Give all ranks rank 0's weights and buffers. Collective."""
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        tensor.copy_(world.broadcast_(tensor.detach().contiguous()))
