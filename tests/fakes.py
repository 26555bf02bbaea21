"""Tiny models and a run folder written by hand, in the layout that the trainer writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from finetune.models import adapters, text

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
UNET_XL = UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "cross_attention_dim": 32 + 48,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 24,
}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
CAPTIONS = ["a red apple", "a green apple", "a smiling face", "a blue heart"]
SCALE = 0.5
STEP = 20


def unet(seed: int = 0) -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(**UNET).eval()


def vae(seed: int = 0) -> AutoencoderKL:
    """Four pixels a latent cell; its own scaling factor is not the one of the run."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            block_out_channels=[16, 16, 16],
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=32,
            scaling_factor=SCALE,
        ).eval()


def tokenizer() -> CLIPTokenizer:
    return text.train_tokenizer(CAPTIONS * 2, 560, max_length=12)


def text_encoder(seed: int = 0) -> CLIPTextModel:
    return text.build_text_encoder(tokenizer(), 32, 1, 2, seed=seed).eval()


def base_model(folder: Path) -> Path:
    """A Stable Diffusion pipeline as diffusers saves it."""
    StableDiffusionPipeline(
        vae=vae(), text_encoder=text_encoder(), tokenizer=tokenizer(), unet=unet(),
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def text_encoder_2(seed: int = 1) -> CLIPTextModelWithProjection:
    """Wider and deeper than the first, with the exact GELU, and a projection to 24 features."""
    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3,
        max_position_embeddings=words.model_max_length, projection_dim=24, hidden_act="gelu",
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPTextModelWithProjection(config).eval()


def tiny_sdxl(folder: Path, *, in_channels: int = 4, force_zeros: bool = True) -> Path:
    """A Stable Diffusion XL pipeline as diffusers saves it; its second tokenizer pads otherwise than the first."""
    second = tokenizer()
    second.pad_token = "!"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**UNET_XL | {"in_channels": in_channels}).eval()
    StableDiffusionXLPipeline(
        vae=vae(), text_encoder=text.build_text_encoder(tokenizer(), 32, 2, 2, seed=0).eval(),
        text_encoder_2=text_encoder_2(), tokenizer=tokenizer(), tokenizer_2=second, unet=unet,
        scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=force_zeros, add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def config(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "model": {"pretrained": None, "vae": None, "scheduler": dict(SCHEDULE)},
        "objective": {"prediction": "epsilon"},
        "adapter": {"kind": "full", "rank": 4, "alpha": 4.0},
        "data": {"shards": "gone"},
        "sample": {"guidance": 3.0},
    }
    for key, value in changes.items():
        made[key] |= value
    return made


def full_run(folder: Path, *, ema: bool = True, steps: tuple[int, ...] = (STEP,)) -> Path:
    """A run from scratch with its own tokenizer and text encoder; `ema` and raw weights differ."""
    vae().save_pretrained(folder / "vae")
    (folder / "config.yaml").write_text(yaml.safe_dump(config(model={"vae": str(folder / "vae")})))
    tokenizer().save_pretrained(folder / "tokenizer")
    for step in steps:
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        for seed, name in enumerate(("weights", "ema") if ema else ("weights",)):
            unet(step + seed).save_pretrained(checkpoint / name / "unet")
            text_encoder(step + seed).save_pretrained(checkpoint / name / "text_encoder")
        (checkpoint / "trainer.json").write_text(json.dumps({"format": 1, "step": step}))
    return folder


def adapted_unet(rank: int = 4, alpha: float = 10.0) -> tuple[UNet2DConditionModel, dict[str, torch.Tensor]]:
    """The base model's U-Net with an adapter that changes it, and the adapter's parameters."""
    module = unet()
    names = adapters.add_lora(module, rank, alpha, seed=1)
    parameters = dict(module.named_parameters())
    generator = torch.Generator().manual_seed(7)
    for name in names:
        if ".lora_B." in name:
            parameters[name].data = 0.2 * torch.randn(parameters[name].shape, generator=generator)
    return module.eval(), {f"unet.{name}": parameters[name].detach() for name in names}


def lora_file(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LoRA parameters by the names of `pytorch_lora_weights.safetensors`."""
    return {adapters.lora_key(name): tensor for name, tensor in named.items()}


def lora_run(folder: Path, base: Path, alpha: float = 10.0) -> Path:
    folder.mkdir()
    made = config(model={"pretrained": str(base)}, adapter={"kind": "lora", "alpha": alpha})
    (folder / "config.yaml").write_text(yaml.safe_dump(made))
    module, named = adapted_unet(alpha=alpha)
    checkpoint = folder / "checkpoints" / f"step-{STEP:08d}"
    for name in ("weights", "ema"):
        adapters.save_lora(checkpoint / name, lora_file(named), adapters.lora_alphas("unet", module))
    (checkpoint / "trainer.json").write_text(json.dumps({"format": 1, "step": STEP}))
    return folder
