"""Sets of shards that lie elsewhere: the same samples as of a local set, through a bounded cache that is shared."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune import run_cli
from finetune.data.shards import (
    Cache,
    EncoderInfo,
    LatentStats,
    Manifest,
    Retry,
    ShardError,
    ShardSet,
    ShardWriter,
    Store,
    index_name,
    json_bytes,
    latent_bytes,
)
from finetune.data.shards import cache as cache_module
from finetune.data.shards.store import StoreAwayError
from tests.data.servers import Fault, Server

QUICK = Retry(attempts=4, manifest_attempts=4, first_s=0.001, cap_s=0.002, stall_s=20.0)
ENCODER = EncoderInfo("./vae", "ab" * 32, 0.18215, 0.0, "float32", (-1.0, 1.0), 4, 8)
STATS = LatentStats(0.0, 1.0, [0.0] * 4, [1.0] * 4)
SAMPLES, A_SHARD = 24, 3


def write_set(root: Path, seed: int = 0) -> Manifest:
    """Eight shards of three latents [8, 32, 32] each."""
    rng = np.random.default_rng(seed)
    with ShardWriter(root, "latents", max_samples=A_SHARD) as writer:
        for number in range(SAMPLES):
            latent = np.abs(rng.normal(size=(8, 32, 32)))
            members = {"latent.npy": latent_bytes(latent), "json": json_bytes({"captions": [f"{seed}: {number}"]})}
            writer.write(f"k{number:03d}", members, (256, 256))
        return writer.finish(ENCODER, STATS)


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("master")
    write_set(folder / "set")
    return folder


@pytest.fixture
def far(master: Path, tmp_path: Path) -> Path:
    """A folder whose `set` may be damaged."""
    shutil.copytree(master, tmp_path / "far")
    return tmp_path / "far"


@pytest.fixture
def server(far: Path) -> Iterator[Server]:
    server = Server(far)
    yield server
    server.close()


def store_of(server: Server, retry: Retry = QUICK) -> Store:
    return Store(server.url + "/set", retry)


def shard_bytes(manifest: Manifest) -> int:
    """What one shard takes in a cache."""
    return max(shard.bytes for shard in manifest.shards) + cache_module.HEADER_BYTES + A_SHARD * 2 * 16


def on_disk(folder: Path) -> int:
    """Bytes of all files; those that vanish meanwhile are not counted."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(path, name)).st_size
    return total


def temporaries(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if path.is_dir()]


def assert_same(shards: ShardSet, local: Path, order: Any = None) -> None:
    want = ShardSet.open(local)
    ids = np.arange(SAMPLES) if order is None else order
    for number in ids:
        assert shards.read(int(number)) == want.read(int(number))
    moments, expected = np.zeros((2, len(ids), 8, 32, 32), np.float16)
    shards.read_latents(ids, moments)
    want.read_latents(ids, expected)
    np.testing.assert_array_equal(moments, expected)


# --- every way gives the samples of the local set


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(moto: str, master: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The set in a bucket of an S3 server; only environment variables say where that is."""
    import boto3

    settings = {
        "AWS_ENDPOINT_URL": f"http://{moto}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="pictures")
    for path in (master / "set").iterdir():
        client.put_object(Bucket="pictures", Key=f"v1/latents/{path.name}", Body=path.read_bytes())
    return "s3://pictures/v1/latents"


def test_http(server: Server, far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)  # a second each time it is asked
    shards = ShardSet.open(server.url + "/set", "latents", cache=Cache(tmp_path / "cache"))
    assert shards.root == server.url + "/set" and shards.remote
    assert_same(shards, far / "set")
    assert_same(shards, far / "set")
    assert max(Counter(request.path for request in server.requests).values()) == 1
    stats = shards.cache.stats
    assert (stats.downloads, stats.retries, stats.evictions) == (8, 0, 0)
    assert stats.bytes == shards.manifest.bytes and stats.wait_s >= 8


def test_s3(bucket: str, master: Path, tmp_path: Path) -> None:
    assert_same(ShardSet.open(bucket, "latents", cache=Cache(tmp_path / "cache")), master / "set")


@pytest.mark.filterwarnings("ignore:.*trying on")
def test_s3_through_faults(
    bucket: str, moto: str, master: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Server(upstream=moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    impatient = Retry(attempts=4, manifest_attempts=4, first_s=0.001, cap_s=0.002, stall_s=0.5)
    proxy.faults = {
        "manifest.json": [Fault("status", status=503), Fault("cut", after=100)],
        "00000.tar": [Fault("status", status=500), Fault("reset", after=9000), Fault("flip", after=5000)],
        "00001.tar": [Fault("cut", after=9000), Fault("short", after=9000), Fault("stall", after=5000)],
        "00002.tar": [Fault("status", status=429), Fault("cut", after=0)],
        "00003.index.npy": [Fault("flip", after=130), Fault("cut", after=100), Fault("short", after=100)],
    }
    try:
        cache = Cache(tmp_path / "cache")
        assert_same(ShardSet.open(Store(bucket, impatient), cache=cache), master / "set")
        assert not any(proxy.faults.values())
        assert cache.stats.retries == 11
        # One request a try: the retries of botocore and s3fs don't multiply ours.
        assert [proxy.count(f"{name}.tar") for name in ("00000", "00001", "00002", "00003")] == [4, 4, 3, 1]
    finally:
        proxy.close()


def test_s3_says_what_is_not_allowed_or_absent(bucket: str, moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShardError, match=r"s3://pictures/v2 has no manifest.json"):
        ShardSet.open("s3://pictures/v2")
    with pytest.raises(ShardError, match="has no manifest.json"):
        ShardSet.open("s3://no-such-bucket/v2")
    proxy = Server(upstream=moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    proxy.faults = {"manifest.json": [Fault("status", status=403)] * 3}
    try:
        with pytest.raises(ShardError, match=r"not allowed \(.*AWS_PROFILE") as caught:
            ShardSet.open(bucket)
        assert proxy.count("manifest.json") == 1 and "\n" not in str(caught.value)
    finally:
        proxy.close()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ShardError, match=r"not allowed \(.*AWS_PROFILE"):
        ShardSet.open(bucket)


@pytest.mark.filterwarnings("ignore:.*trying on")
def test_pipe(far: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(f"pipe:cat {far}/set/{{}}", cache=Cache(tmp_path / "cache"))
    assert_same(shards, far / "set")
    with pytest.raises(StoreAwayError, match=r"pipe:cat .*/none/manifest.json"):
        ShardSet.open(Store(f"pipe:cat {far}/none/{{}}", QUICK), cache=Cache(tmp_path / "cache"))


def test_memory(far: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in (far / "set").iterdir():
        memory.pipe(f"/remote/{path.name}", path.read_bytes())
    assert_same(ShardSet.open("memory://remote", cache=Cache(tmp_path / "cache")), far / "set")


def test_local_sets_are_read_where_they_lie(far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_FINETUNE_CACHE", str(tmp_path / "cache"))
    for root in (far / "set", str(far / "set"), f"file://{far / 'set'}"):
        shards = ShardSet.open(root)
        shards.prefetch([0, 1, 2])
        assert_same(shards, far / "set")
        assert shards.root == far / "set" and shards.cache is None and not shards.remote
    assert not (tmp_path / "cache").exists()


# --- what is asked for anew, and what is kept


def test_the_manifest_is_never_taken_from_the_cache(server: Server, far: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    assert_same(ShardSet.open(store_of(server), cache=cache), far / "set")
    shutil.rmtree(far / "set")
    write_set(far / "set", seed=1)  # other samples under the same names
    assert_same(ShardSet.open(store_of(server), cache=cache), far / "set")
    server.close()
    with pytest.raises(StoreAwayError, match="and the network"), pytest.warns(UserWarning, match="trying on"):
        ShardSet.open(store_of(server), cache=cache)


def test_shards_are_kept_for_the_next_program(server: Server, far: Path, tmp_path: Path) -> None:
    assert_same(ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache")), far / "set")
    before = len(server.requests)
    assert_same(ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache")), far / "set")
    assert [request.path for request in server.requests[before:]] == ["/set/manifest.json"]


def test_two_sets_of_the_same_names_are_kept_apart(server: Server, far: Path, tmp_path: Path) -> None:
    write_set(far / "other" / "set", seed=1)
    cache = Cache(tmp_path / "cache")
    for root in ("set", "other/set", "set"):
        assert_same(ShardSet.open(Store(f"{server.url}/{root}", QUICK), cache=cache), far / root)


def test_a_damaged_copy_is_fetched_anew(server: Server, far: Path, tmp_path: Path) -> None:
    assert_same(ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache")), far / "set")
    tars, indexes = sorted((tmp_path / "cache").rglob("*.tar")), sorted((tmp_path / "cache").rglob("*.npy"))
    os.truncate(tars[0], 1000)
    tars[1].unlink()
    os.truncate(indexes[2], 100)
    indexes[3].write_bytes(indexes[3].read_bytes()[:-16])
    indexes[4].unlink()
    cache = Cache(tmp_path / "cache")
    assert_same(ShardSet.open(store_of(server), cache=cache), far / "set")
    assert cache.stats.downloads == 5 and not temporaries(tmp_path / "cache")


@pytest.mark.filterwarnings("ignore:.*trying on")
def test_an_index_that_cannot_be_right(server: Server, far: Path, tmp_path: Path) -> None:
    path = far / "set" / "00000.index.npy"
    index = np.load(path)
    outside, negative = index.copy(), index.copy()
    outside[1, 0, 1] = 1 << 40
    negative[2, 1] = -7, 100
    for wrong, what in [
        (index[:2], r"is int64 \[2, 2, 2\], the manifest needs int64 \[3, 2, 2\]"),
        (index.astype(np.float64), "is float64"),
        (outside, "members outside"),
        (negative, "members outside"),
    ]:
        np.save(path, wrong)
        shards = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache"))
        with pytest.raises(ShardError, match=what) as caught:
            shards.read(0)
        assert f"{server.url}/set/00000.index.npy" in str(caught.value)
    path.write_bytes(b"<html>")
    with pytest.raises(ShardError, match="6 bytes that are no numpy array"):
        shards.read(0)
    assert not list((tmp_path / "cache").rglob("*.tar"))
    np.save(path, index)
    assert_same(shards, far / "set")


def test_a_missing_shard_names_its_url(server: Server, far: Path, tmp_path: Path) -> None:
    (far / "set" / "00002.tar").unlink()
    shards = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache"))
    with pytest.raises(ShardError, match=f"{server.url}/set/00002.tar is missing"):
        shards.read(6)
    assert shards.read_json(0) == {"captions": ["0: 0"]}


@pytest.mark.filterwarnings("ignore:.*trying on")
def test_a_store_that_is_away_ends_a_command_as_a_disk_that_does_not_answer(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that a launcher starts the command again; what is absent or forbidden stays a mistake."""
    shards = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache"))

    def end(status: int, function: Callable[[], Any]) -> tuple[int, str]:
        server.faults = {name: [Fault("status", status=status)] * 4 for name in ("00000.tar", "classes.json")}
        with pytest.raises(SystemExit) as ended:
            run_cli(function)
        (line,) = capsys.readouterr().err.splitlines()
        return ended.value.code, line

    for name, function in (("00000.tar", lambda: shards.read(0)), ("classes.json", shards.classes)):
        shards.manifest = dataclasses.replace(shards.manifest, classes="0" * 64)
        code, line = end(503, function)
        assert (
            code == 74 and f"{server.url}/set/{name}: HTTP 503" in line and "start the same command again" in line
        )
        assert [end(status, function)[0] for status in (403, 404)] == [2, 2]
    away = pickle.loads(pickle.dumps(StoreAwayError("https://host/a.tar", "HTTP 503")))  # from rank 0 to others
    assert str(away) == "cannot fetch https://host/a.tar: HTTP 503"


def test_errors_of_samples_name_the_url(server: Server, tmp_path: Path) -> None:
    shards = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache"))
    with pytest.raises(ShardError, match=f"{server.url}/set/00000.tar: sample 0 has no member 'mask.png'"):
        shards.read_member(0, "mask.png")


def test_the_autoencoder_of_a_remote_set() -> None:
    with pytest.raises(ShardError, match=r"made by \./vae beside them.*model\.vae"):
        ENCODER.locate("s3://bucket/latents")
    hub = EncoderInfo("owner/vae", "ab" * 32, 1.0, 0.0, "float32", (-1.0, 1.0), 4, 8)
    assert hub.locate("s3://bucket/latents") == "owner/vae"


# --- several at once


def read_all(root: str, folder: Path, max_bytes: int | None, seed: int, queue: Any) -> None:
    cache = Cache(folder, max_bytes, sharers=2)
    shards = ShardSet.open(Store(root, QUICK), cache=cache)
    texts = {}
    for number in np.random.default_rng(seed).permutation(SAMPLES):
        texts[int(number)] = shards.read_json(int(number))["captions"][0]
    queue.put((texts, cache.stats.downloads))


def run_readers(server: Server, folder: Path, max_bytes: int | None, readers: int) -> int:
    """Read all from several processes; returns how many shards they downloaded."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    args = [(server.url + "/set", folder, max_bytes, seed, queue) for seed in range(readers)]
    children = [context.Process(target=read_all, args=each) for each in args]
    for child in children:
        child.start()
    results = [queue.get(timeout=120) for _ in children]
    for child in children:
        child.join()
        assert child.exitcode == 0
    for texts, _ in results:
        assert texts == {number: f"0: {number}" for number in range(SAMPLES)}
    return sum(downloads for _, downloads in results)


def test_processes_download_each_shard_once(server: Server, tmp_path: Path) -> None:
    assert run_readers(server, tmp_path / "cache", None, readers=3) == 8
    fetched = Counter(request.path for request in server.requests if "manifest" not in request.path)
    assert set(fetched.values()) == {1} and len(fetched) == 16
    assert not temporaries(tmp_path / "cache")


def test_processes_share_a_cache_that_is_too_small(server: Server, far: Path, tmp_path: Path) -> None:
    bound = int(2.5 * shard_bytes(Manifest.load(far / "set")))
    seen: list[int] = []
    server.on_request = lambda name: seen.append(on_disk(tmp_path / "cache"))
    assert run_readers(server, tmp_path / "cache", bound, readers=3) > 8
    assert max(seen) <= bound


def test_threads_download_each_shard_once(server: Server, far: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache"))
    threads = [threading.Thread(target=assert_same, args=(shards, far / "set")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shards.cache.stats.downloads == 8
    assert all(server.count(shard.name) == 1 for shard in shards.manifest.shards)


def test_a_download_keeps_no_other_thread_from_reading(server: Server, tmp_path: Path) -> None:
    shards = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache"))
    shards.read(0)
    server.faults = {"00001.tar": [Fault("stall", after=1000)]}
    thread = threading.Thread(target=shards.read, args=(A_SHARD,))
    thread.start()
    assert server.stalled.acquire(timeout=60)
    assert shards.read_json(1) == {"captions": ["0: 1"]}  # open
    assert shards.read_json(2 * A_SHARD) == {"captions": ["0: 6"]}  # to be fetched
    assert thread.is_alive()
    server.release.set()
    thread.join()
    assert server.count("00001.tar") == 1


def fetch_one(root: str, folder: Path) -> None:
    ShardSet.open(Store(root, QUICK), cache=Cache(folder)).read(0)


def test_a_killed_download_is_taken_over(server: Server, far: Path, tmp_path: Path) -> None:
    server.faults = {"00000.tar": [Fault("stall", after=5000)]}
    child = multiprocessing.get_context("fork").Process(
        target=fetch_one, args=(server.url + "/set", tmp_path / "cache")
    )
    child.start()
    assert server.stalled.acquire(timeout=60)
    shards = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache"))
    thread = threading.Thread(target=shards.read, args=(0,))  # waits for the child
    thread.start()
    assert temporaries(tmp_path / "cache") and not list((tmp_path / "cache").glob("*/00000-*/00000.tar"))
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    thread.join()
    assert_same(shards, far / "set")
    assert server.count("00000.tar") == 2 and not temporaries(tmp_path / "cache")


def test_what_a_killed_download_left_makes_room(server: Server, far: Path, tmp_path: Path) -> None:
    """Its room is taken back even if nobody asks for that shard again."""
    bound = int(1.5 * shard_bytes(Manifest.load(far / "set")))
    server.faults = {"00000.tar": [Fault("stall", after=5000)]}
    child = multiprocessing.get_context("fork").Process(
        target=fetch_one, args=(server.url + "/set", tmp_path / "cache")
    )
    child.start()
    assert server.stalled.acquire(timeout=60)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    shards = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache", bound))
    assert shards.cache.held_bytes > bound / 2
    shards.read(A_SHARD)
    assert not temporaries(tmp_path / "cache") and shards.cache.held_bytes <= bound


def _child(shards: ShardSet, queue: Any) -> None:
    queue.put([shards.read(number) for number in range(SAMPLES)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_used_set_works_in_a_child(server: Server, far: Path, tmp_path: Path, method: str) -> None:
    shards = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache"))
    shards.read(0)
    shards.prefetch([1, 2])
    with shards.tars.lock:  # held by another thread at the moment of the fork, say
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        child = context.Process(target=_child, args=(shards, queue))
        child.start()
    assert queue.get(timeout=60) == [ShardSet.open(far / "set").read(number) for number in range(SAMPLES)]
    child.join()
    assert child.exitcode == 0
    assert_same(pickle.loads(pickle.dumps(shards)), far / "set")
    shards.close()


# --- a few samples alone


FEW = np.array([20, 4, 5, 0, 13])


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_an_excerpt_reads_the_same_samples(server: Server, far: Path, tmp_path: Path, ranges: bool) -> None:
    server.ranges = ranges
    server.faults = {"00001.tar": [Fault("status", status=503)]}
    whole = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache"))
    part = whole.excerpt(FEW)
    assert_same(part, far / "set", FEW)
    ranged = [request for request in server.requests if request.path.endswith(".tar") and request.range]
    if ranges:
        assert len(ranged) == len(FEW) + 1 == sum(request.path.endswith(".tar") for request in server.requests)
        assert whole.cache.held_bytes == 0 and whole.cache.stats.downloads == 0
        with pytest.raises(ShardError, match="sample 1 is ''"):
            part.read(1)  # a hole
    else:
        assert whole.cache.stats.downloads == 4
    assert_same(whole, far / "set")
    assert not temporaries(tmp_path / "cache")


def test_an_excerpt_takes_what_is_here(server: Server, far: Path, tmp_path: Path) -> None:
    whole = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache"))
    assert_same(whole, far / "set")
    before = len(server.requests)
    assert_same(whole.excerpt(FEW), far / "set", FEW)
    assert len(server.requests) == before
    local = ShardSet.open(far / "set")
    assert local.excerpt(FEW) is local


def test_an_excerpt_over_s3(bucket: str, master: Path, tmp_path: Path) -> None:
    whole = ShardSet.open(bucket, cache=Cache(tmp_path / "cache"))
    assert_same(whole.excerpt(FEW), master / "set", FEW)
    assert whole.cache.held_bytes == 0


@pytest.mark.filterwarnings("ignore:.*trying on")
def test_an_excerpt_of_a_store_that_goes_away(server: Server, tmp_path: Path) -> None:
    whole = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache"))
    for name in ("00004.tar", "00001.index.npy"):
        server.faults = {name: [Fault("status", status=503)] * 4}
        with pytest.raises(StoreAwayError, match=f"{name}: HTTP 503"):
            whole.excerpt(FEW)
    assert whole.cache.held_bytes == 0


# --- room


def test_bounded_and_right_in_any_order(server: Server, far: Path, tmp_path: Path) -> None:
    bound = int(3.5 * shard_bytes(Manifest.load(far / "set")))
    seen: list[int] = []
    server.on_request = lambda name: seen.append(on_disk(tmp_path / "cache"))
    shards = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache", bound))
    for seed in range(4):
        assert_same(shards, far / "set", np.random.default_rng(seed).permutation(SAMPLES))
    assert shards.cache.stats.evictions > 10
    assert max(seen) <= bound and on_disk(tmp_path / "cache") <= bound


def test_the_least_recently_opened_goes_first(server: Server, far: Path, tmp_path: Path) -> None:
    bound = int(3.5 * shard_bytes(Manifest.load(far / "set")))
    cache = Cache(tmp_path / "cache", bound)
    shards = ShardSet.open(store_of(server), cache=cache)

    def open_again(shard: int) -> None:
        shards.close()  # nothing is open: only the order of use counts
        shards.read(shard * A_SHARD)
        shards.close()

    for shard in (0, 1, 2, 0, 3):
        open_again(shard)
    kept = sorted(path.name for path in (tmp_path / "cache").rglob("*.tar"))
    assert kept == ["00000.tar", "00002.tar", "00003.tar"]


def test_open_shards_are_removed_last_and_stay_readable(server: Server, far: Path, tmp_path: Path) -> None:
    bound = int(3.5 * shard_bytes(Manifest.load(far / "set")))
    reader = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache", bound))
    other = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache", bound))
    want = ShardSet.open(far / "set")
    reader.read(0)
    for shard in (1, 2, 3):
        other.read(shard * A_SHARD)
    assert "00000.tar" in {path.name for path in (tmp_path / "cache").rglob("*.tar")}  # the oldest, but open
    third = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache", bound))
    third.read(4 * A_SHARD)
    third.read(5 * A_SHARD)
    assert reader.read(1) == want.read(1) and other.read(3 * A_SHARD + 1) == want.read(3 * A_SHARD + 1)
    assert on_disk(tmp_path / "cache") <= bound


def test_removed_files_are_let_go(server: Server, far: Path, tmp_path: Path) -> None:
    """A file that is unlinked but open takes its room still: it must not stay so for long."""
    bound = int(2.5 * shard_bytes(Manifest.load(far / "set")))
    shards = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache", bound))
    for number in np.random.default_rng(0).permutation(SAMPLES):
        shards.read(int(number))
        hidden = [tar.name for tar in shards.tars.open.values() if os.fstat(tar.fd).st_nlink == 0]
        assert not hidden
    assert len(shards.tars.open) == 1  # half of the cache is little more than a shard


def test_a_shard_larger_than_the_cache(server: Server, far: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache", 10_000))
    with pytest.raises(ShardError, match=r"00000.tar with its index is [\d,]+ bytes.*10,000; raise data.cache_gib"):
        shards.read(0)
    with pytest.raises(ShardError, match=r"data\.cache_gib"):
        Cache(tmp_path / "cache", 0)


def full_disk(times: int) -> Callable[..., None]:
    from finetune.data.shards import store

    real, calls = store._write, []

    def write(file: Any, chunk: bytes) -> None:
        calls.append(1)
        if len(calls) <= times:
            cause = OSError(errno.ENOSPC, "No space left on device")
            raise store.WriteError(str(cause)) from cause
        real(file, chunk)

    return write


def test_a_full_disk(server: Server, far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache")
    shards = ShardSet.open(store_of(server), cache=cache)
    shards.read(0)
    shards.close()
    monkeypatch.setattr("finetune.data.shards.store._write", full_disk(1))
    shards.read(A_SHARD)  # another shard makes way
    shards.close()
    assert cache.stats.evictions == 1 and not temporaries(tmp_path / "cache")
    monkeypatch.setattr("finetune.data.shards.store._write", full_disk(100))
    with pytest.raises(ShardError, match="no space left for the cache in .*LDM_FINETUNE_CACHE") as caught:
        shards.read(2 * A_SHARD)
    assert "\n" not in str(caught.value) and cache.held_bytes == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(("call", "suffix"), [("mkdir", ".tmp"), ("open", ".lock")])
def test_a_disk_too_full_for_a_name(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, suffix: str, number: int
) -> None:
    """Another program has filled it, the cache is far from its bound: shards make way before any byte comes."""
    cache = Cache(tmp_path / "cache")
    shards = ShardSet.open(store_of(server), cache=cache)
    shards.read(0)
    shards.close()
    real, refused = getattr(os, call), []

    def full(path: Any, *args: Any, **more: Any) -> Any:
        name = Path(path).name
        if name.endswith(suffix) and name != ".lock" and cache.stats.evictions < 1:
            refused.append(path)
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **more)

    monkeypatch.setattr(os, call, full)
    shards.read(A_SHARD)
    assert len(refused) == 1 and cache.stats.evictions == 1 and not temporaries(tmp_path / "cache")
    shards.close()
    cache.stats.evictions = -9  # it stays full
    with pytest.raises(ShardError, match="no space left for the cache in .*LDM_FINETUNE_CACHE"):
        shards.read(2 * A_SHARD)
    assert cache.held_bytes == 0


def test_where_the_cache_is_and_how_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LDM_FINETUNE_CACHE", raising=False)
    assert Cache().folder == tmp_path / "home" / ".cache" / "ldm-finetune" / "shards"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Cache().folder == tmp_path / "xdg" / "ldm-finetune" / "shards"
    monkeypatch.setenv("LDM_FINETUNE_CACHE", str(tmp_path / "named"))
    assert Cache().folder == tmp_path / "named"
    usage = shutil.disk_usage(tmp_path)
    assert Cache().max_bytes <= 100 << 30
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert Cache().max_bytes == 800
    (tmp_path / "file").touch()
    with pytest.raises(ShardError, match="cannot use .*file as cache"):
        Cache(tmp_path / "file")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert Cache(max_bytes=1600).share_bytes == 100
    assert pickle.loads(pickle.dumps(Cache(max_bytes=1600, sets=2))).share_bytes == 50


# --- fetching ahead


def wait_until(condition: Callable[[], bool], event: threading.Event) -> None:
    """`event` is set at each request to the server; the condition may come true a little after one."""
    for _ in range(6000):
        if condition():
            return
        event.wait(0.01)
        event.clear()
    raise AssertionError("did not come true within a minute")


def test_shards_come_ahead_of_the_reader(server: Server, far: Path, tmp_path: Path) -> None:
    requested = threading.Event()
    server.on_request = lambda name: requested.set()
    shards = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache"))
    shards.prefetch([3, 1, 5])
    wait_until(lambda: shards.cache.stats.downloads == 3, requested)
    before = len(server.requests)
    for shard in (3, 1, 5):
        shards.read(shard * A_SHARD)
    assert len(server.requests) == before and shards.cache.stats.wait_s == 0
    assert not list((tmp_path / "cache").rglob("unread"))
    shards.close()
    assert_same(shards, far / "set")
    shards.close()


def test_what_is_being_fetched_ahead_is_waited_for(server: Server, tmp_path: Path) -> None:
    server.faults = {"00001.tar": [Fault("stall", after=1000)]}
    shards = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache"))
    shards.prefetch([1])
    assert server.stalled.acquire(timeout=60)
    thread = threading.Thread(target=shards.read, args=(A_SHARD,))
    thread.start()
    shards.prefetch([0])  # another queue; what runs goes on
    server.release.set()
    thread.join()
    assert server.count("00001.tar") == 1
    shards.close()


def test_no_more_than_half_of_the_cache_is_fetched_ahead(
    server: Server, far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested = threading.Event()
    server.on_request = lambda name: requested.set()
    bound = 4 * shard_bytes(Manifest.load(far / "set"))
    cache = Cache(tmp_path / "cache", bound)
    shards = ShardSet.open(store_of(server), cache=cache)
    shards.prefetch(range(8))
    wait_until(lambda: cache.stats.downloads == 2, requested)
    for shard in range(8):
        # The reader takes one: one more may come, in the order in which they are needed.
        wait_until(lambda shard=shard: cache.stats.downloads == min(shard + 2, 8), requested)
        assert sum(shards.tars.prefetcher._ahead.values()) <= bound // 2
        shards.read(shard * A_SHARD)
    assert cache.stats.downloads == 8 and cache.stats.wait_s == 0
    tars = [Path(request.path).name for request in server.requests if request.path.endswith(".tar")]
    assert sorted(tars) == [shard.name for shard in shards.manifest.shards]
    shards.close()


def test_a_shard_larger_than_the_share_is_fetched_ahead_alone(server: Server, far: Path, tmp_path: Path) -> None:
    requested = threading.Event()
    server.on_request = lambda name: requested.set()
    bound = 6 * shard_bytes(Manifest.load(far / "set"))
    cache = Cache(tmp_path / "cache", bound, sharers=4)
    assert cache.share_bytes < bound // 6
    shards = ShardSet.open(store_of(server), cache=cache)
    shards.prefetch(range(8))
    for shard in range(8):
        wait_until(lambda shard=shard: cache.stats.downloads == shard + 1, requested)
        assert len(shards.tars.prefetcher._ahead) == 1
        shards.read(shard * A_SHARD)
    assert cache.stats.wait_s == 0
    shards.close()


def test_a_new_call_replaces_the_queue(server: Server, far: Path, tmp_path: Path) -> None:
    requested = threading.Event()
    server.on_request = lambda name: requested.set()
    bound = 2 * shard_bytes(Manifest.load(far / "set"))  # one ahead
    cache = Cache(tmp_path / "cache", bound)
    shards = ShardSet.open(store_of(server), cache=cache)
    shards.prefetch([0, 1, 2])
    wait_until(lambda: cache.stats.downloads == 1, requested)
    shards.prefetch([6])
    wait_until(lambda: cache.stats.downloads == 2, requested)
    shards.read(6 * A_SHARD)
    shards.close()
    assert {Path(r.path).name for r in server.requests if r.path.endswith(".tar")} == {"00000.tar", "00006.tar"}


@pytest.mark.filterwarnings("ignore:.*trying on")
def test_an_error_ahead_is_left_to_the_reader(server: Server, far: Path, tmp_path: Path) -> None:
    requested = threading.Event()
    server.on_request = lambda name: requested.set()
    server.faults = {"00002.tar": [Fault("status", status=404)]}
    shards = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache"))
    shards.prefetch([2, 3])
    wait_until(lambda: 2 in shards.tars.prefetcher.errors, requested)
    assert "00002.tar is missing" in str(shards.tars.prefetcher.errors[2])
    server.faults = {"00004.tar": [Fault("status", status=503)] * 4}
    shards.prefetch([4, 6])
    wait_until(lambda: 4 in shards.tars.prefetcher.errors, requested)
    assert isinstance(shards.tars.prefetcher.errors[4], StoreAwayError)
    assert_same(shards, far / "set")
    assert not shards.tars.prefetcher.errors
    shards.close()


def test_closing_ends_the_threads(server: Server, far: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache"))
    shards.prefetch(range(8))
    threads = shards.tars.prefetcher._threads
    shards.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not temporaries(tmp_path / "cache")
    shards.prefetch(range(8))
    threads = shards.tars.prefetcher._threads
    assert_same(shards, far / "set")
    del shards  # so does letting go of the set
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


# --- names


def test_names_in_the_cache_can_be_read(server: Server, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    shards = ShardSet.open(f"http://user:secret@{server.address}/set?token=secret", cache=cache)
    shards.read(0)
    names = json.dumps([str(path.relative_to(tmp_path)) for path in (tmp_path / "cache").rglob("*")])
    assert "secret" not in names and "127-0-0-1" in names and f"00000/{index_name('00000.tar')}" not in names
    assert "secret" not in str(shards.root)


def test_nothing_is_written_outside_or_removed_that_is_not_ours(server: Server, far: Path, tmp_path: Path) -> None:
    """A manifest from elsewhere is not to be trusted, and a cache folder may hold other things."""
    folder = tmp_path / "cache"
    (folder / "project" / "src").mkdir(parents=True)
    (folder / "project" / "src" / "a.tar").write_bytes(b"mine" * 100_000)
    (folder / "project" / ".src.tmp").mkdir()
    manifest = json.loads((far / "set" / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = "../../../outside/" + "a" * 47
    (far / "set" / "manifest.json").write_text(json.dumps(manifest))
    bound = int(1.5 * shard_bytes(Manifest.load(far / "set")))
    cache = Cache(folder, bound)
    assert cache.held_bytes == 0
    shards = ShardSet.open(store_of(server), cache=cache)
    with pytest.raises(ShardError, match="sha256 is"), pytest.warns(UserWarning, match="trying on"):
        shards.read(0)
    for shard in range(1, 8):
        shards.read(shard * A_SHARD)
    assert cache.stats.evictions >= 5
    assert (folder / "project" / "src" / "a.tar").stat().st_size == 400_000
    assert (folder / "project" / ".src.tmp").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "far"}


def test_a_file_beside_the_shards(server: Server, far: Path, tmp_path: Path) -> None:
    (far / "set" / "empty.text.npy").write_bytes(b"states")
    for shards in (ShardSet.open(far / "set"), ShardSet.open(store_of(server), cache=Cache(tmp_path / "cache"))):
        assert shards.read_file("empty.text.npy") == b"states"
        with pytest.raises(ShardError, match="absent.npy is missing"):
            shards.read_file("absent.npy")
