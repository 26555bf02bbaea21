"""ZeRO-1 for the first stage: each process keeps the moments of its share of the weights alone.

Rajbhandari et al. 2020 (arXiv 1910.02054), section 5.1, P_os. DeepSpeed's engine owns one model, one loss and one
backward pass; here two models take turns, and a step looks at gradients of the last layer before its backward pass
(`adaptive_weight`). AdamW updates each weight by itself, so whoever keeps its moments, the step is the same to the
bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finetune.distributed import MOMENTS, World

Moments = dict[str, dict[str, Tensor]]
"""Of each kind (`MOMENTS`), by parameter name."""


def deal(sizes: Mapping[str, int], hands: int) -> list[list[str]]:
    """Names for each of `hands` processes, sizes as equal as it goes: the largest first, to who has least."""
    dealt: list[list[str]] = [[] for _ in range(hands)]
    held = [0] * hands
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        hand = held.index(min(held))
        dealt[hand].append(name)
        held[hand] += sizes[name]
    return dealt


class ShardedAdamW(torch.optim.AdamW):
    """AdamW that updates this process's share of `parameters`, and then has the others' updates.

    All processes must have the same gradients. Moments of weights that are not this process's are nowhere here.
    """

    def __init__(self, parameters: Mapping[str, Tensor], world: World, **settings: Any) -> None:
        self.parameters, self.world = dict(parameters), world
        self.shares = deal({name: tensor.numel() for name, tensor in parameters.items()}, world.size)
        own = [parameters[name] for name in self.shares[world.rank]]
        super().__init__([{"params": own}], **settings)  # a group may be empty: more processes than weights

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step(closure)
        for owner, share in enumerate(self.shares):
            weights = [self.parameters[name] for name in share]
            whole = self._from(owner, weights, weights)
            if owner != self.world.rank:
                for weight, updated in zip(weights, whole, strict=True):
                    weight.copy_(updated)

    def gather(self) -> Moments:
        """The moments of all parameters, on rank 0; collective. A share at a time is on the device."""
        gathered: Moments = {part: {} for part in MOMENTS}
        for part, moments in gathered.items():
            for owner, share in enumerate(self.shares):
                weights = [self.parameters[name] for name in share]
                own = [self.state[weight][part] for weight in weights] if owner == self.world.rank else []
                whole = self._from(owner, own, weights)
                if self.world.is_main:
                    moments |= {name: tensor.cpu() for name, tensor in zip(share, whole, strict=True)}
        return gathered

    def _from(self, owner: int, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """`owner`'s tensors, shaped as `like`, on every rank; one collective."""
        if self.world.size == 1 or not like:
            return list(tensors)
        if owner == self.world.rank:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
        else:
            flat = like[0].new_empty(sum(tensor.numel() for tensor in like))
        dist.broadcast(flat, src=owner)
        parts = flat.split([tensor.numel() for tensor in like])
        return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def whole_moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> Moments:
    """The moments of all `parameters`, on rank 0 at least. Collective under ZeRO-1."""
    if isinstance(optimizer, ShardedAdamW):
        return optimizer.gather()
    return {part: {name: optimizer.state[p][part] for name, p in parameters.items()} for part in MOMENTS}
