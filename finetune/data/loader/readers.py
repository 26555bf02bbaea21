"""Threads that read batches ahead."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune.batch import Batch
from finetune.data.loader.reading import Wanted, read_batch
from finetune.data.loader.samples import Samples, largest_bucket
from finetune.data.order import Order
from finetune.data.shards import Bucket, EncoderInfo
from finetune.latents import LatentSpace

_LOOK_AHEAD_SAMPLES = 1 << 16  # of a rank, whose shards are asked for beforehand where they are remote
_LOOK_AHEAD_STEPS = (64, 2048)  # at least and at most: a step costs Python's time, however few samples it has
_LOOK_EVERY_STEPS = 32
_CLOSE_S = 5.0


@dataclass
class Data:
    """Training order and held-out batches over one or several sets of latent shards.

    `buckets` ((height, width) in pixels) are numbered alike in `order` and in every source.
    """

    sources: list[Samples]
    buckets: list[Bucket]
    order: Order
    held_out: list[Batch]
    space: LatentSpace
    wanted: Wanted = field(default_factory=Wanted)

    @property
    def largest_bucket(self) -> Bucket:
        """(height, width) in pixels of the bucket with most samples."""
        bucket = largest_bucket(source.shards.manifest for source in self.sources)
        assert bucket is not None
        return bucket

    @property
    def encoder(self) -> EncoderInfo:
        """The autoencoder that made the latents."""
        encoder = self.sources[0].shards.manifest.encoder
        assert encoder is not None
        return encoder

    def ids(self, bucket: int, sources: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Sample ids (int64 [B]) of training rows of a bucket, each in its source."""
        if len(self.sources) == 1:
            return self.sources[0].training_ids(bucket, rows)
        ids = np.empty_like(rows)
        for source in np.unique(sources).tolist():
            mine = sources == source
            ids[mine] = self.sources[source].training_ids(bucket, rows[mine])
        return ids

    def loader(self, **settings: Any) -> Loader:
        """A `Loader` over the training samples; `settings` are its keyword arguments."""
        return Loader(self, **settings)


class _Shelf:
    """What one reader has ready, in order; `size` batches at most.

    Waking a thread costs the consumer more than taking a batch, so a full shelf's reader sleeps until half is gone.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[Batch | BaseException] = deque()
        self._closed = self._asleep = False
        lock = threading.Lock()
        self._filled, self._emptied = threading.Condition(lock), threading.Condition(lock)

    def put(self, item: Batch | BaseException) -> bool:
        """Add a batch, or the error that ended the reader, once there is room; False when nobody wants it."""
        with self._emptied:
            while len(self._items) >= self._size and not self._closed:
                self._asleep = True
                self._emptied.wait()
            self._asleep = False
            if not self._closed:
                self._items.append(item)
                self._filled.notify()
            return not self._closed

    def take(self) -> Batch | BaseException:
        """The next batch, once it is there."""
        if not self._items or (self._asleep and len(self._items) <= self._size // 2 + 1):
            with self._filled:
                self._emptied.notify()
                while not self._items:
                    self._filled.wait()
        return self._items.popleft()  # the consumer alone takes, so no lock

    def close(self) -> None:
        """Let go of everything, and of the reader."""
        with self._emptied:
            self._closed = True
            self._items.clear()
            self._emptied.notify()


class Loader:
    """Iterates over this rank's micro-batches for ever, from optimizer step `start_step`.

    Args:
        data: what is read, in which order.
        seed: of the captions drawn.
        rank, world_size: this rank's place; `world_size * micro_batch` divides the global batch.
        micro_batch: samples in one `Batch`.
        readers: threads; prefetch: batches held ready, beside those being read.
        pin: page-locked batches, for a GPU.
    """

    def __init__(
        self,
        data: Data,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int,
        start_step: int = 0,
        readers: int = 1,
        prefetch: int = 8,
        pin: bool = False,
    ) -> None:
        self.data, self.order, self.seed = data, data.order, seed
        assert self.order.global_batch % (world_size * micro_batch) == 0
        self.share = self.order.global_batch // world_size
        self.first = rank * self.share
        self.micro_batch, self.start_step, self.pin = micro_batch, start_step, pin
        self.readers = max(1, readers)
        self.prefetch = max(1, prefetch)
        self.remote = any(samples.shards.remote for samples in data.sources)
        self._looking = threading.Lock()
        self._seen: dict[int, list[tuple[int, list[int]]]] = {}  # steps looked at ahead: see `_shards_of`
        self._shelves: list[_Shelf] = []
        self._threads: list[threading.Thread] = []

    def _read(self, step: int, offset: int) -> Batch:
        chosen = self.order.batch(step, self.first, self.first + self.share)
        cut = slice(offset, offset + self.micro_batch)
        sources, rows = chosen.sources[cut], chosen.rows[cut]
        begin = step * self.order.global_batch + self.first + offset
        clock = np.arange(begin, begin + self.micro_batch, dtype=np.int64)
        return read_batch(
            self.data.sources,
            sources,
            self.data.ids(chosen.bucket, sources, rows),
            self.data.buckets[chosen.bucket],
            clock,
            self.seed,
            wanted=self.data.wanted,
            pin=self.pin,
        )

    def _look_ahead(self, step: int) -> None:
        """Ask for the remote shards of the next steps, in the order of their first use."""
        least, most = _LOOK_AHEAD_STEPS
        end = step + min(max(_LOOK_AHEAD_SAMPLES // self.share, least), most)
        with self._looking:
            # What was seen last time is kept: to look through all of it again would cost more than reading it.
            self._seen = {ahead: found for ahead, found in self._seen.items() if ahead >= step}
            for ahead in range(max(self._seen, default=step - 1) + 1, end):
                self._seen[ahead] = self._shards_of(ahead)
            wanted: list[dict[int, None]] = [{} for _ in self.data.sources]
            for found in self._seen.values():
                for source, shards in found:
                    wanted[source].update(dict.fromkeys(shards))
            for samples, shards_wanted in zip(self.data.sources, wanted, strict=True):
                samples.shards.prefetch(list(shards_wanted))

    def _shards_of(self, step: int) -> list[tuple[int, list[int]]]:
        """(source, its shards in the order of first use) of this rank's share of a step."""
        chosen = self.order.batch(step, self.first, self.first + self.share)
        ids = self.data.ids(chosen.bucket, chosen.sources, chosen.rows)
        found = []
        for source in np.unique(chosen.sources).tolist():
            samples = self.data.sources[source]
            local = ids[chosen.sources == source] - samples.first_id
            shards = np.searchsorted(samples.shards.starts, local, side="right") - 1
            found.append((source, list(dict.fromkeys(shards.tolist()))))
        return found

    def _run(self, reader: int, shelf: _Shelf) -> None:
        """One reader's life: every `readers`-th micro-batch, in order, until one fails or nobody wants more."""
        per_step = self.share // self.micro_batch
        for number in itertools.count(reader, self.readers):
            step, place = divmod(number, per_step)
            try:
                if self.remote and place == 0 and step % _LOOK_EVERY_STEPS == 0:
                    self._look_ahead(self.start_step + step)
                batch = self._read(self.start_step + step, place * self.micro_batch)
            except BaseException as error:
                shelf.put(error)
                return
            if not shelf.put(batch):
                return

    def __iter__(self) -> Generator[Batch]:
        # A shelf for each reader, so that batches come in order and readers don't wait for each other.
        shelves = [_Shelf(-(-self.prefetch // self.readers)) for _ in range(self.readers)]
        self._shelves = shelves  # of this iteration: another may follow
        self._threads = [
            threading.Thread(target=self._run, args=(reader, shelf), name=f"reader-{reader}", daemon=True)
            for reader, shelf in enumerate(shelves)
        ]
        for thread in self._threads:
            thread.start()
        try:
            for shelf in itertools.cycle(shelves):
                batch = shelf.take()
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            for shelf in shelves:
                shelf.close()

    def close(self) -> None:
        """End the readers; a download that hangs is left to its time-out."""
        for shelf in self._shelves:
            shelf.close()
        deadline = time.monotonic() + _CLOSE_S
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        for samples in self.data.sources:  # nothing more is fetched ahead
            if samples.shards.remote:
                samples.shards.close()
