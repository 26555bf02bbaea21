"""Quality at equal GPU-minutes: small U-Nets of matched size on pictures of 64 px, for f = 1, 2, 4 and 8.

`python -m benchmarks.cost_curve --quality SHARDS` runs it. For each f the first stage is trained (`finetune
autoencoder`, L1 and KL alone) or taken and pictures are encoded (`data-tools encode`; `--vae none` for f = 1). Then
an unconditional U-Net of 20M parameters learns epsilon for the same time on the clock, by `finetune train`'s step.
Neither what comes before counts, nor warming up: a first stage is made once for many models.

frechet              squared Frechet distance (Heusel et al. 2017, arXiv 1706.08500) of drawn pictures to all real
                     ones, over the 64 features before the last layer of a classifier trained here on the real
                     pictures: which caption is it? With averaged weights. The fewer are drawn, the larger it is
frechet_first_stage  the same of as many real pictures, encoded and decoded: f's own part in it
frechet_real         the same of as many real pictures as they are: the least that can be reached
classifier_accuracy  on a picture held out of each caption that has three or more
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import save_plot
from benchmarks.ranks import waiter
from benchmarks.works import BETAS, MAX_GRAD_NORM, SEED, schedule, stepping
from finetune import UserError, pictures
from finetune.autoencoder.features import frechet
from finetune.autoencoder.pictures import decode as decode_picture
from finetune.data.loader import Data, Samples
from finetune.data.order import Order, Source
from finetune.data.shards import IMAGE_MEMBERS, NO_ENCODER, Manifest, ShardSet
from finetune.distributed import DataParallel, OptimizerSettings, ParamGroup, World
from finetune.ema import Average, HalfLife
from finetune.latents import LatentSpace, to_raw
from finetune.models import fast
from finetune.models.autoencoder import (
    Autoencoder,
    decode,
    encode_moments,
    encoder_sha256,
    load_autoencoder,
    to_signed,
)
from finetune.models.unet import build_unet
from finetune.objective import LatentDiffusion, Objective
from finetune.sampling import draw_noise, generators, make_scheduler, sample, to_pil
from finetune.tasks.unconditional import Nothing

PIXELS = 64
# Widths by level, the last two of which attend: 20.6M, 21.0M, 19.7M and 19.7M parameters.
UNETS = {1: (64, 128, 192, 256), 2: (128, 192, 256), 4: (160, 288), 8: (160, 288)}
# Widths of first stages, and channels of their latents: the emoji base's recipe, deeper or less deep.
STAGES = {2: ((32, 64), 2), 4: ((32, 64, 96), 4), 8: ((32, 64, 96, 128), 4)}
LR, HALFLIFE_IMAGES = 3e-4, 50_000
FEATURES = 64
_PIECE = 256  # pictures at a time


# --- the measure --------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Pictures [B, 3, 64, 64] in [-1, 1] to one logit a caption; `features` [B, 64] come before."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out in (width, 2 * width, 4 * width, 8 * width):
            layers += [nn.Conv2d(channels, out, 3, 2, 1), nn.GroupNorm(8, out), nn.SiLU()]
            layers += [nn.Conv2d(out, out, 3, 1, 1), nn.GroupNorm(8, out), nn.SiLU()]
            channels = out
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, FEATURES))
        self.head = nn.Linear(FEATURES, classes)

    def features(self, images_B3HW: Tensor) -> Tensor:
        return self.body(images_B3HW)  # type: ignore[no-any-return]

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.head(F.silu(self.features(images_B3HW)))  # type: ignore[no-any-return]


def read_pictures(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [N, 64, 64, 3], int64 [N] number of the first caption) of image shards.

    Raises:
        UserError: too few captions have three pictures for a classifier to be measured.
    """
    shards = ShardSet.open(root, "images")
    numbers: dict[str, int] = {}
    found, labels = [], []
    for index in range(len(shards)):
        members = shards.read(index)
        data = next(members[name] for name in IMAGE_MEMBERS if name in members)
        found.append(decode_picture(data, PIXELS))
        caption = (shards.read_json(index).get("captions") or [""])[0]
        labels.append(numbers.setdefault(caption, len(numbers)))
    if np.bincount(labels).max() < 3 or len(numbers) < 2:
        raise UserError(
            f"{root}: no caption has three pictures, so no classifier can be trained and measured; make the shards "
            "with `data-tools ingest iconify --draws 4`"
        )
    return np.stack(found), np.array(labels)


def held_out_of(labels: np.ndarray) -> np.ndarray:
    """Bool [N]: the last picture of each label that has three or more."""
    places: dict[int, list[int]] = defaultdict(list)
    for place, label in enumerate(labels.tolist()):
        places[label].append(place)
    held = np.zeros(len(labels), bool)
    held[[each[-1] for each in places.values() if len(each) > 2]] = True
    return held


def train_classifier(
    pixels: np.ndarray, labels: np.ndarray, device: torch.device, steps: int, width: int
) -> tuple[Classifier, float]:
    """The classifier, and its accuracy on what `held_out_of` holds out."""
    held = held_out_of(labels)
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Classifier(int(labels.max()) + 1, width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    images, answers = to_signed(pixels, device), torch.from_numpy(labels).to(device)
    train_ids = torch.from_numpy(np.flatnonzero(~held))
    for _ in range(steps):
        ids = train_ids[torch.randint(len(train_ids), (_PIECE,), generator=generator)].to(device)
        down, right = torch.randint(-4, 5, (2,), generator=generator).tolist()
        loss = F.cross_entropy(model(images[ids].roll((down, right), (2, 3))), answers[ids], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    model.eval()
    with torch.no_grad():
        ids = torch.from_numpy(np.flatnonzero(held)).to(device)
        right = sum(int((model(images[part]).argmax(1) == answers[part]).sum()) for part in ids.split(_PIECE))
    return model, right / len(ids)


@torch.no_grad()
def features(model: Classifier, images: Tensor) -> np.ndarray:
    """Float64 [N, 64]."""
    device = next(model.parameters()).device
    return np.concatenate([model.features(part.to(device)).double().cpu().numpy() for part in images.split(_PIECE)])


# --- the models ---------------------------------------------------------------------------------------


def unet_config(factor: int, channels: int, shrink: int) -> dict[str, Any]:
    """The U-Net of f = `factor`; `shrink` divides its widths."""
    widths = [width // shrink for width in UNETS[factor]]
    attends = [level >= len(widths) - 2 for level in range(len(widths))]
    return {
        "sample_size": PIXELS // factor,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": 2,
        "down_block_types": ["AttnDownBlock2D" if one else "DownBlock2D" for one in attends],
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ["AttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)],
        "attention_head_dim": 32 // shrink,
        "cross_attention_dim": [None] * len(widths),
        "norm_num_groups": 32 // shrink,
    }


def command(*words: str) -> None:
    """Run one of our commands.

    Raises:
        UserError: with its last line, when it fails.
    """
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()[-1]
        raise UserError(f"{' '.join(words[:2])} failed: {last}")


def latents_of(
    shards: Path, factor: int, given: str | None, kept: Path, *, steps: int, batch: int, shrink: int
) -> tuple[Path, Autoencoder]:
    """(shards of latents, the first stage), made in `kept` unless they are there.

    Raises:
        UserError: one of our commands failed, or latents are there of other pictures or by another first stage.
    """
    vae, latents = given, kept / f"latents-f{factor}"
    if factor == 1:
        vae = NO_ENCODER
    elif vae is None:
        run = kept / f"first-stage-f{factor}"
        if not (run / "vae").is_dir():
            widths, channels = STAGES[factor]
            words = ["experiment=base", f"data.shards={shards}", f"data.size={PIXELS}", f"run.dir={run}"]
            words += [f"model.block_out_channels={[width // shrink for width in widths]}".replace(" ", "")]
            words += [f"model.latent_channels={channels}", f"model.norm_num_groups={16 // shrink}"]
            words += [f"train.steps={steps}", f"train.global_batch={batch}", "sample.every=0", "tracker=none"]
            if not torch.cuda.is_available():
                words += ["train.precision=fp32"]
            command("finetune", "autoencoder", *words)
        vae = str(run / "vae")
    if not (latents / "manifest.json").is_file():
        command("data_tools", "encode", str(shards), "--vae", vae, "--out", str(latents), "--size", str(PIXELS))
    made, stage = Manifest.load(latents), load_autoencoder(vae)
    made.require_encoder(encoder_sha256(stage), vae)
    if made.samples != (count := Manifest.load(shards).samples):
        raise UserError(
            f"{latents} has {made.samples} pictures, {shards} has {count}; give another folder as --kept"
        )
    return latents, stage


def learn(
    latents: Path,
    config: Mapping[str, Any],
    seconds: float,
    batch: int,
    device: torch.device,
    is_fast: bool,
    seed: int,
) -> tuple[nn.Module, LatentSpace, dict[str, Any]]:
    """(the U-Net with averaged weights, its latent space, what there is to say of the training)."""
    shards = ShardSet.open(latents, "latents")
    encoder = shards.manifest.encoder
    assert encoder is not None
    space = LatentSpace(encoder.scale, encoder.shift)
    buckets = list(shards.bucket_sizes)
    samples = Samples(shards, buckets, [np.empty(0, np.int64)] * len(buckets))
    order = Order([Source(samples.sizes)], seed=seed, global_batch=batch)
    data = Data([samples], buckets, order, [], space)
    loader = data.loader(seed=seed, micro_batch=batch, readers=2, pin=device.type == "cuda")
    unet = build_unet(config, seed=seed).train()
    is_fast = is_fast and fast.available(device)
    if is_fast:
        unet.to(memory_format=torch.channels_last)
        fast.make_fast(unet)
    model = LatentDiffusion(
        unet, Nothing(), schedule=schedule(device), space=space, objective=Objective(), seed=seed
    ).train()
    strategy = DataParallel(
        World(0, 1, 0, device),
        model,
        [ParamGroup("unet", {f"unet.{name}": p for name, p in unet.named_parameters()})],
        optimizer=OptimizerSettings(),
        max_grad_norm=MAX_GRAD_NORM,
        precision="bf16" if device.type == "cuda" else "fp32",
        graphs=is_fast,
    )
    average = Average.starting_at([shard.master for shard in strategy.shards], HalfLife(HALFLIFE_IMAGES, 0.05))
    step = stepping(strategy, model, iter(loader), batch, [average], lr=LR)
    wait = waiter(device)
    for _ in range(10):  # warms up
        step()
    wait()
    started, steps, losses = time.perf_counter(), 0, []
    while time.perf_counter() < started + seconds:
        losses.append(step().loss_sum / batch)
        steps += 1
        if steps % 10 == 0:
            wait()  # the host would run ahead of the clock
    wait()
    took = time.perf_counter() - started
    loader.close()
    averaged = build_unet(config).to(device)
    names = [shard.name.removeprefix("unet.") for shard in strategy.shards]
    averaged.load_state_dict(dict(zip(names, average.tensors, strict=True)))
    said = {
        "parameters": sum(p.numel() for p in averaged.parameters()),
        "seconds": took,
        "steps": steps,
        "batch": batch,
        "images_per_s": steps * batch / took,
        "loss": float(torch.stack(losses[-100:]).mean()),
    }
    return averaged.eval(), space, said


@torch.no_grad()
def drawn(
    unet: nn.Module,
    vae: Autoencoder,
    space: LatentSpace,
    shape: tuple[int, int, int],
    seeds: range,
    steps: int,
) -> Tensor:
    """Float32 [N, 3, 64, 64] in [-1, 1] on the CPU, one from each seed."""
    device = next(unet.parameters()).device
    cast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
    made = []
    for first in range(0, len(seeds), _PIECE):
        noise = draw_noise(generators(seeds[first : first + _PIECE]), shape).to(device)
        with cast:
            z = sample(unet, {}, None, noise, make_scheduler("ddim", BETAS), steps, 1.0)
        made.append(decode(vae, to_raw(z, space)).cpu())
    return torch.cat(made)


# --- all of it ----------------------------------------------------------------------------------------


class Quality:
    """Measures one f after the other by the same classifier.

    Args:
        shards: of pictures, with captions that several pictures share; kept: what is made on the way stays here.
        seconds: of training, for each f. steps: of the classifier, of a first stage. count: of pictures drawn.
        shrink: divides all widths, for a CPU.
        seed: of the U-Nets and of what they draw. First stages and the classifier, the measure, stay the same.
    """

    def __init__(
        self,
        shards: Path,
        kept: Path,
        *,
        seconds: float,
        steps: tuple[int, int],
        count: int,
        ddim: int,
        batch: int,
        is_fast: bool,
        shrink: int,
        seed: int = SEED,
    ) -> None:
        self.shards, self.kept, self.seconds, self.stage_steps = shards, kept, seconds, steps[1]
        self.count, self.ddim, self.batch, self.is_fast, self.shrink = count, ddim, batch, is_fast, shrink
        self.seed = seed
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.pixels, labels = read_pictures(shards)
        width = max(8, 32 // shrink)
        self.classifier, self.accuracy = train_classifier(self.pixels, labels, self.device, steps[0], width)
        self.real = features(self.classifier, to_signed(self.pixels, torch.device("cpu")))
        chosen = np.random.default_rng(SEED).permutation(len(self.pixels))[:count]
        self.some = self.pixels[chosen]
        self.frechet_real = frechet(self.real[chosen], self.real)

    def of(self, factor: int, given: str | None) -> dict[str, Any]:
        """One row.

        Raises:
            UserError: one of our commands failed.
        """
        steps, batch = self.stage_steps, min(self.batch, 128)
        latents, vae = latents_of(
            self.shards, factor, given, self.kept, steps=steps, batch=batch, shrink=self.shrink
        )
        vae.to(self.device)
        encoder = ShardSet.open(latents, "latents").manifest.encoder
        assert encoder is not None
        config = unet_config(factor, encoder.channels, self.shrink)
        unet, space, said = learn(latents, config, self.seconds, self.batch, self.device, self.is_fast, self.seed)
        size = PIXELS // factor
        seeds = range(self.seed * self.count, (self.seed + 1) * self.count)
        images = drawn(unet, vae, space, (encoder.channels, size, size), seeds, self.ddim)
        pictures.save_png(pictures.grid(to_pil(images[:64]), 8), self.kept / f"drawn-f{factor}.png", {})
        return {
            "seed": self.seed,
            "latents": [encoder.channels, size, size],
            **said,
            "ddim_steps": self.ddim,
            "drawn": self.count,
            "frechet": frechet(features(self.classifier, images), self.real),
            "frechet_first_stage": frechet(features(self.classifier, self.reconstructed(vae)), self.real),
            "frechet_real": self.frechet_real,
            "classifier_accuracy": self.accuracy,
            "pictures": len(self.pixels),
        }

    def reconstructed(self, vae: Autoencoder) -> Tensor:
        images = to_signed(self.some, torch.device("cpu"))
        means = (encode_moments(vae, part).chunk(2, dim=1)[0] for part in images.split(_PIECE))
        return torch.cat([decode(vae, mean).cpu() for mean in means])


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    columns = (
        "parameters",
        "seconds",
        "steps",
        "images_per_s",
        "loss",
        "frechet",
        "frechet_first_stage",
        "frechet_real",
    )
    print(f"\n{'f':>3}" + "".join(f"{name:>20}" for name in columns))
    for row in rows:
        shown = row["error"][:100] if "error" in row else "".join(f"{row[name]:>20.4g}" for name in columns)
        print(f"{row['factor']:>3}" + ("  " if "error" in row else "") + shown)


def draw(rows: Sequence[Mapping[str, Any]], out: Path, hardware: str) -> None:
    """Frechet distance by f."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "error" not in row]
    if not rows:
        return
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    factors = [row["factor"] for row in rows]
    for name, label in (
        ("frechet", "drawn"),
        ("frechet_first_stage", "encoded and decoded"),
        ("frechet_real", "real"),
    ):
        axes.plot(factors, [row[name] for row in rows], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(factors, [str(factor) for factor in factors])
    minutes = rows[0]["seconds"] / 60
    unit = "minute" if f"{minutes:.2g}" == "1" else "minutes"
    axes.set(xlabel="f", ylabel="Frechet distance, 64 features of a classifier")
    axes.set_title(f"{minutes:.2g} {unit} each, {PIXELS} px: {hardware}", fontsize="medium")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="center right")
    save_plot(figure, out)
