"""Linear layers of one input as one product, with gradients of float32 weights in float32.

Queries, keys and values come from the same tokens: apart, those are read three times, and three gradients of them
are added up in passes of their own. Under autocast a weight's gradient would be rounded to bf16 and cast back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune.models.fast import lora


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x_RI = x.to(dtype).flatten(0, -2)
        weight_OI = (weights[0] if len(weights) == 1 else torch.cat(weights)).to(dtype)
        y_RO = x_RI @ weight_OI.T
        rows = [len(weight) for weight in weights]
        # Weights as they are, where they need no cast: ZeRO-3 takes their memory back until the backward pass.
        ctx.save_for_backward(x_RI, *(weights if weights[0].dtype == dtype else weight_OI.split(rows)))
        ctx.of_weights = [weight.dtype for weight in weights]
        ctx.of_x = x.shape, x.dtype
        return tuple(y.unflatten(0, x.shape[:-1]) for y in y_RO.split(rows, dim=1))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_RI, *weights = ctx.saved_tensors
        shape, dtype = ctx.of_x
        dys_RO = [dy.to(x_RI.dtype).flatten(0, -2) for dy in dys]
        dx_RI: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for dy_RO, weight_OI in zip(dys_RO, weights, strict=True):
                dx_RI = dy_RO @ weight_OI if dx_RI is None else dx_RI.addmm_(dy_RO, weight_OI)
        needed = zip(dys_RO, ctx.of_weights, ctx.needs_input_grad[1:], strict=True)
        return (
            None if dx_RI is None else dx_RI.view(shape).to(dtype),
            *(_product(dy_RO.T, x_RI, to) if needs else None for dy_RO, to, needs in needed),
        )


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b as `dtype`; where that is float32, sums are kept as they are."""
    if a.is_cuda and dtype == torch.float32 != a.dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def weight_of(layer: nn.Module) -> Tensor | None:
    """[O, I] of a plain or an adapted linear layer; None of what is computed otherwise."""
    if isinstance(layer, lora.Linear):
        return layer.sum()
    return layer.weight if type(layer) is nn.Linear else None


def bias_of(layer: nn.Module) -> Tensor | None:
    """Of a layer that `weight_of` knows."""
    return layer.get_base_layer().bias if isinstance(layer, lora.Linear) else layer.bias  # type: ignore[return-value]


def linear(x: Tensor, *weights_OI: Tensor) -> tuple[Tensor, ...]:
    """[..., I] times each of the weights [O, I], in the dtype that autocast gives `F.linear`: [..., O] each."""
    return _Linear.apply(x, *weights_OI)


def together(layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """What each of these layers makes of x, [..., I]."""
    weights = [weight_of(layer) for layer in layers]
    found = [weight for weight in weights if weight is not None]
    if len(found) < len(layers) or any(bias_of(layer) is not None for layer in layers):
        return tuple(layer(x) for layer in layers)
    return linear(x, *found)
