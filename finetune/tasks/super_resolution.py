"""Pictures of low-resolution ones, which are laid beside the latents (Rombach et al. 2022, section 4.4).

With `noise_levels` the low-resolution picture is noised first and the U-Net is told how much, as Stable Diffusion's
x4 upscaler is (conditioning augmentation: Ho et al. 2022, arXiv 2106.15282, section 4.2): the model then mends what
it is given, and at sampling the level says how far it may depart from it. The U-Net is convolutional: a model
enlarges pictures larger than those it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from finetune import UserError, diffusion, rng
from finetune.batch import Batch, Sample
from finetune.conditioning import Condition, Conditioner, Given, draw, member, picture
from finetune.conditioning.spatial import beside
from finetune.data.shards import LOWRES

UPSCALER_LEVELS = 350  # levels that Stable Diffusion's x4 upscaler was trained with, of 1000


@dataclass
class Options:
    factor: int = 4  # pixels of the picture for one of the low-resolution one, along each side
    noise_levels: int | None = None  # that are drawn from in training; 0: no noise; null: 350 if the U-Net is told


class LowRes(Conditioner):
    """Low-resolution pictures, in [-1, 1], resized to the latents' grid and noised there.

    Args:
        factor: by which they are smaller than the picture; cell: pixels of a latent cell along each side.
        noise_levels: levels 0 to this, exclusive, are drawn in training; 0: no noise, no level.
        seed: of the noise.
    """

    members = (LOWRES,)
    asks = ("image",)
    guided = False
    channels = 3

    def __init__(self, factor: int, cell: int, *, noise_levels: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.factor, self.cell, self.noise_levels, self.seed = factor, cell, noise_levels, seed
        # That of stabilityai/stable-diffusion-x4-upscaler, `low_res_scheduler`.
        betas_T = diffusion.betas(0.0001, 0.02, 1000, "scaled_linear")
        self.schedule = diffusion.variance_preserving(diffusion.alphas_cumprod(betas_T))

    def read(self, sample: Sample) -> dict[str, np.ndarray]:
        """`lowres` uint8 [3, H / factor, W / factor]; with noise, `level` int64 []."""
        data = member(sample, LOWRES, f"encode the pictures with --lowres {self.factor}")
        lowres_HW3 = picture(data, "RGB", LOWRES)
        if (wanted := self._times_factor(lowres_HW3)) != sample.bucket:
            height, width = sample.bucket
            raise UserError(
                f"{LOWRES} has {lowres_HW3.shape[1]}x{lowres_HW3.shape[0]} pixels, for pictures of "
                f"{wanted[1]}x{wanted[0]} at task.options.factor={self.factor}, and this one has {width}x{height}: "
                f"encode with --lowres {self.factor}, or set the factor that the shards have"
            )
        made = {"lowres": np.ascontiguousarray(lowres_HW3.transpose(2, 0, 1))}
        if self.noise_levels:
            made["level"] = np.array(self._level(sample), np.int64)
        return made

    def inputs(self, batch: Batch, drop_B: Tensor, null_caption: str = "") -> dict[str, Tensor]:
        """`lowres` and `level` [B], and `draws` int64 [B], the addresses of the noise."""
        return dict(batch.condition) | ({"draws": batch.clock} if self.noise_levels else {})

    def forward(self, inputs: Mapping[str, Tensor]) -> Condition:
        lowres_B3HW = inputs["lowres"].float() / 127.5 - 1.0
        height, width = (side * self.factor // self.cell for side in lowres_B3HW.shape[2:])
        if (height, width) != lowres_B3HW.shape[2:]:
            lowres_B3HW = F.interpolate(lowres_B3HW, (height, width), mode="bicubic", antialias=True)
        if not self.noise_levels:
            return {"channels": lowres_B3HW}
        level_B = inputs["level"]
        self.schedule = self.schedule.to(level_B.device)
        noise_B3HW = rng.normal(self.seed, "lowres-noise", inputs["draws"], (3, height, width))
        return {"channels": diffusion.mix(lowres_B3HW, noise_B3HW, *self.schedule.at(level_B)), "labels": level_B}

    def size(self, sample: Sample) -> tuple[int, int] | None:
        return self._times_factor(picture(member(sample, LOWRES, "give --image FILE"), "RGB", LOWRES))

    def _times_factor(self, lowres_HW3: np.ndarray) -> tuple[int, int]:
        return lowres_HW3.shape[0] * self.factor, lowres_HW3.shape[1] * self.factor

    def _level(self, sample: Sample) -> int:
        """The level that the sample's record asks for, else one of its own at this visit."""
        asked = sample.record.get("noise_level")
        if asked is None:
            return int(draw(sample, "lowres-level") * self.noise_levels)
        if not isinstance(asked, int) or not 0 <= asked < self.noise_levels:
            raise UserError(f"noise level {asked}: the model was trained with 0 to {self.noise_levels - 1}")
        return asked


def make(options: Options, given: Given) -> Conditioner:
    if options.factor < 2:
        raise UserError(f"task.options.factor={options.factor} must be at least 2")
    embedded = given.embedded_labels
    levels = min(UPSCALER_LEVELS, embedded) if options.noise_levels is None else options.noise_levels
    if not embedded and levels:
        raise UserError(
            f"task.options.noise_levels={levels} and the U-Net is not told of the level: set it to 0, or "
            "model.unet.num_class_embeds=1000"
        )
    if embedded and not 1 <= levels <= min(embedded, 1000):
        raise UserError(
            f"task.options.noise_levels={levels} must be between 1 and {min(embedded, 1000)}: this U-Net is told "
            "of the level"
        )
    own = LowRes(options.factor, given.downsample, noise_levels=levels, seed=given.seed)
    return beside(own, given, "super_resolution")


def lowres(conditioner: Conditioner) -> LowRes | None:
    """What of a conditioner is of this task; None where it is another's."""
    return next((part for part in conditioner.modules() if isinstance(part, LowRes)), None)
