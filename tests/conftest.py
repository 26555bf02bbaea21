"""A tiny Stable-Diffusion-shaped pipeline, latents made with its autoencoder, and ways to start runs."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: its kernels run on the CPU

import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = [f"a {colour} {thing}" for colour in ("red", "blue", "green", "gold") for thing in ("cat", "hat", "bus")]
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}


# What CI runs draws the same examples each time; `make test-full` goes on searching.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.register_profile("searching", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def logged_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is logged in to W&B, and nothing says how it is to run."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers directory: random weights, f = 4 autoencoder, a tokenizer that knows `CAPTIONS`."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    from finetune.models.text import build_text_encoder, train_tokenizer
    from finetune.models.unet import build_unet

    tokenizer = train_tokenizer(CAPTIONS, vocab_size=600, max_length=12)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.5,
    )
    folder = tmp_path_factory.mktemp("model") / "tiny"
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=build_text_encoder(tokenizer, hidden_size=16, layers=1, heads=2, seed=1),
        tokenizer=tokenizer,
        unet=build_unet(UNET, seed=2),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def latents(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 pictures of 32 px, encoded with the pipeline's autoencoder into shards of 40."""
    return write_latents(tmp_path_factory.mktemp("data") / "latents", pipeline)


def write_latents(folder: Path, source: Path, texts: Sequence[str] = CAPTIONS) -> Path:
    """96 pictures of 32 px as latents of `source`'s autoencoder, in shards of 40; two captions each, or none."""
    import torch

    from finetune.data.shards import LatentStats, ShardWriter, json_bytes, latent_bytes
    from finetune.latents import LatentSpace, RunningMoments
    from finetune.models.autoencoder import encode_moments, encoder_info, load_autoencoder

    vae = load_autoencoder(str(source))
    generator = torch.Generator().manual_seed(0)
    statistics = RunningMoments()
    with ShardWriter(folder, "latents", members=["latent.npy", "json"], max_samples=40) as writer:
        for index in range(96):
            colour = torch.rand(3, 1, 1, generator=generator) * 2 - 1
            image = (colour + 0.2 * torch.randn(3, 32, 32, generator=generator)).clamp(-1, 1)
            moments = encode_moments(vae, image[None])[0].numpy().astype(np.float16)
            statistics.add(moments[None])
            captions = [
                text for text in texts[index % max(1, len(texts)) :][:1] for text in (text, f"{text} on a table")
            ]
            members = {"latent.npy": latent_bytes(moments), "json": json_bytes({"captions": captions})}
            writer.write(f"{index:05d}", members, bucket=(32, 32))
        info = encoder_info(vae, str(source), folder)
        summary = statistics.summary(LatentSpace(info.scale, info.shift))
        writer.finish(encoder=info, latents=LatentStats(*summary))
    return folder


@pytest.fixture(scope="session")
def labelled(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of 32 px as latents, with all that any task reads."""
    import torch
    from PIL import Image

    from finetune.data.shards import LatentStats, ShardWriter, json_bytes, latent_bytes, write_classes
    from finetune.latents import LatentSpace, RunningMoments
    from finetune.models.autoencoder import encode_moments, encoder_info, load_autoencoder

    def png(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        return buffer.getvalue()

    folder = tmp_path_factory.mktemp("labelled") / "latents"
    vae = load_autoencoder(str(pipeline))
    draw = np.random.default_rng(0)
    statistics = RunningMoments()
    members = ["latent.npy", "json", "map.png", "hole.npy", "masked.npy", "lowres.png"]
    with ShardWriter(folder, "latents", members=members, max_samples=16) as writer:
        for index in range(24):
            pixels = draw.uniform(-1, 1, (3, 3, 32, 32)).astype(np.float32)
            moments = encode_moments(vae, torch.from_numpy(pixels)).numpy().astype(np.float16)
            statistics.add(moments[:1])
            sample = {
                "latent.npy": latent_bytes(moments[0]),
                "json": json_bytes(
                    {
                        "captions": [CAPTIONS[index % len(CAPTIONS)]],
                        "class": index % 3,
                        "boxes": [[index % 3, 0.1, 0.2, 0.6, 0.9]],
                        "original_size": [48, 40],
                        "crop": [2, 0, 32, 32],
                    }
                ),
                "map.png": png(draw.integers(0, 3, (32, 32), np.uint8)),
                "hole.npy": latent_bytes(draw.integers(0, 2, (2, 8, 8), np.uint8)),
                "masked.npy": latent_bytes(moments[1:]),
                "lowres.png": png(draw.integers(0, 256, (8, 8, 3), np.uint8)),
            }
            writer.write(f"{index:05d}", sample, bucket=(32, 32))
        info = encoder_info(vae, str(pipeline), folder)
        summary = statistics.summary(LatentSpace(info.scale, info.shift))
        manifest = writer.finish(encoder=info, latents=LatentStats(*summary))
    replace(manifest, classes=write_classes(folder, ["circle", "square", "triangle"])).save(folder)
    return folder


@pytest.fixture
def overrides(latents: Path, tmp_path: Path) -> list[str]:
    """A run of a few seconds; later overrides win."""
    return [
        "experiment=smoke",
        f"data.shards={latents}",
        f"run.dir={tmp_path / 'run'}",
        "tracker=none",
        "model.unet.block_out_channels=[16,32]",
        "model.unet.attention_head_dim=2",
        "train.steps=4",
        "checkpoint.every=2",
        "validation.every=0",
        "sample.every=0",
    ]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`command("train", ...)` runs `finetune train ...` in this process: exit code and the error line."""
    from finetune import run_cli
    from finetune.cli import main

    def run(*argv: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            run_cli(lambda: main(list(argv)))
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in err
        assert len(lines) == (ended.value.code in (2, 74))
        return int(ended.value.code or 0), "".join(lines)

    return run


def launch(processes: int, overrides: Sequence[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    """Start a run in several gloo processes with the committed accelerate file, and wait for it."""
    return subprocess.run(
        launch_command(processes, overrides),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        **settings,
    )


def launch_command(processes: int, overrides: Sequence[str]) -> list[str]:
    """The command line of `launch`; one process needs no launcher."""
    train = ["-m", "finetune.train", *overrides]
    if processes == 1:
        return [sys.executable, *train]
    file = ROOT / "launchers" / "accelerate" / "one_machine.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return [*launcher, "--num_processes", str(processes), "--main_process_port", "0", *train]


def environment() -> dict[str, str]:
    """One thread a process, no GPU, no network, and no W&B service of another process."""
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    return {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"} | quiet


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the clock on the wall."""
    timing = ("images_per_s", "data_wait_s", "memory_gib")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timing} for line in lines]
