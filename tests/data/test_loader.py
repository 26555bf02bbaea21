"""Batches: the same from any position, for any ranks; one bucket each; errors and threads that end."""

from __future__ import annotations

import os
import shutil
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune import rng
from finetune.batch import Batch
from finetune.data.loader import Data, Loader, caption_of, hold_out, read_batch
from finetune.data.order import Order
from finetune.data.shards import EncoderInfo, ShardError, ShardSet, ShardWriter, json_bytes, latent_bytes
from finetune.latents import LatentSpace

BUCKETS = {(32, 32): 30, (24, 40): 21}  # height, width in pixels: samples
ENCODER = EncoderInfo("org/vae", "0" * 64, 0.5, 0.0, "float32", (-1.0, 1.0), channels=2, downsample=8)


def captions(index: int) -> list[str]:
    return [f"picture {index}", f"the picture {index}", f"a view of {index}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two buckets, written alternately into shards of 8; each latent holds its own number."""
    root = tmp_path_factory.mktemp("shards") / "latents"
    sizes = [size for size, count in BUCKETS.items() for _ in range(count)]
    sizes = sizes[::2] + sizes[1::2]
    with ShardWriter(root, "latents", members=["latent.npy", "json"], max_samples=8) as writer:
        for index, (height, width) in enumerate(sizes):
            moments = np.full((4, height // 8, width // 8), index, np.float16)
            members = {"latent.npy": latent_bytes(moments), "json": json_bytes({"captions": captions(index)})}
            writer.write(f"{index:04d}", members, bucket=(height, width))
        writer.finish(encoder=ENCODER)
    return root


def data_of(folder: Path, global_batch: int = 6, seed: int = 3) -> Data:
    shards = ShardSet.open(folder)
    buckets = list(shards.buckets.items())
    order = Order([len(ids) for _, ids in buckets], seed=seed, global_batch=global_batch)
    return Data(shards, order, buckets, [], LatentSpace(0.5))


def take(loader: Loader, count: int) -> list[Batch]:
    batches = iter(loader)
    taken = list(islice(batches, count))
    batches.close()
    loader.close()
    return taken


def same(one: Batch, other: Batch) -> bool:
    tensors = all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("moments", "clock", "sample_ids"))
    return tensors and one.captions == other.captions and one.bucket == other.bucket


def test_going_on_at_a_step_equals_walking_there(folder: Path) -> None:
    data = data_of(folder)
    walked = take(data.loader(seed=0, micro_batch=3), 60)  # over several epochs
    assert walked[0].sample_ids.tolist() != walked[2].sample_ids.tolist()
    for step in (0, 1, 7, 8, 9, 25):
        resumed = take(data.loader(seed=0, micro_batch=3, start_step=step), 4)
        assert all(same(a, b) for a, b in zip(walked[2 * step : 2 * step + 4], resumed, strict=True))


@pytest.mark.parametrize(("readers", "prefetch"), [(1, 1), (4, 1), (1, 9), (4, 9)])
def test_readers_and_prefetch_change_nothing(folder: Path, readers: int, prefetch: int) -> None:
    plain = take(data_of(folder).loader(seed=0, micro_batch=6), 20)
    other = take(data_of(folder).loader(seed=0, micro_batch=6, readers=readers, prefetch=prefetch), 20)
    assert all(same(a, b) for a, b in zip(plain, other, strict=True))


def test_ranks_and_micro_batches_cut_the_same_global_batches(folder: Path) -> None:
    steps = 12
    whole = take(data_of(folder).loader(seed=5, micro_batch=6), steps)
    for world_size, micro_batch in ((1, 1), (1, 2), (2, 3), (2, 1), (3, 2), (6, 1)):
        per_step = 6 // world_size // micro_batch
        parts = [
            take(
                data_of(folder).loader(seed=5, rank=rank, world_size=world_size, micro_batch=micro_batch),
                steps * per_step,
            )
            for rank in range(world_size)
        ]
        for step, batch in enumerate(whole):
            pieces = [b for part in parts for b in part[step * per_step : (step + 1) * per_step]]
            assert torch.equal(torch.cat([b.moments for b in pieces]), batch.moments)
            assert torch.equal(torch.cat([b.clock for b in pieces]), batch.clock)
            assert torch.equal(torch.cat([b.sample_ids for b in pieces]), batch.sample_ids)
            assert [caption for b in pieces for caption in b.captions] == batch.captions
            assert {b.bucket for b in pieces} == {batch.bucket}


def test_each_batch_holds_one_bucket_and_each_sample_its_own_latent(folder: Path) -> None:
    data = data_of(folder)
    batches = take(data.loader(seed=0, micro_batch=6), 2 * data.order.steps_per_epoch)
    assert {batch.bucket for batch in batches} == set(BUCKETS)
    for batch in batches:
        height, width = batch.bucket
        assert batch.moments.shape == (6, 4, height // 8, width // 8)
        assert batch.moments.dtype == torch.float16
        assert set(batch.sample_ids.tolist()) <= set(data.shards.buckets[batch.bucket].tolist())
        for moments, sample_id, caption in zip(
            batch.moments, batch.sample_ids.tolist(), batch.captions, strict=True
        ):
            index = int(data.shards.key(sample_id))
            assert (moments == index).all()
            assert caption in captions(index)


def test_the_clock_counts_images_seen(folder: Path) -> None:
    batches = take(data_of(folder).loader(seed=0, micro_batch=2, start_step=4), 9)
    assert torch.cat([batch.clock for batch in batches]).tolist() == list(range(24, 42))


def test_captions_are_drawn_for_each_visit_by_the_clock_alone(folder: Path) -> None:
    data = data_of(folder)
    batches = take(data.loader(seed=9, micro_batch=6), 40 * data.order.steps_per_epoch)
    seen: dict[int, set[str]] = {}
    for batch in batches:
        draws = rng.uniform(9, "caption", batch.clock).tolist()
        for sample_id, draw, caption in zip(batch.sample_ids.tolist(), draws, batch.captions, strict=True):
            assert caption == captions(int(data.shards.key(sample_id)))[int(3 * draw)]
            seen.setdefault(sample_id, set()).add(caption)
    assert all(len(found) == 3 for found in seen.values())
    assert [b.captions for b in take(data_of(folder).loader(seed=8, micro_batch=6), 9)] != [
        b.captions for b in batches[:9]
    ]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"captions": ["a", "b"]}, ["a", "b"]),
        ({"caption": "one"}, ["one", "one"]),
        ({"captions": []}, ["", ""]),
        ({"caption": None}, ["", ""]),
        ({}, ["", ""]),
    ],
)
def test_records_with_few_captions(record: dict, said: list[str]) -> None:
    assert [caption_of(record, draw) for draw in (0.0, 1 - 2**-24)] == said


def test_hold_out_is_disjoint_exhaustive_and_small() -> None:
    buckets = [np.arange(0, 200), np.arange(200, 300), np.arange(300, 307), np.arange(0)]
    for samples in (0, 1, 16, 30, 10**6):
        train, held = hold_out(buckets, samples)
        for ids, left, right in zip(buckets, train, held, strict=True):
            assert sorted([*left, *right]) == ids.tolist()
            assert len(right) <= len(ids) // 10
            assert (np.diff(left) > 0).all() and (np.diff(right) > 0).all()
        assert sum(map(len, held)) <= max(samples + len(buckets), 0)
    assert [len(ids) for ids in hold_out(buckets, 16)[1]] == [10, 5, 0, 0]
    assert [len(ids) for ids in hold_out(buckets, 10**6)[1]] == [20, 10, 0, 0]


def test_hold_out_depends_on_the_set_not_on_the_run(folder: Path) -> None:
    from finetune.build import open_data
    from finetune.config import Config, compose

    def held(*overrides: str) -> tuple[list[int], set[int]]:
        settings = ["experiment=smoke", f"data.shards={folder}", "train.global_batch=6", "validation.samples=5"]
        data = open_data(compose("train", [*settings, *overrides], Config)[0], held_out_batch=4)
        trained = {int(i) for _, ids in data.buckets for i in ids}
        return [int(i) for batch in data.held_out for i in batch.sample_ids], trained

    ids, trained = held()
    assert 0 < len(ids) <= 5 and not trained & set(ids) and len(trained) + len(ids) == sum(BUCKETS.values())
    assert (ids, trained) == held("seed=7") == held("train.global_batch=3") == held("data.shuffle=false")


def test_held_out_batches_are_named_by_sample_ids(folder: Path) -> None:
    shards = ShardSet.open(folder)
    ids = shards.buckets[32, 32][[4, 2, 9]]
    batch = read_batch(shards, ids, (32, 32), ids.astype(np.int64), seed=0)
    assert torch.equal(batch.sample_ids, batch.clock)
    assert [int(m[0, 0, 0]) for m in batch.moments] == [int(shards.key(int(i))) for i in ids]


def test_a_damaged_shard_reaches_the_consumer_by_name(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    victim = ShardSet.open(broken).manifest.shards[2].name
    os.truncate(broken / victim, (broken / victim).stat().st_size // 2)
    loader = data_of(broken).loader(seed=0, micro_batch=6)
    batches = iter(loader)
    with pytest.raises(ShardError, match=rf"{victim}: sample \d+ .*data-tools verify"):
        list(islice(batches, 20))
    loader.close()


def test_a_missing_shard_reaches_the_consumer_by_name(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    data = data_of(broken)
    victim = data.shards.manifest.shards[1].name
    (broken / victim).unlink()
    loader = data.loader(seed=0, micro_batch=6)
    with pytest.raises(ShardError, match=f"{victim} is missing"):
        list(islice(loader, 20))
    loader.close()


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_closing_ends_the_threads(folder: Path) -> None:
    loader = data_of(folder).loader(seed=0, micro_batch=6, readers=3, prefetch=6)
    batches = iter(loader)
    next(batches)
    assert reader_threads()
    batches.close()
    loader.close()
    assert not reader_threads()
    data_of(folder).loader(seed=0, micro_batch=6).close()  # never begun
    assert not reader_threads()


def test_it_reads_ahead_and_no_further(folder: Path) -> None:
    data = data_of(folder)
    loader = data.loader(seed=0, micro_batch=6, readers=1, prefetch=3)
    read: list[tuple[int, int]] = []
    original = loader._read
    loader._read = lambda step, offset: (read.append((step, offset)), original(step, offset))[1]  # type: ignore
    batches = iter(loader)
    next(batches)
    batches.close()
    loader.close()
    assert read == [(step, 0) for step in range(len(read))]
    assert 1 <= len(read) <= 3


def test_an_uneven_cut_is_no_loader(folder: Path) -> None:
    with pytest.raises(AssertionError):
        data_of(folder).loader(seed=0, micro_batch=4)
