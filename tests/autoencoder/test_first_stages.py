"""Diffusion on the latents of each kind of first stage: shards, training, sampling, export."""

from __future__ import annotations

import io
import json
from contextlib import chdir, closing
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import VQModel
from PIL import Image

from data_tools.cli import main as data_tools
from finetune import UserError
from finetune.components import load_components
from finetune.data.shards import Manifest, ShardSet
from finetune.models.autoencoder import Pixels, decode, encode_moments, load_autoencoder
from tests.autoencoder.runs import arguments


def make(shards: Path, folder: Path) -> Path:
    """A tiny VQModel trained for a step, f = 2."""
    from finetune.autoencoder.train import main

    codebook = ("model.latent_channels=3", "model.codebook_size=24")
    main(arguments(shards, folder, *codebook, "train.steps=1", "data.size=16"))
    return folder / "vae"


def encode(shards: Path, latents: Path, vae: Path | str) -> None:
    words = ["encode", shards, "--vae", vae, "--size", 16, "--out", latents]
    assert data_tools([str(word) for word in words]) in (0, None)


def train(latents: Path, run: Path, *more: str) -> None:
    """Two steps of a tiny unconditional U-Net, with a sample grid."""
    from finetune.train import main

    words = ["experiment=small_unconditional", f"data.shards={latents}", f"run.dir={run}", "tracker=none"]
    words += ["train.steps=2", "train.global_batch=4", "checkpoint.every=1", "validation.every=2"]
    words += ["validation.samples=2", "sample.every=2", "sample.steps=2", "model.unet.block_out_channels=[16,32]"]
    main([*words, *more])


def drawn_by(model: Path, file: Path) -> np.ndarray:
    """A picture of a run or an export, uint8 [H, W, 3]."""
    from finetune import sample

    assert sample.main([str(model), "--steps", "2", "--seed", "1", "--out", str(file)]) == 0
    return np.asarray(Image.open(file))


def test_a_codebook_goes_from_pictures_to_samples(shards: Path, tmp_path: Path) -> None:
    from finetune import export

    vae = make(shards, tmp_path / "vq")
    latents, run, out = (tmp_path / name for name in ("latents", "run", "out"))
    encode(shards, latents, vae)
    encoder = Manifest.load(latents).encoder
    assert encoder is not None and (encoder.channels, encoder.downsample) == (3, 2)
    model = load_autoencoder(vae)
    assert isinstance(model, VQModel) and encoder.scale == pytest.approx(model.config.scaling_factor)
    moments = np.empty((1, 6, 8, 8), np.float16)
    with closing(ShardSet.open(latents)) as held, closing(ShardSet.open(shards)) as pictures:
        key = "001"  # of 16 x 16 pixels
        held.read_latents([next(i for i in range(len(held)) if held.key(i) == key)], moments)
        row = next(i for i in range(len(pictures)) if pictures.key(i) == key)
        (tmp_path / "a.png").write_bytes(pictures.read_member(row, "png"))
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)[None] / 127.5 - 1
    assert not moments[0, 3:].any()
    np.testing.assert_allclose(moments, encode_moments(model, picture).numpy(), atol=2e-3)

    train(latents, run)
    assert list((run / "samples").glob("*.png"))
    drawn = drawn_by(run, tmp_path / "drawn.png")
    assert drawn.shape == (16, 16, 3)

    assert export.main([str(run), "--format", "diffusers", "--out", str(out)]) == 0
    assert isinstance(load_components(out).vae, VQModel)
    np.testing.assert_array_equal(drawn_by(out, tmp_path / "again.png"), drawn)
    with pytest.raises(UserError, match="is a VQModel, which no reader of such files expects"):
        export.main([str(run), "--format", "single-file", "--out", str(tmp_path / "a.safetensors")])

    # Its decoder may be another, its encoder not.
    other = load_autoencoder(vae)
    other.encoder.conv_in.weight += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="wrong VAE"):
        train(latents, tmp_path / "wrong", f"model.vae={tmp_path / 'other'}")
    assert json.loads((latents / "manifest.json").read_text())["encoder"]["scale"] == encoder.scale


def test_pixels_go_from_pictures_to_samples(shards: Path, tmp_path: Path) -> None:
    """Without an autoencoder: f = 1, three channels, scale 1, and float16 keeps every grey level."""
    from finetune import export

    latents, run, out = (tmp_path / name for name in ("latents", "run", "out"))
    (tmp_path / "none").mkdir()  # a folder of that name is not meant
    with chdir(tmp_path):
        encode(shards, latents, "none")
    manifest = Manifest.load(latents)
    encoder = manifest.encoder
    assert encoder is not None
    assert (encoder.source, encoder.channels, encoder.downsample, encoder.scale) == ("none", 3, 1, 1.0)
    assert encoder.locate(latents) == "none"
    moments = np.empty((manifest.samples, 6, 16, 16), np.float16)
    with closing(ShardSet.open(latents)) as held, closing(ShardSet.open(shards)) as pictures:
        held.read_latents(list(range(manifest.samples)), moments)
        keys = {held.key(row): row for row in range(manifest.samples)}
        compared = 0
        for row in range(len(pictures)):
            with Image.open(io.BytesIO(pictures.read_member(row, "png"))) as picture:
                pixels = np.array(picture)
            if pixels.shape[:2] == (16, 16):
                mean = torch.from_numpy(moments[keys[pictures.key(row)], :3])[None]
                exact = decode(Pixels(), mean)[0].add(1).mul(127.5).permute(1, 2, 0).numpy()
                assert np.abs(exact - pixels).max() < 0.1  # grey levels
                compared += 1
    assert compared == 20
    assert not moments[:, 3:].any()

    assert data_tools(["verify", str(latents)]) in (0, None)
    train(latents, run)
    assert list((run / "samples").glob("*.png"))
    drawn = drawn_by(run, tmp_path / "drawn.png")
    assert drawn.shape == (16, 16, 3)
    assert data_tools(["preview", str(latents), "--count", "2", "--out", str(tmp_path / "sheet.png")]) in (0, None)

    assert export.main([str(run), "--format", "diffusers", "--out", str(out)]) == 0
    assert isinstance(load_components(out).vae, Pixels)
    np.testing.assert_array_equal(drawn_by(out, tmp_path / "again.png"), drawn)


def test_pixels_cannot_be_mistaken_for_latents(shards: Path, tmp_path: Path) -> None:
    from finetune.autoencoder.train import main

    encode(shards, tmp_path / "latents", "none")
    with pytest.raises(UserError, match="wrong VAE"):
        train(tmp_path / "latents", tmp_path / "run", f"model.vae={make(shards, tmp_path / 'vq')}")
    with pytest.raises(UserError, match="model.pretrained=none are pixels without an autoencoder"):
        main(arguments(shards, tmp_path / "run-2", "model.pretrained=none"))


def test_pixels_of_any_dtype_stay_exact() -> None:
    """`encode --dtype bfloat16` does not round them."""
    every = torch.arange(256.0).view(1, 1, 16, 16).expand(1, 3, 16, 16) / 127.5 - 1
    pixels = load_autoencoder("none", dtype=torch.bfloat16).to(torch.bfloat16)
    mean, std = encode_moments(pixels, every).chunk(2, dim=1)
    assert torch.equal(mean, every)
    assert not std.any()
    assert torch.equal(decode(pixels, 2 * every), (2 * every).clamp(-1, 1))
