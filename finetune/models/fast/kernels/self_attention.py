"""The backward pass of self-attention (Dao 2023, arXiv 2307.08691, algorithm 2), for heads of 40 features.

SD 1.x has them at its first level, where maps have the most tokens. Flash kernels take 40 features as 64. Here they
are 32 and 16, and three of the eight columns that are left hold what is subtracted from the gradient of each
query's weights, D_i = sum(y dy), beside -1 for the values: so tensor cores subtract it, in float32. D_i is cut into
three numbers of 8 bits each, and nothing of it is lost.

One kernel goes through the queries for a block of keys, another through the keys for a block of queries. Scores and
weights are computed twice for that, but there are no atomics: gradients are the same at each run. The forward pass
is a flash kernel of torch's, which keeps the logarithm of each query's sum of exponentials.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from finetune.models.fast.kernels.heads import LOG2_E, dense, load, parts, product, store, strides

FEATURES = 40
_LEAST = 2**29  # scores: where there are fewer, flash kernels' fewer launches and readings take less time
_PREPARED = 128  # tokens of a program of `_prepare`, and what rows of its results are filled up to
# Rows that are kept, rows that pass by at a time, warps, stages. Each shape fills the registers of two programs.
_OF_KEYS, _OF_QUERIES = (128, 32, 4, 3), (128, 64, 8, 3)


@triton.jit
def _prepare(y_BSHD, dy_BSHD, v_BSHD, sums_BHS, dy_BHPE, v_BHPE, sums_BHP, S, P, H, y_b, y_s, dy_b, dy_s, v_b, v_s,
             TS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):  # fmt: skip
    """The second parts of dy and v with the columns that subtract D_i; sums as exponents of two.

    Up to P, rows beyond S are zeros, and their sums infinite: such queries have weights of zero.
    """
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    s = tl.program_id(0) * TS + tl.arange(0, TS)
    y1, y2 = load(y_BSHD + sample * y_b + head * D, s, S, y_s, D, D1, D2)
    dy1, dy2 = load(dy_BSHD + sample * dy_b + head * D, s, S, dy_s, D, D1, D2)
    _, v2 = load(v_BSHD + sample * v_b + head * D, s, S, v_s, D, D1, D2)
    less = tl.sum(y1.to(tl.float32) * dy1.to(tl.float32), 1) + tl.sum(y2.to(tl.float32) * dy2.to(tl.float32), 1)
    high = less.to(dy2.dtype)
    less -= high.to(tl.float32)
    middle = less.to(dy2.dtype)
    low = (less - middle.to(tl.float32)).to(dy2.dtype)
    e = (D1 + tl.arange(0, D2))[None, :]
    dy2 = tl.where(e == D, high[:, None], dy2)
    dy2 = tl.where(e == D + 1, middle[:, None], dy2)
    dy2 = tl.where(e == D + 2, low[:, None], dy2)
    v2 = tl.where((e >= D) & (e < D + 3), -1.0, v2.to(tl.float32))
    row = sample * H + head
    to = (row * P + s)[:, None] * D2 + tl.arange(0, D2)[None, :]
    tl.store(dy_BHPE + to, dy2)
    tl.store(v_BHPE + to, v2.to(v_BHPE.dtype.element_ty))
    sums = tl.load(sums_BHS + row * S + s, mask=s < S, other=float("inf"))
    tl.store(sums_BHP + row * P + s, sums * LOG2_E)


@triton.jit
def _load_prepared(x_BSHD, x_BHPE, at, S, stride, D1: tl.constexpr, D2: tl.constexpr, WHOLE: tl.constexpr):
    """Both parts, the second as `_prepare` made it."""
    first, _ = load(x_BSHD, at, S, stride, D1, D1, 0, WHOLE)
    return first, tl.load(x_BHPE + at[:, None] * D2 + tl.arange(0, D2)[None, :])


@triton.jit
def _gradient_of_keys(q_BSHD, k_BSHD, v_BSHD, dy_BSHD, dy_BHPE, v_BHPE, sums_BHP, dk_BSHD, dv_BSHD, S, P, H,
                      q_b, q_s, k_b, k_s, v_b, v_s, dy_b, dy_s, dk_b, dk_s, dv_b, dv_s, scale,
                      KEPT: tl.constexpr, PASSED: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
                      D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):  # fmt: skip
    """Of keys and values. Scores lie as [keys, queries], so that products take the weights from registers."""
    head, sample = tl.program_id(1) * D, tl.program_id(2).to(tl.int64)
    prepared = (sample * H + tl.program_id(1)) * P
    q_BSHD += sample * q_b + head
    dy_BSHD += sample * dy_b + head
    k = tl.program_id(0) * KEPT + tl.arange(0, KEPT)
    k1, k2 = load(k_BSHD + sample * k_b + head, k, S, k_s, D, D1, D2, WHOLE)
    v1, v2 = _load_prepared(v_BSHD + sample * v_b + head, v_BHPE + prepared * D2, k, S, v_s, D1, D2, WHOLE)
    dk1, dk2 = tl.zeros((KEPT, D1), tl.float32), tl.zeros((KEPT, D2), tl.float32)
    dv1, dv2 = tl.zeros((KEPT, D1), tl.float32), tl.zeros((KEPT, D2), tl.float32)
    exponent = scale * LOG2_E
    for row in tl.range(0, S, PASSED, num_stages=STAGES):
        s = row + tl.arange(0, PASSED)
        q1, q2 = load(q_BSHD, s, S, q_s, D, D1, D2, WHOLE)
        dy1, dy2 = _load_prepared(dy_BSHD, dy_BHPE + prepared * D2, s, S, dy_s, D1, D2, WHOLE)
        sums = tl.load(sums_BHP + prepared + s)
        weights = tl.exp2(product(k1, k2, q1, q2, D2) * exponent - sums[None, :])
        dscores = (weights * product(v1, v2, dy1, dy2, D2)).to(q1.dtype)
        weights = weights.to(dy1.dtype)
        dv1 = tl.dot(weights, dy1, dv1, input_precision="ieee")
        dv2 = tl.dot(weights, dy2, dv2, input_precision="ieee")
        dk1 = tl.dot(dscores, q1, dk1, input_precision="ieee")
        dk2 = tl.dot(dscores, q2, dk2, input_precision="ieee")
    store(dk_BSHD + sample * dk_b + head, k, S, dk_s, D, D1, D2, dk1 * scale, dk2 * scale)
    store(dv_BSHD + sample * dv_b + head, k, S, dv_s, D, D1, D2, dv1, dv2)


@triton.jit
def _gradient_of_queries(q_BSHD, k_BSHD, v_BSHD, dy_BSHD, dy_BHPE, v_BHPE, sums_BHP, dq_BSHD, S, P, H,
                         q_b, q_s, k_b, k_s, v_b, v_s, dy_b, dy_s, dq_b, dq_s, scale,
                         KEPT: tl.constexpr, PASSED: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
                         D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):  # fmt: skip
    head, sample = tl.program_id(1) * D, tl.program_id(2).to(tl.int64)
    prepared = (sample * H + tl.program_id(1)) * P
    k_BSHD += sample * k_b + head
    v_BSHD += sample * v_b + head
    s = tl.program_id(0) * KEPT + tl.arange(0, KEPT)
    q1, q2 = load(q_BSHD + sample * q_b + head, s, S, q_s, D, D1, D2, WHOLE)
    dy1, dy2 = _load_prepared(dy_BSHD + sample * dy_b + head, dy_BHPE + prepared * D2, s, S, dy_s, D1, D2, WHOLE)
    sums = tl.load(sums_BHP + prepared + s)
    dq1, dq2 = tl.zeros((KEPT, D1), tl.float32), tl.zeros((KEPT, D2), tl.float32)
    exponent = scale * LOG2_E
    for row in tl.range(0, S, PASSED, num_stages=STAGES):
        k = row + tl.arange(0, PASSED)
        k1, k2 = load(k_BSHD, k, S, k_s, D, D1, D2, WHOLE)
        v1, v2 = _load_prepared(v_BSHD, v_BHPE + prepared * D2, k, S, v_s, D1, D2, WHOLE)
        weights = tl.exp2(product(q1, q2, k1, k2, D2) * exponent - sums[:, None])
        if not WHOLE:
            weights = tl.where((k < S)[None, :], weights, 0.0)
        dscores = (weights * product(dy1, dy2, v1, v2, D2)).to(k1.dtype)
        dq1 = tl.dot(dscores, k1, dq1, input_precision="ieee")
        dq2 = tl.dot(dscores, k2, dq2, input_precision="ieee")
    store(dq_BSHD + sample * dq_b + head, s, S, dq_s, D, D1, D2, dq1 * scale, dq2 * scale)


def _launch(q_BSHD: Tensor, shape: tuple[int, int, int, int]) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """(the grid: blocks that are kept, heads, samples; what the kernels are compiled for)."""
    batch, tokens, heads, features = q_BSHD.shape
    kept, passed, warps, stages = shape
    d1, d2 = parts(features)
    return (triton.cdiv(tokens, kept), heads, batch), {
        "KEPT": kept,
        "PASSED": passed,
        "WHOLE": tokens % _PREPARED == 0,
        "D": features,
        "D1": d1,
        "D2": d2,
        "STAGES": stages,
        "num_warps": warps,
    }


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        q, k, v = (x_BSHD.transpose(1, 2) for x_BSHD in (q_BSHD, k_BSHD, v_BSHD))
        if q.is_cuda:
            y, sums_BHS, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        else:
            y, sums_BHS, *_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        y_BSHD = y.transpose(1, 2)
        ctx.save_for_backward(q_BSHD, k_BSHD, v_BSHD, y_BSHD, sums_BHS)
        return y_BSHD

    @staticmethod
    def backward(ctx: Any, dy_BSHD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *given, sums_BHS = ctx.saved_tensors
        q_BSHD, k_BSHD, v_BSHD, y_BSHD, dy_BSHD = (dense(x_BSHD) for x_BSHD in (*given, dy_BSHD))
        batch, tokens, heads, features = q_BSHD.shape
        d1, d2 = parts(features)
        filled = triton.cdiv(tokens, _PREPARED) * _PREPARED
        seconds_2BHPE = q_BSHD.new_empty(2, batch, heads, filled, d2)
        sums_BHP = q_BSHD.new_empty(batch, heads, filled, dtype=torch.float32)
        prepared = (*seconds_2BHPE, sums_BHP)
        _prepare[filled // _PREPARED, heads, batch](
            y_BSHD, dy_BSHD, v_BSHD, sums_BHS.contiguous(), *prepared, tokens, filled, heads,
            *strides(y_BSHD, dy_BSHD, v_BSHD), TS=_PREPARED, D=features, D1=d1, D2=d2,
        )  # fmt: skip
        of_queries, *of_keys = ctx.needs_input_grad
        dq_BSHD, dk_BSHD, dv_BSHD = q_BSHD.new_empty(3, *q_BSHD.shape)
        inputs = (q_BSHD, k_BSHD, v_BSHD, dy_BSHD)
        for needed, kernel, shape, outputs in (
            (any(of_keys), _gradient_of_keys, _OF_KEYS, (dk_BSHD, dv_BSHD)),
            (of_queries, _gradient_of_queries, _OF_QUERIES, (dq_BSHD,)),
        ):
            if needed:
                grid, compiled_for = _launch(q_BSHD, shape)
                kernel[grid](
                    *inputs, *prepared, *outputs, tokens, filled, heads, *strides(*inputs, *outputs),
                    features**-0.5, **compiled_for,
                )  # fmt: skip
        return dq_BSHD, dk_BSHD, dv_BSHD


def takes_self_attention(q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> bool:
    """Whether `self_attention` is for these: where there are gradients to compute, on GPUs where it was measured.

    float16 can't hold D_i, which may be larger than all gradients that it comes from.
    """
    batch, tokens, heads, features = q_BSHD.shape
    fits = (
        torch.is_grad_enabled()
        and any(x.requires_grad for x in (q_BSHD, k_BSHD, v_BSHD))
        and q_BSHD.shape == k_BSHD.shape == v_BSHD.shape
        and q_BSHD.dtype == k_BSHD.dtype == v_BSHD.dtype
        and features == FEATURES
        and batch * heads * tokens**2 >= _LEAST
    )
    if not fits or not q_BSHD.is_cuda:
        return fits
    q, k, v = (x_BSHD.transpose(1, 2) for x_BSHD in (q_BSHD, k_BSHD, v_BSHD))
    return (
        q.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, False, False))  # type: ignore[call-arg, arg-type]
    )


def self_attention(q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for each sample and head: [B, S, H, D], in the dtype of all three.

    Args:
        q_BSHD, k_BSHD, v_BSHD: of one shape that `takes_self_attention`.
    """
    return _SelfAttention.apply(q_BSHD, k_BSHD, v_BSHD)
