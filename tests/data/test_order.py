"""Invariants of the order of samples: exactly once an epoch, one bucket a batch, deterministic."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune import UserError
from finetune.data.order import Order

sizes = st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(lambda s: max(s) >= 8)


@given(sizes=sizes, seed=st.integers(0, 2**31), global_batch=st.integers(1, 8), epoch=st.integers(0, 5))
def test_each_epoch_reaches_each_sample_once_but_for_the_counted_tail(sizes, seed, global_batch, epoch):
    order = Order(sizes, seed=seed, global_batch=global_batch)
    seen: dict[int, list[int]] = {bucket: [] for bucket in range(len(sizes))}
    for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
        batch = order.batch(step)
        assert batch.epoch == epoch and len(batch.rows) == global_batch
        seen[batch.bucket] += batch.rows.tolist()
    for bucket, size in enumerate(sizes):
        assert len(set(seen[bucket])) == len(seen[bucket]) == size - order.left_out[bucket]
        assert all(0 <= row < size for row in seen[bucket])


@given(seed=st.integers(0, 2**31), step=st.integers(0, 10_000))
def test_any_position_is_reached_without_its_past(seed, step):
    walked = Order([50, 30], seed=seed, global_batch=4)
    walked.batch(0)
    walked.batch(step)
    fresh = Order([50, 30], seed=seed, global_batch=4).batch(step)
    assert np.array_equal(walked.batch(step).rows, fresh.rows) and walked.batch(step).bucket == fresh.bucket


def test_epochs_and_seeds_differ():
    order = Order([64], seed=0, global_batch=64)
    first, second = order.batch(0).rows, order.batch(1).rows
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, Order([64], seed=1, global_batch=64).batch(0).rows)


def test_too_few_samples_are_refused():
    with pytest.raises(UserError, match=r"the largest has 7 samples, train.global_batch is 8"):
        Order([7, 3], seed=0, global_batch=8)
