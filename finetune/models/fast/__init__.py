"""What makes diffusers' models fast on a GPU; their weights, names and outputs stay the same.

kernels   group norm, GEGLU and others with what stands beside them, in Triton
lora      adapters merged into the product that they adapt
blocks    forward passes of a U-Net's blocks that keep maps channels-last and call these, for training
encoder   that of an autoencoder's encoder, to encode with

Weights that train stay float32 and are cast where they are used. Not here, and why: 8-bit products (at these widths
linear layers wait for memory, not for arithmetic), FlashAttention 3 and 4 (benchmarks/NOTES.md).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import nn

from finetune.models.fast import blocks, encoder

__all__ = ["available", "make_encoder_fast", "make_fast", "missing"]


def available(device: torch.device) -> bool:
    """Whether what is here is for this device: GPUs from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def missing() -> str | None:
    """What it needs beside the device and does not find."""
    if blocks.kernels is None:
        return "Triton"
    # Triton compiles the code that launches its kernels.
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    return None if any(name and shutil.which(name) for name in compilers) else "a C compiler"


def make_fast(unet: nn.Module, *, compiled: bool) -> None:
    """Exchange forward passes in place, and compile block by block.

    Each block is compiled by itself: equal ones once, so that a start takes a fraction of the whole model's time;
    and over several ranks the gradients of one are reduced while those of the blocks before it are computed.
    """
    blocks.exchange(unet)
    if not compiled:
        return
    # torch's own place is a temporary folder, which a node may have forgotten by the next job.
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "ldm-finetune" / "compiled"))
    # Blocks of one class run the same code, each kind and each bucket with shapes of its own.
    config = torch._dynamo.config
    config.optimize_ddp = False  # it would split graphs by DDP's buckets: blocks are small already
    config.recompile_limit = max(config.recompile_limit, 1024)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8192)
    for module in unet.modules():
        if isinstance(module, blocks.Region):
            module.compiled = torch.compile(module.plain, dynamic=False)


def make_encoder_fast(autoencoder: nn.Module) -> bool:
    """Exchange the forward pass of an autoencoder's encoder, in place; False where it is of a kind unknown here."""
    inner = getattr(autoencoder, "encoder", None)
    if not isinstance(inner, nn.Module) or not encoder.takes(inner):
        return False
    inner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inner.__class__ = encoder.Encoder
    return True
