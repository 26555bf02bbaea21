"""`finetune train`: fine-tune a latent diffusion model on latent shards.

Also `python -m finetune.train`, for `accelerate launch`, `torchrun` and `srun`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from finetune import outliving_readers, run_cli
from finetune.config import Config, compose, is_free_form, parse_override
from finetune.help import describe, describe_tasks
from finetune.terminal import quiet_libraries, require_settings, speak_in_turn, stopped_at_once

if TYPE_CHECKING:
    from finetune.distributed import StopRequest

USAGE = """\
usage: finetune train [--print] [KEY=VALUE ...]
       finetune train --multirun KEY=VALUE,VALUE ...

Fine-tune a latent diffusion model on latent shards, or train one from scratch.
The same command goes on where an earlier one stopped.

examples:
  finetune train experiment=smoke data.shards=LATENTS run.dir=runs/smoke
  finetune train experiment=sd15_lora model.pretrained=PATH_OR_HUB_ID data.shards=LATENTS run.dir=runs/mine
  accelerate launch --config_file launchers/accelerate/one_machine.yaml -m finetune.train strategy=zero2 ...

options:
  -h, --help    this text
  --print       print the composed configuration and stop
  --multirun    one run for each combination of values, here or in Slurm: finetune train --multirun --help
"""


def main(argv: list[str]) -> int:
    if any(word in ("-h", "--help") for word in argv):
        print(f"{USAGE}\n{describe('train', Config)}\n\n{describe_tasks()}")
        return 0
    # Warnings of torch's C++ parts are pages of stack where a peer is gone; their errors stay.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return speak_in_turn(lambda: _main(argv))


def _main(argv: list[str]) -> int:
    overrides = [word for word in argv if word != "--print"]
    require_settings(overrides, "finetune train")
    config, composed = compose("train", overrides, Config)
    if "--print" in argv:
        print(OmegaConf.to_yaml(composed), end="")
        return 0
    with stopped_at_once():
        return run(config, composed, {parse_override(word)[0].key_or_group for word in overrides})


def run(config: Config, composed: DictConfig, asked: Collection[str] = ()) -> int:
    """Train one configuration, from the start or from its last checkpoint; `asked`: keys that the user gave."""
    from finetune import build, distributed

    build.check(config)
    quiet_libraries()
    if config.train.threads is not None:
        import torch

        torch.set_num_threads(config.train.threads)
    with outliving_readers(), distributed.StopRequest(int(os.environ.get("RANK", 0))) as request:
        return _run(config, composed, asked, request)


def _run(config: Config, composed: DictConfig, asked: Collection[str], request: StopRequest) -> int:
    from finetune import build, distributed, loop, tracking
    from finetune.checkpoint import held_folder
    from finetune.data.shards import write_atomic
    from finetune.runs import changed_settings

    bounds = distributed.Bounds(config.watch.lost_s, config.watch.stalled_s, config.watch.start_s)
    uses_deepspeed = config.strategy.kind == "zero"
    place = distributed.joined(
        config.train.device, bounds, uses_deepspeed=uses_deepspeed, when_full=build.OUT_OF_MEMORY
    )
    path = Path(config.run.dir)
    with place as world, held_folder(world, path):
        world.watch.at("building the model")
        parts = build.build(config, world, path)
        world.watch.at("restoring the last checkpoint")
        progress = loop.resume(config, world, parts, build.depends_on(config, parts))
        is_free = partial(is_free_form, schema=Config)
        if progress.step and (changed := world.on_main(lambda: changed_settings(path, composed, is_free))):
            parts.notices.append("settings since the last start: " + "; ".join(changed))
        world.on_main(lambda: parts.task.save(path))
        world.on_main(lambda: write_atomic(path / "config.yaml", OmegaConf.to_yaml(composed).encode()))
        tracker = tracking.Tracker(
            path,
            world,
            config=OmegaConf.to_container(composed),  # type: ignore[arg-type]
            name=config.run.name,
            project=config.tracker.project,
            wandb_mode=tracking.wandb_mode(config.tracker.mode) if config.tracker.wandb else None,
            first_step=progress.step,
            total_steps=config.train.steps,
            global_batch=config.train.global_batch,
            open_losses=progress.open_losses,
        )
        with tracker.closing():
            for notice in (*build.unused(config, asked), *parts.notices):
                tracker.say(f"note: {notice}")
            if progress.step >= config.train.steps:
                tracker.say(f"{path} is complete: {progress.step} steps; raise train.steps to go on")
            stop = loop.train(config, world, parts, tracker, progress, request)
            tracker.goes_on = stop > 0
        if world.is_main:
            print(f"run: {path}{', stopped: the same command goes on' if stop else ''}")
    return request.exit_code(stop) if stop else 0


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
