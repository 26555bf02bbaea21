"""A small classifier of pictures: trained on real ones, it judges drawn ones.

It sees colours, shapes and texture at 64 pixels or so, and is trained on moved, scaled, softened and noisy copies,
so that what an autoencoder does to a picture decides little.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from finetune import UserError, first_line
from finetune.models.autoencoder import to_signed
from finetune.models.weight_files import write_weights

_LEAST_SCALE, _MOST_SCALE, _SHIFT = 0.8, 1.1, 0.12  # the shift as a share of the picture
_NOISE = 0.06  # of pixels in [-1, 1]


class Judge(nn.Module):
    """Three-channel pictures -> one logit for each class.

    Args:
        classes: their names, in the order of the logits.
        width: channels of the first layer; later ones have two and four times as many.
        places: side of the grid that features are averaged over: 1 forgets where things are, 4 keeps shapes.
    """

    def __init__(self, classes: Sequence[str], *, width: int = 16, places: int = 1) -> None:
        super().__init__()
        self.classes, self.width, self.places = list(classes), width, places

        def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            return [convolution, nn.GroupNorm(outputs // 8, outputs), nn.SiLU()]

        self.features = nn.Sequential(
            *block(3, width, 2),
            *block(width, 2 * width, 2),
            *block(2 * width, 4 * width, 2),
            *block(4 * width, 4 * width, 1),
            nn.AdaptiveAvgPool2d(places),
            nn.Flatten(),
        )
        self.head = nn.Linear(4 * width * places**2, len(self.classes))

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] -> logits [B, classes]."""
        return self.head(self.features(image_B3HW))

    @torch.no_grad()
    def logits(self, pixels_BHW3: np.ndarray, batch: int = 256) -> Tensor:
        """Pictures, uint8 [B, H, W, 3] -> logits [B, classes], float32 on the CPU."""
        self.eval()
        device = self.head.weight.device
        parts = [pixels_BHW3[start : start + batch] for start in range(0, len(pixels_BHW3), batch)]
        return torch.cat([self(to_signed(part, device)).float().cpu() for part in parts])

    def save(self, path: Path) -> None:
        """Write weights in float16, and classes and shape beside them, into one safetensors file."""
        shape = {"classes": self.classes, "width": self.width, "places": self.places}
        write_weights(
            path, {n: weight.half() for n, weight in self.state_dict().items()}, {"judge": json.dumps(shape)}
        )

    @classmethod
    def load(cls, path: Path) -> Judge:
        """Read what `save` wrote.

        Raises:
            UserError: there is no such file, or it is no judge.
        """
        try:
            with safe_open(path, "pt") as file:
                shape = json.loads((file.metadata() or {})["judge"])
                judge = cls(shape["classes"], width=shape["width"], places=shape["places"])
                judge.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} is no judge of pictures: {first_line(error)}") from None
        return judge.eval()


def train_judge(
    judge: Judge,
    pixels_NHW3: np.ndarray,
    labels_N: Sequence[int],
    *,
    epochs: int,
    seed: int,
    lr: float = 3e-3,
    batch: int = 64,
    progress: Callable[[], object] = lambda: None,
) -> Judge:
    """Train on real pictures (uint8) and the indices of their classes; `progress` is called after each step.

    AdamW under a cosine, cross-entropy with labels smoothed by 0.1. Runs on the judge's device.
    """
    device = judge.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    labels = torch.as_tensor(labels_N)
    steps = epochs * math.ceil(len(labels) / batch)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    judge.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(batch):
            image = varied(to_signed(pixels_NHW3[chosen.numpy()], device), generator)
            loss = F.cross_entropy(judge(image), labels[chosen].to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress()
    return judge.eval()


def varied(image_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    """Copies of pictures in [-1, 1], each scaled, moved, and in one of two cases noisy; draws on the CPU."""
    count, device = len(image_B3HW), image_B3HW.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    scale = 1 / uniform(_LEAST_SCALE, _MOST_SCALE)
    moves = torch.zeros(count, 2, 3)
    moves[:, 0, 0] = moves[:, 1, 1] = scale
    moves[:, 0, 2], moves[:, 1, 2] = 2 * uniform(-_SHIFT, _SHIFT), 2 * uniform(-_SHIFT, _SHIFT)
    grid = F.affine_grid(moves.to(device), list(image_B3HW.shape), align_corners=False)
    # Bilinear at places between pixels: softens as well. The border goes on outwards: grounds stay one colour.
    moved = F.grid_sample(image_B3HW, grid, padding_mode="border", align_corners=False)
    noise = torch.randn(image_B3HW.shape, generator=generator) * _NOISE
    noisy = (torch.rand(count, 1, 1, 1, generator=generator) < 0.5).float()
    return moved + (noise * noisy).to(device)


def top(logits_NK: Tensor, labels_N: Sequence[int], k: int = 1) -> float:
    """Share of pictures whose class is among the `k` likeliest."""
    best = logits_NK.topk(min(k, logits_NK.shape[1]), dim=1).indices
    return float((best == torch.as_tensor(labels_N)[:, None]).any(dim=1).float().mean())
