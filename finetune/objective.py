"""The training loss: a pure function of weights, a batch and the run's clock.

`LatentDiffusion` is the one module that a strategy wraps: all that is trained is inside. Its `forward` takes the
name of what to compute, since DeepSpeed's and DDP's hooks run on the outermost call alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from finetune import diffusion, rng
from finetune.conditioning import Condition, Conditioner, call_unet
from finetune.latents import LatentSpace, sample_latents


@dataclass(frozen=True)
class Objective:
    """What is predicted, at which timesteps, and how errors count; names and sources are in `diffusion`.

    Attributes:
        gamma: of min_snr and soft_min_snr; for p2 its exponent; None: see `used_gamma`. p2_k: p2's k.
        stratified: the timesteps of one optimizer step are spread evenly, over ranks and micro-batches.
        logit_mean, logit_std: of logit_normal timesteps.
        offset_noise: strength of a noise that is constant over each channel (0: none).
        input_perturbation: extra noise that the network sees and is not to predict, as a share of the noise
            (Ning et al. 2023, arXiv 2301.11706, algorithm 1; there 0.1).
    """

    prediction: str = "epsilon"
    weighting: str = "uniform"
    gamma: float | None = None
    p2_k: float = 1.0
    loss: str = "mse"
    huber_delta: float = 1.0
    timesteps: str = "uniform"
    stratified: bool = False
    logit_mean: float = 0.0
    logit_std: float = 1.0
    offset_noise: float = 0.0
    input_perturbation: float = 0.0

    @property
    def used_gamma(self) -> float:
        """`gamma`; None is what the papers take: 5 (Hang et al. 2023), for p2 1 (Choi et al. 2022)."""
        if self.gamma is not None:
            return self.gamma
        return 1.0 if self.weighting == "p2" else 5.0


class LatentDiffusion(nn.Module):
    """U-Net and conditioner under the latent diffusion objective (Rombach et al. 2022, eq. 3) and its variants.

    Args:
        unet: a `UNet2DConditionModel`.
        conditioner: what the U-Net is told.
        schedule: how noise is mixed in.
        space: scale and shift of the latents.
        objective: what is trained.
        seed: of the posterior, timestep and noise draws.
        global_batch: samples of one optimizer step, over which stratified timesteps are spread.
    """

    def __init__(
        self,
        unet: nn.Module,
        conditioner: Conditioner,
        *,
        schedule: diffusion.Schedule,
        space: LatentSpace,
        objective: Objective,
        seed: int,
        global_batch: int = 1,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner
        self.space, self.objective, self.seed, self.global_batch = space, objective, seed, global_batch
        self.schedule = schedule  # no buffers: a strategy that casts the module to bf16 must not round it

    def forward(self, what: str, *args: Any) -> Tensor | Condition:
        match what:
            case "loss":
                return self.loss(*args)
            case "loss_at":
                return self.loss_at(*args)
            case "predict":
                return self.predict(*args)
            case "condition":
                return self.conditioner(*args)
        raise AssertionError(what)

    def loss(
        self,
        moments_B2CHW: Tensor,
        inputs: Mapping[str, Tensor],
        clock_B: Tensor,
        weight_B: Tensor | None = None,
        mask_B1HW: Tensor | None = None,
    ) -> Tensor:
        """Float32 [B]: each sample's loss at its own timestep, posterior sample and noise, drawn by its clock.

        Args:
            inputs: of the conditioner.
            weight_B: how much each sample counts; mask_B1HW: where (see `Batch`).
        """
        objective = self.objective
        timesteps_B = self.timesteps(clock_B)
        error_B = self._error(
            moments_B2CHW, inputs, clock_B, timesteps_B, self.seed, train=True, mask_B1HW=mask_B1HW
        )
        level_weight_B = diffusion.weight(
            objective.prediction,
            objective.weighting,
            *self.schedule.at(timesteps_B),
            gamma=objective.used_gamma,
            k=objective.p2_k,
        ).float()
        return error_B * (level_weight_B if weight_B is None else level_weight_B * weight_B)

    def timesteps(self, clock_B: Tensor) -> Tensor:
        """Int64 [B] indices of the schedule, drawn by each sample's clock."""
        objective, count = self.objective, len(self.schedule)
        if objective.stratified:
            step_B, place_B = clock_B // self.global_batch, clock_B % self.global_batch
            u_B = rng.uniform(self.seed, "timestep-offset", step_B).double()
            u_B = diffusion.stratified(u_B, place_B, self.global_batch)
        elif objective.timesteps == "uniform":
            return rng.integers(self.seed, "timestep", clock_B, count)
        else:
            u_B = rng.uniform(self.seed, "timestep", clock_B).double()
        return diffusion.timesteps(
            u_B, objective.timesteps, count, mean=objective.logit_mean, std=objective.logit_std
        )

    def loss_at(
        self,
        moments_B2CHW: Tensor,
        inputs: Mapping[str, Tensor],
        draw_ids_B: Tensor,
        timesteps_B: Tensor,
        seed: int,
    ) -> Tensor:
        """Float32 [B]: the plain squared error at given timesteps (int64 [B]), whatever the objective's weights.

        Posterior and noise are drawn by (`seed`, `draw_ids_B`).
        """
        return self._error(moments_B2CHW, inputs, draw_ids_B, timesteps_B, seed, train=False)

    def _error(
        self,
        moments_B2CHW: Tensor,
        inputs: Mapping[str, Tensor],
        draw_ids_B: Tensor,
        timesteps_B: Tensor,
        seed: int,
        *,
        train: bool,
        mask_B1HW: Tensor | None = None,
    ) -> Tensor:
        objective = self.objective
        _, channels2, height, width = moments_B2CHW.shape
        shape = (channels2 // 2, height, width)
        posterior_BCHW = rng.normal(seed, "posterior", draw_ids_B, shape)
        noise_BCHW = rng.normal(seed, "noise", draw_ids_B, shape)
        if train and objective.offset_noise:
            offset_BC = rng.normal(seed, "offset-noise", draw_ids_B, shape[:1])
            noise_BCHW = diffusion.add_offset(noise_BCHW, offset_BC, objective.offset_noise)
        z_BCHW = sample_latents(moments_B2CHW.float(), posterior_BCHW, self.space)
        levels = self.schedule.at(timesteps_B)
        seen_BCHW = noise_BCHW
        if train and objective.input_perturbation:
            perturbation_BCHW = rng.normal(seed, "input-perturbation", draw_ids_B, shape)
            seen_BCHW = noise_BCHW + objective.input_perturbation * perturbation_BCHW
        noised_BCHW = diffusion.mix(z_BCHW, seen_BCHW, *levels)
        prediction_BCHW = self.predict(noised_BCHW, self.schedule.told[timesteps_B], self.conditioner(inputs))
        target_BCHW = diffusion.target(objective.prediction, z_BCHW, noise_BCHW, *levels)
        kind = objective.loss if train else "mse"
        error_BCHW = diffusion.elementwise_loss(kind, prediction_BCHW, target_BCHW, objective.huber_delta)
        return diffusion.per_sample(error_BCHW, mask_B1HW)

    def predict(self, noised_BCHW: Tensor, told_B: Tensor, condition: Condition) -> Tensor:
        """The U-Net's output [B, C, H, W] in the dtype of its weights or of autocast.

        `told_B`: times in the schedule's own terms.
        """
        return call_unet(self.unet, noised_BCHW, told_B, condition)
