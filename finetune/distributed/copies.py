"""Weights cast once a step instead of once a micro-batch, for runs that add up many small micro-batches.

Autocast makes a copy of each weight in the working precision for each micro-batch, and takes the weight's gradient
back to float32 before it is added to those before it: 20 bytes a weight in all, which with a few pictures is a good
part of a micro-batch's time. Here the copies are kept for a step, and what is added is the gradient as it comes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from finetune.models import fast


class Copies:
    """Copies in `dtype` of what linear layers and convolutions multiply by: what autocast would cast.

    Args:
        module: whose passes take them.
        trained: float32; those of them that are such layers' weights are copied.
    """

    def __init__(self, module: nn.Module, trained: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
        masters = {id(p): p for p in trained}
        copies: dict[int, nn.Parameter] = {}
        self._places: list[tuple[nn.Module, nn.Parameter, nn.Parameter]] = []  # (layer, its weight, the copy)
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and (master := masters.get(id(layer.weight))) is not None:
                if id(master) not in copies:
                    copies[id(master)] = _copy_of(master, dtype)
                self._places.append((layer, master, copies[id(master)]))
        self._pairs = [(masters[key], copy) for key, copy in copies.items()]
        self._others = [p for key, p in masters.items() if key not in copies]
        self._are_old = False

    @property
    def nbytes(self) -> int:
        return sum(copy.nbytes for _, copy in self._pairs)

    def masters_changed(self) -> None:
        """Copies are made anew before they are used again."""
        self._are_old = True

    @torch.no_grad()
    def renew(self) -> None:
        """Bring them up to date."""
        if self._are_old and self._pairs:
            masters, copies = zip(*self._pairs, strict=True)
            torch._foreach_copy_(copies, masters)
        self._are_old = False

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Layers have the copies as their weights; gradients of those are added to the weights' own."""
        sums = [p.grad for p in self._others]
        for p in self._others:
            p.grad = None
        for layer, _, copy in self._places:
            layer._parameters["weight"] = copy
        try:
            yield
            self._add_to(sums)
        finally:
            for layer, master, _ in self._places:
                layer._parameters["weight"] = master
            for p, total in zip(self._others, sums, strict=True):
                p.grad = p.grad if total is None else total

    @torch.no_grad()
    def _add_to(self, sums: list[Tensor | None]) -> None:
        """Gradients of the other weights, which are many and small, all at once."""
        pairs = [
            (total, p.grad)
            for total, p in zip(sums, self._others, strict=True)
            if total is not None and p.grad is not None
        ]
        if pairs:
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)))


def _copy_of(master: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    copy = nn.Parameter(master.detach().to(dtype))

    def add(of: Tensor) -> None:
        assert of.grad is not None
        if master.grad is None:
            master.grad = of.grad.float()
        else:
            fast.add_(master.grad, of.grad)
        of.grad = None

    copy.register_post_accumulate_grad_hook(add)
    return copy
