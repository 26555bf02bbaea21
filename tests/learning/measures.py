"""Measures of drawn pictures: what a classifier of real ones says, where things lie, how sets differ."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.learning.drawn import nearest, things

_FEW = 6  # pixels: fewer of a colour are no thing


class Classifier(nn.Module):
    """Three convolutions and what they see anywhere in the picture: which shape a scene of one shape shows."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, classes)

    def forward(self, pictures_B3HW: Tensor) -> Tensor:
        made = self.body(pictures_B3HW)  # what is there on the whole, and where it is strongest
        return self.head(torch.cat([made.mean(dim=(2, 3)), made.amax(dim=(2, 3))], dim=1))


def trained_classifier(pictures: np.ndarray, labels: np.ndarray, *, steps: int = 300) -> Classifier:
    """A classifier of real pictures [B, H, W, 3] in [0, 1], trained under noise and blur, which drawn ones have."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(int(labels.max()) + 1).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
        x_B3HW, y_B = tensor(pictures), torch.from_numpy(labels)
        for step in range(steps):
            rows = torch.randint(len(x_B3HW), (64,))
            some = x_B3HW[rows]
            if step % 2:
                some = F.avg_pool2d(F.pad(some, (1, 1, 1, 1), "replicate"), 3, stride=1)
            loss = F.cross_entropy(model(some + 0.1 * torch.randn_like(some)), y_B[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def classified(model: Classifier, pictures: np.ndarray) -> np.ndarray:
    """The label that is likeliest for each picture."""
    return model(tensor(pictures)).argmax(1).numpy()


def thumbnails(pictures: np.ndarray, side: int = 8) -> np.ndarray:
    """Float64 [B, side * side * 3] of [B, H, W, 3]: colours, where they lie, and what goes together."""
    return F.adaptive_avg_pool2d(tensor(pictures).double(), side).flatten(1).numpy()


def tensor(pictures: np.ndarray) -> Tensor:
    """Float32 [B, 3, H, W] in [-1, 1] of [B, H, W, 3] in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() * 2 - 1


Quarters = dict[int, tuple[float, float, float, float]]
"""(left, top, right, bottom) as fractions of the picture, by the quarter that a box lies in: a scene has at most
one in each."""


def asked_boxes(boxes: list[list[float]]) -> Quarters:
    return {int(x0 + x1 >= 1) + 2 * int(y0 + y1 >= 1): (x0, y0, x1, y1) for _, x0, y0, x1, y1 in boxes}


def drawn_boxes(picture: np.ndarray) -> Quarters:
    """Around what is drawn in each quarter; without those where nothing is."""
    found = things(picture[None])[0]
    size = len(found)
    half = size // 2
    boxes: Quarters = {}
    for quarter in range(4):
        left, top = half * (quarter % 2), half * (quarter // 2)
        inside = found[top : top + half, left : left + half]
        if inside.sum() >= _FEW:
            y, x = np.nonzero(inside)
            edges = (left + x.min(), top + y.min(), left + x.max() + 1, top + y.max() + 1)
            boxes[quarter] = tuple(float(edge) / size for edge in edges)  # type: ignore[assignment]
    return boxes


def box_iou(some: Quarters, others: Quarters) -> float:
    """Intersection over union of boxes, the mean over the quarters where either has one; 0 where one has none."""
    each = []
    for quarter in some.keys() | others.keys():
        if quarter in some and quarter in others:
            (a0, b0, a1, b1), (c0, d0, c1, d1) = some[quarter], others[quarter]
            both = max(0.0, min(a1, c1) - max(a0, c0)) * max(0.0, min(b1, d1) - max(b0, d0))
            each.append(both / ((a1 - a0) * (b1 - b0) + (c1 - c0) * (d1 - d0) - both))
        else:
            each.append(0.0)
    return float(np.mean(each))


def box_colours(picture: np.ndarray, boxes: list[list[float]]) -> float:
    """Share of boxes [class, x0, y0, x1, y1] whose middle is mostly of the colour that is their class."""
    colours, size = nearest(picture[None])[0], len(picture)

    def middle(low: float, high: float) -> slice:
        """The pixels of an edge without a quarter at either end."""
        quarter = (high - low) / 4
        return slice(round((low + quarter) * size), round((high - quarter) * size))

    right = [
        np.bincount(colours[middle(y0, y1), middle(x0, x1)].ravel()).argmax() == label
        for label, x0, y0, x1, y1 in boxes
    ]
    return float(np.mean(right))
