"""`finetune autoencoder`: train the first stage on image shards.

A run is a pure function of (config, clock): data order, mirroring and posterior noise are drawn by images seen, so
the same command after a kill goes on as if nothing had happened, and on however many processes: torchrun's, say.
Each takes its share of every batch, and keeps all of the model and its optimizer or, by `strategy=`, a share.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import UserError, by_all, outliving_readers

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.autoencoder.config import Config
    from finetune.autoencoder.features import FeatureNetwork
    from finetune.autoencoder.pictures import Pictures
    from finetune.distributed import StopRequest, World

# What a run may change when it goes on: none of these moves a weight that is already trained.
MAY_CHANGE = ("run", "checkpoint", "sample", "strategy", "tracker", "watch", "scale", "eval")
# Pictures and weights are known by their checksums, not by where they lie.
MAY_CHANGE_KEYS = (
    *("train.steps", "train.threads", "train.device", "data.cache_gib", "data.readers", "data.shards"),
    *("model.pretrained", "loss.lpips", "loss.lpips_heads"),
)

USAGE = """\
usage: finetune autoencoder [KEY=VALUE ...]

Train an autoencoder (the first stage) on image shards; the result is RUN/vae, in the diffusers layout.
The same command goes on where an earlier one stopped; asked to stop (SIGTERM, SIGUSR1, Ctrl-C) it saves first.

examples:
  data-tools ingest folder pictures/ --out shards/
  finetune autoencoder data.shards=shards run.dir=runs/vae
  finetune autoencoder data.shards=shards run.dir=runs/vae model=kl_f4 data.size=256 train.steps=50000
  finetune autoencoder data.shards=shards run.dir=runs/vq model=vq_f4 data.size=256
  finetune autoencoder data.shards=shards loss.discriminator_weight=0.5 loss.discriminator_start=5000
  finetune autoencoder data.shards=shards model.pretrained=runs/vae/vae train.decoder_only=true run.dir=runs/decoder
  torchrun --nproc-per-node 8 -m finetune autoencoder data.shards=shards train.global_batch=64 run.dir=runs/vae
  torchrun --nproc-per-node 8 -m finetune autoencoder data.shards=shards strategy=zero1 run.dir=runs/vae
  finetune autoencoder experiment=emoji data.shards=fluent-emoji run.dir=runs/emoji-vae
"""


def main(argv: Sequence[str]) -> int:
    """Run the command with Hydra overrides; returns the exit code.

    Raises:
        UserError: a mistake in the overrides, the shards or the run folder.
    """
    from finetune.autoencoder import config as schema
    from finetune.help import describe
    from finetune.terminal import require_settings, speak_in_turn

    if any(argument in ("-h", "--help") for argument in argv):
        print(f"{USAGE}\n{describe(schema.NAME, schema.Config, schema.FOLDER)}")
        return 0
    require_settings(argv, "finetune autoencoder")
    # Warnings of torch's C++ parts are pages of stack where a peer is gone; their errors stay.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return speak_in_turn(lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    from omegaconf import OmegaConf

    from finetune.autoencoder import config as schema
    from finetune.terminal import quiet_libraries, stopped_at_once

    config, composed = schema.load(argv)
    settings = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(settings, dict)
    with stopped_at_once():
        from finetune.distributed import StopRequest

        quiet_libraries()
        with outliving_readers(), StopRequest(int(os.environ.get("RANK", 0))) as request:
            plain = {str(key): value for key, value in settings.items()}
            return train(config, plain, OmegaConf.to_yaml(composed), request)


def train(config: Config, settings: Mapping[str, Any], yaml: str, request: StopRequest) -> int:
    """Join the other processes, if there are any, and train together, see `_train`; returns the exit code."""
    from finetune import distributed

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
    """Train as `config` says, from the last checkpoint of its run folder if there is one, and make RUN/vae.

    Args:
        settings: the same config as nested plain values; checkpoints keep what the run depends on.
        yaml: the same config as text, for RUN/config.yaml.

    Returns:
        The number of the signal that stopped the run, after it was saved; 0 when it is complete.
    """
    import torch
    from diffusers import VQModel

    from finetune import distributed, tracking
    from finetune.autoencoder import checkpoint, loop
    from finetune.autoencoder.build import (
        build_adversary,
        build_features,
        build_lpips,
        build_optimizer,
        require_room,
    )
    from finetune.autoencoder.pictures import Pictures
    from finetune.autoencoder.results import finish
    from finetune.checkpoint import held_folder, require_same
    from finetune.data.order import Order, Source
    from finetune.data.shards import write_atomic
    from finetune.models.autoencoder import downsample_factor

    run = Path(config.run.dir)
    device, watch = world.device, world.watch
    watch.at("building the model")
    say: Callable[[str], None] = print if world.is_main else lambda line: None
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    batch = config.train.global_batch
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
    with closing(pictures), contextlib.ExitStack() as stack:
        world.require_same(
            pictures.sha256,
            f"the processes read different data: {config.data.shards} is another set on a machine, or an older "
            "copy; make them the same (compare manifest.json)",
        )
        require_room(config, min(map(min, pictures.buckets)))
        # What is measured is measured by rank 0.
        of_main: list[FeatureNetwork | None] = []
        world.on_main(lambda: of_main.append(build_features(config, pictures, device)))
        stack.enter_context(held_folder(world, run))
        order = Order([Source(pictures.shard_sizes)], seed=config.seed, global_batch=batch)

        vae = vae.to(device)
        if config.train.channels_last:
            vae = vae.to(memory_format=torch.channels_last)
        if config.model.pretrained is None:
            vae.register_to_config(sample_size=max(pictures.buckets[0]))
        average = {n: p.detach().clone() for n, p in vae.named_parameters()} if config.ema.enabled else None
        betas = config.optim.beta1, config.optim.beta2
        optimizer = build_optimizer(config, vae, world, lr=config.optim.lr, betas=betas)
        lpips, lpips_sha256 = build_lpips(config, device, say)
        adversary = build_adversary(config, world)
        depends_on = _depends_on(settings) | {
            "data.shards (manifest's sha256)": pictures.sha256,
            "loss.lpips (weights' sha256)": lpips_sha256,
            "model.pretrained (weights' sha256)": pretrained_sha256,
        }
        passed_over: set[Path] = set()  # broken checkpoints; on rank 0
        watch.at("restoring the last checkpoint")
        step, begun_from = 0, None
        if (found := _found(config, world, passed_over)) is not None:
            folder, record = found
            require_same(record["depends_on"], depends_on, folder)
            step, begun_from = int(record["step"]), record.get("begun_from")
            judged = step - config.loss.discriminator_start
            checkpoint.restore(folder, step, vae, average, optimizer, adversary, judged)
            say(f"resuming from {folder}")
        if step > config.train.steps:
            raise UserError(
                f"{run} is at step {step}, beyond train.steps={config.train.steps}; choose another run.dir"
            )
        if world.is_main:
            (run / "checkpoints").mkdir(exist_ok=True)
        if step == 0 and isinstance(vae, VQModel) and config.model.pretrained is None:
            watch.at("beginning the codebook", distributed.LONG)
            _begin_codebook(config, world, pictures, vae, average)
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
        if said := pictures.never_trained(order):
            tracker.say(said)
        parts = loop.Parts(pictures, order, vae, average, optimizer, lpips, adversary, begun_from, passed_over)
        failed, stop = True, 0
        try:
            stop = loop.train(config, parts, tracker, request, step=step, depends_on=depends_on)
            request.can_save = False  # all is saved, and what is left can be done again
            stop = stop or request.number
            watch.leave()  # the others need not wait for what rank 0 measures
            distributed.stop()
            if world.is_main and not stop:
                finish(config, pictures, vae, average, of_main[0], tracker)
            failed = False
        except BaseException as error:
            watch.judge(error)
            raise
        finally:
            tracker.close(failed=failed, goes_on=stop > 0)
        if stop:
            say(f"run: {run}, stopped: the same command goes on")
        return stop


def _first_stage(config: Config) -> tuple[Any, str | None]:
    """The autoencoder to train, and the sha256 of its weights where they are given."""
    from diffusers import VQModel

    from finetune.autoencoder.build import build, keep_latents, load_given
    from finetune.autoencoder.config import require_penalty

    if config.model.pretrained is None:
        vae, sha256 = build(config.model, config.seed), None
    else:
        vae, sha256 = load_given(config.model)
    require_penalty(config.loss, isinstance(vae, VQModel), f"the {type(vae).__name__} that is trained")
    if config.train.decoder_only:
        keep_latents(vae)
    return vae, sha256


def _found(config: Config, world: World, passed_over: set[Path]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, and its record; collective. Broken ones are added to `passed_over`.

    Raises:
        UserError: the named one is not whole; or there are some, and none shall be taken.
    """
    from finetune.autoencoder import checkpoint
    from finetune.runs import steps_in

    run, wanted = Path(config.run.dir), config.checkpoint.resume
    if wanted == "auto":
        return world.on_main(lambda: checkpoint.latest(run, passed_over))
    if wanted != "never":
        return world.on_main(lambda: checkpoint.named(run, wanted, passed_over))
    if steps_in(run / "checkpoints"):
        raise UserError(f"{run} holds another run and checkpoint.resume=never; choose another run.dir")
    return None


def _begin_codebook(
    config: Config, world: World, pictures: Pictures, vae: Any, average: Mapping[str, Tensor] | None
) -> None:
    """Entries where rank 0's latents are, for all ranks; collective."""
    from finetune.autoencoder.results import begin_codebook

    if world.is_main:
        begin_codebook(config, pictures, vae, world.device)
    codebook = vae.quantize.embedding.weight
    codebook.data.copy_(world.broadcast(codebook.detach().cpu()))
    if average is not None:
        average["quantize.embedding.weight"].copy_(codebook.detach())


def _depends_on(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the trained weights depend on, flat, by config key."""

    from finetune.runs import leaves

    flat = leaves({key: value for key, value in settings.items() if key not in MAY_CHANGE})
    return {key: value for key, value in flat if key not in MAY_CHANGE_KEYS}


def _forget_measures(path: Path) -> None:
    """Drop what was measured when the run had come to its end before: it will be measured again."""
    from finetune.data.shards import write_atomic

    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_atomic(path, "".join(line for line in lines if '"loss": ' in line).encode())
