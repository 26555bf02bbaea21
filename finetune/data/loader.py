"""Order and shards made into batches, read ahead by threads, from any position.

A rank takes its contiguous share of each global batch and cuts it into micro-batches. What a sample is given (its
clock, its caption) depends on its place in the global batch alone, so any number of ranks and any accumulation
train on the same thing.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from finetune import UserError, rng
from finetune.batch import Batch, Sample, picture, stack
from finetune.data.order import Order, permute
from finetune.data.shards import MASK, TEXT, Bucket, EncoderInfo, Manifest, ShardSet
from finetune.latents import LatentSpace

_LOOK_AHEAD_SAMPLES = 1 << 16  # of a rank, whose shards are asked for beforehand where they are remote
_LOOK_AHEAD_STEPS = (64, 2048)  # at least and at most: a step costs Python's time, however few samples it has
_LOOK_EVERY_STEPS = 32
_KEPT_BUFFERS = 16
_CLOSE_S = 5.0
_DRAWS = 4096  # drawn at a time: one call for each batch would cost more than reading it


def _caption_draws(seed: int, clock: np.ndarray) -> list[float]:
    """Uniform in [0, 1) for each clock (int64 [B])."""
    blocks = np.unique(clock // _DRAWS).tolist()
    draws = np.concatenate([_draw_block(seed, block) for block in blocks])
    return draws[np.searchsorted(blocks, clock // _DRAWS) * _DRAWS + clock % _DRAWS].tolist()


@lru_cache(16)
def _draw_block(seed: int, block: int) -> np.ndarray:
    ids = torch.arange(block * _DRAWS, (block + 1) * _DRAWS)
    return rng.uniform(seed, "caption", ids).numpy()


class _Buffers:
    """Memory of moments, used again once its last view is gone: fresh pages cost more than the copy into them."""

    def __init__(self) -> None:
        self._arrays: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], pin: bool) -> torch.Tensor:
        """A float16 tensor of any content."""
        if pin:  # torch keeps page-locked memory in a pool of its own
            return torch.empty(shape, dtype=torch.float16, pin_memory=True)
        count = math.prod(shape)
        size = 1 << (count - 1).bit_length()  # buckets of nearly one size share; pages not used cost nothing
        with self._lock:
            arrays = self._arrays.setdefault(size, [])
            # A tensor holds its array for as long as any view shares its storage; the rest is this list, this
            # name and the call's argument.
            array = next((each for each in arrays if sys.getrefcount(each) <= _UNUSED), None)
            if array is None:
                array = np.empty(size, np.float16)
                if len(arrays) < _KEPT_BUFFERS:
                    arrays.append(array)
            return torch.from_numpy(array)[:count].view(shape)


def _references() -> int:
    """What `sys.getrefcount` says in `_Buffers.take` of an array without tensors; releases of Python differ."""
    arrays = [np.empty(1)]
    return next(sys.getrefcount(each) for each in arrays)


_UNUSED = _references()
_BUFFERS = _Buffers()


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


@dataclass(frozen=True)
class Wanted:
    """What is read of each sample beside its moments and captions.

    Attributes:
        read: a sample's condition as arrays (see `Conditioner.read`), called by the readers; members: what it needs
            beside the record.
        text_states: the drawn captions' states.
        loss_masks: `mask.png`, where the loss counts; a sample without one counts as a whole.
        loss_weights: how much a sample counts, by source.
    """

    read: Callable[[Sample], dict[str, np.ndarray]] | None = None
    members: tuple[str, ...] = ()
    text_states: bool = False
    loss_masks: bool = False
    loss_weights: tuple[float, ...] = ()


def read_batch(
    sources: Sequence[Samples],
    chosen: np.ndarray,
    sample_ids: np.ndarray,
    bucket: Bucket,
    clock: np.ndarray,
    seed: int,
    *,
    wanted: Wanted = Wanted(),
    pin: bool = False,
) -> Batch:
    """Read samples into one batch (see `Batch`).

    Args:
        chosen: [B] each sample's source; sample_ids: [B]; clock: [B].
        seed: of the captions drawn, and of what the condition draws.
        wanted: what is read beside moments and captions.
        pin: in page-locked memory.

    Raises:
        ShardError: naming what can't be read.
        UserError: a sample, which it names, does not have what the condition needs.
    """
    manifest = sources[0].shards.manifest
    encoder = manifest.encoder
    assert encoder is not None
    count = len(sample_ids)
    shape = (count, 2 * encoder.channels, bucket[0] // encoder.downsample, bucket[1] // encoder.downsample)
    moments = _BUFFERS.take(shape, pin)
    out = moments.numpy()
    records: list[dict[str, Any]] = [{}] * count
    for source in np.unique(chosen).tolist():
        places = np.flatnonzero(chosen == source)
        first_id = sources[source].first_id
        read = sources[source].shards.read_samples(sample_ids[places] - first_id, out, places)
        for place, record in zip(places.tolist(), read, strict=True):
            records[place] = record

    def located(place: int) -> tuple[ShardSet, int]:
        source_samples = sources[chosen[place]]
        return source_samples.shards, int(sample_ids[place] - source_samples.first_id)

    def member(place: int, name: str) -> bytes:
        shards, sample_id = located(place)
        return shards.read_member(sample_id, name)

    @contextmanager
    def naming(place: int) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            shards, sample_id = located(place)
            raise UserError(f"{shards.root}: sample {shards.key(sample_id)}: {error}") from None

    def condition_of(place: int, sample: Sample) -> dict[str, np.ndarray]:
        assert wanted.read is not None
        full = replace(sample, members={name: member(place, name) for name in wanted.members})
        with naming(place):
            return wanted.read(full)

    def mask(place: int) -> np.ndarray:
        shards, sample_id = located(place)
        if not shards.has_member(sample_id, MASK):
            return np.ones(shape[2:], np.float32)
        data = shards.read_member(sample_id, MASK)
        with naming(place):
            return shrink(picture(data, "L", MASK), shape[2:])

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory() if pin else tensor

    clock_B = torch.from_numpy(clock)
    draws = _caption_draws(seed, clock)
    samples = [Sample(record, bucket, clock=int(clock[place]), seed=seed) for place, record in enumerate(records)]
    captions = [sample.captions for sample in samples]
    drawn = [int(draw * len(several)) for draw, several in zip(draws, captions, strict=True)]
    states = None
    if wanted.text_states:
        assert manifest.text is not None
        states = torch.empty(
            (count, manifest.text.length, manifest.text.width), dtype=torch.float16, pin_memory=pin
        )
        for place in range(count):
            shards, sample_id = located(place)
            shards.read_row(sample_id, TEXT, drawn[place], len(captions[place]), states[place].numpy())

    condition = {}
    if wanted.read is not None:
        condition = stack([condition_of(place, sample) for place, sample in enumerate(samples)])
    loss_weight = None
    if any(weight != 1 for weight in wanted.loss_weights):
        loss_weight = pinned(torch.tensor(wanted.loss_weights, dtype=torch.float32)[torch.from_numpy(chosen)])
    loss_mask = None
    if wanted.loss_masks:
        loss_mask = pinned(torch.from_numpy(np.stack([mask(place) for place in range(count)])[:, None]))
    return Batch(
        moments,
        [str(several[index]) for several, index in zip(captions, drawn, strict=True)],
        pinned(clock_B),
        torch.from_numpy(sample_ids),
        bucket,
        states,
        {name: pinned(tensor) for name, tensor in condition.items()},
        loss_weight,
        loss_mask,
    )


def shrink(mask_HW: np.ndarray, cells: tuple[int, ...]) -> np.ndarray:
    """A loss mask (uint8) as the share of each latent cell that counts: float32 [h, w] in [0, 1].

    Raises:
        UserError: its size is no multiple of the latents'.
    """
    height, width = mask_HW.shape
    if height % cells[0] or width % cells[1]:
        raise UserError(
            f"{MASK} of {height}x{width} px does not fit latents of {cells[0]}x{cells[1]}: encode again"
        )
    blocks = mask_HW.reshape(cells[0], height // cells[0], cells[1], width // cells[1])
    return blocks.mean(axis=(1, 3), dtype=np.float32) / np.float32(255)


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


def largest_bucket(sets: Iterable[Manifest]) -> Bucket | None:
    """(height, width) in pixels of the bucket with most samples over all sets, held-out ones too; None without any.

    Sample grids have its size. Of buckets with as many samples it is the smallest.
    """
    sizes: Counter[Bucket] = Counter()
    for shard in itertools.chain.from_iterable(each.shards for each in sets):
        if shard.bucket is not None:
            sizes[shard.bucket] += shard.samples
    return max(sorted(sizes), key=sizes.__getitem__, default=None)


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
    wanted: Wanted = Wanted()

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
