"""Batches: the same from any position, for any ranks; one bucket each; errors and threads that end."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import threading
import zlib
from dataclasses import replace
from itertools import islice
from operator import le
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from finetune import UserError, rng
from finetune.batch import Batch, Sample, array, picture
from finetune.conditioning import draw
from finetune.data.loader import Data, Loader, Samples, Wanted, hold_out, largest_bucket, read_batch, shrink
from finetune.data.order import Order, Source
from finetune.data.shards import (
    Cache,
    EncoderInfo,
    Manifest,
    ShardError,
    ShardInfo,
    ShardSet,
    ShardWriter,
    json_bytes,
    latent_bytes,
)
from finetune.data.shards.files import npy_bytes
from finetune.latents import LatentSpace
from tests.data.servers import Server

ROOT = Path(__file__).resolve().parents[2]
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


def data_of(*folders: Path, global_batch: int = 6, seed: int = 3, held_out: int = 0) -> Data:
    """Training data over one or several folders, of equal weights."""
    opened = [ShardSet.open(folder) for folder in folders]
    buckets = sorted({bucket for shards in opened for bucket in shards.bucket_sizes})
    sources: list[Samples] = []
    for shards in opened:
        held = hold_out([shards.bucket_sizes.get(bucket, 0) for bucket in buckets], held_out)
        sources.append(Samples(shards, buckets, held, first_id=sum(len(each.shards) for each in sources)))
    order = Order([Source(each.sizes) for each in sources], seed=seed, global_batch=global_batch)
    return Data(sources, buckets, order, [], LatentSpace(0.5))


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
        assert set(batch.sample_ids.tolist()) <= set(data.sources[0].shards.buckets[batch.bucket].tolist())
        for moments, sample_id, caption in zip(
            batch.moments, batch.sample_ids.tolist(), batch.captions, strict=True
        ):
            index = int(data.sources[0].shards.key(sample_id))
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
        for sample_id, drawn, caption in zip(batch.sample_ids.tolist(), draws, batch.captions, strict=True):
            assert caption == captions(int(data.sources[0].shards.key(sample_id)))[int(3 * drawn)]
            seen.setdefault(sample_id, set()).add(caption)
    assert all(len(found) == 3 for found in seen.values())
    assert [b.captions for b in take(data_of(folder).loader(seed=8, micro_batch=6), 9)] != [
        b.captions for b in batches[:9]
    ]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"captions": ["a", "b"]}, ["a", "b"]),
        ({"caption": "one"}, ["one"]),
        ({"captions": []}, [""]),
        ({"caption": None}, [""]),
        ({}, [""]),
    ],
)
def test_records_with_few_captions(record: dict, said: list[str]) -> None:
    assert Sample(record, (8, 8)).captions == said


def test_hold_out_is_small_and_in_proportion() -> None:
    sizes = [200, 100, 7, 0]
    for samples in (0, 1, 16, 30, 10**6):
        held = hold_out(sizes, samples)
        for size, positions in zip(sizes, held, strict=True):
            assert len(positions) <= size // 10
            assert (np.diff(positions) > 0).all() and (positions < size).all()
    assert [len(positions) for positions in hold_out(sizes, 16)] == [11, 5, 0, 0]
    assert [len(positions) for positions in hold_out(sizes, 10**6)] == [20, 10, 0, 0]


@given(st.lists(st.integers(0, 30_000), min_size=1, max_size=60), st.integers(0, 300))
def test_as_many_are_held_out_as_is_asked(sizes: list[int], samples: int) -> None:
    counts = [len(positions) for positions in hold_out(sizes, samples)]
    most = [size // 10 for size in sizes]
    assert sum(counts) == min(samples, sum(most)) and all(map(le, counts, most))
    quotas = [samples * size / max(1, sum(sizes)) for size in sizes]
    if all(map(le, quotas, most)):  # no bucket is at its limit: each is within one of its share
        assert all(abs(count - quota) < 1 for count, quota in zip(counts, quotas))


def test_many_buckets_of_one_size_hold_out_what_is_asked() -> None:
    """Each bucket's share is less than half a sample."""
    assert sum(map(len, hold_out([25_000] * 40, 16))) == 16
    assert [len(positions) for positions in hold_out([9] * 100 + [1000], 64)] == [0] * 100 + [64]


def test_where_rounding_gives_what_is_asked_it_stays() -> None:
    """So a run that began before remainders were looked at goes on with the same samples."""
    for sizes, samples in (([1234], 64), ([300], 64), ([30_000, 10_000], 64), ([700, 200, 100], 10)):
        total = sum(sizes)
        old = [min(size // 10, round(samples * size / total)) for size in sizes]
        assert [len(positions) for positions in hold_out(sizes, samples)] == old


def test_training_rows_are_all_but_those_held_out(folder: Path) -> None:
    shards = ShardSet.open(folder)
    buckets = list(shards.bucket_sizes)
    held = [np.array([0, 7, 8, 20]), np.array([29])]
    samples = Samples(shards, buckets, held, first_id=100)
    for index, bucket in enumerate(buckets):
        ids = shards.buckets[bucket] + 100
        rows = np.arange(int(samples.sizes[index].sum()))
        assert samples.held_out_ids(index).tolist() == ids[held[index]].tolist()
        assert samples.training_ids(index, rows).tolist() == np.delete(ids, held[index]).tolist()
        # Rows are numbered shard by shard: the order's sizes are these shards' own.
        starts = np.searchsorted(shards.starts, samples.training_ids(index, rows) - 100, side="right")
        assert np.unique(starts, return_counts=True)[1].tolist() == samples.sizes[index].tolist()


def test_sources_are_mixed_sample_by_sample(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with ShardWriter(other, "latents", members=["latent.npy", "json"]) as writer:
        for index in range(12):
            moments = np.full((4, 4, 4), 1000 + index, np.float16)
            record = {"captions": [f"other {index}"]}
            writer.write(f"{index}", {"latent.npy": latent_bytes(moments), "json": json_bytes(record)}, (32, 32))
        writer.finish(encoder=ENCODER)
    data = data_of(folder, other)
    batches = take(data.loader(seed=0, micro_batch=3), 400)
    total = sum(BUCKETS.values())
    for batch in batches:
        for moments, sample_id, caption in zip(batch.moments, batch.sample_ids.tolist(), batch.captions):
            value = int(moments[0, 0, 0])
            if sample_id >= total:
                assert (value, caption) == (1000 + sample_id - total, f"other {sample_id - total}")
            else:
                assert caption in captions(int(data.sources[0].shards.key(sample_id)))
                assert value == int(data.sources[0].shards.key(sample_id))
    share = np.mean([(batch.sample_ids >= total).float().mean() for batch in batches])
    assert abs(share - 0.5) < 0.05


def test_the_largest_bucket_has_most_samples_over_all_sources(folder: Path, tmp_path: Path) -> None:
    """Not the largest area; what is held out changes nothing, so that a run's shards alone tell the same."""

    def latents(name: str, sizes: dict[tuple[int, int], int]) -> Path:
        with ShardWriter(tmp_path / name, "latents", members=["latent.npy", "json"]) as writer:
            for (height, width), samples in sizes.items():
                for index in range(samples):
                    moments = np.zeros((4, height // 8, width // 8), np.float16)
                    members = {"latent.npy": latent_bytes(moments), "json": json_bytes({"captions": ["x"]})}
                    writer.write(f"{height}-{index}", members, (height, width))
            writer.finish(encoder=ENCODER)
        return tmp_path / name

    one, other = latents("one", {(32, 32): 11, (64, 64): 10}), latents("other", {(64, 64): 5})
    assert data_of(one).largest_bucket == (32, 32)
    assert data_of(one, held_out=4).order.sizes.tolist() == [[10, 9]]
    assert data_of(one, other).largest_bucket == (64, 64)
    sets = [Manifest.load(one), Manifest.load(other)]
    assert largest_bucket(sets[:1]) == (32, 32) and largest_bucket(sets) == (64, 64)
    assert largest_bucket([]) is None


def test_hold_out_depends_on_the_set_not_on_the_run(folder: Path) -> None:
    from finetune.build import open_data
    from finetune.config import Config, compose

    def held(*overrides: str) -> tuple[list[int], set[int]]:
        settings = ["experiment=smoke", f"data.shards={folder}", "train.global_batch=6", "validation.samples=5"]
        data = open_data(compose("train", [*settings, *overrides], Config)[0], held_out_batch=4)
        source = data.sources[0]
        trained = {
            int(i)
            for index in range(len(data.buckets))
            for i in source.training_ids(index, np.arange(int(source.sizes[index].sum())))
        }
        return [int(i) for batch in data.held_out for i in batch.sample_ids], trained

    ids, trained = held()
    assert 0 < len(ids) <= 5 and not trained & set(ids) and len(trained) + len(ids) == sum(BUCKETS.values())
    assert (ids, trained) == held("seed=7") == held("train.global_batch=3") == held("data.shuffle=false")


def test_held_out_batches_are_named_by_sample_ids(folder: Path) -> None:
    shards = ShardSet.open(folder)
    ids = shards.buckets[32, 32][[4, 2, 9]]
    sources = data_of(folder).sources
    batch = read_batch(sources, np.zeros(3, np.int64), ids, (32, 32), ids.astype(np.int64), seed=0)
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
    victim = data.sources[0].shards.manifest.shards[1].name
    (broken / victim).unlink()
    loader = data.loader(seed=0, micro_batch=6)
    with pytest.raises(ShardError, match=f"{victim} is missing"):
        list(islice(loader, 20))
    loader.close()


@pytest.mark.parametrize("record", [b"{},{}", b"", b"[]", b'{"captions": ["a"', b"\xff{}", b"{}}"])
def test_a_wrong_record_is_named_among_right_ones(tmp_path: Path, record: bytes) -> None:
    with ShardWriter(tmp_path / "set", "latents", members=["latent.npy", "json"]) as writer:
        for index in range(6):
            text = record if index == 4 else json_bytes({"captions": captions(index)})
            members = {"latent.npy": latent_bytes(np.zeros((4, 4, 4))), "json": text}
            writer.write(f"{index}", members, (32, 32))
        writer.finish(encoder=ENCODER)
    shards = ShardSet.open(tmp_path / "set")
    out = np.empty((3, 4, 4, 4), np.float16)
    with pytest.raises(ShardError, match=r"00000.tar: sample 4 has a json member that is no"):
        shards.read_samples([5, 4, 0], out)
    assert [record["captions"] for record in shards.read_samples([5, 3, 0], out)] == [
        captions(i) for i in (5, 3, 0)
    ]


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


def test_closing_ends_what_fetches_ahead(folder: Path, tmp_path: Path) -> None:
    local = take(data_of(folder).loader(seed=0, micro_batch=6), 8)
    data = data_of(folder)
    (source,) = data.sources
    source.shards = ShardSet.open(f"pipe:cat {folder}/{{}}", cache=Cache(tmp_path, 1 << 30))
    loader = data.loader(seed=0, micro_batch=6, readers=2)
    batches = iter(loader)
    remote = list(islice(batches, 8))
    assert all(same(a, b) for a, b in zip(local, remote, strict=True))
    batches.close()
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("reader", "prefetch"))]


def test_a_loader_can_be_walked_again(folder: Path) -> None:
    loader = data_of(folder).loader(seed=0, micro_batch=6)
    first, second = (list(islice(loader, 3)) for _ in range(2))
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    loader.close()


def test_it_reads_ahead_and_no_further(folder: Path) -> None:
    data = data_of(folder)
    loader = data.loader(seed=0, micro_batch=6, readers=1, prefetch=3)
    read: list[tuple[int, int]] = []
    enough = threading.Event()
    original = loader._read

    def noted(step: int, offset: int) -> Batch:
        read.append((step, offset))
        if len(read) == 5:
            enough.set()
        return original(step, offset)

    loader._read = noted  # type: ignore[method-assign]
    batches = iter(loader)
    for _ in range(2):  # a reader that was ahead of the first sleeps until half of its shelf is gone
        next(batches)
    assert enough.wait(20)  # two taken, and of four others the first at least
    batches.close()
    loader.close()
    assert read == [(step, 0) for step in range(len(read))]
    assert len(read) <= 6


def test_looking_ahead_sees_each_step_once_and_asks_for_the_same(folder: Path) -> None:
    """What is kept from one look to the next changes nothing of what is asked for."""
    data = data_of(folder)
    asked: list[list[int]] = []
    looked: list[int] = []
    data.sources[0].shards.prefetch = lambda shards: asked.append(list(shards))  # type: ignore[method-assign]

    def loader() -> Loader:
        made = data.loader(seed=0, micro_batch=6)
        original = made._shards_of
        made._shards_of = lambda step: (looked.append(step), original(step))[1]  # type: ignore[method-assign]
        return made

    walking = loader()
    for step in (0, 32, 64, 32):  # readers may come out of order
        walking._look_ahead(step)
    assert len(looked) == len(set(looked))
    walking._look_ahead(64)
    loader()._look_ahead(64)
    assert asked[-1] == asked[-2] and set(asked[-1]) == set(range(len(data.sources[0].shards.manifest.shards)))


def test_an_uneven_cut_is_no_loader(folder: Path) -> None:
    with pytest.raises(AssertionError):
        data_of(folder).loader(seed=0, micro_batch=4)


_HUNDRED_MILLION = """
import resource, sys
from finetune.build import open_data
from finetune.config import Config, compose
settings = ["data.shards=" + sys.argv[1], "train.global_batch=2048", "validation.samples=0"]
config = compose("train", settings, Config)[0]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = open_data(config, held_out_batch=64)
for step in (100_000_000 // 2048, 3):
    batch = data.order.batch(step, 512, 1024)
    ids = data.ids(batch.bucket, batch.sources, batch.rows)
    for sample_id in ids.tolist():
        shard, row = data.sources[0].shards.locate(sample_id)
        assert data.sources[0].shards.bucket_of(shard) == data.buckets[batch.bucket]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_hundred_million_samples_need_no_list(tmp_path: Path) -> None:
    """100,000 shards in 3 buckets, opened and asked for its 100,000,000th sample: memory far below 1 GiB."""
    shapes = [(512, 512), (512, 768), (768, 512)]
    rows = [ShardInfo(f"{n:05d}.tar", shapes[n % 3], 1_000, 1, "") for n in range(100_000)]
    Manifest("latents", ["latent.npy", "json"], rows, ENCODER).save(tmp_path)
    command = [sys.executable, "-c", _HUNDRED_MILLION, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) * 1024 < 512 << 20


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "no data: give data.shards=FOLDER, or several as data.sources.NAME.shards=FOLDER"),
        (["data.shards=A", "data.sources.b.shards=A"], "data.shards and data.sources are both given"),
        (["data.sources.b.weight=2"], "no value for data.sources.b.shards: give data.sources.b.shards=FOLDER"),
        (["data.sources.b={shards: A, wieght: 2}"], "unknown key data.sources.b.wieght"),
        (["data.sources.b={shards: A, weight: 0}"], "data.sources.b.weight=0 must be a number greater than 0"),
        (["data.sources.b={shards: A, weight: much}"], "data.sources.b.weight=much must be a number"),
        (
            ["data.sources.a.shards=A", "data.sources.b.shards=B"],
            "sources a and b are not of one autoencoder: scale is 0.5 and 0.25; encode both with the same VAE",
        ),
    ],
)
def test_mistakes_about_sources_get_one_line(folder: Path, tmp_path: Path, overrides: list[str], says: str) -> None:
    from finetune.build import open_data
    from finetune.config import Config, compose

    shutil.copytree(folder, tmp_path / "b")
    manifest = Manifest.load(folder)
    replace(manifest, encoder=replace(ENCODER, scale=0.25)).save(tmp_path / "b")
    named = [
        o.replace("=A", f"={folder}").replace(": A", f": {folder}").replace("=B", f"={tmp_path / 'b'}")
        for o in overrides
    ]
    with pytest.raises(UserError) as caught:
        open_data(compose("train", [*named, "train.global_batch=6"], Config)[0], held_out_batch=4)
    assert says in str(caught.value)


def test_held_out_samples_are_read_without_their_shards(folder: Path, tmp_path: Path) -> None:
    """The same batches; else a shard for each of them would be fetched before the first step."""
    from finetune.build import open_data
    from finetune.config import Config, compose

    with contextlib.closing(Server(folder.parent)) as server:

        def opened(*roots: str) -> Data:
            settings = ["train.global_batch=6", "validation.samples=9", f"data.cache_dir={tmp_path}"]
            named = [f"data.sources.s{number}.shards={root}" for number, root in enumerate(roots)]
            return open_data(compose("train", [*settings, *named], Config)[0], held_out_batch=2)

        near, far = opened(str(folder), str(folder)), opened(str(folder), f"{server.url}/{folder.name}")
        assert len(near.held_out) > 3
        assert all(same(a, b) for a, b in zip(near.held_out, far.held_out, strict=True))
        cache = far.sources[1].shards.cache
        assert cache is not None and cache.held_bytes == 0
        assert same(take(near.loader(seed=0, micro_batch=6), 9)[8], take(far.loader(seed=0, micro_batch=6), 9)[8])


def test_remote_sets_of_a_mixture_share_the_cache(folder: Path, tmp_path: Path) -> None:
    """What all of them keep open, and fetch ahead, fits; a set on this machine takes no share."""
    from finetune.build import open_data
    from finetune.config import Config, compose

    settings = ["train.global_batch=6", "validation.samples=0", f"data.cache_dir={tmp_path}", "data.cache_gib=1"]
    for remote in (1, 3):
        roots = [f"'pipe:cat {folder}/{{}}'"] * remote + [str(folder)]
        named = [f"data.sources.s{number}.shards={root}" for number, root in enumerate(roots)]
        data = open_data(compose("train", [*settings, *named], Config)[0], held_out_batch=4)
        caches = [source.shards.cache for source in data.sources if source.shards.cache is not None]
        assert len(caches) == remote
        shared = sum(2 * cache.sharers * cache.share_bytes for cache in caches)
        assert 0.99 * (1 << 30) < shared <= 1 << 30


def test_memory_is_used_again_only_when_no_view_is_left(folder: Path) -> None:
    data = data_of(folder)
    loader = data.loader(seed=0, micro_batch=6)
    batches = iter(loader)
    slices: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []
    for batch in islice(batches, 60):
        slices.append(batch.moments[2:4, 1:])  # a view alone, the batch itself is let go
        copies.append(slices[-1].clone())
    assert all(torch.equal(view, copy) for view, copy in zip(slices, copies))
    places = {view.untyped_storage().data_ptr() for view in slices}
    assert len(places) == len(slices)
    slices.clear()
    del batch
    again = {next(batches).moments.untyped_storage().data_ptr() for _ in range(40)}
    assert len(again) < 40
    batches.close()
    loader.close()


# --- what a batch brings beside moments and captions ----------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples of 16 px with a class; sample i has a mask whose left i columns count."""
    root = tmp_path_factory.mktemp("labelled") / "latents"
    members = ["latent.npy", "json", "mask.png"]
    with ShardWriter(root, "latents", members=members, max_samples=5) as writer:
        for index in range(12):
            mask = np.zeros((16, 16), np.uint8)
            mask[:, :index] = 255
            buffer = io.BytesIO()
            Image.fromarray(mask).save(buffer, format="PNG")
            sample = {
                "latent.npy": latent_bytes(np.full((4, 2, 2), index, np.float16)),
                "json": json_bytes({"class": index * 10}),
                "mask.png": buffer.getvalue(),
            }
            writer.write(f"{index:04d}", sample, bucket=(16, 16))
        writer.finish(encoder=ENCODER)
    return root


def test_a_condition_is_read_of_each_sample_by_its_own_draws(labelled: Path) -> None:
    """The same in any micro-batch of any rank, read by several threads."""

    def read(sample: Sample) -> dict[str, np.ndarray]:
        assert sample.bucket == (16, 16) and len(sample.members["mask.png"]) > 50
        return {"class": np.int64(sample.record["class"]), "drawn": np.float32(draw(sample, "x"))}

    data = replace(data_of(labelled, global_batch=4), wanted=Wanted(read=read, members=("mask.png",)))
    whole = take(data.loader(seed=3, micro_batch=4), 6)
    for batch in whole:
        assert batch.condition["class"].tolist() == (batch.moments[:, 0, 0, 0].long() * 10).tolist()
        wanted = rng.uniform(3, "x", batch.clock)
        torch.testing.assert_close(batch.condition["drawn"], wanted, rtol=0, atol=0)
    halves = take(data.loader(seed=3, rank=1, world_size=2, micro_batch=1, readers=2), 12)
    assert [int(each.condition["class"]) for each in halves] == [
        int(batch.condition["class"][place]) for batch in whole for place in (2, 3)
    ]


def test_a_mask_counts_by_the_share_of_each_cell(labelled: Path) -> None:
    data = replace(data_of(labelled, global_batch=4), wanted=Wanted(loss_masks=True))
    for batch in take(data.loader(seed=0, micro_batch=4), 3):
        columns = batch.moments[:, 0, 0, 0].float()
        assert batch.loss_mask is not None and batch.loss_mask.shape == (4, 1, 2, 2)
        left, right = (columns / 8).clamp(max=1), ((columns - 8) / 8).clamp(min=0)
        wanted = torch.stack([left, right], dim=1)[:, None, None].expand(4, 1, 2, 2)
        torch.testing.assert_close(batch.loss_mask, wanted, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"mask.png of 16x16 px does not fit latents of 3x2"):
        shrink(np.zeros((16, 16), np.uint8), (3, 2))


def test_what_has_no_mask_counts_as_a_whole(labelled: Path, tmp_path: Path) -> None:
    """A sample among masked ones, and a whole source beside them; without any mask at all it is a mistake."""
    from finetune.build import open_data
    from finetune.config import Config, compose

    def opened(*overrides: str) -> Data:
        settings = ["train.global_batch=4", "validation.samples=2", "data.loss_masks=true", *overrides]
        return open_data(compose("train", settings, Config)[0], held_out_batch=2)

    masked = ShardSet.open(labelled)
    with ShardWriter(tmp_path / "some", "latents", members=["latent.npy", "json", "mask.png"]) as writer:
        for index in range(12):
            sample = masked.read(index)
            if index % 2:
                del sample["mask.png"]
            writer.write(sample.pop("__key__"), sample, bucket=(16, 16))
        writer.finish(encoder=ENCODER)
    with ShardWriter(tmp_path / "none", "latents") as writer:
        for index in range(12):
            members = {"latent.npy": latent_bytes(np.full((4, 2, 2), 20, np.float16)), "json": json_bytes({})}
            writer.write(f"{index:04d}", members, bucket=(16, 16))
        writer.finish(encoder=ENCODER)
    data = opened(f"data.sources.a.shards={tmp_path / 'some'}", f"data.sources.b.shards={tmp_path / 'none'}")
    seen = set()
    for batch in take(data.loader(seed=0, micro_batch=4), 6):
        assert batch.loss_mask is not None and batch.loss_mask.shape == (4, 1, 2, 2)
        for index, mask_1hw in zip(batch.moments[:, 0, 0, 0].int().tolist(), batch.loss_mask, strict=True):
            whole = index % 2 or index == 20
            assert mask_1hw.mean() == (1 if whole else index / 16)
            seen.add("none" if index == 20 else bool(whole))
    assert seen == {"none", True, False}
    with pytest.raises(UserError, match=r"data.loss_masks=true needs mask.png and .*none has none"):
        opened(f"data.shards={tmp_path / 'none'}")


def test_each_source_has_its_loss_weight(labelled: Path) -> None:
    data = data_of(labelled, labelled, global_batch=4)
    weighted = replace(data, wanted=Wanted(loss_weights=(1.0, 0.25)))
    seen = set()
    for batch, plain in zip(
        take(weighted.loader(seed=0, micro_batch=4), 6), take(data.loader(seed=0, micro_batch=4), 6), strict=True
    ):
        assert plain.loss_weight is None and batch.loss_weight is not None
        wanted = torch.where(batch.sample_ids < 12, 1.0, 0.25)
        assert torch.equal(batch.loss_weight, wanted)
        seen |= set(batch.loss_weight.tolist())
    assert seen == {1.0, 0.25}


def test_what_a_condition_lacks_ends_the_loader_with_the_sample_named(labelled: Path, folder: Path) -> None:
    def read(sample: Sample) -> dict[str, np.ndarray]:
        if sample.record.get("class") == 70:
            raise UserError("a sample's class is 70: correct it")
        return {}

    def failing(wanted: Wanted, *folders: Path) -> Loader:
        return replace(data_of(*folders, global_batch=4), wanted=wanted).loader(seed=0, micro_batch=4)

    with pytest.raises(UserError, match=f"^{labelled}: sample 0007: a sample's class is 70: correct it$"):
        take(failing(Wanted(read=read), labelled), 3)
    with pytest.raises(UserError, match=f"^{labelled}: sample 0007: a sample's class is 70: correct it$"):
        take(failing(Wanted(read=read), folder, labelled), 60)  # ids go on behind those of the first source


def test_a_mask_that_is_no_picture_names_its_sample(labelled: Path, tmp_path: Path) -> None:
    whole = ShardSet.open(labelled)
    with ShardWriter(tmp_path / "set", "latents", members=["latent.npy", "json", "mask.png"]) as writer:
        for index in range(12):
            sample = whole.read(index)
            if index == 7:
                sample["mask.png"] = sample["mask.png"][:40]
            writer.write(sample.pop("__key__"), sample, bucket=(16, 16))
        writer.finish(encoder=ENCODER)
    data = replace(data_of(tmp_path / "set", global_batch=4), wanted=Wanted(loss_masks=True))
    with pytest.raises(UserError, match=f"^{tmp_path}/set: sample 0007: mask.png cannot be read as a picture: "):
        take(data.loader(seed=0, micro_batch=4), 3)


def test_a_picture_too_large_to_be_read_is_a_line() -> None:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    small = buffer.getvalue()
    header = b"IHDR" + (20_000).to_bytes(4, "big") * 2 + small[24:29]
    large = small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]
    with pytest.raises(UserError, match=r"^map\.png cannot be read as a picture: Image size \(400000000 pixels\)"):
        picture(large, "L", "map.png")


def test_a_damaged_array_is_a_line_whatever_is_wrong_with_it() -> None:
    whole = npy_bytes(np.zeros((2, 8, 8), np.uint8))
    assert array(whole, "hole.npy").shape == (2, 8, 8)
    draws = np.random.default_rng(0)
    lines = []
    for _ in range(3000):
        damaged = bytearray(whole)
        for at in draws.integers(128, size=3):
            damaged[at] = draws.integers(256)
        try:
            array(bytes(damaged), "hole.npy")
        except UserError as error:
            lines.append(str(error))
    assert len(lines) > 1000
    assert all(re.fullmatch("hole.npy cannot be read as an array: .+", line) for line in lines)
