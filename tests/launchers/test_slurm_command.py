"""`python -m launchers.slurm`: what it refuses, what it would submit, and what it does with a real queue."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import UserError, run_cli
from launchers.slurm import command, node, queue, settings
from launchers.slurm.queue import Node, Partition
from tests.conftest import ROOT
from tests.launchers.cluster import Cluster
from tests.launchers.jobs import job_environment

RUN = ["--", "experiment=smoke", "data.shards=/data/latents", "run.dir=/work/run"]  # global_batch is 8
DAY = 86_400
A100 = Node("gpu1", 64, 2**40, {"a100": 8}, frozenset())
HERE = [
    Partition("long", 2 * DAY, None, [A100, A100, Node("old", 32, 2**38, {"v100": 4}, frozenset())]),
    Partition("debug", 1800, 1, [A100, A100]),
]


@pytest.fixture
def launch(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`launch("nodes=2", ...)` is `python -m launchers.slurm nodes=2 ...` in this process: code, stdout, stderr."""

    def run(*argv: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run_cli(lambda: command.main(argv))
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("24:00:00", DAY),
        ("2-0", 2 * DAY),
        ("2-12:30", 2 * DAY + 12 * 3600 + 1800),
        ("1-1:1:1", DAY + 3661),
        ("unlimited", None),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int | None) -> None:
    assert settings.limit_seconds(text) == seconds


@pytest.mark.parametrize(
    ("gres", "counts"),
    [
        ("gpu:a100:8(S:0-1)", {"a100": 8}),
        ("gpu:8", {"": 8}),
        ("craynetwork:4,gpu:h100:4(S:0),gpu:a100:2", {"h100": 4, "a100": 2}),
        ("gpu", {"": 1}),
        ("(null)", {}),
        ("shard:gpu:4", {}),
    ],
)
def test_gpus_are_read_from_what_sinfo_says(gres: str, counts: dict[str, int]) -> None:
    assert queue.gpus_in(gres) == counts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nodes=0 gpus=1", "nodes=0 must be a number from 1"),
        ("nodes=4-2 gpus=1", "nodes=4-2 ends below its start"),
        ("nodes=two gpus=1", "nodes=two must be a number from 1"),
        ("nodes=2", "say gpus=N"),
        ("gpus=-1", "gpus=-1 must be a number from 0"),
        ("gpus=1 processes=2", "a process has one GPU"),
        ("gpu=1", "unknown setting 'gpu': did you mean 'gpus'?"),
        ("gpus=1 train.steps=5", "unknown setting 'train.steps': overrides of the run come after --"),
        ("gpus=1 gpus=2", "gpus is given twice, as 1 and 2"),
        ("gpus=1 time=24h", "time=24h is not a time limit"),
        ("gpus=1 time=24:00 signal=1400", "time=24:00 and signal=1400 leaves 40 s"),
        ("gpus=1 time=0", "time=0 leaves no time"),
        ("gpus=1 time=1", "time=1 leaves 48 s before the run is told to stop"),
        ("gpus=1 time=10 signal=600", "time=10 and signal=600 leaves 0 s"),
        ("gpus=1 mem=lots", "mem=lots is not an amount of memory"),
        ("gpus=1 sbatch.nodes=3", "say nodes=..."),
        ("gpus=1 sbatch.wrap=x", "the launcher sets that itself"),
        ("gpus=1 sbatch.partition=long", "say partition=..."),
        ("gpus=1 sbatch.cpus-per-task=8", "say cpus=..."),
        ("gpus=a100:", "gpus=a100: must be a number from 0, or TYPE:N"),
        ("gpus=1 experiment=smoke", "unknown setting 'experiment': overrides of the run come after --"),
        ("gpus=1 --dryrun", "unknown option --dryrun"),
        ("gpus=3", "train.global_batch=8 cannot be shared by 3 GPUs: train.global_batch=9 is the nearest that can"),
        ("nodes=2-4 gpus=2", "by 3 nodes with 2 GPUs each: train.global_batch=24 is the smallest that can, with"),
        ("processes=16", "by 16 processes: train.global_batch=16 is the smallest that can; it needs a learning"),
        ("gpus=3 -- train.micro_batch=2", "train.global_batch=6 is the nearest that can"),
        ("nodes=1-3 gpus=1 -- train.global_batch=36 train.micro_batch=8", "1 processes): take train.micro_batch=6"),
        ("gpus=2 -- train.micro_batch=3", "train.micro_batch=3 does not divide the 4 samples of each process"),
        ("gpus=1 -- train.stepz=3", "unknown override 'train.stepz': did you mean 'train.steps'?"),
        ("gpus=1 -- --print", "unknown option --print after --"),
        ("nodes=1-64 gpus=1", "by 3 nodes with 1 GPUs each, and none up to 1000000 by any of 1-64 nodes: give one"),
        ("nodes=1-20000 gpus=1", "and none up to 1000000 by any of 1-20000 nodes: give one number"),
        ("gpus=2 -- optim.lr=-1", "optim.lr=-1.0 must be greater than 0"),
        ("gpus=2 -- optim=prodigy strategy=zero2", "optim=prodigy needs a sum over all weights"),
        ("gpus=2 -- adapter.rank=3", "adapter.rank=3 has no effect here: choose adapter=lora"),
        ("gpus=2 -- data.sources.a.weight=2 data.shards=null", "no value for data.sources.a.shards"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_in_one_line(
    launch: Callable[..., tuple[int, str, str]], no_slurm: None, words: str, message: str
) -> None:
    ours, _, theirs = words.partition(" -- ")
    code, out, err = launch(*ours.split(), "--dry-run", *RUN, *theirs.split())
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and message in err


@pytest.mark.parametrize("processes", [1, 3, 8])
@pytest.mark.parametrize("nodes", ["1", "4", "2-4"])
@pytest.mark.parametrize("micro", [None, 1, 3, 4])
@pytest.mark.parametrize("batch", [1, 4, 30, 97])
def test_the_value_that_a_refusal_names_works(nodes: str, processes: int, micro: int | None, batch: int) -> None:
    job = settings.read([f"nodes={nodes}", f"processes={processes}"])
    values = {"global_batch": batch, "micro_batch": micro}
    try:
        command.check_batch(job, **values)
    except UserError as refused:
        named = re.search(r": (?:take )?train\.(\w+)=(\d+)", str(refused))
        assert named is not None
        command.check_batch(job, **(values | {named[1]: int(named[2])}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gpus=8 partition=lung", "partition=lung is not known to Slurm: did you mean 'long'?"),
        ("gpus=16", "gpus=16 is more than any node of partition long has: 8 GPUs"),
        ("gpus=v100:8", "gpus=8 is more than any node of partition long has: 4 GPUs"),
        ("gpus=h100:8", "gpus=h100:8: no GPU of that type in partition long: it has a100, v100"),
        ("nodes=4 gpus=4", "nodes=4 is more than partition long has: 3"),
        ("nodes=3 gpus=8", "nodes=3: only 2 nodes of partition long have what each is to have"),
        ("nodes=2 gpus=8 partition=debug", "nodes=2 is more than a job may have in partition debug: 1"),
        ("gpus=8 time=3-00", "time=3-00 is more than partition long allows: 2-00:00:00"),
        ("gpus=8 partition=debug time=31", "time=31 is more than partition debug allows: 00:30:00"),
        ("gpus=8 cpus=65", "cpus=65 is more than any node of partition long has: 64 CPUs"),
        ("gpus=8 mem=2T", "mem=2T is more than any node of partition long has: 1024 GiB"),
    ],
)
def test_what_no_node_has_is_refused(words: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        queue.check(settings.read(words.split()), HERE, "long")
    assert str(refused.value) == message


@pytest.mark.parametrize(
    "words",
    [
        "nodes=2 gpus=8 time=2-00",
        "nodes=3 gpus=4",
        "nodes=2-9 gpus=8",
        "gpus=9 partition=long,debug",
        "processes=99",
    ],
)
def test_what_nodes_have_is_not_refused(words: str) -> None:
    queue.check(settings.read(words.split()), HERE, "long")
    queue.check(settings.read(words.split()), [], "")


# --- the command line -----------------------------------------------------------------------------


def test_a_dry_run_prints_the_command_and_changes_nothing(
    launch: Callable[..., tuple[int, str, str]], no_slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    prompts = 'sample.prompts=["a b","it\'s, 100%"]'
    overrides = ["experiment=smoke", "data.shards=my latents", prompts, "train.global_batch=192"]
    words = "nodes=2-4 gpus=a100:8 time=24:00:00 cpus=32 mem=480G account=me sbatch.mail-type=END sbatch.exclusive="
    code, out, err = launch(*words.split(), "--dry-run", "--", *overrides)
    assert code == 0
    line, _, script = out.partition("\n\n")
    assert script.partition("\n")[2] == command.SCRIPT.read_text()
    said = shlex.split(line)
    assert said[: said.index("sbatch")] == [
        f"LDM_FINETUNE_PYTHON={sys.executable}", "LDM_FINETUNE_RETRIES=3", "LDM_FINETUNE_REQUEUES=2",
    ]  # fmt: skip
    options = said[said.index("sbatch") + 1 : said.index(str(command.SCRIPT))]
    assert set(options) == {
        "--parsable", "--job-name=smoke", "--nodes=2-4", "--gpus-per-node=a100:8", "--cpus-per-task=32",
        "--mem=480G", "--time=24:00:00", "--signal=B:USR1@300", "--account=me", "--mail-type=END", "--exclusive",
        f"--output={tmp_path}/runs/smoke/slurm-%j.log", f"--chdir={tmp_path}", "--export=ALL",
    }  # fmt: skip
    given = said[said.index(str(command.SCRIPT)) + 1 :]
    assert given == [*overrides, f"run.dir={tmp_path}/runs/smoke", f'data.shards="{tmp_path}/my latents"']
    assert "secret-key" not in out + err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("time", "limit"), [("24:00:00", "30"), ("unlimited", "30"), ("20", "20"), ("", None)])
def test_the_doctor_has_the_runs_nodes_once(
    launch: Callable[..., tuple[int, str, str]], no_slurm: None, time: str, limit: str | None
) -> None:
    words = ["nodes=4", "gpus=2", *([f"time={time}"] if time else []), "--dry-run"]
    lines = [shlex.split(launch(*words, *more, *RUN)[1].partition("\n\n")[0]) for more in ([], ["--doctor"])]
    train, doctor = ({word for word in line if not word.startswith(("--time", "--signal"))} for line in lines)
    assert doctor - train == {"LDM_FINETUNE_MODULE=finetune.doctor", "--no-requeue", "--job-name=smoke-doctor"}
    assert train - doctor == {"--job-name=smoke"}
    assert [word for word in lines[1] if word.startswith("--time")] == ([f"--time={limit}"] if limit else [])


def test_a_job_is_warned_as_early_by_the_file_alone() -> None:
    assert f"#SBATCH --signal=B:USR1@{settings.WARNING_S}" in command.SCRIPT.read_text().splitlines()


def examples() -> list[str]:
    """The words after `python -m launchers.slurm` in what the help, train.sbatch and README's section show."""
    readme = (ROOT / "README.md").read_text().partition("## From one process to a cluster")[2].partition("\n## ")[0]
    script = re.sub(r"^# ?", "", command.SCRIPT.read_text(), flags=re.MULTILINE)
    whole = "\n".join([command.USAGE, script, readme]).replace("\\\n", " ")
    shown = re.findall(r"^ +python -m launchers\.slurm (.*)$", whole, re.MULTILINE)
    for options, overrides in re.findall(
        r"^ +sbatch (.*) launchers/slurm/train\.sbatch (.*)$", whole, re.MULTILINE
    ):
        shown.append(f"{options.replace('--', '').replace('gpus-per-node', 'gpus')} -- {overrides}")
    assert len(shown) >= 6
    return shown


@pytest.mark.parametrize("words", examples())
def test_what_is_shown_passes_the_checks(
    launch: Callable[..., tuple[int, str, str]], no_slurm: None, words: str
) -> None:
    ours, _, theirs = words.partition(" -- ")
    code, _, err = launch(*ours.split(), "--dry-run", "--", *theirs.split())
    assert (code, [line for line in err.splitlines() if not line.startswith("note: ")]) == (0, [])


def test_relative_paths_compose_to_the_absolute_ones() -> None:
    from finetune.config import Config, compose

    here = Path("/nowhere/with spaces")
    words = ["run.dir=runs/a b,c=[1]", "data.shards=über/{x}\"'"]
    config, _ = compose("train", words, Config)
    settled, notes = command.settle_paths(words, config, here)
    again, _ = compose("train", settled, Config)
    assert again.run.dir == str(here / "runs/a b,c=[1]")
    assert again.data.shards == str(here / "über/{x}\"'")
    assert len(notes) == 1 and "is not there on this machine" in notes[0]
    config, _ = compose("train", ["run.dir=/tmp/run"], Config)
    assert "each node's own" in command.settle_paths([], config, here)[1][0]
    config, _ = compose("train", ["data.shards=s3://bucket/x", "run.dir=/work/run"], Config)
    assert command.settle_paths([], config, here) == ([], [])
    pipe = "pipe:aws s3 cp s3:bucket/x/{} -"
    config, _ = compose("train", [f'data.sources.a.shards="{pipe}"', "run.dir=/work/run"], Config)
    assert command.settle_paths([], config, here) == ([], [])
    words = ["data.sources.a.shards=latents", "data.sources.b.shards=/nowhere/b", "run.dir=/work/run"]
    settled, notes = command.settle_paths(words, compose("train", words, Config)[0], here)
    again, _ = compose("train", settled, Config)
    assert again.data.sources["a"]["shards"] == str(here / "latents")
    assert [note.partition("=")[0] for note in notes] == ["data.sources.a.shards", "data.sources.b.shards"]


def test_a_controller_that_does_not_answer_at_once_is_asked_again(tmp_path: Path) -> None:
    """Stopped while it is started anew: the job was taken for one that Slurm ends, and never went on."""
    answers = "JobState=RUNNING Reason=None"
    (tmp_path / "scontrol").write_text(
        "#!/bin/bash\n"
        f"echo x >> {tmp_path}/asked\n"
        f"(( $(wc -l < {tmp_path}/asked) > 5 )) || exit 1\n"
        f'if [[ $1 == requeue ]]; then echo "$*" > {tmp_path}/requeued; else echo "{answers}"; fi\n'
    )
    (tmp_path / "srun").write_text("#!/bin/bash\nexit 240\n")  # has stopped, and saved
    (tmp_path / "sleep").write_text("#!/bin/bash\n")
    for name in ("scontrol", "srun", "sleep"):
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_SUBMIT_DIR": "/tmp"}
    ended = subprocess.run(
        ["bash", str(ROOT / "launchers/slurm/train.sbatch"), "experiment=smoke"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "LDM_FINETUNE_PYTHON": sys.executable, **job},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 75 and "requeued; goes on from the last checkpoint" in ended.stdout, ended
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_each_try_of_each_job_has_its_own_port() -> None:
    jobs = [
        {"SLURM_JOB_ID": str(number), "SLURM_RESTART_COUNT": str(restart)}
        for number in range(70_000, 70_100)
        for restart in range(3)
    ]
    ports = [node.port(job, attempt) for job in jobs for attempt in range(4)]
    assert len(set(ports)) == len(ports)
    assert min(ports) >= 1024 and max(ports) < 32_768


def test_a_node_starts_one_process_a_gpu() -> None:
    step = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_GPUS_ON_NODE": "4"}
    assert "--nproc-per-node=4" in node.command(step, 0, ["seed=1"])
    assert "--nproc-per-node=2" in node.command({**step, "LDM_FINETUNE_PROCESSES": "2"}, 0, [])
    assert node.command(step, 0, ["a=b c"])[-3:] == ["-m", "finetune.train", "a=b c"]
    assert node.command({**step, "LDM_FINETUNE_MODULE": "finetune.doctor"}, 0, ["a=b"])[-2:] == [
        "finetune.doctor",
        "a=b",
    ]
    with pytest.raises(UserError, match="4 tasks on 1 nodes"):
        node.command({**step, "SLURM_STEP_NUM_TASKS": "4"}, 0, [])
    with pytest.raises(UserError, match="start this through srun"):
        node.command({}, 0, [])


# --- a real queue ---------------------------------------------------------------------------------


def test_the_cluster_is_asked_for_its_partitions(slurm: Cluster) -> None:
    known, default = queue.partitions(slurm.environment)
    assert default == "main"
    assert {each.name: (each.limit, each.most_nodes, len(each.nodes)) for each in known} == {
        "main": (DAY, None, 2), "urgent": (3600, None, 2), "small": (1800, 1, 1),
    }  # fmt: skip
    assert known[0].nodes[0].gpus_of("") == 2 and known[0].nodes[0].cpus == 8


def test_slurms_refusal_is_one_line(
    slurm: Cluster, launch: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for key, value in slurm.environment.items():
        monkeypatch.setenv(key, value)
    code, out, err = launch("gpus=1", "sbatch.begin=never", *RUN[:-1], f"run.dir={tmp_path / 'run'}")
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert (code, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("error: Slurm refuses the job: ") and "never" in lines[0]


def test_ctrl_c_stops_following_and_not_the_job(slurm: Cluster, tmp_path: Path) -> None:
    words = ["processes=1", "sbatch.begin=now+1hour", *RUN[:-1], f"run.dir={tmp_path / 'run'}"]
    log = tmp_path / "out"
    with log.open("wb") as out:
        follower = subprocess.Popen(
            [sys.executable, "-m", "launchers.slurm", *words],
            env=job_environment(slurm),
            cwd=ROOT,
            stdout=out,
            # Tests that run in a shell's background inherit that Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        deadline = time.monotonic() + 60
        while b"waits (BeginTime)" not in log.read_bytes():
            assert time.monotonic() < deadline and follower.poll() is None, log.read_text()
            time.sleep(0.1)
        follower.send_signal(signal.SIGINT)
        assert follower.wait(30) == 130
    finally:
        follower.kill()
    number = log.read_text().partition("job ")[2].partition(":")[0]
    assert slurm.job(number)["JobState"] == "PENDING"
    assert f"scancel {number}" in log.read_text().splitlines()[-1]
    slurm.run("scancel", number)


def test_what_a_surrounding_job_left_is_not_passed_on() -> None:
    inside = {"SLURM_JOB_ID": "1", "SLURM_MEM_PER_NODE": "1", "SLURM_CONF": "x", "HOME": "y", "SBATCH_ACCOUNT": "z"}
    assert command.without_job(inside) == {"SLURM_CONF": "x", "HOME": "y", "SBATCH_ACCOUNT": "z"}
    assert os.environ.keys() >= command.without_job(os.environ).keys()
