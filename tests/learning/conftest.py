"""An autoencoder of drawn scenes, trained once and kept in pytest's cache: what the learning tests stand on."""

from __future__ import annotations

import fcntl
import hashlib
from pathlib import Path

import pytest

from data_tools import cli as data_tools
from finetune.autoencoder import train as first_stage
from tests.scenes import write_scenes

SIZE = 32  # pixels of the pictures that the autoencoder has seen
SCENES = 3000
SETTINGS = [
    "experiment=emoji",
    "model.block_out_channels=[16,32]",  # f = 2: 16x16 latents of 32 px, sharp after two minutes
    "data.flip=false",
    "optim.lr=3e-3",
    "train.steps=1000",
    "train.global_batch=8",
    "train.threads=1",
    "checkpoint.every=500",
]


@pytest.fixture(scope="session")
def scene_vae(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """The folder of an `AutoencoderKL` that takes 32 px scenes to 16x16 latents of 4 channels and back."""
    scenes = Path(write_scenes.__code__.co_filename).read_bytes()
    key = hashlib.sha256(scenes + repr((SIZE, SCENES, SETTINGS)).encode()).hexdigest()[:12]
    cache = getattr(pytestconfig, "cache", None)  # none under `-p no:cacheprovider`
    kept = (tmp_path_factory.mktemp("kept") if cache is None else cache.mkdir("scene_vae")) / key
    kept.mkdir(exist_ok=True)
    with (kept / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in other processes wait for the one that trains
        if not (kept / "vae" / "config.json").is_file():
            folder = tmp_path_factory.mktemp("scenes")
            run("ingest", "folder", write_scenes(folder, SCENES, SIZE), "--out", folder / "shards")
            first_stage.main([*SETTINGS, "tracker=none", f"data.shards={folder / 'shards'}", f"run.dir={kept}"])
    return kept / "vae"


def encode(shards: Path, vae: Path, out: Path, *options: object) -> Path:
    """Latent shards of image shards."""
    run("encode", shards, "--vae", vae, "--out", out, *options)
    return out


def run(*arguments: object) -> None:
    """A `data-tools` command, in this process."""
    assert data_tools.main([str(argument) for argument in arguments]) in (0, None)
