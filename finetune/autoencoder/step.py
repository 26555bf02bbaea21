"""One optimizer step of the first stage, on one process or a share of it on each of several."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.autoencoder import bottleneck
from finetune.autoencoder.bottleneck import PenaltyWeights
from finetune.autoencoder.discriminator import Adversary
from finetune.autoencoder.loss import adaptive_weight, first_stage_loss, generator_loss
from finetune.autoencoder.lpips import Lpips
from finetune.autoencoder.together import sum_tensors
from finetune.autoencoder.zero import trained_weights, update
from finetune.distributed import World
from finetune.models.autoencoder import FirstStage


def step_once(
    vae: FirstStage,
    optimizer: torch.optim.Optimizer,
    image_B3HW: Tensor,
    eps_BCHW: Tensor | None,
    *,
    penalty: PenaltyWeights,
    max_grad_norm: float,
    bf16: bool,
    lpips: Lpips | None = None,
    lpips_weight: float = 1.0,
    adversary: Adversary | None = None,
    world: World | None = None,
) -> dict[str, Tensor]:
    """One step of the autoencoder, and then one of the discriminator on the same reconstructions, if there is one.

    Returns:
        Detached scalars: loss (what was minimised), l1, the penalty's terms, lpips (batch means), gradient norm;
        with a discriminator its loss, the loss that it gives to the autoencoder, and that one's weight. With a
        codebook `uses_K` too, [K]: how often each entry was used. Of several processes (`world`) each returns its
        share, which `of_all` sums.
    """
    with torch.autocast(image_B3HW.device.type, torch.bfloat16, enabled=bf16):
        passed = bottleneck.run(vae, image_B3HW, eps_BCHW, penalty)
    recon_B3HW = passed.recon.float()
    processes = 1 if world is None else world.size
    distance_B = None if lpips is None else lpips(image_B3HW, recon_B3HW, bf16)
    loss = first_stage_loss(image_B3HW, recon_B3HW, passed.penalty, distance_B, lpips_weight)
    total = loss.total.mean() / processes
    judged: dict[str, Tensor] = {} if distance_B is None else {"lpips": distance_B.detach().mean() / processes}
    if adversary is not None:
        adversarial = generator_loss(adversary.judge(recon_B3HW, bf16)) / processes
        weight = adversary.weight * adaptive_weight(
            loss.reconstruction.mean() / processes,
            adversarial,
            vae.decoder.conv_out.weight,
            whole=(lambda gradient: gradient) if world is None else world.sum_,
        )
        total = total + weight * adversarial
        judged |= {"adversarial": adversarial.detach(), "adversarial_weight": weight}
    optimizer.zero_grad(set_to_none=True)
    weights = list(trained_weights(vae).values())
    total.backward(inputs=weights)  # not the discriminator's: this step is not its own
    grad_norm = update(optimizer, weights, world, max_grad_norm)
    if adversary is not None:
        judged["discriminator"] = adversary.learn(image_B3HW, recon_B3HW, max_grad_norm=max_grad_norm, bf16=bf16)
    parts = {"l1": loss.l1.detach().mean() / processes}
    parts |= {name: term_B.mean() / processes for name, term_B in passed.terms.items()}
    if passed.uses is not None:
        parts["uses_K"] = passed.uses
    return {"loss": total.detach(), **parts, **judged, "grad_norm": grad_norm.detach()}


def of_all(values: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """What `step_once` returned, of the global batch: shares are summed over processes."""
    sum_tensors([value for name, value in values.items() if name not in ("grad_norm", "adversarial_weight")], world)
    return values
