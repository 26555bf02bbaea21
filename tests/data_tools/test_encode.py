"""Latent shards hold what the autoencoder says of each picture, and their manifest tells the truth about them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from data_tools.devices import choose_device
from finetune.data.shards import Manifest, ShardError, ShardSet, ShardWriter, json_bytes, verify
from finetune.data.shards.images import decode_rgb
from finetune.latents import LatentSpace, sample_latents
from finetune.models import autoencoder, fast
from finetune.models.autoencoder import encode_moments, encoder_sha256, load_autoencoder
from tests.data_tools.conftest import Result, encoded, smooth_picture

Cli = Callable[..., Result]


def all_moments(shards: ShardSet) -> np.ndarray:
    ((bucket, ids),) = shards.buckets.items()
    encoder = shards.manifest.encoder
    assert encoder is not None
    shape = (2 * encoder.channels, *(side // encoder.downsample for side in bucket))
    out = np.empty((len(ids), *shape), np.float16)
    shards.read_latents(ids, out)
    return out


def moments_of(vae: object, image: Image.Image) -> np.ndarray:
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    return encode_moments(vae, x)[0].numpy()  # type: ignore[arg-type]


def rejects(root: Path) -> dict[str, str]:
    rows = map(json.loads, (root / "rejects.jsonl").read_text().splitlines())
    return {row["file"]: row["reason"] for row in rows}


def test_latents_are_the_autoencoders(cli: Cli, image_shards: Path, vae_folder: Path, tmp_path: Path) -> None:
    result = cli("encode", image_shards, "--vae", vae_folder, "--out", tmp_path / "out", "--batch", 4)
    assert result.code == 0, result.err
    assert verify(tmp_path / "out") == []
    images, latents = ShardSet.open(image_shards), ShardSet.open(tmp_path / "out", "latents")
    assert latents.bucket_sizes == {(32, 32): 6}
    vae = load_autoencoder(vae_folder)
    stored = all_moments(latents)
    for sample_id in range(6):
        assert latents.key(sample_id) == images.key(sample_id)
        want = moments_of(vae, decode_rgb(images.read_member(sample_id, "png")))
        np.testing.assert_allclose(stored[sample_id], want, rtol=2e-3, atol=1e-3)
        record = images.read_json(sample_id)
        assert latents.read_json(sample_id) == {**record, "original_size": [32, 32], "crop": [0, 0, 32, 32]}
    encoder = latents.manifest.encoder
    assert encoder is not None
    assert encoder.sha256 == encoder_sha256(vae)
    assert Path(encoder.locate(tmp_path / "out")).resolve() == vae_folder.resolve()


def test_manifest_statistics_are_those_of_fresh_draws(
    cli: Cli, image_shards: Path, vae_folder: Path, tmp_path: Path
) -> None:
    cli("encode", image_shards, "--vae", vae_folder, "--out", tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out")
    encoder, stats = shards.manifest.encoder, shards.manifest.latents
    assert encoder is not None
    assert stats is not None
    moments = torch.from_numpy(all_moments(shards)).repeat(200, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(len(moments), 4, 16, 16, generator=generator)
    z = sample_latents(moments, eps, LatentSpace(encoder.scale, encoder.shift))
    draws = z[:, 0].numel()
    bound = 4 * max(stats.channel_std) / draws**0.5  # four standard errors
    np.testing.assert_allclose(z.mean(dim=(0, 2, 3)), stats.channel_mean, atol=bound)
    np.testing.assert_allclose(z.std(dim=(0, 2, 3)), stats.channel_std, atol=bound)
    assert abs(float(z.mean()) - stats.mean) < bound
    assert abs(float(z.std()) - stats.std) < bound


def test_resize_and_crop(cli: Cli, vae_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    image = smooth_picture(1, 40, 80)
    (tmp_path / "in" / "wide.png").write_bytes(encoded(image))
    cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "images")
    cli("encode", tmp_path / "images", "--vae", vae_folder, "--out", tmp_path / "out", "--size", 16)
    shards = ShardSet.open(tmp_path / "out")
    record = shards.read_json(0)
    assert (record["original_size"], record["crop"]) == ([40, 80], [0, 8, 16, 16])
    cut = image.resize((32, 16), Image.Resampling.LANCZOS).crop((8, 0, 24, 16))
    want = moments_of(load_autoencoder(vae_folder), cut)
    np.testing.assert_allclose(all_moments(shards)[0], want, rtol=2e-3, atol=1e-3)


def test_sizes_noted_at_ingest_are_carried_on(cli: Cli, vae_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "wide.png").write_bytes(encoded(smooth_picture(1, 64, 128)))
    cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "images", "--size", 32)
    assert ShardSet.open(tmp_path / "images").read_json(0)["crop"] == [0, 16, 32, 32]
    for size, left in ((32, 16), (16, 8), (64, 32)):
        cli("encode", tmp_path / "images", "--vae", vae_folder, "--out", tmp_path / str(size), "--size", size)
        record = ShardSet.open(tmp_path / str(size)).read_json(0)
        assert (record["original_size"], record["crop"]) == ([64, 128], [0, left, size, size])


def test_aspect_buckets(cli: Cli, vae_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shapes = [(40, 40), (30, 60), (60, 30), (40, 44), (31, 60), (20, 90)]
    for number, (height, width) in enumerate(shapes):
        (tmp_path / "in" / f"{number}.png").write_bytes(encoded(smooth_picture(number, height, width)))
    cli("ingest", "folder", tmp_path / "in", "--out", tmp_path / "images")
    result = cli(
        "encode",
        tmp_path / "images",
        "--vae",
        vae_folder,
        "--out",
        tmp_path / "out",
        "--size",
        32,
        "--aspect-buckets",
        "--bucket-step",
        8,
        "--batch",
        2,
    )
    assert result.code == 0, result.err
    assert verify(tmp_path / "out") == []
    shards = ShardSet.open(tmp_path / "out")
    assert shards.bucket_sizes == {(24, 40): 3, (32, 32): 2, (40, 24): 1}
    assert len(shards.manifest.shards) == 3
    seen = {}
    for sample_id in range(6):
        record = shards.read_json(sample_id)
        bucket = shards.bucket_of(shards.locate(sample_id)[0])
        assert tuple(record["crop"][2:]) == bucket
        seen[record["file"]] = bucket
        assert record["original_size"] == list(shapes[int(record["file"][0])])
    assert seen["1.png"] == seen["4.png"] == seen["5.png"] == (24, 40)


@pytest.mark.parametrize("cut", [100, -200, -512])  # in the picture, in its header, before its header
def test_foreign_tars(cli: Cli, vae_folder: Path, tmp_path: Path, cut: int) -> None:
    """As img2dataset leaves them, the last one cut short by a download that broke off."""
    (tmp_path / "tars").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "tars" / f"{shard:05d}.tar", "w") as tar:
            for number in range(3):
                name = f"./{shard}/00{number} é" if number else f"{number:09d}"
                meta = {
                    "caption": "from json",
                    "original_height": 100,
                    "original_width": 90,
                    "exif": "{}",
                    "class": 2,
                }
                members = {
                    "JPG": encoded(smooth_picture(number, 32, 32), "JPEG"),
                    "txt": b"from  txt\n",
                    "json": json_bytes(meta) if number == 1 else None,
                }
                for member, data in members.items():
                    if data is not None:
                        info = tarfile.TarInfo(f"{name}.{member}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    with tarfile.open(tmp_path / "tars" / "00001.tar") as tar:
        places = {info.name: info.offset_data for info in tar}
    os.truncate(tmp_path / "tars" / "00001.tar", places["./1/002 é.JPG"] + cut)

    result = cli("encode", tmp_path / "tars", "--vae", vae_folder, "--out", tmp_path / "out")
    assert (result.code, "several sizes; give --size" in result.err) == (2, True)
    result = cli("encode", tmp_path / "tars", "--vae", vae_folder, "--out", tmp_path / "out", "--size", 16)
    assert result.code == 0, result.err
    assert verify(tmp_path / "out") == []
    shards = ShardSet.open(tmp_path / "out")
    # What came before the cut; the last sample may have lost members, so it is left out.
    assert len(shards) == (5 if cut > 0 else 4)
    assert list(rejects(tmp_path / "out")) == ["00001.tar"]
    keys = [shards.key(i) for i in range(len(shards))]
    assert len(set(keys)) == len(keys)
    assert keys[0] == "00000_000000000"
    row = shards.read_json(1)
    assert row == {
        "captions": ["from json"],
        "original_size": [100, 90],
        "crop": [0, 0, 16, 16],
        "original_height": 100,
        "original_width": 90,
        "class": 2,
    }
    assert shards.read_json(0)["captions"] == ["from txt"]


def test_corrupt_pictures_are_set_aside(cli: Cli, vae_folder: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "images", "images") as writer:
        for number in range(5):
            data = encoded(smooth_picture(number, 16, 16))
            record = json_bytes({"captions": ["a"]}) if number != 3 else b"{"
            writer.write(f"s{number}", {"png": data[:90] if number == 1 else data, "json": record}, (16, 16))
        writer.finish()
    result = cli("encode", tmp_path / "images", "--vae", vae_folder, "--out", tmp_path / "out", "--batch", 2)
    assert result.code == 0
    assert "3 latents" in result.out
    assert "2 set aside, listed in" in result.out
    shards = ShardSet.open(tmp_path / "out")
    assert [shards.key(i) for i in range(3)] == ["s0", "s2", "s4"]
    reasons = rejects(tmp_path / "out")
    assert set(reasons) == {"s1", "s3"}
    assert "json is not JSON" in reasons["s3"]


def test_overflow_is_redone_in_float32(
    cli: Cli, image_shards: Path, vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(vae: object, images_B3HW: torch.Tensor) -> torch.Tensor:
        moments = encode_moments(vae, images_B3HW)  # type: ignore[arg-type]
        if vae.dtype != torch.float32:  # type: ignore[attr-defined]
            moments[1::2] = torch.inf
        return moments

    monkeypatch.setattr(autoencoder, "encode_moments", overflowing)
    result = cli(
        "encode", image_shards, "--vae", vae_folder, "--out", tmp_path / "out", "--dtype", "bfloat16", "--batch", 2
    )
    assert "3 pictures overflowed in bfloat16 and were redone in float32" in result.out
    assert verify(tmp_path / "out") == []
    shards, images = ShardSet.open(tmp_path / "out"), ShardSet.open(image_shards)
    vae = load_autoencoder(vae_folder)
    for sample_id in (1, 3, 5):
        want = moments_of(vae, decode_rgb(images.read_member(sample_id, "png"))).astype(np.float16)
        np.testing.assert_allclose(all_moments(shards)[sample_id], want, rtol=1e-3, atol=1e-4)


def test_latents_that_are_never_finite_are_set_aside(
    cli: Cli, image_shards: Path, vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(vae: object, images_B3HW: torch.Tensor) -> torch.Tensor:
        moments = encode_moments(vae, images_B3HW)  # type: ignore[arg-type]
        moments[0, 0, 0, 0] = 1e6  # finite, but not in float16
        return moments

    monkeypatch.setattr(autoencoder, "encode_moments", broken)
    result = cli("encode", image_shards, "--vae", vae_folder, "--out", tmp_path / "out", "--batch", 2)
    assert result.code == 0
    assert len(ShardSet.open(tmp_path / "out")) == 3
    assert set(rejects(tmp_path / "out").values()) == {"latents are not finite, even in float32"}
    result = cli("encode", image_shards, "--vae", vae_folder, "--out", tmp_path / "none", "--batch", 1)
    assert (result.code, "none of 6 pictures" in result.err) == (2, True)
    with pytest.raises(ShardError):
        Manifest.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--size", "33"], "--size 33 does not divide by 2, the VAE's step; take 32"),
        (["--aspect-buckets"], "--aspect-buckets needs --size"),
        (["--aspect-buckets", "--size", "32"], "too small for --bucket-step 64"),
        (["--aspect-buckets", "--size", "32", "--bucket-step", "3"], "--bucket-step 3 does not divide by 2"),
        (["--device", "warp"], "--device warp can't be used here"),
        (["--device", "meta"], "--device meta can't be used here"),
        (["--degradation", "blind"], "--degradation blind has no effect without --lowres; give both, or neither"),
        (["--min-bucket", "9"], "--min-bucket 9 has no effect without --aspect-buckets"),
        (["--aspect-buckets", "sd", "--max-buckets", "6"], "no effect without --aspect-buckets data"),
        (["--batch", "0"], "'0' is not a whole number"),
        (["--vae", "/no/such/vae"], "no autoencoder at /no/such/vae"),
        (["--caption", "sks"], "'sks' has no place for the caption; put {} where it goes"),
        (["--caption", "{}, \udcff"], "'{}, \\udcff' is not UTF-8"),
    ],
)
def test_mistakes(
    cli: Cli, image_shards: Path, vae_folder: Path, tmp_path: Path, extra: list[str], says: str
) -> None:
    result = cli("encode", image_shards, "--vae", vae_folder, "--out", tmp_path / "out", *extra)
    assert (result.code, says in result.err) == (2, True), result.err


def test_captions_can_be_rewritten(cli: Cli, vae_folder: Path, tmp_path: Path) -> None:
    """A style or a trigger word joins each caption; braces of its own stay, and no caption stays none."""
    source = tmp_path / "shards"
    with ShardWriter(source, "images") as writer:
        for key, captions in (("a", ["a {} cat", "cat"]), ("b", [])):
            members = {"png": encoded(smooth_picture(0, 32, 32)), "json": json_bytes({"captions": captions})}
            writer.write(key, members, (32, 32))
        writer.finish()
    command = ["encode", source, "--vae", vae_folder, "--out", tmp_path / "out"]
    assert cli(*command, "--caption", "{}, in the style of sks").code == 0
    shards = ShardSet.open(str(tmp_path / "out"), "latents")
    found = {shards.key(index): shards.read_json(index)["captions"] for index in range(2)}
    shards.close()
    assert found == {"a": ["a {} cat, in the style of sks", "cat, in the style of sks"], "b": []}
    other = cli(*command, "--caption", "{}, in another style")
    assert (other.code, "caption" in other.err) == (2, True), other.err


def test_sources_that_cannot_be_encoded(cli: Cli, image_shards: Path, vae_folder: Path, tmp_path: Path) -> None:
    cli("encode", image_shards, "--vae", vae_folder, "--out", tmp_path / "latents")
    (tmp_path / "empty").mkdir()
    (image_shards / "manifest.json").unlink()
    for source, says in [
        (tmp_path / "latents", "holds latents, images are needed"),
        (tmp_path / "nowhere", "no folder"),
        (tmp_path / "empty", "no shards in"),
        (image_shards, "never finished"),
    ]:
        result = cli("encode", source, "--vae", vae_folder, "--out", tmp_path / "out")
        assert (result.code, says in result.err) == (2, True), result.err


def test_the_fast_encoder_comes_to_the_same_latents(
    cli: Cli, image_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, by Triton's interpreter; the last batch of four is short."""
    kernels = fast.blocks.kernels
    if kernels is None or not kernels.INTERPRETED:
        pytest.skip("Triton's interpreter is off, or there is no Triton")
    joined: list[int] = []
    join = kernels.join
    monkeypatch.setattr(kernels, "join", lambda x, *a, **k: joined.append(len(x)) or join(x, *a, **k))
    monkeypatch.setattr(fast, "available", lambda device: True)
    monkeypatch.setattr(fast, "missing", lambda: None)
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=1, **blocks).save_pretrained(tmp_path / "vae")
    given = ("encode", image_shards, "--vae", tmp_path / "vae", "--batch", 4, "--size", 8, "--workers", 0)
    found = []
    for name, words in (("fast", ()), ("slow", ("--no-fast",))):
        result = cli(*given, "--out", tmp_path / name, *words)
        assert result.code == 0, result.err
        found.append(all_moments(ShardSet.open(tmp_path / name, "latents")).astype(np.float32))
        assert joined == [4] * 5 + [2] * 5, "four resnets and attention, in two batches, and none without"
    np.testing.assert_allclose(*found, rtol=2e-3, atol=1e-3)


def test_without_what_it_needs_a_gpu_encodes_as_before(
    cli: Cli, image_shards: Path, vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "available", lambda device: True)
    monkeypatch.setattr(fast, "missing", lambda: "a C compiler")
    monkeypatch.setattr(fast, "make_encoder_fast", lambda vae: pytest.fail("there is no compiler"))
    result = cli("encode", image_shards, "--vae", vae_folder, "--out", tmp_path / "out", "--workers", 0)
    assert result.code == 0 and verify(tmp_path / "out") == []
    assert "--fast needs a C compiler, which is not here: the VAE runs as diffusers wrote it\n" in result.err


def test_a_process_takes_its_gpu_and_makes_it_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events would else be those of the first GPU, and nobody waited for the others' latents."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert choose_device("auto") == torch.device("cuda", 2) and current == [torch.device("cuda", 2)]
    assert choose_device("cpu").type == "cpu" and len(current) == 1
