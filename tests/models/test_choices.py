"""Each `model=` composes; the paper's have the sizes that the paper gives, and run."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import UNet2DConditionModel
from omegaconf import OmegaConf

from finetune.config import Config, ModelConfig, compose, conf_dir, groups
from finetune.models.unet import build_unet, pixel_multiple

LAYERS = 12 * 16 * 512**2 / 1e6  # of the boxes' transformer (table 17), which the paper counts with the U-Net
# Millions of parameters: as the paper gives them, and what it counts beside the U-Net.
PAPER = {
    "ldm4": (274, 0.0),
    "ldm8": (256, 0.0),
    "ldm4_class": (395, 0.0),
    "ldm8_class": (395, 0.0),
    "ldm4_layout": (306, LAYERS),
    "ldm8_layout": (345, LAYERS),
    "ldm8_semantic": (215, 0.0),
    "ldm4_sr": (169, 55.3),  # the autoencoder
    "ldm4_inpainting": (215, 0.0),
    "ldm8_text": (1450, 12 * 32 * 1280**2 / 1e6 + (30522 + 77) * 1280 / 1e6),
}
# Exactly those of the authors' released files, as their loader counts and diffusers' conversion has them.
RELEASED = {"ldm4_class": 400.92, "ldm8_text": 872.30}


@functools.cache
def chosen(model: str) -> ModelConfig:
    """As `compose` reads it, which does much else."""
    merged = OmegaConf.merge(ModelConfig, OmegaConf.load(conf_dir() / "model" / f"{model}.yaml"))
    made = OmegaConf.to_object(merged)
    assert isinstance(made, ModelConfig)
    return made


@functools.cache
def on_meta(model: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return build_unet(chosen(model).unet | channels(model))


def channels(model: str) -> dict[str, int]:
    """Of latents as the paper has them, and of what a task lays beside them; the trainer fills these in."""
    latents = 3 if model.startswith("ldm4") else 4
    beside = {"ldm4_sr": 3, "ldm4_inpainting": latents + 1, "ldm8_semantic": 4}.get(model, 0)
    return {"in_channels": latents + beside, "out_channels": latents}


def millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def test_every_choice_is_pretrained_or_builds() -> None:
    for name in groups()["model"]:
        model = chosen(name)
        assert bool(model.pretrained) != bool(model.unet), name
        if name.startswith("ldm"):  # latents and task say these
            assert name in PAPER and not {"in_channels", "out_channels"} & model.unet.keys()
    config, _ = compose("train", ["model=ldm8", "data.shards=none"], Config)
    assert config.model == chosen("ldm8")


@pytest.mark.parametrize("name", PAPER)
def test_sizes_are_the_papers(name: str) -> None:
    paper, beside = PAPER[name]
    assert millions(on_meta(name)) + beside == pytest.approx(paper, rel=0.072)
    if name in RELEASED:
        assert millions(on_meta(name)) == pytest.approx(RELEASED[name], abs=0.005)


@pytest.mark.parametrize("name", PAPER)
def test_attention_is_where_the_paper_has_it(name: str) -> None:
    """By the resolution of the latents that the model is made for: at 32, 16, 8 (and 4), or where it has none."""
    unet = on_meta(name)
    places = [unet.config.sample_size >> level for level in range(len(unet.config.block_out_channels))]
    found = [place for place, block in zip(places, unet.down_blocks, strict=True) if hasattr(block, "attentions")]
    wanted = {"ldm8": [32, 16, 8, 4], "ldm4_sr": [8], "ldm8_semantic": [], "ldm4_inpainting": []}
    assert found == wanted.get(name, [32, 16, 8])
    above = [hasattr(block, "attentions") for block in unet.up_blocks]
    assert above == [hasattr(block, "attentions") for block in reversed(unet.down_blocks)]


@pytest.mark.parametrize("name", sorted(set(PAPER) - {"ldm8_text", "ldm4_class", "ldm8_class", "ldm4_layout"}))
def test_they_run_without_or_with_context(name: str) -> None:
    """At an eighth of the width: the same blocks."""
    settings = chosen(name).unet
    narrow = [channels // 8 for channels in settings["block_out_channels"]]
    heads = {"ldm4": 4, "ldm4_sr": 4, "ldm8": [3, 3, 3, 3, 4]}.get(name, settings["attention_head_dim"])
    unet = build_unet(
        settings
        | {"block_out_channels": narrow, "norm_num_groups": 2, "attention_head_dim": heads}
        | channels(name)
    )
    size = 2 * pixel_multiple(unet, 1)  # with one place alone, self-attention has no use for its queries
    noise = torch.randn(2, unet.config.in_channels, size, size, requires_grad=True)
    context = None if isinstance(settings["cross_attention_dim"], list) else torch.randn(2, 3, 512)
    out = unet(noise, torch.tensor([1, 900]), encoder_hidden_states=context).sample
    assert out.shape == (2, unet.config.out_channels, size, size)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())
