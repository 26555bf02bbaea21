"""The schema of `finetune autoencoder`: typed dataclasses with their defaults, composed by Hydra.

Defaults live here; `conf/autoencoder/` holds choices of groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from omegaconf import MISSING, DictConfig

from finetune import UserError
from finetune.config import (
    CheckpointConfig,
    EmaConfig,
    OptimConfig,
    RunConfig,
    StrategyConfig,
    TrackerConfig,
    WatchConfig,
    compose,
    require,
)

NAME = FOLDER = "autoencoder"  # of the root file and of its folder in conf/


@dataclass
class AutoencoderConfig:
    """The shape of diffusers' `AutoencoderKL`; the defaults are Stable Diffusion's f = 8.

    With `codebook_size` it is that of a `VQModel`, the paper's other kind. The downsampling factor f is
    2^(number of entries in `block_out_channels` - 1). With `pretrained` the shape and the first weights are those
    of a given autoencoder: a folder, a hub id, or a single file.
    """

    pretrained: str | None = None  # a folder, file or hub id; null: built anew
    # Channels of each level; each level after the first halves height and width.
    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    layers_per_block: int = 2  # residual blocks of each level
    latent_channels: int = 4  # of a latent
    norm_num_groups: int = 32  # of group norm; they divide all channels
    mid_block_add_attention: bool = True  # between encoder and latents, and latents and decoder
    initial_logvar: float = 0.0  # of KL's posterior at the start; below 0 the decoder meets less noise at first
    codebook_size: int | None = None  # entries of a VQModel's codebook, latent_channels wide; null: AutoencoderKL


@dataclass
class PicturesConfig:
    """Image shards, and what is done to a picture before the encoder sees it."""

    shards: str = MISSING  # image shards: a folder or an address
    size: int | None = None  # pixels: shorter side resized to it, centre cropped; null: as stored
    flip: bool = False  # mirror half of the pictures, drawn anew each time
    held_out: int = 64  # pictures kept out of training for PSNR, SSIM and grids, at most a tenth of the set
    cache_gib: float = 2.0  # each process keeps decoded pictures in memory when all of them fit in this
    readers: int = 2  # threads that decode


@dataclass
class LossConfig:
    """Rombach et al. 2022 (arXiv 2112.10752), appendix G: L1, LPIPS, a very light KL term (or a codebook's), a
    patch discriminator.

    The discriminator has an AdamW of its own, with the eps, weight decay and clipping of `optim`.
    """

    kl_weight: float = 1e-6  # of KL
    # What a VQModel has in place of KL: what draws entries to latents, and, as a share of it, latents to entries
    # (van den Oord et al. 2017, arXiv 1711.00937, equation 3).
    codebook_weight: float = 1.0
    commitment: float = 0.25  # the share in codebook_weight
    lpips: str | None = None  # file of torchvision's VGG16 with the linear heads of LPIPS 0.1; null: no LPIPS
    lpips_heads: str | None = None  # file of the heads, when they are not in the other
    lpips_weight: float = 1.0  # of LPIPS
    # How hard a patch discriminator pulls on the last layer, as a share of the reconstruction; 0: none. Paper: 0.5.
    discriminator_weight: float = 0.0
    discriminator_start: int = 0  # steps without it at first; the paper's code waits for 50,001
    discriminator_layers: int = 3  # of stride 2: a logit sees 70 pixels with 3, 34 with 2, 16 with 1
    discriminator_width: int = 64  # channels of the first layer; they double up to eight times that
    discriminator_lr: float | None = None  # at the schedule's peak; null: optim.lr
    discriminator_beta1: float = 0.5  # of the discriminator's AdamW
    discriminator_beta2: float = 0.9  # of the discriminator's AdamW


@dataclass
class TrainConfig:
    steps: int = 10_000  # of the optimizer, in all
    global_batch: int = 16  # pictures a step, over all processes
    decoder_only: bool = False  # of model.pretrained: latents, scale and shift stay as they are
    precision: str = "fp32"  # fp32 | bf16 (autocast; the weights stay fp32)
    device: str = "auto"  # auto | cpu | cuda
    threads: int | None = None  # CPU threads; null: torch's choice
    channels_last: bool = True  # convolutions in NHWC


@dataclass
class GridConfig:
    every: int = 1000  # steps between two reconstruction grids; 0: only at the end
    pictures: int = 8  # in a grid


@dataclass
class LatentScaleConfig:
    pictures: int = 2048  # the latents' std is measured on up to so many training pictures (not by decoder_only)


@dataclass
class EvalConfig:
    # TorchScript file of the network whose features rFID compares; null: no rFID. finetune/autoencoder/features.py
    # says how to make that of Inception-v3.
    features: str | None = None


@dataclass
class Config:
    seed: int = 0  # of weights, order and all else that is drawn
    run: RunConfig = field(default_factory=lambda: RunConfig(name="autoencoder"))
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    data: PicturesConfig = field(default_factory=PicturesConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.0))
    ema: EmaConfig = field(default_factory=EmaConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sample: GridConfig = field(default_factory=GridConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    scale: LatentScaleConfig = field(default_factory=LatentScaleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def load(overrides: Sequence[str]) -> tuple[Config, DictConfig]:
    """Compose the config of a run from Hydra overrides (`model=kl_f4 train.steps=100`).

    Returns:
        The typed config and the same, resolved, for saving.

    Raises:
        UserError: an unknown key or choice, a value of the wrong type or out of range, a missing value.
    """
    config, composed = compose(NAME, overrides, Config, FOLDER)
    _check_values(config)
    return config, composed


def _check_values(config: Config) -> None:
    """Refuse what no run can use, before anything is read."""
    from finetune.ranges import require_shared  # it loads torch, which --help does without

    require_shared(config, precisions=("fp32", "bf16"), offloads=("none", "cpu"))
    model = config.model
    positive = {
        "model.layers_per_block": model.layers_per_block,
        "model.latent_channels": model.latent_channels,
        "model.norm_num_groups": model.norm_num_groups,
        "data.size": config.data.size,
        "scale.pictures": config.scale.pictures,
    }
    require(positive, lambda value: value > 0, "must be greater than 0")
    not_negative = {
        "loss.kl_weight": config.loss.kl_weight,
        "loss.codebook_weight": config.loss.codebook_weight,
        "loss.commitment": config.loss.commitment,
        "data.held_out": config.data.held_out,
        "sample.every": config.sample.every,
        "sample.pictures": config.sample.pictures,
    }
    require(not_negative, lambda value: value >= 0, "must not be negative")
    cache = {"data.cache_gib": config.data.cache_gib}
    require(cache, lambda value: 0 <= value < math.inf, "must be a number of GiB, 0 for none")
    if model.codebook_size is not None:
        require({"model.codebook_size": model.codebook_size}, lambda value: value >= 2, "must be at least 2")
    _check_lpips(config.loss)
    _check_discriminator(config.loss, config.train.steps)
    if config.strategy.offload_path is not None:
        raise UserError(
            f"strategy.offload_path={config.strategy.offload_path}: a first stage is not offloaded to files; leave "
            "it out, or choose strategy=zero3_offload"
        )
    if config.strategy.reduce_dtype != "fp32":
        raise UserError(
            f"strategy.reduce_dtype={config.strategy.reduce_dtype}: gradients of a first stage are summed in fp32; "
            "leave it out"
        )
    for channels in model.block_out_channels:
        if channels < 1 or channels % model.norm_num_groups:
            raise UserError(
                f"model.block_out_channels has {channels}, which model.norm_num_groups="
                f"{model.norm_num_groups} does not divide"
            )
    if config.train.decoder_only and model.pretrained is None:
        raise UserError(
            "train.decoder_only=true needs an encoder to keep: give an autoencoder as model.pretrained=..."
        )
    if not model.block_out_channels:
        raise UserError("model.block_out_channels is empty: give one width for each resolution")


def require_penalty(loss: LossConfig, has_codebook: bool, model: str) -> None:
    """Refuse settings of the other kind's penalty.

    Args:
        model: what is trained, in words.

    Raises:
        UserError: `loss` sets what `model` does not have.
    """
    default = LossConfig()
    for name in ("kl_weight",) if has_codebook else ("codebook_weight", "commitment"):
        if (value := getattr(loss, name)) != getattr(default, name):
            lacks = "no posterior" if has_codebook else "no codebook"
            raise UserError(f"loss.{name}={value}, but {model} has {lacks}: leave it out")


def _check_lpips(loss: LossConfig) -> None:
    require({"loss.lpips_weight": loss.lpips_weight}, lambda value: value > 0, "must be greater than 0")
    if loss.lpips is None:
        for name in ("lpips_heads", "lpips_weight"):
            if (value := getattr(loss, name)) != getattr(LossConfig(), name):
                raise UserError(
                    f"loss.{name}={value}, but there is no LPIPS: give the file of VGG16 as loss.lpips=FILE"
                )


def _check_discriminator(loss: LossConfig, steps: int) -> None:
    from finetune.ranges import require_betas

    prefix = "loss.discriminator_"
    require({f"{prefix}weight": loss.discriminator_weight}, lambda value: value >= 0, "must not be negative")
    if loss.discriminator_weight == 0:
        default = LossConfig()
        for name, value in vars(loss).items():
            if name.startswith("discriminator_") and value != getattr(default, name):
                raise UserError(f"loss.{name}={value}, but there is no discriminator: set {prefix}weight=0.5, say")
        return
    require({f"{prefix}start": loss.discriminator_start}, lambda value: value >= 0, "must not be negative")
    positive = {f"{prefix}layers": loss.discriminator_layers, f"{prefix}width": loss.discriminator_width}
    require(positive, lambda value: value > 0, "must be greater than 0")
    if loss.discriminator_lr is not None:
        require({f"{prefix}lr": loss.discriminator_lr}, lambda value: value > 0, "must be greater than 0")
    require_betas({f"{prefix}beta1": loss.discriminator_beta1, f"{prefix}beta2": loss.discriminator_beta2})
    if loss.discriminator_start >= steps:
        raise UserError(
            f"{prefix}start={loss.discriminator_start} is not before train.steps={steps}: the discriminator would "
            "never be used; start it earlier or train for longer"
        )
