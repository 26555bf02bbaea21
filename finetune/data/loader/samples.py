"""Which samples of a source are trained on, and which are held out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import copy

import numpy as np

from finetune.data.order import permute
from finetune.data.shards import Bucket, Manifest, ShardSet


def hold_out(sizes: Sequence[int], samples: int) -> list[np.ndarray]:
    """Positions (int64, ascending) held out of each bucket, in proportion to the buckets' sizes.

    The choice depends on the sizes alone, not on the run's seed, so runs over one set of shards compare.

    Args:
        samples: how many to hold out; fewer only where a tenth of each bucket, which is the most, are fewer.
    """
    total = max(1, sum(sizes))
    quotas = [samples * size / total for size in sizes]
    most = [size // 10 for size in sizes]
    counts = [min(limit, round(quota)) for limit, quota in zip(most, quotas, strict=True)]
    if sum(counts) != samples:  # largest remainders (Hamilton): each of many buckets may round to none
        counts = [min(limit, int(quota)) for limit, quota in zip(most, quotas, strict=True)]
        order = sorted(range(len(sizes)), key=lambda bucket: counts[bucket] - quotas[bucket])
        while room := [bucket for bucket in order if counts[bucket] < most[bucket]][: samples - sum(counts)]:
            for bucket in room:
                counts[bucket] += 1
    return [
        np.sort(permute(np.arange(count), size, size)) if count else np.empty(0, np.int64)
        for size, count in zip(sizes, counts, strict=True)
    ]


class Samples:
    """The samples of one source: which ids are trained on, and which are held out, by bucket.

    Args:
        shards: latent shards; first_id: added to their sample ids, so that ids of several sources differ.
        buckets: of all sources, in one order.
        held_out: positions held out of each bucket, ascending.
    """

    def __init__(
        self, shards: ShardSet, buckets: Sequence[Bucket], held_out: Sequence[np.ndarray], first_id: int = 0
    ) -> None:
        self.shards, self.first_id = shards, first_id
        numbers = [shards.bucket_shards(bucket) for bucket in buckets]
        sizes = [np.diff(shards.starts)[each] for each in numbers]
        self._ends = [np.cumsum(each) for each in sizes]
        # Add it to a position in the bucket, and it is a sample id.
        self._shifts = [
            shards.starts[each] - (ends - size) for each, ends, size in zip(numbers, self._ends, sizes, strict=True)
        ]
        self._held = list(held_out)
        # Training rows skip the held-out positions: the i-th of these comes before row held[i] - i.
        self._gaps = [held - np.arange(len(held)) for held in held_out]
        self.sizes = [
            each - np.bincount(np.searchsorted(ends, held, side="right"), minlength=len(each))
            for each, ends, held in zip(sizes, self._ends, held_out, strict=True)
        ]

    def training_ids(self, bucket: int, rows: np.ndarray) -> np.ndarray:
        """Sample ids (int64) of training rows of a bucket."""
        return self._ids(bucket, rows + np.searchsorted(self._gaps[bucket], rows, side="right"))

    def held_out_ids(self, bucket: int) -> np.ndarray:
        """Sample ids (int64) held out of a bucket."""
        return self._ids(bucket, self._held[bucket])

    def excerpt(self, sample_ids: np.ndarray) -> Samples:
        """The same for reading these samples alone, in this order (see `ShardSet.excerpt`)."""
        part = copy(self)
        part.shards = self.shards.excerpt(sample_ids - self.first_id)
        return part

    def _ids(self, bucket: int, positions: np.ndarray) -> np.ndarray:
        shards = np.searchsorted(self._ends[bucket], positions, side="right")
        return self.first_id + positions + self._shifts[bucket][shards]


def largest_bucket(sets: Iterable[Manifest]) -> Bucket | None:
    """(height, width) in pixels of the bucket with most samples over all sets, held-out ones too; None without any.

    Sample grids have its size. Of buckets with as many samples it is the smallest.
    """
    sizes: Counter[Bucket] = Counter()
    for shard in itertools.chain.from_iterable(each.shards for each in sets):
        if shard.bucket is not None:
            sizes[shard.bucket] += shard.samples
    return max(sorted(sizes), key=sizes.__getitem__, default=None)
