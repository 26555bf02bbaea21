"""What the space costs that a diffusion model works in: pixels (f = 1) and latents of f = 2 to 32.

    python -m benchmarks.cost_curve --out benchmarks/results/cost_curve.jsonl        # one GPU, below 5 minutes
    python -m benchmarks.cost_curve --factors 4,8 --fast --seconds 20
    python -m benchmarks.cost_curve                                                  # on a CPU: tiny shapes
    python -m benchmarks.cost_curve --quality shards --minutes 2 --fast --out FILE  # see `cost_quality`

Class-conditional U-Nets of about 395M parameters for pictures of 256 px (Rombach et al. 2022, arXiv 2112.10752,
section 4.1 and table 13), random weights, latents and classes. Training is `finetune train`'s step as
`benchmarks.train_speed` measures it: AdamW, float32 weights under bf16 autocast, eager as with `model.fast=false`,
or with `--fast` as by default on a GPU. Latents are given: encoding happens once, before. A batch that does not fit
is halved until it does.

images_per_s         of training; `of_peak` of a bf16 product's rate in the same call, `memory_gib` at that batch
gib_per_image        of it what is above weights, moments and all else that is there between steps, by image
tflop_per_image      of forward and backward passes of the U-Net as `torch.utils.flop_counter` counts them
sample_images_per_s  of `--ddim` DDIM steps without guidance and the decoder, weights in bf16. First stages have the
                     widths of `conf/autoencoder/model/` and table 13's latent channels; f = 1 has none
decoder_share        of the time of sampling
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL
from diffusers.utils import logging
from torch import nn

from benchmarks import cost_quality
from benchmarks.common import context, record, rounded, save_plot
from benchmarks.cost_quality import STAGES, UNETS
from benchmarks.ranks import waiter
from benchmarks.train_speed import Trained, Work, measure, peak_tflops, stepping, tflop, trained
from benchmarks.works import BETAS, MATCHED, SEED, SHAPES, channels_of
from finetune import UserError
from finetune.data.shards import set_folder
from finetune.models.autoencoder import decode
from finetune.sampling import draw_noise, generators, make_scheduler, sample

BATCHES = {1: 8, 2: 32, 4: 96, 8: 256, 16: 512, 32: 1024}  # the first that is tried; then half, and so on
SAMPLED = {1: 8, 2: 16, 4: 32, 8: 128, 16: 256, 32: 512}
CONF = Path(__file__).parent.parent / "conf/autoencoder/model"


def first_stage(factor: int, *, tiny: bool) -> AutoencoderKL | None:
    """The autoencoder of f = `factor` with random weights, None for pixels."""
    if factor == 1:
        return None
    given = yaml.safe_load((CONF / f"kl_f{factor}.yaml").read_text())
    widths = [width // 16 if tiny else width for width in given["block_out_channels"]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return AutoencoderKL(
            block_out_channels=widths,
            down_block_types=["DownEncoderBlock2D"] * len(widths),
            up_block_types=["UpDecoderBlock2D"] * len(widths),
            layers_per_block=2,
            latent_channels=MATCHED[factor][0],
            norm_num_groups=min(32, widths[0]),
        ).eval()


@torch.no_grad()
def sampling(unet: nn.Module, vae: AutoencoderKL | None, shape: str, batch: int, steps: int) -> dict[str, float]:
    """Images a second of DDIM and decoder, and the decoder's share; the second call of each is timed."""
    device = next(unet.parameters()).device
    wait = waiter(device)
    size, told = SHAPES[shape]["size"], SHAPES[shape]["unet"]["cross_attention_dim"]
    noise = draw_noise(generators(range(batch)), (channels_of(shape), size, size)).to(device)
    condition = {"context": torch.randn(batch, 1, told, generator=torch.Generator().manual_seed(SEED)).to(device)}
    ends = []
    for count in (1, steps):
        wait()
        ends = [time.perf_counter()]
        z = sample(unet, condition, None, noise, make_scheduler("ddim", BETAS), count, 1.0)
        wait()
        ends.append(time.perf_counter())
        if vae is not None:
            for one in z.split(8):  # all at once, pictures of 256 px would take most of the memory
                decode(vae, one)
        wait()
        ends.append(time.perf_counter())
    started, drawn, done = ends
    return {"sample_images_per_s": batch / (done - started), "decoder_share": (done - drawn) / (done - started)}


def training(work: Work, device: torch.device, seconds: float, is_fast: bool) -> tuple[dict[str, Any], nn.Module]:
    """(what `train_speed.measure` says, the model)."""
    what: list[Trained] = []

    def make() -> Any:
        what.append(trained(work, device, is_fast=is_fast, ema=False))
        return stepping(work, device, what[0])

    measured = measure(make, seconds, device)
    if device.type == "cuda":
        kept = torch.cuda.memory_allocated() / 2**30
        measured["gib_per_image"] = (measured["memory_gib"] - kept) / work.batch
    return measured, what[0].model.unet


def curve_point(factor: int, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One row; raises `torch.OutOfMemoryError` where not even one image fits."""
    tiny = device.type == "cpu"
    shape = f"{'tiny_' if tiny else ''}ldm{factor}"
    work = Work(shape, arguments.batch or (2 if tiny else BATCHES[factor]))
    while True:
        try:
            measured, unet = training(work, device, arguments.seconds, arguments.fast)
            break
        except torch.OutOfMemoryError:
            if work.batch == 1:
                raise
        work = replace(work, batch=work.batch // 2)
        free(device)
    parameters = sum(p.numel() for p in unet.parameters())
    free(device)  # moments and gradients
    dtype = torch.float32 if tiny else torch.bfloat16
    vae = first_stage(factor, tiny=tiny)
    vae = vae if vae is None else vae.to(device, dtype)
    drawn = sampling(unet.to(dtype), vae, shape, 2 if tiny else SAMPLED[factor], arguments.ddim)
    rate, needed = work.batch / measured["step_s"], tflop(work)
    peak = peak_tflops(device)
    return {
        "batch": work.batch,
        "parameters": parameters,
        "latents": [channels_of(shape), *[SHAPES[shape]["size"]] * 2],
        "images_per_s": rate,
        "of_peak": peak and rate * needed / peak,
        "tflop_per_image": needed,
        **measured,
        "ddim_steps": arguments.ddim,
        **drawn,
    }


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def table(rows: Sequence[dict[str, Any]]) -> None:
    columns = {
        "images_per_s": "images/s",
        "batch": "batch",
        "of_peak": "of peak",
        "memory_gib": "GiB",
        "gib_per_image": "GiB/image",
        "tflop_per_image": "TFLOP/image",
        "sample_images_per_s": "sampled/s",
        "decoder_share": "decoder",
    }
    print(f"\n{'f':>3}" + "".join(f"{name:>13}" for name in columns.values()))
    for row in rows:
        if "error" in row:
            print(f"{row['factor']:>3}  {row['error'][:100]}")
            continue
        cells = [
            "-"
            if row.get(name) is None
            else f"{row[name]:.1%}"
            if name in ("of_peak", "decoder_share")
            else f"{row[name]:.4g}"
            for name in columns
        ]
        print(f"{row['factor']:>3}" + "".join(f"{cell:>13}" for cell in cells))


def draw(rows: Sequence[dict[str, Any]], out: Path, hardware: str) -> None:
    """Speed, memory and operations by f."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "error" not in row]
    if not rows:
        return
    figure = Figure(figsize=(9, 7), layout="constrained")
    figure.suptitle(f"Cost of f, U-Nets of matched size: {hardware}, bf16, {rows[0]['variant']}")
    panels = {
        "images_per_s": "training, images/s",
        "sample_images_per_s": f"sampling, images/s ({rows[0]['ddim_steps']} DDIM steps, with the decoder)",
        "tflop_per_image": "TFLOP an image, forward and backward",
        "gib_per_image": "GiB an image in training, without weights and moments",
    }
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        points = [(row["factor"], row[name]) for row in rows if row.get(name)]
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("f")
        axes.grid(alpha=0.3, which="both")
        if not points:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
            continue
        factors, values = zip(*points, strict=True)
        axes.loglog(factors, values, marker="o", base=10)
        axes.set_xscale("log", base=2)
        axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
        for factor, value in points:
            axes.annotate(f"{value:.3g}", (factor, value), xytext=(0, 6), textcoords="offset points", ha="center")
        axes.margins(0.1, 0.2)
    save_plot(figure, out)


def quality_rows(arguments: argparse.Namespace, measured_on: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of part two, recorded.

    Raises:
        UserError: the pictures are not fit for it.
    """
    on_gpu = torch.cuda.is_available()
    given = dict(arguments.vae)
    arguments.kept.mkdir(parents=True, exist_ok=True)
    measure = cost_quality.Quality(
        arguments.quality,
        arguments.kept,
        seconds=60 * arguments.minutes,
        steps=(arguments.classifier_steps, arguments.first_stage_steps),
        count=arguments.pictures,
        ddim=arguments.ddim,
        batch=arguments.batch or (256 if on_gpu else 8),
        is_fast=arguments.fast,
        shrink=1 if on_gpu else 8,
        seed=arguments.seed,
    )
    rows = []
    for factor in arguments.factors:
        row: dict[str, Any] = {"work": "cost_quality", "variant": "fast" if arguments.fast else "eager"}
        row |= {"factor": factor, "pixels": cost_quality.PIXELS, "precision": "bf16" if on_gpu else "fp32"}
        try:
            row |= measure.of(factor, given.get(factor))
        except (UserError, RuntimeError) as error:
            row["error"] = str(error).splitlines()[0][:300]
        rows.append(row)
        record(arguments.out, {key: rounded(value) for key, value in row.items()} | measured_on)
        free(measure.device)
    return rows


def factors_of(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def first_stage_of(text: str) -> tuple[int, str]:
    """(f, the first stage to take for it)."""
    factor, _, model = text.partition("=")
    if not model or factor not in map(str, STAGES):
        named = ", ".join(f"{one}=MODEL" for one in STAGES)
        raise argparse.ArgumentTypeError(f"{text} is none of {named}")
    return int(factor), model


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", type=factors_of, help="of 1,2,4,8,16,32 (default: all; for --quality 1,2,4,8)")
    parser.add_argument("--batch", type=int, help="images of a step, halved until they fit (default: by f)")
    parser.add_argument("--seconds", type=float, default=8.0 if on_gpu else 0.1, help="timed training of each f")
    parser.add_argument("--ddim", type=int, default=50 if on_gpu else 4, help="steps of sampling")
    parser.add_argument("--fast", action="store_true", help="fast U-Nets, as by default on a GPU")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here as well, and plotted beside it")
    quality = parser.add_argument_group("quality at equal time, on pictures (see benchmarks.cost_quality)")
    quality.add_argument(
        "--quality", type=set_folder, metavar="SHARDS", help="measure this instead, on these image shards"
    )
    quality.add_argument(
        "--kept", type=Path, default=Path("runs/cost_curve"), help="first stages, latents, pictures"
    )
    quality.add_argument("--minutes", type=float, default=2.0, help="of training, for each f")
    quality.add_argument(
        "--seed", type=int, default=SEED, metavar="N", help=f"of the U-Nets and what they draw (default: {SEED})"
    )
    quality.add_argument(
        "--vae", type=first_stage_of, action="append", default=[], metavar="F=MODEL", help="a first stage to take"
    )
    quality.add_argument("--first-stage-steps", type=int, default=1500 if on_gpu else 20)
    quality.add_argument("--classifier-steps", type=int, default=3000 if on_gpu else 20)
    quality.add_argument("--pictures", type=int, default=4096 if on_gpu else 80, help="drawn, for each f")
    arguments = parser.parse_args()
    arguments.factors = arguments.factors or [*(UNETS if arguments.quality else MATCHED)]
    if arguments.quality and (unknown := set(arguments.factors) - set(UNETS)):
        parser.error(f"{min(unknown)} is not one of {', '.join(map(str, UNETS))}, of which quality is measured")
    if unknown := set(arguments.factors) - set(MATCHED):
        parser.error(f"{min(unknown)} is not one of {', '.join(map(str, MATCHED))}")
    if arguments.out is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib: pip install matplotlib")
    if arguments.seed < 0:
        parser.error(f"--seed {arguments.seed}: must be at least 0")
    logging.set_verbosity_error()  # it warns of casts to bf16 that are meant
    device = torch.device("cuda" if on_gpu else "cpu")
    measured_on, rows = context(), []
    if arguments.quality:
        try:
            rows = quality_rows(arguments, measured_on)
        except UserError as error:
            parser.error(str(error))
        cost_quality.table(rows)
        if arguments.out is not None:
            cost_quality.draw(rows, arguments.out.with_suffix(".quality.png"), measured_on["hardware"])
        return
    for factor in arguments.factors:
        row: dict[str, Any] = {"work": "cost_curve", "variant": "fast" if arguments.fast else "eager"}
        row |= {"factor": factor, "pixels": 256 if on_gpu else 128, "precision": "bf16"}
        try:
            row |= curve_point(factor, arguments, device)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        rows.append(row)
        record(arguments.out, {key: rounded(value) for key, value in row.items()} | measured_on)
        free(device)
    table(rows)
    if arguments.out is not None:
        draw(rows, arguments.out.with_suffix(".png"), measured_on["hardware"])


if __name__ == "__main__":
    main()
