"""`python -m launchers.slurm`: check a run and its job, submit it, follow its log."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from finetune import UserError
from finetune.config import Config, compose, data_sources, quoted
from finetune.data.shards import is_remote
from launchers.slurm import queue
from launchers.slurm.settings import KEYS, Job, read

SCRIPT = Path(__file__).with_name("train.sbatch")

USAGE = """\
usage: python -m launchers.slurm [KEY=VALUE ...] [--doctor] [--dry-run] [--no-follow] -- OVERRIDES

Train under Slurm: checks the overrides and the job's size, submits the job and follows its log. The exit code is
the job's. Before the time limit, at preemption and at `scancel --signal=USR1 JOB` the run saves, is requeued and
goes on; after a failure it is tried again. With --doctor the same nodes are examined, before they have to train.

examples:
  python -m launchers.slurm nodes=4 gpus=8 time=24:00:00 -- experiment=sdxl_lora train.global_batch=32 \\
    optim.lr=3e-4 data.shards=LATENTS run.dir=RUN
  python -m launchers.slurm nodes=4 gpus=8 --doctor -- experiment=sd15_full data.shards=LATENTS run.dir=RUN
  python -m launchers.slurm nodes=2-4 gpus=a100:4 time=2-00 partition=long account=me -- experiment=sd15_full \\
    strategy=zero2 train.global_batch=192 optim.lr=3e-5 data.shards=LATENTS run.dir=RUN
  python -m launchers.slurm processes=2 time=30 --dry-run -- experiment=smoke data.shards=LATENTS run.dir=RUN

A global batch is shared by all processes, and is part of the training: the experiments' own are for one machine.

options:
  --doctor      run `finetune doctor` in place of training: once, for 30 minutes at most
  --dry-run     print the sbatch command line and the script, and submit nothing
  --no-follow   submit and leave
  -h, --help    this text

settings (KEY=VALUE):
"""
_DOCTOR_MINUTES = 30
_LARGEST_BATCH = 1_000_000
_NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")


def main(argv: Sequence[str]) -> int:
    """Check, submit and follow; the job's exit code.

    Raises:
        UserError: a setting or an override that can't work, or Slurm's refusal.
    """
    words, overrides = _split(list(argv))
    if any(word in ("-h", "--help") for word in words):
        width = max(map(len, KEYS))
        print(USAGE + "\n".join(f"  {key:<{width}}  {text}".rstrip() for key, text in KEYS.items()))
        return 0
    flags = {word for word in words if word.startswith("-")}
    if unknown := sorted(flags - {"--doctor", "--dry-run", "--no-follow"}):
        raise UserError(
            f"unknown option {unknown[0]}: settings are KEY=VALUE, see python -m launchers.slurm --help"
        )
    job = read([word for word in words if word not in flags])
    if unknown := [word for word in overrides if word.startswith("-")]:
        raise UserError(f"unknown option {unknown[0]} after --: overrides are KEY=VALUE, see finetune train --help")
    config, _ = compose("train", overrides, Config)
    check_batch(job, config.train.global_batch, config.train.micro_batch)
    from finetune import build  # it loads torch and diffusers, which --help does without

    build.check(config)
    overrides, notes = settle_paths(overrides, config, Path.cwd())
    environ = without_job(os.environ)
    known, default = queue.partitions(environ)
    queue.check(job, known, default)
    run = Path(config.run.dir).absolute()
    folder = Path(job.log).absolute() if job.log else run
    name, variables = job.name or config.run.name, settings(job)
    if "--doctor" in flags:
        job, name = examining(job), f"{name}-doctor"
        variables["LDM_FINETUNE_MODULE"] = "finetune.doctor"
    line = command(job, overrides, folder, name)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if "--dry-run" in flags:
        shown = " ".join(f"{key}={shlex.quote(value)}" for key, value in variables.items())
        print(f"{shown} {shlex.join(line)}\n\n# {SCRIPT}\n{SCRIPT.read_text()}", end="")
        return 0
    for made in {run, folder}:
        try:
            made.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the folder {made} ({error.strerror}); choose another run.dir or log"
            ) from None
    for key in ("LDM_FINETUNE_PROCESSES", "LDM_FINETUNE_MODULE"):  # the job says it
        environ.pop(key, None)
    number = queue.submit(line, {**environ, **variables})
    log = folder / f"slurm-{number}.log"
    print(f"job {number}: log in {log}", flush=True)
    if "--no-follow" in flags:
        return 0
    try:
        return queue.follow(number, log, environ, _write)
    except KeyboardInterrupt:
        print(
            f"\njob {number} goes on. To look: tail -f {shlex.quote(str(log))}; to end it: scancel {number}; "
            f"to save and requeue it: scancel --signal=USR1 {number}",
            flush=True,
        )
        return 130


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def check_batch(job: Job, global_batch: int, micro_batch: int | None) -> None:
    """Refuse a global batch that can't be shared by the processes of every number of nodes that the job may get.

    Raises:
        UserError: names the numbers, and values that work.
    """
    counts = range(job.nodes[0], job.nodes[1] + 1)
    sizes = range(counts.start * job.processes, counts.stop * job.processes, job.processes)
    for nodes, size in zip(counts, sizes, strict=True):
        kind = "GPUs" if job.gpus else "processes"
        many = f"{nodes} nodes with {job.processes} {kind} each" if nodes > 1 else f"{job.processes} {kind}"
        if global_batch % size or global_batch < size:
            said = f"train.global_batch={global_batch} cannot be shared by {many}"
            every, single = "", ""
            if len(sizes) > 1:
                every = f", with any of {_range(job)} nodes"
                single = f"; or give one number of nodes in place of nodes={_range(job)}"
            least = _least_batch(sizes)
            if len(sizes) > 1 and least > _LARGEST_BATCH:
                raise UserError(
                    f"{said}, and none up to {_LARGEST_BATCH} by any of {_range(job)} nodes: give one number of "
                    f"nodes in place of nodes={_range(job)}, or a shorter range"
                )
            works = _nearest_batch(sizes, least, global_batch, micro_batch)
            what = "the smallest" if works == least > global_batch else "the nearest"
            raise UserError(
                f"{said}: train.global_batch={works} is {what} that can{every}; it needs a learning rate of its "
                f"own (optim.lr){single}"
            )
    shares = {nodes: global_batch // size for nodes, size in zip(counts, sizes, strict=True)}
    for nodes, share in shares.items():
        if micro_batch and share % min(micro_batch, share):
            fits = max(each for each in range(1, micro_batch + 1) if math.gcd(*shares.values()) % each == 0)
            raise UserError(
                f"train.micro_batch={micro_batch} does not divide the {share} samples of each process "
                f"(train.global_batch={global_batch} over {nodes * job.processes} processes): take "
                f"train.micro_batch={fits}"
            )


def _least_batch(sizes: Sequence[int]) -> int:
    """The smallest global batch that all of `sizes` can share, unless that is beyond reason."""
    least = 1
    for size in sizes:
        least = math.lcm(least, size)
        if least > _LARGEST_BATCH:  # of 1 to 100 nodes it has 41 digits
            break
    return least


def _nearest_batch(sizes: Sequence[int], least: int, wanted: int, micro_batch: int | None) -> int:
    """The multiple of `least` nearest to `wanted` that each number of processes can share by micro-batches."""
    micro = micro_batch or 1

    def works(batch: int) -> bool:
        return all((share := batch // size) % min(micro, share) == 0 for size in sizes)

    near = max(wanted // least, 1)  # every `micro`-th multiple works
    found = [count * least for count in range(max(near - micro, 1), near + micro + 2) if works(count * least)]
    return min(found, key=lambda batch: (abs(batch - wanted), batch))


def settle_paths(overrides: Sequence[str], config: Config, here: Path) -> tuple[list[str], list[str]]:
    """Overrides in which the folders of run and shards are absolute, and what is worth knowing about them."""
    settled, notes = list(overrides), []
    folders = {"run.dir": config.run.dir}
    for name, source in data_sources(asdict(config.data)).items():
        folders[name if "." in name else f"data.sources.{name}.shards"] = source["shards"]
    for key, value in folders.items():
        if is_remote(value) or "://" in value:
            continue
        path = Path(value)
        if not path.is_absolute():
            path = here / path
            settled.append(f"{key}={_quoted(os.path.normpath(path))}")
        if any(path.is_relative_to(place) for place in _NODE_LOCAL):
            notes.append(f"{key}={path}: such a folder is usually each node's own; all nodes must see the same one")
        elif key != "run.dir" and not path.exists():
            notes.append(f"{key}={path} is not there on this machine; the nodes must see it")
    return settled, notes


def _quoted(value: str) -> str:
    """A value as an override says it."""
    if re.fullmatch(r"[A-Za-z0-9_./-]+", value):
        return value
    return quoted(value)


def command(job: Job, overrides: Sequence[str], folder: Path, name: str) -> list[str]:
    """The sbatch command line."""
    options = {
        "job-name": name,
        "nodes": _range(job),
        "gpus-per-node": (f"{job.gpu_type}:" if job.gpu_type else "") + str(job.gpus) if job.gpus else "",
        "cpus-per-task": str(job.cpus or ""),
        "mem": job.mem,
        "time": job.time,
        "signal": f"B:USR1@{job.warning}",
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "constraint": job.constraint,
        "output": str(folder).replace("%", "%%") + "/slurm-%j.log",
        "chdir": str(Path.cwd()),
        "export": "ALL",
        **job.sbatch,
    }
    written = [f"--{key}={value}" for key, value in options.items() if value]
    bare = [f"--{key}" for key, value in job.sbatch.items() if not value]  # sbatch.exclusive=
    return ["sbatch", "--parsable", *written, *bare, str(SCRIPT), *overrides]


def _range(job: Job) -> str:
    fewest, most = job.nodes
    return str(fewest) if fewest == most else f"{fewest}-{most}"


def examining(job: Job) -> Job:
    """A job of the same size that runs once: the doctor has nothing to go on with."""
    once = replace(job, sbatch={**job.sbatch, "no-requeue": ""})
    if job.time and (job.seconds is None or job.seconds > _DOCTOR_MINUTES * 60):
        return replace(once, time=str(_DOCTOR_MINUTES), seconds=_DOCTOR_MINUTES * 60, warning=60)
    return once


def settings(job: Job) -> dict[str, str]:
    """What the script takes from the environment, which is not on any command line."""
    variables = {
        "LDM_FINETUNE_PYTHON": sys.executable,
        "LDM_FINETUNE_RETRIES": str(job.retries),
        "LDM_FINETUNE_REQUEUES": str(job.requeues),
    }
    return variables if job.gpus else {**variables, "LDM_FINETUNE_PROCESSES": str(job.processes)}


def without_job(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment without what a surrounding job left in it, which the new one would inherit."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
    return {key: value for key, value in environ.items() if not key.startswith("SLURM_") or key in kept}
