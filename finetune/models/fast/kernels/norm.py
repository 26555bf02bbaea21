"""Group norm (Wu & He 2018, arXiv 1803.08494, eq. 1 to 4) of channels-last maps, with what stands beside it.

In a U-Net that is a shift of each channel before it (the embedded time, a convolution's bias) and SiLU after it.

torch's own returns NCHW for channels-last input, so that each norm copies its map twice. Here three Triton kernels
read it twice and write it once: moments of chunks, moments of groups, the map itself; backward likewise. Moments
are float32 and merged as Chan et al. 1979 do (pairs of counts, means and sums of squares), so that a large mean
costs no digits; there are no atomics, so results are the same at each run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE_S, _TILE_C, _WARPS = 16, 64, 2
_ROWS = 128  # of a chunk at least
_CHUNKS = 64  # of a map's cells at most; each has its own moments


@triton.jit
def _moments(x_BSC, shift_BC, mean_BNC, m2_BNC, S, C,
             ROWS: tl.constexpr, SHIFTED: tl.constexpr,
             TS: tl.constexpr, TC: tl.constexpr):  # fmt: skip
    """Mean and sum of squared distances from it, of each channel over a chunk of ROWS cells."""
    sample, chunk, c = tl.program_id(0), tl.program_id(1), tl.program_id(2) * TC + tl.arange(0, TC)
    first = chunk * ROWS
    last = tl.minimum(first + ROWS, S)
    x_BSC += sample.to(tl.int64) * S * C
    # Distances from the chunk's first cell: squares of the values themselves would lose digits to a large mean.
    pivot = tl.load(x_BSC + first * C + c, mask=c < C, other=0.0).to(tl.float32)
    total = tl.zeros((TS, TC), tl.float32)
    squares = tl.zeros((TS, TC), tl.float32)
    for row in range(0, ROWS, TS):
        s = first + row + tl.arange(0, TS)
        there = (s < last)[:, None] & (c < C)[None, :]
        x = tl.load(x_BSC + s[:, None] * C + c[None, :], mask=there, other=0.0).to(tl.float32)
        apart = tl.where(there, x - pivot[None, :], 0.0)
        total += apart
        squares += apart * apart
    count = (last - first).to(tl.float32)
    sum_C = tl.sum(total, 0)
    mean_C = pivot + sum_C / count
    if SHIFTED:
        mean_C += tl.load(shift_BC + sample * C + c, mask=c < C, other=0.0).to(tl.float32)
    to = (sample * tl.num_programs(1) + chunk) * C + c
    tl.store(mean_BNC + to, mean_C, mask=c < C)
    tl.store(m2_BNC + to, tl.sum(squares, 0) - sum_C * sum_C / count, mask=c < C)


@triton.jit
def _merge(mean_BNC, m2_BNC, mean_BG, rstd_BG, S, C, N, rows, eps, CG,
           TN: tl.constexpr, TG: tl.constexpr):  # fmt: skip
    """Mean and inverse deviation of a group of CG channels, from those of its chunks and channels."""
    sample, group = tl.program_id(0), tl.program_id(1)
    n, g = tl.arange(0, TN), tl.arange(0, TG)
    there = (n < N)[:, None] & (g < CG)[None, :]
    at = (sample * N + n)[:, None] * C + (group * CG + g)[None, :]
    mean = tl.load(mean_BNC + at, mask=there, other=0.0)
    m2 = tl.load(m2_BNC + at, mask=there, other=0.0)
    count = tl.maximum(tl.minimum(rows, S - n * rows), 0).to(tl.float32)[:, None]
    size = S * CG * 1.0
    whole = tl.sum(tl.sum(count * mean, 1), 0) / size
    apart = tl.where(there, mean - whole, 0.0)
    variance = tl.sum(tl.sum(m2 + count * apart * apart, 1), 0) / size
    to = sample * (C // CG) + group
    tl.store(mean_BG + to, whole)
    tl.store(rstd_BG + to, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _of_channels(shift_BC, weight_C, bias_C, mean_BG, rstd_BG, sample, c, C, CG, SHIFTED: tl.constexpr):
    """Of the channels c of a sample: mean without the shift, inverse deviation, weight, bias; all float32."""
    at = sample * (C // CG) + c // CG
    mean_C = tl.load(mean_BG + at, mask=c < C, other=0.0)
    rstd_C = tl.load(rstd_BG + at, mask=c < C, other=0.0)
    weight = tl.load(weight_C + c, mask=c < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_C + c, mask=c < C, other=0.0).to(tl.float32)
    if SHIFTED:
        mean_C -= tl.load(shift_BC + sample * C + c, mask=c < C, other=0.0).to(tl.float32)
    return mean_C, rstd_C, weight, bias


@triton.jit
def _normalize(x_BSC, shift_BC, weight_C, bias_C, mean_BG, rstd_BG, y_BSC, S, C, CG,
               ROWS: tl.constexpr, SHIFTED: tl.constexpr, SILU: tl.constexpr,
               TS: tl.constexpr, TC: tl.constexpr):  # fmt: skip
    sample, chunk, c = tl.program_id(0), tl.program_id(1), tl.program_id(2) * TC + tl.arange(0, TC)
    first = chunk * ROWS
    last = tl.minimum(first + ROWS, S)
    x_BSC += sample.to(tl.int64) * S * C
    y_BSC += sample.to(tl.int64) * S * C
    mean_C, rstd_C, weight, bias = _of_channels(
        shift_BC, weight_C, bias_C, mean_BG, rstd_BG, sample, c, C, CG, SHIFTED
    )
    scale = rstd_C * weight
    for row in range(0, ROWS, TS):
        s = first + row + tl.arange(0, TS)
        there = (s < last)[:, None] & (c < C)[None, :]
        at_SC = s[:, None] * C + c[None, :]
        x = tl.load(x_BSC + at_SC, mask=there, other=0.0).to(tl.float32)
        y = (x - mean_C[None, :]) * scale[None, :] + bias[None, :]
        if SILU:
            y = y * tl.sigmoid(y)
        tl.store(y_BSC + at_SC, y.to(y_BSC.dtype.element_ty), mask=there)


@triton.jit
def _sums(x_BSC, dy_BSC, shift_BC, weight_C, bias_C, mean_BG, rstd_BG, sums_3BNC, S, C, CG, stride,
          ROWS: tl.constexpr, SHIFTED: tl.constexpr, SILU: tl.constexpr,
          TS: tl.constexpr, TC: tl.constexpr):  # fmt: skip
    """Of a chunk, by channel: sums of the gradient before SiLU, of it times the normalized map, of that map."""
    sample, chunk, c = tl.program_id(0), tl.program_id(1), tl.program_id(2) * TC + tl.arange(0, TC)
    first = chunk * ROWS
    last = tl.minimum(first + ROWS, S)
    x_BSC += sample.to(tl.int64) * S * C
    dy_BSC += sample.to(tl.int64) * S * C
    mean_C, rstd_C, weight, bias = _of_channels(
        shift_BC, weight_C, bias_C, mean_BG, rstd_BG, sample, c, C, CG, SHIFTED
    )
    sum_du = tl.zeros((TS, TC), tl.float32)
    sum_dun = tl.zeros((TS, TC), tl.float32)
    sum_n = tl.zeros((TS, TC), tl.float32)
    for row in range(0, ROWS, TS):
        s = first + row + tl.arange(0, TS)
        there = (s < last)[:, None] & (c < C)[None, :]
        at_SC = s[:, None] * C + c[None, :]
        x = tl.load(x_BSC + at_SC, mask=there, other=0.0).to(tl.float32)
        du = tl.load(dy_BSC + at_SC, mask=there, other=0.0).to(tl.float32)
        normal = tl.where(there, (x - mean_C[None, :]) * rstd_C[None, :], 0.0)
        if SILU:
            u = normal * weight[None, :] + bias[None, :]
            gate = tl.sigmoid(u)
            du = du * gate * (1.0 + u * (1.0 - gate))
        sum_du += du
        sum_dun += du * normal
        if SHIFTED:
            sum_n += normal
    to = (sample * tl.num_programs(1) + chunk) * C + c
    tl.store(sums_3BNC + to, tl.sum(sum_du, 0), mask=c < C)
    tl.store(sums_3BNC + stride + to, tl.sum(sum_dun, 0), mask=c < C)
    if SHIFTED:
        tl.store(sums_3BNC + 2 * stride + to, tl.sum(sum_n, 0), mask=c < C)


@triton.jit
def _merge_sums(sums_3BNC, weight_C, rstd_BG, sums_2BC, means_2BG, dshift_BC, S, C, N, stride, BC, BG, CG,
                SHIFTED: tl.constexpr, TN: tl.constexpr, TG: tl.constexpr):  # fmt: skip
    """Sums of a sample's channels; and of its group the two means that are taken out of the gradient."""
    sample, group = tl.program_id(0), tl.program_id(1)
    n, g = tl.arange(0, TN), tl.arange(0, TG)
    there = (n < N)[:, None] & (g < CG)[None, :]
    c = group * CG + g
    at = (sample * N + n)[:, None] * C + c[None, :]
    sum_du = tl.sum(tl.load(sums_3BNC + at, mask=there, other=0.0), 0)
    sum_dun = tl.sum(tl.load(sums_3BNC + stride + at, mask=there, other=0.0), 0)
    weight = tl.load(weight_C + c, mask=g < CG, other=0.0).to(tl.float32)
    size = S * CG * 1.0
    mean_du = tl.sum(weight * sum_du, 0) / size
    mean_dun = tl.sum(weight * sum_dun, 0) / size
    tl.store(sums_2BC + sample * C + c, sum_du, mask=g < CG)
    tl.store(sums_2BC + BC + sample * C + c, sum_dun, mask=g < CG)
    to = sample * (C // CG) + group
    tl.store(means_2BG + to, mean_du)
    tl.store(means_2BG + BG + to, mean_dun)
    if SHIFTED:
        sum_n = tl.sum(tl.load(sums_3BNC + 2 * stride + at, mask=there, other=0.0), 0)
        dshift = tl.load(rstd_BG + to) * (weight * sum_du - S * mean_du - mean_dun * sum_n)
        tl.store(dshift_BC + sample * C + c, dshift, mask=g < CG)


@triton.jit
def _gradient(x_BSC, dy_BSC, further_BSC, shift_BC, weight_C, bias_C, mean_BG, rstd_BG, means_2BG, dx_BSC,
              S, C, CG, BG,
              ROWS: tl.constexpr, ADDED: tl.constexpr, SHIFTED: tl.constexpr, SILU: tl.constexpr,
              TS: tl.constexpr, TC: tl.constexpr):  # fmt: skip
    sample, chunk, c = tl.program_id(0), tl.program_id(1), tl.program_id(2) * TC + tl.arange(0, TC)
    first = chunk * ROWS
    last = tl.minimum(first + ROWS, S)
    x_BSC += sample.to(tl.int64) * S * C
    dy_BSC += sample.to(tl.int64) * S * C
    dx_BSC += sample.to(tl.int64) * S * C
    further_BSC += sample.to(tl.int64) * S * C
    mean_C, rstd_C, weight, bias = _of_channels(
        shift_BC, weight_C, bias_C, mean_BG, rstd_BG, sample, c, C, CG, SHIFTED
    )
    at = sample * (C // CG) + c // CG
    mean_du = tl.load(means_2BG + at, mask=c < C, other=0.0)
    mean_dun = tl.load(means_2BG + BG + at, mask=c < C, other=0.0)
    for row in range(0, ROWS, TS):
        s = first + row + tl.arange(0, TS)
        there = (s < last)[:, None] & (c < C)[None, :]
        at_SC = s[:, None] * C + c[None, :]
        x = tl.load(x_BSC + at_SC, mask=there, other=0.0).to(tl.float32)
        du = tl.load(dy_BSC + at_SC, mask=there, other=0.0).to(tl.float32)
        normal = (x - mean_C[None, :]) * rstd_C[None, :]
        if SILU:
            u = normal * weight[None, :] + bias[None, :]
            gate = tl.sigmoid(u)
            du = du * gate * (1.0 + u * (1.0 - gate))
        dx = rstd_C[None, :] * (weight[None, :] * du - mean_du[None, :] - normal * mean_dun[None, :])
        if ADDED:
            dx += tl.load(further_BSC + at_SC, mask=there, other=0.0).to(tl.float32)
        tl.store(dx_BSC + at_SC, dx.to(dx_BSC.dtype.element_ty), mask=there)


def _merged(of_group: int) -> dict[str, int]:
    """Tiles of what merges: few kinds, since each is compiled."""
    return {"TN": _CHUNKS, "TG": triton.next_power_of_2(of_group)}


def _chunks(cells: int) -> tuple[int, int]:
    """(number of chunks, cells of one): enough programs for a GPU, few enough to merge in one."""
    rows = max(_ROWS, triton.next_power_of_2(triton.cdiv(cells, _CHUNKS)))
    return triton.cdiv(cells, rows), rows


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BCHW: Tensor,
        shift_BC: Tensor | None,
        weight_C: Tensor,
        bias_C: Tensor,
        groups: int,
        eps: float,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = x_BCHW.shape
        cells, of_group = height * width, channels // groups
        number, rows = _chunks(cells)
        new = {"dtype": torch.float32, "device": x_BCHW.device}
        y_BCHW = torch.empty_like(x_BCHW)  # keeps the layout
        mean_BNC, m2_BNC = torch.empty((2, batch, number, channels), **new).unbind()  # type: ignore[call-overload]
        mean_BG, rstd_BG = torch.empty((2, batch, groups), **new).unbind()  # type: ignore[call-overload]
        shift = x_BCHW if shift_BC is None else shift_BC.contiguous()  # never read where there is none
        shifted = shift_BC is not None
        grid = (batch, number, triton.cdiv(channels, _TILE_C))
        tile = {"ROWS": rows, "TS": _TILE_S, "TC": _TILE_C, "num_warps": _WARPS}
        _moments[grid](x_BCHW, shift, mean_BNC, m2_BNC, cells, channels, SHIFTED=shifted, **tile)
        _merge[(batch, groups)](
            mean_BNC, m2_BNC, mean_BG, rstd_BG, cells, channels, number, rows, eps, of_group, **_merged(of_group)
        )
        _normalize[grid](
            x_BCHW, shift, weight_C, bias_C, mean_BG, rstd_BG, y_BCHW, cells, channels, of_group,
            SHIFTED=shifted, SILU=silu, **tile,
        )  # fmt: skip
        ctx.save_for_backward(x_BCHW, shift if shifted else None, weight_C, bias_C, mean_BG, rstd_BG)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        return x_BCHW, y_BCHW

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, further_BCHW: Tensor | None, dy_BCHW: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_BCHW, shift_BC, weight_C, bias_C, mean_BG, rstd_BG = ctx.saved_tensors
        added = further_BCHW is not None
        dy_BCHW = torch.zeros_like(x_BCHW) if dy_BCHW is None else dy_BCHW
        dy_BCHW = dy_BCHW.contiguous(memory_format=torch.channels_last)
        further_BCHW = dy_BCHW if further_BCHW is None else further_BCHW
        further_BCHW = further_BCHW.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = x_BCHW.shape
        groups = mean_BG.shape[1]
        cells, of_group = height * width, channels // groups
        number, rows = _chunks(cells)
        new = {"dtype": torch.float32, "device": x_BCHW.device}
        shifted = shift_BC is not None
        shift = x_BCHW if shift_BC is None else shift_BC
        sums_3BNC = torch.empty((3 if shifted else 2, batch, number, channels), **new)  # type: ignore[call-overload]
        sums_2BC = torch.empty((2, batch, channels), **new)  # type: ignore[call-overload]
        means_2BG = torch.empty((2, batch, groups), **new)  # type: ignore[call-overload]
        dshift_BC = torch.empty((batch, channels) if shifted else (0,), **new)  # type: ignore[call-overload]
        dx_BCHW = torch.empty_like(x_BCHW)
        grid = (batch, number, triton.cdiv(channels, _TILE_C))
        tile = {"ROWS": rows, "TS": _TILE_S, "TC": _TILE_C, "num_warps": _WARPS}
        stride = batch * number * channels
        _sums[grid](
            x_BCHW, dy_BCHW, shift, weight_C, bias_C, mean_BG, rstd_BG, sums_3BNC, cells, channels, of_group,
            stride, SHIFTED=shifted, SILU=ctx.silu, **tile,
        )  # fmt: skip
        _merge_sums[(batch, groups)](
            sums_3BNC, weight_C, rstd_BG, sums_2BC, means_2BG, dshift_BC, cells, channels, number, stride,
            batch * channels, batch * groups, of_group, SHIFTED=shifted, **_merged(of_group),
        )  # fmt: skip
        _gradient[grid](
            x_BCHW, dy_BCHW, further_BCHW, shift, weight_C, bias_C, mean_BG, rstd_BG, means_2BG, dx_BCHW, cells,
            channels, of_group, batch * groups, ADDED=added, SHIFTED=shifted, SILU=ctx.silu, **tile,
        )  # fmt: skip
        _, needs_shift, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        sums_2C = sums_2BC.sum(1) if needs_weight or needs_bias else sums_2BC
        return (
            dx_BCHW,
            dshift_BC.to(shift_BC.dtype) if needs_shift else None,
            sums_2C[1].to(weight_C.dtype) if needs_weight else None,
            sums_2C[0].to(bias_C.dtype) if needs_bias else None,
            None,
            None,
            None,
        )


def group_norm(
    x_BCHW: Tensor, shift_BC: Tensor | None, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """(x, SiLU of normalized `x_BCHW + shift_BC` times weight plus bias), both channels-last in the dtype of x.

    Go on with the first where x is used further: its gradient then comes along with the norm's.

    Args:
        x_BCHW, shift_BC: float32, bfloat16 or float16; weight_C, bias_C: contiguous.
    """
    return _GroupNorm.apply(x_BCHW, shift_BC, weight_C, bias_C, groups, eps, silu)
