"""The on-disk format: what is written is what tarfile, webdataset, datasets and our own reader see."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from finetune import UserError
from finetune.data.shards import (
    EncoderInfo,
    LatentStats,
    Manifest,
    ShardError,
    ShardInfo,
    ShardSet,
    ShardWriter,
    index_name,
    json_bytes,
    latent_bytes,
    verify,
    write_atomic,
)

ENCODER = EncoderInfo("./vae", "ab" * 32, 0.18215, 0.0, "float32", (-1.0, 1.0), 4, 8)
STATS = LatentStats(0.0, 1.0, [0.0] * 4, [1.0] * 4)
BUCKETS = [(64, 64), (32, 64)]


def moments(number: int, bucket: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(number)
    array = rng.normal(size=(8, bucket[0] // 8, bucket[1] // 8)).astype(np.float16)
    array[4:] = np.abs(array[4:])
    return array


def record(number: int) -> dict[str, object]:
    return {"captions": [f"picture {number}, é"], "original_size": [64, 64], "crop": [0, 0, 64, 64]}


def write_set(root: Path, samples: int = 11, max_samples: int = 3, **changes: bytes) -> Manifest:
    """Latents of two buckets; every fourth sample has a depth map. `changes` replaces members of sample 5."""
    with ShardWriter(root, "latents", max_samples=max_samples) as writer:
        for number in range(samples):
            bucket = BUCKETS[number % 3 == 0]
            members = {"latent.npy": latent_bytes(moments(number, bucket)), "json": json_bytes(record(number))}
            if number % 4 == 3:
                members["depth.png"] = bytes([number]) * 700
            if number == 5:
                members.update({name.replace("__", "."): data for name, data in changes.items()})
            writer.write(f"k{number:03d}", members, bucket)
        return writer.finish(ENCODER, STATS)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_set(tmp_path / "set")
    return tmp_path / "set"


def number_of(shards: ShardSet, sample_id: int) -> int:
    return int(shards.key(sample_id)[1:])


# --- other people's readers


def test_index_offsets_are_those_of_tarfile(root: Path) -> None:
    manifest = Manifest.load(root)
    for shard in manifest.shards:
        index = np.load(root / index_name(shard.name))
        seen = np.full_like(index, -1)
        rows: dict[str, int] = {}
        with tarfile.open(root / shard.name) as tar:
            for info in tar:
                key, _, member = info.name.partition(".")
                row = rows.setdefault(key, len(rows))
                seen[row, manifest.members.index(member)] = info.offset_data, info.size
                assert (info.mtime, info.uid, info.gid, info.uname) == (0, 0, 0, "")
        np.testing.assert_array_equal(index, seen)
        assert shard.sha256 == hashlib.sha256((root / shard.name).read_bytes()).hexdigest()
        assert shard.bytes == (root / shard.name).stat().st_size


def test_webdataset_reads_them_unaided(root: Path) -> None:
    import webdataset

    urls = [str(root / shard.name) for shard in Manifest.load(root).shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == 11
    for sample in samples:
        number = int(sample["__key__"][1:])
        np.testing.assert_array_equal(sample["latent.npy"], moments(number, BUCKETS[number % 3 == 0]))
        assert sample["latent.npy"].dtype == np.float16
        assert sample["json"] == record(number)


def test_datasets_reads_them_unaided(tmp_path: Path) -> None:
    import datasets
    from PIL import Image

    rng = np.random.default_rng(0)
    pixels = {f"icon-{n}": rng.integers(0, 256, (8, 8, 3), np.uint8) for n in range(5)}
    with ShardWriter(tmp_path / "set", "images", max_samples=3) as writer:
        for key, array in pixels.items():
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, "PNG")
            writer.write(key, {"png": buffer.getvalue(), "json": json_bytes({"captions": [key]})}, (8, 8))
        writer.finish()
    files = sorted(str(path) for path in (tmp_path / "set").glob("*.tar"))
    rows = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert [row["__key__"] for row in rows] == list(pixels)
    for row in rows:
        np.testing.assert_array_equal(np.asarray(row["png"]), pixels[row["__key__"]])
        assert row["json"] == {"captions": [row["__key__"]]}


# --- our own


def test_read_gives_back_what_was_written(root: Path) -> None:
    shards = ShardSet.open(root, "latents")
    assert len(shards) == shards.manifest.samples == 11
    seen = set()
    for sample_id in range(11):
        number = number_of(shards, sample_id)
        seen.add(number)
        sample = shards.read(sample_id)
        assert sample["__key__"] == f"k{number:03d}"
        assert sample["latent.npy"] == latent_bytes(moments(number, BUCKETS[number % 3 == 0]))
        assert shards.read_json(sample_id) == record(number)
        assert shards.has_member(sample_id, "depth.png") == ("depth.png" in sample) == (number % 4 == 3)
        if number % 4 == 3:
            assert shards.read_member(sample_id, "depth.png") == bytes([number]) * 700
        else:
            with pytest.raises(ShardError, match=r"sample \d+ has no member 'depth.png', only latent.npy, json"):
                shards.read_member(sample_id, "depth.png")
    assert seen == set(range(11))


def test_latent_bytes_are_numpys_own() -> None:
    for shape in [(8, 8, 8), (32, 128, 128), (2, 1, 1)]:
        array = np.zeros(shape, np.float16)
        buffer = io.BytesIO()
        np.save(buffer, array)
        assert latent_bytes(array) == buffer.getvalue()


def test_read_latents_in_any_order(root: Path) -> None:
    shards = ShardSet.open(root)
    for bucket, ids in shards.buckets.items():
        ids = np.random.default_rng(1).permutation(np.concatenate([ids, ids[:2]]))
        out = np.empty((len(ids), 8, bucket[0] // 8, bucket[1] // 8), np.float16)
        shards.read_latents(ids, out)
        for row, sample_id in zip(out, ids):
            np.testing.assert_array_equal(row, moments(number_of(shards, int(sample_id)), bucket))


def test_read_latents_takes_an_array_with_another_header(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, moments(5, BUCKETS[0]), version=(2, 0))
    write_set(tmp_path / "set", latent__npy=buffer.getvalue())
    shards = ShardSet.open(tmp_path / "set")
    sample_id = next(i for i in range(len(shards)) if number_of(shards, i) == 5)
    out = np.empty((1, 8, 8, 8), np.float16)
    shards.read_latents([sample_id], out)
    np.testing.assert_array_equal(out[0], moments(5, BUCKETS[0]))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (latent_bytes(np.zeros((8, 8, 4))), r"is float16 \[8, 8, 4\], not float16 \[8, 8, 8\]"),
        (b"no array at all", "not a numpy array"),
    ],
)
def test_a_wrong_latent_is_named(tmp_path: Path, data: bytes, says: str) -> None:
    write_set(tmp_path / "set", latent__npy=data)
    shards = ShardSet.open(tmp_path / "set")
    sample_id = next(i for i in range(len(shards)) if number_of(shards, i) == 5)
    with pytest.raises(ShardError, match=rf"\d+\.tar: sample {sample_id} .*{says}"):
        shards.read_latents([sample_id], np.empty((1, 8, 8, 8), np.float16))
    assert any(problem.sample == "k005" for problem in verify(tmp_path / "set"))


def test_reads_that_come_in_parts_are_whole(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As network file systems may give them: half of what is asked for."""
    preadv = os.preadv

    def half(fd: int, buffers: Sequence[bytearray | memoryview], offset: int, flags: int = 0) -> int:
        left = (sum(map(len, buffers)) + 1) // 2
        taken = []
        for buffer in map(memoryview, buffers):
            taken.append(buffer[:left])
            left -= len(taken[-1])
        return preadv(fd, taken, offset, flags)

    def pread(fd: int, size: int, offset: int) -> bytes:
        buffer = bytearray((size + 1) // 2)
        return bytes(buffer[: preadv(fd, (buffer,), offset)])

    monkeypatch.setattr(os, "preadv", half)
    monkeypatch.setattr(os, "pread", pread)
    shards = ShardSet.open(root)
    for bucket, ids in shards.buckets.items():
        latents = np.empty((1, 8, bucket[0] // 8, bucket[1] // 8), np.float16)
        row = np.empty(latents.shape[2:], np.float16)
        for sample_id in ids.tolist():
            number = number_of(shards, sample_id)
            assert shards.read_samples([sample_id], latents) == [record(number)]
            assert np.array_equal(latents[0], moments(number, bucket))
            shards.read_row(sample_id, "latent.npy", 5, 8, row)
            assert np.array_equal(row, moments(number, bucket)[5])
    os.truncate(root / "00000.tar", 512 + 128 + 8 * 64 - 1)  # a tar header, that of the array, its rows
    with pytest.raises(ShardError, match="ends early in latent.npy"):
        shards.read_row(0, "latent.npy", 7, 8, np.empty((4, 8), np.float16))


def test_ids_buckets_and_rows_agree(root: Path) -> None:
    shards = ShardSet.open(root)
    everything = np.concatenate(list(shards.buckets.values()))
    assert sorted(everything.tolist()) == list(range(11))
    assert shards.bucket_sizes == {(32, 64): 4, (64, 64): 7}
    for bucket, ids in shards.buckets.items():
        assert {shards.bucket_of(shards.locate(int(i))[0]) for i in ids} == {bucket}
        listed = [np.arange(shards.starts[n], shards.starts[n + 1]) for n in shards.bucket_shards(bucket)]
        np.testing.assert_array_equal(np.concatenate(listed), ids)
    places = [shards.locate(i) for i in range(11)]
    assert places == [(s, r) for s, shard in enumerate(shards.manifest.shards) for r in range(shard.samples)]
    for wrong in (-1, 11):
        with pytest.raises(IndexError):
            shards.locate(wrong)


_MANY = """
import os, resource, sys
import numpy as np
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3]) or hard))
from finetune.data.shards import ShardSet, most_open
print(len(os.listdir("/proc/self/fd")))
sets = [ShardSet.open(sys.argv[1], max_open=most_open(2)) for _ in range(2)]
out = np.empty((1, 4, 2, 2), np.float16)
for shards in sets:
    for sample_id in range(len(shards)):
        shards.read_samples([sample_id], out)
print(*[len(shards.tars.open) for shards in sets])
"""
_CROWDED = """
import os, resource, sys
import numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
from finetune.data.shards import ShardSet
shards = ShardSet.open(sys.argv[1])
out = np.empty((1, 4, 2, 2), np.float16)
shards.read_samples([0], out)
others = []
try:
    while True:
        others.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    for fd in others[-int(sys.argv[2]):]:
        os.close(fd)
for sample_id in range(len(shards)):
    shards.read_samples([sample_id], out)
print(shards.tars.max_open)
"""


@pytest.fixture
def many_shards(tmp_path: Path) -> Path:
    """60 of them, a sample each."""
    with ShardWriter(tmp_path / "set", "latents", members=["latent.npy", "json"], max_samples=1) as writer:
        for index in range(60):
            members = {"latent.npy": latent_bytes(np.zeros((4, 2, 2))), "json": b"{}"}
            writer.write(f"{index}", members, bucket=(16, 16))
        writer.finish(encoder=ENCODER)
    return tmp_path / "set"


@pytest.mark.parametrize(("soft", "hard", "ranks"), [(300, 0, 1), (300, 350, 1), (300, 350, 8)])
def test_open_shards_keep_within_the_limit_of_files(many_shards: Path, soft: int, hard: int, ranks: int) -> None:
    """Two sets of 60 shards each: all stay open where the system's limit can be raised, else as many as fit."""
    command = [sys.executable, "-c", _MANY, str(many_shards), str(soft), str(hard)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"WORLD_SIZE": str(ranks)})
    others, *kept = map(int, done.stdout.split())
    fit = (hard - 256 - others - 4 * ranks) // 2 // 2  # a tar and the map of its index each
    assert kept == [fit if hard else 60] * 2, done.stderr


def test_shards_make_way_for_what_others_open(many_shards: Path) -> None:
    """A run's connections come after its data: with 20 descriptors left 10 shards are open, not 60."""
    command = [sys.executable, "-c", _CROWDED, str(many_shards)]
    done = subprocess.run([*command, "20"], capture_output=True, text=True)
    assert 0 < int(done.stdout or 0) <= 10, done.stderr
    none_left = subprocess.run([*command, "1"], capture_output=True, text=True)
    assert "raise the limit with `ulimit -n`" in none_left.stderr


def test_pickled_copies_and_threads_with_one_open_shard(root: Path) -> None:
    shards = ShardSet.open(root, max_open=1)
    shards.read(0)
    shards = pickle.loads(pickle.dumps(shards))
    want = [shards.read(i) for i in range(11)]
    with ThreadPoolExecutor(4) as pool:
        for sample_id, sample in zip(list(range(11)) * 40, pool.map(shards.read, list(range(11)) * 40)):
            assert sample == want[sample_id]


def test_closed_files_do_not_leak(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    shards = ShardSet.open(root, max_open=2)
    for sample_id in range(11):
        shards.read(sample_id)
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * 2  # a tar and the map of its index each
    shards.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_set_made_anew_is_not_read_as_the_one_that_was_opened(root: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(root)
    want, last = shards.read(0), len(shards) - 1
    shutil.copytree(root, tmp_path / "old")
    write_set(tmp_path / "new", json=json_bytes({"captions": ["as long as before?"]}))

    def put(source: str) -> None:
        for path in (tmp_path / source).iterdir():  # under a run, as rsync does
            shutil.copy(path, root / f".{path.name}")
            os.replace(root / f".{path.name}", root / path.name)

    put("new")
    assert shards.read(0) == want  # from a tar that is open
    for each in (shards, pickle.loads(pickle.dumps(shards))):
        with pytest.raises(ShardError, match=r"set/manifest.json is not the one .*: restore the set"):
            each.read(last)
    (root / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"set/manifest.json is gone"):
        shards.read(last)
    put("old")  # another file that says the same
    assert shards.read(last) == ShardSet.open(root).read(last)
    (root / "manifest.json").touch()
    shards.close()
    assert shards.read(0) == want


# --- writing


def test_same_calls_give_same_bytes(tmp_path: Path) -> None:
    write_set(tmp_path / "a")
    old = os.umask(0o077)
    try:
        write_set(tmp_path / "b")
    finally:
        os.umask(old)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_shards_are_cut_by_samples_and_by_bytes(tmp_path: Path) -> None:
    manifest = write_set(tmp_path / "a", max_samples=2)
    assert max(shard.samples for shard in manifest.shards) == 2
    with ShardWriter(tmp_path / "b", "images", max_bytes=5000) as writer:
        for number in range(10):
            writer.write(f"{number}", {"png": bytes(2000)}, (8, 8))
        assert [shard.samples for shard in writer.close()] == [2] * 5


def test_an_exception_leaves_nothing_that_loads(tmp_path: Path) -> None:
    def stopped() -> None:
        with ShardWriter(tmp_path, "images", max_samples=2) as writer:
            for number in range(3):
                writer.write(f"{number}", {"png": b"x"}, (8, 8))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.index.npy", "00000.tar"]
    with pytest.raises(ShardError, match="never finished"):
        ShardSet.open(tmp_path)


@pytest.mark.parametrize("key", ["", "a.b", "../a", "/a", "a//b", "__a", "a b", "é", "a" * 97])
def test_keys_that_other_readers_would_cut_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ShardError), ShardWriter(tmp_path, "images") as writer:
        writer.write(key, {"png": b"x"}, (8, 8))


def test_the_writer_refuses_repeats_and_folders_in_use(root: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "new", "images") as writer:
        writer.write("a", {"png": b"x"}, (8, 8))
        with pytest.raises(ShardError, match="occurs twice"):
            writer.write("a", {"png": b"x"}, (8, 8))
    with pytest.raises(ShardError, match="already holds shards"):
        ShardWriter(root, "latents")


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writer = ShardWriter(tmp_path, "images")
    writer.write("a", {"png": b"x"}, (8, 8))
    with pytest.raises(OSError, match="No space") as caught, writer:
        writer.close()
    assert caught.value.filename == str(tmp_path / "00000.tar")
    assert list(tmp_path.iterdir()) == []


# --- the manifest


def test_manifest_round_trip(root: Path) -> None:
    manifest = Manifest.load(root)
    before = (root / "manifest.json").read_bytes()
    manifest.save(root)
    assert (root / "manifest.json").read_bytes() == before
    assert Manifest.load(root) == manifest
    assert manifest.encoder == ENCODER
    assert manifest.latents == STATS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no manifest.json"),
        ("{", "not JSON"),
        ("[]", "format version None"),
        ('{"version": 99}', "format version 99, this program reads 1"),
        ('{"version": 1, "kind": "latents"}', "no field 'members'"),
        ('{"version": 1, "kind": "x"}', "neither images nor latents"),
        (
            '{"version": 1, "kind": "images", "members": [], "encoder": null, "latents": null, "shards": '
            '[{"name": "../a.tar", "bucket": null, "samples": 1, "bytes": 1, "sha256": ""}]}',
            "not that of a tar in this folder",
        ),
    ],
)
def test_a_bad_manifest_is_one_line(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        Manifest.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_folders_and_the_wrong_kind(root: Path) -> None:
    with pytest.raises(ShardError, match="no folder of shards"):
        ShardSet.open(root / "nowhere")
    with pytest.raises(ShardError, match="holds latents, images are needed"):
        ShardSet.open(root, "images")


def test_another_encoder_is_refused(root: Path) -> None:
    manifest = Manifest.load(root)
    manifest.require_encoder(ENCODER.sha256, "vae")
    with pytest.raises(ShardError, match=r"wrong VAE: .*made by ./vae \(abababababab\), not by other \(cdcdcd"):
        manifest.require_encoder("cd" * 32, "other")


def test_encoder_paths_are_relative_to_the_manifest(tmp_path: Path) -> None:
    assert ENCODER.locate(tmp_path) == str(tmp_path / "vae")
    hub = EncoderInfo("owner/vae", "", 1.0, 0.0, "float32", (-1.0, 1.0), 4, 8)
    assert hub.locate(tmp_path) == "owner/vae"


# --- verify


def test_a_whole_set_has_no_problems(root: Path) -> None:
    done: list[int] = []
    assert verify(root, progress=done.append) == []
    assert sum(done) == Manifest.load(root).bytes


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_is_found(root: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = sorted(path.name for path in root.iterdir() if path.name != "manifest.json")
    name = names[int(rng.integers(len(names)))]
    data = bytearray((root / name).read_bytes())
    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    (root / name).write_bytes(data)
    assert name in {problem.file for problem in verify(root)}


@pytest.mark.parametrize("keep", [0, 100, 512, 1000, 3000, 9000])
def test_a_truncated_tar_is_found_and_never_read_wrongly(root: Path, keep: int) -> None:
    want = [ShardSet.open(root).read(i) for i in range(11)]
    os.truncate(root / "00000.tar", keep)
    assert "00000.tar" in {problem.file for problem in verify(root)}
    shards = ShardSet.open(root)
    sizes = Manifest.load(root).shards[0].samples
    ends = np.load(root / "00000.index.npy").sum(axis=2).max(axis=1)
    for sample_id in range(11):
        if sample_id >= sizes or ends[sample_id] <= keep:
            assert shards.read(sample_id) == want[sample_id]
        else:
            with pytest.raises(ShardError, match=rf"00000\.tar: sample {sample_id} "):
                shards.read(sample_id)
    if keep < 1000:
        with pytest.raises(ShardError, match=r"00000\.tar: sample 0 ends early"):
            shards.read_latents([0], np.zeros((1, 8, *(side // 8 for side in BUCKETS[1])), np.float16))


@pytest.mark.parametrize(
    ("member", "data", "says"),
    [
        ("latent__npy", latent_bytes(np.full((8, 8, 8), np.nan)), "not finite"),
        ("latent__npy", latent_bytes(np.full((8, 8, 8), -1.0)), "negative standard deviations"),
        ("latent__npy", latent_bytes(np.ones((8, 4, 8))), "its bucket needs float16"),
        ("json", b"{", "not JSON"),
        ("json", b"[]", "no object"),
        ("json", json_bytes({**record(5), "captions": "a cat"}), "captions is no list"),
        ("json", json_bytes({"captions": ["a"], "crop": [0, 0, 1, 1]}), "original_size is not 2 whole numbers"),
    ],
)
def test_a_bad_member_is_named(tmp_path: Path, member: str, data: bytes, says: str) -> None:
    write_set(tmp_path / "set", **{member: data})
    problems = verify(tmp_path / "set")
    assert [problem.sample for problem in problems] == ["k005"]
    assert says in problems[0].what


@pytest.mark.parametrize("offset", [-512, 3, 1 << 40, 1 << 62])
def test_a_wrong_index_never_gives_a_wrong_latent(root: Path, offset: int) -> None:
    index = np.load(root / "00000.index.npy")
    index[0, 0, 0] = offset
    np.save(root / "00000.index.npy", index)
    with pytest.raises(ShardError, match=r"00000\.tar: sample 0 "):
        ShardSet.open(root).read_latents([0], np.zeros((1, 8, *(side // 8 for side in BUCKETS[1])), np.float16))
    assert "00000.index.npy" in {problem.file for problem in verify(root)}


def test_missing_and_stray_files_are_named(root: Path) -> None:
    (root / "00001.tar").unlink()
    (root / "00002.index.npy").unlink()
    (root / "00099.tar").write_bytes(b"")
    (root / ".00100.tar.tmp").write_bytes(b"")
    assert {(problem.file, problem.what.partition(";")[0]) for problem in verify(root)} == {
        ("00001.tar", "missing"),
        ("00002.index.npy", "missing"),
        ("00099.tar", "not in the manifest"),
        (".00100.tar.tmp", "left by a writer that was stopped"),
    }


def test_a_key_in_two_shards_is_named(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "images", max_samples=1) as writer:
        for key in ("a", "b", "a"):
            writer.write(key, {"png": b"x"}, (8, 8))
        writer.finish()
    assert [str(problem) for problem in verify(tmp_path)] == ["00002.tar: sample a: the key is also in 00000.tar"]


@pytest.mark.parametrize("name", ["../../evil.json", "/evil.json", "a/../../evil.json"])
def test_names_that_leave_the_folder_are_reported(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for entry, data in (("a.png", b"x"), (name, b"{}")):
            info = tarfile.TarInfo(entry)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = (tmp_path / "00000.tar").read_bytes()
    np.save(tmp_path / "00000.index.npy", np.asarray([[[512, 1]]]))
    row = ShardInfo("00000.tar", None, 1, len(data), hashlib.sha256(data).hexdigest())
    Manifest("images", ["png"], [row]).save(tmp_path)
    assert [problem.what for problem in verify(tmp_path)] == [f"member {name!r} is no sample's regular file"]


def test_manifest_sums_are_checked(root: Path) -> None:
    data = json.loads((root / "manifest.json").read_text())
    data["samples"] += 1
    (root / "manifest.json").write_text(json.dumps(data))
    assert [str(problem) for problem in verify(root)] == ["manifest.json: samples is 12, the shards sum to 11"]


def test_a_file_that_a_full_disk_refused_leaves_nothing_and_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "manifest.json"
    write_atomic(path, b"before")

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="manifest.json"):
        write_atomic(path, b"after")
    assert [each.name for each in tmp_path.iterdir()] == ["manifest.json"] and path.read_bytes() == b"before"
