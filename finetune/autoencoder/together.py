"""One step over several processes: sums of gradients, and statistics of a batch that all of them share.

Each process has its share of the global batch, and its losses are its share of the global mean. So what one process
would compute of the whole batch is the sum over processes, of losses and of gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune.distributed import World


def sum_gradients(parameters: Iterable[Tensor], world: World) -> None:
    """Sum the gradients over processes, in place, in one collective."""
    sum_tensors([parameter.grad for parameter in parameters if parameter.grad is not None], world)


def sum_tensors(tensors: Sequence[Tensor], world: World) -> None:
    """Sum each tensor over processes, in place, in one collective."""
    if world.size == 1 or not tensors:
        return
    flat = world.sum_(torch.cat([tensor.flatten() for tensor in tensors]))
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


class _Sum(torch.autograd.Function):
    """The sum over processes; as each process's loss depends on it, so do gradients sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.sum_(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.world.sum_(gradient.clone()), None


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation by the mean and variance of the global batch, without running statistics.

    With one process it is torch's own. Each process must have an equal share of the batch.
    """

    def __init__(self, channels: int, world: World | None = None) -> None:
        super().__init__(channels, track_running_stats=False)
        self._world = world

    def forward(self, x_BCHW: Tensor) -> Tensor:
        world = self._world
        if world is None or world.size == 1:
            return super().forward(x_BCHW)
        with torch.autocast(x_BCHW.device.type, enabled=False):
            x = x_BCHW.float()
            count = x.numel() // x.shape[1] * world.size
            centred = x - (_Sum.apply(x.sum(dim=(0, 2, 3)), world) / count)[:, None, None]
            variance = _Sum.apply(centred.square().sum(dim=(0, 2, 3)), world) / count
            scale = torch.rsqrt(variance + self.eps) * self.weight
            normed: Tensor = centred * scale[:, None, None] + self.bias[:, None, None]
        return normed.to(x_BCHW.dtype)
