"""Images per second of one training step, ours beside a stock diffusers loop, in the same run.

    python -m benchmarks.train_step                         # SD 1.5's shape at 512 px on a GPU, tiny on a CPU
    python -m benchmarks.train_step --work tiny --seconds 2

Both train all weights of the same U-Net with AdamW and clipping on the same random moments, with the text encoder
in the step. `stock` is the loop of diffusers' examples: eager, autocast, torch's default AdamW and memory layout.
`ours` is `optimizer_step` as `finetune train` runs it: addressed draws, fused AdamW that skips non-finite steps on
the device; `ours_ema` averages the weights as well; `ours_other_layout` has the memory layout that is not the
default here (channels-last on a GPU). One JSON line each.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.common import context, record
from finetune import diffusion
from finetune.batch import Batch
from finetune.conditioning.text import Text
from finetune.distributed import DataParallel, OptimizerSettings, ParamGroup, World
from finetune.ema import Average, HalfLife
from finetune.latents import LatentSpace
from finetune.models.unet import build_unet
from finetune.objective import LatentDiffusion, Objective
from finetune.step import optimizer_step

WORKS: dict[str, dict[str, Any]] = {
    "sd15_512": {
        "size": 64,
        "tokens": 77,
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    },
    "tiny": {
        "size": 8,
        "tokens": 16,
        "text": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
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
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}


def models(work: dict[str, Any], device: torch.device) -> tuple[Any, Any]:
    torch.manual_seed(0)
    unet = build_unet(work["unet"]).train().to(device)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=1000, max_position_embeddings=work["tokens"], **work["text"]))
    return unet, text.eval().requires_grad_(False).to(device)


def batches(work: dict[str, Any], batch: int, device: torch.device) -> Iterator[Batch]:
    """Random moments that lie in pinned memory, as the loader would leave them."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(4):
        moments = torch.randn(batch, 8, work["size"], work["size"], generator=generator)
        moments[:, 4:] = moments[:, 4:].abs() * 0.1
        clock = torch.arange(index * batch, (index + 1) * batch)
        moments = moments.half().pin_memory() if device.type == "cuda" else moments.half()
        made.append(Batch(moments, [""] * batch, clock, clock, (work["size"] * 8,) * 2))
    while True:
        yield from made


def stock(work: dict[str, Any], batch: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    unet, text = models(work, device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5)
    scheduler = DDPMScheduler(**BETAS)
    source = batches(work, batch, device)
    tokens = torch.randint(0, 1000, (batch, work["tokens"]))

    def step() -> None:
        mean, std = next(source).moments.to(device, non_blocking=True).float().chunk(2, dim=1)
        z = (mean + std * torch.randn_like(mean)) * 0.18215
        noise = torch.randn_like(z)
        timesteps = torch.randint(0, 1000, (batch,), device=device)
        with torch.autocast(device.type, dtype):
            states = text(tokens.to(device))[0]
            predicted = unet(scheduler.add_noise(z, noise, timesteps), timesteps, states).sample
            loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(
    work: dict[str, Any], batch: int, device: torch.device, dtype: torch.dtype, *, ema: bool, channels_last: bool
) -> Callable[[], Any]:
    return trained(work, batch, device, dtype, ema=ema, channels_last=channels_last)[0]


def trained(
    work: dict[str, Any], batch: int, device: torch.device, dtype: torch.dtype, *, ema: bool, channels_last: bool
) -> tuple[Callable[[], Any], DataParallel, list[Average]]:
    """One step of ours, and what it trains."""
    unet, text = models(work, device)
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    tokens = torch.randint(0, 1000, (batch, work["tokens"]))
    conditioner = Text(None, lambda _: tokens, text, lambda ids: text(ids)[0], width=text.config.hidden_size)
    model = LatentDiffusion(
        unet,
        conditioner,
        schedule=diffusion.variance_preserving(diffusion.alphas_cumprod(diffusion.betas(**BETAS))).to(device),
        space=LatentSpace(0.18215),
        objective=Objective(),
        seed=0,
    ).train()
    strategy = DataParallel(
        World(0, 1, 0, device),
        model,
        [ParamGroup("unet", {f"unet.{n}": p for n, p in unet.named_parameters()})],
        optimizer=OptimizerSettings(),
        max_grad_norm=1.0,
        precision={torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype],
    )
    masters = [s.master for s in strategy.shards]
    averages = [Average.starting_at(masters, HalfLife(500_000, 0.05))] if ema else []
    step = partial(
        optimizer_step,
        strategy,
        conditioner,
        batches(work, batch, device),
        micro_batches=1,
        global_batch=batch,
        lr=1e-5,
        dropout=0.1,
        seed=0,
        averages=averages,
        images_seen=1_000_000,
    )
    return step, strategy, averages


def measure(step: Callable[[], Any], batch: int, seconds: float, device: torch.device) -> tuple[float, float]:
    """(median images/s of blocks of four steps, peak GiB of device memory)."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(5):
        step()
    rates: list[float] = []
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or not rates:
        wait()
        started = time.perf_counter()
        for _ in range(4):
            step()
        wait()
        rates.append(4 * batch / (time.perf_counter() - started))
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return sorted(rates)[len(rates) // 2], memory


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORKS, default="sd15_512" if on_gpu else "tiny")
    parser.add_argument("--batch", type=int, default=32 if on_gpu else 4)
    parser.add_argument("--seconds", type=float, default=20.0, help="measured time of each variant")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here as well")
    arguments = parser.parse_args()
    device = torch.device("cuda" if on_gpu else "cpu")
    work, batch, dtype = WORKS[arguments.work], arguments.batch, torch.bfloat16
    variants = {
        "stock": stock,
        "ours": partial(ours, ema=False, channels_last=not on_gpu),
        "ours_ema": partial(ours, ema=True, channels_last=not on_gpu),
        "ours_other_layout": partial(ours, ema=False, channels_last=on_gpu),
        "stock_again": stock,  # the spread of the same thing measured twice
    }
    base = None
    for name, make in variants.items():
        step = make(work, batch, device, dtype)
        rate, memory = measure(step, batch, arguments.seconds, device)
        base = base or rate
        row = {"work": arguments.work, "variant": name, "batch": batch, "precision": "bf16 autocast"}
        row |= {"images_per_s": round(rate, 2), "to_stock": round(rate / base, 3), "memory_gib": round(memory, 2)}
        record(arguments.out, row | context())
        del step
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
