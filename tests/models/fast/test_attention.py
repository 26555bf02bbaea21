"""Attention by Triton kernels, run by Triton's interpreter on the CPU, against torch's in float64."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.models.fast.comparing import apart, in_float64, leaves, with_gradients

kernels = pytest.importorskip("finetune.models.fast.kernels", reason="no Triton for this machine")
pytestmark = pytest.mark.skipif(not kernels.INTERPRETED, reason="Triton's interpreter is off (TRITON_INTERPRET=0)")


def attention_inputs(queries: int, keys: int, heads: int, features: int, dtype=torch.float32) -> list[Any]:
    """Queries, keys, values: [2, S, H, D] and [2, K, H, D]."""
    shapes = [(2, count, heads, features) for count in (queries, keys, keys)]
    return leaves(*shapes, dtype=dtype)


def attention_of_torch(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def both_attentions(inputs: list[Any], ours=kernels.attention):
    dy = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(9)).to(inputs[0].dtype)
    return with_gradients(ours, inputs, dy), with_gradients(attention_of_torch, in_float64(inputs), dy)


# --- to few keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "features"),
    [
        (64, 77, 2, 40),  # Stable Diffusion 1.x: both in two parts
        (64, 77, 1, 64),  # 2.x, XL: keys in two parts
        (70, 16, 3, 24),  # features in two parts, a tile of queries that is not full
        (33, 80, 1, 48),
        (130, 5, 2, 8),  # less than a product takes
        (1, 2, 1, 1),
    ],
)
def test_attention_and_its_gradients_are_those_of_torch(queries, keys, heads, features):
    inputs = attention_inputs(queries, keys, heads, features)
    assert kernels.takes_attention(*inputs)
    for one, other in zip(*both_attentions(inputs), strict=True):
        assert apart(one, other) < 1e-5


@pytest.mark.parametrize("most", [1, 12], ids=["one after another", "apart"])
def test_gradients_of_keys_are_sums_over_all_chunks_of_queries(most, monkeypatch):
    monkeypatch.setattr(sys.modules["finetune.models.fast.kernels.attention"], "_PROGRAMS", most)
    for one, other in zip(*both_attentions(attention_inputs(300, 20, 2, 16)), strict=True):
        assert apart(one, other) < 1e-5


def test_attention_to_one_key_is_its_value():
    inputs = attention_inputs(20, 1, 2, 16)
    (y, dq, dk, dv), wanted = both_attentions(inputs)
    assert torch.equal(y, inputs[2].expand_as(y)) and not dq.any() and not dk.any()
    assert apart(dv, wanted[3]) < 1e-5


def test_attention_to_parts_of_one_product_and_gradients_in_any_layout():
    """Keys and values as slices of what one product made, a gradient whose heads lie apart."""
    q, both = leaves((2, 40, 2, 16), (2, 9, 64))

    def through(attend):
        def compute(q, both):
            k, v = (x.unflatten(-1, (2, 16)) for x in both.split(32, dim=-1))
            return attend(q, k, v).transpose(1, 2).contiguous()

        return compute

    dy = torch.randn((2, 2, 40, 16), generator=torch.Generator().manual_seed(3))
    ours = with_gradients(through(kernels.attention), [q, both], dy)
    wanted = with_gradients(through(attention_of_torch), in_float64([q, both]), dy)
    for one, other in zip(ours, wanted, strict=True):
        assert apart(one, other) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision_is_as_near_as_torchs(dtype):
    inputs = attention_inputs(96, 77, 2, 40, dtype)
    ours, wanted = both_attentions(inputs)
    torchs, _ = both_attentions(inputs, attention_of_torch)
    assert {one.dtype for one in ours} == {dtype}
    for one, other, exact in zip(ours, torchs, wanted, strict=True):
        assert apart(one, exact) < 1.25 * apart(other, exact)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (2,)])
def test_attention_gives_gradients_to_what_needs_them(frozen):
    inputs = attention_inputs(40, 9, 2, 16)
    for index in frozen:
        inputs[index].requires_grad_(False)
    ours, wanted = both_attentions(inputs)
    assert len(ours) == 4 - len(frozen)
    for one, other in zip(ours, wanted, strict=True):
        assert apart(one, other) < 1e-5


def test_large_scores_overflow_nothing():
    inputs = attention_inputs(20, 20, 1, 16)
    with torch.no_grad():
        inputs[0].mul_(1000)
    (y, dq, dk, dv), wanted = both_attentions(inputs)
    assert dq.isfinite().all() and dk.isfinite().all()
    assert apart(y, wanted[0]) < 1e-4 and apart(dv, wanted[3]) < 1e-4


def test_many_keys_or_features_are_for_flash_kernels():
    for keys, features in ((81, 16), (20, 80)):
        assert not kernels.takes_attention(*attention_inputs(10, keys, 1, features))
    q, k, v = attention_inputs(10, 20, 1, 16)
    assert not kernels.takes_attention(q.bfloat16(), k, v)


# --- to many keys, the backward pass ----------------------------------------------------------------


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens count as many: the interpreter is slow."""
    monkeypatch.setattr(sys.modules["finetune.models.fast.kernels.self_attention"], "_LEAST", 0)


def of_one_product(q_k_v_BSC: torch.Tensor, attend, heads: int = 2) -> torch.Tensor:
    return attend(*(x_BSC.unflatten(-1, (heads, -1)) for x_BSC in q_k_v_BSC.chunk(3, dim=-1)))


def both_self_attentions(q_k_v_BSC: torch.Tensor, dy: torch.Tensor, ours=kernels.self_attention):
    for attend, inputs in ((ours, [q_k_v_BSC]), (attention_of_torch, in_float64([q_k_v_BSC]))):
        y, gradient = with_gradients(lambda x_BSC, attend=attend: of_one_product(x_BSC, attend), inputs, dy)
        yield [y, *gradient.chunk(3, dim=-1)]


# Blocks of 128, 64 and 32: whole, one more, one less; both grids of one block.
@pytest.mark.parametrize("tokens", [256, 257, 383, 3])
def test_self_attention_and_its_gradients_are_those_of_torch(tokens, many):
    (q_k_v,) = leaves((2, tokens, 3 * 2 * 40))
    (dy,) = leaves((2, tokens, 2, 40), seed=1)
    assert of_one_product(q_k_v, kernels.takes_self_attention)
    for one, other in zip(*both_self_attentions(q_k_v, dy.detach()), strict=True):
        assert apart(one, other) < 1e-5


def test_self_attention_reads_nothing_beyond_its_tokens(many):
    room = torch.full((2, 256, 3 * 2 * 40), float("nan"))
    room[:, :130] = leaves((2, 130, 3 * 2 * 40))[0].detach()
    (dy,) = leaves((2, 130, 2, 40), seed=1)
    for one, other in zip(*both_self_attentions(room[:, :130].requires_grad_(), dy.detach()), strict=True):
        assert apart(one, other) < 1e-5


@pytest.mark.parametrize("common", [0.0, 30.0], ids=["", "what is subtracted is larger than what is left"])
def test_self_attention_in_bf16_is_as_near_as_torchs(common, many):
    """With values and gradients that have much in common, as few digits of D_i as bf16 has would not do."""
    (q_k_v,) = leaves((1, 160, 3 * 2 * 40), dtype=torch.bfloat16)
    (dy,) = leaves((1, 160, 2, 40), dtype=torch.bfloat16, seed=1)
    with torch.no_grad():
        q_k_v[..., -80:] += common
        dy += common
    ours, wanted = both_self_attentions(q_k_v, dy.detach())
    torchs, _ = both_self_attentions(q_k_v, dy.detach(), attention_of_torch)
    for one, other, exact in zip(ours, torchs, wanted, strict=True):
        assert one.dtype == torch.bfloat16 and apart(one, exact) < 1.25 * apart(other, exact)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (2,)])
def test_self_attention_gives_gradients_to_what_needs_them(frozen, many):
    inputs = leaves(*[(1, 130, 1, 40)] * 3)
    for index in frozen:
        inputs[index].requires_grad_(False)
    ours, wanted = both_attentions(inputs, kernels.self_attention)
    assert len(ours) == 4 - len(frozen)
    for one, other in zip(ours, wanted, strict=True):
        assert apart(one, other) < 1e-5


def test_large_scores_overflow_no_self_attention(many):
    inputs = leaves(*[(1, 130, 1, 40)] * 3)
    with torch.no_grad():
        inputs[0].mul_(1000)
    (y, dq, dk, dv), wanted = both_attentions(inputs, kernels.self_attention)
    assert dq.isfinite().all() and dk.isfinite().all()
    assert apart(y, wanted[0]) < 1e-4 and apart(dv, wanted[3]) < 1e-3  # weights come from sums of such scores


def test_what_self_attention_is_not_for(many):
    def takes(*shapes, dtype=torch.float32):
        return kernels.takes_self_attention(*leaves(*shapes, dtype=dtype))

    whole = (1, 130, 2, 40)
    assert takes(whole, whole, whole)
    assert not takes(*[(1, 130, 2, 64)] * 3)
    assert not takes(whole, (1, 131, 2, 40), (1, 131, 2, 40))
    with torch.no_grad():
        assert not takes(whole, whole, whole)
    assert not kernels.takes_self_attention(*(x.detach() for x in leaves(whole, whole, whole)))


def test_few_scores_are_for_flash_kernels():
    assert not kernels.takes_self_attention(*leaves(*[(1, 130, 2, 40)] * 3))
