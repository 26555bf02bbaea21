"""Order and shards made into batches, read ahead by threads, from any position.

A rank takes its contiguous share of each global batch and cuts it into micro-batches. What a sample is given (its
clock, its caption) depends on its place in the global batch alone, so any number of ranks and any accumulation
train on the same thing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finetune import rng
from finetune.batch import Batch
from finetune.data.order import Order
from finetune.data.shards import EncoderInfo, ShardSet
from finetune.latents import LatentSpace


def hold_out(buckets: Sequence[np.ndarray], samples: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Split sample ids into training and held-out parts, bucket by bucket, in proportion.

    The choice depends on the ids alone, not on the run's seed, so runs over one set of shards compare.

    Args:
        buckets: sample ids of each bucket.
        samples: how many to hold out; at most a tenth of each bucket is taken.

    Returns:
        Training ids and held-out ids of each bucket, each in ascending order.
    """
    total = sum(map(len, buckets))
    train, held = [], []
    for ids in buckets:
        count = min(len(ids) // 10, round(samples * len(ids) / max(1, total)))
        chosen = np.random.Generator(np.random.Philox(len(ids))).permutation(len(ids))[:count]
        mask = np.zeros(len(ids), dtype=bool)
        mask[chosen] = True
        train.append(ids[~mask])
        held.append(ids[mask])
    return train, held


def captions_of(record: dict) -> list[str]:
    """A record's captions; the empty one where it has none."""
    return record.get("captions") or [record.get("caption") or ""]


def caption_of(record: dict, draw: float) -> str:
    """One of the record's captions, chosen by `draw` in [0, 1); "" where there is none."""
    captions = captions_of(record)
    return str(captions[int(draw * len(captions))])


def read_batch(
    shards: ShardSet, sample_ids: np.ndarray, bucket: tuple[int, int], clock: np.ndarray, seed: int
) -> Batch:
    """Read named samples into one batch (see `Batch`); raises `ShardError` naming what can't be read."""
    encoder = shards.manifest.encoder
    assert encoder is not None
    height, width = bucket[0] // encoder.downsample, bucket[1] // encoder.downsample
    shape = (len(sample_ids), 2 * encoder.channels, height, width)
    moments = torch.empty(shape, dtype=torch.float16)
    shards.read_latents(sample_ids, moments.numpy())
    clock_B = torch.from_numpy(clock)
    draws = rng.uniform(seed, "caption", clock_B).tolist()
    captions = [caption_of(shards.read_json(int(i)), draw) for i, draw in zip(sample_ids, draws, strict=True)]
    return Batch(moments, captions, clock_B, torch.from_numpy(sample_ids), bucket)


class Loader:
    """Iterates over this rank's micro-batches for ever, from optimizer step `start_step`.

    Args:
        shards: latent shards.
        buckets: per bucket of `order`, its (height, width) in pixels and its sample ids.
        order: which rows of which bucket form each global batch.
        seed: of the captions drawn.
        rank, world_size: this rank's place; `world_size * micro_batch` divides the global batch.
        micro_batch: samples in one `Batch`.
        readers: threads; prefetch: batches held ready.
        pin: page-locked batches, for a GPU.
    """

    def __init__(
        self,
        shards: ShardSet,
        buckets: Sequence[tuple[tuple[int, int], np.ndarray]],
        order: Order,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int,
        start_step: int = 0,
        readers: int = 2,
        prefetch: int = 4,
        pin: bool = False,
    ) -> None:
        assert order.global_batch % (world_size * micro_batch) == 0
        self.shards, self.buckets, self.order, self.seed = shards, buckets, order, seed
        self.share = order.global_batch // world_size
        self.first = rank * self.share
        self.micro_batch, self.start_step, self.pin = micro_batch, start_step, pin
        self.prefetch = max(1, prefetch)
        self.pool = ThreadPoolExecutor(max(1, readers), thread_name_prefix="reader")

    def _read(self, step: int, offset: int) -> Batch:
        chosen = self.order.batch(step)
        bucket, ids = self.buckets[chosen.bucket]
        begin = self.first + offset
        rows = chosen.rows[begin : begin + self.micro_batch]
        clock = step * self.order.global_batch + np.arange(begin, begin + self.micro_batch, dtype=np.int64)
        batch = read_batch(self.shards, ids[rows], bucket, clock, self.seed)
        return batch.pin() if self.pin else batch

    def _positions(self) -> Iterator[tuple[int, int]]:
        step = self.start_step
        while True:
            for offset in range(0, self.share, self.micro_batch):
                yield step, offset
            step += 1

    def __iter__(self) -> Generator[Batch]:
        ahead: deque[Future[Batch]] = deque()
        positions = self._positions()
        try:
            while True:
                while len(ahead) < self.prefetch:
                    ahead.append(self.pool.submit(self._read, *next(positions)))
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class Data:
    """Training order and held-out batches over one set of latent shards."""

    shards: ShardSet
    order: Order
    buckets: list[tuple[tuple[int, int], np.ndarray]]  # (height, width) in pixels, ids of training samples
    held_out: list[Batch]
    space: LatentSpace

    @property
    def largest_bucket(self) -> tuple[int, int]:
        """(height, width) in pixels of the bucket with most samples."""
        return max(self.buckets, key=lambda bucket: len(bucket[1]))[0]

    @property
    def encoder(self) -> EncoderInfo:
        """The autoencoder that made the latents."""
        encoder = self.shards.manifest.encoder
        assert encoder is not None
        return encoder

    def loader(self, **settings: Any) -> Loader:
        """A `Loader` over the training samples; `settings` are its keyword arguments."""
        return Loader(self.shards, self.buckets, self.order, **settings)
