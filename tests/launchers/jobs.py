"""Jobs of launchers/slurm/train.sbatch in tests: submit one, wait for it, look at its processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.conftest import ROOT, environment
from tests.launchers.cluster import Cluster

SCRIPT = ROOT / "launchers" / "slurm" / "train.sbatch"


def job_environment(cluster: Cluster, **more: str) -> dict[str, str]:
    """What a job gets from who submits it: one process a node on the CPU, and no waiting between tries."""
    ours = {"LDM_FINETUNE_PROCESSES": "1", "LDM_FINETUNE_RETRY_SECONDS": "0", "LDM_FINETUNE_PYTHON": sys.executable}
    return {**environment(), **cluster.environment, **_quiet(), **ours, **more}


def _quiet() -> dict[str, str]:
    return {
        key: environment()[key]
        for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "WANDB_MODE")
    }


@dataclass
class Job:
    """A submitted job. `run` is its run folder."""

    cluster: Cluster
    number: str
    run: Path
    log: Path
    environment: dict[str, str] = field(repr=False, default_factory=dict)

    @classmethod
    def submit(cls, cluster: Cluster, run: Path, overrides: Sequence[str], *options: str, **variables: str) -> Job:
        """`sbatch OPTIONS launchers/slurm/train.sbatch OVERRIDES run.dir=RUN`, from the repository's root."""
        log = run.with_suffix(".log")
        environ = job_environment(cluster, **variables)
        command = ["sbatch", "--parsable", f"--output={log}", *options, str(SCRIPT), *overrides, f"run.dir={run}"]
        done = subprocess.run(
            command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return cls(cluster, done.stdout.strip(), run, log, environ)

    def lines(self) -> int:
        """Lines of metrics.jsonl."""
        file = self.run / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""  # a kill may cut a sign

    def state(self) -> dict[str, str]:
        return self.cluster.job(self.number)

    def until(self, true: Callable[[], bool], what: str, seconds: float = 120) -> None:
        """Wait; the job must not end before it is true."""
        deadline = time.monotonic() + seconds
        while not true():
            ended = self.state()["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
            assert not ended or true(), f"ended before: {what}\n{self.text()}"
            assert time.monotonic() < deadline, f"no {what} in {seconds:g} s: {self.state()}\n{self.text()}"
            time.sleep(0.1)

    def until_line(self, count: int) -> None:
        """Wait for `count` lines of metrics."""
        self.until(lambda: self.lines() >= count, f"{count} lines of metrics")

    def end(self, seconds: float = 240) -> str:
        """Wait for the end: COMPLETED, FAILED, CANCELLED or TIMEOUT."""
        deadline = time.monotonic() + seconds
        while (state := self.state()["JobState"]) not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
            assert time.monotonic() < deadline, f"{self.state()}\n{self.text()}"
            time.sleep(0.2)
        return state

    def workers(self) -> dict[int, psutil.Process]:
        """Training processes by rank."""
        found = {}
        wanted = {"SLURM_JOB_ID": self.number, "SLURM_CONF": self.cluster.environment["SLURM_CONF"]}
        for process in psutil.process_iter():
            try:
                environ = process.environ()
                ours = all(environ.get(key) == value for key, value in wanted.items())
                if ours and "RANK" in environ and "finetune.train" in process.cmdline():
                    found[int(environ["RANK"])] = process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found
