"""Invariants of the order: exactly once an epoch, one bucket a batch, in proportion, near in shards, anywhere."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune import UserError
from finetune.data.order import Interleave, Order, Source, permute

ROOT = Path(__file__).resolve().parents[2]

# Shards of each bucket; some empty, some buckets smaller than a batch.
buckets = st.lists(st.lists(st.integers(0, 40), max_size=5), min_size=1, max_size=4)
batches = st.integers(1, 12)
seeds = st.integers(0, 2**63 - 1)
windows = st.sampled_from([1, 2, 7, 16, 50, 1 << 18])
lanes = st.sampled_from([1, 2, 3, 4, 64])


def order_of(sizes: list[list[int]], **settings: int | bool) -> Order:
    return Order([Source([np.array(each, np.int64) for each in sizes])], **settings)  # type: ignore[arg-type]


def enough(sizes: list[list[int]], global_batch: int) -> bool:
    return any(sum(each) >= global_batch for each in sizes)


@given(
    sizes=buckets,
    seed=seeds,
    global_batch=batches,
    epoch=st.integers(0, 5),
    window=windows,
    most=lanes,
    shuffle=st.booleans(),
    small=st.sampled_from([0, 1 << 11]),
)
def test_each_epoch_reaches_each_sample_once_but_for_the_counted_tail(
    sizes, seed, global_batch, epoch, window, most, shuffle, small
):
    if not enough(sizes, global_batch):
        return
    with mock.patch("finetune.data.order._SMALL", small):  # windows are for more samples than a test can count
        count_an_epoch(sizes, seed, global_batch, epoch, window, most, shuffle)


def count_an_epoch(sizes, seed, global_batch, epoch, window, most, shuffle):
    order = order_of(sizes, seed=seed, global_batch=global_batch, window=window, lanes=most, shuffle=shuffle)
    seen: dict[int, list[int]] = {bucket: [] for bucket in range(len(sizes))}
    for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
        batch = order.batch(step)
        assert batch.epoch == epoch and len(batch.rows) == global_batch and not batch.sources.any()
        seen[batch.bucket] += batch.rows.tolist()
    for bucket, each in enumerate(sizes):
        size = sum(each)
        tail = order.left_out[0, bucket]
        assert tail == size % global_batch < global_batch
        assert len(set(seen[bucket])) == len(seen[bucket]) == size - tail
        assert all(0 <= row < size for row in seen[bucket])


@given(seed=seeds, step=st.integers(0, 10_000), world=st.sampled_from([1, 2, 3, 4, 6, 12]), window=windows)
def test_any_position_is_reached_without_its_past_by_any_number_of_ranks(seed, step, world, window):
    def make() -> Order:
        return order_of([[1500, 20], [900, 400, 1], [30]], seed=seed, global_batch=12, window=window)

    walked = make()
    for before in (0, step // 2, step):
        walked.batch(before)
    whole = walked.batch(step)
    parts = [make().batch(step, 12 // world * rank, 12 // world * (rank + 1)) for rank in range(world)]
    assert np.array_equal(np.concatenate([part.rows for part in parts]), whole.rows)
    assert {part.bucket for part in parts} == {whole.bucket}
    assert np.array_equal(pickle.loads(pickle.dumps(walked)).batch(step).rows, whole.rows)


def test_epochs_and_seeds_differ():
    order = order_of([[64]], seed=0, global_batch=64)
    first, second = order.batch(0).rows, order.batch(1).rows
    assert sorted(first) == sorted(second) and not np.array_equal(first, second)
    assert not np.array_equal(first, order_of([[64]], seed=1, global_batch=64).batch(0).rows)


def test_the_order_is_the_same_in_every_release():
    """What resumes a run of an older release: never change these numbers."""
    order = order_of([[50, 30, 7], [20]], seed=3, global_batch=8, window=32)
    assert [order.batch(step).bucket for step in range(12)] == EXPECTED_BUCKETS
    assert order.batch(5).rows.tolist() == EXPECTED_ROWS
    assert order_of([[3000, 2000, 7]], seed=3, global_batch=8, window=64).batch(77).rows.tolist() == EXPECTED_LARGE


EXPECTED_BUCKETS = [0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0]
EXPECTED_ROWS = [75, 63, 10, 57, 23, 54, 78, 40]
EXPECTED_LARGE = [3461, 3672, 3972, 4233, 229, 557, 2338, 1166]


def test_without_shuffling_rows_come_in_their_order():
    order = order_of([[5, 7], [6]], seed=0, global_batch=3, shuffle=False)
    rows: dict[int, list[int]] = {0: [], 1: []}
    for step in range(order.steps_per_epoch):
        batch = order.batch(step)
        rows[batch.bucket] += batch.rows.tolist()
    assert rows == {0: list(range(12)), 1: list(range(6))}


def test_too_few_samples_are_refused():
    with pytest.raises(UserError, match=r"the largest has 7 samples, train.global_batch is 8"):
        order_of([[7], [2, 1]], seed=0, global_batch=8)


@given(counts=st.lists(st.integers(0, 3000), min_size=1, max_size=6), key=seeds, regular=st.booleans())
@settings(max_examples=50)
def test_interleaving_is_exact_in_each_cycle_and_even_inside(counts, key, regular):
    if not sum(counts):
        return
    mix = Interleave(np.array(counts), key, regular=regular)
    total = sum(counts)
    labels, ordinals = mix.span(0, 2 * total)
    for label, count in enumerate(counts):
        mine = labels == label
        assert np.array_equal(ordinals[mine], np.arange(2 * count))
        assert mine[:total].sum() == count
        # Stratified: between any two positions a label's count is near its proportion.
        ahead = np.cumsum(mine) - np.arange(1, 2 * total + 1) * count / total
        assert np.abs(ahead).max(initial=0) <= len(counts) + 1
    begin, end = total // 3, total + total // 2 + 1
    again = Interleave(np.array(counts), key, regular=regular).span(begin, end)
    assert np.array_equal(again[0], labels[begin:end]) and np.array_equal(again[1], ordinals[begin:end])


@given(count=st.integers(1, 5000), key=seeds)
def test_permute_is_a_permutation_at_any_place(count, key):
    places = permute(np.arange(count), count, key)
    assert np.array_equal(np.sort(places), np.arange(count))
    middle = count // 2
    assert permute(np.array([middle]), count, key)[0] == places[middle]


def test_permute_has_no_preferred_places():
    """Each place goes everywhere equally often: chi-square over 5,000 keys."""
    counts = np.zeros((10, 10))
    for key in range(5_000):
        counts[np.arange(10), permute(np.arange(10), 10, key)] += 1
    chi_square = ((counts - 500) ** 2 / 500).sum()
    assert chi_square < 81 + 5 * np.sqrt(2 * 81)  # 81 degrees of freedom


# --- several sources --------------------------------------------------------------------------------


def test_sources_are_drawn_by_weight_and_walked_evenly():
    big, small = np.full(4, 500), np.full(2, 40)
    order = Order([Source([big], 3.0), Source([small], 1.0)], seed=0, global_batch=16)
    rows: dict[int, list[int]] = {0: [], 1: []}
    steps = 500
    for step in range(steps):
        batch = order.batch(step)
        for source, row in zip(batch.sources.tolist(), batch.rows.tolist()):
            rows[source].append(row)
    share = len(rows[1]) / (steps * 16)
    assert abs(share - 0.25) < 0.005
    counts = Counter(rows[1])
    assert set(counts) == set(range(80))
    assert max(counts.values()) - min(counts.values()) <= 2  # 25 epochs of the small source, each row once in each
    assert max(Counter(rows[0]).values()) - min(Counter(rows[0]).values()) <= 1 + 1


@given(seed=seeds, step=st.integers(0, 3000), world=st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=50)
def test_mixed_batches_are_cut_by_ranks_and_reached_anywhere(seed, step, world):
    def make() -> Order:
        sources = [
            Source([np.array([30, 25]), np.array([40])], 0.7),
            Source([np.array([9]), np.array([], np.int64)], 0.2),
            Source([np.array([16]), np.array([16])], 0.1),
        ]
        return Order(sources, seed=seed, global_batch=8)

    walked = make()
    walked.batch(0)
    whole = walked.batch(step)
    parts = [make().batch(step, 8 // world * rank, 8 // world * (rank + 1)) for rank in range(world)]
    assert np.array_equal(np.concatenate([part.rows for part in parts]), whole.rows)
    assert np.array_equal(np.concatenate([part.sources for part in parts]), whole.sources)
    sizes = np.array([[55, 40], [9, 0], [16, 16]])[whole.sources, whole.bucket]
    assert (whole.rows < sizes).all() and (whole.rows >= 0).all()


def test_buckets_of_a_mixture_come_in_their_proportion():
    sources = [
        Source([np.array([600]), np.array([200])], 1.0),
        Source([np.array([0]), np.array([400])], 1.0),
    ]
    order = Order(sources, seed=0, global_batch=4)
    found = Counter(order.batch(step).bucket for step in range(order.steps_per_epoch))
    assert found[0] / order.steps_per_epoch == pytest.approx(0.75 / 2, abs=0.01)


@given(small=st.integers(1, 40), weight=st.sampled_from([1e-6, 0.3, 1.0, 1000.0]), global_batch=batches, seed=seeds)
@settings(max_examples=20)
def test_a_source_smaller_than_a_batch_is_walked_evenly(small, weight, global_batch, seed):
    """Even one of fewer samples than there are lanes: none is left for ever, none comes twice as often."""
    order = Order(
        [Source([np.array([90, 30])]), Source([np.array([small])], weight)], seed=seed, global_batch=global_batch
    )
    lanes = max(n for n in range(1, small + 1) if order.lanes % n == 0)
    assert order.left_out[1, 0] == small % lanes
    rows = Counter[int]()
    for step in range(200):
        batch = order.batch(step)
        rows.update(batch.rows[batch.sources == 1].tolist())
    assert set(rows) <= set(range(small))
    if weight == 1000 and small % lanes == 0:
        # Lanes keep step to a draw or two each; so do the samples they share.
        assert set(rows) == set(range(small))
        assert max(rows.values()) - min(rows.values()) <= 3


def test_small_buckets_of_a_mixture_come_in_their_proportion_or_never():
    """Bucket 1 has a 40th of the samples; bucket 2 has fewer over all sources than one batch."""
    sources = [
        Source([np.array([400]), np.array([10]), np.array([3])]),
        Source([np.array([400]), np.array([10])] + [np.array([2])]),
    ]
    order = Order(sources, seed=0, global_batch=16)
    steps = 8_000
    found = Counter(order.batch(step).bucket for step in range(steps))
    assert found[1] / steps == pytest.approx(10 / 410, rel=0.02)
    assert found[2] == 0 and order.left_out[:, 2].tolist() == [3, 2]


def test_a_source_without_a_bucket_of_a_batch_is_refused():
    with pytest.raises(UserError, match=r"source 2 of 2 can't be mixed in: .* global batch of 16 over all sources"):
        Order(
            [Source([np.array([100]), np.array([5])]), Source([np.array([0]), np.array([10])])],
            seed=0,
            global_batch=16,
        )


# --- locality ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "shards"), [(1, 40), (2, 40), (8, 40), (16, 10), (64, 100), (128, 100), (128, 3)]
)
def test_few_nodes_read_each_shard(nodes, shards):
    """At most S + N - 1 node-shard pairs an epoch up to 64 nodes, (S + 64) N / 64 beyond."""
    size = 256 * 20 // shards
    order = order_of([[size] * shards], seed=1, global_batch=256, window=1024)
    read: set[tuple[int, int]] = set()
    share = 256 // nodes
    for step in range(order.steps_per_epoch):
        rows = order.batch(step).rows
        read |= {(slot // share, row // size) for slot, row in enumerate(rows.tolist())}
    bound = shards + nodes - 1 if nodes <= 64 else (shards + 64) * nodes / 64
    assert len(read) <= bound


def test_a_node_holds_few_shards_at_a_time():
    """Shards in use at once are those of the window, not of the epoch."""
    order = order_of([[100] * 200], seed=1, global_batch=64, window=640)
    for step in range(0, order.steps_per_epoch, 37):
        near = np.concatenate([order.batch(s).rows for s in range(step, min(step + 5, order.steps_per_epoch))])
        assert len(set((near // 100).tolist())) <= 64 * 3


@pytest.mark.parametrize(
    ("sizes", "nodes", "lanes", "window"),
    [
        ([[100] * 200], 1, 64, 640),
        ([[100] * 200], 8, 64, 640),
        ([[100] * 200], 1, 1, 640),
        ([[100] * 90] * 3, 2, 8, 800),
    ],
)
def test_a_cache_of_what_is_said_to_be_read_at_once_fetches_each_shard_about_once(sizes, nodes, lanes, window):
    order = order_of(sizes, seed=1, global_batch=64, lanes=lanes, window=window)
    room = round(order.shards_at_once(nodes).sum() * 1.2)
    kept: dict[tuple[int, int], None] = {}
    fetched = Counter[tuple[int, int]]()
    for step in range(order.steps_per_epoch):
        batch = order.batch(step, 0, 64 // nodes)
        for shard in np.unique(batch.rows // 100).tolist():
            if (batch.bucket, shard) not in kept:
                fetched[batch.bucket, shard] += 1
            kept.pop((batch.bucket, shard), None)
            kept[batch.bucket, shard] = None
            if len(kept) > room:
                del kept[next(iter(kept))]
    assert sum(fetched.values()) <= 1.6 * len(fetched)
    assert room < 1.5 * sum(map(len, sizes))


# --- scale ------------------------------------------------------------------------------------------

_FAR = """
import resource, sys, time
import numpy as np
from finetune.data.order import Order, Source
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
order = Order([Source([np.full(100_000, 1_000)])], seed=0, global_batch=2048)
for step in (100_000_000 // 2048 - 1, 0, 10_000_000):
    order.batch(step)
for step in range(300):
    order.batch(step)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_hundred_million_samples_need_little_memory():
    """100,000 shards of 1,000: the order's own memory, from any position, far below 1 GiB."""
    run = subprocess.run([sys.executable, "-c", _FAR], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(run.stdout) * 1024 < 256 << 20


def test_the_shuffle_is_nearly_a_full_one():
    """Expected displacement 1/3 of the epoch, and shard neighbours meet in a batch about as often as by chance."""
    size, shards, global_batch = 250, 64, 64
    order = order_of([[size] * shards], seed=5, global_batch=global_batch, window=2048)
    total = size * shards
    rows = np.concatenate([order.batch(step).rows for step in range(order.steps_per_epoch)])
    displacement = np.abs(np.arange(len(rows)) - rows).mean() / total
    assert displacement == pytest.approx(1 / 3, abs=0.03)
    step_of = np.empty(total, np.int64)
    step_of[rows] = np.arange(len(rows)) // global_batch
    together = (step_of[1:] == step_of[:-1])[np.arange(total - 1) % size != size - 1].sum()
    by_chance = (total - shards) * (global_batch - 1) / (total - 1)
    assert together <= 8 * max(1.0, by_chance)
