"""What the checks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from finetune.config import Config
from finetune.distributed import World
from finetune.doctor.board import Board, Outcome
from finetune.doctor.table import FAIL, SKIPPED, Row
from finetune.loop import Parts
from finetune.terminal import ranks_text

LIMITS_S = {
    "hosts": 60.0,
    "folder": 120.0,
    "network": 120.0,
    "data": 300.0,
    "build": 1200.0,  # a large model from a slow disk
    "steps": 600.0,  # a micro-batch; the first one may compile kernels
    "save": 1200.0,
    "weights": 300.0,
}
"""Bounds on a phase's seconds, by kind: far above what healthy ones take."""


@dataclass
class Context:
    """One examination.

    Attributes:
        run: the run's folder, as configured; scratch: where the doctor writes, seen by all ranks, or None.
        world: None when the ranks could not be joined.
        parts: what a run is made of, None until and unless it could be built.
        is_full: a device's or machine's memory did not do for the steps.
        step_seconds: of each step made so far, on this rank.
        peak_bytes, reserved_bytes: on this rank's GPU while steps were made, of tensors and with torch's reserve.
        checkpoint_bytes, snapshot_bytes: what a checkpoint, and the averages that are kept of it, take on the disk.
        apart: config keys whose values differ among the ranks.
    """

    config: Config
    composed: DictConfig
    board: Board
    rank: int
    size: int
    run: Path
    scratch: Path | None = None
    world: World | None = None
    parts: Parts | None = None
    is_full: bool = False
    step_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    reserved_bytes: int = 0
    checkpoint_bytes: int = 0
    snapshot_bytes: int = 0
    apart: list[str] = field(default_factory=list)

    def exchange(
        self, kind: str, name: str, function: Callable[[], Any], *, collective: bool = False
    ) -> list[Outcome]:
        """`Board.exchange` within the bound of `kind`."""
        times = self.parts.accumulation if kind == "steps" and self.parts is not None else 1
        return self.board.exchange(name, function, limit_s=LIMITS_S[kind] * times, collective=collective)

    def joined(self) -> World:
        assert self.world is not None
        return self.world

    def named(self, ranks: Sequence[int]) -> str:
        """Ranks with their hosts, where there are several."""
        if len(set(self.board.hosts)) == 1 or len(ranks) > 4:
            return ranks_text(ranks)
        return ", ".join(f"rank {rank} on {self.board.hosts[rank]}" for rank in ranks)

    def failures(self, name: str, outcomes: Sequence[Outcome], remedy: str) -> list[Row]:
        """A FAIL row with each error and the ranks that had it; none where all went well."""
        errors: dict[str, list[int]] = {}
        for rank, outcome in enumerate(outcomes):
            if outcome.error is not None:
                errors.setdefault(outcome.error, []).append(rank)
        if not errors:
            return []
        said = [
            error if len(ranks) == self.size else f"{self.named(ranks)}: {error}" for error, ranks in errors.items()
        ]
        return [Row(name, FAIL, "; ".join(said[:4]), remedy)]


def settle(world: World) -> None:
    """Wait for the device, so that clocks tell what was done and errors come where they belong."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def skipped(names: Sequence[str], why: str) -> list[Row]:
    return [Row(name, SKIPPED, why) for name in names]


def odd_ones(values: Sequence[Any]) -> dict[Any, list[int]]:
    """Ranks by value, where these differ: the most common value first (of equals, rank 0's)."""
    ranks: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return dict(sorted(ranks.items(), key=lambda item: -len(item[1])))
