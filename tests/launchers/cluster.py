"""A real Slurm for tests: one controller and two nodes on this machine, with their own keys, ports and folders.

Nothing of the machine's own Slurm is touched, and nothing is left when `stop` returns. The nodes claim two GPUs
each that are plain files, so that jobs which ask for GPUs can be queued too.
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
NODES = ("node1", "node2")
_SYSTEM = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={controller}
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdPidFile={root}/%n.pid
SlurmdLogFile={root}/%n.log
SlurmdSpoolDir={root}/%n
StateSaveLocation={root}/state
SlurmdParameters=config_overrides
SlurmctldParameters=allow_user_triggers
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,preempt_youngest_first
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
GresTypes=gpu
JobRequeue=1
ReturnToService=2
KillWait=30
OverTimeLimit=0
MinJobAge=600
InactiveLimit=0
WaitTime=0
SlurmctldTimeout=120
SlurmdTimeout=300
MessageTimeout=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=1-00:00:00 PriorityTier=1 GraceTime={grace} State=UP
PartitionName=urgent Nodes={names} MaxTime=1:00:00 PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=small Nodes={first} MaxTime=0:30:00 MaxNodes=1 PriorityTier=1 State=UP
"""


def missing() -> list[str]:
    """Programs that a cluster needs and this machine lacks."""
    return [name for name in NEEDED if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), _SYSTEM])


class Cluster:
    """A running Slurm. `environment` is what its commands need; `run` calls one of them."""

    def __init__(self) -> None:
        # A socket's path may have 107 bytes: pytest's own folders are too deep.
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **{
                key: value
                for key, value in os.environ.items()
                if not key.startswith(("SLURM_", "SBATCH_", "SRUN_"))
            },
            "SLURM_CONF": str(self.root / "slurm.conf"),
            "PATH": _path(),
        }

    def start(self, *, grace: int = 120) -> None:
        """Start the daemons and wait until both nodes are idle."""
        ports = _free_ports(1 + len(NODES))
        host = socket.gethostname()
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=64000 Gres=gpu:2"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        values = {
            "host": host,
            "user": getpass.getuser(),
            "root": self.root,
            "controller": ports[0],
            "nodes": nodes,
            "names": ",".join(NODES),
            "first": NODES[0],
            "grace": grace,
        }
        (self.root / "slurm.conf").write_text(_CONFIG.format(**values))
        for number in range(2):  # Slurm wants a device's file to be there, not that it is one
            (self.root / f"gpu{number}").touch()
        (self.root / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File={self.root}/gpu[0-1]\n")
        for name in NODES:
            (self.root / name).mkdir()
        (self.root / "state").mkdir()
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        here = str(self.root)
        self._daemon(
            "munged",
            *("--foreground", "--force", f"--key-file={key}", f"--socket={here}/munge.socket"),
            *(f"--pid-file={here}/munged.pid", f"--log-file={here}/munged.log", f"--seed-file={here}/munged.seed"),
        )
        _wait(lambda: (self.root / "munge.socket").exists(), 30, self.logs)
        self._daemon("slurmctld", "-D", "-i")
        for name in NODES:
            self.nodes[name] = self._daemon("slurmd", "-D", "-N", name)
        _wait(self._idle, 60, self.logs)

    def lose(self, node: str) -> None:
        """Kill a node's daemon and what it runs, as if its power had failed; Slurm need not wait to find out."""
        self.nodes[node].kill()
        self.nodes[node].wait()
        log = str(self.root / f"{node}.log")
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.name().startswith("slurmstepd") and log in {file.path for file in process.open_files()}:
                    for child in [process, *process.children(recursive=True)]:
                        child.kill()
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def recover(self, node: str) -> None:
        """Bring a lost node back."""
        self.nodes[node] = self._daemon("slurmd", "-D", "-N", node)
        self.run("scontrol", "update", f"nodename={node}", "state=resume")

    def stop(self) -> None:
        """End the daemons, their jobs, and every process that came from those."""
        for daemon in self.daemons:
            daemon.kill()  # told to end, they would wait for their jobs
        for daemon in self.daemons:
            daemon.wait()
        while strays := self._strays():
            for process in strays:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(strays, 5)
        shutil.rmtree(self.root, ignore_errors=True)

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        """stdout of a Slurm command."""
        done = subprocess.run(
            list(command), env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def job(self, number: str | int) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(number))
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def logs(self) -> str:
        """The last lines of each daemon's log."""
        parts = [f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.root.glob("*.log"))]
        return "\n".join(parts)

    def _idle(self) -> bool:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%T"],
            env=self.environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return done.stdout.split() == ["idle"] * len(NODES)

    def _daemon(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        path = shutil.which(program, path=_path())
        assert path is not None, program
        out = (self.root / f"{program}-{len(self.daemons)}.out.log").open("wb")
        self.daemons.append(
            subprocess.Popen(
                [path, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                preexec_fn=_die_with_the_tests,
            )
        )
        return self.daemons[-1]

    def _strays(self) -> list[psutil.Process]:
        """Processes of jobs, by their environment, and their steps' managers, by the log that they write to.

        Both leave the daemons' process tree.
        """
        mark = str(self.root / "slurm.conf")
        daemons = {os.getpid(), *(daemon.pid for daemon in self.daemons)}
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid in daemons:
                    continue
                if process.name().startswith("slurm"):
                    ours = any(Path(file.path).is_relative_to(self.root) for file in process.open_files())
                else:
                    ours = process.environ().get("SLURM_CONF") == mark
                if ours:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
                continue
        return found


def _die_with_the_tests() -> None:
    """Runs in a daemon before it becomes one: killed with SIGKILL, the tests can't stop it themselves."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _wait(ready: Callable[[], bool], seconds: float, explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"Slurm did not start in {seconds:g} s\n{explain()}")
        time.sleep(0.1)
