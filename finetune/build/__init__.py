"""Config to objects: the one place where names become things, and contradictions are refused.

averages        which averages of the weights are kept
checks          what makes no sense, before anything is loaded
data            shards and mixtures, held-out samples, cached states of captions
identity        what a run must keep to go on
model           U-Net and conditioner, adapters, layout and kernels, the decoder of sample grids
needs           what a rank's memory has to hold, refused where there is less
strategy        batches over ranks, weights and moments by a strategy
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from finetune import UserError, memory
from finetune.build.averages import profiles
from finetune.build.checks import OUT_OF_MEMORY, check, unused
from finetune.build.data import fetched_again, left_out, open_data, with_condition, with_text_states
from finetune.build.identity import depends_on
from finetune.build.model import (
    adapt,
    check_fit,
    conditioned,
    load_decoder,
    make_fast,
    noise_schedule,
    trained_otherwise,
)
from finetune.build.needs import require_memory
from finetune.build.strategy import batch_sizes, make_strategy, precision
from finetune.checkpoint import Checkpoints, Layout
from finetune.conditioning.text import Text
from finetune.config import Config
from finetune.distributed import World
from finetune.ema import Average
from finetune.loop import Parts, asked
from finetune.models.adapters import lora_alphas
from finetune.models.autoencoder import Autoencoder
from finetune.models.schedulers import scheduler_config
from finetune.models.sources import weights_digest
from finetune.objective import LatentDiffusion, Objective

__all__ = [
    "OUT_OF_MEMORY",
    "batch_sizes",
    "build",
    "check",
    "depends_on",
    "fetched_again",
    "noise_schedule",
    "open_data",
    "precision",
    "unused",
]


@memory.shortage_told()
def build(config: Config, world: World, run: Path) -> Parts:
    """Make everything that the loop needs.

    Raises:
        UserError: what is asked for is missing, broken or does not fit together.
    """
    if config.strategy.kind == "zero" and config.train.precision == "fp16" and world.device.type == "cpu":
        raise UserError("train.precision=fp16 under ZeRO needs a GPU: choose bf16 or fp32, or strategy=ddp")
    micro_batch, accumulation = batch_sizes(config, world)
    data = open_data(config, micro_batch * world.size)
    world.require_same(
        repr([source.shards.manifest.sha256 for source in data.sources]),
        "the processes read different data: a machine has another set under the same name, or an older copy; make "
        "them the same (`finetune doctor` says where they differ)",
    )
    notices: list[str] = []
    if config.validation.every and config.validation.samples and not data.held_out:
        notices.append("no sample is held out, so there is no held-out loss: every bucket has fewer than ten")
    notices += left_out(data, config.validation.samples, is_validated=config.validation.every > 0)
    notices += fetched_again(data, world.size)
    decoder: list[Autoencoder | None] = []  # on rank 0 alone: it is not sent to the others
    world.on_main(lambda: decoder.append(load_decoder(config, data, notices)))
    if config.model.pretrained is not None:
        world.on_main(lambda: notices.extend(trained_otherwise(config)))
    unet, conditioner, task = conditioned(config, world, run, data, notices)
    text = next((part for part in conditioner.modules() if isinstance(part, Text)), None)
    train_text = text is not None and text.trained
    if config.model.train_text_encoder and text is None:
        raise UserError("model.train_text_encoder=true: this model has no text encoder; leave it out")
    check_fit(config, unet, text, data)
    data = with_condition(data, conditioner, config, micro_batch * world.size)
    captions = [caption for batch in data.held_out for caption in batch.captions]
    if text is not None and captions and not any(captions):
        notices.append(
            f"none of the {len(captions)} held-out samples has a caption, so that prompts mean nothing to what is "
            "trained: were captions lost when the set was made? `data-tools inspect` counts them"
        )
    if text is not None and config.data.text_states and not train_text:
        data = with_text_states(data, text, notices)
    if config.sample.every and config.sample.prompts is not None and conditioner.asks != ("prompt",):
        notices.append(f"sample.prompts are not used: task={config.task.name} draws what held-out samples say")

    pretrained: str | None = None
    if config.model.pretrained is not None:
        whole = {"unet": unet, **conditioner.parts()}
        named = {f"{part}.{name}": p for part, model in whole.items() for name, p in model.named_parameters()}
        pretrained = world.on_main(lambda: weights_digest(named))
    adapted = adapt(config, unet, text)
    is_fast = make_fast(config, world, unet, notices)

    schedule = config.model.scheduler
    model = LatentDiffusion(
        unet,
        conditioner,
        schedule=noise_schedule(schedule, config.objective.prediction).to(world.device),
        space=data.space,
        objective=Objective(**asdict(config.objective)),
        seed=config.seed,
        global_batch=config.train.global_batch,
    )
    model.train()
    require_memory(config, world, model, accumulation)
    strategy = make_strategy(config, world, model, micro_batch, accumulation, is_fast=is_fast)
    weights = [shard.master for shard in strategy.shards]
    averages = [Average.starting_at(weights, profile, name) for name, profile in profiles(config.ema).items()]
    alphas = None
    if config.adapter.kind == "lora":
        alphas = {
            module: alpha for name, part in adapted.items() for module, alpha in lora_alphas(name, part).items()
        }
    layout = Layout({"unet": unet, **conditioner.parts()}, alphas)
    memory_gib = config.checkpoint.memory_gib
    memory_bytes = None if memory_gib is None else int(memory_gib * 2**30)
    checkpoints = Checkpoints(run, layout, config.checkpoint.keep, memory_bytes, config.ema.snapshot_keep)
    parts = Parts(
        data,
        model,
        strategy,
        averages,
        checkpoints,
        micro_batch,
        accumulation,
        scheduler_config(asdict(schedule), config.objective.prediction),
        decoder[0] if decoder else None,
        notices,
        pretrained,
        task,
    )
    notices += _not_drawn(config, parts)
    return parts


def _not_drawn(config: Config, parts: Parts) -> list[str]:
    """What a user may wait for in vain among sample grids."""
    sample, name = config.sample, config.task.name
    if not sample.every:
        return []
    if asked(config, parts) is None:
        height, width = parts.data.largest_bucket
        return [
            f"no sample grids: task={name} draws what held-out samples say, and none of {height}x{width} px is "
            "held out; begin with a larger validation.samples"
        ]
    sizes = {"sample.height": sample.height, "sample.width": sample.width}
    given = [key for key, value in sizes.items() if value is not None]
    if parts.model.conditioner.channels and given:
        return [f"no effect of {', '.join(given)}: task={name} draws pictures as large as what they are drawn from"]
    return []
