"""The loop of the first stage: what happens when. One clock, images seen; each step is a function of it."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from finetune import UserError, by_all, ema, rng
from finetune.autoencoder import checkpoint
from finetune.autoencoder.bottleneck import PenaltyWeights, perplexity
from finetune.autoencoder.config import Config
from finetune.autoencoder.discriminator import Adversary
from finetune.autoencoder.lpips import Lpips
from finetune.autoencoder.pictures import Pictures
from finetune.autoencoder.results import averaged, save_grid
from finetune.autoencoder.step import of_all, step_once
from finetune.autoencoder.zero import (
    ShardedAdamW,
    averaged_weights,
    spread,
    whole_average,
    whole_moments,
    whole_weights,
)
from finetune.data.order import Order
from finetune.distributed import LONG, Control, Facts, StopRequest, World
from finetune.lr import learning_rate
from finetune.models.autoencoder import FirstStage, downsample_factor, latent_channels, to_signed
from finetune.tracking import Tracker


@dataclass(frozen=True)
class Parts:
    """What the loop runs.

    `average`: of the weights, by name. `begun_from`: as in `Progress`. `passed_over`: broken checkpoints (rank 0).
    """

    pictures: Pictures
    order: Order
    vae: FirstStage
    average: dict[str, Tensor] | None
    optimizer: torch.optim.Optimizer
    lpips: Lpips | None
    adversary: Adversary | None
    begun_from: str | None = None
    passed_over: set[Path] = field(default_factory=set)


def train(
    config: Config,
    parts: Parts,
    tracker: Tracker,
    request: StopRequest,
    *,
    step: int,
    depends_on: Mapping[str, Any],
) -> int:
    """Train from `step` to `train.steps`, or until a rank is asked to stop; what has been trained is saved.

    Returns:
        The number of the signal that asked to stop; 0 for none.
    """
    world, steps, watch = tracker.world, config.train.steps, tracker.world.watch
    control, stop = Control(world), 0
    if step < steps:
        with tracker.paused():
            _fill_cache(parts.pictures, world)
    parts.vae.train()
    request.can_save = True
    optimizers = [parts.optimizer] + ([] if parts.adversary is None else [parts.adversary.optimizer])
    batches = _batches(parts, step, steps, config.train.global_batch, world)
    with closing(batches), spread(optimizers, parts.average):
        while step < steps and not stop:
            watch.begin(step + 1)
            watch.at("waiting for data", 1)
            pixels_BHW3 = next(batches)
            watch.at("in forward, backward and the optimizer")
            values, lr = _step(config, parts, pixels_BHW3, step, world)
            step += 1
            tracker.advance()
            watch.at("agreeing with the other ranks")
            stop = control.exchange(Facts(stop=request.number)).stop
            is_due = step % config.checkpoint.every == 0 or step == steps
            is_told = step % config.tracker.every == 0 or is_due  # not where a run happens to be stopped
            if is_told or stop:
                scalars = _scalars(config, of_all(values, world), step)
            if is_told:
                rate = tracker.rate()
                seen = step * config.train.global_batch
                tracker.write({"step": step, "images_seen": seen, **scalars, "lr": lr, "images_per_s": rate})
                tracker.show(scalars["loss"], rate)
            with tracker.paused():
                watch.at("saving", LONG)
                if is_due or stop:
                    _save(config, parts, tracker, step, depends_on, is_last=stop > 0 or step == steps)
                watch.at("drawing reconstructions", LONG)
                if config.sample.every and step % config.sample.every == 0 and step < steps:
                    _draw(config, parts, tracker, step)
        watch.at("ending", LONG)
        return max(stop, control.last().stop)  # nobody leaves while another still tells


def _fill_cache(pictures: Pictures, world: World) -> None:
    silent = not (pictures.cached and world.is_main)
    with tqdm(total=len(pictures), desc="reading", unit="img", disable=silent) as bar:

        def one_more() -> None:
            world.watch.at("reading pictures")
            bar.update()

        pictures.fill_cache(one_more)


def _step(
    config: Config, parts: Parts, pixels_BHW3: np.ndarray, step: int, world: World
) -> tuple[dict[str, Tensor], float]:
    """One step on this process's share of a batch: what `step_once` returns, and the learning rate.

    Args:
        step: how many were made before.
    """
    vae, batch, device = parts.vae, config.train.global_batch, world.device
    seen = step * batch  # images before this step: the clock of its draws
    begin, end = _share(batch, world)
    ids_B = torch.arange(seen + begin, seen + end, device=device)
    image = to_signed(pixels_BHW3, device)
    if config.data.flip:
        mirrored = rng.integers(config.seed, "mirror", ids_B, 2).bool().view(-1, 1, 1, 1)
        image = torch.where(mirrored, image.flip(3), image)
    eps = None
    if isinstance(vae, AutoencoderKL):
        height, width = (side // downsample_factor(vae) for side in image.shape[2:])
        eps = rng.normal(config.seed, "posterior", ids_B, (latent_channels(vae), height, width))
    step, seen = step + 1, seen + batch
    lr = learning_rate(
        seen,
        peak=config.optim.lr,
        schedule=config.optim.schedule,
        warmup_images=config.optim.warmup_images,
        total_images=config.train.steps * batch,
        final_ratio=config.optim.final_lr_ratio,
    )
    for group in parts.optimizer.param_groups:
        group["lr"] = lr
    judging = _judging(config, parts, step)
    if judging is not None:
        for group in judging.optimizer.param_groups:
            group["lr"] = lr * (config.loss.discriminator_lr or config.optim.lr) / config.optim.lr
    values = step_once(
        vae,
        parts.optimizer,
        image.contiguous(memory_format=torch.channels_last) if config.train.channels_last else image,
        eps,
        penalty=PenaltyWeights(config.loss.kl_weight, config.loss.codebook_weight, config.loss.commitment),
        max_grad_norm=config.optim.max_grad_norm,
        bf16=config.train.precision == "bf16",
        lpips=parts.lpips,
        lpips_weight=config.loss.lpips_weight,
        adversary=judging,
        world=world,
    )
    if parts.average is not None:
        keep = ema.decay(seen, batch, config.ema.halflife_images, config.ema.rampup_ratio)
        weights = averaged_weights(parts.optimizer, vae, list(parts.average))
        ema.update_(list(parts.average.values()), weights, keep)
    return values, lr


def _judging(config: Config, parts: Parts, step: int) -> Adversary | None:
    """The discriminator, when it has a part in `step`, counted from 1."""
    return parts.adversary if step > config.loss.discriminator_start else None


def _scalars(config: Config, values: dict[str, Tensor], step: int) -> dict[str, float]:
    """The values of the global batch as numbers; waits for the device.

    Raises:
        UserError, on every rank: one of them is not finite.
    """
    uses_K = values.pop("uses_K", None)
    scalars = {name: value.item() for name, value in values.items()}
    if not math.isfinite(sum(scalars.values())):
        raise by_all(
            UserError(
                f"the loss is not finite at step {step}; lower optim.lr={config.optim.lr} or set "
                "train.precision=fp32, and start again from the last checkpoint"
            )
        )
    return scalars if uses_K is None else {**scalars, "perplexity": perplexity(uses_K)}


def _save(
    config: Config, parts: Parts, tracker: Tracker, step: int, depends_on: Mapping[str, Any], *, is_last: bool
) -> None:
    """Save; collective. What can't be saved is told, and training goes on; the last time it is tried once more.

    Raises:
        UserError, on every rank: the last save has failed.
    """
    try:
        _save_once(config, parts, tracker, step, depends_on)
    except checkpoint.SaveError as error:
        tracker.say(f"warning: {error}")
        if not is_last:
            return
        try:
            _save_once(config, parts, tracker, step, depends_on)
        except checkpoint.SaveError as again:
            raise by_all(UserError(f"{again}: make room and start the same command again")) from None


def _save_once(config: Config, parts: Parts, tracker: Tracker, step: int, depends_on: Mapping[str, Any]) -> None:
    judging = _judging(config, parts, step)
    of_judge = None
    if judging is not None:
        of_judge = checkpoint.Trained(
            whole_weights(judging.optimizer, judging.model), whole_moments(judging.optimizer, judging.model)
        )
    tracker.world.on_main(
        functools.partial(
            checkpoint.save,
            tracker.run,
            parts.vae,
            checkpoint.Trained(
                whole_weights(parts.optimizer, parts.vae), whole_moments(parts.optimizer, parts.vae)
            ),
            None if parts.average is None else whole_average(parts.optimizer, parts.average),
            of_judge,
            step=step,
            images_seen=step * config.train.global_batch,
            depends_on=depends_on,
            begun_from=parts.begun_from,
            keep=config.checkpoint.keep,
            passed_over=parts.passed_over,
        )
    )


def _draw(config: Config, parts: Parts, tracker: Tracker, step: int) -> None:
    """Save a grid of reconstructions, by rank 0, of the averaged weights where there are any."""
    average = None if parts.average is None else whole_average(parts.optimizer, parts.average)
    sharded = isinstance(parts.optimizer, ShardedAdamW)
    with parts.optimizer.whole() if sharded else contextlib.nullcontext():  # type: ignore[attr-defined]
        if tracker.world.is_main:
            with averaged(parts.vae, average):
                save_grid(config, parts.pictures, parts.vae, step, tracker)


def _share(batch: int, world: World) -> tuple[int, int]:
    """The pictures of a batch that are this process's: from the first up to the second."""
    return world.rank * batch // world.size, (world.rank + 1) * batch // world.size


def _batches(parts: Parts, first: int, last: int, batch: int, world: World) -> Generator[np.ndarray]:
    """uint8 [B, H, W, 3]: this process's share of the batch of each of the steps first..last-1.

    The next batch is read while one is trained on.
    """
    pictures = parts.pictures

    def read(step: int) -> np.ndarray:
        rows = parts.order.batch(step, *_share(batch, world))
        return pictures.read(rows.bucket, pictures.train_ids[rows.bucket][rows.rows])

    with ThreadPoolExecutor(1, thread_name_prefix="batch") as ahead:
        waiting: Future[np.ndarray] | None = ahead.submit(read, first) if first < last else None
        for step in range(first, last):
            assert waiting is not None
            ready = waiting.result()
            waiting = ahead.submit(read, step + 1) if step + 1 < last else None
            yield ready
