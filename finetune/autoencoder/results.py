"""What a first-stage run leaves behind: RUN/vae, its measures on held-out pictures, and grids."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import VQModel
from torch import Tensor
from tqdm import tqdm

from finetune.autoencoder import checkpoint
from finetune.autoencoder.bottleneck import perplexity, spread_codebook
from finetune.autoencoder.config import Config
from finetune.autoencoder.features import FeatureNetwork, frechet
from finetune.autoencoder.measure import (
    SSIM_WINDOW,
    comparison,
    measure_latents,
    psnr,
    reconstruct,
    ssim,
)
from finetune.autoencoder.pictures import Pictures
from finetune.checkpoint import publish
from finetune.models.autoencoder import FirstStage, downsample_factor, to_signed
from finetune.tracking import Tracker

# Of pictures that one process measures at a time: the global batch may be what many GPUs share.
_PIXELS_AT_ONCE = 2**20


def finish(
    config: Config,
    pictures: Pictures,
    vae: FirstStage,
    average: dict[str, Tensor] | None,
    network: FeatureNetwork | None,
    tracker: Tracker,
) -> Path:
    """Measure the latents' scale and held-out PSNR, SSIM and rFID, write RUN/vae and the last grid."""
    run, device, say = tracker.run, tracker.world.device, tracker.say
    result: dict[str, Any] = {"step": config.train.steps}
    if tracker.bar is not None:
        tracker.bar.close()  # of steps, of which there are no more
    with averaged(vae, average):
        if not config.train.decoder_only:
            std, uses_K = _measure_latents(config, pictures, vae, device)
            vae.register_to_config(scaling_factor=1.0 / std)
            result |= {"latent_std": std, "scaling_factor": 1.0 / std}
            if uses_K is not None:
                used = int((uses_K > 0).sum())
                result |= {"codebook_used": used / len(uses_K), "codebook_perplexity": perplexity(uses_K)}
                say(
                    f"codebook: {used} of {len(uses_K)} entries used, "
                    f"perplexity {result['codebook_perplexity']:.0f}"
                )
        temporary = run / ".tmp-vae"
        shutil.rmtree(temporary, ignore_errors=True)
        checkpoint.write_vae(temporary, vae, dict(vae.named_parameters()))
        publish(temporary, run / "vae")
        decibels: list[float] = []
        similarities: list[float] = []
        features: list[tuple[np.ndarray, np.ndarray]] = []
        for pixels_BHW3 in _read_all(pictures, pictures.held_out_ids, config.train.global_batch):
            recon_BHW3 = reconstruct(vae, pixels_BHW3, device)
            decibels += psnr(pixels_BHW3, recon_BHW3).tolist()
            if min(pixels_BHW3.shape[1:3]) >= SSIM_WINDOW:
                similarities += ssim(pixels_BHW3, recon_BHW3).tolist()
            if network is not None:
                features.append((network(pixels_BHW3), network(recon_BHW3)))
        grid = save_grid(config, pictures, vae, config.train.steps, tracker)
    if decibels:
        result["held_out_psnr_db"] = sum(decibels) / len(decibels)
        say(f"held-out PSNR: {result['held_out_psnr_db']:.2f} dB over {len(decibels)} pictures")
    if similarities:
        result["held_out_ssim"] = sum(similarities) / len(similarities)
        say(f"held-out SSIM: {result['held_out_ssim']:.4f} over {len(similarities)} pictures")
    if features:
        real_ND, made_ND = (np.concatenate(each) for each in zip(*features, strict=True))
        result |= {"rfid": frechet(real_ND, made_ND), "rfid_pictures": len(real_ND)}
        say(f"held-out rFID: {result['rfid']:.3f} over {len(real_ND)} pictures")
    tracker.write(result)
    of_latents = f"std {result['latent_std']:.4f}" if "latent_std" in result else "as they were"
    say(f"latents: {of_latents}, scaling_factor {vae.config['scaling_factor']:.5f}")
    if grid is not None:
        say(f"pictures and their reconstructions: {grid}")
    say(f"autoencoder: {run / 'vae'}")
    return run / "vae"


def save_grid(config: Config, pictures: Pictures, vae: FirstStage, step: int, tracker: Tracker) -> Path | None:
    """RUN/samples/step-N.png, and to W&B: held-out pictures (training ones, when none are) over reconstructions."""
    tops: list[np.ndarray] = []
    bottoms: list[np.ndarray] = []
    chosen = pictures.held_out_ids if any(map(len, pictures.held_out_ids)) else pictures.train_ids
    for bucket, ids in enumerate(chosen):
        some = ids[: config.sample.pictures - len(tops)]
        if len(some):
            pixels = pictures.read(bucket, some)
            tops += list(pixels)
            bottoms += list(reconstruct(vae, pixels, tracker.world.device))
    if not tops:
        return None
    return tracker.image(step, comparison(tops, bottoms), "pictures over their reconstructions")


@contextmanager
def averaged(vae: FirstStage, average: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Within the block the model has the averaged weights (when there are any) and is in eval mode."""

    def put(weights: Mapping[str, Tensor]) -> None:
        for name, parameter in vae.named_parameters():
            parameter.data.copy_(weights[name])

    own = {name: parameter.detach().clone() for name, parameter in vae.named_parameters()}
    vae.eval()
    if average is not None:
        put(average)
    try:
        yield
    finally:
        put(own)
        vae.train()


def _measure_latents(
    config: Config, pictures: Pictures, vae: FirstStage, device: torch.device
) -> tuple[float, Tensor | None]:
    """What `measure_latents` says of `config.scale.pictures` of the training pictures."""
    share = min(1.0, config.scale.pictures / sum(map(len, pictures.train_ids)))
    measured = [_evenly(ids, math.ceil(share * len(ids))) for ids in pictures.train_ids]
    with tqdm(total=sum(map(len, measured)), desc="latent scale", unit="img") as bar:

        def batches() -> Iterator[np.ndarray]:
            for pixels_BHW3 in _read_all(pictures, measured, config.train.global_batch):
                yield pixels_BHW3
                bar.update(len(pixels_BHW3))

        return measure_latents(vae, batches(), device)


def begin_codebook(config: Config, pictures: Pictures, vae: VQModel, device: torch.device) -> None:
    """Make the codebook of what the encoder gives to training pictures, taken from all over the set."""
    entries = len(vae.quantize.embedding.weight)
    cells = min(height * width for height, width in pictures.buckets) // downsample_factor(vae) ** 2
    share = min(1.0, 8 * entries / cells / sum(map(len, pictures.train_ids)))
    chosen = [_evenly(ids, math.ceil(share * len(ids))) for ids in pictures.train_ids]
    batches = (to_signed(pixels, device) for pixels in _read_all(pictures, chosen, config.train.global_batch))
    spread_codebook(vae, batches, config.seed)


def _evenly(ids: np.ndarray, count: int) -> np.ndarray:
    """`count` of `ids`, evenly spaced: neighbours in a set of shards are often alike."""
    return ids[[round(i * len(ids) / count) for i in range(count)]] if count < len(ids) else ids


def _read_all(pictures: Pictures, ids_by_bucket: Sequence[np.ndarray], most: int) -> Iterator[np.ndarray]:
    """Batches of at most `most` pictures and `_PIXELS_AT_ONCE`, each of one bucket: uint8 [B, H, W, 3]."""
    for bucket, ids in enumerate(ids_by_bucket):
        size = max(1, min(most, _PIXELS_AT_ONCE // math.prod(pictures.buckets[bucket])))
        for start in range(0, len(ids), size):
            yield pictures.read(bucket, ids[start : start + size])
