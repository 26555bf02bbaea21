"""What benchmarks train: shapes of known U-Nets with random weights, and random batches as from the loader."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from finetune import diffusion
from finetune.batch import Batch
from finetune.conditioning.text import Text
from finetune.distributed import Strategy
from finetune.ema import Average
from finetune.latents import LatentSpace
from finetune.models.adapters import add_lora
from finetune.models.unet import build_unet, enable_gradient_checkpointing
from finetune.objective import LatentDiffusion, Objective
from finetune.step import StepResult, optimizer_step

SEED = 0
BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
}
SPACE = LatentSpace(0.18215)
RANK = 16  # of adapters
LR, MAX_GRAD_NORM = 1e-5, 1.0

# `size`: of the latents' sides; `channels`: of the latents, 4 where nothing is said; `tokens`: of a caption.
SHAPES: dict[str, dict[str, Any]] = {
    "sd15_512": {
        "size": 64,
        "tokens": 77,
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    },
    "sd21_512": {
        "size": 64,
        "tokens": 77,
        "unet": {
            "sample_size": 64,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
    },
    "sdxl_1024": {
        "size": 128,
        "tokens": 77,
        "unet": {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    },
    "tiny": {
        "size": 8,
        "tokens": 16,
        "unet": {
            "sample_size": 8,
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            "block_out_channels": [32, 64],
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        },
    },
}

# Latent channels, multiples of the width, the first level with attention: class-conditional U-Nets of matched size
# for f = 1 to 32 (Rombach et al. 2022, table 13: 396M, 391M, 391M, 395M, 395M, 395M; that of f = 4 has 401M, as the
# authors' released one).
MATCHED = {
    1: (3, (1, 1, 2, 2, 4, 4), 3),
    2: (2, (1, 2, 2, 4, 4), 2),
    4: (3, (1, 2, 3, 5), 1),
    8: (4, (1, 2, 4), 0),
    16: (8, (1, 2, 4), 0),
    32: (32, (1, 2, 4), 0),
}


def matched(downsample: int, pixels: int, width: int, context: int) -> dict[str, Any]:
    """The shape of table 13's U-Net for f = `downsample`; a class is one token of `context` features.

    Args:
        width: channels of the first level.
    """
    channels, multiples, first = MATCHED[downsample]
    attends = [level >= first for level in range(len(multiples))]
    return {
        "size": pixels // downsample,
        "channels": channels,
        "tokens": 1,
        "unet": {
            "sample_size": pixels // downsample,
            "in_channels": channels,
            "out_channels": channels,
            "block_out_channels": [width * multiple for multiple in multiples],
            "down_block_types": ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends],
            "up_block_types": ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)],
            "attention_head_dim": 1,  # heads
            "cross_attention_dim": context,
            "norm_num_groups": min(32, width),
        },
    }


SHAPES |= {f"ldm{f}": matched(f, 256, 192 if f < 8 else 256, 512) for f in MATCHED}
SHAPES |= {f"tiny_ldm{f}": matched(f, 128, 8, 16) for f in MATCHED}


def channels_of(shape: str) -> int:
    """Of the latents."""
    return int(SHAPES[shape].get("channels", 4))


class WithAdded(nn.Module):
    """A U-Net that is told the same pooled text and sizes at each call, as SDXL's is of each sample."""

    def __init__(self, unet: nn.Module, batch: int, device: torch.device) -> None:
        super().__init__()
        self.unet = unet
        generator = torch.Generator().manual_seed(1)
        self.text_embeds = torch.randn(batch, 1280, generator=generator).to(device)
        self.time_ids = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]] * batch, device=device)

    def forward(self, noised: Tensor, *args: Any, **settings: Any) -> Any:
        added = {"text_embeds": self.text_embeds.to(noised.dtype), "time_ids": self.time_ids}
        return self.unet(noised, *args, added_cond_kwargs=added, **settings)


def make_unet(shape: str, *, adapter: str = "full", checkpointing: bool = False) -> UNet2DConditionModel:
    """The U-Net on the CPU; what is trained requires gradients."""
    on_gpu = torch.cuda.is_available()  # it draws weights in no time
    with torch.device("cuda") if on_gpu else contextlib.nullcontext():
        unet = build_unet(SHAPES[shape]["unet"], seed=SEED).train()
    if on_gpu:
        unet = unet.cpu()
    if adapter == "lora":
        unet.requires_grad_(False)
        add_lora(unet, RANK, float(RANK), seed=SEED)
    if checkpointing:
        enable_gradient_checkpointing(unet)
    return unet


def with_added(unet: nn.Module, shape: str, batch: int, device: torch.device) -> nn.Module:
    """The U-Net as both loops call it."""
    return WithAdded(unet, batch, device) if SHAPES[shape]["unet"].get("addition_embed_type") else unet


def trained_of(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def schedule(device: torch.device) -> diffusion.Schedule:
    """Stable Diffusion's noise schedule."""
    return diffusion.variance_preserving(diffusion.alphas_cumprod(diffusion.betas(**BETAS))).to(device)


def make_model(unet: nn.Module, shape: str, device: torch.device) -> LatentDiffusion:
    """What a strategy wraps, told the states of captions by its batches."""
    tokens, width = SHAPES[shape]["tokens"], SHAPES[shape]["unet"]["cross_attention_dim"]
    conditioner = Text(
        None,
        lambda texts: torch.zeros(len(texts), tokens, dtype=torch.long),
        nn.Identity(),
        lambda ids: ids,
        width=width,
    )
    conditioner.empty_states_LD = torch.zeros(tokens, width, dtype=torch.float16)
    return LatentDiffusion(
        unet,
        conditioner,
        schedule=schedule(device),
        space=SPACE,
        objective=Objective(),
        seed=SEED,
    ).train()


def batches(shape: str, batch: int, device: torch.device, *, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
    """Random moments and states in page-locked memory; each visit has clocks of its own, as from the loader."""
    size, tokens, channels = SHAPES[shape]["size"], SHAPES[shape]["tokens"], channels_of(shape)
    generator = torch.Generator().manual_seed(rank)
    made = []
    for _ in range(4):
        moments = torch.randn(batch, 2 * channels, size, size, generator=generator)
        moments[:, channels:] = moments[:, channels:].abs() * 0.1
        states = torch.randn(batch, tokens, SHAPES[shape]["unet"]["cross_attention_dim"], generator=generator)
        pair = (moments.half(), states.half())
        made.append([one.pin_memory() for one in pair] if device.type == "cuda" else pair)
    step = 0
    while True:
        moments, states = made[step % 4]
        clock = (step * ranks + rank) * batch + torch.arange(batch)
        yield Batch(moments, ["x"] * batch, clock, clock, (size * 8,) * 2, text_states=states)
        step += 1


def stepping(
    strategy: Strategy,
    model: LatentDiffusion,
    source: Iterator[Batch],
    global_batch: int,
    averages: Sequence[Average] = (),
    lr: float = LR,
    micro_batches: int = 1,
) -> Callable[[], StepResult]:
    """`finetune train`'s step, on `micro_batches` batches of this rank's; a call makes one."""
    images_seen = 0

    def step() -> StepResult:
        nonlocal images_seen
        images_seen += global_batch
        return optimizer_step(
            strategy,
            model.conditioner,
            source,
            micro_batches=micro_batches,
            global_batch=global_batch,
            lr=lr,
            dropout=0.0,
            seed=SEED,
            averages=averages,
            images_seen=images_seen,
        )

    return step
