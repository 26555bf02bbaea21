"""One node's part of a job: srun starts `python -m launchers.slurm.node [--attempt=N] -- OVERRIDES` once on each.

It starts `launchers.torchrun` with what Slurm says of the job. srun returns the highest exit code of its tasks; so
those that must be heard over the others are raised: 250 stands for 2 (a user's mistake) and 240 for 75 (stopped).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from finetune import STOPPED, UserError, run_cli
from launchers.slurm import queue

RAISED = {2: 250, STOPPED: 240}
"""Exit codes as srun's tasks say them, by those of training."""

# Slurm, or a terminal, sends these to every process of a step: this one is not the one to act on them.
_TOLD_TO_ALL = signal.SIGUSR1, signal.SIGTERM, signal.SIGINT

_FIRST_PORT, _PORTS = 15_000, 17_000  # below the ports that Linux gives to outgoing connections, from 32768
_PORTS_A_JOB = 17  # so that tries of jobs with neighbouring numbers, which may share a node, don't meet


def main(argv: Sequence[str]) -> int:
    """Run this node's processes and return their exit code, raised where srun must hear it."""
    parser = argparse.ArgumentParser(prog="python -m launchers.slurm.node")
    parser.add_argument("--attempt", type=int, default=0, help="tries of this allocation before this one")
    parser.add_argument("--plain-codes", action="store_true", help="leave exit codes as they are")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(list(argv))
    for number in _TOLD_TO_ALL:
        signal.signal(number, signal.SIG_IGN)
    code = subprocess.call(
        command(os.environ, given.attempt, given.overrides), preexec_fn=_restore, env=environment(os.environ)
    )
    code = 128 - code if code < 0 else code
    return code if given.plain_codes else RAISED.get(code, code)


def _restore() -> None:
    for number in _TOLD_TO_ALL:
        signal.signal(number, signal.SIG_DFL)


def command(environ: Mapping[str, str], attempt: int, overrides: Sequence[str]) -> list[str]:
    """The command line of this node's `launchers.torchrun`.

    Args:
        environ: of a task of a Slurm step.
        attempt: tries of this allocation before this one; moves the port, which may not be free again yet.

    Raises:
        UserError: this is no task of a Slurm step, or one of several on this node.
    """
    nodes, processes = _number(environ, "SLURM_STEP_NUM_NODES"), processes_per_node(environ)
    if _number(environ, "SLURM_STEP_NUM_TASKS") != nodes:
        raise UserError(
            f"Slurm started {environ['SLURM_STEP_NUM_TASKS']} tasks on {nodes} nodes: give srun "
            "--ntasks-per-node=1, since torchrun starts a node's processes"
        )
    module = environ.get("LDM_FINETUNE_MODULE") or "finetune.train"
    torchrun = [sys.executable, "-m", "launchers.torchrun", f"--nproc-per-node={processes}"]
    if nodes == 1:
        return [*torchrun, "--standalone", "-m", module, *overrides]
    # The static rendezvous makes the rank of a node its number in the job, so that rank 0 is on the first node.
    spread = [
        f"--nnodes={nodes}",
        f"--node-rank={_number(environ, 'SLURM_NODEID')}",
        f"--master-addr={head_address(environ)}",
        f"--master-port={port(environ, attempt)}",
    ]
    return [*torchrun, *spread, "-m", module, *overrides]


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What the processes get: all, with one thread each unless it is said how many, as torchrun would set it."""
    return {"OMP_NUM_THREADS": "1", **environ}


def processes_per_node(environ: Mapping[str, str]) -> int:
    """`LDM_FINETUNE_PROCESSES`, else the GPUs that the job has on this node, else one.

    Raises:
        UserError: the variable is not a number above zero.
    """
    if text := environ.get("LDM_FINETUNE_PROCESSES"):
        if not text.isdecimal() or int(text) < 1:
            raise UserError(f"LDM_FINETUNE_PROCESSES={text} must be a number of processes a node, from 1")
        return int(text)
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    return int(gpus) if gpus.isdecimal() and int(gpus) > 0 else 1


def head_address(environ: Mapping[str, str]) -> str:
    """Where the job's first node is reached: the address that Slurm itself uses for it, else its name."""
    hosts = queue.ask(os.environ, "scontrol", "show", "hostnames", environ["SLURM_JOB_NODELIST"]).split()
    if not hosts:
        raise UserError(f"Slurm does not name the nodes of {environ['SLURM_JOB_NODELIST']}: is its controller up?")
    shown = queue.ask(os.environ, "scontrol", "--oneliner", "show", "node", hosts[0])
    return next((word[9:] for word in shown.split() if word.startswith("NodeAddr=")), hosts[0])


def port(environ: Mapping[str, str], attempt: int) -> int:
    """A port that this try of this job has for itself."""
    restart = int(environ.get("SLURM_RESTART_COUNT") or 0)
    return _FIRST_PORT + (int(environ["SLURM_JOB_ID"]) * _PORTS_A_JOB + restart * 4 + attempt) % _PORTS


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{name} is not set: start this through srun, or sbatch launchers/slurm/train.sbatch")
    return int(text)


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
