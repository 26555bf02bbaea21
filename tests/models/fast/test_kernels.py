"""Triton kernels, run by Triton's interpreter on the CPU, against torch's own operations in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.models.fast.comparing import apart, assert_rounded_once, in_float64, leaves, with_gradients

kernels = pytest.importorskip("finetune.models.fast.kernels", reason="no Triton for this machine")
pytestmark = pytest.mark.skipif(not kernels.INTERPRETED, reason="Triton's interpreter is off (TRITON_INTERPRET=0)")


# --- group norm -----------------------------------------------------------------------------------


def norm_inputs(shape, *, shifted=True, dtype=torch.float32, mean=0.0, std=1.0, seed=0) -> list[Any]:
    """Map, shift, weight, bias."""
    channels = shape[1]
    x, shift = leaves(shape, shape[:2] if shifted else None, dtype=dtype, seed=seed)
    weight, bias = leaves((channels,), (channels,), seed=seed + 1)
    with torch.no_grad():
        x = (x * std + mean).contiguous(memory_format=torch.channels_last)
        weight.add_(1)
    return [x.requires_grad_(), shift, weight, bias]


def norm_of_torch(groups: int, silu: bool):
    def compute(x, shift, weight, bias):
        x = x if shift is None else x + shift[:, :, None, None]
        # torch 2.13's own, of a channels-last map on a CPU, dies of a segmentation fault where x needs no gradient.
        y = F.group_norm(x.contiguous(), groups, weight, bias, 1e-5)
        return F.silu(y) if silu else y

    return compute


def norm_of_ours(groups: int, silu: bool):
    return lambda x, shift, weight, bias: kernels.group_norm(x, shift, weight, bias, groups, 1e-5, silu)[1]


def both_norms(inputs: list[Any], groups: int, silu: bool, seed: int = 9):
    """[output, gradients...] of ours, and of torch in float64."""
    dy = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed))
    dy = dy.to(inputs[0].dtype)  # NCHW: gradients come as they come
    return (
        with_gradients(norm_of_ours(groups, silu), inputs, dy),
        with_gradients(norm_of_torch(groups, silu), in_float64(inputs), dy),
    )


@pytest.mark.parametrize(
    ("shape", "groups", "silu", "shifted"),
    [
        ((2, 16, 4, 4), 4, True, True),
        ((1, 40, 5, 7), 4, True, False),  # an odd size
        ((2, 24, 16, 9), 3, False, True),  # more cells than a chunk's 128, the last one not full
        ((1, 6, 1, 3), 1, False, False),  # fewer cells than a tile, and one group
        ((2, 70, 13, 11), 7, True, True),  # channels of two tiles, the second not full, and chunks
        ((1, 8, 2, 2), 8, True, False),  # groups of one channel
    ],
)
def test_group_norm_and_its_gradients_are_those_of_torch(shape, groups, silu, shifted):
    ours, wanted = both_norms(norm_inputs(shape, shifted=shifted), groups, silu)
    assert ours[0].is_contiguous(memory_format=torch.channels_last) and ours[0].dtype == torch.float32
    assert ours[1].is_contiguous(memory_format=torch.channels_last)
    assert len(ours) == len(wanted) == 4 + shifted
    for one, other in zip(ours, wanted, strict=True):
        assert apart(one, other) < 1e-5


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("where", ["map", "shift"])
def test_a_large_mean_costs_no_digits(where, silu):
    """E[x^2] - E[x]^2 in float32 would lose six of seven."""
    inputs = norm_inputs((1, 8, 15, 10), mean=50.0 if where == "map" else 0.0, std=2.0)
    if where == "shift":
        with torch.no_grad():
            inputs[1].add_(50.0)
    ours, wanted = both_norms(inputs, 2, silu)
    for one, other in zip(ours, wanted, strict=True):
        assert apart(one, other) < 1e-5


def test_a_group_whose_channels_differ_widely_is_merged_exactly():
    """Chan's formula: channels and chunks with means of their own."""
    inputs = norm_inputs((1, 4, 20, 8))
    with torch.no_grad():
        inputs[0].add_(torch.tensor([-100.0, 3.0, 40.0, 0.0])[:, None, None])
        inputs[0][:, :, 16:] += 30.0  # the second chunk
    ours, wanted = both_norms(inputs, 1, True)
    for one, other in zip(ours, wanted, strict=True):
        assert apart(one, other) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_rounds_half_precision_once(dtype):
    inputs = norm_inputs((2, 16, 12, 11), dtype=dtype, mean=1.0)
    ours, wanted = both_norms(inputs, 4, True)
    assert [one.dtype for one in ours] == [dtype, dtype, dtype, torch.float32, torch.float32]
    assert_rounded_once(ours, wanted)


def test_group_norm_by_weights_in_half_precision():
    """As under ZeRO, whose weights are bf16."""
    inputs = [x.detach().to(torch.bfloat16).requires_grad_() for x in norm_inputs((2, 16, 6, 5))]
    ours, wanted = both_norms(inputs, 4, True)
    assert {one.dtype for one in ours} == {torch.bfloat16}
    assert_rounded_once(ours, wanted)


@pytest.mark.parametrize("frozen", [(2, 3), (0,), (1, 2), (0, 1, 3)])
def test_what_needs_no_gradient_gets_none(frozen):
    inputs = norm_inputs((1, 8, 5, 3))
    for index in frozen:
        inputs[index].requires_grad_(False)
    ours, wanted = both_norms(inputs, 2, True)
    assert len(ours) == 5 - len(frozen)
    for one, other in zip(ours, wanted, strict=True):
        assert apart(one, other) < 1e-5


@pytest.mark.parametrize("how", ["sum", "sliced", "NCHW"])
def test_gradients_that_come_in_other_layouts(how):
    """A sum's is expanded (strides of 0), a joined map's is a slice of a wider one."""
    inputs = norm_inputs((2, 8, 5, 3))

    def through(norm):
        def compute(*tensors):
            y = norm(*tensors)
            if how == "sum":
                return y.sum()
            if how == "sliced":
                wide = torch.cat([y, y.detach() * 2, y * 3], dim=1)
                return (wide * torch.arange(wide.numel(), dtype=wide.dtype).view(wide.shape).cos()).sum()
            return (y.contiguous() * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()).sum()

        return compute

    ones = torch.ones(())
    ours = with_gradients(through(norm_of_ours(2, True)), inputs, ones)
    wanted = with_gradients(through(norm_of_torch(2, True)), in_float64(inputs), ones)
    for one, other in zip(ours[1:], wanted[1:], strict=True):
        assert apart(one, other) < 1e-5


def test_the_same_bits_at_each_run():
    inputs = norm_inputs((2, 8, 16, 12))
    first, second = (both_norms(inputs, 2, True)[0] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def test_samples_are_normalized_each_by_itself():
    inputs = norm_inputs((3, 8, 13, 10))
    whole = norm_of_ours(2, True)(*inputs)
    for index in range(3):
        x, shift = (one[index : index + 1].contiguous(memory_format=torch.channels_last) if one.dim() == 4
                    else one[index : index + 1] for one in inputs[:2])  # fmt: skip
        assert torch.equal(norm_of_ours(2, True)(x, shift, *inputs[2:]), whole[index : index + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalized", [True, False])
def test_the_gradient_of_the_map_itself_comes_along(dtype, normalized):
    """What goes by the norm is added to what comes through it, once."""
    inputs = norm_inputs((2, 8, 5, 3), dtype=dtype)
    dx, dy = (torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (1, 2))

    def through(norm):
        def compute(*tensors):
            same, y = norm(*tensors)
            return ((same * dx.to(same)).sum() + (y * dy.to(y)).sum() * normalized).to(same.dtype)

        return compute

    ours = with_gradients(
        through(lambda x, *more: kernels.group_norm(x, *more, 2, 1e-5, True)), inputs, torch.ones(())
    )
    wanted = through(lambda x, *more: (x, norm_of_torch(2, True)(x, *more)))
    exact = with_gradients(wanted, in_float64(inputs), torch.ones(()))
    for one, other in zip(ours[1:], exact[1:], strict=True):
        if normalized:
            assert apart(one, other) < (1e-5 if dtype == torch.float32 else 5e-3)
        else:
            torch.testing.assert_close(one, other.to(one.dtype))


# --- layer norm -----------------------------------------------------------------------------------


def add_norm_of_torch(x, h, bias, weight, beta):
    y = x if h is None else x + h if bias is None else x + h + bias
    return y, F.layer_norm(y, y.shape[-1:], weight, beta, 1e-5)


def both_add_norms(inputs: list[Any], seed: int = 9):
    """[y, its norm, gradients...] of ours, and of torch in float64."""
    dys = [torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed + i)) for i in (0, 1)]
    found = []
    for function, tensors in (
        (lambda *all_: kernels.add_norm(*all_, 1e-5), inputs),
        (add_norm_of_torch, in_float64(inputs)),
    ):
        y, n = function(*tensors)
        needed = [x for x in tensors if x is not None and x.requires_grad]
        given = [dy.to(inputs[0].dtype).to(y.dtype) for dy in dys]
        gradients = torch.autograd.grad([y * 1, n], needed, given, allow_unused=True)
        found.append([y, n, *gradients])
    return found


def add_norm_inputs(shape, *, added=True, biased=True, dtype=torch.float32, weights=torch.float32) -> list[Any]:
    """x, h, bias, the norm's weight and bias."""
    x, h = leaves(shape, shape if added else None, dtype=dtype)
    bias, weight, beta = leaves(shape[-1:] if biased else None, shape[-1:], shape[-1:], dtype=weights, seed=1)
    return [x, h, bias, weight, beta]


@pytest.mark.parametrize(("added", "biased"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 5, 24),
        (3, 7, 320),  # as Stable Diffusion's narrowest
        (1, 1, 8),
        (2, 1030, 4),  # more rows than a tile of 1,024, the last one not full
        (2, 2, 3, 10),
    ],
    ids=str,
)
def test_add_norm_and_its_gradients_are_those_of_torch(shape, added, biased):
    ours, wanted = both_add_norms(add_norm_inputs(shape, added=added, biased=biased))
    assert len(ours) == 5 + added + biased
    for one, other in zip(ours, wanted, strict=True):
        assert one.is_contiguous()
        assert apart(one, other) < 1e-5 or float(other.abs().max()) < 1e-6


def test_rows_of_many_chunks_are_summed(monkeypatch):
    """As of a batch that has more rows than programs."""
    from finetune.models.fast.kernels import layer_norm

    monkeypatch.setattr(layer_norm, "_PROGRAMS", 2)
    monkeypatch.setattr(layer_norm, "_TILE", 64)
    ours, wanted = both_add_norms(add_norm_inputs((3, 37, 16)))
    for one, other in zip(ours, wanted, strict=True):
        assert apart(one, other) < 1e-5


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_add_norm_rounds_half_precision_once(dtype, weights):
    """The sum, and then the norm of the rounded sum: what is kept is what is normalized."""
    inputs = add_norm_inputs((2, 40, 32), dtype=dtype, weights=weights)
    y, n = kernels.add_norm(*inputs, 1e-5)
    exact, _ = add_norm_of_torch(*in_float64(inputs))
    assert_rounded_once([y], [exact])
    _, wanted = add_norm_of_torch(y.double(), None, None, *in_float64(inputs[3:]))
    assert_rounded_once([n], [wanted])
    ours, wanted = both_add_norms(inputs)
    for one, other, given in zip(ours[2:], wanted[2:], inputs, strict=True):
        assert one.dtype == given.dtype
        assert apart(one, other) < 1e-2


@pytest.mark.parametrize("frozen", [(0,), (1,), (2, 3, 4), (3,), (0, 1)])
def test_add_norm_of_what_needs_no_gradient(frozen):
    inputs = add_norm_inputs((4, 12))
    for index in frozen:
        inputs[index].requires_grad_(False)
    ours, wanted = both_add_norms(inputs)
    assert len(ours) == 7 - len(frozen)
    for one, other in zip(ours, wanted, strict=True):
        assert apart(one, other) < 1e-5


@pytest.mark.parametrize("used", [0, 1])
def test_add_norm_of_which_one_output_is_used(used):
    inputs = add_norm_inputs((4, 12))
    dy = torch.randn((4, 12), generator=torch.Generator().manual_seed(0))
    ours = torch.autograd.grad(kernels.add_norm(*inputs, 1e-5)[used], inputs[:3], dy)
    exact = in_float64(inputs)
    wanted = torch.autograd.grad(add_norm_of_torch(*exact)[used], exact[:3], dy.double())
    for one, other in zip(ours, wanted, strict=True):
        assert apart(one, other) < 1e-5


def test_a_large_mean_of_tokens_costs_no_digits():
    inputs = add_norm_inputs((6, 48))
    with torch.no_grad():
        inputs[0].add_(100.0)
    ours, wanted = both_add_norms(inputs)
    for one, other in zip(ours, wanted, strict=True):
        assert apart(one, other) < 2e-5


# --- GEGLU ----------------------------------------------------------------------------------------


def gate_of_torch(x, bias):
    a, g = (x if bias is None else x + bias).chunk(2, dim=-1)
    return a * F.gelu(g)


def both_gates(inputs: list[Any], seed: int = 9):
    shape = (*inputs[0].shape[:-1], inputs[0].shape[-1] // 2)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(inputs[0].dtype)
    dy = dy.transpose(-1, -2).contiguous().transpose(-1, -2)  # not contiguous
    return (
        with_gradients(kernels.geglu, inputs, dy),
        with_gradients(gate_of_torch, in_float64(inputs), dy),
    )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 5, 24),
        (1, 1, 2),
        (300, 6),  # rows of two chunks
        (2, 3, 2 * 130),  # features of two tiles, the second not full
        (2, 2, 3, 10),
    ],
)
def test_geglu_and_its_gradients_are_those_of_torch(shape, biased):
    ours, wanted = both_gates(leaves(shape, (shape[-1],) if biased else None))
    assert len(ours) == 2 + biased and ours[0].is_contiguous()
    for one, other in zip(ours, wanted, strict=True):
        assert apart(one, other) < 1e-5


def test_geglu_far_from_zero():
    """Where erf is 1 and the density is 0, and where GELU is flat."""
    x = torch.tensor([[1.0, 2.0, -3.0, 4.0, 20.0, -20.0, 0.0, -1e4]], requires_grad=True)
    ours, wanted = both_gates([x, None])
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_geglu_rounds_half_precision_once(dtype):
    (x,), (bias,) = leaves((2, 40, 32), dtype=dtype), leaves((32,), seed=1)
    ours, wanted = both_gates([x, bias])
    assert [one.dtype for one in ours] == [dtype, dtype, torch.float32]
    assert_rounded_once(ours, wanted)


@pytest.mark.parametrize("frozen", [0, 1])
def test_geglu_of_what_needs_no_gradient(frozen):
    inputs = leaves((7, 12), (12,))
    inputs[frozen].requires_grad_(False)
    ours, wanted = both_gates(inputs)
    assert len(ours) == 2
    for one, other in zip(ours, wanted, strict=True):
        assert apart(one, other) < 1e-5


def test_geglu_of_views():
    """Tokens may be a slice of others, or broadcast."""
    (wide,) = leaves((3, 10, 32))
    for view in (wide[:, 2:7, 4:20], wide.transpose(0, 1)[..., ::2], wide[:1].expand(2, -1, -1)):
        found, wanted = kernels.geglu(view, None), gate_of_torch(view.double(), None)
        assert apart(found, wanted) < 1e-6
        assert apart(*(torch.autograd.grad(y.square().sum(), wide)[0] for y in (found, wanted))) < 1e-5


# --- where they run -------------------------------------------------------------------------------


def test_the_kernels_take_what_lies_where_they_run(monkeypatch):
    assert kernels.takes(torch.zeros(1))
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert not kernels.takes(torch.zeros(1))


# --- the end of a residual block ------------------------------------------------------------------


@pytest.mark.parametrize("seam", [False, True])
@pytest.mark.parametrize("shape", [(2, 16, 4, 5), (1, 70, 13, 3), (3, 8, 1, 1)], ids=str)
def test_join_adds_two_maps_and_a_bias_and_leaves_a_seam_of_zeros(shape, seam):
    x, h, bias = (one.detach() for one in leaves(shape, shape, shape[1:2]))
    x, h = (one.contiguous(memory_format=torch.channels_last) for one in (x, h))
    found = kernels.join(x, h, bias, seam=seam)
    assert found.is_contiguous(memory_format=torch.channels_last)
    wanted = F.pad(x + h + bias[:, None, None], (0, 1, 0, 1) if seam else (0, 0, 0, 0))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_join_rounds_half_precision_once(dtype):
    x, h, bias = (one.detach() for one in leaves((2, 16, 6, 5), (2, 16, 6, 5), (16,), dtype=dtype))
    x, h = (one.contiguous(memory_format=torch.channels_last) for one in (x, h))
    exact = x.double() + h.double() + bias.double()[:, None, None]
    assert_rounded_once([kernels.join(x, h, bias)], [exact])


@pytest.mark.parametrize("seam", [False, True])
@pytest.mark.parametrize("shape", [(2, 16, 4, 5), (1, 70, 40, 3), (3, 8, 1, 1)], ids=str)
@pytest.mark.parametrize("added", [True, False])
def test_gradients_of_join(shape, added, seam):
    inputs = leaves(shape, shape if added else None, shape[1:2])
    x, h, bias = in_float64(inputs)
    ours = kernels.join(*inputs, seam=seam)
    wanted = F.pad((x + h if added else x) + bias[:, None, None], (0, 1, 0, 1) if seam else (0, 0, 0, 0))
    assert apart(ours, wanted) < 1e-6
    dy = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    needed = [[one for one in each if one is not None] for each in (inputs, (x, h, bias))]
    gradients = [torch.autograd.grad(y, each, dy.to(y)) for y, each in zip((ours, wanted), needed, strict=True)]
    for one, other in zip(*gradients, strict=True):
        assert apart(one, other) < 1e-6


def test_a_bias_of_join_that_is_bf16_is_summed_in_float32():
    x, h, bias = leaves((2, 4, 30, 30), (2, 4, 30, 30), (4,), dtype=torch.bfloat16)
    (found,) = torch.autograd.grad(kernels.join(x, h, bias), bias, torch.ones_like(x))
    assert found.dtype == torch.bfloat16 and found.tolist() == [1800.0] * 4


@pytest.mark.parametrize("widths", [(6, 70), (64, 64), (3, 1)], ids=str)
def test_cat_and_its_gradients_are_whole_maps(widths):
    x, skip = leaves(*((2, width, 5, 9) for width in widths))
    y = kernels.cat(x, skip)
    assert torch.equal(y, torch.cat([x, skip], dim=1)) and y.is_contiguous(memory_format=torch.channels_last)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad(y, (x, skip), dy)
    for one, other in zip(gradients, dy.split(widths, dim=1), strict=True):
        assert torch.equal(one, other) and one.is_contiguous(memory_format=torch.channels_last)


# --- softmax --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [1, 35, 4096, 9000])
def test_softmax_is_torchs_at_any_length(cells):
    """Longer than a tile too, where the largest score is found late."""
    scores = 10 * torch.randn((2, 3, cells), generator=torch.Generator().manual_seed(cells))
    scores[0, 0, -1] = 200.0
    scores[0, 1] -= 1e4
    torch.testing.assert_close(
        kernels.softmax(scores, 0.3, torch.float32), (0.3 * scores.double()).softmax(-1).float()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_rounds_half_precision_once(dtype):
    scores = torch.randn((4, 50), generator=torch.Generator().manual_seed(0))
    assert_rounded_once([kernels.softmax(scores, 0.7, dtype)], [(0.7 * scores.double()).softmax(-1)])


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_softmax_of_what_overflowed_is_no_number(broken):
    scores = torch.zeros((2, 5000))
    scores[1, 10] = broken
    with np.errstate(invalid="ignore"):  # the interpreter's
        found = kernels.softmax(scores, 1.0, torch.float32)
    assert found[0].isfinite().all() and found[1].isnan().all()


# --- gradients added up -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(7,), (0,), (2048,), (5, 3, 3, 3), (33, 65)])
def test_a_gradient_is_added_in_float32(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    total = torch.randn(shape, generator=generator)
    x = torch.randn(shape, generator=generator).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last) if len(shape) == 4 else (torch.contiguous_format,):
        found, added = total.clone(memory_format=layout), x.to(memory_format=layout)
        kernels.add_(found, added)
        assert torch.equal(found, total + x.float())


def test_what_lies_otherwise_in_memory_is_added_where_it_belongs():
    total, x = torch.zeros(4, 6), torch.arange(24.0).view(6, 4).T.bfloat16()
    kernels.add_(total, x)
    assert torch.equal(total, x.float())
    kernels.add_(total[:, ::2], x[:, ::2])  # not dense
    assert torch.equal(total[:, ::2], 2 * x[:, ::2].float()) and torch.equal(total[:, 1::2], x[:, 1::2].float())
