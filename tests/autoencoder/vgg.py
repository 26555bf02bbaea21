"""Random weights of VGG16 and of LPIPS's heads, under the names of the published ones."""

from __future__ import annotations

import torch

# Where torchvision's VGG16 has its convolutions, and their widths; "M" is a pooling (its configuration D).
LAYOUT = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]


def vgg16(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under torchvision's names, of a size that keeps signals alive."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    index, channels = 0, 3
    for width in LAYOUT:
        if width == "M":
            index += 1
            continue
        state[f"features.{index}.weight"] = (
            torch.randn(width, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
        )
        state[f"features.{index}.bias"] = torch.randn(width, generator=generator) * 0.1
        index, channels = index + 2, width
    return state


def heads(seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    widths = (64, 128, 256, 512, 512)
    return {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1, generator=generator) for i, w in enumerate(widths)}
