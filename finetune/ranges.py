"""Values that no run can use, in the sections that the configs of `train` and `autoencoder` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from finetune import UserError, lr, tracking
from finetune.config import (
    CheckpointConfig,
    EmaConfig,
    OptimConfig,
    RunConfig,
    StrategyConfig,
    TrackerConfig,
    WatchConfig,
    require,
    require_bounds,
    require_choice,
    require_sizes,
)
from finetune.runs import require_checkpoint, require_own_folder

_MOST_THREADS = 1024


class Readers(Protocol):
    readers: int


class Training(Protocol):
    steps: int
    global_batch: int
    precision: str
    threads: int | None


class Shared(Protocol):
    """What the configs of both commands have; either may have more."""

    seed: int

    @property
    def run(self) -> RunConfig: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def ema(self) -> EmaConfig: ...
    @property
    def data(self) -> Readers: ...
    @property
    def strategy(self) -> StrategyConfig: ...
    @property
    def train(self) -> Training: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def tracker(self) -> TrackerConfig: ...
    @property
    def watch(self) -> WatchConfig: ...


def require_shared(config: Shared, *, precisions: Sequence[str], offloads: Sequence[str]) -> None:
    """Refuse values out of range and names that are not known.

    Args:
        precisions, offloads: what the command knows.

    Raises:
        UserError: names the key, its value and what it may be.
    """
    optim, strategy, train = config.optim, config.strategy, config.train
    require_choice(
        {
            "optim.schedule": (optim.schedule, lr.SCHEDULES),
            "strategy.kind": (strategy.kind, ("ddp", "zero")),
            "strategy.offload": (strategy.offload, offloads),
            "strategy.reduce_dtype": (strategy.reduce_dtype, ("fp32", "bf16")),
            "train.precision": (train.precision, precisions),
            "tracker.mode": (config.tracker.mode, tracking.MODES),
        }
    )
    positive = {
        "train.steps": train.steps,
        "train.global_batch": train.global_batch,
        "optim.lr": optim.lr,
        "optim.eps": optim.eps,
        "ema.halflife_images": config.ema.halflife_images,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "tracker.every": config.tracker.every,
    }
    require(positive, lambda value: value > 0, "must be greater than 0")
    require_sizes({"train.threads": train.threads, "data.readers": config.data.readers}, _MOST_THREADS)
    not_negative = {
        "optim.warmup_images": optim.warmup_images,
        "optim.weight_decay": optim.weight_decay,
        "optim.max_grad_norm": optim.max_grad_norm,
        "optim.final_lr_ratio": optim.final_lr_ratio,
        "ema.rampup_ratio": config.ema.rampup_ratio,
    }
    require(not_negative, lambda value: value >= 0, "must not be negative")
    require_betas({"optim.beta1": optim.beta1, "optim.beta2": optim.beta2})
    require_seeds({"seed": config.seed})
    require_bounds(config.watch)
    require_own_folder(config.run.dir)
    require_checkpoint(config.checkpoint.resume)
    if config.tracker.wandb:
        tracking.require_project(config.tracker.project)
    if strategy.kind == "zero" and strategy.stage not in (1, 2, 3):
        raise UserError(f"strategy.stage={strategy.stage} is not known: choose 1, 2 or 3")
    if strategy.kind == "ddp" and strategy.offload != "none":
        raise UserError(
            f"strategy.offload={strategy.offload} is ZeRO's: add strategy=zero2, or choose strategy=zero3_offload"
        )


def require_betas(betas: dict[str, float]) -> None:
    """Refuse decays of Adam's averages, by config key, that are none.

    Raises:
        UserError: names the first such key.
    """
    require(betas, lambda value: 0 <= value < 1, "must be at least 0 and below 1")


def require_seeds(seeds: dict[str, int]) -> None:
    """Refuse seeds, by config key, that do not fit 63 bits.

    Raises:
        UserError: names the first such key.
    """
    require(seeds, lambda value: 0 <= value < 2**63, "must be at least 0 and below 2^63", most=2**63)
