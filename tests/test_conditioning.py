"""Caption dropout as a draw of the clock, and context equal to what diffusers' pipeline encodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from finetune import build
from finetune.batch import Sample
from finetune.conditioning import batch_of, dropped
from finetune.conditioning.text import Text, with_null
from finetune.config import Config, compose
from finetune.distributed import World
from tests.conftest import CAPTIONS


@pytest.fixture
def conditioner_of(overrides: list[str], pipeline: Path, tmp_path: Path) -> Callable[..., Text]:
    """The conditioner that a run on `pipeline` has."""

    def make(*, trained: bool) -> Text:
        settings = [f"model.pretrained={pipeline}", "model.unet={}", f"model.train_text_encoder={trained}"]
        config = compose("train", [*overrides, *settings], Config)[0]
        return build.build(config, World(0, 1, 0, torch.device("cpu")), tmp_path).model.conditioner

    return make


def test_none_and_all_are_dropped_at_the_ends() -> None:
    clock = torch.arange(5000)
    assert not dropped(clock, 0.0, 0).any()
    assert dropped(clock, 1.0, 0).all()


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5])
def test_the_share_dropped_is_the_probability(probability: float) -> None:
    count = 20_000
    share = dropped(torch.arange(count), probability, 0).double().mean().item()
    assert share == pytest.approx(probability, abs=4 * (probability * (1 - probability) / count) ** 0.5)


def test_the_draw_is_the_clocks_alone() -> None:
    """Neither neighbours, nor the caption, nor what was drawn before: only (seed, clock)."""
    clock = torch.arange(1000, 1400)
    whole = dropped(clock, 0.3, 0)
    assert torch.equal(whole, dropped(clock, 0.3, 0))
    assert torch.equal(whole[100:], dropped(clock[100:], 0.3, 0))
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole[shuffled], dropped(clock[shuffled], 0.3, 0))
    assert with_null(["x"] * 400, whole) == ["" if drop else "x" for drop in whole]
    assert not torch.equal(whole, dropped(clock, 0.3, seed=1))


def test_more_dropout_drops_the_same_and_more() -> None:
    clock = torch.arange(2000)
    assert (dropped(clock, 0.1, 0) <= dropped(clock, 0.4, 0)).all()


def test_context_is_what_diffusers_encodes(pipeline: Path, conditioner_of: Callable[..., Text]) -> None:
    reference = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    conditioner = conditioner_of(trained=False)
    captions = [*CAPTIONS[:3], "", "one word " * 40]
    with torch.no_grad():
        wanted, null = reference.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=True)
        asked = batch_of(conditioner, [Sample({"captions": [caption]}, (32, 32)) for caption in captions])
        all_of_them = torch.ones(5, dtype=torch.bool)
        context = conditioner(conditioner.inputs(asked, ~all_of_them))["context"]
        ours_null = conditioner(conditioner.inputs(asked, all_of_them))["context"]
    torch.testing.assert_close(context, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours_null, null, rtol=1e-5, atol=1e-6)
    assert context.shape == (5, 12, 16)
    assert not torch.allclose(context[0], context[1])


def test_a_frozen_encoder_has_no_graph_and_stays_in_eval_mode(
    conditioner_of: Callable[..., Text],
) -> None:
    conditioner = conditioner_of(trained=False)
    conditioner.train()
    assert not any(module.training for module in conditioner.modules())
    torch.nn.ModuleList([conditioner]).train()  # by way of what it is a part of
    assert not any(module.training for module in conditioner.modules())
    conditioner.requires_grad_(True)
    context = conditioner({"ids": conditioner.tokenize(CAPTIONS[:2])})["context"]
    assert not context.requires_grad and context.grad_fn is None
    assert torch.is_grad_enabled()


def test_a_trained_encoder_gets_gradients_and_its_mode(conditioner_of: Callable[..., Text]) -> None:
    conditioner = conditioner_of(trained=True)
    assert all(module.training for module in conditioner.train().modules())
    conditioner({"ids": conditioner.tokenize(CAPTIONS[:2])})["context"].square().sum().backward()
    assert all(p.grad is not None for name, p in conditioner.named_parameters() if "position" not in name)
    assert not any(module.training for module in conditioner.eval().modules())
    with torch.no_grad():
        assert not conditioner({"ids": conditioner.tokenize([""])})["context"].requires_grad
