"""Building and loading U-Nets: the same seed gives the same weights, and mistakes get one line."""

from __future__ import annotations

import json

import pytest
import torch

from finetune import UserError
from finetune.models.unet import build_unet, enable_gradient_checkpointing, load_unet, pixel_multiple
from tests.fakes import UNET as TINY


def test_weights_depend_on_the_seed_alone():
    state = torch.random.get_rng_state()
    one = build_unet(TINY, seed=1).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    same, other = build_unet(TINY, seed=1).state_dict(), build_unet(TINY, seed=2).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["conv_in.weight"], other["conv_in.weight"])


@pytest.mark.parametrize("subfolder", ["unet", ""])
def test_a_saved_unet_comes_back_from_a_pipeline_or_its_own_folder(tmp_path, subfolder):
    unet = build_unet(TINY)
    unet.half().save_pretrained(tmp_path / subfolder)
    loaded = load_unet(tmp_path)
    assert not loaded.training and loaded.dtype == torch.float32
    for name, tensor in unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.float())
    assert load_unet(str(tmp_path), dtype=torch.float16).dtype == torch.float16


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no such folder: .*absent"):
        load_unet(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="holds no U-Net"):
        load_unet(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(UserError, match="holds no U-Net"):
        load_unet(tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(UserError, match="holds a UNet2DModel, not a UNet2DConditionModel"):
        load_unet(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        load_unet(tmp_path / "config.json")
    with pytest.raises(UserError, match="unknown U-Net argument 'block_channels'"):
        build_unet({**TINY, "block_channels": [32]})
    with pytest.raises(UserError, match="give no U-Net"):
        build_unet({**TINY, "block_out_channels": [32]})


def test_broken_weights_are_named(tmp_path):
    build_unet(TINY).save_pretrained(tmp_path / "unet")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="no U-Net can be loaded from"):
        load_unet(tmp_path)


def test_gradient_checkpointing_changes_no_gradient():
    unet = build_unet(TINY).train()
    z, t, context = torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.randn(1, 5, 32)

    def gradients():
        unet.zero_grad()
        unet(z, t, context).sample.square().mean().backward()
        return [parameter.grad.clone() for parameter in unet.parameters()]

    plain = gradients()
    enable_gradient_checkpointing(unet)
    assert unet.is_gradient_checkpointing
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other)


def test_pixel_multiple():
    assert pixel_multiple(build_unet(TINY), downsample=8) == 16


def test_a_folder_beside_the_model_is_told_what_it_holds(tmp_path):
    with pytest.raises(UserError, match=r"there is no unet/config.json and it is no U-Net itself"):
        load_unet(tmp_path)
    for name in ("second", "first"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds no U-Net: it holds the runs first, second: name one"):
        load_unet(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"it holds shards; name a model or a run"):
        load_unet(tmp_path)
