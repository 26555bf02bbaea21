"""What is asked of Slurm's commands: the partitions, a place in the queue, and how a job is doing."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune import UserError
from launchers.slurm.settings import Job, limit_seconds, memory_bytes

ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
)
_LOG_SECONDS, _QUEUE_SECONDS = 1.0, (2.0, 15.0)  # between looks; at the queue more seldom as time goes by


@dataclass(frozen=True)
class Node:
    """What one node of a partition has; `mem` in bytes, `gpus` by type ("" where types are not named)."""

    name: str
    cpus: int
    mem: int
    gpus: Mapping[str, int]
    features: frozenset[str]

    def gpus_of(self, kind: str) -> int:
        return self.gpus.get(kind, 0) if kind else sum(self.gpus.values())


@dataclass(frozen=True)
class Partition:
    """`limit` in seconds, None without one; `most_nodes` that a job may have, None without a bound."""

    name: str
    limit: int | None
    most_nodes: int | None
    nodes: Sequence[Node]


def partitions(environ: Mapping[str, str]) -> tuple[list[Partition], str]:
    """All partitions that Slurm shows, and the name of the default one; none where there is no Slurm to ask."""
    shown = ask(environ, "sinfo", "--noheader", "--Node", "--format=%N|%R|%P|%c|%m|%G|%f|%l|%s")
    found: dict[str, tuple[int | None, int | None, list[Node]]] = {}
    default = ""
    for line in shown.splitlines():
        words = [word.strip() for word in line.split("|")]
        if len(words) != 9:
            continue
        name, partition, starred, cpus, mem, gres, features, limit, size = words
        if starred.endswith("*"):
            default = partition
        most = size.rpartition("-")[2]
        node = Node(name, _leading(cpus), _leading(mem) * 2**20, gpus_in(gres), frozenset(features.split(",")))
        seconds = limit_seconds(limit) if limit not in ("n/a", "") else None
        bound = int(most) if most.isdecimal() else None
        found.setdefault(partition, (seconds, bound, []))[2].append(node)
    return [Partition(name, *rest) for name, rest in found.items()], default


def gpus_in(gres: str) -> dict[str, int]:
    """GPUs by type in what `sinfo` says of a node, as "gpu:a100:8(S:0-1),nic:2"."""
    counts: dict[str, int] = {}
    for match in re.finditer(r"(?:^|,)gpu(?::([^:,()]+))??(?::(\d+))?(?=[(,]|$)", gres):
        kind, count = match[1] or "", int(match[2] or 1)
        counts[kind] = counts.get(kind, 0) + count
    return counts


def check(job: Job, known: Sequence[Partition], default: str) -> None:
    """Refuse what no node or partition can give.

    Raises:
        UserError: the setting, and what there is.
    """
    if not known:
        return
    name = job.partition or default
    by_name = {partition.name: partition for partition in known}
    if "," in name or not name:  # Slurm takes the first of several that can run it: it judges best
        return
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(by_name)}"
        raise UserError(f"partition={name} is not known to Slurm: {hint}")
    partition = by_name[name]
    here = f"partition {name}"
    if job.seconds is not None and partition.limit is not None and job.seconds > partition.limit:
        raise UserError(f"time={job.time} is more than {here} allows: {clock(partition.limit)}")
    fewest = job.nodes[0]
    if partition.most_nodes is not None and fewest > partition.most_nodes:
        raise UserError(f"nodes={fewest} is more than a job may have in {here}: {partition.most_nodes}")
    if fewest > len(partition.nodes):
        raise UserError(f"nodes={fewest} is more than {here} has: {len(partition.nodes)}")
    if job.gpu_type and not any(node.gpus_of(job.gpu_type) for node in partition.nodes):
        kinds = sorted({kind for node in partition.nodes for kind in node.gpus if kind})
        there = f": it has {', '.join(kinds)}" if kinds else ", which names no types"
        raise UserError(f"gpus={job.gpu_type}:{job.gpus}: no GPU of that type in {here}{there}")
    needs: list[tuple[str, str, Callable[[Node], float], float]] = [
        ("gpus", "GPUs", lambda node: node.gpus_of(job.gpu_type), job.gpus),
        ("cpus", "CPUs", lambda node: node.cpus, job.cpus),
        ("mem", "GiB", lambda node: node.mem / 2**30, memory_bytes(job.mem) / 2**30 if job.mem else 0),
    ]
    for key, unit, has, wanted in needs:
        largest = max(map(has, partition.nodes))
        if wanted > largest:
            written = {"gpus": job.gpus, "cpus": job.cpus, "mem": job.mem}[key]
            raise UserError(f"{key}={written} is more than any node of {here} has: {largest:g} {unit}")
    fitting = [node for node in partition.nodes if all(has(node) >= wanted for _, _, has, wanted in needs)]
    if len(fitting) < fewest:
        raise UserError(f"nodes={fewest}: only {len(fitting)} nodes of {here} have what each is to have")


def submit(command: Sequence[str], environ: Mapping[str, str]) -> str:
    """Run sbatch and return the job's number.

    Raises:
        UserError: Slurm is not here, or refuses, in one line.
    """
    if shutil.which("sbatch", path=environ.get("PATH")) is None:
        raise UserError("sbatch is not found: start this on a machine of the cluster, or look with --dry-run")
    done = subprocess.run(command, env=dict(environ), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines()]
        said = [line for line in lines if line.strip()] or [f"exit code {done.returncode}"]
        raise UserError(f"Slurm refuses the job: {'; '.join(dict.fromkeys(said))}")
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)
    return done.stdout.strip().splitlines()[-1].partition(";")[0]


@dataclass
class Seen:
    """What Slurm says of a job. `code`: its exit code as a shell says it; None while it has none."""

    state: str
    reason: str
    nodes: str
    code: int | None


def look(number: str, environ: Mapping[str, str]) -> Seen | None:
    """A job's state; None when Slurm doesn't say."""
    shown = ask(environ, "scontrol", "--oneliner", "show", "job", number)
    said = dict(re.findall(r"(?:^|\s)(JobState|Reason|NodeList|ExitCode)=(\S*)", shown))
    if "JobState" not in said:  # forgotten some minutes after its end; the accounting remembers, where there is one
        words = ask(environ, "sacct", "-nPX", "-j", number, "-o", "State,ExitCode").strip().split("|")
        if len(words) != 2:
            return None
        said = {"JobState": words[0].split()[0], "ExitCode": words[1]}
    state = said["JobState"]
    code, _, signal = said.get("ExitCode", "0:0").partition(":")
    number_of = (int(code) if code.isdecimal() else 1) or (
        128 + int(signal) if signal.isdecimal() and int(signal) else 0
    )
    if state in ENDED and state != "COMPLETED":
        number_of = number_of or 1
    return Seen(state, said.get("Reason", ""), said.get("NodeList", ""), number_of if state in ENDED else None)


def follow(number: str, log: Path, environ: Mapping[str, str], write: Callable[[bytes], object]) -> int:
    """Pass on a job's log until the job ends, requeued or not, and return the job's exit code."""
    position, told, ended, silent = 0, "", 0, 0
    pause, next_look = _QUEUE_SECONDS[0], 0.0
    while True:
        position = _pass_on(log, position, write)
        if time.monotonic() < next_look:
            time.sleep(_LOG_SECONDS)
            continue
        seen = look(number, environ)
        silent = silent + 1 if seen is None else 0
        if seen is None and silent >= 20:
            raise UserError(f"Slurm says nothing of job {number} any more; its log is {log}")
        if seen is not None:
            # A job that is requeued shows the end of its last run for a moment.
            ended = ended + 1 if seen.code is not None else 0
            if ended == 2:
                _pass_on(log, position, write)
                return seen.code or 0
            line = _told(seen)
            if line != told and line:
                write(f"job {number}: {line}\n".encode())
                told, pause = line, _QUEUE_SECONDS[0]
        pause = _QUEUE_SECONDS[0] if ended or seen is None else min(pause * 1.3, _QUEUE_SECONDS[1])
        next_look = time.monotonic() + pause


def _told(seen: Seen) -> str:
    match seen.state:
        case "PENDING":
            return f"waits ({seen.reason})"
        case "RUNNING":
            return f"runs on {seen.nodes}"
        case "REQUEUE_HOLD" | "SPECIAL_EXIT":
            return f"is held ({seen.reason}): scontrol release lets it go on"
    return ""


def _pass_on(log: Path, position: int, write: Callable[[bytes], object]) -> int:
    """Write what the log has from `position` on; where it ends now."""
    try:
        with log.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            position = position if size >= position else 0  # written anew
            file.seek(position)
            while block := file.read(2**16):
                write(block)
                position += len(block)
    except OSError:
        pass
    return position


def clock(seconds: int) -> str:
    """Seconds as Slurm writes a limit."""
    days, rest = divmod(seconds, 86_400)
    text = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{text}" if days else text


def ask(environ: Mapping[str, str], *words: str) -> str:
    """What a command of Slurm's prints; nothing when it is not there or does not answer in a minute."""
    try:
        return subprocess.run(
            words, env=dict(environ), capture_output=True, text=True, timeout=60, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _leading(text: str) -> int:
    """The number that sinfo's "64+" starts with."""
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 0
