"""What `encode` leaves out, how it draws crops and flips, and the states of captions that it keeps."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file

from data_tools.encode.assemble import load_plan, make_plan
from data_tools.encode.encoder import Encoder
from data_tools.encode.parts import Tally
from data_tools.encode.work import Work
from finetune.data.shards import Manifest, ShardSet, ShardWriter, json_bytes, verify
from finetune.data.shards.images import decode_rgb
from finetune.latents import LatentSpace, RunningMoments
from finetune.models import autoencoder, ldm_keys
from finetune.models.autoencoder import encode_moments, load_autoencoder
from finetune.models.text import encode_text, load_text, text_encoder_sha256, tokenize
from tests.conftest import CAPTIONS
from tests.data_tools.conftest import Result, encoded, smooth_picture
from tests.data_tools.test_encode import moments_of
from tests.models.test_single_file import small

Cli = Callable[..., Result]


def image_set(root: Path, shapes: list[tuple[int, int]], per_shard: int = 5) -> Path:
    with ShardWriter(root, "images", max_samples=per_shard) as writer:
        for number, (height, width) in enumerate(shapes):
            record = {"captions": [f"picture {number}"], "score": number}
            members = {"png": encoded(smooth_picture(number, height, width)), "json": json_bytes(record)}
            writer.write(f"k{number:02d}", members)
        writer.finish()
    return root


def rows(root: Path) -> dict[str, tuple[np.ndarray, dict[str, object]]]:
    """Moments and record by key."""
    shards = ShardSet.open(root, "latents")
    encoder = shards.manifest.encoder
    assert encoder is not None
    found = {}
    for sample_id in range(len(shards)):
        height, width = shards.bucket_of(shards.locate(sample_id)[0]) or (0, 0)
        shape = (2 * encoder.channels, height // encoder.downsample, width // encoder.downsample)
        out = np.empty((1, *shape), np.float16)
        shards.read_latents([sample_id], out)
        found[shards.key(sample_id)] = (out[0], shards.read_json(sample_id))
    return found


def test_statistics_are_those_of_the_latents_that_are_kept(cli: Cli, vae_folder: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "images", "images", max_samples=3) as writer:
        for number, key in enumerate(["a", "b", "c", "c", "d", "a"]):  # the second shard repeats two of the first
            image = smooth_picture(number, 32, 48 if number == 5 else 32)
            writer.write(key, {"png": encoded(image), "json": json_bytes({"captions": [key]})})
        writer.finish()
    out = tmp_path / "out"
    buckets = ["--size", 32, "--aspect-buckets", "sd", "--bucket-step", 8]
    result = cli("encode", tmp_path / "images", "--vae", vae_folder, "--out", out, *buckets)
    assert "4 latents" in result.out
    assert "2 set aside" in result.out
    kept = RunningMoments()
    for moments, _ in rows(out).values():
        kept.add(moments[None])
    manifest = Manifest.load(out)
    assert manifest.encoder is not None
    assert manifest.latents is not None
    mean, std, channel_mean, channel_std = kept.summary(LatentSpace(manifest.encoder.scale, manifest.encoder.shift))
    np.testing.assert_allclose(manifest.latents.channel_mean, channel_mean, rtol=1e-9)
    np.testing.assert_allclose(manifest.latents.channel_std, channel_std, rtol=1e-9)
    np.testing.assert_allclose([manifest.latents.mean, manifest.latents.std], [mean, std], rtol=1e-9)


def test_what_is_left_out_is_counted(cli: Cli, vae_folder: Path, tmp_path: Path) -> None:
    images = image_set(tmp_path / "images", [(32, 32)] * 8 + [(16, 32)] * 3 + [(32, 32)])
    (images / "duplicates.jsonl").write_text(
        "".join(json.dumps({"key": key, "duplicate_of": "k00", "distance": 1}) + "\n" for key in ("k01", "k11"))
    )
    (tmp_path / "list.txt").write_text("k02\n\nunknown\nk01\n")
    encode = ("encode", images, "--vae", vae_folder, "--size", "32", "--workers", "0")
    some = ("--exclude", tmp_path / "list.txt", "--min-size", 20, "--where", "score != 3")
    result = cli(*encode, *some, "--out", tmp_path / "a")
    assert result.code == 0, result.err
    assert list(rows(tmp_path / "a")) == ["k00", "k04", "k05", "k06", "k07"]
    assert "3 pictures were left out as duplicates" in result.out
    assert "3 pictures were left out by a filter: smaller than 20 px" in result.out
    assert "1 pictures were left out by a filter" in result.out
    assert not (tmp_path / "a" / "rejects.jsonl").exists()
    result = cli(*encode, "--keep-duplicates", "--out", tmp_path / "b")
    assert len(rows(tmp_path / "b")) == 12
    result = cli(*encode, "--min-size", 64, "--out", tmp_path / "c")
    assert (result.code, "smaller than 64 px" in result.err) == (2, True)
    for line in ('{"kee": 1}', '{"key": ' + 100_000 * "["):
        (tmp_path / "list.txt").write_text('{"key": "\\ud83d"}\n' + line + "\n")
        result = cli(*encode, "--exclude", tmp_path / "list.txt", "--out", tmp_path / "d")
        assert (result.code, "line 2 has no" in result.err) == (2, True)
    result = cli(*encode, "--exclude", tmp_path / "none.txt", "--out", tmp_path / "d")
    assert (result.code, "cannot read" in result.err) == (2, True)


def test_flips_and_crops_are_recorded_as_they_are(cli: Cli, vae_folder: Path, tmp_path: Path) -> None:
    images = image_set(tmp_path / "images", [(40, 80), (60, 40), (32, 32), (48, 96)] * 5)
    encode = (
        "encode",
        images,
        "--vae",
        vae_folder,
        "--size",
        32,
        "--workers",
        0,
        "--flip",
        0.5,
        "--crop",
        "random",
    )
    assert cli(*encode, "--out", tmp_path / "a").code == 0
    assert cli(*encode, "--seed", 1, "--out", tmp_path / "b").code == 0
    assert verify(tmp_path / "a") == []
    vae = load_autoencoder(vae_folder)
    source = ShardSet.open(images)
    found = rows(tmp_path / "a")
    for sample_id in range(len(source)):
        image = decode_rgb(source.read_member(sample_id, "png"))
        moments, record = found[source.key(sample_id)]
        assert record["original_size"] == [image.height, image.width]
        scale = 32 / min(image.size)
        resized = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        if record.get("flipped"):
            resized = ImageOps.mirror(resized)
        top, left, height, width = record["crop"]  # type: ignore[misc]
        assert (height, width) == (32, 32)
        want = moments_of(vae, resized.crop((left, top, left + width, top + height)))
        np.testing.assert_allclose(moments, want, rtol=4e-3, atol=4e-3)
    flipped = [bool(record.get("flipped")) for _, record in found.values()]
    assert 3 < sum(flipped) < 17
    assert len({str(record["crop"]) for _, record in found.values()}) > 8
    assert flipped != [bool(record.get("flipped")) for _, record in rows(tmp_path / "b").values()]


def test_a_flip_mirrors_the_crop_that_ingest_made(cli: Cli, vae_folder: Path, tmp_path: Path) -> None:
    record = {"captions": [], "original_size": [64, 128], "crop": [0, 10, 32, 32]}  # of 32 x 64 pixels
    with ShardWriter(tmp_path / "images", "images") as writer:
        writer.write("a", {"png": encoded(smooth_picture(0, 32, 32)), "json": json_bytes(record)}, (32, 32))
        writer.finish()
    encode = ("encode", tmp_path / "images", "--vae", vae_folder, "--flip", 1, "--workers", 0)
    assert cli(*encode, "--out", tmp_path / "a").code == 0
    assert rows(tmp_path / "a")["a"][1] == {**record, "crop": [0, 64 - 10 - 32, 32, 32], "flipped": True}
    assert cli(*encode, "--size", 16, "--out", tmp_path / "b").code == 0
    assert rows(tmp_path / "b")["a"][1]["crop"] == [0, 11, 16, 16]


@pytest.mark.parametrize(
    ("original_size", "crop"),
    [([0, 0], [0, 0, 16, 16]), ([64, -64], None), ([64.0, 64], [0, 0, 16]), ([64, True], [1]), ([1 << 40, 1], {})],
)
def test_sizes_that_no_picture_has_are_not_carried_on(
    cli: Cli, vae_folder: Path, tmp_path: Path, original_size: object, crop: object
) -> None:
    record = {"captions": [], "original_size": original_size, "crop": crop}
    with ShardWriter(tmp_path / "images", "images") as writer:
        writer.write("a", {"png": encoded(smooth_picture(0, 32, 32)), "json": json_bytes(record)}, (32, 32))
        writer.finish()
    encode = ("encode", tmp_path / "images", "--vae", vae_folder, "--workers", 0)
    assert cli(*encode, "--out", tmp_path / "latents").code == 0
    assert rows(tmp_path / "latents")["a"][1] == {
        "captions": [],
        "original_size": [32, 32],
        "crop": [0, 0, 32, 32],
    }
    assert verify(tmp_path / "latents") == []


def test_overflow_in_every_bucket(
    cli: Cli, vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What overflows is redone alone; what came with it in the batch is not touched."""
    images = image_set(tmp_path / "images", [(32, 32), (24, 40), (40, 24)] * 4)
    encode = ("encode", images, "--vae", vae_folder, "--size", 32, "--aspect-buckets", "--bucket-step", 8)
    encode = (*encode, "--workers", "0", "--batch", 2)
    assert cli(*encode, "--dtype", "bfloat16", "--out", tmp_path / "fine").code == 0
    assert cli(*encode, "--out", tmp_path / "exact").code == 0

    def overflowing(vae: object, images_B3HW: torch.Tensor) -> torch.Tensor:
        moments = encode_moments(vae, images_B3HW)  # type: ignore[arg-type]
        if vae.dtype != torch.float32:  # type: ignore[attr-defined]
            moments[1:, 0, 0, 0] = torch.nan
        return moments

    monkeypatch.setattr(autoencoder, "encode_moments", overflowing)
    result = cli(*encode, "--dtype", "bfloat16", "--out", tmp_path / "redone")
    fine, exact, redone = (rows(tmp_path / name) for name in ("fine", "exact", "redone"))
    assert fine.keys() == exact.keys() == redone.keys()
    # Two batches of two in each unit of five pictures and each bucket of two; the rest are alone.
    changed = [key for key in fine if not np.array_equal(fine[key][0], redone[key][0])]
    assert f"{len(changed)} pictures overflowed in bfloat16" in result.out
    assert len({redone[key][0].shape for key in changed}) == 3
    for key in changed:
        np.testing.assert_allclose(redone[key][0], exact[key][0], rtol=1e-3, atol=1e-4)


def test_states_of_captions(cli: Cli, pipeline: Path, tmp_path: Path) -> None:
    captions = [[CAPTIONS[0]], [], [CAPTIONS[1], CAPTIONS[2], "a red bus on a table"]]
    with ShardWriter(tmp_path / "images", "images", max_samples=2) as writer:
        for number, texts in enumerate(captions):
            members = {"png": encoded(smooth_picture(number, 32, 32)), "json": json_bytes({"captions": texts})}
            writer.write(f"k{number}", members, (32, 32))
        writer.finish()
    encode = ("encode", tmp_path / "images", "--vae", pipeline, "--workers", 0)
    result = cli(*encode, "--text-encoder", pipeline, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert verify(tmp_path / "out") == []
    tokenizer, encoder = load_text(pipeline)

    def states(texts: list[str]) -> np.ndarray:
        with torch.no_grad():
            context = encode_text(encoder, tokenize(tokenizer, texts), tokenizer.pad_token_id)
        return context.numpy().astype(np.float16)

    shards = ShardSet.open(tmp_path / "out")
    info = shards.manifest.text
    assert info is not None
    assert (info.length, info.width, info.sha256) == (12, 16, text_encoder_sha256(encoder))
    assert (tmp_path / "out" / info.source).resolve() == pipeline.resolve()
    for sample_id, texts in enumerate(captions):
        stored = np.load(io.BytesIO(shards.read_member(sample_id, "text.npy")))
        assert stored.dtype == np.float16
        np.testing.assert_allclose(stored, states(texts or [""]), rtol=2e-3, atol=2e-3)
    empty = np.load(tmp_path / "out" / "empty.text.npy")
    np.testing.assert_allclose(empty, states([""])[0], rtol=2e-3, atol=2e-3)
    # A set without states says nothing of them, as sets from before there were any.
    assert cli(*encode, "--out", tmp_path / "plain").code == 0
    assert Manifest.load(tmp_path / "plain").text is None
    assert '"text"' not in (tmp_path / "plain" / "manifest.json").read_text()
    assert not (tmp_path / "plain" / "empty.text.npy").exists()


def test_the_scale_that_a_bare_file_does_not_say_is_said(cli: Cli, image_shards: Path, tmp_path: Path) -> None:
    """SDXL's is another, and nothing in the file tells them apart."""
    _, tensors = small("sd1")
    alone = {k.removeprefix(ldm_keys.VAE): t.clone() for k, t in tensors.items() if k.startswith(ldm_keys.VAE)}
    save_file(alone, tmp_path / "vae.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    line = f"{tmp_path}/vae.safetensors does not say its latents' scale: 0.18215 is taken"
    for name, notes in (("vae", 1), ("model", 0)):
        result = cli("encode", image_shards, "--vae", tmp_path / f"{name}.safetensors", "--out", tmp_path / name)
        assert (result.code, result.err.count(line)) == (0, notes), result.err
    (tmp_path / "vae.yaml").write_text("model: {params: {scale_factor: 0.13025}}")
    result = cli("encode", image_shards, "--vae", tmp_path / "vae.safetensors", "--out", tmp_path / "said")
    assert (result.code, "does not say" in result.err) == (0, False)
    encoder = Manifest.load(tmp_path / "said").encoder
    assert encoder is not None and encoder.scale == 0.13025


def test_foreign_tars_may_be_compressed(cli: Cli, vae_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for name, mode in (("a.tar", "w"), ("b.tar.gz", "w:gz"), ("c.tgz", "w:gz")):
        with tarfile.open(tmp_path / "tars" / name, mode) as tar:
            path = tmp_path / "x.png"
            path.write_bytes(encoded(smooth_picture(len(name), 16, 16)))
            tar.add(path, arcname="x.png")
    result = cli("encode", tmp_path / "tars", "--vae", vae_folder, "--size", 16, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert list(rows(tmp_path / "out")) == ["a_x", "b_x", "c_x"]


def test_a_full_disk_is_one_line_and_the_rest_of_the_work_goes_on_later(
    cli: Cli, vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = image_set(tmp_path / "images", [(16, 16)] * 7, per_shard=3)
    encode = ("encode", images, "--vae", vae_folder, "--size", 16, "--workers", 0)
    assert cli(*encode, "--out", tmp_path / "whole").code == 0
    failures = 0
    while True:
        left = [5]  # the fsync that fails: a unit or a shard needs fewer, so there is progress

        def full(fd: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        result = cli(*encode, "--out", tmp_path / "out")
        monkeypatch.undo()
        if result.code == 0:
            break
        assert "no space left on device while writing" in result.err
        failures += 1
    assert failures >= 3
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_the_next_unit_begins_before_the_last_has_ended(
    cli: Cli, vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that waits for nothing: a batch begins before the last is looked at, across units too."""
    with ShardWriter(tmp_path / "images", "images", max_samples=5) as writer:
        for number in range(15):
            record = json_bytes({"captions": [f"picture {number}"]})
            writer.write(f"{number:03d}", {"png": encoded(smooth_picture(number, 32, 32)), "json": record})
        writer.finish()
    seen: list[str] = []
    start, finish = Encoder.start, Encoder.finish
    monkeypatch.setattr(
        Encoder, "start", lambda self, batch: (seen.append(f"start {batch.samples[0].key}"), start(self, batch))[1]
    )
    monkeypatch.setattr(
        Encoder,
        "finish",
        lambda self, running: (seen.append(f"finish {running.batch.samples[0].key}"), finish(self, running))[1],
    )
    options = ["--vae", vae_folder, "--size", 32, "--batch", 3, "--workers", 0, "--out", tmp_path / "latents"]
    assert cli("encode", tmp_path / "images", *options).code == 0
    firsts = ["000", "003", "005", "008", "010", "013"]  # of batches of three and two pictures in each unit
    wanted = ["start 000"]
    for before, after in itertools.pairwise(firsts):
        wanted += [f"start {after}", f"finish {before}"]
    assert seen == [*wanted, "finish 013"]
    assert Manifest.load(tmp_path / "latents").samples == 15
    assert verify(tmp_path / "latents") == []


def test_a_missing_shard_stops_the_work_instead_of_emptying_it(cli: Cli, vae_folder: Path, tmp_path: Path) -> None:
    images = image_set(tmp_path / "images", [(16, 16)] * 9, per_shard=3)
    (images / "00001.tar").rename(tmp_path / "00001.tar")
    encode = ("encode", images, "--vae", vae_folder, "--size", 16, "--workers", 0, "--out", tmp_path / "out")
    result = cli(*encode)
    assert (result.code, "00001.tar is missing; restore it" in result.err) == (2, True)
    (tmp_path / "00001.tar").rename(images / "00001.tar")
    assert cli(*encode).code == 0
    assert len(rows(tmp_path / "out")) == 9


@pytest.mark.parametrize("fault", ["short index", "refused", "no answer"])
def test_a_shard_that_cannot_be_read_ends_the_work(
    cli: Cli, vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Its pictures are sound: set aside, they would be missing for good from a set that is then complete."""
    images = image_set(tmp_path / "images", [(16, 16)] * 9, per_shard=3)
    encode = ("encode", images, "--vae", vae_folder, "--size", 16, "--workers", 0, "--out", tmp_path / "out")
    tar, index = images / "00001.tar", images / "00001.index.npy"
    whole, opened, pread = index.read_bytes(), os.open, os.pread

    def refuse(path: Any, *args: Any, **options: Any) -> int:
        if path == tar:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *args, **options)

    def fail(fd: int, size: int, offset: int) -> bytes:
        if offset > 4096 and os.path.samestat(os.fstat(fd), tar.stat()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, size, offset)

    match fault:
        case "short index":
            index.write_bytes(whole[:-8])
            code, says = 2, f"{index} is no index"
        case "refused":
            monkeypatch.setattr(os, "open", refuse)
            code, says = 2, f"{tar}: Permission denied; choose another place or mend its permissions"
        case _:
            assert tar.stat().st_size > 8192
            monkeypatch.setattr(os, "pread", fail)
            code, says = 74, f"{tar}: Input/output error; start the same command again"
    result = cli(*encode)
    assert (result.code, says in result.err) == (code, True), result.err
    monkeypatch.undo()
    index.write_bytes(whole)
    assert cli(*encode).code == 0
    assert len(rows(tmp_path / "out")) == 9


def test_the_plan_holds_no_rejects_in_memory(tmp_path: Path) -> None:
    """Of a set of a billion links there are as many rejects as pictures."""
    work = Work(tmp_path, -1)
    for unit in range(40):
        tally = Tally(seen=2000, rejects=[[f"{unit:05d}.tar: {n:0100d}", "not a picture"] for n in range(2000)])
        work.publish(f"done/{unit:05d}.json", asdict(tally))
    tracemalloc.start()
    make_plan(work, [f"{unit:05d}.tar" for unit in range(40)], 100, lambda states: [])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (load_plan(work).rejects, load_plan(work).seen) == (80_000, 80_000)
    assert peak < 4 << 20
