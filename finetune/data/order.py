"""Which sample comes when: a pure function of (bucket sizes, seed, global batch, step). No I/O.

An epoch is a list of global batches. Each bucket (one aspect ratio) is permuted and cut into global batches;
the batches of all buckets are then shuffled together, so a bucket comes up in proportion to its size and every
global batch holds one shape. A tail smaller than one global batch is left out of its epoch; another epoch's
permutation leaves out others. Ranks take slices of a global batch, so the order doesn't know how many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from finetune import UserError


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step's samples: `rows` [global_batch] int64 index into bucket number `bucket`."""

    bucket: int
    rows: np.ndarray
    epoch: int


class Order:
    """The order of samples over all epochs.

    Args:
        bucket_sizes: samples in each bucket.
        seed: of the shuffle; epochs differ by it and their number.
        global_batch: samples in one optimizer step, over all ranks.
        shuffle: False keeps manifest order within buckets and in the epoch.

    Raises:
        UserError: no bucket holds one global batch.
    """

    def __init__(self, bucket_sizes: Sequence[int], *, seed: int, global_batch: int, shuffle: bool = True) -> None:
        self.bucket_sizes = tuple(bucket_sizes)
        self.seed = seed
        self.global_batch = global_batch
        self.shuffle = shuffle
        self.batches_per_bucket = tuple(size // global_batch for size in self.bucket_sizes)
        self.steps_per_epoch = sum(self.batches_per_bucket)
        if self.steps_per_epoch == 0:
            raise UserError(
                f"no bucket holds one global batch: the largest has {max(self.bucket_sizes, default=0)} samples, "
                f"train.global_batch is {global_batch}; lower train.global_batch or add pictures"
            )

    @property
    def left_out(self) -> tuple[int, ...]:
        """Samples of each bucket that an epoch does not reach."""
        return tuple(size % self.global_batch for size in self.bucket_sizes)

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of optimizer step `step` (0-based, over all epochs)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        bucket, start = self._schedule(epoch)[index]
        return GlobalBatch(
            int(bucket), self._permutation(epoch, int(bucket))[start : start + self.global_batch], epoch
        )

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, epoch, stream))))

    @lru_cache(maxsize=2)  # noqa: B019 - an Order lives as long as its run
    def _schedule(self, epoch: int) -> np.ndarray:
        """[steps_per_epoch, 2] of (bucket, first row of the bucket's permutation)."""
        schedule = np.concatenate(
            [
                np.stack([np.full(n, bucket), np.arange(n) * self.global_batch], axis=1)
                for bucket, n in enumerate(self.batches_per_bucket)
            ]
        )
        return self._generator(epoch, 0).permutation(schedule) if self.shuffle else schedule

    @lru_cache(maxsize=64)  # noqa: B019
    def _permutation(self, epoch: int, bucket: int) -> np.ndarray:
        size = self.bucket_sizes[bucket]
        return self._generator(epoch, 1 + bucket).permutation(size) if self.shuffle else np.arange(size)
