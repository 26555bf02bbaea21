"""Rows of one head of queries, keys or values [B, S, H, D], with their features in two parts.

A block of Triton's has a power of two of columns. Features that are none are taken as two such blocks: 40 as 32 and
16, where one would hold 64. Functions with (D, D1, D2) take the features, and the columns of both parts; what is of
a second part is the first where there is none, and never used.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)  # exponents of e as those of two, which a GPU raises


@triton.jit
def load(x, at, R, stride, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, WHOLE: tl.constexpr = False):
    """Rows `at` of the R of a head, in both parts; zeros beyond D, and beyond R unless they are WHOLE."""
    d = tl.arange(0, D1)
    first = tl.load(x + at[:, None] * stride + d[None, :], mask=_there(at, d, R, D, WHOLE), other=0.0)
    second = first
    if D2 > 0:
        e = D1 + tl.arange(0, D2)
        second = tl.load(x + at[:, None] * stride + e[None, :], mask=_there(at, e, R, D, WHOLE), other=0.0)
    return first, second


@triton.jit
def _there(at, d, R, D: tl.constexpr, WHOLE: tl.constexpr):
    there = (d < D)[None, :]
    if not WHOLE:
        there = there & (at < R)[:, None]
    return there


@triton.jit
def store(x, at, R, stride, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, first, second):
    """What `load` takes."""
    d = tl.arange(0, D1)
    tl.store(x + at[:, None] * stride + d[None, :], first.to(x.dtype.element_ty), mask=_there(at, d, R, D, False))
    if D2 > 0:
        e = D1 + tl.arange(0, D2)
        second = second.to(x.dtype.element_ty)
        tl.store(x + at[:, None] * stride + e[None, :], second, mask=_there(at, e, R, D, False))


@triton.jit
def product(x1, x2, y1, y2, D2: tl.constexpr):
    """x y^T over both parts."""
    total = tl.dot(x1, tl.trans(y1), input_precision="ieee")
    if D2 > 0:
        total = tl.dot(x2, tl.trans(y2), total, input_precision="ieee")
    return total


def parts(count: int) -> tuple[int, int]:
    """Two powers of two that hold as many; a product takes 16 at least."""
    first = max(16, 1 << (count.bit_length() - 1))
    return first, max(16, triton.next_power_of_2(count - first)) if count > first else 0


def dense(x_BSHD: Tensor) -> Tensor:
    """With a token's heads side by side."""
    return x_BSHD if x_BSHD.stride()[2:] == (x_BSHD.shape[3], 1) else x_BSHD.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Of samples and tokens of each."""
    return [stride for x_BSHD in tensors for stride in x_BSHD.stride()[:2]]
