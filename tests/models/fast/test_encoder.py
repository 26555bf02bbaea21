"""Encoders made fast: moments and names are those of diffusers' eager models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from finetune.models.autoencoder import Pixels, encode_moments
from finetune.models.fast import blocks, encoder, make_encoder_fast

WIDTHS = (8, 16, 16)
KL = {"block_out_channels": WIDTHS, "norm_num_groups": 2, "latent_channels": 3, "layers_per_block": 1}


def make(kind: Any = AutoencoderKL, **changes: Any) -> Any:
    """A model of random weights whose biases and norms have left their first values."""
    config = KL | changes
    names = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    config = {key: (name,) * len(config["block_out_channels"]) for key, name in names.items()} | config
    torch.manual_seed(1)
    model = kind(**config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def pictures(count: int, height: int, width: int) -> Tensor:
    """[count, 3, height, width] in [-1, 1]."""
    return torch.rand((count, 3, height, width), generator=torch.Generator().manual_seed(2)) * 2 - 1


def assert_same_moments(fast: Any, eager: Any, images: Tensor, tolerance: float = 1e-4) -> None:
    found, wanted = encode_moments(fast, images).double(), encode_moments(eager, images).double()
    assert found.shape == wanted.shape and wanted.std() > 0.05
    assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


@pytest.fixture
def joined(on_kernels: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of a kernel that only a fast encoder calls."""
    calls: list[int] = []
    original = blocks.kernels.join
    monkeypatch.setattr(blocks.kernels, "join", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


TWO_A_BLOCK = {"layers_per_block": 2, "block_out_channels": (8, 16)}
FOUR_LEVELS = {"block_out_channels": (8, 8, 16, 16)}
NO_ATTENTION = {"block_out_channels": (8,), "mid_block_add_attention": False, "use_quant_conv": False}


@pytest.mark.parametrize(("kind", "changes", "size"), [
    (AutoencoderKL, TWO_A_BLOCK, (9, 5)),
    (AutoencoderKL, FOUR_LEVELS, (8, 16)),
    (AutoencoderKL, NO_ATTENTION, (7, 6)),
    (VQModel, {"num_vq_embeddings": 8}, (5, 7)),
    *(
        pytest.param(*each, size, marks=pytest.mark.slow)
        for each in ((AutoencoderKL, {"layers_per_block": 2}), (AutoencoderKL, FOUR_LEVELS), (VQModel, {}))
        for size in ((32, 24), (27, 19))
    ),
])  # fmt: skip
def test_moments_are_those_of_diffusers(kind, changes, size, joined):
    fast, eager = make(kind, **changes), make(kind, **changes)
    assert make_encoder_fast(fast) and not joined
    assert_same_moments(fast, eager, pictures(2, *size))
    resnets = sum(len(block.resnets) for block in (*eager.encoder.down_blocks, eager.encoder.mid_block))
    assert len(joined) == resnets + sum(one is not None for one in eager.encoder.mid_block.attentions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_diffusers(dtype, joined):
    fast, eager, exact = make().to(dtype), make().to(dtype), make()
    assert make_encoder_fast(fast)
    images = pictures(1, 8, 8)
    wanted = encode_moments(exact, images)
    ours, theirs = ((encode_moments(one, images) - wanted).norm() for one in (fast, eager))
    # The interpreter cuts bf16's last bits off where a GPU rounds: twice the error.
    assert joined and float(ours) < 2.5 * float(theirs)


def test_names_and_weights_stay_and_the_file_loads_anywhere(tmp_path):
    fast, eager = make(), make()
    assert make_encoder_fast(fast) and make_encoder_fast(fast), "twice is once"
    assert list(fast.state_dict()) == list(eager.state_dict())
    fast.save_pretrained(tmp_path)
    assert_same_moments(AutoencoderKL.from_pretrained(tmp_path), eager, pictures(1, 8, 8), 1e-6)


def test_without_kernels_or_with_gradients_it_is_diffusers_own(joined, monkeypatch):
    fast, eager = make(), make()
    assert make_encoder_fast(fast)
    images = pictures(1, 8, 12).requires_grad_()
    fast.encoder(images).sum().backward()
    gradient, images.grad = images.grad, None
    eager.encoder(images).sum().backward()
    assert gradient.norm() > 0 and torch.allclose(gradient, images.grad, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(encoder, "_MOST_ELEMENTS", 9 * 13 * 8)  # maps that kernels can't count
    assert_same_moments(fast, eager, pictures(1, 8, 12))
    monkeypatch.undo()
    monkeypatch.setattr(blocks, "kernels", None)
    assert_same_moments(fast, eager, pictures(1, 8, 12))
    assert not joined


def two_heads(model: Any) -> None:
    model.encoder.mid_block.attentions[0].heads = 2


def gelu(model: Any) -> None:
    model.encoder.mid_block.resnets[0].nonlinearity = nn.GELU()


def without_a_bias(model: Any) -> None:
    model.encoder.down_blocks[0].resnets[0].conv1.bias = None


def with_dropout(model: Any) -> None:
    model.encoder.down_blocks[0].resnets[0].dropout.p = 0.1


@pytest.mark.parametrize("change", [two_heads, gelu, without_a_bias, with_dropout])
def test_what_it_does_not_know_stays_as_diffusers_wrote_it(change):
    model = make()
    change(model)
    before = type(model.encoder)
    assert not make_encoder_fast(model)
    assert type(model.encoder) is before is not encoder.Encoder


def test_other_blocks_and_no_encoder_at_all():
    assert not make_encoder_fast(make(VQModel, down_block_types=("AttnDownEncoderBlock2D",) * 3))
    assert not make_encoder_fast(Pixels())


@pytest.mark.parametrize("most", [1 << 27, 2 * 11 * 11, 4 * 11, 1], ids=["at once", "samples", "rows", "a row"])
def test_attention_in_parts_is_torchs(most, on_kernels, monkeypatch):
    monkeypatch.setattr(encoder, "_MOST_SCORES", most)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (3 * torch.randn(3, 11, 12, generator=generator) for _ in range(3))
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert float((encoder.attend(q, k, v) - wanted).norm()) < 1e-5 * float(wanted.norm())
