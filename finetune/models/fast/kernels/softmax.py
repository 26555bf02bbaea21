"""Softmax over rows of float32 scores, written in the type of what it weighs.

torch's own gives float32 as well: a pass more to cast it. The sum runs along with the largest score (Milakov &
Gimelshein 2018, arXiv 1805.02867, algorithm 3), so that rows of any length are read twice. Forward alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE, _WARPS = 4096, 8


@triton.jit
def _softmax(x_RS, y_RS, S, scale, TILES: tl.constexpr, T: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_RS += row * S
    y_RS += row * S
    largest = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for tile in range(TILES):
        s = tile * T + tl.arange(0, T)
        x = tl.load(x_RS + s, mask=s < S, other=-float("inf"))
        new = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp((largest - new) * scale) + tl.sum(tl.exp((x - new) * scale), 0)
        largest = new
    for tile in range(TILES):
        s = tile * T + tl.arange(0, T)
        x = tl.load(x_RS + s, mask=s < S, other=-float("inf"))
        tl.store(y_RS + s, (tl.exp((x - largest) * scale) / total).to(y_RS.dtype.element_ty), mask=s < S)


def softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax(scale * scores) over the last dimension: the shape of `scores`, in `dtype`.

    Args:
        scores: float32, contiguous; scale: above 0.
    """
    weights = torch.empty_like(scores, dtype=dtype)
    cells = scores.shape[-1]
    tiles = triton.cdiv(cells, _TILE)
    _softmax[(scores.numel() // cells,)](scores, weights, cells, scale, TILES=tiles, T=_TILE, num_warps=_WARPS)
    return weights
