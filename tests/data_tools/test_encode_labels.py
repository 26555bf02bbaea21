"""Boxes, maps, masks, holes and small pictures: they stay on their picture, whatever is done to it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_tools.encode.degrade import _blur, _noise, blind, gaussian, shrink
from data_tools.encode.holes import LEAST, MOST, draw_hole, latent_hole
from data_tools.encode.prepare import Prepared, Recipe, prepare
from data_tools.filters import Filters
from data_tools.labels import LabelFile, cut_boxes, read_map, read_mask
from data_tools.pictures import Picture
from finetune.data.shards import Bucket, ShardSet, ShardWriter, json_bytes, parse_npy, verify, write_classes
from finetune.data.shards.images import PictureError, decode_rgb
from finetune.data.shards.manifest import Manifest
from finetune.models import autoencoder
from finetune.models.autoencoder import encode_moments, load_autoencoder
from tests.data_tools.conftest import Result, encoded
from tests.scenes import CLASSES, GROUND, draw_scene

Cli = Callable[..., Result]


def recipe(bucket: Bucket, **changes: Any) -> Recipe:
    return Recipe((bucket,), (255, 255, 255), Filters(), **changes)


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


# --- places


@pytest.mark.parametrize("bucket", [(64, 64), (32, 96), (96, 40), (110, 90), (250, 200)])
@pytest.mark.parametrize("axis", [0, 1])
def test_maps_and_masks_have_the_pixels_of_the_picture(bucket: Bucket, axis: int) -> None:
    """A picture whose red says where a pixel is, and a map and mask that say the same: they must agree then."""
    height, width = (250, 200) if axis == 0 else (200, 250)
    ramp = np.arange(250, dtype=np.uint8)
    place_HW = np.broadcast_to(ramp[:, None], (250, 200)) if axis == 0 else np.broadcast_to(ramp, (200, 250))
    picture = np.stack([place_HW] * 3, axis=-1)
    maps = {"map.png": encoded(Image.fromarray(place_HW)), "mask.png": encoded(Image.fromarray(place_HW))}
    scale = max(bucket[0] / height, bucket[1] / width)
    crops = set()
    for number in range(12):
        item = Picture(f"k{number}", encoded(Image.fromarray(picture)), {"captions": []}, maps)
        made = prepare(item, recipe(bucket, crop="random", flip=0.5, seed=3))
        assert isinstance(made, Prepared)
        red = made.pixels[..., 0].astype(float)
        labels, mask = (pixels_of(made.extra[name]) for name in ("map.png", "mask.png"))
        assert labels.shape == mask.shape == bucket
        inside = (slice(8, -8), slice(8, -8))  # at the border the filters of the picture see less of it
        # The nearest pixel is half a pixel of the larger of the two grids away, at most.
        assert np.abs(labels - red)[inside].max() <= 0.5 * max(1 / scale, 1) + 1
        assert np.abs(labels - red)[inside].mean() <= 0.3 * max(1 / scale, 1) + 0.3
        assert abs((labels - red)[inside].mean()) <= 0.35  # to neither side
        assert np.abs(mask - red)[inside].max() <= 1
        crops.add((made.record.get("flipped", False), *made.record["crop"]))
    assert len(crops) > 2 or bucket == (250, 200)  # the picture as it is
    assert len({crop[0] for crop in crops}) == 2


def test_maps_fit_pictures_that_are_turned_or_read_at_a_reduced_scale() -> None:
    """A JPEG of 1,000 x 600 pixels whose EXIF turns it, cut to 48: it is decoded at an eighth of its size."""
    place_HW = np.broadcast_to((np.arange(600) // 4).astype(np.uint8)[:, None], (600, 1000))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: rows become columns, from the right
    picture = encoded(Image.fromarray(place_HW).convert("RGB"), "JPEG", quality=98, exif=exif)
    upright = np.ascontiguousarray(np.rot90(place_HW, -1))
    item = Picture("k", picture, {"captions": []}, {"map.png": encoded(Image.fromarray(upright))})
    made = prepare(item, recipe((48, 48)))
    assert isinstance(made, Prepared)
    off = pixels_of(made.extra["map.png"]) - made.pixels[..., 0].astype(float)
    step = 600 / 48 / 4  # of the red, from pixel to pixel
    assert np.abs(off[:, 4:-4]).max() < step and abs(off[:, 4:-4].mean()) < 0.75
    turned = Picture("k", picture, {"captions": []}, {"map.png": encoded(Image.fromarray(place_HW))})
    with pytest.raises(PictureError, match="map.png is 600x1000, the upright picture 1000x600"):
        prepare(turned, recipe((48, 48)))


@pytest.mark.parametrize("size", [64, 32, 96])
def test_boxes_hold_their_shapes_after_flips_and_crops(size: int) -> None:
    """Of drawn scenes: where a box is after all, there are its label's pixels, and they fill it."""
    seen = lost = 0
    for index in range(30):
        picture, boxes, labels, _ = draw_scene(index, 96)
        item = Picture(
            f"k{index}",
            encoded(Image.fromarray(picture)),
            {"captions": [], "boxes": boxes},
            {"map.png": encoded(Image.fromarray(labels))},
        )
        made = prepare(item, recipe((size, size // 2), crop="random", flip=0.5, min_box=0.4))
        assert isinstance(made, Prepared)
        cut = pixels_of(made.extra["map.png"])
        for label, *fractions in made.record["boxes"]:
            x0, y0, x1, y1 = (f * side for f, side in zip(fractions, (size // 2, size) * 2, strict=True))
            rows, columns = np.nonzero(cut[round(y0) : round(y1), round(x0) : round(x1)] == label)
            assert (len(rows) / max((x1 - x0) * (y1 - y0), 1)) > 0.25  # half of a triangle's box, and less at a cut
            assert rows.min() <= 2
            assert columns.min() <= 2 * max(size / 96, 1) + 8  # a triangle that is cut leaves a corner empty
        counts = [made.boxes[0], sum(made.boxes)]
        assert counts == [len(made.record["boxes"]), len(boxes)]
        seen, lost = seen + made.boxes[0], lost + made.boxes[1]
    assert seen > 15
    assert lost > 5


@pytest.mark.parametrize(
    ("crop", "flipped", "least", "want"),
    [
        ([0, 0, 100, 200], False, 0.5, [[7, 0.1, 0.2, 0.3, 0.6]]),
        ([0, 0, 100, 200], True, 0.5, [[7, 0.7, 0.2, 0.9, 0.6]]),
        ([0, 40, 100, 100], False, 0.5, [[7, 0.0, 0.2, 0.2, 0.6]]),  # x from 20 to 60, so half of it
        ([0, 40, 100, 100], False, 0.51, []),
        ([0, 60, 100, 100], False, 0.0, []),  # they touch
        ([40, 0, 20, 200], False, 0.5, [[7, 0.1, 0.0, 0.3, 1.0]]),
        ([10, 10, 80, 100], True, 0.0, []),
    ],
)
def test_a_box_by_hand(crop: list[int], flipped: bool, least: float, want: list[Any]) -> None:
    assert cut_boxes([[7, 0.1, 0.2, 0.3, 0.6]], (100, 200), crop, flipped, least) == want


def test_boxes_of_another_form_stay_as_they_are() -> None:
    for boxes in ([[1, 10, 20, 30, 40]], "two", [{"x": 1}]):
        item = Picture("k", encoded(Image.new("RGB", (40, 30))), {"captions": [], "boxes": boxes})
        made = prepare(item, recipe((16, 16), flip=1.0))
        assert isinstance(made, Prepared)
        assert made.record["boxes"] == boxes


# --- files


def test_maps_of_each_kind_are_read() -> None:
    labels = draw_scene(3, 16)[2]
    grey = Image.fromarray(labels)
    palette = grey.copy().convert("P")
    palette.putdata(labels.ravel().tolist())
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9] + [0] * 756)
    for image, options in ((grey, {}), (palette, {}), (palette, {"bits": 2})):
        read = np.asarray(read_map(encoded(image, "PNG", **options), (16, 16)))
        np.testing.assert_array_equal(read, labels)
    segments = labels.astype(np.int64) * 70_000 + 5
    split = np.stack([segments % 256, segments // 256 % 256, segments // 65536], axis=-1).astype(np.uint8)
    numbers = {5 + 70_000 * GROUND: 2, 5: 0}  # the others are of no class
    file = LabelFile(Path("x"), numbers, segments=True)
    want = np.select([labels == GROUND, labels == 0], [2, 0], 255)
    np.testing.assert_array_equal(np.asarray(read_map(encoded(Image.fromarray(split)), (16, 16), file)), want)
    with pytest.raises(PictureError, match=r"map.png has label 3, the classes are 0 to 2"):
        read_map(encoded(grey), (16, 16), None, 3)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (Image.new("RGB", (16, 16)), "map.png is RGB of 8 bits; it must be 8-bit grey, or a palette"),
        (Image.new("RGBA", (16, 16)), "map.png is RGB with alpha of 8 bits"),
        (Image.new("1", (16, 16)), "map.png is grey of 1 bits"),
        (Image.fromarray(np.zeros((16, 16), np.uint16)), "map.png is grey of 16 bits"),
        (Image.new("L", (16, 8)), "map.png is 8x16, the upright picture 16x16"),
    ],
)
def test_maps_that_are_refused(image: Image.Image, says: str) -> None:
    with pytest.raises(PictureError, match=says):
        read_map(encoded(image), (16, 16))


def test_damaged_maps_are_refused() -> None:
    data = encoded(Image.fromarray(draw_scene(1, 64)[2]))
    for broken, says in ((data[:90], "truncated|broken|not enough"), (b"", "is no PNG"), (b"GIF89a" * 9, "no PNG")):
        with pytest.raises(PictureError, match=says):
            read_map(broken, (64, 64))
        with pytest.raises(PictureError, match=says):
            read_mask(broken, (64, 64))
    huge = bytearray(data)
    huge[16:24] = (1 << 30).to_bytes(4, "big") * 2  # refused by its header
    with pytest.raises(PictureError, match="the upright picture 64x64"):
        read_map(bytes(huge), (64, 64))


def test_masks_of_any_bits_are_read() -> None:
    half = np.zeros((8, 8), bool)
    half[:, 4:] = True
    want = np.where(half, 255, 0)
    sixteen = Image.fromarray(np.where(half, 65535, 0).astype(np.uint16))
    for image in (Image.fromarray(half), Image.fromarray(want.astype(np.uint8)), sixteen):
        np.testing.assert_array_equal(np.asarray(read_mask(encoded(image), (8, 8))), want)
    with pytest.raises(PictureError, match="mask.png is RGB; it must be grey"):
        read_mask(encoded(Image.new("RGB", (8, 8))), (8, 8))


# --- holes


@pytest.mark.parametrize(("size", "step"), [((64, 64), 2), ((256, 128), 8), ((32, 32), 8), ((72, 40), 4)])
def test_holes_cover_what_they_should(size: tuple[int, int], step: int) -> None:
    holes = [draw_hole(5, f"k{index}", index % 3, size, step) for index in range(80)]
    coverage = np.array([hole.mean() for hole in holes])
    assert coverage.min() >= LEAST and coverage.max() <= MOST
    assert coverage.std() > 0.05
    assert all(latent_hole(hole, step).any() for hole in holes)
    assert len({hole.tobytes() for hole in holes}) > 60
    touched = np.mean(holes, axis=0)
    assert touched.min() > 0.02 * (min(size) > 40)  # they come everywhere


def test_holes_depend_on_their_arguments_alone() -> None:
    one = draw_hole(1, "key", 0, (64, 64), 8)
    np.random.default_rng(0)
    assert np.array_equal(one, draw_hole(1, "key", 0, (64, 64), 8))
    others = [
        draw_hole(2, "key", 0, (64, 64), 8),
        draw_hole(1, "yek", 0, (64, 64), 8),
        draw_hole(1, "key", 1, (64, 64), 8),
    ]
    assert not any(np.array_equal(one, other) for other in others)


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_latent_holes_are_stable_diffusions(step: int, h: int, w: int, seed: int) -> None:
    hole = np.random.default_rng(seed).random((h * step, w * step)) < 0.5
    want = torch.nn.functional.interpolate(torch.from_numpy(hole)[None, None].float(), size=(h, w))[0, 0]
    np.testing.assert_array_equal(latent_hole(hole, step), want)


# --- small pictures


def test_bicubic_is_pillows() -> None:
    picture = Image.fromarray(draw_scene(2, 64)[0])
    small = shrink(picture, 4, "bicubic", 0, "k")
    np.testing.assert_array_equal(np.asarray(small), np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC)))


def test_blind_pictures_are_their_picture_made_worse_and_stay_in_place() -> None:
    """Many degradations of one picture average to the picture itself, smoothed, and not to a shifted one."""
    picture = Image.fromarray(draw_scene(2, 128)[0])
    small = [np.asarray(shrink(picture, 4, "blind", 7, f"k{index}"), float) for index in range(60)]
    assert {array.shape for array in small} == {(32, 32, 3)}
    assert np.array_equal(small[0], np.asarray(shrink(picture, 4, "blind", 7, "k0"), float))
    assert len({array.tobytes() for array in small}) == 60
    clean = np.asarray(picture.resize((32, 32), Image.Resampling.BOX), float)
    errors = [np.abs(array - clean).mean() for array in small]
    assert min(errors) < 4 and max(errors) > 8  # mild ones and harsh ones
    mean = np.mean(small, axis=0)

    def away(down: int, across: int) -> float:
        shifted = np.roll(mean, (down, across), (0, 1))
        return float(((shifted - clean)[2:-2, 2:-2] ** 2).mean())

    places = {(down, across): away(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1)}
    assert min(places, key=lambda place: places[place]) == (0, 0)
    assert abs(places[0, 1] - places[0, -1]) < 0.25 * places[0, 1]
    assert abs(places[1, 0] - places[-1, 0]) < 0.25 * places[1, 0]


@pytest.mark.parametrize("size", [(5, 3), (16, 16), (21, 9)])
def test_blind_pictures_of_any_size(size: tuple[int, int]) -> None:
    for index in range(20):
        picture = Image.fromarray(
            np.random.default_rng(index).integers(0, 256, (2 * size[1], 2 * size[0], 3), np.uint8)
        )
        assert blind(picture, size, np.random.default_rng(index)).size == size


def test_the_blur_is_a_convolution() -> None:
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (30, 41, 3), np.uint8)
    kernel = random.random((7, 7))
    kernel /= kernel.sum()
    planes = torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[:, None]
    padded = torch.nn.functional.pad(planes, (3,) * 4, mode="reflect")
    turned = torch.from_numpy(kernel[::-1, ::-1].astype(np.float32).copy())[None, None]  # torch's is a correlation
    want = torch.nn.functional.conv2d(padded, turned)[:, 0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(np.asarray(_blur(Image.fromarray(picture), kernel)), want, atol=0.51)


def test_kernels_have_the_covariance_they_are_of() -> None:
    covariance = np.array([[4.0, 1.5], [1.5, 2.0]])
    kernel = gaussian(31, covariance)
    at = np.arange(31) - 15
    down, across = np.meshgrid(at, at, indexing="ij")
    found = [[(kernel * a * b).sum() for b in (down, across)] for a in (down, across)]
    np.testing.assert_allclose(found, covariance, atol=0.02)
    np.testing.assert_allclose(kernel.sum(), 1)


def test_noise_has_the_level_it_is_of() -> None:
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    levels = [np.asarray(_noise(grey, np.random.default_rng(seed)), float).std() for seed in range(60)]
    assert min(levels) < 4 and 20 < max(levels) < 27


# --- the command


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 scenes of 48 px as image shards, with all labels; every third lacks its map, all but two their mask."""
    root = tmp_path_factory.mktemp("scenes") / "images"
    with ShardWriter(root, "images", max_samples=7) as writer:
        for index in range(12):
            picture, boxes, labels, caption = draw_scene(index, 48)
            record = {"captions": [caption], "class": boxes[0][0], "boxes": boxes}
            members = {"png": encoded(Image.fromarray(picture)), "json": json_bytes(record)}
            if index % 3:
                members["map.png"] = encoded(Image.fromarray(labels))
            if index > 9:
                members["mask.png"] = encoded(Image.fromarray(np.where(labels == GROUND, 0, 255).astype(np.uint8)))
            writer.write(f"k{index:03d}", members, (48, 48))
        shards = writer.close()
    Manifest("images", writer.members, shards, classes=write_classes(root, CLASSES)).save(root)
    assert verify(root) == []
    return root


@pytest.fixture(scope="module")
def arguments(scenes: Path, vae_folder: Path) -> list[str]:
    cuts = ["--size", "32", "--crop", "random", "--flip", "0.5", "--batch", "4", "--shard-samples", "5"]
    more = ["--holes", "2", "--lowres", "4", "--degradation", "blind", "--full-holes", "0.2"]
    return [str(scenes), "--vae", str(vae_folder), *cuts, *more]


def test_everything_that_is_made_of_a_picture(
    cli: Cli, arguments: list[str], vae_folder: Path, tmp_path: Path
) -> None:
    result = cli("encode", *arguments, "--out", tmp_path / "out", "--workers", 0)
    assert result.code == 0, result.err
    assert verify(tmp_path / "out") == []
    assert cli("verify", tmp_path / "out").code == 0
    source, shards = ShardSet.open(arguments[0]), ShardSet.open(tmp_path / "out")
    assert shards.classes() == CLASSES
    members = ["latent.npy", "json", "map.png", "mask.png", "lowres.png", "hole.npy", "masked.npy"]
    assert shards.manifest.members == members
    assert len(shards) == 12
    vae = load_autoencoder(vae_folder)
    full = 0
    for number in range(12):
        sample = shards.read(number)
        key, index = sample["__key__"], int(sample["__key__"][1:])
        record = json.loads(sample["json"])
        assert ("map.png" in sample, "mask.png" in sample) == (bool(index % 3), index > 9)
        assert record["class"] == index % 3
        # The picture once more, by what the record says of it.
        picture = decode_rgb(source.read_member(index, "png"))
        top, left, height, width = record["crop"]
        if record.get("flipped"):
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert (height, width) == (32, 32) and record["original_size"] == [48, 48]
        cut = picture.resize((32, 32), Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1)[None].float() / 127.5 - 1
        masked, holes = parse_npy(sample["masked.npy"]), parse_npy(sample["hole.npy"])
        assert masked is not None and holes is not None
        assert masked.shape == (2, 8, 16, 16) and masked.dtype == np.float16
        for hole in range(2):
            inside = draw_hole(0, key, hole, (32, 32), 2)
            if holes[hole].all():
                inside, full = np.ones((32, 32), bool), full + 1
            np.testing.assert_array_equal(holes[hole], inside[::2, ::2])
            filled = pixels * torch.from_numpy(~inside)
            np.testing.assert_allclose(masked[hole], encode_moments(vae, filled)[0], rtol=2e-3, atol=1e-3)
        small = np.asarray(shrink(cut, 4, "blind", 0, key))
        np.testing.assert_array_equal(pixels_of(sample["lowres.png"]), small)
        if index % 3:
            labels = Image.fromarray(draw_scene(index, 48)[2])
            if record.get("flipped"):  # after the resizing, as the picture
                want = labels.resize((32, 32), 0).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            else:
                want = labels.resize((32, 32), 0)
            np.testing.assert_array_equal(pixels_of(sample["map.png"]), np.asarray(want))
    assert 1 <= full <= 12


def test_the_same_bytes_after_kills_and_with_workers(
    cli: Cli, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.data_tools.test_encode_kill import ended, fork, same

    assert cli("encode", *arguments, "--out", tmp_path / "one", "--workers", 0).code == 0
    lives = 0
    while (code := ended(fork(arguments, tmp_path / "two", renames=6 + lives % 2, workers=0))) != 0:
        assert code < 0
        lives += 1
    assert lives >= 2
    same(tmp_path / "one", tmp_path / "two")
    assert cli("encode", *arguments, "--out", tmp_path / "three", "--workers", 2).code == 0
    same(tmp_path / "one", tmp_path / "three")
    result = cli("encode", *arguments, "--holes", 3, "--out", tmp_path / "one")
    assert (result.code, "finished set made with holes 2 (now: 3)" in result.err) == (2, True)


def test_without_them_nothing_is_made(cli: Cli, scenes: Path, vae_folder: Path, tmp_path: Path) -> None:
    job = ["--vae", vae_folder, "--size", 32, "--workers", 0]
    assert cli("encode", scenes, *job, "--out", tmp_path / "out").code == 0
    assert ShardSet.open(tmp_path / "out").manifest.members == ["latent.npy", "json", "map.png", "mask.png"]
    settings = json.loads((tmp_path / "out" / "encode.json").read_text())
    assert not {"holes", "full-holes", "lowres", "degradation", "min-box"} & set(settings)


def test_holes_that_overflow_are_redone(
    cli: Cli, scenes: Path, vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the pictures with a hole overflow here: by the mid-grey in them, which no 8-bit colour is."""

    def overflowing(vae: object, images_B3HW: torch.Tensor) -> torch.Tensor:
        moments = encode_moments(vae, images_B3HW)  # type: ignore[arg-type]
        if vae.dtype != torch.float32:  # type: ignore[attr-defined]
            moments[(images_B3HW == 0).flatten(1).any(1)] = torch.inf
        return moments

    monkeypatch.setattr(autoencoder, "encode_moments", overflowing)
    job = ["--vae", vae_folder, "--size", 32, "--workers", 0, "--holes", 1]
    result = cli("encode", scenes, *job, "--dtype", "bfloat16", "--out", tmp_path / "out")
    assert "12 pictures overflowed in bfloat16 and were redone in float32" in result.out
    assert verify(tmp_path / "out") == []
    assert cli("encode", scenes, *job, "--out", tmp_path / "exact").code == 0
    for number in range(12):
        one, two = (
            parse_npy(ShardSet.open(tmp_path / name).read_member(number, "masked.npy")) for name in ("out", "exact")
        )
        assert one is not None and two is not None
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)


def test_pictures_with_a_wrong_map_are_set_aside(cli: Cli, vae_folder: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "images", "images") as writer:
        for number, labels in enumerate(
            (Image.new("L", (16, 16)), Image.new("L", (8, 16)), Image.new("RGB", (16, 16)))
        ):
            members = {"png": encoded(Image.new("RGB", (16, 16))), "json": b"{}", "map.png": encoded(labels)}
            writer.write(f"k{number}", members, (16, 16))
        writer.finish()
    assert cli("encode", tmp_path / "images", "--vae", vae_folder, "--out", tmp_path / "out").code == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["k1", "k2"]
    assert "map.png is 16x8, the upright picture 16x16" in rows[0]["reason"]
    assert "map.png is RGB" in rows[1]["reason"]


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--lowres", "3"], "--lowres 3 does not divide pictures of 32x32"),
        (["--full-holes", "0.5"], "--full-holes 0.5 has no effect without --holes; give both, or neither"),
        (["--min-box", "1.5"], "'1.5' is not a number from 0 to 1"),
        (["--holes", "-1"], "is not a whole number of at least 0"),
        (["--degradation", "worse"], "invalid choice: 'worse'"),
    ],
)
def test_wrong_arguments(
    cli: Cli, scenes: Path, vae_folder: Path, tmp_path: Path, extra: list[str], says: str
) -> None:
    result = cli("encode", scenes, "--vae", vae_folder, "--size", 32, "--out", tmp_path / "out", *extra)
    assert (result.code, says in result.err) == (2, True)


def test_lost_boxes_are_counted(cli: Cli, scenes: Path, vae_folder: Path, tmp_path: Path) -> None:
    job = ["--vae", vae_folder, "--size", 32, "--aspect-buckets", "--bucket-step", 8, "--workers", 0]
    assert "boxes were left out" not in cli("encode", scenes, *job, "--out", tmp_path / "all").out
    with ShardWriter(tmp_path / "wide", "images") as writer:
        boxes = [[0, 0.0, 0.0, 0.2, 1.0], [0, 0.4, 0.0, 0.6, 1.0]]
        members = {"png": encoded(Image.new("RGB", (128, 32))), "json": json_bytes({"boxes": boxes})}
        writer.write("k", members, (32, 128))
        writer.finish()
    result = cli("encode", tmp_path / "wide", "--vae", vae_folder, "--size", 32, "--out", tmp_path / "out")
    assert "1 of 2 boxes were left out: less than 25% of each is in the crop" in result.out
    (box,) = ShardSet.open(tmp_path / "out").read_json(0)["boxes"]
    assert box == [0, pytest.approx(0.1), 0.0, pytest.approx(0.9), 1.0]
