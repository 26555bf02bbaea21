"""Two channels-last maps as one: their sum, or one beside the other.

`join` ends a residual block: what the last convolution's bias, the skip connection and the next convolution's
padding would do in a pass each is done in one. Backward the gradient is that of all, and the bias's is summed in
one pass without atomics. `cat` takes a skip connection up; torch's own copies at half a GPU's bandwidth.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE_S, _TILE_C, _WARPS = 32, 64, 4
_CHUNKS = 512  # of a map's cells at most, whose sums are added up afterwards


@triton.jit
def _join(x_BSC, h_BSC, bias_C, y_BPC, H, W, SEAM, C,
          ADDED: tl.constexpr, TS: tl.constexpr, TC: tl.constexpr):  # fmt: skip
    p, sample = tl.program_id(0) * TS + tl.arange(0, TS), tl.program_id(1).to(tl.int64)
    c = tl.program_id(2) * TC + tl.arange(0, TC)
    row, column = p // (W + SEAM), p % (W + SEAM)
    written = (row < H + SEAM)[:, None] & (c < C)[None, :]
    there = written & (row < H)[:, None] & (column < W)[:, None]
    at_SC = (row * W + column)[:, None] * C + c[None, :]
    x = tl.load(x_BSC + sample * H * W * C + at_SC, mask=there, other=0.0).to(tl.float32)
    if ADDED:
        x += tl.load(h_BSC + sample * H * W * C + at_SC, mask=there, other=0.0).to(tl.float32)
    bias = tl.load(bias_C + c, mask=c < C, other=0.0).to(tl.float32)
    y = tl.where(there, x + bias[None, :], 0.0)
    y_BPC += sample * (H + SEAM) * (W + SEAM) * C
    tl.store(y_BPC + p[:, None] * C + c[None, :], y.to(y_BPC.dtype.element_ty), mask=written)


@triton.jit
def _column_sums(x_RC, sums_NC, R, C, ROWS: tl.constexpr, TS: tl.constexpr, TC: tl.constexpr):
    """Of each channel the sum over a chunk of ROWS rows."""
    chunk, c = tl.program_id(0), tl.program_id(1) * TC + tl.arange(0, TC)
    first = chunk * ROWS
    x_RC += first.to(tl.int64) * C
    total = tl.zeros((TS, TC), tl.float32)
    for row in range(0, ROWS, TS):
        r = row + tl.arange(0, TS)
        there = (first + r < R)[:, None] & (c < C)[None, :]
        total += tl.load(x_RC + r[:, None] * C + c[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(sums_NC + chunk * C + c, tl.sum(total, 0), mask=c < C)


def _sums(x_BCHW: Tensor) -> Tensor:
    """Float32 sums of each channel of a channels-last map: [C]."""
    channels = x_BCHW.shape[1]
    rows = x_BCHW.numel() // channels
    of_one = max(_TILE_S, triton.next_power_of_2(triton.cdiv(rows, _CHUNKS)))
    chunks = triton.cdiv(rows, of_one)
    sums_NC = torch.empty((chunks, channels), dtype=torch.float32, device=x_BCHW.device)
    _column_sums[(chunks, triton.cdiv(channels, _TILE_C))](
        x_BCHW, sums_NC, rows, channels, ROWS=of_one, TS=_TILE_S, TC=_TILE_C, num_warps=_WARPS
    )
    return sums_NC.sum(0)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, h_BCHW: Tensor | None, bias_C: Tensor, seam: bool) -> Tensor:
        batch, channels, height, width = x_BCHW.shape
        edge = int(seam)
        y_BCHW = torch.empty(
            (batch, channels, height + edge, width + edge),
            dtype=x_BCHW.dtype,
            device=x_BCHW.device,
            memory_format=torch.channels_last,
        )
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        other = x_BCHW if h_BCHW is None else h_BCHW.contiguous(memory_format=torch.channels_last)
        grid = (triton.cdiv((height + edge) * (width + edge), _TILE_S), batch, triton.cdiv(channels, _TILE_C))
        _join[grid](
            x_BCHW, other, bias_C, y_BCHW, height, width, edge, channels,
            ADDED=h_BCHW is not None, TS=_TILE_S, TC=_TILE_C, num_warps=_WARPS,
        )  # fmt: skip
        ctx.seam, ctx.dtype = seam, bias_C.dtype
        return y_BCHW

    @staticmethod
    def backward(ctx: Any, dy_BCHW: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.seam:
            dy_BCHW = dy_BCHW[:, :, :-1, :-1]
        dy_BCHW = dy_BCHW.contiguous(memory_format=torch.channels_last)
        needs_x, needs_h, needs_bias, _ = ctx.needs_input_grad
        return (
            dy_BCHW if needs_x else None,
            dy_BCHW if needs_h else None,
            _sums(dy_BCHW).to(ctx.dtype) if needs_bias else None,
            None,
        )


def join(x_BCHW: Tensor, h_BCHW: Tensor | None, bias_C: Tensor, *, seam: bool = False) -> Tensor:
    """`x_BCHW + h_BCHW + bias_C`, rounded once: [B, C, H, W], channels-last, in the dtype of `x_BCHW`.

    Args:
        x_BCHW: of fewer than 2^31 elements a sample; h_BCHW: of the same shape, or None.
        bias_C: contiguous, of any float dtype.
        seam: give [B, C, H + 1, W + 1], whose last row and column are zeros.
    """
    return _Join.apply(x_BCHW, h_BCHW, bias_C, seam)


@triton.jit
def _cat(x_RC, skip_RD, y_RE, R, C, D, SPLIT: tl.constexpr, TS: tl.constexpr, TC: tl.constexpr):
    """Rows of C and D channels to rows of both; with SPLIT the other way round."""
    first, e = tl.program_id(0) * TS, tl.program_id(1) * TC + tl.arange(0, TC)
    r = tl.arange(0, TS)
    there = (first + r < R)[:, None]
    of_x, of_skip = there & (e < C)[None, :], there & ((e >= C) & (e < C + D))[None, :]
    x_RC += first.to(tl.int64) * C + r[:, None] * C + e[None, :]
    skip_RD += first.to(tl.int64) * D + r[:, None] * D + (e - C)[None, :]
    y_RE += first.to(tl.int64) * (C + D) + r[:, None] * (C + D) + e[None, :]
    if SPLIT:
        y = tl.load(y_RE, mask=of_x | of_skip, other=0.0)
        tl.store(x_RC, y, mask=of_x)
        tl.store(skip_RD, y, mask=of_skip)
    else:
        tl.store(y_RE, tl.load(x_RC, mask=of_x, other=0.0), mask=of_x)
        tl.store(y_RE, tl.load(skip_RD, mask=of_skip, other=0.0), mask=of_skip)


class _Cat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, skip_BDHW: Tensor) -> Tensor:
        x_BCHW, skip_BDHW = (one.contiguous(memory_format=torch.channels_last) for one in (x_BCHW, skip_BDHW))
        batch, channels, height, width = x_BCHW.shape
        ctx.channels = channels, skip_BDHW.shape[1]
        shape = (batch, sum(ctx.channels), height, width)
        y_BEHW = torch.empty(shape, dtype=x_BCHW.dtype, device=x_BCHW.device, memory_format=torch.channels_last)
        _Cat.run(x_BCHW, skip_BDHW, y_BEHW, split=False)
        return y_BEHW

    @staticmethod
    def backward(ctx: Any, dy_BEHW: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        dy_BEHW = dy_BEHW.contiguous(memory_format=torch.channels_last)
        batch, _, height, width = dy_BEHW.shape
        dx_BCHW, dskip_BDHW = (
            torch.empty(
                (batch, each, height, width),
                dtype=dy_BEHW.dtype,
                device=dy_BEHW.device,
                memory_format=torch.channels_last,
            )
            for each in ctx.channels
        )
        _Cat.run(dx_BCHW, dskip_BDHW, dy_BEHW, split=True)
        return dx_BCHW, dskip_BDHW

    @staticmethod
    def run(x_BCHW: Tensor, skip_BDHW: Tensor, y_BEHW: Tensor, *, split: bool) -> None:
        channels, further = x_BCHW.shape[1], skip_BDHW.shape[1]
        rows = y_BEHW.numel() // (channels + further)
        _cat[(triton.cdiv(rows, _TILE_S), triton.cdiv(channels + further, _TILE_C))](
            x_BCHW, skip_BDHW, y_BEHW, rows, channels, further,
            SPLIT=split, TS=_TILE_S, TC=_TILE_C, num_warps=_WARPS,
        )  # fmt: skip


def cat(x_BCHW: Tensor, skip_BDHW: Tensor) -> Tensor:
    """Two maps of one dtype, [B, C, H, W] and [B, D, H, W], as one [B, C + D, H, W]; all are channels-last.

    The gradient comes as two maps in memory, not as slices of one.
    """
    return _Cat.apply(x_BCHW, skip_BDHW)
