"""What a job asks of Slurm, as KEY=VALUE words, and what of it can't be right whatever the cluster is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from finetune import UserError

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
WARNING_S = 300  # before the time limit; train.sbatch says the same
_SHORTEST_SECONDS = 60  # between the start of a job and its warning


@dataclass(frozen=True)
class Job:
    """A job's size and place.

    Attributes:
        nodes: (fewest, most).
        gpus, gpu_type: GPUs a node; 0 for none.
        processes: on each node; as many as GPUs, unless there are none.
        time: as Slurm writes it; empty for the partition's default. The same as `seconds`; None without a limit.
        warning: seconds before the limit at which the run is told to save.
        cpus, mem: CPUs and memory a node, as Slurm writes memory; 0 and empty for the partition's default.
        retries, requeues: after failures: tries in one allocation beyond the first, and further allocations.
        sbatch: further options of sbatch by their long names.
    """

    nodes: tuple[int, int]
    gpus: int
    gpu_type: str
    processes: int
    time: str
    seconds: int | None
    warning: int
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    cpus: int = 0
    mem: str = ""
    name: str = ""
    log: str = ""
    retries: int = 3
    requeues: int = 2
    sbatch: Mapping[str, str] = field(default_factory=dict)


KEYS = {
    "nodes": "how many, or from-to as 2-4: the run goes on with what it is given (default 1)",
    "gpus": "a node, with the type if it matters: 8 or a100:8",
    "processes": "a node, for a job without GPUs",
    "time": "limit, in Slurm's ways: 90 (minutes), 24:00:00, 2-12 (days-hours); default: the partition's",
    "signal": "seconds before the limit at which it saves and is requeued "
    f"(default {WARNING_S}; a fifth of short limits)",
    "partition": "",
    "account": "",
    "qos": "",
    "constraint": "features that nodes must have",
    "cpus": "a node",
    "mem": "a node, as 480G",
    "name": "of the job (default: run.name)",
    "log": "folder of slurm-JOB.log (default: run.dir)",
    "retries": "further tries in the same allocation after a failure (default 3)",
    "requeues": "further allocations after all tries of one have failed (default 2)",
    "sbatch.OPTION": "any other option of sbatch by its long name, as sbatch.mail-type=END",
}
_RESERVED = {
    "nodes": "nodes",
    "ntasks": "processes",
    "ntasks-per-node": "processes",
    "gpus": "gpus",
    "gpus-per-node": "gpus",
    "time": "time",
    "signal": "signal",
    "partition": "partition",  # checked against what there is, as cpus and mem are
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "cpus-per-task": "cpus",
    "mem": "mem",
    "job-name": "name",
    "output": "log",
    "error": "log",
    "export": "",
    "requeue": "",
    "no-requeue": "",
    "open-mode": "",
    "wrap": "",
    "array": "",
    "parsable": "",
    "chdir": "",
}


def read(words: Sequence[str]) -> Job:
    """A job from KEY=VALUE words.

    Raises:
        UserError: an unknown key, with the nearest known one; a value that is none; no GPUs and no processes.
    """
    given, extra = _parsed(words)
    gpu_type, _, gpu_text = given.get("gpus", "0").rpartition(":")
    gpus = _count("gpus", gpu_text, least=0, whole=given.get("gpus"))
    if not gpus and "processes" not in given:
        raise UserError("say gpus=N (a node), or processes=N (a node) for a job without GPUs")
    if gpus and "processes" in given:
        raise UserError(
            f"processes={given['processes']} with gpus={given['gpus']}: a process has one GPU; leave processes out"
        )
    processes = gpus or _count("processes", given["processes"], least=1)
    time = given.get("time", "")
    seconds = limit_seconds(time) if time else None
    warning = _warning(given.get("signal"), time, seconds)
    cpus = _count("cpus", given["cpus"], least=1) if "cpus" in given else 0
    if "mem" in given:
        memory_bytes(given["mem"])
    plain = {"partition", "account", "qos", "constraint", "mem", "name", "log"} & given.keys()
    counts = {key: _count(key, given[key], least=0) for key in ("retries", "requeues") if key in given}
    return Job(
        nodes=node_range(given.get("nodes", "1")),
        gpus=gpus,
        gpu_type=gpu_type,
        processes=processes,
        time=time,
        seconds=seconds,
        warning=warning,
        cpus=cpus,
        sbatch=extra,
        **{key: given[key] for key in plain},  # type: ignore[arg-type]
        **counts,  # type: ignore[arg-type]
    )


def _parsed(words: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Values of our own keys, and of sbatch's options (`sbatch.OPTION=VALUE`).

    Raises:
        UserError: see `read`.
    """
    known = [name for name in KEYS if name != "sbatch.OPTION"]
    given: dict[str, str] = {}
    extra: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"cannot read '{word}': settings are KEY=VALUE; the run's overrides come after --")
        if key.startswith("sbatch."):
            option = key.removeprefix("sbatch.").removeprefix("--")
            if option in _RESERVED:
                ours = _RESERVED[option]
                raise UserError(
                    f"{key}={value}: " + (f"say {ours}=..." if ours else "the launcher sets that itself")
                )
            extra[option] = value
        elif key not in known:
            if "." in key:
                raise UserError(f"unknown setting '{key}': overrides of the run come after --")
            near = difflib.get_close_matches(key, known, n=1)
            hint = (
                f"did you mean '{near[0]}'?"
                if near
                else f"overrides of the run come after --; settings of the job are {', '.join(KEYS)}"
            )
            raise UserError(f"unknown setting '{key}': {hint}")
        elif key in given:
            raise UserError(f"{key} is given twice, as {given[key]} and {value}")
        elif not value:
            raise UserError(f"{key}= has no value")
        else:
            given[key] = value
    return given, extra


def node_range(text: str) -> tuple[int, int]:
    """(fewest, most) of "4" or "2-4".

    Raises:
        UserError: no such range, or zero nodes.
    """
    first, dash, last = text.partition("-")
    fewest = _count("nodes", first, least=1, whole=text)
    most = _count("nodes", last, least=1, whole=text) if dash else fewest
    if most < fewest:
        raise UserError(f"nodes={text} ends below its start: write the smaller number first")
    return fewest, most


def limit_seconds(text: str) -> int | None:
    """Seconds of a time limit as Slurm reads it; None for one without an end.

    Raises:
        UserError: not one of Slurm's forms, or no time at all.
    """
    if text.lower() in ("unlimited", "infinite"):
        return None
    minutes = re.fullmatch(r"(?P<m>\d+)(:(?P<s>\d+))?", text)
    hours = re.fullmatch(r"(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)", text)
    days = re.fullmatch(r"(?P<d>\d+)-(?P<h>\d+)(:(?P<m>\d+)(:(?P<s>\d+))?)?", text)
    match = minutes or hours or days
    if match is None:
        raise UserError(
            f"time={text} is not a time limit: write minutes (90), hours:minutes:seconds (24:00:00) or "
            "days-hours[:minutes] (2-12)"
        )
    parts = {key: int(value) for key, value in match.groupdict().items() if value}
    seconds = sum(parts.get(key, 0) * size for key, size in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)))
    if seconds == 0:
        raise UserError(f"time={text} leaves no time: give at least 2 minutes")
    return seconds


def memory_bytes(text: str) -> int:
    """Bytes of Slurm's 480G; a plain number is MiB.

    Raises:
        UserError: it is no amount of memory.
    """
    match = re.fullmatch(r"(\d+)([KMGTkmgt]?)[bB]?", text)
    if match is None:
        raise UserError(f"mem={text} is not an amount of memory: write 480G or 500000M")
    return int(match[1]) * UNITS[match[2].upper() or "M"]


def _warning(text: str | None, time: str, seconds: int | None) -> int:
    """Seconds before the limit. A run that is warned as it starts would be requeued for ever."""
    warning = min(WARNING_S, (seconds or 86_400) // 5) if text is None else _count("signal", text, least=1)
    if warning > 65_535:
        raise UserError(f"signal={warning} is more than Slurm's 65535 seconds")
    if seconds is not None and seconds - warning < _SHORTEST_SECONDS:
        said = f" and signal={text}" if text is not None else ""
        raise UserError(
            f"time={time}{said} leaves {max(seconds - warning, 0)} s before the run is told to stop: it would be "
            "requeued for ever; give more time" + (", or a smaller signal" if said else "")
        )
    return warning


def _count(key: str, text: str, *, least: int, whole: str | None = None) -> int:
    if not text.isdecimal() or int(text) < least:
        form = ", or a range as 2-4" if key == "nodes" else ", or TYPE:N" if key == "gpus" else ""
        raise UserError(f"{key}={whole or text} must be a number from {least}{form}")
    return int(text)
