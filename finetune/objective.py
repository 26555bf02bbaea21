"""The training loss: a pure function of weights, a batch and the run's clock.

`LatentDiffusion` is the one module that a strategy wraps: all that is trained is inside. Its `forward` takes the
name of what to compute, since DeepSpeed's and DDP's hooks run on the outermost call alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from finetune import diffusion, rng
from finetune.conditioning import TextConditioner
from finetune.latents import LatentSpace, sample_latents


class LatentDiffusion(nn.Module):
    """U-Net and conditioner under the latent diffusion objective (Rombach et al. 2022, eq. 3).

    Args:
        unet: a `UNet2DConditionModel`.
        conditioner: tokens to context.
        alphas_cumprod_T: float64 [T].
        space: scale and shift of the latents.
        prediction: what the U-Net predicts, one of `diffusion.PREDICTIONS`.
        seed: of the posterior, timestep and noise draws.
    """

    def __init__(
        self,
        unet: nn.Module,
        conditioner: TextConditioner,
        *,
        alphas_cumprod_T: Tensor,
        space: LatentSpace,
        prediction: str,
        seed: int,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner
        self.space, self.prediction, self.seed = space, prediction, seed
        # Not a buffer: a strategy that casts the module to bf16 must not round the schedule.
        self.alphas_cumprod_T: Tensor = alphas_cumprod_T

    def forward(self, what: str, *args: Any) -> Tensor:
        match what:
            case "loss":
                return self.loss(*args)
            case "loss_at":
                return self.loss_at(*args)
            case "predict":
                return self.predict(*args)
            case "context":
                return self.conditioner(*args)
        raise AssertionError(what)

    def loss(self, moments_B2CHW: Tensor, text: Tensor, clock_B: Tensor) -> Tensor:
        """Float32 [B]: each sample's loss at its own timestep, posterior sample and noise, drawn by its clock."""
        timesteps_B = rng.integers(self.seed, "timestep", clock_B, len(self.alphas_cumprod_T))
        return self.loss_at(moments_B2CHW, text, clock_B, timesteps_B, self.seed)

    def loss_at(
        self,
        moments_B2CHW: Tensor,
        text: Tensor,
        draw_ids_B: Tensor,
        timesteps_B: Tensor,
        seed: int,
    ) -> Tensor:
        """Float32 [B] at given timesteps (int64 [B]); posterior and noise are drawn by (`seed`, `draw_ids_B`)."""
        _, channels2, height, width = moments_B2CHW.shape
        shape = (channels2 // 2, height, width)
        posterior_BCHW = rng.normal(seed, "posterior", draw_ids_B, shape)
        noise_BCHW = rng.normal(seed, "noise", draw_ids_B, shape)
        z_BCHW = sample_latents(moments_B2CHW.float(), posterior_BCHW, self.space)
        alpha_bar_B = self.alphas_cumprod_T.to(moments_B2CHW.device)[timesteps_B]
        noised_BCHW = diffusion.add_noise(z_BCHW, noise_BCHW, alpha_bar_B)
        prediction_BCHW = self.predict(noised_BCHW, timesteps_B, self.conditioner(text))
        return diffusion.per_sample_mse(prediction_BCHW, diffusion.target(self.prediction, z_BCHW, noise_BCHW))

    def predict(self, noised_BCHW: Tensor, timesteps_B: Tensor, context_BLD: Tensor) -> Tensor:
        """The U-Net's output [B, C, H, W], in the dtype of its weights or of autocast."""
        dtype = next(self.unet.parameters()).dtype
        return self.unet(
            noised_BCHW.to(dtype), timesteps_B, encoder_hidden_states=context_BLD.to(dtype), return_dict=False
        )[0]
