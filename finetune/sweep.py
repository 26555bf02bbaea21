"""`finetune train --multirun`: one run for each point of a sweep, here one after the other or as jobs of Slurm.

Hydra enumerates the points and its launchers start them, submitit's among them. What a launcher starts is `point`,
whose work is one `finetune train` in processes of its own. A point's run folder is named by its values:
the same command goes on where an earlier one stopped.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from finetune import INTERRUPTED, STOPPED, UserError, first_line
from finetune.config import Config, compose, conf_dir, is_free_form, parse_override, quoted
from finetune.terminal import require_settings

USAGE = """\
usage: finetune train --multirun KEY=VALUE,VALUE ... [hydra/launcher=submitit_slurm hydra.launcher.KEY=VALUE ...]

One run for each combination of values. A run's folder is run.dir/KEY=VALUE; the same command goes on where an
earlier one stopped. Without a launcher the runs come one after the other, here, each of as many processes as
LDM_FINETUNE_PROCESSES says (1).

examples:
  finetune train --multirun experiment=smoke data.shards=LATENTS run.dir=sweeps/lr optim.lr=1e-4,3e-5
  finetune train --multirun ... optim.lr=1e-4,3e-5 seed=0,1 hydra/launcher=submitit_slurm \\
    hydra.launcher.partition=gpu hydra.launcher.gpus_per_node=8 hydra.launcher.timeout_min=720

On Slurm a job has one task on each node (hydra.launcher.nodes), which starts a process for each GPU; without GPUs
LDM_FINETUNE_PROCESSES says how many. It needs `pip install ldm-finetune[slurm]`.
"""
_SUBMITIT = "hydra/launcher=submitit_slurm"
_SLURM = {  # unless they are given
    "hydra.launcher.max_num_timeout": "100000",  # a run knows where it stands: the time limit is no failure
    "hydra.launcher.stderr_to_stdout": "true",
    "hydra.launcher.additional_parameters.requeue": "true",
}
_RETRIES = 3
_ASKED_TIMES, _ASKED_SECONDS = 18, 10.0  # of a controller that does not answer


def main(words: Sequence[str]) -> int:
    """Run a sweep.

    Args:
        words: overrides, of which some name several values, and Hydra's own (`hydra/launcher=...`, `hydra.*`).

    Raises:
        UserError: a point that does not compose, a launcher that is not there, a point that failed.
    """
    if any(word in ("-h", "--help") for word in words):
        print(USAGE, end="")
        return 0
    require_settings(words, "finetune train --multirun")
    if (size := os.environ.get("WORLD_SIZE", "1")) != "1":  # each process would start the whole sweep
        raise UserError(
            f"--multirun starts the processes of each run itself: leave torchrun or accelerate launch out, and set "
            f"LDM_FINETUNE_PROCESSES={size}"
        )
    ours = [word for word in words if not _is_hydras(word)]
    swept, points = enumerate_points(ours)
    composed = [compose("train", point, Config)[0] for point in points]
    from finetune import build  # it loads torch and diffusers, which --help does without

    for each in composed:
        build.check(each)
    folder, name = Path(composed[0].run.dir).absolute(), composed[0].run.name
    os.environ.setdefault("WANDB_RUN_GROUP", name)
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")  # the one that training saves at
    given = [word for word in words if _is_hydras(word)]
    keys = {word.partition("=")[0].lstrip("+") for word in given}
    excluded = sorted({parse_override(word)[0].key_or_group for word in ours} - set(swept))
    settings = {
        "hydra.sweep.dir": quoted(str(folder)),
        "hydra.sweep.subdir": "'${hydra.job.override_dirname}'",
        "hydra.job.config.override_dirname.exclude_keys": "[" + ",".join(map(quoted, excluded)) + "]",
        "hydra.output_subdir": "null",
        "hydra/job_logging": "stdout",
        **(_SLURM if _SUBMITIT in given else {}),
    }
    given += [
        f"{'++' if 'additional' in key else ''}{key}={text}" for key, text in settings.items() if key not in keys
    ]
    argv, sys.argv = sys.argv, ["finetune train", "--multirun", *given, *map(_hydras, ours)]
    full, os.environ["HYDRA_FULL_ERROR"] = os.environ.get("HYDRA_FULL_ERROR"), "1"  # else Hydra exits by itself
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")(point)()
    except (HydraException, OmegaConfBaseException) as error:
        if re.search("launcher/submitit_(slurm|local)'", str(error)):
            raise UserError(f"{first_line(error)}: pip install ldm-finetune[slurm]") from None
        raise UserError(first_line(error)) from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.output or b"").decode(errors="replace").strip().splitlines() or [str(error)]
        raise UserError(f"Slurm refuses the sweep: {said[-1]}") from None
    except RuntimeError as error:  # submitit's: no Slurm here, a job that failed
        raise UserError(_cause(error)) from None
    finally:
        sys.argv = argv
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
    print(f"sweep: {folder}, {len(points)} runs")
    return 0


def enumerate_points(words: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """(keys with several values, the overrides of each point).

    Raises:
        UserError: no key has several values, or one twice; the folder of all runs has; values without an end.
    """
    swept: list[str] = []
    choices: list[list[str]] = []
    for word in words:
        override, text = parse_override(word)
        if not override.is_sweep_override():
            choices.append([text])
            continue
        key = override.key_or_group
        if key == "run.dir":
            raise UserError(f"'{word}' names several folders: run.dir holds the whole sweep, a folder for each run")
        if not override.is_discrete_sweep():
            raise UserError(f"'{word}' is a range without steps: name its values, as in {key}=1e-4,3e-5")
        swept.append(key)
        values = list(override.sweep_string_iterator())
        if twice := [value for value in values if values.count(value) > 1]:
            raise UserError(f"'{word}' names {twice[0]} twice: each run has its own folder, named by its values")
        choices.append([f"{override.get_key_element()}={value}" for value in values])
    if not swept:
        raise UserError("--multirun has nothing to sweep: name several values, as in optim.lr=1e-4,3e-5")
    return swept, [list(each) for each in itertools.product(*choices)]


def point(config: DictConfig) -> None:
    """Train one point to its end. What Hydra's launchers call, here or in a job.

    Raises:
        UserError: the run failed.
        KeyboardInterrupt: Ctrl-C reached it; what it had trained is saved.
    """
    settings = HydraConfig.get()
    folder = str(settings.runtime.output_dir)
    overrides = [word for word in settings.overrides.task if not re.match(r"(run\.dir|run\.name)=", word)]
    overrides += [f"run.dir={quoted(folder)}"]
    overrides += [f"run.name={quoted(f'{config.run.name} {settings.job.override_dirname}')}"]
    told: list[int] = []
    in_slurm = os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
    requeue: Any = signal.getsignal(signal.SIGUSR1)  # submitit's, in a job of its
    if in_slurm:
        # The signal reaches the run's own processes too; when they have saved is when to act on it.
        signal.signal(signal.SIGUSR1, lambda number, frame: told.append(number))
    retries = int(os.environ.get("LDM_FINETUNE_RETRIES") or _RETRIES) if in_slurm else 0
    for attempt in range(retries + 1):
        code = STOPPED if told else _call(_command(os.environ, attempt, overrides))
        if told and code not in (0, 2):
            code = STOPPED  # a process that was just starting, or failed while saving, has not said so
        if code in (0, 2, STOPPED):
            break
        print(f"{folder}: exit code {code}, try {attempt + 1} of {retries + 1}", file=sys.stderr, flush=True)
    if code == STOPPED and in_slurm and callable(requeue) and _may_requeue():
        requeue(signal.SIGUSR1, None)  # exits on the first node
        time.sleep(120)  # Slurm ends the others
    if code:
        stopped = ": stopped; the same command goes on" if code == STOPPED else f" failed with exit code {code}"
        raise UserError(f"{folder}{stopped}")


def _call(command: Sequence[str]) -> int:
    """As `subprocess.call`, which kills a quarter of a second after Ctrl-C what Ctrl-C has told to save as well."""
    process, interrupted = subprocess.Popen(command), False
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            interrupted = True
    if interrupted or code in (INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt  # so that no other run begins
    return code


def _command(environ: Mapping[str, str], attempt: int, overrides: Sequence[str]) -> list[str]:
    """The command line of a run on this node."""
    if environ.get("SUBMITIT_EXECUTOR") == "slurm":
        node = ["-m", "launchers.slurm.node", "--plain-codes", f"--attempt={attempt}", "--"]
        return [sys.executable, *node, *overrides]
    train = ["-m", "finetune.train", *overrides]
    processes = environ.get("LDM_FINETUNE_PROCESSES", "1")
    if processes == "1":
        return [sys.executable, *train]
    return [sys.executable, "-m", "launchers.torchrun", "--standalone", f"--nproc-per-node={processes}", *train]


def _may_requeue() -> bool:
    """Whether Slurm leaves the job to us. One that was cancelled would rise again, and one that Slurm has requeued
    needs no help; both are shown as COMPLETING. The time limit is the one end to undo."""
    asks = ["scontrol", "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"]]
    for _ in range(_ASKED_TIMES):
        if shown := subprocess.run(asks, capture_output=True, text=True, check=False).stdout.split():
            break
        time.sleep(_ASKED_SECONDS)  # a controller that does not answer, while it is started anew, says nothing
    return "JobState=RUNNING" in shown or "Reason=TimeLimit" in shown


def _is_hydras(word: str) -> bool:
    return re.match(r"[+~]*hydra[./]", word) is not None


def _hydras(word: str) -> str:
    """An override as Hydra itself must be told: free-form keys may be new."""
    override: Override
    override, text = parse_override(word)
    new = is_free_form(override.key_or_group, Config) and text.startswith(override.key_or_group)
    return f"++{text}" if new else text


def _cause(error: RuntimeError) -> str:
    """Of submitit's message, which holds a job's whole traceback, the line that says it."""
    lines = [line.strip() for line in str(error).splitlines() if "UserError: " in line]
    return lines[-1].partition("UserError: ")[2] if lines else first_line(error)
