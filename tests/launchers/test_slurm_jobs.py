"""The sbatch file under a real Slurm: two nodes train, and whatever happens the run ends the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import metrics
from tests.launchers.cluster import Cluster
from tests.launchers.jobs import Job

STEPS = 120
SETTINGS = [f"train.steps={STEPS}", "checkpoint.every=40", "checkpoint.keep=9", "tracker=wandb"]
# An override as people write them: spaces, both quotes, a bracket and a comma must reach the run.
PROMPTS = 'sample.prompts=["a \\"red\\" apple, please","it\'s $HOME"]'


def same_checkpoints(one: Path, other: Path) -> None:
    """The last checkpoints hold the same bits: weights, EMA, moments."""
    last = f"checkpoints/step-{STEPS:08d}"
    names = sorted(str(path.relative_to(one / last)) for path in (one / last).rglob("*.safetensors"))
    assert {name.split("/")[0] for name in names} == {"weights", "ema", "optimizer"}
    for name in names:
        left, right = load_file(one / last / name), load_file(other / last / name)
        assert left.keys() == right.keys()
        assert all(left[key].equal(right[key]) for key in left), name


def wandb_ids(run: Path) -> set[str]:
    """Ids of all W&B runs in a run folder."""
    return {path.name.removesuffix(".wandb").removeprefix("run-") for path in run.rglob("wandb/*/run-*.wandb")}


@pytest.fixture(scope="module")
def settings(latents: Path) -> list[str]:
    return [
        "experiment=smoke",
        f"data.shards={latents}",
        "model.unet.block_out_channels=[16,32]",
        "model.unet.attention_head_dim=2",
        "validation.every=0",
        "sample.every=0",
        PROMPTS,
        *SETTINGS,
    ]


@pytest.fixture(scope="module")
def calm(slurm: Cluster, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job of two nodes that nothing disturbs."""
    job = Job.submit(slurm, tmp_path_factory.mktemp("jobs") / "calm", settings, "--nodes=2")
    assert job.end() == "COMPLETED", job.text()
    return job


def test_two_nodes_train_as_one_run(calm: Job) -> None:
    import yaml

    assert [line["step"] for line in metrics(calm.run)] == list(range(1, STEPS + 1))
    config = yaml.safe_load((calm.run / "config.yaml").read_text())
    assert config["sample"]["prompts"] == ['a "red" apple, please', "it's $HOME"]
    assert calm.state()["ExitCode"] == "0:0"
    assert "srun: error" not in calm.text()


def test_killed_then_stopped_then_requeued_ends_bit_identical(
    slurm: Cluster, calm: Job, settings: list[str], tmp_path: Path
) -> None:
    """A worker dies (tried again in the allocation), then SIGUSR1 (saved and requeued): the calm run's bits."""
    job = Job.submit(slurm, tmp_path / "rough", settings, "--nodes=2")
    job.until_line(50)
    first = job.workers()
    assert sorted(first) == [0, 1]
    first[1].kill()
    job.until(lambda: "trying again" in job.text(), "second try")
    job.until_line(60)
    slurm.run("scancel", "--signal=USR1", job.number)
    job.until(lambda: job.state()["Restarts"] == "1", "requeue")
    assert 60 <= job.lines() < STEPS
    assert job.end() == "COMPLETED", job.text()
    assert "rank 1 on" in job.text() and "SIGKILL" in job.text()
    assert job.text().count("requeued; goes on") == 1
    assert metrics(job.run) == metrics(calm.run)
    same_checkpoints(job.run, calm.run)
    assert len(wandb_ids(job.run)) == 1 and len(list(job.run.glob("wandb/offline-run-*"))) == 3


def test_a_mistake_is_not_tried_again(slurm: Cluster, settings: list[str], tmp_path: Path) -> None:
    job = Job.submit(slurm, tmp_path / "run", [*settings, "data.shards=/nowhere"], "--nodes=1")
    assert job.end() == "FAILED"
    assert job.state()["ExitCode"] == "2:0"
    assert "/nowhere" in job.text()
    assert "trying again" not in job.text() and "requeued" not in job.text()
