"""The learning rate as a pure function of images seen."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "cosine")


def learning_rate(
    images_seen: int,
    *,
    peak: float,
    schedule: str,
    warmup_images: int,
    total_images: int,
    final_ratio: float = 0.0,
) -> float:
    """Learning rate of the optimizer step that brings the run to `images_seen`.

    A linear warm-up reaches `peak` at `warmup_images`; then it stays (`constant`) or follows half a cosine to
    `peak * final_ratio` at `total_images` (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5, one period).
    """
    if images_seen < warmup_images:
        return peak * images_seen / warmup_images
    if schedule == "constant":
        return peak
    assert schedule == "cosine", schedule
    progress = min(1.0, (images_seen - warmup_images) / max(1, total_images - warmup_images))
    return peak * (final_ratio + (1.0 - final_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))
