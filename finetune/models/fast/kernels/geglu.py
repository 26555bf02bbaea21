"""GEGLU (Shazeer 2020, arXiv 2002.05202, section 2): half the features times the exact GELU of the others.

The bias of the projection before it comes in here, so that its gradient needs no pass of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _TILE_R, _TILE_D, _WARPS = 256, 16, 128, 4


@triton.jit
def _biases(bias_2D, d, D, BIASED: tl.constexpr, TD: tl.constexpr):
    """Of the features d, and of those that gate them; zeros without a bias."""
    bias_a = tl.zeros((TD,), tl.float32)
    bias_g = tl.zeros((TD,), tl.float32)
    if BIASED:
        bias_a = tl.load(bias_2D + d, mask=d < D, other=0.0).to(tl.float32)
        bias_g = tl.load(bias_2D + D + d, mask=d < D, other=0.0).to(tl.float32)
    return bias_a, bias_g


@triton.jit
def _gate(x_R2D, bias_2D, y_RD, R, D,
          BIASED: tl.constexpr, ROWS: tl.constexpr, TR: tl.constexpr, TD: tl.constexpr):  # fmt: skip
    first, d = tl.program_id(0) * ROWS, tl.program_id(1) * TD + tl.arange(0, TD)
    x_R2D += first.to(tl.int64) * 2 * D
    y_RD += first.to(tl.int64) * D
    bias_a, bias_g = _biases(bias_2D, d, D, BIASED, TD)
    for row in range(0, ROWS, TR):
        r = row + tl.arange(0, TR)
        there = (first + r < R)[:, None] & (d < D)[None, :]
        at = r[:, None] * 2 * D + d[None, :]
        a = tl.load(x_R2D + at, mask=there, other=0.0).to(tl.float32) + bias_a[None, :]
        g = tl.load(x_R2D + at + D, mask=there, other=0.0).to(tl.float32) + bias_g[None, :]
        y = a * g * 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        tl.store(y_RD + r[:, None] * D + d[None, :], y.to(y_RD.dtype.element_ty), mask=there)


@triton.jit
def _gate_gradient(x_R2D, bias_2D, dy_RD, dx_R2D, sums_N2D, R, D,
                   BIASED: tl.constexpr, SUMMED: tl.constexpr, ROWS: tl.constexpr,
                   TR: tl.constexpr, TD: tl.constexpr):  # fmt: skip
    """The gradient of x; and of each feature its sum over a chunk of ROWS rows."""
    chunk, d = tl.program_id(0), tl.program_id(1) * TD + tl.arange(0, TD)
    first = chunk * ROWS
    x_R2D += first.to(tl.int64) * 2 * D
    dx_R2D += first.to(tl.int64) * 2 * D
    dy_RD += first.to(tl.int64) * D
    bias_a, bias_g = _biases(bias_2D, d, D, BIASED, TD)
    sum_a = tl.zeros((TR, TD), tl.float32)
    sum_g = tl.zeros((TR, TD), tl.float32)
    for row in range(0, ROWS, TR):
        r = row + tl.arange(0, TR)
        there = (first + r < R)[:, None] & (d < D)[None, :]
        at = r[:, None] * 2 * D + d[None, :]
        a = tl.load(x_R2D + at, mask=there, other=0.0).to(tl.float32) + bias_a[None, :]
        g = tl.load(x_R2D + at + D, mask=there, other=0.0).to(tl.float32) + bias_g[None, :]
        dy = tl.load(dy_RD + r[:, None] * D + d[None, :], mask=there, other=0.0).to(tl.float32)
        below = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))  # the normal distribution's function; then its density
        density = 0.3989422804014327 * tl.exp(-0.5 * g * g)
        da = dy * g * below
        dg = dy * a * (below + g * density)
        tl.store(dx_R2D + at, da.to(dx_R2D.dtype.element_ty), mask=there)
        tl.store(dx_R2D + at + D, dg.to(dx_R2D.dtype.element_ty), mask=there)
        if SUMMED:
            sum_a += da
            sum_g += dg
    if SUMMED:
        tl.store(sums_N2D + chunk * 2 * D + d, tl.sum(sum_a, 0), mask=d < D)
        tl.store(sums_N2D + chunk * 2 * D + D + d, tl.sum(sum_g, 0), mask=d < D)


def _grid(rows: int, features: int) -> tuple[int, int]:
    return triton.cdiv(rows, _ROWS), triton.cdiv(features, _TILE_D)


_TILE = {"ROWS": _ROWS, "TR": _TILE_R, "TD": _TILE_D, "num_warps": _WARPS}


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_R2D: Tensor, bias_2D: Tensor | None) -> Tensor:
        x_R2D = x_R2D.contiguous()
        rows, features = x_R2D.shape[0], x_R2D.shape[1] // 2
        y_RD = torch.empty((rows, features), dtype=x_R2D.dtype, device=x_R2D.device)
        bias = x_R2D if bias_2D is None else bias_2D  # never read where there is none
        _gate[_grid(rows, features)](x_R2D, bias, y_RD, rows, features, BIASED=bias_2D is not None, **_TILE)
        ctx.save_for_backward(x_R2D, bias_2D)
        return y_RD

    @staticmethod
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_R2D, bias_2D = ctx.saved_tensors
        needs_bias = ctx.needs_input_grad[1]
        rows, features = dy_RD.shape
        dx_R2D = torch.empty_like(x_R2D)
        chunks = triton.cdiv(rows, _ROWS) if needs_bias else 0
        sums_N2D = torch.empty((chunks, 2 * features), dtype=torch.float32, device=x_R2D.device)
        _gate_gradient[_grid(rows, features)](
            x_R2D, x_R2D if bias_2D is None else bias_2D, dy_RD.contiguous(), dx_R2D, sums_N2D, rows, features,
            BIASED=bias_2D is not None, SUMMED=needs_bias, **_TILE,
        )  # fmt: skip
        return dx_R2D, sums_N2D.sum(0).to(bias_2D.dtype) if needs_bias else None


def geglu(x: Tensor, bias_2D: Tensor | None) -> Tensor:
    """The first half of (x + bias)'s features times the GELU of the second: [..., 2D] to [..., D], as x is."""
    return _GEGLU.apply(x.flatten(0, -2), bias_2D).unflatten(0, x.shape[:-1])
