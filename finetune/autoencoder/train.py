"""`finetune autoencoder`: train the first stage on image shards.

A run is a pure function of (config, clock): data order, mirroring and posterior noise are drawn by images seen, so
the same command after a kill goes on as if nothing had happened, and on however many processes: torchrun's, say.
Each takes its share of every batch and keeps all of model and optimizer, as data parallelism does: models of this
size need no sharding.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import UserError, by_all

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from finetune.autoencoder.config import Config
    from finetune.autoencoder.discriminator import Adversary
    from finetune.autoencoder.features import FeatureNetwork
    from finetune.autoencoder.lpips import Lpips
    from finetune.autoencoder.pictures import Pictures
    from finetune.data.order import Order
    from finetune.distributed import World
    from finetune.models.autoencoder import FirstStage
    from finetune.tracking import Tracker

# What a run may change when it goes on: none of these moves a weight that is already trained.
MAY_CHANGE = ("run", "checkpoint", "sample", "tracker", "scale", "eval")
# Pictures and weights are known by their checksums, not by where they lie.
MAY_CHANGE_KEYS = (
    *("train.steps", "train.threads", "train.device", "data.cache_gib", "data.readers", "data.shards"),
    *("model.pretrained", "loss.lpips", "loss.lpips_heads"),
)

USAGE = """\
usage: finetune autoencoder [KEY=VALUE ...]

Train an autoencoder (the first stage) on image shards; the result is RUN/vae, in the diffusers layout.
The same command goes on where an earlier one stopped.

examples:
  data-tools ingest folder pictures/ --out shards/
  finetune autoencoder data.shards=shards run.dir=runs/vae
  finetune autoencoder data.shards=shards run.dir=runs/vae model=kl_f4 data.size=256 train.steps=50000
  finetune autoencoder data.shards=shards run.dir=runs/vq model=vq_f4 data.size=256
  finetune autoencoder data.shards=shards loss.discriminator_weight=0.5 loss.discriminator_start=5000
  finetune autoencoder data.shards=shards model.pretrained=runs/vae/vae train.decoder_only=true run.dir=runs/decoder
  torchrun --nproc-per-node 8 -m finetune autoencoder data.shards=shards train.global_batch=64 run.dir=runs/vae
  finetune autoencoder experiment=emoji data.shards=data_tools/emoji/fluent-emoji run.dir=runs/emoji-vae
"""


def main(argv: Sequence[str]) -> int:
    """Run the command with Hydra overrides; returns the exit code.

    Raises:
        UserError: a mistake in the overrides, the shards or the run folder.
    """
    from finetune.autoencoder import config as schema
    from finetune.config import describe
    from finetune.terminal import speak_in_turn

    if any(argument in ("-h", "--help") for argument in argv):
        print(f"{USAGE}\n{describe(schema.NAME, schema.Config, schema.FOLDER)}")
        return 0
    if options := [argument for argument in argv if argument.startswith("-")]:
        raise UserError(f"unknown option {options[0]}: settings are given as KEY=VALUE, without dashes")
    if wanted := [argument for argument in argv if argument.startswith("strategy=")]:
        raise UserError(
            f"{wanted[0]}: models of this size are trained by data parallelism alone, which torchrun starts; "
            "leave it out"
        )
    return speak_in_turn(lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    from omegaconf import OmegaConf

    from finetune.autoencoder import config as schema
    from finetune.terminal import quiet_libraries

    config, composed = schema.load(argv)
    quiet_libraries()
    settings = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(settings, dict)
    train(config, {str(key): value for key, value in settings.items()}, OmegaConf.to_yaml(composed))
    return 0


def train(config: Config, settings: Mapping[str, Any], yaml: str) -> Path:
    """Join the other processes, if there are any, and train together; see `_train`."""
    from finetune import distributed, is_by_all

    world = distributed.start(config.train.device, uses_deepspeed=False)
    try:
        if config.train.global_batch % world.size:
            raise by_all(
                UserError(
                    f"train.global_batch={config.train.global_batch} cannot be shared equally by {world.size} "
                    "processes; give a multiple"
                )
            )
        return _train(config, settings, yaml, world)
    except BaseException as error:
        if is_by_all(error):  # leaving a group whose members are gone may take forever
            distributed.stop()
        raise


def _train(config: Config, settings: Mapping[str, Any], yaml: str, world: World) -> Path:
    """Train as `config` says, from the last checkpoint of its run folder if there is one; returns RUN/vae.

    Args:
        settings: the same config as nested plain values; checkpoints keep what the run depends on.
        yaml: the same config as text, for RUN/config.yaml.
    """
    import torch
    from diffusers import VQModel

    from finetune import distributed, tracking
    from finetune.autoencoder import checkpoint
    from finetune.autoencoder.build import (
        build,
        build_adversary,
        build_features,
        build_lpips,
        keep_latents,
        load_given,
        require_room,
    )
    from finetune.autoencoder.config import require_penalty
    from finetune.autoencoder.pictures import Pictures
    from finetune.autoencoder.results import begin_codebook, finish
    from finetune.autoencoder.step import trained_weights
    from finetune.checkpoint import RunFolder, require_same, require_shared
    from finetune.data.order import Order, Source
    from finetune.data.shards import write_atomic
    from finetune.models.autoencoder import downsample_factor

    run = Path(config.run.dir)
    device = world.device
    say: Callable[[str], None] = print if world.is_main else lambda line: None
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    batch = config.train.global_batch
    pretrained_sha256 = None
    if config.model.pretrained is None:
        vae = build(config.model, config.seed)
    else:
        vae, pretrained_sha256 = load_given(config.model)
    require_penalty(config.loss, isinstance(vae, VQModel), f"the {type(vae).__name__} that is trained")
    if config.train.decoder_only:
        keep_latents(vae)
    pictures = Pictures(
        config.data.shards,
        size=config.data.size,
        held_out=config.data.held_out,
        seed=config.seed,
        multiple=downsample_factor(vae),
        cache_bytes=int(config.data.cache_gib * 2**30),
        readers=config.data.readers,
    )
    with closing(pictures), contextlib.ExitStack() as stack:
        require_room(config, min(map(min, pictures.buckets)))
        # What is measured is measured by rank 0, which writes too: its folder's lock stays with it.
        of_main: list[FeatureNetwork | None] = []
        world.on_main(lambda: of_main.append(build_features(config, pictures, device)))
        folders: list[RunFolder] = []
        world.on_main(lambda: folders.append(RunFolder(run)))
        for held in folders:
            stack.enter_context(closing(held))
        require_shared(world, run)
        order = Order([Source(pictures.shard_sizes)], seed=config.seed, global_batch=batch)
        if world.is_main:
            (run / "checkpoints").mkdir(exist_ok=True)

        vae = vae.to(device)
        if config.train.channels_last:
            vae = vae.to(memory_format=torch.channels_last)
        if config.model.pretrained is None:
            vae.register_to_config(sample_size=max(pictures.buckets[0]))
        average = {n: p.detach().clone() for n, p in vae.named_parameters()} if config.ema.enabled else None
        optimizer = torch.optim.AdamW(
            trained_weights(vae),
            lr=config.optim.lr,
            betas=(config.optim.beta1, config.optim.beta2),
            eps=config.optim.eps,
            weight_decay=config.optim.weight_decay,
            fused=True,
        )
        lpips, lpips_sha256 = build_lpips(config, device, say)
        adversary = build_adversary(config, world)
        depends_on = _depends_on(settings) | {
            "data.shards (manifest's sha256)": pictures.sha256,
            "loss.lpips (weights' sha256)": lpips_sha256,
            "model.pretrained (weights' sha256)": pretrained_sha256,
        }
        step = 0
        found = world.on_main(lambda: checkpoint.latest(run)) if config.checkpoint.resume == "auto" else None
        if found is not None:
            folder, record = found
            require_same(record["depends_on"], depends_on, folder)
            step = int(record["step"])
            judged = step - config.loss.discriminator_start
            checkpoint.restore(folder, step, vae, average, optimizer, adversary, judged)
            say(f"resuming from {folder}")
        elif config.checkpoint.resume == "never" and any((run / "checkpoints").glob("step-*")):
            raise UserError(f"{run} holds another run and checkpoint.resume=never; choose another run.dir")
        if step > config.train.steps:
            raise UserError(
                f"{run} is at step {step}, beyond train.steps={config.train.steps}; choose another run.dir"
            )
        if step == 0 and isinstance(vae, VQModel) and config.model.pretrained is None:
            if world.is_main:
                begin_codebook(config, pictures, vae, device)
            codebook = vae.quantize.embedding.weight
            codebook.data.copy_(world.broadcast(codebook.detach().cpu()))
            if average is not None:
                average["quantize.embedding.weight"].copy_(vae.quantize.embedding.weight.detach())
        if world.is_main:
            write_atomic(run / "config.yaml", yaml.encode())
            _forget_measures(run / "metrics.jsonl")
        tracker = tracking.Tracker(
            run,
            world,
            config=dict(settings),
            name=config.run.name,
            project=config.tracker.project,
            wandb_mode=tracking.wandb_mode(config.tracker.mode) if config.tracker.wandb else None,
            first_step=step,
            total_steps=config.train.steps,
            global_batch=batch,
        )
        processes = f", {world.size} processes" if world.size > 1 else ""
        tracker.say(
            f"{len(pictures)} pictures, {sum(map(len, pictures.held_out_ids))} held out; autoencoder of "
            f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters on {device.type}{processes}"
            + (", of which the decoder is trained" if config.train.decoder_only else "")
        )
        failed = True
        try:
            _loop(config, pictures, order, vae, average, optimizer, lpips, adversary, tracker, step, depends_on)
            distributed.stop()  # the others need not wait for what rank 0 measures
            if world.is_main:
                finish(config, pictures, vae, average, of_main[0], tracker)
            failed = False
        finally:
            tracker.close(failed=failed)
        return run / "vae"


def _loop(
    config: Config,
    pictures: Pictures,
    order: Order,
    vae: FirstStage,
    average: dict[str, Tensor] | None,
    optimizer: torch.optim.Optimizer,
    lpips: Lpips | None,
    adversary: Adversary | None,
    tracker: Tracker,
    step: int,
    depends_on: Mapping[str, Any],
) -> None:
    import torch
    from diffusers import AutoencoderKL
    from tqdm import tqdm

    from finetune import ema, rng
    from finetune.autoencoder import checkpoint
    from finetune.autoencoder.bottleneck import PenaltyWeights, perplexity
    from finetune.autoencoder.results import averaged, save_grid
    from finetune.autoencoder.step import of_all, step_once
    from finetune.lr import learning_rate
    from finetune.models.autoencoder import downsample_factor, latent_channels, to_signed

    world, run = tracker.world, tracker.run
    steps, batch, device = config.train.steps, config.train.global_batch, world.device
    begin, end = (rank * batch // world.size for rank in (world.rank, world.rank + 1))  # our share of a batch
    penalty = PenaltyWeights(config.loss.kl_weight, config.loss.codebook_weight, config.loss.commitment)
    downsample = downsample_factor(vae)
    weights = list(vae.parameters())
    if step < steps:
        silent = not (pictures.cached and world.is_main)
        with tracker.paused(), tqdm(total=len(pictures), desc="reading", unit="img", disable=silent) as bar:
            pictures.fill_cache(lambda: bar.update())
    vae.train()
    with closing(_batches(pictures, order, step, steps, begin, end)) as batches:
        for pixels_BHW3 in batches:
            seen = step * batch  # images before this step: the clock of its draws
            ids_B = torch.arange(seen + begin, seen + end, device=device)
            image = to_signed(pixels_BHW3, device)
            if config.data.flip:
                mirrored = rng.integers(config.seed, "mirror", ids_B, 2).bool().view(-1, 1, 1, 1)
                image = torch.where(mirrored, image.flip(3), image)
            height, width = (side // downsample for side in image.shape[2:])
            eps = None
            if isinstance(vae, AutoencoderKL):
                eps = rng.normal(config.seed, "posterior", ids_B, (latent_channels(vae), height, width))
            step, seen = step + 1, seen + batch
            lr = learning_rate(
                seen,
                peak=config.optim.lr,
                schedule=config.optim.schedule,
                warmup_images=config.optim.warmup_images,
                total_images=steps * batch,
                final_ratio=config.optim.final_lr_ratio,
            )
            for group in optimizer.param_groups:
                group["lr"] = lr
            judging = adversary if step > config.loss.discriminator_start else None
            if judging is not None:
                for group in judging.optimizer.param_groups:
                    group["lr"] = lr * (config.loss.discriminator_lr or config.optim.lr) / config.optim.lr
            values = step_once(
                vae,
                optimizer,
                image.contiguous(memory_format=torch.channels_last) if config.train.channels_last else image,
                eps,
                penalty=penalty,
                max_grad_norm=config.optim.max_grad_norm,
                bf16=config.train.precision == "bf16",
                lpips=lpips,
                lpips_weight=config.loss.lpips_weight,
                adversary=judging,
                world=world,
            )
            tracker.advance()
            if average is not None:
                keep = ema.decay(seen, batch, config.ema.halflife_images, config.ema.rampup_ratio)
                ema.update_(list(average.values()), [weight.detach() for weight in weights], keep)

            saving = step % config.checkpoint.every == 0 or step == steps
            if step % config.tracker.every == 0 or saving:
                values = of_all(values, world)
                uses_K = values.pop("uses_K", None)
                scalars = {name: value.item() for name, value in values.items()}  # the only wait for the device
                if not math.isfinite(sum(scalars.values())):
                    raise by_all(
                        UserError(
                            f"the loss is not finite at step {step}; lower optim.lr={config.optim.lr} or set "
                            "train.precision=fp32, and start again from the last checkpoint"
                        )
                    )
                if uses_K is not None:
                    scalars["perplexity"] = perplexity(uses_K)
                rate = tracker.rate()
                tracker.write({"step": step, "images_seen": seen, **scalars, "lr": lr, "images_per_second": rate})
                tracker.show(scalars["loss"], rate)
            with tracker.paused():
                if saving:
                    world.on_main(
                        functools.partial(
                            checkpoint.save,
                            run,
                            vae,
                            average,
                            optimizer,
                            judging,
                            step=step,
                            images_seen=seen,
                            depends_on=depends_on,
                            keep=config.checkpoint.keep,
                        )
                    )
                if world.is_main and config.sample.every and step % config.sample.every == 0 and step < steps:
                    with averaged(vae, average):
                        save_grid(config, pictures, vae, step, tracker)


def _batches(
    pictures: Pictures, order: Order, first: int, last: int, begin: int, end: int
) -> Generator[np.ndarray]:
    """uint8 [B, H, W, 3]: pictures begin..end-1 of the batch of each of the steps first..last-1.

    The next batch is read while one is trained on.
    """

    def read(step: int) -> np.ndarray:
        rows = order.batch(step, begin, end)
        return pictures.read(rows.bucket, pictures.train_ids[rows.bucket][rows.rows])

    with ThreadPoolExecutor(1, thread_name_prefix="batch") as ahead:
        waiting: Future[np.ndarray] | None = ahead.submit(read, first) if first < last else None
        for step in range(first, last):
            assert waiting is not None
            ready = waiting.result()
            waiting = ahead.submit(read, step + 1) if step + 1 < last else None
            yield ready


def _depends_on(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the trained weights depend on, flat, by config key."""

    def flatten(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, Mapping):
                yield from flatten(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    flat = flatten({key: value for key, value in settings.items() if key not in MAY_CHANGE}, "")
    return {key: value for key, value in flat if key not in MAY_CHANGE_KEYS}


def _forget_measures(path: Path) -> None:
    """Drop what was measured when the run had come to its end before: it will be measured again."""
    from finetune.data.shards import write_atomic

    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_atomic(path, "".join(line for line in lines if '"loss": ' in line).encode())
