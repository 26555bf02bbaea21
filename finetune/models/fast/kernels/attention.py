"""Attention to few keys (Vaswani et al. 2017, arXiv 1706.03762, eq. 1), as to a caption's tokens.

A head's keys and values stay in the multiprocessor, and its queries pass by once. No statistics are kept for the
backward pass: it makes the weights again from the scores, and sums the gradients of keys and values along. Flash
kernels, made for thousands of keys, read queries and their gradients in several passes, and add the gradients of
queries up in float32. There are no atomics, so results are the same at each run.

Keys that are no power of two are taken as two parts, as features are (`heads`): a caption's 77 tokens as 64 and 16.
As one they would fill 128.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.models.fast.kernels.heads import LOG2_E, dense, load, parts, product, store, strides

MOST_KEYS, MOST_FEATURES = 80, 64  # with more of them registers overflow, and flash kernels are faster
# Queries that a program holds at a time, warps, stages: forward and backward. Tensor cores of other generations
# than 9 and 10 take all operands from registers, which 64 queries overflow (as compiled; measured on 9 alone).
_FORWARD, _BACKWARD, _BACKWARD_ELSEWHERE = (64, 4, 2), (64, 4, 1), (32, 4, 1)
_PROGRAMS = 1024  # of either pass, if there are queries for as many


@triton.jit
def _load_all(x, K, stride, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
              K1: tl.constexpr, K2: tl.constexpr):  # fmt: skip
    """Keys or values of a head: the first part of them in both parts of the features, then the second."""
    k1, k2 = load(x, tl.arange(0, K1), K, stride, D, D1, D2)
    l1, l2 = k1, k2
    if K2 > 0:
        l1, l2 = load(x, K1 + tl.arange(0, K2), K, stride, D, D1, D2)
    return k1, k2, l1, l2


@triton.jit
def _store_all(x, K, stride, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, K1: tl.constexpr,
               K2: tl.constexpr, k1, k2, l1, l2):  # fmt: skip
    store(x, tl.arange(0, K1), K, stride, D, D1, D2, k1, k2)
    if K2 > 0:
        store(x, K1 + tl.arange(0, K2), K, stride, D, D1, D2, l1, l2)


@triton.jit
def _weights(q1, q2, k1, k2, l1, l2, K, scale, K1: tl.constexpr, K2: tl.constexpr, D2: tl.constexpr):
    """Softmax of the queries over both parts of the keys."""
    scale *= LOG2_E
    k = tl.arange(0, K1)
    of_k = tl.where((k < K)[None, :], product(q1, q2, k1, k2, D2) * scale, -float("inf"))
    largest = tl.max(of_k, 1)
    of_l = of_k
    if K2 > 0:
        l = K1 + tl.arange(0, K2)
        of_l = tl.where((l < K)[None, :], product(q1, q2, l1, l2, D2) * scale, -float("inf"))
        largest = tl.maximum(largest, tl.max(of_l, 1))
    of_k = tl.exp2(of_k - largest[:, None])
    total = tl.sum(of_k, 1)
    if K2 > 0:
        of_l = tl.exp2(of_l - largest[:, None])
        total += tl.sum(of_l, 1)
    by = 1.0 / total
    return of_k * by[:, None], of_l * by[:, None]


@triton.jit
def _mixed(of_k, of_l, v1, v2, w1, w2, K2: tl.constexpr, D2: tl.constexpr):
    """The sum over both parts of the keys of weights times values, in both parts of the features."""
    of_k = of_k.to(v1.dtype)
    of_l = of_l.to(v1.dtype)
    y1 = tl.dot(of_k, v1, input_precision="ieee")
    if K2 > 0:
        y1 = tl.dot(of_l, w1, y1, input_precision="ieee")
    y2 = y1
    if D2 > 0:
        y2 = tl.dot(of_k, v2, input_precision="ieee")
        if K2 > 0:
            y2 = tl.dot(of_l, w2, y2, input_precision="ieee")
    return y1, y2


@triton.jit
def _mix(q_BSHD, k_BKHD, v_BKHD, y_BSHD, S, K, q_b, q_s, k_b, k_s, v_b, v_s, y_b, y_s, scale, ROWS: tl.constexpr,
         TS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
         K1: tl.constexpr, K2: tl.constexpr):  # fmt: skip
    head, sample = tl.program_id(1) * D, tl.program_id(2).to(tl.int64)
    q_BSHD += sample * q_b + head
    k_BKHD += sample * k_b + head
    v_BKHD += sample * v_b + head
    y_BSHD += sample * y_b + head
    k1, k2, l1, l2 = _load_all(k_BKHD, K, k_s, D, D1, D2, K1, K2)
    v1, v2, w1, w2 = _load_all(v_BKHD, K, v_s, D, D1, D2, K1, K2)
    for row in range(0, ROWS, TS):
        s = tl.program_id(0) * ROWS + row + tl.arange(0, TS)
        q1, q2 = load(q_BSHD, s, S, q_s, D, D1, D2)
        of_k, of_l = _weights(q1, q2, k1, k2, l1, l2, K, scale, K1, K2, D2)
        y1, y2 = _mixed(of_k, of_l, v1, v2, w1, w2, K2, D2)
        store(y_BSHD, s, S, y_s, D, D1, D2, y1, y2)


@triton.jit
def _onto(dk1, dk2, dv1, dv2, weights, dscores, q1, q2, dy1, dy2, D2: tl.constexpr):
    """What these queries add to the gradients of a part of keys and values."""
    weights_T, dscores_T = tl.trans(weights.to(q1.dtype)), tl.trans(dscores)
    dv1 = tl.dot(weights_T, dy1, dv1, input_precision="ieee")
    dk1 = tl.dot(dscores_T, q1, dk1, input_precision="ieee")
    if D2 > 0:
        dv2 = tl.dot(weights_T, dy2, dv2, input_precision="ieee")
        dk2 = tl.dot(dscores_T, q2, dk2, input_precision="ieee")
    return dk1, dk2, dv1, dv2


@triton.jit
def _mix_gradient(q_BSHD, k_BKHD, v_BKHD, dy_BSHD, dq_BSHD, dk_NBKHD, dv_NBKHD, S, K, H,
                  q_b, q_s, k_b, k_s, v_b, v_s, dy_b, dy_s, dq_b, dq_s, scale, SUMMED: tl.constexpr,
                  ROWS: tl.constexpr, TS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
                  K1: tl.constexpr, K2: tl.constexpr):  # fmt: skip
    """The gradient of queries; and over a chunk of ROWS of them the sums that are those of keys and values."""
    head, sample = tl.program_id(1) * D, tl.program_id(2).to(tl.int64)
    q_BSHD += sample * q_b + head
    k_BKHD += sample * k_b + head
    v_BKHD += sample * v_b + head
    dy_BSHD += sample * dy_b + head
    dq_BSHD += sample * dq_b + head
    k1, k2, l1, l2 = _load_all(k_BKHD, K, k_s, D, D1, D2, K1, K2)
    v1, v2, w1, w2 = _load_all(v_BKHD, K, v_s, D, D1, D2, K1, K2)
    dk1, dv1 = tl.zeros((K1, D1), tl.float32), tl.zeros((K1, D1), tl.float32)
    dk2, dv2, dl1, dl2, dw1, dw2 = dk1, dv1, dk1, dk1, dv1, dv1
    if D2 > 0:
        dk2, dv2 = tl.zeros((K1, D2), tl.float32), tl.zeros((K1, D2), tl.float32)
    if K2 > 0:
        dl1, dw1 = tl.zeros((K2, D1), tl.float32), tl.zeros((K2, D1), tl.float32)
        if D2 > 0:
            dl2, dw2 = tl.zeros((K2, D2), tl.float32), tl.zeros((K2, D2), tl.float32)
    for row in range(0, ROWS, TS):
        s = tl.program_id(0) * ROWS + row + tl.arange(0, TS)
        q1, q2 = load(q_BSHD, s, S, q_s, D, D1, D2)
        dy1, dy2 = load(dy_BSHD, s, S, dy_s, D, D1, D2)
        of_k, of_l = _weights(q1, q2, k1, k2, l1, l2, K, scale, K1, K2, D2)
        to_k = product(dy1, dy2, v1, v2, D2)
        to_l = to_k
        mean = tl.sum(of_k * to_k, 1)
        if K2 > 0:
            to_l = product(dy1, dy2, w1, w2, D2)
            mean += tl.sum(of_l * to_l, 1)
        to_k = (of_k * (to_k - mean[:, None]) * scale).to(k1.dtype)
        if K2 > 0:
            to_l = (of_l * (to_l - mean[:, None]) * scale).to(k1.dtype)
        dq1, dq2 = _mixed(to_k, to_l, k1, k2, l1, l2, K2, D2)
        store(dq_BSHD, s, S, dq_s, D, D1, D2, dq1, dq2)
        if SUMMED:
            dk1, dk2, dv1, dv2 = _onto(dk1, dk2, dv1, dv2, of_k, to_k, q1, q2, dy1, dy2, D2)
            if K2 > 0:
                dl1, dl2, dw1, dw2 = _onto(dl1, dl2, dw1, dw2, of_l, to_l, q1, q2, dy1, dy2, D2)
    if SUMMED:
        token = H * D
        to = (tl.program_id(0) * tl.num_programs(2) + sample) * K * token + head
        _store_all(dk_NBKHD + to, K, token, D, D1, D2, K1, K2, dk1, dk2, dl1, dl2)
        _store_all(dv_NBKHD + to, K, token, D, D1, D2, K1, K2, dv1, dv2, dw1, dw2)


def _launch(q_BSHD: Tensor, keys: int, shape: tuple[int, int, int]) -> tuple[tuple[int, int, int], dict[str, int]]:
    """(the grid: chunks of a head's queries, heads, samples; what the kernels are compiled for)."""
    batch, queries, heads, features = q_BSHD.shape
    tile, warps, stages = shape
    tiles = triton.cdiv(queries, tile)
    of_each = triton.next_power_of_2(triton.cdiv(tiles, triton.cdiv(_PROGRAMS, batch * heads)))
    (d1, d2), (k1, k2) = parts(features), parts(keys)
    sizes = {"ROWS": of_each * tile, "TS": tile, "D": features, "D1": d1, "D2": d2, "K1": k1, "K2": k2}
    return (triton.cdiv(tiles, of_each), heads, batch), sizes | {"num_warps": warps, "num_stages": stages}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BSHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor) -> Tensor:
        q_BSHD, k_BKHD, v_BKHD = (dense(x) for x in (q_BSHD, k_BKHD, v_BKHD))
        queries, keys = q_BSHD.shape[1], k_BKHD.shape[1]
        y_BSHD = torch.empty_like(q_BSHD, memory_format=torch.contiguous_format)
        grid, compiled_for = _launch(q_BSHD, keys, _FORWARD)
        _mix[grid](
            q_BSHD, k_BKHD, v_BKHD, y_BSHD, queries, keys, *strides(q_BSHD, k_BKHD, v_BKHD, y_BSHD),
            q_BSHD.shape[3] ** -0.5, **compiled_for,
        )  # fmt: skip
        ctx.save_for_backward(q_BSHD, k_BKHD, v_BKHD)
        return y_BSHD

    @staticmethod
    def backward(ctx: Any, dy_BSHD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_BSHD, k_BKHD, v_BKHD = ctx.saved_tensors
        dy_BSHD = dense(dy_BSHD)
        queries, keys = q_BSHD.shape[1], k_BKHD.shape[1]
        summed = any(ctx.needs_input_grad[1:])
        elsewhere = q_BSHD.is_cuda and torch.cuda.get_device_capability(q_BSHD.device)[0] not in (9, 10)
        grid, compiled_for = _launch(q_BSHD, keys, _BACKWARD_ELSEWHERE if elsewhere else _BACKWARD)
        dq_BSHD = torch.empty_like(q_BSHD, memory_format=torch.contiguous_format)
        sums_2NBKHD = torch.empty(
            (2, grid[0] if summed else 0, *k_BKHD.shape),
            dtype=k_BKHD.dtype if grid[0] == 1 else torch.float32,
            device=k_BKHD.device,
        )
        _mix_gradient[grid](
            q_BSHD, k_BKHD, v_BKHD, dy_BSHD, dq_BSHD, *sums_2NBKHD, queries, keys, q_BSHD.shape[2],
            *strides(q_BSHD, k_BKHD, v_BKHD, dy_BSHD, dq_BSHD), q_BSHD.shape[3] ** -0.5,
            SUMMED=summed, **compiled_for,
        )  # fmt: skip
        if not summed:
            return dq_BSHD, None, None
        dk_BKHD, dv_BKHD = sums_2NBKHD[:, 0] if grid[0] == 1 else sums_2NBKHD.sum(1).to(k_BKHD.dtype)
        return dq_BSHD, dk_BKHD, dv_BKHD


def takes_attention(q_BSHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor) -> bool:
    """Whether `attention` is for these; with float32 it would be slow on a GPU."""
    return (
        k_BKHD.shape[1] <= MOST_KEYS
        and k_BKHD.shape[3] <= MOST_FEATURES
        and q_BSHD.dtype == k_BKHD.dtype == v_BKHD.dtype
        and not (q_BSHD.is_cuda and q_BSHD.dtype == torch.float32)
    )


def attention(q_BSHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for each sample and head: [B, S, H, D], contiguous, in the dtype of all three.

    Args:
        k_BKHD, v_BKHD: of few keys and features (`takes_attention`).
    """
    return _Attention.apply(q_BSHD, k_BKHD, v_BKHD)
