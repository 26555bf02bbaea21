"""`finetune train --multirun`: which runs a sweep is, and that Slurm's jobs of it survive being stopped."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune import UserError
from finetune.config import Config, compose
from finetune.sweep import enumerate_points
from tests.conftest import ROOT, environment, metrics
from tests.launchers.cluster import Cluster
from tests.launchers.jobs import job_environment

# `finetune train --multirun ARGUMENTS` whose runs are not started but listed; the exit code of each is in CODES.
LISTING = """
import json, sys
from finetune import run_cli, sweep
from finetune.cli import main
codes = json.loads(sys.argv[1])
def call(command):
    print("RUN " + json.dumps(command), flush=True)
    return codes.pop(0)
sweep._call = call
run_cli(lambda: main(["train", "--multirun", *sys.argv[2:]]))
"""


def listing(codes: list[int], *words: str, **variables: str) -> tuple[int, list[list[str]], str]:
    """(exit code, command line of each run, stderr)."""
    done = subprocess.run(
        [sys.executable, "-c", LISTING, json.dumps(codes), "data.shards=latents", *words],
        cwd=ROOT, env={**environment(), **variables}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    lines = [line.removeprefix("RUN ") for line in done.stdout.splitlines() if line.startswith("RUN ")]
    return done.returncode, [json.loads(line) for line in lines], done.stderr


def test_a_sweep_is_every_combination_of_its_values() -> None:
    swept, points = enumerate_points(["optim.lr=1e-4,3e-5", "seed=range(0,2)", "adapter=full", "train.steps=3"])
    assert swept == ["optim.lr", "seed"]
    assert len(points) == 4
    settings = [compose("train", point, Config)[0] for point in points]
    assert [(each.optim.lr, each.seed) for each in settings] == [(1e-4, 0), (1e-4, 1), (3e-5, 0), (3e-5, 1)]
    assert {each.train.steps for each in settings} == {3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=1"], "nothing to sweep"),
        (["run.dir=a,b"], "run.dir holds the whole sweep"),
        (["optim.lr=interval(0,1)"], "a range without steps"),
        (["optim.lr=1e-4,3e-5,0.0001"], "names 0.0001 twice"),
    ],
)
def test_what_is_no_sweep_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        enumerate_points(words)


def test_each_point_trains_in_its_own_folder(tmp_path: Path) -> None:
    words = ["experiment=smoke", f"run.dir={tmp_path / 'a b'}", 'sample.prompts=["a, b","it\'s"]']
    words += ["model.unet.block_out_channels=[16,32]", "optim.lr=1e-3,1e-4", "data.shards=~/latents"]
    code, runs, err = listing([0, 0], *words, LDM_FINETUNE_PROCESSES="2")
    assert code == 0, err
    assert len(runs) == 2
    for rate, command in zip((1e-3, 1e-4), runs, strict=True):
        start = command.index("finetune.train")
        assert command[:start] == [
            sys.executable, "-m", "launchers.torchrun", "--standalone", "--nproc-per-node=2", "-m",
        ]  # fmt: skip
        config, _ = compose("train", command[start + 1 :], Config)
        assert config.optim.lr == rate
        assert config.run.dir == str(tmp_path / "a b" / f"optim.lr={rate}")
        assert config.run.name == f"smoke optim.lr={rate}"
        assert config.sample.prompts == ["a, b", "it's"]
        assert config.model.unet["block_out_channels"] == [16, 32]
        assert config.data.shards == str(Path("~/latents").expanduser())


def test_a_point_that_fails_is_named_and_the_others_run(tmp_path: Path) -> None:
    words = ["experiment=smoke", f"run.dir={tmp_path}", "seed=1,2,3"]
    code, runs, err = listing([0, 1, 0], *words)
    assert (code, len(runs)) == (2, 3)
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        f"error: {tmp_path}/seed=2 failed with exit code 1"
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seeed=1,2"], "unknown override 'seeed': did you mean 'seed'?"),
        (["optim.lr=1e-4,-1"], "optim.lr=-1.0 must be greater than 0"),
        (["seed=1,2", "hydra.launcher.partition=x"], "partition"),
        (["seed=1,2", "hydra/launcher=submitit_slurm"], "srun"),
        (["seed=1,2", "hydra/launcher=submitit_slurn"], "Could not find 'hydra/launcher/submitit_slurn'"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    code, runs, err = listing([], "experiment=smoke", f"run.dir={tmp_path}", *words, PATH=str(tmp_path))
    assert (code, runs) == (2, [])
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line and "pip install" not in line
    assert "Traceback" not in err


def test_a_sweep_is_not_started_on_each_rank(tmp_path: Path) -> None:
    words = ["experiment=smoke", "data.shards=x", f"run.dir={tmp_path}", "seed=1,2"]
    code, runs, err = listing([], *words, RANK="1", WORLD_SIZE="4")
    assert (code, runs) == (2, [])
    assert "leave torchrun or accelerate launch out, and set LDM_FINETUNE_PROCESSES=4" in err


def test_slurms_refusal_is_one_line(slurm: Cluster, tmp_path: Path) -> None:
    words = ["experiment=smoke", f"run.dir={tmp_path}", "seed=1,2", "hydra/launcher=submitit_slurm"]
    code, _, err = listing([], *words, "hydra.launcher.partition=nowhere", **slurm.environment)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and "invalid partition" in line
    assert "Traceback" not in err


@pytest.fixture
def settings(overrides: list[str]) -> list[str]:
    return [word for word in overrides if not word.startswith(("run.dir", "train.steps"))] + ["train.steps=100"]


@pytest.mark.slow
def test_slurms_jobs_of_a_sweep_are_stopped_requeued_and_go_on(
    slurm: Cluster, settings: list[str], tmp_path: Path
) -> None:
    """Two points through submitit; one is stopped in the middle. Both end as if alone."""
    folder = tmp_path / "sweep"
    words = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=main", "hydra.launcher.timeout_min=30"]
    words += [*settings, f"run.dir={folder}", "optim.lr=1e-3,1e-4", "checkpoint.every=50"]
    with (tmp_path / "out").open("wb") as out:
        sweep = subprocess.Popen(
            [sys.executable, "-m", "finetune", "train", "--multirun", *words],
            env=job_environment(slurm), cwd=ROOT, stdout=out, stderr=out,
        )  # fmt: skip
    run = folder / "optim.lr=0.001"
    try:
        deadline = time.monotonic() + 200
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_bytes().count(b"\n") < 20:
            assert time.monotonic() < deadline and sweep.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.1)
        (submitted,) = folder.glob(".submitit/*/*_0_submitted.pkl")
        number = submitted.name.partition("_submitted")[0]
        slurm.run("scancel", "--signal=USR1", number)
        assert sweep.wait(240) == 0, (tmp_path / "out").read_text()
    finally:
        sweep.kill()
    assert slurm.job(number)["Restarts"] == "1"
    for rate in (1e-3, 1e-4):
        lines = metrics(folder / f"optim.lr={rate}")
        assert [line["step"] for line in lines] == list(range(1, 101))
        assert {line["lr"] for line in lines[2:]} == {rate}
        assert (folder / f"optim.lr={rate}" / "checkpoints/step-00000100/trainer.json").exists()
    assert "going on from" in next(folder.glob(".submitit/*_0/*_0_log.out")).read_text()
