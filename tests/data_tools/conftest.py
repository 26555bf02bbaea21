"""A command runner, a tiny autoencoder and pictures, shared by the tests of data_tools."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.cli import main
from finetune import run_cli


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`cli("verify", folder)` runs `data-tools verify FOLDER` as the console script would."""

    def run(*args: object) -> Result:
        with pytest.raises(SystemExit) as ended:
            run_cli(lambda: main([str(arg) for arg in args]))
        out, err = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        if code == 2:
            assert err.startswith("error: ")
            assert err.count("\n") == 1, err
        return Result(code, out, err)

    return run


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained AutoencoderKL: 4 latent channels, half the size."""
    import torch
    from diffusers import AutoencoderKL

    torch.set_num_threads(1)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
    )
    path = tmp_path_factory.mktemp("models") / "vae"
    vae.save_pretrained(path)
    return path


def smooth_picture(seed: int, height: int, width: int) -> Image.Image:
    """A random colour field without sharp edges: resampling changes it little."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six 32x32 pictures with sidecars, in two folders."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(6):
        path = folder / ("more" if number % 2 else "") / f"p{number}.png"
        path.write_bytes(encoded(smooth_picture(number, 32, 32)))
        path.with_suffix(".txt").write_text(f"picture {number}\n")
    return folder


@pytest.fixture
def image_shards(photos: Path, tmp_path: Path, cli: Callable[..., Result]) -> Path:
    """The photos as image shards."""
    assert cli("ingest", "folder", photos, "--out", tmp_path / "images").code == 0
    return tmp_path / "images"
