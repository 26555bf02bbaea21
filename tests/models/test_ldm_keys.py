"""Names of single files: against diffusers' own readers, and there and back bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as peer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finetune import UserError
from finetune.models import ldm_keys

SHAPES: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 16, "attention_head_dim": 2},
    "sd2": {"cross_attention_dim": 16, "attention_head_dim": [1, 2, 2, 2], "use_linear_projection": True},
    "xl": {
        "cross_attention_dim": 16,
        "attention_head_dim": [1, 2, 2],
        "use_linear_projection": True,
        "block_out_channels": [8, 16, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 3],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 40,
    },
}


def drawn(module: nn.Module) -> dict[str, Tensor]:
    """Weights of which no two are equal, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(0)
    return {
        n: torch.randn(p.shape, generator=generator)
        for n, p in module.state_dict().items()
        if p.is_floating_point()
    }


def unet(kind: str) -> UNet2DConditionModel:
    settings = {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "sample_size": 8, **SHAPES[kind]}
    with torch.device("meta"):
        return UNet2DConditionModel(**settings)


def vae() -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            block_out_channels=[8, 8, 16],
            layers_per_block=2,
            norm_num_groups=4,
        )


def text(projection: bool = False) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=7, projection_dim=8,
    )  # fmt: skip
    with torch.device("meta"):
        return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", SHAPES)
def test_a_unet_goes_there_and_back_and_diffusers_reads_it(kind: str) -> None:
    module = unet(kind)
    state = drawn(module)
    single = ldm_keys.unet_to_ldm(state, module.config)
    assert len(single) == len(state)
    assert_same(ldm_keys.unet_from_ldm(single, state, module.config), state)
    assert_same(peer.convert_ldm_unet_checkpoint(dict(single), dict(module.config)), state)


def test_keys_of_stable_diffusion_1() -> None:
    """As they are in the file that was published."""
    with torch.device("meta"):
        module = UNet2DConditionModel(cross_attention_dim=768)
    keys = {ldm_keys.unet_key(name, module.config) for name in module.state_dict()}
    assert len(keys) == 686
    assert {
        "time_embed.0.weight",
        "input_blocks.0.0.bias",
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "input_blocks.3.0.op.weight",
        "input_blocks.4.0.skip_connection.weight",
        "input_blocks.11.0.out_layers.3.bias",
        "middle_block.1.proj_in.weight",
        "middle_block.2.emb_layers.1.weight",
        "output_blocks.2.1.conv.weight",
        "output_blocks.5.2.conv.bias",
        "output_blocks.11.1.norm.weight",
        "out.2.weight",
    } <= keys


def test_an_autoencoder_goes_there_and_back_and_diffusers_reads_it() -> None:
    module = vae()
    state = drawn(module)
    single = ldm_keys.vae_to_ldm(state, module.config)
    assert "first_stage_model.decoder.up.2.upsample.conv.weight" in single
    assert single["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert_same(ldm_keys.vae_from_ldm(single, state, module.config), state)
    assert_same(peer.convert_ldm_vae_checkpoint(dict(single), dict(module.config)), state)


@pytest.mark.parametrize("kind", ldm_keys.TEXT)
def test_a_text_encoder_goes_there_and_back(kind: str) -> None:
    state = drawn(text(projection=kind == "xl_openclip"))
    single = ldm_keys.text_to_ldm(state, kind)
    assert all(key.startswith(ldm_keys.TEXT[kind]) for key in single)
    assert_same(ldm_keys.text_from_ldm(single, state, kind), state)


def test_diffusers_reads_clip_and_openclip() -> None:
    state = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in drawn(text()).items()}
    single = ldm_keys.text_to_ldm(state, "clip")
    assert_same(peer.convert_ldm_clip_checkpoint(dict(single)), state)
    projected = {
        n if n.startswith(("text_model.", "text_projection")) else f"text_model.{n}": t
        for n, t in drawn(text(projection=True)).items()
    }
    single = ldm_keys.text_to_ldm(projected, "xl_openclip")
    read = peer.convert_open_clip_checkpoint(nn.Module(), dict(single), prefix="conditioner.embedders.1.model.")
    read = {name: tensor for name, tensor in read.items() if "position_ids" not in name}
    assert_same(read, projected)


def test_layers_after_the_last_used_are_left_out() -> None:
    state = drawn(text())
    single = ldm_keys.text_to_ldm(state, "openclip")
    single["cond_stage_model.model.transformer.resblocks.3.ln_1.weight"] = torch.ones(8)
    assert_same(ldm_keys.text_from_ldm(single, state, "openclip"), state)


def test_a_file_of_another_kind_is_one_line() -> None:
    module = unet("sd1")
    with pytest.raises(UserError, match=r"holds no model\.diffusion_model\..*another kind of model"):
        ldm_keys.unet_from_ldm({}, module.state_dict(), module.config)
    with pytest.raises(UserError, match="know nothing like the U-Net's encoder_hid_proj.weight"):
        ldm_keys.unet_key("encoder_hid_proj.weight", module.config)
