"""Samples a second of the loader, of its peers and of the limit, in one process on the same content.

    python -m benchmarks.loader [--samples 16384] [--rounds 3] [--json benchmarks/results/loader.jsonl]

Content: Stable Diffusion's moments, float16 [8, 64, 64], and a record with captions. Each peer gets its own format
of it and its own shuffle; all files are in the page cache. The limit is a plain loop of `preadv` over the members,
in random order, into one batch tensor. `mosaicml-streaming` and `litdata` are left out where they are missing.
Contenders take turns, round by round, each in a process of its own; the table has each one's median.

"Waiting" is the share of a consumer's time spent in `next`, where it works 5 ms a batch otherwise.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import context, record
from finetune.data.loader import Data, Loader, Samples
from finetune.data.order import Order, Source
from finetune.data.shards import LATENT, EncoderInfo, ShardSet, ShardWriter, json_bytes, latent_bytes
from finetune.latents import LatentSpace

SHAPE = (8, 64, 64)
BATCH = 64
PEERS = {"mosaicml-streaming": "streaming", "litdata": "litdata"}
ENCODER = EncoderInfo("bench/vae", "0" * 64, 0.18215, 0.0, "float32", (-1.0, 1.0), channels=4, downsample=8)


def content(count: int) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Moments and records."""
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((64, *SHAPE)).astype(np.float16)
    for index in range(count):
        captions = [f"a photograph of thing {index}, seen from afar", f"thing {index} on a table, oil on canvas"]
        size = {"original_size": [640, 512], "crop": [64, 0, 512, 512]}
        yield noise[index % 64], {"captions": captions, **size}


# --- contenders: each yields (float16 [BATCH, 8, 64, 64], captions) for ever --------------------------


class Preadv:
    """The limit: one batch tensor used again and again, no captions, no threads."""

    def __init__(self, folder: Path) -> None:
        self.shards = ShardSet.open(folder)
        column = self.shards.manifest.members.index(LATENT)
        self.places = []
        self.files = []
        for info in self.shards.manifest.shards:
            self.files.append(os.open(folder / info.name, os.O_RDONLY))
            index = np.load((folder / info.name).with_suffix(".index.npy"))
            end = index[:, column].sum(axis=1)
            size = int(np.prod(SHAPE)) * 2
            self.places += [(self.files[-1], int(offset)) for offset in end - size]

    def __iter__(self) -> Iterator[torch.Tensor]:
        size = int(np.prod(SHAPE)) * 2
        out = torch.empty((BATCH, *SHAPE), dtype=torch.float16)
        view = out.numpy().data.cast("B")
        while True:
            order = np.random.permutation(len(self.places))
            for start in range(0, len(order) - BATCH + 1, BATCH):
                for row, sample in enumerate(order[start : start + BATCH].tolist()):
                    fd, offset = self.places[sample]
                    os.preadv(fd, (view[row * size : (row + 1) * size],), offset)
                yield out


def ours(folder: Path, readers: int) -> Loader:
    shards = ShardSet.open(folder)
    buckets = list(shards.bucket_sizes)
    samples = Samples(shards, buckets, [np.empty(0, np.int64)])
    order = Order([Source(samples.sizes)], seed=0, global_batch=BATCH)
    data = Data([samples], buckets, order, [], LatentSpace(0.18215))
    return data.loader(seed=0, micro_batch=BATCH, readers=readers, pin=torch.cuda.is_available())


def webdataset_loader(folder: Path) -> Iterator[Any]:
    import webdataset

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    pipeline = webdataset.WebDataset(urls, shardshuffle=100, empty_check=False).shuffle(1000)
    return _for_ever(pipeline.decode().to_tuple("latent.npy", "json").batched(BATCH))


def streaming_loader(folder: Path, count: int) -> Iterator[Any]:
    from streaming import MDSWriter, StreamingDataset

    if not folder.exists():
        columns = {"moments": "ndarray:float16:8,64,64", "record": "json"}
        with MDSWriter(out=str(folder), columns=columns, progress_bar=False) as writer:
            for moments, said in content(count):
                writer.write({"moments": moments, "record": said})
    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH, num_canonical_nodes=1)
    return _for_ever(torch.utils.data.DataLoader(dataset, BATCH, drop_last=True, collate_fn=_collate))


def litdata_loader(folder: Path, count: int) -> Iterator[Any]:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    if not folder.exists():
        folder.mkdir(parents=True)
        writer = BinaryWriter(str(folder), chunk_bytes="64MB")
        for index, (moments, said) in enumerate(content(count)):
            writer[index] = {"moments": torch.from_numpy(moments), "record": said["captions"][0]}
        writer.done()
        writer.merge()
    dataset = StreamingDataset(str(folder), shuffle=True, drop_last=True)
    return _for_ever(StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0))


def _collate(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, list[Any]]:
    return torch.from_numpy(np.stack([row["moments"] for row in rows])), [row["record"] for row in rows]


def _for_ever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


# --- measuring --------------------------------------------------------------------------------------


def rate(batches: Iterator[Any], seconds: float) -> float:
    """Samples a second, after a first stretch that isn't counted."""
    for _ in range(8):
        next(batches)
    started, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < seconds:
        next(batches)
        count += BATCH
    return count / spent


def waiting(batches: Iterator[Any], steps: int = 1000) -> float:
    """Share of the time that a consumer of 5 ms a batch waits."""
    for _ in range(8):
        next(batches)
    started, waited = time.perf_counter(), 0.0
    for _ in range(steps):
        before = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - before
        time.sleep(0.005)
    return waited / (time.perf_counter() - started)


def contender(name: str, folder: Path, samples: int) -> Iterator[Any]:
    """Batches of one contender; its content is made first where it is missing."""
    shards = folder / f"shards-{samples}"
    match name:
        case "preadv loop":
            return iter(Preadv(shards))
        case "ours":
            return iter(ours(shards, readers=1))
        case "ours, 2 readers":
            return iter(ours(shards, readers=2))
        case "webdataset":
            return webdataset_loader(shards)
        case "mosaicml-streaming":
            return streaming_loader(folder / f"mds-{samples}", samples)
        case "litdata":
            return litdata_loader(folder / f"litdata-{samples}", samples)
    raise ValueError(name)


def alone(name: str, folder: Path, args: argparse.Namespace) -> tuple[float, float]:
    """(samples a second, share of the time that a consumer of 5 ms waits) in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loader", "--folder", str(folder), "--samples", str(args.samples)]
    command += ["--seconds", str(args.seconds), "--alone", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found, waited = done.stdout.split()[-2:]
    return float(found), float(waited)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each contender in each round")
    parser.add_argument("--folder", type=Path, help="where the content is (kept) or goes; default: a temporary one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        batches = contender(args.alone, args.folder, args.samples)
        rate(batches, 1.0)
        print(rate(batches, args.seconds), waiting(batches) if args.alone == "ours" else 0.0, flush=True)
        os._exit(0)  # peers leave threads behind that would hold the process
    folder = args.folder or Path(tempfile.mkdtemp())
    shards = folder / f"shards-{args.samples}"
    if not shards.exists():
        with ShardWriter(shards, "latents", members=(LATENT, "json"), max_samples=1024) as writer:
            for index, (moments, said) in enumerate(content(args.samples)):
                members = {LATENT: latent_bytes(moments), "json": json_bytes(said)}
                writer.write(f"{index:09d}", members, (512, 512))
            writer.finish(ENCODER)
    names = ["preadv loop", "ours", "ours, 2 readers", "webdataset"]
    names += [name for name, module in PEERS.items() if importlib.util.find_spec(module)]
    for name in names[4:]:
        alone(name, folder, args)  # writes its content
    for path in sorted(folder.rglob("*")):  # into the page cache
        if path.is_file():
            path.read_bytes()
    rates: dict[str, list[float]] = {name: [] for name in names}
    waits = []
    for _ in range(args.rounds):
        for name in names:
            found, waited = alone(name, folder, args)
            rates[name].append(found)
            if name == "ours":
                waits.append(waited)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    best_peer = max((medians[name] for name in names[4:]), default=None)
    row = {
        "benchmark": "loader",
        **context(),
        "samples": args.samples,
        "samples_per_s": {name: round(value) for name, value in medians.items()},
        "spread": {name: [round(min(found)), round(max(found))] for name, found in rates.items()},
        "of_limit": round(medians["ours"] / medians["preadv loop"], 3),
        "times_webdataset": round(medians["ours"] / medians["webdataset"], 2),
        "times_best_peer": round(medians["ours"] / best_peer, 2) if best_peer else None,
        "waiting": round(statistics.median(waits), 5),
    }
    record(args.json, row)
    for name, value in medians.items():
        print(f"{name:>20}  {value:>9,.0f} samples/s  {value / medians['preadv loop']:6.1%} of the limit")
    print(f"{'waiting':>20}  {row['waiting']:.2%} of the time of a consumer of 5 ms a batch")
    if args.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
