"""Nothing is read, given or left out, and the U-Net must not expect anything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from finetune import UserError, tasks
from finetune.batch import Sample
from finetune.conditioning import Given, batch_of, call_unet
from finetune.config import Config, compose
from finetune.latents import LatentSpace
from finetune.models.unet import build_unet

GIVEN = Given(None, 4, 4, LatentSpace(1.0))


def test_the_condition_is_empty() -> None:
    made = tasks.make("unconditional", {}, GIVEN)
    assert not made.reads and not made.guided and made.asks == () and made.channels == 0 and not made.parts()
    batch = batch_of(made, [Sample({}, (16, 16)), Sample({"captions": ["x"]}, (16, 16))])
    assert made.inputs(batch, torch.tensor([False, True])) == {}
    assert made({}) == {}


def test_small_unconditional_attends_to_itself_alone() -> None:
    config, _ = compose("train", ["model=small_unconditional", "data.shards=x"], Config)
    unet = build_unet(config.model.unet)
    names = [name for name, _ in unet.named_modules()]
    assert any(name.endswith(".to_q") for name in names)
    assert not any("attn2" in name or "encoder_hid" in name for name in names)
    assert set(unet.config.cross_attention_dim) == {None}
    z_BCHW = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert call_unet(unet.eval(), z_BCHW, torch.tensor([10, 500]), {}).shape == z_BCHW.shape


def test_a_model_that_attends_to_something_is_refused() -> None:
    with pytest.raises(UserError, match="this one attends to 64 features: choose a model") as caught:
        tasks.make("unconditional", {}, replace(GIVEN, width=64))
    assert "\n" not in str(caught.value)


def test_there_is_nothing_to_set() -> None:
    with pytest.raises(UserError, match=r"task\.options\.classes: unconditional has none"):
        tasks.make("unconditional", {"classes": 3}, GIVEN)
