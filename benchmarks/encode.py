"""Pictures a second of `data-tools encode`, from JPEG to latent shards, beside the bare autoencoder.

    python -m benchmarks.encode [--size 512] [--pictures 1000 5000] [--batch 8 16 32] [--dtype bfloat16]

The autoencoder has Stable Diffusion's shape and random weights; the pictures are JPEGs (quality 90) of 1.25
times the size with the spectrum of photographs. A rate is the difference of two runs' pictures over that of
their seconds, so that starting up (given beside it) is not in it. The limit is the same autoencoder on one
batch again and again, already on the device.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from benchmarks.common import context, record
from benchmarks.ranks import waiter
from finetune.data.shards import ShardWriter, json_bytes
from finetune.models.autoencoder import encode_moments

SHAPE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}


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
    jpegs = photographs(64, size * 5 // 4, size * 5 // 4)
    with ShardWriter(folder, "images", max_samples=500) as writer:
        for index in range(count):
            members = {"jpg": jpegs[index % 64], "json": json_bytes({"captions": [f"picture {index}"]})}
            writer.write(f"{index:06d}", members)
        writer.finish()


def seconds(folder: Path, vae: Path, out: Path, args: argparse.Namespace, batch: int) -> float:
    """Wall seconds of one `data-tools encode`, start-up included."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "data_tools", "encode", str(folder), "--vae", str(vae), "--out", str(out)]
    command += ["--size", str(args.size), "--dtype", args.dtype, "--batch", str(batch)]
    if args.workers is not None:
        command += ["--workers", str(args.workers)]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def limit(vae: AutoencoderKL, size: int, batch: int, budget_s: float = 8.0) -> float:
    """Pictures a second of the autoencoder alone."""
    images_B3HW = torch.rand(batch, 3, size, size, device=vae.device) * 2 - 1
    wait = waiter(vae.device)

    for _ in range(3):
        encode_moments(vae, images_B3HW)
    wait()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < budget_s:
        for _ in range(4):
            encode_moments(vae, images_B3HW)
        wait()
        count += 4 * batch
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--pictures", type=int, nargs=2, default=[1000, 5000])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(tempfile.mkdtemp())
    try:
        torch.manual_seed(0)
        vae = AutoencoderKL(**SHAPE)
        vae.save_pretrained(folder / "vae")
        vae.to(device, getattr(torch, args.dtype)).requires_grad_(False)
        sets = []
        for count in args.pictures:
            sets.append(folder / f"pictures-{count}")
            write_set(sets[-1], count, args.size)
        for batch in args.batch:
            if device.type == "cuda":
                vae.to(memory_format=torch.channels_last)
                torch.backends.cudnn.benchmark = False
            bare = limit(vae, args.size, batch)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            few, many = (seconds(each, folder / "vae", folder / "out", args, batch) for each in sets)
            rate = (args.pictures[1] - args.pictures[0]) / (many - few)
            row = {
                "benchmark": "encode",
                **context(),
                "size": args.size,
                "dtype": args.dtype,
                "batch": batch,
                "pictures_per_s": round(rate, 1),
                "autoencoder_alone": round(bare, 1),
                "of_limit": round(rate / bare, 3),
                "start_s": round(few - args.pictures[0] / rate, 1),
            }
            record(args.json, row)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
