"""The sbatch file under a real Slurm: two nodes train, and whatever happens the run ends the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT, metrics
from tests.launchers.cluster import NODES, Cluster
from tests.launchers.jobs import Job, job_environment

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
    """A job of two nodes that nothing disturbs, submitted and followed by `python -m launchers.slurm`."""
    run = tmp_path_factory.mktemp("jobs") / "calm"
    words = ["nodes=2", "processes=1", "time=30", "--", *settings, f"run.dir={run}"]
    environ = job_environment(slurm)
    followed = subprocess.run(
        [sys.executable, "-m", "launchers.slurm", *words],
        cwd=ROOT, env=environ, capture_output=True, text=True, errors="replace", timeout=560, check=False,
    )  # fmt: skip
    assert followed.returncode == 0, (followed.stdout[-3000:], followed.stderr)
    number = followed.stdout.split(":")[0].removeprefix("job ")
    job = Job(slurm, number, run, run / f"slurm-{number}.log", environ)
    assert followed.stdout.splitlines()[0] == f"job {number}: log in {job.log}"
    assert job.text() and job.text() in followed.stdout.replace(f"job {number}: runs on node[1-2]\n", "")
    return job


@pytest.mark.timeout(600)
def test_two_nodes_train_as_one_run(calm: Job) -> None:
    import yaml

    assert [line["step"] for line in metrics(calm.run)] == list(range(1, STEPS + 1))
    config = yaml.safe_load((calm.run / "config.yaml").read_text())
    assert config["sample"]["prompts"] == ['a "red" apple, please', "it's $HOME"]
    assert (calm.state()["JobState"], calm.state()["ExitCode"]) == ("COMPLETED", "0:0")
    assert "srun: error" not in calm.text()
    assert b"| 120/120 [" in calm.log.read_bytes() and calm.log.read_bytes().isascii()


@pytest.mark.slow
@pytest.mark.timeout(600)
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
    job = Job.submit(slurm, tmp_path / "run", [*settings, "train.stepz=3"], "--nodes=2")
    assert job.end() == "FAILED"
    assert job.state()["ExitCode"] == "2:0"
    assert "did you mean 'train.steps'?" in job.text()
    assert "trying again" not in job.text() and "requeued" not in job.text()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_doctor_examines_the_nodes_once(slurm: Cluster, settings: list[str], tmp_path: Path) -> None:
    """A launch that is well and one without data, at once: the table, its exit code, and nothing else."""
    cases = (("well", "tracker=none", 0), ("ill", f"data.shards={tmp_path / 'none'}", 1))
    launcher = [
        sys.executable,
        "-m",
        "launchers.slurm",
        "nodes=2",
        "processes=1",
        "time=24:00:00",
        "--doctor",
        "--",
    ]
    followers = [
        subprocess.Popen(
            [*launcher, *settings, f"run.dir={tmp_path / name}", more],
            cwd=ROOT, env=job_environment(slurm), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for name, more, _ in cases
    ]  # fmt: skip
    for follower, (name, _, code) in zip(followers, cases, strict=True):
        said, _ = follower.communicate(timeout=240)
        assert follower.returncode == code, said
        assert f"the doctor has ended with exit code {code}" in said
        assert "ok      ranks          2 of 2" in said
        assert ("FAIL    data" in said) == (code == 1)
        assert "trying again" not in said and "requeued" not in said
        number = said.partition("job ")[2].partition(":")[0]
        state = slurm.job(number)
        assert (state["Restarts"], state["Requeue"], state["TimeLimit"]) == ("0", "0", "00:30:00")
        assert [path.name for path in (tmp_path / name).iterdir()] == [f"slurm-{number}.log"]


# --- what the script does with its step's end: a stand-in for Python costs no time -----------------


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """Runs until told to stop: says so and exits as a node that has saved. After a requeue it is done.

    A signal to all processes may reach its `sleep` first, so it sleeps again. One that comes as bash forks is lost
    on the child: without the kill that `sleep` would go on, and hold the step's output for a minute.
    """
    path = tmp_path / "stand-in"
    path.write_text(
        "#!/bin/bash\n"
        "(( ${SLURM_RESTART_COUNT:-0} > 0 )) && exit 0\n"
        "trap 'echo told to stop; kill -KILL $! 2>/dev/null; exit 240' USR1 TERM\n"
        'echo "started: ${SLURM_GPUS_ON_NODE:-no} GPUs, ${SLURM_CPUS_PER_TASK:-no} CPUs, $*"\n'
        "while true; do sleep 300 & wait; done\n"
    )
    path.chmod(0o755)
    return path


def test_failures_are_tried_again_a_bounded_number_of_times(slurm: Cluster, tmp_path: Path) -> None:
    """Each try fails: two in each allocation, two allocations, then the failure's exit code."""
    job = Job.submit(
        slurm, tmp_path / "run", [], "--nodes=1",
        LDM_FINETUNE_PYTHON="/bin/false", LDM_FINETUNE_RETRIES="1", LDM_FINETUNE_REQUEUES="1",
    )  # fmt: skip
    assert job.end() == "FAILED"
    assert (job.state()["Restarts"], job.state()["ExitCode"]) == ("1", "1:0")
    assert job.text().count("srun: error") == 4
    assert job.text().count("trying again in") == 2


def test_what_the_job_was_given_reaches_each_node(slurm: Cluster, tmp_path: Path, stand_in: Path) -> None:
    job = Job.submit(
        slurm, tmp_path / "run", ["a=b c"], "--nodes=2", "--gpus-per-node=2", "--cpus-per-task=3",
        LDM_FINETUNE_PYTHON=str(stand_in),
    )  # fmt: skip
    line = f"started: 2 GPUs, 3 CPUs, -m launchers.slurm.node --attempt=0 -- a=b c run.dir={job.run}\n"
    job.until(lambda: job.text().count(line) == 2, "start on both nodes")
    slurm.run("scancel", job.number)
    assert job.end() == "CANCELLED"


def test_however_the_signal_is_sent_the_job_is_requeued(slurm: Cluster, tmp_path: Path, stand_in: Path) -> None:
    """To the steps, to the batch script, to both."""
    ways = (["--signal=USR1"], ["--signal=USR1", "--batch"], ["--signal=USR1", "--full"])
    variables = {"LDM_FINETUNE_PYTHON": str(stand_in)}
    jobs = [Job.submit(slurm, tmp_path / f"run{way}", [], "--nodes=2", **variables) for way in range(3)]
    for job, to in zip(jobs, ways, strict=True):
        job.until(lambda job=job: job.text().count("started: ") == 2, "start on both nodes")  # type: ignore[misc]
        slurm.run("scancel", *to, job.number)
    for job in jobs:
        assert job.end() == "COMPLETED"
        assert job.state()["Restarts"] == "1"
        assert job.text().count("told to stop") == 2
        assert "trying again" not in job.text()


def test_a_signal_between_two_tries_is_not_lost(slurm: Cluster, tmp_path: Path) -> None:
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/bash\n(( ${SLURM_RESTART_COUNT:-0} > 0 ))\n")
    failing.chmod(0o755)
    job = Job.submit(slurm, tmp_path / "run", [], LDM_FINETUNE_PYTHON=str(failing), LDM_FINETUNE_RETRY_SECONDS="60")
    job.until(lambda: "trying again in 60 s" in job.text(), "first failure")
    slurm.run("scancel", "--signal=USR1", "--batch", job.number)
    assert job.end(30) == "COMPLETED"
    assert job.state()["Restarts"] == "1"
    assert job.text().count("srun: error") == 1


def test_a_signal_that_a_node_cannot_hear_yet_is_not_lost(slurm: Cluster, tmp_path: Path) -> None:
    """It ends the node's Python before that has said what to do with it."""
    jobs = []
    for name in ("USR1", "TERM"):
        early = tmp_path / name
        early.write_text(f"#!/bin/bash\n(( ${{SLURM_RESTART_COUNT:-0}} > 0 )) && exit 0\nkill -{name} $$\n")
        early.chmod(0o755)
        jobs.append(Job.submit(slurm, tmp_path / f"run-{name}", [], LDM_FINETUNE_PYTHON=str(early)))
    for job in jobs:
        assert job.end() == "COMPLETED"
        assert job.state()["Restarts"] == "1"
        assert "trying again" not in job.text()


def test_a_job_that_a_signal_ends_at_each_start_is_not_requeued_for_ever(slurm: Cluster, tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    ended.write_text("#!/bin/bash\nkill -TERM $$\n")
    ended.chmod(0o755)
    # Slurm says nothing of restarts before the first, so that what is said here stays.
    job = Job.submit(slurm, tmp_path / "run", [], LDM_FINETUNE_PYTHON=str(ended), SLURM_RESTART_COUNT="10")
    assert job.end() == "FAILED"
    assert job.state()["Restarts"] == "0"
    assert "restarted 10 times: not requeued; submit the same command again" in job.text()


def test_a_cancelled_job_saves_and_does_not_rise_again(slurm: Cluster, tmp_path: Path, stand_in: Path) -> None:
    job = Job.submit(slurm, tmp_path / "run", [], "--nodes=2", LDM_FINETUNE_PYTHON=str(stand_in))
    job.until(lambda: job.text().count("started: ") == 2, "start on both nodes")
    slurm.run("scancel", job.number)
    assert job.end() == "CANCELLED"
    job.until(lambda: "Slurm is ending this job" in job.text(), "last word", 20)
    assert job.text().count("told to stop") == 2
    assert (job.state()["JobState"], job.state()["Restarts"]) == ("CANCELLED", "0")


def test_a_preempted_job_saves_within_its_grace_and_is_requeued(
    slurm: Cluster, tmp_path: Path, stand_in: Path
) -> None:
    """Slurm tells the steps alone, with SIGTERM; the job ends by itself, and has to ask for its requeue."""
    job = Job.submit(slurm, tmp_path / "run", [], "--nodes=2", "--exclusive", LDM_FINETUNE_PYTHON=str(stand_in))
    job.until(lambda: job.text().count("started: ") == 2, "start on both nodes")
    slurm.run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert job.end() == "COMPLETED", job.text()
    assert job.state()["Restarts"] == "1"
    assert job.text().count("told to stop") == 2


# --- the long ones: real training -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_preempted_training_ends_bit_identical(
    slurm: Cluster, calm: Job, settings: list[str], tmp_path: Path
) -> None:
    job = Job.submit(slurm, tmp_path / "run", settings, "--nodes=2", "--exclusive")
    job.until_line(30)
    slurm.run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert job.end() == "COMPLETED", job.text()
    assert job.state()["Restarts"] == "1"
    assert metrics(job.run) == metrics(calm.run)
    same_checkpoints(job.run, calm.run)
    assert len(wandb_ids(job.run)) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_lost_node_requeues_the_job(slurm: Cluster, calm: Job, settings: list[str], tmp_path: Path) -> None:
    """It ends with the calm run's bits, from the checkpoint before."""
    job = Job.submit(slurm, tmp_path / "run", settings, "--nodes=2", "--exclusive")
    job.until_line(50)
    slurm.lose(NODES[1])
    try:
        job.until(lambda: job.state()["Restarts"] == "1", "requeue")
    finally:
        slurm.recover(NODES[1])
    assert job.end() == "COMPLETED", job.text()
    assert "DUE TO NODE FAILURE" in job.text()
    assert metrics(job.run) == metrics(calm.run)
    same_checkpoints(job.run, calm.run)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_goes_on_past_its_time_limit(slurm: Cluster, settings: list[str], tmp_path: Path) -> None:
    """Slurm warns up to a minute before the time that was asked for."""
    steps = [*settings, "train.steps=1000000", "checkpoint.every=1000000", "checkpoint.keep=1"]
    job = Job.submit(slurm, tmp_path / "run", steps, "--nodes=2", "--time=4", "--signal=B:USR1@60")
    job.until(lambda: job.state()["Restarts"] == "1", "requeue before the limit", 400)
    assert "stopped by SIGUSR1" in job.text()
    done = job.lines()
    assert done > 0
    job.until_line(done + 5)
    slurm.run("scancel", job.number)
    assert f"step-{done:08d}" in job.text().partition("going on from")[2].splitlines()[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_was_not_warned_is_requeued_after_its_time_limit(
    slurm: Cluster, tmp_path: Path, stand_in: Path
) -> None:
    job = Job.submit(slurm, tmp_path / "run", [], "--time=1", "--signal=CONT@1", LDM_FINETUNE_PYTHON=str(stand_in))
    assert job.end(300) == "COMPLETED", job.text()
    assert job.state()["Restarts"] == "1"
    assert "told to stop" in job.text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_is_always_warned_at_its_start_ends(slurm: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "stand-in"
    path.write_text("#!/bin/bash\ntrap 'kill -KILL $!; exit 240' USR1 TERM\nsleep 100 & wait\n")
    path.chmod(0o755)
    job = Job.submit(slurm, tmp_path / "run", [], "--time=1", "--signal=B:USR1@60", LDM_FINETUNE_PYTHON=str(path))
    assert job.end(600) == "FAILED", job.text()
    assert (job.state()["Restarts"], job.state()["ExitCode"]) == ("3", "75:0")
    assert "give the job more time" in job.text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_allocation_comes_back_smaller(slurm: Cluster, calm: Job, settings: list[str], tmp_path: Path) -> None:
    """Two nodes, then one: the loss goes on as the undisturbed run's."""
    job = Job.submit(slurm, tmp_path / "run", settings, "--nodes=2")
    job.until_line(30)
    slurm.run("scontrol", "update", f"nodename={NODES[1]}", "state=drain", "reason=test")
    try:
        slurm.run("scancel", "--signal=USR1", job.number)
        job.until(lambda: job.state()["JobState"] == "PENDING", "the requeue", 120)
        slurm.run("scontrol", "update", f"jobid={job.number}", "NumNodes=1", "NumTasks=1")
        assert job.end() == "COMPLETED", job.text()
    finally:
        slurm.run("scontrol", "update", f"nodename={NODES[1]}", "state=resume")
    assert job.text().count("slurm job") and "2 node(s)" in job.text() and "1 node(s)" in job.text()
    ours, theirs = metrics(job.run), metrics(calm.run)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-4)
