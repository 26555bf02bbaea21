"""What a run is measured by: held-out loss at fixed noise, and sample grids with fixed seeds.

Both run with the averaged weights. Work is split over ranks in equal shares (the last ones repeat a sample), so
that every rank makes the same calls, as ZeRO-3 needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from finetune import rng
from finetune.batch import Batch
from finetune.conditioning import Condition, Conditioner, to_device
from finetune.distributed import Strategy
from finetune.latents import to_raw
from finetune.models.autoencoder import Autoencoder, decode
from finetune.objective import LatentDiffusion
from finetune.pictures import grid
from finetune.sampling import default_batch, draw_noise, generators, make_scheduler, sample, to_pil

SEED = 0  # the same noise and timesteps in every run, so that losses compare


def stratified_timesteps(sample_ids_B: Tensor, stratum: int, strata: int, num_train_timesteps: int) -> Tensor:
    """Int64 [B]: one timestep for each sample inside the stratum [k/K, (k+1)/K) of the schedule."""
    u_B = rng.uniform(SEED, f"validation-timestep-{stratum}", sample_ids_B).double()
    return ((stratum + u_B) / strata * num_train_timesteps).long().clamp_(max=num_train_timesteps - 1)


def shares(count: int, size: int) -> list[list[int]]:
    """Indices 0..count-1 dealt to `size` ranks in equal shares; the last index fills up."""
    per_rank = -(-count // size)
    return [[min(rank * per_rank + i, count - 1) for i in range(per_rank)] for rank in range(size)]


def held_out_loss(
    strategy: Strategy,
    batches: Sequence[Batch],
    conditioner: Conditioner,
    *,
    strata: int,
    num_train_timesteps: int,
) -> dict[str, float]:
    """Mean loss over held-out samples, in all and for each stratum of timesteps; collective.

    Args:
        batches: the same on every rank; each has one shape. Their ids address the noise.

    Returns:
        `validation/loss` and `validation/loss_t0`, ... by rising timestep.
    """
    world = strategy.world
    sums = torch.zeros(strata + 1, dtype=torch.float64, device=world.device)
    for batch in batches:
        parts = shares(len(batch), world.size)
        mine = parts[world.rank]
        # What fills up the last shares is computed but does not count.
        counted = [i for part in parts[: world.rank] for i in part]
        weight_B = torch.tensor([float(i not in (*counted, *mine[:n])) for n, i in enumerate(mine)])
        share = batch.take(mine)
        inputs = to_device(conditioner.inputs(share, torch.zeros(len(share), dtype=torch.bool)), world.device)
        ids_B = share.sample_ids.to(world.device)
        for stratum in range(strata):
            world.watch.going_on()
            timesteps_B = stratified_timesteps(ids_B, stratum, strata, num_train_timesteps)
            draw_ids_B = ids_B * strata + stratum
            loss_B = strategy(
                "loss_at",
                share.moments.to(world.device),
                inputs,
                draw_ids_B,
                timesteps_B,
                SEED,
            ).double()
            sums[stratum] += (loss_B * weight_B.to(world.device)).sum()
        sums[strata] += weight_B.sum()
    world.sum_(sums)
    per_stratum = (sums[:strata] / sums[strata]).tolist()
    named = {f"validation/loss_t{k}": value for k, value in enumerate(per_stratum)}
    return {"validation/loss": sum(per_stratum) / strata, **named}


def draw_samples(
    strategy: Strategy,
    model: LatentDiffusion,
    decoder: Autoencoder | None,
    batch: Batch,
    *,
    seed: int,
    downsample: int,
    scheduler: Mapping[str, Any],
    steps: int,
    guidance: float,
    guidance_rescale: float = 0.0,
) -> Image.Image | None:
    """A grid with one picture for each sample of `batch`, picture i from noise of `seed` + i; collective.

    Args:
        decoder: on rank 0; pictures are decoded there.
        batch: the conditions, all of one bucket; `downsample` pixels per latent cell.
        scheduler: as of `Components.scheduler`.

    Returns:
        The grid on rank 0, None elsewhere.
    """
    world = strategy.world
    share = shares(len(batch), world.size)
    mine = share[world.rank]
    channels: int = model.unet.config.out_channels  # type: ignore[assignment,union-attr]
    size = batch.bucket
    shape = (channels, size[0] // downsample, size[1] // downsample)
    conditioner = model.conditioner

    def condition_of(rows: Batch, drop: bool) -> Condition:
        drop_B = torch.full((len(rows),), drop)
        made = strategy("condition", to_device(conditioner.inputs(rows, drop_B), world.device))
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in made.items()}

    def denoise(inputs: Tensor, t: Tensor, condition: Condition) -> Tensor:
        world.watch.going_on()
        return strategy("predict", inputs, t.expand(len(inputs)), condition)

    latents = []
    at_once = default_batch(*size)
    for start in range(0, len(mine), at_once):
        chunk = mine[start : start + at_once]
        rows = batch.take(chunk)
        z_BCHW = sample(
            denoise,
            condition_of(rows, drop=False),
            condition_of(rows, drop=True) if guidance > 1 and conditioner.guided else None,
            draw_noise(generators(seed + i for i in chunk), shape).to(world.device),
            make_scheduler(None, scheduler),
            steps,
            guidance,
            guidance_rescale=guidance_rescale,
        )
        latents.append(z_BCHW.cpu())
    drawn = world.gather(torch.cat(latents))
    if decoder is None:
        return None
    by_row = {i: z for part, zs in zip(share, drawn, strict=True) for i, z in zip(part, zs, strict=True)}
    decoder.to(world.device)
    pictures = [
        to_pil(decode(decoder, to_raw(by_row[i][None].to(world.device), model.space)))[0] for i in range(len(batch))
    ]
    decoder.to("cpu")  # its memory is the trainer's until the next grid
    return grid(pictures, columns=min(len(pictures), 8))
