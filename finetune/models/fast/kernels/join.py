"""The sum of two channels-last maps and a bias of each channel, which may come with a seam of zeros.

It ends a residual block: what the last convolution's bias, the skip connection and the next convolution's padding
would do in a pass each is done in one. Forward alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE_S, _TILE_C, _WARPS = 32, 64, 4


@triton.jit
def _join(x_BSC, h_BSC, bias_C, y_BPC, H, W, SEAM, C, TS: tl.constexpr, TC: tl.constexpr):
    p, sample = tl.program_id(0) * TS + tl.arange(0, TS), tl.program_id(1).to(tl.int64)
    c = tl.program_id(2) * TC + tl.arange(0, TC)
    row, column = p // (W + SEAM), p % (W + SEAM)
    written = (row < H + SEAM)[:, None] & (c < C)[None, :]
    there = written & (row < H)[:, None] & (column < W)[:, None]
    at_SC = (row * W + column)[:, None] * C + c[None, :]
    x = tl.load(x_BSC + sample * H * W * C + at_SC, mask=there, other=0.0).to(tl.float32)
    h = tl.load(h_BSC + sample * H * W * C + at_SC, mask=there, other=0.0).to(tl.float32)
    bias = tl.load(bias_C + c, mask=c < C, other=0.0).to(tl.float32)
    y = tl.where(there, x + h + bias[None, :], 0.0)
    y_BPC += sample * (H + SEAM) * (W + SEAM) * C
    tl.store(y_BPC + p[:, None] * C + c[None, :], y.to(y_BPC.dtype.element_ty), mask=written)


def join(x_BCHW: Tensor, h_BCHW: Tensor, bias_C: Tensor, *, seam: bool = False) -> Tensor:
    """`x_BCHW + h_BCHW + bias_C`, rounded once: [B, C, H, W], channels-last, in the dtype of `x_BCHW`.

    Args:
        x_BCHW, h_BCHW: channels-last, of one shape, with fewer than 2^31 elements a sample.
        bias_C: contiguous, of any float dtype.
        seam: give [B, C, H + 1, W + 1], whose last row and column are zeros.
    """
    batch, channels, height, width = x_BCHW.shape
    edge = int(seam)
    y_BCHW = torch.empty(
        (batch, channels, height + edge, width + edge),
        dtype=x_BCHW.dtype,
        device=x_BCHW.device,
        memory_format=torch.channels_last,
    )
    cells = (height + edge) * (width + edge)
    grid = (triton.cdiv(cells, _TILE_S), batch, triton.cdiv(channels, _TILE_C))
    _join[grid](
        x_BCHW, h_BCHW, bias_C, y_BCHW, height, width, edge, channels, TS=_TILE_S, TC=_TILE_C, num_warps=_WARPS
    )
    return y_BCHW
