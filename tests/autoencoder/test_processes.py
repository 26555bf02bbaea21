"""The first stage on two gloo processes is that of one: losses, weights, both models, codebook, ZeRO, resume."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.autoencoder.train import main
from finetune.data.shards import Manifest
from tests.autoencoder.runs import arguments, assert_same_run, losses
from tests.conftest import ROOT, environment

# Rounding in the order of sums must stay rounding: Adam divides by the size of a gradient, were it rounding alone.
COMMON = ["train.steps=4", "checkpoint.every=2", "data.size=16", "optim.eps=1e-3", "optim.max_grad_norm=0.5"]
COMMON += ["loss.discriminator_weight=0.5", "loss.discriminator_layers=2", "loss.discriminator_width=8"]
COMMON += ["loss.discriminator_start=1"]
CODEBOOK = ["model.latent_channels=3", "model.codebook_size=24"]


def on_two(words: list[str]) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "-m", "finetune", "autoencoder", *words]
    env = environment() | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=180)


def assert_close_runs(one: Path, other: Path, step: int = 4) -> None:
    assert len(losses(one)) == len(losses(other)) == step
    for row, its in zip(losses(one), losses(other), strict=True):
        assert row == pytest.approx(its, rel=2e-5, abs=1e-6)
    folders = [run / "checkpoints" / f"step-{step:08d}" for run in (one, other)]
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors")) for folder in folders]
    assert files[0] == files[1] and len(files[0]) == 7  # weights, average, moments; the discriminator's
    for name in files[0]:
        a, b = (load_file(folder / name) for folder in folders)
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-6, msg=f"{name} {key}")


def rewound(run: Path, to: Path) -> Path:
    """A copy of a run of four steps as it was after two."""
    shutil.copytree(run, to)
    for gone in (to / "vae", to / "checkpoints/step-00000004"):
        shutil.rmtree(gone)
    return to


@pytest.fixture(scope="module")
def alone(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    main(arguments(shards, run, *COMMON))
    return run


@pytest.fixture(scope="module")
def together(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("together") / "run"
    done = on_two(arguments(shards, run, *COMMON))
    assert done.returncode == 0, done.stderr[-4000:]
    return run, done.stdout


def test_two_processes_train_what_one_does(alone: Path, together: tuple[Path, str]) -> None:
    run, said = together
    assert_close_runs(alone, run)
    assert said.count("2 processes") == said.count("held-out PSNR") == said.count("LPIPS is off") == 1
    ends = [json.loads((each / "metrics.jsonl").read_text().splitlines()[-1]) for each in (alone, run)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(
    shards: Path, alone: Path, together: tuple[Path, str], tmp_path: Path
) -> None:
    resumed = rewound(together[0], tmp_path / "run")
    main(arguments(shards, resumed, *COMMON))
    assert_close_runs(alone, resumed)


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped(shards: Path, alone: Path, tmp_path: Path) -> None:
    resumed = rewound(alone, tmp_path / "run")
    done = on_two(arguments(shards, resumed, *COMMON))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "resuming from" in done.stdout
    assert_close_runs(alone, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_zero_goes_on_from_data_parallelism_to_its_bits(
    shards: Path, together: tuple[Path, str], tmp_path: Path, strategy: str
) -> None:
    run = rewound(together[0], tmp_path / "run")
    done = on_two(arguments(shards, run, *COMMON, f"strategy={strategy}"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_run(run, together[0], 4, discriminator=True)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero3_offload"])
def test_data_parallelism_and_one_process_go_on_from_zero(
    shards: Path, alone: Path, together: tuple[Path, str], tmp_path: Path, strategy: str
) -> None:
    run = tmp_path / "run"
    done = on_two(arguments(shards, run, *COMMON, f"strategy={strategy}"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_run(run, together[0], 4, discriminator=True)
    ends = [json.loads((each / "metrics.jsonl").read_text().splitlines()[-1]) for each in (together[0], run)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)  # of the averaged weights, which were spread too
    two, one = rewound(run, tmp_path / "two"), rewound(run, tmp_path / "one")
    done = on_two(arguments(shards, two, *COMMON))
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_run(two, together[0], 4, discriminator=True)
    main(arguments(shards, one, *COMMON))
    assert_close_runs(alone, one)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_pictures_and_a_decoder_alone_are_those_of_data_parallelism(
    shards: Path, together: tuple[Path, str], tmp_path: Path, strategy: str
) -> None:
    words = [*COMMON, f"model.pretrained={together[0] / 'vae'}", "train.decoder_only=true", "sample.every=2"]
    runs = [tmp_path / "ddp", tmp_path / strategy]
    for run in runs:
        done = on_two(arguments(shards, run, *words, f"strategy={run.name}"))
        assert done.returncode == 0, done.stderr[-4000:]
    assert_same_run(runs[1], runs[0], 4, discriminator=True)
    (drawn,) = {path.name for path in (runs[0] / "samples").iterdir() if "00000002" in path.name}
    assert (runs[0] / "samples" / drawn).read_bytes() == (runs[1] / "samples" / drawn).read_bytes()


@pytest.mark.slow
def test_a_codebook_is_shared(shards: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    main(arguments(shards, one, *COMMON, *CODEBOOK))
    done = on_two(arguments(shards, two, *COMMON, *CODEBOOK))
    assert done.returncode == 0, done.stderr[-4000:]
    assert_close_runs(one, two)
    spread = tmp_path / "spread"
    done = on_two(arguments(shards, spread, *COMMON, *CODEBOOK, "strategy=zero3"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_run(spread, two, 4, discriminator=True)


@pytest.mark.slow
def test_a_batch_that_two_cannot_share_is_refused_in_one_line(shards: Path, tmp_path: Path) -> None:
    done = on_two(arguments(shards, tmp_path / "run", *COMMON, "train.global_batch=3"))
    assert done.returncode != 0
    line = "error: train.global_batch=3 cannot be shared equally by 2 processes; give a multiple"
    assert done.stderr.count(line) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_with_different_pictures_are_refused(shards: Path, tmp_path: Path) -> None:
    """As where a machine has an older copy on its own disk: the last shard is not there yet."""
    shutil.copytree(shards, tmp_path / "0")
    shutil.copytree(shards, tmp_path / "1")
    manifest = Manifest.load(shards)
    replace(manifest, shards=manifest.shards[:-1]).save(tmp_path / "1")
    done = on_two(arguments(tmp_path / "${oc.env:RANK}", tmp_path / "run", *COMMON))
    assert done.returncode != 0
    assert done.stderr.count("error: the processes read different data: ") == 1
    assert not (tmp_path / "run").exists()
