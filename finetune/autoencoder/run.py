"""A first-stage run: what it is made of, where it goes on from, and what it leaves behind.

A run is a pure function of (config, clock): data order, mirroring and posterior noise are drawn by images seen, so
the same command after a kill goes on as if nothing had happened, and on however many processes: torchrun's, say.
Each takes its share of every batch, and keeps all of the model and its optimizer or, by `strategy=`, a share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor

from finetune import UserError, by_all, distributed
from finetune.autoencoder import checkpoint, loop
from finetune.autoencoder.build import (
    build,
    build_adversary,
    build_features,
    build_lpips,
    build_optimizer,
    keep_latents,
    load_given,
    require_room,
)
from finetune.autoencoder.config import Config, require_penalty
from finetune.autoencoder.features import FeatureNetwork
from finetune.autoencoder.pictures import Pictures
from finetune.autoencoder.results import begin_codebook, finish
from finetune.checkpoint import held_folder, require_same
from finetune.data.order import Order, Source
from finetune.data.shards import write_atomic
from finetune.distributed import StopRequest, World
from finetune.models.autoencoder import FirstStage, downsample_factor
from finetune.runs import leaves, steps_in
from finetune.tracking import Tracker, wandb_mode

# What a run may change when it goes on: none of these moves a weight that is already trained.
MAY_CHANGE = ("run", "checkpoint", "sample", "strategy", "tracker", "watch", "scale", "eval")
# Pictures and weights are known by their checksums, not by where they lie.
MAY_CHANGE_KEYS = (
    *("train.steps", "train.threads", "train.device", "data.cache_gib", "data.readers", "data.shards"),
    *("model.pretrained", "loss.lpips", "loss.lpips_heads"),
)


def train(config: Config, settings: Mapping[str, Any], yaml: str, request: StopRequest) -> int:
    """Join the other processes, if there are any, and train together, from the last checkpoint if there is one.

    Args:
        settings: the config as nested plain values; checkpoints keep what the run depends on.
        yaml: the same as text, for RUN/config.yaml.

    Returns:
        The exit code.

    Raises:
        UserError: what is asked for is missing, broken or does not fit together.
    """
    bounds = distributed.Bounds(config.watch.lost_s, config.watch.stalled_s, config.watch.start_s)
    when_full = (
        "lower train.global_batch or data.size, share the batch among more processes, or set train.precision=bf16"
    )
    with distributed.joined(config.train.device, bounds, uses_deepspeed=False, when_full=when_full) as world:
        if config.train.global_batch % world.size:
            raise by_all(
                UserError(
                    f"train.global_batch={config.train.global_batch} cannot be shared equally by {world.size} "
                    "processes; give a multiple"
                )
            )
        stop = _train(config, settings, yaml, world, request)
    return request.exit_code(stop) if stop else 0


def _train(config: Config, settings: Mapping[str, Any], yaml: str, world: World, request: StopRequest) -> int:
    """Read model and pictures, and train in the run's folder.

    Returns:
        The number of the signal that stopped the run, after it was saved; 0 when it is complete.
    """
    world.watch.at("building the model")
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    vae, pretrained_sha256 = _first_stage(config)
    pictures = Pictures(
        config.data.shards,
        size=config.data.size,
        held_out=config.data.held_out,
        seed=config.seed,
        multiple=downsample_factor(vae),
        cache_bytes=int(config.data.cache_gib * 2**30),
        readers=config.data.readers,
    )
    with closing(pictures):
        world.require_same(
            pictures.sha256,
            f"the processes read different data: {config.data.shards} is another set on a machine, or an older "
            "copy; make them the same (compare manifest.json)",
        )
        require_room(config, min(map(min, pictures.buckets)))
        of_main: list[FeatureNetwork | None] = []  # what is measured is measured by rank 0
        world.on_main(lambda: of_main.append(build_features(config, pictures, world.device)))
        with held_folder(world, Path(config.run.dir)):
            parts, lpips_sha256 = _parts(config, world, vae, pictures)
            depends_on = _depends_on(settings) | {
                "data.shards (manifest's sha256)": pictures.sha256,
                "loss.lpips (weights' sha256)": lpips_sha256,
                "model.pretrained (weights' sha256)": pretrained_sha256,
            }
            world.watch.at("restoring the last checkpoint")
            parts, step = _restored(config, world, parts, depends_on)
            _begin(config, world, parts, yaml, step)
            tracker = _tracker(config, world, settings, step)
            _introduce(config, parts, tracker)
            network = of_main[0] if of_main else None
            return _train_on(config, parts, network, tracker, request, step=step, depends_on=depends_on)


def _train_on(
    config: Config,
    parts: loop.Parts,
    network: FeatureNetwork | None,
    tracker: Tracker,
    request: StopRequest,
    *,
    step: int,
    depends_on: Mapping[str, Any],
) -> int:
    """Train from `step` on, and at the end measure and make RUN/vae; returns as `_train` does."""
    world = tracker.world
    with tracker.closing():
        stop = loop.train(config, parts, tracker, request, step=step, depends_on=depends_on)
        request.can_save = False  # all is saved, and what is left can be done again
        stop = stop or request.number
        tracker.goes_on = stop > 0
        world.watch.leave()  # the others need not wait for what rank 0 measures
        distributed.stop()
        if world.is_main and not stop:
            finish(config, parts.pictures, parts.vae, parts.average, network, tracker)
    if world.is_main and stop:
        print(f"run: {tracker.run}, stopped: the same command goes on")
    return stop


def _first_stage(config: Config) -> tuple[Any, str | None]:
    """The autoencoder to train, and the sha256 of its weights where they are given."""
    if config.model.pretrained is None:
        vae, sha256 = build(config.model, config.seed), None
    else:
        vae, sha256 = load_given(config.model)
    require_penalty(config.loss, isinstance(vae, VQModel), f"the {type(vae).__name__} that is trained")
    if config.train.decoder_only:
        keep_latents(vae)
    return vae, sha256


def _parts(config: Config, world: World, vae: FirstStage, pictures: Pictures) -> tuple[loop.Parts, str | None]:
    """What the loop runs, as it is before any step, and the sha256 of LPIPS's weights."""
    order = Order([Source(pictures.shard_sizes)], seed=config.seed, global_batch=config.train.global_batch)
    vae = vae.to(world.device)
    if config.train.channels_last:
        vae = vae.to(memory_format=torch.channels_last)
    if config.model.pretrained is None:
        vae.register_to_config(sample_size=max(pictures.buckets[0]))
    average = {n: p.detach().clone() for n, p in vae.named_parameters()} if config.ema.enabled else None
    betas = config.optim.beta1, config.optim.beta2
    optimizer = build_optimizer(config, vae, world, lr=config.optim.lr, betas=betas)
    say: Callable[[str], None] = print if world.is_main else lambda line: None
    lpips, lpips_sha256 = build_lpips(config, world.device, say)
    adversary = build_adversary(config, world)
    return loop.Parts(pictures, order, vae, average, optimizer, lpips, adversary), lpips_sha256


def _restored(
    config: Config, world: World, parts: loop.Parts, depends_on: Mapping[str, Any]
) -> tuple[loop.Parts, int]:
    """The parts as the checkpoint has them that the run goes on from, and its step; 0 where there is none.

    Raises:
        UserError: see `_found`; what the run depends on has changed, or it is longer than it shall be.
    """
    step = 0
    if (found := _found(config, world, parts.passed_over)) is not None:
        folder, record = found
        require_same(record["depends_on"], depends_on, folder)
        step = int(record["step"])
        parts = replace(parts, begun_from=record.get("begun_from"))
        judged = step - config.loss.discriminator_start
        checkpoint.restore(folder, step, parts.vae, parts.average, parts.optimizer, parts.adversary, judged)
        if world.is_main:
            print(f"resuming from {folder}")
    run, steps = Path(config.run.dir), config.train.steps
    if step > steps:
        raise UserError(f"{run} is at step {step}, beyond train.steps={steps}; choose another run.dir")
    return parts, step


def _found(config: Config, world: World, passed_over: set[Path]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, and its record; collective. Broken ones are added to `passed_over`.

    Raises:
        UserError: the named one is not whole; or there are some, and none shall be taken.
    """
    run, wanted = Path(config.run.dir), config.checkpoint.resume
    if wanted == "auto":
        return world.on_main(lambda: checkpoint.latest(run, passed_over))
    if wanted != "never":
        return world.on_main(lambda: checkpoint.named(run, wanted, passed_over))
    if steps_in(run / "checkpoints"):
        raise UserError(f"{run} holds another run and checkpoint.resume=never; choose another run.dir")
    return None


def _begin(config: Config, world: World, parts: loop.Parts, yaml: str, step: int) -> None:
    """Make the run's folder ready, and a codebook that is to begin with the first step; collective."""
    run = Path(config.run.dir)
    if world.is_main:
        (run / "checkpoints").mkdir(exist_ok=True)
    if step == 0 and isinstance(parts.vae, VQModel) and config.model.pretrained is None:
        world.watch.at("beginning the codebook", distributed.LONG)
        _begin_codebook(config, world, parts.pictures, parts.vae, parts.average)
    if world.is_main:
        write_atomic(run / "config.yaml", yaml.encode())
        _forget_measures(run / "metrics.jsonl")


def _begin_codebook(
    config: Config, world: World, pictures: Pictures, vae: Any, average: Mapping[str, Tensor] | None
) -> None:
    """Entries where rank 0's latents are, for all ranks; collective."""
    if world.is_main:
        begin_codebook(config, pictures, vae, world.device)
    codebook = vae.quantize.embedding.weight
    codebook.data.copy_(world.broadcast(codebook.detach().cpu()))
    if average is not None:
        average["quantize.embedding.weight"].copy_(codebook.detach())


def _forget_measures(path: Path) -> None:
    """Drop what was measured when the run had come to its end before: it will be measured again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_atomic(path, "".join(line for line in lines if '"loss": ' in line).encode())


def _depends_on(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the trained weights depend on, flat, by config key."""
    flat = leaves({key: value for key, value in settings.items() if key not in MAY_CHANGE})
    return {key: value for key, value in flat if key not in MAY_CHANGE_KEYS}


def _tracker(config: Config, world: World, settings: Mapping[str, Any], step: int) -> Tracker:
    return Tracker(
        Path(config.run.dir),
        world,
        config=dict(settings),
        name=config.run.name,
        project=config.tracker.project,
        wandb_mode=wandb_mode(config.tracker.mode) if config.tracker.wandb else None,
        first_step=step,
        total_steps=config.train.steps,
        global_batch=config.train.global_batch,
    )


def _introduce(config: Config, parts: loop.Parts, tracker: Tracker) -> None:
    """Say what is trained, and on what."""
    world, pictures = tracker.world, parts.pictures
    processes = f", {world.size} processes" if world.size > 1 else ""
    tracker.say(
        f"{len(pictures)} pictures, {sum(map(len, pictures.held_out_ids))} held out; autoencoder of "
        f"{sum(p.numel() for p in parts.vae.parameters()) / 1e6:.2f} M parameters on {world.device.type}{processes}"
        + (", of which the decoder is trained" if config.train.decoder_only else "")
    )
    if said := pictures.never_trained(parts.order):
        tracker.say(said)
