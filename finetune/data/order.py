"""Which sample comes when: a pure function of (sizes of shards, seed, global batch, step). No I/O.

    step --Interleave--> bucket, and the how-manieth batch of that bucket
         --lanes------> a global batch has G slots, shared by L lanes of G / L neighbouring slots
         --Interleave--> with several sources: which one each draw of a lane comes from
         --Line-------> the lane's next samples of that source's bucket

In each epoch the shards of a bucket are laid end to end in a new order, each with its rows in a new order: the
line. The line is cut into L equal stretches, one a lane, and a lane hands out its stretch window by window, each
window shuffled. So every sample comes once an epoch, but for the end of the line that fills no lane.

Nothing here knows of ranks: a rank takes neighbouring slots of each global batch, so any number of them sees the
same global batches. Neighbouring slots are neighbouring stretches: with N nodes and S shards in a bucket, the
node-shard pairs of an epoch are at most S + N - 1 where N divides L, and (S + L) N / L where L divides N; a node
holds about window / N samples' shards at a time. (One canonical split for all world sizes is the idea of
MosaicML's Streaming.) Any position costs the same to reach: no draw depends on an earlier one, and memory is that
of the windows, not of the epoch.

Draws are hashes of addresses (SplitMix64: Steele et al. 2014, "Fast splittable pseudorandom number generators"),
not numpy's generators, whose streams may change from release to release.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from finetune import UserError

LANES = 64
"""At most so many lanes: as many nodes read their own shards alone."""
WINDOW = 1 << 18
"""Samples of a source's bucket that are shuffled together, over all lanes."""

_BLOCK_SAMPLES = 1 << 14  # slots worked out at a time: enough to make Python's share of each small
_BLOCK_EVENTS = 1024
_SMALL = 2048  # a source's bucket of no more samples is shuffled as a whole, whatever the window
_CYCLE = 1 << 20  # weights of sources are rounded to this part of one

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """One data set: the samples of each shard (int64 arrays), bucket by bucket, and its share of the draws."""

    buckets: Sequence[np.ndarray]
    weight: float = 1.0


@dataclass(frozen=True)
class GlobalBatch:
    """Slots of one optimizer step: `rows` [n] int64 of `bucket` in each slot's source (`sources` [n])."""

    bucket: int
    sources: np.ndarray
    rows: np.ndarray
    epoch: int


@dataclass
class _Recent:
    """The results of the last `size` calls, by key; safe in threads (one may be computed twice)."""

    size: int
    kept: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]  # type: ignore[no-any-return]
        made = make()
        with self.lock:
            self.kept[key] = made
            while len(self.kept) > self.size:
                self.kept.popitem(last=False)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["size"])  # type: ignore[misc]


class Order:
    """The order of samples over all epochs.

    Args:
        sources: data sets with the same buckets (an absent one is an empty array).
        seed: of the shuffle; epochs differ by it and their number.
        global_batch: samples in one optimizer step, over all ranks.
        shuffle: False keeps the order of shards and rows in each bucket.
        lanes, window: see the module; the number of lanes is the largest divisor of the global batch up to `lanes`.

    With one source an epoch is each sample once. With several, each source has its own epochs, a source's share
    of the draws is its weight's share, and "epoch" means as many draws as all sources have samples. A bucket that
    does not hold one global batch, over all sources, is not used.

    Raises:
        UserError: no bucket (of some source) holds one global batch.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seed: int,
        global_batch: int,
        shuffle: bool = True,
        lanes: int = LANES,
        window: int = WINDOW,
    ) -> None:
        self.seed, self.global_batch, self.shuffle = seed, global_batch, shuffle
        most = min(lanes, global_batch) if shuffle else 1
        self.lanes = next(count for count in range(most, 0, -1) if global_batch % count == 0)
        self.slots = global_batch // self.lanes  # of a lane in a global batch
        sizes_SK = np.array([[int(np.sum(sizes)) for sizes in source.buckets] for source in sources], np.int64)
        self.sizes = sizes_SK.reshape(len(sources), -1)
        self.weights = np.array([source.weight for source in sources], np.float64)
        if len(sources) == 1:
            self.batches = self.sizes[0] // global_batch
            self.steps_per_epoch = int(self.batches.sum())
            lanes_SK = np.full_like(self.sizes, self.lanes)
            lane_lengths_SK = (self.batches * self.slots)[None]
        else:
            usable_SK = np.where(self.sizes.sum(axis=0) >= global_batch, self.sizes, 0)
            self._share_SK = self._share(usable_SK)
            self.batches = _in_cycle(self._share_SK.sum(axis=0))
            self.steps_per_epoch = int(self.sizes.sum()) // global_batch
            # A few samples can't be parted among all lanes: these then take turns in fewer stretches.
            divisors = np.array([count for count in range(1, self.lanes + 1) if self.lanes % count == 0])
            lanes_SK = divisors[np.maximum(0, np.searchsorted(divisors, usable_SK, side="right") - 1)]
            lane_lengths_SK = usable_SK // lanes_SK
        if self.steps_per_epoch == 0:
            raise UserError(
                f"no bucket holds one global batch: the largest has {int(self.sizes.max(initial=0))} samples, "
                f"train.global_batch is {global_batch}; lower train.global_batch or add pictures"
            )
        self._schedule = Interleave(self.batches, self._key("buckets"), regular=not shuffle)
        self._lines = [
            [
                _Line(
                    np.asarray(sizes, np.int64),
                    int(lane_lengths_SK[source, bucket]),
                    int(lanes_SK[source, bucket]),
                    self.lanes,
                    max(self.slots, window // self.lanes),
                    self._key("line", source, bucket) if shuffle else None,
                )
                for bucket, sizes in enumerate(each.buckets)
            ]
            for source, each in enumerate(sources)
        ]
        # Of one bucket; twice as many as there are buckets, since they take turns.
        self._tables = _Recent(max(8, 2 * int((self.batches > 0).sum())))
        self._mixes = _Recent(4 * self.lanes)

    @property
    def left_out(self) -> np.ndarray:
        """[sources, buckets] int64: samples that one epoch of their source does not reach.

        Another epoch leaves out others, unless the bucket is too small to be used at all.
        """
        reached = [[line.stretches * line.length for line in lines] for lines in self._lines]
        return self.sizes - np.array(reached, np.int64).reshape(self.sizes.shape)

    def never_drawn(self, buckets: Sequence[tuple[int, int]]) -> tuple[dict[tuple[int, int], int], str]:
        """(samples that are in no batch ever, by (height, width) of their bucket; these in words, 8 at most)."""
        never_K = np.where(self.left_out == self.sizes, self.sizes, 0).sum(axis=0)
        small = {bucket: int(count) for bucket, count in zip(buckets, never_K, strict=True) if count}
        named = ", ".join(f"{h}x{w} ({count})" for (h, w), count in list(small.items())[:8])
        return small, f"{named}{', ...' if len(small) > 8 else ''}"

    def shards_at_once(self, nodes: int) -> np.ndarray:
        """[sources, buckets]: about how many shards each of `nodes` nodes reads by turns, at any time."""
        return np.array([[line.shards_at_once(nodes) for line in lines] for lines in self._lines])

    def position(self, step: int) -> tuple[int, int]:
        """(bucket, how many earlier global batches were of that bucket) of optimizer step `step`."""
        labels, ordinals = self._schedule.span(step, step + 1)
        return int(labels[0]), int(ordinals[0])

    def batch(self, step: int, begin: int = 0, end: int | None = None) -> GlobalBatch:
        """Slots `begin` to `end` of the global batch of optimizer step `step` (0-based, over all epochs)."""
        end = self.global_batch if end is None else end
        bucket, batch = self.position(step)
        first, last = begin // self.slots, -(-end // self.slots)
        per_block = _BLOCK_SAMPLES // ((last - first) * self.slots)
        per_block = max(1, min(per_block, int(self.batches[bucket])))
        block, place = divmod(batch, per_block)
        key = (bucket, block, first, last)
        sources, rows = self._tables.get(
            key, lambda: self._table(bucket, block * per_block, per_block, first, last)
        )
        cut = slice(begin - first * self.slots, end - first * self.slots)
        return GlobalBatch(bucket, sources[place, cut], rows[place, cut], step // self.steps_per_epoch)

    def _table(self, bucket: int, batch: int, count: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """(sources, rows), each [count, slots of lanes first..last-1], of batches batch..batch+count-1."""
        begin, end = batch * self.slots, (batch + count) * self.slots
        shape = (last - first, end - begin)
        sources, rows = np.zeros(shape, np.int64), np.empty(shape, np.int64)
        for index, lane in enumerate(range(first, last)):
            if len(self._lines) == 1:
                rows[index] = self._lines[0][bucket].take(lane, begin, end)
                continue
            labels, ordinals = self._mixture(bucket, lane).span(begin, end)
            sources[index] = labels
            for source in np.unique(labels).tolist():
                chosen = labels == source
                draws = ordinals[chosen]  # in a row: nobody else draws from this lane
                rows[index, chosen] = self._lines[source][bucket].take(lane, int(draws[0]), int(draws[-1]) + 1)
        turned = (last - first, count, self.slots)
        by_batch = [a.reshape(turned).transpose(1, 0, 2).reshape(count, -1) for a in (sources, rows)]
        return by_batch[0], by_batch[1]

    def _mixture(self, bucket: int, lane: int) -> Interleave:
        """Which source each draw of a lane comes from."""
        counts_S = _in_cycle(self._share_SK[:, bucket])
        key = self._key("sources", bucket, lane)
        return self._mixes.get((bucket, lane), lambda: Interleave(counts_S, key, regular=not self.shuffle))

    def _share(self, usable_SK: np.ndarray) -> np.ndarray:
        """[sources, buckets]: the share of all draws that each source's bucket gets."""
        total_S1 = usable_SK.sum(axis=1, keepdims=True)
        if not total_S1.all():
            source = int(np.flatnonzero(total_S1[:, 0] == 0)[0])
            raise UserError(
                f"source {source + 1} of {len(self.sizes)} can't be mixed in: no bucket with its samples holds one "
                f"global batch of {self.global_batch} over all sources; lower train.global_batch, add pictures, or "
                "encode all sources with the same buckets"
            )
        return self.weights[:, None] / self.weights.sum() * usable_SK / total_S1

    def _key(self, *address: object) -> int:
        return _key(self.seed, *address)


# --- in what proportion ---------------------------------------------------------------------------


def _in_cycle(share: np.ndarray) -> np.ndarray:
    """How often each label comes in a cycle (int64), for shares of the draws; at least once where there is one."""
    return np.maximum(np.round(share / share.sum() * _CYCLE), share > 0).astype(np.int64)


class Interleave:
    """Labels 0..K-1 for ever, label k `counts[k]` times in each cycle of sum(counts), irregularly, at any position.

    The j-th k happens at time (j + u) / counts[k] of its cycle, u uniform in [0, 1) by (key, k, j): stratified, so
    that every stretch holds each label in proportion, to about one. Positions are ranks of these times.

    Args:
        counts: int64 [K]; key: of the draws; regular: u = 1/2 throughout.
    """

    def __init__(self, counts: np.ndarray, key: int, *, regular: bool = False) -> None:
        self.labels_K = np.flatnonzero(counts)
        self.counts_K = np.asarray(counts, np.int64)[self.labels_K]
        self.keys_K = np.array([_key(key, int(label)) for label in self.labels_K], np.uint64)
        self.cycle = int(self.counts_K.sum())
        self.regular = regular
        self.blocks = max(1, self.cycle // _BLOCK_EVENTS)
        self._recent, self._starts = _Recent(4), _Recent(16)

    def span(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(labels, ordinals), int64 [end - begin]; an ordinal counts the label's earlier occurrences."""
        positions = np.arange(begin, end)
        if len(self.labels_K) == 1:
            return np.full(end - begin, self.labels_K[0]), positions
        found = [np.empty((2, 0), np.int64)]
        position = begin
        while position < end:
            start, events_2N = self._block_at(position)
            piece = events_2N[:, position - start : end - start]
            found.append(piece)
            position += piece.shape[1]
        labels, ordinals = np.concatenate(found, axis=1)
        return labels, ordinals

    def _block_at(self, position: int) -> tuple[int, np.ndarray]:
        """The block that holds a position: its first position, and its (labels, ordinals) [2, n]."""
        cycle, within = divmod(position, self.cycle)
        block = within * self.blocks // self.cycle
        while self._before(cycle, block).sum() > within:
            block -= 1
        while self._before(cycle, block + 1).sum() <= within:
            block += 1
        return self._recent.get((cycle, block), lambda: self._block(cycle, block))

    def _block(self, cycle: int, block: int) -> tuple[int, np.ndarray]:
        first_K, last_K = self._before(cycle, block), self._before(cycle, block + 1)
        index_N = np.repeat(np.arange(len(self.labels_K)), last_K - first_K)
        j_N = np.concatenate([np.arange(a, b) for a, b in zip(first_K, last_K, strict=True)])
        order = np.lexsort((index_N, self._time(cycle, index_N, j_N)))
        ordinals_N = cycle * self.counts_K[index_N] + j_N
        events_2N = np.stack([self.labels_K[index_N], ordinals_N])[:, order]
        return cycle * self.cycle + int(first_K.sum()), events_2N

    def _time(self, cycle: int, index: np.ndarray, j: np.ndarray) -> np.ndarray:
        u = np.full(j.shape, 0.5)
        if not self.regular:
            draw = (cycle * self.counts_K[index] + j).astype(np.uint64)
            u = (_mix(self.keys_K[index] + draw * _WEYL) >> np.uint64(11)) * 2.0**-53
        return (j + u) / self.counts_K[index]

    def _before(self, cycle: int, block: int) -> np.ndarray:
        """[K]: occurrences of each label in the cycle before the time of a block's start."""
        if block >= self.blocks:
            return self.counts_K
        return self._starts.get((cycle, block), lambda: self._count_before(cycle, block))

    def _count_before(self, cycle: int, block: int) -> np.ndarray:
        start = block / self.blocks
        index_K = np.arange(len(self.counts_K))
        near_K = np.maximum(np.floor(start * self.counts_K).astype(np.int64) - 1, 0)
        count_K = near_K.copy()  # all of these are earlier; the next three may be
        for ahead in range(3):
            j_K = near_K + ahead
            count_K += (j_K < self.counts_K) & (self._time(cycle, index_K, j_K) < start)
        return count_K


# --- from where -----------------------------------------------------------------------------------


class _Line:
    """One bucket of one source: its shards end to end, and the lanes' stretches of it.

    Args:
        sizes: samples of each shard, int64; length: samples of a stretch; stretches: how many.
        lanes: a multiple of `stretches`; neighbouring lanes share a stretch and draw from it in turn.
        window: samples of a stretch that are shuffled together; key: of the shuffle, None for manifest order.
    """

    def __init__(
        self, sizes: np.ndarray, length: int, stretches: int, lanes: int, window: int, key: int | None
    ) -> None:
        self.sizes, self.length, self.stretches, self.lanes, self.key = sizes, length, stretches, lanes, key
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        self.window = min(window * lanes // stretches, max(1, length))
        self._epochs = _Recent(2)
        self._windows = _Recent(stretches + 4)

    def shards_at_once(self, nodes: int) -> float:
        """Shards of the windows that one of so many nodes is in."""
        shards = np.count_nonzero(self.sizes) if self.length else 0
        mine = max(1.0, self.stretches / nodes)
        if shards == 0 or self.starts[-1] <= _SMALL:
            return float(shards)
        of_window = self.window * shards / float(self.starts[-1]) + 1
        return float(min(mine * of_window, shards * mine / self.stretches + 1, shards))

    def take(self, lane: int, begin: int, end: int) -> np.ndarray:
        """Rows (int64) of a lane's draws begin..end-1, counted over all epochs."""
        sharers = self.lanes // self.stretches
        rows = self._take(lane // sharers, begin * sharers, end * sharers)
        return rows[lane % sharers :: sharers]

    def _take(self, stretch: int, begin: int, end: int) -> np.ndarray:
        if self.key is not None and self.starts[-1] <= _SMALL:
            # Near is no matter, and one by one its many epochs would cost more than reading the samples.
            epochs, places = np.divmod(np.arange(begin, end), self.length)
            keys = _mix(epochs.astype(np.uint64) * _WEYL + np.uint64(_key(self.key, "small")))
            return permute(stretch * self.length + places, int(self.starts[-1]), keys)
        found = []
        while begin < end:
            epoch, place = divmod(begin, self.length)
            # Stretches change windows at different times, so that new shards are needed one after another.
            ahead = (stretch * self.window) // self.stretches if self.window < self.length else 0
            number = (place + ahead) // self.window
            start = max(0, number * self.window - ahead)
            stop = min(self.length, (number + 1) * self.window - ahead)
            rows = self._windows.get((stretch, epoch, number), partial(self._window, stretch, epoch, start, stop))
            piece = rows[place - start : place - start + end - begin]
            found.append(piece)
            begin += len(piece)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _window(self, stretch: int, epoch: int, start: int, stop: int) -> np.ndarray:
        rows = self._rows(epoch, stretch * self.length + start, stretch * self.length + stop)
        if self.key is None:
            return rows
        return rows[_shuffled(len(rows), _key(self.key, "window", epoch, stretch, start))]

    def _rows(self, epoch: int, begin: int, end: int) -> np.ndarray:
        """Rows at places begin..end-1 of an epoch's line."""
        if self.key is None:
            return np.arange(begin, end)
        shards, starts = self._epochs.get(epoch, lambda: self._shards(epoch))
        first, last = np.searchsorted(starts, (begin, end - 1), side="right") - 1
        inside = slice(int(first), int(last) + 1)
        counts = np.minimum(starts[1:][inside], end) - np.maximum(starts[:-1][inside], begin)
        place_N = np.repeat(np.arange(len(counts)) + first, counts)
        shard_N = shards[place_N]
        keys_N = _mix(shard_N.astype(np.uint64) * _WEYL + np.uint64(_key(self.key, "rows", epoch)))
        rows_N = permute(np.arange(begin, end) - starts[place_N], self.sizes[shard_N], keys_N)
        return rows_N + self.starts[shard_N]

    def _shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the epoch's order, without empty ones, and where each starts on the line (and the end)."""
        assert self.key is not None
        shards = _shuffled(len(self.sizes), _key(self.key, "shards", epoch))
        shards = shards[self.sizes[shards] > 0]
        return shards, np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sizes[shards])])


# --- draws by address -----------------------------------------------------------------------------

_WEYL = np.uint64(0x9E3779B97F4A7C15)


def _key(*address: object) -> int:
    """64 bits for an address."""
    return int.from_bytes(hashlib.blake2b(repr(address).encode(), digest_size=8).digest(), "little")


def _mix(bits: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, a bijection of uint64."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _shuffled(count: int, key: int) -> np.ndarray:
    """A permutation of 0..count-1 (int64): the order of distinct hashes."""
    return np.argsort(_mix(np.arange(count, dtype=np.uint64) * _WEYL + np.uint64(key)))


def permute(places: np.ndarray, count: int | np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """Where a pseudo-random permutation of 0..count-1 takes `places` (int64), without listing it.

    `count` and `key` may be arrays [len(places)]: each place then belongs to the permutation of its own.

    A Feistel network on the next power of two; what falls outside goes around again (Black & Rogaway 2002,
    "Ciphers with arbitrary finite domains", cycle-walking): under two rounds on average.
    """
    values = places.astype(np.uint64)
    count, key = (np.broadcast_to(np.asarray(each).astype(np.uint64), values.shape) for each in (count, key))
    bits = np.maximum(2, np.frexp((count - np.uint64(1)).astype(np.float64))[1]).astype(np.uint64)
    low = bits // np.uint64(2)
    result = _around(values, low, bits - low, key)
    while (outside := np.flatnonzero(result >= count)).size:
        result[outside] = _around(result[outside], low[outside], (bits - low)[outside], key[outside])
    return result.astype(np.int64)


def _around(values: np.ndarray, low: np.ndarray, high: np.ndarray, key: np.ndarray) -> np.ndarray:
    """One way through the network, whose left half has `high` bits and right half `low`."""
    left, right = values >> low, values & ((np.uint64(1) << low) - np.uint64(1))
    for number, constant in enumerate(np.arange(6, dtype=np.uint64) * _WEYL):
        width = (high, low)[number % 2]  # of `left` here: the halves change places, and so do their widths
        left, right = right, left ^ (_mix(right + _mix(key + constant)) >> (np.uint64(64) - width))
    return (left << low) | right
