"""What a first-stage run is made of: the model, what judges it, and what they ask of pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from finetune import UserError, rng
from finetune.autoencoder.config import AutoencoderConfig, Config
from finetune.autoencoder.discriminator import Adversary, PatchDiscriminator, smallest_side
from finetune.autoencoder.features import FeatureNetwork
from finetune.autoencoder.lpips import SMALLEST_SIDE, Lpips, read_lpips
from finetune.autoencoder.pictures import Pictures
from finetune.autoencoder.zero import ShardedAdamW, trained_weights
from finetune.distributed import World
from finetune.models.autoencoder import FirstStage, Pixels, load_autoencoder
from finetune.models.sources import weights_sha256


def build(model: AutoencoderConfig, seed: int) -> FirstStage:
    """An `AutoencoderKL`, or with `codebook_size` a `VQModel`, with initial weights drawn from `seed` alone.

    Convolutions keep the variance of what comes in (std = 1 / sqrt(fan-in); LeCun et al. 1998, "Efficient
    BackProp", section 4.6) and residual branches start at zero (Goyal et al. 2017, arXiv 1706.02677, section
    5.1). From torch's and diffusers' own initial weights a short run ends several dB of PSNR lower.
    """
    levels = len(model.block_out_channels)
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # layers draw from torch's global generator
        torch.manual_seed(rng.fold(seed, "first stage weights"))
        shape: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "block_out_channels": tuple(model.block_out_channels),
            "layers_per_block": model.layers_per_block,
            "latent_channels": model.latent_channels,
            "norm_num_groups": model.norm_num_groups,
            "mid_block_add_attention": model.mid_block_add_attention,
            "force_upcast": False,
        }
        vae: FirstStage
        if model.codebook_size is None:
            vae = AutoencoderKL(**shape)
        else:
            vae = VQModel(**shape, vq_embed_dim=model.latent_channels, num_vq_embeddings=model.codebook_size)
        for module in vae.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.normal_(std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    module.bias.zero_()
        for module in vae.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.zero_()
        if isinstance(vae, AutoencoderKL):
            vae.quant_conv.bias[model.latent_channels :] = model.initial_logvar
    return vae


def load_given(model: AutoencoderConfig) -> tuple[FirstStage, str]:
    """The autoencoder `model.pretrained` in float32, all of it to be trained, and the sha256 of its weights.

    Raises:
        UserError: it can't be loaded, or `model` asks for another shape than it has.
    """
    assert model.pretrained is not None
    vae, default = load_autoencoder(model.pretrained), AutoencoderConfig()
    if isinstance(vae, Pixels):
        raise UserError(f"model.pretrained={model.pretrained} are pixels without an autoencoder: none to train")
    has = {**vae.config, "codebook_size": vae.config.get("num_vq_embeddings")}
    for name, value in vars(model).items():
        if name in has and value not in (getattr(default, name), (given := _plain(has[name]))):
            raise UserError(
                f"model.{name}={value}, but {model.pretrained} has {given}: leave it out, the given shape is kept"
            )
    return vae.requires_grad_(True), weights_sha256(vae.state_dict())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def keep_latents(vae: FirstStage) -> None:
    """Freeze what latents come from, the encoder and `quant_conv`; decoder and codebook stay to be trained."""
    vae.encoder.requires_grad_(False)
    if vae.quant_conv is not None:
        vae.quant_conv.requires_grad_(False)


def build_lpips(
    config: Config, device: torch.device, say: Callable[[str], None] = print
) -> tuple[Lpips | None, str | None]:
    """LPIPS with the weights that `config.loss` names, and their sha256; without any a line says that it is off.

    Raises:
        UserError: there are none, or they are of something else.
    """
    if config.loss.lpips is None:
        say("LPIPS is off: with loss.lpips=FILE (VGG16 and LPIPS's heads) reconstructions get sharper")
        return None, None
    for key, file in (("lpips", config.loss.lpips), ("lpips_heads", config.loss.lpips_heads)):
        if file is not None and not Path(file).is_file():
            raise UserError(f"loss.{key}={file}: there is no such file")
    weights = read_lpips(config.loss.lpips, config.loss.lpips_heads)
    return Lpips(weights).to(device), weights_sha256(weights)


def build_features(config: Config, pictures: Pictures, device: torch.device) -> FeatureNetwork | None:
    """The network whose features rFID compares; without one a line says that it is off.

    Raises:
        UserError: it can't be used, or too few pictures are held out for any distance.
    """
    if config.eval.features is None:
        print("rFID is off: with eval.features=FILE (TorchScript: pictures to features) it is measured at the end")
        return None
    network = FeatureNetwork(config.eval.features, device, pictures.buckets[0])
    count = sum(map(len, pictures.held_out_ids))
    if count < 2:
        raise UserError(
            f"eval.features needs two held-out pictures or more, and there is {count}: raise data.held_out (a "
            "tenth of the set at most)"
        )
    if count <= network.width:  # below it covariances are singular, and the distance grows as pictures get fewer
        print(
            f"warning: rFID of {count} pictures in {network.width} features can only be compared with that of as "
            "many: raise data.held_out",
            file=sys.stderr,
        )
    return network


def build_optimizer(
    config: Config, model: nn.Module, world: World, *, lr: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW of all trained weights on every process, or under ZeRO of this process's share."""
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": config.optim.eps, "fused": True}
    settings["weight_decay"] = config.optim.weight_decay
    if config.strategy.kind == "zero":
        offload = config.strategy.offload == "cpu"
        return ShardedAdamW(model, world, stage=config.strategy.stage, offload=offload, **settings)
    return torch.optim.AdamW(trained_weights(model).values(), **settings)


def build_adversary(config: Config, world: World) -> Adversary | None:
    """The discriminator that `config.loss` asks for, or None."""
    loss, optim = config.loss, config.optim
    if loss.discriminator_weight == 0:
        return None
    shape = loss.discriminator_layers, loss.discriminator_width
    model = PatchDiscriminator(*shape, seed=config.seed, world=world).to(world.device)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    betas = loss.discriminator_beta1, loss.discriminator_beta2
    optimizer = build_optimizer(config, model, world, lr=loss.discriminator_lr or optim.lr, betas=betas)
    return Adversary(model, optimizer, loss.discriminator_weight, world)


def require_room(config: Config, shortest: int) -> None:
    """Refuse pictures whose shortest side, in pixels, is too short for what the loss asks for.

    Raises:
        UserError: LPIPS or the discriminator needs larger ones.
    """
    loss = config.loss
    if loss.lpips is not None and shortest < SMALLEST_SIDE:
        raise UserError(
            f"loss.lpips needs sides of {SMALLEST_SIDE} pixels at least, and the shortest of these pictures "
            f"has {shortest}; leave it out or give larger ones"
        )
    needed = smallest_side(loss.discriminator_layers)
    if loss.discriminator_weight and shortest < needed:
        raise UserError(
            f"loss.discriminator_layers={loss.discriminator_layers} needs sides of {needed} pixels "
            f"at least, and the shortest of these pictures has {shortest}; lower it or give larger ones"
        )
