"""The model of a run: U-Net and conditioner, what of them is trained, and the decoder of sample grids."""

from __future__ import annotations

import shutil
import socket
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from finetune import UserError, diffusion, tasks
from finetune.build.data import captions, classes
from finetune.components import folder_beside, load_own_parts, own_parts, require_told, space_of
from finetune.conditioning import Conditioner, Given
from finetune.conditioning.text import Text
from finetune.config import Config, ModelConfig, SchedulerConfig
from finetune.data.loader import Data
from finetune.distributed import ORDERED, World
from finetune.models import fast
from finetune.models.adapters import TEXT_TARGETS, add_lora, targeted
from finetune.models.autoencoder import Autoencoder, encoder_sha256, load_autoencoder
from finetune.models.layout import store_channels_last
from finetune.models.parts import flat, require_parts
from finetune.models.schedulers import differences, load_scheduler
from finetune.models.sources import has_part
from finetune.models.text import build_text_encoder, load_tokenizer, save_tokenizer, train_tokenizer
from finetune.models.unet import (
    build_unet,
    context_width,
    enable_gradient_checkpointing,
    load_unet,
    pad_input,
    pixel_multiple,
)
from finetune.rng import fold
from finetune.runs import complete_checkpoints
from finetune.sampling import check_size
from finetune.tasks import Task
from finetune.tasks.text_to_image import caption_conditioner, load_captions

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
        if folder.exists() and complete_checkpoints(run):
            return
        # What a start that was refused has left is of other settings, maybe.
        all_captions = islice(captions(data), _TOKENIZER_CAPTIONS)
        made = train_tokenizer(all_captions, settings.vocab_size, settings.max_length)
        temporary = folder.with_name(".tokenizer.tmp")
        save_tokenizer(made, temporary)
        shutil.rmtree(folder, ignore_errors=True)
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


def conditioned(
    config: Config, world: World, run: Path, data: Data, notices: list[str]
) -> tuple[UNet2DConditionModel, Conditioner, Task]:
    """U-Net and conditioner, made for each other, and what task that is.

    Raises:
        UserError: model, task and data contradict each other.
    """
    model, task, channels = config.model, config.task, data.encoder.channels
    unet = load_unet(model.pretrained, revision=model.revision) if model.pretrained is not None else None
    for name, value in model.unet.items() if unet is not None else ():
        has = unet.config.get(name)  # type: ignore[union-attr]
        if value != (list(has) if isinstance(has, tuple) else has):
            raise UserError(
                f"model.unet.{name}={value} has no effect: the U-Net of model.pretrained has {has}; leave it out"
            )
    width = context_width(model.unet if unet is None else unet.config)
    has_text = width is not None and (
        model.pretrained is None or has_part(model.pretrained, "text_encoder", model.revision)
    )
    given = Given(
        width=width,
        latent_channels=channels,
        downsample=data.encoder.downsample,
        space=data.space,
        classes=classes(data) if tasks.reads_labels(task.name) else (),
        text=(lambda: _text(config, world, run, data)) if has_text or task.name == "text_to_image" else None,
        embedded_labels=int((model.unet if unet is None else unet.config).get("num_class_embeds") or 0),
        seed=fold(config.seed, "conditioner"),
    )
    conditioner = tasks.make(task.name, task.options, given)
    made = Task(task.name, asdict(tasks.options(task.name, task.options)), list(given.classes))
    _take_up(model, made, conditioner, notices)
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
    require_told(unet, conditioner, task.name)
    return unet, conditioner, made


def _take_up(model: ModelConfig, task: Task, conditioner: Conditioner, notices: list[str]) -> None:
    """Load what the pretrained model learnt of its condition, where it is an export of the same task."""
    if model.pretrained is None or not own_parts(conditioner):
        return
    folder = folder_beside(model.pretrained, model.revision)
    learnt = None if folder is None else Task.load(folder)
    if folder is None or learnt is None or learnt.name != task.name:
        return
    learnt_options = asdict(tasks.options(learnt.name, learnt.options))
    for what, is_same in (("options", learnt_options == task.options), ("classes", learnt.classes == task.classes)):
        if not is_same:
            notices.append(
                f"{model.pretrained} has other {what} of task={task.name}: what it learnt of its conditions is "
                "left out"
            )
            return
    load_own_parts(conditioner, folder)


def check_fit(config: Config, unet: UNet2DConditionModel, text: Text | None, data: Data) -> None:
    """Refuse a model that does not fit the shards, or its own text encoder.

    Raises:
        UserError: says which sizes are apart.
    """
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


def adapt(config: Config, unet: UNet2DConditionModel, text: Text | None) -> dict[str, nn.Module]:
    """Let what is trained require gradients, with adapters where they are trained; these parts, by name."""
    train_text = text is not None and text.trained
    text_lr = config.optim.text_encoder_lr
    if text_lr is not None and not train_text:
        raise UserError(
            f"optim.text_encoder_lr={text_lr:g} has no effect, no text encoder is trained: set "
            f"it to null{'' if text is None else ', or model.train_text_encoder=true'}"
        )
    unet.requires_grad_(config.adapter.kind == "full")
    adapted: dict[str, nn.Module] = {"unet": unet, **(text.parts() if text is not None and train_text else {})}
    if text is not None:
        text.requires_grad_(train_text and config.adapter.kind == "full")
    if config.adapter.kind == "lora":
        ranks = {part: int(rank) for part, rank in flat(config.adapter.ranks).items()}
        targets = {name: config.adapter.targets if part is unet else TEXT_TARGETS for name, part in adapted.items()}
        every = [layer for part in adapted.values() for layer, _ in part.named_modules()]
        require_parts("adapter.ranks", ranks, every)
        taken = [layer for name, part in adapted.items() for layer in targeted(part, targets[name])]
        require_parts("adapter.ranks", [part for part, rank in ranks.items() if rank], taken)
        for name, part in adapted.items():
            add_lora(
                part,
                config.adapter.rank,
                config.adapter.alpha,
                dropout=config.adapter.dropout,
                ranks=ranks,
                rank_stabilized=config.adapter.rank_stabilized,
                dora=config.adapter.dora,
                target_modules=targets[name],
                seed=fold(config.seed, f"{name} lora"),
            )
    for unused in text.unused() if text is not None else []:
        unused.requires_grad_(False)
    if config.model.gradient_checkpointing:
        for part in adapted.values():
            enable_gradient_checkpointing(part)
    return adapted


def make_fast(config: Config, world: World, unet: UNet2DConditionModel, notices: list[str]) -> bool:
    """Lay weights out as they are fastest, and use our kernels where all ranks can: whether they do. Collective."""
    is_fast = config.model.fast and _can_be_fast(world, notices)
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
    return is_fast


def _can_be_fast(world: World, notices: list[str]) -> bool:
    """Whether our kernels run on all ranks, which have to do the same; what one lacks is noted. Collective."""
    is_available = fast.available(world.device)
    of_ranks = world.gather((is_available, fast.missing() if is_available else None, socket.gethostname()))
    if not any(available for available, _, _ in of_ranks):
        return False
    for rank, (available, missing, host) in enumerate(of_ranks):
        lacks = missing if available else "GPUs from NVIDIA's Ampere on"
        if lacks is not None:
            where = "here" if world.size == 1 else f"on {host} (rank {rank})"
            notices.append(f"model.fast needs {lacks}, which is not {where}: the U-Net runs as diffusers wrote it")
            return False
    return True


def load_decoder(config: Config, data: Data, notices: list[str]) -> Autoencoder | None:
    """The autoencoder for sample grids, proven to be the one that made the latents.

    Raises:
        UserError: another autoencoder made them, or a named one can't be loaded; or they are scaled otherwise than
            those of the pretrained model.
    """
    named = config.model.vae or config.model.pretrained
    shards = data.sources[0].shards
    try:
        source = named or data.encoder.locate(shards.root)
        vae = load_autoencoder(source, revision=None if config.model.vae else config.model.revision)
    except UserError as error:
        if config.model.vae is not None:
            raise
        if named is not None:
            why = str(error).removeprefix(f"no autoencoder at {named}: ")
            raise UserError(
                f"model.pretrained={named}: no autoencoder there ({why}): give a diffusers pipeline, a hub id or a "
                "single file, or name an autoencoder with model.vae=..."
            ) from error
        remedy = "" if "model.vae" in str(error) else "; name the autoencoder with model.vae=..."
        notices.append(f"no sample grids: {error}{remedy}")
        return None
    shards.manifest.require_encoder(encoder_sha256(vae), str(source))
    if config.model.pretrained is not None:
        _require_scale(config.model, data, vae)
    return vae


def _require_scale(model: ModelConfig, data: Data, decoder: Autoencoder) -> None:
    """Refuse latents that are scaled otherwise than those that the pretrained U-Net knows.

    A file of an autoencoder alone does not say its scale: `encode` takes Stable Diffusion 1.x's.
    """
    try:
        own = decoder if model.vae is None else load_autoencoder(str(model.pretrained), revision=model.revision)
    except UserError:  # a U-Net alone
        return
    wanted, found = space_of(own), data.space
    if wanted != found and encoder_sha256(own) == data.encoder.sha256:
        root = data.sources[0].shards.root
        raise UserError(
            f"the latents in {root} have scale {found.scale:g} and shift {found.shift:g}, those of "
            f"{model.pretrained} {wanted.scale:g} and {wanted.shift:g}: encode with --vae {model.pretrained}, "
            f'or write "scale": {wanted.scale!r} and "shift": {wanted.shift!r} into manifest.json there: '
            "latents are kept unscaled"
        )


def trained_otherwise(config: Config) -> list[str]:
    """A notice if the pretrained model's own scheduler says other than the run's settings."""
    try:
        own = load_scheduler(config.model.pretrained or "", config.model.revision)
    except UserError:  # a U-Net alone is trained as well
        return []
    found = differences(own, asdict(config.model.scheduler), config.objective.prediction)
    return [f"{config.model.pretrained} {'; '.join(found)}: it will have to learn this anew"] if found else []
