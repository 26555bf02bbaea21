"""How good the shuffle is beside a full permutation, how near to its shards, and how fast from any position.

    python -m benchmarks.order [--json benchmarks/results/order.jsonl]

Shuffle: mean displacement of a sample between manifest and epoch (a share of the epoch; a full permutation: 1/3),
how often neighbours in a shard meet in one batch, and how many shards a batch draws from, beside a full
permutation of the same set. Locality: nodes that read a shard in an epoch. Start: seconds and memory until the
100,000,000th sample of a synthetic manifest is known, in a fresh process after its imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import context, record
from finetune.data.order import WINDOW, Order, Source
from finetune.data.shards import EncoderInfo, Manifest, ShardInfo

START = """
import resource, sys, time
import torch, numpy
from finetune.build import open_data
from finetune.config import Config, compose
settings = ["data.shards=" + sys.argv[1], "train.global_batch=2048", "validation.samples=0"]
config = compose("train", settings, Config)[0]
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
data = open_data(config, held_out_batch=64)
batch = data.order.batch(100_000_000 // 2048, 0, 2048 // 8)
ids = data.ids(batch.bucket, batch.sources, batch.rows)
print(time.perf_counter() - started, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def quality(shards: int, size: int, global_batch: int, window: int = WINDOW) -> dict[str, float]:
    """One epoch of a set of equal shards beside a full permutation."""
    order = Order([Source([np.full(shards, size)])], seed=0, global_batch=global_batch, window=window)
    total = order.steps_per_epoch * global_batch
    rows = np.concatenate([order.batch(step).rows for step in range(order.steps_per_epoch)])
    full = np.random.default_rng(0).permutation(shards * size)[:total]
    ours, theirs = (_measure(each, size, shards * size, global_batch) for each in (rows, full))
    return {
        "displacement": round(ours[0], 4),
        "displacement_full": round(theirs[0], 4),
        "neighbours_ratio": round(ours[1] / max(theirs[1], 1e-12), 3),
        "shards_in_batch": round(ours[2], 1),
        "shards_in_batch_full": round(theirs[2], 1),
    }


def _measure(rows: np.ndarray, size: int, samples: int, batch: int) -> tuple[float, float, float]:
    displacement = float(np.abs(np.arange(len(rows)) / len(rows) - rows / samples).mean())
    step = np.full(samples, -1)
    step[rows] = np.arange(len(rows)) // batch
    inside = np.arange(samples - 1) % size != size - 1
    together = float(((step[1:] == step[:-1]) & (step[1:] >= 0))[inside].mean())
    drawn_from = np.mean(
        [len(np.unique(rows[i : i + batch] // size)) for i in range(0, len(rows) - batch + 1, batch)]
    )
    return displacement, together, float(drawn_from)


def nodes_a_shard(shards: int, size: int, global_batch: int, nodes: int) -> float:
    """Nodes that read a shard in one epoch, on average over shards."""
    order = Order([Source([np.full(shards, size)])], seed=0, global_batch=global_batch)
    share = global_batch // nodes
    pairs: set[int] = set()
    for step in range(order.steps_per_epoch):
        rows = order.batch(step).rows
        pairs.update((rows // size * nodes + np.arange(global_batch) // share).tolist())
    return len(pairs) / shards


def start(shards: int) -> dict[str, float]:
    """A manifest of 100 million samples in so many shards: seconds and MiB to its last sample."""
    encoder = EncoderInfo("org/vae", "0" * 64, 0.18215, 0.0, "float32", (-1.0, 1.0), channels=4, downsample=8)
    buckets = [(512, 512), (448, 576), (576, 448)]
    infos = [
        ShardInfo(f"{n:05d}.tar", buckets[n % 3], 100_000_000 // shards, 1 << 30, f"{n:064x}")
        for n in range(shards)
    ]
    with tempfile.TemporaryDirectory() as folder:
        Manifest("latents", ["latent.npy", "json"], infos, encoder).save(folder)
        command = [sys.executable, "-c", START, folder]
        found = [
            tuple(map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))
            for _ in range(3)
        ]
    seconds, mebibytes = sorted(found)[1]
    return {"seconds": round(seconds, 2), "MiB": round(mebibytes, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    row: dict[str, Any] = {"benchmark": "order", **context()}
    sets = {
        "100k samples, 10 shards, batch 256": (10, 10_000, 256),
        "1M samples, 100 shards, batch 256": (100, 10_000, 256),
        "4M samples, 4000 shards, batch 2048": (4000, 1_000, 2048),
    }
    row["shuffle"] = {name: quality(*each) for name, each in sets.items()}
    row["nodes_a_shard"] = {
        f"{nodes} nodes, {shards} shards": round(nodes_a_shard(shards, 1_048_576 // shards, 2048, nodes), 2)
        for nodes, shards in ((1, 1024), (8, 1024), (64, 1024), (128, 1024), (64, 64))
    }
    row["start"] = {f"{shards} shards": start(shards) for shards in (10_000, 100_000)}
    record(args.json, row)
    print(json.dumps({name: row[name] for name in ("shuffle", "nodes_a_shard", "start")}, indent=2))


if __name__ == "__main__":
    main()
