"""LPIPS: how different two pictures look, by the features of VGG16 (Zhang et al. 2018, arXiv 1801.03924).

The weights come from the user: those of VGG16 under torchvision's names (`features.0.weight`, ...) and the linear
heads of version 0.1 under the names of their publication (`lin0.model.1.weight`, ...), in one file or in two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune import UserError
from finetune.models.weight_files import read_weights, shape_of

# Simonyan & Zisserman 2015 (arXiv 1409.1556), table 1, configuration D: widths of the 3x3 convolutions by stage. A
# stage is followed by a 2x2 max pooling; LPIPS reads the last ReLU of each.
STAGES = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)
SMALLEST_SIDE = 2 ** (len(STAGES) - 1)  # pixels: the last stage has one cell left
# ImageNet's mean and standard deviation by channel, for pixels in [0, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FEATURE = re.compile(
    r"(?:features|net\.slice\d)\.(\d+\.(?:weight|bias))"
)  # net.slice1: a whole LPIPS, saved as one


def torchvision_index(stage: int, convolution: int) -> int:
    """Where a convolution stands among torchvision's `features`: each has a ReLU after it, each stage a pooling."""
    return sum(2 * len(widths) + 1 for widths in STAGES[:stage]) + 2 * convolution


class Lpips(nn.Module):
    """The distance of arXiv 1801.03924, equation 1, with VGG16 and linear heads; frozen.

    Args:
        weights: what `read_lpips` returns.
    """

    mean_3: Tensor
    std_3: Tensor

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.stages, self.heads, channels = nn.ModuleList(), nn.ParameterList(), 3
        for stage, widths in enumerate(STAGES):
            convolutions = nn.ModuleList()
            for i, width in enumerate(widths):
                convolution = nn.utils.skip_init(nn.Conv2d, channels, width, 3, padding=1)
                name = f"features.{torchvision_index(stage, i)}"
                convolution.weight.data = weights[f"{name}.weight"].float()
                convolution.bias.data = weights[f"{name}.bias"].float()
                convolutions.append(convolution)
                channels = width
            self.stages.append(convolutions)
            self.heads.append(nn.Parameter(weights[f"lin{stage}"].float().flatten()))
        # Pixels come in [-1, 1], so twice the values for [0, 1], moved.
        self.register_buffer("mean_3", torch.tensor(MEAN) * 2 - 1, persistent=False)
        self.register_buffer("std_3", torch.tensor(STD) * 2, persistent=False)
        self.requires_grad_(False)

    def features(self, image_B3HW: Tensor) -> list[Tensor]:
        """The last ReLU of each stage, [B, C, h, w] each, float32 unless autocast says otherwise."""
        x = (image_B3HW - self.mean_3.view(3, 1, 1)) / self.std_3.view(3, 1, 1)
        found: list[Tensor] = []
        for convolutions in self.stages:
            x = F.max_pool2d(x, 2) if found else x
            assert isinstance(convolutions, nn.ModuleList)
            for convolution in convolutions:
                x = F.relu(convolution(x))
            found.append(x)
        return found

    def forward(self, image_B3HW: Tensor, recon_B3HW: Tensor, bf16: bool = False) -> Tensor:
        """Distances [B], float32, of pictures in [-1, 1]; gradients reach `recon_B3HW` alone."""
        with torch.autocast(image_B3HW.device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                wanted = self.features(image_B3HW)
            found = self.features(recon_B3HW)
        total = torch.zeros(len(image_B3HW), device=image_B3HW.device)
        for head_C, a_BChw, b_BChw in zip(self.heads, wanted, found, strict=True):
            total = total + layer_distance(a_BChw.float(), b_BChw.float(), head_C)
        return total


def layer_distance(a_BChw: Tensor, b_BChw: Tensor, head_C: Tensor) -> Tensor:
    """One layer's term of equation 1, [B]: weighted squared differences of unit vectors over channels, averaged."""

    def unit(x_BChw: Tensor) -> Tensor:
        # vector_norm has a gradient of zero at zero, where that of sqrt is not finite: a dead cell is common.
        return x_BChw / (torch.linalg.vector_norm(x_BChw, dim=1, keepdim=True) + 1e-10)

    difference = (unit(a_BChw) - unit(b_BChw)).square()
    return (difference * head_C.view(-1, 1, 1)).sum(dim=1).mean(dim=(1, 2))


def read_lpips(path: str, heads: str | None = None) -> dict[str, Tensor]:
    """VGG16's features and the heads of LPIPS, as `features.N.weight`, `features.N.bias` and `lin0` to `lin4`.

    Args:
        path: a `.safetensors`, or a `.pth` of which weights alone are read; with all of it, or all but the heads.
        heads: a file of the heads alone.

    Raises:
        UserError: a file can't be read, or lacks a tensor, or has one of another shape.
    """
    tensors, _ = read_weights(Path(path))
    own = {f"features.{match[1]}": name for name in tensors if (match := _FEATURE.fullmatch(name))}
    result, channels = {}, 3
    for stage, widths in enumerate(STAGES):
        for i, width in enumerate(widths):
            name = f"features.{torchvision_index(stage, i)}"
            for key, shape in ((f"{name}.weight", (width, channels, 3, 3)), (f"{name}.bias", (width,))):
                what = "give torchvision's VGG16 (no batch norm)"
                result[key] = _take(tensors, own.get(key, key), shape, "loss.lpips", path, what)
            channels = width
    named = tensors if heads is None else read_weights(Path(heads))[0]
    where = ("loss.lpips", path) if heads is None else ("loss.lpips_heads", heads)
    for stage, widths in enumerate(STAGES):
        what = "give the heads of LPIPS 0.1 for VGG16" + (" as loss.lpips_heads=FILE" if heads is None else "")
        key, shape = f"lin{stage}.model.1.weight", (1, widths[-1], 1, 1)
        result[f"lin{stage}"] = _take(named, key, shape, *where, what)
    return result


def _take(
    tensors: Mapping[str, Tensor], key: str, shape: tuple[int, ...], setting: str, path: str, what: str
) -> Tensor:
    if key not in tensors:
        raise UserError(f"{setting}={path} has no {key}: {what}")
    if (found := shape_of(tensors, key)) != shape:
        raise UserError(f"{setting}={path}: {key} is {list(found)} and should be {list(shape)}: {what}")
    return tensors[key]
