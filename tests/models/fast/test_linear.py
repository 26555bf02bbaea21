"""Linear layers of one input as one product: outputs and gradients are those of `F.linear`."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetune.models.fast.linear import linear, together, weight_of
from tests.models.fast.test_kernels import apart, in_float64, leaves


def both(x: torch.Tensor, weights: list[torch.Tensor], dtype: torch.dtype | None = None):
    """[outputs..., gradients of x and weights] of ours under autocast, and of torch in float64."""
    found = []
    for function, tensors in (
        (linear, [x, *weights]),
        (lambda x, *weights: [F.linear(x, weight) for weight in weights], in_float64([x, *weights])),
    ):
        exact = tensors[0].dtype == torch.float64
        with contextlib.nullcontext() if exact else torch.autocast("cpu", dtype, enabled=dtype is not None):
            ys = list(function(*tensors))
        generator = torch.Generator().manual_seed(2)
        dys = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in ys]
        needed = [one for one in tensors if one.requires_grad]
        found.append([*ys, *torch.autograd.grad(ys, needed, dys)])
    return found


@pytest.mark.parametrize("rows", [[4], [6, 6, 6], [3, 8]], ids=str)
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (2, 2, 3, 6)], ids=str)
def test_outputs_and_gradients(shape, rows):
    (x,), weights = leaves(shape), leaves(*((each, 6) for each in rows), seed=1)
    ours, wanted = both(x, weights)
    assert len(ours) == 2 * len(rows) + 1
    for one, other in zip(ours, wanted, strict=True):
        assert apart(one, other) < 1e-6


def test_autocast_takes_the_dtype_that_it_gives_torchs_own():
    (x,), weights = leaves((7, 6)), leaves((4, 6), (5, 6), seed=1)
    ours, wanted = both(x, weights, torch.bfloat16)
    assert [one.dtype for one in ours] == [torch.bfloat16] * 2 + [torch.float32] * 3
    for one, other in zip(ours, wanted, strict=True):
        assert apart(one, other) < 1e-2


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(frozen):
    tensors = [*leaves((3, 6)), *leaves((4, 6), (4, 6), seed=1)]
    tensors[frozen].requires_grad_(False)
    ours, wanted = both(tensors[0], tensors[1:])
    assert len(ours) == 4
    for one, other in zip(ours, wanted, strict=True):
        assert apart(one, other) < 1e-6


def test_tokens_that_are_a_view():
    (wide,) = leaves((4, 3, 12))
    ours, wanted = both(wide.transpose(0, 1)[..., ::2], leaves((4, 6), seed=1))
    for one, other in zip(ours, wanted, strict=True):
        assert apart(one, other) < 1e-6


def test_layers_with_a_bias_or_unknown_ones_are_called():
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    plain, biased, doubled = nn.Linear(6, 4, bias=False), nn.Linear(6, 4), Doubled(6, 4, bias=False)
    x = torch.randn(3, 6)
    for layers in ((plain, plain), (plain, biased), (doubled, plain)):
        for y, layer in zip(together(layers, x), layers, strict=True):
            torch.testing.assert_close(y, layer(x))
    assert weight_of(doubled) is None
