"""The first stage: load an autoencoder, encode pictures to moments, decode latents, and know it again.

Rombach et al. 2022 (arXiv 2112.10752), section 3.1, has two kinds, and what tells them apart stands here:

    AutoencoderKL   the encoder gives a diagonal Gaussian q(z|x) for each latent cell
    VQModel         the encoder gives a point, and the decoder begins with the nearest entries of a codebook; the
                    diffusion model works on the points before, so as moments they have a standard deviation of 0
    Pixels          f = 1: there is none, and latents are the pixels themselves

Scale and shift are not applied here; see `finetune.latents`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias, assert_never

import numpy as np
import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin, VQModel
from diffusers.configuration_utils import register_to_config
from safetensors import SafetensorError
from torch import Tensor

from finetune import UserError, first_line
from finetune.data.shards import NO_ENCODER, EncoderInfo
from finetune.models.single_file import open_file
from finetune.models.sources import fetch, fetch_file, relative_source, weights_sha256
from finetune.models.weight_files import load_folder

PIXEL_RANGE = (-1.0, 1.0)


class Pixels(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """No first stage: the diffusion model works on pixels in [-1, 1], three channels and a cell for each.

    The scale stays 1. A scale is what gives latents of any size the unit variance that schedules are made for
    (Rombach et al. 2022, appendix G), and models of pixels take them in [-1, 1] (Ho et al. 2020, arXiv 2006.11239,
    section 3.3), whose samples are clipped where pictures end.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(self, latent_channels: int = 3, scaling_factor: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("place", torch.zeros(0), persistent=False)  # knows the device

    @property
    def dtype(self) -> torch.dtype:
        """There are no weights to be of another; pixels stay as they are given."""
        return torch.float32


Autoencoder: TypeAlias = AutoencoderKL | VQModel | Pixels
FirstStage: TypeAlias = AutoencoderKL | VQModel  # those that have weights
KINDS = {kind.__name__: kind for kind in (AutoencoderKL, VQModel, Pixels)}


def load_autoencoder(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Autoencoder:
    """Load an autoencoder, frozen and in eval mode.

    Args:
        source: a folder of the autoencoder itself, a pipeline's folder with `vae/` in it, a hub id of either, a
            single file of an autoencoder or of a whole model, or "none" for `Pixels` (a folder of that name is
            ./none).
        revision: branch, tag or commit, for a hub id.

    Raises:
        UserError: nothing there, or something that is neither an `AutoencoderKL` nor a `VQModel`.
    """
    if source == NO_ENCODER:
        return Pixels().to(device).eval()
    if (file := fetch_file(source if isinstance(source, Path) else str(source), revision)) is not None:
        return open_file(file).autoencoder(dtype).to(device).requires_grad_(False)
    try:
        folder = fetch(source if isinstance(source, Path) else str(source), "vae", revision)
    except UserError as error:
        why = str(error).removeprefix(f"{source}: ")
        raise UserError(f"no autoencoder at {source}: {why}") from error
    path = next((place for place in (folder, folder / "vae") if (place / "config.json").is_file()), None)
    if path is None:
        raise UserError(f"{source} has neither config.json nor vae/config.json; give a diffusers autoencoder")
    try:
        class_name = AutoencoderKL.load_config(path).get("_class_name", "AutoencoderKL")
        if class_name not in KINDS:
            raise UserError(
                f"{source} is a {class_name}, not an AutoencoderKL or a VQModel; give the folder of the VAE"
            )
        if class_name == Pixels.__name__:  # a configuration, without weights
            return Pixels.from_config(Pixels.load_config(path)).to(device).eval()
        vae: Autoencoder = load_folder(KINDS[class_name], path, torch_dtype=dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        what = first_line(error).rstrip(".")
        raise UserError(f"cannot load an autoencoder from {source}: {what}; check the folder or id") from None
    if getattr(vae.config, "latents_mean", None) is not None:
        raise UserError(f"{source} normalises latents channel by channel, which shards can't say; use another VAE")
    vae.register_to_config(_name_or_path="")  # diffusers would write where it lay into every copy
    return vae.to(device).eval().requires_grad_(False)


def encoder_sha256(vae: Autoencoder) -> str:
    """`weights_sha256` of `encoder.*` and `quant_conv.*`: a decoder trained further keeps its latents.

    A codebook is the decoder's.
    """
    parts = ("encoder.", "quant_conv.")
    return weights_sha256({name: weight for name, weight in vae.state_dict().items() if name.startswith(parts)})


def downsample_factor(vae: Autoencoder) -> int:
    """Pixels per latent cell, along each side."""
    if isinstance(vae, Pixels):
        return 1
    return int(2 ** (len(vae.config["block_out_channels"]) - 1))


def latent_channels(vae: Autoencoder) -> int:
    """C of the latents: for a `VQModel` the width of its codebook's entries."""
    return int(vae.config.get("vq_embed_dim") or vae.config["latent_channels"])


def encoder_info(vae: Autoencoder, source: str | os.PathLike[str], root: str | os.PathLike[str]) -> EncoderInfo:
    """What a manifest in `root` says of the autoencoder that was loaded from `source`."""
    return EncoderInfo(
        source=NO_ENCODER if source == NO_ENCODER else relative_source(source, root),
        sha256=encoder_sha256(vae),
        scale=float(vae.config["scaling_factor"]),
        shift=float(vae.config.get("shift_factor") or 0.0),
        dtype=str(vae.dtype).removeprefix("torch."),
        pixel_range=PIXEL_RANGE,
        channels=latent_channels(vae),
        downsample=downsample_factor(vae),
    )


def to_signed(pixels_BHW3: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1], channels last in memory."""
    return torch.from_numpy(pixels_BHW3).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_uint8(image_B3HW: Tensor) -> np.ndarray:
    """Float [B, 3, H, W] in [-1, 1] (clipped) -> uint8 [B, H, W, 3]."""
    return ((image_B3HW.float().clamp(-1, 1) + 1.0) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def encode_moments(vae: Autoencoder, images_B3HW: Tensor) -> Tensor:
    """Pictures in [-1, 1] to moments [B, 2C, h, w], float32: mean of q(z|x), then standard deviation.

    Those of a `VQModel` are what comes before its codebook, and zeros.
    """
    images_B3HW = images_B3HW.to(vae.device, vae.dtype)
    match vae:
        case Pixels():
            mean_BCHW, std_BCHW = images_B3HW, torch.zeros_like(images_B3HW)
        case AutoencoderKL():
            posterior = vae.encode(images_B3HW).latent_dist
            mean_BCHW = posterior.mean.float()
            # Not posterior.std, which exp has rounded to vae.dtype.
            std_BCHW = torch.exp(0.5 * posterior.logvar.float())
        case VQModel():
            mean_BCHW = vae.encode(images_B3HW).latents.float()
            std_BCHW = torch.zeros_like(mean_BCHW)
        case _:
            assert_never(vae)
    return torch.cat([mean_BCHW, std_BCHW], dim=1)


@torch.no_grad()
def decode(vae: Autoencoder, raw_BCHW: Tensor) -> Tensor:
    """Raw latents (scale and shift undone) to pictures [B, 3, H, W] in [-1, 1], float32.

    A `VQModel` quantizes them first; `Pixels` are clipped alone.
    """
    raw_BCHW = raw_BCHW.to(vae.device, vae.dtype)
    images_B3HW: Tensor = raw_BCHW if isinstance(vae, Pixels) else vae.decode(raw_BCHW).sample
    return images_B3HW.float().clamp(-1.0, 1.0)
