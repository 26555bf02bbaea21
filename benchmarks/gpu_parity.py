"""Does a GPU train the same model as the CPU? Loss logs of short runs under each precision and strategy.

    python -m benchmarks.gpu_parity --out benchmarks/results/gpu_parity.jsonl

Encodes the bundled emoji with a random autoencoder (on the GPU and on the CPU), trains `experiment=smoke` for 20
steps in float32 on the CPU, and then on the GPUs that are there: every precision on one, every strategy over all.
Draws are addressed, so noise, timesteps, captions and order are the same everywhere. One JSON line a variant:
the largest relative distance of its losses, held-out loss and final averaged weights from the CPU's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from benchmarks.common import context, record
from finetune.data.shards import ShardSet


def run(words: list[str], gpus: int) -> None:
    """`finetune` or `data-tools` in a process of its own, or one process a GPU."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)] if gpus > 1 else []
    command = [sys.executable, *launcher, "-m", *words]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if gpus == 0 else {}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **hidden})
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def train(folder: Path, name: str, latents: Path, gpus: int, *overrides: str) -> Path:
    out = folder / name
    shared = ["experiment=smoke", f"data.shards={latents}", "tracker=none", "train.global_batch=16"]
    run(["finetune.train", *shared, f"run.dir={out}", *overrides], gpus)
    return out


def losses(run: Path) -> tuple[np.ndarray, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = np.array([line["loss"] for line in lines if "loss" in line])
    return training, [line["validation/loss"] for line in lines if "validation/loss" in line][-1]


def averaged(run: Path) -> torch.Tensor:
    file = run / "checkpoints/step-00000020/ema/unet/diffusion_pytorch_model.safetensors"
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(file).items())])


def distance(run: Path, reference: Path) -> dict[str, float]:
    (loss, held_out), (loss_ref, held_out_ref) = losses(run), losses(reference)
    weights, weights_ref = averaged(run), averaged(reference)
    return {
        "loss": float(np.max(np.abs(loss - loss_ref) / loss_ref)),
        "held_out_loss": abs(held_out - held_out_ref) / held_out_ref,
        "ema_weights": float(torch.linalg.norm(weights - weights_ref) / torch.linalg.norm(weights_ref)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines are appended here as well")
    parser.add_argument("--only", default=".*", help="regular expression: the variants to run, as 'zero3|resumed'")
    arguments = parser.parse_args()
    gpus = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
        vae = AutoencoderKL(block_out_channels=(16, 32, 32), norm_num_groups=8, latent_channels=4, **blocks)
        vae.save_pretrained(folder / "vae")
        shards = "fluent-emoji"
        for device, count in (("cpu", 0), ("cuda", 1)):
            words = ["data_tools", "encode", shards, "--vae", str(folder / "vae"), "--out", str(folder / device)]
            if count <= gpus:
                run([*words, "--device", device], count)
        latents = folder / "cpu"
        if gpus:
            sets = [ShardSet.open(folder / device) for device in ("cpu", "cuda")]
            moments = [np.empty((1200, 8, 16, 16), np.float16) for _ in sets]
            for one, read in zip(sets, moments, strict=True):
                one.read_latents(np.arange(1200), read)
            apart = np.abs(moments[1].astype(np.float32) - moments[0]).max() / np.abs(moments[0]).max()
            record(arguments.out, {"work": "encode", "variant": "cuda", "moments": float(apart)} | context())

        reference = train(folder, "reference", latents, 0)
        variants: list[tuple[str, int, list[str]]] = []
        for precision in ("fp32", "bf16", "fp16"):
            variants.append((f"ddp-{precision}", min(gpus, 1), ["strategy=ddp", f"train.precision={precision}"]))
        for strategy in ("ddp", "zero1", "zero2", "zero3") if gpus else ():
            for precision in ("fp32", "bf16") if strategy != "ddp" or gpus > 1 else ():
                variants.append(
                    (f"{strategy}-{precision}", gpus, [f"strategy={strategy}", f"train.precision={precision}"])
                )
        for label, count, overrides in variants:
            if not re.search(arguments.only, label):
                continue
            out = train(folder, f"{label}-{count}", latents, count, *overrides)
            row = {
                "work": "smoke",
                "variant": label,
                "processes": max(count, 1),
                "device": "cuda" if count else "cpu",
            }
            record(arguments.out, row | distance(out, reference) | context())
        if gpus and re.search(arguments.only, "ddp-fp32-resumed"):
            whole = train(folder, "whole", latents, 1)
            again = train(folder, "halves", latents, 1, "train.steps=10")
            train(folder, "halves", latents, 1)
            row = {"work": "smoke", "variant": "ddp-fp32-resumed", "processes": 1, "device": "cuda"}
            record(arguments.out, row | distance(again, whole) | context())


if __name__ == "__main__":
    main()
