"""What makes diffusers' models fast on a GPU; their weights, names and outputs stay the same.

kernels   norms, GEGLU, joins with what stands beside them, attention to captions, in Triton
lora      adapters merged into the product that they adapt
linear    linear layers of one input as one product
blocks    forward passes of a U-Net's blocks that keep maps channels-last and call these, for training
encoder   that of an autoencoder's encoder, to encode with

Weights that train stay float32 and are cast where they are used. Not here, and why: `torch.compile` (two minutes at
a cold start and again for each bucket, for what these kernels do as well), 8-bit products (at these widths linear
layers wait for memory, not for arithmetic), FlashAttention 3 and 4. benchmarks/NOTES.md has the numbers.
"""

from __future__ import annotations

import os
import shutil

import torch
from torch import Tensor, nn

from finetune.models.fast import blocks, encoder

__all__ = ["add_", "available", "make_encoder_fast", "make_fast", "missing"]


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


def make_fast(unet: nn.Module) -> None:
    """Exchange forward passes in place."""
    blocks.exchange(unet)


def add_(total: Tensor, x: Tensor) -> None:
    """`total += x`: float32, and x in half precision."""
    if total.is_cuda:
        blocks.kernels.add_(total, x)
    else:
        total.add_(x)


def make_encoder_fast(autoencoder: nn.Module) -> bool:
    """Exchange the forward pass of an autoencoder's encoder, in place; False where it is of a kind unknown here."""
    inner = getattr(autoencoder, "encoder", None)
    if not isinstance(inner, nn.Module) or not encoder.takes(inner):
        return False
    inner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inner.__class__ = encoder.Encoder
    return True
