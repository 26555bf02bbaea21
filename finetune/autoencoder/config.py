"""The schema of `finetune autoencoder`: typed dataclasses with their defaults, composed by Hydra.

Defaults live here; `conf/autoencoder/` holds choices of `model` and `experiment`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune import UserError
from finetune.config import CheckpointConfig, EmaConfig, RunConfig, conf_dir

GROUPS = ("model", "experiment")


@dataclass
class AutoencoderConfig:
    """The shape of diffusers' `AutoencoderKL`; the defaults are Stable Diffusion's f = 8.

    The downsampling factor f is 2^(number of entries in `block_out_channels` - 1).
    """

    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    initial_logvar: float = 0.0  # of the posterior at the start; below 0 the decoder meets less noise at first


@dataclass
class PicturesConfig:
    """Image shards, and what is done to a picture before the encoder sees it."""

    shards: str = MISSING
    size: int | None = None  # pixels: shorter side resized to it, centre cropped; null: as stored
    flip: bool = False  # mirror half of the pictures, drawn anew each time
    held_out: int = 64  # pictures kept out of training for PSNR and grids, at most a tenth of the set
    cache_gib: float = 2.0  # decoded pictures are kept in memory when all of them fit in this
    readers: int = 2  # threads that decode


@dataclass
class LossConfig:
    """Rombach et al. 2022 (arXiv 2112.10752), appendix G: L1 and a very light KL term."""

    kl_weight: float = 1e-6


@dataclass
class AdamWConfig:
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    schedule: str = "constant"  # constant | cosine
    warmup_images: int = 0
    final_lr_ratio: float = 0.0  # cosine ends at lr times this


@dataclass
class TrainConfig:
    steps: int = 10_000
    global_batch: int = 16
    precision: str = "fp32"  # fp32 | bf16 (autocast; the weights stay fp32)
    device: str = "auto"  # auto | cpu | cuda
    threads: int | None = None  # CPU threads; null: torch's choice
    channels_last: bool = True  # convolutions in NHWC


@dataclass
class GridConfig:
    every: int = 1000  # steps between two reconstruction grids; 0: only at the end
    pictures: int = 8


@dataclass
class LogConfig:
    every: int = 10  # steps between two lines of metrics


@dataclass
class LatentScaleConfig:
    pictures: int = 2048  # the latents' std is measured on up to so many training pictures


@dataclass
class Config:
    seed: int = 0
    run: RunConfig = field(default_factory=lambda: RunConfig(name="autoencoder"))
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    data: PicturesConfig = field(default_factory=PicturesConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: AdamWConfig = field(default_factory=AdamWConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sample: GridConfig = field(default_factory=GridConfig)
    tracker: LogConfig = field(default_factory=LogConfig)
    scale: LatentScaleConfig = field(default_factory=LatentScaleConfig)


def choices_dir() -> Path:
    return conf_dir() / "autoencoder"


def choices() -> dict[str, list[str]]:
    """Config groups of this command and their choices."""
    return {group: sorted(path.stem for path in (choices_dir() / group).glob("*.yaml")) for group in GROUPS}


def load(overrides: Sequence[str]) -> tuple[Config, DictConfig]:
    """Compose the config of a run from Hydra overrides (`model=kl_f4 train.steps=100`).

    Returns:
        The typed config and the same, resolved, for saving.

    Raises:
        UserError: an unknown key or choice, a value of the wrong type or out of range, a missing value.
    """
    _check_overrides(overrides)
    store = ConfigStore.instance()
    store.store(name="autoencoder_schema", node=Config)
    defaults = ["autoencoder_schema", {"model": "kl_f8"}, "_self_", {"experiment": None}]
    store.store(name="autoencoder", node={"defaults": defaults})
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(choices_dir()), version_base="1.3", job_name="autoencoder"):
            composed = compose("autoencoder", list(overrides))
        if missing := sorted(OmegaConf.missing_keys(composed)):
            raise UserError(f"no value for {', '.join(missing)}: give {missing[0]}=...")
        OmegaConf.resolve(composed)
        typed = OmegaConf.to_object(composed)
    except MissingConfigException as error:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        raise UserError(
            f"{group}={choice} is not known: choose one of {', '.join(choices().get(group, []))}"
        ) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from None
    assert isinstance(typed, Config)
    _check_values(typed)
    return typed, composed


def _check_overrides(overrides: Sequence[str]) -> None:
    known = {*_keys(Config), *GROUPS}
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise UserError(f"cannot read the override '{text}': {_one_line(error)}") from None
        key = override.key_or_group
        if override.is_sweep_override():
            raise UserError(f"'{text}' names several values: a run takes one")
        if key not in known and not key.startswith("hydra"):
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{nearest[0]}'?" if nearest else "see `finetune autoencoder --help`"
            raise UserError(f"unknown override '{key}': {hint}")


def _keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all values of a dataclass, its sections included."""
    instance = schema() if isinstance(schema, type) else schema
    for item in fields(instance):
        value = getattr(instance, item.name)
        yield prefix + item.name
        if is_dataclass(value):
            yield from _keys(value, f"{prefix}{item.name}.")


def defaults() -> list[tuple[str, Any]]:
    """(dotted key, default) of every value, for `--help`."""
    flat = []
    for key in _keys(Config):
        value: Any = Config()
        for part in key.split("."):
            value = getattr(value, part)
        if not is_dataclass(value):
            flat.append((key, value))
    return flat


def _check_values(config: Config) -> None:
    """Refuse what no run can use, before anything is read."""
    model = config.model
    positive = {
        "train.steps": config.train.steps,
        "train.global_batch": config.train.global_batch,
        "model.layers_per_block": model.layers_per_block,
        "model.latent_channels": model.latent_channels,
        "model.norm_num_groups": model.norm_num_groups,
        "data.readers": config.data.readers,
        "scale.pictures": config.scale.pictures,
        "tracker.every": config.tracker.every,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
    }
    for key, value in positive.items():
        if value < 1:
            raise UserError(f"{key}={value} must be at least 1")
    not_negative = {
        "loss.kl_weight": config.loss.kl_weight,
        "optim.max_grad_norm": config.optim.max_grad_norm,
        "optim.warmup_images": config.optim.warmup_images,
        "data.held_out": config.data.held_out,
        "sample.every": config.sample.every,
        "sample.pictures": config.sample.pictures,
    }
    for key, number in not_negative.items():
        if number < 0:
            raise UserError(f"{key}={number} must not be negative")
    if not config.optim.lr > 0:
        raise UserError(f"optim.lr={config.optim.lr} must be above 0")
    allowed = {
        "optim.schedule": (config.optim.schedule, ("constant", "cosine")),
        "train.precision": (config.train.precision, ("fp32", "bf16")),
        "train.device": (config.train.device, ("auto", "cpu", "cuda")),
        "checkpoint.resume": (config.checkpoint.resume, ("auto", "never")),
    }
    for key, (choice, known) in allowed.items():
        if choice not in known:
            raise UserError(f"{key}={choice} is not known: choose one of {', '.join(known)}")
    for channels in model.block_out_channels:
        if channels < 1 or channels % model.norm_num_groups:
            raise UserError(
                f"model.block_out_channels has {channels}, which model.norm_num_groups="
                f"{model.norm_num_groups} does not divide"
            )
    if not model.block_out_channels:
        raise UserError("model.block_out_channels is empty: give one width for each resolution")


def _one_line(error: Exception) -> str:
    """The message of a Hydra or OmegaConf error without its dump of types and environment hints."""
    cause = error.__cause__ if error.__cause__ and str(error.__cause__) != "None" else error
    noise = ("object_type", "reference_type", "Set the environment", "See https")
    lines = [line.strip() for line in str(cause).splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith(noise)).replace("full_key:", "key")
