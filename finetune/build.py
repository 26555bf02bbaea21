"""Config to objects: the one place where names become things, and contradictions are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from finetune import UserError, diffusion, lr, tracking
from finetune.checkpoint import Checkpoints, Layout
from finetune.conditioning import TextConditioner
from finetune.config import Config, require, require_choice
from finetune.data.loader import Data, Samples, captions_of, hold_out, read_batch
from finetune.data.order import Order, Source
from finetune.data.shards import EMPTY_TEXT, Cache, ShardSet, is_remote, most_open, parse_npy
from finetune.distributed import AdamW, DataParallel, ParamGroup, Strategy, World, ZeRO
from finetune.ema import Average
from finetune.latents import LatentSpace
from finetune.loop import Parts
from finetune.models.adapters import TEXT_TARGETS, add_lora
from finetune.models.autoencoder import encoder_sha256, load_autoencoder
from finetune.models.components import scheduler_config
from finetune.models.text import (
    build_text_encoder,
    encode_text,
    load_text,
    load_tokenizer,
    save_tokenizer,
    text_encoder_sha256,
    tokenize,
    train_tokenizer,
)
from finetune.models.unet import build_unet, enable_gradient_checkpointing, load_unet, pixel_multiple
from finetune.objective import LatentDiffusion
from finetune.rng import fold
from finetune.sampling import check_size

_TOKENIZER_CAPTIONS = 200_000  # a vocabulary doesn't get better with more


def check(config: Config) -> None:
    """Refuse values out of range and contradictions, before anything is loaded.

    Raises:
        UserError: names the key, its value and what it may be.
    """
    schedule = config.model.scheduler
    require_choice(
        {
            "adapter.kind": (config.adapter.kind, ("full", "lora")),
            "task.name": (config.task.name, ("text_to_image",)),
            "objective.prediction": (config.objective.prediction, diffusion.PREDICTIONS),
            "optim.schedule": (config.optim.schedule, lr.SCHEDULES),
            "strategy.kind": (config.strategy.kind, ("ddp", "zero")),
            "train.precision": (config.train.precision, ("auto", "fp32", "bf16", "fp16")),
            "tracker.mode": (config.tracker.mode, tracking.MODES),
            "model.scheduler.beta_schedule": (config.model.scheduler.beta_schedule, diffusion.BETA_SCHEDULES),
        }
    )
    positive = {
        "train.steps": config.train.steps,
        "train.global_batch": config.train.global_batch,
        "train.micro_batch": 1 if config.train.micro_batch is None else config.train.micro_batch,
        "optim.lr": config.optim.lr,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "tracker.every": config.tracker.every,
        "validation.timesteps": config.validation.timesteps,
        "sample.steps": config.sample.steps,
        "data.readers": config.data.readers,
        "data.prefetch": config.data.prefetch,
        "data.shuffle_window": config.data.shuffle_window,
        "data.lanes": config.data.lanes,
        "data.cache_gib": 1 if config.data.cache_gib is None else config.data.cache_gib,
        "train.threads": 1 if config.train.threads is None else config.train.threads,
        "optim.eps": config.optim.eps,
        "ema.halflife_images": config.ema.halflife_images,
        "model.scheduler.num_train_timesteps": schedule.num_train_timesteps,
    }
    require(positive, lambda value: value > 0, "must be greater than 0")
    not_negative = {
        "optim.warmup_images": config.optim.warmup_images,
        "optim.weight_decay": config.optim.weight_decay,
        "optim.max_grad_norm": config.optim.max_grad_norm,
        "sample.every": config.sample.every,
        "validation.every": config.validation.every,
        "validation.samples": config.validation.samples,
        "optim.text_encoder_lr": config.optim.text_encoder_lr or 0.0,
        "optim.final_lr_ratio": config.optim.final_lr_ratio,
        "ema.rampup_ratio": config.ema.rampup_ratio,
    }
    require(not_negative, lambda value: value >= 0, "must not be negative")
    betas = {"optim.beta1": config.optim.beta1, "optim.beta2": config.optim.beta2}
    require(betas, lambda value: 0 <= value < 1, "must be at least 0 and below 1")
    noise = {"model.scheduler.beta_start": schedule.beta_start, "model.scheduler.beta_end": schedule.beta_end}
    require(noise, lambda value: 0 < value < 1, "is a variance: between 0 and 1")
    seeds = {"seed": config.seed, "sample.seed": config.sample.seed}
    require(seeds, lambda value: 0 <= value < 2**63, "must be at least 0 and below 2^63")
    if config.sample.steps > schedule.num_train_timesteps:
        raise UserError(
            f"sample.steps={config.sample.steps} is more than the noise schedule's {schedule.num_train_timesteps}"
        )
    if not 0 <= config.task.caption_dropout <= 1:
        raise UserError(f"task.caption_dropout={config.task.caption_dropout} is a probability: 0 to 1")
    if config.sample.every and config.sample.prompts is not None and not config.sample.prompts:
        raise UserError(
            "sample.prompts is empty: give prompts, leave it out for held-out captions, or sample.every=0"
        )
    if config.strategy.kind == "zero" and config.strategy.stage not in (1, 2, 3):
        raise UserError(f"strategy.stage={config.strategy.stage} is not known: choose 1, 2 or 3")
    if config.adapter.kind == "lora" and config.model.pretrained is None:
        raise UserError("adapter=lora adapts a pretrained model: set model.pretrained, or use adapter=full")
    if config.model.pretrained is None and not config.model.unet:
        raise UserError("no model: set model.pretrained, or choose a group such as model=small")


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
            f"train.global_batch={total} cannot be shared by {size} processes: take a multiple of {size}"
        )
    micro = min(config.train.micro_batch or share, share)
    if share % micro:
        raise UserError(
            f"train.micro_batch={micro} does not divide the {share} samples of each rank "
            f"(train.global_batch={total} over {size} processes)"
        )
    return micro, share // micro


def open_data(config: Config, held_out_batch: int) -> Data:
    """Open the shards, fix the order of their samples, and read held-out ones in batches of `held_out_batch`.

    Raises:
        UserError: no latent shards there, sets that don't go together, or too few samples.
    """
    named = _sources(config)
    cache = None
    if any(is_remote(root) for root, _ in named.values()):
        gib = config.data.cache_gib
        cache = Cache(config.data.cache_dir, None if gib is None else int(gib * 2**30))
    most = most_open(len(named))
    opened = {name: _open_latents(root, cache, most) for name, (root, _) in named.items()}
    first, *others = opened
    for name in others:
        _check_same_encoder(first, opened[first], name, opened[name])
    sizes = [shards.bucket_sizes for shards in opened.values()]
    buckets = sorted(set().union(*sizes))
    held = hold_out([each.get(bucket, 0) for each in sizes for bucket in buckets], config.validation.samples)
    sources: list[Samples] = []
    for shards in opened.values():
        mine, held = held[: len(buckets)], held[len(buckets) :]
        sources.append(Samples(shards, buckets, mine, first_id=sum(len(each.shards) for each in sources)))
    order = Order(
        [Source(each.sizes, weight) for each, (_, weight) in zip(sources, named.values(), strict=True)],
        seed=fold(config.seed, "order"),
        global_batch=config.train.global_batch,
        shuffle=config.data.shuffle,
        lanes=config.data.lanes,
        window=config.data.shuffle_window,
    )
    held_out = [
        read_batch(sources, np.full(len(piece), number), piece, bucket, piece.astype(np.int64), seed=0)
        for number, each in enumerate(sources)
        for index, bucket in enumerate(buckets)
        for ids in [each.held_out_ids(index)]
        for piece in np.split(ids, range(held_out_batch, len(ids), held_out_batch))
        if len(piece)
    ]
    encoder = opened[first].manifest.encoder
    assert encoder is not None
    return Data(sources, buckets, order, held_out, LatentSpace(encoder.scale, encoder.shift))


def _sources(config: Config) -> dict[str, tuple[str, float]]:
    """(folder or URL of the shards, weight) of each source, by name."""
    if config.data.shards is not None:
        if config.data.sources:
            raise UserError("data.shards and data.sources are both given: put the first among data.sources")
        return {"data.shards": (config.data.shards, 1.0)}
    if not config.data.sources:
        raise UserError("no data: give data.shards=FOLDER, or several as data.sources.NAME.shards=FOLDER")
    sources = {}
    for name, given in config.data.sources.items():
        key = f"data.sources.{name}"
        if not isinstance(given, dict) or not isinstance(given.get("shards"), str):
            raise UserError(f"no value for {key}.shards: give {key}.shards=FOLDER")
        if unknown := given.keys() - {"shards", "weight"}:
            raise UserError(f"unknown key {key}.{min(unknown)}: a source has shards and weight")
        weight = given.get("weight", 1.0)
        if not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise UserError(f"{key}.weight={weight} must be a number greater than 0; leave out what is not wanted")
        sources[name] = (given["shards"], float(weight))
    return sources


def _open_latents(root: str, cache: Cache | None, max_open: int) -> ShardSet:
    shards = ShardSet.open(root, cache=cache, max_open=max_open)
    if shards.manifest.kind != "latents":
        raise UserError(
            f"{root} holds pictures, not latents: run "
            f"`data-tools encode {root} --vae MODEL --out LATENTS` and train on LATENTS"
        )
    return shards


def _check_same_encoder(first: str, one: ShardSet, name: str, other: ShardSet) -> None:
    """Refuse sets whose latents mean different things."""
    for field in ("sha256", "scale", "shift", "channels", "downsample"):
        said, differs = (getattr(shards.manifest.encoder, field) for shards in (one, other))
        if said != differs:
            short = [str(value)[:12] for value in (said, differs)]
            raise UserError(
                f"sources {first} and {name} are not of one autoencoder: {field} is {short[0]} and {short[1]}; "
                "encode both with the same VAE"
            )


def captions(data: Data) -> Iterator[str]:
    """All captions, source by source in the order of the manifests."""
    for source in data.sources:
        for sample_id in range(len(source.shards)):
            yield from captions_of(source.shards.read_json(sample_id))


def _text(config: Config, world: World, run: Path, data: Data) -> tuple[Any, nn.Module, bool]:
    """Tokenizer, text encoder, and whether it is trained."""
    if config.model.pretrained is not None:
        tokenizer, encoder = load_text(config.model.pretrained, config.model.revision)
        return tokenizer, encoder, config.model.train_text_encoder
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
        seed=fold(config.seed, "text encoder"),
    )
    return tokenizer, encoder, True


def _with_text_states(data: Data, length: int, encoder: nn.Module, notices: list[str]) -> Data:
    """The same data, whose batches bring the states of their captions where all sources have those of `encoder`."""
    infos = [source.shards.manifest.text for source in data.sources]
    if not any(infos):
        return data
    sha256 = text_encoder_sha256(encoder)  # type: ignore[arg-type]
    for source, info in zip(data.sources, infos, strict=True):
        if info is None or info.sha256 != sha256 or info.length != length:
            what = "has none" if info is None else f"has those of {info.source}"
            notices.append(
                f"cached states of captions are not used: {source.shards.root} {what}, "
                "not of this model's text encoder; captions are encoded at each visit"
            )
            return data
    shards = data.sources[0].shards
    empty_LD = parse_npy(shards.read_file(EMPTY_TEXT))
    info = infos[0]
    assert info is not None
    if empty_LD is None or empty_LD.dtype != np.float16 or empty_LD.shape != (info.length, info.width):
        raise UserError(
            f"{shards.root}/{EMPTY_TEXT} is no float16 array {[info.length, info.width]}; encode again, "
            "or give data.text_states=false"
        )
    return replace(data, text_states=True, empty_text=torch.from_numpy(empty_LD))


def _decoder(config: Config, data: Data, notices: list[str]) -> AutoencoderKL | None:
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


def build(config: Config, world: World, run: Path) -> Parts:
    """Make everything that the loop needs.

    Raises:
        UserError: what is asked for is missing, broken or does not fit together.
    """
    notices: list[str] = []
    micro_batch, accumulation = batch_sizes(config, world)
    data = open_data(config, micro_batch * world.size)
    if config.validation.every and config.validation.samples and not data.held_out:
        notices.append("no sample is held out, so there is no held-out loss: every bucket has fewer than ten")
    notices += _left_out(data) + _fetched_again(data, world.size)
    decoder: list[AutoencoderKL | None] = []  # on rank 0 alone: it is not sent to the others
    world.on_main(lambda: decoder.append(_decoder(config, data, notices)))
    if config.model.pretrained is not None:
        unet = load_unet(config.model.pretrained, revision=config.model.revision)
    else:
        unet = build_unet(config.model.unet, seed=fold(config.seed, "unet"))
    tokenizer, text_encoder, train_text = _text(config, world, run, data)
    _check_fit(config, unet, text_encoder, data)
    if config.data.text_states and not train_text:
        data = _with_text_states(data, tokenizer.model_max_length, text_encoder, notices)

    unet.requires_grad_(config.adapter.kind == "full")
    text_encoder.requires_grad_(train_text and config.adapter.kind == "full")
    if config.adapter.kind == "lora":
        for part, targets, name in (
            (unet, config.adapter.targets, "unet"),
            (text_encoder, TEXT_TARGETS, "text_encoder"),
        ):
            if part is unet or train_text:
                add_lora(
                    part,
                    config.adapter.rank,
                    config.adapter.alpha,
                    dropout=config.adapter.dropout,
                    target_modules=targets,
                    seed=fold(config.seed, f"{name} lora"),
                )
    if config.model.gradient_checkpointing:
        enable_gradient_checkpointing(unet)
        if train_text:
            enable_gradient_checkpointing(text_encoder)
    channels_last = config.model.channels_last
    if channels_last is None:
        # On a GPU eager norms return NCHW, and the copies back cost more than the convolutions gain.
        channels_last = world.device.type == "cpu"
    if channels_last and config.strategy.kind == "ddp":  # DeepSpeed's flat buffers would lose the layout
        unet.to(memory_format=torch.channels_last)

    schedule = config.model.scheduler
    betas_T = diffusion.betas(
        schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps, schedule.beta_schedule
    )
    model = LatentDiffusion(
        unet,
        TextConditioner(
            partial(tokenize, tokenizer),
            partial(encode_text, text_encoder, pad_id=tokenizer.pad_token_id),
            text_encoder,
            trained=train_text,
            empty_states_LD=data.empty_text,
        ),
        alphas_cumprod_T=diffusion.alphas_cumprod(betas_T).to(world.device),
        space=data.space,
        prediction=config.objective.prediction,
        seed=config.seed,
    )
    model.train()
    strategy = _strategy(config, world, model, micro_batch, accumulation)
    average = None
    if config.ema.enabled:
        weights = [shard.master for shard in strategy.shards]
        average = Average.starting_at(weights, config.ema.halflife_images, config.ema.rampup_ratio)
    layout = Layout(
        {"unet": unet, "text_encoder": text_encoder},
        config.adapter.alpha if config.adapter.kind == "lora" else None,
    )
    checkpoints = Checkpoints(run, layout, config.checkpoint.keep)
    return Parts(
        data,
        model,
        strategy,
        average,
        checkpoints,
        micro_batch,
        accumulation,
        scheduler_config(asdict(schedule), config.objective.prediction),
        decoder[0] if decoder else None,
        notices,
    )


def _left_out(data: Data) -> list[str]:
    """What is not trained on, or not in every epoch."""
    notices = []
    order = data.order
    never_SK = order.left_out == order.sizes
    if small := {
        bucket: int(count)
        for bucket, count in zip(data.buckets, np.where(never_SK, order.sizes, 0).sum(axis=0), strict=True)
        if count
    }:
        named = ", ".join(f"{h}x{w} ({count})" for (h, w), count in list(small.items())[:8])
        notices.append(
            f"{sum(small.values())} samples are never trained on: {len(small)} buckets are smaller than a global "
            f"batch of {order.global_batch}: {named}{', ...' if len(small) > 8 else ''}; "
            "merge them with `data-tools encode --min-bucket`"
        )
    if rest := int(order.left_out[~never_SK].sum()):
        notices.append(
            f"each epoch leaves out {rest} of {int(order.sizes.sum())} samples, others each time: "
            f"the rest of a bucket that fills no global batch of {order.global_batch}"
        )
    return notices


def _fetched_again(data: Data, ranks: int) -> list[str]:
    """Whether the cache of remote shards is too small for those that are read by turns."""
    cache = next((source.shards.cache for source in data.sources if source.shards.cache is not None), None)
    if cache is None:
        return []
    nodes = max(1, ranks // cache.sharers)
    needed = count = 0.0
    for source, shards_K in zip(data.sources, data.order.shards_at_once(nodes).tolist(), strict=True):
        if source.shards.remote:
            infos = source.shards.manifest.shards
            for bucket, shards in zip(data.buckets, shards_K, strict=True):
                numbers = source.shards.bucket_shards(bucket).tolist()
                count += shards
                needed += shards * sum(infos[number].bytes for number in numbers) / max(1, len(numbers))
    if needed <= cache.max_bytes:
        return []
    return [
        f"each node reads about {count:.0f} remote shards by turns ({needed / 2**30:.1f} GiB) and the cache holds "
        f"{cache.max_bytes / 2**30:.1f} GiB: most will be fetched many times an epoch; raise data.cache_gib, or "
        f"lower data.lanes={data.order.lanes} to the most nodes that you will use, and data.shuffle_window"
    ]


def _check_fit(config: Config, unet: Any, text_encoder: Any, data: Data) -> None:
    encoder = data.encoder
    if unet.config.in_channels != encoder.channels:
        raise UserError(
            f"the U-Net takes {unet.config.in_channels} channels, the shards hold latents of {encoder.channels}: "
            "choose a model for these latents or encode with another autoencoder"
        )
    if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
        raise UserError(
            f"the U-Net's cross_attention_dim is {unet.config.cross_attention_dim}, the text encoder's hidden_size "
            f"{text_encoder.config.hidden_size}: they must be equal"
        )
    multiple = pixel_multiple(unet, encoder.downsample)
    if config.sample.every:
        height, width = data.largest_bucket
        check_size(config.sample.height or height, config.sample.width or width, multiple)
    for height, width in data.buckets:
        if height % multiple or width % multiple:
            raise UserError(
                f"pictures of {height}x{width} px do not fit this U-Net: sides must be multiples of {multiple}; "
                "encode with another --size"
            )


def _strategy(
    config: Config, world: World, model: LatentDiffusion, micro_batch: int, accumulation: int
) -> Strategy:
    parameters: dict[str, dict[str, nn.Parameter]] = {
        "unet": {f"unet.{n}": p for n, p in model.unet.named_parameters() if p.requires_grad},
        "text_encoder": {
            f"text_encoder.{n}": p for n, p in model.conditioner.encoder.named_parameters() if p.requires_grad
        },
    }
    text_lr = config.optim.text_encoder_lr
    ratios = {"unet": 1.0, "text_encoder": 1.0 if text_lr is None else text_lr / config.optim.lr}
    groups = [ParamGroup(name, named, ratios[name]) for name, named in parameters.items() if named]
    adamw = AdamW(config.optim.beta1, config.optim.beta2, config.optim.eps, config.optim.weight_decay)
    common: dict[str, Any] = {
        "adamw": adamw,
        "max_grad_norm": config.optim.max_grad_norm,
        "precision": precision(config.train.precision, world.device),
    }
    if config.strategy.kind == "ddp":
        return DataParallel(world, model, groups, **common)
    return ZeRO(
        world,
        model,
        groups,
        **common,
        stage=config.strategy.stage,
        offload_optimizer=config.strategy.offload_optimizer,
        offload_parameters=config.strategy.offload_parameters,
        micro_batch=micro_batch,
        accumulation=accumulation,
    )


def depends_on(config: Config, data: Data) -> dict[str, Any]:
    """What a run must keep to be the same run when it goes on, by config key."""
    adapter = (
        {
            "rank": config.adapter.rank,
            "alpha": config.adapter.alpha,
            "targets": sorted(config.adapter.targets),
        }
        if config.adapter.kind == "lora"
        else {}
    )
    return {
        "seed": config.seed,
        "train.global_batch": config.train.global_batch,
        "validation.samples": config.validation.samples,
        "data.shuffle": config.data.shuffle,
        "data.shuffle_window": config.data.shuffle_window,
        "data.lanes": config.data.lanes,
        "data.sources (manifests' sha256)": [source.shards.manifest.sha256 for source in data.sources],
        "data.sources (weights)": data.order.weights.tolist(),
        "adapter.kind": config.adapter.kind,
        **{f"adapter.{name}": value for name, value in adapter.items()},
        "model.pretrained": config.model.pretrained,
        **{f"model.unet.{name}": value for name, value in config.model.unet.items()},
        **{f"model.text_encoder.{name}": value for name, value in asdict(config.model.text_encoder).items()},
        "model.train_text_encoder": config.model.train_text_encoder,
        **{f"model.scheduler.{name}": value for name, value in asdict(config.model.scheduler).items()},
        "objective.prediction": config.objective.prediction,
    }
