"""The training loop: what happens when. One clock, images seen; each step is a function of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from finetune import UserError, by_all, memory
from finetune.batch import Batch, Sample
from finetune.checkpoint import Checkpoints, Progress, require_same
from finetune.conditioning import batch_of
from finetune.config import Config
from finetune.data.loader import Data
from finetune.distributed import LONG, Control, Facts, StopRequest, Strategy, World
from finetune.ema import Average
from finetune.lr import learning_rate
from finetune.models.autoencoder import Autoencoder
from finetune.objective import LatentDiffusion
from finetune.runs import complete_checkpoints
from finetune.step import optimizer_step
from finetune.tasks import Task
from finetune.validation import draw_samples, held_out_loss


@dataclass
class Parts:
    """What the loop runs."""

    data: Data
    model: LatentDiffusion
    strategy: Strategy
    averages: list[Average]  # the first is what validation and sample grids show
    checkpoints: Checkpoints
    micro_batch: int
    accumulation: int
    scheduler: dict[str, Any]  # configuration of the sampler of sample grids
    decoder: Autoencoder | None  # on rank 0, where sample grids are decoded
    notices: list[str]
    pretrained: str | None  # the digest of the weights of a pretrained model, as they are before any step
    task: Task

    @property
    def average(self) -> Average | None:
        """The first average, where there are any."""
        return self.averages[0] if self.averages else None

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode with the first average of the weights, where there are any. Collective."""
        return self.strategy.evaluating(self.average.tensors if self.average else None)


class Listener(Protocol):
    """Who is told of a run's steps: `Tracker`, or the doctor."""

    open_losses: list[float]
    steps_not_finite: int
    steps_skipped: int

    def step(self, loss_sum: Tensor, grad_norm: Tensor, data_seconds: float) -> None: ...
    def settle(self) -> None: ...
    def log(self, step: int, lr: float) -> None: ...
    def write(self, values: dict[str, Any]) -> None: ...
    def image(self, step: int, picture: Image.Image, caption: str) -> Path | None: ...
    def say(self, line: str) -> None: ...
    def paused(self) -> AbstractContextManager[None]: ...


def at_start(parts: Parts, depends_on: dict[str, Any]) -> Progress:
    """The progress of a run that has not begun. `depends_on`: what must be as it was (see `Progress`)."""
    encoder = parts.data.encoder
    latents = {"scale": encoder.scale, "shift": encoder.shift, "encoder_sha256": encoder.sha256}
    return Progress(step=0, images_seen=0, steps_taken=0, depends_on=depends_on, latents=latents)


def resume(config: Config, world: World, parts: Parts, depends_on: dict[str, Any]) -> Progress:
    """Restore the newest whole checkpoint, or the one that `checkpoint.resume` names, or start anew.

    A run that began at the named one before goes on from its own newest checkpoint (see `followed`).

    `depends_on`: what must be as it was (see `Progress`).

    Raises:
        UserError: the run has checkpoints but was told not to resume; what it depends on has changed.
    """
    fresh = at_start(parts, depends_on)
    wanted, begun_from = config.checkpoint.resume, None
    if wanted == "auto" or wanted == "never":
        path = world.on_main(parts.checkpoints.latest)
        if wanted == "never" and path is not None:
            raise UserError(
                f"checkpoint.resume=never, but {path} is there: choose another run.dir or remove that folder; "
                "without checkpoint.resume the run goes on from it"
            )
    else:
        path, begun_from = world.on_main(lambda: parts.checkpoints.followed(wanted))
    if path is None:
        return fresh
    saved = parts.checkpoints.read(path)
    require_same(saved.depends_on, depends_on, path)
    parts.checkpoints.restore(path, parts.strategy, parts.averages)
    parts.notices.append(f"going on from {path}")
    there = world.on_main(lambda: list(complete_checkpoints(parts.checkpoints.run)))
    if later := [at for at in there if at > saved.step]:
        parts.notices.append(
            f"the checkpoints after it (step {', '.join(map(str, later))}) are removed at the next save: move away "
            "what is to be kept"
        )
    begun_from = begun_from or saved.begun_from
    return replace(saved, depends_on=depends_on, latents=fresh.latents, begun_from=begun_from)


@memory.shortage_told()
def train(
    config: Config, world: World, parts: Parts, tracker: Listener, progress: Progress, request: StopRequest
) -> int:
    """Train from `progress` to `train.steps`, or until a rank is asked to stop.

    Returns:
        The number of the signal that stopped the run, after it was saved; 0 when it is complete.
    """
    strategy, data, control = parts.strategy, parts.data, Control(world)
    global_batch, total_steps = config.train.global_batch, config.train.steps
    loader = data.loader(
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        micro_batch=parts.micro_batch,
        start_step=progress.step,
        readers=config.data.readers,
        prefetch=config.data.prefetch,
        pin=world.device.type == "cuda",
    )
    batches = iter(loader)
    step, stop = progress.step, 0
    parts.checkpoints.say = tracker.say
    parts.checkpoints.prepare(strategy, parts.averages)
    request.can_save = True

    try:
        while step < total_steps and not stop:
            world.watch.begin(step + 1)
            images_seen = (step + 1) * global_batch
            lr = learning_rate(
                images_seen,
                peak=config.optim.lr,
                schedule=config.optim.schedule,
                warmup_images=config.optim.warmup_images,
                total_images=total_steps * global_batch,
                final_ratio=config.optim.final_lr_ratio,
            )
            result = optimizer_step(
                strategy,
                parts.model.conditioner,
                batches,
                micro_batches=parts.accumulation,
                global_batch=global_batch,
                lr=lr,
                dropout=config.task.dropout,
                seed=config.seed,
                averages=parts.averages,
                images_seen=images_seen,
            )
            step += 1
            tracker.step(result.loss_sum, result.grad_norm, result.data_seconds)
            world.watch.at("agreeing with the other ranks")
            facts = control.exchange(Facts(stop=request.number, saving=parts.checkpoints.state))
            stop = facts.stop
            snapshot = _due(config, config.ema.snapshot_every, step)
            is_last = stop > 0 or step == total_steps
            save = _due(config, config.checkpoint.every, step) or snapshot or is_last
            if _due(config, config.tracker.every, step):
                tracker.log(step, lr)
            elif save:
                tracker.settle()
            with tracker.paused():
                world.watch.at("seeing to the last checkpoint", LONG)
                parts.checkpoints.advance(facts.saving)
                if not stop:
                    _look(config, world, parts, tracker, step)
                world.watch.at("saving", LONG)
                if save:
                    now = replace(progress, step=step, images_seen=images_seen)
                    _save(parts, tracker, now, is_last=is_last, snapshot=snapshot)
                if stop:  # after saving, since who asks to stop may not wait for long
                    _look(config, world, parts, tracker, step)
        world.watch.at("ending", LONG)
        parts.checkpoints.finish()
        control.last()  # nobody leaves while another still tells
        if step == total_steps and max(tracker.steps_not_finite, tracker.steps_skipped) > 0:
            _judge_end(strategy, tracker, step)
        return stop if step < total_steps else 0
    finally:
        batches.close()
        loader.close()


def _save(parts: Parts, tracker: Listener, progress: Progress, *, is_last: bool, snapshot: bool) -> None:
    """Save the run, which has come to `progress`, unless it may be lost; collective."""
    strategy = parts.strategy
    if not _is_worth_saving(strategy, tracker.steps_not_finite, is_last):
        tracker.say(f"note: nothing is saved at step {progress.step}, whose loss is not a finite number")
        return
    progress = replace(
        progress,
        steps_taken=strategy.steps_taken,
        loss_scale=strategy.scaler_state(),
        optimizer=strategy.counts(),
        open_losses=list(tracker.open_losses),  # the tracker's list grows while this is written
    )
    save = parts.checkpoints.save if is_last else parts.checkpoints.begin
    save(progress, strategy, parts.averages, snapshot=snapshot)


def _is_worth_saving(strategy: Strategy, steps_not_finite: int, is_last: bool) -> bool:
    """Whether to save after so many steps in a row without a finite loss; collective.

    Such a step moves no weights. One may be a broken sample's: all is as it was. After more the run may be lost,
    and shall not push out what was saved before, unless it can't be saved later.
    """
    return steps_not_finite == 0 or ((steps_not_finite == 1 or is_last) and strategy.is_finite())


def _judge_end(strategy: Strategy, tracker: Listener, step: int) -> None:
    """Tell of a run that ends with steps that had no finite loss, or gradients; collective.

    Raises:
        UserError: it is not saved, or not likely to be of use.
    """
    count, remedy = tracker.steps_not_finite, "lower optim.lr or use train.precision=fp32"
    if not strategy.is_finite():
        raise by_all(
            UserError(
                f"the run's end is not saved, its weights are not finite numbers at step {step}: {remedy}, and go "
                "on from the last checkpoint, if there is one"
            )
        )
    if strategy.steps_taken == 0:
        raise by_all(
            UserError(
                "the run has ended, and no step has changed a weight, since gradients were never finite numbers: "
                f"{remedy}; fp16 takes up to 20 steps to find its loss scale"
            )
        )
    if count > 1:
        raise by_all(
            UserError(
                f"the run has ended and is saved, but the loss of its last {count} steps is not a finite number: "
                f"if it draws nothing of use, {remedy}, and go on from an earlier checkpoint"
            )
        )
    if count == 1:
        tracker.say(f"note: the loss of the last step, {step}, is not a finite number; it changed nothing")


def _due(config: Config, every: int, step: int) -> bool:
    return every > 0 and (step % every == 0 or step == config.train.steps)


def _look(config: Config, world: World, parts: Parts, tracker: Listener, step: int) -> None:
    """Held-out loss and samples, where they are due; collective."""
    world.watch.at("validating", LONG)
    if _due(config, config.validation.every, step) and parts.data.held_out:
        tracker.write({"step": step, **_validate(config, parts)})
    world.watch.at("drawing samples", LONG)
    if _due(config, config.sample.every, step):
        _sample(config, world, parts, tracker, step)


def _validate(config: Config, parts: Parts) -> dict[str, float]:
    with parts.evaluating():
        return held_out_loss(
            parts.strategy,
            parts.data.held_out,
            parts.model.conditioner,
            strata=config.validation.timesteps,
            num_train_timesteps=config.model.scheduler.num_train_timesteps,
        )


def asked(config: Config, parts: Parts) -> Batch | None:
    """What sample grids are drawn of, of one size: `sample.prompts`, else up to four held-out samples' conditions.

    None where there is neither, and the task needs something.
    """
    conditioner, size = parts.model.conditioner, parts.data.largest_bucket
    if not conditioner.channels:  # the condition has no size of its own
        wanted = config.sample.height, config.sample.width
        size = size[0] if wanted[0] is None else wanted[0], size[1] if wanted[1] is None else wanted[1]
    if conditioner.asks == ("prompt",):
        prompts = config.sample.prompts
        if prompts is None:
            prompts = [caption for batch in parts.data.held_out for caption in batch.captions][:4] or [""]
        return batch_of(conditioner, [Sample({"captions": [prompt]}, size) for prompt in prompts])
    if not conditioner.asks:
        return batch_of(conditioner, [Sample({}, size)] * 4)
    for batch in parts.data.held_out:
        if batch.bucket == parts.data.largest_bucket:
            return replace(batch.take(range(min(4, len(batch)))), bucket=size)
    return None


def _sample(config: Config, world: World, parts: Parts, tracker: Listener, step: int) -> None:
    batch = asked(config, parts)
    if not world.broadcast(parts.decoder is not None) or batch is None:
        return
    with parts.evaluating():
        picture: Image.Image | None = draw_samples(
            parts.strategy,
            parts.model,
            parts.decoder,
            batch,
            seed=config.sample.seed,
            downsample=parts.data.encoder.downsample,
            scheduler=parts.scheduler,
            steps=config.sample.steps,
            guidance=config.sample.guidance,
            guidance_rescale=config.sample.guidance_rescale,
        )
    if picture is not None:
        tracker.image(step, picture, " | ".join(batch.captions))
