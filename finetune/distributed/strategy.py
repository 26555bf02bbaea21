"""What every strategy is, and data parallelism: how weights, gradients and moments are spread.

A strategy hides whether weights are whole on each rank (DDP) or in pieces (ZeRO) behind one idea: each rank
owns `Shard`s, float32 views of what its optimizer updates. Averaging, checkpoints and restores work on shards
and name whole parameters only in files, so that a file doesn't know which strategy wrote it.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune import UserError
from finetune.distributed.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")
_GATHER_ELEMENTS = 1 << 25  # 128 MiB of float32 on the device while parameters are gathered


@dataclass(frozen=True)
class ParamGroup:
    """Trainable parameters with a learning rate of `lr_ratio` times the schedule's."""

    name: str
    parameters: dict[str, nn.Parameter]
    lr_ratio: float = 1.0


@dataclass(frozen=True)
class AdamW:
    """AdamW's settings (Loshchilov & Hutter 2019, arXiv 1711.05101), without the learning rate."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2


@dataclass
class Shard:
    """What this rank's optimizer updates of one parameter.

    Attributes:
        name: of the parameter in the wrapped module; shape: of the whole parameter.
        start: first flat element that this rank owns.
        master: float32; the whole parameter in its own shape, or a flat view of `master.numel()` elements.
        key: the tensor that the optimizer files its state under; offset: where `master` lies in it.
        is_whole: every rank owns the whole parameter, and `master` has its shape.
    """

    name: str
    shape: torch.Size
    start: int
    master: Tensor
    key: Tensor
    offset: int
    is_whole: bool = False

    def view_of(self, like_key: Tensor) -> Tensor:
        """The part of a tensor shaped as `key` (a moment, say) that belongs to this parameter."""
        return like_key if self.is_whole else like_key.narrow(0, self.offset, self.master.numel())


@dataclass(frozen=True)
class StepStats:
    """`grad_norm`: before clipping, float32 scalar on the device; not finite when the step was skipped."""

    grad_norm: Tensor


class Strategy(ABC):
    """Runs forward and backward passes of one module and steps its optimizer, over all ranks."""

    world: World
    module: nn.Module  # the module as given: names of parameters are its own
    optimizer: torch.optim.Optimizer
    shards: list[Shard]

    @abstractmethod
    def backward(self, args: tuple[Any, ...], *, global_batch: int, last: bool) -> Tensor:
        """Forward and backward of one micro-batch.

        Args:
            args: of the module's forward, which returns a loss for each sample.
            global_batch: samples in this step over all ranks and micro-batches; gradients become the mean.
            last: the step's last micro-batch, after which gradients are reduced.

        Returns:
            The sum of the samples' losses, float32, on the device.
        """

    @abstractmethod
    def step(self, lr: float) -> StepStats:
        """Clip, update unless a gradient anywhere is not finite, and zero the gradients."""

    @abstractmethod
    def refresh(self) -> None:
        """Carry changed masters into the weights that forward passes use. Collective."""

    @abstractmethod
    def __call__(self, *args: Any) -> Tensor:
        """A forward pass without gradients. Collective under ZeRO-3: all ranks call with equal shapes."""

    @abstractmethod
    def scaler_state(self) -> dict[str, float]:
        """State of the fp16 loss scale; empty for other precisions."""

    @abstractmethod
    def load_scaler_state(self, state: Mapping[str, float]) -> None: ...

    def moments(self, kind: str) -> list[Tensor]:
        """One of `MOMENTS` for each shard."""
        return [shard.view_of(self.optimizer.state[shard.key][kind]) for shard in self.shards]

    @property
    def steps_taken(self) -> int:
        """Optimizer steps so far; skipped ones don't count (AdamW's bias correction depends on it)."""
        return int(next(iter(self.optimizer.state.values()))["step"])

    def set_steps_taken(self, steps: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(steps)

    @contextlib.contextmanager
    def evaluating(self, average: Sequence[Tensor] | None) -> Iterator[None]:
        """Evaluation mode, with `average` (one tensor a shard) in place of the weights. Collective."""
        self._swap(average)
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()
            self._swap(average)

    def _swap(self, average: Sequence[Tensor] | None) -> None:
        if average is None:
            return
        with torch.no_grad():
            for shard, other in zip(self.shards, average, strict=True):
                kept = shard.master.clone()
                shard.master.copy_(other)
                other.copy_(kept)
        self.refresh()

    def gather(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Whole parameters by name from one tensor a shard: float32 on the CPU, on rank 0; elsewhere empty.

        Collective where a parameter lies in pieces; device memory stays bounded.
        """
        whole: dict[str, Tensor] = {}
        pieces: list[tuple[Shard, Tensor]] = []
        for shard, tensor in zip(self.shards, tensors, strict=True):
            if shard.is_whole:
                if self.world.is_main:
                    whole[shard.name] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            else:
                pieces.append((shard, tensor))
        for group in _groups_of(pieces, _GATHER_ELEMENTS):
            sizes = [math.prod(shard.shape) for shard, _ in group]
            flat = torch.zeros(sum(sizes), dtype=torch.float32, device=self.world.device)
            for (shard, tensor), part in zip(group, flat.split(sizes), strict=True):
                part[shard.start : shard.start + tensor.numel()].copy_(tensor)
            if self.world.size > 1:
                dist.reduce(flat, dst=0)  # each element is owned once: the others add zeros
            if self.world.is_main:
                host = flat.cpu()
                for (shard, _), part in zip(group, host.split(sizes), strict=True):
                    whole[shard.name] = part.view(shard.shape).clone()
        return whole

    @torch.no_grad()
    def scatter_(self, tensors: Sequence[Tensor], whole: Callable[[str], Tensor]) -> None:
        """Fill one tensor a shard from whole parameters: the reverse of `gather`, read on every rank."""
        for shard, tensor in zip(self.shards, tensors, strict=True):
            source = whole(shard.name)
            if source.shape != shard.shape:
                raise UserError(
                    f"{shard.name} is {list(source.shape)} in the checkpoint, {list(shard.shape)} in the model: "
                    "put model.* back as it was or choose another run.dir"
                )
            if not shard.is_whole:
                source = source.reshape(-1)[shard.start : shard.start + tensor.numel()]
            tensor.copy_(source)

    def _start_adamw(self, keys: Sequence[Tensor]) -> None:
        """Make AdamW's state now, so that fresh and resumed runs go the same way through its code."""
        for key in keys:
            # The fused optimizer, which `make_adamw` makes, counts steps on the parameter's device.
            step = torch.zeros((), dtype=torch.float32, device=key.device)
            moments = {kind: torch.zeros_like(key.detach()) for kind in MOMENTS}
            self.optimizer.state[key] = {"step": step, **moments}

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]


def _groups_of(pieces: Sequence[tuple[Shard, Tensor]], limit: int) -> Iterator[list[tuple[Shard, Tensor]]]:
    group: list[tuple[Shard, Tensor]] = []
    elements = 0
    for shard, tensor in pieces:
        size = math.prod(shard.shape)
        if group and elements + size > limit:
            yield group
            group, elements = [], 0
        group.append((shard, tensor))
        elements += size
    if group:
        yield group


def make_adamw(groups: Sequence[ParamGroup], settings: AdamW) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [{"params": list(group.parameters.values()), "lr_ratio": group.lr_ratio} for group in groups],
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


class DataParallel(Strategy):
    """Whole weights on every rank, in float32; gradients are averaged by torch's DDP, passes run in autocast."""

    def __init__(
        self,
        world: World,
        module: nn.Module,
        groups: Sequence[ParamGroup],
        *,
        adamw: AdamW,
        max_grad_norm: float,
        precision: str,
    ) -> None:
        self.world, self.module, self.max_grad_norm = world, module, max_grad_norm
        module.to(world.device)
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        self.wrapped: nn.Module = module
        if world.size > 1:
            self.wrapped = nn.parallel.DistributedDataParallel(
                module,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        self.optimizer = make_adamw(groups, adamw)
        self.parameters = {name: p for group in groups for name, p in group.parameters.items()}
        self._start_adamw(list(self.parameters.values()))
        self.shards = [Shard(n, p.shape, 0, p.data, p, 0, is_whole=True) for n, p in self.parameters.items()]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype is not None)

    def backward(self, args: tuple[Any, ...], *, global_batch: int, last: bool) -> Tensor:
        synced = last or self.world.size == 1
        with contextlib.nullcontext() if synced else self.wrapped.no_sync():  # type: ignore[operator]
            with self._autocast():
                loss_B = self.wrapped(*args)
            total = loss_B.float().sum()
            # DDP averages over ranks; what is wanted is the sum over all samples by their number.
            self.scaler.scale(total * (self.world.size / global_batch)).backward()
        return total.detach()

    def step(self, lr: float) -> StepStats:
        self._set_lr(lr)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.max_grad_norm, norm)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # The fused kernel skips the update where this flag is set, without asking the host. The norm is of
            # reduced gradients, so all ranks see the same one.
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepStats(norm.float())

    def refresh(self) -> None:
        """Masters are the weights: nothing to do."""

    @torch.no_grad()
    def __call__(self, *args: Any) -> Tensor:
        with self._autocast():
            return self.module(*args)

    def scaler_state(self) -> dict[str, float]:
        return dict(self.scaler.state_dict())

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(state))
