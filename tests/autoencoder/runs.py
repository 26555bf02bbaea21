"""Tiny runs of the first stage, and what they left."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

SETTINGS = [
    "model.block_out_channels=[8,16]",
    "model.layers_per_block=1",
    "model.norm_num_groups=4",
    "model.mid_block_add_attention=false",
    "data.flip=true",
    "optim.lr=1e-3",
    "optim.schedule=cosine",
    "optim.warmup_images=20",
    "optim.weight_decay=0.01",
    "ema.halflife_images=50",
    "train.global_batch=4",
    "train.threads=1",
    "train.device=cpu",
    "tracker=none",
    "tracker.every=1",
    "sample.every=0",
]


def arguments(shards: Path, run: Path, *more: str) -> list[str]:
    return [f"data.shards={shards}", f"run.dir={run}", *SETTINGS, *more]


def losses(run: Path) -> list[dict[str, float]]:
    """What was logged at each step, without the speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_s", None)
    return [line for line in lines if "loss" in line]


def assert_same_run(one: Path, other: Path, step: int, discriminator: bool = False) -> None:
    folders = [run / "checkpoints" / f"step-{step:08d}" for run in (one, other)]
    files = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*.safetensors")) for f in folders]
    assert files[0] == files[1]
    # weights, average, two moments; of the discriminator weights and two moments
    assert len(files[0]) == (7 if discriminator else 4)
    for name in files[0]:
        a, b = (load_file(folder / name) for folder in folders)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert losses(one) == losses(other)
    final = [load_file(run / "vae" / "diffusion_pytorch_model.safetensors") for run in (one, other)]
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[0])
    assert (one / "vae" / "config.json").read_text() == (other / "vae" / "config.json").read_text()
