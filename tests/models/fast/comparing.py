"""What a kernel computes beside what torch does in float64."""

from __future__ import annotations

from typing import Any

import torch


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Distance over the norm of what is wanted."""
    assert found.shape == wanted.shape
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def leaves(*shapes: tuple[int, ...] | None, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Any]:
    """Random tensors that need gradients; None where there is no shape."""
    generator = torch.Generator().manual_seed(seed)
    made = [shape and torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [None if one is None else one.requires_grad_() for one in made]


def with_gradients(function, tensors: list[Any], dy: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of those tensors that need one."""
    y = function(*tensors)
    needed = [x for x in tensors if x is not None and x.requires_grad]
    return [y, *torch.autograd.grad(y, needed, dy.to(y.dtype))]


def assert_rounded_once(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    """Each is as near to what is exact as its type allows: nothing inside was rounded to that type."""
    for one, exact in zip(found, wanted, strict=True):
        assert apart(one, exact) <= 1.01 * apart(exact.to(one.dtype), exact) + 1e-6


def in_float64(tensors: list[Any]) -> list[Any]:
    return [x if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
