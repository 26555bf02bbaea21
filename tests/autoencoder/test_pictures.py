"""Which pictures a first-stage run sees, and how they are decoded."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from finetune import UserError
from finetune.autoencoder import config as schema
from finetune.autoencoder.pictures import Pictures, decode
from finetune.data.order import Order, Source
from finetune.data.shards import ShardWriter


def picture(number: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(array: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return buffer.getvalue()


def write(root: Path, sizes: Sequence[tuple[int, int]], mixed: bool = False) -> Path:
    with ShardWriter(root, "images") as writer:
        for number, (height, width) in enumerate(sizes):
            members = {"png": encoded(picture(number, height, width)), "json": b'{"caption": "x"}'}
            writer.write(f"{number:04d}", members, None if mixed else (height, width))
        writer.finish()
    return root


def opened(root: Path, **changes: object) -> Pictures:
    arguments: dict = dict(size=None, held_out=4, seed=0, multiple=4, cache_bytes=2**30, readers=2)
    return Pictures(str(root), **{**arguments, **changes})


def test_training_and_held_out_pictures_part_the_set(tmp_path: Path) -> None:
    root = write(tmp_path / "s", [(16, 16)] * 45)
    pictures = opened(root)
    train, hidden = pictures.train_ids[0], pictures.held_out_ids[0]
    assert len(hidden) == 4
    assert sorted([*train, *hidden]) == list(range(45))
    assert np.array_equal(opened(root).held_out_ids[0], hidden)
    assert not np.array_equal(opened(root, seed=1).held_out_ids[0], hidden)
    assert len(opened(root, held_out=40).held_out_ids[0]) == 4  # at most a tenth


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_pictures_come_back_as_they_were_with_and_without_cache(tmp_path: Path, cache_bytes: int) -> None:
    pictures = opened(write(tmp_path / "s", [(16, 16)] * 12), cache_bytes=cache_bytes)
    seen = []
    pictures.fill_cache(lambda: seen.append(1))
    assert len(seen) == (12 if cache_bytes else 0)
    batch = pictures.read(0, [5, 2, 9])
    assert np.array_equal(batch, np.stack([picture(5), picture(2), picture(9)]))


def test_the_set_in_the_box_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = opened(Path(schema.load(["experiment=emoji"])[0].data.shards))
    assert pictures.buckets == [(64, 64)] and len(pictures) == 1200
    write(tmp_path / "fluent-emoji", [(16, 16)])  # a folder here comes first
    assert opened(Path("fluent-emoji")).buckets == [(16, 16)]


def test_each_bucket_keeps_its_shape(tmp_path: Path) -> None:
    pictures = opened(write(tmp_path / "s", [(16, 16), (8, 24)] * 10), held_out=0)
    assert sorted(pictures.buckets) == [(8, 24), (16, 16)]
    for bucket, size in enumerate(pictures.buckets):
        assert pictures.read(bucket, pictures.train_ids[bucket][:3]).shape == (3, *size, 3)


def test_buckets_smaller_than_a_global_batch_are_told_of(tmp_path: Path) -> None:
    pictures = opened(write(tmp_path / "s", [(16, 16)] * 12 + [(8, 24)] * 5), held_out=0)
    sources = [Source(pictures.shard_sizes)]
    assert pictures.never_trained(Order(sources, seed=0, global_batch=4)) is None  # the fifth has its turn
    said = pictures.never_trained(Order(sources, seed=0, global_batch=6))
    assert said is not None
    assert "5 pictures are never trained on, in buckets smaller than a global batch of 6: 8x24 (5);" in said


def test_size_makes_one_bucket_of_mixed_pictures(tmp_path: Path) -> None:
    root = write(tmp_path / "s", [(16, 16), (20, 31)] * 10, mixed=True)
    pictures = opened(root, size=12)
    assert pictures.buckets == [(12, 12)]
    assert pictures.read(0, [0, 1]).shape == (2, 12, 12, 3)
    with pytest.raises(UserError, match="give data.size"):
        opened(root)


def test_decode_crops_the_centre_after_resizing_the_shorter_side() -> None:
    array = np.zeros((20, 60, 3), np.uint8)
    array[:, 20:40] = 255
    out = decode(encoded(array), 20)
    assert out.shape == (20, 20, 3)
    assert (out == 255).all()
    assert decode(encoded(array), 10).shape == (10, 10, 3)


def test_transparency_is_laid_over_white() -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    out = decode(encoded(rgba), None)
    assert out[0, 0].tolist() == [10, 20, 30]
    assert out[3, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_seen_upright(tmp_path: Path, orientation: int) -> None:
    """`data-tools ingest` keeps a file as it is and writes the bucket of the upright picture."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(picture(0, 8, 12)).resize((24, 16), Image.Resampling.BICUBIC).save(buffer, "JPEG", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(buffer)))
    with ShardWriter(tmp_path / "s", "images") as writer:
        writer.write("turned", {"jpg": buffer.getvalue()}, upright.shape[:2])
        writer.finish()
    assert np.array_equal(opened(tmp_path / "s").read(0, [0])[0], upright)
    top, left = (side // 2 - 8 for side in upright.shape[:2])
    assert np.array_equal(opened(tmp_path / "s", size=16).read(0, [0])[0], upright[top:, left:][:16, :16])


def test_sixteen_bits_are_scaled() -> None:
    grey = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)
    assert np.array_equal(decode(encoded(grey), None), np.repeat(np.round(grey / 257)[..., None], 3, axis=2))


def test_a_colour_profile_is_used() -> None:
    """That of a screen whose red and blue are exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"tmp_").replace(b"bXYZ", b"rXYZ").replace(b"tmp_", b"bXYZ")
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 60, 20)).save(buffer, "PNG", icc_profile=profile)
    np.testing.assert_allclose(decode(buffer.getvalue(), None), np.full((4, 4, 3), (20, 60, 200)), atol=2)


def test_decoding_in_threads_leaves_the_filters_of_warnings() -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture(0, 256, 256)).save(buffer, "WEBP")  # decoded without Python's lock
    with warnings.catch_warnings():
        before = list(warnings.filters)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda data: decode(data, None), [buffer.getvalue()] * 200))
        assert warnings.filters == before


def test_sides_that_the_model_cannot_halve_are_refused_with_a_size_that_it_can(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"18x18 .* factor 4; give data.size=16"):
        opened(write(tmp_path / "s", [(18, 18)] * 4))


@pytest.mark.parametrize("size", [None, 16])
def test_a_set_of_no_pictures_is_refused(tmp_path: Path, size: int | None) -> None:
    with ShardWriter(tmp_path, "images", members=("png",)) as writer:
        writer.finish()
    with pytest.raises(UserError, match="is a set of no pictures"):
        opened(tmp_path, size=size)


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s", "images") as writer:
        writer.write("good", {"png": encoded(picture(0))}, (16, 16))
        writer.write("torn", {"png": encoded(picture(1))[:90]}, (16, 16))
        writer.finish()
    with pytest.raises(UserError, match=r"broken picture torn.png .*data-tools verify"):
        opened(tmp_path / "s").read(0, [0, 1])
