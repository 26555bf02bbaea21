"""The end of a residual branch and the layer norm (Ba et al. 2016, arXiv 1607.06450) before the next in one pass.

A transformer's block adds a branch and its bias to the tokens and normalizes them for the next branch. Apart that
reads and writes the tokens three times each way; here once. Backward, the gradient that goes by the next branch is
added to the one that comes through it, and sums over tokens (of the bias, the norm's weight and bias) are taken
along; there are no atomics, so results are the same at each run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE, _WARPS = 4096, 4  # elements of whole rows that a program holds
_PROGRAMS = 1024  # of a backward pass at most; each has sums of its own


@triton.jit
def _add_norm(x_RC, h_RC, bias_C, weight_C, beta_C, y_RC, n_RC, mean_R, rstd_R, R, C, eps,
              ADDED: tl.constexpr, BIASED: tl.constexpr, TR: tl.constexpr, TC: tl.constexpr):  # fmt: skip
    first = tl.program_id(0) * TR
    r, c = tl.arange(0, TR), tl.arange(0, TC)
    there = (first + r < R)[:, None] & (c < C)[None, :]
    base, at = first.to(tl.int64) * C, r[:, None] * C + c[None, :]
    y = tl.load(x_RC + base + at, mask=there, other=0.0)
    dtype = y.dtype
    if ADDED:
        y = y.to(tl.float32) + tl.load(h_RC + base + at, mask=there, other=0.0).to(tl.float32)
        if BIASED:
            y += tl.load(bias_C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        y = y.to(dtype)  # what is normalized is what is kept
        tl.store(y_RC + base + at, y, mask=there)
    y = y.to(tl.float32)
    mean = tl.sum(tl.where(there, y, 0.0), 1) / C
    apart = tl.where(there, y - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(apart * apart, 1) / C + eps)
    weight = tl.load(weight_C + c, mask=c < C, other=0.0).to(tl.float32)
    beta = tl.load(beta_C + c, mask=c < C, other=0.0).to(tl.float32)
    n = apart * rstd[:, None] * weight[None, :] + beta[None, :]
    tl.store(n_RC + base + at, n.to(dtype), mask=there)
    tl.store(mean_R + first + r, mean, mask=first + r < R)
    tl.store(rstd_R + first + r, rstd, mask=first + r < R)


@triton.jit
def _add_norm_gradient(y_RC, dy_RC, dn_RC, weight_C, mean_R, rstd_R, dx_RC, sums_3NC, R, C, stride,
                       ADDED: tl.constexpr, BIASED: tl.constexpr, WEIGHTED: tl.constexpr,
                       ROWS: tl.constexpr, TR: tl.constexpr, TC: tl.constexpr):  # fmt: skip
    """The gradient of the tokens; of ROWS rows also sums of it, of dn, and of dn times the normalized tokens."""
    program = tl.program_id(0)
    c = tl.arange(0, TC)
    weight = tl.load(weight_C + c, mask=c < C, other=0.0).to(tl.float32)
    sum_dx = tl.zeros((TR, TC), tl.float32)
    sum_dn = tl.zeros((TR, TC), tl.float32)
    sum_dnn = tl.zeros((TR, TC), tl.float32)
    for row in range(0, ROWS, TR):
        first = program * ROWS + row
        r = first + tl.arange(0, TR)
        there = (r < R)[:, None] & (c < C)[None, :]
        base, at = first.to(tl.int64) * C, tl.arange(0, TR)[:, None] * C + c[None, :]
        mean = tl.load(mean_R + r, mask=r < R, other=0.0)
        rstd = tl.load(rstd_R + r, mask=r < R, other=0.0)
        y = tl.load(y_RC + base + at, mask=there, other=0.0).to(tl.float32)
        dn = tl.load(dn_RC + base + at, mask=there, other=0.0).to(tl.float32)
        normal = tl.where(there, (y - mean[:, None]) * rstd[:, None], 0.0)
        du = dn * weight[None, :]
        mean_du = tl.sum(du, 1) / C
        mean_dun = tl.sum(du * normal, 1) / C
        dx = rstd[:, None] * (du - mean_du[:, None] - normal * mean_dun[:, None])
        if ADDED:
            dx += tl.load(dy_RC + base + at, mask=there, other=0.0).to(tl.float32)
        tl.store(dx_RC + base + at, dx.to(dx_RC.dtype.element_ty), mask=there)
        if BIASED:
            sum_dx += tl.where(there, dx, 0.0)
        if WEIGHTED:
            sum_dn += dn
            sum_dnn += dn * normal
    to = program * C + c
    if BIASED:
        tl.store(sums_3NC + to, tl.sum(sum_dx, 0), mask=c < C)
    if WEIGHTED:
        tl.store(sums_3NC + stride + to, tl.sum(sum_dn, 0), mask=c < C)
        tl.store(sums_3NC + 2 * stride + to, tl.sum(sum_dnn, 0), mask=c < C)


def _tile(features: int) -> dict[str, int]:
    columns = triton.next_power_of_2(features)
    return {"TR": max(1, _TILE // columns), "TC": columns, "num_warps": _WARPS}


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor | None, bias_C: Tensor | None, weight_C: Tensor, beta_C: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        features = x.shape[-1]
        rows, tile = x.numel() // features, _tile(features)
        added = h is not None
        y = torch.empty_like(x) if added else x
        n = torch.empty_like(x)
        mean_R, rstd_R = torch.empty((2, rows), dtype=torch.float32, device=x.device).unbind()
        other = h.contiguous() if h is not None else x  # never read where there is none
        bias = x if bias_C is None else bias_C
        _add_norm[(triton.cdiv(rows, tile["TR"]),)](
            x, other, bias, weight_C, beta_C, y, n, mean_R, rstd_R, rows, features, eps,
            ADDED=added, BIASED=bias_C is not None, **tile,
        )  # fmt: skip
        ctx.save_for_backward(y, bias_C, weight_C, beta_C, mean_R, rstd_R)
        ctx.set_materialize_grads(False)
        return y, n

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dn: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, bias_C, weight_C, beta_C, mean_R, rstd_R = ctx.saved_tensors
        needs_x, needs_h, needs_bias, needs_weight, needs_beta, _ = ctx.needs_input_grad
        if dn is None:
            dn = torch.zeros_like(y)
        dn = dn.contiguous()
        features = y.shape[-1]
        rows, tile = y.numel() // features, _tile(features)
        of_one = max(tile["TR"], triton.next_power_of_2(triton.cdiv(rows, _PROGRAMS)))
        programs = triton.cdiv(rows, of_one)
        weighted = needs_weight or needs_beta
        sums_3NC = torch.empty(
            (3 if needs_bias or weighted else 0, programs, features), dtype=torch.float32, device=y.device
        )
        dx = torch.empty_like(y)
        _add_norm_gradient[(programs,)](
            y, y if dy is None else dy.contiguous(), dn, weight_C, mean_R, rstd_R, dx, sums_3NC,
            rows, features, programs * features,
            ADDED=dy is not None, BIASED=needs_bias, WEIGHTED=weighted, ROWS=of_one, **tile,
        )  # fmt: skip
        sums_3C = sums_3NC.sum(1)
        return (
            dx if needs_x else None,
            dx if needs_h else None,
            sums_3C[0].to(bias_C.dtype) if needs_bias else None,
            sums_3C[2].to(weight_C.dtype) if needs_weight else None,
            sums_3C[1].to(beta_C.dtype) if needs_beta else None,
            None,
        )


def add_norm(
    x: Tensor, h: Tensor | None, bias_C: Tensor | None, weight_C: Tensor, beta_C: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(y, layer norm of y over the last dimension) with y = x + h + bias, both [..., C] in the dtype of x.

    Go on with y where x or h was used further: its gradient then comes along with the norm's.

    Args:
        h: of the shape of x; without it y is x, and there is no bias.
        bias_C: may be None; weight_C, beta_C: the norm's. Vectors are contiguous, of any float dtype.
    """
    return _AddNorm.apply(x, h, bias_C, weight_C, beta_C, eps)
