"""ZeRO for the first stage: each process keeps its share of moments, gradients, weights (stages 1, 2, 3).

Rajbhandari et al. 2020 (arXiv 1910.02054), section 5. DeepSpeed's engine owns one model, one loss and one backward
pass; here two models take turns, and a step looks at gradients of the last layer before its backward pass
(`adaptive_weight`). So each weight has an owner: AdamW updates every weight by itself, and whoever does it, the
step is the same.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune.autoencoder.together import sum_gradients
from finetune.distributed import MOMENTS, World
from finetune.distributed.gathering import blocks_of
from finetune.distributed.zero import GATHERED_WHOLE

Moments = dict[str, dict[str, Tensor]]
"""Of each kind (`MOMENTS`), by parameter name."""

# Blocks whose weights are gathered as one; of what is in none of these, layer by layer.
_WHOLE = (*GATHERED_WHOLE, "Attention")
_READ_ASIDE = ("VectorQuantizer",)  # its codebook is read without a call, so it stays with all processes


def deal(sizes: Mapping[str, int], hands: int) -> list[list[str]]:
    """Names for each of `hands` processes, sizes as equal as it goes: the largest first, to who has least."""
    dealt: list[list[str]] = [[] for _ in range(hands)]
    held = [0] * hands
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        hand = held.index(min(held))
        dealt[hand].append(name)
        held[hand] += sizes[name]
    return dealt


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class ShardedAdamW(torch.optim.AdamW):
    """AdamW of this process's share of a model's weights.

    Stage 1 keeps the share's moments alone. Under stage 2 each gradient is summed at its owner as soon as the
    backward pass has it, and nowhere else. Under stage 3, between `begin` and `end`, a weight that is not of this
    process's share has no memory but while its block is computed.

    Args:
        offload: the share's weights and moments are in host memory as well, where the update runs; under stage 3
            its weights are there alone.
    """

    def __init__(
        self, model: nn.Module, world: World, *, stage: int, offload: bool = False, **settings: Any
    ) -> None:
        self.parameters, self.world, self.stage, self.offload = trained_weights(model), world, stage, offload
        self.shares = deal({name: tensor.numel() for name, tensor in self.parameters.items()}, world.size)
        self.own = self.shares[world.rank]
        # What is updated: the model's own weights, or copies of them.
        self.masters: dict[str, Tensor] = {name: self.parameters[name] for name in self.own}
        if offload:
            self.masters = {name: nn.Parameter(p.detach().cpu().clone()) for name, p in self.masters.items()}
        # A group may be empty: there may be more processes than weights.
        super().__init__([{"params": list(self.masters.values())}], **settings)
        self.units: list[list[str]] = []  # names of what is gathered as one
        self.inside: int | None = None  # the unit that is whole now
        self.is_spread = False
        self.kept = list(self.parameters)  # names of what every process has after each update
        owners = {name: owner for owner, share in enumerate(self.shares) for name in share}
        if stage > 1:
            for name, parameter in self.parameters.items():
                reduce = functools.partial(self._reduce, owner=owners[name])
                parameter.register_post_accumulate_grad_hook(reduce)
        if stage == 3:
            # The first layer's input is a picture, which needs none: its weight does.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            names = {parameter: name for name, parameter in self.parameters.items()}
            for unit in _units(model):
                if found := [names[parameter] for parameter in unit.parameters() if parameter in names]:
                    enter = functools.partial(self._enter, number=len(self.units))
                    unit.register_forward_pre_hook(enter)
                    unit.register_full_backward_pre_hook(enter)
                    self.units.append(found)
            spread = {name for unit in self.units for name in unit}
            self.kept = [name for name in self.parameters if name not in spread]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def update(self, max_grad_norm: float) -> Tensor:
        """Clip, update, and let all have what they keep; returns the norm of all gradients. Collective."""
        parameters = self.parameters
        if self.stage == 1:
            sum_gradients(parameters.values(), self.world)
            norm = nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
        else:
            norms = torch.zeros(len(parameters), device=self.world.device)
            own = {place: p.grad for place, p in enumerate(parameters.values()) if p.grad is not None}
            if own:
                norms[list(own)] = torch.stack(torch._foreach_norm(list(own.values())))
            norm = torch.linalg.vector_norm(self.world.sum_(norms))
        nn.utils.clip_grads_with_norm_([parameters[name] for name in self.own], max_grad_norm, norm)
        if self.offload:
            for name, master in self.masters.items():
                gradient = parameters[name].grad
                master.grad = None if gradient is None else gradient.to(master.device)
                parameters[name].grad = None
        self.step()
        self._leave()
        self._share(self.kept)
        return norm

    @torch.no_grad()
    def begin(self) -> None:
        """Spread the model's weights, which are now as training begins."""
        for name, master in self.masters.items():
            if self.offload:
                master.copy_(self.parameters[name])
        self.is_spread = self.stage == 3
        if self.is_spread:
            for parameter in self.parameters.values():
                if not parameter.untyped_storage().resizable():  # a file's memory
                    parameter.data = parameter.data.clone()
            for number in range(len(self.units)):
                self._release(number)

    def end(self) -> None:
        """Give every process the whole model, for good. Collective."""
        if self.is_spread:
            self._leave()
            self._share([name for unit in self.units for name in unit])
            self.is_spread = False

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block every process has the whole model. Collective."""
        was_spread = self.is_spread
        self.end()
        try:
            yield
        finally:
            if was_spread:
                self.begin()

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each process gives of its own share, of all trained weights, on rank 0 in host memory; collective.

        A share at a time is on the device.
        """
        gathered: dict[str, Tensor] = {}
        for owner, share in enumerate(self.shares):
            own = [tensors[name] for name in share] if owner == self.world.rank else []
            whole = self._from(owner, own, share)
            if self.world.is_main:
                gathered |= {name: tensor.cpu() for name, tensor in zip(share, whole, strict=True)}
        return gathered

    def _share(self, names: Sequence[str]) -> None:
        """Bring these weights from their owners to every process."""
        wanted = set(names)
        for owner, share in enumerate(self.shares):
            found = [name for name in share if name in wanted]
            own = [self.masters[name] for name in found] if owner == self.world.rank else []
            for name, tensor in zip(found, self._from(owner, own, found), strict=True):
                parameter = self.parameters[name]
                if self.masters.get(name) is not parameter:
                    if not parameter.untyped_storage().nbytes():
                        parameter.untyped_storage().resize_(parameter.numel() * parameter.itemsize)
                    parameter.data.copy_(tensor)  # not a change of what the backward pass has kept

    def _from(self, owner: int, tensors: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
        """`owner`'s tensors, shaped as the weights `names`, on every rank; one collective."""
        if self.world.size == 1 or not names:
            return [tensor.detach() for tensor in tensors]
        like = [self.parameters[name] for name in names]
        if owner == self.world.rank:
            flat = torch.cat([tensor.detach().to(self.world.device).flatten() for tensor in tensors])
        else:
            flat = torch.empty(sum(tensor.numel() for tensor in like), device=self.world.device)
        dist.broadcast(flat, src=owner)
        parts = flat.split([tensor.numel() for tensor in like])
        return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]

    @torch.no_grad()
    def _reduce(self, parameter: Tensor, owner: int) -> None:
        assert parameter.grad is not None
        if self.world.size > 1:
            flat = parameter.grad.flatten()
            dist.reduce(flat, dst=owner)
            # Its own memory, in the parameter's layout: a gradient may be one number, expanded.
            kept = owner == self.world.rank
            parameter.grad = torch.empty_like(parameter).copy_(flat.view(parameter.shape)) if kept else None

    @torch.no_grad()
    def _enter(self, *_: Any, number: int) -> None:
        """Before a unit's forward or backward pass: it is whole, and the one before it no longer."""
        if self.is_spread and self.inside != number:
            self._leave()
            self._share(self.units[number])
            self.inside = number

    def _leave(self) -> None:
        if self.inside is not None:
            self._release(self.inside)
            self.inside = None

    def _release(self, number: int) -> None:
        for name in self.units[number]:
            parameter = self.parameters[name]
            if self.masters.get(name) is not parameter:
                parameter.untyped_storage().resize_(0)


def _units(module: nn.Module) -> Iterator[nn.Module]:
    for unit in blocks_of(module, lambda block: type(block).__name__ in (*_WHOLE, *_READ_ASIDE)):
        if type(unit).__name__ not in _READ_ASIDE:
            yield unit


def update(
    optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], world: World | None, max_grad_norm: float
) -> Tensor:
    """Sum the gradients over processes, clip them (0: not), and step; returns their norm before clipping."""
    limit = max_grad_norm or math.inf
    if isinstance(optimizer, ShardedAdamW):
        return optimizer.update(limit)
    if world is not None:
        sum_gradients(weights, world)
    norm = nn.utils.clip_grad_norm_(weights, limit)
    optimizer.step()
    return norm


@contextlib.contextmanager
def spread(optimizers: Sequence[torch.optim.Optimizer], average: dict[str, Tensor] | None) -> Iterator[None]:
    """Within the block weights, and under stage 3 `average`, of the first model, are with their owners alone.

    Collective. After it every process has all weights, and rank 0 all of the average. A block that fails stays so.
    """
    sharded = [optimizer for optimizer in optimizers if isinstance(optimizer, ShardedAdamW)]
    for optimizer in sharded:
        optimizer.begin()
    if sharded and sharded[0].is_spread and average is not None:
        for name in sharded[0].parameters:
            tensor = average.pop(name)
            if name in sharded[0].masters:
                average[name] = tensor.to(sharded[0].masters[name].device)
    yield
    if average is not None:
        average |= whole_average(optimizers[0], average)
    for optimizer in sharded:
        optimizer.end()


def averaged_weights(optimizer: torch.optim.Optimizer, model: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The weights `names` as they are now, where their average is."""
    masters = optimizer.masters if isinstance(optimizer, ShardedAdamW) and optimizer.is_spread else {}
    parameters = dict(model.named_parameters())
    return [masters.get(name, parameters[name]).detach() for name in names]


def whole_average(optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The average of all weights, on rank 0 at least. Collective."""
    if not isinstance(optimizer, ShardedAdamW) or not optimizer.is_spread:
        return dict(average)
    others = {name: tensor for name, tensor in average.items() if name not in optimizer.parameters}
    return others | {name: tensor.to(optimizer.world.device) for name, tensor in optimizer.gather(average).items()}


def whole_weights(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """All weights of a model, on rank 0 at least. Collective."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    if isinstance(optimizer, ShardedAdamW) and optimizer.is_spread:
        weights |= optimizer.gather(optimizer.masters)
    return weights


def whole_moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> Moments:
    """The moments of all trained weights, on rank 0 at least. Collective."""
    if isinstance(optimizer, ShardedAdamW):
        own = {name: optimizer.state[master] for name, master in optimizer.masters.items()}
        return {part: optimizer.gather({name: state[part] for name, state in own.items()}) for part in MOMENTS}
    trained = trained_weights(model)
    return {part: {name: optimizer.state[p][part] for name, p in trained.items()} for part in MOMENTS}
