"""Config to objects: the one place where names become things, and contradictions are refused.

averages        which averages of the weights are kept
checks          what makes no sense, before anything is loaded
data            shards and mixtures, held-out samples, cached states of captions
identity        what a run must keep to go on
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from finetune import UserError, diffusion, memory, tasks
from finetune.build.averages import profiles
from finetune.build.checks import OUT_OF_MEMORY, check
from finetune.build.data import (
    captions,
    classes,
    fetched_again,
    left_out,
    open_data,
    with_condition,
    with_text_states,
)
from finetune.build.identity import depends_on
from finetune.checkpoint import Checkpoints, Layout
from finetune.conditioning import Conditioner, Given
from finetune.conditioning.text import Text
from finetune.config import Config, SchedulerConfig
from finetune.data.loader import Data
from finetune.distributed import ORDERED, DataParallel, OptimizerSettings, ParamGroup, Strategy, World, ZeRO
from finetune.ema import Average
from finetune.loop import Parts
from finetune.models import fast
from finetune.models.adapters import TEXT_TARGETS, add_lora, lora_alphas
from finetune.models.autoencoder import Autoencoder, encoder_sha256, load_autoencoder
from finetune.models.layout import store_channels_last
from finetune.models.parts import flat, part_of, require_parts
from finetune.models.schedulers import differences, load_scheduler, scheduler_config
from finetune.models.sources import has_part, weights_digest
from finetune.models.text import build_text_encoder, load_tokenizer, save_tokenizer, train_tokenizer
from finetune.models.unet import (
    build_unet,
    context_width,
    enable_gradient_checkpointing,
    load_unet,
    pad_input,
    pixel_multiple,
)
from finetune.objective import LatentDiffusion, Objective
from finetune.rng import fold
from finetune.sampling import check_size
from finetune.tasks import Task
from finetune.tasks.text_to_image import caption_conditioner, load_captions

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
]

_TOKENIZER_CAPTIONS = 200_000  # a vocabulary doesn't get better with more


def noise_schedule(schedule: SchedulerConfig, prediction: str) -> diffusion.Schedule:
    """How noise is mixed in while training."""
    if prediction == "flow":
        return diffusion.rectified_flow(schedule.num_train_timesteps, schedule.shift)
    betas_T = diffusion.betas(
        schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps, schedule.beta_schedule
    )
    alpha_bar_T = diffusion.alphas_cumprod(betas_T)
    if schedule.rescale_betas_zero_snr:
        alpha_bar_T = diffusion.zero_terminal_snr(alpha_bar_T)
    return diffusion.variance_preserving(alpha_bar_T)


def precision(wanted: str, device: torch.device) -> str:
    """`auto` becomes bf16 on a GPU that multiplies it, else fp32: on most CPUs bf16 is several times slower."""
    if wanted != "auto":
        return wanted
    return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"


def batch_sizes(config: Config, world: World) -> tuple[int, int]:
    """(micro-batch, accumulation steps) of each rank.

    Raises:
        UserError: the global batch can't be cut so.
    """
    total, size = config.train.global_batch, world.size
    share, rest = divmod(total, size)
    if rest or share == 0:
        raise UserError(
            f"train.global_batch={total} cannot be shared by {size} processes: take a multiple of {size}, such as "
            f"{max(round(total / size), 1) * size}, with a learning rate of its own (optim.lr)"
        )
    micro = min(config.train.micro_batch or share, share)
    if share % micro:
        raise UserError(
            f"train.micro_batch={micro} does not divide the {share} samples of each rank "
            f"(train.global_batch={total} over {size} processes)"
        )
    return micro, share // micro


def _text(config: Config, world: World, run: Path, data: Data) -> Text:
    """The conditioner of the model's captions."""
    if config.model.pretrained is not None:
        return load_captions(
            config.model.pretrained,
            config.model.revision,
            words=config.model.tokenizer,
            trained=config.model.train_text_encoder,
        )
    folder, settings = run / "tokenizer", config.model.text_encoder

    def make() -> None:
        if not folder.exists():
            all_captions = islice(captions(data), _TOKENIZER_CAPTIONS)
            made = train_tokenizer(all_captions, settings.vocab_size, settings.max_length)
            temporary = folder.with_name(".tokenizer.tmp")
            save_tokenizer(made, temporary)
            temporary.rename(folder)

    world.on_main(make)
    tokenizer = load_tokenizer(folder)
    encoder = build_text_encoder(
        tokenizer,
        settings.hidden_size,
        settings.layers,
        settings.heads,
        embedding_std=settings.embedding_std,
        seed=fold(config.seed, "text encoder"),
    )
    return caption_conditioner(tokenizer, encoder, trained=True)


def _conditioned(config: Config, world: World, run: Path, data: Data) -> tuple[UNet2DConditionModel, Conditioner]:
    """U-Net and conditioner, made for each other.

    Raises:
        UserError: model, task and data contradict each other.
    """
    model, task, channels = config.model, config.task, data.encoder.channels
    unet = load_unet(model.pretrained, revision=model.revision) if model.pretrained is not None else None
    width = context_width(model.unet if unet is None else unet.config)
    has_text = width is not None and (
        model.pretrained is None or has_part(model.pretrained, "text_encoder", model.revision)
    )
    given = Given(
        width=width,
        latent_channels=channels,
        downsample=data.encoder.downsample,
        space=data.space,
        classes=classes(data),
        text=(lambda: _text(config, world, run, data)) if has_text or task.name == "text_to_image" else None,
        embedded_labels=int((model.unet if unet is None else unet.config).get("num_class_embeds") or 0),
        seed=fold(config.seed, "conditioner"),
    )
    conditioner = tasks.make(task.name, task.options, given)
    made = Task(task.name, asdict(tasks.options(task.name, task.options)), list(given.classes))
    world.on_main(lambda: None if (run / tasks.TASK_FILE).exists() else made.save(run))
    wanted = channels + conditioner.channels
    if unet is None:
        arguments = {"in_channels": wanted, "out_channels": channels, **model.unet}
        unet = build_unet(arguments, seed=fold(config.seed, "unet"))
    elif model.pad_input and unet.config.in_channels < wanted:
        if config.adapter.kind != "full":
            raise UserError(
                "model.pad_input=true gives the U-Net weights that adapter=lora does not train: use adapter=full, "
                f"or begin with a model that has {wanted} input channels"
            )
        pad_input(unet, wanted)
    if unet.config.in_channels != wanted:
        takes = f"the U-Net takes {unet.config.in_channels} channels, the shards hold latents of {channels}"
        if conditioner.channels:
            takes += f" and task={task.name} adds {conditioner.channels}"
        if model.pretrained is None:
            remedy = "leave model.unet.in_channels out, or encode with another autoencoder"
        elif conditioner.channels and unet.config.in_channels == channels:
            remedy = "give model.pad_input=true to add them with zero weights, or choose a model that has them"
        else:
            remedy = "choose a model for these latents or encode with another autoencoder"
        raise UserError(f"{takes}: {remedy}")
    return unet, conditioner


def _decoder(config: Config, data: Data, notices: list[str]) -> Autoencoder | None:
    """The autoencoder for sample grids, proven to be the one that made the latents.

    Raises:
        UserError: another autoencoder made them, or a named one can't be loaded.
    """
    named = config.model.vae or config.model.pretrained
    shards = data.sources[0].shards
    try:
        source = named or data.encoder.locate(shards.root)
        vae = load_autoencoder(source, revision=None if config.model.vae else config.model.revision)
    except UserError as error:
        if named is not None:
            raise
        remedy = "" if "model.vae" in str(error) else "; name the autoencoder with model.vae=..."
        notices.append(f"no sample grids: {error}{remedy}")
        return None
    shards.manifest.require_encoder(encoder_sha256(vae), str(source))
    return vae


def _trained_otherwise(config: Config) -> list[str]:
    """A notice if the pretrained model's own scheduler says other than the run's settings."""
    try:
        own = load_scheduler(config.model.pretrained or "", config.model.revision)
    except UserError:  # a U-Net alone is trained as well
        return []
    found = differences(own, asdict(config.model.scheduler), config.objective.prediction)
    return [f"{config.model.pretrained} {'; '.join(found)}: it will have to learn this anew"] if found else []


@memory.shortage_told()
def build(config: Config, world: World, run: Path) -> Parts:
    """Make everything that the loop needs.

    Raises:
        UserError: what is asked for is missing, broken or does not fit together.
    """
    if config.strategy.kind == "zero" and config.train.precision == "fp16" and world.device.type == "cpu":
        raise UserError("train.precision=fp16 under ZeRO needs a GPU: choose bf16 or fp32, or strategy=ddp")
    notices: list[str] = []
    micro_batch, accumulation = batch_sizes(config, world)
    data = open_data(config, micro_batch * world.size)
    if config.validation.every and config.validation.samples and not data.held_out:
        notices.append("no sample is held out, so there is no held-out loss: every bucket has fewer than ten")
    notices += left_out(data) + fetched_again(data, world.size)
    decoder: list[Autoencoder | None] = []  # on rank 0 alone: it is not sent to the others
    world.on_main(lambda: decoder.append(_decoder(config, data, notices)))
    if config.model.pretrained is not None:
        world.on_main(lambda: notices.extend(_trained_otherwise(config)))
    unet, conditioner = _conditioned(config, world, run, data)
    text = next((part for part in conditioner.modules() if isinstance(part, Text)), None)
    train_text = text is not None and text.trained
    if config.model.train_text_encoder and text is None:
        raise UserError("model.train_text_encoder=true: this model has no text encoder; leave it out")
    _check_fit(config, unet, text, data)
    data = with_condition(data, conditioner, config, micro_batch * world.size)
    if text is not None and config.data.text_states and not train_text:
        data = with_text_states(data, text, notices)
    if config.sample.prompts is not None and conditioner.asks != ("prompt",):
        notices.append(f"sample.prompts are not used: task={config.task.name} draws what held-out samples say")

    pretrained: str | None = None
    if config.model.pretrained is not None:
        whole = {"unet": unet, **conditioner.parts()}
        named = {f"{part}.{name}": p for part, model in whole.items() for name, p in model.named_parameters()}
        pretrained = world.on_main(lambda: weights_digest(named))
    unet.requires_grad_(config.adapter.kind == "full")
    adapted: dict[str, nn.Module] = {"unet": unet, **(text.parts() if text is not None and train_text else {})}
    if text is not None:
        text.requires_grad_(train_text and config.adapter.kind == "full")
    if config.adapter.kind == "lora":
        ranks = {part: int(rank) for part, rank in flat(config.adapter.ranks).items()}
        every = [name for model in adapted.values() for name, _ in model.named_modules()]
        require_parts("adapter.ranks", ranks, every)
        for name, part in adapted.items():
            add_lora(
                part,
                config.adapter.rank,
                config.adapter.alpha,
                dropout=config.adapter.dropout,
                ranks=ranks,
                rank_stabilized=config.adapter.rank_stabilized,
                dora=config.adapter.dora,
                target_modules=config.adapter.targets if part is unet else TEXT_TARGETS,
                seed=fold(config.seed, f"{name} lora"),
            )
    for unused in text.unused() if text is not None else []:
        unused.requires_grad_(False)
    if config.model.gradient_checkpointing:
        for part in adapted.values():
            enable_gradient_checkpointing(part)
    is_fast = config.model.fast and fast.available(world.device)
    if is_fast and (missing := fast.missing()):
        notices.append(f"model.fast needs {missing}, which is not here: the U-Net runs as diffusers wrote it")
        is_fast = False
    channels_last = config.model.channels_last
    if channels_last is None:
        # On a GPU eager norms return NCHW, and the copies back cost more than the convolutions gain.
        gains = is_fast or world.device.type == "cpu"
        channels_last = gains and config.optim.kind not in ORDERED and not config.adapter.dora
    if channels_last and config.strategy.kind == "ddp":
        unet.to(memory_format=torch.channels_last)
    elif channels_last:
        store_channels_last(unet)
    if is_fast:
        fast.make_fast(unet)

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
    strategy = _strategy(config, world, model, micro_batch, accumulation, is_fast=is_fast)
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
    return Parts(
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
    )


def _check_fit(config: Config, unet: UNet2DConditionModel, text: Text | None, data: Data) -> None:
    encoder = data.encoder
    if unet.config.out_channels != encoder.channels:
        raise UserError(
            f"the U-Net makes {unet.config.out_channels} channels, the shards hold latents of {encoder.channels}: "
            "choose a model for these latents or encode with another autoencoder"
        )
    width = context_width(unet.config)
    if text is not None and width != text.width:
        raise UserError(
            f"the U-Net's cross_attention_dim is {width}, the text encoder's hidden_size {text.width}: they must "
            "be equal"
        )
    multiple = pixel_multiple(unet, encoder.downsample)
    if config.sample.every:
        height, width = data.largest_bucket
        sample = config.sample
        height = height if sample.height is None else sample.height
        check_size(height, width if sample.width is None else sample.width, multiple)
    for height, width in data.buckets:
        if height % multiple or width % multiple:
            raise UserError(
                f"pictures of {height}x{width} px do not fit this U-Net: sides must be multiples of {multiple}; "
                "encode with another --size"
            )


def _strategy(
    config: Config, world: World, model: LatentDiffusion, micro_batch: int, accumulation: int, *, is_fast: bool
) -> Strategy:
    parameters = {
        name: {f"{name}.{key}": p for key, p in part.named_parameters() if p.requires_grad}
        for name, part in {"unet": model.unet, **model.conditioner.parts()}.items()
    }
    groups = _groups(config, parameters)
    names = ("kind", "beta1", "beta2", "eps", "weight_decay", "d0", "d_coef")
    common: dict[str, Any] = {
        "optimizer": OptimizerSettings(**{name: getattr(config.optim, name) for name in names}),
        "max_grad_norm": config.optim.max_grad_norm,
        "precision": precision(config.train.precision, world.device),
    }
    graphs = is_fast and config.model.graphs
    if config.strategy.kind == "ddp":
        casts_once = is_fast and accumulation > 1 and config.adapter.kind == "full"  # an adapter's weights are few
        return DataParallel(world, model, groups, **common, graphs=graphs, casts_once=casts_once)
    return ZeRO(
        world,
        model,
        groups,
        **common,
        stage=config.strategy.stage,
        offload=config.strategy.offload != "none",
        offload_folder=None if config.strategy.offload_path is None else Path(config.strategy.offload_path),
        micro_batch=micro_batch,
        accumulation=accumulation,
        graphs=graphs,
    )


def _groups(config: Config, parameters: dict[str, dict[str, nn.Parameter]]) -> list[ParamGroup]:
    """Parameters of a component that have one learning rate."""
    text_lr, own = config.optim.text_encoder_lr, flat(config.optim.lr_ratios)
    require_parts("optim.lr_ratios", own, [name for named in parameters.values() for name in named])
    groups: list[ParamGroup] = []
    for component, named in parameters.items():
        is_text = component.startswith("text_encoder")
        usual = text_lr / config.optim.lr if is_text and text_lr is not None else 1.0
        by_ratio: dict[float, dict[str, nn.Parameter]] = {}
        for name, parameter in named.items():
            by_ratio.setdefault(own.get(part_of(name, own) or "", usual), {})[name] = parameter
        groups += [ParamGroup(component, some, ratio) for ratio, some in sorted(by_ratio.items(), reverse=True)]
    return groups
