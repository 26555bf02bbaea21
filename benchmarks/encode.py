"""Pictures a second of `data-tools encode`, from JPEG to latent shards, and of what it is made of.

    python -m benchmarks.encode --parts apart,autoencoder,kernels   # the autoencoder alone
    python -m benchmarks.encode --parts path,whole --batch 32       # with pictures decoded by worker processes

apart         the largest relative distance of moments from diffusers' in float32, of each variant
autoencoder   one batch again and again, already on the device: the limit
kernels       milliseconds of a batch by class of kernel, and the longest
path          JPEGs to batches in page-locked memory, without an autoencoder: the other limit
whole         the command, with the autoencoder as diffusers wrote it (`--no-fast`) and with ours

The autoencoder has Stable Diffusion's shape and random weights; the pictures are JPEGs (quality 90) of 1.25
times the size with the spectrum of photographs. A rate of the whole command is the difference of two runs'
pictures over that of their seconds, so that starting up (given beside it) is not in it. One JSON line each.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from benchmarks.common import context, record
from benchmarks.profile_step import breakdown
from benchmarks.ranks import waiter
from data_tools.arguments import default_workers
from data_tools.encode.encoder import stack
from data_tools.encode.prepare import Prepared, Recipe, prepare
from data_tools.filters import Filters
from data_tools.pictures import PictureSource
from data_tools.workers import Workers
from finetune.data.shards import ShardWriter, json_bytes
from finetune.models import fast
from finetune.models.autoencoder import encode_moments, load_autoencoder

SHAPE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
PARTS = ("apart", "autoencoder", "kernels", "path", "whole")
VARIANTS = ("stock", "channels_last", "ours", "ours_by_trial")  # the last with `cudnn.benchmark`


def photographs(count: int, height: int, width: int) -> list[bytes]:
    """JPEGs of noise whose amplitude falls as 1 / frequency, as photographs' does (Field 1987)."""
    generator = np.random.default_rng(0)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / max(height, width))
    found = []
    for _ in range(count):
        phase = np.exp(2j * np.pi * generator.random((3, *amplitude.shape)))
        pixels = np.fft.irfft2(amplitude * phase, s=(height, width))
        pixels = 128 + 50 * pixels / pixels.std()
        buffer = io.BytesIO()
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))
        image.save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def write_set(folder: Path, count: int, size: int) -> None:
    """Image shards of `count` pictures, of which 64 differ."""
    jpegs = photographs(min(count, 64), size * 5 // 4, size * 5 // 4)
    with ShardWriter(folder, "images", max_samples=500) as writer:
        for index in range(count):
            members = {"jpg": jpegs[index % len(jpegs)], "json": json_bytes({"captions": [f"picture {index}"]})}
            writer.write(f"{index:06d}", members)
        writer.finish()


@contextlib.contextmanager
def autoencoder(folder: Path, variant: str, dtype: torch.dtype, device: torch.device) -> Iterator[Any]:
    """The autoencoder in `folder` as a variant has it."""
    vae = load_autoencoder(folder, dtype=dtype, device=device)
    if variant != "stock":
        vae.to(memory_format=torch.channels_last)
    if variant.startswith("ours") and not fast.make_encoder_fast(vae):
        sys.exit("the fast encoder does not know this autoencoder")
    torch.backends.cudnn.benchmark = variant == "ours_by_trial"
    try:
        yield vae
    finally:
        torch.backends.cudnn.benchmark = False
        if device.type == "cuda":
            torch.cuda.empty_cache()


def noise(batch: int, height: int, width: int, device: torch.device) -> torch.Tensor:
    """Pictures [batch, 3, height, width] in [-1, 1], channels last in memory as `data-tools encode` has them."""
    images_BHW3 = torch.rand((batch, height, width, 3), generator=torch.Generator().manual_seed(1))
    return (images_BHW3 * 2 - 1).to(device).permute(0, 3, 1, 2)


def apart(folder: Path, size: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Of two pictures of the size, and of one of odd sides: ||moments - exact|| / ||exact||, the larger."""
    batches = [noise(2, size, size, device), noise(1, size // 2 + 1, size // 3 * 2 + 3, device)]
    found: dict[str, float] = {}
    with contextlib.ExitStack() as scope:
        scope.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
        torch.backends.cudnn.allow_tf32 = False
        with autoencoder(folder, "stock", torch.float32, device) as vae:
            exact = [encode_moments(vae, images) for images in batches]
        for variant, kind in (("ours", torch.float32), ("stock", dtype), ("ours", dtype)):
            with autoencoder(folder, variant, kind, device) as vae:
                distances = [
                    float((encode_moments(vae, images) - wanted).norm() / wanted.norm())
                    for images, wanted in zip(batches, exact, strict=True)
                ]
            found[f"{variant}_{str(kind).removeprefix('torch.')}"] = max(distances)
    return found


def rate(vae: Any, images_B3HW: torch.Tensor, seconds: float) -> float:
    """Pictures a second of the autoencoder alone."""
    wait = waiter(images_B3HW.device)
    for _ in range(3):
        encode_moments(vae, images_B3HW)
    wait()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        for _ in range(4):
            encode_moments(vae, images_B3HW)
        wait()
        count += 4 * len(images_B3HW)
    return count / (time.perf_counter() - started)


def _begins(workers: int, batch: int) -> int:
    """The picture from which on `decoded` counts: by then all workers run."""
    return 4 * workers + batch


def decoded(shards: Path, size: int, batch: int, workers: int, pin: bool) -> float:
    """Pictures a second from shards to batches, as the command makes them, once all workers run."""
    recipe = Recipe(((size, size),), (255, 255, 255), Filters())
    source = PictureSource.open(shards)
    few: list[Prepared] = []
    started, count = 0.0, 0
    with Workers(workers) as pool:
        work = pool.map(functools.partial(prepare, recipe=recipe), source, ahead=4 * workers + batch)
        for number, (_, result) in enumerate(work):
            assert isinstance(result, Prepared)
            few.append(result)
            if len(few) == batch:
                stack(few[0].bucket, few, pin)
                few = []
            if number == _begins(workers, batch):
                started, count = time.perf_counter(), -number
        return (count + number) / (time.perf_counter() - started)


def command_seconds(command: list[str], out: Path) -> float:
    """Wall seconds of one `data-tools encode`, start-up included."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def whole(folder: Path, args: argparse.Namespace, batch: int, workers: int, *, ours: bool) -> dict[str, float]:
    """Pictures a second of the command, and the seconds until it begins."""
    words = ["--size", str(args.size), "--dtype", args.dtype, "--batch", str(batch), "--workers", str(workers)]
    words += ["--vae", str(folder / "vae"), "--fast" if ours else "--no-fast"]
    sets = [[sys.executable, "-m", "data_tools", "encode", str(folder / str(n)), *words] for n in args.pictures]
    few, many = (command_seconds(command, folder / "out") for command in sets)
    per_s = (args.pictures[1] - args.pictures[0]) / (many - few)
    return {"pictures_per_s": round(per_s, 1), "start_s": round(few - args.pictures[0] / per_s, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--variants", default="stock,channels_last,ours", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--pictures", type=int, nargs=2, default=[1000, 5000], help="of the two runs of `whole`")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--widths", type=int, nargs="+", default=SHAPE["block_out_channels"])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each rate of the autoencoder alone")
    parser.add_argument("--workers", type=int, help="that decode (default: as data-tools has it)")
    parser.add_argument("--json", type=Path, help="JSON lines are appended here as well")
    args = parser.parse_args()
    parts, variants = args.parts.split(","), args.variants.split(",")
    for given, known in ((parts, PARTS), (variants, VARIANTS)):
        if unknown := [one for one in given if one not in known]:
            parser.error(f"{unknown[0]} is not one of {', '.join(known)}")
    workers = default_workers() if args.workers is None else args.workers
    begins = _begins(workers, max(args.batch))
    if "path" in parts and args.pictures[1] < 2 * begins:
        parser.error(
            f"--pictures {args.pictures[1]}: the path begins to count at {begins}, take {2 * begins} or more"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.deterministic = True  # as in `data-tools encode`
    dtype = getattr(torch, args.dtype)
    common = {"benchmark": "encode", **context(), "size": args.size, "dtype": args.dtype}

    def report(part: str, **found: Any) -> None:
        record(args.json, {**common, "part": part, **found})

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        AutoencoderKL(**SHAPE | {"block_out_channels": args.widths}).save_pretrained(folder / "vae")
        if "apart" in parts:
            report("apart", apart=apart(folder / "vae", args.size, dtype, device))
        for batch in args.batch if {"autoencoder", "kernels"} & set(parts) else ():
            images_B3HW = noise(batch, args.size, args.size, device)
            for variant in variants:
                with autoencoder(folder / "vae", variant, dtype, device) as vae:
                    if "autoencoder" in parts:
                        per_s = rate(vae, images_B3HW, args.seconds)
                        report("autoencoder", variant=variant, batch=batch, pictures_per_s=round(per_s, 1))
                    if "kernels" in parts and batch == args.batch[-1]:
                        step: Callable[[], Any] = functools.partial(encode_moments, vae, images_B3HW)
                        found, longest = breakdown(step, 3, device)
                        report("kernels", variant=variant, batch=batch, **found)
                        print("\n".join(longest), flush=True)
            del images_B3HW
        if not {"path", "whole"} & set(parts):
            return
        for count in args.pictures:
            write_set(folder / str(count), count, args.size)
        for batch in args.batch:
            if "path" in parts:
                per_s = decoded(folder / str(args.pictures[1]), args.size, batch, workers, device.type == "cuda")
                report("path", batch=batch, workers=workers, pictures_per_s=round(per_s, 1))
            for variant in [one for one in variants if one in ("stock", "ours")] if "whole" in parts else ():
                found = whole(folder, args, batch, workers, ours=variant == "ours")
                report("whole", variant=variant, batch=batch, workers=workers, **found)


if __name__ == "__main__":
    main()
