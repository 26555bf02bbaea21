"""Which configurations make no sense: refused before anything is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from finetune import UserError, diffusion, distributed, tasks
from finetune.build.averages import check_averages
from finetune.build.data import sources_of
from finetune.config import (
    LARGEST_SIDE,
    AdapterConfig,
    Config,
    ModelConfig,
    StrategyConfig,
    data_sources,
    require,
    require_choice,
    require_finite,
    require_sizes,
)
from finetune.data.shards import is_remote
from finetune.models.parts import flat
from finetune.models.schedulers import most_steps, scheduler_config
from finetune.ranges import require_seeds, require_shared

OUT_OF_MEMORY = (
    "lower train.micro_batch, set model.gradient_checkpointing=true, use strategy=zero2 or zero3 on more "
    "processes, strategy=zero3_offload, or adapter=lora"
)
"""What to do where a device's memory does not hold a run."""
_UNET_SIZES = (
    "sample_size",
    "in_channels",
    "out_channels",
    "block_out_channels",
    "norm_num_groups",
    "cross_attention_dim",
    "attention_head_dim",
    "num_attention_heads",
    "num_class_embeds",
)
_UNET_LAYERS = ("layers_per_block", "transformer_layers_per_block")
_MOST_LAYERS = 200
_LONGEST_CAPTION = 4096  # tokens; attention takes its square
_MOST_RANK = 4096


def check(config: Config) -> None:
    """Refuse values out of range and contradictions, before anything is loaded.

    Raises:
        UserError: names the key, its value and what it may be.
    """
    schedule, objective = config.model.scheduler, config.objective
    require_shared(config, precisions=("auto", "fp32", "bf16", "fp16"), offloads=("none", "cpu", "nvme"))
    require_choice(
        {
            "adapter.kind": (config.adapter.kind, ("full", "lora")),
            "task.name": (config.task.name, tasks.names()),
            "objective.prediction": (objective.prediction, diffusion.PREDICTIONS),
            "objective.weighting": (objective.weighting, diffusion.WEIGHTINGS),
            "objective.loss": (objective.loss, diffusion.LOSSES),
            "objective.timesteps": (objective.timesteps, diffusion.TIMESTEPS),
            "optim.kind": (config.optim.kind, distributed.KINDS),
            "model.scheduler.beta_schedule": (schedule.beta_schedule, diffusion.BETA_SCHEDULES),
            "model.scheduler.timestep_spacing": (schedule.timestep_spacing, ("leading", "trailing", "linspace")),
        }
    )
    _check_model(config.model)
    positive = {
        "train.micro_batch": config.train.micro_batch,
        "checkpoint.memory_gib": config.checkpoint.memory_gib,
        "data.prefetch": config.data.prefetch,
        "data.shuffle_window": config.data.shuffle_window,
        "data.lanes": config.data.lanes,
        "data.cache_gib": config.data.cache_gib,
        "optim.d0": config.optim.d0,
        "optim.d_coef": config.optim.d_coef,
        "model.scheduler.shift": schedule.shift,
        "objective.gamma": objective.gamma,
        "objective.p2_k": objective.p2_k,  # of 0, weights where there is no signal would be 0 / 0
        "objective.huber_delta": objective.huber_delta,
        "objective.logit_std": objective.logit_std,
    }
    require(positive, lambda value: value > 0, "must be greater than 0")
    not_negative = {
        "optim.text_encoder_lr": config.optim.text_encoder_lr,
        "objective.offset_noise": objective.offset_noise,
        "objective.input_perturbation": objective.input_perturbation,
        **flat(config.optim.lr_ratios, "optim.lr_ratios."),
    }
    require(not_negative, lambda value: value >= 0, "must not be negative")
    noise = {"model.scheduler.beta_start": schedule.beta_start, "model.scheduler.beta_end": schedule.beta_end}
    require(noise, lambda value: 0 < value < 1, "is a variance: between 0 and 1")
    require_finite({"objective.logit_mean": objective.logit_mean})
    _check_looks(config)
    check_averages(config.ema)
    _check_objective(config)
    _check_optimizer(config)
    tasks.options(config.task.name, config.task.options)
    if not 0 <= config.task.dropout <= 1:
        raise UserError(f"task.dropout={config.task.dropout} is a probability: 0 to 1")
    _check_strategy(config.strategy)
    _check_adapter(config.adapter, config.model)
    _check_use(config)
    sources_of(config)
    if config.model.pretrained is None and not config.model.unet:
        raise UserError("no model: set model.pretrained, or choose a group such as model=small")


def _check_looks(config: Config) -> None:
    """Refuse held-out losses and samples that can't be."""
    sample, validation, schedule = config.sample, config.validation, config.model.scheduler
    require_sizes({"sample.height": sample.height, "sample.width": sample.width}, LARGEST_SIDE)
    positive = {"validation.timesteps": validation.timesteps, "sample.steps": sample.steps}
    require(positive, lambda value: value > 0, "must be greater than 0")
    not_negative = {
        "sample.every": sample.every,
        "validation.every": validation.every,
        "validation.samples": validation.samples,
    }
    require(not_negative, lambda value: value >= 0, "must not be negative")
    require_seeds({"sample.seed": sample.seed})
    guidance = {"sample.guidance": sample.guidance}
    require(guidance, lambda value: value >= 1, "must be at least 1, which is no guidance")
    most = most_steps(scheduler_config(asdict(schedule), config.objective.prediction))
    for key, number, limit in (
        ("sample.steps", sample.steps, most),
        ("validation.timesteps", validation.timesteps, schedule.num_train_timesteps),
    ):
        if number > limit:
            raise UserError(f"{key}={number} is more than the noise schedule's {limit}")
    if sample.every and sample.prompts is not None and not sample.prompts:
        raise UserError(
            "sample.prompts is empty: give prompts, leave it out for held-out captions, or sample.every=0"
        )


def _check_strategy(strategy: StrategyConfig) -> None:
    """Refuse what goes with another strategy."""
    offload, path = strategy.offload, strategy.offload_path
    if offload == "nvme" and strategy.stage != 3:
        raise UserError("strategy.offload=nvme is stage 3's: add strategy=zero3, or choose strategy.offload=cpu")
    if (offload == "nvme") != (path is not None):
        raise UserError(
            f"strategy.offload={offload} with strategy.offload_path={path}: nvme needs a folder on a local disk "
            "for its files, and only nvme does"
        )
    if strategy.kind == "zero" and strategy.reduce_dtype != "fp32":
        raise UserError(
            f"strategy.reduce_dtype={strategy.reduce_dtype} is ddp's, ZeRO sums gradients in train.precision: "
            "leave it out"
        )


def _check_model(model: ModelConfig) -> None:
    """Refuse sizes that no model has."""
    text, unet = model.text_encoder, model.unet
    require_sizes(
        {
            "model.text_encoder.vocab_size": text.vocab_size,
            "model.text_encoder.hidden_size": text.hidden_size,
            "model.text_encoder.heads": text.heads,
            "model.scheduler.num_train_timesteps": model.scheduler.num_train_timesteps,
            **{f"model.unet.{name}": unet.get(name) for name in _UNET_SIZES},
        }
    )
    require_sizes({"model.text_encoder.max_length": text.max_length}, _LONGEST_CAPTION)
    layers = {"model.text_encoder.layers": text.layers}
    require_sizes(layers | {f"model.unet.{name}": unet.get(name) for name in _UNET_LAYERS}, _MOST_LAYERS)
    std = {"model.text_encoder.embedding_std": text.embedding_std}
    require(std, lambda value: value > 0, "must be greater than 0")
    dropout = unet.get("dropout", 0.0)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"model.unet.dropout={dropout} is a probability: at least 0 and below 1")
    if model.pretrained is None:
        for name, value in (("tokenizer", model.tokenizer), ("revision", model.revision)):
            if value is not None:
                raise UserError(
                    f"model.{name}={value} is of a pretrained model, and model.pretrained names none: leave it out"
                )
    elif model.revision is not None and Path(model.pretrained).expanduser().exists():
        raise UserError(
            f"model.revision={model.revision}: {model.pretrained} is here, and only models of the Hugging Face Hub "
            "have revisions: leave it out"
        )


def _check_adapter(adapter: AdapterConfig, model: ModelConfig) -> None:
    """Refuse what no adapter can be, or none of this model."""
    require_sizes({"adapter.rank": adapter.rank}, _MOST_RANK)
    ranks = flat(adapter.ranks, "adapter.ranks.")
    require(ranks, lambda rank: rank >= 0, "must not be negative", most=_MOST_RANK)
    require(ranks, lambda rank: rank == int(rank), "is no whole number")
    require({"adapter.alpha": adapter.alpha}, lambda value: value > 0, "must be greater than 0")
    if not 0 <= adapter.dropout < 1:
        raise UserError(f"adapter.dropout={adapter.dropout} is a probability: at least 0 and below 1")
    if adapter.kind == "lora" and not adapter.targets:
        raise UserError(
            "adapter.targets is empty, so that no module is adapted: name some, or leave it out for attention"
        )
    if adapter.dora and adapter.kind != "lora":
        raise UserError("adapter.dora=true is of low-rank adapters: choose adapter=dora or adapter=lora")
    if adapter.dora and model.channels_last:
        raise UserError(
            "model.channels_last=true does not go with adapter.dora=true, which reads weights: leave it out"
        )
    if adapter.kind == "lora" and model.pretrained is None:
        raise UserError("adapter=lora adapts a pretrained model: set model.pretrained, or use adapter=full")


def _check_use(config: Config) -> None:
    """Refuse settings of what is not chosen: who sets them believes that it is."""
    objective, is_prodigy = config.objective, config.optim.kind == "prodigy"
    is_p2 = objective.weighting == "p2"
    has_gamma = objective.weighting in ("min_snr", "soft_min_snr", "p2")
    is_logit_normal = objective.timesteps == "logit_normal"
    of_lora = "rank", "alpha", "dropout", "rank_stabilized", "targets", "ranks"
    usual = Config()
    for section, names, is_used, chooses in (
        ("adapter", of_lora, config.adapter.kind == "lora", "adapter=lora"),
        ("objective", ("logit_mean", "logit_std"), is_logit_normal, "objective.timesteps=logit_normal"),
        ("optim", ("final_lr_ratio",), config.optim.schedule == "cosine", "optim.schedule=cosine"),
        ("objective", ("gamma",), has_gamma, "objective.weighting=min_snr, soft_min_snr or p2"),
        ("objective", ("p2_k",), is_p2, "objective.weighting=p2"),
        ("objective", ("huber_delta",), objective.loss == "huber", "objective.loss=huber"),
        ("optim", ("d0", "d_coef"), is_prodigy, "optim=prodigy"),
        ("data", ("lanes", "shuffle_window"), config.data.shuffle, "data.shuffle=true"),
    ):
        for name in names:
            given = getattr(getattr(config, section), name)
            if not is_used and given != getattr(getattr(usual, section), name):
                raise UserError(f"{section}.{name}={given} has no effect here: choose {chooses}, or leave it out")


def unused(config: Config, asked: Collection[str]) -> list[str]:
    """Which of the keys that were asked for have no effect, since what they are of is turned off.

    They are told of, not refused: a command for many runs may say them all. What an experiment says is no wish.
    """
    sources = data_sources(asdict(config.data))
    fetches = any(is_remote(str(each["shards"])) for each in sources.values())
    draws, validates = config.sample.every > 0, config.validation.every > 0
    ema, is_pretrained = config.ema, config.model.pretrained is not None
    lengths = [f"ema.halflives_images.{name}" for name in ema.halflives_images]
    of_halflives = ["ema.halflife_images"] + ([] if lengths else ["ema.rampup_ratio"])
    notices = []
    for names, is_used, why in (
        (("data.cache_dir", "data.cache_gib"), fetches, "all shards are on this machine"),
        (
            ("ema.kind", "ema.halflife_images", "ema.rampup_ratio", "ema.sigma_rels"),
            ema.enabled,
            "ema.enabled=false",
        ),
        (lengths, ema.enabled, "ema.enabled=false"),
        (of_halflives, not ema.enabled or ema.kind != "power", "ema.kind=power"),
        (("model.pad_input",), is_pretrained, "the U-Net is built anew, with the channels that its task needs"),
        (("model.train_text_encoder",), is_pretrained, "a text encoder that is built anew is always trained"),
        (("model.graphs",), config.model.fast, "model.fast=false"),
        (("sample.prompts", "sample.seed", "sample.steps"), draws, "sample.every=0"),
        (("validation.timesteps",), validates, "validation.every=0"),
        (("tracker.mode", "tracker.project"), config.tracker.wandb, "tracker=none"),
        ([f"data.sources.{name}.weight" for name in sources], len(sources) > 1, "it is the only source"),
    ):
        if not is_used and (given := [name for name in names if name in asked]):
            notices.append(f"no effect of {', '.join(given)}: {why}")
    return notices


def _check_optimizer(config: Config) -> None:
    """Refuse what an optimizer can't do."""
    optim, kind = config.optim, config.optim.kind
    if config.strategy.kind == "zero" and kind in distributed.NEED_WHOLE:
        what = "a sum over all weights" if kind == "prodigy" else "whole weights"
        raise UserError(
            f"optim={kind} needs {what}, which no rank has under ZeRO: choose strategy=ddp, or optim=adamw, lion "
            "or schedule_free"
        )
    if config.model.channels_last and kind in distributed.ORDERED:
        raise UserError(
            f"model.channels_last=true does not go with optim={kind}, whose rows or blocks are of weights in "
            "another order: leave it out"
        )
    if kind == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "optim=adamw8bit needs bitsandbytes: pip install 'ldm-finetune[optim8bit]', or take optim=adamw"
        )
    if kind == "prodigy":
        if not 0.1 <= optim.lr <= 10:
            raise UserError(
                f"optim.lr={optim.lr:g} with optim=prodigy: it finds the learning rate, which this is a factor of; "
                "set optim.lr=1 (an experiment may have set it)"
            )
        if flat(optim.lr_ratios) or optim.text_encoder_lr not in (None, optim.lr):
            raise UserError(
                "optim=prodigy has one learning rate for all weights: leave optim.lr_ratios and "
                "optim.text_encoder_lr out"
            )
    if kind == "schedule_free":
        if optim.schedule != "constant":
            raise UserError(
                f"optim.schedule={optim.schedule} with optim=schedule_free, whose average stands for a schedule: "
                "set optim.schedule=constant (optim.warmup_images is fine)"
            )
        if config.ema.enabled:
            raise UserError(
                "ema.enabled=true with optim=schedule_free, which averages weights itself: set ema.enabled=false"
            )
        if optim.beta1 == 0:
            raise UserError(
                "optim.beta1=0 with optim=schedule_free: gradients would be of weights that its average can't be "
                "found from; take 0.9"
            )


def _check_objective(config: Config) -> None:
    """Refuse what contradicts itself."""
    schedule, objective = config.model.scheduler, config.objective
    if not 0 <= config.sample.guidance_rescale <= 1:
        raise UserError(f"sample.guidance_rescale={config.sample.guidance_rescale} is a share: 0 to 1")
    if objective.prediction == "flow":
        if schedule.rescale_betas_zero_snr:
            raise UserError(
                "model.scheduler.rescale_betas_zero_snr is of beta schedules, objective.prediction=flow has none: "
                "its last timestep is pure noise already"
            )
        return
    if schedule.shift != 1:
        raise UserError(
            f"model.scheduler.shift={schedule.shift:g} is of objective.prediction=flow alone; leave it at 1"
        )
    if schedule.rescale_betas_zero_snr:
        if objective.prediction == "epsilon":
            raise UserError(
                "objective.prediction=epsilon says nothing of a latent at the pure noise that "
                "model.scheduler.rescale_betas_zero_snr makes of the last timestep: use objective=v_zero_snr"
            )
        if schedule.timestep_spacing != "trailing":
            raise UserError(
                "model.scheduler.rescale_betas_zero_snr needs model.scheduler.timestep_spacing=trailing: else "
                "sampling never begins at the last timestep"
            )
